"""Dropping tokens: those that a method chose go on, and the others are gone or, with ``merge``, go
into the kept token whose features point most nearly their way.

A kept token becomes the mean of what it took up, weighted by how many patches each stands for, and
stands for as many as they did together, which attention heeds from then on (``Tokens.log_size``).
All ways to execute a choice are the same function: what is dropped is a set of tokens like what is
kept, made by the other half of the choice. Images that keep nothing have nowhere to put it.

Merging pays where a part of the tokens goes at once, and hurts where most do, as the nearest kept
token may not be near. Untrained SaiT on DeiT-Tiny, KL to the dense model on 125 held-out images of
ImageNet's training set, dropped and merged, for three scores: at 0.65 of the MACs (after 4 blocks,
115 of 196 kept) 0.044 to 0.061 and 0.027 to 0.039; at 0.5 (67 kept) 0.179 to 0.211 and 0.148 to
0.159; at 0.5 after 3 blocks (83 kept, alike less yet) 0.187 to 0.432 and 0.423 to 0.559.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrim.layers import sampling
from vitrim.layers.merging import Moves, add_rows, direction_of, rows_of, sizes_of
from vitrim.tokens.packed import AnyTokens, PackedTokens, select
from vitrim.tokens.plain import Tokens

SomeTokens = TypeVar("SomeTokens", bound=AnyTokens)


def keep_best(
    tokens: Tokens, score_BN: Tensor, count: int, merge: bool = False
) -> tuple[Tokens, Moves | None]:
    """The ``count`` patch tokens with the best scores, in no order to rely on."""
    if not merge:
        return tokens.gather(sampling.top_k(score_BN, count)), None
    order_BN = score_BN.topk(tokens.num_patches, dim=1).indices
    return keep_first(tokens, order_BN, count, merge)


def keep_first(
    tokens: Tokens, order_BN: Tensor, count: int, merge: bool = False
) -> tuple[Tokens, Moves | None]:
    """The patch tokens at the first ``count`` positions of ``order_BN``."""
    kept = tokens.gather(order_BN[:, :count])
    return absorb(kept, tokens.gather(order_BN[:, count:])) if merge else (kept, None)


def keep_chosen(
    tokens: AnyTokens, keep_BN: Tensor, merge: bool = False
) -> tuple[AnyTokens, Moves | None]:
    """The patch tokens that ``keep_BN`` (bool, on the original grid) names; see ``select``."""
    return _merge_chosen(tokens, keep_BN) if merge else (select(tokens, keep_BN), None)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # as all that deals with counts
def _merge_chosen(tokens: AnyTokens, keep_BN: Tensor) -> tuple[AnyTokens, Moves]:
    return absorb(select(tokens, keep_BN), select(tokens, ~keep_BN))


def hide(tokens: Tokens, keep_BN: Tensor, merge: bool = False) -> tuple[Tokens, Moves | None]:
    """All tokens, under the mask ``keep_BN`` (0 or 1), which keeps none that was hidden before.

    Straight-through gradients of the mask pass through sizes and means too: less of ``keep`` is
    more of the token in the one that it would go into.
    """
    kept = tokens.with_keep(keep_BN)
    if not merge:
        return kept, None
    before_BN = torch.ones_like(keep_BN) if tokens.keep_BN is None else tokens.keep_BN
    return absorb(kept, tokens.with_keep(before_BN - keep_BN))


def absorb(kept: SomeTokens, gone: AnyTokens) -> tuple[SomeTokens, Moves]:
    """``kept``, into which ``gone`` has been merged, and who went where.

    Args:
        kept: what goes on; under a mask or as padding, hidden tokens take up nothing.
        gone: what does not, of the same images; what a mask hides of it is not there.
    """
    if isinstance(kept, PackedTokens) or isinstance(gone, PackedTokens):
        return cast("tuple[SomeTokens, Moves]", _absorb_packed(kept, gone))
    return cast("tuple[SomeTokens, Moves]", _absorb(kept, gone))


def _absorb_packed(kept: AnyTokens, gone: AnyTokens) -> tuple[AnyTokens, Moves]:
    gone = gone.padded() if isinstance(gone, PackedTokens) else gone
    if isinstance(kept, Tokens):
        return _absorb(kept, gone)
    merged, moves = _absorb(kept.padded(), gone)
    x = merged.x.flatten(0, 1).index_select(0, kept.layout.place_T)
    size_BN = cast(Tensor, merged.size_BN)
    size_N = size_BN.flatten().index_select(0, kept.layout.patch_place_N)
    return replace(kept, x=x, size_N=size_N), moves


def _absorb(kept: Tokens, gone: Tokens) -> tuple[Tokens, Moves]:
    alike_BDK = gone.patches @ direction_of(kept.patches).transpose(1, 2)
    if kept.keep_BN is not None:
        hidden_B1K = (kept.keep_BN < 0.5).unsqueeze(1)
        itself_BDK = gone.index_BN.unsqueeze(2) == kept.index_BN.unsqueeze(1)
        alike_BDK = alike_BDK.masked_fill(hidden_B1K | itself_BDK, -torch.inf)
    # One place more than there are tokens, the last choice of all, stands for nowhere.
    least = torch.finfo(alike_BDK.dtype).min
    target_BD = F.pad(alike_BDK, (0, 1), value=least).argmax(-1)

    size_BK, size_BD, there = sizes_of(kept), sizes_of(gone), None
    if gone.keep_BN is not None:
        there, size_BD = gone.keep_BN > 0.5, size_BD * gone.keep_BN
    size_BK = F.pad(size_BK, (0, 1), value=1.0).scatter_add(1, target_BD, size_BD)
    share_BD = size_BD / size_BK.gather(1, target_BD)
    x, row_BD = F.pad(kept.x, (0, 0, 0, 1)), target_BD + kept.num_prefix
    change_BDC = share_BD.unsqueeze(-1) * (gone.patches - rows_of(x, row_BD))
    x = add_rows(x, row_BD, change_BDC)[:, :-1]

    source_BD = gone.index_BN if there is None else gone.index_BN.where(there, -1)
    into_BD = F.pad(kept.index_BN, (0, 1), value=-1).gather(1, target_BD)
    return kept.with_x(x).sized(size_BK[:, :-1]), (source_BD, into_BD)
