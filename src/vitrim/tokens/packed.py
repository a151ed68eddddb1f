"""Per-image token counts without padding waste.

Linear layers, norms and MLPs run on the packed rows of all images, (sum of counts, C); only
attention needs to know where an image ends. The rows lie image after image, the images in order of
their length, so that attention can take neighbours of like length together. What is per image is
handed out in the batch's own order: nobody outside meets the internal one.

What deals with the counts themselves stays out of torch.compile's graphs, which would be made anew
for the counts of every batch; the blocks' norms and MLPs are in them, for any number of rows.

Attention runs as ``torch.nn.attention.varlen`` on CUDA in half precision, and elsewhere as
``scaled_dot_product_attention`` on buckets of images: ``bucketing`` says how they are chosen, and
``results/packing.md`` which ways were tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from vitrim.errors import ConfigError
from vitrim.tokens.attention import AttentionRecord, Score, attend, scale_of
from vitrim.tokens.bucketing import (
    COSTS,
    CUDA_COSTS,
    Bucket,
    bucketed_attention,
    divide,
    make_bucket,
)
from vitrim.tokens.calls import called, is_hooked
from vitrim.tokens.graphs import exporting
from vitrim.tokens.padding import select_padded
from vitrim.tokens.plain import Tokens
from vitrim.tokens.projections import placed, project, project_as_one
from vitrim.tokens.rotary import Rotary

Function = TypeVar("Function", bound=Callable[..., Any])


def _not_compiled(function: Function) -> Function:
    """A graph break around what works with the counts of images."""
    disabled: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


class Layout:
    """Where each image's rows lie in a packed batch; made once per stage, shared by its blocks.

    Args:
        counts: patch tokens of each image.
        num_prefix: prefix tokens of every image.
    """

    def __init__(self, counts: list[int], num_prefix: int, device: torch.device) -> None:
        self.counts = counts
        self.num_prefix = num_prefix
        self.device = device
        self.order = sorted(range(len(counts)), key=counts.__getitem__)
        """The images as they lie in the rows."""
        self._buckets: dict[Any, list[Bucket]] = {}

    @property
    def num_images(self) -> int:
        return len(self.counts)

    @property
    def num_rows(self) -> int:
        return sum(self.counts) + self.num_images * self.num_prefix

    @property
    def longest(self) -> int:
        """Tokens of the longest image."""
        return max(self.counts) + self.num_prefix

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each image, as they lie."""
        return [self.counts[image] + self.num_prefix for image in self.order]

    @cached_property
    def counts_B(self) -> Tensor:
        """(B,) int64."""
        return self._tensor(self.counts)

    @cached_property
    def start_B(self) -> Tensor:
        """(B,): first row of each image."""
        starts = [0] * self.num_images
        for image, start in zip(self.order, accumulate(self.lengths, initial=0), strict=False):
            starts[image] = start
        return self._tensor(starts)

    @cached_property
    def image_T(self) -> Tensor:
        """(rows,): image of each row."""
        order, lengths = self._tensor(self.order), self._tensor(self.lengths)
        return order.repeat_interleave(lengths, output_size=self.num_rows)

    @cached_property
    def place_T(self) -> Tensor:
        """(rows,): place of each row among the (B * longest) places of padded sequences."""
        start = torch.arange(self.num_images, device=self.device) * self.longest - self.start_B
        return torch.arange(self.num_rows, device=self.device) + start[self.image_T]

    @cached_property
    def patch_row_N(self) -> Tensor:
        """(patch rows,): row of each patch token."""
        rank = torch.arange(self.num_images, device=self.device) + 1
        counts = self._tensor([self.counts[image] for image in self.order])
        before = rank.repeat_interleave(counts, output_size=sum(self.counts)) * self.num_prefix
        return torch.arange(sum(self.counts), device=self.device) + before

    @cached_property
    def patch_place_N(self) -> Tensor:
        """(patch rows,): place of each patch row among (B * longest count) places."""
        place = self.place_T.index_select(0, self.patch_row_N)
        return place - (self.image_N + 1) * self.num_prefix

    @cached_property
    def prefix_row_BP(self) -> Tensor:
        """(B, P): row of each prefix token."""
        prefix = torch.arange(self.num_prefix, device=self.device)
        return self.start_B.unsqueeze(1) + prefix

    @cached_property
    def image_N(self) -> Tensor:
        """(patch rows,): image of each patch row."""
        return self.image_T.index_select(0, self.patch_row_N)

    @cached_property
    def visible_BN(self) -> Tensor:
        """(B, longest) bool: which places of the padded sequences are tokens."""
        lengths = (self.counts_B + self.num_prefix).unsqueeze(1)
        return torch.arange(self.longest, device=self.device) < lengths

    @cached_property
    def bounds(self) -> Tensor:
        """(B + 1,) int32: where the sequences begin and end, for varlen attention."""
        bounds = torch.tensor(list(accumulate(self.lengths, initial=0)), dtype=torch.int32)
        return bounds.to(self.device, non_blocking=True)

    def pad(self, values: Tensor) -> Tensor:
        """(B, longest, ...): ``values`` (rows, ...) of each image in the batch's order, and 0."""
        return self._pad(values, self.place_T, self.longest)

    def pad_patches(self, values: Tensor) -> Tensor:
        """(B, longest count, ...): ``values`` (patch rows, ...), likewise."""
        return self._pad(values, self.patch_place_N, max(self.counts))

    def _pad(self, values: Tensor, places: Tensor, longest: int) -> Tensor:
        padded = values.new_zeros(self.num_images * longest, *values.shape[1:])
        padded = padded.index_copy(0, places, values)
        return padded.view(self.num_images, longest, *values.shape[1:])

    def buckets(self, dtype: torch.dtype, heads: int) -> list[Bucket]:
        """How attention of this type divides the images; kept for the next block."""
        key = dtype, heads
        if key not in self._buckets:
            costs = COSTS.get(dtype, COSTS[torch.bfloat16])
            threads = torch.get_num_threads()
            if self.device.type != "cpu":
                costs, threads = CUDA_COSTS, 1
            lengths = [length for length in self.lengths if length > 0]
            self._buckets[key] = [
                make_bucket(lengths[start:stop], padded, dtype, self.device)
                for start, stop, padded in divide(lengths, costs, heads, threads)
            ]
        return self._buckets[key]

    def _tensor(self, values: list[int]) -> Tensor:
        # A plain torch.tensor(..., device="cuda") would wait for the device.
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """Prefix and patch tokens of a batch whose images keep different numbers of patches.

    The packed twin of :class:`Tokens`: what the two have in common has the same name.
    """

    x: Tensor
    """(rows, C): image after image, each with its prefix tokens first, in the layout's order."""
    layout: Layout
    index_N: Tensor
    """(patch rows,) int64: place of each patch token in the original row-major patch grid."""
    size_N: Tensor | None = None
    """(patch rows,): how many patches each patch token stands for; None: one each."""
    rotary: Rotary | None = None
    """What turns queries and keys by the places of their tokens; None: nothing."""

    @property
    def num_prefix(self) -> int:
        return self.layout.num_prefix

    @property
    def num_images(self) -> int:
        return self.layout.num_images

    @property
    @_not_compiled
    def counts_B(self) -> Tensor:
        """(B,): patch tokens of each image."""
        return self.layout.counts_B

    @property
    @_not_compiled
    def patches(self) -> Tensor:
        """(patch rows, C)"""
        return self.x.index_select(0, self.layout.patch_row_N)

    @property
    @_not_compiled
    def prefix_BPC(self) -> Tensor:
        return self.x[self.layout.prefix_row_BP]

    @property
    @_not_compiled
    def log_size_T(self) -> Tensor | None:
        """(rows,): see :attr:`Tokens.log_size`."""
        if self.size_N is None:
            return None
        zeros = self.size_N.new_zeros(self.layout.num_rows)
        return zeros.index_copy(0, self.layout.patch_row_N, self.size_N.log())

    @property
    @_not_compiled
    def angles(self) -> Tensor | None:
        """(rows, H, 2 D), H may be 1: what :attr:`rotary` says of these tokens."""
        rows = self.layout.patch_row_N, self.layout.num_rows
        return None if self.rotary is None else self.rotary.of_rows(self.index_N, *rows)

    @property
    @_not_compiled
    def bias(self) -> Tensor:
        """(B, 1, 1, longest): of the padded sequences, see :attr:`Tokens.bias`."""
        visible_BN, size_T = self.layout.visible_BN, self.log_size_T
        bias = self.x.new_zeros(visible_BN.shape) if size_T is None else self.layout.pad(size_T)
        return bias.masked_fill(~visible_BN, -math.inf)[:, None, None, :]

    def with_x(self, x: Tensor) -> PackedTokens:
        return replace(self, x=x)

    @_not_compiled
    def with_prefix(self, prefix_BPC: Tensor) -> PackedTokens:
        """The same patch tokens behind other prefix tokens, as many as there are now."""
        rows = self.layout.prefix_row_BP.flatten()
        return self.with_x(self.x.index_copy(0, rows, prefix_BPC.flatten(0, 1)))

    @_not_compiled
    def sum_per_image(self, values: Tensor) -> Tensor:
        """(B, ...): sum over each image's patch tokens of ``values`` (patch rows, ...)."""
        return self.layout.pad_patches(values).sum(1)

    @_not_compiled
    def max_per_image(self, values: Tensor) -> Tensor:
        """(B, ...): largest of each image's patch tokens of ``values`` (patch rows, ...); -inf of
        none.
        """
        least = values.new_full((self.num_images, *values.shape[1:]), -math.inf)
        image = self.layout.image_N.view(-1, *[1] * (values.ndim - 1)).expand_as(values)
        return least.scatter_reduce(0, image, values, "amax")

    @_not_compiled
    def spread(self, per_image: Tensor) -> Tensor:
        """(patch rows, ...): each image's value of ``per_image`` (B, ...) for all its patches."""
        return per_image.index_select(0, self.layout.image_N)

    @_not_compiled
    def on_grid(self, values: Tensor, num_patches: int, fill: float) -> Tensor:
        """(B, num_patches, ...): ``values`` (patch rows, ...) on the grid, ``fill`` elsewhere."""
        grid = values.new_full((self.num_images, num_patches, *values.shape[1:]), fill)
        place_N = self.layout.image_N * num_patches + self.index_N
        return grid.flatten(0, 1).index_copy(0, place_N, values).view(grid.shape)

    def places(self) -> list[Tensor]:
        """Per image: the original places of its patch tokens, sorted."""
        layout = self.layout
        parts = torch.split(self.index_N, [layout.counts[image] for image in layout.order])
        places = dict(zip(layout.order, parts, strict=True))
        return [places[image].sort().values for image in range(self.num_images)]

    @_not_compiled
    def padded(self) -> Tokens:
        """The same tokens padded to the longest image, under a keep mask."""
        layout = self.layout
        keep = layout.visible_BN[:, self.num_prefix :].to(self.x.dtype)
        index = layout.pad_patches(self.index_N)
        size = None if self.size_N is None else layout.pad_patches(self.size_N).clamp(min=1)
        tokens = Tokens(layout.pad(self.x), self.num_prefix, index, keep, rotary=self.rotary)
        return tokens.sized(size)


