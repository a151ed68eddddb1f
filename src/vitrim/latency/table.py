"""A latency table: how long each part of a model takes on one device, by its token count.

``vitrim profile`` measures it (``measure.py``), and from it the latency of models that were not
measured is predicted, step by step (:func:`predict`). A table is good for the device, runtime,
precision, batch and model that it was measured with, and for nothing else:
:meth:`LatencyTable.check` refuses the rest.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from vitrim import costs
from vitrim.checkpoint import write_atomic
from vitrim.config import closest, from_plain, read_json, require, shown
from vitrim.errors import ConfigError
from vitrim.families import ViT
from vitrim.methods.base import Method
from vitrim.tokens.calls import hidden_of
from vitrim.tokens.plain import Grid
from vitrim.tools.hardware import cpu_name

FORMAT = "vitrim-latency"
FORMAT_VERSION = 1
LONGEST = 1e9
"""Milliseconds that a batch may take: eleven days."""
MOST_TOKENS = 1 << 24
"""Of an image; one of 4096 x 4096 pixels has as many."""

Count = TypeVar("Count", int, float, Tensor)

_MODEL_FIELDS = ("family", "depth", "width", "heads", "mlp_width", "prefix", "image_size")
_PLACE_FIELDS = ("runtime", "batch", "threads", "dtype", "device", "cpu", "gpu")


def check_times(milliseconds: Sequence[float]) -> None:
    """Raise :class:`ConfigError` unless all are from 0 to :data:`LONGEST`."""
    for value in milliseconds:
        if not 0 <= value <= LONGEST:
            raise ConfigError(f"a time is {value} ms; expected 0 to {LONGEST:,.0f}")


@dataclass(frozen=True)
class Curve:
    """Milliseconds per batch of one part against the tokens that enter it."""

    tokens: tuple[int, ...]
    """Sorted, each once; prefix included."""
    median: tuple[float, ...]
    low: tuple[float, ...]
    """Lower quartile over the rounds."""
    high: tuple[float, ...]
    """Upper quartile."""

    def __post_init__(self) -> None:
        lengths = {len(values) for values in (self.tokens, self.median, self.low, self.high)}
        if lengths == {0} or len(lengths) != 1:
            raise ConfigError("a curve's tokens, median, low and high are not equally many")
        if any(a >= b for a, b in zip(self.tokens, self.tokens[1:], strict=False)):
            raise ConfigError("a curve's token counts do not rise")
        require(
            self.tokens[0] >= 0 and self.tokens[-1] <= MOST_TOKENS,
            f"a curve's token counts are {shown(self.tokens)}; expected 0 to {MOST_TOKENS:,}",
        )
        check_times((*self.median, *self.low, *self.high))

    def milliseconds(self, tokens: Any) -> Any:
        """Median at ``tokens`` (a number, or a tensor of any shape): on straight lines between the
        measured counts, and along the first or last of them beyond, never below 0.
        """
        if isinstance(tokens, Tensor):
            return self._of_tensor(tokens)
        if len(self.tokens) == 1:
            return self.median[0]
        place = bisect.bisect_right(self.tokens, tokens)
        left = min(max(place - 1, 0), len(self.tokens) - 2)
        start, stop = self.tokens[left : left + 2]
        low, high = self.median[left : left + 2]
        return max(low + (high - low) * (tokens - start) / (stop - start), 0.0)

    def _of_tensor(self, tokens: Tensor) -> Tensor:
        kind = tokens.dtype if tokens.is_floating_point() else torch.get_default_dtype()
        x = tokens.to(kind)
        median = x.new_tensor(self.median)
        if len(self.tokens) == 1:
            return median[0] + 0 * x
        knots = x.new_tensor(self.tokens)
        place = torch.searchsorted(knots, x.detach(), right=True) - 1
        left = place.clamp(0, len(self.tokens) - 2)
        slope = (median[1:] - median[:-1]) / (knots[1:] - knots[:-1])
        return (median[left] + slope[left] * (x - knots[left])).clamp(min=0)


@dataclass(frozen=True)
class LatencyTable:
    """Curves by part, and what they were measured on and with."""

    stamp: Mapping[str, Any]
    """``runtime``, ``batch``, ``threads``, ``dtype``; the hardware and versions; and the model:
    ``backbone``, ``family``, ``depth``, ``width``, ``heads``, ``mlp_width``, ``prefix``,
    ``image_size`` (see :func:`describe_model`)."""
    curves: Mapping[str, Curve]
    """By part; see ``vitrim.costs.Step`` and, for images of unlike counts, ``packed_part``."""

    @property
    def batch(self) -> int:
        """Images per call, which all times are for."""
        return int(self.stamp["batch"])

    def milliseconds(self, part: str, tokens: Count) -> float | Tensor:
        """Of one part on ``tokens`` tokens per image, per batch; differentiable in a tensor.

        Raises:
            ConfigError: the part was not profiled.
        """
        return cast("float | Tensor", self.curve(part).milliseconds(tokens))

    def curve(self, part: str) -> Curve:
        """Of one part.

        Raises:
            ConfigError: the part was not profiled.
        """
        if part not in self.curves:
            raise ConfigError(
                f"the latency table has no curve of {part!r}{closest(part, self.curves)}; it has "
                f"{', '.join(self.curves)}. Profile the model again, with this method"
            )
        return self.curves[part]

    def check(
        self,
        family: Any,
        *,
        runtime: str | None = None,
        batch: int | None = None,
        threads: int | None = None,
        dtype: str | None = None,
        device: torch.device | str | None = "cpu",
    ) -> None:
        """Raise :class:`ConfigError` unless the table is for the backbone that ``family`` runs, on
        this machine; the message says all that differs.

        Args:
            family: of the backbone.
            runtime: wanted; None takes any.
            batch: likewise.
            threads: likewise.
            dtype: likewise.
            device: that the model is meant for; None takes any, also another machine's.
        """
        wanted = describe_model(family)
        asked = {"runtime": runtime, "batch": batch, "threads": threads, "dtype": dtype}
        wanted |= {name: value for name, value in asked.items() if value is not None}
        if device is not None:
            wanted |= _describe_device(torch.device(device))
        fields = (*_PLACE_FIELDS, *_MODEL_FIELDS)
        differences = [
            f"{name} {self.stamp.get(name)!r}, here {wanted[name]!r}"
            for name in fields
            if name in wanted and self.stamp.get(name) != wanted[name]
        ]
        if differences:
            raise ConfigError(
                f"the latency table is of another setting: {'; '.join(differences)}. Make one for "
                "this setting with vitrim profile"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        curves = {
            part: {name: list(values) for name, values in asdict(curve).items()}
            for part, curve in self.curves.items()
        }
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "unit": "milliseconds per batch",
            "stamp": dict(self.stamp),
            "curves": curves,
        }

    @classmethod
    def from_dict(cls, data: Any, source: str = "the latency table") -> LatencyTable:
        """A table from its plain form.

        Raises:
            ConfigError: it is none, is damaged, or of another version.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ConfigError(f"{source} is no latency table; vitrim profile writes one")
        if data.get("version") != FORMAT_VERSION:
            raise ConfigError(
                f"{source} is of version {data.get('version')!r}; this vitrim reads version "
                f"{FORMAT_VERSION}. Make it again with vitrim profile"
            )
        try:
            stamp = _table(data, "stamp")
            _check_stamp(stamp)
            found = _table(data, "curves")
            curves = {part: from_plain(Curve, _table(found, part), part) for part in found}
            require(len(curves) > 0, "it has no curves")
        except ConfigError as error:
            raise ConfigError(
                f"{source} is damaged ({error}); make it again with vitrim profile"
            ) from error
        return cls(stamp, curves)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON; the file appears whole or not at all."""
        write_atomic(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table.

        Raises:
            ConfigError: it is no file, no latency table, or a damaged one.
        """
        return cls.from_dict(read_json(Path(path)), str(path))


