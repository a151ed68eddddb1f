"""STViT-R: published costs, both forms by loops, borders, options, pyramids, guards, files."""

from __future__ import annotations

import math
import sys
import types

import pytest
import timm
import torch

from tests.conftest import (
    golden,
    golden_weights,
    images,
    norm_operations,
    seeded,
    tiny_swin,
    tiny_vit,
)
from tests.test_stvit_swin import attention_of
from vitrim import (
    CheckpointError,
    ConfigError,
    STViTRConfig,
    UnsupportedBackboneError,
    from_pretrained,
    load_official,
    sparsify,
)
from vitrim.convert import read_file
from vitrim.costs.macs import counting
from vitrim.families import family_of
from vitrim.layers.semantic_keys import token_order
from vitrim.layers.semantic_windows import Windows
from vitrim.tokens.feature_map import FeatureMap

TARGET = torch.tensor([1, 2, 3])
EVERYTHING = {"residual": True, "global_centres": True, "position_convolution": True}


def sparse_swin(model=None, **options):
    model = tiny_swin() if model is None else model
    options = {"window_tokens": 4, "layer_scale": 0.5} | options
    return sparsify(model, STViTRConfig(**options), generator=seeded(0)).eval()


RELEASED = {"project_once": False}
COSTS = [
    ("tiny", (224, 224), RELEASED, 3.616),
    ("small", (224, 224), RELEASED, 5.824),
    ("base", (224, 224), RELEASED, 10.261),
    ("small", (224, 224), {}, 5.64),
    ("small", (800, 1280), {"form": "dense"}, 129.1),
    ("base", (800, 1280), {"form": "dense"}, 223.4),
    ("small", (800, 1280), {"form": "dense", "pad_mask": "off"} | RELEASED, 237.3),
    ("base", (800, 1280), {"form": "dense", "pad_mask": "off"} | RELEASED, 415.7),
]


@pytest.mark.parametrize(
    ("size", "pixels", "options", "gmacs"),
    COSTS,
    ids=[f"{size}-{h}x{w}-{list(o.values())}-{g}G" for size, (h, w), o, g in COSTS],
)
def test_published_costs(size, pixels, options, gmacs):
    """Those at 224 x 224 count five operations for each value that a norm reads."""
    with torch.device("meta"):
        model = timm.create_model(f"conv_stem_swin_{size}", dynamic_img_size=True)
        sparse = sparsify(model.requires_grad_(False), STViTRConfig(**options)).eval()
        norms = norm_operations(sparse)
        with torch.no_grad(), counting() as counter:
            sparse(torch.empty(1, 3, *pixels))
    assert sparse.macs(pixels) == counter.get_total_flops() / 2
    counted = sparse.macs(pixels) + (sum(norms) if pixels == (224, 224) else 0)
    assert counted / 1e9 == pytest.approx(gmacs, rel=1e-3)


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 28.320), ("small", 49.626), ("base", 87.812)]
)
def test_published_parameters(size, millions):
    with torch.device("meta"):
        model = timm.create_model(f"conv_stem_swin_{size}")
        sparse = sparsify(model, STViTRConfig())
    used = sum(p.numel() for p in sparse.parameters())
    for index, block in enumerate(model.layers[2].blocks):
        used -= block.attn.relative_position_bias_table.numel() if index % 6 else 0
    assert used / 1e6 == pytest.approx(millions, abs=5e-4)


def spans(count, window, reach, length, inside):
    """Per window of an axis: the places of the larger window about it, cut off at the border."""
    for index in range(count):
        start = index * window - (reach - window) // 2
        if inside:
            start = max(0, min(start, count * window - reach))
        yield list(range(max(0, start), min(start + reach, length)))


