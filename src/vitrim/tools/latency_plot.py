"""The picture of a latency table."""

from __future__ import annotations

from pathlib import Path

from vitrim import cost
from vitrim.latency import LatencyTable
from vitrim.tools.curve import check_plot, save_figure
from vitrim.tools.probes import DENSE


def draw_table(path: Path, table: LatencyTable) -> None:
    """Draw the curves: halves of blocks, whole ones or levels, and the parts that stand between.

    Dashed is what runs on packed images. The bands are quartiles over the rounds; the file appears
    whole or not at all.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    in_blocks = ("block", "attention", "mlp", "cross")
    packed = {cost.packed_part(part) for part in table.curves}
    for part in table.curves:
        if part in packed or part == DENSE:
            continue
        axes = left if part in in_blocks or part.startswith("level") else right
        color = None
        for name, style in ((part, ".-"), (cost.packed_part(part), ".--")):
            if name in table.curves:
                curve = table.curves[name]
                (line,) = axes.plot(curve.tokens, curve.median, style, label=name, color=color)
                color = line.get_color()
                axes.fill_between(curve.tokens, curve.low, curve.high, color=color, alpha=0.2)
    stamp = table.stamp
    where = stamp.get("gpu", stamp["cpu"])
    figure.suptitle(
        f"{stamp['backbone']}, {stamp['runtime']}, {stamp['dtype']}, batch {stamp['batch']}, "
        f"{stamp['threads']} thread(s), {where}",
        fontsize="medium",
    )
    for axes in (left, right):
        axes.set(xlabel="tokens that enter", ylabel="milliseconds per batch")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)
