"""What budgets in milliseconds give when the result is measured: asked, predicted, measured.

``python benchmarks/milliseconds.py`` on an otherwise idle machine (about six minutes) profiles the
embedded set's vision transformer, trains digits recipes to budgets of that table, and times what
comes out beside the dense model; with ``--assets FOLDER`` (see ``real_weights.py``) it does the
same without training for DeiT-Tiny on real images. Writes ``results/milliseconds.json`` and
``.md``. With ``--swin WEIGHTS``, of the recipe digits-swin, it does so on that Swin instead, and
writes ``results/milliseconds_swin.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim import ASViTConfig, SaiTConfig, from_pretrained
from vitrim.budgets.milliseconds import sparsify_to
from vitrim.checkpoint import write_atomic
from vitrim.cli.common import load_model
from vitrim.cli.images import prepared_images
from vitrim.families import family_of
from vitrim.latency.measure import profile
from vitrim.latency.probes import kinds_of
from vitrim.latency.table import LatencyTable, predict
from vitrim.tools.benchmark import Quartiles, limited_threads, take_turns
from vitrim.tools.hardware import hardware
from vitrim.train.backbone import create_dense
from vitrim.train.engine import train
from vitrim.train.recipe import BudgetRecipe, load_recipe

RESULTS = Path(__file__).parents[1] / "results"
REAL = "deit_tiny_patch16_224"
FREE = {
    "asvit": ASViTConfig(value_weighting=True),
    "sait": SaiTConfig(score="cls_value_norm"),
}
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamicvit": ("digits-dynamicvit", {}),
    "dynamicvit, each image": ("digits-dynamicvit", {"threshold": 0.5}),
    "spvit, each image": ("digits-spvit", {}),
    "asvit": ("digits-asvit", {}),
}
"""Recipes, and fields of the method that differ."""
TRAINED_SWIN: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic_spatial": ("digits-dynamic_spatial-swin", {}),
    "spvit_pyramid, each image": ("digits-spvit_pyramid-swin", {"inference": "argmax"}),
}
SHARES, TRAINED_SHARE, SWIN_SHARE = (0.8, 0.65), 0.7, 0.95
"""Of the dense model's predicted latency."""
TRAINED_BATCH = 16
CALIBRATED_ON, TIMED = 256, 32


def without_training(assets: Path, options: Any) -> Iterator[dict[str, Any]]:
    """DeiT-Tiny, one image at a time: solved schedules and the dial."""
    model = load_model(REAL, assets / "weights" / f"{REAL}.safetensors")
    table = profile(model, threads=options.threads, configs=kinds_of(family_of(model), tuple(FREE)))
    seen = prepared_images(model, str(assets / "imagenet-adapt-1000"), CALIBRATED_ON, 32)
    unseen = prepared_images(model, str(assets / "imagenet-val-1300"), TIMED, 32)
    for name, config in FREE.items():
        for share in SHARES:
            asked = share * dense_milliseconds(table, model)
            sparse, latency, _ = sparsify_to(model, config, table, asked, seen.split(32))
            how = {"model": REAL, "method": name, "way": "without training", "batch": 1}
            yield how | measured(model, sparse, latency.plain(), unseen.split(1), options)


def by_training(
    name: str,
    recipes: dict[str, tuple[str, dict[str, Any]]],
    words: Sequence[str],
    share: float,
    options: Any,
) -> Iterator[dict[str, Any]]:
    """A model of the embedded set in batches: recipes with a budget, ``words`` changed in them."""
    first, _ = next(iter(recipes.values()))
    dense = create_dense(load_recipe(first, words).model, seed=0).eval()
    methods = {str(load_recipe(recipe).method.name) for recipe, _ in recipes.values()}
    configs = kinds_of(family_of(dense), tuple(methods))
    table = profile(dense, batch=TRAINED_BATCH, threads=options.threads, configs=configs)
    with tempfile.TemporaryDirectory() as folder:
        table.save(Path(folder) / "table.json")
        asked = share * dense_milliseconds(table, dense)
        budget = BudgetRecipe(milliseconds=asked, table=f"{folder}/table.json")
        for way, (recipe_name, fields) in recipes.items():
            recipe = load_recipe(recipe_name, words)
            method = replace(recipe.method, config=recipe.method.config | fields)
            recipe = replace(recipe, method=method, budget=budget)
            result = train(recipe, Path(folder) / way)
            sparse = from_pretrained(result.folder / "checkpoint")
            unseen = prepared_images(sparse, "digits/test", 16 * TRAINED_BATCH, TRAINED_BATCH)
            how = {
                "model": name,
                "method": way,
                "way": f"trained by {recipe_name}",
                "batch": TRAINED_BATCH,
            }
            batches = unseen.split(TRAINED_BATCH)
            yield how | measured(dense, sparse, result.metrics["latency"], batches, options)


