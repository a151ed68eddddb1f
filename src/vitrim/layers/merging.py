"""Merging tokens: who goes into whom, and what becomes of them.

Bipartite matching after ToMe (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv
2210.09461, section 3): tokens at even places of the sequence, prefix included, may go into tokens
at odd places, each into the most similar one. Everything that touches features works on the rows
that go, not on those that stay: merging costs by how much it merges.

How many go is a number for all images (:func:`match`, :func:`merge`), or follows from what it costs
them, image by image (:func:`merge_below`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrim.tokens.graphs import exporting
from vitrim.tokens.packed import AnyTokens, select
from vitrim.tokens.plain import Tokens

Moves = tuple[Tensor, Tensor]
"""Original places (B, D) of tokens that left, and of the tokens that each went into; -1 for no
token, and for nowhere."""


@dataclass(frozen=True, slots=True)
class Matching:
    """Which patch tokens stay, and into which of these the others go; places count patch tokens."""

    order_BN: Tensor
    """(B, N) int64: places of those that stay, then of those that go."""
    target_BR: Tensor
    """(B, R) int64: where among those that stay each of the others goes."""
    going_BR: Tensor | None = None
    """(B, R) bool: whether it goes; None: all of them do. What does not is listed among those that
    stay, too."""

    @property
    def kept_BK(self) -> Tensor:
        """(B, K) int64: places of those that stay."""
        return self.order_BN[:, : self.order_BN.shape[1] - self.target_BR.shape[1]]

    @property
    def source_BR(self) -> Tensor:
        """(B, R) int64: places of those that go."""
        return self.order_BN[:, self.order_BN.shape[1] - self.target_BR.shape[1] :]


def most_sources(num_patches: int, num_prefix: int) -> int:
    """How many of ``num_patches`` tokens may go at once: those at even places of the sequence."""
    return (num_patches + (num_prefix + 1) % 2) // 2


def match(
    metric_BNC: Tensor, count: int, num_prefix: int, weight_BN: Tensor | None = None
) -> Matching:
    """The ``count`` cheapest merges of tokens at even places into tokens at odd ones.

    Going costs ``(1 - cosine) * weight``, the cosine that of the most similar token at an odd
    place. Who stays keeps to the order of the sequence, the even places before the odd ones.

    Args:
        metric_BNC: what patch tokens are compared by, one row each; not normalised.
        count: of tokens that go, :func:`most_sources` at most.
        num_prefix: tokens before them in the sequence.
        weight_BN: see above; None: 1.
    """
    even, odd = _starts(num_prefix)
    gain_BA, target_BA = _nearest(metric_BNC, num_prefix, weight_BN)
    order_BA = _sorted(gain_BA, descending=True).indices
    going_BR, staying_BA = order_BA[:, :count], _sorted(order_BA[:, count:]).values
    odd_places = torch.arange(odd, metric_BNC.shape[1], 2, device=metric_BNC.device)
    odd_places = odd_places.expand(order_BA.shape[0], -1)
    even_places = torch.add(even, torch.cat([staying_BA, going_BR], 1), alpha=2)
    staying = staying_BA.shape[1]
    order_BN = torch.cat([even_places[:, :staying], odd_places, even_places[:, staying:]], 1)
    return Matching(order_BN, target_BA.gather(1, going_BR) + staying)


def _starts(num_prefix: int) -> tuple[int, int]:
    """Of the patch tokens, the first at an even place of the sequence, and at an odd one."""
    return num_prefix % 2, 1 - num_prefix % 2


def _nearest(
    metric_BNC: Tensor, num_prefix: int, weight_BN: Tensor | None, shown_BN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of the tokens at even places, what going costs each, below 0, and into which it would go,
    counted among those at odd places (B, A); see :func:`match`. What is not shown has no part.
    """
    even, odd = _starts(num_prefix)
    source_BAC = metric_BNC[:, even::2]
    # Rows of targets, columns of sources: torch finds maxima faster along the first of the two.
    alike_BTA = direction_of(metric_BNC[:, odd::2]) @ source_BAC.transpose(1, 2)
    if shown_BN is not None:
        alike_BTA = alike_BTA.masked_fill(~shown_BN[:, odd::2, None], -torch.inf)
    best = alike_BTA.max(1)
    norm_BA = torch.linalg.vector_norm(source_BAC, dim=-1)
    gain_BA = (best.values / norm_BA.clamp(min=torch.finfo(norm_BA.dtype).tiny)).float() - 1
    if weight_BN is not None:
        gain_BA = gain_BA * weight_BN[:, even::2]
    if shown_BN is not None:
        gain_BA = gain_BA.masked_fill(~shown_BN[:, even::2], -torch.inf)
    return gain_BA, best.indices


