"""Detection and segmentation with dense and sparse backbones: AP and mIoU, MACs, milliseconds.

``python benchmarks/dense.py train`` writes the embedded scenes, trains a Mask R-CNN and an UperNet
on a small dense Swin and ConvNeXt (recipes ``scenes-HEAD-FAMILY``), goes on from each with every
method (``scenes-HEAD-METHOD-FAMILY``) and, for as many steps, without one, and measures them all on
unseen scenes (``evaluate`` does that alone): about two hours on one core, and a finished part is
not repeated. ``... speed`` times them on those scenes, and the papers' backbones on 800 x 1280
pixels (``... published``: these alone); the machine should do nothing else then. Each part writes
``results/dense.json`` and the tables of ``dense.md``.

Sparse is compared with the dense model that was trained for as long, on the same images; intervals
are over images drawn anew.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vitrim
from vitrim.checkpoint import write_atomic
from vitrim.features import FeaturesOnly, TimmPyramid
from vitrim.tasks import from_pretrained
from vitrim.tasks.evaluation import DENSE
from vitrim.tasks.scenes import write_scenes
from vitrim.tools.benchmark import Row, benchmark
from vitrim.tools.hardware import hardware
from vitrim.train.recipe import list_recipes, load_recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "dense.json"
PAGE = RESULTS.with_suffix(".md")
START, END = "<!-- {} -->\n", "<!-- end of {} -->"
HEADS = {"mask_rcnn": ("box AP", "mask AP"), "upernet": ("mIoU",)}
"""The scores of each head that are compared."""
FAMILIES = ("swin", "convnext")
METHODS = ("dynamic_spatial", "spvit_pyramid", "stvit_r")
SCENES = 200
"""Unseen ones that are measured on."""
BEFORE = "dense, before"
"""The dense model that the others went on from."""
TIMED_BATCHES, TIMED_SCENES = (1, 8), 64
PUBLISHED = {
    "Swin-S, STViT-R": ("swin_small_patch4_window7_224", vitrim.STViTRConfig(form="dense")),
    "Swin-T, dynamic spatial": (
        "swin_tiny_patch4_window7_224",
        vitrim.DynamicSpatialConfig(keep_ratio=0.7),
    ),
    "ConvNeXt-T, dynamic spatial": ("convnext_tiny", vitrim.DynamicSpatialConfig(keep_ratio=0.7)),
}
"""Backbone and method, timed with random weights."""
PUBLISHED_SIZE = (800, 1280)


class Case:
    """A head on a family: one dense model, and what was made of it."""

    def __init__(self, runs: Path, head: str, family: str) -> None:
        self.runs, self.head, self.family = runs, head, family
        self.name = f"{head}-{family}"
        known = list_recipes()
        self.recipes = {
            method: name
            for method in METHODS
            if (name := f"scenes-{head}-{method}-{family}") in known
        }

    def train(self) -> None:
        """All of its models; those that are there are left as they are."""
        for words in self.commands().values():
            run_vitrim("train", *words)

    def commands(self) -> dict[str, list[str]]:
        """The words after ``vitrim train`` by the model's name, the first to be run first."""
        start = f"model.checkpoint={self.folder(BEFORE)}"
        found = {BEFORE: [f"scenes-{self.name}"]}
        if self.head == "upernet":
            detector = Case(self.runs, "mask_rcnn", self.family).folder(BEFORE)
            found[BEFORE] += ["--set", f"model.weights={detector}"]
        found |= {method: [recipe, "--set", start] for method, recipe in self.recipes.items()}
        found[DENSE] = [f"scenes-{self.name}", *self._as_long(), "--set", start]
        return {
            name: [*words, "-o", str(self.folder(name).parent)] for name, words in found.items()
        }

    def _as_long(self) -> Iterator[str]:
        """Changes to the dense recipe after which it trains as the sparse ones do."""
        sparse = load_recipe(next(iter(self.recipes.values())))
        values = {
            "run.epochs": sparse.run.epochs,
            "optim.lr": sparse.optim.lr,
            "optim.backbone_lr_scale": sparse.optim.backbone_lr_scale,
            "model.init": "timm",
        }
        for key, value in values.items():
            yield from ("--set", f"{key}={value}")

    def folder(self, name: str) -> Path:
        """The checkpoint of a model."""
        own = {BEFORE: self.name, DENSE: f"{self.name}-longer"}.get(name, f"{self.name}-{name}")
        return self.runs / own / "checkpoint"

    def models(self) -> dict[str, Any]:
        """By name, the one that is compared with first."""
        names = [DENSE, BEFORE, *self.recipes]
        return {name: from_pretrained(self.folder(name)).eval() for name in names}

    def evaluate(self, scenes: Path) -> list[dict[str, Any]]:
        """A row per model."""
        models = self.models()
        found = (
            _detectors(models, scenes) if self.head == "mask_rcnn" else _segmenters(models, scenes)
        )
        rows = []
        for name, result in found.items():
            log = self.folder(name).parent / "log.jsonl"
            last = json.loads(log.read_text().splitlines()[-1])
            words = shlex.join(["vitrim", "train", *self.commands()[name]])
            rows.append(
                {
                    "head": self.head,
                    "family": self.family,
                    "model": name,
                    "command": words.replace(str(self.runs), "RUNS"),
                    "steps": last["step"],
                    "train_seconds": round(last["time"]),
                    **result.to_dict(),
                    "hardware": hardware(torch.device("cpu")),
                }
            )
        return rows

    def speed(self, images: Tensor) -> list[dict[str, Any]]:
        """Rows of the backbones, and of the whole models, each beside the dense one."""
        models = self.models()
        del models[BEFORE]
        mean, std = (
            torch.tensor(models[DENSE].data_config[key]).view(3, 1, 1) for key in ("mean", "std")
        )
        seen = (images - mean) / std
        whole = {name: _Whole(model) for name, model in models.items()}
        parts = {
            "backbone": (
                {name: backbone_alone(model.backbone) for name, model in models.items()},
                seen,
            ),
            "whole": (whole, images if self.head == "mask_rcnn" else seen),
        }
        found = []
        for part, (candidates, given) in parts.items():
            rows = timed(candidates, given)
            found += [{"head": self.head, "family": self.family, "part": part, **r} for r in rows]
        return found


