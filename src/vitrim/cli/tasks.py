"""What ``eval``, ``bench`` and ``info`` do for checkpoints of detectors and segmenters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim import checkpoint
from vitrim.cli import common, tables
from vitrim.config import read_json, to_plain
from vitrim.errors import CheckpointError, ConfigError, InputError
from vitrim.features import FeaturesOnly, TimmPyramid
from vitrim.tasks.evaluation import DENSE, TaskEvaluation, at_settings, dense_twin
from vitrim.tasks.model import TaskModel
from vitrim.tasks.opened import from_pretrained
from vitrim.tools.benchmark import DTYPES, benchmark
from vitrim.tools.hardware import hardware

SCENES = 200
"""Embedded scenes that are evaluated where nobody says how many."""


@dataclass(frozen=True)
class TaskData:
    """What a detector or segmenter is evaluated on, as a command line says it."""

    source: str
    annotations: Path | None = None
    """The json file of a folder of images, for detectors."""
    batch: int = 8
    workers: int = 2
    limit: int | None = None
    split: str | None = None
    """Name of the split's folders, for segmenters."""


def open_task(source: str) -> TaskModel | None:
    """The detector or segmenter in a checkpoint folder; None where ``source`` is none of one."""
    path = Path(source) / checkpoint.CONFIG_FILE
    if not path.is_file():
        return None
    config = read_json(path, CheckpointError)
    if not isinstance(config, Mapping) or "task" not in config:
        return None
    model: TaskModel = from_pretrained(source)
    return model


def candidates(
    model: TaskModel,
    ratios: Sequence[float],
    budgets: Sequence[float],
    against: Path | None = None,
) -> dict[str, TaskModel]:
    """The dense model, and the sparse one at each ratio or budget.

    Args:
        model: as it was saved.
        ratios: keep ratios.
        budgets: shares of the dense MACs.
        against: checkpoint of the dense model; None runs the model's own backbone dense.
    """
    if ratios and budgets:
        raise ConfigError("both --keep-ratio and --macs are given; give one of them")
    if model.sparse is None:
        given = {"--keep-ratio": ratios, "--macs": budgets, "--against": against}
        common.refuse(given, "the checkpoint's backbone is dense")
        return {DENSE: model}
    if against is None:
        common.note(
            "dense is the checkpoint's own backbone, as it was fine-tuned; to compare with the "
            "model before that, give its checkpoint: --against DIR"
        )
        found = {DENSE: dense_twin(model)}
    else:
        found = {DENSE: _dense_of(model, against)}
    settings = [*ratios, *budgets]
    for place, sparse in enumerate(at_settings(model, ratios, budgets)):
        backbone = sparse.sparse
        assert backbone is not None
        name = common.setting_name(backbone)
        found[f"{backbone.method.name} at {settings[place]:g}" if budgets else name] = sparse
    return found


def _dense_of(model: TaskModel, against: Path) -> TaskModel:
    """The dense model in ``against``, of the same task and classes."""
    dense: TaskModel = from_pretrained(against)
    if dense.task != model.task or dense.classes != model.classes:
        raise InputError(f"{against} holds a model for another task, or of other classes")
    return dense if dense.sparse is None else dense_twin(dense)


def eval_task(
    source: str,
    models: Mapping[str, TaskModel],
    data: TaskData,
    device: torch.device,
    json: Path | None,
    dtype: str,
) -> None:
    """Print, and write, how good the models are, and what their backbones cost."""
    for model in models.values():
        model.to(device)
    precision = DTYPES[dtype]
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        results = _evaluate(models, data)
    common.out().print(tables.task_table(results))
    sparse = {name: found for name, found in results.items() if found.stages}
    if sparse:
        common.out().print(tables.stage_table(sparse))
    common.name_unreadable(next(iter(results.values())).unreadable)
    rows = [{"name": name, **found.to_dict()} for name, found in results.items()]
    content = {
        "model": source,
        "data": data.source,
        "dtype": dtype,
        "hardware": hardware(device),
    }
    common.write_json(json, content | {"results": rows})


def _evaluate(models: Mapping[str, Any], data: TaskData) -> dict[str, TaskEvaluation]:
    first = next(iter(models.values()))
    source, count = "scenes/test" if data.source == "scenes" else data.source, data.limit or SCENES
    if first.task == "segmentation":
        common.refuse({"--annotations": data.annotations}, "it is for detectors; leave it out")
        return _evaluate_segmenters(first, models, source, count, data)
    common.refuse({"--split": data.split}, "it is for segmenters; --data names the split's folder")
    from vitrim.tasks.detection_data import DetectionLoader, open_coco
    from vitrim.tasks.detection_evaluation import evaluate_detectors

    folder = open_coco(
        source,
        None if data.annotations is None else str(data.annotations),
        classes=first.classes,
        masks=first.config.has_masks,
        count=count,
        side=first.data_config["input_size"][-1],
    )
    loader = DetectionLoader(folder, data.batch, data.workers, limit=data.limit)
    with common.progress("evaluating", loader.count) as advance:
        return evaluate_detectors(models, loader, progress=advance)


