"""Accuracy against measured speed: merging, ToMe and the methods that drop, at every budget.

``python benchmarks/frontier.py`` takes the accuracies of ``results/real_weights.json`` (DeiT-Tiny;
make that first), builds each model of fixed counts anew at the setting that was measured there, as
speed does not depend on weights, and times all of them beside the dense one, in turns within one
process: torch and onnxruntime, single precision. Writes ``results/frontier.json`` and ``.png``. The
machine should do nothing else: about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vitrim
from vitrim.checkpoint import write_atomic
from vitrim.export.bundle import export
from vitrim.runtime import Bundle
from vitrim.tools.benchmark import Quartiles, limited_threads, take_turns
from vitrim.tools.hardware import hardware

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
MODEL = "deit_tiny_patch16_224"
BUDGETS = (0.8, 0.65, 0.5)
ROWS = {
    "merging": "merging training-free",
    "merging, adapted": "merging adapted",
    "ToMe": "tome (preset)",
    "dynamicvit, adapted": "dynamicvit adapted",
    "spvit, adapted": "spvit adapted",
    "stvit, adapted": "stvit adapted",
}
"""What is compared, and its rows in ``real_weights.json``; methods whose counts depend on the image
have their speeds there."""
STYLES: dict[str, dict[str, Any]] = {
    "merging": {"color": "black", "linewidth": 2.5},
    "merging, adapted": {"color": "black", "linewidth": 2.5, "linestyle": ":"},
    "ToMe": {"color": "tab:red", "linestyle": "--"},
}


def config_of(name: str, budget: float) -> Any:
    """The config that ``real_weights.py`` measured."""
    if name.startswith("merging"):
        return vitrim.MergingConfig()
    if name == "ToMe":
        return vitrim.MergingConfig.tome()
    if name.startswith("dynamicvit"):
        return vitrim.DynamicViTConfig()
    if name.startswith("spvit"):
        return vitrim.SPViTConfig(inference="top_k")
    layers, tokens = {0.8: (8, 64), 0.65: (6, 49), 0.5: (4, (6, 7))}[budget]
    return vitrim.STViTConfig(
        base_layers=layers,
        semantic_tokens=tokens,
        keep_prefix=True,
        global_centres=False,
        pooling="avg",
    )


def models() -> tuple[dict[str, nn.Module], list[dict[str, Any]]]:
    """The models by label, and what is known of each."""
    found = json.loads((RESULTS / "real_weights.json").read_text())["models"][MODEL]
    torch.manual_seed(0)
    dense = timm.create_model(MODEL).eval()
    result = found["dense"]["results"][0]
    made: dict[str, nn.Module] = {"dense": dense}
    known = [{"name": "dense", "budget": 1.0, "top1": result["dense"]["top1"]}]
    for name, row in ROWS.items():
        for budget in BUDGETS:
            rows = [r for r in found[row]["results"] if r["budget"] == budget]
            if not rows:
                continue
            label = f"{name} {budget}"
            sparse = vitrim.sparsify(dense, config_of(name, budget))
            if sparse.method.dial() is not None and not name.startswith("stvit"):
                sparse.set_budget(budget)
            twin = f"merging {budget}"
            made[label] = made[twin] if name.startswith("merging,") else sparse.eval()
            macs = sparse.macs()
            assert macs is not None
            known.append(
                {
                    "name": name,
                    "budget": budget,
                    "top1": rows[0]["sparse"]["top1"],
                    "difference": rows[0]["paired"]["difference"],
                    "share": macs / sparse.dense_macs(),
                }
            )
    return made, known


def runners(made: dict[str, nn.Module], runtime: str, threads: int, folder: Path) -> dict[str, Any]:
    """What runs a batch, by label; models that are one are run once."""
    found: dict[str, Callable[[Tensor], Any]] = {}
    data_config = timm.data.resolve_model_data_config(made["dense"])
    for label, model in made.items():
        if label.startswith("merging,"):
            continue
        if runtime == "torch":
            found[label] = model
            continue
        target = folder / label.replace(" ", "-").replace(",", "")
        if not target.exists():
            print(f"exporting {label} ...", flush=True)
            export(model, target, "onnx", data_config=data_config)
        bundle = Bundle(target, threads)
        found[label] = lambda images, bundle=bundle: bundle(images.numpy())
    return found


def measure(runtime: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    made, known = models()
    images, rows = [torch.randn(options.batch, 3, 224, 224) for _ in range(2)], []
    able = runners(made, runtime, options.threads, options.bundles)
    print(f"measuring {runtime} ...", flush=True)
    with torch.inference_mode(), limited_threads(options.threads):
        turns = (options.rounds, options.seconds, 600.0, time.perf_counter)
        timing = take_turns(able, images, *turns)
    for row in known:
        label = "dense" if row["name"] == "dense" else f"{row['name']} {row['budget']}"
        label = label.replace("merging, adapted", "merging")
        seconds = Quartiles.of(timing[label].seconds)
        measured = {
            "runtime": runtime,
            "batch": options.batch,
            "milliseconds": vars(seconds / 1e-3),
            "images_per_second": options.batch / seconds.median,
            "speedup": vars(timing[label].speedup(timing["dense"])),
        }
        rows.append(row | measured)
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    speed = row["speedup"]
    return (
        f"{row['runtime']:12s} {row['name']:20s} {row['budget']:4} top-1 {row['top1']:.2f} "
        f"{row['milliseconds']['median']:8.2f} ms {row['images_per_second']:7.1f} images/s "
        f"{speed['median']:.3f} [{speed['low']:.3f}, {speed['high']:.3f}]"
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against images per second, a panel for each runtime."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    figure, panels = plt.subplots(
        1, len(runtimes), figsize=(5.2 * len(runtimes), 4.4), layout="constrained", sharey=True
    )
    for panel, runtime in zip(panels if len(runtimes) > 1 else [panels], runtimes, strict=True):
        mine = [row for row in rows if row["runtime"] == runtime]
        start = next(row for row in mine if row["name"] == "dense")
        panel.plot(start["images_per_second"], start["top1"], "k*", markersize=12, label="dense")
        for name in ROWS:
            own = [row for row in mine if row["name"] == name]
            points = [(row["images_per_second"], row["top1"]) for row in own]
            style = {"marker": "o"} | STYLES.get(name, {"alpha": 0.8})
            panel.plot(*zip(*points, strict=True), label=name, **style)
        panel.set(title=f"{runtime}, batch {start['batch']}, fp32", xlabel="images per second")
        panel.grid(alpha=0.3)
    first = panels[0] if len(runtimes) > 1 else panels
    first.set(ylabel="top-1 on 1,300 validation images (%)")
    first.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtimes", default="torch,onnxruntime")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--bundles", type=Path, default=ROOT / "runs" / "frontier")
    options = parser.parse_args()
    path = RESULTS / "frontier.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for runtime in filter(None, options.runtimes.split(",")):  # none: only draw
        rows = [row for row in rows if row["runtime"] != runtime] + measure(runtime, options)
        content = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware(torch.device("cpu")),
            "rows": rows,
        }
        write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    draw(rows, RESULTS / "frontier.png")


if __name__ == "__main__":
    main()
