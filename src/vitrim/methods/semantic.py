"""What the forms of STViT share: semantic tokens stand for the patches.

Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View", CVPR 2023
(arXiv 2303.08685); see ``stvit.py``, ``stvit_swin.py``, ``stvit_video.py`` and ``stvit_r.py``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim import costs
from vitrim.config import check_weights, normalise, require
from vitrim.errors import ConfigError
from vitrim.layers.pooling import POOLINGS
from vitrim.layers.semantic_attention import Keys, WindowRecord
from vitrim.layers.semantic_keys import own_and_near
from vitrim.layers.semantic_windows import (
    Windows,
    global_centres,
    resized_centres,
    tokens_side,
    windows_of,
)
from vitrim.methods.base import Method, answer_parts, with_total
from vitrim.methods.records import (
    DenseOutput,
    Dial,
    FeatureOutput,
    PooledOutput,
    Recorder,
    StageTrace,
)
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
        return self._windows_on(family.stage_grid(grid, STAGE))

    def _windows_on(self, map_grid: Grid) -> Windows:
        """The same, given the map's rows and columns."""
        return windows_of(map_grid, self.window, self.config.window_tokens)

    def variants(self, ratios: Sequence[float]) -> list[Any]:
        """The semantic tokens as set, and fewer and more, as a window has room for them."""
        near = (self.config.side + more for more in (-1, 0, 1))
        return self._with_sides(side for side in near if 1 <= side <= min(self.window))

    def starts(self, family: Any, grid: Grid) -> list[Any]:
        return self._with_sides(range(1, min(self.window) + 1))

    def _with_sides(self, sides: Iterable[int]) -> list[Any]:
        return [replace(self.config, window_tokens=side * side) for side in sides]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig(WindowConfig):
    """What the forms whose semantic tokens take the map's place for good are set by."""

    base_layers: int | None = None
    """Blocks of the third stage before the generation layers; None: as ``base_share`` says."""
    centres_in_residual: bool = True
    """Whether the second generation layer's residual holds G too, as in the released code."""

    def __post_init__(self) -> None:
        WindowConfig.__post_init__(self)
        base = self.base_layers
        require(base is None or base >= 0, f"base_layers is {base}; expected 0 or more")


