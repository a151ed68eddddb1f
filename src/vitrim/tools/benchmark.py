"""Speed, measured so that it can be believed.

The candidates take turns: in each round every one of them runs for a slice of time, in rotating
order, so that a busy neighbour or a warming processor strikes all alike. Speed-ups are ratios of
times in the same round, and their median and quartiles are reported.

*Efficiency* is the measured speed-up divided by the one that the MACs promise: 1 means that every
multiplication saved was time saved.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.config import closest
from vitrim.errors import ConfigError, InputError
from vitrim.features import FeaturesOnly, TimmPyramid
from vitrim.tools.evaluate import dense_macs, size_of
from vitrim.tools.hardware import hardware, synchronise

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WARM_UP_CALLS = 3
_FEWEST_ROUNDS = 3
_MOST_BATCHES = 8

Clock = Callable[[], float]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __truediv__(self, divisor: float) -> Quartiles:
        return Quartiles(self.median / divisor, self.low / divisor, self.high / divisor)


@dataclass(frozen=True)
class Row:
    """One candidate at one batch size and precision."""

    name: str
    base: str
    """The candidate that speed-up and efficiency compare with."""
    batch: int
    dtype: str
    compiled: bool
    image_shape: tuple[int, ...]
    rounds: int
    calls_per_round: int
    macs: float
    """Per image."""
    seconds: Quartiles
    """Per batch."""
    images_per_second: float
    """At the median time."""
    speedup: Quartiles
    """Time of the base over time of this candidate, in the same round."""
    efficiency: Quartiles
    """``speedup`` over (MACs of the base / MACs of this candidate)."""
    hardware: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return asdict(self) | {"image_shape": list(self.image_shape)}


def benchmark(
    candidates: Mapping[str, nn.Module],
    image_shape: tuple[int, ...],
    *,
    batches: Sequence[int] = (1, 16),
    dtypes: Sequence[str] = ("fp32", "bf16"),
    rounds: int = 15,
    min_seconds: float = 0.3,
    max_seconds: float = math.inf,
    compile: bool = False,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    images: Tensor | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> list[Row]:
    """Time the candidates against the first of them, on random or given images.

    A model whose token counts depend on the image needs real ones: on noise it keeps other numbers
    of tokens than on photographs.

    Copies are timed: the models given keep their weights, precision, device and mode.

    Args:
        candidates: models by name; the first is the base of the comparison.
        image_shape: (channels, height, width), or (channels, frames, height, width) of clips.
        batches: numbers of images per call.
        dtypes: ``"fp32"`` and ``"bf16"`` (weights and images cast).
        rounds: how often each candidate has its turn.
        min_seconds: a turn lasts at least about this long, and at least one call.
        max_seconds: after this long at one dtype and batch the rounds end early, but three at
            least are measured; a row says how many there were.
        compile: run through ``torch.compile``.
        threads: torch's CPU threads while measuring; None leaves them. Restored afterwards.
        device: ``"cpu"`` or a CUDA device.
        images: (any number, channels, height, width), prepared for the models: each call takes the
            next ``batch`` of them, up to eight different batches, every candidate the same ones in
            each round. None takes one batch of noise.
        clock: seconds; monotonic.
        progress: told what is measured next.

    Returns:
        A row per dtype, batch and candidate, in this order.

    Raises:
        ConfigError: an argument is out of range.
        InputError: the device is not there, or a model does not take the images.
    """
    _check(candidates, batches, dtypes, rounds, threads)
    device = checked_device(device)
    rows = []
    with limited_threads(threads):
        for dtype in dtypes:
            models = {
                name: copy.deepcopy(model).to(device, DTYPES[dtype]).eval()
                for name, model in candidates.items()
            }
            for batch in batches:
                if progress is not None:
                    progress(f"{dtype}, batch {batch}")
                inputs = _inputs(images, batch, image_shape, device, DTYPES[dtype])
                with torch.inference_mode():
                    macs = {name: _mean_macs(model, inputs) for name, model in models.items()}
                    # A stale compilation for another batch size would make shapes dynamic.
                    torch.compiler.reset()
                    runners = {
                        name: torch.compile(model, dynamic=False) if compile else model
                        for name, model in models.items()
                    }
                    timing = take_turns(runners, inputs, rounds, min_seconds, max_seconds, clock)
                shared = {
                    "batch": batch,
                    "dtype": dtype,
                    "compiled": compile,
                    "image_shape": image_shape,
                    "hardware": hardware(device),
                }
                rows += _rows(timing, macs, shared)
    return rows


def macs_per_image(model: nn.Module, images: Tensor) -> float:
    """Mean MACs of one image, the same number in every command."""
    if isinstance(model, TimmPyramid):
        return FeaturesOnly(model.backbone).traced_macs(images)
    if isinstance(model, FeaturesOnly):
        return model.traced_macs(images)
    if hasattr(model, "trace"):
        sparse: Any = model
        macs: int | None = sparse.macs(size_of(images))
        return float(sparse.trace(images).macs.mean()) if macs is None else macs
    return dense_macs(model, images[:1])


def _mean_macs(model: nn.Module, batches: Sequence[Tensor]) -> float:
    return statistics.fmean(macs_per_image(model, batch) for batch in batches)


@dataclass(frozen=True)
class Timing:
    """What one runner took."""

    seconds: list[float]
    """Per call, a number per round."""
    calls: int
    """In each round."""

    def speedup(self, base: Timing) -> Quartiles:
        """Time of the base over this time, round by round."""
        pairs = zip(base.seconds, self.seconds, strict=True)
        return Quartiles.of([before / after for before, after in pairs])


def take_turns(
    runners: Mapping[str, Callable[[Tensor], Any]],
    batches: Sequence[Tensor],
    rounds: int,
    min_seconds: float,
    max_seconds: float,
    clock: Clock,
) -> dict[str, Timing]:
    """Seconds per call of each runner in each round, in rotating order.

    Args:
        runners: by name; each takes a batch.
        batches: what they are called on, one after the other.
        rounds: how often each has its turn.
        min_seconds: a turn lasts at least about this long, and at least one call per batch.
        max_seconds: after this long the rounds end early, but three at least are measured.
        clock: seconds; monotonic.
    """
    calls, deadline = {}, clock() + max_seconds
    keep_memory()
    for name, run in runners.items():
        _seconds_per_call(run, batches, 1, clock)  # the first call compiles and allocates
        seconds = _seconds_per_call(run, batches, _WARM_UP_CALLS, clock)
        passes = round(min_seconds / max(seconds, 1e-9) / len(batches))
        calls[name] = max(1, passes) * len(batches)
    names = list(runners)
    seconds_of: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        if turn >= _FEWEST_ROUNDS and clock() > deadline:
            break
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            runners[name](batches[0])  # wakes its threads, and takes the caches from the one before
            seconds = _seconds_per_call(runners[name], batches, calls[name], clock)
            seconds_of[name].append(seconds)
    return {name: Timing(seconds_of[name], calls[name]) for name in names}


def keep_memory() -> None:
    """Have the C library keep the memory that is freed, as it comes to do in a process that runs a
    single model; among many, calls would fault pages in again or not as chance has it.
    """
    # glibc keeps up to twice the largest block that it saw freed, and takes note up to 32 MiB.
    torch.empty((32 << 20) - 8192, dtype=torch.uint8)


def _seconds_per_call(
    run: Callable[[Tensor], Any], batches: Sequence[Tensor], calls: int, clock: Clock
) -> float:
    synchronise()
    start = clock()
    for call in range(calls):
        run(batches[call % len(batches)])
    synchronise()
    return (clock() - start) / calls


def _rows(
    timing: Mapping[str, Timing], macs: Mapping[str, float], shared: Mapping[str, Any]
) -> list[Row]:
    base = next(iter(timing))
    rows = []
    for name, own in timing.items():
        speedup, seconds = own.speedup(timing[base]), Quartiles.of(own.seconds)
        rows.append(
            Row(
                name=name,
                base=base,
                rounds=len(own.seconds),
                calls_per_round=own.calls,
                macs=macs[name],
                seconds=seconds,
                images_per_second=shared["batch"] / seconds.median,
                speedup=speedup,
                efficiency=speedup / (macs[base] / macs[name]),
                **shared,
            )
        )
    return rows


def _check(
    candidates: Mapping[str, nn.Module],
    batches: Sequence[int],
    dtypes: Sequence[str],
    rounds: int,
    threads: int | None,
) -> None:
    if not candidates:
        raise ConfigError("there is no candidate to measure")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ConfigError(
                f"dtype is {dtype!r}{closest(dtype, DTYPES)}; use one of {', '.join(DTYPES)}"
            )
    for name, value in {"rounds": rounds, "threads": 1 if threads is None else threads}.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected at least 1")
    if not batches or min(batches) < 1:
        raise ConfigError(f"batches are {tuple(batches)}; expected numbers of at least 1")
    if not dtypes:
        raise ConfigError(f"no dtype is given; use one of {', '.join(DTYPES)}")


def checked_device(device: str | torch.device) -> torch.device:
    """``device``, if it is one that vitrim measures on and that is there."""
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device is {device!r}; use cpu, cuda or cuda:1 and so on") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device is {str(device)!r}; use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {str(device)!r}, but torch finds no CUDA device; use cpu")
    return device


@contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """Torch with so many CPU threads for a while; None leaves their number."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


def _inputs(
    images: Tensor | None,
    batch: int,
    image_shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The batches that every candidate is timed on."""
    if images is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn((batch, *image_shape), generator=generator).to(device, dtype)]
    if tuple(images.shape[1:]) != tuple(image_shape):
        raise InputError(
            f"images have shape {tuple(images.shape)}; expected (any, "
            f"{', '.join(map(str, image_shape))})"
        )
    count = min(len(images) // batch, _MOST_BATCHES)
    if count == 0:
        raise InputError(f"{len(images)} images do not make one batch of {batch}; give more")
    return [part.to(device, dtype) for part in torch.split(images[: count * batch], batch)]
