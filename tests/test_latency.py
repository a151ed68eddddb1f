"""Latency tables: the data, what is measured, and what is predicted; no time decides a test."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from tests.conftest import images, tiny_convnext, tiny_lvvit, tiny_pit, tiny_swin, tiny_vit
from tests.tables import pyramid_table_of
from vitrim import (
    ASViTConfig,
    DenseConfig,
    DynamicSpatialConfig,
    DynamicViTConfig,
    MergingConfig,
    SPViTConfig,
    SPViTPyramidConfig,
    STViTConfig,
    STViTRConfig,
    STViTSwinConfig,
    costs,
    sparsify,
)
from vitrim.cli.app import app
from vitrim.config import MOST_BYTES
from vitrim.errors import ConfigError, InputError
from vitrim.families import family_of
from vitrim.latency import parts, probes, runners
from vitrim.latency.levels import Level, as_methods_run_them
from vitrim.latency.measure import profile
from vitrim.latency.plot import draw_table
from vitrim.latency.table import Curve, LatencyTable, describe_model, predict
from vitrim.methods import method_of_config
from vitrim.tokens import packed as packing
from vitrim.tokens.packed import Layout
from vitrim.tokens.plain import Tokens
from vitrim.tools.hardware import cpu_name


def curve(tokens, milliseconds):
    values = tuple(milliseconds)
    return Curve(tuple(tokens), values, values, values)


def table(**changes):
    family = family_of(tiny_vit())
    stamp = {"runtime": "torch", "batch": 1, "threads": 1, "dtype": "fp32", "device": "cpu"}
    stamp |= {"cpu": cpu_name()} | describe_model(family) | changes
    curves = {"stem": curve([17], [0.5]), "block": curve([5, 9, 17], [1.0, 3.0, 4.0])}
    return LatencyTable(stamp, curves)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(5, 1.0), (7, 2.0), (9, 3.0), (13, 3.5), (17, 4.0), (21, 4.5), (4, 0.5), (1, 0.0)],
)
def test_times_lie_on_lines_between_the_measured_counts(tokens, expected):
    assert table().milliseconds("block", tokens) == pytest.approx(expected)
    found = table().milliseconds("block", torch.tensor([tokens, 17]))
    assert found.tolist() == pytest.approx([expected, 4.0])


def test_a_single_count_is_a_constant():
    assert table().milliseconds("stem", 3) == 0.5
    assert table().milliseconds("stem", torch.tensor([3.0, 40.0])).tolist() == [0.5, 0.5]


def test_a_time_has_the_slope_of_its_line():
    tokens = torch.tensor([6.0, 9.0, 16.0, 30.0, 1.0], requires_grad=True)
    table().milliseconds("block", tokens).sum().backward()
    assert tokens.grad.tolist() == pytest.approx([0.5, 0.125, 0.125, 0.125, 0.0])
    assert torch.autograd.gradcheck(
        table().curves["block"].milliseconds,
        torch.tensor([6.0, 12.0], dtype=torch.float64, requires_grad=True),
    )


def test_saved_is_loaded(tmp_path):
    path = tmp_path / "table.json"
    table().save(path)
    loaded = LatencyTable.load(path)
    assert loaded == LatencyTable(dict(table().stamp), table().curves)
    assert json.loads(path.read_text())["unit"] == "milliseconds per batch"


def damaged(change):
    data = table().to_dict()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ('{"a": ' + "1" * 5000 + "}", "is damaged"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "nested deeper"),
        ('{"a": 100000000000000000000}', "more than 64 bits"),
        ("[]", "is no latency table"),
        ('{"format": "other"}', "is no latency table"),
        (damaged(lambda data: data.update(version=2)), "version 2.*reads version 1"),
        (damaged(lambda data: data.pop("curves")), "is damaged.*curves"),
        (damaged(lambda data: data["curves"].clear()), "no curves"),
        (damaged(lambda data: data["stamp"].pop("cpu")), "no cpu"),
        (damaged(lambda data: data["curves"]["block"].pop("low")), "is damaged.*low"),
        (damaged(lambda data: data["curves"]["block"]["low"].pop()), "not equally many"),
        (damaged(lambda data: data["curves"]["block"]["tokens"].sort(reverse=True)), "do not rise"),
        (damaged(lambda data: data["curves"]["stem"].update(low=[float("nan")])), "is nan"),
        (damaged(lambda data: data["curves"]["stem"].update(median=[math.inf])), "is inf"),
        (damaged(lambda data: data["curves"]["stem"].update(high=[1e300])), "time is 1e[+]300"),
        (damaged(lambda data: data["curves"]["stem"].update(median=[-0.1])), "time is -0.1"),
        (damaged(lambda data: data["curves"]["stem"].update(tokens=[-1])), "token counts"),
        (damaged(lambda data: data["curves"]["stem"].update(tokens=[10**9])), "token counts"),
        (damaged(lambda data: data["curves"]["stem"].update(tokens=[2.5])), "is damaged.*2.5"),
        (damaged(lambda data: data["curves"]["stem"].update(tokens=7)), "a list was expected"),
        (damaged(lambda data: data["curves"].update(stem=[])), "a table was expected"),
        (damaged(lambda data: data.update(curves=[1])), "a table was expected"),
        (damaged(lambda data: data.update(stamp=[])), "a table was expected"),
        (damaged(lambda data: data["stamp"].update(batch=0)), "batch is 0"),
        (damaged(lambda data: data["stamp"].update(batch=[1])), "batch is"),
        (damaged(lambda data: data["stamp"].update(threads=math.nan)), "threads is nan"),
        (damaged(lambda data: data["stamp"].update(depth="12")), "depth is '12'"),
        (damaged(lambda data: data["stamp"].update(width=True)), "width is True"),
        (damaged(lambda data: data["stamp"].update(cpu=None)), "cpu is None"),
        (damaged(lambda data: data["curves"]["stem"].update(low=["soon"])), "is damaged.*soon"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path, content, message):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        LatencyTable.load(path)


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "nowhere.json", tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ConfigError, match=f"{path} is no file"):
            LatencyTable.load(path)
    (tmp_path / "large.json").write_bytes(b" " * (MOST_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        LatencyTable.load(tmp_path / "large.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("samples"), "lacks settings or samples"),
        (lambda found: found.update(settings=3), "lacks settings or samples"),
        (lambda found: found["samples"].update({"stem@17": "fast"}), "expected milliseconds"),
        (lambda found: found["samples"].update({"stem@17": [math.nan]}), "is nan"),
        (lambda found: found["samples"].update({"stem@17": [-1.0]}), "time is -1"),
        (lambda found: found["samples"].update({"stem@17": [1e300]}), "time is 1e"),
        (lambda found: found["samples"].update({"stem@17": []}), "unlike numbers"),
        (lambda found: found["samples"].clear(), "unlike numbers"),
    ],
)
def test_a_damaged_side_file_is_refused(monkeypatch, tmp_path, change, message):
    path = tmp_path / "table.json.partial"
    options = {"configs": [], "side_file": path, **SETTINGS, "rounds": 1}
    profile(tiny_vit(), clock=FakeMachine(monkeypatch).clock, **options)
    found = json.loads(path.read_text())
    change(found)
    for content in (json.dumps(found), "[" * 100_000):
        path.write_text(content)
        with pytest.raises(ConfigError, match=message if content[0] == "{" else "damaged") as error:
            profile(tiny_vit(), **options)
        assert "delete it" in str(error.value)


def test_a_part_that_was_not_profiled_is_named():
    with pytest.raises(ConfigError, match=r"no curve of 'blok' .did you mean 'block'.*stem, block"):
        table().milliseconds("blok", 3)


def test_a_table_of_another_setting_is_refused_and_says_all_that_differs():
    family = family_of(tiny_vit())
    table().check(family, runtime="torch", batch=1, threads=1, dtype="fp32")
    table(cpu="another").check(family, device=None)
    with pytest.raises(ConfigError, match="cpu 'another', here"):
        table(cpu="another").check(family)
    with pytest.raises(ConfigError) as error:
        table().check(
            family_of(tiny_vit(depth=3)), runtime="onnxruntime", batch=16, threads=2, dtype="bf16"
        )
    for part in (
        "runtime 'torch', here 'onnxruntime'",
        "batch 1, here 16",
        "threads 1, here 2",
        "dtype 'fp32', here 'bf16'",
        "depth 4, here 3",
    ):
        assert part in str(error.value)
    assert "width" not in str(error.value)
    with pytest.raises(ConfigError, match="image_size"):
        table().check(family_of(tiny_vit(img_size=64)))


def test_the_sizes_of_a_pyramid_are_lists():
    stamp = describe_model(family_of(tiny_pit()))
    assert (stamp["depth"], stamp["width"], stamp["heads"]) == ([2, 3, 2], [16, 32, 64], [1, 2, 4])
    assert describe_model(family_of(tiny_convnext()))["heads"] == [0, 0, 0, 0]
    found = pyramid_table_of(tiny_swin(), [])
    found = LatencyTable.from_dict(json.loads(json.dumps(found.to_dict())))
    found.check(family_of(tiny_swin()))
    with pytest.raises(ConfigError, match=r"depth \[1, 1, 6, 1\], here \[1, 1, 6, 2\]"):
        found.check(family_of(tiny_swin(depths=(1, 1, 6, 2))))


def test_a_dense_model_is_stem_blocks_or_levels_and_head():
    steps = family_of(tiny_vit()).dense_steps((4, 4))
    assert [step.part for step in steps] == ["stem", *["block"] * 4, "head"]
    family = family_of(tiny_pit())
    steps = family.dense_steps(family.grid())
    assert [step.part for step in steps] == ["stem", "level0", "level1", "level2", "head"]
    assert [step.tokens for step in steps] == [50, 49, 16, 4, 5]


# What is measured.


def test_the_parts_make_the_model():
    """Stem, chain of blocks and head, one after the other, are the backbone."""
    backbone = tiny_vit()
    x = images()
    with torch.no_grad():
        tokens = parts.Blocks(backbone)(parts.Stem(backbone)(x))
        halves = parts.Stem(backbone)(x)
        torch.testing.assert_close(parts.Head(backbone)(tokens), backbone(x))
        attended = parts.AttentionHalves(backbone)(halves)
    assert parts.Blocks(backbone).repeats == 4
    assert attended.shape == tokens.shape
    assert not torch.equal(attended, tokens)


PYRAMIDS = [tiny_swin, tiny_pit, tiny_convnext]


@pytest.mark.parametrize("make", PYRAMIDS)
def test_the_levels_make_the_pyramid(make):
    backbone = make()
    x = images()
    with torch.no_grad():
        found = parts.Stem(backbone)(x)
        for level in range(len(family_of(backbone).depths)):
            found = Level(backbone, (level,))(found)
        torch.testing.assert_close(parts.Head(backbone)(found), backbone(x))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (tiny_swin, DynamicSpatialConfig()),
        (tiny_convnext, DynamicSpatialConfig()),
        (tiny_swin, SPViTPyramidConfig(inference="top_k", stages=(0, 4))),
        (tiny_swin, SPViTPyramidConfig()),
        (tiny_pit, SPViTPyramidConfig(inference="top_k", stages=(6,))),
        (tiny_swin, STViTSwinConfig()),
        (tiny_swin, STViTRConfig()),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_the_levels_of_a_method_make_the_sparse_model(make, config):
    """Each alone, one after the other: nothing is lost between them or done twice. (On PiT a
    package goes on from level to level, so there one level is sparse, the last.)
    """
    backbone = make()
    sparse = sparsify(backbone, config, generator=torch.Generator().manual_seed(0)).eval()
    family, grid, x = sparse.family, sparse.family.grid(), images()
    counts = sparse.method.counts(family, grid) or (1,) * len(sparse.method.stages)
    with torch.no_grad():
        found = parts.Stem(backbone)(x)
        for step in sparse.method.steps(family, grid, counts)[1:-1]:
            method = sparse.method if "-" in step.part else None
            found = Level(backbone, step.levels, method)(found)
        torch.testing.assert_close(parts.Head(backbone)(found), sparse(x))


@pytest.mark.parametrize("make", PYRAMIDS)
def test_curves_of_levels_go_by_the_positions_that_are_computed(make):
    """Counted at the MLP of a level's last block; where images decide, of noise."""
    backbone = make()
    family = family_of(backbone)
    shapes = probes._shapes(backbone, (3, 3, 32, 32))
    prefix = 2 if make is tiny_pit else 0  # class and package token
    points = Counter()
    for config in probes.kinds_of(family):
        if isinstance(config, STViTSwinConfig | STViTRConfig):
            continue  # all their blocks run on all semantic tokens
        found = as_methods_run_them(backbone, config, shapes, 4)
        for (part, positions), level in found.items():
            points[part] += 1
            (number,) = level.levels
            rows = []
            mlp = family.block(number, family.depths[number] - 1).mlp
            hook = mlp.register_forward_hook(
                lambda _m, x, _y, rows=rows: rows.append(x[0].shape[:-1].numel())
            )
            noise = torch.randn(shapes[number], generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                level(noise)
            hook.remove()
            assert sum(rows) / 3 == pytest.approx(positions + prefix, abs=0.5)
    assert all(count > 1 for part, count in points.items() if "@" in part)


def test_a_packed_chain_is_the_chain_of_each_image():
    backbone = tiny_vit()
    x = images(4)
    with torch.no_grad():
        features = parts.Stem(backbone)(x)
        module = parts.Blocks(backbone, packed=True)
        packed, rows = module.packed(features), module(features)
        for image, count in enumerate(packed.layout.counts):
            start = int(packed.layout.start_B[image])
            own = slice(start, start + count + 1)
            alone = Tokens.of(packed.x[own].unsqueeze(0), 1)
            alone = module.family.run_blocks(range(module.repeats), alone)
            torch.testing.assert_close(rows[own], alone.x[0])


@pytest.mark.parametrize(("mean", "num_images"), [(12, 4), (7, 3), (1, 5), (100, 16)])
def test_packed_counts_spread_around_their_mean(mean, num_images):
    counts = parts.spread_counts(mean, num_images)
    assert sum(counts) == mean * num_images
    assert min(counts) >= 1
    assert mean < 4 or len(set(counts)) > 1


def kind_name(config):
    method = method_of_config(config)(family_of(tiny_vit()), config)
    name = method.select_name + "-drop" * (getattr(config, "action", "") == "drop")
    return costs.select_part(name, method.counts(family_of(tiny_vit()), (4, 4)) is None)


PLAIN_KINDS = probes.kinds_of(family_of(tiny_vit()))


@pytest.mark.parametrize("config", PLAIN_KINDS, ids=kind_name)
def test_a_selector_alone_runs_no_block_but_its_own(config):
    """It keeps what the method keeps; of the backbone it runs what its step's MACs say."""
    backbone = tiny_vit()
    module = parts.Selecting(backbone, config)
    assert module.part == kind_name(config)
    ran = Counter()
    for index, block in enumerate(backbone.blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.update([index]))
    x = parts.Stem(backbone)(images()) if module.adaptive else torch.randn(2, 12, 32)
    if isinstance(config, STViTConfig):
        x = parts.Stem(backbone)(images())
    with torch.no_grad():
        kept = module(x)
    assert kept.numel() < x.numel() or module.adaptive
    assert sum(ran.values()) == (2 if isinstance(config, STViTConfig) else 0)


CHOOSING = [
    pytest.param(config, packed, id=kind_name(config) + "-packed" * packed)
    for config in PLAIN_KINDS
    for packed in (False, True)
    if kind_name(config).endswith("-adaptive") and (not packed or hasattr(config, "stages"))
]
"""Selectors of images that decide; those that choose more than once meet packed ones too."""


@pytest.mark.parametrize(("config", "packed"), CHOOSING)
def test_an_adaptive_selector_keeps_some_of_noise_and_divides_it_for_attention(
    config, packed, monkeypatch
):
    """Where it kept everything there would be nothing to gather, and what follows nothing to
    divide.
    """
    module = parts.Selecting(tiny_vit(img_size=64), config, packed=packed)
    selected, divided = [], []
    select_many, buckets = packing._select_many, Layout.buckets

    def select(*arguments):
        selected.append(select_many(*arguments).layout)
        return select_many(*arguments)

    def divide(layout, *arguments):
        divided.append(layout.counts)
        return buckets(layout, *arguments)

    monkeypatch.setattr(packing, "_select_many", select)
    monkeypatch.setattr(Layout, "buckets", divide)
    with torch.no_grad():
        kept = module(torch.randn(16, 65, 32, generator=torch.Generator().manual_seed(1)))
    assert 0.5 < len(kept) / (16 * 65) < 0.9
    layout, *_ = selected  # what is merged away is selected after it
    assert len(set(layout.counts)) > 1
    assert divided[-1] == layout.counts


def test_a_checkpoints_own_selector_is_measured_with_one_stage():
    def alone(config, depth):
        return method_of_config(config).one_stage(config, 1, parts.KEPT, depth)

    config = ASViTConfig(stages=(1, 2), thresholds=(0.01, 0.02))
    assert alone(config, 4).thresholds == 0.01
    config = SPViTConfig(stages=(1, 2), keep_ratio=(0.9, 0.5), package_mode="sum")
    single = alone(config, 4)
    assert (single.stages, single.package_mode) == ((1,), "sum")
    assert alone(STViTConfig(generation_layers=3), 8).base_layers == 5


class FakeMachine:
    """A runtime that takes as long as a formula says, by a clock of its own."""

    CALLING = 2.0

    def __init__(self, monkeypatch, fails_after=math.inf):
        self.now, self.calls, self.fails_after = 0.0, [], fails_after
        monkeypatch.setattr(runners, "bind", self.bind)

    def clock(self):
        return self.now

    def bind(self, module, example, varies, runtime, dtype, threads):
        def call(x):
            self.calls.append((type(module).__name__, x.shape[1]))
            if len(self.calls) > self.fails_after:
                raise KeyboardInterrupt
            milliseconds = self.CALLING + module.repeats * self.formula(module, x.shape[1])
            self.now += milliseconds / 1e3

        return lambda x: lambda: call(x)

    @staticmethod
    def formula(module, tokens):
        """Milliseconds of a part run once."""
        if isinstance(module, parts.Nothing):
            return 0.0
        weight = 3.0 if isinstance(module, parts.Blocks) else 1.0
        return weight * math.ceil(tokens / 4)


SETTINGS = {"points": 5, "rounds": 3, "min_seconds": 0.0}


def test_what_calling_costs_is_counted_once(monkeypatch):
    machine = FakeMachine(monkeypatch)
    family = family_of(tiny_vit())
    found = profile(tiny_vit(), clock=machine.clock, configs=[DynamicViTConfig()], **SETTINGS)
    block = found.curves["block"]
    assert block.tokens == (3, 6, 10, 14, 17)
    assert block.median == pytest.approx([3.0, 6.0, 9.0, 12.0, 15.0])
    assert block.low == pytest.approx(block.high)
    assert found.milliseconds("stem", 17) == pytest.approx(2.0 + 1.0)  # its input is 3 wide
    assert found.milliseconds("select-dynamicvit", 17) == pytest.approx(5.0)
    dense = predict(found, None, family, (4, 4))
    assert dense == pytest.approx(3.0 + 4 * 15.0 + 5.0)
    found.check(family, runtime="torch", batch=1, threads=1, dtype="fp32")


def calls_of_a_run():
    """Of all parts once, at first; and in a round: one to warm up and one to time, and a chain of
    blocks before each of a part that a model runs once.
    """
    found = list(probes.probes_of(tiny_vit(), [], "torch", 1, SETTINGS["points"], {}))
    cold = sum(probe.module.cold for probe in found)
    assert 0 < cold < len(found)
    return len(found), 2 * len(found) + 2 * cold


def test_parts_that_a_model_runs_once_follow_a_chain_of_blocks(monkeypatch):
    machine = FakeMachine(monkeypatch)
    profile(tiny_vit(), clock=machine.clock, configs=[], **SETTINGS)
    first, _ = calls_of_a_run()
    before = Counter(
        earlier
        for earlier, call in itertools.pairwise(machine.calls[first:])
        if call[0] in ("Stem", "Head")
    )
    assert before.keys() == {("Blocks", 3)}


def test_whole_models_take_turns_with_the_parts(monkeypatch):
    machine = FakeMachine(monkeypatch)
    sparse = sparsify(tiny_vit(), DynamicViTConfig())
    options = {"configs": [], "beside": {"sparse": sparse}, **SETTINGS}
    found = profile(tiny_vit(), clock=machine.clock, **options)
    assert found.milliseconds("dense", 17) == found.milliseconds("sparse", 17)
    assert found.milliseconds("dense", 17) == pytest.approx(2.0 + 1.0)  # its input is 3 wide


def test_turns_rotate(monkeypatch):
    machine = FakeMachine(monkeypatch)
    percents = []
    profile(tiny_vit(), clock=machine.clock, configs=[], progress=percents.append, **SETTINGS)
    assert percents == sorted(percents)
    assert percents[-4:] == [30, 53, 76, 100]
    first, each = calls_of_a_run()
    rounds = [machine.calls[first:][i * each : (i + 1) * each] for i in range(3)]
    assert len(machine.calls) == first + 3 * each
    assert len({calls[1] for calls in rounds}) == 3
    assert len({frozenset(Counter(calls).items()) for calls in rounds}) == 1


def test_an_interrupted_run_goes_on(monkeypatch, tmp_path):
    path = tmp_path / "table.json.partial"
    first, each = calls_of_a_run()
    options = {"configs": [], "side_file": path, **SETTINGS}

    broken = FakeMachine(monkeypatch, fails_after=first + each + 5)  # in the second round
    with pytest.raises(KeyboardInterrupt):
        profile(tiny_vit(), clock=broken.clock, **options)
    assert {len(times) for times in json.loads(path.read_text())["samples"].values()} == {1}

    resumed = FakeMachine(monkeypatch)
    found = profile(tiny_vit(), clock=resumed.clock, **options)
    assert len(resumed.calls) == first + 2 * each
    assert found.curves["block"].median == pytest.approx([3.0, 6.0, 9.0, 12.0, 15.0])

    finished = FakeMachine(monkeypatch)
    profile(tiny_vit(), clock=finished.clock, **options)
    assert finished.calls == []

    with pytest.raises(ConfigError, match=r"other settings: batch 1, now 2.*delete the file"):
        profile(tiny_vit(), batch=2, **options)
    with pytest.raises(ConfigError, match=r"depth 4, now 3"):
        profile(tiny_vit(depth=3), **options)
    with pytest.raises(ConfigError, match=r"measured parts, now"):
        profile(tiny_vit(), **(options | {"points": 4}))
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"damaged.*delete it"):
        profile(tiny_vit(), **options)


