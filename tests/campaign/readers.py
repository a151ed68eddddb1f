"""Everything in vitrim that reads a file: a good one to start from, how it is spoilt, and the call.

A reader is made once in a folder of its own, and reads copies of it in which one file is spoilt.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor

import vitrim
from tests.campaign.mutations import NO_FILES, ODD, as_json, as_toml, no_file, spoil, spoil_bytes
from tests.conftest import forge, golden, golden_weights, seeded, tiny_swin, tiny_vit
from tests.tables import table_of
from tests.training import quiet, tiny_recipe, write_images
from vitrim import ASViTConfig, DynamicViTConfig, sparsify
from vitrim.budgets import schedule as schedules
from vitrim.cli import main
from vitrim.config import to_plain
from vitrim.convert import load_official, read_file
from vitrim.families import family_of
from vitrim.latency.measure import profile
from vitrim.latency.table import LatencyTable, predict
from vitrim.runtime import Bundle, UnreadableImageError, open_image, prepare
from vitrim.tasks.clips import held_out_reader, open_clips
from vitrim.tasks.coco import CocoFolder
from vitrim.tasks.coco_metrics import coco_metrics
from vitrim.tasks.sampling import Sampling
from vitrim.tasks.scenes import write_scenes
from vitrim.tasks.segmentation_data import LabelForm, SegmentationFolder
from vitrim.tasks.video_files import write_video
from vitrim.train.data import check_label_space, digits_data_config, eval_loader, open_dataset
from vitrim.train.engine import train
from vitrim.train.recipe import load_recipe

Spoil = Callable[[Path, random.Random, int], None]


@dataclass(frozen=True)
class Reader:
    """One kind of file."""

    inputs: int
    file: str
    """That is spoilt, in the folder."""
    make: Callable[[Path], Any]
    """Writes a folder with a good file."""
    read: Callable[[Path], Any]
    """Of the folder: success, or one of vitrim's errors."""
    spoil: Spoil


def structured(load: Callable[[str], Any], dump: Callable[[Any], bytes]) -> Spoil:
    """Mostly the structure, else the bytes; first what is no file at all."""

    def change(path: Path, rng: random.Random, number: int) -> None:
        if number < NO_FILES:
            return no_file(path, number)
        if rng.random() < 0.25:
            path.write_bytes(spoil_bytes(path.read_bytes(), rng))
        elif rng.random() < 0.02:
            path.write_bytes(dump(rng.choice(ODD)))
        else:
            path.write_bytes(dump(spoil(load(path.read_text()), rng, number)))
        return None

    return change


def by_bytes(path: Path, rng: random.Random, number: int) -> None:
    if number < NO_FILES:
        return no_file(path, number)
    path.write_bytes(spoil_bytes(path.read_bytes(), rng))
    return None


JSON = structured(json.loads, as_json)


def command(*words: str) -> None:
    """The command line, which ends with 0, or 2 and a message."""
    try:
        main(words)
    except SystemExit as end:
        if end.code not in (None, 0, 2):
            raise RuntimeError(f"vitrim {words[0]} ends with {end.code}") from end


# checkpoints


def make_checkpoint(folder: Path) -> None:
    config = DynamicViTConfig(stages=(1, 2), keep_ratio=0.7, threshold=None)
    sparse = sparsify(tiny_vit(), config, generator=seeded(0)).eval()
    with torch.no_grad():
        for weights in sparse.method.parameters():
            weights.add_(0.01)  # as if they were trained
    vitrim.calibrate(sparse, None, macs=(0.8, 0.9))
    sparse.save_pretrained(folder / "model", metrics={"top1": 50.0})


def read_checkpoint(folder: Path) -> None:
    model = folder / "model"
    if all((model / name).is_file() for name in ("config.json", "model.safetensors")):
        with suppress(Exception):  # too damaged for digests; a stranger would make them fit
            forge(model, lambda config: None)
    command("info", str(folder / "model"))
    sparse = vitrim.from_pretrained(folder / "model")
    size = sparse.data_config.get("input_size", (3, 32, 32))[1:]
    sparse(torch.zeros(1, 3, *size))


