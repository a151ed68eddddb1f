"""What the demo says of its measurements: six lines, and a page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vitrim.demo.outcome import BATCHES, BUDGETS, DENSE, Outcome, Point
from vitrim.model import SparseModel
from vitrim.tools import report, visualize
from vitrim.tools.benchmark import Row

_PICTURES = 6
_COUNTED = 500
"""Images of the histograms."""


def summary(outcome: Outcome, output: Path, seconds: float) -> list[str]:
    """A line on the dense model and one on each method; the last says where the report is."""
    batch = BATCHES[0]
    base = outcome.row(DENSE, batch)
    lines = [
        f"dense       {outcome.dense.top1:.2f}% top-1, {base.macs / 1e6:.1f} MMACs, "
        f"{base.images_per_second:,.0f} images/s at batch {batch}, fp32, "
        f"{base.hardware['threads']} threads"
    ]
    for method in outcome.recipes:
        point = outcome.main(method)
        found, pair, row = point.evaluation, point.evaluation.paired, outcome.row(point.name, batch)
        assert pair is not None
        lines.append(
            f"{method:11} {found.sparse.top1:.2f}% top-1, {pair.difference:+.2f} points "
            f"({pair.low:+.2f} to {pair.high:+.2f}), {share(point):.0f}% of the MACs, "
            f"{row.speedup.median:.2f}x ({row.speedup.low:.2f} to {row.speedup.high:.2f})"
        )
    lines[-1] += f"; report: {output / 'report.html'}, after {seconds:.0f} s"
    return lines


def share(point: Point) -> float:
    """Mean cost in percent of the dense model's."""
    return 100 * point.evaluation.macs.mean / point.evaluation.dense_macs


def report_page(outcome: Outcome) -> str:
    """The report, one self-contained HTML document."""
    batch = BATCHES[0]
    base = outcome.row(DENSE, batch)
    hardware = base.hardware
    found = outcome.points[0].evaluation
    names = ", ".join(outcome.recipes)
    parts = [
        "<h1>Vision transformers that look only where it matters</h1>",
        f'<p class="soft">Five ways to compute fewer tokens ({names}) on the embedded data set, '
        f"measured on {hardware['cpu']}, {hardware['threads']} threads, torch {hardware['torch']}, "
        f"{hardware['date'][:10]}.</p>",
        report.cards([_card(outcome, method) for method in outcome.recipes]),
        f'<p class="soft">Measured speed-up over the dense model ({outcome.dense.top1:.2f}% top-1) '
        f"at {100 * BUDGETS[0]:.0f}% of its MACs and batch {batch}, and the difference of top-1 "
        "accuracy in points.</p>",
        "<h2>What accuracy costs</h2>",
        _charts(outcome),
        "<h2>Results</h2>",
        _result_table(outcome),
        f'<p class="soft">Each method was fine-tuned once, for {_training(outcome)}; the budgets '
        "use the same weights, calibrated on training images without labels. In small print: the "
        "95% confidence interval of the difference, the quartiles of the speed-up, the standard "
        "deviation of the MACs over the images.</p>",
        *_pictures(outcome),
        "<h2>How this was measured</h2>",
        f"<p>Accuracy: one pass over {found.images:,} test images, dense and sparse on the same "
        "batches. Time: the candidates take turns in rotating order over "
        f"{base.rounds} rounds on the same test images; speed-ups are ratios of times in the same "
        "round, their median is shown. Efficiency is the speed-up over the ratio of the MACs: 1 "
        "means that all work saved was time saved. results.json has all numbers.</p>",
    ]
    return report.page("vitrim demo", "\n".join(parts))


def _card(outcome: Outcome, method: str) -> tuple[str, str]:
    point = outcome.main(method)
    assert point.evaluation.paired is not None
    speedup = outcome.row(point.name, BATCHES[0]).speedup.median
    return f"{speedup:.2f}x", f"{method}: {point.evaluation.paired.difference:+.2f} points"


def _training(outcome: Outcome) -> str:
    return ", ".join(f"{name} {took:.0f} s" for name, took in outcome.train_seconds.items())