def predict(
    table: LatencyTable,
    method: Method | None,
    family: Any,
    grid: Grid,
    counts: Sequence[Any] = (),
) -> Any:
    """Milliseconds per batch of a model that was not measured.

    Args:
        table: of the backbone, in the runtime and at the batch that are meant.
        method: as it is set up; None is the dense backbone.
        family: of the backbone.
        grid: rows and columns of an image's patches.
        counts: kept after each stage: numbers, or tensors of one dimension with the count of each
            image of a sample. Of a sample, batches of 1 give the mean of the images' latencies, and
            larger ones the latency of a packed batch of such images.

    Returns:
        a number, or a tensor through which gradients flow to ``counts``.

    Raises:
        ConfigError: the table lacks a part of the model.
    """
    if method is None:
        return _total(table, family.dense_steps(grid))
    return _total(table, method.steps(family, grid, counts))


def _total(table: LatencyTable, steps: Sequence[costs.Step]) -> Any:
    total: Any = 0.0
    for step in steps:
        total = total + _step_milliseconds(table, step)
    return total


def _step_milliseconds(table: LatencyTable, step: costs.Step) -> Any:
    tokens = step.tokens
    if not isinstance(tokens, Tensor) or tokens.ndim == 0:
        return table.milliseconds(step.part, tokens)
    sample = tokens if tokens.is_floating_point() else tokens.float()
    if table.batch == 1:
        milliseconds = table.milliseconds(step.part, sample)
        assert isinstance(milliseconds, Tensor)
        return milliseconds.mean()
    unlike = bool((sample != sample[0]).any()) and not step.levels
    part = costs.packed_part(step.part) if unlike else step.part
    return table.milliseconds(part, sample.mean())