class _Whole(nn.Module):
    """A detector or segmenter on a batch of images of one size."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model([*images] if self.model.task == "detection" else images)


def backbone_alone(backbone: nn.Module) -> nn.Module:
    """The pyramid, of a dense model by timm's own forward."""
    pyramid = FeaturesOnly(backbone)
    return pyramid if pyramid.is_sparse else TimmPyramid(pyramid)


def timed(
    candidates: dict[str, nn.Module], images: Tensor, rounds: int = 9
) -> list[dict[str, Any]]:
    """Rows of interleaved rounds on two threads, beside the first candidate."""
    shape = (images.shape[1], images.shape[2], images.shape[3])
    batches = [batch for batch in TIMED_BATCHES if batch <= len(images)]
    rows = benchmark(
        candidates,
        shape,
        batches=batches,
        dtypes=("fp32",),
        rounds=rounds,
        threads=2,
        images=images,
    )
    for row in rows:
        print(shown(row), flush=True)
    return [row.to_dict() for row in rows]


def shown(row: Row) -> str:
    time, ratio = row.seconds, row.speedup
    return (
        f"batch {row.batch} {row.name:28s} {row.macs / 1e9:8.3f} GMACs {1e3 * time.median:9.2f} ms "
        f"[{1e3 * time.low:.2f}, {1e3 * time.high:.2f}]  speed-up {ratio.median:.3f} "
        f"[{ratio.low:.3f}, {ratio.high:.3f}]"
    )


def time_published() -> list[dict[str, Any]]:
    """The papers' backbones at the size of detectors, with random weights, on one image."""
    found = []
    for name, (architecture, config) in PUBLISHED.items():
        torch.manual_seed(0)
        sizes = {} if "convnext" in architecture else {"img_size": PUBLISHED_SIZE}
        dense = timm.create_model(architecture, **sizes).eval()
        sparse = vitrim.sparsify(dense, config)
        candidates = {DENSE: backbone_alone(dense), "sparse": backbone_alone(sparse)}
        images = torch.randn(1, 3, *PUBLISHED_SIZE, generator=torch.Generator().manual_seed(0))
        found += [{"published": name, **row} for row in timed(candidates, images, 5)]
    return found


def _detectors(models: dict[str, Any], scenes: Path) -> Any:
    from vitrim.tasks.detection_data import DetectionLoader, open_coco
    from vitrim.tasks.detection_evaluation import evaluate_detectors

    folder = open_coco(str(scenes), None, classes=models[DENSE].classes, masks=True)
    return evaluate_detectors(models, DetectionLoader(folder, 8, 0), draws=300)


def _segmenters(models: dict[str, Any], scenes: Path) -> Any:
    from vitrim.tasks.segmentation_batches import SegmentationLoader, held_out_pairs
    from vitrim.tasks.segmentation_evaluation import evaluate_segmenters

    pairs = held_out_pairs(models[DENSE], str(scenes))
    return evaluate_segmenters(models, SegmentationLoader(pairs, 8, 0))


def test_scenes(runs: Path) -> Path:
    """The folder of unseen scenes, written if it is not there."""
    folder = runs / "scenes-test"
    return folder if folder.exists() else write_scenes(folder, SCENES, split="test")


def timed_images(runs: Path) -> Tensor:
    """The first of the unseen scenes, from 0 to 1."""
    from PIL import Image
    from torchvision.transforms.v2 import functional

    files = sorted((test_scenes(runs) / "images").iterdir())[:TIMED_SCENES]
    return torch.stack([functional.pil_to_tensor(Image.open(file)) for file in files]).float() / 255


