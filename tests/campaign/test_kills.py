"""Kills at random moments: whatever a run was doing, it goes on to the same end, to the bit."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import vitrim
from tests.training import curve, quiet
from vitrim.train.engine import train
from vitrim.train.recipe import load_recipe
from vitrim.train.state import load_state

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(900)]

KILLS = 20
KILLS_OF_A_RUN = 5
TINY = [
    "model.weights=none",
    "model.kwargs={img_size=48, patch_size=12, embed_dim=32, depth=4, num_heads=2, num_classes=10}",
    "method.stages=[1, 2]",
    "data.length=48",
    "data.val_length=16",
    "data.batch_size=8",
    "optim.ema_decay=0.9",
    "run.epochs=12",
    "run.log_every=1",
    "run.checkpoint_steps=2",
    "run.tensorboard=false",
    "run.precision=fp32",
]
SERVER = multiprocessing.get_context("forkserver")  # imports once what every run needs
SERVER.set_forkserver_preload(["tests.campaign.test_kills", "accelerate", "sklearn.datasets"])


def run(folder: Path, workers: int) -> None:
    torch.set_num_threads(1)
    recipe = load_recipe("digits-dynamicvit", [*TINY, f"data.workers={workers}"])
    train(recipe, folder, on_progress=quiet)


def start(folder: Path, workers: int) -> multiprocessing.process.BaseProcess:
    process = SERVER.Process(target=run, args=(folder, workers))
    process.start()
    return process


def finish(folder: Path, workers: int = 0) -> None:
    process = start(folder, workers)
    process.join()
    assert process.exitcode == 0


def check_whole(folder: Path) -> None:
    """Whatever lies there at any moment can be opened."""
    load_state(folder)
    if (folder / "checkpoint" / "config.json").exists():
        vitrim.from_pretrained(folder / "checkpoint")


def written(file: Path) -> int:
    """When, in nanoseconds; 0 where it is absent."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def kill(folder: Path, workers: int, wait: float) -> int:
    """Kill a run some seconds after it began or went on; 1 where it was running still."""
    log = folder / "log.jsonl"
    before = written(log)
    process = start(folder, workers)
    while process.is_alive() and written(log) in (0, before):
        time.sleep(0.002)
    process.join(wait)
    process.kill()
    process.join()
    check_whole(folder)
    return int(process.exitcode < 0)


def tensors_of(state):
    """Every tensor and number of a nested state, in order."""
    if isinstance(state, dict):
        return [value for key in sorted(state, key=str) for value in tensors_of(state[key])]
    if isinstance(state, list | tuple):
        return [value for entry in state for value in tensors_of(entry)]
    return [state]


def same(one, other) -> bool:
    pairs = zip(tensors_of(one), tensors_of(other), strict=True)
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs)


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    whole, draw, kills, number = tmp_path / "whole", random.Random(0), 0, 0
    finish(whole)
    expected = safetensors.torch.load_file(whole / "checkpoint" / "model.safetensors")
    while kills < KILLS:
        folder, workers = tmp_path / f"killed_{number}", number % 3
        for _ in range(KILLS_OF_A_RUN):
            kills += kill(folder, workers, draw.uniform(0, 0.6))
        finish(folder, workers)
        assert curve(folder) == curve(whole)
        assert same(load_state(folder), load_state(whole))
        assert same(
            safetensors.torch.load_file(folder / "checkpoint" / "model.safetensors"), expected
        )
        assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".lock"))]
        number += 1
