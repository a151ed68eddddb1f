"""Dynamic spatial sparsification: is time saved as multiplications are? On Swin and ConvNeXt.

Run it on an otherwise idle machine: ``python benchmarks/dynamic_spatial.py`` (about fifteen minutes
on 2 cores). Dense and sparse take turns within one process, so that a busy neighbour strikes both
alike; see ``vitrim/tools/benchmark.py``. Writes ``results/dynamic_spatial.json``.

*Saving met* is the share of the dense model's time that is saved, divided by the share of its MACs
that is: 1 means that every multiplication saved was time saved. *Efficiency* is the speed-up
divided by the one that the MACs promise. Both compare with timm's model, as a user would.

Part of that saving is not the method's: on a CPU vitrim runs the MLPs of whole blocks in slices,
which gives the same numbers in less time. So the dense model in slices (``keep_ratio`` 1
throughout) takes part too, and the saving met is printed against it as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch

import vitrim
from vitrim.checkpoint import write_atomic
from vitrim.tools.benchmark import Row, benchmark

MODELS = {"swin-t": "swin_tiny_patch4_window7_224", "convnext-t": "convnext_tiny"}
SLICES = "dense in slices"
RESULTS = Path(__file__).parents[1] / "results" / "dynamic_spatial.json"


def candidates(name: str, ratios: list[float]) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    dense = timm.create_model(MODELS[name]).eval()
    configs = {f"{name} {SLICES}": vitrim.DynamicSpatialConfig(keep_ratio=(1.0, 1.0, 1.0))}
    for ratio in ratios:
        configs[f"{name} r={ratio}"] = vitrim.DynamicSpatialConfig(keep_ratio=ratio)
    sparse = {key: vitrim.sparsify(dense, config) for key, config in configs.items()}
    return {f"{name} dense": dense, **sparse}


def savings_met(row: Row, dense: Row) -> dict[str, float]:
    """The saved share of the time over the saved share of the MACs: median and quartiles."""
    promised, found = 1 - row.macs / dense.macs, row.speedup
    speedups = {"median": found.median, "low": found.low, "high": found.high}
    return {name: (1 - 1 / speedup) / promised for name, speedup in speedups.items()}


def report(rows: list[Row]) -> list[dict[str, Any]]:
    """Print the rows of one model, and give them as JSON-ready data with the savings met."""
    content = []
    for row in rows:
        text = (
            f"{row.dtype} batch {row.batch:3d} {row.name:26s} {row.macs / 1e9:6.3f} GMACs "
            f"{row.seconds.median * 1e3:8.2f} ms [{row.seconds.low * 1e3:.2f}, "
            f"{row.seconds.high * 1e3:.2f}]  speed-up {row.speedup.median:.3f} "
            f"[{row.speedup.low:.3f}, {row.speedup.high:.3f}]"
        )
        content.append(row.to_dict())
        if row.name == row.base:
            dense = row
        elif SLICES in row.name:
            sliced = row
        else:
            met = savings_met(row, dense)
            saved = 1 - row.seconds.median / sliced.seconds.median
            against_sliced = saved / (1 - row.macs / dense.macs)
            content[-1] |= {"saving_met": met, "saving_met_against_slices": against_sliced}
            text += (
                f"  efficiency {row.efficiency.median:.3f}  saving met {met['median']:.3f} "
                f"[{met['low']:.3f}, {met['high']:.3f}], against slices {against_sliced:.3f}"
            )
        print(text, flush=True)
    return content


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
        content += report(rows)
    command = "python benchmarks/dynamic_spatial.py " + " ".join(sys.argv[1:])
    text = json.dumps({"command": command.strip(), "rows": content}, indent=1)
    options.output.parent.mkdir(exist_ok=True)
    write_atomic(options.output, (text + "\n").encode())


if __name__ == "__main__":
    main()