def _result_table(outcome: Outcome) -> str:
    head = ["model", "top-1 %", "difference", "MMACs"]
    head += [*(f"speed-up\nbatch {batch}" for batch in BATCHES), "images/s", "efficiency"]
    base = outcome.row(DENSE, BATCHES[0])
    speed = f"{base.images_per_second:,.0f}"
    first = [DENSE, f"{outcome.dense.top1:.2f}", "", f"{base.macs / 1e6:.1f}"]
    rows = [[*first, *("1" for _ in BATCHES), speed, ""]]
    for point in outcome.points:
        pair, macs = point.evaluation.paired, point.evaluation.macs
        timed = [outcome.row(point.name, batch) for batch in BATCHES]
        assert pair is not None
        cost = "" if point.budget is None else f"\n{100 * point.budget:.0f}% of the MACs"
        rows.append(
            [
                point.method + cost,
                f"{point.evaluation.sparse.top1:.2f}",
                f"{pair.difference:+.2f}\n{pair.low:+.2f} to {pair.high:+.2f}",
                f"{macs.mean / 1e6:.1f}\n± {macs.std / 1e6:.1f}",
                *(
                    f"{row.speedup.median:.2f}\n{row.speedup.low:.2f} to {row.speedup.high:.2f}"
                    for row in timed
                ),
                f"{timed[0].images_per_second:,.0f}",
                f"{timed[0].efficiency.median:.2f}",
            ]
        )
    return report.table(head, rows)


def _charts(outcome: Outcome) -> str:
    def series(x_of: Callable[[Row], float], unit: str) -> list[report.Series]:
        base = x_of(outcome.row(DENSE, BATCHES[0]))
        note = f"dense: {outcome.dense.top1:.2f}% at {base:,.1f} {unit}"
        found = [report.Series(DENSE, [report.Point(base, outcome.dense.top1, note, True)])]
        for method in outcome.recipes:
            dots = []
            for point in outcome.points:
                if point.method == method:
                    x, top1 = (
                        x_of(outcome.row(point.name, BATCHES[0])),
                        point.evaluation.sparse.top1,
                    )
                    note = f"{point.name}: {top1:.2f}% at {x:,.1f} {unit}"
                    dots.append(report.Point(x, top1, note, point.is_main))
            found.append(report.Series(method, dots))
        return found

    charts = [
        report.chart(
            series(lambda row: row.images_per_second, "images/s"),
            f"measured images per second, batch {BATCHES[0]}",
            "top-1 %",
        ),
        report.chart(
            series(lambda row: row.macs / 1e6, "MMACs"), "mean MMACs per image", "top-1 %"
        ),
    ]
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts)
    note = f"The large dots are at {100 * BUDGETS[0]:.0f}% of the dense model's MACs."
    return f'<div class="charts">{figures}</div><p class="soft">{note}</p>'


def _pictures(outcome: Outcome) -> list[str]:
    """Test images under each method: the first ones, or the easiest and the hardest."""
    parts = []
    for method in outcome.recipes:
        sparse = outcome.main(method).sparse
        parts.append(f"<h2>What {method} looks at</h2>")
        if sparse.macs() is not None:
            images, labels = (tensor[:_PICTURES] for tensor in outcome.batches[0])
            parts += _strips(sparse, images, labels)
            continue
        images = torch.cat([images for images, _ in outcome.batches])[:_COUNTED]
        labels = torch.cat([labels for _, labels in outcome.batches])[:_COUNTED]
        trace = sparse.trace(images)
        counts = torch.stack([stage.counts for stage in trace.stages], 1).tolist()
        histograms = visualize.histograms(counts, trace, side=192)
        parts.append(report.strip(histograms, f"Patches that {len(images)} images kept"))
        order, half = visualize.easiest_first(counts), _PICTURES // 2
        for name, places in {"least": order[:half], "most": order[-half:]}.items():
            parts.append(f"<h3>Images that kept {name}</h3>")
            parts += _strips(sparse, images[places], labels[places])
    return parts


def _strips(sparse: SparseModel, images: Tensor, labels: Tensor) -> list[str]:
    """What each stage keeps of the images, stage by stage."""
    trace = sparse.trace(images)
    mean, std = sparse.data_config["mean"], sparse.data_config["std"]
    return [
        report.strip(
            visualize.panels(
                visualize.denormalize(image, mean, std),
                trace,
                place,
                class_names=[f"digit {digit}" for digit in range(10)],
                truth=int(labels[place]),
                side=192,
            )
        )
        for place, image in enumerate(images)
    ]
