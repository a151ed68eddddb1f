"""Family ``video_swin``: run piece by piece, a backbone is torchvision's, bit for bit."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torchvision.models import video
from torchvision.models.video.swin_transformer import SwinTransformer3d

from tests.conftest import clips, jitter, seeded, tiny_video_swin
from vitrim import DenseConfig, InputError, UnsupportedBackboneError, from_pretrained, sparsify
from vitrim.costs.macs import counting
from vitrim.families import family_of
from vitrim.families.described import describe_backbone, describe_data

SIZES = [(8, 32, 32), (7, 27, 35), (1, 1, 1), (2, 9, 40), (11, 32, 6)]
"""Frames, height and width: whole windows, padded ones, and maps smaller than a window."""
VARIANTS = {
    "plain": {},
    "three-stages": {"depths": (2, 2, 3), "num_heads": (1, 2, 2)},
    "long-windows": {"window_size": (8, 3, 5)},
    "mlp-ratio": {"mlp_ratio": 2.0},
    "drop-path": {"stochastic_depth_prob": 0.3, "dropout": 0.1, "attention_dropout": 0.1},
}
STATED = {  # torchvision's weights, and what torchvision states of them at 16 frames of 224 x 224
    "T 28.158 M 43.882 G": ("swin3d_t", video.Swin3D_T_Weights.KINETICS400_V1),
    "S 49.817 M 82.841 G": ("swin3d_s", video.Swin3D_S_Weights.KINETICS400_V1),
    "B 88.049 M 140.667 G": ("swin3d_b", video.Swin3D_B_Weights.KINETICS400_V1),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_run_piece_by_piece_it_is_torchvision(variant, size):
    model = tiny_video_swin(**VARIANTS[variant])
    family = family_of(model)
    x = clips(2, size)
    with torch.no_grad():
        assert torch.equal(family.head(family.dense(x)), model(x))
        assert torch.equal(sparsify(model, DenseConfig())(x), model(x))
    with torch.no_grad(), counting() as counter:
        model(x[:1])
    assert family.dense_macs(family.grid(size)) == counter.get_total_flops() / 2


def test_in_training_it_is_torchvision_too():
    model = tiny_video_swin(stochastic_depth_prob=0.5, dropout=0.1).train()
    sparse, x = sparsify(model, DenseConfig()), clips(4)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(sparse(x), expected)


@pytest.mark.parametrize("row", STATED)
def test_macs_and_parameters_are_what_torchvision_states(row):
    """Multiply-accumulates of linear layers, the patch convolution and attention's two products."""
    name, weights = STATED[row]
    with torch.device("meta"):
        model = timm.create_model(name)
        theirs = getattr(video, name)()
    family, meta = family_of(model), weights.meta
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"]
    assert round(family.dense_macs(family.grid((16, 224, 224))) / 1e9, 3) == meta["_ops"]
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert family.clip_frames == 32


def test_published_weights_are_read_from_torchvisions_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(3)
    file = video.Swin3D_T_Weights.KINETICS400_V1.url.rpartition("/")[2]
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(video.swin3d_t().state_dict(), folder / file)
    theirs = video.swin3d_t(weights="KINETICS400_V1").eval()
    ours = timm.create_model("swin3d_t", pretrained=True).eval()
    x = clips(1, (4, 32, 32))
    with torch.no_grad():
        expected = theirs(x)
        assert torch.equal(ours(x), expected)
        assert torch.equal(sparsify(theirs, DenseConfig()).eval()(x), expected)
    data = describe_data(theirs)
    assert data == describe_data(ours)
    assert data["interpolation"] == "bilinear"
    assert data["frames"] == 32


@pytest.mark.parametrize("maker", ["torchvision", "timm"])
def test_whoever_made_it_its_checkpoint_makes_it_again(maker, tmp_path):
    model = tiny_video_swin()
    if maker == "torchvision":
        sizes = {"patch_size": [2, 1, 1], "window_size": [2, 4, 4], "depths": [1, 2]}
        model = jitter(SwinTransformer3d(embed_dim=8, num_heads=[1, 2], num_classes=3, **sizes))
        model.head = nn.Linear(16, 7)
    sparse, x = sparsify(model.eval(), DenseConfig()), clips(2)
    sparse.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert torch.equal(loaded(x), sparse(x))
    assert type(loaded.unwrap()) is SwinTransformer3d
    assert loaded.takes_clips
    assert loaded.data_config["frames"] == (8 if maker == "timm" else 32)
    assert describe_backbone(loaded.unwrap()) == describe_backbone(model)


def test_what_cannot_be_run_is_refused_by_name():
    model = tiny_video_swin()
    model.features[0][0].attn = nn.Identity()
    with pytest.raises(UnsupportedBackboneError, match="attention type Identity"):
        family_of(model)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 8, 32, 32), (2, 3, 0, 32, 32), (3, 8)])
def test_what_is_no_clip_is_refused(shape):
    sparse = sparsify(tiny_video_swin(), DenseConfig()).eval()
    with pytest.raises(InputError, match=r"\(batch, 3, frames, height, width\)"):
        sparse(torch.zeros(shape))


def test_images_are_no_clips():
    from tests.conftest import tiny_vit

    sparse = sparsify(tiny_vit(), DenseConfig())
    assert not sparse.takes_clips
    with pytest.raises(InputError, match="expected"):
        sparse(torch.randn(1, 3, 8, 32, 32, generator=seeded(0)))
