"""The parts of a model that a latency table has curves of, ready to run alone; the levels of
pyramids are in ``vitrim.latency.levels``.

A part that a model runs block after block is run so here too: a chain of all the backbone's blocks,
on as many tokens from first to last, so that weights come from where they come from in a model, and
what it costs to call a runtime is shared by a whole chain. Other parts find the caches full of the
blocks' weights and features in a model, so here a short chain runs before each call of them. What a
method does to choose tokens is the method's own inference on a backbone whose blocks do nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrim import costs
from vitrim.budget import Curve
from vitrim.errors import ConfigError
from vitrim.families import family_of
from vitrim.families.base import Pyramid
from vitrim.methods import method_of_config
from vitrim.methods.base import Method
from vitrim.tokens.feature_map import FeatureMap
from vitrim.tokens.packed import Layout, PackedTokens
from vitrim.tokens.plain import Grid, Tokens

SPREAD = 0.5
"""The images of a packed batch have from this share fewer to this share more than their mean."""
KEPT = 0.7
"""Share of the tokens that go on where a method chooses."""
_STAGE = 1
"""The block before which it does."""


class Packed:
    """Features as packed images with unlike counts; see :data:`SPREAD`. Which rows are whose is
    worked out once: in a model, choosing the tokens does that.
    """

    def __init__(self, num_prefix: int) -> None:
        self._num_prefix = num_prefix
        self._known: dict[tuple[int, ...], tuple[Layout, Tensor]] = {}

    def __call__(self, images: Tensor) -> PackedTokens:
        if images.shape not in self._known:
            mean = images.shape[1] - self._num_prefix
            counts = spread_counts(mean, len(images))
            layout = Layout(counts, self._num_prefix, images.device)
            # Some images have more tokens than the features have places: there they share them.
            index = torch.cat([torch.arange(counts[image]) % mean for image in layout.order])
            self._known[images.shape] = layout, index.to(images.device)
        layout, index = self._known[images.shape]
        return PackedTokens(images.flatten(0, 1)[: layout.num_rows], layout, index)


class Part(nn.Module):
    """A piece of a model by itself; ``images`` are images, or (B, tokens, width) features, which
    enter it ``packed`` or as they are.
    """

    repeats = 1
    """How often a call runs what the curve is of."""
    counts_calls = False
    """Whether the cost of calling the runtime belongs to the part: to one part of a model."""
    cold = True
    """Whether a chain of blocks runs before each call."""

    def __init__(self, backbone: nn.Module, packed: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.family: Any = family_of(backbone)
        self.packed = Packed(self.family.num_prefix) if packed else None

    def tokens(self, x: Tensor) -> Any:
        """Features as the tokens, or the map, that they would be inside the model."""
        if isinstance(self.family, Pyramid):
            return FeatureMap(x)
        return self.packed(x) if self.packed else Tokens.of(x, self.family.num_prefix)


def features(tokens: Any) -> Tensor:
    """The features of tokens or of a map."""
    x: Tensor = tokens.x_BHWC if isinstance(tokens, FeatureMap) else tokens.x
    return x


class Nothing(Part):
    """What it costs to hand a runtime features and to get them back; ``free`` in torch itself."""

    def __init__(self, backbone: nn.Module, cold: bool, free: bool) -> None:
        super().__init__(backbone)
        self.cold, self.free = cold, free

    def forward(self, images: Tensor) -> Tensor:
        return images if self.free else images + 1


class Stem(Part):
    """From images to tokens."""

    counts_calls = True

    def forward(self, images: Tensor) -> Tensor:
        return features(self.family.stem(images))


class Head(Part):
    """From tokens to logits."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.family.head(self.tokens(images))
        return logits


class Whole(Part):
    """A model as it is: the backbone itself, or a sparse one on it."""

    counts_calls = True
    cold = False

    def __init__(self, backbone: nn.Module, model: nn.Module) -> None:
        super().__init__(backbone)
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)  # type: ignore[no-any-return]


