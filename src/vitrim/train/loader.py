"""Training batches in an order that a resumed run finds again, and batches to evaluate on, whatever
a sample is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from vitrim.errors import TrainingError
from vitrim.tasks.base import ALONE, Share
from vitrim.train.recipe import Recipe
from vitrim.train.samples import (
    EpochBatches,
    SeededSamples,
    SeededStream,
    SkipUnreadable,
    Unreadable,
    mix_seed,
)

logger = logging.getLogger(__name__)


class SampleLoader:
    """This process's batches of any epoch, from any batch on, as they were collated.

    Args:
        dataset: of the training samples; map-style, or one of timm's streams.
        recipe: its data and seed are used.
        share: of this process.
        collate: puts items together, :class:`~vitrim.train.samples.Unreadable` ones among them, to
            a batch that has a length and lists these as ``unreadable``.
    """

    def __init__(
        self, dataset: Any, recipe: Recipe, share: Share, collate: Callable[[Any], Any]
    ) -> None:
        data, self.seed, self.rank = recipe.data, recipe.run.seed, share.rank
        self.num_samples = len(dataset)
        self.batches_per_epoch = self.num_samples // (data.batch_size * share.num_processes)
        self.unreadable: set[str] = set()
        self.max_unreadable = data.max_unreadable
        self._streams = isinstance(dataset, IterableDataset)
        common: dict[str, Any] = {
            "num_workers": data.workers,
            "collate_fn": collate,
            "pin_memory": share.pin_memory,
        }
        if self._streams:
            self._stream = SeededStream(dataset, self.seed, share.rank)
            # Readers shuffle by the worker's seed and keep state, so each epoch gets new workers.
            self._generator = torch.Generator()
            common["num_workers"] = max(1, data.workers)
            if hasattr(dataset, "set_loader_cfg"):
                dataset.set_loader_cfg(common["num_workers"])
            self._loader = DataLoader(
                self._stream, data.batch_size, drop_last=True, generator=self._generator, **common
            )
            return
        self._batches = EpochBatches(
            self.num_samples,
            data.batch_size,
            seed=self.seed,
            rank=share.rank,
            num_processes=share.num_processes,
        )
        self._loader = DataLoader(
            SeededSamples(dataset, self.seed, data.curriculum_epochs),
            batch_sampler=self._batches,
            persistent_workers=data.workers > 0,
            **common,
        )

    def batches(self, epoch: int, first: int = 0) -> Iterator[tuple[int, Any]]:
        """Batches of ``epoch`` from number ``first`` on, with their numbers.

        Raises:
            TrainingError: more images than the recipe allows cannot be read, or a whole batch.
        """
        if self._streams:
            self._stream.set_epoch(epoch)
            self._generator.manual_seed(mix_seed(self.seed, 8, epoch, self.rank))
        else:
            self._batches.start(epoch, first)
        for number, batch in enumerate(self._loader, 0 if self._streams else first):
            if number < first:
                continue  # a stream can only be read again from its start
            self._count_unreadable(batch)
            yield number, batch

    def _count_unreadable(self, batch: Any) -> None:
        for unreadable in batch.unreadable:
            if unreadable.name not in self.unreadable:
                logger.warning("left out %s: %s", unreadable.name, unreadable.reason)
                self.unreadable.add(unreadable.name)
        count = len(self.unreadable)
        if count > self.max_unreadable * self.num_samples or not len(batch):
            names = "\n  ".join(sorted(self.unreadable))
            raise TrainingError(
                f"{count} of {self.num_samples} images cannot be read: more than the share "
                f"{self.max_unreadable} of data.max_unreadable, or a whole batch:\n  {names}\n"
                "Repair or remove them; the last saved state of this run is kept"
            )


class HeldOutLoader:
    """This process's share of the data to evaluate on, in order, once per iteration.

    ``unreadable`` names the images that the latest iteration left out.

    Args:
        dataset: of the samples, map-style.
        collate: as that of :class:`SampleLoader`.
        batch_size: images per batch.
        workers: processes that read images; 0 reads in this one.
        share: of this process.
        limit: use this many images, spread evenly; None uses all.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[Any], Any],
        batch_size: int,
        workers: int = 0,
        share: Share = ALONE,
        limit: int | None = None,
    ) -> None:
        self.unreadable: list[Unreadable] = []
        total = len(dataset)
        self.count = total if limit is None else min(limit, total)
        indices = [place * total // self.count for place in range(self.count)]
        self._loader = DataLoader(
            SkipUnreadable(dataset),
            batch_size,
            sampler=indices[share.rank :: share.num_processes],
            num_workers=workers,
            collate_fn=collate,
        )

    def batches(self) -> Iterator[Any]:
        """Batches as they were collated, those without a readable image left out."""
        self.unreadable = []
        for batch in self._loader:
            self.unreadable += batch.unreadable
            if len(batch):
                yield batch
