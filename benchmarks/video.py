"""Moving digits: a dense Video Swin, STViT on it, and a ViT that sees single frames.

``python benchmarks/video.py train`` trains the three by their recipes (``digits-video-swin``,
``digits-stvit_video``, ``digits-video-framewise``) and evaluates them on unseen clips; a finished
part is not repeated. ``python benchmarks/video.py speed`` times them; the machine should do nothing
else then. Both write ``results/video.json`` and ``results/video.md``.
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

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "video.json"
PAGE = RESULTS.with_suffix(".md")
CLIPS = 2000
DENSE, SPARSE, FRAMES = "digits-video-swin", "digits-stvit_video", "digits-video-framewise"
START, END = "<!-- table -->\n", "<!-- end of table -->"


def vitrim(*arguments: Any) -> None:
    words = [str(argument) for argument in arguments]
    print("vitrim", *words, flush=True)
    subprocess.run([sys.executable, "-m", "vitrim", *words], check=True)


def train(runs: Path, changes: list[str]) -> None:
    """Each model by its recipe, then both of clips on the same unseen clips, and the frames'."""
    weights = runs / DENSE / "backbone.safetensors"
    vitrim("train", DENSE, "-o", runs / DENSE)  # a finished run is left as it is
    options = [word for change in changes for word in ("--set", change)]
    vitrim("train", SPARSE, "-o", runs / SPARSE, "--set", f"model.weights={weights}", *options)
    vitrim("train", FRAMES, "-o", runs / FRAMES)
    data = ("--data", "moving-digits", "--limit", CLIPS, "--batch", 16)
    report = runs / SPARSE / "evaluation.json"
    if not report.exists():
        vitrim("eval", runs / SPARSE / "checkpoint", *data, "--weights", weights, "--json", report)
    report = runs / FRAMES / "evaluation.json"
    if not report.exists():
        report.write_text(json.dumps(evaluate_frames(runs / FRAMES), indent=1))


def frames_model(folder: Path) -> Any:
    """The trained image model on 16 frames of a clip."""
    from vitrim.checkpoint import load_strict, read_weights
    from vitrim.tasks.video import FrameWise
    from vitrim.train.backbone import create_dense
    from vitrim.train.recipe import load_recipe

    model = create_dense(load_recipe(FRAMES).model, 0)
    weights = folder / "backbone.safetensors"
    load_strict(model, read_weights(weights), str(weights))
    return FrameWise(model.eval(), 16)


def evaluate_frames(folder: Path) -> dict[str, Any]:
    """Top-1 by the mean over all 16 frames of each of the same clips; of the digit alone too."""
    import torch

    from vitrim.model import evaluating
    from vitrim.tasks.clips import held_out_reader, open_clips
    from vitrim.tasks.sampling import Sampling
    from vitrim.tools.evaluate import dense_macs
    from vitrim.train.data import EvalLoader, digits_data_config

    model = frames_model(folder)
    reader = held_out_reader(digits_data_config(64), Sampling(16, 1))
    clips = open_clips("moving-digits/test", reader)
    right = digit = seen = 0
    with evaluating(model):
        for views, labels in EvalLoader(clips, 16, limit=CLIPS):
            answers = model(views[:, 0]).argmax(-1)
            right += int((answers == labels).sum())
            digit += int((answers // 4 == labels // 4).sum())
            seen += len(labels)
    macs = dense_macs(model, torch.zeros(1, 3, 16, 64, 64))
    return {"clips": seen, "top1": 100 * right / seen, "digit": 100 * digit / seen, "macs": macs}


def speed(runs: Path) -> None:
    """Clips per second of the three, in interleaved rounds on one thread."""
    from vitrim.model import from_pretrained
    from vitrim.tools.benchmark import benchmark

    sparse = from_pretrained(runs / SPARSE / "checkpoint")
    models = {
        "dense": sparse.backbone,
        "stvit_video": sparse,
        "frame-wise": frames_model(runs / FRAMES),
    }
    rows = benchmark(
        models, (3, 16, 64, 64), batches=(1, 16), dtypes=("fp32",), rounds=9, threads=1
    )
    content = {"rows": [row.to_dict() for row in rows]}  # which say on what machine
    (runs / "speed.json").write_text(json.dumps(content, indent=1))


def write(runs: Path) -> None:
    """What there is so far."""
    found = json.loads((runs / SPARSE / "evaluation.json").read_text())["results"][0]
    frames = json.loads((runs / FRAMES / "evaluation.json").read_text())
    timed = runs / "speed.json"
    content = {
        "command": "python benchmarks/video.py train; python benchmarks/video.py speed",
        "date": time.strftime("%Y-%m-%d"),
        "clips": CLIPS,
        "evaluation": found,
        "frame-wise": frames,
        "speed": json.loads(timed.read_text()) if timed.exists() else None,
        "seconds": {name: seconds(runs / name) for name in (DENSE, SPARSE, FRAMES)},
    }
    write_atomic(RESULTS, (json.dumps(content, indent=1) + "\n").encode())
    text = PAGE.read_text()
    before, after = text.split(START)[0], text.split(END)[1]
    lines = "\n".join(table(content))
    write_atomic(PAGE, (before + START + "\n" + lines + "\n\n" + END + after).encode())


def seconds(folder: Path) -> int:
    log = (folder / "log.jsonl").read_text().splitlines()
    return round(json.loads(log[-1])["time"])


def table(content: dict[str, Any]) -> list[str]:
    found, frames, timed = content["evaluation"], content["frame-wise"], content["speed"]
    pair, dense = found["paired"], found["dense_macs"]
    rows = {
        "dense": (found["dense"]["top1"], "", dense),
        "stvit_video": (
            found["sparse"]["top1"],
            f"{pair['difference']:+.2f} ({pair['low']:+.2f} to {pair['high']:+.2f})",
            found["macs"]["mean"],
        ),
        "frame-wise": (
            frames["top1"],
            f"{frames['top1'] - found['dense']['top1']:+.2f}",
            frames["macs"],
        ),
    }
    lines = [
        "| model | top-1 | difference from dense (95 %) | MMACs per clip | share | clips/s, one at "
        "a time | clips/s, 16 at a time |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (top1, difference, macs) in rows.items():
        rates = [row for row in (timed or {"rows": []})["rows"] if row["name"] == name]
        shown = [f"{row['images_per_second']:.1f}" for row in rates] or ["", ""]
        lines.append(
            f"| {name} | {top1:.2f} | {difference} | {macs / 1e6:.1f} | {macs / dense:.2f} | "
            f"{' | '.join(shown)} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "speed", "table"))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "video")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.what == "train":
        train(options.runs, options.changes)
    if options.what == "speed":
        speed(options.runs)
    write(options.runs)


if __name__ == "__main__":
    main()
