"""vitrim: faster vision transformers by computing only the tokens that matter."""

from importlib.util import find_spec

from vitrim.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    MissingExtraError,
    TrainingError,
    UnsupportedBackboneError,
    VitrimError,
)

if find_spec("torch"):  # without it vitrim.runtime is there alone, for exported bundles
    from vitrim.budget import Calibration
    from vitrim.budgets.calibrate import calibrate
    from vitrim.convert import load_official
    from vitrim.methods.asvit import ASViTConfig
    from vitrim.methods.dynamic_spatial import DynamicSpatialConfig
    from vitrim.methods.dynamicvit import DynamicViTConfig
    from vitrim.methods.sait import SaiTConfig
    from vitrim.methods.spvit import SPViTConfig
    from vitrim.methods.spvit_pyramid import SPViTPyramidConfig
    from vitrim.methods.stvit import STViTConfig
    from vitrim.methods.stvit_r import STViTRConfig
    from vitrim.methods.stvit_swin import STViTSwinConfig
    from vitrim.model import SparseModel, Trace, from_pretrained, sparsify

__version__ = "0.1.0"

__all__ = [
    "ASViTConfig",
    "Calibration",
    "CheckpointError",
    "ConfigError",
    "DynamicSpatialConfig",
    "DynamicViTConfig",
    "InputError",
    "MissingExtraError",
    "SPViTConfig",
    "SPViTPyramidConfig",
    "STViTConfig",
    "STViTRConfig",
    "STViTSwinConfig",
    "SaiTConfig",
    "SparseModel",
    "Trace",
    "TrainingError",
    "UnsupportedBackboneError",
    "VitrimError",
    "__version__",
    "calibrate",
    "from_pretrained",
    "load_official",
    "sparsify",
]
