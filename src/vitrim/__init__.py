"""vitrim: faster vision transformers by computing only the tokens that matter."""

import sys
from importlib.util import find_spec
from pathlib import Path

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
    try:
        from vitrim import tasks
        from vitrim.budget import Calibration
        from vitrim.budgets.calibrate import calibrate
        from vitrim.convert import (
            as_transformers,
            from_transformers,
            load_official,
            sparsify_inside,
        )
        from vitrim.features import FeaturesOnly, SimplePyramid
        from vitrim.methods.asvit import ASViTConfig
        from vitrim.methods.dense import DenseConfig
        from vitrim.methods.dynamic_spatial import DynamicSpatialConfig
        from vitrim.methods.dynamicvit import DynamicViTConfig
        from vitrim.methods.merging import MergingConfig
        from vitrim.methods.sait import SaiTConfig
        from vitrim.methods.spvit import SPViTConfig
        from vitrim.methods.spvit_pyramid import SPViTPyramidConfig
        from vitrim.methods.stvit import STViTConfig
        from vitrim.methods.stvit_r import STViTRConfig
        from vitrim.methods.stvit_swin import STViTSwinConfig
        from vitrim.methods.stvit_video import STViTVideoConfig
        from vitrim.model import SparseModel, Trace, from_pretrained, sparsify
    except KeyboardInterrupt:
        if Path(*sys.argv[:1]).stem in ("vitrim", "-m"):  # the command, which ends without a word
            raise SystemExit(130) from None
        raise


__version__ = "0.1.0"

__all__ = [
    "ASViTConfig",
    "Calibration",
    "CheckpointError",
    "ConfigError",
    "DenseConfig",
    "DynamicSpatialConfig",
    "DynamicViTConfig",
    "FeaturesOnly",
    "InputError",
    "MergingConfig",
    "MissingExtraError",
    "SPViTConfig",
    "SPViTPyramidConfig",
    "STViTConfig",
    "STViTRConfig",
    "STViTSwinConfig",
    "STViTVideoConfig",
    "SaiTConfig",
    "SimplePyramid",
    "SparseModel",
    "Trace",
    "TrainingError",
    "UnsupportedBackboneError",
    "VitrimError",
    "__version__",
    "as_transformers",
    "calibrate",
    "from_pretrained",
    "from_transformers",
    "load_official",
    "sparsify",
    "sparsify_inside",
    "tasks",
]
