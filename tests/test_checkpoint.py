"""Checkpoints and conversion: what is saved comes back; what is foreign or damaged is refused."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from functools import partial

import pytest
import safetensors.torch
import timm
import torch

from tests.conftest import images, seeded, tiny_vit
from vitrim import (
    CheckpointError,
    ConfigError,
    DynamicViTConfig,
    checkpoint,
    from_pretrained,
    load_official,
    sparsify,
)
from vitrim.checkpoint import write_atomic
from vitrim.convert import read_file

X = images(2)
JAGGED = torch.nested.as_nested_tensor([torch.zeros(5)], layout=torch.jagged)


@pytest.fixture
def sparse():
    config = DynamicViTConfig(stages=(1, 2), keep_ratio=(0.6, 0.3), token_weight=0.25)
    return sparsify(tiny_vit(drop_path_rate=0.1), config, generator=seeded(0)).eval()


@pytest.fixture
def folder(sparse, tmp_path):
    sparse.save_pretrained(tmp_path / "model", metrics={"top1": 50.0})
    return tmp_path / "model"


def test_save_and_load_are_equal(sparse, folder):
    loaded = from_pretrained(folder)
    assert torch.equal(loaded(X), sparse(X))
    assert loaded.config == sparse.config
    assert loaded.backbone.pretrained_cfg["architecture"] == "vit_tiny_patch16_224"
    assert not loaded.training
    loaded.save_pretrained(folder)  # over itself
    assert torch.equal(from_pretrained(folder)(X), sparse(X))


def test_run_time_changes_are_saved(sparse, folder):
    sparse.set_keep_ratio((0.5, 0.25))
    sparse.save_pretrained(folder)
    assert from_pretrained(folder).config.keep_ratio == (0.5, 0.25)


def test_config_says_what_it_is(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == "vitrim"
    assert config["backbone"]["kwargs"]["embed_dim"] == 32
    assert config["method"]["name"] == "dynamicvit"
    assert config["metrics"] == {"top1": 50.0}
    assert set(config["versions"]) == {"vitrim", "torch", "timm"}
    assert config["data"]["mean"]
    names = set(safetensors.torch.load_file(folder / "model.safetensors"))
    assert "backbone.blocks.0.attn.qkv.weight" in names
    assert "method.predictors.0.classify.4.bias" in names
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_backbone_that_timm_did_not_make_cannot_be_saved(tmp_path):
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2
    )
    with pytest.raises(CheckpointError, match=r"not made by timm.create_model"):
        sparsify(model, DynamicViTConfig()).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        from_pretrained(folder)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.filterwarnings("ignore")
def test_a_pickle_posing_as_a_checkpoint(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="or a pickle"):
        from_pretrained(folder)
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"model": Bomb()}))
    with pytest.raises(CheckpointError, match="refuses to run"):
        read_file(tmp_path / "bomb.pth")
    torch.save({"model": Bomb()}, tmp_path / "zip.pth")
    with pytest.raises(CheckpointError, match="refuses to run"):
        read_file(tmp_path / "zip.pth")


def test_weights_of_another_architecture(folder):
    other = sparsify(tiny_vit(depth=3, embed_dim=64), DynamicViTConfig(stages=(1, 2)))
    other.save_pretrained(folder.parent / "other")
    (folder.parent / "other" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        from_pretrained(folder)
    assert "missing backbone.blocks.3.norm1.weight" in str(error.value)
    assert "backbone.cls_token has shape (1, 1, 64) where (1, 1, 32) is due" in str(error.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.update(format="other"), CheckpointError, "not written by vitrim"),
        (lambda c: c.update(format_version=9), CheckpointError, "format version 9"),
        (lambda c: c.pop("backbone"), CheckpointError, "lacks backbone"),
        (lambda c: c["backbone"].update(name="no_such"), CheckpointError, "unknown to timm"),
        (lambda c: c["backbone"]["kwargs"].update(nonsense=1), CheckpointError, "cannot create"),
        (lambda c: c["method"].update(name="dynamicvt"), ConfigError, "did you mean 'dynamicvit'"),
        (
            lambda c: c["method"]["config"].update(keep_ration=1),
            ConfigError,
            r"unknown key 'method.keep_ration' \(did you mean 'keep_ratio'",
        ),
        (lambda c: c["method"]["config"].update(keep_ratio=7), ConfigError, "keep_ratio is 7"),
        (lambda c: c["method"]["config"].update(stages="x"), ConfigError, "method.stages is 'x'"),
    ],
)
def test_damaged_configs(folder, change, error, message):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        from_pretrained(folder)


def test_other_things_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config.json"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(CheckpointError, match="damaged"):
        from_pretrained(tmp_path)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full_disk(_):
        raise OSError("disk full")

    monkeypatch.setattr("vitrim.checkpoint.os.fsync", full_disk)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def official_state(sparse):
    """The state dict as the authors' code names it."""
    state = {}
    for key, value in sparse.state_dict().items():
        key = key.removeprefix("backbone.").replace("method.predictors.", "score_predictor.")
        if key.startswith("score_predictor."):
            key = key.replace(".embed.", ".in_conv.").replace(".classify.", ".out_conv.")
        state[key] = value
    return state