class Reference:
    """A unit by loops over windows that are cut off at the border; tokens of a window are square.

    Semantic tokens are kept as {(window row, window column): (B, rows, columns, C)}.
    """

    def __init__(self, model, sparse, side, window=4):
        self.blocks, self.config = model.layers[2].blocks, sparse.config
        self.method, self.side, self.window = sparse.method, side, window

    def finish(self, index, out, residual):
        block, extras = self.blocks[index], self.method.blocks[str(index)]
        x = extras.scale1 * out + (0 if residual is None else residual)
        return x + extras.scale2 * block.mlp(block.norm2(x))

    def run(self, index, query, memory, residual):
        """``query`` (B, ..., C) of one group of queries."""
        flat = query.flatten(1, -2)
        out, _ = attention_of(self.blocks[index], flat, memory.flatten(1, -2))
        return self.finish(index, out.view(query.shape), residual)

    def pooled(self, x):
        """Centres of each window, those of padding left out."""
        centres, side, window = {}, self.side, self.window
        for i, j in self.places(x):
            rows = []
            for a in range(side):
                top = i * window + a * window // side
                bottom = i * window + math.ceil((a + 1) * window / side)
                cells = []
                for b in range(side):
                    left = j * window + b * window // side
                    right = j * window + math.ceil((b + 1) * window / side)
                    if top < x.shape[1] and left < x.shape[2]:
                        cells.append(x[:, top:bottom, left:right].amax((1, 2)))
                if cells:
                    rows.append(torch.stack(cells, 1))
            centres[i, j] = torch.stack(rows, 1)
        return centres

    def places(self, x):
        self.shape = [math.ceil(length / self.window) for length in x.shape[1:3]]
        return [(i, j) for i in range(self.shape[0]) for j in range(self.shape[1])]

    def near(self, x, reach, inside):
        """Per window: what of the map lies in the larger window about it."""
        axes = [
            list(spans(count, self.window, reach, length, inside))
            for count, length in zip(self.shape, x.shape[1:3], strict=True)
        ]
        return {(i, j): x[:, ys][:, :, xs].flatten(1, 2)
                for i, ys in enumerate(axes[0]) for j, xs in enumerate(axes[1])}  # fmt: skip

    def flat(self, tokens):
        return torch.cat([part.flatten(1, 2) for part in tokens.values()], 1)

    def apart(self, flat, like):
        sizes = [part.shape[1] * part.shape[2] for part in like.values()]
        parts = zip(flat.split(sizes, 1), like.items(), strict=True)
        return {place: part.view(old.shape) for part, (place, old) in parts}

    def with_centres(self, tokens):
        if self.method.centres_SC is None:
            return tokens
        side, (rows, columns) = self.side, self.shape
        centres = self.method.centres_SC.view(rows * side, columns * side, -1)
        return {
            (i, j): part + centres[i * side :, j * side :][: part.shape[1], : part.shape[2]]
            for (i, j), part in tokens.items()
        }

    def unit(self, x, first):
        centres, dense = self.pooled(x), self.config.form == "dense"
        near = self.near(x, 8 if dense else 6, inside=not dense)
        s = {}
        for w, p in centres.items():
            memory = near[w] if dense else torch.cat([p.flatten(1, 2), near[w]], 1)
            s[w] = self.run(first + 1, p, memory, p if dense or self.config.residual else None)
        if dense:
            near = self.near(x, 12, inside=False)
            s = {w: self.run(first + 2, p, near[w], p) for w, p in s.items()}
        else:
            memory = torch.cat([self.flat(s), x.flatten(1, 2)], 1)
            query = self.flat(self.with_centres(s) if first == 0 else s)
            s = self.apart(self.run(first + 2, query, memory, query), s)
        s = {w: self.run(first + 3, p, p, p) for w, p in s.items()}
        query = self.flat(s)
        s = self.apart(self.run(first + 4, query, query, query), s)
        if not dense:
            return self.run(first + 5, x, self.flat(s), x)
        out, half = torch.empty_like(x), self.config.recovery_windows // 2
        for (i, j), _ in s.items():
            seen = [p for (a, b), p in s.items() if max(abs(i - a), abs(j - b)) <= half]
            memory = torch.cat([p.flatten(1, 2) for p in seen], 1)
            ys = slice(i * self.window, (i + 1) * self.window)
            xs = slice(j * self.window, (j + 1) * self.window)
            out[:, ys, xs] = self.run(first + 5, x[:, ys, xs], memory, x[:, ys, xs])
        return out


