"""The table of what works: every entry is tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.conftest import (
    clips,
    images,
    seeded,
    tiny_convnext,
    tiny_lvvit,
    tiny_pit,
    tiny_swin,
    tiny_video_swin,
    tiny_vit,
)
from vitrim import UnsupportedBackboneError, capabilities, sparsify
from vitrim.families import FAMILIES
from vitrim.methods import METHODS

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- capabilities -->", "<!-- end of capabilities -->"
BACKBONES = {
    "vit": tiny_vit,
    "lvvit": tiny_lvvit,
    "pit": tiny_pit,
    "swin": lambda: tiny_swin(depths=(2, 2, 6, 2)),
    "convnext": tiny_convnext,
    "video_swin": tiny_video_swin,
}
TABLE = capabilities.capabilities()
PAIRS = [(method, family) for method, row in TABLE.items() for family in row]


def test_every_method_has_an_answer_for_every_family():
    names = {family.name for family in FAMILIES}
    assert names == BACKBONES.keys()
    for name, method in METHODS.items():
        assert TABLE[name].keys() == names
        assert set(method.families) | method.refusals.keys() == names
        assert not set(method.families) & method.refusals.keys()


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_the_table_is_true(method, family):
    model, config = BACKBONES[family](), METHODS[method].config_class()
    reason = TABLE[method][family]
    given = clips(2) if family == "video_swin" else images(2)
    if reason is None:
        sparse = sparsify(model, config, generator=seeded(0)).eval()
        with torch.no_grad():
            logits = sparse(given)
        assert logits.shape == (2, 10)
        assert logits.isfinite().all()
        assert sparse.trace(given).macs.isfinite().all()
    else:
        with pytest.raises(UnsupportedBackboneError) as error:
            sparsify(model, config)
        assert reason in str(error.value)


def test_reasons_name_methods_that_work_there():
    """Where a reason says which method to use instead, that one does serve the family."""
    for row in TABLE.values():
        for family, reason in row.items():
            _, use, instead = (reason or "").partition("use ")
            named = METHODS.keys() & set(re.findall(r"[a-z_]+", instead))
            assert all(TABLE[name][family] is None for name in named), reason
            assert named or not use, reason


def test_markdown():
    lines = capabilities.capability_markdown().splitlines()
    assert lines[0] == "| method | " + " | ".join(family.name for family in FAMILIES) + " |"
    assert len([line for line in lines if line.startswith("| `")]) == len(METHODS)
    assert sum(line.count(" yes ") for line in lines) == sum(
        reason is None for row in TABLE.values() for reason in row.values()
    )


def test_the_readme_shows_it():
    text = README.read_text(encoding="utf-8")
    assert START in text
    table = text.split(START)[1].split(END)[0]
    assert table.strip() == capabilities.capability_markdown()
