"""Latency tables: the data, what is measured, and what is predicted; no time decides a test."""

from __future__ import annotations

import json

import pytest
import torch

from tests.conftest import tiny_pit, tiny_vit
from vitrim import cost
from vitrim.errors import ConfigError, InputError
from vitrim.families import family_of
from vitrim.hardware import cpu_name
from vitrim.latency import Curve, LatencyTable, describe_model


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
        ("{", "is damaged, or no latency table"),
        ("[]", "is no latency table"),
        ('{"format": "other"}', "is no latency table"),
        (damaged(lambda data: data.update(version=2)), "version 2.*reads version 1"),
        (damaged(lambda data: data.pop("curves")), "is damaged.*curves"),
        (damaged(lambda data: data["curves"].clear()), "no curves"),
        (damaged(lambda data: data["stamp"].pop("cpu")), "no cpu"),
        (damaged(lambda data: data["curves"]["block"].pop("low")), "is damaged.*low"),
        (damaged(lambda data: data["curves"]["block"]["low"].pop()), "not equally many"),
        (damaged(lambda data: data["curves"]["block"]["tokens"].sort(reverse=True)), "do not rise"),
        (damaged(lambda data: data["curves"]["stem"].update(low=[float("nan")])), "no finite"),
        (damaged(lambda data: data["curves"]["stem"].update(low=["soon"])), "is damaged.*soon"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path, content, message):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        LatencyTable.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.json"):
        LatencyTable.load(tmp_path / "nowhere.json")


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


def test_other_families_have_no_table():
    with pytest.raises(ConfigError, match="not for the family 'pit'"):
        describe_model(family_of(tiny_pit()))


def test_dense_steps_cost_what_the_family_says():
    family = family_of(tiny_vit())
    steps = cost.dense_steps(family, (4, 4))
    assert cost.total_macs(steps) == family.dense_macs((4, 4))
    assert [step.part for step in steps] == ["stem", *["block"] * 4, "head"]
