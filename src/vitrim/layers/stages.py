"""Stages: before which blocks a method acts, and how many positions it keeps there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from vitrim.config import require


def quarter_stages(depth: int) -> tuple[int, ...]:
    """A quarter, a half and three quarters of the depth: 3, 6, 9 of 12 blocks."""
    return tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)}))


def check_keep_ratio(keep_ratio: float | tuple[float, ...], may_rise: bool = False) -> None:
    """Raise :class:`ConfigError` unless the ratios are in (0, 1], and fall if they must."""
    ratios = keep_ratio if isinstance(keep_ratio, tuple) else (keep_ratio,)
    require(len(ratios) > 0, "keep_ratio is empty; give a number or one number per stage")
    for ratio in ratios:
        require(0 < ratio <= 1, f"keep_ratio is {ratio}; expected a number in (0, 1]")
    falling = may_rise or all(a >= b for a, b in pairwise(ratios))
    require(falling, f"keep_ratio is {ratios}; a later stage cannot keep more than an earlier")


def stage_ratios(keep_ratio: float | tuple[float, ...], num_stages: int) -> tuple[float, ...]:
    """The kept share of the original patches at each stage: r, r^2, r^3 ... of one number r.

    The powers are in the DynamicViT authors' floating-point arithmetic, which their counts follow.
    """
    if isinstance(keep_ratio, tuple):
        require(
            len(keep_ratio) == num_stages,
            f"keep_ratio has {len(keep_ratio)} numbers for {num_stages} stages",
        )
        return keep_ratio
    return tuple(keep_ratio ** (stage + 1) for stage in range(num_stages))


def fixed_counts(ratios: Sequence[float], num_patches: int) -> tuple[int, ...]:
    """Whole patches at each stage, rounded down as the DynamicViT authors do, but at least one."""
    return tuple(max(1, int(num_patches * ratio)) for ratio in ratios)


def stretches(stages: Sequence[int], depth: int) -> list[range]:
    """The blocks before the first stage, then those from each stage to the next."""
    return [range(start, stop) for start, stop in pairwise((0, *stages, depth))]


def check_stages(stages: Sequence[int], depth: int | None = None) -> None:
    """Raise :class:`ConfigError` unless ``stages`` are sorted blocks of a backbone of ``depth``."""
    require(len(stages) > 0, "stages is empty; name at least one block, such as (3, 6, 9)")
    ordered = all(a < b for a, b in pairwise(stages))
    require(ordered, f"stages are {tuple(stages)}; expected increasing block numbers")
    require(stages[0] >= 0, f"stages are {tuple(stages)}; block numbers start at 0")
    if depth is not None:
        require(
            stages[-1] < depth,
            f"stage {stages[-1]} is outside the backbone, whose blocks are 0 to {depth - 1}",
        )