@pytest.mark.parametrize("make", [tiny_vit, tiny_lvvit, *PYRAMIDS])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_kind_that_runs_on_a_model_is_predicted(make, batch):
    """What is measured, in torch itself, has every part that the methods' steps name."""
    backbone = make()
    found = profile(backbone, batch=batch, points=8, rounds=1, min_seconds=0.0)
    family = family_of(backbone)
    choosing_nothing = [DenseConfig()] if family.name in ("vit", "lvvit") else []
    for config in (*choosing_nothing, *probes.kinds_of(family)):
        sparse = sparsify(backbone, config)
        counts = sparse.method.counts(family, family.grid())
        if counts is None:
            counts = [torch.tensor([9.0, 4.0, 5.0])] * len(sparse.method.stages)
        assert 0 < float(predict(found, sparse.method, family, family.grid(), counts)) < math.inf


def test_semantic_tokens_with_scales_of_their_own_have_blocks_of_their_own():
    config = STViTConfig(semantic_tokens=4, keep_prefix=True, global_centres=False)
    sparse = sparsify(tiny_vit(), config)
    found = profile(sparse, points=3, rounds=1, min_seconds=0.0)
    assert found.curves["select-stvit"].tokens == (2, 5, 10)
    assert "cross" not in found.curves
    assert predict(found, sparse.method, sparse.family, (4, 4), (4,)) > 0
    sparse = sparsify(tiny_vit(), replace(config, layer_scale=0.5))
    found = profile(sparse, points=3, rounds=1, min_seconds=0.0)
    assert "cross" in found.curves
    assert predict(found, sparse.method, sparse.family, (4, 4), (4,)) > 0


