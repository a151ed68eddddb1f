"""Folders of images and labels, what is wrong with them, preparation, and the measures."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vitrim
from tests.conftest import images, seeded, tiny_convnext, tiny_pit, tiny_swin, tiny_vit
from tests.training import curve, quiet
from vitrim import ConfigError, InputError, TrainingError
from vitrim.cli import main
from vitrim.runtime import UnreadableImageError
from vitrim.tasks import from_pretrained, upernet
from vitrim.tasks.base import ALONE
from vitrim.tasks.config import TaskRecipe
from vitrim.tasks.detection_task import DetectionTask
from vitrim.tasks.scenes import LABEL_NAMES, open_scenes, write_scenes
from vitrim.tasks.segmentation_data import (
    IGNORED,
    LabelForm,
    Preparation,
    SegmentationFolder,
    find_folders,
)
from vitrim.tasks.segmentation_metrics import bootstrap, pixel_counts, segmentation_metrics
from vitrim.tasks.segmentation_task import SegmentationTask
from vitrim.train.engine import train
from vitrim.train.recipe import MethodRecipe, recipe_from_plain
from vitrim.train.samples import SeededSamples, SkipUnreadable, Unreadable

FORM = LabelForm(num_classes=4)
VALUES = np.array([[0, 1, 2], [3, 255, 0]])


def write_pairs(root, *labels, names="abcdefgh"):
    """Images of the labels' sizes, and the labels as they are."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, label in zip(names, labels, strict=False):
        picture = label if isinstance(label, Image.Image) else Image.fromarray(label)
        Image.new("RGB", picture.size, (250, 0, 0)).save(root / "images" / f"{name}.jpg")
        picture.save(root / "labels" / f"{name}.png")
    return root / "images", root / "labels"


def grey(values=VALUES):
    return np.asarray(values).astype(np.uint8)


def coloured(values=VALUES):
    picture = Image.fromarray(grey(values))
    palette = Image.new("P", picture.size)
    palette.putdata([int(value) for value in grey(values).ravel()])
    palette.putpalette([9, 9, 9] * 256)
    return palette


@pytest.mark.parametrize(
    "label", [grey(), VALUES.astype(np.uint16), coloured()], ids=("grey", "16", "palette")
)
def test_labels_in_eight_and_sixteen_bits_and_of_a_palette(tmp_path, label):
    data = SegmentationFolder(*write_pairs(tmp_path, label), FORM)
    image, labels = data[0]
    assert image.size == (3, 2)
    assert labels.tolist() == [[0, 1, 2], [3, IGNORED, 0]]
    reduced = LabelForm(num_classes=3, reduce_zero_label=True)
    labels = SegmentationFolder(*write_pairs(tmp_path, label), reduced)[0][1]
    assert labels.tolist() == [[IGNORED, 0, 1], [2, IGNORED, IGNORED]]


def test_sixteen_bits_hold_more_classes(tmp_path):
    values = np.array([[0, 300], [255, 65535]], np.uint16)
    form = LabelForm(num_classes=847, ignore_index=65535)
    labels = SegmentationFolder(*write_pairs(tmp_path, values), form)[0][1]
    assert labels.tolist() == [[0, 300], [255, IGNORED]]


def damage_label(folder):
    (folder / "b.png").write_bytes(b"no image")


def other_format(folder):
    Image.fromarray(grey()).save(folder / "b.png", "JPEG")


BAD = {
    "it has 2 x 3 pixels, and its image 3 x 2": Image.fromarray(grey().T.copy()),
    "it holds the number 4; the classes are 0 to 3, and 255 is no class": grey([[0, 1, 4]] * 2),
    "its pixels are RGB; expected class numbers": Image.new("RGB", (3, 2)),
    "its pixels are LA; expected class numbers": Image.new("LA", (3, 2)),
    "cannot identify image file": damage_label,
    "cannot identify image": other_format,
}


