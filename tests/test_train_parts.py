"""The parts of training, one by one: order, seeds, groups, schedule, average, mixing, state."""

from __future__ import annotations

import hashlib
import math
import os
import random
import signal
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from tests.conftest import images, tiny_vit
from tests.training import TINY, tiny_recipe, write_images
from vitrim import CheckpointError, ConfigError, DynamicViTConfig, InputError, sparsify
from vitrim.checkpoint import write_atomic
from vitrim.errors import TrainingError
from vitrim.tasks.classification import SparseTask, create_task, data_config_of, top1
from vitrim.tasks.labelled import Mixer, TrainLoader, training_transform
from vitrim.train import state as trainer_state
from vitrim.train.backbone import create_dense
from vitrim.train.devices import accelerator_of
from vitrim.train.digits import ClutteredDigits
from vitrim.train.folder import held
from vitrim.train.logs import JsonLines, RichBar, read_log
from vitrim.train.optim import MovingAverage, Schedule, create_optimizer, parameter_groups
from vitrim.train.recipe import AugmentRecipe, ModelRecipe, OptimRecipe
from vitrim.train.samples import EpochBatches, SeededSamples, mix_seed, seeded

DATA_CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}


def sparse_tiny(**config):
    return sparsify(tiny_vit(), DynamicViTConfig(keep_ratio=0.7, **config))


def test_processes_share_out_the_same_global_batches():
    alone = list(EpochBatches(26, 8, seed=3))
    parts = [list(EpochBatches(26, 4, seed=3, rank=r, num_processes=2)) for r in range(2)]
    assert alone == [first + second for first, second in zip(*parts, strict=True)]
    assert len(alone) == 3
    assert len({key for batch in alone for key in batch}) == 24


def test_epochs_differ_and_can_be_entered_anywhere():
    batches = EpochBatches(24, 4, seed=0)
    first = list(batches)
    batches.start(1)
    second = list(batches)
    assert [i for b in first for _, i in b] != [i for b in second for _, i in b]
    batches.start(1, 4)
    assert list(batches) == second[4:]
    assert len(batches) == 2


def test_seeded_restores_what_it_borrowed():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with seeded(5, 6):
        inside = random.random(), np.random.rand(), torch.rand(1).item()
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    with seeded(5, 6):
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == inside
    assert mix_seed(5, 6) != mix_seed(6, 5)


def test_a_sample_is_a_function_of_seed_epoch_and_index(tmp_path):
    recipe = AugmentRecipe(rand_augment="rand-m9-mstd0.5-inc1", random_erase=1.0)
    recipe_of = tiny_recipe(write_images(tmp_path / "set"))
    transform = training_transform(recipe, DATA_CONFIG)
    from vitrim.train.data import open_dataset

    dataset = open_dataset(recipe_of.data.train, transform)
    samples = SeededSamples(dataset, seed=0)
    image = samples[(2, 5)][0]
    samples[(0, 1)]
    torch.rand(3)
    assert torch.equal(image, samples[(2, 5)][0])
    assert not torch.equal(image, samples[(3, 5)][0])
    assert not torch.equal(image, SeededSamples(dataset, seed=1)[(2, 5)][0])


def test_curriculum_raises_the_clutter():
    dataset = ClutteredDigits("train", 4, image_size=48)
    samples = SeededSamples(dataset, seed=0, curriculum_epochs=4)
    clutter = []
    for epoch in (0, 1, 4, 9):
        samples[(epoch, 0)]
        clutter.append(dataset.clutter)
        assert dataset.epoch == epoch
    assert clutter == [0.0, 0.25, 1.0, 1.0]


