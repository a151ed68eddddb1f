"""``vitrim sparsify``, and how the commands meet budgets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from vitrim.budget import TOLERANCE, Calibration, check_budget
from vitrim.budgets.calibrate import MAX_IMAGES, calibrate
from vitrim.budgets.milliseconds import check_table, follow, is_settled, sparsify_to
from vitrim.budgets.schedule import load as load_schedule
from vitrim.cli import common, tables
from vitrim.cli.images import unlabelled_batches
from vitrim.cli.options import (
    BatchOption,
    ChangesOption,
    DenseArgument,
    DenseWeightsOption,
    DeviceOption,
    JsonOption,
    SplitOption,
    WorkersOption,
)
from vitrim.cli.schedule import (
    ElsewhereOption,
    MillisecondsOption,
    RuntimeOption,
    StagesOption,
    TableOption,
    dense_model,
    latency_facts,
    latency_metrics,
    method_config,
    schedule_table,
    table_of,
)
from vitrim.config import require, to_plain
from vitrim.errors import ConfigError
from vitrim.families import family_of
from vitrim.methods import METHODS, method_by_name
from vitrim.model import SparseModel, sparsify

MacsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--macs",
        metavar="SHARE",
        help="Mean cost as a share of the dense model's MACs, such as 0.6; give it several times, "
        "or 0.5,0.6, for several.",
    ),
]


def budgets_of(words: Sequence[str] | None) -> list[float]:
    """The budgets that ``--macs`` gave, checked, each once."""
    budgets = [share for word in words or () for share in common.numbers(word, float, "--macs")]
    for budget in budgets:
        check_budget(budget)
    return list(dict.fromkeys(budgets))


@dataclass(frozen=True)
class Met:
    """A budget, and how the model is set to it."""

    budget: float
    dial: str
    value: float
    set_by: str
    """``formula``, ``record``, or what was calibrated on."""


def meet(sparse: SparseModel, budgets: Sequence[float], loader: Any, source: str) -> list[Met]:
    """The dial's value for each budget: by formula, by the record, or by calibration.

    Args:
        sparse: its settings are as they were afterwards.
        budgets: shares of the dense MACs.
        loader: images to calibrate on, where that is needed.
        source: what they are called.
    """
    known: dict[float, Met] = {}
    restore, dial = sparse.snapshot(), sparse.method.dial()
    is_fixed = sparse.macs() is not None
    try:
        for budget in budgets:
            try:
                sparse.set_budget(budget)
            except ConfigError:
                if is_fixed:
                    raise
                continue
            by = "formula" if is_fixed else "record"
            known[budget] = Met(budget, dial.name, sparse.method.dial().value, by)
        missing = [budget for budget in budgets if budget not in known]
        found = calibrate(sparse, loader, missing, progress=common.note) if missing else ()
        for point in found:
            by = f"calibration on {point.images} images of {source}"
            known[point.budget] = Met(point.budget, point.dial, point.value, by)
    finally:
        restore()
    return [known[budget] for budget in budgets]


def sparsify_command(
    model: DenseArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Images to calibrate on: a folder of any layout, a tar, a timm reader name, or "
            "digits. Labels are not used. Not needed where every image keeps the same number of "
            "tokens, as with merging; then --milliseconds finds a schedule on them, if given."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="One that needs no training of its own: merging, asvit, sait, or stvit with "
            "keep_prefix."
        ),
    ] = "merging",
    macs: MacsOption = None,
    milliseconds: MillisecondsOption = None,
    table: TableOption = None,
    schedule: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Drop where this schedule says (vitrim schedule)."),
    ] = None,
    stages: StagesOption = None,
    weights: DenseWeightsOption = None,
    changes: ChangesOption = None,
    images: Annotated[
        int, typer.Option(min=1, help="Images to look at, spread evenly over the data.")
    ] = MAX_IMAGES,
    tolerance: Annotated[
        float, typer.Option(help="Relative difference of the mean cost that meets the budget.")
    ] = TOLERANCE,
    batch: BatchOption = 32,
    split: SplitOption = None,
    workers: WorkersOption = 2,
    device: DeviceOption = None,
    runtime: RuntimeOption = None,
    elsewhere: ElsewhereOption = False,
    json: JsonOption = None,
) -> None:
    """Make a dense model sparse without training, for a mean cost in MACs or milliseconds.

    Of several --macs the first is set; the others are recorded, for set_budget and vitrim eval.
    """
    common.check_writable(json)
    common.check_new_folder(output)
    budgets, latency_table = budgets_of(macs), table_of(milliseconds, table)
    if budgets and milliseconds is not None:
        raise ConfigError("there are two budgets; give --macs or --milliseconds")
    needs_budget = method_by_name(method).drops and schedule is None
    if needs_budget and not budgets and milliseconds is None:
        raise ConfigError("no budget is given; add --macs with a share of the MACs, such as 0.6")
    config = _training_free_config(method, changes or [])
    follows = None if schedule is None else load_schedule(schedule)
    where = common.device_of(device)
    dense = dense_model(model, weights).to(where)
    if latency_table is not None:
        check_table(latency_table, family_of(dense), runtime=runtime, elsewhere=elsewhere)
    start = time.perf_counter()
    source, batches = "", list[Tensor]()
    if data is None:
        _check_needs_no_images(dense, config)
    else:
        source, batches = unlabelled_batches(dense, data, images, batch, workers, split, where)
    latency, found = None, tuple[Calibration, ...]()
    if milliseconds is not None and latency_table is not None:
        sparse, latency, follows = sparsify_to(
            dense,
            config,
            latency_table,
            milliseconds,
            batches,
            schedule=follows,
            stages=stages,
            progress=common.note,
        )
    else:
        sparse = follow(dense, config, follows, batches)
    if budgets and is_settled(sparse, follows):
        raise ConfigError(
            f"the schedule sets how many tokens {method} leaves, and so would --macs; leave that "
            "out, or find a schedule for the budget: vitrim schedule --macs"
        )
    if budgets:
        found = calibrate(
            sparse, batches, budgets, tolerance=tolerance, max_images=images, progress=common.note
        )
    seconds = time.perf_counter() - start
    trained = f"weights of {weights.name}" if weights is not None else "its own weights"
    sparse.origin = f"{model}, {trained}, made sparse without training by vitrim sparsify"
    sparse.data_config = common.data_config_of(dense, source)
    metrics = latency_metrics(latency, follows)
    sparse.to(torch.device("cpu")).save_pretrained(output, metrics=metrics)
    if follows is not None:
        common.out().print(schedule_table(follows))
        remark = follows.fitted(config)[1]
        if remark is not None:
            common.note(remark)
    if latency is not None:
        common.out().print(latency_facts(latency))
    if found:
        common.out().print(tables.calibration_table(found))
    took = f" ({seconds:.0f} s of calibration)" if batches else ""
    common.out().print(f"written: {output}{took}", soft_wrap=True)
    common.write_json(json, _report(model, method, data, seconds, found) | metrics)


def _training_free_config(name: str, changes: Sequence[str]) -> Any:
    """The method's config with changes, if the method works without training."""
    method, config = method_by_name(name), method_config(name, changes)
    if method.must_learn(config):
        ready = [n for n, other in METHODS.items() if other.drops and other.needs_training is None]
        raise ConfigError(
            f"{name} must learn what to compute, so it cannot do without training; train it: "
            f"vitrim train {method.needs_training} --data DIR -o DIR. Without training: "
            f"{', '.join(ready)}; and stvit with keep_prefix=true, global_centres=false"
        )
    return config


def _check_needs_no_images(dense: nn.Module, config: Any) -> None:
    """Raise :class:`ConfigError` unless every image will keep the same number of tokens."""
    sparse = sparsify(dense, config)
    name, needs = sparse.method.name, sparse.macs() is None
    sparse.unwrap()
    require(
        not needs,
        f"the counts of {name} depend on the images; give some with --data (labels are not used), "
        "or take a method whose counts are fixed, such as merging",
    )


def _report(
    model: str, method: str, data: str | None, seconds: float, found: Sequence[Calibration]
) -> dict[str, Any]:
    return {
        "model": model,
        "method": method,
        "data": data,
        "seconds": round(seconds, 2),
        "calibration": [to_plain(point) for point in found],
    }
