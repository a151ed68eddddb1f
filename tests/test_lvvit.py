"""LV-ViT: the model, its family, its own training, and what it costs; parity is in test_golden."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_model_args
from torch import nn

from tests.conftest import images, seeded, tiny_lvvit
from vitrim import (
    ASViTConfig,
    CheckpointError,
    DynamicViTConfig,
    InputError,
    SaiTConfig,
    SPViTConfig,
    STViTConfig,
    UnsupportedBackboneError,
    from_pretrained,
    sparsify,
)
from vitrim.convert import load_dense
from vitrim.costs.macs import counting
from vitrim.families import family_of
from vitrim.layers.losses import kept_token_divergence
from vitrim.models import LVVisionTransformer
from vitrim.models.lvvit import exchange, random_box
from vitrim.tasks.classification import DenseTask, SparseTask, create_task
from vitrim.tokens.packed import PackedTokens, select
from vitrim.tokens.plain import Tokens
from vitrim.train.recipe import load_recipe

VARIANTS = {
    "like-s": {},
    "like-m": {"name": "lvvit_m", "embed_dim": 64, "depth": 5, "num_heads": 4},
    "oblong": {"img_size": (32, 48)},
    "dynamic-image-size": {"dynamic_img_size": True},
    "patches-of-16": {"patch_size": 16, "img_size": 64},
    "drop-path": {"drop_path_rate": 0.3, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1},
    "other-skip": {"skip_lam": 3.0, "mlp_ratio": 2.0, "qkv_bias": True},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def backbone(variant):
    return tiny_lvvit(**VARIANTS[variant])


def variant_images(model, batch):
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=seeded(batch))


# The model


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [("lvvit_s", 26.152, 6.551), ("lvvit_m", 55.831, 12.678)],
    ids=["S: 26.152 M, 6.551 GMACs", "M: 55.831 M, 12.678 GMACs"],
)
def test_published_sizes(name, parameters, gmacs):
    with torch.device("meta"):
        model = timm.create_model(name)
    family = family_of(model)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=6e-4)
    assert family.dense_macs((14, 14)) / 1e9 == pytest.approx(gmacs, abs=6e-4)
    assert {block.norm1.eps for block in model.blocks} == {model.norm.eps} == {1e-5}
    with pytest.raises(RuntimeError, match="No pretrained weights"), torch.device("meta"):
        timm.create_model(name, pretrained=True)


def test_the_forward_spelt_out():
    """The whole model from its weights, without any of its code."""
    model, x = tiny_lvvit(skip_lam=3.0), images(2)
    weight = model.state_dict()
    for conv, stride, padding in ((1, 2, 3), (2, 1, 1), (3, 1, 1)):
        x = F.conv2d(x, weight[f"patch_embed.conv{conv}.weight"], None, stride, padding)
        bn = [weight[f"patch_embed.bn{conv}.{key}"] for key in ("running_mean", "running_var")]
        affine = [weight[f"patch_embed.bn{conv}.{key}"] for key in ("weight", "bias")]
        x = F.batch_norm(x, *bn, *affine).relu()
    x = F.conv2d(x, weight["patch_embed.proj.weight"], weight["patch_embed.proj.bias"], 4)
    x = torch.cat([weight["cls_token"].expand(2, -1, -1), x.flatten(2).mT], 1)
    x = x + weight["pos_embed"]
    for block in range(4):
        part = {k.removeprefix(f"blocks.{block}."): v for k, v in weight.items()}
        y = F.layer_norm(x, (32,), part["norm1.weight"], part["norm1.bias"], 1e-5)
        qkv = F.linear(y, part["attn.qkv.weight"]).view(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
        y = ((qkv[0] * 16**-0.5) @ qkv[1].mT).softmax(-1) @ qkv[2]
        y = y.transpose(1, 2).reshape(2, 17, 32)
        x = x + F.linear(y, part["attn.proj.weight"], part["attn.proj.bias"]) / 3
        y = F.layer_norm(x, (32,), part["norm2.weight"], part["norm2.bias"], 1e-5)
        y = F.gelu(F.linear(y, part["mlp.fc1.weight"], part["mlp.fc1.bias"]))
        x = x + F.linear(y, part["mlp.fc2.weight"], part["mlp.fc2.bias"]) / 3
    x = F.layer_norm(x, (32,), weight["norm.weight"], weight["norm.bias"], 1e-5)
    tokens = F.linear(x[:, 1:], weight["aux_head.weight"], weight["aux_head.bias"])
    logits = F.linear(x[:, 0], weight["head.weight"], weight["head.bias"])
    expected = logits + 0.5 * tokens.max(1).values
    with torch.no_grad():
        torch.testing.assert_close(model(images(2)), expected, atol=2e-5, rtol=1e-5)


@each_variant
def test_it_is_made_again_from_its_description(variant):
    model = backbone(variant)
    again = timm.create_model(model.pretrained_cfg["architecture"], **get_model_args(model)).eval()
    again.load_state_dict(model.state_dict())
    x = variant_images(model, 2)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_another_image_size_interpolates_the_positions():
    model = tiny_lvvit()
    dynamic = tiny_lvvit(dynamic_img_size=True)
    x = images(2, size=48)
    with torch.no_grad():
        expected = dynamic(x)
        model.set_input_size((48, 48))
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="patches of 8 pixels"):
        model.set_input_size((48, 48), patch_size=4)


def test_other_classes_and_none():
    model = tiny_lvvit()
    model.reset_classifier(3)
    assert model(images(2)).shape == (2, 3)
    assert model.aux_head.weight.shape == (3, 32)
    model.reset_classifier(0)
    assert model(images(2)).shape == (2, 32)
    with pytest.raises(UnsupportedBackboneError, match="num_classes=0"):
        family_of(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "avg"}, "reads its class token"),
        ({"patch_size": 7}, "even patch_size"),
        ({"dynamic_img_pad": True}, "no dynamic_img_pad"),
    ],
)
def test_what_it_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_lvvit(**options)


# Its own training


def test_token_labelling_without_mixing():
    model, x = tiny_lvvit(mix_token=False).train(), images(3)
    target, token_target = torch.tensor([1, 2, 3]), torch.randint(10, (3, 16), generator=seeded(0))
    parts = model.losses(x, target, token_target)
    tokens = model.forward_features(x)
    class_loss = F.cross_entropy(model.class_logits(tokens), target)
    token_loss = F.cross_entropy(model.token_logits(tokens).flatten(0, 1), token_target.flatten())
    torch.testing.assert_close(parts["classification"], class_loss)
    torch.testing.assert_close(parts["token"], token_loss)
    torch.testing.assert_close(parts["total"], class_loss + 0.5 * token_loss)
    soft = F.one_hot(token_target, 10).float()
    assert torch.allclose(model.losses(x, target, soft)["total"], parts["total"])
    by_image = model.losses(x, target)["token"]
    repeated = model.losses(x, target, target[:, None].expand(3, 16))["token"]
    torch.testing.assert_close(by_image, repeated)


def test_mixing_tokens_follows_labels_and_places(monkeypatch):
    """The class token learns both labels by their shares, a patch that of the image it is of."""
    model = tiny_lvvit(num_classes=3).train()
    colours = torch.tensor([0, 1, 2])
    monkeypatch.setattr("vitrim.models.lvvit.random_box", lambda grid, generator: (1, 3, 0, 4))
    model.patch_embed, model.blocks, model.norm = Paint(model.patch_embed), Watch(), nn.Identity()
    monkeypatch.setattr(model, "_pos_embed", lambda x: torch.cat([x[:, :1], x], 1))
    model.aux_head = Colour()
    parts = model.losses(torch.zeros(3, 3, 32, 32), colours)
    (watch,) = model.blocks
    mixed = watch.seen[:, 1:, 0].view(3, 4, 4)  # rows 1 and 2, half of the patches, are exchanged
    assert mixed[0].tolist() == [[0] * 4, [2] * 4, [2] * 4, [0] * 4]
    assert (mixed[1] == 1).all()
    assert parts["token"] < 1e-4
    logits = model.class_logits(watch.seen)
    own, other = F.cross_entropy(logits, colours), F.cross_entropy(logits, colours.flip(0))
    torch.testing.assert_close(parts["classification"], (own + other) / 2)


class Paint(nn.Module):
    """A stem whose patches have the number of their image in every channel."""

    def __init__(self, stem):
        super().__init__()
        self.dynamic_feat_size = stem.dynamic_feat_size

    def forward(self, x):
        return torch.arange(len(x)).float()[:, None, None].repeat(1, 16, 32)


class Watch(nn.ModuleList):
    """The blocks: one that changes nothing and keeps what it saw."""

    def __init__(self):
        super().__init__()

    def __iter__(self):
        return iter([self])

    def forward(self, x):
        self.seen = x
        return x


class Colour(nn.Module):
    """Sure of the class that a token's first channel names."""

    def forward(self, x):
        return 30 * F.one_hot(x[..., 0].long(), 3).float()


