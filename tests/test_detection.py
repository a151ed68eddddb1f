"""Detectors: torchvision's numbers, sparse backbones, checkpoints, training, commands."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import vitrim
from tests.training import curve, quiet, run_script
from vitrim import CheckpointError, ConfigError, InputError
from vitrim.cli import main
from vitrim.tasks import cascade
from vitrim.tasks.detection import own_sizes
from vitrim.tasks.detection_data import DetectionSamples, open_coco
from vitrim.tasks.opened import from_pretrained
from vitrim.tasks.registry import task_class
from vitrim.tasks.scenes import write_scenes
from vitrim.train.engine import train
from vitrim.train.recipe import AugmentRecipe, list_recipes, load_recipe, recipe_from_plain

SWIN = {
    "img_size": 64,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [1, 1, 6, 1],
    "num_heads": [1, 1, 2, 2],
    "num_classes": 3,
    "strict_img_size": False,
    "drop_path_rate": 0.0,
}
SMALL = {
    "num_classes": 4,
    "short_sides": (64,),
    "long_side": 96,
    "channels": 8,
    "box_width": 16,
    "mask_width": 8,
    "mask_convolutions": 1,
    "proposals": 30,
    "box_samples": 16,
    "anchor_scale": 4.0,
    "score_threshold": 0.0,
}
METHODS = {
    "dense": None,
    "dynamic_spatial": vitrim.DynamicSpatialConfig(keep_ratio=0.7),
    "spvit_pyramid": vitrim.SPViTPyramidConfig(keep_ratio=(0.8, 0.7, 0.6), inference="top_k"),
    "stvit_r": vitrim.STViTRConfig.dense_prediction(window_tokens=4, layer_scale=1.0),
}
HEADS = ("mask_rcnn", "faster_rcnn", "retinanet", "cascade_mask_rcnn")


def swin(config=None):
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN)
    generator = torch.Generator().manual_seed(0)
    return model if config is None else vitrim.sparsify(model, config, generator=generator)


def detector(config=None, head="mask_rcnn", **changes):
    backbone = swin(config)
    torch.manual_seed(1)
    return getattr(vitrim.tasks, head)(backbone, **(SMALL | changes))


def images():
    torch.manual_seed(2)
    return [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]


def targets():
    """Two objects in the first image, none in the second."""
    masks = torch.zeros(2, 64, 80, dtype=torch.uint8)
    masks[0, 4:40, 4:30] = masks[1, 20:60, 20:50] = 1
    return [
        {
            "boxes": torch.tensor([[4.0, 4, 30, 40], [20, 20, 50, 60]]),
            "labels": torch.tensor([1, 3]),
            "masks": masks,
        },
        {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "masks": torch.zeros(0, 70, 64, dtype=torch.uint8),
        },
    ]


class Pyramid(torch.nn.Module):
    """A dense detector's maps, as torchvision takes a backbone."""

    def __init__(self, model):
        super().__init__()
        self.levels, self.neck, self.out_channels = model.levels, model.head.neck, 8

    def forward(self, x):
        return self.neck(self.levels(x))


def torchvision_twin(model):
    """Torchvision's own Mask R-CNN with the same weights."""
    names = ["0", "1", "2", "3"]
    sizes = tuple((4.0 * stride,) for stride in (4, 8, 16, 32, 64))
    data = model.data_config
    return MaskRCNN(
        Pyramid(model),
        min_size=64,
        max_size=96,
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        rpn_pre_nms_top_n_train=60,
        rpn_post_nms_top_n_train=60,
        rpn_pre_nms_top_n_test=30,
        rpn_post_nms_top_n_test=30,
        box_head=model.head.roi_heads.box_head,
        box_predictor=model.head.roi_heads.box_predictor,
        rpn_head=model.head.rpn.head,
        box_score_thresh=0.0,
        box_batch_size_per_image=16,
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2),
        mask_head=model.head.roi_heads.mask_head,
        mask_predictor=model.head.roi_heads.mask_predictor,
    )