@pytest.mark.parametrize("reason", BAD)
def test_labels_that_cannot_be_used_name_themselves(tmp_path, reason):
    images, labels = write_pairs(tmp_path, grey(), grey())
    if callable(BAD[reason]):
        BAD[reason](labels)
    else:
        label = BAD[reason]
        label = label if isinstance(label, Image.Image) else Image.fromarray(label)
        label.save(labels / "b.png")
    data = SegmentationFolder(images, labels, FORM)
    with pytest.raises(UnreadableImageError, match=rf"labels.b\.png cannot be .*{reason}"):
        data[1]
    assert isinstance(SkipUnreadable(data)[1], Unreadable)


def test_images_and_labels_without_the_other_are_counted_and_told(tmp_path, caplog):
    images, labels = write_pairs(tmp_path, *[grey()] * 4)
    (labels / "b.png").unlink()
    (images / "d.jpg").unlink()
    (labels / "notes.txt").write_text("no label")
    with pytest.raises(InputError, match=r"1 of 3 images .* 1 without a label \(b.jpg\)"):
        SegmentationFolder(images, labels, FORM)
    data = SegmentationFolder(images, labels, FORM, max_skipped=0.5)
    assert len(data) == 2
    assert "1 of 3 images" in caplog.text
    assert "1 of 3 labels" in caplog.text
    assert "1 without an image (d.png)" in caplog.text
    for path in labels.glob("*.png"):
        path.unlink()
    with pytest.raises(InputError, match=r"no image of .* has a label"):
        SegmentationFolder(images, labels, FORM, max_skipped=1)
    with pytest.raises(InputError, match="does not exist"):
        SegmentationFolder(images, tmp_path / "absent", FORM)


def test_the_two_forms_of_folders(tmp_path):
    for place in ("images/training", "annotations/training", "images/val", "labels/val"):
        (tmp_path / "ade" / place).mkdir(parents=True)
    root = tmp_path / "ade"
    assert find_folders(root, training=True) == (
        root / "images/training",
        root / "annotations/training",
    )
    assert find_folders(root, training=False) == (root / "images/val", root / "labels/val")
    assert find_folders(root, training=True, split="val")[0] == root / "images/val"
    with pytest.raises(InputError, match="expected images/test and annotations/test"):
        find_folders(root, training=True, split="test")
    # All splits together are never meant.
    for folder in (root / "annotations", root / "labels"):
        for split in folder.iterdir():
            split.rmdir()
    with pytest.raises(InputError, match="no folders of images and labels"):
        find_folders(root, training=True)
    (tmp_path / "pairs" / "images").mkdir(parents=True)
    (tmp_path / "pairs" / "labels").mkdir()
    found = find_folders(tmp_path / "pairs", training=False)
    assert found == (tmp_path / "pairs/images", tmp_path / "pairs/labels")


def prepare(**changes):
    fields = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "crop": (16, 24)}
    return Preparation(**(fields | {"short_side": 20, "long_side": 60} | changes))


