"""Merging against dropping and ToMe at equal MACs; writes ``results/merging.json``.

Run it on an otherwise idle machine: ``python benchmarks/merging.py`` (a few minutes on 2 cores for
each model). With ``--tome FOLDER``, where ToMe's own repository lies (facebookresearch/ToMe), its
code takes part; without, the preset ``MergingConfig.tome()`` stands in, labelled so. All take turns
within one process; see ``vitrim/tools/benchmark.py``.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import vitrim
from vitrim.checkpoint import write_atomic
from vitrim.tools.benchmark import Row, benchmark

RESULTS = Path(__file__).parents[1] / "results" / "merging.json"


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
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    shares = [float(share) for share in options.shares.split(",")]
    content: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "models": {}}
    for model in options.models.split(","):
        rows = benchmark(
            candidates(model, shares, options.tome),
            (3, 224, 224),
            batches=[int(batch) for batch in options.batches.split(",")],
            dtypes=options.dtypes.split(","),
            rounds=options.rounds,
            min_seconds=options.seconds,
            threads=options.threads,
            progress=print,
        )
        content["models"][model] = [row.to_dict() for row in rows]
        for row in rows:
            print(line(row))
        write_atomic(options.output, (json.dumps(content, indent=1) + "\n").encode())


def line(row: Row) -> str:
    seconds = row.seconds
    return (
        f"{row.dtype} batch {row.batch:3d} {row.name:24s} {row.macs / 1e9:6.3f} G "
        f"{seconds.median * 1e3:8.2f} ms [{seconds.low * 1e3:.2f}, {seconds.high * 1e3:.2f}]  "
        f"{row.images_per_second:7.1f} images/s  speed-up {row.speedup.median:.3f}  "
        f"efficiency {row.efficiency.median:.3f}"
    )


if __name__ == "__main__":
    main()
