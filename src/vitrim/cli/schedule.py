"""``vitrim schedule``, and the options of budgets in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import typer
from torch import nn

from vitrim.budget import check_budget
from vitrim.budgets.effects import measure_effects
from vitrim.budgets.milliseconds import EFFECT_IMAGES, Latency, check_table
from vitrim.budgets.schedule import Schedule
from vitrim.budgets.solve import Costs, check_reach, find_schedule
from vitrim.capabilities import require_served
from vitrim.cli import common, tables
from vitrim.cli.images import unlabelled_batches
from vitrim.cli.options import (
    BatchOption,
    ChangesOption,
    DenseArgument,
    DenseWeightsOption,
    DeviceOption,
    SplitOption,
    WorkersOption,
)
from vitrim.config import from_plain, to_plain
from vitrim.errors import ConfigError
from vitrim.families import family_of
from vitrim.latency.table import LatencyTable
from vitrim.methods import method_by_name
from vitrim.model import SparseModel

MillisecondsOption = Annotated[
    float | None,
    typer.Option(
        "--milliseconds",
        metavar="MS",
        help="Mean latency per batch of the table, as it predicts; needs --table.",
    ),
]
TableOption = Annotated[
    Path | None,
    typer.Option("--table", metavar="FILE", help="Latency table, as vitrim profile writes."),
]
RuntimeOption = Annotated[
    str | None,
    typer.Option(help="Runtime that the model is meant for; a table of another one is refused."),
]
ElsewhereOption = Annotated[
    bool,
    typer.Option("--elsewhere", help="The table is of another machine, and meant to be."),
]
StagesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Stages of the schedule, at most; sait has one. If not given, 3, for merging 6: fewer "
        "where more do not pay.",
    ),
]


def schedule_command(
    model: DenseArgument,
    data: Annotated[
        str,
        typer.Option(
            help="Images to measure quality on: a folder of any layout, a tar, a timm reader name, "
            "or digits. Labels are not used."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")],
    milliseconds: MillisecondsOption = None,
    table: TableOption = None,
    macs: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Budget as a share of the dense MACs, such as 0.6."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Whose selectors the schedule pays: dynamicvit, spvit, asvit, sait; or merging, "
            "which merges or drops."
        ),
    ] = "dynamicvit",
    changes: ChangesOption = None,
    stages: StagesOption = None,
    procedure: Annotated[
        Literal["exact", "progressive"],
        typer.Option(help="The best by a dynamic programme, or SPViT's layer-to-phase procedure."),
    ] = "exact",
    signal: Annotated[
        Literal["agreement", "attention"],
        typer.Option(help="Quality by agreement with the dense model, or by attention kept."),
    ] = "agreement",
    weights: DenseWeightsOption = None,
    images: Annotated[
        int, typer.Option(min=1, help="Images to look at, spread evenly over the data.")
    ] = EFFECT_IMAGES,
    batch: BatchOption = 32,
    split: SplitOption = None,
    workers: WorkersOption = 2,
    device: DeviceOption = None,
    runtime: RuntimeOption = None,
    elsewhere: ElsewhereOption = False,
) -> None:
    """Find where to drop (or merge) tokens, and how many, for a budget of milliseconds or MACs.

    The schedule is a small JSON file, for recipes (method.schedule) and vitrim sparsify --schedule.
    """
    common.check_writable(output)
    latency_table = table_of(milliseconds, table)
    if (milliseconds is None) == (macs is None):
        raise ConfigError("give one budget: --milliseconds with --table, or --macs")
    config = method_config(method, changes or [])
    where = common.device_of(device)
    dense = dense_model(model, weights).to(where)
    family = family_of(dense)
    if latency_table is not None:
        check_table(latency_table, family, runtime=runtime, elsewhere=elsewhere)
    if macs is not None:
        check_budget(macs)
    _, batches = unlabelled_batches(dense, data, images, batch, workers, split, where)
    height, width = batches[0].shape[-2:]
    costs = Costs(family, family.grid((height, width)), config, latency_table)
    budget = milliseconds if milliseconds is not None else macs
    assert budget is not None
    check_reach(costs, budget)
    effects = measure_effects(family, batches, signal, config=config, progress=common.note)
    found = find_schedule(costs, effects, budget, stages=stages, procedure=procedure)
    found.save(output)
    common.out().print(schedule_table(found, costs.dense))
    common.out().print(f"written: {output}", soft_wrap=True)


def table_of(milliseconds: float | None, path: Path | None) -> LatencyTable | None:
    """The table that a budget of milliseconds needs; None for other budgets."""
    if milliseconds is None:
        if path is not None:
            raise ConfigError("--table is for --milliseconds; give that budget too")
        return None
    if path is None:
        raise ConfigError(
            "--milliseconds needs --table; make one on the device that counts: vitrim profile "
            "MODEL -o table.json"
        )
    return LatencyTable.load(path)


def dense_model(source: str, weights: Path | None) -> nn.Module:
    """The model called ``source``, if it is a dense one that can be made sparse: of timm's, that is
    known before its weights are fetched.
    """
    if timm.is_model(source) and not Path(source).exists():
        require_served(source)
    model = common.load_model(source, weights)
    if isinstance(model, SparseModel):
        raise ConfigError(
            f"{source} is sparse already ({model.method.name}); give a dense model: a timm name, "
            "with --weights for weights of your own"
        )
    return model


def method_config(name: str, changes: Sequence[str]) -> Any:
    """The config of the method called ``name``, with the changes of ``--set``."""
    from vitrim.train.toml import apply_override

    fields: dict[str, Any] = {}
    for change in changes:
        if "=" not in change:
            raise ConfigError(f"--set is {change!r}; write FIELD=VALUE, see vitrim list methods")
        apply_override(fields, change)
    config: Any = from_plain(method_by_name(name).config_class, fields)
    return config


def schedule_table(schedule: Schedule, dense: float | None = None) -> Any:
    """What a schedule says, in rows."""
    ways = {"merge": ", merged", "drop": ", the others dropped"}
    said = [ways[action] for action in schedule.actions] or [""] * len(schedule.stages)
    kept = zip(schedule.stages, schedule.counts, schedule.keep_ratios, said, strict=True)
    facts = {
        f"before block {block}": f"{count} of {schedule.patches} patches go on ({100 * ratio:.0f}%)"
        f"{way}"
        for block, count, ratio, way in kept
    }
    if schedule.milliseconds is not None:
        of_dense = "" if dense is None else f" of {dense:.4g} dense"
        facts["latency"] = f"{schedule.milliseconds:.4g} ms{of_dense}, by prediction"
    if schedule.macs is not None:
        facts["MACs"] = f"{100 * schedule.macs:.1f}% of dense"
    if schedule.loss is not None:
        facts["expected loss"] = f"{schedule.loss:.4g} by {schedule.signal}"
    facts["found for"] = f"{schedule.method}, {schedule.procedure}"
    return tables.fact_table(facts)


def latency_facts(latency: Latency) -> Any:
    """What was asked and what is predicted, in rows."""
    looked = f"mean of {latency.images} images" if latency.images else "the same for every image"
    return tables.fact_table(
        {
            "asked": f"{latency.asked:g} ms",
            "predicted": f"{latency.predicted:.4g} ms, {looked}",
            "dense": f"{latency.dense:.4g} ms by prediction",
            "set by": f"{latency.dial} = {latency.value:.6g}" if latency.dial else "its counts",
            "table": ", ".join(
                f"{name} {latency.table[name]}" for name in ("runtime", "batch", "threads", "dtype")
            ),
        }
    )


def latency_metrics(latency: Latency | None, schedule: Schedule | None) -> dict[str, Any]:
    """What a checkpoint records of them."""
    metrics: dict[str, Any] = {}
    if latency is not None:
        metrics["latency"] = latency.plain()
    if schedule is not None:
        metrics["schedule"] = to_plain(schedule)
    return metrics