def test_parameter_groups_cover_every_parameter_once():
    sparse = sparse_tiny()
    groups = parameter_groups(sparse, OptimRecipe(weight_decay=0.1))
    assert {group["role"] for group in groups} == {"backbone", "method"}
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(sparse.parameters()))
    names = {id(p): name for name, p in sparse.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            free = parameter.ndim == 1 or name.endswith(("cls_token", "pos_embed"))
            assert group["weight_decay"] == (0.0 if free else 0.1), name
            assert name.startswith(group["role"])


def test_biases_of_relative_positions_are_not_decayed():
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8}
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), **sizes
    )
    groups = parameter_groups(swin, OptimRecipe(weight_decay=0.1))
    (free,) = [group["params"] for group in groups if group["weight_decay"] == 0]
    table = swin.layers[0].blocks[0].attn.relative_position_bias_table
    assert any(parameter is table for parameter in free)


def test_embeddings_can_be_left_out_as_the_authors_do():
    sparse = sparse_tiny()
    before = sparse.backbone.pos_embed.clone()
    optimizer = create_optimizer(sparse, OptimRecipe(train_embeddings=False, weight_decay=0.5))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    sparse.train().losses(images(2))["total"].backward()
    optimizer.step()
    assert torch.equal(sparse.backbone.pos_embed, before)
    assert sparse.backbone.cls_token.grad is None


def test_schedule_warms_up_step_by_step_then_follows_the_cosine():
    recipe = OptimRecipe(lr=1e-3, lr_batch=512, warmup_epochs=1, min_lr=1e-5)
    schedule = Schedule(recipe, steps_per_epoch=10, epochs=5, global_batch=256)
    assert schedule.lr(0) == 0
    assert schedule.lr(5) == pytest.approx(0.5 * 5e-4)
    assert schedule.lr(10) == pytest.approx(5e-4)
    assert schedule.lr(30) == pytest.approx(1e-5 + (5e-4 - 1e-5) * 0.5)
    assert schedule.lr(50) == pytest.approx(1e-5)
    quarter = (1 + math.cos(math.pi / 4)) / 2
    assert schedule.lr(20) == pytest.approx(1e-5 + (5e-4 - 1e-5) * quarter)


def test_frozen_backbone_does_not_move_nor_decay():
    sparse = sparse_tiny().train()
    recipe = OptimRecipe(lr=0.01, weight_decay=0.5, backbone_lr_scale=0.1, freeze_backbone_epochs=1)
    optimizer = create_optimizer(sparse, recipe)
    schedule = Schedule(recipe, steps_per_epoch=2, epochs=3, global_batch=2)
    start = deepcopy(sparse.state_dict())
    for step in range(3):
        lr = schedule.apply(optimizer, step)
        rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
        assert rates == {"method": lr, "backbone": 0.0 if step < 2 else pytest.approx(0.1 * lr)}
        sparse.losses(images(2), torch.tensor([1, 2]))["total"].backward()
        optimizer.step()
        optimizer.zero_grad()
        now = sparse.state_dict()
        moved = {name.split(".")[0] for name in now if not torch.equal(now[name], start[name])}
        assert moved == ({"method"} if step < 2 else {"method", "backbone"})


def test_constant_backbone_rate_stays_below_the_methods():
    recipe = OptimRecipe(
        lr=1e-3,
        lr_batch=4,
        min_lr=1e-6,
        backbone_lr_scale=0.25,
        backbone_schedule="constant",
        freeze_backbone_epochs=1,
    )
    schedule = Schedule(recipe, steps_per_epoch=2, epochs=5, global_batch=8)
    rates = [schedule.backbone_lr(step) for step in range(11)]
    assert rates[:2] == [0.0, 0.0]
    assert rates[2:6] == [pytest.approx(0.25 * 2e-3)] * 4
    assert rates[10] == schedule.lr(10) == pytest.approx(1e-6)


def test_moving_average_follows_its_formula():
    model = torch.nn.BatchNorm1d(2)
    average = MovingAverage(model, decay=0.9)
    with torch.no_grad():
        model.weight.fill_(3.0)
    model(torch.randn(4, 2))
    average.update(model)
    torch.testing.assert_close(average.model.weight, torch.full((2,), 0.9 * 1 + 0.1 * 3))
    assert average.model.num_batches_tracked == 1
    assert not average.model.training


