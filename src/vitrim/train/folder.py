"""A folder that is written to: by one process at a time, and with words where that fails."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vitrim.errors import TrainingError

LOCK_FILE = ".lock"

logger = logging.getLogger(__name__)
_locks: set[int] = set()


def _let_go() -> None:
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    # A reader of images may outlive a run that was killed; the lock must not.
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within this context a failure of the disk is an error that names ``folder``.

    Raises:
        TrainingError: no space, no permission, a file that is too large.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{folder} cannot be written to ({error.strerror or error}); what was saved before is "
            "kept. Mend that and run the same command again, or use another folder"
        ) from error


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """``folder``, made if absent, is this process's alone until the context ends.

    The lock is the system's, so it goes with the process, however that ends. A folder that was made
    here and stayed empty is removed.

    Raises:
        TrainingError: another process holds the folder, or it cannot be written to.
    """
    is_new, path = not folder.exists(), folder / LOCK_FILE
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    _locks.add(lock)
    try:
        if not _take(lock, path):
            raise TrainingError(
                f"{folder} is in use by another run; wait until it ends, or use another folder"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):  # it is not empty
                    folder.rmdir()
    finally:
        _locks.discard(lock)
        os.close(lock)


def _take(lock: int, path: Path) -> bool:
    """Whether the file behind ``lock`` could be locked, and is still the one at ``path``."""
    try:
        import fcntl
    except ImportError:  # there is none on Windows
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s cannot be locked (%s); start no other run there", path.parent, error)
        return True
    # Between opening and locking, the run that held it may have ended and removed it.
    return path.exists() and os.path.samestat(os.fstat(lock), path.stat())
