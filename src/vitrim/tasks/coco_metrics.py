"""Average precision of detectors, by pycocotools alone, and its interval over images.

Answers are in the form that COCO's servers take: one table per object, with the file's own ids of
images and categories. They are plain data, so processes can gather them and files can keep them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import copy
from io import StringIO
from typing import Any

import numpy as np
from torch import Tensor

from vitrim.errors import InputError, MissingExtraError
from vitrim.tasks.coco import CocoFolder, encoded, mask_tools

KINDS = ("bbox", "segm")
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""COCO's main measures, in its order; small, medium and large are below and above 32 and 96 square.
"""

Result = dict[str, Any]


def coco_results(dataset: CocoFolder, image_id: int, output: dict[str, Tensor]) -> list[Result]:
    """What a torchvision detector found in one image, in COCO's form of results.

    Args:
        dataset: whose categories the labels are.
        image_id: of the image.
        output: ``boxes`` (N, 4) as x1, y1, x2, y2, ``labels`` (N,), ``scores`` (N,), and ``masks``
            (N, 1, H, W) from 0 to 1 where there are masks, all in the image's own pixels.

    Returns:
        Tables of ``image_id, category_id, score, bbox``, and ``segmentation`` (run-length code as
        text). Classes that the data do not have are left out, as nothing can be said of them.
    """
    results = []
    masks = output.get("masks")
    boxes = output["boxes"].double().cpu()
    for number, label in enumerate(output["labels"].tolist()):
        if label not in dataset.category_ids:
            continue
        left, top, right, bottom = boxes[number].tolist()
        result: Result = {
            "image_id": image_id,
            "category_id": dataset.category_ids[label],
            "score": float(output["scores"][number]),
            "bbox": [left, top, right - left, bottom - top],
        }
        if masks is not None:
            mask = (masks[number].squeeze(0) > 0.5).to("cpu").numpy()
            code = mask_tools().encode(np.asfortranarray(mask, np.uint8))
            result["segmentation"] = code | {"counts": code["counts"].decode()}
        results.append(result)
    return results


def coco_metrics(
    dataset: CocoFolder,
    predictions: Sequence[Result],
    kinds: Sequence[str] = KINDS,
    image_ids: Collection[int] | None = None,
) -> dict[str, dict[str, float | None]]:
    """COCO's measures in percent, by kind (``bbox``, ``segm``) and name (:data:`NAMES`).

    Args:
        dataset: the truth, crowd regions included.
        predictions: as :func:`coco_results` makes them.
        kinds: of boxes, of masks, or both.
        image_ids: those that were looked at; None takes all of ``dataset``. An image that could
            not be read must not count as one in which nothing was found.

    Returns:
        None stands where the data have no object of that size.

    Raises:
        InputError: predictions are of other images, or no numbers; there is no image.
        MissingExtraError: pycocotools is not installed.
    """
    return {kind: CocoRecords(dataset, predictions, kind, image_ids).metrics() for kind in kinds}


class CocoRecords:
    """How the predictions for each image match its objects, at every threshold of COCO's.

    Arguments and errors are those of :func:`coco_metrics`, for one ``kind``.
    """

    def __init__(
        self,
        dataset: CocoFolder,
        predictions: Sequence[Result],
        kind: str,
        image_ids: Collection[int] | None = None,
    ) -> None:
        known = {image.id for image in dataset.images}
        self.image_ids = sorted(known if image_ids is None else known.intersection(image_ids))
        if not self.image_ids:
            raise InputError(f"none of the images of {dataset.file} was looked at")
        if kind == "segm" and not dataset.masks:
            raise InputError("the data were read without masks, so masks cannot be measured")
        _check(predictions, set(self.image_ids), kind)
        with _pycocotools() as (truth_class, evaluation_class):
            truth = _truth(truth_class, dataset, self.image_ids)
            found = _found(truth_class, truth, predictions, kind)
            self._evaluation = evaluation_class(truth, found, kind)
            self._evaluation.params.imgIds = self.image_ids
            self._evaluation.evaluate()

    def metrics(self) -> dict[str, float | None]:
        """In percent, by name."""
        evaluation = self._evaluation
        with _pycocotools():
            evaluation.accumulate()
            evaluation.summarize()
        values = evaluation.stats[: len(NAMES)].tolist()
        return {
            name: None if value < 0 else 100 * value
            for name, value in zip(NAMES, values, strict=True)
        }

    def average_precision(self, chosen: Sequence[int]) -> float:
        """AP in percent over the images at the places ``chosen`` in :attr:`image_ids`, one or
        several times each; 0 where they hold no object.
        """
        evaluation, count = copy(self._evaluation), len(self.image_ids)
        parameters = evaluation.params = copy(evaluation.params)
        areas, sizes = len(parameters.areaRng), len(evaluation.evalImgs) // count
        everything = [number for number in range(sizes) if number % areas == 0]
        evaluation.evalImgs = [
            evaluation.evalImgs[number * count + place] for number in everything for place in chosen
        ]
        parameters.imgIds = [*range(len(chosen))]
        parameters.areaRng = parameters.areaRng[:1]
        parameters.maxDets = parameters.maxDets[-1:]
        evaluation._paramsEval = parameters
        with _pycocotools():
            evaluation.accumulate()
        precision = evaluation.eval["precision"]
        return 100 * float(precision[precision > -1].mean()) if (precision > -1).any() else 0.0


