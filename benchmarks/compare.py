"""Every method at equal MACs beside dense timm, in every runtime: accuracy against latency.

``python benchmarks/compare.py`` compares checkpoints that exist: those that
``benchmarks/real_weights.py ASSETS`` adapted (DeiT-Tiny), where they and real images are there;
else those of ``vitrim demo -o DIR`` (``--demo DIR``, embedded images), after running it if needed.
Batches 1 and 16; torch eager, torch.compile, onnxruntime and OpenVINO; single precision. Candidates
take turns in rotating order. Writes ``results/compare.json``, ``.md`` and ``.svg``. The machine
should do nothing else: about ten minutes on two cores, most of it compilation.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import profiles
import torch
from torch import Tensor, nn

from vitrim import from_pretrained
from vitrim.checkpoint import write_atomic
from vitrim.cli.common import data_config_of
from vitrim.cli.images import prepared_images
from vitrim.demo.outcome import BUDGETS
from vitrim.demo.run import run_demo
from vitrim.export.bundle import FILES, export
from vitrim.methods import METHODS
from vitrim.model import SparseModel
from vitrim.runtime import Bundle
from vitrim.tools.benchmark import Quartiles, limited_threads, macs_per_image, take_turns
from vitrim.tools.hardware import hardware

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
IMAGES = ROOT.parent / "shared" / "assets" / "imagenet-val-1300"
"""Real images, which lie beside the checkout on some machines only."""
REAL = ROOT / "runs" / "real_weights" / "deit_tiny_patch16_224"
REAL_BUDGET = 0.65
RUNTIMES = ("torch", "torch-compile", "onnxruntime", "openvino")
FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}
BATCHES = (1, 16)
ENOUGH = 0.9
"""Rows whose efficiency is below are profiled."""

Run = Callable[[Tensor], Any]


@dataclass
class Candidate:
    """A model that is compared."""

    name: str
    model: nn.Module
    top1: float
    networks: dict[str, Path] = field(default_factory=dict)
    """Exported, by runtime."""

    @property
    def one_by_one(self) -> bool:
        """Whether its counts depend on the image, so that it is exported for one at a time."""
        return isinstance(self.model, SparseModel) and self.model.macs() is None


def real_candidates(data: Path) -> Iterator[Candidate]:
    """DeiT-Tiny and each adapted method at one budget."""
    dense = None
    for method in ("dynamicvit", "spvit", "asvit", "sait", "stvit"):
        name = f"{method}-adapt" + (f"-{REAL_BUDGET}" if method == "stvit" else "")
        results = json.loads((REAL / f"{name}.json").read_text())["results"]
        result = next(r for r in results if r.get("budget", REAL_BUDGET) == REAL_BUDGET)
        sparse = from_pretrained(REAL / name / "checkpoint")
        if "value" in result:
            sparse.method.turn(result["value"])
        if dense is None:
            dense = sparse.backbone
            yield Candidate("dense", dense, result["dense"]["top1"])
        yield Candidate(method, sparse, result["sparse"]["top1"])


def demo_candidates(demo: Path) -> Iterator[Candidate]:
    """The embedded set's model and each method of a demo's folder at its first budget."""
    points = json.loads((demo / "results.json").read_text())["points"]
    main = {point["method"]: point for point in points if point["is_main"]}
    dense = None
    for method, point in main.items():
        sparse = from_pretrained(demo / "checkpoints" / method)
        if dense is None:
            dense = sparse.backbone
            yield Candidate("dense", dense, point["dense"]["top1"])
        yield Candidate(method, sparse, point["sparse"]["top1"])


def exported(candidate: Candidate, runtime: str, folder: Path, data_config: Any) -> Path:
    """The candidate's network for ``runtime``, written once."""
    if runtime not in candidate.networks:
        target = folder / f"{candidate.name}-{runtime}"
        export(candidate.model, target, FORMATS[runtime], data_config=data_config)
        candidate.networks[runtime] = target
    return candidate.networks[runtime]


