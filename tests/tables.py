"""Latency tables for tests, made by formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from vitrim import costs
from vitrim.families import family_of
from vitrim.latency.table import Curve, LatencyTable, describe_model
from vitrim.methods import METHODS, method_of_config
from vitrim.tools.hardware import cpu_name

PLACE = {"runtime": "torch", "batch": 1, "threads": 1, "dtype": "fp32"}
PLACE |= {"device": "cpu", "cpu": cpu_name()}


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
    parts["last"] = made(0.001, 0.02)
    for name in (*METHODS, "merging-drop"):
        for adaptive in (False, True):
            # Scoring is half a block, a generation of semantic tokens two of them.
            scales = {"asvit": 0.01, "sait": 0.01, "merging-drop": 0.01, "merging": 0.015}
            scale = (scales | {"stvit": 0.04}).get(name, 0.002)
            parts[costs.select_part(name, adaptive)] = made(scale, 0.04 + 0.01 * adaptive)
    parts |= {costs.packed_part(name): curve for name, curve in parts.items()}
    return LatencyTable(PLACE | describe_model(family) | stamp, parts)


def pyramid_table_of(backbone: nn.Module, configs: Sequence[Any], batch: int = 1) -> LatencyTable:
    """A table whose levels take longer the more positions a method computes."""
    family: Any = family_of(backbone)
    grid = family.grid()
    steps = family.dense_steps(grid)
    for config in configs:
        method = method_of_config(config)(family, config)
        steps += method.steps(family, grid, [1] * len(method.stages))
    parts = {}
    for step in steps:
        full = math.prod(family.stage_grid(grid, step.levels[0])) if step.levels else 1
        times = (2.0, 4.0) if "-" in step.part else (4.0, 4.0)
        parts[step.part] = Curve((0, full), times, times, times)
    return LatencyTable(PLACE | describe_model(family) | {"batch": batch}, parts)
