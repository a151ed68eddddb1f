"""SaiT's behaviour: scores, selectors, the schedule, losses, the density at run time."""

from __future__ import annotations

import dataclasses
import json

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import images, seeded, tiny_vit
from tests.training import curve, quiet, run_script, tiny_recipe, write_images
from vitrim import ConfigError, SaiTConfig, from_pretrained, sparsify
from vitrim.config import to_plain
from vitrim.costs.macs import counting
from vitrim.families import family_of
from vitrim.layers.token_scores import SCORES
from vitrim.methods.records import DenseOutput
from vitrim.methods.sait import SaiT
from vitrim.train.engine import train
from vitrim.train.recipe import load_recipe, recipe_from_plain

X = images(3)
TARGET = torch.tensor([1, 2, 3])
SELECTORS = {"density": 0.5, "threshold": 1.0, "mass": 0.6}


def sharp_vit(**kwargs):
    """Blocks whose attention prefers some tokens to others, and matters to the result."""
    model = tiny_vit(**kwargs)
    with torch.no_grad():
        for name, parameter in model.blocks.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(6 if "qkv" in name else 3)
    return model


def sparse_vit(backbone=None, **options):
    options = {"prune_after": 2, "min_kept": 2} | options
    model = backbone if backbone is not None else sharp_vit()
    return sparsify(model, SaiTConfig(**options)).eval()


def teach(sparse, x=X):
    """The dense teacher is the same model, moved a little."""
    teacher = sharp_vit()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.2)
    return sparse.method.teach(family_of(teacher), x)


@pytest.fixture(scope="module")
def deit_s():
    return timm.create_model("deit_small_patch16_224").eval()


@pytest.mark.parametrize(
    ("prune_after", "kept", "gmacs"), [(3, 98, 2.84), (3, 85, 2.62), (4, 69, 2.59), (4, 78, 2.73)]
)
def test_costs_of_deit_s(deit_s, prune_after, kept, gmacs):
    density = kept / 196
    options = {"prune_after": prune_after, "where": "end", "exact_last_block": False}
    sparse = sparse_vit(deit_s, selector="density", density=density, **options)
    assert sparse.method.counts(sparse.family, (14, 14)) == (kept,)
    assert sparse.macs() / 1e9 == pytest.approx(gmacs, rel=1e-2)


def test_the_default_place_is_a_third_of_the_depth():
    places = {
        depth: sparsify(sharp_vit(depth=depth), SaiTConfig()).method.stages[0]
        for depth in (2, 4, 12, 16)
    }
    assert places == {2: 1, 4: 1, 12: 4, 16: 5}


@pytest.mark.parametrize("where", ["end", "mid"])
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("score", SCORES)
def test_costs_are_what_torch_counts(where, selector, score):
    sparse = sparse_vit(where=where, selector=selector, score=score)
    for image in X:
        with torch.no_grad(), counting() as counter:
            sparse(image[None])
        macs = sparse.trace(image[None]).macs.item()
        assert macs == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)


def test_no_parameters_are_added():
    model = sharp_vit()
    sparse = sparse_vit(model)
    assert list(sparse.method.state_dict()) == []
    assert {name.removeprefix("backbone.") for name in sparse.state_dict()} == set(
        model.state_dict()
    )


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_dense_mode_is_the_timm_model_bit_for_bit(pool):
    model = sharp_vit(global_pool=pool, class_token=pool == "token", drop_path_rate=0.3)
    dense = model(X)
    sparse = sparse_vit(model)
    assert not torch.equal(sparse(X), dense)
    sparse.set_density(None)
    assert torch.equal(sparse(X), dense)
    assert torch.equal(sparse.trace(X).logits, dense)
    assert sparse.macs() == sparse.dense_macs()
    sparse.set_density(1.0)  # that has the exact last block
    torch.testing.assert_close(sparse(X), dense, atol=1e-5, rtol=0)
    sparse.method.set_selector("mass", 0.6)
    with sparse.method.dense():
        assert torch.equal(sparse(X), dense)
    assert sparse.config.selector == "mass"
    assert not torch.equal(sparse(X), dense)