def runner(candidate: Candidate, runtime: str, threads: int) -> Run:
    """What runs a batch of images."""
    if runtime == "torch":
        return candidate.model
    if runtime == "torch-compile":
        return torch.compile(candidate.model)  # type: ignore[no-any-return]
    bundle = Bundle(candidate.networks[runtime], threads)
    return lambda images: bundle(images.numpy())


def profile(candidate: Candidate, runtime: str, run: Run, images: Tensor, threads: int) -> Any:
    """Where the time goes; see :mod:`profiles`."""
    if runtime.startswith("torch"):
        return profiles.of_torch(run, images)
    network = candidate.networks[runtime] / FILES[FORMATS[runtime]]
    reader = profiles.of_onnxruntime if runtime == "onnxruntime" else profiles.of_openvino
    return reader(network, images, threads)


def compare(
    candidates: list[Candidate], images: Tensor, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per runtime, batch and candidate."""
    rows: list[dict[str, Any]] = []
    data_config = data_config_of(candidates[1].model)
    with tempfile.TemporaryDirectory() as name, limited_threads(options.threads):
        for runtime in options.runtimes:
            for batch in BATCHES:
                able = candidates
                if runtime in FORMATS:
                    able = [each for each in candidates if batch == 1 or not each.one_by_one]
                    for each in able:
                        exported(each, runtime, Path(name), data_config)
                rows += _rows(able, runtime, batch, images, options)
    return rows


def _rows(
    candidates: list[Candidate],
    runtime: str,
    batch: int,
    images: Tensor,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    print(f"measuring {runtime}, batch {batch} ...", flush=True)
    batches = list(torch.split(images, batch))[:16]
    torch.compiler.reset()
    with torch.inference_mode():
        runners = {each.name: runner(each, runtime, options.threads) for each in candidates}
        timing = take_turns(
            runners, batches, options.rounds, options.seconds, options.limit, time.perf_counter
        )
        macs = {
            each.name: sum(macs_per_image(each.model, part) for part in batches) / len(batches)
            for each in candidates
        }
    rows, dense = [], candidates[0]
    for each in candidates:
        own = timing[each.name]
        speedup, seconds = own.speedup(timing["dense"]), Quartiles.of(own.seconds)
        share = macs[each.name] / macs["dense"]
        row: dict[str, Any] = {
            "method": each.name,
            "runtime": runtime,
            "batch": batch,
            "top1": each.top1,
            "macs": macs[each.name],
            "rounds": len(own.seconds),
            "milliseconds": vars(seconds / 1e-3),
            "images_per_second": batch / seconds.median,
            "speedup": vars(speedup),
            "efficiency": vars(speedup / (1 / share)),
        }
        if row["efficiency"]["median"] < ENOUGH:
            both = [
                profile(one, runtime, runners[one.name], batches[0], options.threads)
                for one in (dense, each)
            ]
            row["profile"] = {"dense": both[0], "sparse": both[1]}
            row["excess_ms"] = profiles.excess(both[0], both[1], share)
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    speedup, efficiency, ms = row["speedup"], row["efficiency"], row["milliseconds"]
    rest = ""
    if "excess_ms" in row:
        worst = [(kind, ms) for kind, ms in row["excess_ms"].items() if ms > 0][:3]
        rest = ", ".join(f"{kind} {ms:.2f} ms" for kind, ms in worst)
    return (
        f"| {row['runtime']} | {row['batch']} | {row['method']} | {row['top1']:.2f} | "
        f"{row['macs'] / 1e9:.3f} | {ms['median']:.2f} [{ms['low']:.2f}, {ms['high']:.2f}] | "
        f"{row['images_per_second']:.0f} | {speedup['median']:.2f} [{speedup['low']:.2f}, "
        f"{speedup['high']:.2f}] | {efficiency['median']:.2f} | {rest} |"
    )


def page(content: dict[str, Any]) -> str:
    """The table, in words that say how it was made."""
    stamp = content["hardware"]
    return "\n".join(
        [
            "# Every method at equal MACs, in every runtime",
            "",
            f"Made by `make bench`, here as `{content['command']}`, single precision, "
            f"{stamp['threads']} threads, {stamp['cpu']}, {content['date']}.",
            f"Accuracy: {content['data']}.",
            "",
            "Medians and quartiles over interleaved rounds. Efficiency is the speed-up over the "
            "one that the MACs promise. Under 0.9 a profile says which kinds of work take more "
            "than their share (milliseconds per call beyond MACs ratio x dense; the profiler slows "
            "what it watches). A model whose counts depend on the image is exported for one image "
            "a time, so it has no row at batch 16 there.",
            "",
            "![accuracy against latency](compare.svg)",
            "",
            "| runtime | batch | method | top-1 | GMACs | ms | images/s | speed-up | efficiency | "
            "beyond its share |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *map(_line, content["rows"]),
            "",
        ]
    )


def draw(content: dict[str, Any], path: Path) -> None:
    """Accuracy against latency, a panel per batch size and runtime."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = content["rows"]
    runtimes = [name for name in RUNTIMES if any(row["runtime"] == name for row in rows)]
    figure, panels = plt.subplots(
        *(len(BATCHES), len(runtimes)),
        **{"figsize": (3.2 * len(runtimes), 6.4), "layout": "constrained"},
        sharey=True,
        squeeze=False,
    )
    colours = {name: f"C{number}" for number, name in enumerate(["dense", *METHODS])}
    for panel_row, batch in zip(panels, BATCHES, strict=True):
        for panel, runtime in zip(panel_row, runtimes, strict=True):
            for row in rows:
                if (row["batch"], row["runtime"]) == (batch, runtime):
                    ms = row["milliseconds"]
                    error = [[ms["median"] - ms["low"]], [ms["high"] - ms["median"]]]
                    panel.errorbar(
                        *(ms["median"], row["top1"]),
                        xerr=error,
                        fmt="*" if row["method"] == "dense" else "o",
                        color=colours[row["method"]],
                        label=row["method"],
                    )
            panel.set(title=f"{runtime}, batch {batch}", xlabel="ms per batch")
            panel.set_xlim(left=0)
            panel.grid(alpha=0.3)
        panel_row[0].set_ylabel("top-1 (%)")
    panels[0][0].legend(fontsize=8, loc="lower left")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=IMAGES, help="For the real weights.")
    parser.add_argument("--demo", type=Path, help="Folder of vitrim demo -o, instead.")
    parser.add_argument("--runtimes", nargs="*", default=RUNTIMES, choices=RUNTIMES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.3, help="Length of a turn.")
    parser.add_argument("--limit", type=float, default=45.0, help="Seconds per batch and runtime.")
    options = parser.parse_args()
    if options.demo is None and options.images.is_dir() and REAL.is_dir():
        candidates = list(real_candidates(options.images))
        source = str(options.images)
        data = f"DeiT-Tiny at {REAL_BUDGET} of its MACs, 1,300 ILSVRC2012 validation images"
    else:
        demo = options.demo or ROOT / "runs" / "demo"
        if not (demo / "results.json").exists():
            print("\n".join(run_demo(demo, threads=options.threads)))
        candidates, source = list(demo_candidates(demo)), "digits"
        data = f"the embedded set's ViT at {BUDGETS[0]} of its MACs, 2,000 test images"
    for candidate in candidates:
        candidate.model.eval()
    images = prepared_images(candidates[1].model, source, 4 * max(BATCHES), max(BATCHES))
    content = {
        "command": " ".join(["python benchmarks/compare.py", *sys.argv[1:]]),
        "data": data,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(torch.device("cpu")) | {"threads": options.threads},
        "rows": compare(candidates, images, options),
    }
    write_atomic(RESULTS / "compare.json", (json.dumps(content, indent=1) + "\n").encode())
    write_atomic(RESULTS / "compare.md", page(content).encode())
    draw(content, RESULTS / "compare.svg")


if __name__ == "__main__":
    main()
