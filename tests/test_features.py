"""Pyramids for heads: of every method and family, of padded batches, in training; their cost."""

from __future__ import annotations

import copy
import json
from functools import partial
from itertools import pairwise

import pytest
import timm
import torch
from PIL import Image
from timm.models._features import FeatureGetterNet, FeatureInfo
from torch import nn

from tests.conftest import images, seeded, tiny_convnext, tiny_lvvit, tiny_pit, tiny_swin, tiny_vit
from tests.test_cli import run
from tests.test_methods import BACKBONES, CASES, FAMILIES, KEEPS_ALL
from tests.test_methods import FIRST_OF_IMAGES as FIRST
from vitrim import (
    ASViTConfig,
    ConfigError,
    DenseConfig,
    DynamicSpatialConfig,
    DynamicViTConfig,
    FeaturesOnly,
    InputError,
    MergingConfig,
    SaiTConfig,
    SimplePyramid,
    SPViTConfig,
    SPViTPyramidConfig,
    STViTConfig,
    STViTRConfig,
    STViTSwinConfig,
    sparsify,
)
from vitrim.costs.macs import counting
from vitrim.errors import CheckpointError
from vitrim.methods import method_of_config
from vitrim.methods.records import Recorder

X = images(3)
GIVES_NONE = ("stvit", "stvit_swin")
GIVE = [
    (case, name) for case, name in FIRST if method_of_config(CASES[case]).name not in GIVES_NONE
]
"""Every case that gives maps, on one backbone of each family that its method runs on."""
ALL = [
    (case, name)
    for case, config in KEEPS_ALL.items()
    for name in ("class and registers", "scale and norm", "lv-vit", "pit", "swin", "convnext")
    if FAMILIES[name] in method_of_config(config).families
]


def sparse_model(model: nn.Module, config, scale: float = 1.0):
    """With selectors that are sure of what they choose, so that rounding decides nothing."""
    sparse = sparsify(model, config, generator=seeded(3)).eval()
    with torch.no_grad():
        for parameter in sparse.method.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return sparse


# --- every family and method ---


@pytest.mark.parametrize(("case", "backbone"), ALL)
def test_nothing_dropped_is_timms_own_pyramid(case, backbone):
    model = BACKBONES[backbone]()
    sparse = sparsify(model, KEEPS_ALL[case], generator=seeded(3)).eval()
    with torch.no_grad():
        everything = range(len(sparse.feature_info))
        found = sparse.features(X, indices=everything)
        expected = model.forward_intermediates(X, list(everything), intermediates_only=True)
    exact = getattr(KEEPS_ALL[case], "mode", "adaptive") == "adaptive"
    exact = exact and case != "merging threshold"  # whose means are of one token each
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0 if exact else 2e-6, rtol=0)


