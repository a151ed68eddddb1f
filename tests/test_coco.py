"""Data in COCO's form: what pycocotools' users expect, bad records, embedded scenes, metrics."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO

from vitrim import InputError
from vitrim.runtime import UnreadableImageError
from vitrim.tasks import coco
from vitrim.tasks.coco import CocoFolder, run_lengths
from vitrim.tasks.coco_metrics import CocoRecords, bootstrap, coco_metrics, coco_results
from vitrim.tasks.scenes import LABEL_NAMES, Scenes, write_scenes
from vitrim.train.samples import SkipUnreadable, Unreadable

SQUARE = [[2, 3, 8, 3, 8, 9, 2, 9]]


def annotation(number=1, **changes):
    """A good one: a square of 6 x 6 in the first image."""
    good = {"id": number, "image_id": 7, "category_id": 20, "bbox": [2, 3, 6, 6], "iscrowd": 0}
    return good | {"area": 36, "segmentation": SQUARE} | changes


def write_coco(folder, *annotations, images=None, categories=None):
    """Two images, 20 high and 30 wide, of ids 7 and 9; categories 90 (dog) and 20 (cat)."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        pixels = rng.integers(0, 255, size=(20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    size = {"height": 20, "width": 30}
    if images is None:
        images = [{"id": 7, "file_name": "a.png"} | size, {"id": 9, "file_name": "b.png"} | size]
    if categories is None:
        categories = [{"id": 90, "name": "dog"}, {"id": 20, "name": "cat"}]
    content = {"images": images, "annotations": [*annotations], "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "images", folder / "instances.json"


def test_items_have_torchvisions_keys(tmp_path):
    places = write_coco(
        tmp_path, annotation(1), annotation(5, category_id=90, bbox=[-2, 10, 60, 20])
    )
    data = CocoFolder(*places)
    assert data.categories == {1: "cat", 2: "dog"}
    assert data.category_ids == {1: 20, 2: 90}
    image, target = data[0]
    picture = np.asarray(Image.open(places[0] / "a.png"))
    assert torch.equal(image, torch.from_numpy(picture.copy()).permute(2, 0, 1))
    assert target["boxes"].tolist() == [[2, 3, 8, 9], [0, 10, 30, 20]]
    assert target["labels"].tolist() == [1, 2]
    assert target["area"].tolist() == [36, 36]
    assert target["iscrowd"].tolist() == [0, 0]
    assert target["image_id"] == 7
    reference = COCO(str(places[1]))
    for mask, record in zip(target["masks"], reference.loadAnns([1, 5]), strict=True):
        code = reference.annToRLE(record)
        assert mask_tools.area(code) == mask.sum() == 36
        assert mask_tools.encode(np.asfortranarray(mask.numpy()))["counts"] == code["counts"]
    # An image without objects stays one.
    _, nothing = data[1]
    shapes = [tuple(nothing[name].shape) for name in ("boxes", "labels", "masks", "area")]
    assert shapes == [(0, 4), (0,), (0, 20, 30), (0,)]


def test_run_length_codes_and_crowds(tmp_path):
    mask = np.zeros((20, 30), np.uint8)
    mask[3:9, 2:8] = mask[0, 0] = mask[15:, 25:] = 1
    code = mask_tools.encode(np.asfortranarray(mask))
    compressed = {"size": [20, 30], "counts": code["counts"].decode()}
    runs = {"size": [20, 30], "counts": run_lengths(compressed["counts"])}
    assert runs["counts"][:3] == [0, 1, 42]
    places = write_coco(
        tmp_path,
        annotation(1, segmentation=compressed),
        annotation(2, segmentation=runs, iscrowd=1),
    )
    target = CocoFolder(*places).target(0)
    assert (target["masks"].numpy() == mask).all()
    assert target["iscrowd"].tolist() == [0, 1]
    assert len(CocoFolder(*places, crowd=False).target(0)["boxes"]) == 1


def test_areas_that_are_not_given_are_measured(tmp_path):
    plain = annotation(1, bbox=[2, 3, 7, 6])
    del plain["area"]
    places = write_coco(tmp_path, plain)
    assert CocoFolder(*places).target(0)["area"].tolist() == [36]
    boxes = CocoFolder(*places, masks=False).target(0)
    assert boxes["area"].tolist() == [42]
    assert "masks" not in boxes


BAD = {
    "whose polygons have fewer than three points": {"segmentation": [[2, 3, 8, 9]]},
    "whose iscrowd is neither 0 nor 1": {"iscrowd": "no"},
    "whose polygons are no lists of": {"segmentation": [[2, 3, 8, 3, 8, "9"]]},
    "far outside of the image": {"segmentation": [[2, 3, 8, 3, 8, 1e8]]},
    "outlines longer": {"segmentation": [[0, 0, 30, 20] * 400]},
    "without a mask": {"segmentation": []},
    "of another size than the image": {"segmentation": {"size": [30, 20], "counts": [600]}},
    "does not fill the image": {"segmentation": {"size": [20, 30], "counts": [500, 40]}},
    "damaged run-length code": {"segmentation": {"size": [20, 30], "counts": "zzzz"}},
    "of a category that the file does not list": {"category_id": 3},
    "of an image that the file does not list": {"image_id": 8},
    "without a box of four numbers": {"bbox": [1, 2, 3]},
    "whose box has no extent": {"bbox": [2, 3, 0, 6]},
    "whose box has no extent within the image": {"bbox": [40, 3, 5, 6]},
}


@pytest.mark.parametrize("reason", BAD)
def test_annotations_of_no_use_are_counted_and_told(tmp_path, caplog, reason):
    places = write_coco(tmp_path, annotation(1), annotation(44, **BAD[reason]))
    with caplog.at_level(logging.WARNING):
        data = CocoFolder(*places, max_skipped=0.5)
    assert [len(objects) for objects in data.objects.values()] == [1, 0]
    assert len(data.skipped_annotations) == 1
    assert reason in caplog.text
    assert "1 of 2 annotations" in caplog.text
    assert "id 44" in caplog.text
    with pytest.raises(InputError, match=rf"{reason}.* than the share 0.01"):
        CocoFolder(*places)


def test_a_polygon_of_two_points_beside_a_whole_one(tmp_path):
    places = write_coco(tmp_path, annotation(1, segmentation=[[1, 1, 5, 5], *SQUARE]))
    assert CocoFolder(*places).target(0)["masks"].sum() == 36


@pytest.mark.parametrize("spoil", ["absent", "damaged", "of another size"])
def test_images_that_cannot_be_used(tmp_path, caplog, spoil):
    images, file = write_coco(tmp_path, annotation(1), annotation(2, image_id=9))
    if spoil == "absent":
        (images / "b.png").unlink()
        with pytest.raises(InputError, match=r"1 of 2 images .* not in .*images \(b.png\)"):
            CocoFolder(images, file)
        data = CocoFolder(images, file, max_skipped=0.5)
        assert (len(data), len(data.skipped_images), len(data.skipped_annotations)) == (1, 1, 0)
        assert "1 of 2 images" in caplog.text
        return
    if spoil == "damaged":
        (images / "b.png").write_bytes(b"no image")
    else:
        Image.new("RGB", (20, 30)).save(images / "b.png")
    data = CocoFolder(images, file)
    with pytest.raises(UnreadableImageError, match=r"b\.png cannot be read"):
        data[1]
    assert isinstance(SkipUnreadable(data)[1], Unreadable)


def test_files_that_are_refused(tmp_path, monkeypatch, caplog):
    images, file = write_coco(tmp_path, annotation(1))
    whole = json.loads(file.read_text())

    def refused(content, match, **options):
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(InputError, match=match):
            CocoFolder(images, file, **options)

    refused("", "no json file")
    refused("[" * 100_000, "no json file")
    refused({}, "no list of images and annotations and categories")
    refused(whole | {"annotations": []}, "an empty list of annotations")
    refused(whole | {"annotations": [annotation(image_id=3)]}, "no objects .*", max_skipped=1)
    refused(whole | {"categories": [{"id": 1}]}, "expected an id and a name")
    refused(whole | {"categories": whole["categories"] * 2}, "two categories of one id or name")
    refused(whole | {"images": whole["images"] * 2}, "two images of id 7")
    for name in ("../a.png", "/etc/passwd", "C:\\a.png", "x\\..\\..\\a.png"):
        outside = whole["images"][0] | {"file_name": name}
        refused(whole | {"images": [outside]}, "not inside the folder")
    for name in (".", "nul\0", "long" * 99, "\ud800", 3):
        odd = whole["images"][0] | {"file_name": name}
        refused(whole | {"images": [odd]}, "no images", max_skipped=1)
    caplog.text.encode()  # what a stranger's file is called can be written down
    for entry in (3, {"id": True}, {"id": 2**70}, {"id": 1, "file_name": "a.png", "height": 0}):
        refused(whole | {"images": [entry]}, "1 of 1 images .* without")
    refused(whole, "1 categories that the model does not know: 'cat'", classes=("dog", "cow"))
    with pytest.raises(InputError, match=r"folder of images .* does not exist"):
        CocoFolder(tmp_path / "absent", file)
    with pytest.raises(InputError, match="is no file"):
        CocoFolder(images, tmp_path / "absent.json")
    monkeypatch.setattr(coco, "MOST_BYTES", 100)
    refused(whole, "larger than")


def test_classes_of_a_trained_head(tmp_path):
    data = CocoFolder(*write_coco(tmp_path, annotation(1)), classes=("cow", "dog", "cat"))
    assert data.target(0)["labels"].tolist() == [3]
    assert data.category_ids == {2: 90, 3: 20}


def test_scenes_are_a_function_of_the_seed(tmp_path):
    first = write_scenes(tmp_path / "first", 3, seed=3, side=96)
    again = write_scenes(tmp_path / "again", 3, seed=3, side=96)
    other = write_scenes(tmp_path / "other", 3, seed=4, side=96)
    names = [path.relative_to(first) for path in first.rglob("*.*")]
    assert len(names) == 7
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert not any((first / name).read_bytes() == (other / name).read_bytes() for name in names)
    with pytest.raises(InputError, match="is in use"):
        write_scenes(first, 6)
    assert {path.name for path in tmp_path.iterdir()} == {"first", "again", "other"}


def test_the_readers_take_the_scenes(tmp_path):
    folder = write_scenes(tmp_path / "scenes", 5)
    data = CocoFolder(folder / "images", folder / "instances.json")
    assert [*data.categories.values()] == [*LABEL_NAMES[1:]]
    scenes = Scenes("train", 5, image_size=128)
    for index in range(5):
        image, target = data[index]
        assert tuple(image.shape) == (3, 128, 128)
        labels = np.array(Image.open(folder / "labels" / f"{index:06d}.png"))
        objects = scenes.scene(index)[1]
        assert 2 <= len(objects) == len(target["labels"]) <= 6
        for number, found in enumerate(objects):
            assert target["boxes"][number].tolist() == [*found.box]
            assert target["labels"][number] == found.label + 1
            mask = target["masks"][number].numpy().astype(bool)
            assert (mask == found.mask).all()
            assert (labels[mask] == found.label + 1).all()
        assert (labels > 0).sum() == target["masks"].sum()


def answers(data, seed, noise):
    """What a detector of some precision would say."""
    generator, results = torch.Generator().manual_seed(seed), []
    for index in range(len(data)):
        target = data.target(index)
        count = len(target["labels"])
        output = {
            "boxes": target["boxes"] + noise * torch.randn(count, 4, generator=generator),
            "labels": target["labels"],
            "scores": torch.rand(count, generator=generator),
            "masks": target["masks"].unsqueeze(1) * 0.9,
        }
        results += coco_results(data, target["image_id"], output)
    return results


def test_metrics_are_those_of_pycocotools(tmp_path, capsys):
    from pycocotools.cocoeval import COCOeval

    folder = write_scenes(tmp_path / "scenes", 12)
    data = CocoFolder(folder / "images", folder / "instances.json")
    results = answers(data, 0, noise=3)
    found = coco_metrics(data, results)
    assert capsys.readouterr().out == ""
    truth = COCO(str(folder / "instances.json"))
    json.dumps(results)  # plain, as COCO's servers take it
    evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in results]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    expected = [None if value < 0 else 100 * value for value in evaluation.stats[:6].tolist()]
    assert [*found["bbox"].values()] == pytest.approx(expected)
    assert 5 < found["bbox"]["AP"] < 95
    assert found["segm"]["AP"] == pytest.approx(100)
    assert found["segm"]["APl"] is None  # no digit is that large
    assert coco_metrics(data, [], ["bbox"])["bbox"]["AP"] == 0


