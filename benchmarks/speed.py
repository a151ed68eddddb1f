"""Speed of sparse models against their dense timm base; writes ``results/speed.json``.

Run it on an otherwise idle machine: ``python benchmarks/speed.py`` (about five minutes on 2 cores).
Dense and sparse take turns within one process; see ``vitrim/tools/benchmark.py`` for how times,
speed-ups and efficiencies are computed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch

import vitrim
from vitrim.checkpoint import write_atomic
from vitrim.tools.benchmark import benchmark

MODEL = "deit_small_patch16_224"
RESULTS = Path(__file__).parents[1] / "results" / "speed.json"


def candidates() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    dense = timm.create_model(MODEL).eval()
    found: dict[str, torch.nn.Module] = {"dense": dense}
    for ratio in (0.9, 0.7, 0.5):
        found[f"dynamicvit r={ratio}"] = vitrim.sparsify(
            dense, vitrim.DynamicViTConfig(keep_ratio=ratio)
        )
    return found


def sparsify_seconds() -> float:
    model = timm.create_model(MODEL)
    start = time.perf_counter()
    vitrim.sparsify(model, vitrim.DynamicViTConfig())
    return time.perf_counter() - start


def peak_memory(which: str) -> float:
    """Peak resident MiB of a fresh process that evaluates one batch of 64 images."""
    command = [sys.executable, __file__, "--peak-memory-of", which]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(out.stdout)


def print_own_peak_memory(which: str) -> None:
    model = candidates()[which]
    with torch.inference_mode():
        model(torch.zeros(64, 3, 224, 224))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--peak-memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_memory_of:
        return print_own_peak_memory(options.peak_memory_of)
    rows = benchmark(
        candidates(),
        (3, 224, 224),
        batches=[int(batch) for batch in options.batches.split(",")],
        rounds=options.rounds,
        threads=options.threads,
        device=options.device,
        compile=options.compile,
        progress=print,
    )
    for row in rows:
        print(
            f"{row.dtype} batch {row.batch:3d} {row.name:18s} "
            f"{row.seconds.median * 1e3:8.2f} ms [{row.seconds.low * 1e3:.2f}, "
            f"{row.seconds.high * 1e3:.2f}]  {row.images_per_second:7.1f} images/s  "
            f"speed-up {row.speedup.median:.3f} [{row.speedup.low:.3f}, {row.speedup.high:.3f}]  "
            f"efficiency {row.efficiency.median:.3f}"
        )
    content = {
        "command": "python benchmarks/speed.py " + " ".join(sys.argv[1:]),
        "model": MODEL,
        "rows": [row.to_dict() for row in rows],
        "sparsify_seconds": sparsify_seconds(),
        "peak_memory_mib": {name: peak_memory(name) for name in ("dense", "dynamicvit r=0.7")},
    }
    print(f"sparsify: {content['sparsify_seconds']:.3f} s; peak MiB {content['peak_memory_mib']}")
    options.output.parent.mkdir(exist_ok=True)
    write_atomic(options.output, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