# What is predicted.


def packed_table(batch):
    """Packed, everything takes longer: a part's own curve is used or the sum is far off."""
    counts = (3, 17)
    curves = {
        "stem": curve([17], [1.0]),
        "block": curve(counts, [3.0, 17.0]),
        "block-packed": curve(counts, [300.0, 1700.0]),
        "last": curve(counts, [0.3, 1.7]),
        "last-packed": curve(counts, [30.0, 170.0]),
        "select-dynamicvit-adaptive": curve(counts, [0.0, 0.0]),
        "head": curve(counts, [0.0, 0.0]),
        "head-packed": curve(counts, [0.0, 5000.0]),
    }
    return LatencyTable(dict(table().stamp) | {"batch": batch}, curves)


def test_counts_of_images_are_a_mean_of_latencies_or_one_packed_batch():
    config = DynamicViTConfig(threshold=0.5, stages=(2,))
    exact, whole = (
        sparsify(tiny_vit(), replace(config, exact_last_block=exact)) for exact in (True, False)
    )
    counts = torch.tensor([4, 12])

    def predicted(batch, counts, sparse=whole):
        method, family = sparse.method, sparse.family
        return float(predict(packed_table(batch), method, family, (4, 4), [counts]))

    assert predicted(1, counts) == pytest.approx(1 + 2 * 17 + 2 * (5 + 13) / 2)
    assert predicted(2, counts) == pytest.approx(1 + 2 * 17 + 2 * 900 + 5000 * 3 / 7)
    assert predicted(2, torch.tensor([8, 8])) == pytest.approx(1 + 2 * 17 + 2 * 9)
    assert predicted(2, 8) == pytest.approx(1 + 2 * 17 + 2 * 9)
    # The head behind an exact last block sees the class token of every image alike.
    assert predicted(1, counts, exact) == pytest.approx(1 + 2 * 17 + 1.1 * (5 + 13) / 2)
    assert predicted(2, counts, exact) == pytest.approx(1 + 2 * 17 + 900 + 90)
    assert predicted(2, 8, exact) == pytest.approx(1 + 2 * 17 + 1.1 * 9)