def test_mixing_follows_its_generator_and_stops_at_evaluation():
    model, x, target = tiny_lvvit().train(), images(4), torch.tensor([0, 1, 2, 3])
    totals = [model.losses(x, target, generator=seeded(seed))["total"] for seed in (0, 0, 1)]
    assert torch.equal(totals[0], totals[1])
    assert not torch.equal(totals[0], totals[2])
    model.eval()
    totals = [model.losses(x, target, generator=seeded(seed))["total"] for seed in (0, 1)]
    assert torch.equal(*totals)


def test_boxes_lie_on_the_grid_and_are_undone():
    generator = seeded(0)
    boxes = [random_box((6, 9), generator) for _ in range(400)]
    assert all(0 <= a <= b <= 6 and 0 <= c <= d <= 9 for a, b, c, d in boxes)
    areas = [(b - a) * (d - c) / 54 for a, b, c, d in boxes]
    assert 0 in areas
    assert max(areas) > 0.5
    assert 0.15 < sum(areas) / 400 < 0.35  # uniform, cut to even sides and clipped
    x = torch.randn(4, 6, 9, 2, generator=generator)
    for box in boxes[:20]:
        assert torch.equal(exchange(exchange(x, box), box), x)


def test_dense_training_reaches_everything():
    task = DenseTask(tiny_lvvit()).train()
    parts = task(images(4), torch.tensor([0, 1, 2, 3]), seed=1)
    assert parts.keys() == {"classification", "token", "total"}
    parts["total"].backward()
    assert [name for name, p in task.named_parameters() if p.grad is None] == []
    plain = task.model.blocks[0].mlp.fc1.weight.grad.clone()
    task.zero_grad()
    task.model.set_grad_checkpointing()
    task(images(4), torch.tensor([0, 1, 2, 3]), seed=1)["total"].backward()
    torch.testing.assert_close(task.model.blocks[0].mlp.fc1.weight.grad, plain)


