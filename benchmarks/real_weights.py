"""Real weights on real images: every method, training-free and adapted, at several budgets.

``python benchmarks/real_weights.py ASSETS`` where ASSETS holds ``weights/*.safetensors``,
``imagenet-val-1300`` (measured on, never trained or calibrated on) and ``imagenet-adapt-1000``
(adapted and calibrated on, without labels). Writes ``results/real_weights.json``. A run that exists
is not repeated, so parts can be done on their own (``--models``, ``--methods``) and one after the
other; each model and method takes up to twenty minutes on two otherwise idle cores.
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
RESULTS = ROOT / "results" / "real_weights.json"
CROP_PCT = {"deit_tiny_patch16_224": "0.875", "vit_tiny_patch16_224": "0.9"}
"""What the weights were published with; for DeiT timm's own entry says 0.9."""
TRAINING_FREE = ("asvit", "sait")
ADAPTED = ("dynamicvit", "spvit", "asvit", "sait", "stvit")
BUDGETS = (0.8, 0.65, 0.5)
NO_DIAL = ("stvit",)


class Bench:
    """One model of the table."""

    def __init__(self, assets: Path, runs: Path, model: str) -> None:
        self.assets, self.runs, self.model = assets, runs / model, model
        self.weights = assets / "weights" / f"{model}.safetensors"
        self.validation = assets / "imagenet-val-1300"
        self.adaptation = assets / "imagenet-adapt-1000"
        self.runs.mkdir(parents=True, exist_ok=True)

    def dense(self) -> Any:
        return self._evaluate("dense", self.model)

    def training_free(self, method: str) -> Any:
        folder = self.runs / f"{method}-free"
        if not folder.exists():
            vitrim(
                *("sparsify", self.model, "--weights", self.weights, "--method", method),
                *("--macs", ",".join(map(str, BUDGETS)), "--data", self.adaptation, "-o", folder),
            )
        return self._evaluate(f"{method}-free", folder, *self._budgets)

    def adapted(self, method: str) -> Any:
        run = self.runs / f"{method}-adapt"
        vitrim(  # a finished run is left as it is
            *("train", f"{method}-adapt", "-o", run),
            *("--set", f"model.name={self.model}", "--set", "model.pretrained=false"),
            *("--set", f"model.weights={self.weights}"),
            *("--set", f"data.train={self.adaptation}"),
            *("--set", f"data.crop_pct={CROP_PCT[self.model]}"),
        )
        budgets = () if method in NO_DIAL else self._budgets
        found = self._evaluate(f"{method}-adapt", run / "checkpoint", *budgets)
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return found | {"adapt_seconds": round(log[-1]["time"])}

    @property
    def _budgets(self) -> tuple[Any, ...]:
        each = (part for budget in BUDGETS for part in ("--macs", budget))
        return (*each, "--calibrate-on", self.adaptation)

    def _evaluate(self, name: str, model: Any, *options: Any) -> dict[str, Any]:
        output = self.runs / f"{name}.json"
        if not output.exists():
            vitrim(
                *("eval", model, "--data", self.validation, "--weights", self.weights),
                *("--crop-pct", CROP_PCT[self.model], "--json", output, *options),
            )
        content: dict[str, Any] = json.loads(output.read_text())
        return content


def vitrim(*arguments: Any) -> None:
    words = [str(argument) for argument in arguments]
    print("vitrim", *words, flush=True)
    subprocess.run([sys.executable, "-m", "vitrim", *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "real_weights")
    parser.add_argument("--models", nargs="*", default=list(CROP_PCT))
    parser.add_argument("--methods", nargs="*", default=list(ADAPTED))
    options = parser.parse_args()
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    models: dict[str, Any] = earlier.get("models", {})
    for model in options.models:
        bench = Bench(options.assets, options.runs, model)
        rows = models.setdefault(model, {})
        rows["dense"] = bench.dense()
        for method in options.methods:
            if method in TRAINING_FREE:
                rows[f"{method} training-free"] = bench.training_free(method)
            rows[f"{method} adapted"] = bench.adapted(method)
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