def test_a_dense_detector_is_torchvision_s():
    """On images that need no padding: of what pads, torchvision's backbones see the padding."""
    model, same = detector(), [torch.rand(3, 64, 96), torch.rand(3, 64, 96)]
    objects = [targets()[0] | {"masks": torch.ones(2, 64, 96, dtype=torch.uint8)}] * 2
    twin = torchvision_twin(model)
    for expected, found in zip(twin.eval()(same), model.eval()(same), strict=True):
        assert expected.keys() == found.keys()
        assert len(found["boxes"]) > 5
        assert all(torch.equal(expected[name], found[name]) for name in found)
    torch.manual_seed(3)
    expected = twin.train()(same, objects)
    torch.manual_seed(3)
    found = model.train()(same, objects)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in found)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", METHODS)
def test_every_detector_trains_and_detects(head, method):
    more = {"box_head": "4conv1fc", "box_loss": "giou", "batch_norm": True}
    model = detector(METHODS[method], head, **(more if "cascade" in head else {}))
    terms = model.train().losses(images(), targets())
    others = [value for name, value in terms.items() if name != "total"]
    assert torch.isclose(terms["total"], sum(others))
    assert ("ratio" in terms) == (method in ("dynamic_spatial", "spvit_pyramid"))
    terms["total"].backward()
    if model.sparse is not None:
        learned = list(model.sparse.method.parameters())
        assert any(parameter.grad is not None for parameter in learned)
    assert all(p.grad is not None for p in model.head.parameters())
    found = model.eval()(images())
    assert all(len(one["boxes"]) == len(one["labels"]) == len(one["scores"]) for one in found)
    assert ("masks" in found[0]) == model.config.has_masks
    if "masks" in found[0]:
        assert found[0]["masks"].shape[1:] == (1, 64, 80)


@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_depend_on_what_an_image_is_padded_with(method):
    """Padded to 96 x 96 together, and to less alone; kept counts are of each image's own places."""
    model, both = detector(METHODS[method]).eval(), images()
    batch, _ = model.transform(both)
    assert own_sizes(batch) == [(64, 80), (70, 64)]
    together = model.levels(batch.tensors, own_sizes(batch))
    for number, image in enumerate(both):
        alone, _ = model.transform([image])
        single = model.levels(alone.tensors, own_sizes(alone))
        for level, found in zip(single, together, strict=True):
            rows, columns = level.shape[2:]
            assert torch.allclose(level[0], found[number, :, :rows, :columns], atol=1e-4)


def test_what_needed_no_padding_has_no_sizes():
    batch, _ = detector().eval().transform([torch.rand(3, 64, 96)])
    assert own_sizes(batch) is None


def test_all_positions_kept_is_the_dense_detector():
    sparse = detector(METHODS["dynamic_spatial"]).eval()
    sparse.backbone.set_keep_ratio((1.0, 1.0, 1.0))
    x = torch.rand(1, 3, 64, 96)
    pairs = zip(detector().eval().levels(x), sparse.levels(x), strict=True)
    assert all(torch.equal(expected, found) for expected, found in pairs)


def test_a_plain_transformer_has_a_simple_pyramid():
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=4, num_heads=2, num_classes=3
    )
    sparse = vitrim.sparsify(vit, vitrim.DynamicViTConfig(keep_ratio=0.7))
    model = vitrim.tasks.mask_rcnn(sparse, **(SMALL | {"fixed_size": (64, 64)}))
    terms = model.train().losses(images(), targets())
    assert terms["ratio"] >= 0
    assert [level.reduction for level in model.head.neck.info] == [4, 8, 16, 32]
    assert len(model.eval()(images())) == 2


def test_a_trained_detector_is_made_sparse_where_it_stands():
    """And its backbone is traced and turned there."""
    model, x = detector().eval(), torch.rand(2, 3, 64, 64)
    before = model.levels(x)
    model.backbone = vitrim.sparsify(model.backbone, METHODS["dynamic_spatial"])
    model.backbone.set_keep_ratio((1.0, 1.0, 1.0))
    assert all(torch.equal(*pair) for pair in zip(before, model.levels(x), strict=True))
    model.backbone.set_keep_ratio(0.7)
    assert model.backbone.trace(x).stages[0].counts.tolist() == [11, 11]
    assert model.backbone.features_macs((64, 64)) < model.backbone.dense_features_macs((64, 64))
    model.backbone.set_budget(0.9)
    assert model.backbone.macs() <= 0.91 * model.backbone.dense_macs()
    assert len(model.eval()(images())) == 2