def dense_milliseconds(table: LatencyTable, model: nn.Module) -> float:
    family = family_of(model)
    return float(predict(table, None, family, family.grid()))


def measured(
    dense: nn.Module,
    sparse: nn.Module,
    latency: dict[str, Any],
    batches: Sequence[Tensor],
    options: Any,
) -> dict[str, Any]:
    """What was asked and predicted, beside what the models take in turns.

    They are timed in a process of their own: one that has trained before is slower by a quarter.
    """
    models = {"dense": dense.eval(), "sparse": sparse.eval()}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        of = fresh.submit(times, models, batches, options.threads, options.rounds).result()
    return {
        "asked": latency["asked"],
        "predicted": latency["predicted"],
        "measured": vars(of["sparse"]),
        "error": of["sparse"].median / latency["asked"] - 1,
        "dense": {"predicted": latency["dense"], "measured": vars(of["dense"])},
    }


def times(
    models: dict[str, nn.Module], batches: Sequence[Tensor], threads: int, rounds: int
) -> dict[str, Quartiles]:
    """Milliseconds per batch of each."""
    models = copy.deepcopy(models)  # into memory of this process
    with limited_threads(threads), torch.inference_mode():
        timing = take_turns(models, batches, rounds, 0.3, math.inf, time.perf_counter)
    return {name: Quartiles.of(own.seconds) / 1e-3 for name, own in timing.items()}


def line(row: dict[str, Any]) -> str:
    measured, dense = row["measured"], row["dense"]
    cells = [
        *(row["model"], row["batch"], row["method"], row["way"]),
        *(f"{row['asked']:.2f}", f"{row['predicted']:.2f}"),
        f"{measured['median']:.2f} [{measured['low']:.2f}, {measured['high']:.2f}]",
        f"{row['error']:+.1%}",
        *(f"{dense['predicted']:.2f}", f"{dense['measured']['median']:.2f}"),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def page(content: dict[str, Any]) -> str:
    stamp = content["hardware"]
    return "\n".join(
        [
            "# Budgets in milliseconds, and what was measured",
            "",
            f"Made by `{content['command']}` on {stamp['threads']} thread(s) of "
            f"{stamp['cpu']}, torch {stamp['torch']}, {content['date']}. Milliseconds per batch, "
            "medians [quartiles] over rounds in which the dense and the sparse model take turns, "
            "on images that were not calibrated or trained on, in a process that did nothing else. "
            "The tables were made in the same run.",
            "",
            "| model | batch | method | way | asked | predicted | measured | error | dense, "
            "predicted | dense, measured |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *map(line, content["rows"]),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, help="Real weights and images.")
    parser.add_argument("--swin", type=Path, help="Dense weights of the recipe digits-swin.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    rows = []
    if options.swin is not None:
        words = [f"model.weights={json.dumps(str(options.swin))}"]
        name, output = "the embedded set's Swin", RESULTS / "milliseconds_swin.json"
        sources = [by_training(name, TRAINED_SWIN, words, SWIN_SHARE, options)]
    else:
        name, output = "the embedded set's ViT", RESULTS / "milliseconds.json"
        sources = [by_training(name, TRAINED, (), TRAINED_SHARE, options)]
    if options.assets is not None:
        sources.insert(0, without_training(options.assets, options))
    for source in sources:
        for row in source:
            rows.append(row)
            print(line(row), flush=True)
    content = {
        "command": " ".join(["python benchmarks/milliseconds.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(torch.device("cpu")) | {"threads": options.threads},
        "rows": rows,
    }
    write_atomic(output, (json.dumps(content, indent=1) + "\n").encode())
    write_atomic(output.with_suffix(".md"), page(content).encode())


if __name__ == "__main__":
    main()