@pytest.mark.parametrize(("case", "backbone"), GIVE)
def test_each_image_has_its_own_pyramid_and_all_of_it_can_be_trained(case, backbone):
    sparse = sparsify(BACKBONES[backbone](), CASES[case], generator=seeded(3)).eval()
    with torch.no_grad():
        levels = sparse.features(X)
        alone = [sparse.features(image[None]) for image in X]
    for level, pieces in zip(levels, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(level, torch.cat(pieces), atol=1e-5, rtol=1e-5)
    assert [level.shape[1] for level in levels] == sparse.feature_info.channels()
    assert [32 // level.shape[2] for level in levels] == [
        32 // level.shape[2] for level in sparse.family.pyramid(X)[0]
    ]
    backbone = sparse.features_only().train()
    backbone.generator = seeded(5)
    levels = backbone(X)
    parts = backbone.losses([level.detach() + 1 for level in levels])
    assert ("ratio" in parts) == hasattr(sparse.config, "ratio_weight")
    (parts["total"] + sum(level.square().mean() for level in levels)).backward()
    for name, parameter in backbone.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    trained = sparse.trace(X)
    assert trained.logits.shape == (3, 10)


class Told(Recorder):
    """Keeps the tokens before and after each stage."""

    def add(self, block, before, scores, after, moves=None):
        super().add(block, before, scores, after, moves)
        self.states = [*getattr(self, "states", []), before]


DROPPING = {
    "dynamicvit": DynamicViTConfig(stages=(1, 3), keep_ratio=0.6),
    "dynamicvit threshold": DynamicViTConfig(stages=(1, 3), threshold=0.5),
    "dynamicvit merging": DynamicViTConfig(stages=(1, 3), keep_ratio=0.6, merge_dropped=True),
    "spvit": SPViTConfig(stages=(1, 3)),
    "asvit": ASViTConfig(thresholds=0.06, stages=(1, 3)),
    "asvit merging": ASViTConfig(thresholds=0.06, stages=(1, 3), merge_dropped=True),
    "sait": SaiTConfig(min_kept=0, mass=0.6, prune_after=2),
    "merging": MergingConfig(stages=(1, 2, 3), keep_ratio=0.7),
    "merging threshold": MergingConfig(stages=(1, 2, 3), threshold=0.1),
    "merging, dropping, merging": MergingConfig(
        stages=(1, 2, 3), keep_ratio=0.7, action=("merge", "drop", "merge")
    ),
}


@pytest.mark.parametrize("make", [tiny_vit, tiny_lvvit])
@pytest.mark.parametrize("config", DROPPING.values(), ids=DROPPING)
@torch.no_grad()
def test_a_place_shows_what_its_token_was_last(config, make):
    """By a loop over images and places, from what the stages say of themselves."""
    drops = not getattr(config, "merge_dropped", getattr(config, "action", "drop") == "merge")
    sparse = sparse_model(make(), config)
    family, last = sparse.family, []
    told = Told(family.grid())

    class Watched(type(family)):
        def head(self, tokens):
            last.append(tokens)
            return super().head(tokens)

        whole_last_block = "watched"

    sparse.method.infer(Watched(sparse.backbone), X, told)
    states = [*told.states, last[0]]
    (found,) = sparse.features(X)
    dropped = 0
    for image in range(len(X)):
        lists = [tokens_of(state, image) for state in states]
        for place in range(16):
            home = place
            for stage, (before, after) in enumerate(pairwise(lists)):
                expected = before[home]
                home = int(told.stages[stage].groups[image, place])
                if home < 0:
                    dropped += 1
                    break
                expected = after[home]
            shown = found[image, :, place // 4, place % 4]
            torch.testing.assert_close(shown, expected, atol=1e-5, rtol=1e-5)
    assert (dropped > 0) == drops


def tokens_of(state, image):
    """Original place: features of its token, of one image, whatever the state."""
    if hasattr(state, "layout"):
        rows = state.layout.image_N == image
        return dict(zip(state.index_N[rows].tolist(), state.patches[rows], strict=True))
    return dict(zip(state.index_BN[image].tolist(), state.patches[image], strict=True))


def test_what_gives_no_map_says_why():
    for model, config in (
        (tiny_vit(), STViTConfig(semantic_tokens=4)),
        (tiny_swin(), STViTSwinConfig(window_tokens=4)),
    ):
        sparse = sparsify(model, config).eval()
        for entry in (sparse.features, sparse.train_features, sparse.features_only().train()):
            with pytest.raises(ConfigError, match="mixed into all semantic tokens"):
                entry(X)


@torch.no_grad()
def test_other_sizes_of_images():
    x = torch.randn(2, 3, 48, 40, generator=seeded(1))
    for model, config, shape in (
        (tiny_vit(dynamic_img_size=True), DynamicViTConfig(stages=(1, 2)), (6, 5)),
        (tiny_lvvit(dynamic_img_size=True), MergingConfig(stages=(1, 2)), (6, 5)),
        (tiny_swin(strict_img_size=False), SPViTPyramidConfig(), (6, 5)),
        (tiny_convnext(), DynamicSpatialConfig(stages=(1,)), (6, 5)),
    ):
        sparse = sparsify(model, config, generator=seeded(3)).eval()
        assert tuple(sparse.features(x)[-1].shape[2:]) == shape
    none = sparse.features(x[:0])
    assert [len(level) for level in none] == [0] * 4


# --- images that were padded to one size ---

SIZES = [(64, 64), (37, 50), (16, 63), (5, 3)]
flexible_swin = partial(
    tiny_swin, patch_size=2, img_size=64, strict_img_size=False, always_partition=True
)
PADDED = {
    "dynamic_spatial on swin": (flexible_swin, DynamicSpatialConfig(stages=(1, 3), keep_ratio=0.6)),
    "dynamic_spatial on convnext": (
        partial(tiny_convnext, patch_size=2),
        DynamicSpatialConfig(stages=(1, 3), keep_ratio=0.6),
    ),
    "spvit_pyramid": (flexible_swin, SPViTPyramidConfig()),
    "spvit_pyramid fixed": (flexible_swin, SPViTPyramidConfig(inference="top_k", keep_ratio=0.6)),
    "spvit_pyramid masked": (
        flexible_swin,
        SPViTPyramidConfig(inference="top_k", keep_ratio=0.6, execution="mask", dropped="run"),
    ),
    "stvit_r": (flexible_swin, STViTRConfig.dense_prediction(window_tokens=4, layer_scale=0.5)),
    "stvit_r, 9 tokens": (
        flexible_swin,
        STViTRConfig.dense_prediction(window_tokens=9, layer_scale=0.5, position_convolution=True),
    ),
    "stvit_r on its stem": (
        partial(
            tiny_swin, "conv_stem_swin_tiny", patch_size=4, img_size=128, strict_img_size=False
        ),
        STViTRConfig.dense_prediction(window_tokens=4, layer_scale=0.5),
    ),
}


@pytest.mark.parametrize(("make", "config"), PADDED.values(), ids=PADDED)
@torch.no_grad()
def test_a_padded_batch_is_its_images_one_by_one(make, config):
    """Each alone is padded to whole positions of the smallest map; the padding holds noise. In
    double precision, where no rounding decides between two positions.
    """
    sparse = sparse_model(make(), config, scale=20.0).double()
    reduction = sparse.family.reduction
    sizes = [(height * reduction // 16, width * reduction // 16) for height, width in SIZES]
    x = torch.randn(4, 3, 4 * reduction, 6 * reduction, generator=seeded(1)).double()
    batch = sparse.features(x, sizes)
    for number, (height, width) in enumerate(sizes):
        own = [-(-side // reduction) * reduction for side in (height, width)]
        alone = torch.randn(1, 3, *own, generator=seeded(2)).double()
        alone[0, :, :height, :width] = x[number, :, :height, :width]
        levels = sparse.features(alone, [(height, width)])
        for padded, level in zip(batch, levels, strict=True):
            rows, columns = level.shape[2:]
            found = padded[number, :, :rows, :columns]
            torch.testing.assert_close(found, level[0], atol=1e-9, rtol=0)
            assert not padded[number, :, rows:].any()
            assert not padded[number, :, :, columns:].any()
        if (height, width) == tuple(own):  # whole, and in whole windows
            for level, plain in zip(levels, sparse.features(alone), strict=True):
                torch.testing.assert_close(level, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("make", "config"), PADDED.values(), ids=PADDED)
def test_training_on_a_padded_batch(make, config):
    """Gradients are numbers, padding is kept nowhere and counts in no ratio."""
    backbone = sparse_model(make(), config).features_only().train()
    reduction = backbone.family.reduction
    sizes = [(2 * reduction, reduction), (reduction, 3 * reduction)]
    x = torch.randn(2, 3, 2 * reduction, 4 * reduction, generator=seeded(1))
    backbone.generator = seeded(4)
    levels = backbone(x, sizes)
    output = backbone.output
    for level, keep in zip(levels, output.keeps, strict=True):
        assert keep.shape == (2, *level.shape[2:])
        places = level.shape[3] // 4
        assert not keep[0, :, places:].any()
        assert not keep[1, level.shape[2] // 2 :].any()
        assert not level[1, :, level.shape[2] // 2 :].any()
    parts = backbone.losses()
    if "ratio" in parts and "spatial" in backbone.model.method.name:
        ratios, keep = config.ratios(2), output.keeps[2]
        own = torch.tensor([2.0, 3.0]) * (keep.shape[2] // 2) ** 2
        shares = keep.flatten(1).sum(1) / own
        last = ((shares - ratios[1]) ** 2).mean()
        assert parts["ratio"] > last / 2 - 1e-6  # the mean over two predictors
    (parts["total"] + sum(level.square().mean() for level in levels)).backward()
    assert all(p.grad.isfinite().all() for p in backbone.parameters() if p.grad is not None)


@torch.no_grad()
def test_the_counts_of_padded_images_are_of_their_own_positions():
    sparse = sparse_model(flexible_swin(), DynamicSpatialConfig(stages=(1,), keep_ratio=(0.6,)))
    seen = []
    fast = sparse.method.fast_paths[0]
    fast.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    x, sizes = torch.randn(2, 3, 64, 64, generator=seeded(1)), [(64, 64), (37, 50)]
    sparse.features(x, sizes)
    own = 8 * 8, 5 * 7
    assert 2 * 64 - seen[0] == sum(int(positions * 0.6) for positions in own)


def test_bad_sizes_say_what_is_wrong():
    spatial = sparse_model(flexible_swin(), DynamicSpatialConfig(stages=(1,)))
    x = torch.zeros(2, 3, 64, 64)
    for wrong, match in (
        ([(64, 64)], "1 sizes for 2 images"),
        ([(64, 64), (65, 1)], "size of image 1"),
        ([(64, 64), (0, 1)], "size of image 1"),
    ):
        with pytest.raises(InputError, match=match):
            spatial.features(x, wrong)
    with pytest.raises(InputError, match="multiples of 16"):
        spatial.features(x[..., :60], [(64, 60)] * 2)
    whole = [(32, 32)] * 3
    for model, config in (
        (tiny_vit(), DynamicViTConfig(stages=(1,))),
        (tiny_vit(), DenseConfig()),
        (tiny_pit(), SPViTPyramidConfig()),
    ):
        with pytest.raises(ConfigError, match="does not serve sizes"):
            sparsify(model, config).eval().features(X, whole)
    with pytest.raises(ConfigError, match="dense_prediction"):
        sparse_model(flexible_swin(), STViTRConfig(window_tokens=4)).features(x, [(64, 64)] * 2)


# --- the module, and who takes it ---


def spatial_swin(**kwargs):
    return sparse_model(flexible_swin(**kwargs), DynamicSpatialConfig(stages=(1, 3)))


class WithNames(nn.Module):
    """Torchvision's parts want maps by name."""

    def __init__(self, features, neck):
        super().__init__()
        self.features, self.neck = features, neck

    def forward(self, x):
        maps = {str(number): level for number, level in enumerate(self.features(x))}
        return list(self.neck(maps).values())


def test_what_timm_says_of_features_only_is_what_we_say():
    for name, config, options in (
        ("swin_tiny_patch4_window7_224", DynamicSpatialConfig(), {}),
        ("convnext_tiny", DynamicSpatialConfig(), {}),
        ("pit_ti_224", SPViTPyramidConfig(), {}),
        ("vit_tiny_patch16_224", DynamicViTConfig(), {"out_indices": (2, 5, 8, 11)}),
    ):
        with torch.device("meta"):
            theirs = timm.create_model(name, features_only=True, **options).feature_info
            sparse = sparsify(timm.create_model(name), config)
        ours = sparse.features_only(**options).feature_info
        assert isinstance(sparse.feature_info, FeatureInfo)
        assert ours.channels() == theirs.channels()
        assert ours.reduction() == theirs.reduction()
        assert ours.out_indices == tuple(theirs.out_indices)
        assert ours.module_name() == [each.replace("_", ".") for each in theirs.module_name()]


def test_the_module_has_two_modes():
    sparse = spatial_swin()
    module = sparse.features_only((1, 3))
    x = torch.randn(2, 3, 64, 64, generator=seeded(1))
    assert not sparse.backbone.head.fc.weight.requires_grad
    with torch.no_grad():
        for ours, whole in zip(module(x), (sparse.features(x)[i] for i in (1, 3)), strict=True):
            assert torch.equal(ours, whole)
    with pytest.raises(InputError, match="no forward in training mode"):
        module.losses()
    module.train()
    module.generator = seeded(7)
    first = module(x)
    again = copy.deepcopy(module)
    assert again.output is None
    again.generator = seeded(7)
    assert all(map(torch.equal, again(x), first))
    assert not torch.equal(module(x)[1], first[1])  # another draw
    with pytest.raises(InputError, match="expected"):
        module.losses(first[:1])
    module(x)
    parts = module.losses(first, pyramid_weight=3.0)
    total = sparse.config.ratio_weight * parts["ratio"] + 3.0 * parts["pyramid"]
    torch.testing.assert_close(parts["total"], total)
    with pytest.raises(InputError, match="the maps asked for"):
        sparse.features_only((0, 4))
    assert sparse.trace(x).macs.tolist() == [sparse.macs((64, 64))] * 2


@torch.no_grad()
def test_a_dense_backbone_goes_the_same_way():
    """As a teacher, or to compare; with the sizes of padded images too."""
    model = flexible_swin()
    module = FeaturesOnly(model)
    x = torch.randn(2, 3, 64, 64, generator=seeded(1))
    for ours, theirs in zip(
        module(x), model.forward_intermediates(x, intermediates_only=True), strict=True
    ):
        assert torch.equal(ours, theirs)
    everything = sparse_model(model, DynamicSpatialConfig(stages=(1,), keep_ratio=(1.0,)))
    sizes = [(64, 64), (32, 40)]
    for ours, sparse in zip(module(x, sizes), everything.features(x, sizes), strict=True):
        assert torch.equal(ours, sparse)


def test_torchvisions_pyramid_network_takes_it():
    from torchvision.ops import FeaturePyramidNetwork

    features = spatial_swin().features_only()
    neck = FeaturePyramidNetwork(features.feature_info.channels(), 16)
    maps = WithNames(features.train(), neck)(torch.randn(2, 3, 64, 64, generator=seeded(1)))
    assert [tuple(level.shape) for level in maps] == [(2, 16, n, n) for n in (32, 16, 8, 4)]
    sum(level.square().mean() for level in maps).backward()
    assert features.model.method.fast_paths[0].linear.weight.grad.abs().sum() > 0


def test_decoders_of_smp_take_it():
    pytest.importorskip("segmentation_models_pytorch")
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    x = torch.randn(2, 3, 64, 64, generator=seeded(1))
    features = spatial_swin().features_only()
    channels = [3, 0, *features.feature_info.channels()]  # of images, and none at half of them
    for decoder in (UPerNetDecoder, FPNDecoder):
        head = decoder(encoder_channels=channels, encoder_depth=5).eval()
        with torch.no_grad():
            out = head([x, x[:, :0], *features(x)])
        assert out.shape[2:] == (32, 32)


def test_consumers_of_timm_and_transformers_take_it():
    """timm's own getter on the sparse model; UperNet of transformers on the module."""
    sparse = sparse_model(tiny_vit(), DynamicViTConfig(stages=(1, 2)))
    getter = FeatureGetterNet(sparse, out_indices=(1, 3))
    with torch.no_grad():
        for ours, theirs in zip(sparse.features_only((1, 3))(X), getter(X), strict=True):
            assert torch.equal(ours, theirs)
    assert getter.feature_info.channels() == [32, 32]

    transformers = pytest.importorskip("transformers")
    from transformers.models.upernet.modeling_upernet import UperNetHead

    features = spatial_swin().features_only()
    config = transformers.UperNetConfig(hidden_size=16, num_labels=5)
    head = UperNetHead(config, in_channels=features.feature_info.channels()).eval()
    with torch.no_grad():
        logits = head(features(torch.randn(2, 3, 64, 64, generator=seeded(1))))
    assert logits.shape == (2, 5, 32, 32)


def test_a_simple_pyramid_of_one_plain_map():
    sparse = sparse_model(tiny_vit(dynamic_img_size=True), DynamicViTConfig(stages=(1, 2)))
    pyramid = SimplePyramid(sparse.features_only(), channels=12).train()
    maps = pyramid(torch.randn(2, 3, 48, 32, generator=seeded(1)))
    assert [tuple(level.shape) for level in maps] == [
        (2, 12, rows, columns) for rows, columns in ((24, 16), (12, 8), (6, 4), (3, 2))
    ]
    assert pyramid.feature_info.reduction() == [2, 4, 8, 16]
    assert pyramid.feature_info.channels() == [12] * 4
    parts = pyramid.losses()
    (parts["total"] + sum(level.square().mean() for level in maps)).backward()
    assert all(p.grad is not None for p in pyramid.parameters() if p.requires_grad)
    with pytest.raises(InputError, match="gives 2 maps"):
        SimplePyramid(sparse.features_only(2))


# --- what it costs ---

GIGA = [
    ("swin_small_patch4_window7_224", None, {}, 187.6),
    ("swin_base_patch4_window7_224", None, {}, 331.1),
    ("conv_stem_swin_small", STViTRConfig.dense_prediction(), {}, 129.1),
    ("conv_stem_swin_base", STViTRConfig.dense_prediction(), {}, 223.4),
]


@pytest.mark.parametrize(
    ("name", "config", "options", "expected"),
    GIGA,
    ids=[f"{name}-800x1280-{expected}" for name, _, _, expected in GIGA],
)
def test_published_costs_of_backbones_at_800_x_1280(name, config, options, expected):
    with torch.device("meta"):
        model = timm.create_model(name, strict_img_size=False, **options)
        sparse = sparsify(model, config or DynamicSpatialConfig())
    macs = sparse.dense_features_macs if config is None else sparse.features_macs
    assert macs((800, 1280)) / 1e9 == pytest.approx(expected, abs=0.05)


COUNTED = {
    "dynamic_spatial swin": (flexible_swin, DynamicSpatialConfig(stages=(1, 3)), (80, 48)),
    "dynamic_spatial convnext": (tiny_convnext, DynamicSpatialConfig(stages=(1, 3)), (40, 24)),
    "spvit_pyramid swin": (flexible_swin, SPViTPyramidConfig(inference="top_k"), (80, 48)),
    "spvit_pyramid pit": (tiny_pit, SPViTPyramidConfig(inference="top_k"), (32, 32)),
    "stvit_r": (flexible_swin, STViTRConfig.dense_prediction(window_tokens=4), (80, 48)),
    "dynamicvit": (
        partial(tiny_vit, dynamic_img_size=True),
        DynamicViTConfig(stages=(1, 2), keep_ratio=(1.0, 0.5)),
        (48, 40),
    ),
    "spvit": (tiny_vit, SPViTConfig(inference="top_k", keep_ratio=(1.0, 0.5), stages=(1, 2)), None),
    "sait": (tiny_lvvit, SaiTConfig(selector="density"), None),
    "merging": (tiny_vit, MergingConfig(), None),
    "dense": (tiny_vit, DenseConfig(), None),
}


@pytest.mark.parametrize(("make", "config", "size"), COUNTED.values(), ids=COUNTED)
@torch.no_grad()
def test_the_formula_is_what_torch_counts(make, config, size):
    sparse = sparse_model(make(), config)
    x = torch.randn(1, 3, *(size or (32, 32)), generator=seeded(1))
    with counting() as counter:
        sparse.features(x)
    assert sparse.features_macs(size) == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)
    with counting() as counter:
        FeaturesOnly(sparse.backbone)(x)
    dense = counter.get_total_flops() / 2
    assert sparse.dense_features_macs(size) == pytest.approx(dense, rel=1e-3)
    assert sparse.features_macs(size) <= dense


# --- elsewhere than in torch ---

DATA = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
EXPORTED = {
    "onnx": (
        tiny_vit,
        MergingConfig(stages=(1, 2, 3), action=("merge", "drop", "merge")),
        None,
    ),
    "pt2": (
        partial(tiny_vit, class_token=False, global_pool="avg"),
        SPViTConfig(stages=(1, 2)),
        3,
    ),
}
"""Format: how the model is made, its method, and images per call."""


@pytest.mark.parametrize("to", EXPORTED)
def test_a_bundle_gives_the_pyramid_and_the_embedding(to, tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    from vitrim.export.bundle import check, export, run_all

    make, config, batch = EXPORTED[to]
    model = sparse_model(make(), config, scale=20.0)
    features = model.features_only()
    folder = export(features, tmp_path / "bundle", to, data_config=DATA, batch=batch)
    found = check(features, folder, X)
    assert found.difference < 1e-4
    assert found.agreement is None
    with torch.no_grad():
        levels, embedding = features.embedded(X)
        if batch is None:  # else features do not tell how many tokens an image keeps
            expected = model.forward_head(model.forward_features(X), pre_logits=True)
            torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-5)
    outputs = run_all(folder, X)
    shapes = [tuple(part.shape) for part in [*levels, embedding]]
    assert [output.shape for output in outputs] == shapes
    description = json.loads((folder / "bundle.json").read_text())
    assert description["outputs"][-1] == "embedding"
    assert description["model"]["macs"] == features.macs()


def test_a_bundle_says_what_it_gives(tmp_path):
    pytest.importorskip("openvino")
    from vitrim.export.bundle import export
    from vitrim.runtime import Bundle

    data = partial(export, data_config=DATA)
    config = DynamicSpatialConfig(stages=(1, 3))
    features = sparse_model(tiny_convnext(), config, scale=20.0).features_only(2)
    bundle = Bundle(data(features, tmp_path / "features", "openvino"))
    x = X.numpy()
    found = bundle.features(x)
    with torch.no_grad():
        for ours, theirs in zip(
            found.values(), [*features(X), features.embedded(X)[1]], strict=True
        ):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-4, rtol=1e-4)
    assert list(found) == ["level2", "level3", "embedding"]
    assert [found[name].shape for name in found] == [(3, 32, 8, 8), (3, 64, 4, 4), (3, 64)]
    with pytest.raises(InputError, match="gives features"):
        bundle(x)
    description = json.loads((bundle.folder / "bundle.json").read_text())
    description["outputs"] = ["level0"]
    (bundle.folder / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="expected level0"):
        Bundle(bundle.folder).features(x)
    description["outputs"] = None
    (bundle.folder / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="--features"):
        Bundle(bundle.folder).features(x)
    with pytest.raises(ConfigError, match="executorch"):
        data(features, tmp_path / "no", "executorch")


def test_the_commands(tmp_path, capsys):
    """Export with a check, and the speed at a size of its own."""
    sparse = sparse_model(tiny_convnext(), DynamicSpatialConfig(stages=(1, 3)))
    sparse.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 48), "teal").save(tmp_path / "photos" / "one.png")
    words = ["export", tmp_path / "model", "--to", "pt2", "-o", tmp_path / "bundle", "--features"]
    code, out, err = run(capsys, *words, "--check", "--data", tmp_path / "photos")
    assert code == 0, err
    assert "level3, embedding" in out
    report = tmp_path / "bench.json"
    words = ["bench", tmp_path / "model", "--features", "--image-size", "64,32", "--json", report]
    quick = ["--batch", 1, "--dtype", "fp32", "--rounds", 1, "--seconds", 0]
    code, out, err = run(capsys, *words, *quick)
    assert code == 0, err
    dense, row = json.loads(report.read_text())["rows"]
    assert dense["macs"] == sparse.dense_features_macs((64, 32))
    assert row["macs"] == sparse.features_macs((64, 32))
    assert dense["image_shape"] == [3, 64, 32]
    words[4] = "64,32,16"
    code, out, err = run(capsys, *words, *quick)
    assert code == 2
    assert "expected a side, or height,width" in err