@pytest.mark.parametrize("size", [4, 5])
def test_mixing_keeps_every_image_and_sums_to_one(size):
    mixer = Mixer(AugmentRecipe(mixup=0.8, cutmix=1.0, label_smoothing=0.1), num_classes=10)
    batch, labels = images(size), torch.arange(size)
    with seeded(0):
        mixed, target = mixer(batch, labels)
    with seeded(0):
        again, _ = mixer(batch, labels)
    assert torch.equal(mixed, again)
    assert mixed.shape == batch.shape
    assert target.shape == (size, 10)
    torch.testing.assert_close(target.sum(1), torch.ones(size))
    assert not torch.equal(mixed[0], batch[0])
    assert torch.equal(batch, images(size))  # the caller's images are left alone
    if size == 5:
        assert torch.equal(mixed[4], batch[4])
        assert target[4, 4] == pytest.approx(0.91)


def test_smoothing_without_mixing():
    mixer = Mixer(AugmentRecipe(label_smoothing=0.2), num_classes=4)
    _, target = mixer(images(1), torch.tensor([2]))
    torch.testing.assert_close(target, torch.tensor([[0.05, 0.05, 0.85, 0.05]]))
    _, plain = Mixer(AugmentRecipe(), 4)(images(1), torch.tensor([2]))
    assert plain.tolist() == [2]


def test_teacher_stays_frozen_and_out_of_the_state():
    recipe = tiny_recipe("unused")
    task = create_task(recipe)
    assert isinstance(task, SparseTask)
    assert task.teacher is not None
    task.train()
    assert task.model.training
    assert not task.teacher.training
    terms = task(images(2), torch.tensor([0, 1]), seed=1)
    assert {"ratio", "classification", "distill", "token", "total"} == terms.keys()
    terms["total"].backward()
    assert all(p.grad is None for p in task.teacher.parameters())
    assert not any("teacher" in name for name in task.model.state_dict())
    before = deepcopy(task.teacher.state_dict())
    with torch.no_grad():
        task.model.backbone.head.weight.add_(1)
    assert torch.equal(task.teacher.head.weight, before["head.weight"])


def test_noise_is_a_function_of_the_seed():
    task = create_task(tiny_recipe("unused")).train()
    batch = images(2)
    with torch.no_grad():
        first, again, other = (task(batch, seed=seed)["ratio"].item() for seed in (1, 1, 2))
    assert first == again != other


