"""The training loop, on Accelerate: one process or many, one readable loop.

A step is a function of the recipe, the weights, its number and the number of processes: data order,
augmentation, mixing, dropout and the method's noise are seeded by ``(seed, place)``. So a run that
was killed and goes on from its last saved state writes the same log as one that never stopped.

What is trained, on what and how it is judged is the task's (``tasks/``).

A run's folder holds ``recipe.json``, ``log.jsonl``, ``state/`` (the trainer's, to go on from) and
the result, ``checkpoint/`` above all: the best by validation, or the last where there is none.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.checkpoint import load_strict
from vitrim.errors import InputError, TrainingError
from vitrim.tasks.base import Share, on_device
from vitrim.tasks.registry import task_class
from vitrim.train.devices import accelerator_of
from vitrim.train.folder import held, writing
from vitrim.train.logs import Logs, Record
from vitrim.train.optim import MovingAverage, Schedule, create_optimizer
from vitrim.train.recipe import Recipe
from vitrim.train.samples import mix_seed, seeded
from vitrim.train.state import check_folder, claim_folder, is_finite, load_state, save_state

MOST_SKIPPED = 32
"""Steps in a row that fp16's scaler may skip; it halves its scale of 65,536 at each."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Where a run is, and how good its result is."""

    folder: Path
    """The run's folder."""
    metrics: dict[str, Any]
    """Of the result, as written beside it; ``val_...`` in percent where there is validation."""


def train(
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    resume: bool = True,
    on_progress: Callable[[Record], None] | None = None,
) -> TrainResult:
    """Train by ``recipe`` in the folder ``output``; an interrupted run goes on where it was.

    Start it once per device (``accelerate launch``, ``torchrun``) to use several.

    Args:
        recipe: what to do.
        output: the run's folder, made if absent.
        resume: False forgets an earlier part of the same run and starts anew.
        on_progress: takes every log record instead of the progress bar.

    Raises:
        TrainingError: the folder holds another run, is in use or cannot be written to, the loss or
            the weights are no numbers any more, or too many images cannot be read. The last saved
            state is kept.
        ConfigError, InputError, CheckpointError: the recipe, its data or its weights are wrong.
    """
    folder = Path(output)
    with (
        accelerator_of(recipe.run.precision) as accelerator,
        held(folder) if accelerator.is_main_process else nullcontext(),
    ):
        accelerator.wait_for_everyone()
        check_folder(folder, recipe)
        before: int | None = None
        while True:
            trainer = _Trainer(recipe, folder, accelerator, resume=resume, before=before)
            try:
                return trainer.run(on_progress)
            except _SpoiltStateError as error:
                before = trainer.step
                logger.warning("passed over the state of step %d in %s: %s", before, folder, error)


class _SpoiltStateError(TrainingError):
    """The first step after a resume is not finite: what it was resumed from is to blame."""


