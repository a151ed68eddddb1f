"""Single samples on their way to a batch: read, named when damaged, seeded, put in order.

In training everything random about sample ``index`` of ``epoch`` is a function of ``(seed, epoch,
index)``, and the order of an epoch one of ``(seed, epoch)``. No state of a worker process enters,
so that a run which was killed goes on exactly where it was, whatever the number of workers.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from vitrim.errors import InputError
from vitrim.runtime import UnreadableImageError, decode, open_file

UNLABELLED = -1

Transform = Callable[[Image.Image], Any]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands in a batch for an image that could not be read, until the collation drops it."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Batch:
    """What the workers hand over."""

    images: Tensor
    """(B, channels, H, W); empty when no image of the batch could be read."""
    labels: Tensor
    """(B,) int64; -1 where there is no label."""
    unreadable: list[Unreadable]

    def __len__(self) -> int:
        return len(self.labels)


class FolderReader:
    """The images under a folder, in a fixed order, in timm's reader protocol."""

    def __init__(self, samples: Sequence[tuple[Path, int]]) -> None:
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return open_file(path), label

    def filename(self, index: int, absolute: bool = False) -> str:
        return str(self.samples[index][0])


class TarReader:
    """The images of an uncompressed tar file, in its order, in timm's reader protocol.

    Unlike timm's it keeps no pickled index, and no open file that forked workers would share.

    Args:
        path: the archive; a class is the folder that directly holds an image. Hidden files, and
            those in hidden folders, are none.
        suffixes: of image files, in lower case.
    """

    def __init__(self, path: Path, suffixes: Sequence[str]) -> None:
        self.path = path
        try:
            with tarfile.open(path, "r:") as archive:
                members = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
        except Exception as error:  # damaged headers raise nearly anything
            raise InputError(f"{path} is not a whole, uncompressed tar file: {error}") from error
        self.members = [
            m for m in members if Path(m[0]).suffix.lower() in suffixes and not is_hidden(m[0])
        ]
        self.labels = [UNLABELLED] * len(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        _, offset, size = self.members[index]
        with open(self.path, "rb") as archive:
            archive.seek(offset)
            return BytesIO(archive.read(size)), self.labels[index]

    def filename(self, index: int, absolute: bool = False) -> str:
        return f"{self.path}:{self.members[index][0]}"

    def folder(self, index: int) -> str:
        """Name of the folder that holds image ``index``."""
        return Path(self.members[index][0]).parent.name


def is_hidden(path: str) -> bool:
    """Whether a part of a relative path starts with a dot, as what programs leave behind does
    (``.ipynb_checkpoints``, ``._1.png``).
    """
    return any(part[0] == "." and part != ".." for part in Path(path).parts)


class ReaderDataset(Dataset[tuple[Any, int]]):
    """Items ``(transform(image), label)`` of a reader; damaged files raise and name themselves.

    Args:
        reader: gives ``(open file, label)`` by index, and ``filename(index)``.
        transform: applied to the RGB image.
        classes: class names in label order, or None where they are not known.
        read: from an open file to what is transformed.
        kind: what messages say that a file should be.
    """

    def __init__(
        self,
        reader: Any,
        transform: Transform | None,
        classes: Sequence[str] | None,
        read: Callable[[Any], Any] = decode,
        kind: str = "an image",
    ) -> None:
        self.reader = reader
        self.transform = transform
        self.classes = classes
        self.read = read
        self.kind = kind

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            file, label = self.reader[index]
            with file:
                image = self.read(file)
            value = image if self.transform is None else self.transform(image)
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            reason = str(error) or repr(error)
            raise UnreadableImageError(self.name(index), reason, self.kind) from error
        return value, UNLABELLED if label is None else int(label)

    def name(self, index: int) -> str:
        """The file behind sample ``index``, as far as its reader knows it."""
        try:
            return str(self.reader.filename(index, absolute=True))
        except Exception:  # the reader may have to open the damaged file to tell its name
            return f"sample {index}"


class SkipUnreadable(Dataset[Any]):
    """``dataset``, with :class:`Unreadable` in the place of what cannot be read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except UnreadableImageError as error:
            return Unreadable(error.name, error.reason)
        except OSError as error:
            return Unreadable(f"sample {index}", str(error))


def collate(items: Sequence[Any]) -> Batch:
    """Stack the readable items and list the others."""
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    readable = [item for item in items if not isinstance(item, Unreadable)]
    images = torch.stack([image for image, _ in readable]) if readable else torch.empty(0)
    labels = [UNLABELLED if label is None else int(label) for _, label in readable]
    return Batch(images, torch.tensor(labels, dtype=torch.int64), unreadable)


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several non-negative numbers, without correlation between neighbours."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators inside, and restore them after.

    The augmentations and mixes of timm and torchvision draw from all three.
    """
    seed = mix_seed(*parts)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class SeededSamples(Dataset[Any]):
    """Training samples by key ``(epoch, index)``; see the module's text.

    Args:
        dataset: map-style; it is told the epoch where it has ``set_epoch``.
        seed: of the run.
        curriculum_epochs: epochs over which the dataset's ``clutter`` rises from 0 to 1.
    """

    def __init__(self, dataset: Any, seed: int, curriculum_epochs: int = 0) -> None:
        self.dataset = SkipUnreadable(dataset)
        self.seed = seed
        self.curriculum_epochs = curriculum_epochs
        self.epoch: int | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        if epoch != self.epoch:
            self._start(epoch)
        with seeded(self.seed, 1, epoch, index):
            return self.dataset[index]

    def _start(self, epoch: int) -> None:
        dataset = self.dataset.dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        if self.curriculum_epochs:
            dataset.clutter = min(1.0, epoch / self.curriculum_epochs)
        self.epoch = epoch


class SeededStream(IterableDataset[Any]):
    """The same for timm's streaming datasets, which share the data out among processes themselves.

    Exact as far as the reader's own order is a function of its seed and the epoch.
    """

    def __init__(self, dataset: Any, seed: int, rank: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.rank = rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch before its iteration begins."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        samples, number = iter(self.dataset), 0
        while True:
            parts = (self.epoch, self.rank, worker.id if worker else 0, number)
            with seeded(self.seed, 1, *parts):
                try:
                    sample = next(samples)
                except StopIteration:
                    return
            yield sample
            number += 1


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """This process's batches of ``(epoch, index)`` keys.

    An epoch is one permutation, cut into global batches that the processes share out in order, so
    that the global batches do not depend on how many processes there are. The last samples that
    fill no global batch are left out.

    Args:
        num_samples: in the data set.
        batch_size: per process.
        seed: of the run.
        rank: of this process.
        num_processes: in all.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, seed: int, rank: int = 0, num_processes: int = 1
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.num_processes = num_processes
        self.epoch = 0
        self.first = 0

    def start(self, epoch: int, first: int = 0) -> None:
        """Make the next iteration give the batches of ``epoch`` from number ``first`` on."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        return self.num_samples // (self.batch_size * self.num_processes) - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 2, self.epoch))
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        for number in range(self.first, self.first + len(self)):
            start = (number * self.num_processes + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[start : start + self.batch_size]]
