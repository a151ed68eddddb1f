"""Real weights on real images: every method, training-free and adapted, at several budgets.

``python benchmarks/real_weights.py ASSETS`` where ASSETS holds ``weights/*.safetensors``,
``imagenet-val-1300`` (measured on, never trained or calibrated on) and ``imagenet-adapt-1000``
(adapted and calibrated on, without labels). Writes ``results/real_weights.json``. A run that exists
is not repeated, so parts can be done on their own (``--models``, ``--methods``) and one after the
other; each model and method takes up to twenty minutes on two otherwise idle cores. ``--speed``
times every row beside its dense model as well; the machine should do nothing else then.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn

from vitrim import from_pretrained
from vitrim.checkpoint import write_atomic
from vitrim.cli.images import prepared_images
from vitrim.model import SparseModel
from vitrim.tools.benchmark import Row, benchmark

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "real_weights.json"
CROP_PCT = {"deit_tiny_patch16_224": "0.875", "vit_tiny_patch16_224": "0.9"}
"""What the weights were published with; for DeiT timm's own entry says 0.9."""
METHODS = ("merging", "dynamicvit", "spvit", "asvit", "sait", "stvit")
BUDGETS = (0.65, 0.8, 0.5)
"""The first is what a calibrated model is adapted at."""
RATIOS = "0.8,0.7,0.6"
"""Of the paper's rule, for DynamicViT, besides the budgets."""
TRAINING_FREE: dict[str, dict[str, Any]] = {
    "merging": {},
    "asvit": {"value_weighting": "true"},
    "sait": {"score": "cls_value_norm"},
}
"""Fields other than the defaults; chosen on adaptation images."""
TOME = {
    "merged_per_block": 13,
    "metric": "mean_keys",
    "importance_power": 0,
    "weigh_by": "size",
    "exact_last_block": "false",
}
"""``MergingConfig.tome()``, for the command line."""
LOW = 0.5
"""The budget that has an adaptation of its own; those above it share one."""
LOW_FIELDS = {"dynamicvit": {"keep_ratio": 0.56}, "spvit": {"keep_ratio": 0.56}}
"""Fields that set the cost near it, where adapting needs no calibration before."""
STVIT = {
    0.65: {"base_layers": 6, "semantic_tokens": 49},
    0.8: {"base_layers": 8, "semantic_tokens": 64},
    0.5: {"base_layers": 4, "semantic_tokens": "[6,7]"},
}
"""Budget: where STViT's semantic tokens begin and how many there are; chosen on adaptation images.
Each is a model of its own."""
STVIT_FREE = {"keep_prefix": "true", "global_centres": "false", "pooling": "avg"}
STVIT_EPOCHS = 8
SPEED_BATCH, SPEED_BATCHES = 16, 4
PER_IMAGE: dict[str, dict[str, Any]] = {
    "merging": {"threshold": 0.01},
    "dynamicvit": {"threshold": 0.5},
    "spvit": {"inference": "threshold"},
}
"""Fields that let the images decide how many tokens they keep, after adapting with fixed counts, or
without adapting.
"""


