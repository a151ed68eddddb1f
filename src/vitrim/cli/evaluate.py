"""``vitrim eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from vitrim.budgets.calibrate import MAX_IMAGES
from vitrim.cli import common, tables
from vitrim.cli.budgets import MacsOption, budgets_of, meet
from vitrim.cli.clips import MOST_CALIBRATED, ClipData, ClipOptions, is_video
from vitrim.cli.images import calibration_loader
from vitrim.cli.options import (
    AgainstOption,
    DeviceOption,
    FramesOption,
    ImagesAtOnceOption,
    JsonOption,
    ModelArgument,
    RatioOption,
    SplitOption,
    StrideOption,
    ViewsOption,
    WeightsOption,
    WorkersOption,
)
from vitrim.cli.tasks import TaskData, candidates, eval_task, open_task
from vitrim.config import closest
from vitrim.errors import ConfigError
from vitrim.model import SparseModel
from vitrim.tools.benchmark import DTYPES
from vitrim.tools.curve import check_plot, draw_curve
from vitrim.tools.evaluate import (
    DenseEvaluation,
    Evaluation,
    Setting,
    evaluate_dense,
    evaluate_settings,
)
from vitrim.tools.hardware import hardware

_BATCH, _TASK_BATCH = 64, 8
"""Images per batch for classifiers, and for detectors and segmenters, whose images are large."""


def eval_command(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Option(
            help="Folder with one folder of images, or of videos, per class, a tar or a CSV of it, "
            "a timm reader name, or an embedded set: digits, moving-digits."
        ),
    ],
    weights: WeightsOption = None,
    keep_ratio: RatioOption = None,
    macs: MacsOption = None,
    calibrate_on: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help=f"For --macs, where it must be calibrated: use {MAX_IMAGES} images of these, "
            "spread evenly, instead of as many of --data. Labels are not used.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw accuracy against MACs here (.png, .pdf, .svg)."),
    ] = None,
    batch: ImagesAtOnceOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use this many images, spread evenly.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 by autocast.")] = "fp32",
    class_map: Annotated[
        Path | None, typer.Option(help="Text file with all class folders in label order.")
    ] = None,
    split: SplitOption = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1.0, help="Share of the resized image to keep; the model's, if not given."
        ),
    ] = None,
    workers: WorkersOption = 2,
    annotations: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For detectors: the json file (COCO) of the images in --data, which otherwise "
            "is a folder with images/ and instances.json in it, or scenes, the embedded set.",
        ),
    ] = None,
    against: AgainstOption = None,
    frames: FramesOption = None,
    stride: StrideOption = None,
    views: ViewsOption = None,
    device: DeviceOption = None,
    json: JsonOption = None,
) -> None:
    """Accuracy of a sparse model beside its dense one, and what it costs.

    With --macs or --keep-ratio one checkpoint is tried at several settings, on the same images.
    A timm name, with or without --weights, measures that dense model alone. For a detector it is
    average precision (COCO's) of boxes and masks, for a segmenter the mean IoU on a folder of
    images and PNG labels, and the cost of its backbone. Videos, in class folders or a CSV of paths
    and labels, are for models of clips, and for models of images, which see frames of them.
    """
    from vitrim.train.data import check_label_space, eval_loader

    common.check_writable(json)
    if plot is not None:
        common.check_writable(plot)
        check_plot(plot)
    ratios = common.numbers(keep_ratio, float, "--keep-ratio") if keep_ratio else []
    budgets = budgets_of(macs)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}{closest(dtype, DTYPES)}; use {' or '.join(DTYPES)}")
    precision, where = DTYPES[dtype], common.device_of(device)
    common.refuse(
        {"--calibrate-on": calibrate_on and not budgets}, "it is for --macs, which is not"
    )
    clip_options = ClipOptions(frames, stride, views)
    if (task := open_task(model)) is not None:
        common.refuse(clip_options.given, f"{model} is a {task.kind}; leave that out")
        common.refuse(
            {"--class-map": class_map, "--crop-pct": crop_pct, "--plot": plot},
            f"{model} is a {task.kind}; leave that out",
        )
        common.refuse(
            {"--calibrate-on": calibrate_on},
            f"{model} is a {task.kind}: calibrate its backbone, vitrim.calibrate(model.backbone, "
            "...), and save it",
        )
        common.refuse(
            {"--weights": weights},
            f"{model} is a {task.kind}, whose dense one is a checkpoint: --against DIR",
        )
        chosen = TaskData(data, annotations, batch or _TASK_BATCH, workers, limit, split)
        compared = candidates(task, ratios, budgets, against)
        eval_task(model, compared, chosen, where, json, dtype)
        return
    common.refuse(
        {"--annotations": annotations, "--against": against},
        f"{model} is a classifier; leave that out (its dense weights: --weights FILE)",
    )
    subject = common.load_model(model, weights if not Path(model).is_dir() else None).to(where)
    _check_together(model, subject, ratios, budgets, plot)

    source, num_classes = common.data_source(data), common.num_classes_of(subject)
    clips: ClipData | None = None
    if is_video(subject, data):
        common.refuse({"--split": split}, f"{data} holds videos; leave that out")
        reading: dict[str, Any] = {
            "batch": batch or _TASK_BATCH,
            "workers": workers,
            "class_map": class_map,
        }
        reading |= {"options": clip_options, "crop_pct": crop_pct}
        open_videos: Any = partial(ClipData.open, subject, **reading)
        clips = open_videos(source, limit=limit)
        loader: Any = clips.loader
    else:
        common.refuse(clip_options.given, f"{data} holds images; leave that out")
        batch = batch or _BATCH
        config = common.data_config_of(subject, source)
        if crop_pct is not None:
            config["crop_pct"] = crop_pct
        options = {"num_classes": num_classes, "class_map": class_map, "split": split}
        loader = eval_loader(source, config, batch, workers, limit, **options)
        check_label_space(loader.dataset, num_classes)
    judged: Any = (lambda model: model) if clips is None else clips.judged

    results: dict[str, Evaluation | DenseEvaluation] = {}
    choices: dict[str, _Choice] = {}
    content: dict[str, Any] = {
        "model": model,
        "data": data,
        "dtype": dtype,
        "hardware": hardware(where),
    }
    if isinstance(subject, SparseModel):
        content["dense_weights"] = "the checkpoint's own" if weights is None else str(weights)
        reference = _reference(subject, weights, where)
        if budgets:
            basis = source if calibrate_on is None else common.data_source(calibrate_on)
            if clips is None:
                images = calibration_loader(
                    *(subject, basis, MAX_IMAGES, batch or _BATCH, workers),
                    crop_pct=crop_pct,
                    split=split,
                )
            else:
                images = [*open_videos(basis, limit=MOST_CALIBRATED).singles(subject)]
            choices = _at_budgets(subject, budgets, images, data, calibrate_on)
        else:
            choices = _at_ratios(subject, ratios)
        settings = {name: choice.set for name, choice in choices.items()}
        with common.progress("evaluating", _length(loader, limit)) as advance:
            results |= evaluate_settings(
                judged(subject),
                loader,
                settings,
                dense=reference if reference is True else judged(reference),
                dtype=precision,
                progress=advance,
            )
    else:
        with common.progress("evaluating", _length(loader, limit)) as advance:
            results["dense"] = evaluate_dense(
                judged(subject), loader, dtype=precision, progress=advance
            )

    _print_evaluations(results, "videos" if clips else "images")
    rows = [
        {"name": name, **(choices[name].facts if name in choices else {}), **found.to_dict()}
        for name, found in results.items()
    ]
    common.write_json(json, content | {"results": rows})
    if plot is not None:
        _draw(plot, Path(model).resolve().name, choices, results)


@dataclass(frozen=True)
class _Choice:
    """One way to set the checkpoint."""

    label: str
    """In the picture."""
    set: Setting
    facts: dict[str, Any]
    """For the record."""


def _check_together(
    name: str,
    subject: nn.Module,
    ratios: Sequence[float],
    budgets: Sequence[float],
    plot: Path | None,
) -> None:
    """Refuse options that do not go together, before any work."""
    if ratios and budgets:
        raise ConfigError("both --keep-ratio and --macs are given; give one of them")
    if isinstance(subject, SparseModel):
        return
    common.refuse(
        {"--keep-ratio": ratios, "--macs": budgets, "--plot": plot}, f"{name!r} is a dense model"
    )


def _at_ratios(subject: SparseModel, ratios: Sequence[float]) -> dict[str, _Choice]:
    """The model at each keep ratio; without ratios, as it is."""
    if not ratios:
        name = common.setting_name(subject)
        return {name: _Choice(name, lambda: None, {})}
    choices, restore = {}, subject.snapshot()
    for ratio in ratios:
        set_ratio = partial(subject.set_keep_ratio, ratio)
        set_ratio()
        name = common.setting_name(subject)
        choices[name] = _Choice(f"r {ratio:g}", set_ratio, {"keep_ratio": ratio})
    restore()
    return choices


def _at_budgets(
    subject: SparseModel,
    budgets: Sequence[float],
    images: Any,
    data: str,
    calibrate_on: str | None,
) -> dict[str, _Choice]:
    """The model at each budget; what is neither formula nor recorded is calibrated on images."""
    found = meet(subject, budgets, images, calibrate_on or data)
    if calibrate_on is None and any(met.set_by.startswith("calibration") for met in found):
        common.note(
            "calibrated on images that are evaluated too, without their labels; "
            "--calibrate-on DIR takes others"
        )
    return {
        f"{subject.method.name} at {met.budget:g}": _Choice(
            f"{met.budget:g}", partial(subject.method.turn, met.value), asdict(met)
        )
        for met in found
    }


def _print_evaluations(results: Mapping[str, Evaluation | DenseEvaluation], what: str) -> None:
    console = common.out()
    console.print(tables.evaluation_table(results, what))
    sparse = {name: found for name, found in results.items() if isinstance(found, Evaluation)}
    if sparse:
        console.print(tables.stage_table(sparse))
    common.name_unreadable(next(iter(results.values())).unreadable)


def _draw(
    path: Path,
    title: str,
    choices: Mapping[str, _Choice],
    results: Mapping[str, Evaluation | DenseEvaluation],
) -> None:
    points = [
        (choices[name].label, found)
        for name, found in results.items()
        if isinstance(found, Evaluation)
    ]
    draw_curve(path, title, points)
    common.note(f"written: {path}")


def _reference(
    subject: SparseModel, weights: Path | None, device: torch.device
) -> bool | nn.Module:
    """The dense model to compare a checkpoint with: its own backbone, or one with ``weights``."""
    if weights is None:
        common.note(
            "dense is the checkpoint's own backbone, as it was fine-tuned; to compare with the "
            "model before that, give its --weights"
        )
        return True
    from vitrim.checkpoint import load_strict, read_weights
    from vitrim.families.described import create_backbone, describe_backbone

    dense = create_backbone(describe_backbone(subject.backbone))
    load_strict(dense, read_weights(weights), str(weights))
    return dense.eval().to(device)


def _length(loader: Any, limit: int | None) -> int | None:
    try:
        total = len(loader.dataset)
    except TypeError:  # a stream
        return limit
    return total if limit is None else min(limit, total)
