"""Whole runs: learning, going on after a kill, several processes, guards, results."""

from __future__ import annotations

import json
import math
import signal

import pytest
import safetensors.torch
import torch

import vitrim
from tests.training import TINY, curve, quiet, run_script, tiny_recipe, write_images
from vitrim import InputError, TrainingError, VitrimError
from vitrim.train.backbone import create_dense
from vitrim.train.devices import accelerator_of, native
from vitrim.train.engine import train
from vitrim.train.recipe import load_recipe
from vitrim.train.state import load_state, save_state

LEARNS = {"run__epochs": 10, "optim__lr": 3e-3, "data__batch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "train")


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "val", per_class=5)


def test_a_sparse_run_learns_and_its_checkpoint_opens(folder, validation, tmp_path):
    recipe = tiny_recipe(folder, data__val=str(validation), **LEARNS)
    result = train(recipe, tmp_path / "run", on_progress=quiet)
    steps = [line for line in curve(tmp_path / "run") if "total" in line]
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert {"ratio", "classification", "distill", "token", "lr", "grad_norm"} <= steps[0].keys()
    assert steps[-1]["classification"] < 0.5 * steps[0]["classification"]
    assert result.metrics["val_top1"] == 100
    assert result.metrics["val_images"] == 10
    sparse = vitrim.from_pretrained(tmp_path / "run" / "checkpoint")
    config = json.loads((tmp_path / "run" / "checkpoint" / "config.json").read_text())
    assert config["metrics"] == result.metrics
    assert config["origin"] == "recipe tiny, from vit_tiny_patch16_224"
    assert config["data"]["input_size"] == [3, 32, 32]
    assert sparse.macs() < sparse.dense_macs()
    measured = [line for line in curve(tmp_path / "run") if "val_top1" in line]
    assert [line["epoch"] for line in measured] == list(range(10))


def test_a_dense_run_learns_and_its_weights_open(folder, tmp_path):
    recipe = tiny_recipe(folder, method__name=None, **LEARNS)
    train(recipe, tmp_path / "run", on_progress=quiet)
    steps = curve(tmp_path / "run")
    assert steps[-1]["total"] < 0.5 * steps[0]["total"]
    weights = str(tmp_path / "run" / "backbone.safetensors")
    start = tiny_recipe(folder, model__weights=weights).model
    state = create_dense(start, seed=1).state_dict()
    saved = safetensors.torch.load_file(weights)
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    made = json.loads((tmp_path / "run" / "backbone.json").read_text())
    assert made["backbone"]["kwargs"]["embed_dim"] == TINY["embed_dim"]
    assert made["recipe"]["run"]["epochs"] == 10
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_unlabelled_training_learns_from_the_teacher_alone(folder, tmp_path):
    recipe = tiny_recipe(folder / "class_0", data__labels=False, run__epochs=4)
    train(recipe, tmp_path / "run", on_progress=quiet)
    assert set(curve(tmp_path / "run")[0]) >= {"ratio", "distill", "token"}
    assert not any("classification" in line for line in curve(tmp_path / "run"))


KILLED = """
def kill(record):
    if record["step"] == 6:  # the last state is that of step 4, an epoch has 4 steps
        os.kill(os.getpid(), signal.SIGKILL)

train(recipe, folder / "whole", on_progress=lambda record: None)
train(recipe, folder / "killed", on_progress=kill)
"""
RESUMED = 'train(recipe, folder / "killed", on_progress=lambda record: None)'


