"""The command line: what it prints and writes, and how it fails."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import vitrim.cli
from tests.conftest import forge, golden, golden_weights, tiny_vit
from tests.tables import table_of
from vitrim import DynamicViTConfig, SaiTConfig
from vitrim.budgets.schedule import load as load_schedule
from vitrim.cli import main
from vitrim.cli.common import setting_name
from vitrim.config import to_plain
from vitrim.families.described import describe_data
from vitrim.tools.hardware import cpu_name
from vitrim.train.data import eval_loader

QUICK = ["--workers", "0", "--device", "cpu"]
SPARSIFY = ["sparsify", "digits_vit", "--data", "DATA", "-o", "TMP/out", "--method"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A checkpoint, a data folder with ten classes and a damaged image, dense weights."""
    folder = tmp_path_factory.mktemp("made")
    sparse = vitrim.sparsify(tiny_vit(), DynamicViTConfig(keep_ratio=0.6))
    sparse.save_pretrained(folder / "checkpoint", metrics={"val_top1": 12.5}, origin="a test")
    adaptive = vitrim.sparsify(tiny_vit(), DynamicViTConfig(threshold=0.5))
    adaptive.save_pretrained(folder / "adaptive")
    rng = np.random.default_rng(0)
    for label in range(10):
        inside = folder / "data" / f"class{label}"
        inside.mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(inside / f"{number}.png")
    # The last of four blocks is a quarter of the model: exact, no budget of 0.85 would be left.
    config = SaiTConfig(min_kept=0, exact_last_block=False)
    calibrated = vitrim.sparsify(tiny_vit(patch_size=4), config)
    loader = eval_loader(folder / "data", describe_data(calibrated.backbone), 20)
    vitrim.calibrate(calibrated, loader, (0.7, 0.85))
    calibrated.save_pretrained(folder / "calibrated")
    (folder / "data" / "class3" / "broken.png").write_bytes(b"no image at all")
    return folder


@pytest.fixture
def dense(monkeypatch) -> list[str]:
    """Arguments that name a small dense model, as if timm had fetched its weights."""
    model, create = tiny_vit(patch_size=4), timm.create_model

    def fetched(name, pretrained=False, **options):
        return model if pretrained else create(name, **options)

    monkeypatch.setattr(timm, "create_model", fetched)
    return ["vit_tiny_patch16_224"]


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output, error stream."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def fails(capsys, folder: Path, *arguments) -> str:
    """The one message of a command that must fail and write nothing below ``folder``."""
    before = sorted(folder.rglob("*"))
    code, out, err = run(capsys, *arguments)
    assert code == 2, (out, err)
    assert "Traceback" not in err
    messages = [line for line in err.splitlines() if line.startswith("vitrim: error: ")]
    assert len(messages) == 1, err
    assert sorted(folder.rglob("*")) == before
    return err


# eval


def test_eval_prints_and_writes(capsys, made, tmp_path):
    report = tmp_path / "eval.json"
    code, out, err = run(
        capsys, "eval", made / "checkpoint", "--data", made / "data", "--json", report, *QUICK
    )
    assert code == 0, err
    assert "dense" in out
    assert "dynamicvit 0.6" in out
    assert "block 1" in out
    assert "broken.png" in err
    written = json.loads(report.read_text())
    assert written["hardware"].keys() >= {"cpu", "torch", "timm", "date"}
    (result,) = written["results"]
    assert result["images"] == 20
    assert result["num_unreadable"] == 1
    assert result["unreadable"] == [str(made / "data" / "class3" / "broken.png")]
    assert result["paired"].keys() >= {"won", "lost", "low", "high"}
    assert result["macs"]["mean"] < result["dense_macs"]


def test_eval_at_other_ratios_and_with_another_dense_model(capsys, made, tmp_path):
    weights, report = tmp_path / "dense.safetensors", tmp_path / "eval.json"
    dense = tiny_vit()
    torch.nn.init.zeros_(dense.head.weight)
    with torch.no_grad():
        dense.head.bias.copy_(torch.arange(10.0).flip(0))  # always class 0
    safetensors.torch.save_file(dense.state_dict(), weights)
    code, out, err = run(
        capsys,
        *("eval", made / "checkpoint", "--data", made / "data", "--weights", weights),
        *("--keep-ratio", "0.9,0.3", "--limit", "10", "--json", report, *QUICK),
    )
    assert code == 0, err
    assert "dynamicvit 0.3" in out
    first, second = json.loads(report.read_text())["results"]
    assert first["macs"]["mean"] > second["macs"]["mean"]
    assert first["images"] + first["num_unreadable"] == 10
    assert first["dense"] == second["dense"]
    assert first["dense"]["top1"] == pytest.approx(10, abs=2)


def test_eval_takes_batches_where_counts_vary(capsys, made, tmp_path):
    reports = []
    for batch in (1, 4):
        reports.append(tmp_path / f"{batch}.json")
        arguments = ("--data", made / "data", "--limit", "8", "--batch", batch, *QUICK)
        code, out, err = run(capsys, "eval", made / "adaptive", *arguments, "--json", reports[-1])
        assert code == 0, err
        assert "adaptive" in out
    single, together = (json.loads(report.read_text())["results"][0] for report in reports)
    assert together["macs"]["mean"] == pytest.approx(single["macs"]["mean"])
    assert together["sparse"] == single["sparse"]