def test_a_merging_block_is_its_selector_and_the_mlp_of_what_is_left():
    sparse = sparsify(tiny_vit(), MergingConfig(stages=(2,), keep_ratio=0.5))
    found = table()
    scales = {"block": 1.0, "select-merging": 100.0, "mlp": 0.1, "last": 0.01, "head": 0.0}
    found.curves.update({part: curve([1, 17], [s, 17 * s]) for part, s in scales.items()})
    counts = sparse.method.counts(sparse.family, (4, 4))
    assert counts == (8,)
    milliseconds = float(predict(found, sparse.method, sparse.family, (4, 4), counts))
    assert milliseconds == pytest.approx(0.5 + 17 + 1700 + 0.9 + 9 + 0.09)


def test_merging_alone_is_what_a_block_does_before_its_mlp():
    backbone = tiny_vit()
    module, x = parts.Selecting(backbone, MergingConfig()), torch.randn(2, 17, 32)
    sparse = sparsify(backbone, module.method.config).eval()
    mlps = []
    backbone.blocks[0].mlp.register_forward_pre_hook(lambda _m, given: mlps.append(given[0]))
    with torch.no_grad():
        alone = module(parts.Stem(backbone)(images()))
        sparse(images())
        torch.testing.assert_close(backbone.blocks[0].norm2(alone), mlps[0])
        assert module(x[:, :11]).shape == (2, 1 + 7, 32)
    assert len(mlps) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_merging_by_a_threshold_has_a_curve_of_its_own(packed):
    module = parts.Selecting(tiny_vit(), MergingConfig(threshold=0.01), packed)
    assert module.part == "select-merging-adaptive" + ("-packed" if packed else "")
    with torch.no_grad():
        made = module(torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(1)))
    assert 3 * 9 <= made.flatten(0, -2).shape[0] < 3 * 17