class GenerationMethod(WindowMethod):
    """A method whose two generation layers make semantic tokens, which take the map's place for the
    rest of the third stage and the stages behind it.

    Maps are (..., rows, columns, C), windows of them (..., W, S, C), after batch and any frames.
    """

    base_share: ClassVar[tuple[int, int]]
    """Of all blocks, those before the generation layers, as a fraction; ours."""
    config: GenerationConfig

    def __init__(
        self, family: Any, config: GenerationConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        depths = family.depths
        require(len(depths) > STAGE, f"the backbone has {len(depths)} stages; expected 3 or more")
        before, depth = sum(depths[:STAGE]), depths[STAGE]
        base, (part, whole) = config.base_layers, self.base_share
        if base is None:
            base = min(max(0, part * sum(depths) // whole - before), max(0, depth - 2))
        require(
            base + 2 <= depth,
            f"{base} base layers and 2 generation layers do not fit in the {depth} blocks of the "
            "third stage; lower base_layers",
        )
        self.config = config
        self.base_layers = base
        self.stages = (before + base + 2,)
        dim = family.stage_dim(STAGE)
        self.window = self._largest_window(family)
        self.centres_grid = self._windows(family, family.grid()).tokens
        self.pooling = POOLINGS[config.pooling](dim)
        self.pooling.reset_parameters(generator)
        self.centres_SC: nn.Parameter | None = None
        if config.global_centres:
            self.centres_SC = global_centres(self.centres_grid, dim, generator)
        self.layer_scales = nn.ParameterDict()
        if config.layer_scale is not None:
            for stage, index in self._semantic_blocks(family):
                scales = torch.full((2, family.stage_dim(stage)), config.layer_scale)
                self.layer_scales[f"{stage}_{index}"] = nn.Parameter(scales)

    def _largest_window(self, family: Any) -> Grid:
        """Rows and columns of a window of the third stage, where the map is as large."""
        window: Grid = family.block(STAGE, 0).window_size
        return window

    def _semantic_blocks(self, family: Any) -> list[tuple[int, int]]:
        """Stage and index of the blocks that run on semantic tokens, generation layers first."""
        firsts = {STAGE: self.base_layers}
        return [
            (stage, index)
            for stage in range(STAGE, len(family.depths))
            for index in range(firsts.get(stage, 0), family.depths[stage])
        ]

    def infer(self, family: Any, images: Tensor, recorder: Recorder | None = None) -> Tensor:
        logits: Tensor = family.head(self._run(family, images, recorder))
        return logits

    def train_forward(
        self, family: Any, images: Tensor, generator: torch.Generator | None = None
    ) -> PooledOutput:
        semantic = self._run(family, images)
        return PooledOutput(family.head(semantic), family.pool(semantic))

    @abstractmethod
    def _run(self, family: Any, images: Tensor, recorder: Recorder | None = None) -> Any:
        """The map of semantic tokens after the last block."""

    def _base(self, family: Any, images: Tensor) -> Any:
        """The map that semantic tokens are made of."""
        state = family.stem(images)
        for stage in range(STAGE):
            state = family.run_stage(stage, state)
        state = family.enter_stage(STAGE, state)
        for index in range(self.base_layers):
            state = family.run_block(STAGE, index, state)
        return state

    def _reach(self, windows: Windows) -> Grid:
        return windows.reach(self.config.key_window, 10 / 7)

    def _generate(
        self, family: Any, x: Tensor, windows: Windows, first_residual: bool = True
    ) -> tuple[Tensor, WindowRecord]:
        """The map of semantic tokens, and the last generation layer's attention; ``first_residual``
        says whether the first one's residual holds the centres.
        """
        first, second = self.base_layers, self.base_layers + 1
        each, positions = x.shape[:-3], x.flatten(-3, -2)  # batch and, of clips, frames
        keys = own_and_near(windows, self._reach(windows), x.device)
        centres = windows.pool(x.flatten(0, -4), self.pooling)
        centres = centres.reshape(*each, *centres.shape[1:])
        memory = torch.cat([centres.flatten(-3, -2), positions], -2)
        residual = centres if first_residual else None
        semantic, _ = self._cross_block(family, first, centres, residual, memory, keys)
        query = residual = semantic
        if self.centres_SC is not None:
            made = resized_centres(self.centres_SC, self.centres_grid, windows.tokens)
            query = semantic + windows.split_tokens(made)
            residual = query if self.config.centres_in_residual else semantic
        memory = torch.cat([semantic.flatten(-3, -2), positions], -2)
        semantic, record = self._cross_block(family, second, query, residual, memory, keys)
        rows, columns = windows.visible_tokens
        tokens = windows.join_tokens(semantic.flatten(0, -4))[:, :rows, :columns]
        return tokens.reshape(*each, rows, columns, -1), record

    def _cross_block(
        self,
        family: Any,
        index: int,
        query: Tensor,
        residual: Tensor | None,
        memory: Tensor,
        keys: Keys,
        stage: int = STAGE,
    ) -> tuple[Tensor, WindowRecord]:
        """A block of the backbone between the windows of ``query`` and the rows of ``memory``;
        without a ``residual`` its attention alone is what its second half starts from.
        """
        scales = self._scales(stage, index, query)
        records: list[WindowRecord] = []

        def run(query: Tensor) -> Tensor:
            x, record = family.attend(stage, index, query, memory, keys)
            records.append(record)
            x = scales[0] * x
            if residual is not None:
                x = residual + family.attention_drop_path(stage, index)(x)
            return self._second_half(family, stage, index, x, scales[1])

        return family.in_name_of(stage, index, run, query), records[0]

    def _second_half(self, family: Any, stage: int, index: int, x: Tensor, scale: Tensor) -> Tensor:
        """The MLP of a block with its residual."""
        out: Tensor = x + family.drop_path(stage, index)(scale * family.channel(stage, index, x))
        return out

    def _scales(self, stage: int, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """What multiplies the two branches of a block."""
        if self.config.layer_scale is None:
            one = torch.ones((), device=like.device, dtype=like.dtype)
            return one, one
        first, second = self.layer_scales[f"{stage}_{index}"]
        return first, second

    def _generation_macs(self, family: Any, windows: Windows) -> Any:
        """MACs of making the semantic tokens of one map."""
        positions, made = math.prod(windows.grid), windows.num_tokens
        keys = self.config.window_tokens + math.prod(self._reach(windows))
        total: Any = self.pooling.macs(math.prod(windows.whole), made)
        for index in (self.base_layers, self.base_layers + 1):
            total += family.attend_macs(STAGE, index, made, made + positions, keys)
            total += family.channel_macs(STAGE, index, made)
        return total

    def _base_macs(self, family: Any, grid: Grid) -> int:
        """MACs of the third stage before the generation layers."""
        blocks = (family.block_macs(STAGE, index, grid) for index in range(self.base_layers))
        total: int = family.downsample_macs(STAGE, grid) + sum(blocks)
        return total

    def _steps(self, family: Any, grid: Grid, count: Any, macs: Any) -> list[costs.Step]:
        """The steps, given how many semantic tokens go on, and MACs from the third stage on."""
        dense = costs.dense_levels(family, grid)[:STAGE]
        stages, before = range(STAGE, len(family.depths)), (self.base_layers,)
        semantic = costs.sparse_levels(self.name, stages, count, macs, before=before)
        return costs.pyramid_steps(family, grid, [*dense, semantic])

    def dial(self) -> Dial:
        """The number of semantic tokens per window, in steps, where nothing was learned for one.

        Raises:
            ConfigError: global centres or a learned pooling belong to the present number.
        """
        config = self.config
        require(
            not config.global_centres and config.pooling != "intra_inter",
            f"this {self.name} learned to make {config.window_tokens} semantic tokens per window; "
            "to change their number later, make it sparse with global_centres=False and pooling "
            '"max" or "avg"',
        )
        most = min(self.window) ** 2
        return Dial("window_tokens", config.window_tokens, 1.0, float(most))

    def turn(self, value: float) -> None:
        dial = self.dial()
        require(math.isfinite(value), f"window_tokens is {value}; expected a number")
        if round(value) != dial.value:
            sides = range(1, min(self.window) + 1)
            side = min(sides, key=lambda side: abs(side * side - value))
            self.config = replace(self.config, window_tokens=side * side)