@pytest.mark.parametrize("where", ["end", "mid"])
@pytest.mark.parametrize(
    ("selector", "value"), [("density", 1.0), ("threshold", 0.0), ("mass", 1.0)]
)
def test_keeping_everything_is_the_dense_model(where, selector, value):
    model = sharp_vit()
    sparse = sparse_vit(model, where=where, selector=selector, **{selector: value})
    torch.testing.assert_close(sparse(X), model(X), atol=1e-5, rtol=0)
    assert sparse.trace(X).stages[0].counts.tolist() == [16, 16, 16]
    half = sparse.losses(X, TARGET)
    dense = torch.nn.functional.cross_entropy(model(X), TARGET)
    sparse.method.config = dataclasses.replace(sparse.config, train_density=1.0)
    torch.testing.assert_close(sparse.losses(X, TARGET)["classification"], dense)
    assert not torch.isclose(half["classification"], dense)


def test_dropping_is_dropping():
    """A pruned token cannot be seen by what comes after; what is kept goes on unchanged."""
    model = sharp_vit()
    for where in ("end", "mid"):
        sparse = sparse_vit(model, where=where, selector="density", density=0.25)
        family, method = sparse.family, sparse.method
        for image in X:
            x = image[None]
            kept = sparse.trace(x).stages[0].kept
            tokens = family.run_blocks([0], family.stem(x))
            tokens, score = family.attention_half(1, tokens, SCORES[sparse.config.score].read)
            assert torch.equal(score.topk(4).indices.sort().values, kept[0][None])
            if where == "end":
                tokens = family.mlp_half(1, tokens).gather(kept[0][None])
            else:
                tokens = family.mlp_half(1, tokens.gather(kept[0][None]))
            expected = family.head(family.run_blocks([2, 3], tokens))
            torch.testing.assert_close(sparse(x), expected, atol=1e-5, rtol=0)
        assert method.stages == (2,)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("class_token", [True, False])
def test_scores_are_what_they_say(score, class_token):
    """Each score by the whole attention map, written out."""
    pool = {} if class_token else {"class_token": False, "global_pool": "avg"}
    model = sharp_vit(qk_norm=True, **pool)
    sparse = sparse_vit(model, score=score)
    family, prefix = sparse.family, int(class_token)
    attention = model.blocks[1].attn
    x = model.blocks[1].norm1(family.run_blocks([0], family.stem(X)).x)
    q, k, v = attention.qkv(x).view(3, prefix + 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
    weights = attention.q_norm(q) @ attention.k_norm(k).transpose(-2, -1) / 4
    weights = weights.softmax(-1)
    received = weights.mean(2)[..., prefix:]
    paid = weights[:, :, 0, 1:] if class_token else received
    norms = v.square().sum(-1).sqrt()[..., prefix:]
    expected = {
        "mean_received": received.mean(1),
        "cls": paid.mean(1),
        "cls_value_norm": (paid * norms).mean(1),
        "head_max": received.amax(1),
    }[score]
    expected = expected / expected.sum(1, keepdim=True)
    found = sparse.trace(X).stages[0].scores
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    words = sparse.method.score_name
    assert ("no class token" in words) == (not class_token and score.startswith("cls"))
    assert ("class token" in words) == score.startswith("cls")


def test_selectors_keep_what_they_say():
    x = images(8, seed=4)
    for selector, value in SELECTORS.items():
        sparse = sparse_vit(selector=selector, min_kept=0, **{selector: value})
        stage = sparse.trace(x).stages[0]
        for score, kept in zip(stage.scores, stage.kept, strict=True):
            falling = score.sort(descending=True).values
            if selector == "density":
                count = 8
            elif selector == "threshold":
                count = int((score >= value / 16).sum())
            else:
                count = next(n for n in range(1, 17) if falling[:n].sum() >= value)
            assert torch.equal(kept, score.topk(count).indices.sort().values)
        if selector != "density":
            assert len(set(stage.counts.tolist())) > 1


def test_density_is_rounded_up():
    sparse = sparse_vit(selector="density")
    method, family = sparse.method, sparse.family
    for density, patches, count in [(0.5, 196, 98), (0.55, 100, 55), (0.501, 16, 9), (1e-3, 9, 1)]:
        method.set_density(density)
        assert method.counts(family, (1, patches)) == (count,)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(0, 2**31), st.floats(0.01, 1), st.floats(0.01, 1))