def test_the_cascade_averages_scores_and_moves_boxes():
    """Three equal heads that move nothing say what one of them says."""
    model = detector(head="cascade_mask_rcnn").eval()
    stages = model.head.roi_heads.stages
    assert [stage.proposal_matcher.high_threshold for stage in stages] == [0.5, 0.6, 0.7]
    assert stages[2].box_coder.weights == (30.0, 30.0, 15.0, 15.0)
    for stage in stages:
        torch.nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
        torch.nn.init.zeros_(stage.box_predictor.bbox_pred.bias)
        stage.load_state_dict(stages[0].state_dict())
    maps = model.head.neck(model.levels(torch.rand(1, 3, 64, 64)))
    boxes = torch.tensor([[4.0, 4, 30, 40], [20, 20, 50, 60]])
    found, _ = model.head.roi_heads(maps, [boxes], [(64, 64)])
    logits, _ = cascade._seen(stages[0], maps, [boxes], [(64, 64)])
    assert torch.allclose(found[0]["scores"].max(), logits.softmax(1)[:, 1:].max())
    assert {tuple(box) for box in found[0]["boxes"].tolist()} <= {tuple(b) for b in boxes.tolist()}
    torch.nn.init.constant_(stages[1].box_predictor.bbox_pred.bias, 1.0)
    moved, _ = model.head.roi_heads(maps, [boxes], [(64, 64)])
    assert not torch.equal(moved[0]["boxes"], found[0]["boxes"])


def test_later_stages_do_not_start_from_the_objects_themselves():
    """They are added to learn from, at each stage anew, and would be counted twice."""
    stage = detector(head="cascade_mask_rcnn").head.roi_heads.stages[0]
    objects = targets()[:1]
    boxes = torch.cat([objects[0]["boxes"], torch.tensor([[5.0, 5, 30, 40]])])
    moved = cascade._refined(stage, torch.zeros(3, 4), [boxes], [(64, 80)], objects)
    assert moved[0].tolist() == [[5.0, 5, 30, 40]]


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_is_the_same_detector(method, tmp_path):
    model = detector(METHODS[method], classes=("a", "b", "c")).eval()
    if model.sparse is not None and method != "stvit_r":
        model.backbone.set_keep_ratio(0.6 if method == "dynamic_spatial" else (0.6, 0.6, 0.6))
    model.save_pretrained(tmp_path / "made", metrics={"box AP": 1.0}, origin="a test")
    again = from_pretrained(tmp_path / "made")
    assert again.classes == ("a", "b", "c")
    assert again.config == model.config
    assert again.origin == "a test"
    assert not again.training
    for expected, found in zip(model(images()), again(images()), strict=True):
        assert all(torch.equal(expected[name], found[name]) for name in found)
    names = {name.split(".")[0] for name in _weights(tmp_path / "made")}
    assert names == {"backbone", "head"} | ({"method"} if model.sparse is not None else set())


def _weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "detector"
    detector(METHODS["dynamic_spatial"], classes=("a", "b", "c")).eval().save_pretrained(folder)
    return folder


