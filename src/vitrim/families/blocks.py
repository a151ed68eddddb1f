"""The two halves of timm's transformer blocks, whichever family's backbone they stand in.

``Block`` and ``EvaBlock`` have their norms before attention and MLP, ``ResPostBlock`` and
``EvaBlockPostNorm`` behind them. Every piece is the block's own sub-module, called as timm calls
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrim.families.refused import PARTS
from vitrim.tokens.attention import Score, attention_of_first, recorded_attention
from vitrim.tokens.calls import bare, called, is_hooked, kind
from vitrim.tokens.packed import AnyTokens, PackedTokens, packed_attention
from vitrim.tokens.plain import Tokens
from vitrim.tokens.projections import linears_of
from vitrim.tokens.slices import in_slices

SomeTokens = TypeVar("SomeTokens", bound=AnyTokens)
_MLPS = (Mlp, GluMlp, SwiGLU, GeGluMlp)
_POST_NORM = (ResPostBlock, EvaBlockPostNorm)
"""Blocks whose norms stand behind their branches."""
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
    """A block: timm's own (fused) forward, or by halves: packed, under a mask, of tokens that stand
    for several patches, or without the prefix that timm would not turn.
    """
    num_prefix = 0 if tokens.rotary is None else bare(block).attn.num_prefix_tokens
    if isinstance(tokens, PackedTokens) or is_changed(tokens) or tokens.num_prefix < num_prefix:

        def run(x: Tensor) -> Tensor:
            return mlp_half(block, attention_half(block, tokens.with_x(x), has_class)[0]).x

        return tokens.with_x(called(block, run, tokens.x))
    angles = tokens.angles
    if angles is None:
        return tokens.with_x(block(tokens.x))
    return tokens.with_x(block(tokens.x, rope=angles[:, :, num_prefix:]))


def is_changed(tokens: Tokens) -> bool:
    """Whether a block needs to know more of the tokens than their features."""
    return tokens.keep_BN is not None or tokens.size_BN is not None


def whole_for(block: Any) -> str | None:
    """Why a block must be run on all tokens though few are asked for; None: it need not be."""
    attention = bare(block).attn
    if not attention.fused_attn:
        return "fused_attn is off, so that its attention map can be looked at"
    if any(type(linear) is not nn.Linear for linear in linears_of(attention)):
        return "its qkv is no plain linear layer"
    if getattr(attention, "num_kv_groups", 1) > 1:
        return "its heads share keys and values"
    if any(map(is_hooked, (block, *bare(block).modules()))):
        return "something in it is hooked"
    return None


def first_rows(block: Any, tokens: AnyTokens, rows: int) -> Tokens:
    """The first ``rows`` prefix tokens as a block leaves them, alone: exact, for the price of
    their queries; see :func:`vitrim.tokens.attention.attention_of_first`.
    """
    block = bare(block)
    x, angles = given(block, 1, tokens.x), tokens.angles
    if isinstance(tokens, PackedTokens):
        x = tokens.layout.pad(x)
        angles = None if angles is None else tokens.layout.pad(angles).transpose(1, 2)
    out = attention_of_first(block.attn, x, rows, tokens.bias, angles)
    half = tokens.prefix_BPC[:, :rows] + taken(block, 1, out)
    after = mlp_half(block, Tokens.of(half, rows))
    assert isinstance(after, Tokens)
    return after


def split_block(
    block: Any, tokens: AnyTokens, has_class: bool, score: Score, between: Between | None = None
) -> tuple[AnyTokens, Tensor]:
    """A block with a score read off its attention, and something done between its halves.

    Args:
        block: a block of timm's.
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
        block: a block of timm's.
        tokens: what enters it.
        has_class: whether token 0 is a class token.
        score: asks for a score of the patch tokens, read off this attention.

    Returns:
        the tokens between the halves, and the score, (B, N) or, packed, (patch rows,).
    """
    block, angles = bare(block), tokens.angles
    x = given(block, 1, tokens.x)
    if isinstance(tokens, PackedTokens):
        layout, bias = tokens.layout, tokens.log_size_T
        out, scores = packed_attention(block.attn, x, layout, score, has_class, bias, angles)
    else:
        keep = None if tokens.keep_BN is None else tokens.keep_all
        prefix, bias = tokens.num_prefix, tokens.log_size
        out, record = recorded_attention(block.attn, x, prefix, has_class, keep, bias, angles)
        scores = None if score is None else score(record)
    return tokens.with_x(tokens.x + taken(block, 1, out)), scores


def given(block: Any, half: int, x: Tensor) -> Tensor:
    """What the first or second branch of a block works on."""
    if isinstance(block, _POST_NORM):
        return x
    normed: Tensor = getattr(block, f"norm{half}")(x)
    return normed


def taken(block: Any, half: int, out: Tensor) -> Tensor:
    """What the block adds of what a branch gives."""
    if isinstance(block, _POST_NORM):
        out = getattr(block, f"norm{half}")(out)
    elif isinstance(block, EvaBlock):
        scale = getattr(block, f"gamma_{half}")
        out = out if scale is None else scale * out
    else:
        out = getattr(block, f"ls{half}")(out)
    added: Tensor = getattr(block, f"drop_path{half}")(out)
    return added


def mlp_half(block: Any, tokens: AnyTokens) -> AnyTokens:
    """The MLP with its norm and residual."""
    block = bare(block)

    def half(x: Tensor) -> Tensor:
        return x + taken(block, 2, block.mlp(given(block, 2, x)))

    parts = (block.norm2, *block.mlp.modules())
    if isinstance(tokens, PackedTokens) and not any(map(is_hooked, parts)):
        return tokens.with_x(in_slices(half, tokens.x))
    return tokens.with_x(half(tokens.x))


def block_obstacles(
    model: Any, served: Sequence[type[nn.Module]], attentions: Sequence[type[nn.Module]]
) -> Iterator[str]:
    """What keeps the tokens and blocks of a plain vision transformer from being run one by one.

    Args:
        model: of timm's.
        served: kinds of blocks.
        attentions: kinds of their attention layers.
    """
    if not isinstance(model.patch_drop, nn.Identity | None):
        yield "patch_drop_rate > 0 (it drops tokens at random; create the model without it)"
    for block in model.blocks:
        found = _not_served(block, served, attentions)
        if found is not None:
            yield found
            return


def _not_served(
    block: Any, served: Sequence[type[nn.Module]], attentions: Sequence[type[nn.Module]]
) -> str | None:
    parts: dict[str, tuple[Callable[[Any], Any], Sequence[type[nn.Module]]]] = {
        "block": (lambda block: block, served),
        "attention": (lambda block: block.attn, attentions),
        "MLP": (lambda block: block.mlp, _MLPS),
    }
    for what, (part, kinds) in parts.items():
        found = kind(part(block))
        if found not in kinds:
            names = ", ".join(each.__name__ for each in kinds)
            why = PARTS.get(found.__name__)
            why = f": {why}" if why else ""
            return f"{what} type {found.__name__}{why} (served: {names})"
    return None
