"""Padded images of detectors and segmenters: what is counted and calibrated of them."""

from __future__ import annotations

import pytest
import timm
import torch

import vitrim
from tests.test_detection import METHODS, SMALL, SWIN, detector, images, recipe, swin
from tests.test_segmentation import NARROW
from vitrim.errors import ConfigError, InputError
from vitrim.tasks.base import ALONE
from vitrim.tasks.evaluation import Costs
from vitrim.tasks.registry import task_class
from vitrim.tasks.segmentation_batches import preparation_of

THRESHOLD = vitrim.SPViTPyramidConfig(inference="threshold", threshold=0.5)
PIXELS = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
OWN = [(64, 64), (32, 96)]


@pytest.mark.parametrize("name", ["dynamic_spatial", "spvit_pyramid", "stvit_r"])
def test_a_trace_keeps_no_padding(name):
    for stage in swin(METHODS[name]).eval().trace(PIXELS, OWN).stages:
        rows, columns = stage.grid
        for image, (height, width) in enumerate(OWN):
            padding = torch.ones(rows, columns, dtype=torch.bool)
            padding[: rows * height // 64, : columns * width // 96] = False
            if stage.assignment is None:
                assert len(stage.kept[image])
                assert not padding.flatten()[stage.kept[image]].any()
            else:
                assert stage.assignment[image][:, padding.flatten()].max() == 0


@pytest.mark.parametrize("config", [METHODS["dynamic_spatial"], THRESHOLD])
def test_counts_are_those_of_the_image_alone(config):
    sparse = swin(config).eval()
    together = sparse.trace(PIXELS, OWN).stages
    alone = sparse.trace(PIXELS[:1, :, :, :64], [(64, 64)]).stages
    assert [int(s.counts[0]) for s in together] == [int(s.counts[0]) for s in alone]


def test_sizes_that_a_method_does_not_serve():
    for config in (vitrim.STViTSwinConfig(), vitrim.STViTRConfig(window_tokens=4)):
        with pytest.raises(ConfigError, match="serve"):
            swin(config).eval().trace(PIXELS, OWN)
    plain = vitrim.sparsify(timm.create_model("test_vit"), vitrim.DynamicViTConfig())
    with pytest.raises(ConfigError, match="does not serve sizes"):
        plain.eval().trace(torch.rand(1, 3, 160, 160), [(100, 160)])


def test_kept_positions_of_a_detector_are_of_the_images_alone():
    model = detector(METHODS["dynamic_spatial"], fixed_size=()).eval()
    costs = Costs(model)
    costs.add([torch.rand(3, 64, 64)])
    costs.add([torch.rand(3, 64, 80)])  # padded to 64 x 96
    (whole, _, _), (padded, _, _) = costs.kept
    assert (whole, padded) == (int(16 * 0.7), int(20 * 0.7))
    assert costs.macs[1] < model.backbone.features_macs((64, 96))


def spread(model):
    """Scores as a selector that was trained has them: of many sizes."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.backbone.method.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)


@pytest.mark.parametrize("budget", [0.65, 0.5])
def test_the_backbone_of_a_detector_is_calibrated_on_its_images(budget):
    model = detector(THRESHOLD)
    spread(model)
    loader = [(images(), None), ([torch.rand(3, 80, 64)] * 2, None)]
    found = vitrim.calibrate(model.backbone, loader, budget, tolerance=0.02, prepare=model.prepared)
    assert found.images == 4
    model.eval()
    costs = Costs(model)
    for image in [image for batch, _ in loader for image in batch]:
        costs.add([image])
    assert sum(costs.macs) / sum(costs.dense_macs) == pytest.approx(budget, rel=0.05)


def test_the_backbone_of_a_segmenter_is_calibrated():
    model = vitrim.tasks.upernet(swin(THRESHOLD), 5, **NARROW)
    spread(model)
    loader = [(torch.rand(2, 3, 64, 70), None)]
    found = vitrim.calibrate(model.backbone, loader, 0.6, tolerance=0.02, prepare=model.prepared)
    assert found.fraction == pytest.approx(0.6, rel=0.02)


def test_images_that_the_backbone_of_a_detector_is_not_calibrated_on():
    model = detector(THRESHOLD)
    spread(model)
    with pytest.raises(InputError, match="the loader gives list"):
        vitrim.calibrate(model.backbone, [(images(), None)], 0.9)


def test_a_backbone_of_one_size_needs_images_of_that_size(tmp_path):
    fixed = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4)
    model = vitrim.tasks.upernet(fixed, 5, **NARROW)
    with pytest.raises(ConfigError, match="short_side = 64"):
        preparation_of(vitrim.tasks.upernet(fixed, 5, channels=8, short_side=512))
    assert preparation_of(vitrim.tasks.upernet(fixed, 5, channels=8, short_side=64))
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 5, 64, 64)
    model = vitrim.tasks.mask_rcnn(fixed, **SMALL).eval()
    with pytest.raises(ConfigError, match=r"fixed_size=\(64, 64\)"):
        model([torch.rand(3, 64, 80)])
    assert vitrim.tasks.mask_rcnn(fixed, fixed_size=(64, 64), **SMALL).eval()(images())


def test_training_at_a_size_that_the_backbone_does_not_take_begins_not(tmp_path):
    kwargs = SWIN | {"strict_img_size": True}
    asked = recipe(tmp_path / "none", model__kwargs=kwargs, task__short_sides=[64, 96])
    task = task_class("detection").create(asked)
    with pytest.raises(ConfigError, match="fixed_size"):
        task.open_data(asked, ALONE)


def test_images_of_unlike_size_for_a_plain_transformer():
    model = vitrim.tasks.mask_rcnn(
        timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, dynamic_img_size=True),
        **SMALL,
    ).eval()
    with pytest.raises(ConfigError, match=r"unlike sizes.*fixed_size=\(64, 64\)"):
        model(images())
