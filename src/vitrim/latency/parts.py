"""The parts of a model that a latency table has curves of, ready to run alone; the levels of
pyramids are in ``levels.py``.

A part that a model runs block after block is run so here too: a chain of all the backbone's blocks,
on as many tokens from first to last, so that weights come from where they come from in a model, and
what it costs to call a runtime is shared by a whole chain. Other parts find the caches full of the
blocks' weights and features in a model, so here a short chain runs before each call of them. What a
method does to choose tokens is the method's own inference on a backbone whose blocks do nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrim import costs
from vitrim.budget import Curve
from vitrim.errors import ConfigError
from vitrim.families import family_of
from vitrim.families.inside import features_of
from vitrim.methods import method_of_config
from vitrim.methods.base import Method
from vitrim.tokens.packed import Layout, PackedTokens

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

    def __init__(self, family: Any) -> None:
        self._family = family
        self._known: dict[tuple[int, ...], tuple[Layout, Tensor]] = {}

    def __call__(self, images: Tensor) -> PackedTokens:
        if images.shape not in self._known:
            mean = images.shape[1] - self._family.num_prefix
            counts = spread_counts(mean, len(images))
            layout = Layout(counts, self._family.num_prefix, images.device)
            # Some images have more tokens than the features have places: there they share them.
            index = torch.cat([torch.arange(counts[image]) % mean for image in layout.order])
            self._known[images.shape] = layout, index.to(images.device)
        layout, index = self._known[images.shape]
        rotary = self._family.state(images).rotary
        return PackedTokens(images.flatten(0, 1)[: layout.num_rows], layout, index, rotary=rotary)


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
        self.packed = Packed(self.family) if packed else None

    def tokens(self, x: Tensor) -> Any:
        """Features as the tokens, or the map, that they would be inside the model."""
        return self.packed(x) if self.packed else self.family.state(x)


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
        return features_of(self.family.stem(images))


class Head(Part):
    """From tokens to logits."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.family.head(self.tokens(images))
        return logits


class LastBlock(Part):
    """The last block, of the tokens that the head reads alone."""

    def forward(self, images: Tensor) -> Tensor:
        return features_of(self.family.last_rows(self.tokens(images)))


class Whole(Part):
    """A model as it is: the backbone itself, or a sparse one on it."""

    counts_calls = True
    cold = False

    def __init__(self, backbone: nn.Module, model: nn.Module) -> None:
        super().__init__(backbone)
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)  # type: ignore[no-any-return]


class Blocks(Part):
    """Block after block. Packed images have just been selected, and run only to the next stage."""

    def __init__(self, backbone: nn.Module, packed: bool = False) -> None:
        super().__init__(backbone, packed)
        depth = self.family.depth
        self.repeats = max(1, depth // 4) if packed else depth
        self.cold = packed

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images)
        for block in range(self.repeats):
            tokens = self.run(block, tokens)
        return features_of(tokens)

    def run(self, block: int, tokens: Any) -> Any:
        """What the curve is of; other parts have others in its place."""
        return self.family.run_blocks((block,), tokens)


class AttentionHalves(Blocks):
    """The first halves of blocks."""

    def run(self, block: int, tokens: Any) -> Any:
        return self.family.attention_half(block, tokens)[0]


class MlpHalves(Blocks):
    """The second halves of blocks."""

    def run(self, block: int, tokens: Any) -> Any:
        return self.family.mlp_half(block, tokens)


class CrossBlocks(Blocks):
    """All blocks on semantic tokens that are weighted by what each stands for."""

    def run(self, block: int, tokens: Any) -> Any:
        x, bias = tokens.x, tokens.x.new_ones(tokens.x.shape[1])
        return tokens.with_x(self.family.cross_block(block, tokens, x, tokens, bias)[0])


class Selecting(Part):
    """How a method chooses among the tokens, and gathers what it keeps; where it can, it keeps
    :data:`KEPT` of them. ``packed``: of images that a stage before has left with unlike counts.
    """

    def __init__(self, backbone: nn.Module, config: Any, packed: bool = False) -> None:
        super().__init__(backbone, packed)
        kind = method_of_config(config)
        config = kind.one_stage(config, _STAGE, KEPT, self.family.depth)
        self.method = method = new_method(backbone, config)
        family, grid = self.family, self.family.grid()
        steps = method.steps(family, grid, [math.prod(grid) - 1] * len(method.stages))
        with_mlp = all(step.part != "mlp" for step in steps)  # it is no step of its own
        self.inside: Any = family.without_blocks(self._between, with_mlp)
        self.adaptive = method.counts(family, grid) is None
        part = next(step.part for step in steps if step.part.startswith(costs.SELECT))
        self.part = costs.packed_part(part) if packed else part
        if self.adaptive:
            self._keep_some(next(backbone.parameters()))

    @property
    def made(self) -> int | None:
        """Tokens that it makes out of all patches; None where it chooses among them."""
        family, grid = self.family, self.family.grid()
        counts = self.method.counts(family, grid) or [1] * len(self.method.stages)
        steps = self.method.steps(family, grid, counts)
        return next((step.tokens for step in steps if step.memory is not None), None)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.method.infer(self.inside, images)
        return x

    def _between(self, blocks: Sequence[int], tokens: Any) -> Any:
        """What is done for blocks that are not there: what was packed is divided for attention, and
        packed images come from those before the stage.
        """
        stage = self.method.stages[0]
        if self.packed and stage not in blocks:
            return self.packed(tokens.x)
        if isinstance(tokens, PackedTokens):
            attention: Any = self.family.backbone.blocks[stage].attn
            tokens.layout.buckets(tokens.x.dtype, attention.num_heads)
        return tokens

    @torch.no_grad()
    def _keep_some(self, like: Tensor) -> None:
        """Have the method tell tokens of noise apart, and turn its dial: new, it may keep all."""
        try:
            dial = self.method.dial()
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


def new_method(backbone: nn.Module, config: Any) -> Method:
    """A method as it is when new, by a seed, on the backbone's device and in its precision."""
    method_class: Any = method_of_config(config)
    method: Method = method_class(family_of(backbone), config, torch.Generator().manual_seed(0))
    parameter = next(backbone.parameters())
    return method.to(parameter.device, parameter.dtype).requires_grad_(False).eval()


def spread_counts(mean: int, num_images: int) -> list[int]:
    """Patches of each image of a packed batch: evenly spread around their mean."""
    steps = [(2 * image + 1) / num_images - 1 for image in range(num_images)]
    counts = [max(1, round(mean * (1 + SPREAD * step))) for step in steps]
    if len(set(counts)) == 1:
        return counts
    counts[-1] += mean * num_images - sum(counts)
    return counts