def _rewritten(folder, change):
    """A config that says something else, and whose digest says so too."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    config["digests"]["config"] = vitrim.checkpoint.digest_of(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["task"].update(name="pose"), "pose"),
        (lambda c: c["task"].update(classes="abc"), "task.classes"),
        (lambda c: c["task"].update(classes=["a"]), "1 classes are named"),
        (lambda c: c["task"].update(config=None), "task.config"),
        (lambda c: c["task"]["config"].update(channels=16), "does not fit this architecture"),
        (lambda c: c["task"]["config"].update(box_width=65536), "does not fit this architecture"),
        (lambda c: c["task"]["config"].update(num_clases=4), "did you mean"),
        (lambda c: c["task"]["config"].pop("num_classes"), "lacks num_classes"),
        (lambda c: c.pop("task"), "classifier"),
        (lambda c: c["method"].update(name="dynamicspatial"), "dynamic_spatial"),
    ],
)
def test_damaged_checkpoints_are_refused(saved, tmp_path, change, message):
    shutil.copytree(saved, tmp_path / "copy")
    _rewritten(tmp_path / "copy", change)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        from_pretrained(tmp_path / "copy")


def test_torn_weights_are_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        from_pretrained(tmp_path / "copy")
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        from_pretrained(tmp_path / "copy")


def test_who_opens_the_wrong_kind_is_told(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"vitrim\.tasks\.from_pretrained"):
        vitrim.from_pretrained(saved)
    swin(METHODS["dynamic_spatial"]).eval().save_pretrained(tmp_path / "classifier")
    with pytest.raises(CheckpointError, match=r"open it by vitrim\.from_pretrained"):
        from_pretrained(tmp_path / "classifier")


def test_what_no_file_says_is_not_saved(tmp_path):
    model = detector().eval()
    model.backbone.layers[0].blocks[0].mlp.act = torch.nn.Tanh()
    with pytest.raises(CheckpointError, match="other maps"):
        model.save_pretrained(tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([1, 4])}, "the head knows 1 to 3"),
        ({"labels": torch.tensor([0, 1])}, "labels from 0"),
        ({"labels": torch.tensor([1])}, "1 labels and boxes"),
        ({"boxes": torch.tensor([[4.0, 4, 4, 40], [0, 0, 9, 9]])}, "without extent"),
        ({"boxes": torch.full((2, 4), torch.nan)}, "without extent"),
        ({"masks": torch.zeros(2, 9, 9)}, "masks of"),
        ({"masks": None}, "no masks"),
    ],
)
def test_targets_that_cannot_be_learned_are_refused(change, message):
    model, given = detector().train(), targets()
    given[0] = {name: v for name, v in (given[0] | change).items() if v is not None}
    with pytest.raises(InputError, match=message):
        model(images(), given)
    with pytest.raises(InputError, match="needs targets"):
        model(images())


def test_a_backbone_without_maps_is_refused():
    with pytest.raises(ConfigError, match="stvit_swin gives no feature maps"):
        vitrim.tasks.mask_rcnn(swin(vitrim.STViTSwinConfig(window_tokens=4)), **SMALL)
    with pytest.raises(vitrim.UnsupportedBackboneError, match="ResNet"):
        vitrim.tasks.mask_rcnn(timm.create_model("resnet10t"), **SMALL)
    odd = timm.create_model("vit_tiny_patch16_224", img_size=56, patch_size=14, depth=2)
    with pytest.raises(ConfigError, match="14 pixels"):
        vitrim.tasks.mask_rcnn(odd, **SMALL)


# Training


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root / "train", 4, seed=0, side=64)
    return write_scenes(root / "val", 3, seed=0, side=64, split="val").parent


def recipe(scenes, method="dynamic_spatial", **changes):
    task = {name: list(v) if isinstance(v, tuple) else v for name, v in SMALL.items()}
    task |= {"name": "detection", "num_classes": 11, "score_threshold": 0.05}
    data = {
        "name": "tiny",
        "task": task,
        "model": {"name": "swin_tiny_patch4_window7_224", "kwargs": dict(SWIN)},
        "method": {"name": method} if method else {},
        "data": {
            "train": str(scenes / "train"),
            "val": str(scenes / "val"),
            "batch_size": 2,
            "workers": 0,
        },
        "augment": {"hflip": 0.5},
        "optim": {"lr": 1e-3},
        "run": {"epochs": 2, "log_every": 1, "checkpoint_steps": 3, "tensorboard": False},
    }
    for place, value in changes.items():
        table, key = place.split("__")
        data[table][key] = value
    return recipe_from_plain(data)


class Stopped(Exception):
    """Takes the place of a kill."""


def test_training_goes_on_exactly_where_it_was(scenes, tmp_path):
    """Crops, several sizes, a teacher of the pyramid, an average, noise: all of it random."""
    changes = {
        "task__short_sides": [48, 64],
        "task__crop_short_sides": [56, 72],
        "task__crop_sides": [40, 56],
        "task__pyramid_weight": 1.0,
        "model__kwargs": SWIN | {"drop_path_rate": 0.2},
        "optim__ema_decay": 0.9,
    }
    asked = recipe(scenes, **changes)

    def stop(record):
        if record["step"] == 3:
            raise Stopped

    whole = train(asked, tmp_path / "whole", on_progress=quiet)
    with pytest.raises(Stopped):
        train(asked, tmp_path / "killed", on_progress=stop)
    train(asked, tmp_path / "killed", on_progress=quiet)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    lines = [line for line in curve(tmp_path / "whole") if "total" in line]
    assert len(lines) == 4
    due = {"loss_classifier", "loss_mask", "loss_objectness", "ratio", "pyramid"}
    assert due <= lines[0].keys()
    measured = [line for line in curve(tmp_path / "whole") if "val_box_ap" in line]
    assert len(measured) == 2
    assert {"val_mask_ap", "val_box_ap50"} <= measured[0].keys()
    assert whole.metrics["val_images"] == 3
    results = [_weights(tmp_path / run / "checkpoint") for run in ("whole", "killed")]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert from_pretrained(tmp_path / "whole" / "checkpoint").classes == tuple("0123456789")


def test_a_sparse_run_goes_on_from_a_dense_detector(scenes, tmp_path):
    train(recipe(scenes, None, run__epochs=1), tmp_path / "dense", on_progress=quiet)
    start = str(tmp_path / "dense" / "checkpoint")
    dense = from_pretrained(start)
    assert dense.sparse is None
    task = task_class("detection").create(recipe(scenes, model__checkpoint=start))
    assert task.model.sparse.method.name == "dynamic_spatial"
    weights, head = dense.timm_model.state_dict(), dense.head.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in task.model.timm_model.state_dict().items())
    assert all(torch.equal(v, head[k]) for k, v in task.model.head.state_dict().items())
    with pytest.raises(CheckpointError, match="does not fit"):
        task_class("detection").create(recipe(scenes, model__checkpoint=start, task__channels=16))


LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SCRIPT = 'train(recipe, folder / "run", on_progress=lambda record: None)'


def test_two_processes_give_what_one_gives(scenes, tmp_path):
    """Means over what was sampled in a batch: so one process adds up the same two batches. All
    that is drawn is off: noise, mirrors, and which anchors and regions are learned from.
    """
    changes = {
        "method__sampling": "argmax",
        "augment__none": True,
        "task__proposal_samples": 65536,
        "task__box_samples": 65536,
        "run__epochs": 2,
    }
    two = run_script(SCRIPT, recipe(scenes, **changes), tmp_path / "two", *LAUNCHER)
    assert two.returncode == 0, two.stderr
    one = recipe(scenes, optim__accumulate=2, **changes)
    train(one, tmp_path / "one", on_progress=quiet)
    lines, expected = curve(tmp_path / "two" / "run"), curve(tmp_path / "one")
    assert len(lines) == len(expected) == 4
    for line, wanted in zip(lines, expected, strict=True):
        for name, value in wanted.items():
            assert line[name] == pytest.approx(value, abs=2e-4), (name, line, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task__num_classes": 4}, "has 10 categories, and the head 3"),
        ({"augment__mixup": 0.8}, "augment.mixup"),
        ({"data__train": "absent"}, "absent"),
        ({"data__labels": False, "data__val": None}, "labels"),
        ({"task__train_annotations": "none.json"}, "none.json"),
        (
            {"method__name": "stvit_r", "task__pyramid_weight": 1.0, "model__teacher": False},
            "teacher",
        ),
    ],
)
def test_recipes_that_cannot_run_leave_nothing_behind(scenes, tmp_path, changes, message):
    with pytest.raises((ConfigError, InputError), match=message):
        train(recipe(scenes, **changes), tmp_path / "run", on_progress=quiet)
    assert not (tmp_path / "run").exists()


def test_changed_images_keep_their_objects(scenes):
    """A box stays about its mask, whatever is mirrored and cropped."""
    folder = open_coco(str(scenes / "train"), None, classes=None, masks=True)
    config = recipe(scenes, task__crop_short_sides=[64, 90], task__crop_sides=[40, 64]).task.build()
    samples = DetectionSamples(folder, AugmentRecipe(hflip=0.5), config)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, target = samples[seed % len(samples)]
        seen.add(tuple(image.shape[1:]))
        assert 0 <= image.min() <= image.max() <= 1
        assert target["masks"].shape[1:] == image.shape[1:]
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            own = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert torch.allclose(box, torch.stack(own).squeeze().float(), atol=1.6)
    assert len(seen) > 3


def test_every_recipe_of_detection_can_start():
    names = [name for name in list_recipes() if "rcnn" in name]
    assert len(names) == 14
    for name in names:
        found = load_recipe(name, ["model.pretrained=false"])
        assert found.task.name == "detection"
        if found.method.name is not None:
            found.method.build()
    tiny = load_recipe("scenes-mask_rcnn-stvit_r-swin")
    assert task_class("detection").create(tiny).model.sparse.method.name == "stvit_r"


# Commands


def run(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(recipe(scenes, run__epochs=1), folder / "run", on_progress=quiet)
    return folder / "run" / "checkpoint"


def test_eval_puts_dense_and_sparse_side_by_side(capsys, trained, scenes, tmp_path):
    words = ("eval", trained, "--data", scenes / "val", "--workers", 0, "--keep-ratio", "0.9,0.5")
    status, out, _ = run(capsys, *words, "--json", tmp_path / "found.json")
    assert status == 0
    assert "dynamic_spatial 0.9" in out
    rows = json.loads((tmp_path / "found.json").read_text())["results"]
    dense, first, second = rows
    assert dense["name"] == "dense"
    assert {"box AP", "mask AP"} <= dense["scores"].keys()
    assert dense["images"] == 3
    assert second["macs"]["mean"] < first["macs"]["mean"] < dense["macs"]["mean"]
    assert second["stages"][0]["kept"]["mean"] == 8
    assert dense["differences"] == {}
    for name in ("box AP", "mask AP"):
        gap, low, high = second["differences"][name]
        assert gap == pytest.approx(second["scores"][name] - dense["scores"][name])
        assert low <= high
    for wrong in ("digits", tmp_path):
        assert run(capsys, "eval", trained, "--data", wrong)[0] == 2


def test_show_draws_what_is_found_and_where(capsys, trained, scenes, tmp_path):
    status, _, _ = run(capsys, "show", trained, scenes / "val" / "images", "-o", tmp_path / "shown")
    assert status == 0
    assert len(list((tmp_path / "shown").glob("*.png"))) == 3
    page = (tmp_path / "shown" / "page.html").read_text()
    assert "found" in page
    assert "stage 3, before block" in page


def test_bench_times_backbone_and_whole(capsys, trained, tmp_path):
    """On images of the size that is said, and the backbone on what it sees of them."""
    words = ("bench", trained, "--dtype", "fp32", "--batch", 1, "--rounds", 1, "--seconds", 0)
    more = ("--image-size", "128,160", "--json", tmp_path / "rows.json")
    status, _, err = run(capsys, *words, *more)
    assert status == 0
    assert "backbone on 64 x 96 pixels" in err
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["name"] for row in rows["backbone"]] == [
        "backbone, dense",
        "backbone, dynamic_spatial 0.7",
    ]
    sizes = {kind: found[0]["image_shape"][1:] for kind, found in rows.items()}
    assert sizes == {"backbone": [64, 96], "whole": [128, 160]}
    assert rows["whole"][0]["macs"] > rows["backbone"][0]["macs"]
    assert rows["backbone"][1]["macs"] < rows["backbone"][0]["macs"]


def test_info_says_what_is_inside(capsys, trained):
    status, out, _ = run(capsys, "info", trained)
    assert status == 0
    assert "detection, mask_rcnn" in out
    assert "dynamic_spatial" in out