AnyTokens = Tokens | PackedTokens


def select(tokens: AnyTokens, keep_BN: Tensor, packages_BPC: Tensor | None = None) -> AnyTokens:
    """Only the patch tokens that ``keep_BN`` names, a number that may differ between images.

    One device synchronisation, to learn the counts. Where all images keep the same number, a single
    image above all, the tokens are a plain ``Tokens``.

    Args:
        tokens: what is there now.
        keep_BN: (B, N) bool, on the original grid.
        packages_BPC: tokens to put behind each image's prefix, as further prefix tokens.

    Raises:
        ConfigError: ``torch.jit.trace`` looks on.
    """
    num_images = keep_BN.shape[0]  # len() would make a plain number of it
    if num_images == 1 and isinstance(tokens, Tokens):
        return _select_one(tokens, keep_BN[0], packages_BPC)
    if torch._C._get_tracing_state():  # torch.jit.trace looks on
        raise ConfigError(
            "each image decides how many tokens it keeps, and torch.jit.trace would record what "
            "these images do; use torch.export (vitrim export), or settings that keep the same "
            "number of every image"
        )
    if exporting():
        assert isinstance(tokens, Tokens)
        return select_padded(tokens, keep_BN, packages_BPC)
    return _select_many(tokens, keep_BN, packages_BPC)