def make_detector(folder: Path) -> None:
    sparse = sparsify(tiny_swin(), vitrim.DynamicSpatialConfig(), generator=seeded(0)).eval()
    small = {"channels": 8, "box_width": 8, "mask_width": 8, "short_sides": (32,)}
    detector = vitrim.tasks.mask_rcnn(sparse, 3, classes=("a", "b"), **small).eval()
    detector.save_pretrained(folder / "model")


def read_detector(folder: Path) -> None:
    model = folder / "model"
    if all((model / name).is_file() for name in ("config.json", "model.safetensors")):
        with suppress(Exception):
            forge(model, lambda config: None)
    command("info", str(model))
    vitrim.tasks.from_pretrained(model)([torch.zeros(3, 32, 32)])


def spoil_weights(path: Path, rng: random.Random, number: int) -> None:
    """The bytes, the header's structure, or the tensors."""
    if number < NO_FILES or rng.random() < 0.4:
        return by_bytes(path, rng, number)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.5:
        header = as_json(spoil(json.loads(content[8 : 8 + length]), rng, number))
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    else:
        weights = spoil_tensors(safetensors.torch.load(content), rng, odd=False)
        path.write_bytes(safetensors.torch.save(weights))
    return None


# the authors' files


def spoil_tensors(weights: dict[str, Any], rng: random.Random, odd: bool = True) -> dict[Any, Any]:
    """Some tensors lost, renamed, or in another form."""
    weights = dict(weights)
    for _ in range(rng.choice((1, 1, 2, 5))):
        name = rng.choice([*weights])
        tensor = weights[name]
        if not isinstance(tensor, Tensor):
            continue
        changes: list[Callable[[], Any]] = [
            lambda: None,
            lambda t=tensor: torch.zeros(()),
            lambda t=tensor: torch.zeros(0, *t.shape),
            lambda t=tensor: t.flatten().clone(),
            lambda t=tensor: t.unsqueeze(0).clone(),
            lambda t=tensor: torch.zeros([side + 1 for side in t.shape]),
            lambda t=tensor: torch.cat([t, t]) if t.ndim else t,
            lambda t=tensor: t[: len(t) // 2].clone() if t.ndim else t,
            lambda t=tensor: torch.full_like(t, torch.nan, dtype=torch.float32),
            lambda t=tensor: torch.full_like(t, torch.inf, dtype=torch.float16),
            lambda t=tensor: torch.full_like(t, 1e300, dtype=torch.float64),
            *[
                lambda t=tensor, kind=kind: t.to(kind)
                for kind in (torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn)
            ],
        ]
        odder: list[Callable[[], Any]] = [
            lambda t=tensor: t.to(torch.complex64),
            lambda t=tensor: t.float().to_sparse() if t.ndim else t,
            lambda t=tensor: torch.zeros((), dtype=t.dtype).expand(t.shape),
            lambda t=tensor: torch.zeros(1).expand(*[10**6] * max(1, min(t.ndim, 2))),
            lambda t=tensor: torch.empty(t.shape, device="meta"),
            lambda t=tensor: rng.choice([None, 3, "text", [], {}, {"a": t}, 10**400]),
        ]
        new = rng.choice([*changes, *(odder if odd else [])])()
        if new is None:
            del weights[name]
        else:
            weights[name] = new
        if rng.random() < 0.2:
            digit = rng.choice(["9" * 5000, "999999999", "-1", "x", ""])
            weights["".join(digit if c.isdigit() else c for c in name)] = tensor
        if odd and rng.random() < 0.1:
            weights[rng.choice([3, None, ("a", 1), 2.5, b"x"])] = tensor
    return weights or {"x": torch.zeros(1)}


def make_official(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 1}
    model = timm.create_model("deit_small_patch16_224", num_classes=5, **sizes)
    sparse = sparsify(model, DynamicViTConfig(stages=(1, 2)), generator=seeded(3)).eval()
    state = {}
    for key, value in sparse.state_dict().items():
        key = key.removeprefix("backbone.").replace("method.predictors.", "score_predictor.")
        if key.startswith("score_predictor."):
            key = key.replace(".embed.", ".in_conv.").replace(".classify.", ".out_conv.")
        state[key] = value
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-3)}, folder / "model.pth")
    load_official(read_file(folder / "model.pth"), "dynamicvit", stages=(1, 2))


