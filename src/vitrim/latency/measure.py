"""Measuring latency tables.

Every part of a model (``parts.py``) is timed on as many numbers of tokens as it takes to
see the device's steps. All take turns: in each round everything runs once for a slice of time, in
rotating order, so that a busy neighbour strikes all alike. What it costs to hand features to a
runtime and to get them back is measured too and taken off, in the same round: a model pays it once,
with its stem. Parts that a model runs once are timed one call at a time, with caches as a model
leaves them. After each round the times are kept in a file beside the table, from which a run that
was interrupted goes on.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrim.checkpoint import write_atomic
from vitrim.config import read_json, require, shown
from vitrim.errors import ConfigError
from vitrim.families import family_of
from vitrim.latency import runners
from vitrim.latency.probes import (
    NOTHING,
    NOTHING_COLD,
    POINTS,
    Probe,
    kinds_of,
    probes_of,
)
from vitrim.latency.table import Curve, LatencyTable, check_times, describe_model
from vitrim.model import SparseModel
from vitrim.tools.benchmark import (
    Clock,
    Quartiles,
    checked_device,
    keep_memory,
    limited_threads,
)
from vitrim.tools.hardware import hardware, synchronise

_READY = 30
"""Percent of the work that are done when everything is ready to be timed."""

Progress = Callable[[int], None]
Samples = dict[str, list[float]]


def profile(
    model: nn.Module,
    *,
    runtime: str = "torch",
    batch: int = 1,
    threads: int = 1,
    dtype: str = "fp32",
    configs: Sequence[Any] | None = None,
    points: int | None = None,
    rounds: int = 15,
    min_seconds: float = 0.02,
    device: str | torch.device = "cpu",
    side_file: Path | None = None,
    beside: Mapping[str, nn.Module] | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure the latency table of a model's backbone.

    Args:
        model: a timm model of a served family, or a sparse model on one.
        runtime: ``torch``, ``torch-compile``, ``onnxruntime`` or ``openvino``.
        batch: images per call.
        threads: CPU threads.
        dtype: ``fp32``, ``bf16`` or ``int8``, as the runtime has it.
        configs: of the methods whose selectors are measured; None takes the sparse model's own, or
            every kind that runs on the backbone.
        points: numbers of tokens that blocks are timed on; None takes 24, or 8 where each is
            compiled by itself. Levels of a pyramid are timed on up to 7 numbers of positions.
        rounds: how often everything has its turn.
        min_seconds: a turn lasts at least about this long, and at least one call.
        device: ``"cpu"``, or for torch a CUDA device.
        side_file: what was measured so far; read if it is there, written after every round.
        beside: whole models by name, on the same backbone, which take turns with the parts: to hold
            predictions against. The dense model always does, as ``dense``.
        clock: seconds; monotonic.
        progress: told how many percent are done.

    Raises:
        ConfigError: the runtime lacks the precision, or the side file is of other settings.
        MissingExtraError: the runtime is not installed.
    """
    device = checked_device(device)
    runners.check_runtime(runtime, dtype, device)
    for name, value in {"batch": batch, "threads": threads, "rounds": rounds}.items():
        require(value >= 1, f"{name} is {value}; expected 1 or more")
    points = points or POINTS[runtime]
    require(points >= 2, f"points is {points}; expected 2 or more")
    require(0 <= min_seconds < math.inf, f"min_seconds is {min_seconds}; expected 0 or more")
    source = model.backbone if isinstance(model, SparseModel) else model
    if configs is None:
        if isinstance(model, SparseModel):
            configs = model.method.own_kinds()
        else:
            configs = kinds_of(family_of(source))
    kind = runners.torch_dtype(runtime, dtype)
    backbone, *models = (
        copy.deepcopy(module).to(device, kind).eval().requires_grad_(False)
        for module in (source, *(beside or {}).values())
    )
    whole = dict(zip(beside or {}, models, strict=True))
    probes = list(probes_of(backbone, configs, runtime, batch, points, whole))
    with limited_threads(threads):
        stamp = _stamp(backbone, device, runtime, batch, threads, dtype)
        samples = _resumed(side_file, stamp, probes)
        if min(map(len, samples.values())) < rounds:
            report = progress or (lambda percent: None)
            calls = _calls(probes, runtime, dtype, threads, device, report)
            save = partial(_save, side_file, stamp)
            with torch.inference_mode():
                _measure(calls, probes, samples, rounds, min_seconds, clock, save, report)
    return LatencyTable(stamp, _curves(probes, samples))