def run_vitrim(*words: str) -> None:
    print("vitrim", *words, flush=True)
    subprocess.run([sys.executable, "-m", "vitrim", *words], check=True)


def write(content: dict[str, Any]) -> None:
    """The JSON, and the tables of the page between their marks."""
    write_atomic(RESULTS, (json.dumps(content, indent=1) + "\n").encode())
    text = PAGE.read_text()
    for name, lines in tables(content).items():
        start, end = START.format(name), END.format(name)
        before, after = text.split(start)[0], text.split(end)[1]
        text = before + start + "\n" + "\n".join(lines) + "\n\n" + end + after
    write_atomic(PAGE, text.encode())


def tables(content: dict[str, Any]) -> dict[str, list[str]]:
    """Lines of Markdown by the name of the table."""
    found = {head: _scores_table(content, head) for head in HEADS}
    return found | {
        "commands": _commands(content),
        "milliseconds": _speed_table(content),
        "published": _published_table(content),
    }


def _scores_table(content: dict[str, Any], head: str) -> list[str]:
    names = HEADS[head]
    columns = [column for name in names for column in (name, "from dense (95 %)")]
    lines = ["| backbone | model | " + " | ".join(columns) + " | MMACs | of dense | steps |"]
    lines.append("|---" * (len(columns) + 5) + "|")
    for row in content["scores"]:
        if row["head"] != head:
            continue
        cells = []
        for name in names:
            gap = row["differences"].get(name)
            cells.append(f"{row['scores'][name]:.1f}")
            cells.append("" if gap is None else f"{gap[0]:+.2f} ({gap[1]:+.2f} to {gap[2]:+.2f})")
        macs, dense = row["macs"]["mean"], row["dense_macs"]["mean"]
        lines.append(
            f"| {row['family']} | {row['model']} | {' | '.join(cells)} | {macs / 1e6:.1f} | "
            f"{macs / dense:.2f} | {row['steps']} |"
        )
    return lines


def _commands(content: dict[str, Any]) -> list[str]:
    rows = [(row["command"], row["train_seconds"]) for row in content["scores"]]
    return ["```sh", *(f"{words}  # {seconds} s" for words, seconds in rows), "```"]


def _speed_table(content: dict[str, Any]) -> list[str]:
    lines = [
        "| head | backbone | model | batch | backbone, ms per image | speed-up | promised | "
        "whole, ms per image | speed-up |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    speed = content.get("speed", [])
    whole = {_place(row): row for row in speed if row["part"] == "whole"}
    for row in speed:
        if row["part"] == "whole":
            continue
        other = whole[_place(row)]
        promised = row["speedup"]["median"] / row["efficiency"]["median"]
        lines.append(
            f"| {row['head']} | {row['family']} | {row['name']} | {row['batch']} | "
            f"{_per_image(row)} | {_quartiles(row['speedup'])} | {promised:.2f} | "
            f"{_per_image(other)} | {_quartiles(other['speedup'])} |"
        )
    return lines


def _published_table(content: dict[str, Any]) -> list[str]:
    lines = [
        "| backbone, method | GMACs dense | sparse | ms dense | sparse | speed-up | promised | "
        "saving met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = content.get("published", [])
    for dense, sparse in zip(rows[::2], rows[1::2], strict=True):
        ratio, macs = sparse["speedup"], sparse["macs"] / dense["macs"]
        lines.append(
            f"| {sparse['published']} | {dense['macs'] / 1e9:.1f} | {sparse['macs'] / 1e9:.1f} | "
            f"{_per_image(dense)} | {_per_image(sparse)} | {_quartiles(ratio)} | {1 / macs:.2f} | "
            f"{(1 - 1 / ratio['median']) / (1 - macs):.2f} |"
        )
    return lines


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["head"], row["family"], row["name"], row["batch"]


def _per_image(row: dict[str, Any]) -> str:
    return _quartiles({k: 1e3 * v / row["batch"] for k, v in row["seconds"].items()})


def _quartiles(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "evaluate", "speed", "published", "tables"))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "dense")
    parser.add_argument("--heads", nargs="*", default=list(HEADS))
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    options = parser.parse_args()
    content: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    content["command"] = "python benchmarks/dense.py train; python benchmarks/dense.py speed"
    cases = [Case(options.runs, h, f) for h in options.heads for f in options.families]
    for case in cases if options.what in ("train", "evaluate") else ():
        if options.what == "train":
            case.train()
        others = [
            row
            for row in content.get("scores", [])
            if (row["head"], row["family"]) != (case.head, case.family)
        ]
        content["scores"] = others + case.evaluate(test_scenes(options.runs))
        write(content)
    if options.what == "speed":
        images = timed_images(options.runs)
        content["speed"] = [row for case in cases for row in case.speed(images)]
        write(content)
    if options.what in ("speed", "published"):
        content["published"] = time_published()
    write(content)


if __name__ == "__main__":
    main()