@pytest.fixture
def official():
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=4, num_classes=5)
    sparse = sparsify(model, DynamicViTConfig(stages=(1, 2), keep_ratio=0.5), generator=seeded(3))
    return sparse.eval()


@pytest.mark.parametrize("wrap", [None, "model", "model_ema"])
def test_official_weights_in_any_wrapping(official, wrap):
    state = official_state(official)
    content = {wrap: state, "epoch": 3} if wrap else state
    model = load_official(content, "dynamicvit", stages=(1, 2), keep_ratio=0.5)
    x = images(2, size=64)
    assert torch.equal(model(x), official(x))


def test_official_files(official, tmp_path):
    path = tmp_path / "official.pth"
    content = {"model": official_state(official), "args": argparse.Namespace(lr=1e-3)}
    torch.save(content, path)
    model = load_official(read_file(path), "dynamicvit", stages=(1, 2), keep_ratio=0.5)
    model.save_pretrained(tmp_path / "converted")
    again = from_pretrained(tmp_path / "converted")
    x = images(2, size=64)
    assert torch.equal(again(x), official(x))
    assert (
        "DynamicViT" in json.loads((tmp_path / "converted" / "config.json").read_text())["origin"]
    )


def test_every_key_that_does_not_fit_is_named(official):
    state = official_state(official)
    del state["blocks.1.norm1.weight"]
    state["blocks.1.extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        load_official(state, "dynamicvit", stages=(1, 2))
    assert "missing backbone.blocks.1.norm1.weight" in str(error.value)
    assert "unexpected backbone.blocks.1.extra" in str(error.value)


def test_official_mistakes(official, tmp_path):
    state = official_state(official)
    with pytest.raises(ConfigError, match="unknown system 'dynamicvt'"):
        load_official(state, "dynamicvt")
    with pytest.raises(ConfigError, match="unknown key 'keepratio'"):
        load_official(state, "dynamicvit", keepratio=0.7)
    with pytest.raises(CheckpointError, match="2 predictors, the config 3 stages"):
        load_official(state, "dynamicvit")
    with pytest.raises(CheckpointError, match="'deit_huge' is unknown to timm"):
        load_official(state, "dynamicvit", architecture="deit_huge")
    with pytest.raises(CheckpointError, match="timm cannot create 'resnet50'"):
        load_official(state, "dynamicvit", architecture="resnet50")
    with pytest.raises(CheckpointError, match=r"pos_embed has shape \(17,\)"):
        load_official(state | {"pos_embed": torch.zeros(17)}, "dynamicvit")
    with pytest.raises(CheckpointError, match="no score_predictor"):
        load_official(tiny_state(), "dynamicvit")
    with pytest.raises(CheckpointError, match="no plain vision transformer"):
        load_official({"fc.weight": torch.zeros(1)}, "dynamicvit")
    with pytest.raises(CheckpointError, match="no state dict"):
        load_official({"epoch": 3}, "dynamicvit")
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "absent.pth", tmp_path, tmp_path / "pipe.pth", "/dev/zero"):
        with pytest.raises(CheckpointError, match=f"{path} is no file"):
            read_file(path)
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(CheckpointError, match="damaged"):
        read_file(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: torch.zeros(1)}, "no state dict.*found 3"),
        ({("a",): torch.zeros(1)}, "no state dict"),
        ({"epoch": 10**5000}, "no state dict.*'epoch'"),
        ({"blocks.0.norm1.weight": [1.0]}, "no state dict.*norm1"),
        ({"cls_token": torch.zeros(())}, r"cls_token has shape \(\)"),
        ({"patch_embed.proj.weight": torch.zeros(())}, r"proj.weight has shape \(\)"),
        ({"head.weight": torch.zeros(())}, r"head.weight has shape \(\)"),
        ({"head.weight": torch.zeros(0, 192)}, "none empty"),
        ({"blocks.0.mlp.fc1.weight": torch.zeros(())}, r"fc1.weight has shape \(\)"),
        ({"blocks.0.mlp.fc1.bias": torch.zeros(())}, r"fc1.bias has shape \(\) where \(768,\)"),
        ({"pos_embed": torch.zeros(1, 1, 192)}, "does not fit|cannot create|no model"),
        ({f"blocks.{'9' * 5000}.x": torch.zeros(1)}, "no model"),
        ({f"blocks.{i}.x": torch.zeros(1) for i in range(2000)}, "2000 blocks"),
        ({"head.bias": torch.zeros(5).to_sparse()}, "no plain tensors"),
        ({"head.bias": torch.zeros(5, device="meta")}, "no plain tensors"),
        ({"head.bias": torch.zeros(1).expand(5)}, "no plain tensors"),
        ({"cls_token": torch.zeros(1).expand(1, 1, 10**12)}, "no plain tensors"),
        ({"head.bias": JAGGED}, "no plain tensors"),
        ({"head.bias": torch.zeros(5, dtype=torch.int8)}, "no weight's.*head.bias .*int8"),
        ({"head.bias": torch.zeros(5, dtype=torch.bool)}, "no weight's.*head.bias .*bool"),
        ({"head.bias": torch.zeros(5, dtype=torch.complex64)}, "no weight's.*head.bias .*complex"),
        ({"head.bias": torch.zeros(5).to(torch.float8_e5m2)}, "no weight's.*head.bias .*float8"),
        ({"head.bias": torch.full((5,), math.nan)}, "not finite.*head.bias"),
        ({"head.bias": torch.full((5,), -math.inf)}, "not finite.*head.bias"),
        ({"head.bias": torch.tensor([1e300] * 5, dtype=torch.float64)}, "not finite.*head.bias"),
    ],
)
def test_official_weights_that_are_none(official, change, message):
    state = official_state(official)
    with pytest.raises(CheckpointError, match=message):
        load_official(state | change, "dynamicvit", stages=(1, 2))


