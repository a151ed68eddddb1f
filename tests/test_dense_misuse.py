"""What detectors and segmenters say of images, targets, settings and options that cannot be."""

from __future__ import annotations

import pytest
import timm
import torch

import vitrim
from tests.conftest import tiny_swin
from tests.test_cli import run
from tests.test_detection import SMALL, detector, images, swin, targets
from tests.test_segmentation import NARROW, segmenters, write_checkpoint
from vitrim.errors import CheckpointError, ConfigError, InputError
from vitrim.features import FeaturesOnly
from vitrim.tasks import from_pretrained, mask_rcnn, upernet
from vitrim.tasks.registry import task_class
from vitrim.train.data import digits_data_config, eval_loader
from vitrim.train.recipe import list_recipes, load_recipe

SPATIAL = vitrim.DynamicSpatialConfig(keep_ratio=0.7)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(3, 1, 500), "nothing would be left"),
        (torch.rand(3, 0, 10), "has shape"),
        (torch.rand(4, 64, 64), r"expected \(3, height, width\)"),
        (torch.rand(64, 64), "has shape"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), "uint8"),
        (torch.rand(3, 64, 64).half(), "float16"),
    ],
)
def test_images_that_no_detector_takes(image, message):
    model = detector().eval()
    with pytest.raises(InputError, match=message):
        model([images()[0], image])


def test_a_batch_of_no_image():
    assert detector().eval()([]) == []
    for segmenter in (segmenters()["swin"], segmenters()["spatial swin"]):
        model = upernet(segmenter, 5, **NARROW)
        for mode in (True, False):
            assert model.train(mode)(torch.rand(0, 3, 32, 32)).shape == (0, 5, 32, 32)
        with pytest.raises(InputError, match="0 images"):
            model.losses(torch.rand(0, 3, 32, 32), torch.zeros(0, 32, 32, dtype=torch.long))


@pytest.mark.parametrize("sparse", [True, False])
def test_maps_of_no_image(sparse):
    model = vitrim.sparsify(tiny_swin(), SPATIAL) if sparse else tiny_swin()
    maps = FeaturesOnly(model.eval())
    due, read = maps.embedded(torch.rand(2, 3, 32, 32))
    levels, none = maps.embedded(torch.rand(0, 3, 32, 32))
    for found in (levels, maps(torch.rand(0, 3, 32, 32))):
        assert [level.shape for level in found] == [(0, *level.shape[1:]) for level in due]
    assert none.shape == (0, *read.shape[1:])


def test_detectors_of_half_precision_on_a_cpu():
    with pytest.raises(InputError, match="autocast"):
        detector().half().eval()([torch.rand(3, 64, 64).half()])


@pytest.mark.parametrize(
    "change", [{"labels": torch.ones(2)}, {"boxes": [[1, 2, 3, 4]] * 2}, {"masks": None}]
)
def test_targets_of_other_types(change):
    given = targets()
    with pytest.raises(InputError, match="target 0"):
        detector().train()(images(), [given[0] | change, given[1]])


def test_labels_of_any_whole_numbers():
    model, pixels = upernet(segmenters()["swin"], 5, **NARROW), torch.rand(2, 3, 32, 32)
    labels = torch.randint(0, 5, (2, 32, 32))
    due, found = (
        model.eval().losses(pixels, each)["total"] for each in (labels, labels.to(torch.uint8))
    )
    assert torch.equal(due, found)
    with pytest.raises(InputError, match="float32"):
        model.losses(pixels, labels.float())


@pytest.mark.parametrize("indices", [[7], [], [-9], ["x"], [1.5]])
def test_maps_that_are_not_there(indices):
    sparse = vitrim.sparsify(tiny_swin(), SPATIAL)
    for ask in (
        lambda: sparse.features(torch.rand(1, 3, 32, 32), indices=indices),
        lambda: sparse.train_features(torch.rand(1, 3, 32, 32), indices=indices),
        lambda: sparse.embedded_features(torch.rand(1, 3, 32, 32), indices=indices),
        lambda: sparse.forward_intermediates(torch.rand(1, 3, 32, 32), indices=indices),
        lambda: sparse.features_only(indices),
    ):
        with pytest.raises(InputError, match="the maps asked for"):
            ask()


