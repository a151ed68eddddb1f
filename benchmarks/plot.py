"""``real_weights.md`` and ``.png`` from ``real_weights.json`` in results (needs matplotlib)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
DEIT = "deit_tiny_patch16_224"


def table(models: dict[str, Any]) -> str:
    """A table per model: every row of the measurements."""
    lines = []
    for model, found in models.items():
        dense = found["dense"]["results"][0]
        lines += [
            f"### {model}",
            "",
            f"Dense: {dense['dense']['top1']:.2f} top-1 at {dense['dense_macs'] / 1e9:.3f} GMACs.",
            "",
            "| | setting | top-1 | against dense (95 %) | won, lost | GMACs: mean ± std | share | "
            "images/s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, content in found.items():
            lines += [] if name == "dense" else [_line(name, row) for row in content["results"]]
        lines.append("")
    return "\n".join(lines)


def _line(name: str, row: dict[str, Any]) -> str:
    pair, macs = row["paired"], row["macs"]
    setting = row["budget"] if "budget" in row else f"r = {row['keep_ratio']}"
    return (
        f"| {name} | {setting} | {row['sparse']['top1']:.2f} | {pair['difference']:+.2f} "
        f"({pair['low']:+.2f} to {pair['high']:+.2f}) | {pair['won']}, {pair['lost']} | "
        f"{macs['mean'] / 1e9:.3f} ± {macs['std'] / 1e9:.3f} | "
        f"{macs['mean'] / row['dense_macs']:.3f} | {_speed(row)} |"
    )


def _speed(row: dict[str, Any]) -> str:
    if "speed" not in row:
        return ""
    speed = row["speed"]
    return f"{speed['images_per_second']:.0f} ({speed['speedup']['median']:.2f}x)"


def draw(found: dict[str, Any], path: Path) -> None:
    """Accuracy against mean MACs of every method on one model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.6, 5.0), layout="constrained")
    for name, content in found.items():
        if name == "dense" or "at keep ratios" in name:
            continue
        rows = sorted(content["results"], key=lambda row: row["macs"]["mean"])
        macs = [row["macs"]["mean"] / 1e9 for row in rows]
        free = "training-free" in name
        style: dict[str, Any] = {"linestyle": ":" if free else "-", "marker": "s" if free else "o"}
        if name.startswith("tome"):
            style = {"linestyle": "--", "marker": "D", "color": "gray"}
        elif name.startswith("merging"):
            style |= {"linewidth": 2.5, "color": "black"}
        axes.plot(macs, [row["sparse"]["top1"] for row in rows], label=name, **style)
    dense = found["dense"]["results"][0]
    axes.plot(dense["dense_macs"] / 1e9, dense["dense"]["top1"], "k*", markersize=12, label="dense")
    axes.set(
        xlabel="mean GMACs per image",
        ylabel="top-1 on 1,300 validation images (%)",
        title="DeiT-Tiny; adapted and calibrated on 1,000 unlabelled images",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    models = json.loads((RESULTS / "real_weights.json").read_text())["models"]
    page = RESULTS / "real_weights.md"
    start, end = "<!-- tables -->\n", "<!-- end of tables -->"
    text = page.read_text()
    before, after = text.split(start)[0], text.split(end)[1]
    page.write_text(f"{before}{start}\n{table(models)}\n{end}{after}")
    draw(models[DEIT], RESULTS / "real_weights.png")


if __name__ == "__main__":
    main()
