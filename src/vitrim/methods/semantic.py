"""What the forms of STViT share: semantic tokens stand for the patches.

Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View", CVPR 2023
(arXiv 2303.08685); see ``stvit.py``, ``stvit_swin.py`` and ``stvit_r.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrim.config import check_weights, normalise, require
from vitrim.errors import ConfigError
from vitrim.layers.semantic_windows import Windows, tokens_side, windows_of
from vitrim.methods.base import Method, answer_parts, with_total
from vitrim.methods.records import DenseOutput, FeatureOutput, PooledOutput, StageTrace
from vitrim.tokens.plain import Grid, Sizes

STAGE = 2
"""Of a backbone with windows, where semantic tokens are made; stages are counted from 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SemanticConfig:
    """What every form of STViT is set by."""

    pooling: Literal["max", "avg", "intra_inter"] = "max"
    """How a region becomes an initial centre: the largest value per channel (the released code),
    the mean, or weights and places that are learned (our reading of the paper, not verified)."""
    global_centres: bool = True
    """Learn centres G that are added to the second generation layer's queries. Paper: yes; the
    released STViT-R weights have none."""
    layer_scale: float | None = None
    """Initial value of a learned scale per channel of each branch after the base layers; None has
    none. The released code: 1e-5; ours: None, so that a trained model's blocks mean the same."""
    classification_weight: float = 1.0
    """Weight of the cross entropy. The released code has this term alone."""
    distill_weight: float = 0.5
    """Ours: weight of KL(teacher || student) on the logits, where there is a teacher."""
    feature_weight: float = 0.0
    """Ours, for adapting on few images: weight of the squared error of what the classifier reads
    against what the teacher's reads."""
    version: int = 1

    def __post_init__(self) -> None:
        normalise(self)
        scale = self.layer_scale
        require(scale is None or scale > 0, f"layer_scale is {scale}; expected more than 0")
        check_weights(self, "classification", "distill", "feature")


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig(SemanticConfig):
    """What the forms that make semantic tokens window by window are set by."""

    window_tokens: int = 9
    """Semantic tokens per window: a square number. Paper: 9; also 16 and 4. The released code: 9,
    whatever its options say."""
    key_window: int | None = None
    """Side of the larger window that a window's semantic tokens look at first; None: 10/7 of a
    window's side, the released code's 10 for 7, or as the form says."""

    def __post_init__(self) -> None:
        SemanticConfig.__post_init__(self)
        _ = self.side
        key = self.key_window
        require(key is None or key >= 1, f"key_window is {key}; expected 1 or more")

    @property
    def side(self) -> int:
        """Semantic tokens per side of a window."""
        return tokens_side(self.window_tokens)


class SemanticMethod(Method):
    """A method whose semantic tokens stand for the patches: no patch features are compared."""

    keeps_its_cost = True  # it learned to make so many

    def features(
        self, family: Any, images: Tensor, indices: Sequence[int], sizes: Sizes = None
    ) -> FeatureOutput:
        return self.train_features(family, images, indices, sizes)

    def train_features(
        self,
        family: Any,
        images: Tensor,
        indices: Sequence[int],
        sizes: Sizes = None,
        generator: torch.Generator | None = None,
    ) -> FeatureOutput:
        raise ConfigError(
            f"{self.name} gives no feature maps: after its generation layers nothing is left of "
            "the patches, and what a place held is mixed into all semantic tokens that looked at "
            "it, which never learned to give it back. The form of the method that does is stvit_r, "
            "on Swin"
        )

    @torch.no_grad()
    def teach(self, family: Any, images: Tensor) -> DenseOutput:
        state = family.dense(images)
        features = family.patch_features(state)
        return DenseOutput(family.head(state), features, pooled_features=family.pool(state))

    def losses(
        self, output: PooledOutput, target: Tensor | None, teacher: DenseOutput | None
    ) -> dict[str, Tensor]:
        """Classification, distillation and, with a weight above 0, what the classifier reads."""
        parts = answer_parts(output, target, teacher)
        if teacher is not None and self.config.feature_weight:
            wanted = teacher.pooled_features
            if wanted is None:
                raise ConfigError(
                    "feature_weight is above 0, so the loss needs what the teacher's classifier "
                    "reads; ask the teacher through the method's teach"
                )
            parts["feature"] = F.mse_loss(output.features_BC.float(), wanted.float())
        return with_total(self.config, parts)

    @staticmethod
    def semantic_trace(block: int, grid: Grid, looks_BSN: Tensor, count: int) -> StageTrace:
        """The record of a stage at which ``count`` semantic tokens take the places' part.

        Args:
            block: the first that runs on them.
            grid: rows and columns of the places.
            looks_BSN: how much each semantic token looks at each place.
            count: of the semantic tokens that go on.
        """
        nothing = torch.empty(0, dtype=torch.int64, device=looks_BSN.device)
        counts = torch.full((len(looks_BSN),), count, device=looks_BSN.device)
        kept = [nothing] * len(looks_BSN)
        return StageTrace(block, looks_BSN.mean(1), grid, kept, counts, looks_BSN)


class WindowMethod(SemanticMethod):
    """A method that makes semantic tokens window by window: ``window_tokens`` of its config."""

    families = ("swin",)
    refusals: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("vit", "eva", "naflex"), "a plain transformer has no windows: use stvit"
    ) | {
        "swin_v2": "its attention knows no other windows than its own; use dynamic_spatial",
        "lvvit": "it has no windows",
        "pit": "it has no windows",
        "convnext": "it has no attention",
    }
    window: Grid
    """Rows and columns of a window."""

    def _windows(self, family: Any, grid: Grid) -> Windows:
        """The windows of the map of :data:`STAGE`, of an image of ``grid`` patches."""
        map_grid = family.stage_grid(grid, STAGE)
        return windows_of(map_grid, self.window, self.config.window_tokens)

    def variants(self, ratios: Sequence[float]) -> list[Any]:
        """The semantic tokens as set, and fewer and more, as a window has room for them."""
        near = (self.config.side + more for more in (-1, 0, 1))
        return self._with_sides(side for side in near if 1 <= side <= min(self.window))

    def starts(self, family: Any, grid: Grid) -> list[Any]:
        return self._with_sides(range(1, min(self.window) + 1))

    def _with_sides(self, sides: Iterable[int]) -> list[Any]:
        return [replace(self.config, window_tokens=side * side) for side in sides]
