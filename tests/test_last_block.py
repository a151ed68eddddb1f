"""The exact last block: the same logits, for what a class token's head needs of it."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace

import pytest
import timm
import torch
from torch.ao.nn.quantized import dynamic

from tests.conftest import (
    forge,
    images,
    jitter,
    seeded,
    tiny_convnext,
    tiny_lvvit,
    tiny_pit,
    tiny_swin,
    tiny_vit,
    watch_blocks,
)
from tests.tables import table_of
from tests.test_families import VARIANTS, backbone, variant_images
from tests.test_macs import counted
from tests.test_methods import CASES, METHOD, sparse_model
from tests.test_wrapped import Adapter
from tests.training import quiet, tiny_recipe, write_images
from vitrim import (
    ConfigError,
    DenseConfig,
    DynamicViTConfig,
    SaiTConfig,
    STViTConfig,
    UnsupportedBackboneError,
    calibrate,
    from_pretrained,
    sparsify,
)
from vitrim.families import family_of
from vitrim.latency.measure import profile
from vitrim.latency.table import LatencyTable, predict
from vitrim.tokens.packed import select
from vitrim.train.engine import train

X = images(3)
POOLING = {
    *("average-pool", "class-token-average", "registers-average", "prefix-in-average", "siglip"),
}
"""Variants whose heads read the patch tokens."""
EXACT = [name for name in VARIANTS if name not in POOLING]
PLAIN = [name for name in CASES if "vit" in METHOD[name].families]
STARTING = STViTConfig(semantic_tokens=4, pooling="avg", global_centres=False, keep_prefix=True)


def dense(model, exact=True):
    return sparsify(model, DenseConfig(exact_last_block=exact))


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def ran_whole(sparse, monkeypatch, x=X):
    """Whether a call runs all of the last block."""
    seen = []
    with monkeypatch.context() as patch:
        watch_blocks(sparse, patch, lambda index, *_: seen.append(index))
        sparse(x)
    return len(sparse.backbone.blocks) - 1 in seen


# Against timm.


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_dropped_is_timm(variant, batch):
    model = backbone(variant)
    x = variant_images(model, batch)
    close(dense(model)(x), model(x))
    assert torch.equal(dense(model, exact=False)(x), model(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_same_function(variant):
    """In double precision nothing but the order of additions is left."""
    model = backbone(variant).double()
    x = variant_images(model, 2).double()
    close(dense(model)(x), model(x), 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 0},
        {"dynamic_img_size": True},
        {"scale_attn_norm": True, "qk_norm": True, "init_values": 0.3},
        {"reg_tokens": 3, "qkv_bias": False, "proj_bias": False},
        {"depth": 1},
    ],
    ids=str,
)
def test_together_they_are_timm(options):
    model = tiny_vit(**options)
    sizes = [(32, 32), (48, 32), (24, 56)] if options.get("dynamic_img_size") else [(32, 32)]
    for size in sizes:
        x = torch.randn(2, 3, *size, generator=seeded(1))
        close(dense(model)(x), model(x))


@pytest.mark.parametrize("head_dim", [8, 16, 24])
@pytest.mark.parametrize("gated", [False, True])
def test_gated_attention_and_heads_of_any_width_are_timm(gated, head_dim):
    model = tiny_vit()
    for block in model.blocks:
        options = {"qkv_bias": True, "attn_head_dim": head_dim, "gated": gated}
        block.attn = timm.layers.Attention(32, num_heads=2, **options)
    jitter(model).eval()
    close(dense(model)(X), model(X))
    assert dense(model).macs() == counted(dense(model), X[:1]) < dense(model).dense_macs()


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_reads_the_patches_runs_whole_and_says_so(variant, monkeypatch):
    sparse = dense(backbone(variant))
    why = sparse.method.whole_last_block(sparse.family)
    assert (why is None) == (variant in EXACT)
    assert why is None or why == "the head reads the patch tokens too"
    x = variant_images(sparse.backbone, 2)
    assert ran_whole(sparse, monkeypatch, x) == (variant in POOLING)


def test_lv_vit_runs_whole():
    model = tiny_lvvit()
    assert torch.equal(dense(model)(X), model(X))
    assert dense(model).macs() == dense(model).dense_macs()


# What it costs.


@pytest.mark.parametrize("variant", VARIANTS)
def test_macs_are_what_torch_counts(variant):
    sparse = dense(backbone(variant))
    x = variant_images(sparse.backbone, 1)
    assert sparse.macs() == counted(sparse, x)
    assert (sparse.macs() < sparse.dense_macs()) == (variant in EXACT)
    whole = dense(sparse.backbone, exact=False)
    assert whole.macs() == whole.dense_macs()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_macs_of_methods_are_what_torch_counts(name, exact):
    config = replace(CASES[name], exact_last_block=exact)
    sparse = sparsify(tiny_vit(), config, generator=seeded(3)).eval()
    for image in X:
        found = sparse.trace(image[None]).macs.item()
        assert found == counted(sparse, image[None])


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_it_saves_eight_percent_of_deit(name):
    with torch.device("meta"):
        sparse = dense(timm.create_model(f"deit_{name}_patch16_224"))
    assert 1 - sparse.macs() / sparse.dense_macs() == pytest.approx(0.0815, abs=0.001)
    if name == "tiny":
        assert sparse.dense_macs() / 1e9 == pytest.approx(1.254, abs=5e-4)
        assert sparse.macs() / 1e9 == pytest.approx(1.152, abs=5e-4)


# Every form of the tokens.


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("variant", ["vit", "deit-distilled", "qk-norm", "registers-class"])
def test_masked_gathered_and_packed_agree(variant, sized):
    """With one another, and with the whole block; also where tokens stand for several patches."""
    family = family_of(backbone(variant))
    tokens = family.run_block(0, family.stem(images(4)))
    if sized:
        size = torch.randint(1, 5, (4, 16), generator=seeded(2)).float()
        tokens = tokens.sized(size)
    position = torch.stack([torch.randperm(16, generator=seeded(i))[:7] for i in range(4)])
    keep = torch.zeros(4, 16).scatter(1, position, 1.0)
    alike = tokens.with_keep(keep), tokens.gather(position)
    for form in alike:
        close(family.answer(1, form), family.answer(1, alike[1], exact=False))
    if sized:
        plain = tokens.sized(None).gather(position)
        assert (family.answer(1, plain) - family.answer(1, alike[1])).abs().max() > 1e-4
    unlike = keep * (torch.arange(4)[:, None] + torch.arange(16) > 6)
    packed = select(tokens, unlike > 0)
    assert len(set(packed.counts_B.tolist())) > 1
    close(family.answer(1, packed), family.answer(1, packed, exact=False))
    close(family.answer(1, packed), family.answer(1, tokens.with_keep(unlike)))


@pytest.mark.parametrize("name", PLAIN)
def test_methods_answer_the_same(name, monkeypatch):
    sparse = sparse_model(name)
    whole = copy.deepcopy(sparse)
    whole.method.config = replace(sparse.config, exact_last_block=False)
    close(sparse(X), whole(X))
    why = sparse.method.whole_last_block(sparse.family)
    expected = {"stvit", "stvit learned pooling"}  # no class token
    assert (why is not None and "keep_prefix" in why) == (name in expected)
    assert why is not None or not ran_whole(sparse, monkeypatch)
    assert whole.method.whole_last_block(whole.family) is not None


def test_semantic_tokens_say_what_hinders():
    for options, why in (
        ({"keep_prefix": False}, "keep_prefix"),
        ({"layer_scale": 0.5}, "layer_scale"),
        ({"base_layers": 2}, "up to the last block"),
        ({"exact_last_block": False}, "exact_last_block is false"),
    ):
        sparse = sparsify(tiny_vit(), replace(STARTING, **options))
        assert why in sparse.method.whole_last_block(sparse.family)
        assert sparse(X).isfinite().all()
        assert sparse.macs() == counted(sparse, X[:1])


def test_sait_set_to_be_dense_is_timm_bit_for_bit():
    model = tiny_vit()
    sparse = sparsify(model, SaiTConfig(selector="dense"))
    assert torch.equal(sparse(X), model(X))
    assert sparse.macs() == sparse.dense_macs()
    assert "bit for bit" in sparse.method.whole_last_block(sparse.family)
    sparse.set_density(1.0)
    close(sparse(X), model(X))
    assert sparse.macs() == dense(model).macs() == counted(sparse, X[:1])


# Who looks on sees the whole block.


@pytest.mark.parametrize("name", ["blocks.3", "blocks.3.attn", "blocks.3.norm1", "norm"])
def test_hooks_see_all_tokens(name):
    sparse = dense(tiny_vit())
    expected, saved = sparse(X), sparse.macs()
    seen = []
    handle = sparse.backbone.get_submodule(name).register_forward_hook(
        lambda _module, _inputs, out: seen.append(out.shape)
    )
    close(sparse(X), expected)
    assert seen == [(3, 17, 32)]
    assert "hooked" in sparse.method.whole_last_block(sparse.family)
    assert sparse.macs() == sparse.dense_macs()
    handle.remove()
    assert sparse.macs() == saved
    assert torch.equal(sparse(X), expected)


def test_hooks_of_other_blocks_change_nothing(monkeypatch):
    sparse = dense(tiny_vit())
    sparse.backbone.blocks[2].register_forward_hook(lambda *_: None)
    assert not ran_whole(sparse, monkeypatch)


def test_a_map_that_is_asked_for_is_made():
    model = tiny_vit()
    sparse = dense(model)
    model.blocks[-1].attn.fused_attn = False
    maps = []
    model.blocks[-1].attn.attn_drop.register_forward_hook(lambda _m, _i, out: maps.append(out))
    close(sparse(X), model(X))
    assert [found.shape for found in maps] == [(3, 2, 17, 17)] * 2
    assert "fused_attn" in sparse.method.whole_last_block(sparse.family)


def test_features_are_of_all_tokens():
    model = tiny_vit()
    assert torch.equal(dense(model).forward_features(X), model.forward_features(X))
    sparse = sparse_model("dynamicvit")
    assert sparse.forward_features(X).shape == (3, 1 + 5, 32)
    close(sparse.forward_head(sparse.forward_features(X)), sparse(X))


def test_other_projections_run_whole():
    adapted, quantised = tiny_vit(), tiny_vit()
    adapted.blocks[-1].attn.qkv = Adapter(adapted.blocks[-1].attn.qkv)
    layer = quantised.blocks[-1].attn.qkv
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own quantisation
        quantised.blocks[-1].attn.qkv = dynamic.Linear.from_float(layer)
    for model in (adapted, quantised):
        sparse = dense(model)
        assert torch.equal(sparse(X), model(X))
        assert "qkv" in sparse.method.whole_last_block(sparse.family)
        assert sparse.macs() == sparse.dense_macs()


def test_other_adapted_layers_do_not_hinder(monkeypatch):
    model = tiny_vit()
    block = model.blocks[-1]
    block.attn.proj, block.mlp.fc1 = Adapter(block.attn.proj), Adapter(block.mlp.fc1)
    close(dense(model)(X), model(X))
    assert not ran_whole(dense(model), monkeypatch)


# Training.


@pytest.mark.parametrize("name", ["dense", "dynamicvit", "spvit", "asvit", "stvit with prefix"])
def test_training_runs_whole(name, monkeypatch):
    gradients, config = [], CASES[name]
    if name == "asvit":  # whose budget counts what is executed at inference
        config = replace(config, counting="authors")
    for exact in (True, False):
        config = replace(config, exact_last_block=exact)
        sparse = sparsify(tiny_vit(), config, generator=seeded(3)).train()
        with torch.enable_grad():
            sparse.losses(X, torch.tensor([1, 2, 3]), generator=seeded(0))["total"].backward()
        gradients.append([p.grad for p in sparse.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert name == "stvit with prefix" or ran_whole(sparse, monkeypatch)


@torch.enable_grad()
def test_gradients_in_evaluation_are_those_of_timm():
    model, x = tiny_vit(), X.clone().requires_grad_()
    expected = torch.autograd.grad(model(x)[:, 1].sum(), [x, *model.parameters()])
    found = torch.autograd.grad(dense(model)(x)[:, 1].sum(), [x, *model.parameters()])
    for one, other in zip(found, expected, strict=True):
        close(one, other)


# Graphs, tables, files and commands; exports of every format are in test_export.py.


@pytest.mark.parametrize("variant", ["vit", "deit-distilled", "qk-norm", "registers-class"])
def test_one_graph(variant):
    sparse = dense(backbone(variant))
    torch._dynamo.reset()
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    close(compiled(X), sparse(X))
    program = torch.export.export(sparse, (X,))
    close(program.module()(X), sparse(X))


def test_half_precision_is_as_near_as_timm():
    """Against double precision neither order of additions is the better one."""
    model = tiny_vit(embed_dim=64, num_heads=4)
    x = images(16)
    expected = copy.deepcopy(model).double()(x.double())
    model = model.bfloat16()
    errors = [(run(x.bfloat16()).double() - expected).norm() for run in (dense(model), model)]
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("batch", [1, 3])
def test_tables_have_a_curve_of_it(batch):
    model = tiny_vit()
    found = profile(model, configs=[DenseConfig()], batch=batch, points=3, rounds=1, min_seconds=0)
    assert ("last-packed" in found.curves) == (batch > 1)
    assert not any(part.startswith("select") for part in found.curves)
    sparse, family = dense(model), family_of(model)
    assert 0 < predict(found, sparse.method, family, (4, 4)) < 1e3
    pooled = profile(
        backbone("average-pool"), configs=[], batch=batch, points=3, rounds=1, min_seconds=0
    )
    assert "last" not in pooled.curves


def test_it_is_predicted_by_its_curve():
    model = tiny_vit()
    table, family = table_of(model), family_of(model)
    parts = ["stem", *["block"] * 3, "last"]
    expected = sum(table.milliseconds(part, 17) for part in parts) + table.milliseconds("head", 1)
    assert predict(table, dense(model).method, family, (4, 4)) == pytest.approx(expected)
    whole = predict(table, dense(model, exact=False).method, family, (4, 4))
    assert whole == predict(table, None, family, (4, 4)) > expected


def test_a_table_without_it_asks_for_another():
    model = tiny_vit()
    table = table_of(model)
    old = LatencyTable(table.stamp, {n: c for n, c in table.curves.items() if "last" not in n})
    sparse = dense(model)
    with pytest.raises(ConfigError, match=r"no curve of 'last'.*Profile the model again"):
        predict(old, sparse.method, sparse.family, (4, 4))
    assert predict(old, None, sparse.family, (4, 4)) > 0


def test_a_checkpoint_from_before_runs_whole(tmp_path):
    """Its budgets and costs were those of the whole block."""
    sparse = sparsify(tiny_vit(), DynamicViTConfig(exact_last_block=False))
    sparse.save_pretrained(tmp_path)

    def forget(config):
        for name in ("exact_last_block", "merge_dropped"):
            config["method"]["config"].pop(name)

    forge(tmp_path, forget)
    loaded = from_pretrained(tmp_path)
    assert loaded.config == sparse.config
    assert torch.equal(loaded(X), sparse(X))
    assert from_pretrained(tmp_path, exact_last_block=True).macs() < loaded.macs()


def test_what_drops_nothing_takes_no_budget():
    sparse = dense(tiny_vit())
    assert sparse.trace(X).stages == []
    assert sparse.trace(X[:0]).macs.shape == (0,)
    for turn in (
        lambda: calibrate(sparse, [X], 0.6),
        lambda: sparse.set_budget(0.6),
        lambda: sparse.set_keep_ratio(0.5),
        lambda: sparse.set_density(0.5),
    ):
        with pytest.raises(ConfigError, match="the cost of dense is fixed"):
            turn()


def test_what_is_sparse_already_is_refused_with_advice():
    sparse = dense(tiny_vit())
    with pytest.raises(UnsupportedBackboneError, match=r"sparse already, by dense.*unwrap\(\)"):
        sparsify(sparse, DenseConfig())
    assert sparsify(sparse.unwrap(), DenseConfig()).backbone is sparse.backbone


def test_pyramids_are_refused_with_a_reason():
    for make in (tiny_convnext, tiny_pit, tiny_swin):
        with pytest.raises(UnsupportedBackboneError, match="small part of it"):
            dense(make())


@pytest.mark.parametrize("exact", [True, False])
def test_saved_it_says_which_it_is(exact, tmp_path):
    sparse = dense(tiny_vit(), exact)
    sparse.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())["method"]
    assert described["name"] == "dense"
    assert described["config"]["exact_last_block"] is exact
    assert torch.equal(from_pretrained(tmp_path)(X), sparse(X))


def test_it_is_trained_as_it_is(tmp_path):
    recipe = tiny_recipe(
        write_images(tmp_path / "data"), method__keep_ratio=None, method__name="dense"
    )
    with torch.enable_grad():
        result = train(recipe, tmp_path / "run", on_progress=quiet)
    sparse = from_pretrained(result.folder / "checkpoint")
    assert sparse.config == DenseConfig()
    assert sparse.macs() < sparse.dense_macs()
