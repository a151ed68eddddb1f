"""Kills at random moments: whatever a run was doing, it goes on to the same end, to the bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import vitrim
from tests.training import curve
from vitrim.train.state import load_state

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(900)]

KILLS = 20
RUNS = 4
TINY = (
    "model.weights=none",
    "model.kwargs={img_size=48, patch_size=12, embed_dim=32, depth=4, num_heads=2, num_classes=10}",
    "method.stages=[1, 2]",
    "data.length=48",
    "data.val_length=16",
    "data.batch_size=8",
    "optim.ema_decay=0.9",
    "run.epochs=40",
    "run.log_every=1",
    "run.checkpoint_steps=2",
    "run.tensorboard=false",
    "run.precision=fp32",
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(folder: Path, workers: int) -> subprocess.Popen[bytes]:
    changes = [word for change in (*TINY, f"data.workers={workers}") for word in ("--set", change)]
    command = [sys.executable, "-m", "vitrim", "train", "digits-dynamicvit", "-o", str(folder)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *changes], env=ENVIRONMENT, **quiet)


def finish(folder: Path, workers: int = 0) -> None:
    with start(folder, workers) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def check_whole(folder: Path) -> None:
    """Whatever lies there at any moment can be opened."""
    load_state(folder)
    if (folder / "checkpoint" / "config.json").exists():
        vitrim.from_pretrained(folder / "checkpoint")


def kill(folder: Path, workers: int, wait: float) -> bool:
    """Kill a run some seconds after its first step; whether it was still running."""
    process, log = start(folder, workers), folder / "log.jsonl"
    before = log.stat().st_size if log.exists() else 0
    while process.poll() is None and not (log.exists() and log.stat().st_size > before):
        time.sleep(0.002)
    time.sleep(wait)
    was_running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    check_whole(folder)
    return was_running


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
    whole, draw, kills = tmp_path / "whole", random.Random(0), 0
    finish(whole)
    expected = safetensors.torch.load_file(whole / "checkpoint" / "model.safetensors")
    for number in range(RUNS):
        folder, workers = tmp_path / f"killed_{number}", number % 3
        for _ in range(KILLS // RUNS):
            kills += kill(folder, workers, draw.uniform(0, 0.4))
        finish(folder, workers)
        assert curve(folder) == curve(whole)
        assert same(load_state(folder), load_state(whole))
        assert same(
            safetensors.torch.load_file(folder / "checkpoint" / "model.safetensors"), expected
        )
        assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".lock"))]
    assert kills == KILLS
