"""``vitrim bench`` and ``vitrim show``."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from vitrim.cli import common, tables
from vitrim.cli.budgets import MacsOption, budgets_of
from vitrim.cli.clips import ClipOptions, clip_batch, draw_clips, is_video, read_clips
from vitrim.cli.images import prepared_images
from vitrim.cli.options import (
    AgainstOption,
    DeviceOption,
    FramesOption,
    JsonOption,
    ModelArgument,
    RatioOption,
    ShareOption,
    StrideOption,
)
from vitrim.cli.tasks import bench_task, open_task
from vitrim.cli.tasks import candidates as task_candidates
from vitrim.errors import ConfigError, InputError
from vitrim.features import FeaturesOnly, TimmPyramid
from vitrim.methods import method_by_name
from vitrim.model import SparseModel, sparsify
from vitrim.modes import evaluating
from vitrim.runtime import check_finite as check_logits
from vitrim.tasks.video import on_clips, takes_clips
from vitrim.tools.benchmark import benchmark
from vitrim.tools.evaluate import check_answers

_MOST_BATCHES = 8


def bench_command(
    model: ModelArgument,
    method: Annotated[
        str | None,
        typer.Option(help="Method for a timm name; its new parameters are random, as time allows."),
    ] = None,
    keep_ratio: RatioOption = None,
    macs: MacsOption = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images to run, of any layout; noise, if not given. Where the counts depend on "
            "the image, noise keeps other numbers of tokens than photographs do."
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Images per call.")] = "1,16",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or both.")] = "fp32,bf16",
    image_size: Annotated[
        str | None,
        typer.Option(
            help="Side in pixels, or height,width; for a timm name, with --features, or of the "
            "images that a detector or segmenter is given."
        ),
    ] = None,
    features: Annotated[
        bool,
        typer.Option("--features", help="The feature pyramid, against timm's own, not the logits."),
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Through torch.compile.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each model.")] = 15,
    seconds: Annotated[float, typer.Option(min=0, help="Length of a turn.")] = 0.3,
    against: AgainstOption = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Clips of so many frames; the model's, if it takes clips."),
    ] = None,
    device: DeviceOption = None,
    json: JsonOption = None,
) -> None:
    """Speed of a sparse model against the dense timm model, in interleaved rounds.

    Efficiency is the measured speed-up over the one that the MACs promise. Of detectors and
    segmenters the backbone alone is timed, and then the whole. Models of clips, and with --frames
    models of images on the frames of clips, are timed on clips.
    """
    common.check_writable(json)
    batches = common.numbers(batch, int, "--batch")
    dtypes = [name.strip() for name in dtype.split(",")]
    ratios = common.numbers(keep_ratio, float, "--keep-ratio") if keep_ratio else []
    if (task := open_task(model)) is not None:
        common.refuse(
            {"--method": method, "--data": data, "--features": features, "--frames": frames},
            f"{model} is a {task.kind}, whose backbone and whole are timed on noise; leave that "
            "out",
        )
        bench_task(
            model,
            task_candidates(task, ratios, budgets_of(macs), against),
            _size(image_size),
            batches,
            json,
            dtypes=dtypes,
            rounds=rounds,
            min_seconds=seconds,
            compile=compile,
            threads=threads,
            device=common.device_of(device),
        )
        return
    common.refuse({"--against": against}, f"{model} is a classifier; leave that out")
    size = _size(image_size)
    candidates = _candidates(model, method, ratios, budgets_of(macs), size, features)
    sparse = next((m for m in candidates.values() if isinstance(m, SparseModel)), None)
    shape: tuple[int, ...] = _image_shape(sparse or candidates["dense"], size)
    images = None
    if frames is not None or takes_clips(candidates["dense"]):
        common.refuse({"--features": features}, "they are of images; leave that out")
        first, count = sparse or candidates["dense"], _MOST_BATCHES * max(batches)
        images, shape = clip_batch(first, data, ClipOptions(frames), count, size)
        candidates = {name: on_clips(each, shape[1]) for name, each in candidates.items()}
    elif data is not None:
        batch_size = max(batches)
        count = _MOST_BATCHES * batch_size
        images = prepared_images(sparse or candidates["dense"], data, count, batch_size)
        height, width = images.shape[2:]
        if (height, width) != shape[1:]:
            raise ConfigError(
                f"--image-size is {image_size}, but images of --data are prepared as {height} x "
                f"{width} pixels; leave one of the two out"
            )
    if images is None and sparse is not None and sparse.macs() is None:
        common.note("counts depend on the image, and noise is none: give images by --data")
    if features:
        pyramids = {name: FeaturesOnly(each) for name, each in candidates.items()}
        candidates = pyramids | {"dense": TimmPyramid(pyramids["dense"])}
    for candidate in candidates.values():
        _check_answers(candidate, shape, images)
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
        images=images,
        progress=lambda text: common.note(f"measuring {text} ..."),
    )
    common.out().print(tables.benchmark_table(rows))
    common.write_json(json, {"model": model, "rows": [row.to_dict() for row in rows]})


def _candidates(
    source: str,
    method: str | None,
    ratios: Sequence[float],
    budgets: Sequence[float],
    image_size: tuple[int, int] | None,
    features: bool,
) -> dict[str, nn.Module]:
    """The dense model, and the sparse one at each ratio or budget, all with the same backbone."""
    if ratios and budgets:
        raise ConfigError("both --keep-ratio and --macs are given; give one of them")
    make_config: Any = None
    if method is not None:
        known = method_by_name(method)
        make_config = known.feature_config if features else known.config_class
        if Path(source).exists():
            raise ConfigError(f"{source} is a checkpoint, which has a method; leave --method out")
    given = None if features and Path(source).exists() else image_size
    model = common.load_model(source, pretrained=False, image_size=given)
    if not isinstance(model, SparseModel):
        if make_config is None:
            if ratios or budgets:
                option = "--keep-ratio" if ratios else "--macs"
                raise ConfigError(f"{option} is given for a dense model; name a --method as well")
            return {"dense": model}
        model = sparsify(model, make_config())
    found: dict[str, nn.Module] = {"dense": model.backbone}
    for ratio in ratios:
        changed = deepcopy(model)
        changed.set_keep_ratio(ratio)
        found[common.setting_name(changed)] = changed
    for budget in budgets:
        changed = deepcopy(model)
        changed.set_budget(budget)
        found[f"{changed.method.name} at {budget:g}"] = changed
    return found if ratios or budgets else found | {common.setting_name(model): model}


def _check_answers(model: nn.Module, shape: Sequence[int], images: Tensor | None) -> None:
    """Refuse to time a model whose answer to the first image, or to noise, means nothing."""
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    image = noise if images is None else images[:1]
    with evaluating(model):
        if isinstance(model, SparseModel):
            check_answers(model.trace(image))
        elif isinstance(model, FeaturesOnly | TimmPyramid):
            for level in model(image):
                check_logits(level.flatten(1).float().numpy())
        else:
            check_logits(model(image).float().numpy())


def _image_shape(model: nn.Module, size: tuple[int, int] | None) -> tuple[int, int, int]:
    channels, height, width = common.data_config_of(model)["input_size"]
    height, width = size or (height, width)
    return channels, height, width


def _size(words: str | None) -> tuple[int, int] | None:
    """Height and width of ``side`` or ``height,width``."""
    if words is None:
        return None
    sides = common.numbers(words, int, "--image-size")
    if len(sides) > 2 or min(sides) < 1:
        raise ConfigError(f"--image-size is {words!r}; expected a side, or height,width, in pixels")
    return sides[0], sides[-1]


def show_command(
    model: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder.")],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE|VIDEO|FOLDER...",
            help="Images, folders of images, digits, or videos, folders of videos, moving-digits.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")],
    keep_ratio: Annotated[float | None, typer.Option(help="Instead of the checkpoint's.")] = None,
    macs: ShareOption = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many images per source.")] = 24,
    against: AgainstOption = None,
    frames: FramesOption = None,
    stride: StrideOption = None,
    device: DeviceOption = None,
) -> None:
    """Draw which patches each stage keeps: PNG files and one page.html. Of detectors and segmenters
    what they find is drawn too, dense beside sparse; of videos a strip of frames.
    """
    from vitrim.cli.show import draw, read_images
    from vitrim.cli.task_show import draw_task, read_task_images

    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; give a folder")
    if keep_ratio is not None and macs is not None:
        raise ConfigError("both --keep-ratio and --macs are given; give one of them")
    clip_options = ClipOptions(frames, stride)
    reads: Any = read_images
    draws: Any = draw
    if (task := open_task(model)) is not None:
        ratios, budgets = ([each] if each is not None else [] for each in (keep_ratio, macs))
        shown: Any = task_candidates(task, ratios, budgets, against)
        found, draws = read_task_images(task, sources, limit), draw_task
        common.refuse(clip_options.given, f"{model} is of images; leave that out")
    else:
        common.refuse({"--against": against}, f"{model} is a classifier; leave that out")
        shown = common.require_sparse(common.load_model(model), model)
        if keep_ratio is not None:
            shown.set_keep_ratio(keep_ratio)
        if macs is not None:
            shown.set_budget(macs)
        if is_video(shown, sources[0]):
            reads, draws = partial(read_clips, options=clip_options), draw_clips
        else:
            common.refuse(clip_options.given, f"{sources[0]} holds images; leave that out")
        found = reads(shown, sources, limit)
    where = common.device_of(device)
    for each in shown.values() if task is not None else (shown,):
        each.to(where)
    with common.progress("drawing", len(found.images)) as advance:
        draws(shown, found, output, advance)
    common.name_unreadable(tuple(found.unreadable))
    what = "video" if draws is draw_clips else "image"
    images = f"1 {what}" if len(found.images) == 1 else f"{len(found.images)} {what}s"
    common.out().print(f"{images} drawn: {output / 'page.html'}", soft_wrap=True)