def test_killed_in_mid_epoch_and_resumed_gives_the_same_curve(folder, validation, tmp_path):
    """Everything random is on; the second part even reads its images in another process."""
    changes = {
        "model__kwargs": TINY | {"drop_path_rate": 0.2, "proj_drop_rate": 0.1},
        "data__val": str(validation),
        "augment__none": False,
        "augment__rand_augment": "rand-m9-mstd0.5-inc1",
        "augment__random_erase": 0.5,
        "augment__mixup": 0.8,
        "augment__cutmix": 1.0,
        "augment__label_smoothing": 0.1,
        "optim__ema_decay": 0.9,
        "optim__clip_grad": 1.0,
        "run__checkpoint_steps": 2,
        "run__epochs": 3,
    }
    killed = run_script(KILLED, tiny_recipe(folder, **changes), tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert curve(tmp_path / "killed")[-1]["step"] == 6
    assert load_state(tmp_path / "killed")["step"] == 4
    resumed = run_script(RESUMED, tiny_recipe(folder, data__workers=1, **changes), tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "whole")) == 12 + 3
    results = [
        safetensors.torch.load_file(tmp_path / run / "checkpoint" / "model.safetensors")
        for run in ("whole", "killed")
    ]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_two_processes_give_what_one_gives(folder, validation, tmp_path):
    """The same global batches; what the batch normalises together (token loss) is off."""
    changes = {
        "method__sampling": "argmax",
        "method__token_weight": 0.0,
        "data__val": str(validation),
        "run__epochs": 2,
    }
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = 'train(recipe, folder / "run", on_progress=lambda record: None)'
    two = tiny_recipe(folder, data__batch_size=4, **changes)
    done = run_script(script, two, tmp_path / "two", *launcher)
    assert done.returncode == 0, done.stderr
    one = tiny_recipe(folder, data__batch_size=8, **changes)
    result = train(one, tmp_path / "one", on_progress=quiet)
    lines, expected = curve(tmp_path / "two" / "run"), curve(tmp_path / "one")
    assert len(lines) == len(expected) == 6
    for line, wanted in zip(lines, expected, strict=True):
        for name in wanted.keys() - {"token"}:
            assert line[name] == pytest.approx(wanted[name], abs=1e-5), (line, wanted)
    assert result.metrics["val_images"] == 10


