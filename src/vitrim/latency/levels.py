"""The levels of a pyramid, ready to run alone: what a latency table has curves of on Swin, ConvNeXt
and PiT.

A level is a stage of the backbone, from its downsampling to its last block. As the backbone runs
it, its curve is one number. As a method runs it, it is the method's own inference on a backbone
whose other levels have no blocks, with all that it does to choose; its curve goes by how many
positions take the full computation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.budget import Curve
from vitrim.families import family_of
from vitrim.families.inside import features_of
from vitrim.latency.parts import Part, new_method
from vitrim.methods.base import Method
from vitrim.methods.records import Recorder

LEAST, MOST = 0.1, 0.97
"""Shares of the positions that a method's curve goes from and to, and then to all of them."""


class Level(Part):
    """Levels of a pyramid, as the backbone runs them or as ``method`` does, on the features that
    enter the first.
    """

    def __init__(
        self, backbone: nn.Module, levels: Sequence[int], method: Method | None = None
    ) -> None:
        super().__init__(backbone)
        self.levels, self.method = tuple(levels), method
        self.inside: Any = self.family.only(self.levels)

    def forward(self, images: Tensor) -> Tensor:
        if self.method is not None:
            return self.method.infer(self.inside, images)
        state = self.tokens(images)
        for level in self.levels:
            state = self.family.run_stage(level, state)
        return features_of(state)

    def kept(self, images: Tensor) -> float:
        """Positions that the method chooses, mean over the images."""
        assert self.method is not None
        recorder = Recorder(self.inside.grid())
        with torch.no_grad():
            self.method.infer(self.inside, images, recorder)
        return float(recorder.stages[0].counts.double().mean())


def as_methods_run_them(
    backbone: nn.Module, config: Any, shapes: Sequence[tuple[int, ...]], points: int
) -> dict[tuple[str, int], Level]:
    """Levels that a method changes, by part and positions, of several numbers of positions.

    Args:
        backbone: a pyramid.
        config: of the method.
        shapes: of the features that enter each level.
        points: how many numbers of positions, about.
    """
    family: Any = family_of(backbone)
    grid = family.grid()
    shares = [LEAST + (MOST - LEAST) * point / max(points - 1, 1) for point in range(points)]
    dense = {step.part for step in family.dense_steps(grid)}
    found: dict[tuple[str, int], Level] = {}
    for variant in new_method(backbone, config).variants(shares):
        method = new_method(backbone, variant)
        counts = method.counts(family, grid)
        for step in method.steps(family, grid, counts or [1] * len(method.stages)):
            if step.part in dense:
                continue
            level = Level(backbone, step.levels, method)
            chosen = {round(step.tokens): level}
            if counts is None:
                chosen = _deciding(level, shapes[step.levels[0]], shares)
            for positions, each in chosen.items():
                found.setdefault((step.part, positions), each)
    return found


def _deciding(level: Level, shape: tuple[int, ...], shares: Sequence[float]) -> dict[int, Level]:
    """A level where each image decides: the dial is turned until so many of noise are kept."""
    method = level.method
    assert method is not None
    parameter = next(level.backbone.parameters())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.to(parameter.device, parameter.dtype)
    positions = math.prod(level.family.stage_grid(level.family.grid(), level.levels[0]))

    def turn(value: float) -> None:
        method.turn(max(value, 1e-9))  # at 0 it does not even look

    @cache
    def kept(value: float) -> float:
        turn(value)
        return level.kept(x)

    found: dict[int, Level] = {}
    for share in shares:
        curve = Curve(method.dial(), kept)
        place = curve.search(share * positions, tolerance=1e9, near_enough=0.02, tries=30)
        turn(curve.dial.at(place))
        own = Level(level.backbone, level.levels, copy.deepcopy(method))
        found.setdefault(round(curve.at(place)), own)
    return found
