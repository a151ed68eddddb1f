"""The command ``vitrim``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from vitrim.errors import MissingExtraError, VitrimError, printable


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 wrong input or usage, 130 interrupted.

    Our own errors are one clear message on the error stream; ``--debug``, anywhere among the
    arguments, shows where they were raised.
    """
    _print_logs_safely()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        if words[:1] == ["predict"] and not _asks_torch(words[1:2]):
            from vitrim import predict

            predict.main(words[1:])
        else:
            _app(words)
    except (VitrimError, OSError) as error:
        if debug:
            raise
        print(f"vitrim: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _asks_torch(model: Sequence[str]) -> bool:
    """Whether ``vitrim predict`` is to run a checkpoint; a bundle needs neither torch nor the
    packages of the other commands.
    """
    return bool(model) and (Path(model[0]) / "model.safetensors").is_file()


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _print_logs_safely() -> None:
    """What is logged goes to the error stream, without control characters of files' names."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _app(words: list[str]) -> None:
    try:
        from vitrim.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("typer", "rich"):
            raise
        raise MissingExtraError("the command line", error.name, "cli") from error
    app(words, prog_name="vitrim")