def test_eval_of_a_dense_model_on_the_embedded_data(capsys, tmp_path):
    from vitrim.train.shipped import DIGITS_ARCHITECTURE, DIGITS_ARGUMENTS

    torch.manual_seed(0)
    weights, report = tmp_path / "digits.safetensors", tmp_path / "eval.json"
    model = tiny_vit(DIGITS_ARCHITECTURE, **DIGITS_ARGUMENTS)
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(half, weights)
    code, out, err = run(
        capsys,
        *("eval", "digits_vit", "--weights", weights, "--data", "digits", "--limit", "20"),
        *("--dtype", "bf16", "--json", report, *QUICK),
    )
    assert code == 0, err
    assert "Accuracy on 20 images" in out
    (result,) = json.loads(report.read_text())["results"]
    assert "sparse" not in result
    assert result["dense_macs"] == pytest.approx(84.7e6, rel=0.01)


def test_eval_sweeps_budgets_by_formula_and_draws(capsys, made, tmp_path):
    pytest.importorskip("matplotlib")
    report, picture = tmp_path / "eval.json", tmp_path / "curve.png"
    code, out, err = run(
        capsys,
        *("eval", made / "checkpoint", "--data", made / "data", "--macs", "0.757,0.5"),
        *("--macs", "0.64", "--json", report, "--plot", picture, *QUICK),
    )
    assert code == 0, err
    assert "dynamicvit at 0.64" in out
    assert "calibrated" not in err
    rows = json.loads(report.read_text())["results"]
    assert [row["budget"] for row in rows] == [0.757, 0.5, 0.64]
    for row in rows:
        assert row["macs"]["mean"] / row["dense_macs"] == pytest.approx(row["budget"], rel=0.01)
        assert (row["dial"], row["set_by"]) == ("keep_ratio", "formula")
        assert row["dense"] == rows[0]["dense"]
    with Image.open(picture) as drawn:
        assert drawn.width > 500


def test_eval_calibrates_what_is_not_recorded(capsys, made, tmp_path):
    report = tmp_path / "eval.json"

    def evaluate(*arguments) -> tuple[list[dict], str]:
        code, _, err = run(
            capsys,
            *("eval", made / "calibrated", "--data", made / "data", "--json", report),
            *(*arguments, *QUICK),
        )
        assert code == 0, err
        return json.loads(report.read_text())["results"], err

    rows, err = evaluate("--macs", "0.7", "--macs", "0.8")
    assert [row["set_by"] for row in rows] == ["record", "record"]  # between two records
    assert "calibrated" not in err
    rows, err = evaluate("--macs", "0.7", "--macs", "0.5")
    assert rows[0]["set_by"] == "record"
    assert rows[1]["set_by"] == f"calibration on 20 images of {made / 'data'}"
    assert rows[1]["macs"]["mean"] / rows[1]["dense_macs"] == pytest.approx(0.5, rel=0.02)
    assert "evaluated too, without their labels" in err
    rows, err = evaluate("--macs", "0.5", "--calibrate-on", made / "data" / "class1")
    assert rows[0]["set_by"].startswith("calibration on 2 images")
    assert "evaluated too" not in err


