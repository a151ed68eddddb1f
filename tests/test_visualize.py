"""Pictures show what the trace says; pages hold all they show."""

from __future__ import annotations

import base64
import io
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import vitrim
from tests.conftest import images, tiny_vit
from vitrim import DynamicViTConfig, MergingConfig, STViTConfig
from vitrim.cli import show
from vitrim.tools import report, visualize

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def trace():
    sparse = vitrim.sparsify(tiny_vit(), DynamicViTConfig(keep_ratio=0.6)).eval()
    return sparse.trace(images(2))


def colourful() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels[..., 0] = 255  # no pixel is grey
    pixels[..., 1:] //= 2
    return Image.fromarray(pixels)


def test_denormalize_undoes_the_normalisation():
    pixels = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0))
    shape = (3, 1, 1)
    prepared = (pixels / 255 - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)
    shown = visualize.denormalize(prepared, MEAN, STD)
    assert np.array_equal(np.asarray(shown), pixels.permute(1, 2, 0).numpy())


def test_denormalize_clips_and_takes_grey():
    shown = visualize.denormalize(torch.tensor([[[-9.0, 0.0, 9.0]]]), [0.5], [0.5])
    assert np.asarray(shown)[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


def test_exactly_the_dropped_patches_fade():
    keep = torch.tensor([[True, False], [False, True]])
    picture = colourful()
    faded = np.asarray(visualize.fade(picture, keep)).astype(int)
    original = np.asarray(picture).astype(int)
    inside = np.s_[2:14]
    far = np.s_[18:30]
    for rows, columns, kept in (
        (inside, inside, 1),
        (inside, far, 0),
        (far, inside, 0),
        (far, far, 1),
    ):
        patch, before = faded[rows, columns], original[rows, columns]
        if kept:
            assert np.array_equal(patch, before)
        else:
            assert (patch.max(-1) == patch.min(-1)).all()  # grey
            assert patch.min() > 190  # and pale


def test_panels_follow_the_trace(trace):
    found = visualize.panels(colourful(), trace, 1, truth=3)
    assert [panel.title for panel in found] == [
        "input",
        "stage 1, before block 1",
        "stage 2, before block 2",
        "stage 3, before block 3",
    ]
    best = int(trace.logits[1].argmax())
    assert found[0].caption.startswith(f"class {best}, ")
    assert ("truth: class 3" in found[0].caption) == (best != 3)
    for panel, stage in zip(found[1:], trace.stages, strict=True):
        assert panel.caption.startswith(f"{len(stage.kept[1])} of 16 patches")
        cell = panel.image.width // 4
        assert panel.image.size == (4 * cell, 4 * cell)
        pixels = np.asarray(panel.image).astype(int)
        for place in range(16):
            row, column = divmod(place, 4)
            patch = pixels[
                row * cell + 2 : (row + 1) * cell - 2, column * cell + 2 : (column + 1) * cell - 2
            ]
            is_grey = bool((patch.max(-1) == patch.min(-1)).all())
            assert is_grey == (place not in stage.kept[1].tolist())


def test_patches_have_the_colour_of_the_semantic_token_that_looks_most():
    looks_SN = torch.zeros(3, 4)
    leader = [2, 0, 1, 0]
    for place, token in enumerate(leader):
        looks_SN[token, place] = 0.5
        looks_SN[(token + 1) % 3, place] = 0.3
    picture = colourful()
    before = np.asarray(picture).astype(float)
    shown = np.asarray(visualize.assignment(picture, looks_SN, (2, 2))).astype(float)
    colours = visualize.token_colours(3)
    assert len(set(colours)) == 3
    for place, token in enumerate(leader):
        row, column = divmod(place, 2)
        patch = np.s_[16 * row + 2 : 16 * row + 14, 16 * column + 2 : 16 * column + 14]
        tinted = (before[patch] + np.array(colours[token])) / 2
        assert np.abs(shown[patch] - tinted).max() <= 1
    # Lines part different tokens and nothing else.
    assert (shown[2:14, 16] == 255).all()
    assert (shown[16, 2:14] == 255).all()
    assert (shown[16, 18:30] < 255).any(-1).all()


def test_panels_show_semantic_tokens():
    sparse = vitrim.sparsify(tiny_vit(), STViTConfig(semantic_tokens=(2, 3))).eval()
    trace = sparse.trace(images(2))
    found = visualize.panels(colourful(), trace, 1)
    assert [panel.title for panel in found] == ["input", "stage 1, before block 3"]
    assert found[1].caption == "6 semantic tokens for 16 patches"
    large = found[0].image
    expected = visualize.assignment(large, trace.stages[0].assignment[1], (4, 4))
    assert np.array_equal(np.asarray(found[1].image), np.asarray(expected))


def test_patches_that_are_one_token_have_one_colour():
    picture = Image.new("RGB", (40, 30), (200, 40, 40))
    group = torch.tensor([[0, 1, 1, 3], [0, 5, 1, 7], [-1, 9, 9, 11]])
    shown = np.asarray(visualize.merged(picture, group))
    seen = {
        (row, column): tuple(shown[row * 10 + 5, column * 10 + 5].tolist())
        for row in range(3)
        for column in range(4)
    }
    assert seen[0, 0] == seen[1, 0]
    assert seen[0, 1] == seen[0, 2] == seen[1, 2]
    assert seen[2, 1] == seen[2, 2]
    assert len({seen[0, 0], seen[0, 1], seen[2, 1], seen[0, 3]}) == 4
    assert seen[0, 3] == seen[1, 1] == seen[1, 3] == (200, 40, 40)  # alone: as it is
    assert min(seen[2, 0]) > 200  # gone: pale


def test_panels_show_merged_tokens():
    sparse = vitrim.sparsify(tiny_vit(), MergingConfig(stages=(1, 2), keep_ratio=(0.75, 0.5)))
    trace = sparse.trace(images(2))
    picture = Image.new("RGB", (32, 32))
    found = visualize.panels(picture, trace, 1)
    assert [panel.caption for panel in found[1:]] == [
        "12 tokens for 16 patches (75%)",
        "8 tokens for 16 patches (50%)",
    ]


def test_histogram_bars_stand_where_the_counts_are():
    shown = np.asarray(visualize.histogram([0, 10, 10, 19], 19, side=240)).astype(int)
    blue = (shown == (31, 111, 235)).all(-1)
    heights = blue.sum(0)
    left, right = 24, 228
    step = (right - left) / 20
    middle = [round(left + (count + 0.5) * step) for count in range(20)]
    assert heights[middle[10]] > 1.9 * heights[middle[0]]
    assert heights[middle[0]] == heights[middle[19]] > 50
    assert all(heights[middle[count]] == 0 for count in range(20) if count not in (0, 9, 10, 19))


@pytest.mark.parametrize("counts", [[0], [196], [0, 0], [5, 100, 196]])
def test_histograms_of_extreme_counts(counts):
    shown = np.asarray(visualize.histogram(counts, 196))
    assert shown.shape == (320, 320, 3)
    assert ((shown == (31, 111, 235)).all(-1).any(0)).sum() >= 1


def test_histograms_follow_the_trace(trace):
    counts = [[9, 5, 3], [9, 7, 5]]
    found = visualize.histograms(counts, trace, side=200)
    assert [panel.title for panel in found] == [
        f"stage {number + 1}, before block {stage.block}"
        for number, stage in enumerate(trace.stages)
    ]
    assert [panel.caption for panel in found] == [
        "9 ± 0 of 16 patches",
        "6 ± 1 of 16 patches",
        "4 ± 1 of 16 patches",
    ]
    assert visualize.lay_out(found).width > 3 * 200


def test_easiest_images_come_first():
    assert visualize.easiest_first([[9, 5], [8, 2], [9, 2], [3, 9]]) == [1, 2, 0, 3]


def shown_by(config, folder, count=3):
    """What ``vitrim show`` writes for some images, and the page's headings."""
    sparse = vitrim.sparsify(tiny_vit(), config, generator=torch.Generator().manual_seed(3)).eval()
    data_config = {"mean": MEAN, "std": STD}
    shown = [show.ShownImage(f"picture {i}.png", x, None) for i, x in enumerate(images(count))]
    show.draw(sparse, show.Found(data_config, None, shown), folder, lambda _: None)
    page = (folder / "page.html").read_text()
    parse(page)
    files = sorted(path.name for path in folder.glob("*.png"))
    return sparse, files, re.findall(r"<h3>(.*?)</h3>", page), page


def test_show_orders_adaptive_images_from_easy_to_hard(tmp_path):
    config = DynamicViTConfig(stages=(1, 2), threshold=0.5)
    sparse, files, headings, page = shown_by(config, tmp_path, 6)
    assert files == [*(f"{i + 1:03d}_picture_{i}.png" for i in range(6)), "counts.png"]
    counts = [
        [int(stage.counts) for stage in sparse.trace(image[None]).stages] for image in images(6)
    ]
    order = visualize.easiest_first(counts)
    assert len({counts[place][-1] for place in order}) > 2
    assert headings == [
        "Patches that the images kept",
        "The easiest images, which kept least",
        "The hardest images, which kept most",
        *(f"picture {place}.png" for place in order),
    ]
    assert "dropped patches are faded" in page


def test_show_without_adaptive_counts_keeps_the_order(tmp_path):
    _, files, headings, page = shown_by(STViTConfig(semantic_tokens=4), tmp_path)
    assert "counts.png" not in files
    assert headings == [f"picture {i}.png" for i in range(3)]
    assert "each colour is a semantic token" in page


def test_show_of_one_adaptive_image_has_no_histogram(tmp_path):
    config = DynamicViTConfig(stages=(1, 2), threshold=0.5)
    _, files, headings, _ = shown_by(config, tmp_path, 1)
    assert files == ["001_picture_0.png"]
    assert headings == ["picture 0.png"]


def test_names_of_classes(trace):
    names = [f"first{place}, synonym" for place in range(10)]
    best = int(trace.logits[0].argmax())
    found = visualize.panels(colourful(), trace, 0, class_names=names)
    assert found[0].caption.startswith(f"first{best}, ")
    assert "synonym" not in found[0].caption


def test_strip_holds_every_panel(trace):
    row = visualize.panels(colourful(), trace, 0)
    picture = np.asarray(visualize.lay_out(visualize.panels(colourful(), trace, 0)))
    assert picture.shape[0] > row[0].image.height
    for panel in row:
        corner = np.asarray(panel.image)
        found = [
            left
            for left in range(picture.shape[1] - corner.shape[1])
            if np.array_equal(
                picture[16 : 16 + corner.shape[0], left : left + corner.shape[1]], corner
            )
        ]
        assert len(found) == 1
    below = picture[16 + row[0].image.height :]
    assert (below < 128).any()  # something is written


class Collector(HTMLParser):
    """Checks that tags are closed, and notes what a page shows."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(page: str) -> Collector:
    found = Collector()
    found.feed(page)
    assert found.open == []
    return found


def test_gallery_is_self_contained(trace):
    row = visualize.panels(colourful(), trace, 0)
    page = report.gallery("Title <1>", "note & more", [("a <b>.png", row)])
    found = parse(page)
    assert len(found.pictures) == 4
    for panel, address in zip(row, found.pictures, strict=True):
        kind, _, content = address.partition(",")
        assert kind == "data:image/png;base64"
        shown = Image.open(io.BytesIO(base64.b64decode(content)))
        assert np.array_equal(np.asarray(shown), np.asarray(panel.image))
    assert "Title &lt;1&gt;" in page
    assert "a &lt;b&gt;.png" in page
    assert 'name="viewport"' in page
    assert "http" not in page
    assert "<script" not in page


def test_chart_places_points():
    line = [report.Point(10, 90, "low"), report.Point(20, 95, "high <", is_main=True)]
    series = [report.Series("dense", [report.Point(30, 96, "dense")]), report.Series("own", line)]
    chart = report.chart(series, "cost", "worth <")
    parse(chart)
    found = re.findall(
        r'<circle cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)" fill="(#\w+)" stroke', chart
    )
    (x3, y3, _), (x1, y1, r1), (x2, y2, r2) = (tuple(map(float, dot[:3])) for dot in found)
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert (y1 - y2) == pytest.approx(5 * (y2 - y3), abs=0.6)
    assert r2 > r1
    colours = [dot[3] for dot in found]
    assert colours[0] != colours[1] == colours[2]
    assert "worth &lt;" in chart
    assert "<title>high &lt;</title>" in chart
    assert chart.count(">own</text>") == 1


@pytest.mark.parametrize(
    "values", [[3.0], [0.0, 0.0], [95.1, 96.2], [0.03, 0.085], [400, 1210.0], [-5, 5]]
)
def test_ticks_enclose_and_are_round(values):
    found = report.ticks(values, 5)
    assert found[0] <= min(values) + 1e-9
    assert found[-1] >= max(values) - 1e-9
    assert 2 <= len(found) <= 8
    steps = {round(b - a, 9) for a, b in itertools.pairwise(found)}
    assert len(steps) == 1
    digits = f"{steps.pop():.6e}".partition("e")[0].rstrip("0").rstrip(".")
    assert digits in {"1", "2", "2.5", "5"}