def spoil_pickle(path: Path, rng: random.Random, number: int) -> None:
    """The bytes, the pickle inside, or the tensors."""
    if number < NO_FILES or rng.random() < 0.3:
        return by_bytes(path, rng, number)
    content = torch.load(path, weights_only=False)
    kind = rng.random()
    if kind < 0.25:
        buffer = io.BytesIO()
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                if name.endswith("data.pkl"):
                    data = spoil_bytes(data, rng)
                new.writestr(name, data)
        path.write_bytes(buffer.getvalue())
        return None
    if kind < 0.8:
        content["model"] = spoil_tensors(content["model"], rng)
    elif kind < 0.9:
        content = rng.choice(
            [
                [content],
                content["model"],
                {"model": content},
                {"model": []},
                {},
                3,
                None,
                {"model": {}, "state_dict": content["model"]},
                {3: content["model"]},
            ]
        )
    content = content if kind < 0.9 else dict.fromkeys(content, rng.choice([None, 3, "x", [], {}]))
    torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.8)
    return None


def read_official(folder: Path) -> None:
    load_official(read_file(folder / "model.pth"), "dynamicvit", stages=(1, 2))


@cache
def golden_state(name: str) -> dict[str, Tensor]:
    return golden_weights(golden(name))


def authors(name: str, system: str) -> Reader:
    """The authors' own names and sizes; only tensors in memory are spoilt."""

    def change(path: Path, rng: random.Random, number: int) -> None:
        path.write_text(str(rng.getrandbits(63)))

    def read(folder: Path) -> None:
        seed, weights = (folder / "seed").read_text(), golden_state(name)
        load_official(spoil_tensors(weights, random.Random(seed)) if seed else weights, system)

    return Reader(60, "seed", lambda folder: (folder / "seed").touch(), read, change)


# budgets


def make_table(folder: Path) -> None:
    table_of(tiny_vit()).save(folder / "table.json")


def read_table(folder: Path) -> None:
    table = LatencyTable.load(folder / "table.json")
    model = tiny_vit()
    family = family_of(model)
    table.check(family, device=None)
    predict(table, None, family, family.grid())
    sparse = sparsify(model, DynamicViTConfig(stages=(1, 2), keep_ratio=0.7))
    predict(table, sparse.method, family, family.grid(), [11, 7])
    predict(
        table, sparse.method, family, family.grid(), [torch.tensor([11, 9]), torch.tensor([7, 3])]
    )


def make_side_file(folder: Path) -> None:
    profile_with(folder)


def profile_with(folder: Path) -> None:
    options: dict[str, Any] = {"points": 2, "rounds": 1, "min_seconds": 0.0, "configs": []}
    profile(tiny_vit(), side_file=folder / "partial.json", **options)


def make_schedule(folder: Path) -> None:
    schedule = schedules.Schedule(
        stages=(1, 3),
        counts=(10, 6),
        patches=16,
        milliseconds=3.0,
        macs=0.6,
        asked={"milliseconds": 3.1},
        method="dynamicvit",
        procedure="exact",
        signal="agreement on 64 images",
        loss=0.1,
        table={"device": "cpu", "batch": 1},
    )
    schedule.save(folder / "schedule.json")


