"""The commands; those that measure are in ``measure.py``."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer

from vitrim import capabilities, checkpoint, convert, hub
from vitrim.budget import Calibration
from vitrim.cli import common, tables
from vitrim.cli.budgets import sparsify_command
from vitrim.cli.evaluate import eval_command
from vitrim.cli.export import export_command, predict_command
from vitrim.cli.measure import bench_command, show_command
from vitrim.cli.profile import profile_command
from vitrim.cli.schedule import schedule_command
from vitrim.cli.tasks import open_task, task_facts
from vitrim.config import to_plain
from vitrim.errors import InputError, printable
from vitrim.methods import METHODS
from vitrim.model import SparseModel
from vitrim.runtime import input_shape
from vitrim.tools.evaluate import check_answers

app = typer.Typer(
    name="vitrim",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("sparsify")(sparsify_command)
app.command("schedule")(schedule_command)
app.command("export")(export_command)
app.command("predict")(predict_command)
app.command("eval")(eval_command)
app.command("bench")(bench_command)
app.command("profile")(profile_command)
app.command("show")(show_command)

OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from vitrim import __version__

        print(f"vitrim {__version__}, torch {torch.__version__}, timm {timm.__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="And exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error was raised; works anywhere.")
    ] = False,
) -> None:
    """Faster vision transformers by computing only the tokens that matter."""


class Listed(StrEnum):
    """What ``vitrim list`` lists."""

    models = "models"
    methods = "methods"
    recipes = "recipes"
    capabilities = "capabilities"


@app.command("list")
def list_command(
    what: Annotated[Listed, typer.Argument(help="What to list.")],
    pattern: Annotated[
        str, typer.Argument(help="Only models whose name matches, such as 'deit*'.")
    ] = "*",
    summary: Annotated[
        bool, typer.Option("--summary", help="Models: how many of each module, and why not more.")
    ] = False,
) -> None:
    """List the models, methods or recipes that vitrim knows, or which method runs on what."""
    if what is Listed.models:
        _list_models(pattern, summary)
    elif what is Listed.methods:
        _list_methods()
    elif what is Listed.recipes:
        _list_recipes()
    else:
        _list_capabilities()


def _list_models(pattern: str, summary: bool) -> None:
    """Timm's names that a family serves, or how many of each module and why not the others."""
    names = capabilities.modules_of_models(pattern)
    if not names:
        raise InputError(f"no vision transformer of timm matches {pattern!r}")
    with common.progress("looking at timm's models", sum(map(len, names.values()))) as advance:
        found = capabilities.support(pattern, advance)
    served = [name for module in found for name in module.served]
    console = common.out()
    if summary:
        console.print(tables.support_table(found))
    else:
        for name in served:
            console.print(name)
    total = sum(module.total for module in found)
    note = f"{len(served)} of {total} models of this kind" if summary else f"{len(served)} models"
    common.note(f"{note}, by their timm names; and digits_vit, which is shipped")


def _list_methods() -> None:
    console = common.out()
    for name, method in METHODS.items():
        table = tables.plain_table(name, "setting", "default")
        table.columns[1].justify = "left"
        for entry in dataclasses.fields(method.config_class):
            table.add_row(entry.name, repr(entry.default))
        console.print(table)


def _list_capabilities() -> None:
    """Which method runs on which family of backbones, and why not."""
    table = capabilities.capabilities()
    console = common.out()
    overview = tables.plain_table("Methods and families", "method", *next(iter(table.values())))
    for method, row in table.items():
        overview.add_row(method, *("yes" if reason is None else "no" for reason in row.values()))
    console.print(overview)
    for method, row in table.items():
        reasons = {family: reason for family, reason in row.items() if reason is not None}
        console.print(f"{method} does not run on", style="bold")
        console.print(tables.fact_table(reasons))


def _list_recipes() -> None:
    from vitrim.train.recipe import list_recipes

    table = tables.plain_table("Recipes", "name", "what it does")
    table.columns[1].justify = "left"
    table.columns[0].no_wrap = True
    for name, description in list_recipes().items():
        table.add_row(name, description)
    common.out().print(table)


@app.command("info")
def info_command(
    model: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder.")],
) -> None:
    """What a checkpoint holds: backbone, method, cost, origin and metrics."""
    model = str(hub.folder_of(model))
    if (task := open_task(model)) is not None:
        common.out().print(model, style="bold", soft_wrap=True)
        common.out().print(tables.fact_table(task_facts(model, task)))
        return
    sparse = common.require_sparse(common.load_model(model), model)
    config, image_shape = checkpoint.read_config(model), input_shape(common.data_config_of(sparse))
    one, size = "clip" if sparse.takes_clips else "image", _size(image_shape)
    dense_macs, macs = sparse.dense_macs(size), sparse.macs(size)
    cost = "depends on the image" if macs is None else f"{tables.giga(macs)} GMACs per {one}"
    if macs is not None:
        cost += f", {100 * macs / dense_macs:.0f}% of dense"
    added = sum(parameter.numel() for parameter in sparse.method.parameters())
    backbone = config["backbone"]
    arguments = ", ".join(f"{key}={value!r}" for key, value in backbone["kwargs"].items())
    settings = to_plain(sparse.config)
    facts = {
        "backbone": f"{backbone['name']}({arguments})",
        f"{one}s": " x ".join(str(side) for side in image_shape),
        "parameters": f"{sum(p.numel() for p in sparse.parameters()):,}, of the method {added:,}",
        "dense": f"{tables.giga(dense_macs)} GMACs per {one}",
        "sparse": cost,
        "patches kept": _patches_kept(sparse, image_shape),
        **_last_block(sparse),
        "method": sparse.method.name,
        **({"token score": sparse.method.score_name} if sparse.method.score_name else {}),
        **{f"  {name}": value for name, value in settings.items()},
        "calibration": "\n".join(map(_calibrated, sparse.calibration)) or "none",
        "origin": config.get("origin") or "not recorded",
        "metrics": json.dumps(config.get("metrics") or {}, indent=1),
        "written with": _versions(config.get("versions")),
    }
    common.out().print(model, style="bold", soft_wrap=True)
    common.out().print(tables.fact_table(facts))