def test_gradients_reach_the_counts():
    sparse = sparsify(tiny_vit(), DynamicViTConfig(threshold=0.5, stages=(2,)))
    counts = torch.tensor([4.0, 12.0], requires_grad=True)
    predict(packed_table(1), sparse.method, sparse.family, (4, 4), [counts]).backward()
    assert counts.grad.tolist() == pytest.approx([0.55, 0.55])


def test_levels_of_images_that_decide_have_one_curve():
    """It was measured on such a batch, so only the mean counts."""
    sparse = sparsify(tiny_swin(), SPViTPyramidConfig(stages=(2,)))
    family, grid = sparse.family, sparse.family.grid()
    for batch, counts in ((1, [16.0, 48.0]), (4, [16.0, 48.0]), (4, [32.0, 32.0])):
        found = pyramid_table_of(tiny_swin(), [sparse.config], batch)
        counts = torch.tensor(counts, requires_grad=True)
        predicted = predict(found, sparse.method, family, grid, [counts])
        assert predicted.item() == pytest.approx(5 * 4 + 3)
        predicted.backward()
        assert counts.grad.tolist() == pytest.approx([1 / 64] * 2)


@pytest.mark.parametrize(
    ("profiled", "other", "name"),
    [
        (DynamicSpatialConfig(), DynamicSpatialConfig(stages=(2, 3)), "level2-dynamic_spatial@2,3"),
        (SPViTPyramidConfig(), SPViTPyramidConfig(stages=(4,)), "level2-spvit_pyramid@2-adaptive"),
        (SPViTPyramidConfig(), SPViTPyramidConfig(execution="mask"), "-masked@"),
        (STViTSwinConfig(), STViTSwinConfig(base_layers=1), "level2to3-stvit_swin@1"),
        (STViTRConfig(), STViTRConfig.dense_prediction(), "level2-stvit_r-dense"),
    ],
)
def test_levels_that_choose_elsewhere_have_other_curves(profiled, other, name):
    found = pyramid_table_of(tiny_swin(), [profiled])
    sparse = sparsify(tiny_swin(), other)
    counts = [4] * len(sparse.method.stages)
    with pytest.raises(ConfigError, match=f"no curve of '[^']*{name}.*Profile the model again"):
        predict(found, sparse.method, sparse.family, sparse.family.grid(), counts)