# The family


@pytest.mark.parametrize("batch", [1, 2, 3])
@each_variant
def test_nothing_dropped_is_the_model(variant, batch):
    model = backbone(variant)
    family, x = family_of(model), None
    assert family.name == "lvvit"
    x = variant_images(model, batch)
    with torch.no_grad():
        assert torch.equal(family.head(family.dense(x)), model(x))


@each_variant
def test_keeping_everything_masked_or_packed_is_the_model(variant):
    model = backbone(variant)
    family, x = family_of(model), variant_images(model, 3)
    with torch.no_grad():
        expected = model(x)
        tokens = family.stem(x)
        masked = tokens.with_keep(torch.ones(3, tokens.num_patches))
        for block in range(family.depth):
            masked = family.run_block(block, masked)
        torch.testing.assert_close(family.head(masked), expected, atol=2e-5, rtol=1e-5)


@each_variant
def test_mask_gather_and_packed_agree(variant):
    model = backbone(variant)
    family, x = family_of(model), variant_images(model, 3)
    with torch.no_grad():
        start = family.run_block(0, family.stem(x))
        num_patches = start.num_patches
        order = torch.stack([torch.randperm(num_patches, generator=seeded(i)) for i in range(3)])
        for counts in ((3, 3, 3), (2, 4, 1)):
            keep = torch.zeros(3, num_patches, dtype=torch.bool)
            for image, count in enumerate(counts):
                keep[image, order[image, :count]] = True
            masked, kept = start.with_keep(keep.float()), select(start, keep)
            assert isinstance(kept, Tokens if len(set(counts)) == 1 else PackedTokens)
            for block in range(1, family.depth):
                masked, kept = family.run_block(block, masked), family.run_block(block, kept)
            torch.testing.assert_close(family.head(masked), family.head(kept), atol=1e-5, rtol=0)
            torch.testing.assert_close(
                family.training_head(masked), family.training_head(kept), atol=1e-5, rtol=0
            )


