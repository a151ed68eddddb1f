"""Which method runs on which family of backbones, and why not: read off the code itself."""

from __future__ import annotations

from vitrim.families import FAMILIES
from vitrim.methods import METHODS


def capabilities() -> dict[str, dict[str, str | None]]:
    """Method: family: None where it works, otherwise why not and what to use instead."""
    return {
        name: {
            family.name: None
            if family.name in method.families
            else method.refusals.get(family.name, "it was not written for it")
            for family in FAMILIES
        }
        for name, method in METHODS.items()
    }


def capability_markdown() -> str:
    """The table as Markdown, with the reasons as notes below it."""
    table = capabilities()
    names = [family.name for family in FAMILIES]
    lines = [f"| method | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    notes: dict[str, int] = {}
    for method, row in table.items():
        cells = []
        for reason in row.values():
            number = None if reason is None else notes.setdefault(reason, len(notes) + 1)
            cells.append("yes" if number is None else f"no ({number})")
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    lines.append("")
    lines += [f"{number}. {reason[0].upper()}{reason[1:]}." for reason, number in notes.items()]
    return "\n".join(lines)