class _Chain(Part):
    """Block after block. Packed images have just been selected, and run only to the next stage."""

    def __init__(self, backbone: nn.Module, packed: bool = False) -> None:
        super().__init__(backbone, packed)
        depth = self.family.depth
        self.repeats = max(1, depth // 4) if packed else depth
        self.cold = packed


class Blocks(_Chain):
    """Whole blocks."""

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.family.run_blocks(range(self.repeats), self.tokens(images)).x
        return x


class AttentionHalves(_Chain):
    """The first halves of blocks."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images)
        for block in range(self.repeats):
            tokens, _ = self.family.attention_half(block, tokens)
        return tokens.x  # type: ignore[no-any-return]


class MlpHalves(_Chain):
    """The second halves of blocks."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images)
        for block in range(self.repeats):
            tokens = self.family.mlp_half(block, tokens)
        return tokens.x  # type: ignore[no-any-return]


class CrossBlocks(_Chain):
    """All blocks on semantic tokens that are weighted by what each stands for."""

    def forward(self, images: Tensor) -> Tensor:
        x, bias = images, images.new_ones(images.shape[1])
        for block in range(self.repeats):
            x, _ = self.family.cross_block(block, x, x, x, bias)
        return x


class Selecting(Part):
    """How a method chooses among the tokens, and gathers what it keeps; where it can, it keeps
    :data:`KEPT` of them. ``packed``: of images that a stage before has left with unlike counts.
    """

    def __init__(self, backbone: nn.Module, config: Any, packed: bool = False) -> None:
        super().__init__(backbone, packed)
        config = single_stage(config, self.family.depth)
        method_class: Any = method_of_config(config)
        method: Method = method_class(self.family, config, torch.Generator().manual_seed(0))
        parameter = next(backbone.parameters())
        method.to(parameter.device, parameter.dtype).requires_grad_(False)
        self.method = method.eval()
        self.hollow: Any = _Hollow(self, method)
        self.adaptive = method.counts(self.family, self.family.grid()) is None
        self.part = costs.select_part(method.name, self.adaptive)
        if packed:
            self.part = costs.packed_part(self.part)
        if self.adaptive:
            self._keep_some(parameter)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.method.infer(self.hollow, images)
        return x

    @torch.no_grad()
    def _keep_some(self, like: Tensor) -> None:
        """Have the method tell tokens of noise apart, and turn its dial: new, it may keep all."""
        try:
            dial = self.method.dial
        except ConfigError:  # what computes every token has none
            return
        prefix, patches = self.family.num_prefix, math.prod(self.family.grid())
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(4, patches + prefix, self.family.embed_dim, generator=generator)
        images = images.to(like.device, like.dtype)

        def kept(value: float) -> float:
            self.method.turn(value)
            return self.forward(images).numel() / images.numel()

        for weights in self.method.parameters():
            if weights.ndim > 1:
                weights.mul_(10)
        curve = Curve(dial, kept)
        place = curve.search(KEPT, tolerance=math.inf, near_enough=0.02, tries=20)
        self.method.turn(dial.at(place))


class _Hollow:
    """A family that takes features for images, and whose blocks do nothing: what is left of a
    method's inference is the method's own, and dividing what it packed for attention.
    """

    def __init__(self, part: Part, method: Method) -> None:
        self.family, self.part = part.family, part
        family, grid = part.family, part.family.grid()
        steps = method.steps(family, grid, [math.prod(grid)] * len(method.stages))
        self.has_mlp_steps = any(step.part == "mlp" for step in steps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["family"], name)

    def grid(self, image_size: tuple[int, int] | None = None) -> Grid:
        grid: Grid = self.family.grid()
        return grid

    def stem(self, images: Tensor) -> Tokens:
        return Tokens.of(images, self.family.num_prefix)

    def run_block(self, index: int, tokens: Any) -> Any:
        return tokens

    def run_blocks(self, indices: Sequence[int], tokens: Any) -> Any:
        if self.part.packed and _STAGE not in indices:
            return self.part.packed(tokens.x)
        if isinstance(tokens, PackedTokens):
            attention: Any = self.family.backbone.blocks[_STAGE].attn
            tokens.layout.buckets(tokens.x.dtype, attention.num_heads)
        return tokens

    def mlp_half(self, index: int, tokens: Any) -> Any:
        return tokens if self.has_mlp_steps else self.family.mlp_half(index, tokens)

    def head(self, tokens: Any) -> Tensor:
        x: Tensor = tokens.x
        return x

    def patch_head(self, x: Tensor) -> Tensor:
        return x


def single_stage(config: Any, depth: int) -> Any:
    """``config`` with one stage, early in the backbone, that drops a part of the tokens."""
    fields = {field.name for field in dataclasses.fields(config)}
    if "semantic_tokens" in fields:  # no blocks after the generation layers
        return dataclasses.replace(config, base_layers=depth - config.generation_layers)
    if "prune_after" in fields:
        return dataclasses.replace(config, prune_after=_STAGE)
    changes: dict[str, Any] = {"stages": (_STAGE,)}
    if "keep_ratio" in fields:
        changes["keep_ratio"] = KEPT
    if isinstance(getattr(config, "thresholds", None), tuple):
        changes["thresholds"] = config.thresholds[0]
    return dataclasses.replace(config, **changes)


def spread_counts(mean: int, num_images: int) -> list[int]:
    """Patches of each image of a packed batch: evenly spread around their mean."""
    steps = [(2 * image + 1) / num_images - 1 for image in range(num_images)]
    counts = [max(1, round(mean * (1 + SPREAD * step))) for step in steps]
    if len(set(counts)) == 1:
        return counts
    counts[-1] += mean * num_images - sum(counts)
    return counts