def bootstrap(
    records: CocoRecords, other: CocoRecords | None = None, draws: int = 500, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of AP over images drawn with replacement, in percent.

    With ``other``, of the same images, it is the interval of ``records`` minus ``other``, both on
    the same draws.
    """
    if other is not None and other.image_ids != records.image_ids:
        raise InputError("the two records are of different images, so they cannot be paired")
    generator, count = np.random.default_rng(seed), len(records.image_ids)
    values = []
    for _ in range(draws):
        chosen = generator.integers(count, size=count).tolist()
        value = records.average_precision(chosen)
        values.append(value - (other.average_precision(chosen) if other else 0.0))
    low, high = np.percentile(values, (2.5, 97.5)).tolist()
    return low, high


@contextmanager
def _pycocotools() -> Iterator[tuple[Any, Any]]:
    """Its classes of data and evaluation; what they print is not shown."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingExtraError("measuring detectors", "pycocotools", "dense") from error
    with redirect_stdout(StringIO()):
        yield COCO, COCOeval


def _check(predictions: Sequence[Result], images: set[int], kind: str) -> None:
    for result in predictions:
        if result["image_id"] not in images:
            raise InputError(
                f"a prediction is of image {result['image_id']}, which is none of the images that "
                "were looked at"
            )
        if not np.isfinite([result["score"], *result["bbox"]]).all():
            raise InputError(
                f"a box or score of image {result['image_id']} holds NaN or infinity; check the "
                "weights of the model"
            )
        if kind == "segm" and "segmentation" not in result:
            raise InputError("the predictions have no masks; measure boxes alone (bbox)")


def _truth(coco_class: Any, dataset: CocoFolder, image_ids: Sequence[int]) -> Any:
    """The form that pycocotools itself has of the data that were read."""
    images = {image.id: image for image in dataset.images}
    annotations: list[dict[str, Any]] = []
    for number in image_ids:
        for found in dataset.objects[number]:
            annotation = {
                # From 1: the evaluation takes a match with 0 for none.
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": dataset.category_ids[found.label],
                "bbox": list(found.box_XYWH),
                "area": found.area,
                "iscrowd": int(found.is_crowd),
            }
            if dataset.masks:
                annotation["segmentation"] = encoded(found, images[number])
            annotations.append(annotation)
    truth = coco_class()
    truth.dataset = {
        "images": [
            {"id": number, "height": images[number].height, "width": images[number].width}
            for number in image_ids
        ],
        "categories": [{"id": number} for number in sorted(dataset.category_ids.values())],
        "annotations": annotations,
    }
    truth.createIndex()
    return truth


def _found(coco_class: Any, truth: Any, predictions: Sequence[Result], kind: str) -> Any:
    # With both, pycocotools would take a mask's area from its box.
    unused = "segmentation" if kind == "bbox" else "bbox"
    results = [{name: v for name, v in one.items() if name != unused} for one in predictions]
    if results:
        return truth.loadRes(results)
    nothing = coco_class()  # loadRes fails on an empty list
    nothing.dataset = truth.dataset | {"annotations": []}
    nothing.createIndex()
    return nothing
