"""Folders of files with a class each, whatever the files hold: found, ordered, numbered."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from timm.data.imagenet_info import ImageNetInfo

from vitrim.config import read_text
from vitrim.errors import ConfigError, InputError
from vitrim.train.samples import UNLABELLED, is_hidden

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, slots=True)
class FileKind:
    """What is looked for."""

    name: str
    """In messages."""
    suffixes: Sequence[str]
    """In lower case."""

    @property
    def named(self) -> str:
        """The suffixes, for messages."""
        return ", ".join(self.suffixes)


IMAGES = FileKind("image", IMAGE_SUFFIXES)

Samples = list[tuple[Path, int]]
"""Files with their labels."""


def folder_samples(
    path: Path,
    kind: FileKind,
    labelled: bool,
    num_classes: int | None,
    class_map: str | os.PathLike[str] | None,
) -> tuple[Samples, list[str] | None]:
    """The files of a folder with one folder per class, and the classes in label order; of any
    layout, without labels, where none are asked for.

    Raises:
        InputError: there is no file, no class folder, or one without a file.
    """
    if not labelled:
        files = files_in(path, kind)
        if not files:
            raise InputError(f"the data folder {path} holds no {kind.name} ({kind.named})")
        return [(file, UNLABELLED) for file in files], None
    folders = [entry for entry in path.iterdir() if entry.is_dir() and entry.name[0] != "."]
    folders.sort(key=lambda folder: natural(folder.name))
    if not folders:
        nothing = "nothing to read"
        found = f"{kind.name}s but no class folders" if any(files_in(path, kind)) else nothing
        raise InputError(
            f"the data folder {path} holds {found}; expected one folder of {kind.name}s per class"
        )
    inside = {folder: files_in(folder, kind) for folder in folders}
    empty = [folder.name for folder in folders if not inside[folder]]
    if empty:
        raise InputError(
            f"{len(empty)} class folder(s) of {path} hold no {kind.name}: {first_of(empty)}. Add "
            f"{kind.name}s ({kind.named}) or remove the folder; labels would shift otherwise"
        )
    classes = label_order([folder.name for folder in folders], num_classes, class_map)
    number = {name: label for label, name in enumerate(classes)}
    return [(file, number[folder.name]) for folder in folders for file in inside[folder]], classes


def label_order(
    folders: list[str], num_classes: int | None, class_map: str | os.PathLike[str] | None
) -> list[str]:
    """Class names in label order: from the map, from ImageNet-1k, or the folders themselves."""
    if class_map is not None:
        classes = list(class_numbers(class_map))
        unknown = sorted(set(folders) - set(classes))
        if unknown:
            raise InputError(
                f"{class_map} lacks {len(unknown)} class folder(s): {first_of(unknown)}"
            )
        return classes
    if num_classes == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in folders):
        imagenet = list(ImageNetInfo("imagenet-1k").label_names())
        if set(folders) <= set(imagenet):
            return imagenet
    return folders


def class_numbers(class_map: str | os.PathLike[str]) -> dict[str, int]:
    """Labels by class name, of a text file with a name per line."""
    try:
        lines = read_text(Path(class_map)).split("\n")
    except ConfigError as error:
        raise InputError(f"the class map {class_map} cannot be read: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names or len(set(names)) != len(names):
        raise InputError(f"the class map {class_map} is empty or names a class twice")
    return {name: label for label, name in enumerate(names)}


def files_in(folder: Path, kind: FileKind = IMAGES) -> list[Path]:
    """Files of a kind under ``folder`` at any depth, in natural order; hidden ones are left out.
    Links are followed, as timm does, but none upwards, and each folder is read once.
    """
    files: list[Path] = []
    start, seen = folder.resolve(), set[Path]()
    for name, folders, inside in os.walk(folder, followlinks=True):
        here = Path(name)
        above = {start, *start.parents, here.resolve(), *here.resolve().parents}
        found = {(here / inner).resolve(): inner for inner in folders if not is_hidden(inner)}
        folders[:] = [inner for real, inner in found.items() if real not in seen | above]
        seen |= found.keys()
        visible = [here / inner for inner in inside if not is_hidden(inner)]
        files += [path for path in visible if path.suffix.lower() in kind.suffixes]
    return sorted(files, key=lambda path: natural(str(path)))


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``class_2`` before ``class_10``, as timm orders class folders."""
    parts = re.split(r"(\d+)", name.lower())
    whole = (part.lstrip("0") if number % 2 else part for number, part in enumerate(parts))
    return [(len(part) if number % 2 else 0, part) for number, part in enumerate(whole)]


def first_of(names: Sequence[str], count: int = 5) -> str:
    """The first names, for messages."""
    return ", ".join(names[:count]) + (" ..." if len(names) > count else "")