def checked(side=40):
    """An image whose red tells the class, in quarters."""
    labels = np.zeros((side, 2 * side), np.int64)
    labels[: side // 2] = 1
    labels[:, side:] += 2
    pixels = np.repeat((labels * 80)[..., None], 3, axis=-1).astype(np.uint8)
    return Image.fromarray(pixels), labels


def test_crops_keep_image_and_labels_together():
    image, labels = checked()
    classes = set()
    for seed in range(12):
        random.seed(seed)
        torch.manual_seed(seed)
        pixels, found, size = prepare().training(image, labels)
        assert (tuple(pixels.shape), tuple(found.shape)) == ((3, 16, 24), (16, 24))
        height, width = size.tolist()
        assert (found[height:] == IGNORED).all()
        assert (found[:, width:] == IGNORED).all()
        assert not pixels[:, height:].any()
        assert not pixels[:, :, width:].any()
        red = (pixels[0, :height, :width] * 0.25 + 0.5) * 255 / 80
        right = (red.round() == found[:height, :width]).float().mean()
        assert right > 0.8  # but for the edges between classes
        classes |= set(found[:height, :width].unique().tolist())
        flipped = prepare(hflip=1.0, scale=(1.0, 1.0), crop=(20, 40)).training(image, labels)[1]
        assert flipped[0, 0] == 3
    assert classes == {0, 1, 2, 3}


def test_small_images_are_padded():
    image, labels = checked()
    pixels, found, size = prepare(scale=(0.5, 0.5)).training(image, labels)
    assert size.tolist() == [10, 20]
    assert (found >= 0).sum() == 200
    assert not pixels[:, 10:].any()


def test_evaluation_looks_at_the_whole_image():
    image, labels = checked()
    pixels, found = prepare().evaluation(image, labels)
    assert tuple(pixels.shape) == (3, 20, 40)
    assert torch.equal(found, torch.from_numpy(labels))
    wide = prepare(long_side=30).evaluation(image, labels)[0]
    assert tuple(wide.shape) == (3, 15, 30)


def test_samples_are_a_function_of_seed_and_place(tmp_path):
    folder = write_scenes(tmp_path / "scenes", 3)
    preparation = prepare(crop=(96, 96), short_side=128, long_side=128, color_jitter=0.4)
    places = find_folders(folder, training=True)
    data = SegmentationFolder(*places, LabelForm(num_classes=11), preparation.training)
    first, again, other = (SeededSamples(data, seed) for seed in (0, 0, 1))
    again[0, 1]
    for key in ((0, 2), (1, 2)):
        assert all(map(torch.equal, first[key], again[key]))
        assert not torch.equal(first[key][0], other[key][0])
    assert not torch.equal(first[0, 2][0], first[1, 2][0])


def test_embedded_scenes_are_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = open_scenes("scenes/val", 2)
    inode = (folder / "instances.json").stat().st_ino
    assert open_scenes("scenes/val", 2) == folder
    assert (folder / "instances.json").stat().st_ino == inode
    with pytest.raises(InputError, match="none of the embedded scenes"):
        open_scenes("scenes", 2)
    (tmp_path / "vitrim").rename(tmp_path / "moved")
    (tmp_path / "vitrim").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        open_scenes("scenes/val", 2)


def test_measures_are_those_of_the_confusion_matrix():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 3, (4, 20, 30), generator=generator)
    labels[labels < 0] = IGNORED
    wrong = torch.rand(labels.shape, generator=generator) < 0.3
    predicted = torch.where(wrong, torch.randint(0, 5, labels.shape, generator=generator), labels)
    predicted[predicted < 0] = 4
    counts = torch.stack(
        [pixel_counts(p, truth, 6) for p, truth in zip(predicted, labels, strict=True)]
    )
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    for truth, p in zip(labels.ravel().tolist(), predicted.ravel().tolist(), strict=True):
        if truth >= 0:
            matrix[truth, p] += 1
    right, there, said = matrix.diag(), matrix.sum(1), matrix.sum(0)
    iou = (right / (there + said - right))[:5]  # class 5 does not occur
    found = segmentation_metrics(counts.sum(0))
    assert found["miou"] == pytest.approx(100 * float(iou.mean()))
    assert found["macc"] == pytest.approx(100 * float((right / there)[:3].mean()))
    assert found["pixel_acc"] == pytest.approx(100 * float(right.sum() / matrix.sum()))
    low, high = bootstrap(counts)
    assert low < found["miou"] < high
    better = torch.stack([pixel_counts(truth, truth, 6) for truth in labels])
    low, high = bootstrap(better, counts)
    assert 0 < low < 100 - found["miou"] < high
    assert bootstrap(counts, counts) == (0, 0)


SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 1, 2, 2],
    "num_classes": 10,
    "drop_path_rate": 0.1,
    "strict_img_size": False,
}
NARROW = {"channels": 16, "aux_channels": 8, "norm": "group", "dropout": 0.0}


def segmenters():
    """One of every kind of backbone, dense and sparse."""
    spatial, tokens = vitrim.DynamicSpatialConfig(keep_ratio=0.7), vitrim.DynamicViTConfig
    return {
        "swin": tiny_swin(),
        "spatial swin": vitrim.sparsify(tiny_swin(), spatial),
        "spatial convnext": vitrim.sparsify(tiny_convnext(), spatial),
        "pit": tiny_pit(),
        "vit": tiny_vit(),
        "sparse vit": vitrim.sparsify(tiny_vit(), tokens(stages=(1, 2))),
    }


