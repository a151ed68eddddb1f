"""Attention of packed images on the kernels that torch has everywhere, a few images per call.

The images lie in order of their length. Images of equal length are one plain batch, a view of the
packed rows without a copy. Others may share a call once they are copied to one length, under a mask
that hides the rest; that pays where calls are dear compared with their work, and where the number
of keys fits the kernel badly. :class:`Costs` says which it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

_LANES = 16
"""CPU kernels like their keys in multiples of this: the rest of a row is done one by one."""
_SPAN = 32
"""Images whose lengths differ by more never share a call."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Time of an attention call in nanoseconds, from which the buckets are chosen.

    Work counts per head of 64 channels. CPU numbers were measured on one core
    (``python benchmarks/packing.py --fit``); only their proportions matter.
    """

    call: float
    """A call without its work, on one thread."""
    pair: float
    """A query and a key."""
    ragged: float
    """A query, where the number of keys is no multiple of 16."""
    tail: float
    """A query and a key beyond the last multiple of 16."""
    row: float
    """A row's queries, keys and values, copied to a padded place."""
    back: float
    """A row's context, copied back from a padded place; not so where all are equally long."""

    def of_view(self, images: int, length: int, heads: int, threads: int) -> float:
        """Of ``images`` of the same ``length``, as they lie."""
        tail = length % _LANES
        query = self.pair * length + (self.ragged + self.tail * tail if tail else 0.0)
        work = images * length * query * heads * _share(images, length, heads, threads)
        return self._calling(threads) + work

    def of_padded(
        self, images: int, longest: int, heads: int, threads: int, equal: bool = False
    ) -> float:
        """Of ``images`` copied to the length of the ``longest``, or all ``equal`` to it."""
        keys = _padded(longest)
        work = (self.pair * longest + self.row) * keys + (0.0 if equal else self.back * longest)
        share = _share(images, longest, heads, threads)
        return self._calling(threads) + images * work * heads * share

    def _calling(self, threads: int) -> float:
        """Each of a call's operations waits for its last thread: measured with one and two."""
        return self.call * threads**2


def _padded(length: int) -> int:
    return -(-length // _LANES) * _LANES


def _share(images: int, length: int, heads: int, threads: int) -> float:
    """The busiest thread's share: kernels hand out heads of images in pieces of 32 queries."""
    pieces = images * heads * -(-length // 32)
    return math.ceil(pieces / threads) / pieces


COSTS = {
    torch.float32: Costs(call=19_000, pair=3.75, ragged=86.0, tail=3.0, row=35.0, back=20.0),
    torch.bfloat16: Costs(call=22_000, pair=3.85, ragged=140.0, tail=0.0, row=62.0, back=27.0),
}
"""Measured on an AMD EPYC (Zen 5) core with torch 2.15; other types count as bfloat16."""
CUDA_COSTS = Costs(call=50_000, pair=0.01, ragged=0.0, tail=0.0, row=0.1, back=0.1)
"""For what varlen does not take. Not measured, for want of a device: few calls are best there."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Images next to each other in the packed rows that share one attention call."""

    images: int
    longest: int
    num_rows: int
    """Their packed rows together."""
    rows: Tensor | None = None
    """(images * padded length,): the bucket's row in each padded place; places beyond an image's
    end repeat its first row, so that no image's numbers come near another's. None: a view does."""
    mask: Tensor | None = None
    """(images, 1, 1, padded length): what to add to the logits."""
    back: Tensor | None = None
    """(num_rows,): place of each packed row among (images * longest) contexts; None: the same."""


def divide(
    lengths: Sequence[int], costs: Costs, heads: int, threads: int = 1
) -> list[tuple[int, int, bool]]:
    """Divide sorted lengths into buckets (start, stop, padded), at the least cost in sum."""
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    ends = list(accumulate(count for _, count in runs))
    starts = [0, *ends]
    best = [0.0]
    choice: list[tuple[int, bool]] = []
    for last, (longest, count) in enumerate(runs):
        view = best[last] + costs.of_view(count, longest, heads, threads)
        options = [(view, (last, False))]
        for first in range(last, -1, -1):
            if longest - runs[first][0] > _SPAN:
                break
            images = ends[last] - starts[first]
            cost = costs.of_padded(images, longest, heads, threads, equal=first == last)
            options.append((best[first] + cost, (first, True)))
        cheapest = min(options)
        best.append(cheapest[0])
        choice.append(cheapest[1])
    buckets = []
    last = len(runs)
    while last > 0:
        first, padded = choice[last - 1]
        buckets.append((starts[first], starts[last], padded))
        last = first
    return buckets[::-1]


def make_bucket(
    lengths: Sequence[int],
    padded: bool,
    dtype: torch.dtype,
    device: torch.device,
    lanes: int = _LANES,
) -> Bucket:
    """The bucket of images of these sorted ``lengths``: ``padded`` to a multiple of ``lanes``, or,
    all being equal, as they lie.
    """
    images, longest, num_rows = len(lengths), lengths[-1], sum(lengths)
    if not padded:
        return Bucket(images, longest, num_rows)
    ends = torch.tensor(lengths).unsqueeze(1)
    starts = ends.cumsum(0) - ends
    place = torch.arange(-(-longest // lanes) * lanes)
    visible = place < ends
    rows = starts + place * visible
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)
    rows, mask = (
        table.to(device, non_blocking=True) for table in (rows.flatten(), mask[:, None, None])
    )
    if lengths[0] == longest:
        return Bucket(images, longest, num_rows, rows, mask)
    back = visible[:, :longest].flatten().nonzero().flatten().to(device, non_blocking=True)
    return Bucket(images, longest, num_rows, rows, mask, back)


def bucketed_attention(
    qkv_T3HD: Tensor, buckets: list[Bucket], dropout: float, bias_T: Tensor | None = None
) -> Tensor:
    """(rows, H, D): the context of every row, a call per bucket; ``bias_T`` (rows,) is added to the
    logits of the keys.
    """
    contexts = []
    rows = [bucket.num_rows for bucket in buckets]
    parts = torch.split(qkv_T3HD, rows)
    biases = [None] * len(rows) if bias_T is None else torch.split(bias_T, rows)
    for part, bias, bucket in zip(parts, biases, buckets, strict=True):
        padded = part if bucket.rows is None else part.index_select(0, bucket.rows)
        q, k, v = _heads(padded, bucket.images)
        if bucket.rows is not None:
            q = q[:, :, : bucket.longest]
        mask = bucket.mask
        if bias is not None:
            bias = bias if bucket.rows is None else bias.index_select(0, bucket.rows)
            bias = bias.view(bucket.images, 1, 1, -1)
            mask = bias if mask is None else mask + bias
        context = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        context = context.transpose(1, 2).flatten(0, 1)
        if bucket.back is not None:
            context = context.index_select(0, bucket.back)
        contexts.append(context)
    return torch.cat(contexts)


def _heads(qkv_T3HD: Tensor, images: int) -> tuple[Tensor, ...]:
    """Queries, keys and values (B, H, N, D) of images of one length."""
    shape = (images, -1, *qkv_T3HD.shape[1:])
    return qkv_T3HD.view(shape).permute(2, 0, 3, 1, 4).unbind(0)