def test_without_any_patch_the_class_token_speaks_alone():
    model = tiny_lvvit()
    family = family_of(model)
    with torch.no_grad():
        tokens = family.dense(images(2))
        alone = family.training_head(tokens)
        none = torch.zeros(2, 16)
        assert torch.equal(family.head(tokens.with_keep(none)), alone)
        assert torch.equal(family.head(tokens.gather(none[:, :0].long())), alone)
        one = torch.zeros(2, 16, dtype=torch.bool)
        one[1, 3] = True
        packed = select(tokens, one)
        assert isinstance(packed, PackedTokens)
        expected = torch.stack([alone[0], family.head(tokens.with_keep(one.float()))[1]])
        torch.testing.assert_close(family.head(packed), expected, atol=1e-6, rtol=0)
        assert not torch.equal(expected[1], alone[1])


def test_package_tokens_say_nothing():
    family = family_of(tiny_lvvit())
    with torch.no_grad():
        tokens = family.dense(images(2))
        package = torch.full((2, 1, 32), 9.0)
        more = tokens.with_prefix(torch.cat([tokens.prefix_BPC, package], 1))
        assert torch.equal(family.head(more), family.head(tokens))
    assert family.head_macs(18, 1) == family.head_macs(17) == 32 * 10 * 17


def test_macs_are_what_torch_counts():
    model = tiny_lvvit().requires_grad_(False)
    with counting() as counter:
        model(images(1))
    family = family_of(model)
    assert counter.get_total_flops() / 2 == family.dense_macs(family.grid())


def test_other_models_are_refused():
    class Changed(LVVisionTransformer):
        pass

    with pytest.raises(UnsupportedBackboneError, match="Changed"):
        family_of(Changed(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2))
    with pytest.raises(UnsupportedBackboneError, match="patch_drop_rate"):
        family_of(tiny_lvvit(patch_drop_rate=0.5))
    with pytest.raises(UnsupportedBackboneError, match=r"lvvit.*classifier of their own"):
        sparsify(tiny_lvvit(), STViTConfig(semantic_tokens=4))
    with pytest.raises(InputError, match="multiples of the patch size"):
        sparsify(tiny_lvvit(dynamic_img_size=True), DynamicViTConfig())(torch.randn(1, 3, 36, 32))


# The methods on it


def test_training_looks_at_the_class_token_and_at_the_patches_by_themselves():
    """The authors' losses never see the sum that inference answers with; nor does the teacher's."""
    model, x = tiny_lvvit(), images(3)
    sparse = sparsify(model, DynamicViTConfig(stages=(1, 2)), generator=seeded(1)).eval()
    family = sparse.family
    teacher = sparse.method.teach(family, x)
    tokens = family.dense(x)
    normed = model.norm(tokens.x)
    assert torch.equal(teacher.logits, model.head(normed[:, 0]))
    assert torch.equal(teacher.patch_features, model.aux_head(normed[:, 1:]))
    output = sparse.method.train_forward(family, x, seeded(0))
    parts = sparse.method.losses(output, None, teacher)
    keep = output.tokens.keep_BN > 0.5
    student = output.patch_features[keep].log_softmax(-1)
    wanted = teacher.patch_features[keep].log_softmax(-1)
    expected = (wanted.exp() * (wanted - student)).sum(-1).mean()
    torch.testing.assert_close(parts["token"], expected)
    parts["total"].backward()
    assert model.aux_head.weight.grad.abs().sum() > 0
    nothing = kept_token_divergence(output.patch_features, teacher.patch_features, 0 * keep)
    assert nothing == 0


