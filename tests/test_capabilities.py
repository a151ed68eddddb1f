"""The table of what works: every entry is tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

from tests.conftest import (
    clips,
    images,
    seeded,
    tiny_convnext,
    tiny_eva,
    tiny_lvvit,
    tiny_naflex,
    tiny_pit,
    tiny_swin,
    tiny_swin_v2,
    tiny_video_swin,
    tiny_vit,
)
from vitrim import UnsupportedBackboneError, capabilities, sparsify
from vitrim.cli.schedule import dense_model
from vitrim.families import FAMILIES
from vitrim.methods import METHODS
from vitrim.methods.base import OF_CLIPS
from vitrim.train.backbone import create_dense
from vitrim.train.recipe import ModelRecipe

MODELS = Path(__file__).parents[1] / "results" / "models.md"
README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- capabilities -->", "<!-- end of capabilities -->"
BACKBONES = {
    "vit": tiny_vit,
    "eva": tiny_eva,
    "naflex": tiny_naflex,
    "lvvit": tiny_lvvit,
    "pit": tiny_pit,
    "swin": lambda: tiny_swin(depths=(2, 2, 6, 2)),
    "swin_v2": lambda: tiny_swin_v2(depths=(2, 2, 6, 2)),
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
        assert set(method.families) | method.refusals.keys() | OF_CLIPS.keys() == names
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
    names = dict.fromkeys(family.name for family in FAMILIES)
    assert lines[0] == f"| method | {' | '.join(names)} |"
    assert len([line for line in lines if line.startswith("| `")]) == len(METHODS)
    assert sum(line.count(" yes ") for line in lines) == sum(
        reason is None for row in TABLE.values() for reason in row.values()
    )


def test_the_readme_shows_it():
    text = README.read_text(encoding="utf-8")
    assert START in text
    table = text.split(START)[1].split(END)[0]
    assert table.strip() == capabilities.capability_markdown()


@pytest.fixture(scope="module")
def found():
    return capabilities.support()


def test_what_is_served_of_timm(found):
    """The table of models is what building each of them says; see results/models.md."""
    text = MODELS.read_text(encoding="utf-8")
    if f"timm {timm.__version__} " in text:  # others have other names
        assert text.split(START)[1].split(END)[0].strip() == capabilities.support_markdown(found)
    modules = {each.module: each for each in found}
    assert len(modules) == len(found)
    assert len(modules["eva"].served) == 65
    assert sum(len(each.served) for each in found) >= 330


def test_what_is_refused_says_why_and_what_to_use(found):
    for each in found:
        for name, why in each.refused.items():
            assert "served: " in why or "; use " in why, (name, why)


def test_support_is_known_without_a_download(monkeypatch):
    """Before any weight is fetched, and with models that have none."""

    def fetched(*arguments, **options):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("timm.models._builder.load_pretrained", fetched)
    assert capabilities.why_not("vit_small_patch16_dinov3.lvd1689m") is None
    assert "; use " in capabilities.why_not("beitv2_base_patch16_224")
    with pytest.raises(UnsupportedBackboneError, match="beitv2_base_patch16_224"):
        dense_model("beitv2_base_patch16_224", None)
    recipe = ModelRecipe(name="cait_xxs24_224", pretrained=True)
    with pytest.raises(UnsupportedBackboneError, match="attention maps"):
        create_dense(recipe, 0)
