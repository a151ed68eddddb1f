"""The benchmark's order, arithmetic and records, under a clock of our own: nothing is timed."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import vitrim
from tests.conftest import tiny_vit
from vitrim import ConfigError, DynamicViTConfig, InputError
from vitrim.tools.benchmark import Quartiles, benchmark

SHAPE = (3, 32, 32)


class Clock:
    """A clock that only the models move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


class Timed(nn.Module):
    """Takes a known time per call, whatever copy of it runs."""

    def __init__(self, name: str, seconds: list[float]) -> None:
        super().__init__()
        self.name, self.seconds, self.done = name, seconds, 0
        self.layer = nn.Linear(3 * 32 * 32, 4 if name == "dense" else 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        CLOCK.now += self.seconds[min(self.done, len(self.seconds) - 1)]
        CLOCK.calls.append(self.name)
        self.done += 1
        return self.layer(images.flatten(1))


@pytest.fixture(autouse=True)
def fresh_clock():
    CLOCK.now = 0.0
    CLOCK.calls.clear()


def timed_rows(dense: list[float], sparse: list[float], **options):
    candidates = {"dense": Timed("dense", dense), "sparse": Timed("sparse", sparse)}
    settings = {"batches": (2,), "dtypes": ("fp32",), "rounds": 3, "min_seconds": 0.0}
    return benchmark(candidates, SHAPE, clock=CLOCK, **(settings | options))


def test_speedup_and_efficiency_come_from_pairs_of_one_round():
    # One call counts MACs, four warm up; then a call per round. The machine slows down in round 2
    # for both: ratios of the same round do not see it.
    warm = [1.0] * 5
    base, sparse = timed_rows([*warm, 4.0, 40.0, 4.0], [*warm, 2.0, 10.0, 2.0])
    assert sparse.speedup == Quartiles(median=2.0, low=2.0, high=3.0)
    assert base.macs == 4 * 3072
    assert sparse.macs == 3072
    assert sparse.efficiency == Quartiles(median=0.5, low=0.5, high=0.75)
    assert base.speedup == base.efficiency == Quartiles(1.0, 1.0, 1.0)
    assert sparse.seconds.median == 2.0
    assert sparse.images_per_second == 1.0
    assert (sparse.rounds, sparse.calls_per_round) == (3, 1)
    assert (sparse.name, sparse.base, base.name) == ("sparse", "dense", "dense")


def test_order_rotates():
    timed_rows([1.0], [1.0])
    turns = ["dense", "sparse", "sparse", "dense", "dense", "sparse"]
    assert CLOCK.calls[-12:] == [name for name in turns for _ in range(2)]  # one warms up


def test_a_turn_lasts_as_long_as_asked():
    base, sparse = timed_rows([0.5], [0.125], min_seconds=2.0)
    assert (base.calls_per_round, sparse.calls_per_round) == (4, 16)
    assert sparse.speedup.median == pytest.approx(4.0)


@pytest.mark.parametrize(("limit", "rounds"), [(1000.0, 9), (31.0, 6), (0.0, 3)])
def test_rounds_end_when_the_time_is_up(limit, rounds):
    # Warming up takes 8 seconds, a round 4.
    rows = timed_rows([1.0], [1.0], rounds=9, max_seconds=limit)
    assert {row.rounds for row in rows} == {rounds}


def test_given_images_are_taken_in_turn_by_all():
    """Adaptive models are timed on real images: every candidate on the same batches."""
    seen = {"one": [], "two": []}

    class Watching(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.layer = name, nn.Linear(3, 1)

        def forward(self, images: Tensor) -> Tensor:
            seen[self.name].append(images[:, 0, 0, 0].tolist())
            return self.layer(images[..., 0, 0])

        def __deepcopy__(self, memo: object) -> Watching:
            return self

    pool = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    models = {name: Watching(name) for name in seen}
    options = {"batches": (2,), "dtypes": ("fp32",), "rounds": 2, "min_seconds": 0.0}
    rows = benchmark(models, (3, 4, 4), images=pool, **options)
    assert {row.calls_per_round for row in rows} == {2}
    for batches in seen.values():
        assert batches[-6:] == [[0.0, 1.0], [0.0, 1.0], [2.0, 3.0]] * 2  # one warms up
    with pytest.raises(InputError, match="do not make one batch of 8"):
        benchmark(models, (3, 4, 4), images=pool, **options | {"batches": (8,)})
    with pytest.raises(InputError, match=r"shape \(5, 3, 4, 4\)"):
        benchmark(models, (3, 8, 8), images=pool, **options)


def test_row_per_dtype_batch_and_candidate():
    rows = timed_rows([1.0], [1.0], batches=(1, 3), dtypes=("fp32", "bf16"))
    found = [(row.dtype, row.batch, row.name) for row in rows]
    assert found == [
        (dtype, batch, name)
        for dtype in ("fp32", "bf16")
        for batch in (1, 3)
        for name in ("dense", "sparse")
    ]


def test_rows_are_json_ready_and_say_where_they_were_measured():
    row = timed_rows([1.0], [1.0], threads=1)[1].to_dict()
    assert json.loads(json.dumps(row)) == row
    assert row["hardware"].keys() >= {"cpu", "cores", "threads", "torch", "timm", "date", "device"}
    assert row["hardware"]["threads"] == 1
    assert row["speedup"].keys() == {"median", "low", "high"}
    assert (row["dtype"], row["batch"], row["compiled"]) == ("fp32", 2, False)


def test_real_models_are_left_as_they_were():
    dense = tiny_vit()
    sparse = vitrim.sparsify(dense, DynamicViTConfig(keep_ratio=0.5)).train()
    weight = dense.head.weight.clone()
    threads = torch.get_num_threads()
    rows = benchmark(
        {"dense": dense, "sparse": sparse},
        SHAPE,
        batches=(2,),
        dtypes=("bf16",),
        rounds=2,
        min_seconds=0,
        threads=1,
    )
    assert torch.equal(dense.head.weight, weight)
    assert dense.head.weight.dtype == torch.float32
    assert sparse.training
    assert torch.get_num_threads() == threads
    assert rows[0].macs == pytest.approx(sparse.dense_macs(), rel=1e-3)
    assert rows[1].macs == sparse.macs()
    ratio = rows[0].macs / rows[1].macs
    assert rows[1].efficiency.median == pytest.approx(rows[1].speedup.median / ratio)


def test_threads_are_restored_after_an_error():
    threads = torch.get_num_threads()
    with pytest.raises(InputError):
        benchmark({"dense": tiny_vit()}, (3, 40, 40), batches=(1,), rounds=1, threads=1)
    assert torch.get_num_threads() == threads


def test_compiled_candidates_are_compiled(monkeypatch):
    compiled = []

    def compile(model, **options):
        compiled.append((model.name, options))
        return model

    monkeypatch.setattr(torch, "compile", compile)
    rows = timed_rows([1.0], [1.0], compile=True)
    assert [name for name, _ in compiled] == ["dense", "sparse"]
    assert all(row.compiled for row in rows)


def test_quartiles():
    assert Quartiles.of([5.0]) == Quartiles(5.0, 5.0, 5.0)
    assert Quartiles.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Quartiles(median=3.0, low=2.0, high=4.0)
    assert Quartiles(4.0, 2.0, 6.0) / 2 == Quartiles(2.0, 1.0, 3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": ("bf61",)}, "did you mean 'bf16'"),
        ({"dtypes": ()}, "no dtype"),
        ({"rounds": 0}, "rounds is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"batches": (0,)}, "batches are"),
        ({"batches": ()}, "batches are"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        timed_rows([1.0], [1.0], **options)


def test_no_candidate():
    with pytest.raises(ConfigError, match="no candidate"):
        benchmark({}, SHAPE)


def test_other_devices_are_refused():
    with pytest.raises(InputError, match="cpu or cuda"):
        timed_rows([1.0], [1.0], device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            timed_rows([1.0], [1.0], device="cuda")


FAULTS = """
import resource, torch
from vitrim.tools.benchmark import keep_memory
{call}
torch.set_num_threads(1)
def work():
    kept = [torch.ones(6 << 20, dtype=torch.uint8) for _ in range(4)]
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_what_is_freed_is_kept():
    """24 MiB are 6,144 pages, given back and faulted in again by each call unless told."""

    def faults(call: str) -> int:
        script = FAULTS.format(call=call)
        found = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
        return int(found.stdout)

    # By chance a heap can be such that nothing is given back; not five times in a row.
    assert any(faults("") > 10 * 1000 for _ in range(5))
    assert faults("keep_memory()") < 1000
