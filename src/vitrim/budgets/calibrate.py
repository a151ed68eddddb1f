"""Calibration: the dial of a method turned until the mean cost over some images meets a budget.

No labels and no training: only what the images cost is looked at. A pass over the images is one
measurement; the search brackets the budget and closes in on it, a handful of passes in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from vitrim.budget import TOLERANCE, Calibration, Curve, Spread, check_budget
from vitrim.config import require
from vitrim.errors import ConfigError, InputError
from vitrim.model import SparseModel
from vitrim.modes import evaluating
from vitrim.tokens.plain import Sizes
from vitrim.tools.evaluate import check_answers

MAX_IMAGES = 256
"""How many images are looked at, if not said otherwise; 154 MB of them at 224 x 224 pixels."""
MAX_BYTES = 1 << 30
"""No further batch is kept in memory beyond this."""

Prepare = Callable[[Any], tuple[Tensor, Sizes]]
"""From a loader's images to what the backbone sees, and what of it are the images' own sizes."""

Batch = tuple[Tensor, Sizes]
Progress = Callable[[str], None]
"""Told what each pass found."""

_TRIES = 20


@overload
def calibrate(
    sparse: SparseModel,
    loader: Iterable[Any] | None,
    macs: float,
    *,
    tolerance: float = TOLERANCE,
    max_images: int = MAX_IMAGES,
    prepare: Prepare | None = None,
    progress: Progress | None = None,
) -> Calibration: ...


@overload
def calibrate(
    sparse: SparseModel,
    loader: Iterable[Any] | None,
    macs: Sequence[float],
    *,
    tolerance: float = TOLERANCE,
    max_images: int = MAX_IMAGES,
    prepare: Prepare | None = None,
    progress: Progress | None = None,
) -> tuple[Calibration, ...]: ...


def calibrate(
    sparse: SparseModel,
    loader: Iterable[Any] | None,
    macs: float | Sequence[float],
    *,
    tolerance: float = TOLERANCE,
    max_images: int = MAX_IMAGES,
    prepare: Prepare | None = None,
    progress: Progress | None = None,
) -> Calibration | tuple[Calibration, ...]:
    """Turn the method's dial so that the mean cost over the loader's images meets a budget.

    The model is left at the budget, at the first of several, and keeps a record of all of them
    (``sparse.calibration``, in place of an earlier one), from which ``set_budget`` changes between
    them, also after saving and loading. If anything fails, it is left as it was.

    Args:
        sparse: any sparse model whose method has a dial; its mode is restored afterwards.
        loader: batches of images, or of (images, anything), prepared for the model. The first
            ``max_images`` are kept in memory (a gibibyte at most), so they should be of all kinds:
            shuffled, not the first class of a folder. It may be None where every image keeps the
            same number of tokens: then a formula gives the cost.
        macs: share of the dense model's MACs, such as 0.6, or several.
        tolerance: relative difference between mean cost and budget that meets it.
        max_images: look at no more than these.
        prepare: of a detector or segmenter ``model`` whose backbone is calibrated:
            ``model.prepared``. Then the loader's images are what that model itself takes, of any
            sizes; each is looked at alone, and no padding is counted as kept.
        progress: told in words what each pass found.

    Returns:
        what was found: one record, or one per budget.

    Raises:
        ConfigError: a budget is out of reach, or passed over by steps of the cost; the method's
            cost is fixed, or its selector must be trained first.
        InputError: there is no image, the images do not fit the model, or its scores or logits are
            not finite.
    """
    budgets = tuple(macs) if isinstance(macs, Sequence) else (macs,)
    require(len(budgets) > 0, "there is no budget; give a share of the dense MACs, such as 0.6")
    for budget in budgets:
        check_budget(budget)
    require(0 < tolerance < 1, f"tolerance is {tolerance}; expected a share, such as 0.01")
    require(max_images >= 1, f"max_images is {max_images}; expected at least 1")
    method = sparse.method
    method.dial()  # refuses where there is none
    if sparse.is_untrained:
        raise ConfigError(
            f"the selector of {method.name} must be learned, and this one still has the values "
            f"that it was made with; train it first: vitrim train {method.needs_training}"
        )
    restore = sparse.snapshot()
    try:
        if sparse.macs() is None:
            batches = _collect(sparse, loader, max_images, prepare)
            found = _by_images(sparse, batches, budgets, tolerance, progress)
        else:
            found = tuple(_by_formula(sparse, budget, tolerance) for budget in budgets)
        method.turn(found[0].value)
    except BaseException:
        restore()
        raise
    sparse.calibration = found
    return found if isinstance(macs, Sequence) else found[0]


def _by_formula(sparse: SparseModel, budget: float, tolerance: float) -> Calibration:
    sparse.set_budget(budget, tolerance=tolerance)
    dial, macs = sparse.method.dial(), sparse.macs()
    assert macs is not None
    return Calibration(
        budget=budget,
        dial=dial.name,
        value=dial.value,
        fraction=macs / sparse.dense_macs(),
        macs=Spread(float(macs), 0.0, float(macs), float(macs)),
        images=0,
        passes=0,
    )


def _by_images(
    sparse: SparseModel,
    batches: list[Batch],
    budgets: Sequence[float],
    tolerance: float,
    progress: Progress | None,
) -> tuple[Calibration, ...]:
    dial, images = sparse.method.dial(), sum(len(batch) for batch, _ in batches)
    dense = sum(len(batch) * sparse.dense_macs(_size(batch)) for batch, _ in batches)
    measured: dict[float, Tensor] = {}

    def cost(value: float) -> float:
        sparse.method.turn(value)
        measured[value] = macs = _measure(sparse, batches)
        fraction = float(macs.sum()) / dense
        if progress is not None:
            progress(f"{dial.name} {value:.6g}: {100 * fraction:.1f}% of the dense MACs")
        return fraction

    curve = Curve(dial, cost)
    found: list[Calibration] = []
    for budget in budgets:
        before = len(measured)
        position = curve.search(
            budget,
            tolerance=tolerance,
            near_enough=tolerance,
            tries=_TRIES,
            guess=None if found else dial.position(dial.value),
        )
        value = dial.at(position)
        found.append(
            Calibration(
                budget=budget,
                dial=dial.name,
                value=value,
                fraction=curve.at(position),
                macs=Spread.of(measured[value]),
                images=images,
                passes=len(measured) - before,
            )
        )
    return tuple(found)


def _collect(
    sparse: SparseModel, loader: Iterable[Any] | None, max_images: int, prepare: Prepare | None
) -> list[Batch]:
    """The first images of ``loader``, in its batches, checked and prepared for the model."""
    require(
        loader is not None,
        f"the counts of {sparse.method.name} depend on the images; give a loader of some",
    )
    assert loader is not None
    parameter = next(sparse.backbone.parameters())
    batches: list[Batch] = []
    room, num_bytes = max_images, 0
    for images, sizes in _seen(loader, prepare, parameter.device):
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise InputError(
                f"the loader gives {kind}; expected batches of prepared images (float tensors), "
                "or (images, target)"
            )
        if not len(images):  # all of the batch was unreadable
            continue
        images = images[:room]
        sparse.family.check_images(images)
        batches.append((images.to(parameter.dtype), sizes))
        room -= len(images)
        num_bytes += images.nbytes
        if not room or num_bytes >= MAX_BYTES:
            break
    if not batches:
        raise InputError(
            "there is no image to calibrate on: the loader is empty, or nothing in it was readable"
        )
    return batches


def _seen(
    loader: Iterable[Any], prepare: Prepare | None, device: torch.device
) -> Iterator[tuple[Any, Sizes]]:
    """The images of each batch, or what ``prepare`` makes of each image alone."""
    for batch in loader:
        images = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if prepare is None:
            yield images, None
            continue
        for one in range(len(images)):
            alone = images[one : one + 1]
            on_device = alone.to(device) if isinstance(alone, Tensor) else [alone[0].to(device)]
            yield prepare(on_device)


def _measure(sparse: SparseModel, batches: Sequence[Batch]) -> Tensor:
    """(images,): MACs of each image at the present settings."""
    device = next(sparse.backbone.parameters()).device
    macs = []
    with evaluating(sparse):
        for images, sizes in batches:
            trace = sparse.trace(images.to(device), sizes)
            check_answers(trace)
            macs.append(trace.macs.cpu())
    return torch.cat(macs)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]