def test_intervals_over_images(tmp_path):
    folder = write_scenes(tmp_path / "scenes", 12)
    data = CocoFolder(folder / "images", folder / "instances.json")
    good, bad = (CocoRecords(data, answers(data, 0, noise), "bbox") for noise in (1, 4))
    before = good.metrics()
    assert good.average_precision(range(12)) == pytest.approx(before["AP"])
    # Twice the images is as good, and half of them what pycocotools says of them alone.
    assert good.average_precision([*range(12)] * 2) == pytest.approx(before["AP"], abs=3)
    half = good.image_ids[:6]
    results = [result for result in answers(data, 0, 1) if result["image_id"] in half]
    alone = CocoRecords(data, results, "bbox", half).metrics()["AP"]
    assert good.average_precision(range(6)) == pytest.approx(alone)
    assert good.metrics() == before
    low, high = bootstrap(good, draws=40)
    assert low < before["AP"] < high
    low, high = bootstrap(good, bad, draws=40)
    assert 0 < low < before["AP"] - bad.metrics()["AP"] < high
    assert bootstrap(good, good, draws=3) == (0, 0)


def test_bad_predictions(tmp_path):
    places = write_coco(tmp_path, annotation(1))
    data, boxes = CocoFolder(*places), CocoFolder(*places, masks=False)
    good = {"image_id": 7, "category_id": 20, "bbox": [2, 3, 6, 6], "score": 0.5}
    assert coco_metrics(data, [good], ["bbox"])["bbox"]["AP"] == pytest.approx(100)
    for result, match in ((good | {"image_id": 8}, "image 8"), (good | {"score": np.nan}, "NaN")):
        with pytest.raises(InputError, match=match):
            coco_metrics(data, [result], ["bbox"])
    with pytest.raises(InputError, match="predictions have no masks"):
        coco_metrics(data, [good])
    with pytest.raises(InputError, match="read without masks"):
        coco_metrics(boxes, [good], ["segm"])
    # An image that could not be read is not one in which nothing was found.
    shutil.rmtree(places[0])
    assert coco_metrics(data, [good], ["bbox"], [7])["bbox"]["AP"] == pytest.approx(100)
    with pytest.raises(InputError, match="none of the images"):
        coco_metrics(data, [], ["bbox"], [])


def test_crowds_are_ignored_as_pycocotools_does(tmp_path):
    crowd = annotation(2, iscrowd=1, bbox=[10, 3, 15, 15])
    data = CocoFolder(*write_coco(tmp_path, annotation(1), crowd))
    good = {"image_id": 7, "category_id": 20, "bbox": [2, 3, 6, 6], "score": 0.5}
    inside = good | {"bbox": [11, 4, 5, 5], "score": 0.9}
    assert coco_metrics(data, [good, inside], ["bbox"])["bbox"]["AP"] == pytest.approx(100)
