"""Accuracy and cost of a sparse model beside its dense one, on the same images.

Both models see every batch, so their answers can be compared image by image: the difference of two
accuracies measured on the same images is far more certain than either accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.budget import Spread
from vitrim.costs.macs import counting
from vitrim.errors import InputError, UnsupportedBackboneError
from vitrim.families import family_of
from vitrim.model import SparseModel, Trace
from vitrim.modes import evaluating

Batches = Iterable[tuple[Tensor, Tensor]]
Progress = Callable[[int], None]
"""Called after each batch with the number of images seen so far."""
Setting = Callable[[], None]
"""Sets a model, such as to a keep ratio."""

_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, in percent."""

    top1: float
    top5: float


@dataclass(frozen=True)
class Paired:
    """The sparse model's answers against the dense model's, image by image."""

    won: int
    """Images that only the sparse model gets right."""
    lost: int
    """Images that only the dense model gets right."""
    agreement: float
    """Share of images with the same prediction, right or wrong, in percent."""
    difference: float
    """Sparse minus dense top-1, in points."""
    low: float
    """Lower end of the difference's 95% confidence interval, in points."""
    high: float
    """Upper end of the same interval."""


@dataclass(frozen=True)
class StageKept:
    """How many patches one stage keeps."""

    block: int
    num_patches: int
    """Patches, or positions of the map, that an image has there if nothing is dropped."""
    kept: Spread


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found."""

    images: int
    sparse: Accuracy
    macs: Spread
    """Per image, of the sparse model."""
    dense_macs: int
    """Per image, of its backbone with nothing dropped."""
    stages: tuple[StageKept, ...]
    dense: Accuracy | None = None
    """None where no dense model was asked for."""
    paired: Paired | None = None
    """The same."""
    unreadable: tuple[str, ...] = ()
    """Files that could not be read and were left out."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return _plain(self)


@dataclass(frozen=True)
class DenseEvaluation:
    """What :func:`evaluate_dense` found."""

    images: int
    dense: Accuracy
    dense_macs: int
    """Per image."""
    unreadable: tuple[str, ...] = ()
    """Files that could not be read and were left out."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return _plain(self)


def _plain(found: Evaluation | DenseEvaluation) -> dict[str, Any]:
    """Nested lists and dictionaries; the count of unreadable files stands beside their names."""
    plain = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(found).items()
    }
    return plain | {"num_unreadable": len(found.unreadable)}


def evaluate(
    sparse: SparseModel,
    loader: Batches,
    *,
    dense: bool | nn.Module = True,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Evaluation:
    """One pass over ``loader`` with the sparse and the dense model.

    Args:
        sparse: any sparse model; its mode is restored afterwards.
        loader: batches of images (B, channels, H, W) and class numbers (B,). If it has an attribute
            ``unreadable`` (files with a ``name``), they are reported after the pass.
        dense: True compares with the sparse model's own backbone, nothing dropped; a module, such
            as the model before it was made sparse, is compared instead; False measures none.
        dtype: float32, or bfloat16 for automatic mixed precision.
        progress: called after each batch with the number of images seen.

    Raises:
        InputError: there is no image, weights, answers or the patches' scores are not finite, or
            images and labels misfit.
    """
    as_it_is: dict[str, Setting] = {"": lambda: None}
    found = evaluate_settings(sparse, loader, as_it_is, dense=dense, dtype=dtype, progress=progress)
    return found[""]


def evaluate_settings(
    sparse: Any,
    loader: Batches,
    settings: Mapping[str, Setting],
    *,
    dense: bool | nn.Module = True,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """The same for one model at several settings, in one pass: the dense model runs once.

    The model's settings and mode are restored afterwards. Errors are those of :func:`evaluate`.

    Args:
        sparse: any sparse model, or what runs one on the frames or views of clips.
        loader: as in :func:`evaluate`.
        settings: what sets the model, by name, such as
            ``{"0.5": lambda: sparse.set_keep_ratio(0.5)}``.
        dense: as in :func:`evaluate`.
        dtype: as in :func:`evaluate`.
        progress: as in :func:`evaluate`.
    """
    reference = sparse.backbone if dense is True else dense or None
    dense_answers = None if reference is None else _Answers("dense")
    runs = {name: _Run() for name in settings}
    size: Any = None
    restore = sparse.snapshot()
    check_weights("sparse", sparse)
    if reference is not None:
        check_weights("dense", reference)
    try:
        with evaluating(sparse, *([] if reference is None else [reference])):
            for images, target in _batches(loader, sparse, progress):
                size = size_of(images)
                with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
                    if reference is not None and dense_answers is not None:
                        dense_answers.add(reference(images), target)
                    for name, setting in settings.items():
                        with torch.inference_mode(False):
                            setting()
                        runs[name].add(sparse.trace(images), target)
    finally:
        restore()
    if size is None:
        raise InputError(_nothing_read(loader))
    dense_macs, unreadable = sparse.dense_macs(size), _unreadable(loader)
    return {
        name: run.evaluation(dense_answers, dense_macs, unreadable) for name, run in runs.items()
    }


class _Run:
    """What one setting of a sparse model answers and costs, batch by batch."""

    def __init__(self) -> None:
        self.answers = _Answers("sparse")
        self.macs = _Column(torch.float64)
        self.counts: list[_Column] = []
        self.places: list[tuple[int, int]] = []

    def add(self, trace: Trace, target: Tensor) -> None:
        """Note a batch."""
        self.answers.add(trace.logits, target)
        check_scores(trace)
        self.macs.add(trace.macs)
        self.counts = self.counts or [_Column(torch.int32) for _ in trace.stages]
        for column, stage in zip(self.counts, trace.stages, strict=True):
            column.add(stage.counts)
        self.places = [(stage.block, math.prod(stage.grid)) for stage in trace.stages]

    def evaluation(
        self, dense: _Answers | None, dense_macs: int, unreadable: tuple[str, ...]
    ) -> Evaluation:
        """All of it, beside the dense model's answers."""
        return Evaluation(
            images=self.answers.count,
            sparse=self.answers.accuracy(),
            dense=None if dense is None else dense.accuracy(),
            dense_macs=dense_macs,
            macs=Spread.of(self.macs.values),
            stages=tuple(
                StageKept(block, num_patches, Spread.of(kept.values))
                for (block, num_patches), kept in zip(self.places, self.counts, strict=True)
            ),
            paired=None if dense is None else compare(dense, self.answers),
            unreadable=unreadable,
        )


