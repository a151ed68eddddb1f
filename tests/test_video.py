"""Videos: models of clips and of images on them, training, the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vitrim
from tests.conftest import seeded, tiny_video_swin, tiny_vit
from tests.test_cli import fails, run
from tests.training import TINY, curve, quiet, run_script
from vitrim import ConfigError, InputError
from vitrim.checkpoint import read_weights
from vitrim.tasks.moving_digits import write_moving_digits
from vitrim.tasks.registry import task_class
from vitrim.tasks.video import FrameWise, Views, takes_clips
from vitrim.tools.evaluate import dense_macs, evaluate
from vitrim.train.engine import train
from vitrim.train.recipe import list_recipes, load_recipe, recipe_from_plain

SMALL = {
    "frames": 8,
    "img_size": 32,
    "patch_size": [2, 2, 2],
    "embed_dim": 8,
    "depths": [1, 1, 3, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": [2, 4, 4],
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Eight files, in the folders of their classes."""
    return write_moving_digits(tmp_path_factory.mktemp("videos") / "train", 8, side=48)


@pytest.fixture(scope="module")
def listed(videos) -> Path:
    """The same as a CSV file, with labels of 40 classes."""
    files = sorted(videos.rglob("*.mp4"))
    lines = [f"{file.relative_to(videos)},{number}\n" for number, file in enumerate(files)]
    path = videos / "videos.csv"
    path.write_text("".join(lines))
    return path


def recipe(train_on: Path | str, method: str | None = "stvit_video", **changes: Any) -> Any:
    tables: dict[str, Any] = {
        "name": "tiny",
        "task": {"name": "video", "stride": 1, "clips": 2},
        "model": {"name": "vitrim_video_swin_digits", "kwargs": dict(SMALL)},
        "method": {} if method is None else {"name": method, "window_tokens": 4},
        "data": {"train": str(train_on), "val": str(train_on), "batch_size": 2, "workers": 0},
        "augment": {"hflip": 0.5, "color_jitter": 0.4, "mixup": 0.2, "cutmix": 1.0},
        "run": {"epochs": 2, "log_every": 1, "checkpoint_steps": 3, "tensorboard": False},
    }
    for place, value in changes.items():
        table, key = place.split("__")
        tables[table][key] = value
    return recipe_from_plain(tables)


def test_an_image_model_answers_for_a_clip_by_the_mean_of_its_frames():
    """Counts differ by frame, so all frames of all clips are packed as one batch."""
    config = vitrim.DynamicViTConfig(stages=(1, 2), keep_ratio=0.7, threshold=0.5)
    sparse = vitrim.sparsify(tiny_vit(), config, generator=seeded(0)).eval()
    frame_wise = FrameWise(sparse, frames=3)
    clips = torch.randn(2, 3, 3, 32, 32, generator=seeded(1))
    with torch.no_grad():
        expected = torch.stack([sparse(clips[:, :, t]) for t in range(3)]).mean(0)
        assert torch.allclose(frame_wise(clips), expected, atol=1e-5)
    trace = frame_wise.trace(clips)
    assert torch.allclose(trace.logits, expected, atol=1e-5)
    alone = [sparse.trace(clips[:, :, t]).macs for t in range(3)]
    assert torch.allclose(trace.macs, torch.stack(alone).sum(0))
    assert dense_macs(frame_wise, clips) == 3 * sparse.dense_macs()
    with pytest.raises(InputError, match=r"expected \(any, 3, 3, H, W\)"):
        frame_wise(clips[:, :, :2])
    with pytest.raises(ConfigError, match="takes clips itself"):
        FrameWise(tiny_video_swin(), 4)
    assert not takes_clips(sparse)


def test_views_are_averaged_by_probability():
    model = tiny_video_swin()
    views = torch.randn(2, 3, 3, 8, 32, 32, generator=seeded(0))
    with torch.no_grad():
        each = [model(views[:, v]).softmax(-1) for v in range(3)]
        found = Views(model)(views)
    assert torch.allclose(found.exp(), torch.stack(each).mean(0), atol=1e-6)
    assert torch.equal(Views(model)(views[:, :1]), model(views[:, 0]))