def test_missing_matplotlib_says_how_to_install(capsys, made, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ("--data", made / "data", "--plot", tmp_path / "curve.png", *QUICK)
    err = fails(capsys, tmp_path, "eval", made / "checkpoint", *arguments)
    assert "pip install 'vitrim[viz]'" in err


# sparsify


def test_sparsify_calibrates_and_records(capsys, dense, made, tmp_path):
    output, report = tmp_path / "sparse", tmp_path / "found.json"
    code, out, err = run(
        capsys,
        *("sparsify", *dense, "--method", "sait", "--data", made / "data" / "class1", *QUICK),
        *("--macs", "0.55", "--macs", "0.7", "--set", "min_kept=0", "-o", output, "--json", report),
    )
    assert code == 0, err
    assert "budget" in out
    assert "of the dense MACs" in err
    sparse = vitrim.from_pretrained(output)
    assert [point.budget for point in sparse.calibration] == [0.55, 0.7]
    assert sparse.config.mass == sparse.calibration[0].value
    assert sparse.config.min_kept == 0
    written = json.loads(report.read_text())
    assert [point["fraction"] for point in written["calibration"]] == [
        pytest.approx(0.55, rel=0.01),
        pytest.approx(0.7, rel=0.01),
    ]
    code, out, err = run(capsys, "info", output)
    assert code == 0, err
    assert "0.7 of dense at mass" in out
    assert "without training" in out


def test_sparsify_takes_semantic_tokens_that_need_no_training(capsys, dense, made, tmp_path):
    words = [*("sparsify", *dense, "--method", "stvit", "--set", "keep_prefix=true"), *QUICK]
    words += ["--set", "semantic_tokens=9", "--macs", "0.9", "--tolerance", "0.1"]
    words += ["--data", made / "data" / "class1", "-o", tmp_path / "out"]
    status, _, errors = run(capsys, *words)
    assert status == 2
    assert "vitrim train stvit-adapt" in errors
    assert run(capsys, *words, "--set", "global_centres=false")[0] == 0
    assert vitrim.from_pretrained(tmp_path / "out").config.keep_prefix


def test_what_drops_nothing_goes_through_every_command(capsys, dense, made, tmp_path):
    output, data = tmp_path / "dense", made / "data" / "class1"
    words = ("sparsify", *dense, "--method", "dense", "--data", data, *QUICK, "-o", output)
    for budget in ("--macs", "0.6"), ("--schedule", tmp_path / "absent.json"):
        assert "dense" in fails(capsys, tmp_path, *words, *budget) or budget[0] == "--schedule"
    quick = ("--rounds", "1", "--seconds", "0", "--device", "cpu")
    report = tmp_path / "report.json"
    for command in (
        words,
        ("info", output),
        ("eval", output, "--data", made / "data", *QUICK),
        ("bench", output, "--batch", "1", "--dtype", "fp32", "--json", report, *quick),
        ("show", output, data, "-o", tmp_path / "shown", "--device", "cpu"),
        ("profile", output, "-o", tmp_path / "table.json", "--points", "2", *quick),
        ("export", output, "--to", "pt2", "--check", "--data", data, "-o", tmp_path / "bundle"),
    ):
        code, out, err = run(capsys, *command)
        assert code == 0, err
        if command[0] == "info":
            assert "exact: what the logits need" in out
            assert "all" in out
    rows = json.loads(report.read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "dense by vitrim"]
    assert rows[1]["macs"] < rows[0]["macs"]
    assert "looks at every patch" in (tmp_path / "shown" / "page.html").read_text()
    message = fails(
        capsys,
        tmp_path,
        *("schedule", *dense, "--method", "dense", "--macs", "0.7", "--data", data, *QUICK),
        *("-o", tmp_path / "schedule.json"),
    )
    assert "dense" in message


def test_sparsify_needs_no_image_for_fixed_counts(capsys, dense, made, tmp_path):
    code, out, err = run(
        capsys,
        *("sparsify", *dense, "--method", "sait", "--set", "selector=density", "--macs", "0.5"),
        *("--data", made / "data", "-o", tmp_path / "sparse", "--tolerance", "0.03", *QUICK),
    )
    assert code == 0, err
    assert "by formula" in out
    sparse = vitrim.from_pretrained(tmp_path / "sparse")
    assert sparse.macs() / sparse.dense_macs() == pytest.approx(0.5, rel=0.03)


def test_merging_needs_no_images(capsys, dense, tmp_path):
    words = ("sparsify", *dense, "--macs", "0.7", "--tolerance", "0.05", "--device", "cpu")
    code, out, err = run(capsys, *words, "--method", "merging", "-o", tmp_path / "out")
    assert code == 0, err
    assert "by formula" in out
    assert "keep_ratio" in out
    sparse = vitrim.from_pretrained(tmp_path / "out")
    assert sparse.macs() / sparse.dense_macs() == pytest.approx(0.7, rel=0.05)
    message = fails(capsys, tmp_path, *words, "--method", "asvit", "-o", tmp_path / "new")
    assert "give some with --data" in message


# budgets in milliseconds


@pytest.fixture
def table(tmp_path) -> Path:
    """A latency table of the small dense model."""
    times = table_of(tiny_vit(patch_size=4))
    times.save(tmp_path / "table.json")
    return tmp_path / "table.json"


def test_a_schedule_is_found_and_followed(capsys, dense, made, table, tmp_path):
    file, data = tmp_path / "schedule.json", ("--data", made / "data", *QUICK)
    budget = ("--milliseconds", "6", "--table", table)
    code, out, err = run(capsys, "schedule", *dense, *data, *budget, "--stages", "2", "-o", file)
    assert code == 0, err
    assert "of 64 patches go on" in out
    assert "broken.png" in err
    schedule = load_schedule(file)
    assert schedule.asked == {"milliseconds": 6.0}
    assert schedule.milliseconds <= 6
    assert schedule.table["runtime"] == "torch"
    output = tmp_path / "sparse"
    code, out, err = run(capsys, "sparsify", *dense, *data, "--schedule", file, "-o", output)
    assert code == 0, err
    assert vitrim.from_pretrained(output).method.stages == schedule.stages
    recorded = json.loads((output / "config.json").read_text())["metrics"]
    assert recorded == {"schedule": to_plain(schedule)}
    arguments = ("--macs", "0.7", "--procedure", "progressive", "--signal", "attention")
    code, out, err = run(capsys, "schedule", *dense, *data, *arguments, "-o", file)
    assert code == 0, err
    assert load_schedule(file).macs <= 0.7


def test_a_schedule_of_merging_is_found_and_followed(capsys, dense, made, table, tmp_path):
    file, output = tmp_path / "schedule.json", tmp_path / "sparse"
    budget = ("--milliseconds", "6", "--table", table)
    words = ("schedule", *dense, "--method", "merging", *budget, "-o", file)
    code, out, err = run(capsys, *words, "--data", made / "data", *QUICK)
    assert code == 0, err
    assert "patches go on" in out
    assert ", merged" in out or "dropped" in out
    schedule = load_schedule(file)
    assert len(schedule.actions) == len(schedule.stages)
    words = ("sparsify", *dense, "--method", "merging", "--schedule", file, "--device", "cpu")
    code, out, err = run(capsys, *words, *budget, "-o", output)
    assert code == 0, err
    assert "its counts" in out
    sparse = vitrim.from_pretrained(output)
    assert sparse.config.action == schedule.actions
    assert sparse.method.counts(sparse.family, (8, 8)) == schedule.counts
    words += ("-o", tmp_path / "other")
    assert "leave that out" in fails(capsys, tmp_path, *words, "--macs", "0.6")
    words = ("sparsify", *dense, *budget, "--device", "cpu", "-o", tmp_path / "free", "--method")
    code, out, err = run(capsys, *words, "merging")
    assert code == 0, err
    assert "keep_ratio" in out
    words = (*words[:-2], tmp_path / "none", "--method")
    assert "depend on the images" in fails(capsys, tmp_path, *words, "asvit")


@pytest.mark.parametrize("method", ["asvit", "sait"])
def test_sparsify_meets_milliseconds_and_records_them(capsys, dense, made, table, tmp_path, method):
    output, report = tmp_path / "sparse", tmp_path / "report.json"
    code, out, err = run(
        capsys,
        *("sparsify", *dense, "--method", method, "--data", made / "data", *QUICK),
        *("--milliseconds", "6", "--table", table, "-o", output, "--json", report),
    )
    assert code == 0, err
    assert "6 ms" in out
    latency = json.loads((output / "config.json").read_text())["metrics"]["latency"]
    assert latency["asked"] == 6
    assert latency["predicted"] == pytest.approx(6, rel=0.05)
    assert latency["table"]["cpu"] == cpu_name()
    assert json.loads(report.read_text())["latency"] == latency
    assert vitrim.from_pretrained(output).calibration


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--milliseconds", "6"], "needs --table"),
        (["--table", "TABLE", "--macs", "0.5"], "--table is for --milliseconds"),
        (["--milliseconds", "6", "--table", "TABLE", "--macs", "0.5"], "two budgets"),
        (["--milliseconds", "1", "--table", "TABLE"], "under the floor"),
        (["--milliseconds", "60", "--table", "TABLE"], "asks for nothing: the dense model takes"),
        (["--milliseconds", "6", "--table", "TABLE", "--runtime", "openvino"], "runtime 'torch'"),
        (["--milliseconds", "6", "--table", "ABSENT"], "is no file"),
        (["--schedule", "ABSENT"], "is no file"),
        (["--schedule", "TABLE"], "is no schedule"),
    ],
)
def test_bad_budgets_in_milliseconds(capsys, dense, made, table, tmp_path, words, message):
    places = {"TABLE": table, "ABSENT": tmp_path / "absent.json"}
    words = [places.get(word, word) for word in words]
    command = ("sparsify", *dense, "--data", made / "data", "-o", tmp_path / "out", *QUICK)
    assert message in fails(capsys, tmp_path, *command, *words)


