"""How well a latency table predicts models that were not profiled.

``python benchmarks/latency.py`` on an otherwise idle machine (under four minutes on 2 cores) makes
the tables of a backbone for torch and onnxruntime, then measures schedules of several methods that
the tables know nothing of, in turns, and writes ``results/latency.json``: predicted and measured
milliseconds, and the median error (without the dense model, which is there to compare with).
Weights and images are random, as time allows: where each image decides, it keeps what it happens to
keep, which the prediction is told.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitrim import (
    DynamicViTConfig,
    SaiTConfig,
    SparseModel,
    SPViTConfig,
    STViTConfig,
    sparsify,
)
from vitrim.checkpoint import write_atomic
from vitrim.hardware import hardware
from vitrim.tools import runners
from vitrim.tools.benchmark import Quartiles, limited_threads, take_turns
from vitrim.tools.latency import predict, profile
from vitrim.tools.parts import kinds_of

MODEL = "deit_tiny_patch16_224"
RESULTS = Path(__file__).parents[1] / "results"
METHODS = ("dynamicvit", "spvit", "sait", "stvit")
PACKED_BATCH = 8


def schedules(depth: int) -> dict[str, Any]:
    """Configs by name, for a backbone of ``depth`` blocks."""

    def at(*shares: float) -> tuple[int, ...]:
        return tuple(round(depth * share) for share in shares)

    def spvit(keep_ratio: float, *stages: int) -> SPViTConfig:
        return SPViTConfig(keep_ratio=keep_ratio, stages=stages or None, inference="top_k")

    def sait(density: float, prune_after: int) -> SaiTConfig:
        return SaiTConfig(selector="density", density=density, prune_after=prune_after)

    early, middle = at(0.17, 0.42, 0.67), at(0.34)
    return {
        "dynamicvit 0.9": DynamicViTConfig(keep_ratio=0.9),
        "dynamicvit 0.7": DynamicViTConfig(keep_ratio=0.7),
        "dynamicvit 0.5": DynamicViTConfig(keep_ratio=0.5),
        "dynamicvit 0.6, early stages": DynamicViTConfig(keep_ratio=0.6, stages=early),
        "dynamicvit 0.4, one stage": DynamicViTConfig(keep_ratio=0.4, stages=middle),
        "spvit 0.7": spvit(0.7),
        "spvit 0.5, two stages": spvit(0.5, *at(0.17, 0.58)),
        "sait 0.7": sait(0.7, depth // 3),
        "sait 0.5, early": sait(0.5, depth // 4),
        "sait 0.3, late": sait(0.3, depth // 2),
        "stvit 5 x 5": STViTConfig(semantic_tokens=25),
        "dynamicvit, each image": DynamicViTConfig(threshold=0.5),
    }


def packed_schedules(depth: int) -> dict[str, Any]:
    """The same for batches of images with unlike counts."""
    return {
        "dynamicvit 0.7, batch": DynamicViTConfig(keep_ratio=0.7),
        "dynamicvit, packed": DynamicViTConfig(threshold=0.5),
        "dynamicvit, packed, one stage": DynamicViTConfig(threshold=0.5, stages=(depth // 3,)),
    }


def check(
    backbone: nn.Module, runtime: str, batch: int, configs: dict[str, Any], options: Any
) -> list[dict[str, Any]]:
    """Profile, predict and measure in one runtime."""
    threads = options.threads
    sparse = {"dense": sparsify(backbone, DynamicViTConfig(keep_ratio=1.0))}
    for name, config in configs.items():
        sparse[name] = sparsify(backbone, config, generator=torch.Generator().manual_seed(1))
    names = METHODS if batch == 1 else ("dynamicvit",)
    table = profile(
        backbone,
        runtime=runtime,
        batch=batch,
        threads=threads,
        configs=[c for c in kinds_of(sparse["dense"].family, names) if _is_wanted(c)],
        points=options.points if batch == 1 else options.points // 2,
        rounds=options.rounds,
    )
    generator = torch.Generator().manual_seed(0)
    size = sparse["dense"].family.image_size
    images = torch.randn((max(batch, 4), 3, *size), generator=generator)
    batches = list(images.split(batch))
    with torch.no_grad():
        models = {name: _runner(model, batches, runtime, threads) for name, model in sparse.items()}
    with limited_threads(threads), torch.inference_mode():
        timing = take_turns(models, batches, options.rounds, 0.05, math.inf, time.perf_counter)
    rows = []
    for name, model in sparse.items():
        measured = Quartiles.of([1e3 * seconds for seconds in timing[name].seconds])
        predicted = _predicted(table, model, images)
        row = {
            "runtime": runtime,
            "batch": batch,
            "threads": threads,
            "schedule": name,
            "predicted": predicted,
            "measured": asdict(measured),
            "error": predicted / measured.median - 1,
        }
        print(
            f"{runtime:12} batch {batch:2}  {name:30} predicted {predicted:8.2f} ms  measured "
            f"{measured.median:8.2f} ms  {100 * row['error']:+5.1f}%",
            flush=True,
        )
        rows.append(row)
    return rows


def _is_wanted(config: Any) -> bool:
    """Whether a schedule of this kind is among those that are measured."""
    return not (isinstance(config, SPViTConfig | SaiTConfig) and _decides(config))


def _decides(config: Any) -> bool:
    return getattr(config, "inference", "top_k") != "top_k" or config == SaiTConfig()


def _predicted(table: Any, model: SparseModel, images: Tensor) -> float:
    family = model.family
    counts: Any = model.method.counts(family, family.grid())
    if counts is None:
        counts = [stage.counts for stage in model.trace(images).stages]
    return float(predict(table, model.method, family, family.grid(), counts))


def _runner(
    model: SparseModel, batches: list[Tensor], runtime: str, threads: int
) -> Callable[[Tensor], Any]:
    model.eval()
    if runtime == "torch":
        return model
    bound = runners.bind(model, batches[0], False, runtime, "fp32", threads)
    calls = {id(part): bound(part) for part in batches}
    return lambda part: calls[id(part)]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--runtimes", default="torch,onnxruntime")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--points", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS / "latency.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    backbone = timm.create_model(options.model).eval().requires_grad_(False)
    depth = len(backbone.blocks)
    rows = []
    for runtime in options.runtimes.split(","):
        rows += check(backbone, runtime, 1, schedules(depth), options)
        if runtime == "torch":
            rows += check(backbone, runtime, PACKED_BATCH, packed_schedules(depth), options)
    errors = {}
    for runtime in options.runtimes.split(","):
        own = [row for row in rows if row["runtime"] == runtime and row["schedule"] != "dense"]
        errors[runtime] = statistics.median(abs(row["error"]) for row in own)
    for runtime, error in errors.items():
        print(f"{runtime}: median error {100 * error:.1f}%")
    run = {
        "command": " ".join(["python", *sys.argv]),
        "model": options.model,
        "hardware": hardware(torch.device("cpu")) | {"threads": options.threads},
        "median_error": errors,
        "rows": rows,
    }
    write_atomic(options.output, (json.dumps(run, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
