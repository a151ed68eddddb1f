"""Real weights on real images, where they lie beside the checkout."""

from __future__ import annotations

import pytest
import timm
import torch

from vitrim import (
    DenseConfig,
    DynamicViTConfig,
    MergingConfig,
    as_transformers,
    from_pretrained,
    from_transformers,
    sparsify,
    sparsify_inside,
)
from vitrim.checkpoint import load_strict, read_weights
from vitrim.export.bundle import export
from vitrim.export.bundle import run as bundle_logits
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


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224"])
@torch.no_grad()
def test_every_entrance_gives_the_same_logits(assets, tmp_path, name):
    """timm, transformers, in its place, a checkpoint and a bundle, on real images."""
    hf = pytest.importorskip("transformers")
    pytest.importorskip("onnx")
    model = timm.create_model(name).eval()
    path = assets / "weights" / f"{name}.safetensors"
    load_strict(model, read_weights(path), str(path))
    data = describe_data(model)
    batches = eval_loader(assets / "imagenet-val-1300", data, 8, limit=16, num_classes=1000)
    x = torch.cat([images for images, _ in batches])
    due = model(x)
    theirs = in_transformers(hf, model)
    torch.testing.assert_close(theirs(x).logits, due, atol=1e-4, rtol=1e-5)
    entrances = {
        "timm": sparsify(model, DenseConfig()),
        "transformers": from_transformers(theirs, MergingConfig(keep_ratio=1.0)),
    }
    entrances["transformers"].data_config = data
    entrances["transformers"].save_pretrained(tmp_path / "saved")
    entrances["checkpoint"] = from_pretrained(tmp_path / "saved")
    entrances["and back"] = lambda x: as_transformers(entrances["transformers"])(x).logits
    sparsify_inside(theirs, DenseConfig())
    entrances["in its place"] = lambda x: theirs(x).logits
    folder = export(entrances["checkpoint"], tmp_path / "bundle", "onnx", data_config=data)
    entrances["bundle"] = lambda x: torch.from_numpy(bundle_logits(folder, x))
    for entrance, answer in entrances.items():
        gap = (answer(x) - due).abs().max() / due.abs().max()
        assert gap < 1e-5, f"{entrance}: {gap:.2g}"


def in_transformers(hf, model):
    """A timm model's weights in transformers' ViT, whose epsilon is set to timm's."""
    width = model.embed_dim
    config = hf.ViTConfig(
        hidden_size=width,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=model.blocks[0].attn.num_heads,
        intermediate_size=4 * width,
        layer_norm_eps=model.norm.eps,
        num_labels=model.num_classes,
    )
    theirs, state = hf.ViTForImageClassification(config).eval(), model.state_dict()
    for name, tensor in theirs.state_dict().items():
        for old, new in (
            ("vit.embeddings.position_embeddings", "pos_embed"),
            ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("vit.embeddings.", ""),
            ("vit.layernorm", "norm"),
            ("vit.layers.", "blocks."),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("attention.o_proj", "attn.proj"),
            ("classifier", "head"),
        ):
            name = name.replace(old, new)
        for place, part in enumerate(("q_proj", "k_proj", "v_proj")):
            if part in name:
                joined = state[name.replace(f"attention.{part}", "attn.qkv")]
                tensor.copy_(joined[place * width : (place + 1) * width])
                break
        else:
            tensor.copy_(state[name])
    return theirs