def test_mass_is_monotone_and_enough(size, seed, one, other):
    method = sparse_vit(min_kept=0).method
    score = torch.rand(4, size, generator=seeded(seed)).pow(4)
    falling = (score / score.sum(1, keepdim=True)).sort(1, descending=True).values
    counts = []
    for mass in sorted((one, other)):
        method.set_selector("mass", mass)
        keep = method._ranks_kept(falling, "mass")
        counts.append(keep.sum(1))
        assert torch.equal(keep, keep.cummin(1).values)  # the head of each row
        short = (falling * keep).sum(1) - falling.gather(1, counts[-1][:, None] - 1)[:, 0]
        assert ((falling * keep).sum(1) >= min(mass, 1) - 1e-5).all()
        assert (short < mass + 1e-5).all()
    assert (counts[0] <= counts[1]).all()


def test_mass_one_keeps_what_rounding_would_lose():
    method = sparse_vit(min_kept=0, mass=1.0).method
    falling = torch.tensor([[1.0, 1e-9, 1e-9, 0.0]])  # the first alone sums to 1 in floats
    assert method._ranks_kept(falling, "mass").all()
    method.set_selector("mass", 0.999)
    assert method._ranks_kept(falling, "mass").sum() == 1


def test_guards_on_the_count():
    for selector, strict in (("mass", 1e-3), ("threshold", 90.0)):
        counts = {}
        for least, most in ((0, None), (3, None), (0, 5), (3, 3)):
            sparse = sparse_vit(
                selector=selector, min_kept=least, max_kept=most, **{selector: strict}
            )
            counts[least, most] = sparse.trace(X).stages[0].counts.tolist()
            sparse.method.turn(sparse.method.dial().dearest)
            top = sparse.trace(X).stages[0].counts.tolist()
            assert top == [most or 16] * 3
        assert counts[3, None] == counts[3, 3] == [3] * 3
        assert counts[0, None] == [int(selector == "mass")] * 3


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_nothing_and_one_kept(pool):
    model = sharp_vit(global_pool=pool, class_token=pool == "token")
    sparse = sparse_vit(
        model, selector="threshold", threshold=90.0, min_kept=0, train_selector="threshold"
    )
    nothing = int(pool != "token")
    assert sparse.trace(X).stages[0].counts.tolist() == [nothing] * 3
    assert sparse(X).isfinite().all()
    parts = sparse.train().losses(X, TARGET, teach(sparse))
    parts["total"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in sparse.parameters())
    sparse.eval().set_density(1e-3)
    assert sparse.trace(X).stages[0].counts.tolist() == [1] * 3
    assert sparse(X).isfinite().all()


