"""Spoilt files by the thousand: each ends in success or an error of ours, soon, in little memory.

    pytest -m campaign tests/campaign

``VITRIM_FUZZ_SEED`` draws other inputs. A failure names its input; to see it raised:
``python -m tests.campaign.worker READER NUMBER``.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.campaign.readers import READERS
from tests.campaign.worker import SEED

SECONDS = 20.0
"""An input may take, on a machine that does other things besides."""
ROOT = Path(__file__).parents[2]


class Worker:
    """A process that reads inputs of one reader; started anew when one hangs or kills it."""

    def __init__(self, name: str, template: Path) -> None:
        self.words = [sys.executable, "-m", "tests.campaign.worker", name, str(template)]
        self.process: Any = None

    def read(self, number: int) -> dict[str, Any]:
        started = self.process is None
        if started:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(self.words, cwd=ROOT, env=environment, **pipes)
        print(number, file=self.process.stdin, flush=True)
        limit = SECONDS + (120 if started else 0)  # imports
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        answer = self.process.stdout.readline() if ready else ""
        if answer:
            return json.loads(answer)
        code = self.close()
        why = f"the process died ({code})" if ready else f"no answer in {limit:g} s"
        return {"kind": "failed", "why": why, "seconds": limit, "peak": 0}

    def close(self) -> int | None:
        """End the process; what it ended with."""
        process, self.process = self.process, None
        if process is None:
            return None
        process.kill()
        process.stdin.close()
        process.stdout.close()
        return process.wait()


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", READERS)
def test_spoilt_files_are_refused(name, tmp_path, record_property):
    template = tmp_path / "template"
    template.mkdir()
    READERS[name].make(template)
    worker = Worker(name, template)
    try:
        assert worker.read(-1)["kind"] == "accepted"
        found = [worker.read(number) for number in range(READERS[name].inputs)]
    finally:
        worker.close()
    slow = [each for each in found if each["seconds"] > SECONDS and each["kind"] != "failed"]
    for each in slow:
        each |= {"kind": "failed", "why": f"{each['seconds']:.0f} s"}
    kinds = [each["kind"] for each in found]
    row = [name, len(kinds), *(kinds.count(kind) for kind in ("accepted", "refused", "failed"))]
    most = [max(each["seconds"] for each in found), max(each["peak"] for each in found) >> 20]
    record_property("campaign", [*row, *most])
    failures = [
        f"  python -m tests.campaign.worker {name!r} {number}: {each['why']}"
        for number, each in enumerate(found)
        if each["kind"] == "failed"
    ]
    assert not failures, f"VITRIM_FUZZ_SEED={SEED}\n" + "\n".join(failures)
