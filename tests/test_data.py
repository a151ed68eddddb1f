"""Sources of images: labels, damaged files, bad folders, evaluation batches."""

from __future__ import annotations

import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from tests.training import write_images
from vitrim import ConfigError, InputError
from vitrim.runtime import UnreadableImageError
from vitrim.train.data import (
    check_label_space,
    digits_data_config,
    eval_loader,
    eval_transform,
    open_dataset,
)
from vitrim.train.digits import ClutteredDigits

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
}


def rename(root, names):
    for folder, name in zip(sorted(root.iterdir()), names, strict=True):
        folder.rename(root / name)
    return root


def test_folder_labels_follow_natural_order(tmp_path):
    root = rename(write_images(tmp_path / "set", classes=3, per_class=2), ["c2", "c10", "c1"])
    (root / "c1" / "0.png").rename(root / "c1" / "²1².png")
    dataset = open_dataset(root)
    assert list(dataset.classes) == ["c1", "c2", "c10"]
    assert [dataset[i][1] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    # write_images made the class folders red, green, blue; they are now c2, c10, c1.
    assert np.asarray(dataset[0][0]).mean((0, 1)).argmax() == 2
    check_label_space(dataset, 3)
    with pytest.raises(InputError, match=r"the data have 3 classes .* the model has 4 outputs"):
        check_label_space(dataset, 4)


def test_imagenet_folders_take_imagenet_labels(tmp_path):
    names = ImageNetInfo().label_names()
    root = rename(write_images(tmp_path / "set", per_class=1), [names[7], names[404]])
    dataset = open_dataset(root, num_classes=1000)
    assert [dataset[i][1] for i in range(2)] == [7, 404]
    check_label_space(dataset, 1000)
    assert [open_dataset(root, num_classes=2)[i][1] for i in range(2)] == [0, 1]


def test_class_map(tmp_path):
    root = write_images(tmp_path / "set", per_class=1)
    class_map = tmp_path / "classes.txt"
    class_map.write_text("other\nclass_1\nclass_0\n")
    dataset = open_dataset(root, class_map=class_map)
    assert [dataset[i][1] for i in range(2)] == [2, 1]
    check_label_space(dataset, 3)
    class_map.write_text("other\nclass_1\n")
    with pytest.raises(InputError, match=r"classes.txt lacks 1 class folder\(s\): class_0"):
        open_dataset(root, class_map=class_map)
    class_map.write_bytes(b"class_0\n" * 3_000_000)
    for path in (class_map, tmp_path / "absent.txt", tmp_path, "/dev/zero", "nul\0"):
        with pytest.raises(InputError, match="cannot be read"):
            open_dataset(root, class_map=path)


def test_bad_folders_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_dataset(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds nothing to read"):
        open_dataset(tmp_path / "empty")
    with pytest.raises(InputError, match="holds no image"):
        open_dataset(tmp_path / "empty", labelled=False)
    root = write_images(tmp_path / "set")
    with pytest.raises(InputError, match="holds images but no class folders"):
        open_dataset(root / "class_0")
    (root / "class_1b").mkdir()
    with pytest.raises(InputError, match=r"1 class folder\(s\) .* hold no image: class_1b"):
        open_dataset(root)
    for name in ("hfds/nobody/nothing", "torch/cifar10", "torch/image_folder", "wds/x"):
        for place in (tmp_path / "absent", None):
            with pytest.raises(InputError, match=f"timm cannot open the data {name}"):
                open_dataset(name, root=place)


def test_unlabelled_folder_of_any_layout(tmp_path):
    root = write_images(tmp_path / "set", per_class=2)
    Image.new("RGB", (32, 32)).save(root / "loose.jpg")
    dataset = open_dataset(root, labelled=False)
    assert len(dataset) == 5
    assert {dataset[i][1] for i in range(5)} == {-1}


def test_tar_of_a_folder(tmp_path):
    root = write_images(tmp_path / "set", per_class=3)
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(root, arcname=".")
    packed, plain = open_dataset(tmp_path / "set.tar"), open_dataset(root)
    assert sorted(packed[i][1] for i in range(6)) == [0, 0, 0, 1, 1, 1]
    check_label_space(packed, 2)
    pictures = {packed[i][0].tobytes() for i in range(len(packed))}
    assert pictures == {plain[i][0].tobytes() for i in range(6)}
    assert open_dataset(tmp_path / "set.tar", labelled=False)[0][1] == -1
    with pytest.raises(InputError, match="the data have 2 classes"):
        check_label_space(packed, 3)
    with tarfile.open(tmp_path / "pax.tar", "w") as archive:
        member = tarfile.TarInfo("a/0.png")
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "x"}
        archive.addfile(member)
        member.pax_headers = {"GNU.sparse.size": "x", "GNU.sparse.map": "x"}
        archive.addfile(member)
    (tmp_path / "broken.tar").write_bytes(b"x" * 600)
    for name in ("broken.tar", "pax.tar"):
        with pytest.raises(InputError, match="not a whole, uncompressed tar file"):
            open_dataset(tmp_path / name)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_named_and_left_out(tmp_path, workers):
    root = write_images(tmp_path / "set", per_class=4)
    (root / "class_0" / "1.png").write_bytes(b"no image")
    whole = (root / "class_1" / "2.png").read_bytes()
    (root / "class_1" / "2.png").write_bytes(whole[: len(whole) // 2])
    loader = eval_loader(root, CONFIG, batch_size=3, workers=workers)
    for _ in range(2):  # the list is that of the latest iteration, not of all
        labels = torch.cat([labels for _, labels in loader])
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]
        names = [unreadable.name for unreadable in loader.unreadable]
        assert names == [str(root / "class_0" / "1.png"), str(root / "class_1" / "2.png")]
    with pytest.raises(UnreadableImageError, match=r"1\.png cannot be read as an image"):
        loader.dataset[1]


def test_evaluation_prepares_images_as_the_model_wants(tmp_path):
    root = write_images(tmp_path / "set", per_class=1, size=48)
    config = CONFIG | {"mean": (0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7), "crop_pct": 0.8}
    images, _ = next(iter(eval_loader(root, config, batch_size=2)))
    picture = Image.open(root / "class_0" / "0.png").resize((40, 40), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, 4:36, 4:36] / 255
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    expected = (pixels - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(images[0], expected)


def test_limit_is_spread_over_the_classes(tmp_path):
    root = write_images(tmp_path / "set", per_class=6)
    loader = eval_loader(root, CONFIG, batch_size=4, limit=4)
    assert torch.cat([labels for _, labels in loader]).tolist() == [0, 0, 1, 1]
    assert len(loader) == 1


def test_embedded_set_by_name():
    dataset = open_dataset("digits/test", eval_transform(digits_data_config(64)), length=3)
    image, label = dataset[2]
    assert (dataset.split, len(dataset), tuple(image.shape)) == ("test", 3, (3, 64, 64))
    assert 0 <= label <= 9
    assert open_dataset("digits").split == "val"
    assert open_dataset("digits", training=True).split == "train"
    loader = eval_loader("digits/val", digits_data_config(48), 2, length=4)
    assert [tuple(images.shape) for images, _ in loader] == [(2, 3, 48, 48)] * 2
    with pytest.raises(ConfigError, match="split is 'tset'"):
        open_dataset("digits/tset")
    for wrong in ({"length": 10**20}, {"image_size": 10**6}, {"seed": -1}):
        with pytest.raises(ConfigError, match="expected 1 to ten million samples"):
            ClutteredDigits("val", **({"length": 3} | wrong))


def with_hidden(root):
    """A folder data set of 2 x 2 images, and what other programs left in it."""
    write_images(root, per_class=2)
    for place in (
        "class_0/.ipynb_checkpoints/0-checkpoint",
        "class_1/._0",
        ".trash/0",
        ".cache/a/0",
    ):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(root / f"{place}.png")
    return root


@pytest.mark.parametrize("source", ["folder", "tar", "torch"])
def test_hidden_files_are_neither_images_nor_classes(tmp_path, source):
    root = with_hidden(tmp_path / ".hidden parents" / "set")
    if source == "torch":
        dataset = open_dataset("torch/image_folder", root=root)
    elif source == "tar":
        with tarfile.open(tmp_path / "set.tar", "w") as archive:
            archive.add(root, arcname="./data/../set")
        dataset = open_dataset(tmp_path / "set.tar")
        assert len(open_dataset(tmp_path / "set.tar", labelled=False)) == 4
    else:
        dataset = open_dataset(root)
        assert len(open_dataset(root, labelled=False)) == 4
    assert list(dataset.classes) == ["class_0", "class_1"]
    assert sorted(dataset[i][1] for i in range(len(dataset))) == [0, 0, 1, 1]


def test_links_are_followed_but_not_in_circles(tmp_path):
    root, more = write_images(tmp_path / "set", per_class=2), write_images(tmp_path / "more")
    (root / "class_0" / "linked").symlink_to(more / "class_0")
    (root / "class_0" / "again").symlink_to(more / "class_0")
    (more / "class_0" / "up").symlink_to(more)
    (root / "class_1" / "here").symlink_to(root / "class_1")
    (root / "class_1" / "up").symlink_to(root)
    (root / "class_1" / "gone.png").symlink_to(tmp_path / "gone.png")
    dataset = open_dataset(root)
    assert sorted(label for _, label in dataset.reader.samples) == [0] * 10 + [1] * 3
    with pytest.raises(UnreadableImageError, match="No such file"):
        dataset[len(dataset) - 1]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_would_hang_or_fill_the_memory(tmp_path, workers):
    root = write_images(tmp_path / "set", per_class=3)
    (root / "class_0" / "1.png").unlink()
    os.mkfifo(root / "class_0" / "1.png")
    Image.new("L", (1, 60_000)).save(root / "class_1" / "1.png")
    Image.new("RGB", (20, 10)).save(root / "class_1" / "2.png", "EPS")
    loader = eval_loader(root, CONFIG, batch_size=3, workers=workers)
    assert torch.cat([labels for _, labels in loader]).tolist() == [0, 0, 1]
    assert [file.reason.partition("x")[0][:11] for file in loader.unreadable] == [
        "it is no fi",
        "it has 1 ",
        "cannot iden",
    ]


def test_a_transform_that_fails_names_the_image(tmp_path):
    def transform(image):
        raise MemoryError("too large")

    dataset = open_dataset(write_images(tmp_path / "set"), transform)
    with pytest.raises(UnreadableImageError, match=r"class_0.0\.png cannot be .*: too large"):
        dataset[0]


@pytest.mark.parametrize(
    ("name", "root", "split"),
    [
        ("wds/x", "pipe:touch {marker} #", "a.tar|100"),
        ("wds/x", "http://127.0.0.1:9/", "a.tar|100"),
        ("wds/x", "data", "pipe:touch {marker}|100"),
        ("wds/x", "zip://a::b", "a.tar|1"),
    ],
)
def test_data_are_read_from_files_alone(tmp_path, name, root, split):
    marker = tmp_path / "marker"
    words = (text.format(marker=marker) for text in (root, split))
    with pytest.raises(InputError, match="not from pipes and addresses"):
        open_dataset(name, root=next(words), split=next(words))
    assert not marker.exists()


def test_names_with_long_numbers_are_sorted(tmp_path):
    for name in ("c10", "c9", "c" + "1" * 100, "c01"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
    assert open_dataset(tmp_path).classes == ["c01", "c9", "c10", "c" + "1" * 100]