@_not_compiled
def _select_many(tokens: AnyTokens, keep_BN: Tensor, packages_BPC: Tensor | None) -> AnyTokens:
    """:func:`select` for several images."""
    num_images, num_patches = keep_BN.shape
    device, prefix = tokens.x.device, tokens.num_prefix
    order: Sequence[int] = range(num_images)
    if isinstance(tokens, Tokens):
        present = tokens.num_patches
        place = torch.arange(num_images * present, device=device)
        image_N, index_N = place // max(present, 1), tokens.index_BN.flatten()
        size_N = None if tokens.size_BN is None else tokens.size_BN.flatten()
        row_N = place + (image_N + 1) * prefix
        start_B = torch.arange(num_images, device=device) * (prefix + present)
        prefix_row_BP = start_B.unsqueeze(1) + torch.arange(prefix, device=device)
        rows = tokens.x.flatten(0, 1)
    else:
        layout = tokens.layout
        order, image_N, index_N = layout.order, layout.image_N, tokens.index_N
        size_N = tokens.size_N
        row_N, prefix_row_BP, rows = layout.patch_row_N, layout.prefix_row_BP, tokens.x
    alive_N = keep_BN.flatten().index_select(0, image_N * num_patches + index_N)
    if isinstance(tokens, Tokens) and tokens.keep_BN is not None:
        alive_N = alive_N & (tokens.keep_BN.flatten() > 0.5)
    counts_B = torch.zeros(num_images, dtype=torch.int64, device=device)
    counts = counts_B.scatter_add(0, image_N, alive_N.long()).tolist()
    if packages_BPC is not None:
        package = torch.arange(packages_BPC.shape[:2].numel(), device=device) + len(rows)
        prefix_row_BP = torch.cat([prefix_row_BP, package.view(num_images, -1)], 1)
        rows = torch.cat([rows, packages_BPC.flatten(0, 1).to(rows.dtype)])

    # The n-th kept patch of all goes as many places on as its image moves; the others go nowhere.
    packed = Layout(counts, prefix_row_BP.shape[1], device)
    before, after = _starts(counts, order), _starts(counts, packed.order)
    move_B = packed._tensor([b - a for a, b in zip(before, after, strict=True)])
    target_N = alive_N.long().cumsum(0) - 1 + move_B.index_select(0, image_N)
    target_N = target_N.where(alive_N, sum(counts))
    place = torch.arange(len(target_N), device=device)
    kept_N = place.new_empty(sum(counts) + 1).scatter(0, target_N, place)[:-1]

    source_T = place.new_empty(packed.num_rows)
    source_T = source_T.scatter(0, packed.prefix_row_BP.flatten(), prefix_row_BP.flatten())
    source_T = source_T.scatter(0, packed.patch_row_N, row_N.index_select(0, kept_N))
    x, index_N = rows.index_select(0, source_T), index_N.index_select(0, kept_N)
    size_N = None if size_N is None else size_N.index_select(0, kept_N)
    if min(counts) < max(counts):
        return PackedTokens(x, packed, index_N, size_N, tokens.rotary)
    shape, x = (num_images, counts[0]), x.view(num_images, packed.longest, x.shape[1])
    size_BN = None if size_N is None else size_N.view(shape)
    return Tokens(x, packed.num_prefix, index_N.view(shape), rotary=tokens.rotary).sized(size_BN)