def _stamp(
    backbone: Any, device: torch.device, runtime: str, batch: int, threads: int, dtype: str
) -> dict[str, Any]:
    """What a table was measured with; see :attr:`LatencyTable.stamp`."""
    known = getattr(backbone, "pretrained_cfg", None) or {}
    return {
        "runtime": runtime,
        "runtime_version": runners.version_of(runtime),
        "batch": batch,
        "dtype": dtype,
        **hardware(device),
        "threads": threads,
        "backbone": known.get("architecture") or type(backbone).__name__,
        **describe_model(family_of(backbone)),
    }


def _resumed(side_file: Path | None, stamp: Mapping[str, Any], probes: Sequence[Probe]) -> Samples:
    """The times of an interrupted run, or none yet; milliseconds per call, a number per round."""
    fresh: Samples = {_key(probe): [] for probe in probes}
    if side_file is None or not side_file.exists():
        return fresh
    try:
        before, samples = _read(side_file)
    except ConfigError as error:
        raise ConfigError(
            f"{side_file}, the times of an interrupted run, is damaged ({error}); delete it"
        ) from error
    now = _settings(stamp)
    differences = [
        f"{name} {before.get(name)!r}, now {now.get(name)!r}"
        for name in now
        if before.get(name) != now.get(name)
    ]
    if samples.keys() != fresh.keys():
        differences.append(f"{len(samples)} measured parts, now {len(fresh)}")
    if differences:
        raise ConfigError(
            f"{side_file} holds the times of an interrupted run with other settings: "
            f"{'; '.join(differences)}. Give the same again, or delete the file"
        )
    return samples


def _read(side_file: Path) -> tuple[dict[str, Any], Samples]:
    """Settings and times in the file of an interrupted run; ConfigError where they are none."""
    found = read_json(side_file)
    names = ("settings", "samples")
    whole = isinstance(found, dict) and all(isinstance(found.get(name), dict) for name in names)
    require(whole, "it lacks settings or samples")
    settings, samples = (found[name] for name in names)
    for part, times in samples.items():
        numbers = isinstance(times, list) and all(type(time) in (int, float) for time in times)
        require(numbers, f"{part} is {shown(times)}; expected milliseconds")
        check_times(times)
    require(len(set(map(len, samples.values()))) == 1, "its parts have unlike numbers of times")
    return settings, samples


def _settings(stamp: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in stamp.items() if name != "date"}
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _save(side_file: Path | None, stamp: Mapping[str, Any], samples: Samples) -> None:
    if side_file is not None:
        content = {"settings": _settings(stamp), "samples": samples}
        write_atomic(side_file, json.dumps(content).encode())


def _key(probe: Probe) -> str:
    return f"{probe.part}@{probe.tokens}"