@pytest.mark.parametrize("frame_wise", [False, True])
def test_evaluation_of_views(frame_wise):
    """Beside the dense model inside, with MACs of a clip."""
    if frame_wise:
        config = vitrim.DynamicViTConfig(stages=(1, 2), keep_ratio=0.5)
        sparse = vitrim.sparsify(tiny_vit(), config, generator=seeded(0)).eval()
        judged, times = Views(FrameWise(sparse, 8)), 8
    else:
        sparse = vitrim.sparsify(tiny_video_swin(), vitrim.STViTVideoConfig(window_tokens=4))
        judged, times = Views(sparse), 1
    views = torch.randn(3, 2, 3, 8, 32, 32, generator=seeded(0))
    found = evaluate(judged, [(views, torch.tensor([1, 2, 3]))])
    assert found.images == 3
    assert found.dense_macs == times * sparse.dense_macs()
    assert found.macs.mean == pytest.approx(times * sparse.macs())
    assert found.paired is not None


def test_a_run_that_was_stopped_goes_on(videos, listed, tmp_path):
    """On files, in class folders for training and as a CSV for validation."""
    changes = {"data__val": str(listed), "model__kwargs": SMALL | {"num_classes": 40}}
    plain = recipe(listed, **changes)
    whole = train(plain, tmp_path / "whole", on_progress=quiet)

    class StopError(Exception):
        pass

    def stop(record):
        if record["step"] == 6:
            raise StopError

    with pytest.raises(StopError):
        train(plain, tmp_path / "stopped", on_progress=stop)
    train(plain, tmp_path / "stopped", on_progress=quiet)
    assert curve(tmp_path / "whole") == curve(tmp_path / "stopped")
    weights = [
        read_weights(tmp_path / r / "checkpoint/model.safetensors") for r in ("whole", "stopped")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert whole.metrics["val_images"] == 8
    assert whole.metrics["val_views"] == 2
    sparse = vitrim.from_pretrained(tmp_path / "whole" / "checkpoint")
    assert (sparse.data_config["frames"], sparse.data_config["stride"]) == (8, 1)


LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SCRIPT = 'train(recipe, folder / "run", on_progress=lambda record: None)'


def test_two_processes_give_what_one_gives(listed, tmp_path):
    changes = {"augment__mixup": 0.0, "augment__cutmix": 0.0}  # which are of a process's batch
    changes |= {"model__kwargs": SMALL | {"num_classes": 40}}
    two = run_script(SCRIPT, recipe(listed, **changes), tmp_path / "two", *LAUNCHER)
    assert two.returncode == 0, two.stderr
    train(recipe(listed, data__batch_size=4, **changes), tmp_path / "one", on_progress=quiet)
    lines, expected = curve(tmp_path / "two" / "run"), curve(tmp_path / "one")
    assert len(lines) == len(expected) == 6
    for line, wanted in zip(lines, expected, strict=True):
        for name, value in wanted.items():
            assert line[name] == pytest.approx(value, abs=2e-4), (name, line, wanted)


def test_an_image_model_is_trained_on_frames(videos, tmp_path):
    """A whole batch of a damaged file stops it, one among others does not."""
    kwargs = TINY | {"num_classes": len(list(videos.glob("*_*")))}
    model = {"model__name": "vit_tiny_patch16_224", "model__kwargs": kwargs}
    plain = recipe(videos, None, task__frames=2, **model)
    result = train(plain, tmp_path / "run", on_progress=quiet)
    assert (tmp_path / "run" / "backbone.safetensors").exists()
    assert "frames" not in json.loads((tmp_path / "run" / "backbone.json").read_text())["data"]
    assert result.metrics["val_images"] == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment__hflip": 0.5}, "augment.hflip is 0.5, and moving digits"),
        ({"data__val_split": "x"}, "val_split"),
        ({"task__crops": 2}, "crops is 2"),
        ({"task__frames": 0}, "frames is 0"),
    ],
)
def test_recipes_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        task_class("video").create(recipe("moving-digits", **changes))