def read_schedule(folder: Path) -> None:
    schedule = schedules.load(folder / "schedule.json")
    sparsify(tiny_vit(), schedule.apply(DynamicViTConfig()))(torch.zeros(1, 3, 32, 32))
    sparsify(tiny_vit(), schedule.apply(ASViTConfig()))
    schedule.save(folder / "again.json")


# training


def make_recipe(folder: Path) -> None:
    plain = json.loads(json.dumps(to_plain(tiny_recipe("images"))))
    plain["method"] = {"name": plain["method"]["name"], **plain["method"]["config"]}
    (folder / "recipe.toml").write_bytes(as_toml(without_none(plain)))


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return value


def read_recipe(folder: Path) -> None:
    json.dumps(to_plain(load_recipe(folder / "recipe.toml")))


def spoil_override(path: Path, rng: random.Random, number: int) -> None:
    keys = ("optim.lr", "run.epochs", "model.kwargs.depth", "name", "a.b.c", "augment.scale", "")
    texts = ("x", "1", "nan", "[1,", "{a=1}", "'", "[" * 50_000, "1" * 5000, "none", "", "\0")
    override = f"{rng.choice(keys)}{rng.choice(('=', '.x=', '', '=='))}{rng.choice(texts)}"
    path.write_bytes(
        spoil_bytes(override.encode(), rng) if rng.random() < 0.5 else override.encode()
    )


def read_override(folder: Path) -> None:
    override = (folder / "override").read_bytes().decode("utf-8", "replace")
    json.dumps(to_plain(load_recipe("digits-dense", [override])))


def make_run(folder: Path) -> None:
    """A run at its end: its recipe, log and states."""
    images = write_images(folder / "images")
    (folder / "images.txt").write_text(str(images))
    train(run_recipe(folder), folder / "run", on_progress=quiet)


def run_recipe(folder: Path) -> Any:
    images = (folder / "images.txt").read_text()
    return tiny_recipe(images, run__epochs=1, run__checkpoint_steps=1)


def read_run(folder: Path) -> None:
    for state in filter(Path.is_file, (folder / "run" / "state").glob("step_*.pt")):
        with suppress(OSError):
            digest = hashlib.sha256(state.read_bytes()).hexdigest()
            state.with_suffix(".sha256").write_text(f"{digest}  {state.name}\n")
    train(run_recipe(folder), folder / "run", on_progress=quiet)


def spoil_state(path: Path, rng: random.Random, number: int) -> None:
    """The bytes, or what is in it."""
    if number < NO_FILES or rng.random() < 0.4:
        return by_bytes(path, rng, number)
    state = torch.load(path, weights_only=False)
    name = rng.choice([*state])
    kind = rng.random()
    if kind < 0.3:
        del state[name]
    elif kind < 0.6:
        state[name] = rng.choice([None, -1, 10**30, "x", [], {}, float("nan"), torch.zeros(2)])
    elif isinstance(state.get("model"), dict):
        state["model"] = spoil_tensors(state["model"], rng, odd=False)
    torch.save(rng.choice([state] * 9 + [[state]]), path)
    return None


def spoil_log(path: Path, rng: random.Random, number: int) -> None:
    if number < NO_FILES or rng.random() < 0.3:
        return by_bytes(path, rng, number)
    lines = path.read_text().splitlines()
    place = rng.randrange(len(lines))
    spoilt = as_json(spoil(json.loads(lines[place]), rng, number))
    if rng.random() < 0.2:
        spoilt = as_json(rng.choice(ODD))
    path.write_bytes(b"\n".join([*(line.encode() for line in lines[:place]), spoilt, b""]))
    return None


# images


FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "TIFF",
    "PPM",
    "GIF",
    "ICO",
    "TGA",
    "PCX",
    "DDS",
    "JPEG2000",
)


