"""What a run leaves behind and shows: ``log.jsonl`` always, TensorBoard and a bar where there are.

Only the main process makes these.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from vitrim.checkpoint import write_atomic
from vitrim.errors import TrainingError
from vitrim.train.folder import writing

LOG_FILE = "log.jsonl"

Record = dict[str, Any]

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the records of a run, one by one."""

    def write(self, record: Record) -> None:
        """Take one record: ``step``, ``epoch``, and numbers by name."""

    def close(self) -> None:
        """The run is over."""


class JsonLines:
    """``log.jsonl``: one line per record, the record of truth.

    Lines after ``step`` are cut off first: the run went on from there, and writes them anew.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder, path = folder, folder / LOG_FILE
        kept = [record for record in read_log(folder) if record["step"] <= step]
        with writing(folder):
            write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)

    def write(self, record: Record) -> None:
        with writing(self._folder):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # of a line that the disk has refused already
            self._file.close()


def read_log(folder: Path) -> list[Record]:
    """The records of ``log.jsonl`` without damaged lines, which are named, and without a last one
    that a kill left torn.
    """
    path = folder / LOG_FILE
    records = []
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror}); remove it") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode())
            if type(record) is not dict or type(record.get("step")) is not int:
                raise ValueError("it is no record with a step")
            records.append(record)
        except (ValueError, RecursionError) as error:
            if line.endswith(b"\n"):
                logger.warning("left out line %d of %s: %s", number, path, error)
    return records


class TensorBoard:
    """TensorBoard files beside the log."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class Callback:
    """Hands every record to a function."""

    def __init__(self, function: Callable[[Record], None]) -> None:
        self._function = function

    def write(self, record: Record) -> None:
        self._function(record)

    def close(self) -> None:
        pass


class PlainLines:
    """One line per record, for files and pipes."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps

    def write(self, record: Record) -> None:
        print(f"step {record['step']}/{self._total}  {summary(record)}", file=sys.stderr)

    def close(self) -> None:
        pass


class RichBar:
    """A progress bar for a terminal."""

    def __init__(self, total_steps: int, step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=total_steps, completed=step)
        self._progress.start()

    def write(self, record: Record) -> None:
        self._progress.update(self._task, completed=record["step"], description=summary(record))

    def close(self) -> None:
        self._progress.stop()


def summary(record: Record) -> str:
    """A record's numbers in one short line."""
    names = [name for name in record if name not in ("step", "time")]
    return "  ".join(f"{name} {_short(record[name])}" for name in names)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Logs:
    """All sinks of a run as one.

    Args:
        folder: of the run.
        step: that the run goes on from.
        total_steps: of the whole run.
        tensorboard: write its files too, if it is installed.
        on_progress: takes every record instead of a bar or lines on the error stream.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        total_steps: int,
        *,
        tensorboard: bool,
        on_progress: Callable[[Record], None] | None,
    ) -> None:
        self._start = time.monotonic()
        self._sinks: list[Sink] = [JsonLines(folder, step)]
        if tensorboard:
            with suppress(ImportError):  # an extra that nobody has to install
                self._sinks.append(TensorBoard(folder, step))
        self._sinks.append(
            _display(step, total_steps) if on_progress is None else Callback(on_progress)
        )

    def write(self, record: Record) -> None:
        """Give ``record`` to every sink, with the seconds since the run began or went on."""
        stamped = record | {"time": round(time.monotonic() - self._start, 3)}
        for sink in self._sinks:
            sink.write(stamped)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def _display(step: int, total_steps: int) -> Sink:
    if sys.stderr.isatty():
        with suppress(ImportError):
            return RichBar(total_steps, step)
    return PlainLines(total_steps)