def _evaluate_segmenters(
    first: Any, models: Mapping[str, Any], source: str, count: int, data: TaskData
) -> dict[str, TaskEvaluation]:
    from vitrim.tasks.segmentation_batches import SegmentationLoader, held_out_pairs
    from vitrim.tasks.segmentation_evaluation import evaluate_segmenters

    pairs = held_out_pairs(first, source, split=data.split, count=count)
    loader = SegmentationLoader(pairs, data.batch, data.workers, limit=data.limit)
    with common.progress("evaluating", loader.count) as advance:
        return evaluate_segmenters(models, loader, progress=advance)


class _Whole(nn.Module):
    """A detector on a batch of images of one size, as it is timed."""

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model([*images]) if self.model.task == "detection" else self.model(images)


def bench_task(
    source: str,
    models: Mapping[str, TaskModel],
    size: tuple[int, int] | None,
    batches: Sequence[int],
    json: Path | None,
    **options: Any,
) -> None:
    """Print, and write, the time of the backbones alone, and that of the whole models, on images of
    ``size`` (height, width), which a detector resizes before its backbone sees them.
    """
    first = next(iter(models.values()))
    side = _usual_side(first)
    image = torch.zeros(first.family.in_channels, *(size or (side, side)))
    seen = first.prepared(image.unsqueeze(0))[0]
    kinds: dict[str, tuple[tuple[int, ...], dict[str, nn.Module]]] = {
        "backbone": (seen.shape[1:], {name: _backbone_of(m) for name, m in models.items()}),
        "whole": (image.shape, {name: _Whole(m) for name, m in models.items()}),
    }
    rows = {}
    for kind, (shape, timed) in kinds.items():
        rows[kind] = benchmark(
            {f"{kind}, {name}": model for name, model in timed.items()},
            (shape[0], shape[1], shape[2]),
            batches=batches,
            progress=partial(_tell, kind, shape),
            **options,
        )
        common.out().print(tables.benchmark_table(rows[kind]))
    plain = {kind: [row.to_dict() for row in found] for kind, found in rows.items()}
    common.write_json(json, {"model": source, "rows": plain})


def _tell(kind: str, shape: Sequence[int], text: str) -> None:
    common.note(f"measuring the {kind} on {shape[1]} x {shape[2]} pixels, {text} ...")


def _backbone_of(model: TaskModel) -> nn.Module:
    """The pyramid alone, of a dense model by timm's own forward."""
    pyramid = FeaturesOnly(deepcopy(model.backbone))
    return pyramid if model.sparse is not None else TimmPyramid(pyramid)


def _usual_side(model: TaskModel) -> int:
    sides = getattr(model.config, "short_sides", None)
    return int(sides[-1] if sides else model.data_config["input_size"][-1])


def task_facts(source: str, model: TaskModel) -> dict[str, Any]:
    """What a checkpoint of a detector or segmenter holds, for ``vitrim info``."""
    config, side = checkpoint.read_config(source), _usual_side(model)
    sparse, family = model.sparse, model.family
    grid = family.grid((side, side))
    dense = sum(step.macs for step in family.dense_steps(grid) if step.part != "head")
    facts = {
        "task": f"{model.task}, {getattr(model.config, 'head', '')}".rstrip(", "),
        "classes": ", ".join(model.classes) or "not named",
        "backbone": config["backbone"]["name"],
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}, of the head "
        f"{sum(p.numel() for p in model.head.parameters()):,}",
        "dense": f"{tables.giga(dense)} GMACs of the backbone per image of {side} x {side}",
    }
    if sparse is not None:
        macs = sparse.features_macs((side, side))
        share = "" if macs is None else f", {100 * macs / dense:.0f}% of dense"
        cost = "depends on the image" if macs is None else f"{tables.giga(macs)} GMACs{share}"
        facts |= {"sparse": cost, "method": sparse.method.name}
        facts |= {f"  {name}": value for name, value in to_plain(sparse.config).items()}
    facts |= {f"task.{name}": value for name, value in to_plain(model.config).items()}
    facts["origin"] = config.get("origin") or "not recorded"
    facts["metrics"] = config.get("metrics") or {}
    return facts