def test_new_parameters_are_a_function_of_the_seed():
    one, same, other = (
        create_task(tiny_recipe("unused", run__seed=seed)).model.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    for name in ("backbone.pos_embed", "method.predictors.0.classify.0.weight"):
        assert not torch.equal(one[name], other[name])


def test_new_weights_by_fan_in_suit_any_width():
    wide, by_fan_in = (
        create_dense(ModelRecipe(name="vit_tiny_patch16_224", kwargs=TINY, init=init), seed=0)
        for init in ("timm", "fan_in")
    )
    inputs = TINY["embed_dim"]
    assert by_fan_in.blocks[0].attn.qkv.weight.std().item() == pytest.approx(inputs**-0.5, rel=0.05)
    assert by_fan_in.blocks[0].mlp.fc2.weight.std().item() == pytest.approx(
        (4 * inputs) ** -0.5, rel=0.05
    )
    assert wide.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    with pytest.raises(ConfigError, match=r"model\.init is 'fan_in', but the weights are loaded"):
        ModelRecipe(name="vit_tiny_patch16_224", init="fan_in", pretrained=True)


def test_bad_models_are_told_apart(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean .*'vit_tiny_patch16_224'"):
        create_dense(ModelRecipe(name="vit_tiny_patch16_225"), 0)
    with pytest.raises(ConfigError, match="timm cannot create"):
        create_dense(ModelRecipe(name="vit_tiny_patch16_224", kwargs={"dims": [8]}), 0)
    with pytest.raises(CheckpointError, match="no weights 'package:nothing' are shipped"):
        create_dense(
            ModelRecipe(name="vit_tiny_patch16_224", kwargs=TINY, weights="package:nothing"), 0
        )
    pickle = tmp_path / "weights.safetensors"
    torch.save({"head.weight": torch.zeros(1)}, pickle)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        create_dense(ModelRecipe(name="vit_tiny_patch16_224", kwargs=TINY, weights=str(pickle)), 0)


def test_a_run_may_start_from_a_checkpoint(tmp_path):
    start = create_task(tiny_recipe("unused")).model
    start.save_pretrained(tmp_path / "start")
    changes = {"model__checkpoint": str(tmp_path / "start"), "method__keep_ratio": 0.5}
    task = create_task(tiny_recipe("unused", model__name=None, model__kwargs={}, **changes))
    assert task.model.config.keep_ratio == 0.5
    weights = task.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in start.state_dict().items())
    assert torch.equal(task.teacher.pos_embed, start.backbone.pos_embed)


def test_images_are_prepared_for_the_size_that_the_model_was_built_for():
    recipe = tiny_recipe("folder", data__crop_pct=0.8)
    config = data_config_of(create_task(recipe), recipe)
    assert (config["input_size"], config["crop_pct"]) == ((3, 32, 32), 0.8)
    recipe = tiny_recipe("digits/train")
    config = data_config_of(create_task(recipe), recipe)
    assert (config["std"], config["crop_pct"]) == ((0.25, 0.25, 0.25), 1.0)


def test_labels_outside_the_head_are_refused(tmp_path):
    root = write_images(tmp_path / "set", classes=3)
    with pytest.raises(InputError, match="the data have 3 classes"):
        TrainLoader(tiny_recipe(root), DATA_CONFIG, num_classes=2)


def test_training_stops_past_the_stated_share_of_unreadable_images(tmp_path):
    root = write_images(tmp_path / "set", per_class=8)
    for number in range(3):
        (root / "class_0" / f"{number}.png").write_bytes(b"damaged")
    allowed = TrainLoader(tiny_recipe(root, data__max_unreadable=0.2), DATA_CONFIG, 2)
    assert sum(len(batch) for batch, _ in allowed.epoch(0)) == 13
    assert len(allowed.unreadable) == 3
    strict = TrainLoader(tiny_recipe(root, data__max_unreadable=0.125), DATA_CONFIG, 2)
    with pytest.raises(TrainingError, match="3 of 16 images cannot be read") as caught:
        list(strict.epoch(0))
    assert all(f"class_0/{number}.png" in str(caught.value) for number in range(3))


def state_of(step, **changes):
    parts = {"global_batch": 4, "best": 1.0, "metrics": {}, "average": None, "scaler": None}
    return parts | {"step": step, "model": {"a": torch.ones(20)}, "optimizer": {}} | changes


def test_state_is_written_whole_and_two_are_kept(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        trainer_state.save_state(tmp_path, step, state_of(step))
    names = [path.name for path in sorted((tmp_path / "state").iterdir())]
    stems = ["step_000000002", "step_000000003"]
    assert names == [f"{stem}.{end}" for stem in stems for end in ("pt", "sha256")]
    for digest in (tmp_path / "state").glob("*.sha256"):
        expected, _, name = digest.read_text().strip().partition("  ")
        assert hashlib.sha256((tmp_path / "state" / name).read_bytes()).hexdigest() == expected

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(TrainingError, match=r"cannot be written to \(No space left on device"):
            trainer_state.save_state(tmp_path, 4, state_of(4))
    assert [path.name for path in sorted((tmp_path / "state").iterdir())] == names
    assert trainer_state.load_state(tmp_path)["step"] == 3
    assert trainer_state.load_state(tmp_path, before=3)["step"] == 2
    newest = tmp_path / "state" / "step_000000003.pt"
    newest.write_bytes(newest.read_bytes()[:50])
    assert trainer_state.load_state(tmp_path)["step"] == 2
    (tmp_path / "state" / "step_000000002.pt").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"no trainer state .* can be used; start anew"):
        trainer_state.load_state(tmp_path)


def test_no_flipped_bit_in_a_state_goes_unnoticed(tmp_path, caplog):
    for step in (1, 2):
        trainer_state.save_state(tmp_path, step, state_of(step))
    path = tmp_path / "state" / "step_000000002.pt"
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert trainer_state.load_state(tmp_path)["step"] == 1, place
    assert "passed over the damaged state" in caplog.text
    path.write_bytes(whole)
    assert trainer_state.load_state(tmp_path)["step"] == 2
    path.with_suffix(".sha256").write_bytes(b"\xff")
    assert trainer_state.load_state(tmp_path)["step"] == 1


@pytest.mark.parametrize("name", list(state_of(1)))
def test_a_state_that_lacks_a_part_is_passed_over(tmp_path, name):
    trainer_state.save_state(tmp_path, 1, state_of(1))
    lacking = {key: value for key, value in state_of(2).items() if key != name}
    for damaged in (lacking, state_of(2) | {name: "something else"}):
        trainer_state.save_state(tmp_path, 2, damaged)
        assert trainer_state.load_state(tmp_path)["step"] == 1


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04", b"\x80\x04N."])
def test_states_are_checked_whatever_their_digest_says(tmp_path, content):
    folder = tmp_path / "state"
    folder.mkdir()
    torch.save(state_of(1), folder / "step_000000001.pt")
    torch.save([1, 2], folder / "step_000000002.pt")
    torch.save(state_of(9), folder / "step_000000003.pt")
    (folder / "step_000000004.pt").write_bytes(content)
    torch.save(state_of(5), folder / "step_000000005.pt")
    for path in sorted(folder.glob("*.pt"))[:4]:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.with_suffix(".sha256").write_text(f"{digest}  {path.name}\n")
    os.mkfifo(folder / "step_000000005.sha256")
    (folder / "step_000000006.pt").mkdir()
    os.mkfifo(folder / "step_000000007.pt")
    assert trainer_state.load_state(tmp_path)["step"] == 1


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ('{"flour": 500}', "is no recipe that this vitrim reads"),
        ("[1, 2]", "the recipe is .1, 2.; a table was expected"),
        ('{"method": {"config": 5}}', "method.config is 5; expected a table"),
        ("{" * 9, "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("1" * 5_000, "is damaged"),
        ("\xff", "is damaged"),
        (None, "is no file"),
    ],
)
def test_somebody_elses_recipe_is_left_alone(tmp_path, recipe, message):
    path = tmp_path / "recipe.json"
    path.mkdir() if recipe is None else path.write_text(recipe, encoding="latin-1")
    with pytest.raises(TrainingError, match=message):
        trainer_state.check_folder(tmp_path, tiny_recipe("unused"))
    assert path.is_dir() or path.read_text(encoding="latin-1") == recipe


