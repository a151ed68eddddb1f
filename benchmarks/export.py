"""What exported models keep of the saving: dense and sparse in each runtime, side by side.

``python benchmarks/export.py`` exports DeiT-Small with random weights, dense, with DynamicViT at
r = 0.7 and, for one image at a time, with AS-ViT calibrated to the same cost on the embedded
images; then it times them in torch, torch.compile, onnxruntime and OpenVINO. Within a runtime the
candidates take turns in rotating order. Writes ``results/export.json`` and the table of
``results/export.md``; parts that are measured already stay (``--again`` measures them anew), so it
can run piece by piece: ``--only onnxruntime openvino``. The machine should do nothing else: about
ten minutes on two cores, half of it exporting; what is exported is kept in ``runs/export``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vitrim
from vitrim.checkpoint import write_atomic
from vitrim.export.bundle import export, images_decide
from vitrim.families.described import describe_data
from vitrim.runtime import Bundle
from vitrim.tools.benchmark import Quartiles, limited_threads, macs_per_image, take_turns
from vitrim.tools.hardware import hardware
from vitrim.train.data import digits_data_config, eval_loader

MODEL = "deit_small_patch16_224"
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "export.json"
FOLDER = ROOT / "runs" / "export"
DTYPES = {
    "torch": ("fp32", "bf16"),
    "torch-compile": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16"),
}
FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARPNESS = 8
"""Random attention looks at all tokens alike; queries and keys this much larger make it choose."""
CALIBRATION, TIMED = 32, 16
"""Embedded images, for AS-ViT's thresholds and int8 scales, and to time one by one."""

Run = Callable[[Tensor], Any]


def embedded_images() -> Tensor:
    config = digits_data_config(224)
    loader = eval_loader("digits/test", config, 8, 0, CALIBRATION, labelled=False)
    return torch.cat([images for images, _ in loader])


def candidates(images: Tensor) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    dense = timm.create_model(MODEL).eval()
    with torch.no_grad():
        for block in dense.blocks:
            block.attn.qkv.weight.mul_(SHARPNESS)
    fixed = vitrim.sparsify(dense, vitrim.DynamicViTConfig(keep_ratio=0.7))
    adaptive = vitrim.sparsify(dense, vitrim.ASViTConfig())
    vitrim.calibrate(adaptive, [images], fixed.macs() / fixed.dense_macs())
    return {"dense": dense, "dynamicvit r=0.7": fixed, "asvit": adaptive}


def exported(name: str, model: nn.Module, runtime: str, dtype: str, batch: int, **how: Any) -> Path:
    """The bundle of a model, made once. OpenVINO is fastest with all sizes known."""
    size = batch if runtime == "openvino" and not images_decide(model) else None
    parts = [name.replace(" ", "-"), runtime, dtype, "any" if size is None else str(size)]
    target = FOLDER / "-".join(parts)
    if not target.is_dir():
        export(model, target, FORMATS[runtime], dtype=dtype, batch=size, **how)
    return target


def runner(name: str, model: nn.Module, runtime: str, dtype: str, batch: int, **how: Any) -> Run:
    """What runs a batch of images."""
    if runtime in FORMATS:
        bundle = Bundle(exported(name, model, runtime, dtype, batch, **how), how_many())
        return lambda images: bundle(images.numpy())
    model = copy.deepcopy(model).to(TORCH_DTYPES[dtype])
    return torch.compile(model) if runtime == "torch-compile" else model


def how_many() -> int:
    return torch.get_num_threads()