def _calls(
    probes: Sequence[Probe],
    runtime: str,
    dtype: str,
    threads: int,
    device: torch.device,
    progress: Progress,
) -> dict[str, runners.Call]:
    """What to time, by key; made ready, which may take longer than timing it."""
    kind = runners.torch_dtype(runtime, dtype)
    bound: dict[int, runners.Bound] = {}
    calls = {}
    # The largest first: it is what a module is exported with.
    for done, probe in enumerate(reversed(probes)):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(probe.shape, generator=generator).to(device, kind)
        module = probe.module
        if id(module) not in bound:
            bound[id(module)] = runners.bind(module, x, probe.varies, runtime, dtype, threads)
        calls[_key(probe)] = bound[id(module)](x)
        progress(_READY * (done + 1) // len(probes))
    return dict(reversed(calls.items()))


def _measure(
    calls: Mapping[str, runners.Call],
    probes: Sequence[Probe],
    samples: Samples,
    rounds: int,
    min_seconds: float,
    clock: Clock,
    save: Callable[[Samples], None],
    progress: Progress,
) -> None:
    """Fill ``samples`` up to so many rounds."""
    names = list(calls)
    cold = {_key(probe) for probe in probes if probe.module.cold}
    chain = calls[_chain_before(probes)]
    keep_memory()
    for call in calls.values():  # the first call allocates, and compiles
        call()
    first = min(map(len, samples.values()))
    for turn in range(first, rounds):
        start = turn * len(names) // rounds  # another one begins each round
        for name in names[start:] + names[:start]:
            time_turn = _milliseconds_after(chain) if name in cold else _milliseconds
            samples[name].append(time_turn(calls[name], min_seconds, clock))
        save(samples)
        progress(_READY + (100 - _READY) * (turn + 1) // rounds)


def _chain_before(probes: Sequence[Probe]) -> str:
    """The chain of blocks that runs before parts that a model runs once: short, but long enough for
    features, not weights alone, to take the caches. Of a pyramid the last level.
    """
    keys = {probe.tokens: _key(probe) for probe in probes if probe.part == "block"}
    if not keys:
        return _key(probes[-1])
    wanted = max(keys) / 4
    return keys[min(keys, key=lambda tokens: abs(tokens - wanted))]


def _milliseconds(call: runners.Call, min_seconds: float, clock: Clock) -> float:
    """Per call, in a turn; the first call warms up and tells how many there is time for."""
    seconds = _seconds(call, 1, clock)
    repeats = max(1, round(min_seconds / max(seconds, 1e-9)))
    return 1e3 * _seconds(call, repeats, clock) / repeats


def _milliseconds_after(before: runners.Call) -> Callable[[runners.Call, float, Clock], float]:
    """The same with another call before each, which is not counted."""

    def milliseconds(call: runners.Call, min_seconds: float, clock: Clock) -> float:
        both = _seconds(before, 1, clock) + _seconds(call, 1, clock)
        repeats = max(1, round(min_seconds / max(both, 1e-9)))
        total = 0.0
        for _ in range(repeats):
            before()
            total += _seconds(call, 1, clock)
        return 1e3 * total / repeats

    return milliseconds


def _seconds(call: runners.Call, repeats: int, clock: Clock) -> float:
    synchronise()
    start = clock()
    for _ in range(repeats):
        call()
    synchronise()
    return clock() - start


def _curves(probes: Sequence[Probe], samples: Samples) -> dict[str, Curve]:
    """Milliseconds of each part run once, less what calling the runtime costs."""
    points: dict[str, dict[int, Quartiles]] = {}
    for probe in probes:
        if probe.part in (NOTHING, NOTHING_COLD):
            continue
        times = samples[_key(probe)]
        if not probe.module.counts_calls:
            nothing = NOTHING_COLD if probe.module.cold else NOTHING
            overhead = samples[f"{nothing}@{probe.shape[1]}"]
            pairs = zip(times, overhead, strict=True)
            times = [max(t - calling, 0.0) / probe.module.repeats for t, calling in pairs]
        points.setdefault(probe.part, {})[probe.tokens] = Quartiles.of(times)
    return {part: _curve(found) for part, found in points.items()}


def _curve(points: Mapping[int, Quartiles]) -> Curve:
    tokens = sorted(points)
    found = [points[count] for count in tokens]
    return Curve(
        tokens=tuple(tokens),
        median=tuple(point.median for point in found),
        low=tuple(point.low for point in found),
        high=tuple(point.high for point in found),
    )