def test_a_result_without_a_state_is_left_alone(tmp_path, caplog):
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(TrainingError, match=r"holds checkpoint, but no recipe\.json"):
        trainer_state.check_folder(tmp_path, tiny_recipe("unused"))
    trainer_state.claim_folder(tmp_path, tiny_recipe("unused"), 0)
    with pytest.raises(TrainingError, match=r"another recipe's run \(it differs in optim\.lr"):
        trainer_state.check_folder(tmp_path, tiny_recipe("unused", optim__lr=0.5))
    trainer_state.check_folder(tmp_path, tiny_recipe("unused"))
    assert "holds no trainer state; the run starts anew" in caplog.text
    (tmp_path / "checkpoint").rmdir()
    trainer_state.check_folder(tmp_path, tiny_recipe("unused", optim__lr=0.5))
    assert "saved nothing; this one takes its place" in caplog.text


def test_claiming_sweeps_what_a_kill_left_and_what_comes_after(tmp_path):
    for name in ("state", "checkpoint", "mine"):
        (tmp_path / name).mkdir()
    stale = ["state/.step_000000003.pt.77.tmp", ".recipe.json.77.tmp"]
    stale += ["checkpoint/.model.safetensors.77.tmp", ".backbone.safetensors.77.tmp"]
    others = ["mine/.notes.tmp", "notes.tmp", ".notes.tmp", "state/work.tmp"]
    for name in stale + others:
        (tmp_path / name).write_bytes(b"half")
    for step in (4, 6):
        trainer_state.save_state(tmp_path, step, state_of(step))
    trainer_state.claim_folder(tmp_path, tiny_recipe("unused"), 4)
    found = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]
    state = ["state/step_000000004.pt", "state/step_000000004.sha256"]
    assert sorted(found) == sorted([*others, *state, "recipe.json"])


