"""Dynamic spatial sparsification: is time saved as multiplications are? On Swin and ConvNeXt.

Run it on an otherwise idle machine: ``python benchmarks/dynamic_spatial.py`` (about fifteen minutes
on 2 cores). Dense and sparse take turns within one process, so that a busy neighbour strikes both
alike; see ``vitrim/tools/benchmark.py``. Writes ``results/dynamic_spatial.json``.

*Saving met* is the share of the dense model's time that is saved, divided by the share of its MACs
that is: 1 means that every multiplication saved was time saved. *Efficiency* is the speed-up
divided by the one that the MACs promise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import timm
import torch

import vitrim
from vitrim.checkpoint import write_atomic
from vitrim.tools.benchmark import Row, benchmark

MODELS = {"swin-t": "swin_tiny_patch4_window7_224", "convnext-t": "convnext_tiny"}
RESULTS = Path(__file__).parents[1] / "results" / "dynamic_spatial.json"


def candidates(name: str, ratios: list[float]) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    dense = timm.create_model(MODELS[name]).eval()
    sparse = {
        f"{name} r={ratio}": vitrim.sparsify(dense, vitrim.DynamicSpatialConfig(keep_ratio=ratio))
        for ratio in ratios
    }
    return {f"{name} dense": dense, **sparse}


def savings_met(row: Row, dense: Row) -> tuple[float, float, float]:
    """Median and quartiles: the saved share of the time over the saved share of the MACs."""
    promised = 1 - row.macs / dense.macs
    found = row.speedup
    median, low, high = ((1 - 1 / s) / promised for s in (found.median, found.low, found.high))
    return median, low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--ratios", default="0.7")
    parser.add_argument("--batches", default="16")
    parser.add_argument("--dtypes", default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    content = []
    for name in options.models.split(","):
        rows = benchmark(
            candidates(name, [float(ratio) for ratio in options.ratios.split(",")]),
            (3, 224, 224),
            batches=[int(batch) for batch in options.batches.split(",")],
            dtypes=options.dtypes.split(","),
            rounds=options.rounds,
            threads=options.threads,
            device=options.device,
            compile=options.compile,
        )
        for row in rows:
            text = (
                f"{row.dtype} batch {row.batch:3d} {row.name:18s} {row.macs / 1e9:6.3f} GMACs "
                f"{row.seconds.median * 1e3:8.2f} ms [{row.seconds.low * 1e3:.2f}, "
                f"{row.seconds.high * 1e3:.2f}]"
            )
            content.append(row.to_dict())
            if row.name == row.base:
                dense = row
            else:
                median, low, high = savings_met(row, dense)
                text += (
                    f"  speed-up {row.speedup.median:.3f} [{row.speedup.low:.3f}, "
                    f"{row.speedup.high:.3f}]  efficiency {row.efficiency.median:.3f}  "
                    f"saving met {median:.3f} [{low:.3f}, {high:.3f}]"
                )
                content[-1]["saving_met"] = {"median": median, "low": low, "high": high}
            print(text, flush=True)
    command = "python benchmarks/dynamic_spatial.py " + " ".join(sys.argv[1:])
    text = json.dumps({"command": command.strip(), "rows": content}, indent=1)
    options.output.parent.mkdir(exist_ok=True)
    write_atomic(options.output, (text + "\n").encode())


if __name__ == "__main__":
    main()
