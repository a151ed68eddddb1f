"""Merging against dropping and ToMe at equal MACs; writes ``results/merging.json``.

Run it on an otherwise idle machine: ``python benchmarks/merging.py`` (a few minutes on 2 cores for
each model). With ``--tome FOLDER``, where ToMe's own repository lies (facebookresearch/ToMe), its
code takes part; without, the preset ``MergingConfig.tome()`` stands in, labelled so. All take turns
within one process; see ``vitrim/tools/benchmark.py``. ``--runtimes onnxruntime,openvino`` times the
exported models instead (fp32; half a minute to export each, kept in ``runs/merging``). What is not
measured again stays in the file.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import vitrim
from vitrim.checkpoint import write_atomic
from vitrim.export.bundle import export, images_decide
from vitrim.families.described import describe_data
from vitrim.runtime import Bundle
from vitrim.tools.benchmark import (
    Quartiles,
    benchmark,
    limited_threads,
    macs_per_image,
    take_turns,
)
from vitrim.tools.hardware import hardware

ROOT = Path(__file__).parents[1]
RESULTS, BUNDLES = ROOT / "results" / "merging.json", ROOT / "runs" / "merging"
FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}


def at(dense: nn.Module, config: Any, share: float) -> vitrim.SparseModel:
    """A sparse model at a share of the dense MACs."""
    sparse = vitrim.sparsify(dense, config)
    sparse.set_budget(share)
    return sparse


def tome_of(folder: Path | None) -> tuple[str, Callable[[nn.Module, float], nn.Module]]:
    """What stands for ToMe, and how it is made of a dense model and its r."""
    if folder is None:
        return "tome (preset)", lambda dense, r: vitrim.sparsify(
            dense, vitrim.MergingConfig.tome(r)
        )
    sys.path.insert(0, str(folder))
    import tome

    def patched(dense: nn.Module, r: float) -> nn.Module:
        model = copy.deepcopy(dense)
        tome.patch.timm(model)
        model.r = round(r)
        return model

    return "tome (its code)", patched


def whole_r(dense: nn.Module, share: float) -> tuple[int, float]:
    """ToMe's r that comes nearest to a share of the dense MACs, and the share that it has."""
    found = {}
    for r in range(1, 25):
        sparse = vitrim.sparsify(dense, vitrim.MergingConfig.tome(r))
        macs = sparse.macs()
        assert macs is not None
        found[r] = macs / sparse.dense_macs()
    r = min(found, key=lambda r: abs(found[r] - share))
    return r, found[r]


def candidates(model: str, shares: list[float], folder: Path | None) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    dense = timm.create_model(model).eval()
    found: dict[str, nn.Module] = {"dense": dense}
    name, make = tome_of(folder)
    for asked in shares:
        r, share = whole_r(dense, asked)  # the others meet its MACs
        found[f"{name} {asked}"] = make(dense, r)
        found[f"merging {asked}"] = at(dense, vitrim.MergingConfig(), share)
        found[f"dynamicvit {asked}"] = at(dense, vitrim.DynamicViTConfig(), share)
        found[f"sait {asked}"] = at(dense, vitrim.SaiTConfig(selector="density"), share)
    return found


def exported(
    model: str, runtime: str, batch: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Rows of the exported models in one runtime; ToMe's code cannot be exported."""
    made = {
        name: candidate
        for name, candidate in candidates(model, options.shares, None).items()
        if not images_decide(candidate)
    }
    runners: dict[str, Callable[[torch.Tensor], Any]] = {}
    for name, candidate in made.items():
        size = batch if runtime == "openvino" else None  # fastest with all sizes known
        folder = BUNDLES / f"{model} {name} {runtime} {size or 'any'}".replace(" ", "-")
        if not folder.exists():
            print(f"exporting {folder.name} ...", flush=True)
            data_config = describe_data(made["dense"])
            export(candidate, folder, FORMATS[runtime], batch=size, data_config=data_config)
        bundle = Bundle(folder, options.threads)
        runners[name] = lambda images, bundle=bundle: bundle(images.numpy())
    images = [torch.randn(batch, 3, 224, 224) for _ in range(2)]
    turns = (options.rounds, options.seconds, math.inf, time.perf_counter)
    with torch.inference_mode(), limited_threads(options.threads):
        timing = take_turns(runners, images, *turns)
        macs = {name: macs_per_image(found, images[0][:1]) for name, found in made.items()}
    for name, own in timing.items():
        speedup = own.speedup(timing["dense"])
        yield {
            **{"runtime": runtime, "batch": batch, "dtype": "fp32", "name": name},
            "macs": macs[name],
            "seconds": vars(Quartiles.of(own.seconds)),
            "speedup": vars(speedup),
            "efficiency": vars(speedup / (macs["dense"] / macs[name])),
            "hardware": hardware(torch.device("cpu")),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="deit_tiny_patch16_224,deit_small_patch16_224")
    parser.add_argument("--shares", default="0.8,0.65,0.5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", default="16,1")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--tome", type=Path)
    parser.add_argument("--runtimes", default="torch")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.shares = [float(share) for share in options.shares.split(",")]
    batches = [int(batch) for batch in options.batches.split(",")]
    found = json.loads(options.output.read_text()) if options.output.exists() else {}
    content: dict[str, Any] = {"models": {}, "exported": {}} | found
    content["command"] = " ".join(["python", *sys.argv])

    def keep(part: str, name: str, rows: list[dict[str, Any]]) -> None:
        content[part][name] = rows
        write_atomic(options.output, (json.dumps(content, indent=1) + "\n").encode())
        for row in rows:
            print(line(row), flush=True)

    for model in options.models.split(","):
        for runtime in options.runtimes.split(","):
            if runtime != "torch":
                for batch in batches:
                    rows = list(exported(model, runtime, batch, options))
                    keep("exported", f"{model} {runtime} batch {batch}", rows)
                continue
            measured = benchmark(
                candidates(model, options.shares, options.tome),
                (3, 224, 224),
                batches=batches,
                dtypes=options.dtypes.split(","),
                rounds=options.rounds,
                min_seconds=options.seconds,
                threads=options.threads,
                progress=print,
            )
            keep("models", model, [row.to_dict() for row in measured])


def line(row: dict[str, Any]) -> str:
    seconds = row["seconds"]
    return (
        f"{row.get('runtime', 'torch')} {row['dtype']} batch {row['batch']:3d} {row['name']:24s} "
        f"{row['macs'] / 1e9:6.3f} G {seconds['median'] * 1e3:8.2f} ms "
        f"[{seconds['low'] * 1e3:.2f}, {seconds['high'] * 1e3:.2f}]  "
        f"speed-up {row['speedup']['median']:.3f}  efficiency {row['efficiency']['median']:.3f}"
    )


if __name__ == "__main__":
    main()