def test_a_folder_is_held_by_one(tmp_path):
    folder = tmp_path / "a" / "run"
    with held(folder):
        with pytest.raises(TrainingError, match=r"a/run is in use by another run"), held(folder):
            pass
        assert folder.is_dir()
    assert not folder.exists()  # nothing was written into it
    with held(folder):
        (folder / "mine").touch()
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    import fcntl

    honest = fcntl.flock

    def late(lock, how):
        (tmp_path / ".lock").unlink()  # by the run that ends just now
        honest(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(TrainingError, match="in use"), held(tmp_path):
        pass


HOLDS = """
import os, sys, time
from pathlib import Path
from vitrim.train.folder import held
with held(Path(sys.argv[1])):
    if os.fork() == 0:  # as a reader of images that outlives the run
        os.close(1)
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    time.sleep(20)
"""


def test_a_killed_process_holds_no_folder(tmp_path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(TrainingError, match="in use"), held(tmp_path / "run"):
                pass
            os.kill(other.pid, signal.SIGKILL)
            other.wait()
            with held(tmp_path / "run"):
                pass
        finally:
            os.killpg(other.pid, signal.SIGKILL)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(TrainingError, match=f"{path} cannot be written to"), held(path):
            pass


def test_a_state_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("pwned").touch, ())

    (tmp_path / "state").mkdir()
    torch.save({"step": Evil()}, tmp_path / "state" / "step_000000001.pt")
    with pytest.raises(TrainingError, match="no trainer state"):
        trainer_state.load_state(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_a_crash_leaves_the_old_file_whole(tmp_path, monkeypatch):
    write_atomic(tmp_path / "file", b"old")

    def crash(_descriptor):
        raise OSError("crash")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="crash"):
        write_atomic(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_log_is_cut_back_to_the_saved_step(tmp_path):
    lines = [f'{{"step": {step}}}\n' for step in range(1, 6)]
    (tmp_path / "log.jsonl").write_text("".join(lines) + '{"step": 6, "to')
    log = JsonLines(tmp_path, 3)
    log.write({"step": 4, "new": 1})
    log.close()
    assert read_log(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "new": 1}]


def test_damaged_lines_of_the_log_are_left_out_and_named(tmp_path, caplog):
    damaged = [b"\xff", b"[1]", b"{}", b'{"step": "x"}', b"[" * 100_000, b'{"step": ' + b"1" * 5000]
    lines = [b'{"step": 1}', *damaged, b'{"step": 2}']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines) + b"\n" + b'{"step": 3')
    assert read_log(tmp_path) == [{"step": 1}, {"step": 2}]
    assert [record.args[0] for record in caplog.records] == [2, 3, 4, 5, 6, 7]
    JsonLines(tmp_path, 5).close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_launch_of_several_that_became_one_is_told(monkeypatch, caplog):
    with accelerator_of("fp32") as accelerator:
        assert accelerator.num_processes == 1
    assert not caplog.records
    # What `accelerate launch --num_processes 2 --cpu` sets for the one process that it starts.
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with accelerator_of("fp32"):
        pass
    assert "started this one alone" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_validation_refuses_answers_that_are_no_numbers(value):
    model = tiny_vit()
    loader = [(images(4), torch.tensor([0, 1, 2, 3]))]
    with accelerator_of("fp32") as accelerator:
        assert top1(accelerator, model, loader)[1] == 4
        torch.nn.init.constant_(model.head.bias[3:4], value)
        with pytest.raises(TrainingError, match="logits of 4 of 4 validation images hold NaN"):
            top1(accelerator, model, loader)


