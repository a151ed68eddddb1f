"""Checkpoints and conversion: what is saved comes back; what is foreign or damaged is refused."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import pickle
import resource
import socket
import threading
import time
import zipfile
from collections import OrderedDict
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.utils.prune

from tests.conftest import forge, images, seeded, tiny_swin, tiny_vit
from vitrim import (
    ASViTConfig,
    CheckpointError,
    ConfigError,
    DynamicSpatialConfig,
    DynamicViTConfig,
    calibrate,
    from_pretrained,
    load_official,
    sparsify,
)
from vitrim.checkpoint import write_atomic
from vitrim.convert import read_file
from vitrim.families import described

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
    with pytest.raises(CheckpointError, match=r"damaged, or not of the same checkpoint"):
        from_pretrained(folder)
    forge(folder, lambda config: None)
    with pytest.raises(CheckpointError) as error:
        from_pretrained(folder)
    assert "missing backbone.blocks.3.norm1.weight" in str(error.value)
    assert "backbone.cls_token has shape (1, 1, 64) where (1, 1, 32) is due" in str(error.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.update(format="other"), CheckpointError, "not written by vitrim"),
        (lambda c: c.update(format_version=9), CheckpointError, "format version 9"),
        (lambda c: c.pop("backbone"), CheckpointError, "backbone is None; a table is due"),
        (lambda c: c["backbone"].update(name="no_such"), CheckpointError, "unknown to timm"),
        (lambda c: c["backbone"]["kwargs"].update(nonsense=1), ConfigError, "no argument of an"),
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
    forge(folder, change)
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
        ({"head.bias": torch.zeros(5, dtype=torch.int8)}, "head.bias is of torch.int8"),
        ({"head.bias": torch.zeros(5, dtype=torch.bool)}, "head.bias is of torch.bool"),
        ({"head.bias": torch.zeros(5, dtype=torch.complex64)}, "head.bias is of torch.complex"),
        ({"head.bias": torch.zeros(5).to(torch.float8_e5m2)}, "head.bias is of torch.float8"),
        ({"head.bias": torch.full((5,), math.nan)}, "not finite .*head.bias"),
        ({"head.bias": torch.full((5,), -math.inf)}, "not finite .*head.bias"),
        ({"head.bias": torch.tensor([1e300] * 5, dtype=torch.float64)}, "not finite .*head.bias"),
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
    create = described.create_backbone

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
    forge(folder, lambda config: config.update(data={"input_size": 3, "mean": 1}))
    with pytest.raises(CheckpointError, match="input_size of data is 3"):
        from_pretrained(folder)


def test_loading_may_change_the_method(folder):
    loaded = from_pretrained(folder, threshold=0.5)
    assert loaded.config.threshold == 0.5
    with pytest.raises(ConfigError, match="thresold"):
        from_pretrained(folder, thresold=0.5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"pretrained": True},
        {"pretrained_cfg": "x"},
        {"checkpoint_path": "/etc/passwd"},
        {"cache_dir": "/tmp"},
        {"features_only": True},
        {"scriptable": True},
        {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:1/x.py"}},
        {"pretrained_cfg_overlay": {"file": "/etc/passwd", "input_size": [3, 32, 32]}},
        {"pretrained_cfg_overlay": "x"},
        {"pretrained_cfg_overlay": {"input_size": {"a": 1}}},
        {"device": "cuda"},
        {"norm_layer": "os.system"},
        {"norm_layer": {"a": 1}},
        {"depth": 10_000},
        {"depth": [10, 10**9]},
        {"depth": "x"},
        {"depth": [[2]]},
        {"depth": [None]},
        {"depths": [1, 1, [1], 1]},
        {"num_heads": [True]},
        {"pretrained_cfg_overlay": {"input_size": "abc"}},
        {"pretrained_cfg_overlay": {"input_size": [3, 0, 0]}},
        {"embed_dim": 10**12},
        {"img_size": float("nan")},
        {"img_size": [1] * 1000},
        [1],
    ],
    ids=str,
)
def test_a_checkpoint_reaches_neither_network_nor_files(folder, kwargs, monkeypatch):
    def forbidden(*_args, **_kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr(socket.socket, "connect", forbidden)

    def change(config):
        if isinstance(kwargs, dict):
            config["backbone"]["kwargs"] |= kwargs
        else:
            config["backbone"]["kwargs"] = kwargs

    forge(folder, change)
    with pytest.raises((ConfigError, CheckpointError), match=r"backbone\.kwargs"):
        from_pretrained(folder)


def test_a_hostile_description_takes_neither_memory_nor_time(folder):
    for change in ({"embed_dim": 16384}, {"depth": 900}, {"img_size": 65536}, {"mlp_ratio": 6e4}):
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        forge(folder, lambda config, c=change: config["backbone"]["kwargs"].update(c))
        with pytest.raises(CheckpointError):
            from_pretrained(folder)
        assert time.monotonic() - began < 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


@pytest.mark.parametrize("field", ["keep_ratio", "stages", "temperature", "version"])
def test_every_setting_is_required(folder, field):
    forge(folder, lambda config: config["method"]["config"].pop(field))
    with pytest.raises(ConfigError, match=f"method.config lacks {field}"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weight: weight.fill_(torch.nan), "not finite"),
        (lambda weight: weight.fill_(torch.inf), "not finite"),
        (lambda weight: weight.double(), "weights of torch.float32 and torch.float64; one is due"),
        (lambda weight: weight.to(torch.int8), "torch.int8 where torch.float32 is due"),
        (lambda weight: weight.bool(), "torch.bool where"),
        (lambda weight: weight.to(torch.float8_e5m2), "weights of torch.float32 and torch.float8"),
        (lambda weight: weight.to(torch.complex64), "torch.complex64 where"),
    ],
)
def test_weights_of_no_use_are_refused(folder, spoil, message):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["method.predictors.0.embed.1.weight"] = spoil(
        weights["method.predictors.0.embed.1.weight"].clone()
    )
    path.write_bytes(safetensors.torch.save(weights))
    forge(folder, lambda config: None)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder)


def test_a_changed_number_or_setting_is_noticed(folder):
    path, config = folder / "model.safetensors", folder / "config.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    with pytest.raises(CheckpointError, match="digest is another"):
        from_pretrained(folder)
    path.write_bytes(whole)
    text = config.read_text()
    config.write_text(text.replace('"token_weight": 0.25', '"token_weight": 0.5'))
    with pytest.raises(CheckpointError, match="changed or damaged since it was written"):
        from_pretrained(folder)
    config.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "digests"}))
    with pytest.raises(CheckpointError, match="digest"):
        from_pretrained(folder)


def test_a_checkpoint_of_the_first_version_is_read(folder, sparse):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["digests"]
    path.write_text(json.dumps(config | {"format_version": 1}))
    assert torch.equal(from_pretrained(folder)(X), sparse(X))


def test_reading_while_another_process_saves(sparse, folder):
    other = copy.deepcopy(sparse)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    answers, stop = [sparse(X), other(X)], threading.Event()

    def save():
        while not stop.is_set():
            for model in (sparse, other):
                model.save_pretrained(folder)

    writer = threading.Thread(target=save)
    writer.start()
    try:
        for _ in range(20):
            found = from_pretrained(folder)(X)
            assert any(torch.equal(found, answer) for answer in answers)
    finally:
        stop.set()
        writer.join()


def replaced_head(model):
    model.backbone.head = torch.nn.Linear(32, 7)


def tied(model):
    model.backbone.blocks[1].mlp.fc1.weight = model.backbone.blocks[0].mlp.fc1.weight


def activation(model):
    model.backbone.blocks[0].mlp.act = torch.nn.ReLU()


def heads(model):
    for block in model.backbone.blocks:
        block.attn.num_heads, block.attn.head_dim = 4, 8


def epsilon(model):
    model.backbone.norm.eps = 0.5


def pruned(model):
    torch.nn.utils.prune.l1_unstructured(model.backbone.blocks[0].mlp.fc1, "weight", 0.5)


def hooked(model):
    model.backbone.blocks[0].register_forward_hook(lambda _m, _i, out: out * 2)


def spoiled(model):
    model.method.predictors[0].embed[1].bias.data[0] = torch.nan


def hooked_outside(model):
    model.register_forward_hook(lambda _m, _i, out: out + 1)


def of_the_method(model):
    for parameter in model.method.parameters():
        parameter.data.mul_(20)  # new ones hardly tell tokens apart
    model.method.predictors[0].embed[0].eps = 1.0


CHANGES = (
    of_the_method,
    replaced_head,
    tied,
    activation,
    heads,
    epsilon,
    pruned,
    hooked,
    hooked_outside,
    spoiled,
)


@pytest.mark.parametrize("change", CHANGES)
def test_what_could_not_be_rebuilt_is_refused_when_it_is_saved(sparse, tmp_path, change):
    change(sparse)
    with pytest.raises(CheckpointError):
        sparse.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_head_that_timm_replaced_is_saved(sparse, tmp_path):
    sparse.reset_classifier(7)
    sparse.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(X), sparse(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_checkpoint_keeps_its_type(sparse, tmp_path, dtype):
    sparse.to(dtype).save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(X.to(dtype)), sparse(X.to(dtype)))


def test_compiled_blocks_are_saved_under_timms_names(sparse, tmp_path):
    expected = sparse(X)
    sparse.backbone.blocks[0] = torch.compile(sparse.backbone.blocks[0], backend="eager")
    sparse.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(X), expected)


def test_buffers_that_no_file_holds_are_made(tmp_path):
    sparse = sparsify(tiny_swin(img_size=36), DynamicSpatialConfig(), generator=seeded(0)).eval()
    sparse.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert not any(buffer.is_meta for buffer in loaded.buffers())
    assert torch.equal(loaded(images(2, 36)), sparse(images(2, 36)))


def test_arguments_that_timm_cannot_run_are_refused(folder):
    forge(folder, lambda config: config["backbone"]["kwargs"].update(norm_layer="layernorm2d"))
    with pytest.raises(CheckpointError):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "metrics", [{"a": float("nan")}, {"a": object()}, {(1, 2): 3}], ids=["nan", "object", "key"]
)
def test_metrics_that_no_file_holds_are_named(sparse, tmp_path, metrics):
    with pytest.raises(CheckpointError, match="origin, metrics or data"):
        sparse.save_pretrained(tmp_path / "model", metrics=metrics)
    assert not (tmp_path / "model").exists()


def test_views_of_one_tensor_are_saved_whole(sparse, tmp_path):
    shared = torch.randn(192, 32, generator=seeded(5)) / 10
    sparse.backbone.blocks[0].mlp.fc1.weight.data = shared[:128]
    sparse.backbone.blocks[1].mlp.fc1.weight.data = shared[64:]
    sparse.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(X), sparse(X))


def test_threads_save_and_turn_one_model(sparse, tmp_path):
    stop, errors = threading.Event(), []

    def turn():
        while not stop.is_set():
            for ratio in ((0.9, 0.8), (0.4, 0.2)):
                sparse.set_keep_ratio(ratio)

    def save():
        try:
            for _ in range(6):
                sparse.save_pretrained(tmp_path)
        except Exception as error:
            errors.append(error)

    turner = threading.Thread(target=turn)
    savers = [threading.Thread(target=save) for _ in range(2)]
    turner.start()
    for saver in savers:
        saver.start()
    for saver in savers:
        saver.join()
    stop.set()
    turner.join()
    assert not errors
    assert from_pretrained(tmp_path).config.keep_ratio in ((0.9, 0.8), (0.4, 0.2))


def test_compiling_a_block_keeps_the_record_of_a_calibration(tmp_path):
    sparse = sparsify(tiny_vit(), ASViTConfig(thresholds=0.06)).eval()
    calibrate(sparse, [images(8)], macs=(0.6, 0.75))
    sparse.backbone.blocks[0] = torch.compile(sparse.backbone.blocks[0], backend="eager")
    sparse.set_budget(0.7)
    sparse.save_pretrained(tmp_path)
    assert len(from_pretrained(tmp_path).calibration) == 2
