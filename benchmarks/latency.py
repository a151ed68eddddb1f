"""How well a latency table predicts models that were not profiled.

``python benchmarks/latency.py`` on an otherwise idle machine (nine minutes) makes the tables of a
backbone for torch and onnxruntime, in the same rounds measures schedules of several methods that
the tables know nothing of, and writes ``results/latency.json`` and ``.md``: predicted and measured
milliseconds, and the median error (without the dense model, which is there to compare with). With
``--model swin_tiny_patch4_window7_224 --output results/latency_swin.json`` likewise of a pyramid.
Weights and images are random, as time allows: where each image decides, it keeps what it happens
to keep, which the prediction is told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitrim import (
    DynamicSpatialConfig,
    DynamicViTConfig,
    SaiTConfig,
    SparseModel,
    SPViTConfig,
    SPViTPyramidConfig,
    STViTConfig,
    STViTRConfig,
    STViTSwinConfig,
    sparsify,
)
from vitrim.checkpoint import write_atomic
from vitrim.families import ViT, family_of
from vitrim.latency.measure import profile
from vitrim.latency.probes import DENSE, kinds_of
from vitrim.latency.table import predict
from vitrim.methods import method_of_config
from vitrim.tools.hardware import hardware

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


def pyramid_schedules(family: Any) -> dict[str, Any]:
    """The same for a pyramid."""

    def spvit(keep_ratio: Any) -> SPViTPyramidConfig:
        return SPViTPyramidConfig(keep_ratio=keep_ratio, inference="top_k")

    spatial = {
        "dynamic_spatial 0.9": DynamicSpatialConfig(keep_ratio=0.9),
        "dynamic_spatial 0.7": DynamicSpatialConfig(keep_ratio=0.7),
        "dynamic_spatial 0.5": DynamicSpatialConfig(keep_ratio=0.5),
        "dynamic_spatial 0.9, 0.8, 0.2": DynamicSpatialConfig(keep_ratio=(0.9, 0.8, 0.2)),
    }
    pyramid = {
        "spvit_pyramid 0.8": spvit(0.8),
        "spvit_pyramid 0.6": spvit(0.6),
        "spvit_pyramid 0.4": spvit(0.4),
        "spvit_pyramid 0.9, 0.5, 0.2": spvit((0.9, 0.5, 0.2)),
        "spvit_pyramid, each image": SPViTPyramidConfig(),
    }
    semantic = {
        "stvit_swin 9": STViTSwinConfig(),
        "stvit_swin 4": STViTSwinConfig(window_tokens=4),
        "stvit_r 9": STViTRConfig(),
        "stvit_r 4": STViTRConfig(window_tokens=4),
    }
    found = spatial | pyramid | semantic
    return {k: c for k, c in found.items() if family.name in method_of_config(c).families}


def packed_schedules(depth: int) -> dict[str, Any]:
    """The same for batches of images with unlike counts."""
    return {
        "dynamicvit 0.7, batch": DynamicViTConfig(keep_ratio=0.7),
        "dynamicvit, packed": DynamicViTConfig(threshold=0.5),
        "dynamicvit, packed, one stage": DynamicViTConfig(threshold=0.5, stages=(depth // 3,)),
    }


def check(
    backbone: nn.Module,
    runtime: str,
    batch: int,
    threads: int,
    configs: dict[str, Any],
    options: Any,
) -> list[dict[str, Any]]:
    """Profile, with whole models beside the parts, and predict those; in one runtime."""
    sparse = {
        name: sparsify(backbone, config, generator=torch.Generator().manual_seed(1)).eval()
        for name, config in configs.items()
    }
    family = family_of(backbone)
    kinds = kinds_of(family)
    if isinstance(family, ViT):
        kinds = kinds_of(family, METHODS if batch == 1 else ("dynamicvit",))
        kinds = [config for config in kinds if _is_wanted(config)]
    table = profile(
        backbone,
        runtime=runtime,
        batch=batch,
        threads=threads,
        configs=kinds,
        points=options.points if batch == 1 else options.points // 2,
        rounds=options.rounds,
        min_seconds=options.seconds,
        beside=sparse,
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((batch, 3, *family.image_size), generator=generator)
    predicted = {DENSE: float(predict(table, None, family, family.grid()))}
    predicted |= {name: _predicted(table, model, images) for name, model in sparse.items()}
    rows = []
    for name, milliseconds in predicted.items():
        curve = table.curves[name]
        row = {
            "runtime": runtime,
            "batch": batch,
            "threads": threads,
            "schedule": name,
            "predicted": milliseconds,
            "measured": {"low": curve.low[0], "median": curve.median[0], "high": curve.high[0]},
            "error": milliseconds / curve.median[0] - 1,
        }
        print(
            f"{runtime:12} {threads} thread(s) batch {batch}  {name:30} predicted "
            f"{milliseconds:7.2f} ms  measured {curve.median[0]:7.2f} ms  {row['error']:+6.1%}",
            flush=True,
        )
        rows.append(row)
    return rows


def _is_wanted(config: Any) -> bool:
    """Whether a schedule of this kind is among those that are measured."""
    return not (isinstance(config, SPViTConfig | SaiTConfig) and _decides(config))


def _decides(config: Any) -> bool:
    """Whether each image does."""
    return getattr(config, "inference", "top_k") != "top_k" or config == SaiTConfig()


def _predicted(table: Any, model: SparseModel, images: Tensor) -> float:
    family = model.family
    counts: Any = model.method.counts(family, family.grid())
    if counts is None:
        counts = [stage.counts for stage in model.trace(images).stages]
    return float(predict(table, model.method, family, family.grid(), counts))


def page(run: dict[str, Any]) -> str:
    """The table, in words that say how it was made."""
    stamp = run["hardware"]
    errors = [f"| {where} | {error:.1%} |" for where, error in run["median_error"].items()]
    rows = [
        f"| {row['runtime']} | {row['threads']} | {row['batch']} | {row['schedule']} | "
        f"{row['predicted']:.2f} | {row['measured']['median']:.2f} [{row['measured']['low']:.2f}, "
        f"{row['measured']['high']:.2f}] | {row['error']:+.1%} |"
        for row in run["rows"]
    ]
    return "\n".join(
        [
            "# How well a latency table predicts",
            "",
            f"Made by `{run['command']}`: {run['model']}, random weights, fp32, {stamp['cpu']}, "
            f"torch {stamp['torch']}, {run['date']}. The tables of `vitrim profile` know the parts;"
            " the schedules below were not profiled, but measured in the same rounds. Milliseconds"
            " per batch: predicted, and measured median [quartiles].",
            "",
            "| runtime | median error |",
            "|---|---|",
            *errors,
            "",
            "| runtime | threads | batch | schedule | predicted | measured | error |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--runtimes", default="torch,onnxruntime")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--points", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.02, help="length of a turn")
    parser.add_argument("--output", type=Path, default=RESULTS / "latency.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    backbone = timm.create_model(options.model).eval().requires_grad_(False)
    family = family_of(backbone)
    is_plain = isinstance(family, ViT)
    alone = schedules(family.depth) if is_plain else pyramid_schedules(family)
    together = packed_schedules(family.depth) if is_plain else alone
    rows, errors = [], {}
    for threads in options.threads:
        for runtime in options.runtimes.split(","):
            alike = {k: c for k, c in alone.items() if is_plain or not _decides(c)}
            configs = alone if runtime == "torch" else alike
            found = check(backbone, runtime, 1, threads, configs, options)
            if runtime == "torch":
                found += check(backbone, runtime, PACKED_BATCH, threads, together, options)
            error = statistics.median(abs(r["error"]) for r in found if r["schedule"] != DENSE)
            print(f"{runtime}, {threads} thread(s): median error {100 * error:.1f}%")
            errors[f"{runtime}, {threads} thread(s)"] = error
            rows += found
    run = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "model": options.model,
        "hardware": hardware(torch.device("cpu")),
        "median_error": errors,
        "rows": rows,
    }
    write_atomic(options.output, (json.dumps(run, indent=1) + "\n").encode())
    write_atomic(options.output.with_suffix(".md"), page(run).encode())


if __name__ == "__main__":
    main()