def test_the_bar_shows_the_numbers(capsys):
    bar = RichBar(total_steps=10, step=2)
    bar.write({"step": 5, "total": 1.23456, "time": 3.0})
    bar.close()
    shown = capsys.readouterr()
    assert "5/10" in shown.err
    assert "total 1.235" in shown.err
    assert shown.out == ""


def test_one_image_in_other_modes_is_read(tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    Image.new("L", (40, 32)).save(tmp_path / "set" / "a" / "grey.png")
    Image.new("RGBA", (32, 40)).save(tmp_path / "set" / "a" / "alpha.png")
    recipe = tiny_recipe(tmp_path / "set", data__batch_size=2)
    (batch,) = TrainLoader(recipe, DATA_CONFIG, 1).epoch(0)
    assert batch[0].shape == (2, 3, 32, 32)


class Stream(IterableDataset):
    """Stands in for a streaming reader: its order is a function of the epoch."""

    def __init__(self):
        self.transform = None
        self.epoch = 0

    def __len__(self):
        return 12

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(self.epoch))
        for index in order.tolist():
            image = Image.new("RGB", (40, 40), (20 * index, 0, 255 - 20 * index))
            yield self.transform(image), index % 2


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_are_seeded_and_can_be_entered_anywhere(monkeypatch, workers):
    monkeypatch.setattr("vitrim.train.data.create_dataset", lambda *_, **__: Stream())
    changes = {"data__batch_size": 3, "data__workers": workers, "augment__none": False}
    recipe = tiny_recipe("wds/shards", augment__color_jitter=0.4, **changes)
    loader = TrainLoader(recipe, DATA_CONFIG, 2)
    assert loader.batches_per_epoch == 4
    whole = list(loader.epoch(1))
    rest = list(loader.epoch(1, 2))
    assert [labels.tolist() for _, labels in rest] == [y.tolist() for _, y in whole[2:]]
    assert all(torch.equal(one[0], two[0]) for one, two in zip(rest, whole[2:], strict=True))
    assert not torch.equal(next(loader.epoch(2))[0], whole[0][0])


def test_rates_along_a_line_and_in_steps():
    common = {"steps_per_epoch": 10, "epochs": 5, "global_batch": 1}
    line = Schedule(OptimRecipe(lr=1.0, warmup_epochs=1, schedule="linear"), **common)
    assert [line.lr(step) for step in (5, 10, 30, 50)] == pytest.approx([0.5, 1, 0.5, 0])
    recipe = OptimRecipe(lr=1.0, warmup_epochs=1, schedule="steps", step_epochs=(3, 4))
    steps = Schedule(recipe, **common)
    rates = [steps.lr(step) for step in (5, 10, 29, 30, 40, 50)]
    assert rates == pytest.approx([0.5, 1, 1, 0.1, 0.01, 0.01])
    for wrong in ({"schedule": "steps"}, {"step_epochs": (3,)}):
        with pytest.raises(ConfigError, match="steps need epochs"):
            OptimRecipe(**wrong)