def test_work_that_no_table_describes_is_refused_by_name():
    masked = sparsify(tiny_vit(), SPViTConfig(execution="mask"))
    found = profile(masked, points=2, rounds=1, min_seconds=0.0)
    with pytest.raises(ConfigError, match="no curve of 'masked'"):
        predict(found, masked.method, masked.family, (4, 4), (9, 9, 9))
    spatial = sparsify(tiny_convnext(), DynamicSpatialConfig())
    with pytest.raises(ConfigError, match="no curve of 'level0-dynamic_spatial'"):
        predict(found, spatial.method, spatial.family, (8, 8), (9, 9, 9))


# Runtimes.


@pytest.mark.parametrize(
    ("runtime", "dtype", "message"),
    [
        ("torch", "int8", "torch is profiled in fp32, bf16.*int8 is run by onnxruntime"),
        ("onnxruntime", "bf16", "onnxruntime is profiled in fp32, int8.*bf16 is run by torch, "),
        ("openvino", "int8", "openvino is profiled in fp32, bf16"),
        ("onnxruntim", "fp32", "unknown runtime 'onnxruntim'.*did you mean 'onnxruntime'"),
        ("torch", "fp8", "not in 'fp8'$"),
    ],
)
def test_what_a_runtime_lacks_is_refused_by_name(runtime, dtype, message):
    with pytest.raises(ConfigError, match=message):
        profile(tiny_vit(), runtime=runtime, dtype=dtype)