def test_a_table_of_another_machine_must_be_meant(capsys, dense, made, table, tmp_path):
    content = json.loads(table.read_text())
    content["stamp"]["cpu"] = "a phone's"
    table.write_text(json.dumps(content))
    command = ["schedule", *dense, "--data", made / "data", "--milliseconds", "6"]
    command += ["--table", table, *QUICK, "-o", tmp_path / "schedule.json"]
    assert "a phone's" in fails(capsys, tmp_path, *command)
    assert run(capsys, *command, "--elsewhere")[0] == 0


# bench


def test_bench_at_budgets_on_images(capsys, made, tmp_path):
    report = tmp_path / "bench.json"
    quick = ("--rounds", "1", "--seconds", "0", "--dtype", "fp32", "--device", "cpu")
    code, _, err = run(
        capsys,
        *("bench", made / "calibrated", "--macs", "0.7,0.85", "--batch", "1,4", *quick),
        *("--data", made / "data", "--json", report),
    )
    assert code == 0, err
    rows = json.loads(report.read_text())["rows"]
    assert [row["name"] for row in rows[:3]] == ["dense", "sait at 0.7", "sait at 0.85"]
    assert {row["batch"] for row in rows} == {1, 4}
    for row in rows[3:]:
        share = float(row["name"].rpartition(" ")[2]) if row["name"] != "dense" else 1
        assert row["macs"] / rows[0]["macs"] == pytest.approx(share, rel=0.05)


def test_bench_of_a_checkpoint(capsys, made, tmp_path):
    report = tmp_path / "bench.json"
    quick = ("--rounds", "2", "--seconds", "0", "--threads", "1", "--device", "cpu")
    code, out, err = run(
        capsys, "bench", made / "checkpoint", "--batch", "1,2", "--json", report, *quick
    )
    assert code == 0, err
    assert "efficiency" in out
    written = json.loads(report.read_text())
    assert written["command"].split()[0] == "vitrim"
    assert [row["name"] for row in written["rows"]] == ["dense", "dynamicvit 0.6"] * 4
    assert {(row["dtype"], row["batch"]) for row in written["rows"]} == {
        (dtype, batch) for dtype in ("fp32", "bf16") for batch in (1, 2)
    }
    assert all(row["hardware"]["threads"] == 1 for row in written["rows"])


def test_what_results_are_called():
    """By the setting that says what a model costs, in as many digits as tell settings apart."""
    config = vitrim.MergingConfig()
    sparse = vitrim.sparsify(tiny_vit(), config)
    assert setting_name(sparse) == "merging 0.7"
    sparse.set_keep_ratio(1 / 1.2)
    assert setting_name(sparse) == "merging 0.833333"
    sparse.set_keep_ratio((0.9, 0.75, 0.6))
    assert setting_name(sparse) == "merging 0.9, 0.75, 0.6"
    tome = vitrim.sparsify(tiny_vit(), vitrim.MergingConfig.tome(3))
    assert setting_name(tome) == "merging, merged_per_block 3"


def test_bench_of_a_timm_name_with_random_predictors(capsys, tmp_path):
    report = tmp_path / "bench.json"
    quick = ("--rounds", "1", "--seconds", "0", "--dtype", "fp32", "--batch", "1")
    code, _, err = run(
        capsys,
        *("bench", "vit_tiny_patch16_224", "--image-size", "64", "--method", "dynamicvit"),
        *("--keep-ratio", "0.7,0.5", "--json", report, "--device", "cpu", *quick),
    )
    assert code == 0, err
    rows = json.loads(report.read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "dynamicvit 0.7", "dynamicvit 0.5"]
    assert rows[0]["image_shape"] == [3, 64, 64]
    assert rows[0]["macs"] > rows[1]["macs"] > rows[2]["macs"]


