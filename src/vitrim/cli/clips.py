"""What ``eval``, ``bench``, ``show`` and ``predict`` do with videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.cli import common
from vitrim.cli.show import Found, ShownImage, png, strip_name, write_page
from vitrim.errors import ConfigError, InputError, printable
from vitrim.model import SparseModel
from vitrim.modes import evaluating
from vitrim.runtime import UnreadableImageError
from vitrim.tasks.clips import VIDEOS, held_out_reader, is_clips, open_clips
from vitrim.tasks.moving_digits import NAME, is_moving_digits
from vitrim.tasks.sampling import Sampling
from vitrim.tasks.video import FRAMES_OF_IMAGES, Views, folded, on_clips, takes_clips
from vitrim.tools import visualize
from vitrim.tools.evaluate import check_answers, check_logits
from vitrim.train.data import EvalLoader, check_label_space, digits_data_config

MOST_CALIBRATED = 64
"""Videos that a budget is calibrated on, where that needs any."""


@dataclass(frozen=True, slots=True)
class ClipOptions:
    """How clips are taken from videos, as a command line says it; None leaves it to the model."""

    frames: int | None = None
    stride: int | None = None
    views: str | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The options by name, to refuse them."""
        return {
            "--frames": self.frames,
            "--stride": self.stride is not None,
            "--views": self.views,
        }

    def sampling(self, model: nn.Module, config: dict[str, Any]) -> Sampling:
        """Which frames ``model`` looks at: an image model at frames from all over the video."""
        frames, stride = self.frames, self.stride
        if takes_clips(model):
            frames = frames or config["frames"]
            stride = config.get("stride", 2) if stride is None else stride
        clips, crops = _views(self.views)
        return Sampling(frames or FRAMES_OF_IMAGES, stride or 0, clips, crops)


def _views(words: str | None) -> tuple[int, int]:
    parts = (words or "1x1").lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and len(part) < 5 for part in parts):
        raise ConfigError(f"--views is {words!r}; expected clips x crops, such as 4x3")
    return int(parts[0]), int(parts[1])


def is_video(model: nn.Module, source: str) -> bool:
    """Whether the data are videos, or the model takes nothing else."""
    return takes_clips(model) or is_clips(source)


def clip_config(model: nn.Module, source: str) -> dict[str, Any]:
    """How frames are prepared for ``model``."""
    config = common.data_config_of(model)
    if is_moving_digits(source) and not getattr(model, "data_config", None):
        config |= digits_data_config(config["input_size"][-1])
    return config


