"""Models of transformers become timm models with the same numbers, and go back."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import images, jitter
from vitrim import (
    from_transformers,
)

hf = pytest.importorskip("transformers")

X = images(2)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
NAMES = {"id2label": dict(enumerate("abcde")), "label2id": {c: i for i, c in enumerate("abcde")}}
DINO = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
TEXT |= {"intermediate_size": 16, "max_position_embeddings": 8, "projection_size": 32}


def vision(kind, **options):
    return getattr(hf, f"{kind}VisionConfig")(**SIZES, **options)


def two_towers(kind):
    config = getattr(hf, f"{kind}Config")(
        text_config=TEXT | {"eos_token_id": 2}, vision_config=SIZES, projection_dim=24
    )
    return getattr(hf, f"{kind}Model")(config)


MODELS = {
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SIZES), add_pooling_layer=False),
    "vit classifier": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, **NAMES)),
    "vit without qkv bias": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(**SIZES, **NAMES, qkv_bias=False, hidden_act="gelu_new")
    ),
    "deit": lambda: hf.DeiTModel(hf.DeiTConfig(**SIZES), add_pooling_layer=False),
    "deit classifier": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**SIZES, **NAMES)),
    "deit distilled": lambda: hf.DeiTForImageClassificationWithTeacher(
        hf.DeiTConfig(**SIZES, **NAMES)
    ),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO, mlp_ratio=2)),
    "dinov2 swiglu": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO, use_swiglu_ffn=True)),
    "dinov2 with registers": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)
    ),
    "clip": lambda: hf.CLIPVisionModel(vision("CLIP")),
    "clip projected": lambda: hf.CLIPVisionModelWithProjection(vision("CLIP", projection_dim=24)),
    "clip with text": lambda: two_towers("CLIP"),
    "siglip": lambda: hf.SiglipVisionModel(vision("Siglip")),
    "siglip without a head": lambda: hf.SiglipVisionModel(vision("Siglip", vision_use_head=False)),
    "siglip classifier": lambda: hf.SiglipForImageClassification(
        hf.SiglipConfig(vision_config=SIZES, **NAMES)
    ),
    "siglip with text": lambda: two_towers("Siglip"),
}


def made(name):
    torch.manual_seed(0)
    return jitter(MODELS[name]()).eval()


def tower_of(model):
    return next(
        (getattr(model, n) for n in ("vit", "deit", "vision_model") if hasattr(model, n)), model
    )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_twin_has_the_models_numbers(name):
    model = made(name)
    sparse = from_transformers(model)
    tower = tower_of(model)(X)
    hidden = tower.last_hidden_state
    if "clip" in name and "siglip" not in name:
        hidden = tower_of(model).post_layernorm(hidden)
    torch.testing.assert_close(sparse.backbone.forward_features(X), hidden, atol=1e-5, rtol=1e-5)
    answer = sparse(X)
    if "classifier" in name or name in ("vit without qkv bias", "deit distilled"):
        torch.testing.assert_close(answer, model(X).logits, atol=1e-5, rtol=1e-5)
        assert sparse.labels == tuple("abcde")
    elif name == "clip projected":
        torch.testing.assert_close(answer, model(X).image_embeds, atol=1e-5, rtol=1e-5)
    elif hasattr(model, "get_image_features"):
        due = model.get_image_features(X).pooler_output
        torch.testing.assert_close(answer, due, atol=1e-5, rtol=1e-5)
    elif tower.pooler_output is not None:
        torch.testing.assert_close(answer, tower.pooler_output, atol=1e-5, rtol=1e-5)