# show


def test_show_draws_images_and_a_page(capsys, made, tmp_path):
    single = made / "data" / "class1" / "0.png"
    output = tmp_path / "shown"
    code, out, err = run(
        capsys,
        *("show", made / "checkpoint", single, made / "data" / "class3", "-o", output),
        *("--device", "cpu"),
    )
    assert code == 0, err
    assert "3 images drawn" in out
    assert "broken.png" in err
    assert "1 unreadable" in err
    pictures = sorted(path.name for path in output.iterdir())
    assert pictures == ["001_0.png", "002_0.png", "003_1.png", "page.html"]
    with Image.open(output / "001_0.png") as strip:
        assert strip.width > 4 * strip.height / 2
    page = (output / "page.html").read_text()
    assert page.count("data:image/png;base64") == 12


def test_show_takes_the_embedded_data_and_adaptive_models(capsys, made, tmp_path):
    sparse = vitrim.sparsify(tiny_vit(img_size=64, patch_size=16), DynamicViTConfig(threshold=0.4))
    sparse.save_pretrained(tmp_path / "checkpoint")
    output = tmp_path / "shown"
    arguments = ("digits", "-o", output, "--limit", "2", "--device", "cpu")
    code, _, err = run(capsys, "show", tmp_path / "checkpoint", *arguments)
    assert code == 0, err
    assert len(list(output.glob("00*.png"))) == 2


def test_show_at_a_budget(capsys, made, tmp_path):
    image = made / "data" / "class1" / "0.png"
    for name, budget in (("calibrated", "0.7"), ("calibrated", "0.85")):
        words = ("show", made / name, image, "-o", tmp_path / budget, "--macs", budget)
        code, _, err = run(capsys, *words, "--device", "cpu")
        assert code == 0, err
    strips = [(tmp_path / budget / "001_0.png").read_bytes() for budget in ("0.7", "0.85")]
    assert strips[0] != strips[1]


# list, info, convert, train


def test_list_methods_and_recipes(capsys):
    code, out, _ = run(capsys, "list", "methods")
    assert code == 0
    assert "dynamicvit" in out
    assert "keep_ratio" in out
    code, out, _ = run(capsys, "list", "recipes")
    assert code == 0
    assert "digits-dynamicvit" in out


def test_list_capabilities(capsys):
    code, out, _ = run(capsys, "list", "capabilities")
    assert code == 0
    assert "spvit_pyramid" in out
    assert "convnext" in out
    assert "ConvNeXt has none" in " ".join(out.split())


@pytest.mark.parametrize(
    ("pattern", "served"),
    [
        ("pit_ti*", ["pit_ti_224", "pit_ti_distilled_224"]),
        ("lvvit*", ["lvvit_m", "lvvit_s"]),
        ("swin_*tiny*", ["swin_s3_tiny_224", "swin_tiny_patch4_window7_224"]),
        ("conv*_tiny", ["conv_stem_swin_tiny", "convnext_tiny"]),
        ("swinv2*tiny_ns*", ["swinv2_cr_tiny_ns_224"]),
        ("vit_tiny*dinov3*", ["vit_tiny_patch16_dinov3_qkvb"]),
    ],
)
def test_list_models_of_every_family(capsys, pattern, served):
    code, out, _ = run(capsys, "list", "models", pattern)
    assert code == 0
    assert out.split() == served


def test_list_models_holds_only_what_is_served(capsys):
    code, out, _ = run(capsys, "list", "models", "vit_little_patch16_reg*")
    assert code == 0
    assert "vit_little_patch16_reg4_gap_256" in out
    code, out, _ = run(capsys, "list", "models", "vit_base_patch16_xp_224")
    assert code == 0
    assert out == ""


def test_list_models_summary(capsys):
    code, out, err = run(capsys, "list", "models", "*_tiny*patch16*", "--summary")
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines() if "deit" in line] == [["deit", "2", "2"]]
    assert "models of this kind" in err
    code, out, _ = run(capsys, "list", "models", "cait_s24*", "--summary")
    assert "use deit3" in " ".join(out.split())


def test_info(capsys, made):
    code, out, err = run(capsys, "info", made / "checkpoint")
    assert code == 0, err
    for expected in ("vit_tiny_patch16_224", "dynamicvit", "0.6", "a test", "12.5", "of dense"):
        assert expected in out
    assert "exact: what the logits need" in out
    code, out, _ = run(capsys, "info", made / "adaptive")
    assert code == 0
    assert "depends on the image" in out


def test_convert(capsys, tmp_path):
    case = golden("dynamicvit_deit-s_r0.7_eval")
    torch.save({"model": golden_weights(case)}, tmp_path / "authors.pth")
    output = tmp_path / "converted"
    code, out, err = run(
        capsys,
        *("convert", tmp_path / "authors.pth", "--from", "dynamicvit", "--keep-ratio", "0.5"),
        *("--stages", ",".join(map(str, case["config"]["stages"])), "-o", output)
        if "stages" in case.get("config", {})
        else ("-o", output),
    )
    assert code == 0, err
    assert str(output) in out
    assert vitrim.from_pretrained(output).config.keep_ratio == 0.5