@pytest.mark.parametrize(
    "config", [SaiTConfig(min_kept=2), ASViTConfig(thresholds=0.06, learn_thresholds=False)]
)
def test_without_a_token_loss_training_sees_the_whole_answer(config):
    """Else the patches' classifier would not follow the tokens that it reads."""
    model, x = tiny_lvvit(), images(3)
    sparse = sparsify(model, config).eval()
    teacher = sparse.method.teach(sparse.family, x)
    torch.testing.assert_close(teacher.logits, model(x))
    parts = sparse.losses(x, torch.tensor([1, 2, 3]), teacher, seeded(0))
    parts["total"].backward()
    assert model.aux_head.weight.grad.abs().sum() > 0


def test_only_the_student_uses_the_statistics_of_the_batch():
    student, teacher = tiny_lvvit(), tiny_lvvit()
    task = SparseTask(sparsify(student, DynamicViTConfig()), teacher).train()
    before = {name: value.clone() for name, value in teacher.named_buffers()}
    seen = student.patch_embed.bn1.running_mean.clone()
    task(images(4), torch.tensor([0, 1, 2, 3]))
    assert all(torch.equal(before[name], value) for name, value in teacher.named_buffers())
    assert not torch.equal(seen, student.patch_embed.bn1.running_mean)


def test_statistics_are_saved(tmp_path):
    sparse = sparsify(tiny_lvvit(), DynamicViTConfig(keep_ratio=0.6), generator=seeded(1))
    sparse.train()(images(4))
    sparse.eval().save_pretrained(tmp_path / "checkpoint")
    loaded = from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(loaded(images(2)), sparse(images(2)))


NAMES = {"S": "lvvit_s", "M": "lvvit_m"}
DROP = DynamicViTConfig
FIXED = partial(SPViTConfig, inference="top_k", package_mode="sum")
PUBLISHED = [
    ("S", DROP(keep_ratio=0.9), (4, 8, 12), 26.876, 5.876),
    ("S", DROP(keep_ratio=0.8), (4, 8, 12), 26.876, 5.206),
    ("S", DROP(keep_ratio=0.7), (4, 8, 12), 26.876, 4.650),
    ("S", DROP(keep_ratio=0.5), (4, 8, 12), 26.876, 3.790),
    ("M", DROP(keep_ratio=0.9), (5, 10, 15), 57.115, 11.207),
    ("M", DROP(keep_ratio=0.8), (5, 10, 15), 57.115, 9.783),
    ("M", DROP(keep_ratio=0.7), (5, 10, 15), 57.115, 8.593),
    ("M", DROP(keep_ratio=0.5), (5, 10, 15), 57.115, 6.741),
    ("S", FIXED(keep_ratio=0.7), (4, 8, 12), 26.173, 4.60),
    ("S", FIXED(keep_ratio=(0.617, 0.369, 0.137)), (4, 8, 12), 26.173, 4.08),
    ("M", FIXED(keep_ratio=0.7), (5, 10, 15), 55.852, 8.52),
    ("M", FIXED(keep_ratio=(0.617, 0.369, 0.137)), (5, 10, 15), 55.852, 7.38),
    ("S", ASViTConfig(), (5, 9, 13), 26.152, None),
    ("M", ASViTConfig(), (6, 11, 16), 55.831, None),
]


def published_id(size, config, _stages, parameters, gmacs):
    cost = f"{gmacs} GMACs" if gmacs else "counts of the image"
    kind = type(config).__name__.removesuffix("Config")
    ratio = getattr(config, "keep_ratio", None)
    return f"{kind} LV-ViT-{size}{f' r={ratio}' if ratio else ''}: {parameters} M, {cost}"


@pytest.mark.parametrize(
    ("size", "config", "stages", "parameters", "gmacs"),
    PUBLISHED,
    ids=[published_id(*row) for row in PUBLISHED],
)
def test_published_costs(size, config, stages, parameters, gmacs):
    with torch.device("meta"):
        sparse = sparsify(timm.create_model(NAMES[size]), config)
    assert sparse.method.stages == stages
    count = sum(p.numel() for p in sparse.parameters())
    assert count / 1e6 == pytest.approx(parameters, abs=6e-4)
    assert (gmacs is None) == (sparse.macs() is None)
    if isinstance(config, SPViTConfig):  # the table's counts are rounded, ours rounded down
        counts = [round(196 * ratio) for ratio in config.ratios(3)]
        found = sparse.method.macs(sparse.family, (14, 14), counts)
        assert found / 1e9 == pytest.approx(gmacs, abs=6e-3)
    elif gmacs is not None:
        assert sparse.macs() / 1e9 == pytest.approx(gmacs, rel=3e-4)