def encoded(form: str, size: tuple[int, int] = (40, 30)) -> bytes:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, size=(size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def make_image(folder: Path) -> None:
    (folder / "data" / "cat").mkdir(parents=True)
    (folder / "data" / "cat" / "1.png").write_bytes(encoded("PNG"))
    (folder / "data" / "cat" / "2.png").write_bytes(encoded("PNG"))
    make_checkpoint(folder)


def spoil_image(path: Path, rng: random.Random, number: int) -> None:
    if number < NO_FILES:
        return no_file(path, number)
    if rng.random() < 0.1:
        buffer = io.BytesIO()
        size = rng.choice([(1, 60_000), (60_000, 1), (1, 1_000_000), (8000, 8000), (1, 1)])
        mode = rng.choice(["1", "L", "I;16", "P", "RGBA"])
        Image.new(mode, size).save(buffer, "PNG")
        path.write_bytes(buffer.getvalue())
    elif rng.random() < 0.1:
        text = [
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            b"<svg/>",
            b"",
            b"P6 9999999 9999999 255\n",
        ]
        path.write_bytes(rng.choice(text))
    else:
        path.write_bytes(spoil_bytes(encoded(rng.choice(FORMATS)), rng))
    return None


def read_image(folder: Path) -> None:
    data = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    data |= {"interpolation": "bicubic", "crop_pct": 0.9}
    for _ in eval_loader(folder / "data", data, 2):
        pass
    command("show", str(folder / "model"), str(folder / "data"), "-o", str(folder / "shown"))
    prepare(open_image(folder / "data" / "cat" / "1.png"), data)


def make_tar(folder: Path) -> None:
    write_images(folder / "images", per_class=2)
    with tarfile.open(folder / "data.tar", "w") as archive:
        archive.add(folder / "images", arcname="data")


def read_tar(folder: Path) -> None:
    data = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    for _ in eval_loader(folder / "data.tar", data | {"interpolation": "bicubic"}, 2):
        pass


def spoil_tar(path: Path, rng: random.Random, number: int) -> None:
    """The bytes, often those of a header, or odd members."""
    if number < NO_FILES or rng.random() < 0.3:
        return by_bytes(path, rng, number)
    content = bytearray(path.read_bytes())
    if rng.random() < 0.6:
        start = 512 * rng.randrange(len(content) // 512)
        content[start : start + 512] = spoil_bytes(bytes(content[start : start + 512]), rng)[:512]
        path.write_bytes(content)
        return None
    with tarfile.open(path, "a") as archive:
        name = rng.choice(
            [
                "../x.png",
                "/x.png",
                "data/\x1b[31m.png",
                "data/é/\n.png",
                "x.png",
                "a/" * 60 + "x.png",
            ]
        )
        member = tarfile.TarInfo(name)
        member.type = rng.choice(
            [
                tarfile.REGTYPE,
                tarfile.SYMTYPE,
                tarfile.FIFOTYPE,
                tarfile.LNKTYPE,
                tarfile.GNUTYPE_SPARSE,
            ]
        )
        member.linkname = "/etc/passwd"
        archive.addfile(member)
    return None


def make_class_map(folder: Path) -> None:
    write_images(folder / "images", per_class=1)
    (folder / "classes.txt").write_text("class_0\nclass_1\nclass_2\n")


def read_class_map(folder: Path) -> None:
    dataset = open_dataset(folder / "images", class_map=folder / "classes.txt")
    check_label_space(dataset, 3)


# scenes


def make_scenes(folder: Path) -> None:
    write_scenes(folder / "scenes", 3, side=64)


def read_coco(folder: Path) -> None:
    scenes = folder / "scenes"
    data = CocoFolder(scenes / "images", scenes / "instances.json", max_skipped=1)
    for index in range(len(data)):
        with suppress(UnreadableImageError):
            data[index]
    coco_metrics(data, [])


def read_label(folder: Path) -> None:
    form = LabelForm(num_classes=11)
    data = SegmentationFolder(folder / "scenes" / "images", folder / "scenes" / "labels", form)
    for index in range(len(data)):
        with suppress(UnreadableImageError):
            data[index]


# bundles


def make_video(folder: Path) -> None:
    write_video(folder / "clip.mp4", np.zeros((12, 32, 32, 3), np.uint8), 10)
    (folder / "clips.csv").write_text("path,label\nclip.mp4,3\nother.mp4,1\n")


def read_video(folder: Path) -> None:
    reader = held_out_reader(digits_data_config(32), Sampling(4, 2))
    for source in (folder / "clip.mp4", folder / "clips.csv"):
        open_clips(source, reader, labelled=source.suffix == ".csv")[0]


def make_bundle(folder: Path) -> None:
    from vitrim.export.bundle import export

    data = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    data |= {"interpolation": "bicubic", "crop_pct": 0.9}
    labels = [f"label {number}" for number in range(10)]
    export(tiny_vit(), folder / "bundle", "onnx", data_config=data, labels=labels)
    (folder / "1.png").write_bytes(encoded("PNG"))


def read_bundle(folder: Path) -> None:
    command("predict", str(folder / "bundle"), str(folder / "1.png"))
    bundle = Bundle(folder / "bundle", threads=1)
    with Image.open(folder / "1.png") as image:
        bundle(bundle.prepare([image, image]))


TOML = structured(tomllib.loads, as_toml)
READERS: dict[str, Reader] = {
    "config.json": Reader(300, "model/config.json", make_checkpoint, read_checkpoint, JSON),
    "model.safetensors": Reader(
        200, "model/model.safetensors", make_checkpoint, read_checkpoint, spoil_weights
    ),
    "detector": Reader(200, "model/config.json", make_detector, read_detector, JSON),
    "detector's weights": Reader(
        60, "model/model.safetensors", make_detector, read_detector, spoil_weights
    ),
    "authors' .pth": Reader(250, "model.pth", make_official, read_official, spoil_pickle),
    "authors' Swin": authors("dynamicvit_swin-t_r0.7_eval_b1", "dynamicvit"),
    "authors' ConvNeXt": authors("dynamicvit_convnext-t_r0.7_eval", "dynamicvit"),
    "authors' PiT": authors("spvit_pit-s_eval", "spvit"),
    "authors' STViT-R": authors("stvit-r_swin-t_eval", "stvit-r"),
    "latency table": Reader(250, "table.json", make_table, read_table, JSON),
    "side file": Reader(80, "partial.json", make_side_file, profile_with, JSON),
    "schedule": Reader(250, "schedule.json", make_schedule, read_schedule, JSON),
    "recipe TOML": Reader(300, "recipe.toml", make_recipe, read_recipe, TOML),
    "override": Reader(
        80,
        "override",
        lambda folder: (folder / "override").write_text("optim.lr=1"),
        read_override,
        spoil_override,
    ),
    "class map": Reader(60, "classes.txt", make_class_map, read_class_map, by_bytes),
    "bundle.json": Reader(250, "bundle/bundle.json", make_bundle, read_bundle, JSON),
    "network": Reader(120, "bundle/model.onnx", make_bundle, read_bundle, by_bytes),
    "trainer state": Reader(90, "run/state/step_000000004.pt", make_run, read_run, spoil_state),
    "recipe.json": Reader(80, "run/recipe.json", make_run, read_run, JSON),
    "log.jsonl": Reader(80, "run/log.jsonl", make_run, read_run, spoil_log),
    "image": Reader(250, "data/cat/1.png", make_image, read_image, spoil_image),
    "COCO json": Reader(300, "scenes/instances.json", make_scenes, read_coco, JSON),
    "label PNG": Reader(150, "scenes/labels/000001.png", make_scenes, read_label, spoil_image),
    "video": Reader(200, "clip.mp4", make_video, read_video, by_bytes),
    "CSV of videos": Reader(100, "clips.csv", make_video, read_video, by_bytes),
    "tar": Reader(120, "data.tar", make_tar, read_tar, spoil_tar),
}
