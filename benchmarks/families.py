"""Every method on every family that it serves, on the embedded images: accuracy, MACs, speed.

``python benchmarks/families.py train`` trains a small dense model of each family (recipe
``digits-FAMILY``) and makes it sparse with each method (``digits-METHOD-FAMILY``), then evaluates;
a finished part is not repeated. ``python benchmarks/families.py speed`` measures all of them; the
machine should do nothing else then. Both write ``results/families.json`` and ``families.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vitrim.checkpoint import write_atomic
from vitrim.methods import METHODS
from vitrim.train.recipe import list_recipes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "families.json"
PAGE = RESULTS.with_suffix(".md")
FAMILIES = ("lvvit", "pit", "swin", "convnext")
BATCH = 64
IMAGES = 2000
START, END = "<!-- table -->\n", "<!-- end of table -->"


def vitrim(*arguments: Any) -> None:
    words = [str(argument) for argument in arguments]
    print("vitrim", *words, flush=True)
    subprocess.run([sys.executable, "-m", "vitrim", *words], check=True)


def methods_on(family: str) -> list[str]:
    known = list_recipes()
    return [name for name in METHODS if f"digits-{name}-{family}" in known]


def train(runs: Path, family: str) -> None:
    """The dense model of ``family``, and each method on it, evaluated on unseen images."""
    dense = runs / f"digits-{family}"
    vitrim("train", f"digits-{family}", "-o", dense)  # a finished run is left as it is
    weights = dense / "backbone.safetensors"
    for method in methods_on(family):
        run = runs / f"digits-{method}-{family}"
        vitrim("train", run.name, "-o", run, "--set", f"model.weights={weights}")
        report = run / "evaluation.json"
        if not report.exists():
            vitrim(
                *("eval", run / "checkpoint", "--data", "digits", "--limit", IMAGES),
                *("--weights", weights, "--json", report),
            )


def measure(runs: Path, family: str) -> None:
    """Images per second of each method beside its dense model, in interleaved rounds."""
    for method in methods_on(family):
        run = runs / f"digits-{method}-{family}"
        vitrim(
            *("bench", run / "checkpoint", "--data", "digits", "--batch", BATCH),
            *("--dtype", "fp32", "--rounds", 7, "--json", run / "speed.json"),
        )


def rows(runs: Path) -> list[dict[str, Any]]:
    """What is there so far, a row per method and family."""
    found = []
    for family in FAMILIES:
        for method in methods_on(family):
            run = runs / f"digits-{method}-{family}"
            if not (run / "evaluation.json").exists():
                continue
            evaluation = json.loads((run / "evaluation.json").read_text())["results"][0]
            log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            speed = []
            if (run / "speed.json").exists():
                speed = json.loads((run / "speed.json").read_text())["rows"]
            found.append(
                {
                    "family": family,
                    "method": method,
                    "train_seconds": round(log[-1]["time"]),
                    "evaluation": evaluation,
                    "speed": speed,
                }
            )
    return found


def line(row: dict[str, Any]) -> str:
    found, pair = row["evaluation"], row["evaluation"]["paired"]
    share = found["macs"]["mean"] / found["dense_macs"]
    speed = ["", ""]
    if row["speed"]:
        dense, sparse = row["speed"]
        speed = [f"{each['images_per_second']:.0f}" for each in (dense, sparse)]
        speed[1] += f" ({sparse['speedup']['median']:.2f}x)"
    return (
        f"| {row['family']} | {row['method']} | {found['dense']['top1']:.2f} | "
        f"{found['sparse']['top1']:.2f} | {pair['difference']:+.2f} ({pair['low']:+.2f} to "
        f"{pair['high']:+.2f}) | {found['dense_macs'] / 1e6:.1f} | "
        f"{found['macs']['mean'] / 1e6:.1f} | {share:.3f} | {speed[0]} | {speed[1]} |"
    )


def write(runs: Path) -> None:
    found = rows(runs)
    content = {
        "command": "python benchmarks/families.py train; python benchmarks/families.py speed",
        "date": time.strftime("%Y-%m-%d"),
        "rows": found,
    }
    write_atomic(RESULTS, (json.dumps(content, indent=1) + "\n").encode())
    table = [
        "| family | method | dense top-1 | sparse top-1 | difference (95 %) | dense MMACs | "
        "sparse MMACs | share | dense images/s | sparse images/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(line, found),
    ]
    text = PAGE.read_text()
    before, after = text.split(START)[0], text.split(END)[1]
    write_atomic(PAGE, (before + START + "\n" + "\n".join(table) + "\n\n" + END + after).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "speed", "table"))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "families")
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    options = parser.parse_args()
    parts = {"train": train, "speed": measure}
    for family in options.families if options.what in parts else ():
        parts[options.what](options.runs, family)
    write(options.runs)


if __name__ == "__main__":
    main()