def test_arguments_out_of_range_are_refused():
    for name in ("batch", "threads", "rounds"):
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            profile(tiny_vit(), **{name: 0})
    with pytest.raises(ConfigError, match="points is 1"):
        profile(tiny_vit(), points=1)
    with pytest.raises(ConfigError, match="'dynamicvitt' is unknown"):
        probes.kinds_of(family_of(tiny_vit()), ["dynamicvitt"])
    with pytest.raises(ConfigError, match="'stvit_r' does not run on vit; use asvit, dense"):
        probes.kinds_of(family_of(tiny_vit()), ["stvit_r"])


@pytest.mark.parametrize(
    ("runtime", "dtype"),
    [("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32")],
)
def test_a_runtime_computes_what_torch_does_on_any_number_of_tokens(runtime, dtype):
    pytest.importorskip(runtime)
    module = parts.Blocks(tiny_vit(depth=1)).eval()
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))
    bound = runners.bind(module, x, True, runtime, dtype, 1)
    for tokens in (17, 9):
        part = x[:, :tokens].contiguous()
        found = torch.from_numpy(bound(part)()[0])
        with torch.no_grad():
            wanted = module(part)
        assert (found - wanted).abs().max() < (1e-4 if dtype == "fp32" else 1.0)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("inference", ["top_k", "threshold"])