def merge(tokens: Tokens, matching: Matching, weight_BN: Tensor | None = None) -> Tokens:
    """The tokens that stay, each the mean of itself and those that went into it.

    Args:
        tokens: what stays and what goes; a mask is left away.
        matching: who goes where.
        weight_BN: of the patch tokens in that mean; None: their sizes, as in ToMe.
    """
    target_BR = matching.target_BR
    ordered, size_BN = tokens.sized(None).gather(matching.order_BN), sizes_of(tokens)
    num_kept = ordered.num_patches - target_BR.shape[1]

    def summed(values_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Of those that go, and the sum of what each that stays has together with them."""
        kept_BK = values_BN.gather(1, matching.kept_BK)  # its own memory: it is overwritten
        going_BR = values_BN.gather(1, matching.source_BR)
        if matching.going_BR is not None:
            going_BR = going_BR * matching.going_BR
        return going_BR, add_rows(kept_BK, target_BR, going_BR)

    size_BR, size_BK = summed(size_BN)
    going_BR, weight_BK = (size_BR, size_BK) if weight_BN is None else summed(weight_BN)
    share_BR = going_BR / weight_BK.gather(1, target_BR)
    target_BR = target_BR + tokens.num_prefix
    last = tokens.num_prefix + num_kept
    change = ordered.x[:, last:] - rows_of(ordered.x, target_BR)
    x = add_rows(ordered.x, target_BR, share_BR.unsqueeze(-1) * change)[:, :last]
    index_BK = ordered.index_BN[:, :num_kept]
    return Tokens(x, tokens.num_prefix, index_BK, rotary=tokens.rotary).sized(size_BK)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # as all that deals with counts
def merge_below(
    tokens: Tokens,
    metric_BNC: Tensor,
    threshold: float,
    num_patches: int,
    cost_BN: Tensor | None = None,
    weight_BN: Tensor | None = None,
) -> tuple[AnyTokens, Moves]:
    """Every merge that costs less than ``threshold``: a number that may differ between images.

    Args:
        tokens: of images that have unlike numbers of them, padded under a mask; what it hides goes
            nowhere, nor does anything go into it.
        metric_BNC: what patch tokens are compared by, see :func:`match`.
        threshold: of the costs of going, which stand there too.
        num_patches: of the original grid.
        cost_BN: of the patch tokens in these costs; None: 1.
        weight_BN: of the patch tokens in means; None: their sizes.

    Returns:
        what goes on, and what became of the others.
    """
    starts, num_images = _starts(tokens.num_prefix), metric_BNC.shape[0]
    if not exporting() and tokens.num_patches < 2:
        return tokens, (tokens.index_BN[:, :0], tokens.index_BN[:, :0])
    shown_BN = None if tokens.keep_BN is None else tokens.keep_BN > 0.5
    gain_BA, target_BA = _nearest(metric_BNC, tokens.num_prefix, cost_BN, shown_BN)
    going_BA = gain_BA > -threshold
    even, odd = (
        torch.arange(start, metric_BNC.shape[1], 2, device=metric_BNC.device) for start in starts
    )
    # In the order of a match, if all at even places stayed; these once more, as those that may go.
    order_BN = torch.cat([even, odd, even]).expand(num_images, -1)
    matching = Matching(order_BN, target_BA + even.shape[0], going_BA)
    merged = merge(tokens, matching, weight_BN)
    staying_BN = torch.cat([~going_BA, going_BA.new_ones(num_images, odd.shape[0])], 1)
    if shown_BN is not None:
        staying_BN = staying_BN & shown_BN.gather(1, matching.kept_BK)
    source_BA, into_BA = moves_of(tokens, matching, merged)
    merged = merged.with_keep(staying_BN.to(merged.x.dtype))
    after = select(merged, staying_BN.new_ones(num_images, num_patches))
    return after, (source_BA.where(going_BA, -1), into_BA)


def sizes_of(tokens: Tokens) -> Tensor:
    """(B, N): how many patches each patch token stands for; 16 bits would lose count at 256."""
    if tokens.size_BN is not None:
        return tokens.size_BN
    dtype = torch.promote_types(tokens.x.dtype, torch.float32)
    return tokens.x.new_ones(tokens.index_BN.shape, dtype=dtype)


def direction_of(x_BNC: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros, which is like no other, stays as it is.

    What is compared is made so before it is multiplied: products of long rows overflow in 16 bits.
    """
    return F.normalize(x_BNC, dim=-1, eps=torch.finfo(x_BNC.dtype).tiny)


def _sorted(values_BN: Tensor, descending: bool = False) -> Any:
    """Each row's values and where they were."""
    if exporting():  # a graph's sort asks for the row's size when it runs
        return values_BN.topk(values_BN.shape[1], dim=1, largest=descending)
    return values_BN.sort(1, descending=descending)


def moves_of(before: Tokens, matching: Matching, after: Tokens) -> Moves:
    """What a merge moved."""
    source_BR = before.index_BN.gather(1, matching.source_BR)
    return source_BR, after.index_BN.gather(1, matching.target_BR)


def rows_of(x_BNC: Tensor, row_BR: Tensor) -> Tensor:
    """(B, R, C): rows of each image."""
    rows = x_BNC.flatten(0, 1).index_select(0, _flat(row_BR, x_BNC))
    return rows.view(*row_BR.shape, x_BNC.shape[2])


def add_rows(x_BNC: Tensor, row_BR: Tensor, values_BRC: Tensor) -> Tensor:
    """``x`` (B, N, C) or (B, N), which is overwritten, with ``values`` added to some rows of each
    image.
    """
    rows, values = x_BNC.flatten(0, 1), values_BRC.flatten(0, 1).to(x_BNC.dtype)
    return rows.index_add_(0, _flat(row_BR, x_BNC), values).view(x_BNC.shape)


def _flat(row_BR: Tensor, x_BNC: Tensor) -> Tensor:
    """(B * R,): rows of each image among those of all."""
    num_images, num_rows = x_BNC.shape[:2]
    if isinstance(num_images, int) and num_images == 1:
        return row_BR[0]
    start = torch.arange(num_images, device=row_BR.device).unsqueeze(1) * num_rows
    return (row_BR + start).flatten()