@pytest.mark.parametrize("size", [(32, 32), (27, 27), (36, 52)])
@pytest.mark.parametrize(
    ("options", "side"),
    [
        ({"window_tokens": 4}, 2),
        ({"window_tokens": 4, "global_centres": True}, 2),
        ({"window_tokens": 9, "residual": True}, 3),
        ({"window_tokens": 4, "form": "dense", "recovery_windows": 3}, 2),
        ({"window_tokens": 9, "form": "dense"}, 3),
    ],
    ids=str,
)
def test_both_forms_by_loops(size, options, side):
    """Maps that windows fit, and maps that they hang over by one row or by three."""
    model = tiny_swin(
        img_size=size, always_partition=True, depths=(1, 1, 12, 1) if side == 2 else (1, 1, 6, 1)
    )
    sparse = sparse_swin(model, **options)
    if sparse.method.centres_SC is not None:
        torch.nn.init.normal_(sparse.method.centres_SC, generator=seeded(1))
    family, reference = sparse.family, Reference(model, sparse, side)
    dense = sparse.config.form == "dense"
    x = torch.randn(2, 3, *size, generator=seeded(2))
    with torch.no_grad():
        fmap = family.run_stage(1, family.run_stage(0, family.stem(x), dense), dense)
        fmap = family.enter_stage(2, fmap)
        for first in sparse.method.units:
            fmap = family.run_block(2, first, fmap, dense)
            fmap = FeatureMap(reference.unit(fmap.x_BHWC, first))
        expected = family.run_stage(3, fmap, dense)
        levels = sparse.features(x)
        torch.testing.assert_close(levels[2].permute(0, 2, 3, 1), fmap.x_BHWC, atol=5e-5, rtol=0)
        torch.testing.assert_close(sparse(x), family.head(expected), atol=5e-5, rtol=0)
        with counting() as counter:
            sparse.requires_grad_(False)(x[:1])
    assert sparse.macs() == counter.get_total_flops() / 2
    assert sparse.trace(x).macs.tolist() == [sparse.macs()] * 2


@pytest.mark.parametrize(
    "options",
    [
        EVERYTHING | {"position_biases": True},
        {"form": "dense"},
        {"form": "dense", "pad_mask": "official"},
        {"form": "dense", "pad_mask": "off", "window_tokens": 9},
    ],
    ids=str,
)
def test_projecting_once_changes_no_number(options):
    model = tiny_swin(img_size=(27, 44), always_partition=True)
    x = torch.randn(2, 3, 27, 44, generator=seeded(0))
    once, often = (sparse_swin(model, project_once=flag, **options) for flag in (True, False))
    torch.testing.assert_close(once(x), often(x), atol=2e-6, rtol=0)
    assert once.macs() < often.macs()
    for sparse in (once, often):
        with torch.no_grad(), counting() as counter:
            sparse.requires_grad_(False)(x[:1])
        assert sparse.macs() == counter.get_total_flops() / 2


