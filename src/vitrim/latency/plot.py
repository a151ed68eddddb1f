"""The picture of a latency table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vitrim import costs
from vitrim.latency.probes import DENSE
from vitrim.latency.table import Curve, LatencyTable
from vitrim.tools.curve import check_plot, save_figure

_IN_BLOCKS = ("block", "attention", "mlp", "cross")
_LEVEL = re.compile(r"level(\d+)(?:to(\d+))?-?(.*)")


def draw_table(path: Path, table: LatencyTable) -> None:
    """Draw the curves: of a plain vision transformer the blocks, whole and by halves, and the parts
    that stand between them; of a pyramid each level, as it is and as methods run it.

    The bands are quartiles over the rounds; the file appears whole or not at all.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    levels = _levels(table)
    axes = _draw_levels(figure, levels) if levels else _draw_parts(figure, table)
    stamp = table.stamp
    where = stamp.get("gpu", stamp["cpu"])
    figure.suptitle(
        f"{stamp['backbone']}, {stamp['runtime']}, {stamp['dtype']}, batch {stamp['batch']}, "
        f"{stamp['threads']} thread(s), {where}",
        fontsize="medium",
    )
    axes[0].set(ylabel="milliseconds per batch")
    for each in axes:
        each.set_ylim(bottom=0)
        each.grid(alpha=0.3)
    save_figure(figure, path)


def _draw_parts(figure: Any, table: LatencyTable) -> Any:
    """Blocks on the left; dashed is what runs on packed images."""
    axes = figure.subplots(1, 2)
    packed = {costs.packed_part(part) for part in table.curves}
    for part in table.curves:
        if part in packed or part == DENSE:
            continue
        place = axes[0] if part in _IN_BLOCKS else axes[1]
        color = None
        for name, style in ((part, ".-"), (costs.packed_part(part), ".--")):
            if name in table.curves:
                color = _draw(place, table.curves[name], style, name, color)
    for place in axes:
        place.set(xlabel="tokens that enter")
        place.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return axes


def _levels(table: LatencyTable) -> list[tuple[int, str, Curve]]:
    """Level, method and curve; the method is empty where the backbone runs the level."""
    found = []
    for part, curve in table.curves.items():
        match = _LEVEL.match(part)
        if match is not None:
            until = f", to level {match[2]}" if match[2] else ""
            found.append((int(match[1]), match[3] + until, curve))
    return found


def _draw_levels(figure: Any, levels: list[tuple[int, str, Curve]]) -> Any:
    """A panel for each level; the broken line is the level as the backbone runs it."""
    numbers = sorted({number for number, _, _ in levels})
    axes = figure.subplots(1, len(numbers), squeeze=False)[0]
    colors: dict[str, str] = {}
    for number, method, curve in levels:
        place = axes[numbers.index(number)]
        if method:
            kind = re.sub("@[0-9,]+", "", method)  # its blocks differ from level to level
            _draw(place, curve, ".-", method, colors.setdefault(kind, f"C{len(colors)}"))
        else:
            place.axhline(curve.median[0], color="black", linestyle="--", label="dense")
    for number, place in zip(numbers, axes, strict=True):
        place.set(title=f"level {number}", xlabel="positions computed", xlim=(0, None))
        place.legend(fontsize="x-small", loc="lower right")
    return axes


def _draw(axes: Any, curve: Curve, style: str, label: str, color: str | None) -> str:
    """A curve with its band; its colour."""
    (line,) = axes.plot(curve.tokens, curve.median, style, label=label, color=color)
    found: str = line.get_color()
    axes.fill_between(curve.tokens, curve.low, curve.high, color=found, alpha=0.2)
    return found
