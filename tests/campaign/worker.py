"""A process that reads spoilt files, one by one.

``python -m tests.campaign.worker READER NUMBER`` reads one, and shows what becomes of it;
``VITRIM_FUZZ_SEED`` is the campaign's seed.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.campaign.readers import READERS
from vitrim.errors import VitrimError

SEED = os.environ.get("VITRIM_FUZZ_SEED", "0")
MOST_BYTES = 2 << 30
"""Of memory that a process may take while it reads."""


def prepared(name: str, template: Path, folder: Path, number: int) -> None:
    """Make input ``number`` of a reader in ``folder``; -1 is the good one."""
    reader = READERS[name]
    shutil.copytree(template, folder, symlinks=True)
    if number >= 0:
        reader.spoil(folder / reader.file, random.Random(f"{SEED}/{name}/{number}"), number)


def outcome(name: str, template: Path, number: int) -> dict[str, object]:
    """What becomes of one input: accepted, refused or failed, and why."""
    folder = Path(tempfile.mkdtemp(dir=template.parent)) / "input"
    prepared(name, template, folder, number)
    reset_peak()
    start = time.monotonic()
    kind, why = "accepted", ""
    try:
        READERS[name].read(folder)
    except VitrimError as error:
        kind, why = "refused", str(error)
    except BaseException as error:
        kind, why = "failed", f"{type(error).__name__}: {error}"[:300]
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/vitrim/" in f.filename]
        if frames:
            why += f" [{Path(frames[-1].filename).name}:{frames[-1].lineno}]"
    seconds, peak = time.monotonic() - start, peak_bytes()
    if peak > MOST_BYTES:
        kind, why = "failed", f"{peak >> 20} MB of memory; {why}"
    shutil.rmtree(folder.parent, ignore_errors=True)
    return {"kind": kind, "why": why, "seconds": seconds, "peak": peak}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def limit_memory() -> None:
    """An allocation that would go far beyond fails, and does not take the machine along."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 2 * MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


@contextmanager
def answers() -> Iterator[object]:
    """The standard output for answers alone: what is read prints into the void."""
    mine = os.fdopen(os.dup(1), "w")
    void = os.open(os.devnull, os.O_WRONLY)
    os.dup2(void, 1)
    os.dup2(void, 2)
    yield mine


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name, template = sys.argv[1], Path(sys.argv[2])
    if not template.is_dir():  # a number: one input, to be looked at
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "input"
            (Path(place) / "template").mkdir()
            READERS[name].make(Path(place) / "template")
            prepared(name, Path(place) / "template", folder, int(sys.argv[2]))
            limit_memory()
            READERS[name].read(folder)
            print("accepted")
        return
    with answers() as mine:
        limit_memory()
        for line in sys.stdin:
            print(json.dumps(outcome(name, template, int(line))), file=mine, flush=True)


if __name__ == "__main__":
    main()