@pytest.mark.parametrize(
    ("state", "system", "message"),
    [
        ({"layers.0.x": (1,), "patch_embed.proj.weight": (8, 3, 4, 4)}, "dynamicvit", "0 blocks"),
        ({"downsample_layers.0.0.weight": (8, 3, 4, 4)}, "dynamicvit", "0 blocks"),
        ({"layers.2.blocks.1.attn.q.weight": (8, 8)}, "stvit-r", "0 blocks"),
        (
            {"layers.2.blocks.1.attn.q.weight": (), "layers.9999999999.blocks.0.norm1.weight": ()},
            "stvit-r",
            "1 stages",
        ),
        ({"transformers.0.x": (), "pos_embed": (1, 8, 8, 8)}, "spvit", "missing patch_embed.conv"),
        ({"score_predictor.0.keep_threshold": ()}, "asvit", "missing cls_token"),
    ],
)
def test_official_weights_of_no_model(state, system, message):
    weights = {name: torch.zeros(shape) for name, shape in state.items()}
    with pytest.raises(CheckpointError, match=message):
        load_official(weights, system)


def test_a_dictionary_with_names_of_its_own_is_read_as_one(official, tmp_path):
    """An OrderedDict may carry attributes in the place of its methods."""
    state = OrderedDict(official_state(official))
    state.get = state.keys = "no method"
    torch.save(state, tmp_path / "odd.pth")
    load_official(read_file(tmp_path / "odd.pth"), "dynamicvit", stages=(1, 2))
    with pytest.raises(CheckpointError, match="no state dict"):
        load_official({"model": {"model": official_state(official)}}, "dynamicvit")


def test_what_does_not_fit_takes_no_memory(official, monkeypatch):
    """A backbone of a billion parameters is refused before it has any."""
    state, made = official_state(official), []
    create = checkpoint.create_backbone

    def watched(description):
        made.append(create(description))
        return made[-1]

    monkeypatch.setattr("vitrim.convert.official.create_backbone", watched)
    with pytest.raises(CheckpointError, match="does not fit this architecture"):
        load_official(state, "dynamicvit", architecture="vit_giant_patch14_224", stages=(1, 2))
    (giant,) = made
    assert all(tensor.is_meta for tensor in giant.state_dict().values())


def test_a_compressed_file_is_refused(tmp_path):
    """Forty kilobytes may hold any number of zeros."""
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 10**6)}}, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    read_file(tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match="is compressed"):
        read_file(tmp_path / "small.pth")


def tiny_state():
    return timm.create_model("deit_tiny_patch16_224", img_size=64, depth=4).state_dict()


def test_damaged_files_never_leak_other_errors(official, tmp_path):
    """Bytes flipped anywhere in an authors' file give our error, or tensors."""
    path = tmp_path / "official.pth"
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 8)}}, path)
    whole = path.read_bytes()
    generator = seeded(0)
    for _ in range(150):
        place, value = torch.randint(0, 2**31, (2,), generator=generator).tolist()
        damaged = bytearray(whole)
        damaged[place % len(whole)] = value % 256
        path.write_bytes(damaged)
        try:
            read_file(path)
        except CheckpointError:
            continue


def test_a_backbone_of_unwritable_arguments_is_refused(tmp_path):
    model = tiny_vit(norm_layer=partial(torch.nn.LayerNorm, eps=1e-3))
    with pytest.raises(CheckpointError, match="an argument that no file can hold"):
        sparsify(model, DynamicViTConfig(stages=(1,))).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_data_config_must_be_one(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"data": {"input_size": 3, "mean": 1}}))
    with pytest.raises(CheckpointError, match="data config"):
        from_pretrained(folder)


def test_loading_may_change_the_method(folder):
    loaded = from_pretrained(folder, threshold=0.5)
    assert loaded.config.threshold == 0.5
    with pytest.raises(ConfigError, match="thresold"):
        from_pretrained(folder, thresold=0.5)