@pytest.mark.parametrize("name", ["stvit_video-swin3d-t", "stvit_video-swin3d-s"])
def test_the_recipes_of_kinetics_run_on_a_stand_in(videos, tmp_path, name):
    plain = load_recipe(name)
    assert (plain.task.config["frames"], plain.task.config["stride"]) == (32, 2)
    optim = plain.optim
    assert (optim.backbone_lr_scale, plain.run.epochs, optim.lr, optim.lr_batch) == (
        0.1,
        30,
        1e-3,
        64,
    )
    classes = len(list(videos.glob("*_*")))
    kwargs = {key: value for key, value in SMALL.items() if key not in ("frames", "img_size")}
    small = plain.model.kwargs | kwargs | {"num_classes": classes}
    changes = [
        *(f"model.kwargs.{key}={json.dumps(value)}" for key, value in small.items()),
        f"data.train={videos}",
        f"data.val={videos}",
        *("data.batch_size=8", "data.workers=0", "data.image_size=32", "run.epochs=1"),
        *("method.window_tokens=4", "task.frames=8", "run.precision=fp32"),
    ]
    result = train(load_recipe(name, changes), tmp_path / "run", on_progress=quiet)
    assert result.metrics["step"] == 1


def test_moving_digits_have_recipes():
    known = list_recipes()
    for name in ("digits-video-swin", "digits-stvit_video", "digits-video-framewise"):
        assert name in known
        assert load_recipe(name).task.name == "video"
    dense, sparse = (load_recipe(n).model for n in ("digits-video-swin", "digits-stvit_video"))
    assert (dense.name, dense.kwargs) == (sparse.name, sparse.kwargs)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A model of clips and one of images, of 40 classes."""
    folder = tmp_path_factory.mktemp("made")
    config = vitrim.STViTVideoConfig(window_tokens=4)
    clips = vitrim.sparsify(tiny_video_swin(num_classes=40), config, generator=seeded(0))
    config = vitrim.DynamicViTConfig(stages=(1, 2), keep_ratio=0.7)
    images = vitrim.sparsify(tiny_vit(num_classes=40), config, generator=seeded(0))
    for name, model in (("clips", clips), ("images", images)):
        model.eval().save_pretrained(folder / name)
    return {name: folder / name for name in ("clips", "images")}


@pytest.mark.parametrize("kind", ["clips", "images"])
def test_commands_on_videos(capsys, videos, listed, checkpoints, tmp_path, kind):
    model, file = checkpoints[kind], next(videos.rglob("*.mp4"))
    code, out, _ = run(capsys, "predict", model, file, file, "--top", "2")
    assert code == 0
    assert len(out.splitlines()) == 2
    assert out.startswith(f"{file}: ")
    report = tmp_path / "found.json"
    words = ("--views", "2x3", "--batch", "4", "--workers", "0", "--json", report)
    code, out, _ = run(capsys, "eval", model, "--data", listed, *words)
    assert code == 0, out
    assert "Accuracy on 8 videos" in out
    assert json.loads(report.read_text())["results"][0]["images"] == 8
    words = ("--batch", "1", "--dtype", "fp32", "--rounds", "1", "--seconds", "0", "--frames", "8")
    code, out, _ = run(capsys, "bench", model, "--data", videos, *words)
    assert code == 0, out
    assert "clips/s" in out
    code, out, _ = run(capsys, "show", model, file, "-o", tmp_path / "pictures")
    assert code == 0, out
    assert "1 video drawn" in out
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
    assert "frame" in (tmp_path / "pictures" / "page.html").read_text()


def test_commands_refuse_what_is_no_video(capsys, videos, checkpoints, tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "photo.jpg")
    message = fails(capsys, tmp_path, "predict", checkpoints["clips"], tmp_path / "photo.jpg")
    assert "photo.jpg cannot be read as a video: it is an image (JPEG)" in message
    message = fails(capsys, tmp_path, "eval", checkpoints["clips"], "--data", tmp_path)
    assert "holds 1 images, such as photo.jpg, and no video" in message
    words = ("--views", "4+3", "--data", videos)
    assert "such as 4x3" in fails(capsys, tmp_path, "eval", checkpoints["clips"], *words)
    words = ("eval", checkpoints["images"], "--data", "digits", "--frames", "4")
    assert "--frames is given" in fails(capsys, tmp_path, *words)
