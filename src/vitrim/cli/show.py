"""What ``vitrim show`` does: read images, draw their strips, write them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrim.checkpoint import write_atomic
from vitrim.cli import common
from vitrim.errors import InputError, printable
from vitrim.model import SparseModel
from vitrim.runtime import UnreadableImageError
from vitrim.tools import report, visualize
from vitrim.tools.evaluate import check_answers

_LONGEST = 50
"""Characters of an image's name in that of its strip, of up to four bytes each."""
_ENDS = 4
"""How many of the easiest and of the hardest images are shown first."""


@dataclass(frozen=True)
class ShownImage:
    """A prepared image."""

    name: str
    pixels: Tensor
    """(channels, H, W), as the model takes it."""
    truth: int | None


@dataclass
class Found:
    """What was read, and what could not be."""

    data_config: dict[str, Any]
    class_names: Sequence[str] | None
    images: list[ShownImage] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def read_images(model: SparseModel, sources: Sequence[str], limit: int) -> Found:
    """Read at most ``limit`` images of each file or folder; what is unreadable is noted.

    Raises:
        InputError: a source is absent or empty, or nothing can be read.
    """
    from vitrim.train.data import eval_transform

    config = common.data_config_of(model, sources[0])
    found = Found(config, common.class_names_of(model))
    read_all(sources, eval_transform(config), limit, found)
    return found


def read_all(sources: Sequence[str], transform: Any, limit: int, found: Found) -> None:
    """Read at most ``limit`` images of each source, changed by ``transform``, into ``found``.

    Raises:
        InputError: a source is absent or empty, or nothing can be read.
    """
    for source in sources:
        dataset, names = _open(source, transform, found.data_config["input_size"][-1])
        total = len(dataset)
        count = min(limit, total)
        for index in (place * total // count for place in range(count)):
            _read(dataset, index, names, found)
    if not found.images:
        raise InputError(
            f"not one image could be read: all {len(found.unreadable)} files are damaged or no "
            f"images, such as {found.unreadable[0]}"
        )


def _open(source: str, transform: Any, image_size: int) -> tuple[Any, Callable[[int], str]]:
    """A dataset of the source's images, and the name of each."""
    from vitrim.train.data import is_digits, open_dataset
    from vitrim.train.samples import FolderReader, ReaderDataset

    if is_digits(source):
        name = common.data_source(source)
        digits = open_dataset(name, transform, image_size=image_size)
        return digits, lambda index: f"{name} {index}"
    if Path(source).is_file():
        dataset = ReaderDataset(FolderReader([(Path(source), -1)]), transform, None)
    else:
        dataset = open_dataset(source, transform, labelled=False)
    return dataset, dataset.name


def _read(dataset: Any, index: int, names: Callable[[int], str], found: Found) -> None:
    try:
        pixels, label = dataset[index]
    except UnreadableImageError as error:
        found.unreadable.append(error.name)
        return
    name = printable(names(index))
    found.images.append(ShownImage(name, pixels, label if label >= 0 else None))


def draw(model: SparseModel, found: Found, folder: Path, advance: Callable[[int], None]) -> None:
    """Write a PNG strip per image and ``page.html`` with all of them, after all are drawn.

    Where the counts depend on the image, ``counts.png`` shows their histogram, and the page has it
    first, then the easiest and the hardest images, then all of them in that order.
    """
    device = next(model.parameters()).device
    mean, std = found.data_config["mean"], found.data_config["std"]
    strips: list[tuple[str, list[visualize.Panel]]] = []
    files, counts = {}, []
    for number, shown in enumerate(found.images, 1):
        trace = model.trace(shown.pixels.unsqueeze(0).to(device))
        check_answers(trace)
        picture = visualize.denormalize(shown.pixels, mean, std)
        row = visualize.panels(picture, trace, 0, class_names=found.class_names, truth=shown.truth)
        files[strip_name(number, shown.name)] = png(row)
        strips.append((Path(shown.name).name, row))
        counts.append([int(stage.counts[0]) for stage in trace.stages])
        advance(number)
    means = "each colour is a semantic token, on the patches that it looks at most"
    if not trace.stages:
        means = "it looks at every patch"
    elif trace.stages[0].assignment is None:
        means = "dropped patches are faded"
    if len(strips) > 1 and model.macs() is None:
        histograms = visualize.histograms(counts, trace)
        files["counts.png"] = png(histograms)
        strips = _by_difficulty(strips, counts, histograms)
    note = f"{model.method.name} on {model.backbone.__class__.__name__}: {means}."
    write_page(folder, files, "What the model looks at", note, strips)


def strip_name(number: int, name: str) -> str:
    """The file of an image's strip."""
    stem = re.sub(r"[^\w.-]+", "_", Path(name).stem)[:_LONGEST]
    return f"{number:03d}_{stem}.png"


def write_page(
    folder: Path,
    files: dict[str, bytes],
    title: str,
    note: str,
    strips: Sequence[tuple[str, Sequence[visualize.Panel]]],
) -> None:
    """Write pictures by name, and ``page.html`` with all strips, into a folder made if absent."""
    page = report.gallery(title, note, strips)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(folder / name, content)
    write_atomic(folder / "page.html", page.encode())


def _by_difficulty(
    strips: list[tuple[str, list[visualize.Panel]]],
    counts: list[list[int]],
    histograms: list[visualize.Panel],
) -> list[tuple[str, list[visualize.Panel]]]:
    """The histograms, the easiest and the hardest images, and then all, easiest first."""
    ordered = [strips[place] for place in visualize.easiest_first(counts)]
    ends = [replace(row[-1], title=name) for name, row in ordered]
    shown = min(_ENDS, len(ends) // 2)
    return [
        ("Patches that the images kept", histograms),
        ("The easiest images, which kept least", ends[:shown]),
        ("The hardest images, which kept most", ends[::-1][:shown]),
        *ordered,
    ]


def png(row: Sequence[visualize.Panel]) -> bytes:
    """A strip as a file."""
    buffer = io.BytesIO()
    visualize.lay_out(row).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
