"""Mean IoU and cost of segmenters, all on the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vitrim.errors import InputError
from vitrim.modes import evaluating
from vitrim.tasks.evaluation import DENSE, Costs, TaskEvaluation
from vitrim.tasks.segmentation import Segmenter
from vitrim.tasks.segmentation_batches import SegmentationLoader
from vitrim.tasks.segmentation_metrics import PixelCounts, bootstrap
from vitrim.tools.evaluate import check_weights

NAMES = {"miou": "mIoU", "macc": "mean accuracy", "pixel_acc": "pixel accuracy"}
"""What the measures are called in tables."""


def evaluate_segmenters(
    models: Mapping[str, Segmenter],
    loader: SegmentationLoader,
    *,
    draws: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> dict[str, TaskEvaluation]:
    """One pass over ``loader`` with every segmenter.

    Args:
        models: by name; that which is called ``dense`` is compared with.
        loader: of the images.
        draws: of the images, for the interval of the differences; 0 draws none.
        progress: called after each batch with the number of images seen.

    Raises:
        InputError: there is no image, or weights or scores are not finite.
    """
    for name, model in models.items():
        check_weights(name, model)
    pixels = {name: PixelCounts(model.config.num_classes) for name, model in models.items()}
    costs = {name: Costs(model) for name, model in models.items()}
    seen = 0
    with evaluating(*models.values()):
        for images, labels in loader:
            for name, model in models.items():
                own = images.to(next(model.parameters()).device)
                pixels[name].note(model(own), labels)
                if pixels[name].broken:
                    raise InputError(
                        f"scores of the {name} segmenter hold NaN or infinity; check its weights, "
                        "and that the images are finite and normalised"
                    )
                for image in own.unsqueeze(1):
                    costs[name].add(image)
            seen += len(images)
            if progress is not None:
                progress(seen)
    if not seen:
        raise InputError("not one image could be read; check the data")
    names = tuple(str(file.name) for file in loader.unreadable)
    return {
        name: TaskEvaluation(
            images=seen,
            scores={NAMES[key]: value for key, value in found.metrics().items()},
            differences={} if name == DENSE else _differences(found, pixels.get(DENSE), draws),
            unreadable=names,
            **costs[name].spreads(),
        )
        for name, found in pixels.items()
    }


def _differences(
    own: PixelCounts, dense: PixelCounts | None, draws: int
) -> dict[str, tuple[float, float, float]]:
    """Of the mIoU, with its interval."""
    if dense is None or not draws:
        return {}
    value = own.metrics()["miou"] - dense.metrics()["miou"]
    return {NAMES["miou"]: (value, *bootstrap(own.counts, dense.counts, draws))}