def test_accumulation_equals_the_bigger_batch(folder, tmp_path):
    changes = {"method__name": None, "optim__lr_batch": 16, "optim__clip_grad": 0.5}
    big = tiny_recipe(folder, data__batch_size=8, **changes)
    small = tiny_recipe(folder, data__batch_size=4, optim__accumulate=2, **changes)
    train(big, tmp_path / "big", on_progress=quiet)
    train(small, tmp_path / "small", on_progress=quiet)
    for line, expected in zip(curve(tmp_path / "small"), curve(tmp_path / "big"), strict=True):
        assert line == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("found", "expected"),
    [({}, "fp32"), ({"avx512_bf16": False}, "fp32"), ({"amx_bf16": True}, "bf16")],
)
def test_automatic_precision_is_what_the_processor_has(found, expected, monkeypatch):
    """Without its instructions bf16 takes twenty times as long."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert native(cpu=True) == expected
    with accelerator_of("auto") as accelerator:
        if accelerator.device.type == "cpu":
            assert accelerator.mixed_precision == expected.replace("fp32", "no")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns(folder, tmp_path, precision):
    recipe = tiny_recipe(folder, run__precision=precision, **LEARNS)
    train(recipe, tmp_path / "run", on_progress=quiet)
    steps = curve(tmp_path / "run")
    assert steps[-1]["classification"] < 0.7 * steps[0]["classification"]
    assert all(line["distill"] >= 0 for line in steps)
    weights = safetensors.torch.load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    # The precision of one run is not that of the next in the same process.
    train(tiny_recipe(folder, run__epochs=1), tmp_path / "next", on_progress=quiet)


def test_the_average_is_what_is_saved(folder, tmp_path):
    for decay in (0.0, 0.5):
        recipe = tiny_recipe(folder, optim__ema_decay=decay)
        train(recipe, tmp_path / str(decay), on_progress=quiet)
    last = load_state(tmp_path / "0.0")["model"]
    followed = vitrim.from_pretrained(tmp_path / "0.0" / "checkpoint").state_dict()
    averaged = vitrim.from_pretrained(tmp_path / "0.5" / "checkpoint").state_dict()
    name = "backbone.blocks.0.attn.qkv.weight"
    torch.testing.assert_close(followed[name], last[name])
    assert torch.equal(averaged[name], load_state(tmp_path / "0.5")["average"][name])
    assert not torch.equal(averaged[name], last[name])


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(
    folder, tmp_path, monkeypatch
):
    from vitrim.tasks.classification import SparseTask

    honest, calls = SparseTask.forward, []

    def breaks_at_step_6(self, *arguments, **named):
        terms = honest(self, *arguments, **named)
        calls.append(1)
        return terms | {"total": terms["total"] * float("nan")} if len(calls) == 6 else terms

    recipe = tiny_recipe(folder)
    with monkeypatch.context() as patch:
        patch.setattr(SparseTask, "forward", breaks_at_step_6)
        with pytest.raises(TrainingError, match="step 6 has no finite loss"):
            train(recipe, tmp_path / "run", on_progress=quiet)
    state = load_state(tmp_path / "run")
    assert state["step"] == 4
    assert all(value.isfinite().all() for value in state["model"].values())
    kept = vitrim.from_pretrained(tmp_path / "run" / "checkpoint")  # nothing validates this run
    assert all(
        torch.equal(kept.state_dict()[name], state["model"][name]) for name in state["model"]
    )
    train(recipe, tmp_path / "run", on_progress=quiet)
    train(recipe, tmp_path / "whole", on_progress=quiet)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_a_gradient_that_is_no_number_stops_too(folder, tmp_path, monkeypatch):
    from vitrim.layers import losses

    def infinite_slope(keep, ratio):
        return (keep - keep.detach()).sum().sqrt()  # 0, with a slope of infinity

    monkeypatch.setattr(losses, "ratio_loss", infinite_slope)
    with pytest.raises(TrainingError, match="step 1 has no finite loss or gradient"):
        train(tiny_recipe(folder), tmp_path / "run", on_progress=quiet)
    assert load_state(tmp_path / "run") is None
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_too_many_unreadable_images_stop_the_run(tmp_path):
    root = write_images(tmp_path / "set")
    (root / "class_1" / "3.png").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=r"class_1/3\.png"):
        train(tiny_recipe(root), tmp_path / "strict", on_progress=quiet)
    recipe = tiny_recipe(root, data__max_unreadable=0.1)
    train(recipe, tmp_path / "lenient", on_progress=quiet)
    assert curve(tmp_path / "lenient")[-1]["step"] == 8


def test_a_folder_holds_one_recipe(folder, tmp_path):
    train(tiny_recipe(folder, run__epochs=1), tmp_path / "run", on_progress=quiet)
    with pytest.raises(TrainingError, match=r"another recipe's run \(it differs in optim.lr\)"):
        train(tiny_recipe(folder, run__epochs=1, optim__lr=0.1), tmp_path / "run")
    before = curve(tmp_path / "run")
    again = train(tiny_recipe(folder, run__epochs=1, run__log_every=2), tmp_path / "run")
    assert again.metrics["step"] == 4
    assert curve(tmp_path / "run") == before  # it was over: nothing is done twice
    anew = tiny_recipe(folder, run__epochs=1, run__log_every=4)
    train(anew, tmp_path / "run", resume=False, on_progress=quiet)
    assert curve(tmp_path / "run") == before[3:]


def test_a_run_of_before_a_field_was_added_goes_on(folder, tmp_path):
    recipe = tiny_recipe(folder, run__epochs=1)
    train(recipe, tmp_path / "run", on_progress=quiet)
    before, path = curve(tmp_path / "run"), tmp_path / "run" / "recipe.json"
    plain = json.loads(path.read_text())
    assert plain["model"].pop("init") == "timm"
    path.write_text(json.dumps(plain))
    assert train(recipe, tmp_path / "run").metrics["step"] == 4
    assert curve(tmp_path / "run") == before


def test_worker_processes_change_nothing(folder, tmp_path):
    """Five batches and two to a step: each epoch leaves one that the workers had read ahead."""
    for workers in (0, 2):
        recipe = tiny_recipe(
            folder,
            data__workers=workers,
            data__batch_size=3,
            augment__none=False,
            optim__accumulate=2,
            run__epochs=3,
        )
        train(recipe, tmp_path / str(workers), on_progress=quiet)
    assert curve(tmp_path / "2") == curve(tmp_path / "0")
    assert len(curve(tmp_path / "0")) == 6


def test_a_run_whose_time_is_up_stops_cleanly_and_goes_on(folder, tmp_path):
    recipe = tiny_recipe(folder, run__max_seconds=1e-6)
    result = train(recipe, tmp_path / "run", on_progress=quiet)
    assert result.metrics["step"] == 1
    vitrim.from_pretrained(tmp_path / "run" / "checkpoint")
    train(tiny_recipe(folder), tmp_path / "run", on_progress=quiet)
    train(tiny_recipe(folder), tmp_path / "whole", on_progress=quiet)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_too_few_images_for_one_step(folder, tmp_path):
    with pytest.raises(InputError, match="16 training images do not fill one step of 32"):
        train(tiny_recipe(folder, data__batch_size=32), tmp_path / "run", on_progress=quiet)


@pytest.mark.parametrize(
    ("table__key", "value", "message"),
    [
        ("data__train", "absent", "does not exist"),
        ("data__val", "absent", "does not exist"),
        ("model__weights", "absent.safetensors", "does not exist"),
        ("model__name", "no_such_model", "unknown to timm"),
        ("method__stages", [2, 9], "stage 9 is outside the backbone"),
    ],
)
def test_a_recipe_that_cannot_run_leaves_nothing_behind(
    folder, tmp_path, table__key, value, message
):
    changes = {"data__train": str(folder), table__key: value}
    with pytest.raises(VitrimError, match=message):
        train(tiny_recipe("", **changes), tmp_path / "run", on_progress=quiet)
    assert not (tmp_path / "run").exists()


def test_a_folder_whose_run_saved_nothing_can_be_used_again(folder, tmp_path):
    def stop(_record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipe(folder), tmp_path / "run", on_progress=stop)
    changed = tiny_recipe(folder, optim__lr=1e-4)
    train(changed, tmp_path / "run", on_progress=quiet)
    train(changed, tmp_path / "whole", on_progress=quiet)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_tensorboard_and_plain_lines(folder, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    train(tiny_recipe(folder, run__epochs=1, run__tensorboard=True), tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("step 1/4")
    assert "ratio" in lines[0]


def test_threshold_mode_is_validated_image_by_image(folder, validation, tmp_path):
    recipe = tiny_recipe(folder, data__val=str(validation), method__threshold=0.5, run__epochs=1)
    result = train(recipe, tmp_path / "run", on_progress=quiet)
    assert result.metrics["val_images"] == 10


def test_the_embedded_recipe_runs_on_two_pictures(tmp_path):
    changes = ["data.length=4", "data.val_length=4", "data.batch_size=2", "data.workers=0"]
    short = ["run.epochs=2", "run.tensorboard=false", "data.curriculum_epochs=1"]
    recipe = load_recipe("digits-dense", [*changes, *short])
    result = train(recipe, tmp_path / "run", on_progress=quiet)
    assert result.metrics["val_images"] == 4
    made = json.loads((tmp_path / "run" / "backbone.json").read_text())
    assert made["data"]["std"] == [0.25, 0.25, 0.25]
    weights = f"model.weights={tmp_path / 'run' / 'backbone.safetensors'}"
    sparse = load_recipe("digits-dynamicvit", [*changes, *short[:2], weights])
    train(sparse, tmp_path / "sparse", on_progress=quiet)
    vitrim.from_pretrained(tmp_path / "sparse" / "checkpoint")


def break_after_step(monkeypatch, number, breaks):
    """An accident: what ``breaks`` does to the optimiser and its weights after step ``number``."""
    honest, calls = torch.optim.AdamW.step, []

    def step(self, *arguments, **named):
        answer = honest(self, *arguments, **named)
        calls.append(1)
        if len(calls) == number:
            with torch.no_grad():
                breaks(self)
        return answer

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def weights_of(role, value):
    def breaks(optimizer):
        for group in optimizer.param_groups:
            if group["role"] == role:
                for parameter in group["params"]:
                    parameter.fill_(value)

    return breaks


def moments(optimizer):
    next(iter(optimizer.state.values()))["exp_avg"].fill_(torch.inf)


ACCIDENTS = {
    "backbone nan": weights_of("backbone", torch.nan),
    "backbone huge": weights_of("backbone", 1e30),
    "method nan": weights_of("method", torch.nan),
    "method huge": weights_of("method", 1e30),
    "moments": moments,
}


@pytest.mark.parametrize("accident", list(ACCIDENTS))
@pytest.mark.parametrize("step", [6, 8])
def test_spoiled_weights_are_never_saved(folder, tmp_path, monkeypatch, accident, step):
    recipe = tiny_recipe(folder, run__checkpoint_steps=2)
    with monkeypatch.context() as patch:
        break_after_step(patch, step, ACCIDENTS[accident])
        with pytest.raises(TrainingError, match=f"step {step} spoiled the weights: .* NaN or inf"):
            train(recipe, tmp_path / "run", on_progress=quiet)
    state = load_state(tmp_path / "run")
    assert state["step"] == step - 2
    kept = vitrim.from_pretrained(tmp_path / "run" / "checkpoint")
    for weights in (state["model"], kept.state_dict()):
        assert all(value.isfinite().all() for value in weights.values())
    if step == 6:
        train(recipe, tmp_path / "run", on_progress=quiet)
        train(recipe, tmp_path / "whole", on_progress=quiet)
        assert curve(tmp_path / "run") == curve(tmp_path / "whole")


@pytest.mark.parametrize("changes", [{"optim__ema_decay": 0.5}, {"method__name": None}])
def test_spoiled_averages_and_dense_weights_are_never_saved(folder, tmp_path, monkeypatch, changes):
    def breaks(optimizer):
        for group in optimizer.param_groups:
            group["params"][0].fill_(torch.nan)

    break_after_step(monkeypatch, 2, breaks)
    recipe = tiny_recipe(folder, run__checkpoint_steps=2, **changes)
    with pytest.raises(TrainingError, match="step 2 spoiled the weights"):
        train(recipe, tmp_path / "run", on_progress=quiet)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"recipe.json", "log.jsonl"}


def test_a_bad_last_state_is_passed_over_for_the_one_before(folder, tmp_path, caplog):
    recipe = tiny_recipe(folder, run__checkpoint_steps=2)
    train(recipe, tmp_path / "whole", on_progress=quiet)
    part = tiny_recipe(folder, run__checkpoint_steps=2, run__max_seconds=1e-6)

    def weights(state):
        for value in state["model"].values():
            value.fill_(1e30)

    def one_value(state):
        state["model"]["backbone.head.bias"][0] = torch.nan

    def optimiser(state):
        next(iter(state["optimizer"]["state"].values()))["exp_avg_sq"].fill_(torch.nan)

    def shape(state):
        state["model"]["backbone.head.bias"] = torch.zeros(3)

    def groups(state):
        state["optimizer"] = {}

    def moments(state):
        next(iter(state["optimizer"]["state"].values()))["exp_avg"] = torch.zeros(3)

    def kinds(state):
        state["model"]["backbone.head.bias"] = state["model"]["backbone.head.bias"].to(torch.int8)

    def gradient(state):  # weights and answers are finite, the next loss or gradient is not
        state["model"]["backbone.norm.weight"] *= 1e25

    damages = (weights, one_value, optimiser, shape, groups, moments, kinds, gradient)
    for number, damage in enumerate(damages):
        run = tmp_path / str(number)
        for _ in range(6):
            train(part, run, on_progress=quiet)
        state = load_state(run)
        assert state["step"] == 6
        damage(state)
        save_state(run, 6, state)
        caplog.clear()
        train(recipe, run, on_progress=quiet)
        assert "passed over the state of step 6" in caplog.text
        assert curve(run)[5:] == curve(tmp_path / "whole")[5:]
        assert load_state(run)["step"] == 8


def test_a_run_whose_states_are_all_bad_says_so(folder, tmp_path):
    recipe = tiny_recipe(folder, run__epochs=1)
    train(recipe, tmp_path / "run", on_progress=quiet)
    for step in (3, 4):
        state = load_state(tmp_path / "run", before=step + 1)
        state["model"]["backbone.head.bias"].fill_(torch.nan)
        save_state(tmp_path / "run", step, state)
    with pytest.raises(TrainingError, match=r"no trainer state .* start anew \(--no-resume\)"):
        train(recipe, tmp_path / "run", on_progress=quiet)
    assert load_state(tmp_path / "run")["step"] == 4  # nothing was thrown away
    train(recipe, tmp_path / "run", resume=False, on_progress=quiet)


def test_fp16_without_a_scaler_stops_at_a_gradient_that_is_no_number(folder, tmp_path, monkeypatch):
    from vitrim.layers import losses

    monkeypatch.setattr(losses, "ratio_loss", lambda keep, _: (keep - keep.detach()).sum().sqrt())
    with pytest.raises(TrainingError, match="step 1 has no finite loss or gradient"):
        train(tiny_recipe(folder, run__precision="fp16"), tmp_path / "run", on_progress=quiet)
    assert load_state(tmp_path / "run") is None


def test_a_scaler_skips_what_overflows_but_not_for_ever(folder, tmp_path, monkeypatch):
    import accelerate

    from vitrim.layers import losses

    class WithScaler(accelerate.Accelerator):
        """As on a GPU, where fp16 has a scaler."""

        def __init__(self, **options):
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu")

    honest, steps = losses.ratio_loss, []

    def ratio_loss(keep, ratio):
        steps.append(1)
        if len(steps) in (1, 2, 5) or len(steps) > 8:
            return (keep - keep.detach()).sum().sqrt()  # 0, with a slope of infinity
        return honest(keep, ratio)

    monkeypatch.setattr(accelerate, "Accelerator", WithScaler)
    monkeypatch.setattr(losses, "ratio_loss", ratio_loss)
    recipe = tiny_recipe(folder, run__epochs=20, run__precision="fp16", method__stages=[2])
    message = "step 41 is one of 33 in a row without a finite gradient in half precision"
    with pytest.raises(TrainingError, match=message):
        train(recipe, tmp_path / "run", on_progress=quiet)
    norms = [line["grad_norm"] for line in curve(tmp_path / "run")]
    skipped = [number for number, norm in enumerate(norms, 1) if not math.isfinite(norm)]
    assert skipped == [1, 2, 5, *range(9, 41)]
    assert load_state(tmp_path / "run")["step"] == 40


def test_the_clock_is_no_loss_term(folder, tmp_path, monkeypatch):
    from vitrim.tasks.classification import SparseTask

    honest = SparseTask.forward
    monkeypatch.setattr(
        SparseTask,
        "forward",
        lambda self, *a, **k: {name: v * torch.nan for name, v in honest(self, *a, **k).items()},
    )
    with pytest.raises(TrainingError) as caught:
        train(tiny_recipe(folder), tmp_path / "run", on_progress=quiet)
    assert "total nan" in str(caught.value)
    assert "time_up" not in str(caught.value)


def test_a_folder_is_in_use_while_its_run_lasts(folder, tmp_path):
    recipe, refused = tiny_recipe(folder), []

    def second(record):
        if record["step"] == 6:
            script = 'train(recipe, folder / "run", on_progress=lambda record: None)'
            refused.append(run_script(script, recipe, tmp_path))

    train(recipe, tmp_path / "run", on_progress=second)
    assert "TrainingError" in refused[0].stderr
    assert "run is in use by another run" in refused[0].stderr
    train(recipe, tmp_path / "whole", on_progress=quiet)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_folder_that_cannot_be_written_to_is_noticed_before_the_data(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="file/run cannot be written to"):
        train(tiny_recipe("absent"), tmp_path / "file" / "run", on_progress=quiet)


LIMITED = """
import resource, sys
from vitrim.errors import TrainingError
train(recipe, folder / "whole", on_progress=lambda record: None)
part = folder / "part"
for limit in (1_000, 100_000, 400_000):  # bytes: of the log, of the result, of a state
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        train(recipe, part, on_progress=lambda record: None)
    except TrainingError as error:
        assert "part cannot be written to (File too large)" in str(error), error
    else:
        raise AssertionError(f"{limit} bytes are enough")
    assert not [path for path in part.rglob("*") if path.name.endswith(".tmp")]
    assert not list(part.rglob("*.pt"))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
train(recipe, part, on_progress=lambda record: None)
"""


def test_files_that_may_not_grow_stop_the_run_and_leave_nothing_halfway(folder, tmp_path):
    done = run_script(LIMITED, tiny_recipe(folder), tmp_path)
    assert done.returncode == 0, done.stderr
    assert curve(tmp_path / "part") == curve(tmp_path / "whole")
