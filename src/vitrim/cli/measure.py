"""``vitrim eval``, ``vitrim bench`` and ``vitrim show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from vitrim.cli import common, tables
from vitrim.config import closest, from_plain
from vitrim.errors import ConfigError, InputError
from vitrim.methods import method_by_name
from vitrim.model import SparseModel, sparsify
from vitrim.tools.benchmark import DTYPES, benchmark, hardware
from vitrim.tools.evaluate import DenseEvaluation, Evaluation, evaluate, evaluate_dense

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT|MODEL", help="Checkpoint folder, timm model name, or digits_vit."
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu or cuda; CUDA where it is, if not given.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the results here as well.")
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Safetensors file with timm's names: the weights of a timm model, or, with a "
        "checkpoint, those of the dense model to compare with.",
    ),
]
RatioOption = Annotated[
    str | None,
    typer.Option(help="Keep ratios to try instead of the checkpoint's, such as 0.7,0.5."),
]
WorkersOption = Annotated[
    int, typer.Option(min=0, help="Processes that read images; 0 reads in this one.")
]


def eval_command(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Option(
            help="Folder with one folder of images per class, a tar of it, a timm reader name, "
            "or digits, the embedded set."
        ),
    ],
    weights: WeightsOption = None,
    keep_ratio: RatioOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 64,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use this many images, spread evenly.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 by autocast.")] = "fp32",
    class_map: Annotated[
        Path | None, typer.Option(help="Text file with all class folders in label order.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a timm reader.")] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1.0, help="Share of the resized image to keep; the model's, if not given."
        ),
    ] = None,
    workers: WorkersOption = 2,
    device: DeviceOption = None,
    json: JsonOption = None,
) -> None:
    """Accuracy of a sparse model beside its dense one, and what it costs.

    A timm name, with or without --weights, measures that dense model alone.
    """
    from vitrim.train.data import check_label_space, eval_loader

    common.check_writable(json)
    ratios = common.numbers(keep_ratio, float, "--keep-ratio") if keep_ratio else [None]
    precision = _dtype(dtype)
    where = common.device_of(device)
    subject = common.load_model(model, weights if not Path(model).is_dir() else None).to(where)
    if keep_ratio and not isinstance(subject, SparseModel):
        raise ConfigError(f"--keep-ratio is given, but {model!r} is a dense model")
    reference = _reference(subject, weights, where)
    if reference is True and isinstance(subject, SparseModel):
        common.note(
            "dense is the checkpoint's own backbone, as it was fine-tuned; to compare with the "
            "model before that, give its --weights"
        )
    source = common.data_source(data)
    options = {
        "num_classes": common.num_classes_of(subject),
        "class_map": class_map,
        "split": split,
    }

    def measure(name: str) -> Evaluation | DenseEvaluation:
        size = batch
        if isinstance(subject, SparseModel) and subject.macs() is None and batch > 1:
            common.note("each image keeps a count of its own: using batches of one image")
            size = 1
        config = common.data_config_of(subject, source)
        if crop_pct is not None:
            config["crop_pct"] = crop_pct
        loader = eval_loader(source, config, size, workers, limit, **options)
        check_label_space(loader.dataset, common.num_classes_of(subject))
        with common.progress(f"evaluating {name}", _length(loader, limit)) as advance:
            if isinstance(subject, SparseModel):
                return evaluate(subject, loader, dense=reference, dtype=precision, progress=advance)
            return evaluate_dense(subject, loader, dtype=precision, progress=advance)

    results = {}
    for ratio in ratios:
        if ratio is not None and isinstance(subject, SparseModel):
            subject.set_keep_ratio(ratio)
        name = _setting(subject)
        results[name] = measure(name)
    _print_evaluations(results)
    content: dict[str, Any] = {"model": model, "data": data, "dtype": dtype}
    content["hardware"] = hardware(where)
    if isinstance(subject, SparseModel):
        content["dense_weights"] = "the checkpoint's own" if weights is None else str(weights)
    found = [{"name": name, **result.to_dict()} for name, result in results.items()]
    common.write_json(json, content | {"results": found})


def _print_evaluations(results: dict[str, Evaluation | DenseEvaluation]) -> None:
    console = common.out()
    console.print(tables.evaluation_table(results))
    sparse = {name: found for name, found in results.items() if isinstance(found, Evaluation)}
    if sparse:
        console.print(tables.stage_table(sparse))
    _name_unreadable(next(iter(results.values())).unreadable)


def _name_unreadable(names: tuple[str, ...]) -> None:
    if names:
        listed = "\n  ".join(names[:20])
        more = f"\n  and {len(names) - 20} more" if len(names) > 20 else ""
        common.note(f"left out, {len(names)} unreadable image(s):\n  {listed}{more}")


def _reference(subject: nn.Module, weights: Path | None, device: torch.device) -> bool | nn.Module:
    """The dense model to compare a checkpoint with: its own backbone, or one with ``weights``."""
    if weights is None or not isinstance(subject, SparseModel):
        return True
    from vitrim.checkpoint import create_backbone, describe_backbone, load_strict, read_weights

    dense = create_backbone(describe_backbone(subject.backbone))
    load_strict(dense, read_weights(weights), str(weights))
    return dense.eval().to(device)


def _setting(model: nn.Module) -> str:
    """What a result is called: the method and what it is set to."""
    if not isinstance(model, SparseModel):
        return "dense"
    if model.macs() is None:
        return f"{model.method.name}, adaptive"
    ratio = getattr(model.config, "keep_ratio", None)
    return model.method.name if ratio is None else f"{model.method.name} {ratio}"


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}{closest(name, DTYPES)}; use {' or '.join(DTYPES)}")
    return DTYPES[name]


def _length(loader: Any, limit: int | None) -> int | None:
    try:
        total = len(loader.dataset)
    except TypeError:  # a stream
        return limit
    return total if limit is None else min(limit, total)


def bench_command(
    model: ModelArgument,
    method: Annotated[
        str | None,
        typer.Option(help="Method for a timm name; its new parameters are random, as time allows."),
    ] = None,
    keep_ratio: RatioOption = None,
    batch: Annotated[str, typer.Option(help="Images per call.")] = "1,16",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or both.")] = "fp32,bf16",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels; for a timm name.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Through torch.compile.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each model.")] = 15,
    seconds: Annotated[float, typer.Option(min=0, help="Length of a turn.")] = 0.3,
    device: DeviceOption = None,
    json: JsonOption = None,
) -> None:
    """Speed of a sparse model against the dense timm model, in interleaved rounds.

    Efficiency is the measured speed-up over the one that the MACs promise.
    """
    common.check_writable(json)
    batches = common.numbers(batch, int, "--batch")
    dtypes = [name.strip() for name in dtype.split(",")]
    ratios = common.numbers(keep_ratio, float, "--keep-ratio") if keep_ratio else []
    candidates = _candidates(model, method, ratios, image_size)
    sparse = next((m for m in candidates.values() if isinstance(m, SparseModel)), None)
    if sparse is not None and sparse.macs() is None and batches != [1]:
        common.note("each image keeps a count of its own: measuring batches of one image")
        batches = [1]
    shape = _image_shape(sparse or candidates["dense"])
    rows = benchmark(
        candidates,
        shape,
        batches=batches,
        dtypes=dtypes,
        rounds=rounds,
        min_seconds=seconds,
        compile=compile,
        threads=threads,
        device=common.device_of(device),
        progress=lambda text: common.note(f"measuring {text} ..."),
    )
    common.out().print(tables.benchmark_table(rows))
    common.write_json(json, {"model": model, "rows": [row.to_dict() for row in rows]})


def _candidates(
    source: str, method: str | None, ratios: list[float], image_size: int | None
) -> dict[str, nn.Module]:
    """The dense model, and the sparse one at each ratio, all with the same backbone."""
    if method is not None:
        config_class: Any = method_by_name(method).config_class
        if Path(source).exists():
            raise ConfigError(f"{source} is a checkpoint, which has a method; leave --method out")
    model = common.load_model(source, pretrained=False, image_size=image_size)
    if isinstance(model, SparseModel):
        return {"dense": model.backbone} | _at_ratios(model, ratios)
    if method is None:
        if ratios:
            raise ConfigError("--keep-ratio is given for a dense model; name a --method as well")
        return {"dense": model}
    configs = [from_plain(config_class, {"keep_ratio": ratio}) for ratio in ratios]
    found: dict[str, nn.Module] = {"dense": model}
    for config in configs or [config_class()]:
        sparse = sparsify(model, config)
        found[_setting(sparse)] = sparse
    return found


def _at_ratios(model: SparseModel, ratios: list[float]) -> dict[str, nn.Module]:
    if not ratios:
        return {_setting(model): model}
    import copy

    found: dict[str, nn.Module] = {}
    for ratio in ratios:
        changed = copy.deepcopy(model)
        changed.set_keep_ratio(ratio)
        found[_setting(changed)] = changed
    return found


def _image_shape(model: nn.Module) -> tuple[int, int, int]:
    channels, height, width = common.data_config_of(model)["input_size"]
    return channels, height, width


def show_command(
    model: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder.")],
    sources: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE|FOLDER...", help="Images, folders of images, or digits."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")],
    keep_ratio: Annotated[float | None, typer.Option(help="Instead of the checkpoint's.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many images per source.")] = 24,
    device: DeviceOption = None,
) -> None:
    """Draw which patches each stage keeps: PNG files and one page.html."""
    from vitrim.cli.show import draw, read_images

    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; give a folder")
    sparse = common.require_sparse(common.load_model(model), model)
    if keep_ratio is not None:
        sparse.set_keep_ratio(keep_ratio)
    found = read_images(sparse, sources, limit)
    with common.progress("drawing", len(found.images)) as advance:
        draw(sparse.to(common.device_of(device)), found, output, advance)
    _name_unreadable(tuple(found.unreadable))
    common.out().print(f"{len(found.images)} images drawn: {output / 'page.html'}")
