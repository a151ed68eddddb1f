"""What the tests share: small backbones, and the recipe of the golden weights."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vitrim import checkpoint
from vitrim.families import blocks

# The tests run in several processes: one that used every core would hold up the others.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

GOLDEN = Path(__file__).parent / "golden"
ASSETS = Path(__file__).parents[2] / "shared" / "assets"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def jitter(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values where constructors put ones, zeros or tiny numbers.

    A norm or LayerScale that is skipped or misplaced then changes the output.
    """
    generator = seeded(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and ("norm" in name or "ls" in name or "gamma" in name):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.ndim == 1 or any(part in name for part in ("token", "latent", "table")):
                parameter.normal_(std=0.3, generator=generator)
    return model


def tiny_vit(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    """A small plain vision transformer: 16 patches of 8 pixels, 4 blocks, 10 classes."""
    torch.manual_seed(0)
    sizes = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "num_classes": 10,
    }
    return jitter(timm.create_model(name, **(sizes | kwargs))).eval()


def tiny_eva(name: str = "eva02_tiny_patch14_224", **kwargs: Any) -> nn.Module:
    """A small Eva: 16 patches of 8 pixels, 4 blocks, 10 classes; its weights are large enough that
    tokens look at each other, and that logits depend on it: timm's own start near 0.
    """
    torch.manual_seed(0)
    sizes = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "num_classes": 10,
    }
    model = jitter(timm.create_model(name, **(sizes | kwargs))).eval()
    generator = seeded(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.2, generator=generator)
    return model


def tiny_naflex(name: str = "naflexvit_base_patch16_gap", **kwargs: Any) -> nn.Module:
    """A small NaFlexVit for images of 32 x 32: 16 patches of 8 pixels, 4 blocks, 10 classes."""
    torch.manual_seed(0)
    sizes = {
        "patch_size": 8,
        "pos_embed_grid_size": (4, 4),
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "num_classes": 10,
        "pretrained_cfg_overlay": {"input_size": (3, 32, 32)},
    }
    return jitter(timm.create_model(name, **(sizes | kwargs))).eval()


def tiny_lvvit(name: str = "lvvit_s", **kwargs: Any) -> nn.Module:
    """A small LV-ViT: 16 patches of 8 pixels, 4 blocks, 10 classes; its stem has seen data."""
    torch.manual_seed(0)
    sizes = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "stem_width": 8,
        "num_classes": 10,
    }
    model = jitter(timm.create_model(name, **(sizes | kwargs))).eval()
    for statistics, buffer in model.named_buffers():
        if "running" in statistics:
            buffer.uniform_(0.5, 1.5, generator=seeded(1))
    return model


def tiny_swin(name: str = "swin_tiny_patch4_window7_224", **kwargs: Any) -> nn.Module:
    """A small Swin: maps of 32, 16, 8 and 4 positions a side, windows of 4, 10 classes."""
    torch.manual_seed(0)
    sizes = {
        "img_size": 32,
        "patch_size": 1,
        "embed_dim": 8,
        "depths": (1, 1, 6, 1),
        "num_heads": (1, 1, 2, 2),
        "window_size": 4,
        "num_classes": 10,
        "drop_path_rate": 0.0,
    }
    return jitter(timm.create_model(name, **(sizes | kwargs))).eval()


def tiny_swin_v2(name: str = "swinv2_tiny_window8_256", **kwargs: Any) -> nn.Module:
    """The same of the second version, whose attention compares directions."""
    return tiny_swin(name, **kwargs)


def tiny_pit(name: str = "pit_s_224", **kwargs: Any) -> nn.Module:
    """A small PiT: maps of 7, 4 and 2 positions a side from overlapping patches, 10 classes."""
    torch.manual_seed(0)
    sizes = {
        "img_size": 32,
        "patch_size": 8,
        "stride": 4,
        "base_dims": (16, 16, 16),
        "depth": (2, 3, 2),
        "heads": (1, 2, 4),
        "num_classes": 10,
    }
    return jitter(timm.create_model(name, **(sizes | kwargs))).eval()


def tiny_convnext(name: str = "convnext_tiny", **kwargs: Any) -> nn.Module:
    """A small ConvNeXt: maps of 32, 16, 8 and 4 positions a side, 10 classes."""
    torch.manual_seed(0)
    sizes = {
        "patch_size": 1,
        "dims": (8, 16, 32, 64),
        "depths": (1, 1, 6, 1),
        "num_classes": 10,
        "pretrained_cfg_overlay": {"input_size": (3, 32, 32)},
    }
    return jitter(timm.create_model(name, **(sizes | kwargs))).eval()


def norm_operations(model: nn.Module) -> list[int]:
    """Filled by the forwards that follow: five operations for each value that a LayerNorm reads,
    as published costs of Swin and its kin count them beside multiply-accumulates.
    """
    operations: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda _m, x, _y: operations.append(5 * x[0].numel()))
    return operations


def watch_blocks(
    model: Any, monkeypatch: pytest.MonkeyPatch, record: Callable[[int, Any, Any], None]
) -> None:
    """``record`` gets the index of each block of a plain vision transformer that is run whole, and
    the tokens before and after it.
    """
    run_block, indices = blocks.run_block, {b: i for i, b in enumerate(model.backbone.blocks)}

    def run(block: Any, tokens: Any, has_class: bool) -> Any:
        after = run_block(block, tokens, has_class)
        if block in indices:  # not a teacher's
            record(indices[block], tokens, after)
        return after

    monkeypatch.setattr(blocks, "run_block", run)


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a checkpoint's ``config.json`` as a stranger would, its digests too."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    weights = checkpoint.read_weights(folder / "model.safetensors")
    digests = {
        "config": checkpoint.digest_of(config),
        "weights": checkpoint.fingerprint(weights),
    }
    path.write_text(json.dumps(config | {"digests": digests}))


def images(batch: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=seeded(seed))


def golden(name: str) -> dict[str, Any]:
    case: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return case


def golden_weights(case: dict[str, Any]) -> dict[str, Tensor]:
    """The authors' state dict of a golden case, from its rules."""
    recipe = case["weights"]
    weights = {}
    for key, shape, rule in recipe["state_dict"]:
        generator = seeded((zlib.crc32(key.encode()) ^ recipe["salt"]) & 0x7FFFFFFF)
        noise = torch.randn(shape, generator=generator)
        kind, _, argument = rule.partition(":")
        if kind == "normal":
            weights[key] = float(argument or recipe["scale"]) * noise
        elif kind == "alias":
            weights[key] = weights[argument]
        elif rule == "norm":
            weights[key] = 1 + 0.1 * noise
        elif rule == "gamma":
            weights[key] = 0.5 + 0.1 * noise
        elif rule == "mean":
            weights[key] = 0.1 * noise
        elif rule == "var":
            weights[key] = 1 + 0.1 * noise.abs()
        elif rule == "keep":  # as the constructors make it: a counter
            weights[key] = torch.zeros(shape, dtype=torch.int64)
        elif rule == "value":
            weights[key] = torch.tensor(recipe["overrides"][key])
        else:
            raise AssertionError(f"unknown rule {rule!r}")
    return weights


def golden_input(case: dict[str, Any]) -> Tensor:
    return torch.randn(case["input"]["shape"], generator=seeded(case["input"]["seed"]))


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real weights and images, which lie beside the checkout on some machines only."""
    if not ASSETS.is_dir():
        pytest.skip("no real weights and images beside this checkout")
    return ASSETS