def test_masks_differ_at_borders_alone():
    """Where nothing hangs over and nothing is beyond reach, there is nothing to hide."""
    x = torch.randn(2, 3, 27, 27, generator=seeded(0))
    found = [
        sparse_swin(tiny_swin(img_size=27, always_partition=True), form="dense", pad_mask=mask)(x)
        for mask in ("correct", "official", "off")
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(found[one], found[other], atol=1e-5)


def test_one_window_is_everywhere():
    """On a map of one window, the forms differ only in what the definitions say they do."""
    model = tiny_swin(img_size=16)
    dense, whole = (
        sparse_swin(model, form=form, residual=True, window_tokens=1, **options)
        for form, options in (
            ("dense", {"key_window": 4, "second_key_window": 4}),
            ("classification", {}),
        )
    )
    x = images(2, size=16)
    assert [d.shape for d in dense.features(x)] == [w.shape for w in whole.features(x)]
    first, second = (sparse.trace(x).stages[0].assignment for sparse in (dense, whole))
    torch.testing.assert_close(first.sum(-1), torch.ones(2, 1))  # it looks at positions alone
    assert (second.sum(-1) < 1).all()


def test_position_biases_and_centres_belong_to_places():
    """In the order of the map, whatever the order of the windows: against a loop over pairs."""
    sparse = sparse_swin(position_biases=True, window_tokens=4)
    extras = sparse.method.blocks["4"]
    torch.nn.init.normal_(extras.bias_table, generator=seeded(0))
    windows = Windows((8, 8), (4, 4), 2)
    order = token_order(windows, torch.device("cpu"))
    bias = extras.bias(windows.tokens, order)
    assert bias.shape == (2, 16, 16)
    for query, one in enumerate(order.tolist()):
        for key, other in enumerate(order.tolist()):
            down, right = one // 4 - other // 4 + 3, one % 4 - other % 4 + 3
            assert torch.equal(bias[:, query, key], extras.bias_table[down * 7 + right])
    assert order[:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_other_image_sizes():
    flexible = tiny_swin(dynamic_img_size=True)
    for options in ({}, {"form": "dense"}, EVERYTHING, {"form": "dense", **EVERYTHING}):
        sparse = sparse_swin(flexible, **options)
        for size in ((32, 32), (45, 20), (64, 40), (9, 9)):
            x = torch.randn(2, 3, *size, generator=seeded(0))
            trace = sparse.trace(x)
            assert trace.logits.isfinite().all()
            assert trace.macs[0] == sparse.macs(size)
            assert trace.stages[0].assignment.shape[1] == trace.stages[0].counts[0]
    biased = sparse_swin(flexible, position_biases=True)
    with pytest.raises(ConfigError, match=r"made for 4 x 4 semantic tokens; .* have 4 x 6"):
        biased(torch.randn(1, 3, 32, 48))


@pytest.mark.parametrize(
    "options",
    [
        {},
        EVERYTHING | {"position_biases": True, "pooling": "intra_inter"},
        {"form": "dense", "position_biases": True},
        {"layer_scale": None},
    ],
    ids=str,
)
def test_everything_learned_gets_a_gradient(options):
    sparse = sparse_swin(**options).train()
    sparse.losses(images(3), TARGET)["total"].backward()
    for name, parameter in sparse.method.named_parameters():
        assert parameter.grad is not None, name
        # A softmax does not feel what is added to all its logits.
        assert parameter.grad.abs().sum() > 0 or name == "pooling.weigh.bias", name
    unused = {name for name, p in sparse.backbone.named_parameters() if p.grad is None}
    tables = [f"layers.2.blocks.{i}.attn.relative_position_bias_table" for i in range(1, 6)]
    assert unused == set(tables)


def test_layer_scales_start_as_released_and_may_be_left_out():
    x = images(2)
    released = sparsify(tiny_swin(), STViTRConfig(window_tokens=4)).eval()
    scales = [p for name, p in released.method.named_parameters() if ".scale" in name]
    assert len(scales) == 10
    assert all((p == 1e-5).all() for p in scales)
    ones, none = sparse_swin(layer_scale=1.0), sparse_swin(layer_scale=None)
    assert list(none.method.parameters()) == []
    torch.testing.assert_close(ones(x), none(x), atol=1e-6, rtol=0)


def test_the_pyramid(tmp_path):
    config = STViTRConfig.dense_prediction(window_tokens=4, layer_scale=0.5)
    assert (config.form, config.level_norms, config.pad_mask) == ("dense", True, "correct")
    sparse = sparsify(tiny_swin(dynamic_img_size=True), config).eval()
    plain = sparse_swin(sparse.backbone, form="dense")
    x = torch.randn(2, 3, 45, 30, generator=seeded(0))
    levels, bare = sparse.features(x), plain.features(x)
    assert [tuple(level.shape[1:]) for level in levels] == [
        (8, 45, 30), (16, 23, 15), (32, 12, 8), (64, 6, 4),
    ]  # fmt: skip
    for norm, level, other in zip(sparse.method.level_norms, levels, bare, strict=True):
        torch.testing.assert_close(level.permute(0, 2, 3, 1), norm(other.permute(0, 2, 3, 1)))
    sum(level.square().mean() for level in sparse.train().features(x)).backward()
    assert all(p.grad is not None for p in sparse.method.parameters())
    sparse.eval().save_pretrained(tmp_path)
    for level, again in zip(levels, from_pretrained(tmp_path).features(x), strict=True):
        assert torch.equal(level, again)


def test_a_backbone_with_the_authors_stem(tmp_path):
    sizes = {"img_size": 64, "window_size": 2, "embed_dim": 8, "num_heads": (1, 1, 2, 2)}
    sizes |= {"depths": (1, 1, 6, 1), "num_classes": 10, "dynamic_img_size": True}
    model = timm.create_model("conv_stem_swin_tiny", **sizes).eval()
    sparse = sparse_swin(model)
    x = torch.randn(2, 3, 61, 45, generator=seeded(0))
    logits = sparse(x)
    assert sparse.trace(x).macs.tolist() == [sparse.macs((61, 45))] * 2
    sparse.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(x), logits)
    assert sparse.unwrap() is model
    with pytest.raises(ValueError, match="patch_size is 8"):
        timm.create_model("conv_stem_swin_tiny", patch_size=8)


def test_losses_are_weighted():
    options = {"classification_weight": 2.0, "distill_weight": 3.0, "feature_weight": 5.0}
    sparse, x = sparse_swin(**options).train(), images(3)
    teacher = sparse.method.teach(family_of(tiny_swin()), x)
    parts = sparse.losses(x, TARGET, teacher)
    total = 2 * parts["classification"] + 3 * parts["distill"] + 5 * parts["feature"]
    torch.testing.assert_close(parts["total"], total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_tokens": 8}, "window_tokens is 8; expected a square number"),
        ({"window_tokens": 25}, "window_tokens is 25; the windows of this backbone have 4 x 4"),
        ({"key_window": 0}, "key_window is 0"),
        ({"recovery_windows": 4}, "recovery_windows is 4; expected an odd number"),
        ({"pad_mask": "off"}, 'belong to form="dense"'),
        ({"second_key_window": 9}, 'belong to form="dense"'),
        ({"form": "dense", "key_window": 3}, "expected at least a window's 4 positions"),
        ({"form": "sparse"}, "form is 'sparse'; use one of"),
        ({"layer_scale": 0.0}, "layer_scale is 0.0"),
        ({"distill_weight": -1.0}, "distill_weight is -1.0"),
        ({"version": 2}, "version is 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        sparse_swin(**options)


def test_backbones_that_do_not_fit_are_refused():
    with pytest.raises(UnsupportedBackboneError, match="use stvit"):
        sparsify(tiny_vit(), STViTRConfig())
    with pytest.raises(ConfigError, match="expected a multiple of 6 in the third stage"):
        sparse_swin(tiny_swin(depths=(1, 1, 5, 1)))
    with pytest.raises(ConfigError, match="the cost of stvit_r is fixed"):
        sparse_swin().method.dial()


class CfgNode(dict):
    """What the authors' files hold of their settings."""


def test_the_authors_files_are_read_without_their_settings(tmp_path, monkeypatch):
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    monkeypatch.setattr(CfgNode, "__module__", "yacs.config")
    settings = CfgNode(TRAIN=CfgNode(EPOCHS=300))
    settings.__dict__["__immutable__"] = True
    weights = {"a": torch.ones(2)}
    content = {"model": weights, "optimizer": {}, "epoch": 1, "config": settings, "amp": {}}
    torch.save(content, tmp_path / "theirs.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.delitem(sys.modules, "yacs")
    assert torch.equal(read_file(tmp_path / "theirs.pth")["model"]["a"], weights["a"])


def test_files_of_other_systems_are_refused():
    weights = golden_weights(golden("stvit-r_swin-t_eval"))
    changes = {
        "layers.2.blocks.1.attn.q.weight": "no layers.2.blocks.1.attn.q.weight key",
        "layers.2.blocks.7.attn.kv.bias": None,
        "layers.2.blocks.2.attn.kv.weight": "no layers.2.blocks.2.attn.kv.weight",
        "patch_embed.proj.2.c.weight": "missing patch_embed.proj.2.c.weight",
        "norm.weight": "missing backbone.norm.weight",
    }
    for key, message in changes.items():
        if message is not None:
            with pytest.raises(CheckpointError, match=message):
                load_official({k: w for k, w in weights.items() if k != key}, "stvit-r")