def test_train_by_a_recipe_with_changes(capsys, made, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        """
        name = "tiny"
        [model]
        name = "vit_tiny_patch16_224"
        [model.kwargs]
        img_size = 32
        patch_size = 8
        embed_dim = 32
        depth = 4
        num_heads = 2
        num_classes = 10
        [method]
        name = "dynamicvit"
        [data]
        train = "nowhere"
        batch_size = 8
        workers = 0
        max_unreadable = 0.5
        [augment]
        none = true
        [run]
        epochs = 1
        """
    )
    output = tmp_path / "run"
    code, out, err = run(
        capsys,
        *("train", recipe, "-o", output, "--data", made / "data"),
        *("--set", "method.keep_ratio=0.55", "--set", "run.tensorboard=false"),
    )
    assert code == 0, err
    assert str(output) in out.replace("\n", "")
    assert vitrim.from_pretrained(output / "checkpoint").config.keep_ratio == 0.55


# what strangers wrote


def test_control_characters_are_never_printed(capsys, made, tmp_path):
    evil = "\x1b]0;owned\x07 \x9b31m [bold]x[/nothing] :cat:"
    sparse = vitrim.sparsify(tiny_vit(), DynamicViTConfig(keep_ratio=0.6))
    sparse.save_pretrained(tmp_path / "evil", metrics={evil: evil}, origin=evil)
    code, out, err = run(capsys, "info", tmp_path / "evil")
    assert code == 0, err
    assert out.replace("\n", "").isprintable()
    assert r"\x1b]0;owned\x07 \x9b31m [bold]x[/nothing] :cat:" in out
    err = fails(capsys, tmp_path, "info", tmp_path / evil)
    assert err.replace("\n", "").isprintable()
    folder = tmp_path / evil.replace("/", "")
    folder.mkdir()
    Image.new("RGB", (40, 40)).save(folder / f"{evil[:9]}\udcff\n{'long' * 50}.png")
    (folder / "\x1b.png").write_bytes(b"?")
    output = folder / "shown"
    code, out, err = run(
        capsys, "show", made / "checkpoint", folder, "-o", output, "--device", "cpu"
    )
    assert code == 0, err
    assert (out + err).replace("\n", "").isprintable()
    (strip,) = (path.name for path in output.glob("*.png"))
    assert strip.startswith("001__x1b_0_owned_udcff_long")
    assert len(strip) < 60
    assert (output / "page.html").is_file()


