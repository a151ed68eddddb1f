"""Merging tokens: who goes into whom, and what becomes of them.

Bipartite matching after ToMe (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv
2210.09461, section 3): tokens at even places of the sequence, prefix included, may go into tokens
at odd places, each into the most similar one. Everything that touches features works on the rows
that go, not on those that stay: merging costs by how much it merges.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitrim.tokens.plain import Tokens

EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Matching:
    """Which patch tokens stay, and into which of these the others go; places count patch tokens."""

    kept_BK: Tensor
    """(B, K) int64: places of those that stay."""
    source_BR: Tensor
    """(B, R) int64: places of those that go."""
    target_BR: Tensor
    """(B, R) int64: where among those that stay each of them goes."""


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
    first = num_prefix % 2
    norm_BN = torch.linalg.vector_norm(metric_BNC, dim=-1)
    a_BAC, b_BTC = metric_BNC[:, first::2], metric_BNC[:, 1 - first :: 2]
    # Rows of targets, columns of sources: torch finds maxima faster along the first of the two.
    similar_BTA = (b_BTC @ a_BAC.transpose(1, 2)) / norm_BN[:, 1 - first :: 2].unsqueeze(-1)
    best = similar_BTA.max(1)
    cost_BA = 1 - (best.values / norm_BN[:, first::2]).float()
    if weight_BN is not None:
        cost_BA = cost_BA * weight_BN[:, first::2]
    order_BA = cost_BA.argsort(1)
    going_BR, staying = order_BA[:, :count], order_BA[:, count:].sort(1).values
    places_T = torch.arange(1 - first, metric_BNC.shape[1], 2, device=metric_BNC.device)
    kept_BK = torch.cat([staying * 2 + first, places_T.expand(staying.shape[0], -1)], 1)
    target_BR = best.indices.gather(1, going_BR) + staying.shape[1]
    return Matching(kept_BK, going_BR * 2 + first, target_BR)


def merge(
    tokens: Tokens, matching: Matching, weight_BN: Tensor | None = None, keep_norm: bool = False
) -> Tokens:
    """The tokens that stay, each the mean of itself and those that went into it.

    Args:
        tokens: without a mask.
        matching: who goes where.
        weight_BN: of the patch tokens in that mean; None: their sizes, as in ToMe.
        keep_norm: give the mean the mean norm of its parts, which averaging makes smaller.
    """
    size_BN = tokens.size_BN
    if size_BN is None:
        size_BN = tokens.x.new_ones(tokens.index_BN.shape)
    weight_BN = size_BN if weight_BN is None else weight_BN
    kept = replace(tokens, size_BN=size_BN).gather(matching.kept_BK)
    source_BR, target_BR = matching.source_BR, matching.target_BR
    assert kept.size_BN is not None
    size_BK = kept.size_BN.scatter_add(1, target_BR, size_BN.gather(1, source_BR))

    going_BR = weight_BN.gather(1, source_BR)
    weight_BK = weight_BN.gather(1, matching.kept_BK).scatter_add(1, target_BR, going_BR)
    share_BR = going_BR / weight_BK.gather(1, target_BR)
    prefix = tokens.num_prefix
    source = rows_of(tokens.x, source_BR + prefix)
    target = rows_of(kept.x, target_BR + prefix)
    x = add_rows(kept.x, target_BR + prefix, share_BR.unsqueeze(-1) * (source - target))
    if keep_norm:
        before_BR = _norm(target)
        gained_BR = share_BR * (_norm(source) - before_BR)
        gained_BK = torch.zeros_like(weight_BK).scatter_add(1, target_BR, gained_BR)
        same_BK = torch.zeros_like(weight_BK).scatter_add(1, target_BR, torch.ones_like(share_BR))
        mean = rows_of(x, target_BR + prefix)
        wanted_BR = before_BR + gained_BK.gather(1, target_BR)
        factor_BR = wanted_BR / _norm(mean).clamp(min=EPS) - 1
        factor_BR = factor_BR / same_BK.gather(1, target_BR)
        x = add_rows(x, target_BR + prefix, factor_BR.unsqueeze(-1) * mean)
    return replace(kept, x=x, size_BN=size_BK)


def rows_of(x_BNC: Tensor, row_BR: Tensor) -> Tensor:
    """(B, R, C): rows of each image."""
    num_images, num_rows, width = x_BNC.shape
    start = torch.arange(num_images, device=x_BNC.device).unsqueeze(1) * num_rows
    rows = x_BNC.flatten(0, 1).index_select(0, (row_BR + start).flatten())
    return rows.view(num_images, -1, width)


def add_rows(x_BNC: Tensor, row_BR: Tensor, values_BRC: Tensor) -> Tensor:
    """``x_BNC``, which is overwritten, with ``values`` added to some rows of each image."""
    num_images, num_rows, _ = x_BNC.shape
    start = torch.arange(num_images, device=x_BNC.device).unsqueeze(1) * num_rows
    flat = x_BNC.flatten(0, 1)
    flat = flat.index_add_(0, (row_BR + start).flatten(), values_BRC.flatten(0, 1).to(flat.dtype))
    return flat.view(x_BNC.shape)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)