@dataclass(frozen=True)
class ClipData:
    """Videos in batches of views, and the model that answers for them."""

    loader: EvalLoader
    sampling: Sampling

    @classmethod
    def open(
        cls,
        model: nn.Module,
        source: str,
        *,
        options: ClipOptions,
        batch: int,
        workers: int,
        limit: int | None,
        class_map: Path | None = None,
        crop_pct: float | None = None,
    ) -> ClipData:
        """The videos of ``source`` for ``model``."""
        config = clip_config(model, source)
        if crop_pct is not None:
            config["crop_pct"] = crop_pct
        sampling = options.sampling(model, config)
        num_classes = common.num_classes_of(model)
        dataset = open_clips(
            f"{NAME}/test" if source == NAME else source,
            held_out_reader(config, sampling),
            num_classes=num_classes,
            class_map=class_map,
            image_size=config["input_size"][-1],
        )
        check_label_space(dataset, num_classes)
        return cls(EvalLoader(dataset, batch, workers, limit=limit), sampling)

    def judged(self, model: nn.Module) -> Views:
        """``model`` on the batches of the loader."""
        return Views(on_clips(model, self.sampling.frames))

    def singles(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """First views as ``model`` itself takes them, to calibrate on: clips, or their frames."""
        for views, labels in self.loader:
            clips = views[:, 0]
            if takes_clips(model):
                yield clips, labels
            else:
                yield folded(clips), labels.repeat_interleave(self.sampling.frames)


def predict(
    model: nn.Module, sources: Sequence[Path], options: ClipOptions, top: int
) -> Iterator[str]:
    """A line with the likeliest classes of each video.

    Raises:
        InputError: a source is no video that can be read, or the answer is not finite.
    """
    config = clip_config(model, "")
    sampling = options.sampling(model, config)
    judged, names = Views(on_clips(model, sampling.frames)), common.class_names_of(model)
    device = next(model.parameters()).device
    for source in sources:
        dataset = open_clips(source, held_out_reader(config, sampling), labelled=False)
        for index in range(len(dataset)):
            views, _ = dataset[index]
            with evaluating(model):
                logits = judged(views[None].to(device)).float()
            check_logits(dataset.name(index), logits)
            shares, labels = logits[0].softmax(-1).topk(min(top, logits.shape[1]))
            pairs = zip(shares.tolist(), labels.tolist(), strict=True)
            answers = [f"{names[n] if names else n} {share:.1%}" for share, n in pairs]
            yield printable(f"{dataset.name(index)}: {', '.join(answers)}").replace("\n", "\\n")


def read_clips(
    model: SparseModel, sources: Sequence[str], limit: int, options: ClipOptions
) -> Found:
    """Read at most ``limit`` videos of each source; what is unreadable is noted.

    Raises:
        InputError: a source is absent or empty, or nothing can be read.
    """
    config = clip_config(model, sources[0])
    sampling = replace(options.sampling(model, config), clips=1, crops=1)
    found = Found(config, common.class_names_of(model))
    for source in sources:
        dataset = _unlabelled(source, config, sampling)
        total = len(dataset)
        count = min(limit, total)
        for index in (place * total // count for place in range(count)):
            named = f"{source} {index}" if is_moving_digits(source) else dataset.name(index)
            try:
                views, label = dataset[index]
            except UnreadableImageError as error:
                found.unreadable.append(error.name)
                continue
            truth = label if label >= 0 else None
            found.images.append(ShownImage(printable(named), views[0], truth))
            found.class_names = getattr(dataset, "classes", None) or found.class_names
    if not found.images:
        raise InputError(
            f"not one video could be read: all {len(found.unreadable)} files are damaged or no "
            f"videos ({VIDEOS.named}), such as {found.unreadable[0]}"
        )
    return found


def draw_clips(
    model: SparseModel, found: Found, folder: Path, advance: Callable[[int], None]
) -> None:
    """Write a strip of frames per video, and ``page.html`` with all of them, once all are drawn."""
    device, strips, files = next(model.parameters()).device, [], {}
    mean, std = found.data_config["mean"], found.data_config["std"]
    for number, shown in enumerate(found.images, 1):
        clips = shown.pixels.unsqueeze(0).to(device)
        trace = model.trace(clips if model.takes_clips else folded(clips))
        check_answers(trace)
        frames = [visualize.denormalize(frame, mean, std) for frame in shown.pixels.unbind(1)]
        row = visualize.clip_panels(frames, trace, class_names=found.class_names, truth=shown.truth)
        files[strip_name(number, shown.name)] = png(row)
        strips.append((Path(shown.name).name, row))
        advance(number)
    means = "what each frame's tokens are after the last stage"
    if model.takes_clips:
        means = "each colour is a semantic token, on the places that it looks at most"
    note = f"{model.method.name} on {model.backbone.__class__.__name__}: {means}."
    write_page(folder, files, "What the model looks at", note, strips)


def clip_batch(
    model: nn.Module,
    source: str | None,
    options: ClipOptions,
    count: int,
    size: tuple[int, int] | None,
) -> tuple[Tensor | None, tuple[int, ...]]:
    """Clips of ``source`` to time ``model`` on, None where it is None, and the shape of one."""
    config = clip_config(model, source or "")
    sampling = options.sampling(model, config)
    channels, *sides = config["input_size"]
    shape = (channels, sampling.frames, *(size or sides))
    if source is None:
        return None, shape
    dataset = _unlabelled(source, config, sampling)
    loader = EvalLoader(dataset, 1, limit=count)
    clips = [views[:, 0] for views, _ in loader]
    common.name_unreadable(tuple(file.name for file in loader.unreadable))
    if not clips:
        raise InputError(f"{source} has not one readable video")
    return torch.cat(clips), shape


def _unlabelled(source: str, config: dict[str, Any], sampling: Sampling) -> Any:
    """The videos of a source of any layout."""
    return open_clips(
        f"{NAME}/test" if source == NAME else source,
        held_out_reader(config, sampling),
        labelled=False,
        image_size=config["input_size"][-1],
    )