@pytest.mark.parametrize("spoilt", ["head", "selector"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_answers_that_mean_nothing_are_errors(
    capsys, monkeypatch, made, tmp_path, spoilt, adaptive
):
    """Of finite weights, which load; this vitrim would not have saved them."""
    config = DynamicViTConfig(threshold=0.5) if adaptive else DynamicViTConfig(keep_ratio=0.6)
    sparse = vitrim.sparsify(tiny_vit(), config)
    with torch.no_grad():
        for parameter in (sparse.backbone.head if spoilt == "head" else sparse.method).parameters():
            parameter.fill_(3e38)
    monkeypatch.setattr("vitrim.model.check_rebuilt", lambda *_: None)
    sparse.save_pretrained(tmp_path / "spoilt")
    output = ("-o", tmp_path / "out")
    bench = ("--batch", "1", "--dtype", "fp32", "--rounds", "1", "--seconds", "0")
    commands = [
        ("info", tmp_path / "spoilt"),
        ("bench", tmp_path / "spoilt", *bench),
        ("bench", tmp_path / "spoilt", *bench, "--data", made / "data" / "class1"),
        ("show", tmp_path / "spoilt", made / "data", *output, "--device", "cpu"),
    ]
    for command in commands:
        assert "hold NaN or infinity" in fails(capsys, tmp_path, *command)


@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_an_export_of_nan_is_an_error(capsys, monkeypatch, made, tmp_path, to):
    pytest.importorskip("onnxscript")
    sparse = vitrim.sparsify(tiny_vit(), DynamicViTConfig(keep_ratio=0.6))
    with torch.no_grad():
        sparse.backbone.head.weight.fill_(3e38)
    monkeypatch.setattr("vitrim.model.check_rebuilt", lambda *_: None)
    sparse.save_pretrained(tmp_path / "spoilt")
    words = ("--check", "--data", made / "data", "--images", "4", "-o", tmp_path / "out")
    code, _, err = run(capsys, "export", tmp_path / "spoilt", "--to", to, *words)
    assert code == 2
    assert "hold NaN or infinity" in err


def test_what_is_logged_is_printable():
    from vitrim.cli import _Printable

    record = logging.LogRecord("x", 30, "f", 1, "left out %s", ("a\x1b]0;x\x07\x9b31m",), None)
    assert _Printable("%(message)s").format(record).isprintable()


def test_a_difference_that_is_no_number_is_refused():
    from vitrim.cli.export import DifferentAnswerError, _refuse_other_answers
    from vitrim.export.bundle import Check

    with pytest.raises(DifferentAnswerError):
        _refuse_other_answers(Check(1, float("nan"), 1.0), Path("x"))


@pytest.mark.parametrize("words", [["info", "x"], ["predict", "x", "y"]])
def test_an_interrupted_command_ends_without_a_word(capsys, monkeypatch, words):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vitrim.cli._app", interrupt)
    monkeypatch.setattr("vitrim.predict.main", interrupt)
    assert run(capsys, *words) == (130, "", "")


def test_an_interrupted_import_ends_without_a_word():
    code = (
        "import importlib.util, sys; sys.argv[0] = 'vitrim'\n"
        "def interrupt(*_): raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, type('Interrupt', (), {'find_spec': lambda self, name, *_: "
        "interrupt() if name == 'vitrim.budget' else None})())\n"
        "import vitrim"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")
    done = subprocess.run(
        [sys.executable, "-c", code.replace("'vitrim'\n", "'python'\n")], capture_output=True
    )
    assert b"KeyboardInterrupt" in done.stderr


# failures


def test_wrong_checkpoints_are_named(capsys, made, tmp_path):
    def refused(name: str) -> str:
        return fails(capsys, tmp_path, "eval", tmp_path / name, "--data", made / "data")

    (tmp_path / "empty").mkdir()
    assert "no vitrim checkpoint" in refused("empty")
    assert "neither a checkpoint folder" in refused("absent")
    for name in ("truncated", "pickle", "other", "ratio", "stages", "key", "size"):
        (tmp_path / name).mkdir()
        for path in (made / "checkpoint").iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    whole = (made / "checkpoint" / "model.safetensors").read_bytes()
    (tmp_path / "truncated" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused("truncated")
    (tmp_path / "pickle" / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    assert "pickle" in refused("pickle")
    (tmp_path / "file.pth").write_bytes(pickle.dumps({"a": 1}))
    assert "vitrim convert" in refused("file.pth")
    other = vitrim.sparsify(tiny_vit(depth=3), DynamicViTConfig(stages=(1, 2)))
    safetensors.torch.save_file(other.state_dict(), tmp_path / "other" / "model.safetensors")
    assert "digest" in refused("other")
    forge(tmp_path / "other", lambda config: None)
    assert "does not fit" in refused("other")
    changes = {
        "ratio": ({"keep_ratio": 1.5}, "(0, 1]"),
        "stages": ({"stages": [1, 2, 9]}, "outside"),
        "key": ({"keep_ration": 0.5}, "did you mean 'keep_ratio'"),
    }
    forge(tmp_path / "size", lambda config: config["data"].pop("input_size"))
    assert "input_size" in refused("size")
    for name, (change, message) in changes.items():
        forge(tmp_path / name, lambda config, c=change: config["method"]["config"].update(c))
        assert message in refused(name)


def test_wrong_data_are_named(capsys, made, tmp_path):
    def refused(*arguments) -> str:
        return fails(capsys, tmp_path, "eval", made / "checkpoint", *arguments, *QUICK)

    (tmp_path / "nothing").mkdir()
    assert "nothing to read" in refused("--data", tmp_path / "nothing")
    assert "does not exist" in refused("--data", tmp_path / "absent")
    (tmp_path / "hole" / "cat").mkdir(parents=True)
    (tmp_path / "hole" / "dog").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "hole" / "cat" / "a.png")
    assert "dog" in refused("--data", tmp_path / "hole")
    Image.new("RGB", (40, 40)).save(tmp_path / "hole" / "dog" / "a.png")
    report = ("--json", tmp_path / "eval.json")
    assert "2 classes" in refused("--data", tmp_path / "hole", *report)
    for label in range(10):
        (tmp_path / "broken" / str(label)).mkdir(parents=True)
        (tmp_path / "broken" / str(label) / "x.png").write_bytes(b"?")
    assert "not one image" in refused("--data", tmp_path / "broken", *report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "deit_tny", "--data", "x"], "did you mean deit_tiny_patch16_224"),
        (["eval", "CKPT", "--data", "DATA", "--keep-ratio", "1.5"], "(0, 1]"),
        (["eval", "CKPT", "--data", "DATA", "--keep-ratio", "half"], "expected numbers"),
        (["eval", "CKPT", "--data", "DATA", "--dtype", "bf61"], "did you mean 'bf16'"),
        (["eval", "CKPT", "--data", "DATA", "--device", "gpu"], "device is 'gpu'"),
        (["eval", "CKPT", "--data", "DATA", "--json", "TMP/a/b.json"], "does not exist"),
        (["eval", "CKPT", "--data", "DATA", "--weights", "TMP/none"], "does not exist"),
        (["bench", "vit_tiny_patch16_224", "--method", "dynamcvit"], "did you mean 'dynamicvit'"),
        (["bench", "vit_tiny_patch16_224", "--keep-ratio", "0.5"], "--method"),
        (["bench", "CKPT", "--method", "dynamicvit"], "has a method"),
        (["bench", "CKPT", "--image-size", "64"], "fixed"),
        (["bench", "CKPT", "--batch", "0"], "at least 1"),
        (["bench", "CKPT", "--dtype", "fp23"], "did you mean 'fp32'"),
        (["eval", "CKPT", "--data", "DATA", "--macs", "1.5"], "at most 1"),
        (["eval", "CKPT", "--data", "DATA", "--macs", "half"], "expected numbers"),
        (["eval", "CKPT", "--data", "DATA", "--macs", "0.01"], "out of reach"),
        (["eval", "CKPT", "--data", "DATA", "--macs", ".5", "--keep-ratio", ".5"], "one of them"),
        (["eval", "CKPT", "--data", "DATA", "--plot", "TMP/curve.txt"], "no name of a picture"),
        (["eval", "CAL", "--data", "DATA", "--macs", ".5", "--calibrate-on", "TMP/x"], "not exist"),
        (["eval", "CAL", "--data", "DATA", "--macs", "0.1"], "out of reach"),
        (["eval", "digits_vit", "--data", "digits", "--macs", "0.5"], "dense model"),
        (["eval", "digits_vit", "--data", "digits", "--plot", "TMP/x.png"], "dense model"),
        (["bench", "CAL", "--macs", "0.3"], "vitrim.calibrate"),
        (["bench", "CKPT", "--macs", "0.5", "--keep-ratio", "0.5"], "one of them"),
        (["bench", "vit_tiny_patch16_224", "--macs", "0.5"], "--method"),
        ([*SPARSIFY, "dynamicvit", "--macs", "0.5"], "vitrim train dynamicvit-adapt"),
        ([*SPARSIFY, "spvit", "--macs", "0.5"], "must learn"),
        ([*SPARSIFY, "stvit", "--macs", "0.5"], "must learn"),
        ([*SPARSIFY, "siat", "--macs", "0.5"], "did you mean 'sait'"),
        ([*SPARSIFY, "sait"], "no budget"),
        ([*SPARSIFY, "sait", "--macs", "1.5"], "at most 1"),
        ([*SPARSIFY, "sait", "--macs", "0.1"], "gives 0."),
        ([*SPARSIFY, "sait", "--macs", "0.5", "--set", "mas=1"], "did you mean 'mass'"),
        ([*SPARSIFY, "sait", "--macs", "0.5", "--set", "mass"], "FIELD=VALUE"),
        ([*SPARSIFY, "sait", "--macs", "0.5", "--set", "selector=dense"], "dense"),
        ([*SPARSIFY, "sait", "--macs", "0.5", "-o", "EVIL"], "is a file"),
        ([*SPARSIFY, "sait", "--macs", "0.5", "--data", "TMP/none"], "does not exist"),
        ([*SPARSIFY, "sait", "--macs", "0.5", "--weights", "TMP/none"], "does not exist"),
        (["sparsify", "CAL", *SPARSIFY[2:], "sait", "--macs", "0.5"], "sparse already"),
        (["show", "CKPT", "TMP/none.png", "-o", "TMP/out"], "does not exist"),
        (["show", "CKPT", "DATA/class3/broken.png", "-o", "TMP/out"], "not one image"),
        (["show", "CKPT", "DATA", "-o", "TMP/out", "--keep-ratio", "0"], "(0, 1]"),
        (["show", "CAL", "DATA", "-o", "TMP/out", "--macs", "0.1"], "no calibration reaches"),
        (["show", "CKPT", "DATA", "-o", "TMP/out", "--macs", "2"], "at most 1"),
        (
            ["show", "CKPT", "DATA", "-o", "TMP/out", "--macs", "0.7", "--keep-ratio", "0.7"],
            "give one of them",
        ),
        (["info", "TMP"], "no vitrim checkpoint"),
        (["train", "digits-dynamicvt", "-o", "TMP/out"], "did you mean 'digits-dynamicvit'"),
        (["train", "digits-dynamicvit", "-o", "TMP/out", "--set", "method.name=dynamcvit"], "mean"),
        (["train", "digits-dynamicvit", "-o", "TMP/out", "--set", "method.kep=1"], "unknown key"),
        (["train", "digits-dynamicvit", "-o", "TMP/out", "--set", "x"], "no override"),
        (["convert", "TMP/none.pth", "--from", "dynamicvit", "-o", "TMP/out"], "is no file"),
        (["convert", "EVIL", "--from", "dynamicvit", "-o", "TMP/out"], "refuses to run"),
        (["list", "models", "resnet*"], "no vision transformer"),
        (["demo", "-o", "EVIL"], "is a file"),
        (["show", "CKPT", "DATA", "-o", "EVIL"], "is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_wrong_input_gives_one_clear_message(capsys, made, tmp_path, arguments, message):
    class Evil:
        def __reduce__(self):
            return (print, ("code was run",))

    evil = tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps({"model": Evil()}))
    places = {
        "CKPT": str(made / "checkpoint"),
        "CAL": str(made / "calibrated"),
        "DATA": str(made / "data"),
        "TMP": str(tmp_path),
        "EVIL": str(evil),
    }
    words = []
    for word in arguments:
        head, slash, tail = word.partition("/")
        words.append(places.get(head, head) + slash + tail)
    takes_quick = words[0] in ("eval", "sparsify") and "--device" not in words
    quick = QUICK if takes_quick else []
    assert message in fails(capsys, tmp_path, *words, *quick)


def test_debug_shows_where_an_error_was_raised(capsys, tmp_path):
    with pytest.raises(vitrim.CheckpointError):
        main(["info", str(tmp_path), "--debug"])
    with pytest.raises(vitrim.CheckpointError):
        main(["--debug", "info", str(tmp_path)])


def test_debug_traceback_and_exit_code_of_the_process(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "vitrim", "info", str(tmp_path)]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    assert plain.returncode == 2
    assert plain.stderr.startswith("vitrim: error: ")
    assert len(plain.stderr.splitlines()) == 1
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, check=False)
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    assert "CheckpointError" in debug.stderr


def test_usage_errors_exit_with_2(capsys):
    code, _, err = run(capsys, "eval")
    assert code == 2
    assert "Missing" in err
    assert run(capsys, "--help")[0] == 0


def test_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert f"vitrim {vitrim.__version__}" in out


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_missing_packages_say_how_to_install(capsys, monkeypatch, package):
    for name in list(sys.modules):
        if name == package or name.startswith(("vitrim.cli.", f"{package}.")):
            monkeypatch.delitem(sys.modules, name)
            if name.startswith("vitrim.cli."):
                monkeypatch.delattr(vitrim.cli, name.rpartition(".")[2], raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run(capsys, "info", "x")
    assert code == 2
    assert "pip install 'vitrim[cli]'" in err
