"""Errors of vitrim: each says what was found, what was expected and what to do."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` on a terminal: control characters, which could command it, as Python writes them."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class VitrimError(Exception):
    """Base of every error that vitrim raises on purpose; the command line exits with code 2."""


class ConfigError(VitrimError, ValueError):
    """A setting is out of range, unknown, or does not fit the backbone."""


class UnsupportedBackboneError(VitrimError, TypeError):
    """The model is none that vitrim can run piece by piece without changing its numbers."""


class InputError(VitrimError, ValueError):
    """Images, labels or data files are not what the model needs."""


class CheckpointError(VitrimError, ValueError):
    """A checkpoint is damaged, foreign, unsafe, or of another architecture."""


class TrainingError(VitrimError, RuntimeError):
    """Training cannot go on (NaN, too many unreadable images, a run folder in use)."""


class MissingExtraError(VitrimError, ImportError):
    """An optional package is needed; the message names the pip extra that brings it."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs {package}, which is not installed; run: pip install 'vitrim[{extra}]'"
        )
