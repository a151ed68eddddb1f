"""Average precision and cost of detectors, all on the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vitrim.errors import InputError
from vitrim.modes import evaluating
from vitrim.tasks.coco_metrics import CocoRecords, Result, bootstrap, coco_results
from vitrim.tasks.detection import Detector
from vitrim.tasks.detection_data import DetectionLoader
from vitrim.tasks.detection_task import NAMES, kinds
from vitrim.tasks.evaluation import DENSE, Costs, TaskEvaluation
from vitrim.tools.evaluate import check_weights

MOST_DRAWN = 1000
"""Images over which an interval is drawn; more take minutes."""


def evaluate_detectors(
    models: Mapping[str, Detector],
    loader: DetectionLoader,
    *,
    draws: int = 200,
    progress: Callable[[int], None] | None = None,
) -> dict[str, TaskEvaluation]:
    """One pass over ``loader`` with every detector.

    Args:
        models: by name; that which is called ``dense`` is compared with.
        loader: of the images; its classes are the detectors'.
        draws: of the images, for the interval of the differences; 0 draws none.
        progress: called after each batch with the number of images seen.

    Raises:
        InputError: there is no image, or weights or answers are not finite.
    """
    for name, model in models.items():
        check_weights(name, model)
        known = len(loader.folder.categories)
        if known != model.config.num_classes - 1:
            raise InputError(
                f"the data have {known} categories, and the {name} detector knows "
                f"{model.config.num_classes - 1} beside the background"
            )
    found: dict[str, list[Result]] = {name: [] for name in models}
    costs = {name: Costs(model) for name, model in models.items()}
    ids = list[int]()
    with evaluating(*models.values()):
        for images, targets in loader:
            ids += [target["image_id"] for target in targets]
            for name, model in models.items():
                device = next(model.parameters()).device
                own = [image.to(device) for image in images]
                for target, output in zip(targets, model(own), strict=True):
                    found[name] += coco_results(loader.folder, target["image_id"], output)
                for image in own:
                    costs[name].add([image])
            if progress is not None:
                progress(len(ids))
    if not ids:
        raise InputError("not one image could be read; check the data")
    names = tuple(str(file.name) for file in loader.unreadable)
    records = {
        name: {kind: CocoRecords(loader.folder, found[name], kind, ids) for kind in kinds(model)}
        for name, model in models.items()
    }
    dense = records.get(DENSE)
    drawn = draws if len(ids) <= MOST_DRAWN else 0
    return {
        name: TaskEvaluation(
            images=len(ids),
            scores=_scores(own),
            differences={} if dense is None or name == DENSE else _differences(own, dense, drawn),
            unreadable=names,
            **costs[name].spreads(),
        )
        for name, own in records.items()
    }


def _scores(records: Mapping[str, CocoRecords]) -> dict[str, float | None]:
    return {
        f"{NAMES[kind]} {name}": value
        for kind, record in records.items()
        for name, value in record.metrics().items()
    }


def _differences(
    own: Mapping[str, CocoRecords], dense: Mapping[str, CocoRecords], draws: int
) -> dict[str, tuple[float, float, float]]:
    """Of the AP of boxes and of masks, each with its interval."""
    found = {}
    for kind in own.keys() & dense.keys() if draws else ():
        here, there = own[kind].metrics()["AP"], dense[kind].metrics()["AP"]
        if here is not None and there is not None:
            interval = bootstrap(own[kind], dense[kind], draws)
            found[f"{NAMES[kind]} AP"] = (here - there, *interval)
    return dict(sorted(found.items()))
