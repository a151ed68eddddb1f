"""Pushing to the hub and loading from it, by a small server that speaks the needed part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import forge, images, tiny_vit
from tests.small_hub import hub
from vitrim import (
    CheckpointError,
    ConfigError,
    DynamicViTConfig,
    MergingConfig,
    from_pretrained,
    sparsify,
)
from vitrim.cli import main
from vitrim.hub import is_hub_name
from vitrim.tasks.classification import create_task
from vitrim.train.recipe import load_recipe

__all__ = ["hub"]

huggingface_hub = pytest.importorskip("huggingface_hub")

X = images(2)


def merged():
    sparse = sparsify(tiny_vit(), MergingConfig(stages=(1, 2), keep_ratio=0.6)).eval()
    sparse.labels = tuple("abcdefghij")
    return sparse


def test_a_model_goes_to_the_hub_and_comes_back(hub, capsys):
    sparse = merged()
    metrics = {"top-1 on 1,300 validation images": 81.38, "ms | batch 1, 2 threads": 12.5}
    address = sparse.push_to_hub("me/model", metrics=metrics)
    assert "/me/model/commit/" in address
    again = from_pretrained("me/model")
    assert torch.equal(again(X), sparse(X))
    assert again.labels == sparse.labels
    card = hub.commits["main"]["README.md"].decode()
    for text in (
        "`merging`",
        "keep_ratio 0.6",
        "81.38",
        "ms \\| batch 1, 2 threads | 12.5",
        "GMACs",
    ):
        assert text in card
    assert "license: " in card
    assert "licence of the backbone" in card
    with pytest.raises(SystemExit) as exit_:
        main(["info", "me/model"])
    assert not exit_.value.code
    assert "merging" in capsys.readouterr().out


def test_a_revision_is_a_branch_or_a_commit(hub):
    sparse = merged()
    sparse.push_to_hub("me/model", revision="half")
    commit = next(key for key in hub.commits if key != "half")
    sparse.set_budget(0.6)
    sparse.push_to_hub("me/model")
    for revision in ("half", commit):
        assert from_pretrained("me/model", revision=revision).config.keep_ratio == 0.6
    assert from_pretrained("me/model").config.keep_ratio != 0.6
    with pytest.raises(CheckpointError, match="me/model at revision none is no folder here"):
        from_pretrained("me/model", revision="none")


def test_a_folder_wins_over_the_hub(hub):
    merged().save_pretrained("me/model")
    asked = len(hub.asked)
    from_pretrained("me/model")
    assert len(hub.asked) == asked
    with pytest.raises(CheckpointError, match="is of models on the hub"):
        from_pretrained("me/model", revision="main")


def test_what_is_not_there_is_one_clear_line(hub, capsys):
    for name in ("you/nothing", "me/nothing"):
        with pytest.raises(
            CheckpointError, match=f"{name} is no folder here, and cannot be fetched"
        ):
            from_pretrained(name)
    with pytest.raises(SystemExit) as exit_:
        main(["info", "you/nothing"])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "check the name, the revision and the network" in said


def test_offline_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be fetched from the hub"):
        from_pretrained("me/model")
    with pytest.raises(CheckpointError, match="cannot be pushed to the hub"):
        merged().push_to_hub("me/model")


def test_no_weights_are_fetched_before_the_config_was_checked(hub, tmp_path):
    merged().push_to_hub("me/model")
    files = hub.commits["main"]
    config = json.loads(files["config.json"])
    for change in (
        {"backbone": {"name": "deit_tiny_patch16_224", "kwargs": {"pretrained": True}}},
        {"format": "other"},
    ):
        files["config.json"] = json.dumps(config | change).encode()
        hub.asked.clear()
        with pytest.raises(CheckpointError):
            from_pretrained("me/model", revision="main")
        assert not any("model.safetensors" in path for path in hub.asked)


def test_a_strangers_config_reaches_no_file_and_no_network(hub, tmp_path):
    sparse = merged()
    sparse.save_pretrained(tmp_path / "made")
    forge(tmp_path / "made", lambda c: c["backbone"]["kwargs"].update(checkpoint_path="x.pth"))
    hub.commits["c" * 40] = hub.commits["main"] = {
        name: (tmp_path / "made" / name).read_bytes()
        for name in ("config.json", "model.safetensors")
    }
    with pytest.raises(ConfigError, match="is no argument of an architecture"):
        from_pretrained("me/model")


def test_what_a_recipe_says_reaches_no_hub(hub):
    recipe = load_recipe("dynamicvit-adapt", ['model.checkpoint="me/model"'])
    with pytest.raises(CheckpointError, match="no vitrim checkpoint"):
        create_task(recipe)
    assert not hub.asked
    assert is_hub_name("me/model")
    for source in (
        Path("me/model"),
        "model",
        "a/b/c",
        "../model",
        "/me/model",
        "me/..",
        "me\n/model",
    ):
        assert not is_hub_name(source)


def test_a_name_of_no_model_is_refused():
    with pytest.raises(CheckpointError, match="expected owner/name"):
        sparsify(tiny_vit(), DynamicViTConfig(stages=(1,))).push_to_hub("model")
