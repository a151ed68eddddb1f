"""What ``vitrim profile`` times: which parts of a model, which selectors, on how many tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vitrim import costs
from vitrim.errors import ConfigError
from vitrim.families import ViT, family_of
from vitrim.families.inside import features_of
from vitrim.latency.levels import Level, as_methods_run_them
from vitrim.latency.parts import (
    AttentionHalves,
    Blocks,
    CrossBlocks,
    Head,
    LastBlock,
    MlpHalves,
    Nothing,
    Part,
    Selecting,
    Stem,
    Whole,
    new_method,
)
from vitrim.methods import METHODS, method_of_config

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


def kinds_of(family: Any, names: Sequence[str] = ()) -> list[Any]:
    """A config of every kind of selector of the methods called ``names``, or of all, that run on
    ``family``.
    """
    able = {name: method for name, method in METHODS.items() if family.name in method.families}
    for name in names:
        if name not in able:
            why = f"does not run on {family.name}" if name in METHODS else "is unknown"
            raise ConfigError(f"method {name!r} {why}; use {', '.join(sorted(able))}")
    return [kind for name in able if not names or name in names for kind in able[name].kinds()]


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
    is_exact = family.whole_last_block is None
    if is_exact:
        plain["last"] = LastBlock(backbone), few
    if packs:
        every_other = sorted({*many[1::2], many[-1]})
        plain[costs.packed_part("block")] = Blocks(backbone, packed=True), every_other
        plain[costs.packed_part("mlp")] = MlpHalves(backbone, packed=True), few
        plain[costs.packed_part("head")] = Head(backbone, packed=True), few
        if is_exact:
            plain[costs.packed_part("last")] = LastBlock(backbone, packed=True), few
    for config in configs:
        if not method_of_config(config).drops:
            continue  # it chooses nothing
        selecting = Selecting(backbone, config)
        if selecting.adaptive and batch > 1 and not in_torch:
            continue  # exported, images decide one at a time
        if selecting.made is not None:
            yield from _making_probes(backbone, selecting, (batch, every[-1], family.embed_dim))
            if _runs_cross_blocks(backbone, config):
                plain["cross"] = CrossBlocks(backbone), few
        elif in_torch:
            plain[selecting.part] = selecting, few
            chooses_again = hasattr(config, "stages") and selecting.method.most_stages != 1
            if packs and selecting.adaptive and chooses_again:
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


def _making_probes(backbone: Any, selecting: Selecting, shape: tuple[int, ...]) -> Iterator[Probe]:
    """Making tokens out of all patches; a module of its own for each number of them."""
    for config in selecting.method.variants(()):
        module = Selecting(backbone, config)
        assert module.made is not None
        yield Probe(module.part, module.made, module, shape, varies=False)


def _runs_cross_blocks(backbone: Any, config: Any) -> bool:
    family, method = family_of(backbone), new_method(backbone, config)
    counts = method.target_counts(family, family.grid())
    return any(step.part == "cross" for step in method.steps(family, family.grid(), counts))


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
        decides = new_method(backbone, config).counts(family, grid) is None
        if decides and image[0] > 1 and not runtime.startswith("torch"):
            continue  # exported, images decide one at a time
        found = as_methods_run_them(backbone, config, shapes, min(points, FEW_POINTS))
        for (part, positions), level in found.items():
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
    shapes = [tuple(features_of(tokens).shape)]
    for level in range(len(family.depths)):
        tokens = family.run_stage(level, tokens)
        shapes.append(tuple(features_of(tokens).shape))
    return shapes


def _spaced(low: int, high: int, points: int) -> list[int]:
    """Whole numbers from ``low`` to ``high``, evenly spaced."""
    step = (high - low) / max(points - 1, 1)
    return sorted({round(low + index * step) for index in range(points)})
