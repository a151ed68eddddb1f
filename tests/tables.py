"""Latency tables for tests, made by formula."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from vitrim import cost
from vitrim.families import family_of
from vitrim.hardware import cpu_name
from vitrim.latency import Curve, LatencyTable, describe_model
from vitrim.methods import METHODS


def table_of(backbone: nn.Module, *, jump: int = 0, **stamp: Any) -> LatencyTable:
    """A table whose blocks take longer with more tokens, and jump behind so many tokens."""
    family = family_of(backbone)
    most = math.prod(family.grid()) + family.num_prefix
    tokens = sorted({most, *range(2, most, 3)})

    def made(scale: float, constant: float) -> Curve:
        times = tuple(
            constant + scale * (n + n * n / 200) + (scale * 30 if jump and n > jump else 0)
            for n in tokens
        )
        return Curve(tuple(tokens), times, times, times)

    parts = {"stem": made(0, 0.3), "head": made(0, 0.1), "block": made(0.02, 0.05)}
    parts |= {"attention": made(0.008, 0.02), "mlp": made(0.012, 0.03), "cross": made(0.02, 0.1)}
    for name in METHODS:
        for adaptive in (False, True):
            # Scoring is half a block, a generation of semantic tokens two of them.
            scale = {"asvit": 0.01, "sait": 0.01, "stvit": 0.04}.get(name, 0.002)
            parts[cost.select_part(name, adaptive)] = made(scale, 0.04 + 0.01 * adaptive)
    parts |= {cost.packed_part(name): curve for name, curve in parts.items()}
    place = {"runtime": "torch", "batch": 1, "threads": 1, "dtype": "fp32"}
    place |= {"device": "cpu", "cpu": cpu_name()}
    return LatencyTable(place | describe_model(family) | stamp, parts)