_NAMES = ("runtime", "dtype", "device", "cpu", "family")
_REQUIRED = ("runtime", "batch", "threads", "dtype", "device", "cpu", *_MODEL_FIELDS)


def _table(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = data.get(name)
    if not isinstance(table, dict):
        raise ConfigError(f"{name} is {shown(table)}; a table was expected")
    return table


def _check_stamp(stamp: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` unless ``stamp`` says all that a model and a place are told by."""
    missing = [name for name in _REQUIRED if name not in stamp]
    require(not missing, f"no {', '.join(missing)}")
    for name in _REQUIRED:
        value = stamp[name]
        if name in _NAMES:
            require(isinstance(value, str), f"{name} is {shown(value)}; a name was expected")
            continue
        least = 1 if name in _PLACE_FIELDS else 0
        levels = isinstance(value, list) and name in _MODEL_FIELDS
        whole = value if levels else [value]
        good = all(type(item) is int and least <= item <= MOST_TOKENS for item in whole)
        require(good, f"{name} is {shown(value)}; expected {least} to {MOST_TOKENS:,}")


def describe_model(family: Any) -> dict[str, Any]:
    """What a backbone's times depend on, JSON-ready; of a pyramid, sizes are lists by level."""
    sizes: Mapping[str, Any]
    if isinstance(family, ViT):
        sizes = _sizes(family.depth, family.embed_dim, family.backbone.blocks[0])
    else:
        levels = [
            _sizes(depth, family.stage_dim(level), family.block(level, 0))
            for level, depth in enumerate(family.depths)
        ]
        sizes = {name: [level[name] for level in levels] for name in levels[0]}
    return {
        "family": family.name,
        **sizes,
        "prefix": family.num_prefix,
        "image_size": list(family.image_size),
    }


def _sizes(depth: int, width: int, block: Any) -> dict[str, int]:
    """Of blocks like this one; a convolution has no heads."""
    heads = int(block.attn.num_heads) if hasattr(block, "attn") else 0
    return {"depth": depth, "width": width, "heads": heads, "mlp_width": hidden_of(block.mlp)}


def _describe_device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": device.type, "cpu": cpu_name()}
    return {"device": device.type, "gpu": torch.cuda.get_device_name(device)}
