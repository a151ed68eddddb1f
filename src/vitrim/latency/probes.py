"""What ``vitrim profile`` times: which parts of a model, which selectors, on how many tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vitrim import costs
from vitrim.errors import ConfigError
from vitrim.families import ViT, family_of
from vitrim.latency.levels import Level, as_methods_run_them
from vitrim.latency.parts import (
    AttentionHalves,
    Blocks,
    CrossBlocks,
    Head,
    MlpHalves,
    Nothing,
    Part,
    Selecting,
    Stem,
    Whole,
    features,
)
from vitrim.methods import METHODS, method_of_config
from vitrim.methods.asvit import ASViTConfig
from vitrim.methods.dynamic_spatial import DynamicSpatialConfig
from vitrim.methods.dynamicvit import DynamicViTConfig
from vitrim.methods.sait import SaiTConfig
from vitrim.methods.spvit import SPViTConfig
from vitrim.methods.spvit_pyramid import SPViTPyramidConfig
from vitrim.methods.stvit import STViTConfig
from vitrim.methods.stvit_r import STViTRConfig
from vitrim.methods.stvit_swin import STViTSwinConfig
from vitrim.tokens.plain import Grid

POINTS = {"torch": 24, "torch-compile": 8, "onnxruntime": 24, "openvino": 24}
"""Numbers of tokens that blocks are timed on, if not told otherwise; compiling takes its time."""
FEW_POINTS = 6
"""The same of parts that cost little."""
NOTHING, NOTHING_COLD = "nothing", "nothing-cold"
DENSE = "dense"
"""The whole dense model, to hold the sum of its parts against."""


@dataclass(frozen=True)
class Probe:
    """One thing to time: a part on a number of tokens."""

    part: str
    tokens: int
    module: Part
    shape: tuple[int, ...]
    """Of its input."""
    varies: bool
    """Whether the same module runs on other numbers of tokens."""


KINDS: tuple[Any, ...] = (
    DynamicViTConfig(),
    DynamicViTConfig(threshold=0.5),
    SPViTConfig(inference="top_k"),
    SPViTConfig(),
    ASViTConfig(),
    SaiTConfig(selector="density"),
    SaiTConfig(),
    STViTConfig(),
)
"""Every way of choosing tokens; what else their configs say hardly matters to how long it takes."""
PYRAMID_KINDS: tuple[Any, ...] = (
    DynamicSpatialConfig(),
    SPViTPyramidConfig(inference="top_k"),
    SPViTPyramidConfig(),
    STViTSwinConfig(),
    STViTRConfig(),
)
"""The same on pyramids."""


def kinds_of(family: Any, names: Sequence[str] = ()) -> list[Any]:
    """A config of every kind of selector of the methods called ``names``, or of all, that run on
    ``family``.
    """
    kinds = [(method_of_config(config), config) for config in (*KINDS, *PYRAMID_KINDS)]
    kinds = [(method, config) for method, config in kinds if family.name in method.families]
    known = {method.name for method, _ in kinds}
    for name in names:
        if name not in known:
            why = f"does not run on {family.name}" if name in METHODS else "is unknown"
            raise ConfigError(f"method {name!r} {why}; use {', '.join(sorted(known))}")
    return [config for method, config in kinds if not names or method.name in names]


def probes_of(
    backbone: Any,
    configs: Sequence[Any],
    runtime: str,
    batch: int,
    points: int,
    beside: Mapping[str, nn.Module],
) -> Iterator[Probe]:
    """Everything that is timed; ``beside`` are whole models on backbones like this one."""
    family = family_of(backbone)
    tokens = math.prod(family.grid()) + family.num_prefix
    image = (batch, int(backbone.in_chans), *family.image_size)
    yield Probe("stem", tokens, Stem(backbone), image, varies=False)
    for name, model in {DENSE: backbone, **beside}.items():
        yield Probe(name, tokens, Whole(backbone, model), image, varies=False)
    if isinstance(family, ViT):
        yield from _plain_probes(backbone, configs, runtime, batch, points)
    else:
        yield from _pyramid_probes(backbone, configs, runtime, image, points)


def _plain_probes(
    backbone: Any, configs: Sequence[Any], runtime: str, batch: int, points: int
) -> Iterator[Probe]:
    """What comes between stem and logits of a plain vision transformer, and its head."""
    family = family_of(backbone)
    assert isinstance(family, ViT)
    patches, prefix = math.prod(family.grid()), family.num_prefix
    many = _spaced(prefix + 2, patches + prefix, points)
    few = _spaced(prefix + 2, patches + prefix, min(points, FEW_POINTS))
    every = sorted({*many, *few})
    in_torch, free = runtime.startswith("torch"), runtime == "torch"
    plain: dict[str, tuple[Part, list[int]]] = {
        NOTHING: (Nothing(backbone, cold=False, free=free), every),
        NOTHING_COLD: (Nothing(backbone, cold=True, free=free), every),
        "block": (Blocks(backbone), many),
        "attention": (AttentionHalves(backbone), few),
        "mlp": (MlpHalves(backbone), few),
        "head": (Head(backbone), few),
    }
    packs = batch > 1 and free
    if packs:
        every_other = sorted({*many[1::2], many[-1]})
        plain[costs.packed_part("block")] = Blocks(backbone, packed=True), every_other
        plain[costs.packed_part("mlp")] = MlpHalves(backbone, packed=True), few
        plain[costs.packed_part("head")] = Head(backbone, packed=True), few
    for config in configs:
        selecting = Selecting(backbone, config)
        if selecting.adaptive and batch > 1 and not in_torch:
            continue  # exported, images decide one at a time
        if isinstance(config, STViTConfig):
            yield from _semantic_probes(backbone, config, batch, patches + prefix)
            if (prefix and config.keep_prefix) or config.layer_scale is not None:
                plain["cross"] = CrossBlocks(backbone), few
        elif in_torch:
            plain[selecting.part] = selecting, few
            if packs and selecting.adaptive and hasattr(config, "stages"):
                again = Selecting(backbone, config, packed=True)
                plain[again.part] = again, few
        else:  # a graph keeps a fixed number, so there is one graph for each number that enters
            for tokens in (few[len(few) // 3], few[-1]):
                shape = (batch, tokens, family.embed_dim)
                selecting = Selecting(backbone, config)
                yield Probe(selecting.part, tokens, selecting, shape, varies=False)
    for part, (module, counts) in plain.items():
        for tokens in counts:
            yield Probe(part, tokens, module, (batch, tokens, family.embed_dim), varies=True)


def _semantic_probes(
    backbone: Any, config: STViTConfig, batch: int, tokens: int
) -> Iterator[Probe]:
    """Making semantic tokens, of all patches; a module of its own for each number of them."""
    family: Any = family_of(backbone)
    shape = (batch, tokens, family.embed_dim)
    for rows, columns in _semantic_shapes(config.shape, family.grid()):
        module = Selecting(backbone, replace(config, semantic_tokens=(rows, columns)))
        count = rows * columns + (family.num_prefix if config.keep_prefix else 0)
        yield Probe(module.part, count, module, shape, varies=False)


def _semantic_shapes(shape: Grid, grid: Grid) -> list[Grid]:
    """``shape``, and a smaller and a larger one, as the grid has room for them."""
    by_count = {}
    for scale in (0.5, 1, 1.5):
        rows, columns = (
            max(1, min(round(scale * side), most)) for side, most in zip(shape, grid, strict=True)
        )
        by_count[rows * columns] = rows, columns
    return [by_count[count] for count in sorted(by_count)]


def _pyramid_probes(
    backbone: Any,
    configs: Sequence[Any],
    runtime: str,
    image: tuple[int, ...],
    points: int,
) -> Iterator[Probe]:
    """The same of a pyramid: its levels, dense and as methods run them."""
    family: Any = family_of(backbone)
    grid, free = family.grid(), runtime == "torch"
    shapes = _shapes(backbone, image)
    for cold in (False, True):
        for shape in {shape[1]: shape for shape in shapes}.values():
            module = Nothing(backbone, cold, free)
            yield Probe(NOTHING_COLD if cold else NOTHING, shape[1], module, shape, varies=False)
    _, *levels, head = family.dense_steps(grid)
    yield Probe(head.part, head.tokens, Head(backbone), shapes[-1], varies=False)
    for config in configs:
        decides = getattr(config, "inference", "top_k") != "top_k"
        if decides and image[0] > 1 and not runtime.startswith("torch"):
            continue  # exported, images decide one at a time
        few = min(points, FEW_POINTS)
        for part, positions, level in as_methods_run_them(backbone, config, shapes, few):
            yield Probe(part, positions, level, shapes[level.levels[0]], varies=False)
    for step in levels:
        level = Level(backbone, step.levels)
        yield Probe(step.part, step.tokens, level, shapes[step.levels[0]], varies=False)


@torch.no_grad()
def _shapes(backbone: Any, image: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of the features that enter each level of a pyramid, and of those that leave the last."""
    family: Any = family_of(backbone)
    parameter = next(backbone.parameters())
    tokens = family.stem(torch.zeros(image, device=parameter.device, dtype=parameter.dtype))
    shapes = [tuple(features(tokens).shape)]
    for level in range(len(family.depths)):
        tokens = family.run_stage(level, tokens)
        shapes.append(tuple(features(tokens).shape))
    return shapes


def _spaced(low: int, high: int, points: int) -> list[int]:
    """Whole numbers from ``low`` to ``high``, evenly spaced."""
    step = (high - low) / max(points - 1, 1)
    return sorted({round(low + index * step) for index in range(points)})
