"""open_clip's models are made sparse in their place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.conftest import images, jitter, tiny_vit
from vitrim import (
    DenseConfig,
    MergingConfig,
    UnsupportedBackboneError,
    sparsify,
    sparsify_inside,
)

clip_model = pytest.importorskip("open_clip.model")

X = images(2)
TEXT = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1}
SIZES = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}


def made(kind=clip_model.CLIP, quick_gelu=False, **vision):
    torch.manual_seed(0)
    vision = clip_model.CLIPVisionCfg(**(SIZES | vision))
    return jitter(kind(24, vision, clip_model.CLIPTextCfg(**TEXT), quick_gelu=quick_gelu)).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quick_gelu": True},
        {"ls_init_value": 0.5, "mlp_ratio": 2.5},
        {"pool_type": "avg"},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"no_ln_pre": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_its_own_transformer_is_converted_in_its_place(options):
    model, words = made(**options), torch.tensor([[1, 5, 9, 2, 0, 0, 0, 0]])
    due = model.get_logits(X, words)[0]
    sparse = sparsify_inside(model, DenseConfig())
    assert model.visual is sparse
    torch.testing.assert_close(model.get_logits(X, words)[0], due, atol=1e-4, rtol=1e-5)
    assert model.visual.image_size == (32, 32)


@torch.no_grad()
def test_its_timm_trunk_is_made_sparse_in_its_place():
    model = made(clip_model.CustomTextCLIP, timm_model_name="vit_tiny_patch16_224", image_size=224)
    model.visual.trunk = tiny_vit(num_classes=0, embed_dim=192, num_heads=3)
    model.visual.preprocess_cfg = {
        "size": 32,
        "mean": (0.4, 0.4, 0.4),
        "std": (0.2, 0.2, 0.2),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    due = model.encode_image(X)
    with pytest.raises(UnsupportedBackboneError, match="sparsify_inside"):
        sparsify(model, DenseConfig())
    sparse = sparsify_inside(model, MergingConfig(keep_ratio=1.0))
    assert model.visual.trunk is sparse
    torch.testing.assert_close(model.encode_image(X), due, atol=1e-5, rtol=1e-5)
    assert sparse.data_config["mean"] == (0.4, 0.4, 0.4)
    assert sparse.data_config["crop_mode"] == "squash"
    sparse.set_budget(0.6)
    assert model.encode_image(X).shape == (2, 24)


def test_what_timm_has_no_word_for_is_refused():
    model = made(attentional_pool=True)
    with pytest.raises(UnsupportedBackboneError, match="attentional pooling"):
        sparsify_inside(model, DenseConfig())
    model = made()
    model.visual.output_tokens = True
    with pytest.raises(UnsupportedBackboneError, match="output_tokens"):
        sparsify_inside(model, DenseConfig())
    model = made()
    model.visual.transformer.resblocks[1].ln_1.eps = 0.1
    with pytest.raises(UnsupportedBackboneError, match="gives another embedding"):
        sparsify_inside(model, DenseConfig())


def test_hints_for_what_cannot_be_made_sparse():
    pair = nn.ModuleList([tiny_vit(), tiny_vit()])
    with pytest.raises(UnsupportedBackboneError, match="2 vision towers: 0, 1; give one as path"):
        sparsify_inside(pair, DenseConfig())
    sparse = sparsify_inside(pair, DenseConfig(), path="1")
    assert pair[1] is sparse
    assert pair[0] is not sparse
    with pytest.raises(UnsupportedBackboneError, match="no vision tower"):
        sparsify_inside(nn.ModuleList([nn.Linear(2, 2)]), DenseConfig())
    with pytest.raises(UnsupportedBackboneError, match="no module 'visual'"):
        sparsify_inside(pair, DenseConfig(), path="visual")
    for model, message in (
        ("deit_small_patch16_224", "is a name; give the model itself"),
        (torch.compile(tiny_vit(), backend="eager"), "compiled"),
        (nn.DataParallel(tiny_vit()), "DataParallel around a VisionTransformer"),
        (3, "no torch module"),
    ):
        for call in (sparsify, sparsify_inside):
            with pytest.raises(UnsupportedBackboneError, match=message):
                call(model, DenseConfig())