def _size(image_shape: Sequence[int]) -> Any:
    """Height and width of images, or frames, height and width of clips."""
    return tuple(image_shape[1:])


def _versions(record: Any) -> str:
    if not isinstance(record, Mapping):
        return "not recorded"
    return ", ".join(f"{name} {version}" for name, version in record.items())


def _calibrated(point: Calibration) -> str:
    macs = point.macs
    spread = "" if macs.min == macs.max else f" ±{tables.giga(macs.std)}"
    basis = f"{point.images} images" if point.images else "formula"
    return (
        f"{point.budget:g} of dense at {point.dial} {point.value:.6g}: "
        f"{tables.giga(macs.mean)}{spread} GMACs ({basis})"
    )


def _patches_kept(sparse: SparseModel, image_shape: Sequence[int]) -> str:
    trace = sparse.trace(torch.randn(1, *image_shape, generator=torch.Generator().manual_seed(0)))
    check_answers(trace)
    if sparse.macs() is None:
        return "a number that depends on the image"
    return (
        ", ".join(
            f"{int(stage.counts[0])} of {math.prod(stage.grid)} before block {stage.block}"
            for stage in trace.stages
        )
        or "all"
    )


def _last_block(sparse: SparseModel) -> dict[str, str]:
    """Whether it computes no more than the logits need, of methods that know of it."""
    if not hasattr(sparse.config, "exact_last_block"):
        return {}
    why = sparse.method.whole_last_block(sparse.family)
    return {"last block": "exact: what the logits need" if why is None else f"whole: {why}"}


@app.command("train")
def train_command(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Packaged recipe (vitrim list recipes) or file.")
    ],
    output: OutputOption,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a value of the recipe."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Training images; a folder with train and val in it gives both."),
    ] = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Start anew where a run was interrupted.")
    ] = False,
) -> None:
    """Train by a recipe; an interrupted run goes on where it was.

    On several devices: accelerate launch -m vitrim train ...
    """
    from vitrim.train.recipe import load_recipe

    overrides = [*_data_overrides(data), *(changes or [])]
    chosen = load_recipe(recipe, overrides)
    from vitrim.train.engine import train

    result = train(chosen, output, resume=not no_resume)
    facts = {name: value for name, value in result.metrics.items() if not isinstance(value, dict)}
    common.out().print(f"trained: {result.folder}", style="bold", soft_wrap=True)
    common.out().print(tables.fact_table(facts))


def _data_overrides(data: str | None) -> list[str]:
    if data is None:
        return []
    folder = Path(data)
    train, val = folder / "train", folder / "val"
    if train.is_dir() and val.is_dir():
        found = {"data.train": str(train), "data.val": str(val)}
    else:
        found = {"data.train": data}
    return [f"{key}={json.dumps(value)}" for key, value in found.items()]


@app.command("convert")
def convert_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The authors' .pth file.")],
    system: Annotated[str, typer.Option("--from", help=f"{', '.join(convert.SYSTEMS)}.")],
    output: OutputOption,
    keep_ratio: Annotated[
        float | None, typer.Option(help="That it was trained for; the file does not say.")
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help="Blocks before which tokens are dropped, such as 3,6,9.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(metavar="NAME", help="timm name; worked out if not given.")
    ] = None,
) -> None:
    """Make an authors' checkpoint a vitrim one; no code in the file is run."""
    common.check_new_folder(output)
    options: dict[str, Any] = {}
    if keep_ratio is not None:
        options["keep_ratio"] = keep_ratio
    if stages is not None:
        options["stages"] = common.numbers(stages, int, "--stages")
    content = convert.read_file(file)
    model = convert.load_official(content, system, architecture=architecture, **options)
    model.save_pretrained(output)
    common.out().print(f"written: {output}")


@app.command("demo")
def demo_command(
    output: OutputOption = Path("vitrim-demo"),
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Length of the training, instead of the recipe's.")
    ] = None,
) -> None:
    """The whole job on embedded data: train, evaluate, measure, report; some minutes, offline."""
    from vitrim.demo.run import run_demo

    common.check_new_folder(output)
    for line in run_demo(output, seconds=seconds, progress=common.progress):
        print(printable(line))