@pytest.mark.parametrize(
    ("budget", "gmacs"), [(0.7, 4.563), (0.6, 3.911)], ids=["0.7: 4.563 G", "0.6: 3.911 G"]
)
def test_published_budgets_of_asvit(budget, gmacs):
    with torch.device("meta"):
        sparse = sparsify(timm.create_model("lvvit_s"), ASViTConfig(counting="elementwise"))
    counts = [torch.tensor([196.0])] * 3
    _, dense = sparse.method.budget_macs(sparse.family, 196, counts)
    assert budget * dense / 1e9 == pytest.approx(gmacs, abs=6e-4)


# The authors' dense files


def test_dense_files():
    model, x = tiny_lvvit(embed_dim=64, num_heads=1), images(2)
    weights = model.state_dict()
    for content in (
        weights,
        {"model": weights},
        {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
    ):
        loaded = load_dense(content)
        assert not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))
    larger = load_dense(weights, img_size=48)
    model.set_input_size((48, 48))
    with torch.no_grad():
        assert torch.equal(larger(images(2, size=48)), model(images(2, size=48)))


def test_dense_files_that_do_not_fit():
    weights = tiny_lvvit(embed_dim=64, num_heads=1).state_dict()
    less = {key: value for key, value in weights.items() if "aux_head" not in key}
    with pytest.raises(CheckpointError, match=r"missing aux_head\.weight(?s:.)*aux_head\.bias"):
        load_dense(less)
    with pytest.raises(CheckpointError, match=r"unexpected score_predictor\.0"):
        load_dense(weights | {"score_predictor.0.x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="the file for lvvit_s does not fit"):
        load_dense(weights, "lvvit_s")
    with pytest.raises(CheckpointError, match="no plain vision transformer"):
        load_dense({"conv.weight": torch.zeros(1)})


def test_masks_and_places_survive_a_new_prefix():
    """What the largest logit is taken over does not depend on how tokens lie."""
    tokens = Tokens.of(torch.zeros(1, 4, 2), 1).with_keep(torch.tensor([[1.0, 0.0, 1.0]]))
    values = torch.tensor([[[1.0], [9.0], [2.0]]])
    assert tokens.max_per_image(values).tolist() == [[2.0]]
    assert replace(tokens, keep_BN=None).max_per_image(values).tolist() == [[9.0]]


# Recipes


@pytest.mark.parametrize("method", ["dynamicvit", "spvit", "asvit", "sait"])
def test_recipes_on_the_embedded_set_fit_their_dense_model(method):
    dense = load_recipe("digits-lvvit")
    sparse = load_recipe(f"digits-{method}-lvvit", ["data.length=4", "data.val=none"])
    assert sparse.model.name == dense.model.name
    assert sparse.model.kwargs == dense.model.kwargs
    task = create_task(sparse)
    parts = task(images(2, size=64), torch.tensor([1, 2]))
    parts["total"].backward()
    assert parts["total"].isfinite()


@pytest.mark.parametrize("size", ["s", "m"])
def test_the_published_recipes(size):
    dynamic = load_recipe(f"dynamicvit-lvvit-{size}")
    assert dynamic.method.build() == DynamicViTConfig(keep_ratio=0.7)
    assert dynamic.model.kwargs == {}
    like = load_recipe("dynamicvit-deit-s")
    assert (dynamic.optim, dynamic.data, dynamic.run) == (like.optim, like.data, like.run)
    spvit = load_recipe(f"spvit-lvvit-{size}")
    assert spvit.method.build() == SPViTConfig(keep_ratio=0.7, package_mode="sum")
    assert spvit.data.batch_size * 8 == spvit.optim.lr_batch == 512
    asvit = load_recipe(f"asvit-lvvit-{size}").method.build()
    assert asvit.stages == {"s": (5, 9, 13), "m": (6, 11, 16)}[size]
    assert (asvit.budget, asvit.counting) == (0.7, "elementwise")