def _select_one(tokens: Tokens, keep_N: Tensor, packages_1PC: Tensor | None) -> Tokens:
    """:func:`select` for a single image, without a branch on the count, so that it exports."""
    alive_N = keep_N.index_select(0, tokens.index_BN[0])
    if tokens.keep_BN is not None:
        alive_N = alive_N & (tokens.keep_BN[0] > 0.5)
    kept = tokens.gather(alive_N.nonzero().squeeze(1).unsqueeze(0))
    if packages_1PC is None:
        return kept
    return kept.with_prefix(torch.cat([kept.prefix_BPC, packages_1PC], 1))


def _starts(counts: list[int], order: Sequence[int]) -> list[int]:
    """Per image: how many patches lie before its first, when the images lie in ``order``."""
    starts, total = [0] * len(counts), 0
    for image in order:
        starts[image] = total
        total += counts[image]
    return starts


@_not_compiled
def packed_attention(
    attention: Attention,
    x_TC: Tensor,
    layout: Layout,
    score: Score | None = None,
    has_class: bool = False,
    bias_T: Tensor | None = None,
    angles: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Timm's attention layer on packed rows, each image seeing itself alone.

    Args:
        attention: an attention layer of timm's; its own projections and norms are used.
        x_TC: packed rows, normalised for attention.
        layout: where the images lie.
        score: asks for a score of the patch tokens.
        has_class: whether each image's token 0 is a class token.
        bias_T: added to the logits of each key (rows,); None: nothing.
        angles: (rows, H, 2 D), H may be 1, that turn queries and keys; None: none do.

    Returns:
        the layer's output (rows, C), and the score (patch rows,) if it was asked for.
    """
    scores: list[Tensor] = []

    def run(x_TC: Tensor) -> Tensor:
        qkv = _projected(attention, x_TC, angles)
        context = _contexts(attention, qkv, layout, bias_T)
        if score is not None:
            record = _padded_record(attention, qkv, context, layout, has_class, bias_T)
            scores.append(score(record).flatten().index_select(0, layout.patch_place_N))
        out = attention.norm(context.flatten(1))
        if attention.gate is not None:
            out = out * attention.gate(x_TC).sigmoid()
        projected: Tensor = attention.proj_drop(attention.proj(out))
        return projected

    return called(attention, run, x_TC), scores[0] if scores else None


def _projected(attention: Attention, x_TC: Tensor, angles: Tensor | None) -> Tensor:
    """(rows, 3, H, D): queries, keys and values."""
    normed = not isinstance(attention.q_norm, nn.Identity) or is_hooked(attention.q_norm)
    if angles is None and not normed and attention.qkv is not None:
        return project_as_one(attention, x_TC)
    q, k, v = project(attention, x_TC)
    q = placed(attention, attention.q_norm, q, v, angles)
    k = placed(attention, attention.k_norm, k, v, angles)
    return torch.stack([q.to(v), k.to(v), v], 1)


def _contexts(attention: Attention, qkv: Tensor, layout: Layout, bias_T: Tensor | None) -> Tensor:
    """(rows, H, D)"""
    bias_T = None if bias_T is None else bias_T.to(qkv.dtype)
    if not attention.fused_attn:  # one whole map of all images, for who looks at it
        q, k, v = layout.pad(qkv).permute(2, 0, 3, 1, 4).unbind(0)
        mask = q.new_zeros(layout.visible_BN.shape) if bias_T is None else layout.pad(bias_T)
        mask = mask.masked_fill(~layout.visible_BN, -math.inf)
        context = attend(attention, q, k, v, mask[:, None, None, :]).transpose(1, 2)
        return context.flatten(0, 1).index_select(0, layout.place_T)
    dropout = attention.attn_drop.p if attention.training else 0.0
    if bias_T is None and _takes_varlen(qkv, dropout):
        q, k, v = qkv.unbind(1)
        bounds, longest = layout.bounds, layout.longest
        return cast(Tensor, varlen_attn(q, k, v, bounds, bounds, longest, longest))
    heads = attention.num_heads
    return bucketed_attention(qkv, layout.buckets(qkv.dtype, heads), dropout, bias_T)


def _padded_record(
    attention: Attention,
    qkv: Tensor,
    context: Tensor,
    layout: Layout,
    has_class: bool,
    bias_T: Tensor | None,
) -> AttentionRecord:
    q, k, v = layout.pad(qkv).permute(2, 0, 3, 1, 4).unbind(0)
    context = layout.pad(context).transpose(1, 2)
    scale, visible, prefix = scale_of(attention, q), layout.visible_BN, layout.num_prefix
    bias = None if bias_T is None else layout.pad(bias_T)[:, None, None, :]
    return AttentionRecord(q, k, v, context, scale, prefix, has_class, visible, bias=bias)


def _takes_varlen(qkv: Tensor, dropout: float) -> bool:
    return (
        qkv.is_cuda
        and qkv.dtype in (torch.float16, torch.bfloat16)
        and dropout == 0
        and qkv.shape[-1] % 8 == 0
        and qkv.shape[-1] <= 256
        and torch.cuda.get_device_capability(qkv.device) >= (8, 0)
    )
