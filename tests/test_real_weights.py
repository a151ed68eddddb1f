"""Real weights on real images, where they lie beside the checkout."""

from __future__ import annotations

import pytest
import timm
import torch

from vitrim import DynamicViTConfig, from_pretrained, sparsify
from vitrim.checkpoint import load_strict, read_weights
from vitrim.families.described import describe_data
from vitrim.tools.evaluate import evaluate
from vitrim.train.data import eval_loader

pytestmark = pytest.mark.assets


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_real_models_see_and_survive_a_round_trip(assets, tmp_path, name):
    model = timm.create_model(name)
    path = assets / "weights" / f"{name}.safetensors"
    load_strict(model, read_weights(path), str(path))
    sparse = sparsify(model, DynamicViTConfig(keep_ratio=1.0)).eval()
    loader = eval_loader(
        assets / "imagenet-val-1300", describe_data(model), 26, limit=52, num_classes=1000
    )
    found = evaluate(sparse, loader)
    assert found.images == 52
    assert found.sparse.top1 == found.dense.top1 >= 65  # 82 % on all 1,300
    assert found.paired.won == found.paired.lost == 0
    sparse.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(from_pretrained(tmp_path)(x), sparse(x))
