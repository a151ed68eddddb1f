"""A method from outside: one class, no other module touched, and everything takes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
from torch import Tensor

import vitrim
from tests import test_methods as contract
from tests.conftest import images, tiny_lvvit, tiny_vit
from tests.training import quiet, tiny_recipe, write_images
from vitrim import costs
from vitrim.budgets.effects import measure_effects
from vitrim.budgets.schedule import load
from vitrim.budgets.solve import Costs, find_schedule
from vitrim.capabilities import capabilities
from vitrim.config import normalise
from vitrim.export.bundle import check, export
from vitrim.families import family_of
from vitrim.latency.measure import profile
from vitrim.latency.table import predict
from vitrim.layers import losses
from vitrim.layers.sampling import top_k
from vitrim.layers.stages import check_keep_ratio, quarter_stages, stage_ratios, stretches
from vitrim.methods import METHODS, register
from vitrim.methods.base import Method, RatioMethod
from vitrim.methods.records import TrainingOutput
from vitrim.train.engine import train
from vitrim.train.recipe import BudgetRecipe, MethodRecipe, load_recipe

X = images(3)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomDropConfig:
    keep_ratio: float | tuple[float, ...] = 0.7
    stages: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        normalise(self)
        check_keep_ratio(self.keep_ratio)

    def ratios(self, num_stages: int) -> tuple[float, ...]:
        return stage_ratios(self.keep_ratio, num_stages)


class RandomDrop(RatioMethod):
    """Drops patch tokens by a number that only their place decides."""

    name = "random_drop"
    config_class = RandomDropConfig
    families = ("vit", "lvvit")

    def __init__(self, family, config, generator=None):
        super().__init__()
        self.config = config
        self.stages = config.stages or quarter_stages(family.depth)

    def infer(self, family, images: Tensor, recorder=None) -> Tensor:
        stem = family.stem(images)
        counts = self._fixed_counts(stem.num_patches)
        before, *others = stretches(self.stages, family.depth)
        tokens = family.run_blocks(before, stem)
        for stage, blocks in enumerate(others):
            score_BN = (tokens.index_BN * 12.9898 + stage).sin() * 43758.5453 % 1
            kept = tokens.gather(top_k(score_BN, counts[stage]))
            if recorder:
                recorder.add(self.stages[stage], tokens, score_BN, kept)
            tokens = family.run_blocks(blocks, kept)
        return family.head(tokens)

    def train_forward(self, family, images: Tensor, generator=None) -> TrainingOutput:
        return TrainingOutput(self.infer(family, images))

    def losses(self, output, target, teacher) -> dict[str, Tensor]:
        parts = {}
        if target is not None:
            parts["classification"] = losses.classification_loss(output.logits, target)
        if teacher is not None:
            parts["distill"] = losses.distillation_loss(output.logits, teacher.logits)
        return parts | {"total": sum(parts.values())}

    def steps(self, family, grid, counts) -> list[costs.Step]:
        patches, steps = math.prod(grid), [costs.stem(family, math.prod(grid))]
        for block in range(family.depth):
            if block in self.stages:
                steps.append(costs.select(self.name, block, patches + family.num_prefix, 0))
                patches = counts[self.stages.index(block)]
            steps.append(costs.block(family, block, patches + family.num_prefix))
        return [*steps, costs.head(family, patches + family.num_prefix)]


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    register(RandomDrop)
    config = RandomDropConfig(stages=(1, 2), keep_ratio=0.6)
    monkeypatch.setitem(contract.CASES, "random_drop", config)
    kept = RandomDropConfig(stages=(1, 2), keep_ratio=1.0)
    monkeypatch.setitem(contract.KEEPS_ALL, "random_drop", kept)
    yield
    METHODS.pop("random_drop")


PROMISES = [
    contract.test_logits_are_finite_deterministic_and_of_their_shape,
    contract.test_images_do_not_see_each_other,
    contract.test_keeping_everything_is_the_dense_model,
    contract.test_macs_are_what_torch_counts,
    contract.test_gradients_reach_what_the_method_learns,
    contract.test_the_loss_falls,
    contract.test_training_follows_its_generator,
    contract.test_other_image_sizes,
    contract.test_half_precision,
    contract.test_dial_moves_the_cost,
    contract.test_compiles,
    contract.test_exports,
]
PLAIN = ["class token", "average pool", "lv-vit"]


@pytest.mark.parametrize("backbone", PLAIN)
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__[5:])
def test_it_keeps_the_contract(promise, backbone):
    promise("random_drop", backbone)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    contract.test_saved_and_loaded_it_is_the_same("random_drop", "class token", tmp_path)


class Unfinished(Method):
    name = "unfinished"
    config_class = RandomDropConfig


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (type("Mine", (RandomDrop,), {"name": "mine"}), "lacks config_class"),
        (type("Mine", (RandomDrop,), {"config_class": dict}), "lacks name"),
        (
            type("Mine", (RandomDrop,), {"name": "mine", "config_class": RandomDropConfig}),
            "already",
        ),
        (type("Mine", (RandomDrop,), {"name": "sait", "config_class": dict}), "is SaiT already"),
        (type("M", (RandomDrop,), {"name": "m", "config_class": dict, "families": ("x",)}), "x"),
        (Unfinished, "lacks counts, infer, losses"),
    ],
    ids=["config", "name", "taken config", "taken name", "family", "abstract"],
)
def test_what_is_not_whole_or_taken_is_refused(method, words):
    before = dict(METHODS)
    with pytest.raises(vitrim.ConfigError, match=words):
        register(method)
    assert before == METHODS
    register(RandomDrop)  # again, as when its module is loaded anew


def test_it_is_listed_with_where_it_runs():
    row = capabilities()["random_drop"]
    assert [family for family, reason in row.items() if reason is None] == ["vit", "lvvit"]
    assert row["swin"]


@pytest.mark.parametrize("make", [tiny_vit, tiny_lvvit])
def test_it_is_calibrated(make):
    sparse = vitrim.sparsify(make(), RandomDropConfig(stages=(1, 3)))
    found = vitrim.calibrate(sparse, None, macs=0.8, tolerance=0.05)
    assert found.fraction == pytest.approx(sparse.macs() / sparse.dense_macs())
    assert abs(found.fraction / 0.8 - 1) < 0.05


def profiled():
    return profile(tiny_vit(num_classes=2), points=4, rounds=1, min_seconds=0.0)


def test_it_is_profiled_among_the_others():
    table = profiled()
    assert "select-random_drop" in table.curves
    sparse = vitrim.sparsify(tiny_vit(num_classes=2), RandomDropConfig())
    family, grid = sparse.family, sparse.family.grid()
    predicted = predict(table, sparse.method, family, grid, sparse.method.counts(family, grid))
    assert predicted > 0


def test_a_schedule_is_solved_for_it(tmp_path):
    family = family_of(tiny_vit())
    effects = measure_effects(family, [images(8)])
    costs_of = Costs(family, family.grid(), RandomDropConfig())
    find_schedule(costs_of, effects, 0.8).save(tmp_path / "schedule.json")
    schedule = load(tmp_path / "schedule.json")
    assert schedule.method == "random_drop"
    assert costs_of.of(schedule) <= 0.8
    changes = [
        "method.name=random_drop",
        f"method.schedule={tmp_path / 'schedule.json'}",
        "data.train=photos",
    ]
    (tmp_path / "own.toml").write_text(
        'name = "own"\nmodel = { name = "vit_tiny_patch16_224" }\n[data]\n[run]\nepochs = 1\n'
    )
    config = load_recipe(tmp_path / "own.toml", changes).method.build()
    sparse = vitrim.sparsify(tiny_vit(), config)
    assert sparse.method.counts(sparse.family, sparse.family.grid()) == schedule.counts


def test_it_is_trained_to_a_latency(tmp_path):
    folder = write_images(tmp_path / "data")
    table = profiled()
    curves = {  # as if times were exact: a block takes as long as it has tokens
        part: replace(curve, median=curve.tokens, low=curve.tokens, high=curve.tokens)
        if part == "block"
        else replace(curve, **dict.fromkeys(("median", "low", "high"), (0.1,) * len(curve.tokens)))
        for part, curve in table.curves.items()
    }
    replace(table, curves=curves).save(tmp_path / "table.json")
    dense = predict(replace(table, curves=curves), None, family_of(tiny_vit()), (4, 4))
    recipe = replace(
        tiny_recipe(folder, data__val=str(folder), run__epochs=1),
        method=MethodRecipe(name="random_drop"),
        budget=BudgetRecipe(milliseconds=0.8 * dense, table=str(tmp_path / "table.json")),
    )
    found = train(recipe, tmp_path / "run", on_progress=quiet).metrics["latency"]
    assert found["is_met"]
    sparse = vitrim.from_pretrained(tmp_path / "run" / "checkpoint")
    assert type(sparse.config) is RandomDropConfig
    assert sparse.config.keep_ratio != RandomDropConfig().keep_ratio  # chosen at the start


def test_it_is_exported(tmp_path):
    pytest.importorskip("onnx")
    data = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.2,) * 3, "crop_pct": 0.9}
    sparse = vitrim.sparsify(tiny_vit(), RandomDropConfig()).eval()
    folder = export(sparse, tmp_path / "bundle", "onnx", data_config=data)
    found = check(sparse, folder, images(5))
    assert found.difference < 1e-4
    assert found.agreement == 1
