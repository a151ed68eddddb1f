"""Which method runs on which family of backbones, which of timm's models are served, and why not:
read off the code itself, and off models that are built without memory or a download.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from vitrim.errors import UnsupportedBackboneError
from vitrim.families import FAMILIES, family_of
from vitrim.families.refused import MODULES
from vitrim.methods import METHODS


def capabilities() -> dict[str, dict[str, str | None]]:
    """Method: family: None where it works, otherwise why not and what to use instead."""
    return {
        name: {
            family.name: None if family.name in method.families else method.why_not(family.name)
            for family in FAMILIES
        }
        for name, method in METHODS.items()
    }


def capability_markdown() -> str:
    """The table as Markdown, with the reasons as notes below it."""
    table = capabilities()
    names = list(next(iter(table.values())))
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


@dataclass(frozen=True, slots=True)
class Support:
    """Of a module of timm's: the names that are served, and why the others are not."""

    module: str
    served: tuple[str, ...]
    refused: Mapping[str, str]
    """Why not, by name."""

    @property
    def total(self) -> int:
        return len(self.served) + len(self.refused)

    @property
    def reasons(self) -> dict[str, int]:
        """How many names each reason keeps away, the most first."""
        return dict(Counter(self.refused.values()).most_common())


def why_not(name: str) -> str | None:
    """Why the model that timm calls ``name`` is not served; None: it is. No weights are made, and
    none are fetched.
    """
    smallest = {m: family.smallest for family in FAMILIES for m in family.modules}
    model = _without_memory(name, smallest.get(_module_of(name), {}))
    try:
        family_of(model)
    except UnsupportedBackboneError as error:
        why = MODULES.get(_module_of(name)) or str(error)
        return why.removeprefix(f"this {type(model).__name__} cannot be made sparse: ")
    return None


def require_served(name: str) -> None:
    """Raise :class:`UnsupportedBackboneError` unless timm's model ``name`` is served."""
    why = why_not(name)
    if why is not None:
        raise UnsupportedBackboneError(
            f"{name} cannot be made sparse: {why}. What can: vitrim list models"
        )


def modules_of_models(pattern: str = "*") -> dict[str, list[str]]:
    """The names that match, by the modules of timm's that hold vision transformers and their kin:
    those of the families, then the others.
    """
    modules = [module for family in FAMILIES for module in family.modules]
    names = {m: timm.list_models(pattern, module=m) for m in [*modules, *sorted(MODULES)]}
    return {module: found for module, found in names.items() if found}


def support(pattern: str = "*", tell: Callable[[int], None] = lambda done: None) -> list[Support]:
    """What is served of timm's names that match, module by module; ``tell`` hears how many names
    were looked at.
    """
    found, done = [], 0
    for module, names in modules_of_models(pattern).items():
        answers = {}
        for name in names:
            # A module that no family serves is known by its name: nothing need be built.
            answers[name] = MODULES[module] if module in MODULES else why_not(name)
            tell(done := done + 1)
        served = tuple(name for name, why in answers.items() if why is None)
        refused = {name: why for name, why in answers.items() if why is not None}
        found.append(Support(module, served, refused))
    return found


def support_markdown(found: list[Support]) -> str:
    """The same as Markdown."""
    served, total = sum(len(each.served) for each in found), sum(each.total for each in found)
    lines = [f"{served} of {total} names.", "", "| module | served | of | why not the others |"]
    lines.append("|---|---|---|---|")
    for each in found:
        reasons = [f"{count}: {reason}" for reason, count in each.reasons.items()]
        row = f"`{each.module}`", str(len(each.served)), str(each.total), "; ".join(reasons)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _module_of(name: str) -> str:
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def _without_memory(name: str, smallest: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        try:
            model: nn.Module = timm.create_model(name, **smallest)
        except (AssertionError, TypeError):  # some say for each block what it is made of
            model = timm.create_model(name)
    return model