@pytest.mark.parametrize("make", [tiny_swin, lambda: vitrim.sparsify(tiny_swin(), SPATIAL)])
def test_images_without_pixels(make):
    with pytest.raises(InputError, match="have shape"):
        FeaturesOnly(make().eval())(torch.rand(1, 3, 0, 32))


def test_the_hint_for_a_backbone_of_one_size_is_right():
    with pytest.raises(InputError, match="dynamic_img_size=True"):
        vitrim.sparsify(tiny_swin(), SPATIAL).features(torch.rand(1, 3, 48, 40))
    flexible = vitrim.sparsify(tiny_swin(dynamic_img_size=True), SPATIAL)
    assert flexible.features(torch.rand(1, 3, 48, 40))


def test_another_backbone_has_the_same_maps_or_is_refused():
    model = detector()
    model.backbone = vitrim.sparsify(model.backbone, SPATIAL)
    other = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4)
    with pytest.raises(ConfigError, match="the head was made for"):
        model.backbone = other


def test_names_of_classes():
    names = (name for name in "abc")
    assert mask_rcnn(swin(), classes=names, **SMALL).classes == ("a", "b", "c")
    with pytest.raises(ConfigError, match="expected names"):
        mask_rcnn(swin(), classes=[1, 2, 3], **SMALL)


def test_checkpoints_that_cannot_be_what_is_asked(tmp_path):
    model = detector()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="keep_ratio given, but"):
        from_pretrained(tmp_path / "dense", keep_ratio=0.5)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        model.save_pretrained(tmp_path / "file")


def test_options_that_are_not_heeded_are_refused(capsys, tmp_path):
    made, classifier = tmp_path / "segmenter", tmp_path / "classifier"
    write_checkpoint(made)
    vitrim.sparsify(tiny_swin(), SPATIAL).save_pretrained(classifier)
    evaluate = ("eval", made, "--data", "scenes")
    refused = {
        "--weights": (*evaluate, "--weights", "w.safetensors"),
        "--class-map and --crop-pct and --plot": (
            *(*evaluate, "--class-map", "map.txt", "--crop-pct", 0.9),
            *("--plot", tmp_path / "plot.png"),
        ),
        "--calibrate-on": (*evaluate, "--calibrate-on", "there", "--macs", 0.9),
        "it is for --macs": (*evaluate, "--calibrate-on", "there"),
        "did you mean 'bf16'": (*evaluate, "--dtype", "bf1"),
        "--features": ("bench", made, "--features"),
        "--against": ("bench", classifier, "--against", made),
        "--annotations and --against": (
            *("eval", classifier, "--data", "digits"),
            *("--annotations", "x.json", "--against", made),
        ),
        "has its own": (
            *("export", classifier, "--to", "pt2", "-o", tmp_path / "bundle"),
            *("--weights", "w.safetensors"),
        ),
    }
    for message, words in refused.items():
        status, _, err = run(capsys, *map(str, words))
        assert status == 2, words
        assert message in err
        assert err.count("vitrim: error:") == 1


def test_segmenters_are_evaluated_in_bf16(capsys, tmp_path):
    write_checkpoint(tmp_path / "made")
    words = ("eval", tmp_path / "made", "--data", "scenes", "--limit", 1, "--workers", 0)
    status, out, err = run(capsys, *map(str, words), "--dtype", "bf16", "--device", "cpu")
    assert status == 0, err
    assert "mIoU" in out


def test_data_that_a_task_does_not_heed():
    for name, field in {"mask_rcnn": "val_split", "upernet": "class_map"}.items():
        recipe = load_recipe(f"scenes-{name}-swin", [f'data.{field}="x"'])
        with pytest.raises(ConfigError, match=f"data.{field} is not for"):
            task_class(recipe.task.name).create(recipe)


def test_digits_for_models_of_few_pixels():
    pixels, _ = next(iter(eval_loader("digits/test", digits_data_config(32), 2, 0, 2)))
    assert pixels.shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    "name", [n for n in list_recipes() if n.startswith("scenes-") and n.count("-") == 3]
)
def test_sparse_recipes_of_the_scenes_cost_at_most_0_8(name):
    recipe = load_recipe(name)
    backbone = timm.create_model(recipe.model.name, **recipe.model.kwargs)
    maps = FeaturesOnly(vitrim.sparsify(backbone, recipe.method.build()))
    assert 0.7 < maps.macs((128, 128)) / maps.dense_macs((128, 128)) <= 0.8
    assert recipe.task.build().pyramid_weight == 0.1
