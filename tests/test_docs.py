"""The documentation holds: pages are built without a warning, and what they show runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer

import vitrim
from tests.pages import PAGES, ROOT, commands, names, small_model, world
from tests.small_hub import hub
from vitrim import predict
from vitrim.cli.app import app
from vitrim.convert import SYSTEMS
from vitrim.train.recipe import list_recipes

__all__ = ["hub", "world"]

sybil = pytest.importorskip("sybil", reason="pip install 'vitrim[docs]'")
COMMAND = typer.main.get_command(app)
QUICK = {"eval": ["--workers", "0"]}
"""What a test adds to a command of a page."""
DEAR = ("bench", "export", "predict")
"""Commands that tests of their own run."""
LINES = [(page, words) for page in PAGES for words in commands(page)]


def page_id(page: Any) -> str:
    return str(page.relative_to(ROOT)) if isinstance(page, Path) else " ".join(page)


def examples(page: Path) -> Any:
    from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

    document = sybil.Document.parse(str(page), PythonCodeBlockParser(), SkipParser())
    return document, list(document.examples())


WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=page_id)
def test_snippets_run(page, world, hub):
    if page.name == "huggingface.md":
        pytest.importorskip("transformers", reason="pip install 'vitrim[hf]'")
    document, snippets = examples(page)
    document.namespace.update(names())
    if page.name == "README.md":
        document.namespace.update(of_the_readme())
    for snippet in snippets:
        snippet.evaluate()


def of_the_readme() -> dict[str, Any]:
    """What its snippets speak of: a checkpoint, a Swin, a detector's loss, clips."""
    config = vitrim.DynamicViTConfig(keep_ratio=0.7)
    model = small_model("deit_small_patch16_224", pretrained=True)
    vitrim.sparsify(model, config).save_pretrained("runs/deit_s_dynamicvit")
    swin = timm.create_model("swin_tiny_patch4_window7_224", pretrained=True)
    with torch.no_grad():
        dense_levels = vitrim.FeaturesOnly(swin)(names()["images"])
    return {
        "timm_model": swin,
        "dense_levels": dense_levels,
        "plain_backbone": vitrim.FeaturesOnly(model),
        "sizes": [(224, 224), (160, 192)],
        "detector_loss": torch.tensor(0.0),
        "clips": torch.randn(1, 3, 8, 224, 224),
    }


@pytest.mark.parametrize(("page", "words"), LINES, ids=page_id)
def test_lines_of_shell_are_those_of_the_command(page, words, monkeypatch):
    if words[0] == "predict":  # its parser stands in what it does first
        monkeypatch.setattr(predict, "Bundle", lambda *_: sys.exit("parsed"))
        with pytest.raises(SystemExit, match="parsed"):
            predict.main(words[1:])
        return
    name, *rest = words
    if name.startswith("-"):
        assert any(name in parameter.opts for parameter in COMMAND.params)
        return
    COMMAND.commands[name].make_context(name, list(rest))
    if name == "train" and not words[1].endswith(".toml"):
        assert words[1] in list_recipes()
    if name == "convert":
        assert words[words.index("--from") + 1] in SYSTEMS


def test_the_ten_minutes_run(world):
    (page,) = (page for page in PAGES if page.name == "ten-minutes.md")
    for words in commands(page):
        if words[0] not in DEAR:
            app([*words, *QUICK.get(words[0], [])], standalone_mode=False)
    assert list(Path("pictures").glob("*.png"))


NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=page_id)
def test_notebooks_run(notebook, world):
    import matplotlib

    matplotlib.use("agg")
    namespace: dict[str, Any] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are cleared before a commit"
            place = f"{notebook.name} {cell['id']}"
            exec(compile("".join(cell["source"]), place, "exec"), namespace)


@pytest.mark.timeout(300)
def test_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="pip install 'vitrim[docs]'")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*words, "--site-dir", str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    built = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "set_budget" in built