@pytest.mark.parametrize("kind", segmenters().keys())
def test_two_lines_make_a_segmenter_of_any_backbone(tmp_path, kind):
    segmenter = upernet(segmenters()[kind], num_classes=5, **NARROW)
    pixels, labels = images(), torch.randint(-1, 5, (2, 32, 32), generator=seeded(0))
    segmenter.train()
    assert segmenter(pixels).shape == (2, 5, 32, 32)
    terms = segmenter.losses(pixels, labels, generator=seeded(1))
    assert ("ratio" in terms) == (" " in kind)
    parts = sum(value.detach() for name, value in terms.items() if name != "total")
    assert float(terms["total"].detach()) == pytest.approx(float(parts), rel=1e-5)
    again = segmenter.losses(pixels, labels, generator=seeded(1))
    assert torch.equal(again["segmentation"], terms["segmentation"])
    terms["total"].backward()
    assert all(p.grad is not None for p in segmenter.head.parameters())
    segmenter.eval()
    segmenter.save_pretrained(tmp_path / "model")
    read = from_pretrained(tmp_path / "model")
    assert torch.equal(read(pixels), segmenter(pixels))
    assert read.config == segmenter.config


def test_a_segmenter_of_which_nothing_is_dropped_is_its_dense_one():
    dense = upernet(tiny_swin(), num_classes=5, **NARROW).eval()
    backbone = vitrim.sparsify(tiny_swin(), vitrim.DynamicSpatialConfig(keep_ratio=(1.0, 1.0, 1.0)))
    sparse = upernet(backbone, num_classes=5, **NARROW).eval()
    sparse.head.load_state_dict(dense.head.state_dict())
    torch.testing.assert_close(sparse(images()), dense(images()))
    # The backbone inside is a sparse model like every other.
    assert len(sparse.backbone.trace(images()).stages) == 3
    sparse.backbone.set_keep_ratio((0.9, 0.7, 0.5))
    assert not torch.allclose(sparse(images()), dense(images()))
    # What the paper's authors fine-tune is the distance to the dense pyramid: here none.
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    sparse.backbone.set_keep_ratio((1.0, 1.0, 1.0))
    terms = sparse.train().losses(images(), labels, teacher=dense, pyramid_weight=0.5)
    assert terms["pyramid"] >= 0


def test_backbones_without_a_map_are_refused():
    with pytest.raises(ConfigError, match="stvit"):
        upernet(vitrim.sparsify(tiny_vit(), vitrim.STViTConfig()), num_classes=5)
    with pytest.raises(ConfigError, match=r"reductions of \[7\] pixels"):
        upernet(tiny_vit(patch_size=7, img_size=28), num_classes=5)
    with pytest.raises(vitrim.UnsupportedBackboneError, match="ResNet"):
        upernet(timm.create_model("resnet10t"), num_classes=5)


def test_images_of_any_size_are_padded_out_of_sight():
    model = vitrim.sparsify(
        tiny_swin(strict_img_size=False), vitrim.DynamicSpatialConfig(keep_ratio=0.7)
    )
    segmenter = upernet(model, num_classes=5, **NARROW).eval()
    odd = images(size=29)
    assert segmenter(odd).shape == (2, 5, 29, 29)
    padded = torch.nn.functional.pad(odd, (0, 3, 0, 3), value=7.0)
    seen = segmenter(padded, [(29, 29)] * 2)[..., :29, :29]
    torch.testing.assert_close(seen, segmenter(odd), rtol=1e-3, atol=1e-4)


def test_the_loss_leaves_pixels_without_a_class_out():
    segmenter = upernet(tiny_swin(), num_classes=5, **NARROW).eval()
    pixels, labels = images(), torch.randint(0, 5, (2, 32, 32), generator=seeded(0))
    scores = segmenter(pixels)
    labels[:, :16] = IGNORED
    terms = segmenter.losses(pixels, labels)
    due = torch.nn.functional.cross_entropy(scores[:, :, 16:], labels[:, 16:])
    torch.testing.assert_close(terms["segmentation"], due / 2)
    labels[0, 20, 3] = 5
    with pytest.raises(InputError, match="labels go up to 5; the segmenter knows 5 classes"):
        segmenter.losses(pixels, labels)
    with pytest.raises(InputError, match=r"labels have shape \(2, 16, 32\)"):
        segmenter.losses(pixels, labels[:, 16:])
    for change, match in (
        ({"num_classes": 1}, "num_classes is 1"),
        ({"classes": ("a", "b")}, "2 classes are named; num_classes is 5"),
        ({"short_side": 9000, "long_side": 100}, "the longer one last"),
        ({"chanels": 3}, "chanels"),
    ):
        with pytest.raises((ConfigError, TypeError), match=match):
            upernet(tiny_swin(), **({"num_classes": 5} | change))


