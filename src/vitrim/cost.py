"""What a plain vision transformer computes for one image, step by step.

One description that both costs read: MACs are the sum over the steps' MACs, milliseconds the sum
over what a latency table says of their parts (``vitrim.latency``). Token counts may be plain
numbers or tensors, through which gradients flow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vitrim.tokens import Grid


@dataclass(frozen=True, slots=True)
class Step:
    """One part of a model, run once."""

    part: str
    """Its kind, which names the table's curve: ``stem``, ``block``, ``attention`` and ``mlp`` (the
    halves of a block), ``cross`` (a block between two sequences), ``masked`` (a block that hides
    tokens and computes them all), ``head``, or a method's own, see :func:`select`."""
    tokens: Any
    """That enter it, prefix included."""
    macs: Any
    block: int | None = None
    """The backbone's block that it belongs to or, for a selector, that it stands before."""
    memory: Any = None
    """Tokens that are looked at, where others than ``tokens`` are."""


def total_macs(steps: Iterable[Step]) -> Any:
    """The sum of the steps' MACs."""
    total: Any = 0
    for step in steps:
        total = total + step.macs
    return total


def stem(family: Any, num_patches: int) -> Step:
    """Patch embedding, prefix tokens and positions."""
    return Step("stem", num_patches + family.num_prefix, family.stem_macs(num_patches))


def block(family: Any, index: int, tokens: Any, part: str = "block") -> Step:
    """Block ``index`` on ``tokens`` tokens."""
    return Step(part, tokens, family.block_macs(index, tokens), index)


def attention_macs(family: Any, index: int, tokens: Any) -> Any:
    """MACs of the first half of block ``index``."""
    return family.block_macs(index, tokens) - family.mlp_macs(index, tokens)


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
    return f"select-{method}{'-adaptive' if adaptive else ''}"


def packed_part(part: str) -> str:
    """The name of a part whose images enter it with unlike counts, packed."""
    return f"{part}-packed"


def head(family: Any, tokens: Any, packages: int = 0) -> Step:
    """Final norm, pooling and classifier; ``packages`` of the ``tokens`` are package tokens."""
    return Step("head", tokens, family.head_macs(tokens, packages))


def dense_steps(family: Any, grid: Grid) -> list[Step]:
    """The backbone alone on one image of ``grid`` patches."""
    num_patches = math.prod(grid)
    tokens = num_patches + family.num_prefix
    blocks = [block(family, index, tokens) for index in range(family.depth)]
    return [stem(family, num_patches), *blocks, head(family, tokens)]
