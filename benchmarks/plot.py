"""Draws ``results/real_weights.png`` from ``results/real_weights.json`` (needs matplotlib)."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"

# DeiT-Tiny with ToMe off the shelf on the same 1,300 images: GMACs and top-1, figures given to us.
TOME = [(0.929, 81.3), (0.811, 80.3), (0.735, 80.2), (0.625, 79.2)]


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = json.loads((RESULTS / "real_weights.json").read_text())
    rows = found["results"]["deit_tiny_patch16_224 dynamicvit-adapt"]
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    macs = [row["macs"]["mean"] / 1e9 for row in rows]
    top1 = [row["sparse"]["top1"] for row in rows]
    axes.plot(macs, top1, "o-", label="DynamicViT, adapted at r = 0.7, set at run time")
    for x, y, row in zip(macs, top1, rows, strict=True):
        label = row["name"].removeprefix("dynamicvit ")
        axes.annotate(f"r {label}", (x, y), (6, -12), textcoords="offset points")
    axes.plot(*zip(*TOME, strict=True), "s--", color="gray", label="ToMe, off the shelf (as given)")
    dense = rows[0]
    axes.plot(dense["dense_macs"] / 1e9, dense["dense"]["top1"], "k*", markersize=12, label="dense")
    axes.set(
        xlabel="GMACs per image",
        ylabel="top-1 on 1,300 validation images (%)",
        title="DeiT-Tiny, adapted on 1,000 unlabelled images",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(RESULTS / "real_weights.png", dpi=150)


if __name__ == "__main__":
    main()