def test_ties_go_to_the_earlier_patch():
    model = sharp_vit()
    with torch.no_grad():  # no position and no difference between patches: all scores are equal
        model.pos_embed.zero_()
    sparse = sparse_vit(model, selector="density", density=0.25)
    assert [kept.tolist() for kept in sparse.trace(torch.ones_like(X)).stages[0].kept] == [
        [0, 1, 2, 3]
    ] * 3
    for selector in ("mass", "threshold"):
        sparse.method.set_selector(selector, SaiTConfig().mass if selector == "mass" else 90.0)
        for kept in sparse.trace(torch.ones_like(X)).stages[0].kept:
            assert kept.tolist() == list(range(len(kept)))


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
@pytest.mark.parametrize("selector", SELECTORS)
def test_a_batch_is_its_images_in_any_order(selector, pool):
    model = sharp_vit(global_pool=pool, class_token=pool == "token")
    for where in ("end", "mid"):
        sparse = sparse_vit(
            model, selector=selector, where=where, **{selector: SELECTORS[selector]}
        )
        x = images(6, seed=9)
        logits, order = sparse(x), torch.tensor([3, 0, 5, 1, 4, 2])
        alone = torch.cat([sparse(image[None]) for image in x])
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(sparse(x[order]), logits[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
@pytest.mark.parametrize("selector", ["threshold", "mass"])
@pytest.mark.parametrize("where", ["end", "mid"])
def test_masked_training_agrees_with_packed_inference(selector, pool, where):
    model = sharp_vit(global_pool=pool, class_token=pool == "token")
    sparse = sparse_vit(model, selector=selector, train_selector=selector, where=where)
    x = images(6, seed=9)
    output = sparse.method.train_forward(sparse.family, x)
    assert output.kept.keep_BN is not None
    assert output.kept.num_patches == output.kept.counts_B.max()
    trace = sparse.trace(x)
    torch.testing.assert_close(output.logits, trace.logits, atol=1e-5, rtol=0)
    assert torch.equal(output.kept.counts_B.long(), trace.stages[0].counts)
    torch.testing.assert_close(output.score_BN, trace.stages[0].scores)


def test_one_set_of_weights_at_any_density():
    sparse = sparse_vit()
    state = {name: value.clone() for name, value in sparse.state_dict().items()}
    costs = []
    for density in (0.2, 0.5, 0.8, None):
        sparse.set_density(density)
        costs.append(sparse.macs())
        assert sparse(X).isfinite().all()
    assert costs == sorted(costs)
    assert all(torch.equal(state[name], value) for name, value in sparse.state_dict().items())
    sparse.set_keep_ratio(0.3)
    assert (sparse.config.selector, sparse.config.density) == ("density", 0.3)
    with pytest.raises(ConfigError, match="SaiT drops tokens once; give one keep ratio"):
        sparse.set_keep_ratio((0.5, 0.3))
    for wrong in (0.0, 1.5, "0.5"):
        with pytest.raises(ConfigError, match="density is"):
            sparse.set_density(wrong)
    with pytest.raises(ConfigError, match="selector is 'masss'"):
        sparse.method.set_selector("masss")
    assert sparse.config.density == 0.3


def test_run_time_settings_are_saved(tmp_path):
    sparse = sparse_vit()
    for number, density in enumerate((0.4, None)):
        sparse.set_density(density)
        sparse.save_pretrained(tmp_path / str(number))
        loaded = from_pretrained(tmp_path / str(number))
        assert loaded.config == sparse.config
        assert torch.equal(loaded(X), sparse(X))


@pytest.mark.parametrize("selector", SELECTORS)
def test_the_dial_is_the_field_of_the_selector(selector):
    sparse = sparse_vit(selector=selector, min_kept=1)
    dial = sparse.method.dial()
    assert dial.name == selector
    for value, count in ((dial.cheapest, 1), (dial.dearest, 16)):
        sparse.method.turn(value)
        assert getattr(sparse.config, selector) == value
        assert sparse.trace(X).stages[0].counts.tolist() == [count] * 3
    sparse.set_density(None)
    with pytest.raises(ConfigError, match="set to be dense"):
        sparse.method.dial()


def test_epochs_alternate_and_the_first_is_dense():
    sparse = sparse_vit().train()
    kept = []
    for epoch in range(4):
        sparse.method.begin_epoch(epoch)
        sparse.method.begin_step(3 * epoch)
        kept.append(sparse.method.train_forward(sparse.family, X, seeded(0)).kept is None)
    assert kept == [True, False, True, False]
    dense = sparse_vit().unwrap()(X)
    sparse.method.begin_epoch(2)
    assert torch.equal(sparse.method.train_forward(sparse.family, X).logits, dense)


def test_the_other_schedules():
    steps = {"per_iteration": [1, 0, 1, 0], "sparse": [0] * 4, "sandwich": [2] * 4}
    for schedule, dense in steps.items():
        sparse, found = sparse_vit(schedule=schedule).train(), []
        for step in range(4):
            sparse.method.begin_epoch(0)
            sparse.method.begin_step(step)
            output = sparse.method.train_forward(sparse.family, X, seeded(0))
            both = output.kept is not None and output.dense_logits is not None
            found.append(2 if both else int(output.kept is None))
        assert found == dense, schedule
    sandwich = sparse_vit(schedule="sandwich", distill_weight=1.0, train_density=0.5)
    parts = sandwich.losses(X, TARGET, teach(sandwich))
    turns = []
    for dense in (True, False):
        with sandwich.method.dense():
            sandwich.method.config = dataclasses.replace(sandwich.config, schedule="per_epoch")
            sandwich.method.begin_epoch(int(not dense))
            turns.append(sandwich.losses(X, TARGET, teach(sandwich)))
    for name in ("classification", "distill", "attention"):
        torch.testing.assert_close(parts[name], (turns[0][name] + turns[1][name]) / 2)


def test_densities_are_drawn_from_the_generator():
    sparse = sparse_vit(sharp_vit(img_size=64), train_density=(0.25, 0.75))
    x = images(2, size=64)

    def count(seed):
        return sparse.method.train_forward(sparse.family, x, seeded(seed)).kept.num_patches

    counts = [count(seed) for seed in range(30)]
    assert counts == [count(seed) for seed in range(30)]
    assert 16 <= min(counts) < 24 < 40 < max(counts) <= 48
    fixed = sparse_vit(sharp_vit(img_size=64), train_density=0.3)
    assert fixed.method.train_forward(fixed.family, x).kept.num_patches == 20


def test_the_teacher_tells_its_last_class_attention():
    sparse = sparse_vit()
    model = sharp_vit()
    taught = sparse.method.teach(family_of(model), X)
    assert torch.equal(taught.logits, model(X))
    assert not taught.patch_attention.requires_grad
    family = family_of(model)
    for block, place in ((-1, 3), (0, 0), (2, 2)):
        method = sparse_vit(teacher_block=block).method
        x = model.blocks[place].norm1(family.run_blocks(range(place), family.stem(X)).x)
        q, k, _ = model.blocks[place].attn.qkv(x).view(3, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
        expected = (q @ k.transpose(-2, -1) / 4).softmax(-1)[:, :, 0, 1:].mean(1)
        found = method.teach(family, X).patch_attention
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(ConfigError, match="teacher_block is 4; the teacher has blocks 0 to 3"):
        sparse_vit(teacher_block=4).method.teach(family, X)


def test_attention_loss_is_the_divergence():
    sparse = sparse_vit()
    output = sparse.method.train_forward(sparse.family, X, seeded(0))
    taught = DenseOutput(output.logits.detach(), torch.zeros(0))

    def loss(attention_BN, **options):
        method = sparse_vit(**options).method
        teacher = dataclasses.replace(taught, patch_attention=attention_BN)
        return method.losses(output, None, teacher)["attention"]

    student = output.score_BN.detach()
    assert loss(3 * student).item() == pytest.approx(0, abs=1e-6)
    teacher = torch.rand(3, 16, generator=seeded(1)) + 0.1
    share = teacher / teacher.sum(1, keepdim=True)
    forward = (share * (share / student).log()).sum(1).mean()
    reverse = (student * (student / share).log()).sum(1).mean()
    torch.testing.assert_close(loss(teacher), forward)
    torch.testing.assert_close(loss(teacher, attention_direction="reverse"), reverse)
    flat, hot = (side.sqrt() / side.sqrt().sum(1, keepdim=True) for side in (share, student))
    expected = (flat * (flat / hot).log()).sum(1).mean()
    torch.testing.assert_close(loss(teacher, attention_temperature=2.0), expected)
    assert loss(torch.zeros(3, 16)).isfinite()
    with pytest.raises(ConfigError, match="needs a teacher's class attention"):
        sparse.method.losses(output, None, taught)
    with pytest.raises(ConfigError, match="learns from labels or from a dense teacher"):
        sparse.method.losses(output, None, None)


@pytest.mark.parametrize("epoch", [0, 1])
def test_attention_loss_reaches_the_blocks_up_to_the_pruning(epoch):
    sparse = sparse_vit().train()
    sparse.method.begin_epoch(epoch)
    sparse.losses(X, None, teach(sparse), seeded(0))["attention"].backward()
    norms = [block.attn.qkv.weight.grad for block in sparse.backbone.blocks]
    assert all(gradient is not None and gradient.norm() > 0 for gradient in norms[:2])
    assert norms[2:] == [None, None]


def test_losses_are_weighted_and_the_logit_term_is_optional():
    weights = {"classification_weight": 0.5, "attention_weight": 2.0, "distill_weight": 3.0}
    sparse = sparse_vit(train_density=0.5, **weights)
    parts = sparse.losses(X, TARGET, teach(sparse))
    expected = 0.5 * parts["classification"] + 2 * parts["attention"] + 3 * parts["distill"]
    torch.testing.assert_close(parts["total"], expected)
    plain = sparse_vit()
    assert set(plain.losses(X, TARGET, teach(plain))) == {"classification", "attention", "total"}
    assert set(plain.losses(X, TARGET)) == {"classification", "total"}


def test_a_teacher_with_a_finer_grid():
    sparse = sparse_vit()
    fine = family_of(sharp_vit(patch_size=4))
    taught = sparse.method.teach(fine, X)
    assert taught.patch_attention.shape == (3, 64)
    assert sparse.losses(X, None, taught)["attention"].isfinite()
    # A bright corner of the teacher's map is the same corner of the student's.
    corner = torch.zeros(1, 8, 8)
    corner[:, :2, 6:] = 1
    score = torch.full((1, 16), 1e-3)
    output = sparse.method.train_forward(sparse.family, X[:1])
    found = {}
    for place in range(16):
        scored = score.clone()
        scored[0, place] = 1
        changed = dataclasses.replace(output, score_BN=scored / scored.sum())
        teacher = dataclasses.replace(taught, patch_attention=corner.flatten(1))
        found[place] = sparse.method.losses(changed, None, teacher)["attention"].item()
    assert min(found, key=found.get) == 3
    odd = dataclasses.replace(taught, patch_attention=torch.rand(3, 60))
    with pytest.raises(ConfigError, match="60 patches are no grid of the shape 4 x 4"):
        sparse.losses(X, None, odd)


@pytest.mark.parametrize("schedule", ["per_iteration", "sandwich"])
def test_loss_falls_in_both_modes(schedule):
    sparse = sparse_vit(schedule=schedule).train()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=2e-3)
    generator, teacher = seeded(1), teach(sparse)
    for step in range(40):
        sparse.method.begin_step(step)
        loss = sparse.losses(X, TARGET, teacher, generator)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sparse.eval()
    for density in (None, 0.7, 0.4):
        sparse.set_density(density)
        assert sparse(X).argmax(1).tolist() == TARGET.tolist()


def test_exports_with_a_dynamic_batch():
    sparse = sparse_vit(selector="density")
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(sparse, (X,), dynamic_shapes=({0: batch},))
        x = images(5, seed=7)
        torch.testing.assert_close(program.module()(x), sparse(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_after": 0}, "prune_after is 0; expected 1 or more"),
        ({"score": "mean"}, "score is 'mean'.*known: mean_received, cls"),
        ({"selector": "topk"}, "selector is 'topk'; use one of"),
        ({"density": 0.0}, r"density is 0.0; expected a number in \(0, 1\]"),
        ({"mass": 1.1}, "mass is 1.1"),
        ({"threshold": -1.0}, "threshold is -1.0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"min_kept": -1}, "min_kept is -1"),
        ({"max_kept": 3}, "max_kept is 3; expected at least 1, and min_kept = 16"),
        ({"min_kept": 0, "max_kept": 0}, "max_kept is 0"),
        ({"train_density": (0.7, 0.3)}, "train_density is"),
        ({"train_density": (0.1, 0.2, 0.3)}, "expected one number, or two"),
        ({"train_density": 0.0}, "train_density is 0.0"),
        ({"attention_temperature": 0.0}, "attention_temperature is 0.0"),
        ({"attention_weight": -1.0}, "attention_weight is -1.0"),
        ({"version": 2}, "version is 2"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ConfigError, match=message):
        SaiTConfig(**options)


def test_a_place_outside_the_backbone():
    with pytest.raises(ConfigError, match="prune_after is 4; the backbone has 4 blocks"):
        sparse_vit(prune_after=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "train")


def sait_recipe(folder, method=None, **changes):
    plain = to_plain(tiny_recipe(folder, **{"run__epochs": 4} | changes))
    fields = {"prune_after": 2, "min_kept": 2, "train_density": 0.5}
    plain["method"] = {"name": "sait"} | fields | (method or {})
    return recipe_from_plain(plain)


@pytest.fixture
def passes(monkeypatch):
    """Filled with (epoch, step, parts that ran sparse, parts that ran dense) of each step."""
    seen: list[tuple[int, int, int, int]] = []
    place = {}
    begin_epoch, begin_step, forward = SaiT.begin_epoch, SaiT.begin_step, SaiT.train_forward

    def spy_epoch(self, epoch):
        place["epoch"] = epoch
        begin_epoch(self, epoch)

    def spy_step(self, step):
        seen.append((place["epoch"], step, 0, 0))
        begin_step(self, step)

    def spy_forward(self, *arguments):
        output = forward(self, *arguments)
        epoch, step, sparse, dense = seen[-1]
        seen[-1] = (epoch, step, sparse + (output.kept is not None), dense + (output.kept is None))
        return output

    monkeypatch.setattr(SaiT, "begin_epoch", spy_epoch)
    monkeypatch.setattr(SaiT, "begin_step", spy_step)
    monkeypatch.setattr(SaiT, "train_forward", spy_forward)
    return seen


class Stop(Exception):
    """Ends a run in its middle."""


def test_a_run_alternates_and_goes_on_exactly(folder, tmp_path, passes):
    """Four steps an epoch; the state is saved at 3, 4, 6, ... and the run ends at 6, 7 and 11."""
    recipe = sait_recipe(folder, {"train_density": (0.3, 0.7)})
    train(recipe, tmp_path / "whole", on_progress=quiet)
    assert passes == [(step // 4, step, step // 4 % 2, 1 - step // 4 % 2) for step in range(16)]
    for last in (6, 7, 11):

        def stop(record, last=last):
            if record.get("step") == last:
                raise Stop

        with pytest.raises(Stop):
            train(recipe, tmp_path / "parts", on_progress=stop)
    passes.clear()
    train(recipe, tmp_path / "parts", on_progress=quiet)
    assert passes[0][1] in (9, 10, 11)
    assert all(sparse == epoch % 2 for epoch, _, sparse, _ in passes)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


@pytest.mark.parametrize("schedule", ["per_epoch", "per_iteration"])
def test_all_parts_of_an_accumulated_step_are_of_a_kind(folder, tmp_path, passes, schedule):
    changes = {"data__batch_size": 2, "optim__accumulate": 2, "run__epochs": 2}
    train(sait_recipe(folder, {"schedule": schedule}, **changes), tmp_path, on_progress=quiet)
    turn = {"per_epoch": lambda step: step // 4, "per_iteration": lambda step: step}[schedule]
    assert passes == [
        (step // 4, step, 2 * (turn(step) % 2), 2 - 2 * (turn(step) % 2)) for step in range(8)
    ]


def test_two_processes_give_what_one_gives(folder, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = 'train(recipe, folder / "run", on_progress=lambda record: None)'
    two = sait_recipe(folder, data__batch_size=4, run__epochs=2)
    done = run_script(script, two, tmp_path / "two", *launcher)
    assert done.returncode == 0, done.stderr
    one = sait_recipe(folder, data__batch_size=8, run__epochs=2)
    train(one, tmp_path / "one", on_progress=quiet)
    lines, expected = curve(tmp_path / "two" / "run"), curve(tmp_path / "one")
    assert len(lines) == len(expected) == 4
    for line, wanted in zip(lines, expected, strict=True):
        assert line == pytest.approx(wanted, abs=1e-5)


def test_validation_measures_both_modes(folder, tmp_path):
    recipe = sait_recipe(folder, data__val=str(folder), run__epochs=2, optim__lr=3e-3)
    result = train(recipe, tmp_path, on_progress=quiet)
    measured = [line for line in curve(tmp_path) if "val_top1" in line]
    assert [line["epoch"] for line in measured] == [0, 1]
    assert all(0 <= line["val_dense_top1"] <= 100 for line in measured)
    saved = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert saved["metrics"]["val_dense_top1"] == result.metrics["val_dense_top1"]
    sparse = from_pretrained(tmp_path / "checkpoint")
    assert (sparse.config.selector, sparse.config.train_density) == ("mass", 0.5)


@pytest.mark.parametrize("size", ["t", "s", "b"])
def test_the_recipes(size):
    recipe = load_recipe(f"sait-deit-{size}")
    config, optim = recipe.method.build(), recipe.optim
    assert (config.schedule, config.train_density) == ("per_epoch", (0.3, 0.7))
    assert (config.classification_weight, config.attention_weight) == (1.0, 1.0)
    assert (config.distill_weight, config.selector) == (0.0, "mass")
    assert (optim.lr, optim.lr_batch, optim.backbone_lr_scale) == (1e-4, 1024, 1.0)
    assert (optim.min_lr, optim.warmup_epochs, optim.weight_decay) == (1e-6, 5, 0.05)
    assert recipe.run.epochs == 30  # even, so that dense and sparse epochs are as many
    assert recipe.model.teacher
    assert recipe.model.pretrained


def test_a_recipe_from_scratch_and_one_for_a_few_images():
    scratch, adapt = load_recipe("sait-deit-s-scratch"), load_recipe("sait-adapt")
    assert not scratch.model.pretrained
    assert not scratch.model.teacher
    assert scratch.run.epochs == 300
    assert not adapt.data.labels
    assert adapt.model.teacher
    assert adapt.method.build().distill_weight > 0


def test_info_names_the_score(tmp_path, capsys):
    from vitrim.cli import main

    names = {}
    for name, pool in (("class", {}), ("average", {"class_token": False, "global_pool": "avg"})):
        sparse = sparse_vit(sharp_vit(**pool), score="cls_value_norm")
        sparse.save_pretrained(tmp_path / name)
        with pytest.raises(SystemExit) as done:
            main(["info", str(tmp_path / name)])
        assert not done.value.code
        names[name] = " ".join(capsys.readouterr().out.split())
    assert "token score attention received from the class token, times" in names["class"]
    assert "token score attention received from all tokens, times" in names["average"]
    assert "no class token" in names["average"]