class _Trainer:
    """The parts of a run and its loop."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        accelerator: Any,
        *,
        resume: bool,
        before: int | None = None,
    ) -> None:
        """``before`` is a step: only earlier states are resumed from."""
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        task = task_class(recipe.task.name).create(recipe)
        self.task, self.model, self.method = task, task.model, task.method
        places = accelerator.process_index, accelerator.num_processes
        share = Share(*places, pin_memory=accelerator.device.type == "cuda")
        self.loader, self.validation = task.open_data(recipe, share)
        self._count_steps()
        optimizer = create_optimizer(self.model, recipe.optim)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        decay = recipe.optim.ema_decay
        self.average = None if decay is None else MovingAverage(self.model, decay)
        self.prepared, self.optimizer = accelerator.prepare(task, optimizer)
        if self.average is not None:
            self.average.model.to(accelerator.device)
        self.step, self.best, self.metrics = 0, -math.inf, dict[str, Any]()
        self.skipped, self.time_is_up = 0, False
        if resume:
            self._go_on(before)
        self.resumed_at = self.step
        # Only now, so that a recipe that cannot run leaves nothing behind.
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            claim_folder(folder, recipe, self.step)

    def _count_steps(self) -> None:
        recipe, loader = self.recipe, self.loader
        accumulate = recipe.optim.accumulate
        self.global_batch = recipe.data.batch_size * accumulate * self.accelerator.num_processes
        self.steps_per_epoch = loader.batches_per_epoch // accumulate
        if self.steps_per_epoch == 0:
            raise InputError(
                f"the {loader.num_samples} training images do not fill one step of "
                f"{self.global_batch}; lower data.batch_size or optim.accumulate"
            )
        self.total_steps = self.steps_per_epoch * recipe.run.epochs
        self.schedule = Schedule(
            recipe.optim, self.steps_per_epoch, recipe.run.epochs, self.global_batch
        )

    def run(self, on_progress: Callable[[Record], None] | None) -> TrainResult:
        """The loop: steps, log, validation, saved states."""
        run, self.logs = self.recipe.run, None
        if self.accelerator.is_main_process:
            self.logs = Logs(
                self.folder,
                self.step,
                self.total_steps,
                tensorboard=run.tensorboard,
                on_progress=on_progress,
            )
        self.started = self.logged = time.monotonic()
        self.logged_step = self.step
        try:
            while self.step < self.total_steps and not self.time_is_up:
                epoch, within = divmod(self.step, self.steps_per_epoch)
                batches = self.loader.epoch(epoch, within * self.recipe.optim.accumulate)
                if self.method is not None:
                    self.method.begin_epoch(epoch)
                while self.step < (epoch + 1) * self.steps_per_epoch and not self.time_is_up:
                    record = self._optimise(batches)
                    self.step += 1
                    last = self.time_is_up or self.step == self.total_steps
                    if last or self.step % run.log_every == 0:
                        self._log_step(epoch, record)
                    epoch_ends = self.step % self.steps_per_epoch == 0
                    if last or epoch_ends or self.step % run.checkpoint_steps == 0:
                        self._refuse_spoiled_weights()
                        if last or (epoch_ends and (epoch + 1) % run.eval_every == 0):
                            self._validate(epoch)
                        self._save()
        finally:
            if self.logs is not None:
                self.logs.close()
        self.accelerator.wait_for_everyone()
        return TrainResult(self.folder, self.metrics)

    def _optimise(self, batches: Iterator[tuple[Any, ...]]) -> dict[str, float]:
        """One optimiser step; returns its loss terms, rate and gradient norm."""
        accelerator, recipe, step = self.accelerator, self.recipe, self.step
        lr = self.schedule.apply(self.optimizer, step)
        if self.method is not None:
            self.method.begin_step(step)
        accumulate = recipe.optim.accumulate
        sums: dict[str, Tensor] = {}
        for part in range(accumulate):
            batch = next(batches, None)
            if batch is None:
                raise TrainingError(f"the data ended before step {step} although more were due")
            last = part == accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.prepared):
                terms = self._losses(batch, (accelerator.process_index, step, part))
                accelerator.backward(terms["total"] / accumulate)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float() / accumulate
        limit = math.inf if recipe.optim.clip_grad is None else recipe.optim.clip_grad
        norm = accelerator.clip_grad_norm_(self.parameters, limit)
        means = self._mean_of_processes(sums)
        self._guard(means, float(norm))
        self.optimizer.step()
        self._count_skipped()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.model)
        return means | {"lr": lr, "grad_norm": float(norm)}

    def _losses(self, batch: tuple[Any, ...], place: tuple[int, int, int]) -> dict[str, Tensor]:
        batch, seed = on_device(batch, self.accelerator.device), self.recipe.run.seed
        with seeded(seed, 6, *place):  # dropout and stochastic depth draw from torch's own state
            terms: dict[str, Tensor] = self.prepared(*batch, mix_seed(seed, 7, *place))
        return terms

    def _mean_of_processes(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Terms averaged over the processes, which also agree on whether the time is up."""
        limit = self.recipe.run.max_seconds
        time_up = limit is not None and time.monotonic() - self.started > limit
        values = torch.stack([*terms.values(), terms["total"].new_tensor(float(time_up))])
        *means, share_up = self.accelerator.reduce(values, "mean").tolist()
        self.time_is_up = share_up > 0
        return dict(zip(terms, means, strict=True))

    def _guard(self, means: dict[str, float], norm: float) -> None:
        """Stop before a step that would spoil the weights; a scaler skips overflows itself."""
        has_scaler = self.accelerator.scaler is not None
        if math.isfinite(means["total"]) and (math.isfinite(norm) or has_scaler):
            return
        terms = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        reason = (
            f"step {self.step + 1} has no finite loss or gradient ({terms}, gradient {norm:.4g})"
        )
        if 0 < self.step == self.resumed_at:
            raise _SpoiltStateError(reason)
        raise self._stopped(reason)

    def _count_skipped(self) -> None:
        self.skipped = self.skipped + 1 if self.optimizer.step_was_skipped else 0
        if self.skipped > MOST_SKIPPED:
            raise self._stopped(
                f"step {self.step + 1} is one of {self.skipped} in a row without a finite gradient "
                "in half precision"
            )

    def _refuse_spoiled_weights(self) -> None:
        """Stop before weights are validated or saved from which no run could go on."""
        fault = self._fault()
        if fault is not None:
            raise self._stopped(f"step {self.step} spoiled the weights: {fault}")

    def _fault(self) -> str | None:
        """What is not finite in the weights, the optimiser, or an answer to noise."""
        try:
            self.task.check(self.model)
            if self.average is not None:
                self.task.check(self.average.model)
        except InputError as error:
            return str(error)
        is_sound = is_finite(self.optimizer.state_dict())
        return None if is_sound else "the optimiser's moments hold NaN or infinity"

    def _stopped(self, reason: str) -> TrainingError:
        return TrainingError(
            f"{reason}; the last saved state and result in {self.folder} are kept. In another "
            "folder, try a lower optim.lr, optim.clip_grad = 1.0, or run.precision = 'fp32'; "
            "model.checkpoint starts from that result"
        )

    def _log_step(self, epoch: int, record: Record) -> None:
        now = time.monotonic()
        rate = (self.step - self.logged_step) * self.global_batch / max(now - self.logged, 1e-9)
        self.logged, self.logged_step = now, self.step
        if self.logs is not None:
            place = {"step": self.step, "epoch": epoch}
            self.logs.write(place | record | {"images_per_second": round(rate, 1)})

    def _validate(self, epoch: int) -> None:
        """Measure, and write the result if it is the best so far, or if nothing measures it."""
        if self.task.latency is None:
            self._judge(epoch, {})
            return
        with self.task.latency.met(self._result, self.task.data_config) as found:
            self._judge(epoch, {"latency": found})

    def _judge(self, epoch: int, cost: dict[str, Any]) -> None:
        metrics: dict[str, Any] = {"step": self.step, "epoch": epoch, "weights": "last"} | cost
        if self.average is not None:
            metrics["weights"] = f"moving average, decay {self.average.decay}"
        if self.validation is None:
            self._export(metrics)
            return
        score = self.task.evaluate(self._result, self.validation, self.accelerator)
        main, found = score.main, dict(score.found)
        if "latency" in cost:
            found["predicted_ms"] = cost["latency"]["predicted"]
            if not cost["latency"]["is_met"]:
                main -= 100  # in percent: whatever meets the budget is better
        if self.logs is not None:
            self.logs.write({"step": self.step, "epoch": epoch} | found)
        if main > self.best:
            self.best = main
            measured = {"val_images": score.images, "val_data": self.recipe.data.val}
            measured |= score.more | {"precision": self._precision}
            self._export(metrics | found | measured)

    @property
    def _precision(self) -> str:
        name: str = self.accelerator.mixed_precision
        return name.replace("no", "fp32")

    @property
    def _result(self) -> nn.Module:
        """The weights that are validated and saved."""
        model: nn.Module = self.model
        return model if self.average is None else self.average.model

    def _export(self, metrics: dict[str, Any]) -> None:
        self.metrics = metrics
        if self.accelerator.is_main_process:
            with writing(self.folder):
                self.task.save(self._result, self.folder, self.recipe, metrics)

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "global_batch": self.global_batch,
            "best": self.best,
            "metrics": self.metrics,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.model.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        save_state(self.folder, self.step, state)

    def _go_on(self, before: int | None) -> None:
        """Restore the last state from which the run can go on, if there is any."""
        state = load_state(self.folder, before)
        while state is not None:
            if state["global_batch"] != self.global_batch:
                raise TrainingError(
                    f"the run in {self.folder} took {state['global_batch']} images per step and "
                    f"would now take {self.global_batch}; use as many processes as before, or "
                    "change optim.accumulate with their number in another folder"
                )
            fault = self._restore(state)
            if fault is None:
                return
            step = state["step"]
            logger.warning("passed over the state of step %d in %s: %s", step, self.folder, fault)
            state = load_state(self.folder, before=step)

    def _restore(self, state: dict[str, Any]) -> str | None:
        """Put everything back as it was saved; returns what is wrong with it."""
        try:
            load_strict(self.model, state["model"], "its model")
            self.optimizer.load_state_dict(state["optimizer"])
            self._check_moments()
            if self.average is not None:
                load_strict(self.average.model, state["average"], "its average")
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what does not fit raises nearly anything
            return f"it does not fit: {error}"
        self.step, self.best, self.metrics = state["step"], state["best"], state["metrics"]
        return self._fault()

    def _check_moments(self) -> None:
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                    raise ValueError(f"{name} of the optimiser is no tensor of floats")
                if value.ndim and value.shape != parameter.shape:
                    raise ValueError(f"{name} of the optimiser has shape {tuple(value.shape)}")
