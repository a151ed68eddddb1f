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
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.budget import Curve
from vitrim.errors import ConfigError
from vitrim.families import family_of
from vitrim.latency.parts import Part, features
from vitrim.methods import method_of_config
from vitrim.methods.base import Method, RatioMethod
from vitrim.methods.records import Recorder
from vitrim.tokens.plain import Grid

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
        # Of the family's own class too: methods ask which family they run on.
        alone = type("Alone", (_Alone, type(self.family)), {})
        self.alone = alone(backbone, self)

    def forward(self, images: Tensor) -> Tensor:
        if self.method is not None:
            return self.method.infer(self.alone, images)
        tokens = self.tokens(images)
        for level in self.levels:
            tokens = self.family.run_stage(level, tokens)
        return features(tokens)

    def kept(self, images: Tensor) -> float:
        """Positions that the method chooses, mean over the images."""
        assert self.method is not None
        recorder = Recorder(self.alone.grid())
        with torch.no_grad():
            self.method.infer(self.alone, images, recorder)
        return float(recorder.stages[0].counts.double().mean())


class _Alone:
    """What a family does otherwise of which some levels run alone: it takes features for images,
    and its other levels have no blocks.
    """

    def __init__(self, backbone: Any, part: Level) -> None:
        self.backbone, self.part = backbone, part
        self.levels = part.levels

    @property
    def depths(self) -> tuple[int, ...]:
        depths: tuple[int, ...] = self.part.family.depths
        return tuple(depth if level in self.levels else 0 for level, depth in enumerate(depths))

    def grid(self, image_size: tuple[int, int] | None = None) -> Grid:
        grid: Grid = self.part.family.grid()
        return grid

    def stage_grid(self, grid: Grid, stage: int) -> Grid:
        found: Grid = self.part.family.stage_grid(self.grid(), stage)
        return found

    def stem(self, images: Tensor) -> Any:
        return self.part.tokens(images)

    def enter_stage(self, stage: int, tokens: Any) -> Any:
        return self.part.family.enter_stage(stage, tokens) if stage in self.levels else tokens

    def head(self, tokens: Any) -> Tensor:
        return features(tokens)


def as_methods_run_them(
    backbone: nn.Module, config: Any, shapes: Sequence[tuple[int, ...]], points: int
) -> Iterator[tuple[str, int, Level]]:
    """Levels that a method changes: part, positions and module, of several numbers of positions.

    Args:
        backbone: a pyramid.
        config: of the method.
        shapes: of the features that enter each level.
        points: how many numbers of positions, about.
    """
    made = set[tuple[str, int]]()
    for part, positions, level in _runs(backbone, config, shapes, points):
        if (part, positions) not in made:
            made.add((part, positions))
            yield part, positions, level


def _runs(
    backbone: nn.Module, config: Any, shapes: Sequence[tuple[int, ...]], points: int
) -> Iterator[tuple[str, int, Level]]:
    family: Any = family_of(backbone)
    grid = family.grid()
    dense = {step.part for step in family.dense_steps(grid)}
    for method in _variants(backbone, config, points):
        counts = method.counts(family, grid)
        for step in method.steps(family, grid, counts or [1] * len(method.stages)):
            if step.part in dense:
                continue
            if counts is None:
                level = Level(backbone, step.levels, method)
                yield from _deciding(step.part, level, shapes[step.levels[0]], points)
            else:
                yield step.part, round(step.tokens), Level(backbone, step.levels, method)


def _variants(backbone: nn.Module, config: Any, points: int) -> Iterator[Method]:
    """A method that keeps more and more; itself alone, where images decide."""
    method = _new(backbone, config)
    if isinstance(method, RatioMethod):
        if method.images_decide:
            yield method
            return
        for share in [*_shares(points), 1.0]:
            yield _new(backbone, replace(config, keep_ratio=(share,) * len(method.stages)))
        return
    for side in (config.side - 1, config.side, config.side + 1):
        try:
            yield _new(backbone, replace(config, window_tokens=side * side))
        except ConfigError:  # a window has no room for so many, or one is too few
            continue


def _new(backbone: nn.Module, config: Any) -> Method:
    method_class: Any = method_of_config(config)
    method: Method = method_class(family_of(backbone), config, torch.Generator().manual_seed(0))
    parameter = next(backbone.parameters())
    return method.to(parameter.device, parameter.dtype).requires_grad_(False).eval()


def _shares(points: int) -> list[float]:
    return [LEAST + (MOST - LEAST) * point / max(points - 1, 1) for point in range(points)]


def _deciding(
    part: str, level: Level, shape: tuple[int, ...], points: int
) -> Iterator[tuple[str, int, Level]]:
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

    for share in _shares(points):
        curve = Curve(method.dial, kept)
        place = curve.search(share * positions, tolerance=1e9, near_enough=0.02, tries=30)
        turn(curve.dial.at(place))
        own = Level(level.backbone, level.levels, copy.deepcopy(method))
        yield part, round(curve.at(place)), own
