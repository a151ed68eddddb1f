"""What the tests of the documentation share: the pages, their lines of shell, and a small world.

In that world timm's pretrained models are small and random, and lie beside a few photographs, a
folder of labelled images and the checkpoints that pages speak of, so that a page's snippet runs as
the reader sees it. So are those of transformers, where that is installed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import vitrim

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SMALL: dict[str, dict[str, Any]] = {
    "vision_transformer": {"embed_dim": 24, "num_heads": 2},
    "deit": {"embed_dim": 24, "num_heads": 2},
    "swin_transformer": {"embed_dim": 8, "depths": (1, 1, 6, 1), "num_heads": (1, 1, 2, 2)},
    "convnext": {"dims": (8, 8, 16, 16), "depths": (1, 1, 6, 1)},
    "pit": {"base_dims": (16, 16, 16), "heads": (1, 2, 4)},
}
"""Arguments that make timm's models small, by the module that they are in."""
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
create_model = timm.create_model


def small_model(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Timm's ``create_model``; what is pretrained is small, with random weights."""
    if not pretrained:
        return create_model(name, **arguments)
    module = timm.models.get_arch_name(name)
    kind = timm.model_entrypoint(module).__module__.rpartition(".")[2]
    torch.manual_seed(0)
    return create_model(name, **SMALL[kind] | arguments).eval()


def commands(page: Path) -> list[list[str]]:
    """The words of each ``vitrim`` command in the page's blocks of shell."""
    found = []
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                words = words[words.index("&&") + 1 :]
            if words[:1] == ["vitrim"]:
                found.append(words[1:])
    return found


def photograph(path: Path, seed: int = 0, size: int = 64) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, size=(size, size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_world() -> None:
    """Photographs and labelled images in the current folder."""
    for number in range(4):
        photograph(Path("photos") / f"{number}.jpg", number)
    for number, folder in enumerate(["n01440764", "n01443537"] * 2):
        photograph(Path("imagenet/val") / folder / f"{number}.jpg", number)
    photograph(Path("photo.jpg"), 9)


def small_transformers() -> dict[str, Callable[[str], Any]]:
    """What stands for ``from_pretrained`` of transformers' classes."""
    import transformers

    tower = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}
    text = tower | {"num_hidden_layers": 1, "vocab_size": 40}
    config = transformers.ViTConfig(**tower)
    clip = transformers.CLIPConfig(text_config=text, vision_config=tower)
    return {
        "AutoModelForImageClassification": lambda _: transformers.ViTForImageClassification(config),
        "AutoImageProcessor": lambda _: transformers.ViTImageProcessor(),
        "CLIPModel": lambda _: transformers.CLIPModel(clip),
    }


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with what pages speak of, and small models for timm's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", small_model)
    if find_spec("transformers") is not None:
        for name, make in small_transformers().items():
            monkeypatch.setattr(f"transformers.{name}.from_pretrained", make)
    write_world()
    return tmp_path


def names() -> dict[str, Any]:
    """What snippets take for granted, such as ``images``; a page's own names come on top."""
    torch.manual_seed(0)
    model = small_model("deit_small_patch16_224", pretrained=True)
    images = torch.randn(2, 3, 224, 224)
    return {
        "timm": timm,
        "torch": torch,
        "vitrim": vitrim,
        "model": model,
        "dense": deepcopy(model),
        "images": images,
        "pixel_values": images,
        "loader": [(images, torch.tensor([1, 2]))],
    }
