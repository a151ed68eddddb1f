"""The two halves of timm's standard transformer block, whichever family's backbone it stands in.

Every piece is the block's own sub-module, called as timm calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrim.tokens.attention import Score, attention_of_first, recorded_attention
from vitrim.tokens.calls import bare, called, is_hooked
from vitrim.tokens.packed import AnyTokens, PackedTokens, in_slices, packed_attention
from vitrim.tokens.plain import Tokens

SomeTokens = TypeVar("SomeTokens", bound=AnyTokens)
Between = Callable[[AnyTokens, Tensor], AnyTokens]
"""Takes the tokens between the halves of a block and their score; gives those that go on."""


def run_blocks(
    chosen: Sequence[nn.Module], tokens: SomeTokens, has_class: bool, again: bool
) -> SomeTokens:
    """Several blocks, one after the other; ``again`` computes them once more in the backward pass
    instead of keeping what is inside (activation checkpointing).
    """
    for block in chosen:

        def run(x: Tensor, block: Any = block, tokens: AnyTokens = tokens) -> Tensor:
            return run_block(block, tokens.with_x(x), has_class).x

        x = checkpoint(run, tokens.x, use_reentrant=False) if again else run(tokens.x)
        tokens = cast(SomeTokens, tokens.with_x(x))
    return tokens


def run_block(block: Any, tokens: AnyTokens, has_class: bool) -> AnyTokens:
    """A ``Block``: timm's own (fused) forward, or by halves: packed, under a mask, or of tokens
    that stand for several patches.
    """
    if isinstance(tokens, PackedTokens) or is_changed(tokens):

        def run(x: Tensor) -> Tensor:
            return mlp_half(block, attention_half(block, tokens.with_x(x), has_class)[0]).x

        return tokens.with_x(called(block, run, tokens.x))
    return tokens.with_x(block(tokens.x))


def is_changed(tokens: Tokens) -> bool:
    """Whether a block needs to know more of the tokens than their features."""
    return tokens.keep_BN is not None or tokens.size_BN is not None


def whole_for(block: Any) -> str | None:
    """Why a ``Block`` must be run on all tokens though few are asked for; None: it need not be."""
    attention = bare(block).attn
    if not attention.fused_attn:
        return "fused_attn is off, so that its attention map can be looked at"
    if type(attention.qkv) is not nn.Linear:
        return "its qkv is no plain linear layer"
    if any(map(is_hooked, (block, *bare(block).modules()))):
        return "something in it is hooked"
    return None


def first_rows(block: Any, tokens: AnyTokens, rows: int) -> Tokens:
    """The first ``rows`` prefix tokens as a ``Block`` leaves them, alone: exact, for the price of
    their queries; see :func:`vitrim.tokens.attention.attention_of_first`.
    """
    block = bare(block)
    x = block.norm1(tokens.x)
    x = tokens.layout.pad(x) if isinstance(tokens, PackedTokens) else x
    out = attention_of_first(block.attn, x, rows, tokens.bias)
    half = tokens.prefix_BPC[:, :rows] + block.drop_path1(block.ls1(out))
    after = mlp_half(block, Tokens.of(half, rows))
    assert isinstance(after, Tokens)
    return after


def split_block(
    block: Any, tokens: AnyTokens, has_class: bool, score: Score, between: Between | None = None
) -> tuple[AnyTokens, Tensor]:
    """A ``Block`` with a score read off its attention, and something done between its halves.

    Args:
        block: a ``timm.models.vision_transformer.Block``.
        tokens: what enters it.
        has_class: whether token 0 is a class token.
        score: of the patch tokens.
        between: what is done; None does nothing.

    Returns:
        the tokens that leave the block, and the score, (B, N) or, packed, (patch rows,).
    """
    left: list[tuple[AnyTokens, Tensor]] = []

    def run(x: Tensor) -> Tensor:
        half, scores = attention_half(block, tokens.with_x(x), has_class, score)
        assert scores is not None
        after = mlp_half(block, half if between is None else between(half, scores))
        left.append((after, scores))
        return after.x

    x = called(block, run, tokens.x)
    after, scores = left[0]
    return after.with_x(x), scores


def attention_half(
    block: Any, tokens: AnyTokens, has_class: bool, score: Score | None = None
) -> tuple[AnyTokens, Tensor | None]:
    """Attention with its norm and residual.

    Args:
        block: a ``timm.models.vision_transformer.Block``.
        tokens: what enters it.
        has_class: whether token 0 is a class token.
        score: asks for a score of the patch tokens, read off this attention.

    Returns:
        the tokens between the halves, and the score, (B, N) or, packed, (patch rows,).
    """
    x = block.norm1(tokens.x)
    if isinstance(tokens, PackedTokens):
        layout, bias = tokens.layout, tokens.log_size_T
        out, scores = packed_attention(block.attn, x, layout, score, has_class, bias)
    else:
        keep = None if tokens.keep_BN is None else tokens.keep_all
        prefix, bias = tokens.num_prefix, tokens.log_size
        out, record = recorded_attention(block.attn, x, prefix, has_class, keep, bias)
        scores = None if score is None else score(record)
    return tokens.with_x(tokens.x + block.drop_path1(block.ls1(out))), scores


def mlp_half(block: Any, tokens: AnyTokens) -> AnyTokens:
    """The MLP with its norm and residual."""
    block = bare(block)

    def half(x: Tensor) -> Tensor:
        out: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return out

    parts = (block.norm2, *block.mlp.modules())
    if isinstance(tokens, PackedTokens) and not any(map(is_hooked, parts)):
        return tokens.with_x(in_slices(half, tokens.x))
    return tokens.with_x(half(tokens.x))
