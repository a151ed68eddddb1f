"""What a reader of data leaves out: counted by reason, named, and no more than a share of it."""

from __future__ import annotations

import logging
from collections import defaultdict

from vitrim.errors import InputError

logger = logging.getLogger(__name__)

_MOST_NAMES = 5


class LeftOut:
    """Parts of a data set that are of no use, by reason.

    Args:
        what: what is counted, in the plural, such as ``"annotations"``.
        source: the file or folder that they belong to.
    """

    def __init__(self, what: str, source: object) -> None:
        self.what = what
        self.source = source
        self.names: dict[str, list[str]] = defaultdict(list)
        """Reason to the names of what was left out for it."""

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def add(self, reason: str, name: object) -> None:
        """Count one more, by a name that a log can write: half characters become escapes."""
        self.names[reason].append(str(name).encode("utf-8", "backslashreplace").decode())

    def __str__(self) -> str:
        return "; ".join(
            f"{len(names)} {reason} ({', '.join(names[:_MOST_NAMES])}"
            f"{' ...' if len(names) > _MOST_NAMES else ''})"
            for reason, names in self.names.items()
        )

    def tell(self, total: int, most: float) -> None:
        """Say what was left out, once all of the ``total`` were looked at.

        Raises:
            InputError: it is more than the share ``most``.
        """
        if not len(self):
            return
        found = f"{len(self)} of {total} {self.what} of {self.source} are of no use: {self}"
        if len(self) > most * total:
            raise InputError(
                f"{found}. That is more than the share {most:g} which may be left out; repair the "
                "data, or allow more (max_skipped)"
            )
        logger.warning("left out, %s", found)