class Bench:
    """One model of the table."""

    def __init__(self, assets: Path, runs: Path, model: str, options: argparse.Namespace) -> None:
        self.epochs, self.low, self.speed = options.epochs, not options.no_low, options.speed
        self.assets, self.runs, self.model = assets, runs / model, model
        self.weights = assets / "weights" / f"{model}.safetensors"
        self.validation = assets / "imagenet-val-1300"
        self.adaptation = assets / "imagenet-adapt-1000"
        self.runs.mkdir(parents=True, exist_ok=True)

    def dense(self) -> Any:
        return self._evaluate("dense", self.model)

    def training_free(self, method: str) -> Any:
        if method == "stvit":
            return self._stvit_rows("free", epochs=0)
        folder = self._sparsify(method, f"{method}-free", BUDGETS, TRAINING_FREE[method])
        return self._evaluate(f"{method}-free", folder, *self._budgets)

    def free_per_image(self, method: str) -> Any:
        folder = self._sparsify(method, f"{method}-free", BUDGETS, TRAINING_FREE[method])
        return self._per_image(method, f"{method}-free", folder)

    def _per_image(self, method: str, name: str, checkpoint: Path) -> dict[str, Any]:
        """The rows of a model whose counts were fixed, if the images decide."""
        other = self.runs / f"{name}-per-image-checkpoint"
        from_pretrained(checkpoint, **PER_IMAGE[method]).save_pretrained(other)
        found: dict[str, Any] = self._evaluate(f"{name}-per-image", other, *self._budgets)
        return found

    def tome(self) -> Any:
        folder = self._sparsify("merging", "tome", BUDGETS, TOME)
        return self._evaluate("tome", folder, *self._budgets)

    def _sparsify(
        self, method: str, name: str, budgets: Sequence[float], fields: dict[str, Any]
    ) -> Path:
        """The calibrated checkpoint, without training."""
        folder = self.runs / name
        if not folder.exists():
            vitrim(
                *("sparsify", self.model, "--weights", self.weights, "--method", method),
                *("--macs", ",".join(map(str, budgets)), "--data", self.adaptation, "-o", folder),
                *self._changes("", fields),
            )
        return folder

    def adapted(self, method: str) -> dict[str, Any]:
        """The rows of an adapted model, by their names."""
        if method == "stvit":
            return {"adapted": self._stvit_rows("adapt", STVIT_EPOCHS)}
        name = f"{method}-adapt"
        checkpoint, seconds = self._adapt(method, name, *self._start(method, BUDGETS[0]))
        rows = {"adapted": self._evaluate(name, checkpoint, *self._budgets) | seconds}
        if self.low and method not in ("sait", "merging"):  # adapted at many budgets at once
            low, low_seconds = self._adapt(method, f"{name}-low", *self._start(method, LOW))
            found = self._evaluate(f"{name}-low", low, *self._calibrated_at(LOW))
            rows[f"adapted at {LOW}"] = found | low_seconds
        if method == "dynamicvit":
            ratios = self._evaluate(f"{method}-ratios", checkpoint, "--keep-ratio", RATIOS)
            rows["adapted, at keep ratios"] = ratios | seconds
        if method in PER_IMAGE:
            rows["adapted, counts per image"] = self._per_image(method, name, checkpoint) | seconds
        return rows

    def _start(self, method: str, budget: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the recipe's method and model start from, for adapting near a budget."""
        fields = TRAINING_FREE.get(method, {})
        if budget == LOW:
            fields = fields | LOW_FIELDS.get(method, {})
        if method != "asvit":
            return fields, {}
        folder = self.runs / f"{method}-free"  # its thresholds stay as they were calibrated
        if budget != LOW:
            return {}, {"checkpoint": folder}
        record = json.loads((folder / "config.json").read_text())["calibration"]
        factor = next(point["value"] for point in record if point["budget"] == budget)
        return {"threshold_factor": factor}, {"checkpoint": folder}

    def _adapt(
        self, method: str, name: str, fields: dict[str, Any], model: dict[str, Any], *options: Any
    ) -> tuple[Path, dict[str, Any]]:
        """The adapted checkpoint, and how long it took; a finished run is left as it is."""
        run = self.runs / name
        dense = {"name": self.model, "pretrained": "false", "weights": self.weights}
        data = {"train": self.adaptation, "crop_pct": CROP_PCT[self.model]}
        parts = {"model": dense | model, "data": data, "method": fields}
        if self.epochs is not None:
            parts["run"] = {"epochs": self.epochs}
        changes = (word for part, found in parts.items() for word in self._changes(part, found))
        if not (self.runs / f"{name}.json").exists():  # train goes on where it was interrupted
            vitrim("train", f"{method}-adapt", "-o", run, *changes, *options)
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        seconds = {"adapt_seconds": round(log[-1]["time"]), "epochs": 1 + log[-1]["epoch"]}
        return run / "checkpoint", seconds

    def _stvit_rows(self, kind: str, epochs: int) -> dict[str, Any]:
        """One row per budget, each of a model of its own."""
        rows, more = [], {}
        for budget, fields in STVIT.items():
            name = f"stvit-{kind}-{budget}"
            if epochs:
                options = ("--set", f"run.epochs={self.epochs or epochs}")
                checkpoint, more = self._adapt("stvit", name, fields, {}, *options)
            else:
                checkpoint = self._sparsify("stvit", name, (budget,), STVIT_FREE | fields)
            found = self._evaluate(name, checkpoint)
            rows += [row | {"budget": budget} for row in found["results"]]
        return {"results": rows} | more

    @staticmethod
    def _changes(part: str, fields: dict[str, Any]) -> list[str]:
        prefix = f"{part}." if part else ""
        return [word for name, v in fields.items() for word in ("--set", f"{prefix}{name}={v}")]

    @property
    def _budgets(self) -> tuple[Any, ...]:
        return self._calibrated_at(*BUDGETS)

    def _calibrated_at(self, *budgets: float) -> tuple[Any, ...]:
        each = (part for budget in budgets for part in ("--macs", budget))
        return (*each, "--calibrate-on", self.adaptation)

    def _evaluate(self, name: str, model: Any, *options: Any) -> dict[str, Any]:
        output = self.runs / f"{name}.json"
        if not output.exists():
            vitrim(
                *("eval", model, "--data", self.validation, "--weights", self.weights),
                *("--crop-pct", CROP_PCT[self.model], "--json", output, *options),
            )
        text = output.read_text()
        for path, word in ((self.assets, "ASSETS"), (self.runs.parent, "RUNS")):
            text = text.replace(str(path.resolve()), word).replace(str(path), word)
        content: dict[str, Any] = json.loads(text)
        return self._with_speed(content, name, model)

    def _with_speed(self, content: dict[str, Any], name: str, model: Any) -> dict[str, Any]:
        """Each result with the speed that was measured at its setting, beside the dense model."""
        output = self.runs / f"{name}-speed.json"
        if self.speed and name != "dense" and not output.exists():
            rows = [row.to_dict() for row in self._time(from_pretrained(model), content["results"])]
            write_atomic(output, (json.dumps(rows, indent=1) + "\n").encode())
        if output.exists():
            rows = json.loads(output.read_text())
            for result, row in zip(content["results"], rows, strict=True):
                result["speed"] = row
        return content

    def _time(self, sparse: SparseModel, results: list[dict[str, Any]]) -> list[Row]:
        """A row per result; the dense model takes its turns among them."""
        candidates: dict[str, nn.Module] = {"dense": sparse.backbone}
        for number, result in enumerate(results):
            turned = deepcopy(sparse)
            if "value" in result:
                turned.method.turn(result["value"])
            elif "keep_ratio" in result:
                turned.set_keep_ratio(result["keep_ratio"])
            candidates[str(number)] = turned
        count = SPEED_BATCHES * SPEED_BATCH
        images = prepared_images(sparse, str(self.validation), count, SPEED_BATCH)
        shape = (images.shape[1], images.shape[2], images.shape[3])
        options: dict[str, Any] = {"dtypes": ("fp32",), "rounds": 5, "images": images}
        print(f"timing {self.runs.name}, {len(results)} settings", flush=True)
        return benchmark(candidates, shape, batches=(SPEED_BATCH,), **options)[1:]


def vitrim(*arguments: Any) -> None:
    words = [str(argument) for argument in arguments]
    print("vitrim", *words, flush=True)
    subprocess.run([sys.executable, "-m", "vitrim", *words], check=True)


def rows_of(bench: Bench, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """A method's rows, by their names, as many as were asked for."""
    rows = {}
    if method in TRAINING_FREE and method in PER_IMAGE:
        rows[f"{method} training-free, counts per image"] = bench.free_per_image(method)
    if options.per_image:
        return rows
    if method in TRAINING_FREE or method == "stvit":
        rows[f"{method} training-free"] = bench.training_free(method)
    if method == "merging":
        rows["tome (preset)"] = bench.tome()
    if not options.free:
        rows |= {f"{method} {name}": row for name, row in bench.adapted(method).items()}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "real_weights")
    parser.add_argument("--models", nargs="*", default=list(CROP_PCT))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--epochs", type=int, help="Of every adaptation, instead of its recipe's.")
    parser.add_argument("--speed", action="store_true", help="Time the rows as well.")
    parser.add_argument("--free", action="store_true", help="Nothing that is adapted.")
    parser.add_argument("--per-image", action="store_true", help="Only counts per image, untrained")
    parser.add_argument("--no-low", action="store_true", help=f"No adaptation at {LOW} of its own.")
    options = parser.parse_args()
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    models: dict[str, Any] = earlier.get("models", {})
    for model in options.models:
        bench = Bench(options.assets, options.runs, model, options)
        rows: dict[str, Any] = models.setdefault(model, {})
        if not options.per_image:
            rows["dense"] = bench.dense()
        for method in options.methods:
            rows |= rows_of(bench, method, options)
            content = {
                "command": "python benchmarks/real_weights.py ASSETS " + " ".join(sys.argv[2:]),
                "data": "1,300 ILSVRC2012 validation images (an easy-leaning subset); calibrated "
                "and adapted on 1,000 other images without labels",
                "date": time.strftime("%Y-%m-%d"),
                "models": models,
            }
            write_atomic(RESULTS, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
