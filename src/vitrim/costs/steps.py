"""What a model computes for one image, step by step.

One description that both costs read: MACs are the sum over the steps' MACs, milliseconds the sum
over what a latency table says of their parts (``vitrim.latency.table``). Token counts may be plain
numbers or tensors, through which gradients flow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vitrim.tokens.plain import Grid

SELECT = "select-"
"""What the names of methods' own parts start with; see :func:`select`."""


@dataclass(frozen=True, slots=True)
class Step:
    """One part of a model, run once."""

    part: str
    """Its kind, which names the table's curve: ``stem``, ``block``, ``attention`` and ``mlp`` (the
    halves of a block), ``last`` (of the last block what the logits need), ``cross`` (a block
    between two sequences), ``masked`` (a block that hides tokens and computes them all), ``head``,
    or a method's own, see :func:`select`; in pyramids whole levels, see :func:`level` and
    :func:`sparse_levels`."""
    tokens: Any
    """That enter it, prefix included; of levels the positions that are computed."""
    macs: Any
    block: int | None = None
    """The backbone's block that it belongs to or, for a selector, that it stands before."""
    memory: Any = None
    """Tokens that are looked at, where others than ``tokens`` are."""
    levels: tuple[int, ...] = ()
    """Of a pyramid, that it covers, from 0."""


def total_macs(steps: Iterable[Step]) -> Any:
    """The sum of the steps' MACs."""
    total: Any = 0
    for step in steps:
        total = total + step.macs
    return total


def without_head(steps: Iterable[Step]) -> Any:
    """MACs of all steps but the head: of a backbone that gives its maps."""
    return total_macs(step for step in steps if step.part != "head")


def stem(family: Any, num_patches: int) -> Step:
    """Patch embedding, prefix tokens and positions."""
    return Step("stem", num_patches + family.num_prefix, family.stem_macs(num_patches))


def block(family: Any, index: int, tokens: Any, part: str = "block") -> Step:
    """Block ``index`` on ``tokens`` tokens."""
    return Step(part, tokens, family.block_macs(index, tokens), index)


def attention_macs(family: Any, index: int, tokens: Any) -> Any:
    """MACs of the first half of block ``index``."""
    return family.block_macs(index, tokens) - family.mlp_macs(index, tokens)


def matching_macs(family: Any, before: Any, after: Any) -> Any:
    """MACs of finding, for each patch token that is dropped, the kept one that is most like it,
    given how many patch tokens there were and are.
    """
    return (before - after) * after * family.embed_dim


def mlp(family: Any, index: int, tokens: Any) -> Step:
    """The second half of block ``index``."""
    return Step("mlp", tokens, family.mlp_macs(index, tokens), index)


def select(method: str, index: int, tokens: Any, macs: Any, adaptive: bool = False) -> Step:
    """What a method does to choose among ``tokens`` tokens, and gathering what it keeps.

    Args:
        method: its name.
        index: block before which it chooses, or inside which.
        tokens: that it sees, prefix included.
        macs: of all of that.
        adaptive: whether each image decides how many it keeps.
    """
    return Step(select_part(method, adaptive), tokens, macs, index)


def select_part(method: str, adaptive: bool) -> str:
    """The part's name, which a latency table has for each method that was profiled."""
    return f"{SELECT}{method}{'-adaptive' if adaptive else ''}"


def packed_part(part: str) -> str:
    """The name of a part whose images enter it with unlike counts, packed."""
    return f"{part}-packed"


def head(family: Any, tokens: Any, packages: int = 0) -> Step:
    """Final norm, pooling and classifier; ``packages`` of the ``tokens`` are package tokens."""
    return Step("head", tokens, family.head_macs(tokens, packages))


def answer(
    family: Any, tokens: Any, exact: bool = True, part: str = "block", packages: int = 0
) -> list[Step]:
    """The last block of a plain vision transformer, and the head: see ``ViT.answer``.

    Args:
        family: of the backbone.
        tokens: that enter the block.
        exact: whether the block computes no more than the logits need, where that can be.
        part: what the block is where it runs whole.
        packages: how many of the tokens are package tokens.
    """
    last = family.depth - 1
    if not exact or family.whole_last_block is not None:
        return [block(family, last, tokens, part), head(family, tokens, packages)]
    rows = Step("last", tokens, family.last_rows_macs(tokens), last)
    return [rows, head(family, family.read_rows)]


def plain_steps(family: Any, grid: Grid, exact: bool = False) -> list[Step]:
    """A plain vision transformer alone on one image of ``grid`` patches; ``exact``: see
    :func:`answer`.
    """
    num_patches = math.prod(grid)
    tokens = num_patches + family.num_prefix
    blocks = [block(family, index, tokens) for index in range(family.depth - 1)]
    return [stem(family, num_patches), *blocks, *answer(family, tokens, exact)]


def level(family: Any, number: int, grid: Grid, macs: Any = None) -> Step:
    """Level ``number`` of a pyramid, from its downsampling to its last block, on every position;
    ``macs``, where a method adds to the backbone's own.
    """
    positions = math.prod(family.stage_grid(grid, number))
    macs = family.level_macs(number, grid) if macs is None else macs
    return Step(f"level{number}", positions, macs, levels=(number,))


def dense_levels(family: Any, grid: Grid) -> list[Step]:
    """Every level of a pyramid, as the backbone runs it."""
    return [level(family, number, grid) for number in range(len(family.depths))]


def sparse_levels(
    method: str,
    numbers: Sequence[int],
    positions: Any,
    macs: Any,
    *,
    before: Sequence[int] = (),
    adaptive: bool = False,
) -> Step:
    """Levels of a pyramid as a method runs them, choosing included.

    Args:
        method: its name, and what else tells its curves apart.
        numbers: of the levels, one after the other.
        positions: that take the full computation in a block that is sparse; their mean, where
            blocks differ.
        macs: of all of that.
        before: blocks of the first level before which it chooses; others have other curves.
        adaptive: whether each image decides how many it keeps.
    """
    first, last = numbers[0], numbers[-1]
    name = f"level{first}" if first == last else f"level{first}to{last}"
    where = f"@{','.join(map(str, before))}" if before else ""
    part = f"{name}-{method}{where}{'-adaptive' if adaptive else ''}"
    return Step(part, positions, macs, levels=tuple(numbers))


def pyramid_steps(family: Any, grid: Grid, levels: Iterable[Step]) -> list[Step]:
    """Stem, ``levels`` and head of a pyramid on one image of ``grid`` patches."""
    last = math.prod(family.stage_grid(grid, len(family.depths) - 1))
    stem = Step("stem", math.prod(grid) + family.num_prefix, family.stem_macs(grid))
    return [stem, *levels, Step("head", last + family.num_prefix, family.head_macs())]
