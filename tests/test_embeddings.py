"""Features of many images in a file, and timm's own steps on a sparse model."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, NativeScaler, accuracy

from tests.conftest import tiny_swin, tiny_vit
from vitrim import DynamicSpatialConfig, DynamicViTConfig, MergingConfig, sparsify
from vitrim.cli import main
from vitrim.errors import MissingExtraError

DATA = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "crop_pct": 0.9,
}


def run(capsys, *words):
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as error:
        code = error.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    paths = []
    for number in range(6):
        path = folder / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = generator.integers(0, 255, (40, 30 + 5 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 44)).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("openvino")
    from vitrim.export.bundle import export

    sparse = sparsify(tiny_vit(num_classes=0), MergingConfig(stages=(1, 2), keep_ratio=0.6)).eval()
    folder = tmp_path_factory.mktemp("export")
    data = DATA | {"crop_mode": "squash"}
    return sparse, export(
        sparse.features_only(), folder / "b", "openvino", data_config=data, batch=4
    )


def expected(sparse, paths):
    transform = create_transform(**DATA, crop_mode="squash")
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        (level,), pooled = sparse.embedded_features(images)
    return level.numpy(), pooled.numpy()


def test_features_are_written_one_row_an_image(pictures, exported, tmp_path, capsys):
    sparse, bundle = exported
    level, pooled = expected(sparse, pictures)
    words = ["predict", bundle, *pictures, "--features", "-o", tmp_path / "all.npz"]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "level3, embedding of 6 images" in out
    with np.load(tmp_path / "all.npz", allow_pickle=False) as found:
        assert list(found["name"]) == [str(path) for path in pictures]
        np.testing.assert_allclose(found["level3"], level, atol=1e-4)
        np.testing.assert_allclose(found["embedding"], pooled, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["all.npz"]


def test_features_in_parquet(pictures, exported, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    sparse, bundle = exported
    _, pooled = expected(sparse, pictures)
    words = ["predict", bundle, *pictures, "--features", "embedding", "-o", tmp_path / "e.parquet"]
    code, _, err = run(capsys, *words)
    assert code == 0, err
    table = parquet.read_table(tmp_path / "e.parquet")
    assert table.column_names == ["name", "embedding"]
    assert table["name"].to_pylist() == [str(path) for path in pictures]
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), pooled, atol=1e-4)
    assert table.schema.field("embedding").metadata[b"shape"] == b"32"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--features", "nonsense", "-o", "x.npz"], "has no 'nonsense'; it has level3, embedding"),
        (["--features", "-o", "x.csv"], "neither .npz nor .parquet"),
        (["--features", "-o", "absent/x.npz"], "its folder is absent"),
        (["--features"], "are given together"),
        (["-o", "x.npz"], "are given together"),
    ],
)
def test_what_cannot_be_written_is_said(
    pictures, exported, tmp_path, capsys, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "predict", exported[1], pictures[0], *words)
    assert code == 2
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_damaged_image_leaves_no_file(pictures, exported, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    words = [*pictures, tmp_path / "bad.png", "--features", "-o", tmp_path / "x.npz"]
    code, _, err = run(capsys, "predict", exported[1], *words)
    assert code == 2
    assert "bad.png cannot be read as an image" in err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.png"]


def test_parquet_needs_an_extra(tmp_path, monkeypatch):
    from vitrim.feature_files import check_output

    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"vitrim\[parquet\]"):
        check_output(tmp_path / "x.parquet")


# --- timm's training and validation scripts, step by step ---


# timm's dataset leaves files to the collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("make", "config"),
    [
        (tiny_vit, DynamicViTConfig(stages=(1, 2), keep_ratio=0.6)),
        (tiny_vit, MergingConfig(stages=(1, 2), keep_ratio=0.6)),
        (tiny_swin, DynamicSpatialConfig(stages=(1, 3))),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_timms_training_and_validation_run(make, config, pictures, tmp_path):
    sparse = sparsify(make(num_classes=2), config)
    data = timm.data.resolve_data_config({}, model=sparse, verbose=False) | DATA
    dataset = create_dataset("", root=pictures[0].parents[1], split="train")
    options = {"batch_size": 2, "use_prefetcher": False, "num_workers": 0}
    loader = create_loader(dataset, **data, **options, is_training=True)
    validation = create_loader(
        create_dataset("", root=pictures[0].parents[1], split="validation"), **data, **options
    )
    mixup = timm.data.Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=2)
    task = ClassificationTask(sparse, SoftTargetCrossEntropy())
    optimizer = create_optimizer_v2(
        sparse, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.8
    )
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=4, warmup_epochs=1)
    ema, scaler = ModelEmaV3(sparse, decay=0.9), NativeScaler(device="cpu")
    saver = CheckpointSaver(sparse, optimizer, model_ema=ema, checkpoint_dir=tmp_path)
    task.train()
    for epoch in range(2):
        for images, labels in loader:
            images, target = mixup(images, labels)
            loss = task(images, target)["loss"]
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=sparse.parameters())
            ema.update(sparse, step=epoch)
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=float(epoch))
    sparse.eval()
    top1 = AverageMeter()
    with torch.inference_mode():
        for images, labels in validation:
            output = sparse(images)
            assert torch.isfinite(output).all()
            top1.update(accuracy(output, labels, topk=(1,))[0].item(), len(images))
    assert top1.count == 6
    again = sparsify(make(num_classes=2), config)
    load_checkpoint(again, str(tmp_path / "model_best.pth.tar"), use_ema=True, weights_only=False)
    assert all(
        torch.equal(found, ema.module.state_dict()[name])
        for name, found in again.state_dict().items()
    )
    timm.utils.freeze(sparse, ["backbone.blocks" if make is tiny_vit else "backbone.layers"])
    frozen = [name for name, p in sparse.named_parameters() if not p.requires_grad]
    assert frozen
    assert list(timm.models.model_parameters(sparse, exclude_head=True))