def test_a_level_computes_elsewhere_what_it_does_here(runtime, inference):
    pytest.importorskip(runtime)
    config = SPViTPyramidConfig(stages=(6,), inference=inference)
    shapes = probes._shapes(tiny_pit(), (1, 3, 32, 32))
    level = next(iter(as_methods_run_them(tiny_pit(), config, shapes, 1).values()))
    x = torch.randn(shapes[2], generator=torch.Generator().manual_seed(0))
    found = runners.bind(level, x, False, runtime, "fp32", 1)(x)()[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), level(x), atol=1e-4, rtol=0)


def test_bfloat16_is_run_in_torch():
    found = profile(
        tiny_vit(), dtype="bf16", configs=[DynamicViTConfig()], points=2, rounds=1, min_seconds=0.0
    )
    assert found.stamp["dtype"] == "bf16"


# The command.


@pytest.fixture
def tiny_deit(monkeypatch):
    monkeypatch.setattr("vitrim.cli.common.load_model", lambda *_, **__: tiny_vit())


def run(*words):
    return CliRunner().invoke(app, ["profile", *map(str, words)])


def test_the_command_writes_a_table_and_a_picture(tiny_deit, tmp_path):
    path, picture = tmp_path / "table.json", tmp_path / "curves.svg"
    options = ("--points", 3, "--rounds", 2, "--seconds", 0, "--methods", "dynamicvit")
    result = run("deit_tiny", "-o", path, "--plot", picture, *options)
    assert result.exit_code == 0, result.output
    assert "select-dynamicvit-adaptive" in result.output
    found = LatencyTable.load(path)
    assert {"block", "stem", "head", "mlp", "attention", "select-dynamicvit"} <= set(found.curves)
    assert not any("sait" in part for part in found.curves)
    assert "svg" in picture.read_text()[:200]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.svg", "table.json"]


def test_the_command_measures_a_pyramid(monkeypatch, tmp_path):
    monkeypatch.setattr("vitrim.cli.common.load_model", lambda *_, **__: tiny_convnext())
    path, picture = tmp_path / "table.json", tmp_path / "curves.svg"
    result = run("x", "-o", path, "--plot", picture, "--points", 2, "--rounds", 1, "--seconds", 0)
    assert result.exit_code == 0, result.output
    assert "level2-dynamic_spatial@1,2,3" in LatencyTable.load(path).curves
    assert "svg" in picture.read_text()[:200]
    result = run("x", "-o", tmp_path / "other.json", "--methods", "spvit_pyramid")
    assert "'spvit_pyramid' does not run on convnext" in str(result.exception)


def test_a_picture_of_another_kind_is_refused_before_the_work(tiny_deit, tmp_path):
    result = run("deit_tiny", "-o", tmp_path / "table.json", "--plot", tmp_path / "curves.bmp")
    assert isinstance(result.exception, InputError)
    with pytest.raises(InputError, match="no name of a picture"):
        draw_table(tmp_path / "curves.bmp", table())