def recipe(**changes):
    data = {
        "name": "tiny-segmenter",
        "task": {"name": "segmentation", "num_classes": 11, "short_side": 32, "long_side": 64},
        "model": {"name": "swin_tiny_patch4_window7_224", "kwargs": SWIN, "init": "fan_in"},
        "method": {"name": "dynamic_spatial", "keep_ratio": [0.9, 0.7]},
        "data": {"train": "scenes/train", "val": "scenes/val", "length": 8, "val_length": 4},
        "optim": {"lr": 3e-3},
        "run": {"epochs": 2, "log_every": 1, "tensorboard": False, "checkpoint_steps": 1},
    }
    data["method"]["stages"] = [0, 1]
    data["task"] |= NARROW
    data["data"] |= {"image_size": 48, "batch_size": 4, "workers": 0}
    for place, value in changes.items():
        table, key = place.split("__")
        data.setdefault(table, {})[key] = value
    return recipe_from_plain(data)


@pytest.fixture(scope="module", autouse=True)
def scenes(tmp_path_factory):
    """The embedded scenes are written into a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_a_run_that_was_stopped_goes_on_exactly(tmp_path):
    config = recipe(task__pyramid_weight=0.1, task__dropout=0.1)
    whole = train(config, tmp_path / "whole", on_progress=quiet)
    assert set(whole.metrics) >= {"val_miou", "val_macc", "val_pixel_acc"}
    assert whole.metrics["val_images"] == 4

    def stop(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", on_progress=stop)
    train(config, tmp_path / "parts", on_progress=quiet)
    assert curve(tmp_path / "parts")[-1] == curve(tmp_path / "whole")[-1]
    first = curve(tmp_path / "whole")[0]
    assert {"segmentation", "auxiliary", "ratio", "pyramid"} <= first.keys()
    read = from_pretrained(tmp_path / "whole" / "checkpoint")
    assert read.classes == LABEL_NAMES
    assert read.sparse.method.name == "dynamic_spatial"


def test_a_dense_segmenter_is_made_sparse_by_a_recipe(tmp_path):
    dense = recipe(run__epochs=1)
    dense = dataclasses.replace(dense, method=MethodRecipe())
    train(dense, tmp_path / "dense", on_progress=quiet)
    folder = str(tmp_path / "dense" / "checkpoint")
    read = from_pretrained(folder)
    assert read.sparse is None
    start = {"model__checkpoint": folder, "model__name": None, "model__init": "timm"}
    task = SegmentationTask.create(recipe(**start))
    assert task.model.sparse.method.name == "dynamic_spatial"
    for own, other in zip(task.model.head.parameters(), read.head.parameters(), strict=True):
        assert torch.equal(own, other)
    for own, other in zip(
        task.model.timm_model.parameters(), read.timm_model.parameters(), strict=True
    ):
        assert torch.equal(own, other)
    detector = recipe(**start)
    table = TaskRecipe(name="detection", config={"num_classes": 11})
    with pytest.raises(ConfigError, match="holds a model for segmentation"):
        DetectionTask.create(dataclasses.replace(detector, task=table))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"augment__mixup": 0.2}, "augment.mixup is not for segmentation"),
        ({"task__num_classes": 5}, "the embedded scenes have 11"),
        ({"task__norm": "batch", "data__batch_size": 1}, "set task.norm = 'group'"),
        ({"data__labels": False}, "data.labels is false"),
        ({"model__teacher": False, "task__pyramid_weight": 1.0}, "model.teacher = true"),
        ({"task__scale": [2.0, 1.0]}, "the smaller first"),
    ],
)
def test_recipes_that_are_refused(tmp_path, change, match):
    with pytest.raises(ConfigError, match=match):
        train(recipe(**change), tmp_path / "run", on_progress=quiet)
    assert not (tmp_path / "run").exists()


def write_checkpoint(folder):
    backbone = vitrim.sparsify(
        tiny_swin(strict_img_size=False), vitrim.DynamicSpatialConfig(keep_ratio=0.7)
    )
    segmenter = upernet(
        backbone, 11, short_side=32, long_side=64, classes=LABEL_NAMES, **NARROW
    ).eval()
    segmenter.data_config |= {"input_size": [3, 48, 48]}
    segmenter.save_pretrained(folder)


def run(capsys, *arguments):
    """Exit code, standard output, error stream."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_commands(capsys, tmp_path):
    model, quiet = tmp_path / "model", ("--device", "cpu")
    write_checkpoint(model)
    report = tmp_path / "eval.json"
    options = ("--limit", 5, "--workers", 0, "--keep-ratio", "0.9,0.7", "--json", report, *quiet)
    code, out, err = run(capsys, "eval", model, "--data", "scenes", *options)
    assert code == 0, err
    assert all(word in out for word in ("mIoU", "dense", "dynamic_spatial 0.9", "before block"))
    rows = json.loads(report.read_text())["results"]
    assert [row["name"] for row in rows] == ["dense", "dynamic_spatial 0.9", "dynamic_spatial 0.7"]
    macs = [row["macs"]["mean"] for row in rows]
    assert macs[0] == rows[2]["dense_macs"]["mean"] > macs[1] > macs[2]
    for row in rows[1:]:
        value, low, high = row["differences"]["mIoU"]
        assert low <= value <= high
    # A pair of folders, in which something is wrong.
    images, labels = write_pairs(tmp_path / "pairs", *[grey()] * 3)
    (images / "a.jpg").write_bytes(b"no image")
    Image.fromarray(grey(VALUES * 4)).save(labels / "b.png")
    code, out, err = run(capsys, "eval", model, "--data", tmp_path / "pairs", "--workers", 0)
    assert code == 0, err
    assert "On 1 images" in out
    assert all(name in err for name in ("2 unreadable", "a.jpg", "b.png"))
    code, _, err = run(capsys, "eval", model, "--data", tmp_path, "--workers", 0)
    assert code == 2
    assert "no folders of images and labels" in err
    code, out, err = run(capsys, "show", model, images / "c.jpg", "-o", tmp_path / "shown", *quiet)
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "shown").iterdir()) == [
        "001_c.png",
        "page.html",
    ]
    page = (tmp_path / "shown" / "page.html").read_text()
    assert "background" in page or "%" in page