def evaluate_dense(
    model: nn.Module,
    loader: Batches,
    *,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> DenseEvaluation:
    """The same pass with a dense model alone; arguments and errors as in :func:`evaluate`."""
    answers, one_image = _Answers("dense"), None
    check_weights("dense", model)
    with evaluating(model):
        for images, target in _batches(loader, model, progress):
            one_image = images[:1]
            with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
                answers.add(model(images), target)
    if one_image is None:
        raise InputError(_nothing_read(loader))
    return DenseEvaluation(
        images=answers.count,
        dense=answers.accuracy(),
        dense_macs=dense_macs(model, one_image),
        unreadable=_unreadable(loader),
    )


def size_of(images: Tensor) -> Any:
    """Height and width of images (B, channels, H, W); of clips (B, ..., channels, T, H, W) their
    length too.
    """
    return tuple(images.shape[-2:] if images.ndim == 4 else images.shape[-3:])


def dense_macs(model: nn.Module, images: Tensor) -> int:
    """MACs of one of ``images`` in a dense model: by formula where a family runs the model, or the
    model knows them itself, else counted while the model runs.

    Raises:
        InputError: the model does not take the images.
    """
    known: Any = getattr(model, "dense_macs", None)
    if known is not None and not isinstance(model, SparseModel):
        return int(known(size_of(images)))
    try:
        family = family_of(model)
    except UnsupportedBackboneError:
        return counted_macs(model, images)
    family.check_images(images)
    return family.dense_macs(family.grid(size_of(images)))


def counted_macs(model: nn.Module, images: Tensor) -> int:
    """MACs of one image, counted while any model runs ``images``; two FLOPs are one MAC.

    Raises:
        InputError: the model does not take the images.
    """
    try:
        # Without gradients the counter trips over parameters that enter a module, as PiT's do.
        with (
            evaluating(model),
            torch.inference_mode(False),
            torch.enable_grad(),
            counting() as counter,
        ):
            model(images.clone())
    except AssertionError as error:  # timm's way of refusing a shape
        raise InputError(
            f"the model does not take images of shape {tuple(images.shape)}: {error}"
        ) from error
    return int(counter.get_total_flops()) // 2 // len(images)


def check_weights(name: str, model: nn.Module) -> None:
    """Raise :class:`InputError` where a parameter of the model called ``name`` is not finite."""
    broken = [key for key, value in model.named_parameters() if not bool(value.isfinite().all())]
    if broken:
        raise InputError(
            f"{len(broken)} weights of the {name} model hold NaN or infinity, such as {broken[0]}"
        )


def check_logits(name: str, logits_BC: Tensor) -> None:
    """Raise :class:`InputError` where an answer of the model called ``name`` is not finite."""
    if not bool(torch.isfinite(logits_BC).all()):
        raise InputError(
            f"the {name} model's logits hold NaN or infinity; check its weights, and that the "
            "images are finite and normalised"
        )


def check_scores(trace: Trace) -> None:
    """Raise :class:`InputError` where a stage has no finite score for a patch that reached it: the
    logits need not show it.
    """
    grid, counts_B = None, None
    for stage in trace.stages:
        reached_B = math.prod(stage.grid) if counts_B is None or stage.grid != grid else counts_B
        if bool((stage.scores.isfinite().sum(1) < reached_B).any()):
            raise InputError(
                f"the token scores before block {stage.block} hold NaN or infinity, so what is "
                "kept means nothing; check the weights of the method"
            )
        grid, counts_B = stage.grid, stage.counts


def check_answers(trace: Trace) -> None:
    """Raise :class:`InputError` for logits or scores of a sparse model that mean nothing."""
    check_logits("sparse", trace.logits)
    check_scores(trace)


class _Column:
    """One number per image, in an array made beforehand: small tensors that stay between large
    ones that go would hold the memory of these.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._array, self._count = torch.empty(2**16, dtype=dtype), 0

    def add(self, values: Tensor) -> None:
        """Copy a batch's values (B,)."""
        end = self._count + len(values)
        if end > len(self._array):
            more = self._array.new_empty(max(len(self._array), len(values)))
            self._array = torch.cat([self._array, more])
        self._array[self._count : end] = values
        self._count = end

    @property
    def values(self) -> Tensor:
        """(images,): all that were added."""
        return self._array[: self._count]


class _Answers:
    """Predictions of one model and where the truth stands among them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._predictions, self._ranks = _Column(torch.int32), _Column(torch.int32)

    def add(self, logits_BC: Tensor, target_B: Tensor) -> None:
        """Note a batch; the rank of the truth is the number of classes that come before it: those
        with more, and of those with as much the ones of lower number.
        """
        check_logits(self.name, logits_BC)
        num_classes = logits_BC.shape[1]
        if not bool(((target_B >= 0) & (target_B < num_classes)).all()):
            raise InputError(
                f"labels run from {int(target_B.min())} to {int(target_B.max())}, but the "
                f"{self.name} model has {num_classes} classes (0 to {num_classes - 1})"
            )
        truth_B1 = target_B.unsqueeze(1)
        truth_logit_B1 = logits_BC.gather(1, truth_B1)
        number_C = torch.arange(num_classes, device=logits_BC.device)
        ties_BC = (logits_BC == truth_logit_B1) & (number_C < truth_B1)
        self._ranks.add(((logits_BC > truth_logit_B1) | ties_BC).sum(1))
        self._predictions.add(logits_BC.argmax(1))

    @property
    def count(self) -> int:
        return len(self._ranks.values)

    @property
    def predictions(self) -> Tensor:
        """(images,): class numbers."""
        return self._predictions.values

    @property
    def right(self) -> Tensor:
        """(images,) bool: whether the prediction is the truth."""
        return self._ranks.values == 0

    def accuracy(self) -> Accuracy:
        ranks = self._ranks.values
        top1, top5 = (100 * float((ranks < k).double().mean()) for k in (1, 5))
        return Accuracy(top1, top5)


def compare(dense: _Answers, sparse: _Answers) -> Paired:
    """Both models' answers to the same images, paired."""
    won = int((sparse.right & ~dense.right).sum())
    lost = int((dense.right & ~sparse.right).sum())
    same = dense.predictions == sparse.predictions
    low, high = paired_interval(won, lost, dense.count)
    return Paired(
        won=won,
        lost=lost,
        agreement=100 * float(same.double().mean()),
        difference=100 * (won - lost) / dense.count,
        low=low,
        high=high,
    )


def paired_interval(won: int, lost: int, images: int) -> tuple[float, float]:
    """95% confidence interval, in points, of a difference of proportions from paired answers.

    Agresti and Min's adjusted Wald interval (Statistics in Medicine 24, 2005): half an image is
    added to each cell of the two-by-two table, so that no flips at all still leave a doubt.
    """
    won_adjusted, lost_adjusted, total = won + 0.5, lost + 0.5, images + 2
    centre = (won_adjusted - lost_adjusted) / total
    variance = (won_adjusted + lost_adjusted - total * centre**2) / total**2
    margin = _NORMAL_95 * math.sqrt(variance)
    return 100 * max(-1.0, centre - margin), 100 * min(1.0, centre + margin)


def _batches(
    loader: Batches, model: nn.Module, progress: Progress | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches on the model's device; empty ones (all unreadable) are left out."""
    device = next(model.parameters()).device
    seen = 0
    for images, target in loader:
        if len(images):
            yield images.to(device), target.to(device)
        seen += len(images)
        if progress is not None:
            progress(seen)


def _unreadable(loader: Batches) -> tuple[str, ...]:
    return tuple(str(getattr(file, "name", file)) for file in getattr(loader, "unreadable", ()))


def _nothing_read(loader: Batches) -> str:
    unreadable = _unreadable(loader)
    if unreadable:
        return (
            f"not one image could be read: all {len(unreadable)} files are damaged or no images, "
            f"such as {unreadable[0]}"
        )
    return "there is no image to evaluate on; check the data folder and the limit"