def measure(
    models: dict[str, nn.Module], runtime: str, dtype: str, batch: int, images: Tensor, rounds: int
) -> Iterator[dict[str, Any]]:
    """Rows of the candidates at one runtime, precision and batch."""
    timed = images[:TIMED] if batch == 1 else images[:batch]
    macs = {name: macs_per_image(model, timed) for name, model in models.items()}
    how = {"data_config": describe_data(models["dense"]), "images": images}
    torch.compiler.reset()
    runners = {
        name: runner(name, model, runtime, dtype, batch, **how) for name, model in models.items()
    }
    kind = TORCH_DTYPES[dtype] if runtime.startswith("torch") else torch.float32
    with torch.inference_mode():
        batches = list(torch.split(timed.to(kind), batch))
        timing = take_turns(runners, batches, rounds, 0.3, math.inf, time.perf_counter)
    for name, own in timing.items():
        speedup = own.speedup(timing["dense"])
        yield {
            "runtime": runtime,
            "dtype": dtype,
            "batch": batch,
            "name": name,
            "macs": macs[name],
            "rounds": len(own.seconds),
            "seconds": asdict(Quartiles.of(own.seconds)),
            "speedup": asdict(speedup),
            "efficiency": asdict(speedup / (macs["dense"] / macs[name])),
            "hardware": hardware(torch.device("cpu")),
        }


def page(rows: list[dict[str, Any]]) -> str:
    """The table, between marks: what stands around it is written by hand."""
    lines = [
        "| runtime | precision | batch | model | GMACs | ms per call | speed-up | efficiency |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds, speedup = row["seconds"], row["speedup"]
        cells = [
            *(row["runtime"], row["dtype"], row["batch"], row["name"], f"{row['macs'] / 1e9:.3f}"),
            f"{1e3 * seconds['median']:.2f} [{1e3 * seconds['low']:.2f}, "
            f"{1e3 * seconds['high']:.2f}]",
            f"{speedup['median']:.2f} [{speedup['low']:.2f}, {speedup['high']:.2f}]",
            f"{row['efficiency']['median']:.3f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    path, begin, end = RESULTS.with_suffix(".md"), "<!-- table -->", "<!-- end of table -->"
    before, _, rest = path.read_text().partition(begin)
    after = rest.partition(end)[2]
    table = "\n".join(lines)
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def line(row: dict[str, Any]) -> str:
    seconds, speedup = row["seconds"], row["speedup"]
    return (
        f"{row['runtime']:13s} {row['dtype']:4s} batch {row['batch']:2d} {row['name']:16s} "
        f"{seconds['median'] * 1e3:8.2f} ms [{seconds['low'] * 1e3:.2f}, "
        f"{seconds['high'] * 1e3:.2f}]  speed-up {speedup['median']:.3f} [{speedup['low']:.3f}, "
        f"{speedup['high']:.3f}]  efficiency {row['efficiency']['median']:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--again", action="store_true", help="Measure what is there already.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.output.exists():
        rows = json.loads(options.output.read_text())["rows"]
    asked = [
        (runtime, dtype, batch)
        for runtime in options.only
        for dtype in DTYPES[runtime]
        if dtype in options.dtypes
        for batch in options.batches
    ]
    known = {(row["runtime"], row["dtype"], row["batch"]) for row in rows}
    todo = asked if options.again else [part for part in asked if part not in known]
    with limited_threads(options.threads):
        images = embedded_images()
        models = candidates(images)
        for part in todo:
            runtime, dtype, batch = part
            # Images of unequal counts are one call each in a graph without padding.
            chosen = {n: m for n, m in models.items() if batch == 1 or not images_decide(m)}
            found = list(measure(chosen, runtime, dtype, batch, images, options.rounds))
            rows = [r for r in rows if (r["runtime"], r["dtype"], r["batch"]) != part] + found
            content = {
                "command": " ".join(["python benchmarks/export.py", *sys.argv[1:]]),
                "model": MODEL,
                "rows": rows,
            }
            options.output.parent.mkdir(exist_ok=True)
            write_atomic(options.output, (json.dumps(content, indent=1) + "\n").encode())
            for row in found:
                print(line(row), flush=True)
    order = {runtime: place for place, runtime in enumerate(DTYPES)}
    rows.sort(key=lambda row: (order[row["runtime"]], row["dtype"], row["batch"]))
    if options.output == RESULTS:
        write_atomic(RESULTS.with_suffix(".md"), page(rows).encode())


if __name__ == "__main__":
    main()