def test_labels_out_of_range_stop_a_run_once_there_are_too_many(tmp_path):
    write_pairs(tmp_path / "pairs", *[grey(np.full((48, 48), 7 * (n > 3))) for n in range(8)])
    config = recipe(
        data__train=str(tmp_path / "pairs"), data__val=None, task__num_classes=4, run__epochs=1
    )
    with pytest.raises(TrainingError, match=r"cannot be read: more than the share 0.01"):
        train(config, tmp_path / "run", on_progress=quiet)
    lenient = dataclasses.replace(config.data, max_unreadable=0.5)
    train(dataclasses.replace(config, data=lenient), tmp_path / "lenient", on_progress=quiet)


def test_padding_that_a_backbone_would_look_at_is_refused_before_training():
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    start = {"model__name": "vit_tiny_patch16_224", "model__kwargs": sizes}
    vit = dataclasses.replace(
        recipe(**start, task__short_side=48, task__long_side=48), method=MethodRecipe()
    )
    with pytest.raises(ConfigError, match=r"set task\.scale to 1 or more"):
        SegmentationTask.create(vit).open_data(vit, ALONE)
    table = dataclasses.replace(vit.task, config=vit.task.config | {"scale": [1.0, 1.5]})
    larger = dataclasses.replace(vit, task=table)
    loader, _ = SegmentationTask.create(larger).open_data(larger, ALONE)
    assert next(loader.epoch(0))[2] is None
