"""``sparsify`` and the model that it returns."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitrim import budget, checkpoint, hub
from vitrim.as_timm import TimmModel
from vitrim.budget import TOLERANCE, Calibration
from vitrim.config import to_plain
from vitrim.costs import without_head
from vitrim.errors import CheckpointError, ConfigError, InputError, UnsupportedBackboneError
from vitrim.families import Family, family_of
from vitrim.features import is_empty, one_for_none
from vitrim.methods import method_of_config
from vitrim.methods.base import Method
from vitrim.methods.records import DenseOutput, Recorder, StageTrace, TrainingOutput
from vitrim.modes import eval_mode
from vitrim.rebuilt import check_rebuilt, made
from vitrim.tokens.calls import is_hooked
from vitrim.tokens.plain import Grid, Sizes


@dataclass(frozen=True)
class Trace:
    """What a sparse model did with a batch."""

    logits: Tensor
    """(B, classes)"""
    stages: list[StageTrace]
    """One per stage, in order; places refer to the stage's grid (plain: the patches')."""
    macs: Tensor
    """(B,): multiply-accumulates spent on each image."""
    grid: Grid
    """Rows and columns of the patch grid."""

    def of_nothing(self) -> Trace:
        """The same of none of its images."""
        stages = [stage.of_nothing() for stage in self.stages]
        return Trace(self.logits[:0], stages, self.macs[:0], self.grid)


class SparseModel(TimmModel):
    """A timm model that computes only the tokens that matter; made by :func:`sparsify`.

    ``backbone`` is the timm model itself, with its own weights and names; ``method`` adds what the
    method learns. Calling it gives logits (B, classes), in training mode by the differentiable
    forward, so it drops into any loop, DDP or exporter that takes a timm model. Parameters of the
    backbone that the method never uses require no gradient until :meth:`unwrap`.

    Threads may run one model together, while another one turns its dial: a forward has the settings
    that it began with. Whether it trains is one fact for all of them.
    """

    method: Method

    def __init__(
        self, backbone: nn.Module, config: Any, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self._family = family = family_of(backbone)
        method_class: Any = method_of_config(config)
        method_class.check_family(family)
        self.backbone = backbone
        self.method = method_class(family, config, generator)
        self._traits = family.traits()
        self._unused = [p for p in self.method.unused(family) if p.requires_grad]
        for unused in self._unused:
            unused.requires_grad_(False)
        parameter = next(backbone.parameters())
        self.method.to(device=parameter.device, dtype=parameter.dtype)
        self.training = backbone.training  # the backbone's parts stay as they are
        self.method.train(backbone.training)
        self.origin: str | None = None
        self.data_config: dict[str, Any] = {}
        self.labels: tuple[str, ...] | None = None
        """Names of the classes, where the model brings some."""
        self.calibration = ()
        self._newborn = _samples(self.method)

    @property
    def family(self) -> Family:
        """What runs the backbone piece by piece, as it is now.

        Raises:
            UnsupportedBackboneError: it was replaced by one, or changed into one, that cannot be
                run so, or that the method was not made for.
        """
        if self._family.backbone is not self.backbone:  # another one, or a replica's
            found = family_of(self.backbone)
            type(self.method).check_family(found)
            self._family = found
        if torch.compiler.is_compiling():
            return self._family
        obstacles = list(self._family.obstacles(self.backbone))
        traits = self._family.traits() if not obstacles else self._traits
        obstacles += [
            f"{name}: {traits[name]}, and {value} when it was made sparse"
            for name, value in self._traits.items()
            if traits.get(name) != value
        ]
        if obstacles:
            raise UnsupportedBackboneError(
                f"the backbone has changed since it was made sparse: {'; '.join(obstacles)}. "
                "Change it back, or make it sparse again"
            )
        for name, container in self._family.containers():
            if is_hooked(container):
                warnings.warn(
                    f"hooks of backbone.{name} are not run: vitrim runs its blocks one by one; put "
                    "them on a block, or on the whole backbone",
                    stacklevel=3,
                )
        return self._family

    @property
    def takes_clips(self) -> bool:
        """Whether it takes clips (B, channels, frames, height, width) in place of images."""
        return self._family.clip_frames is not None

    @property
    def calibration(self) -> tuple[Calibration, ...]:
        """Budgets that :func:`vitrim.calibrate` met, with the weights that it found."""
        return self._calibration

    @calibration.setter
    def calibration(self, found: tuple[Calibration, ...]) -> None:
        self._calibration = found
        self._calibrated = checkpoint.fingerprint(self.state_dict()) if found else None

    @property
    def is_calibrated(self) -> bool:
        """Whether the record of a calibration is of the weights that the model has now."""
        return self._calibrated == checkpoint.fingerprint(self.state_dict())

    @property
    def config(self) -> Any:
        """The method's config, with whatever was changed at run time."""
        return self.method.config

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of ``images`` (B, channels, H, W)."""
        if is_empty(images):
            with eval_mode(self):
                one: Tensor = self(one_for_none(images))
            return one[:0]
        family, method = self.family, self._settled()

        def run(images: Tensor) -> Tensor:
            if self.training:
                return method.train_forward(family, images).logits
            return method.infer(family, images)

        return self.through(run, images)

    def trace(self, images: Tensor, sizes: Sizes = None) -> Trace:
        """Logits, and what each stage kept, by the inference forward without gradients.

        Deterministic: a model in training mode is put into evaluation mode for it, and back. With
        ``sizes``, see :meth:`features`, no padding is kept; the logits, which pool it, say nothing.
        """
        if is_empty(images):
            return self.trace(one_for_none(images)).of_nothing()
        family, method = self.family, self._settled()
        with torch.no_grad(), eval_mode(self):
            grid = family.grid(family.size_of(images))
            recorder = Recorder(grid)
            run = partial(method.infer, method.padded(family, sizes), recorder=recorder)
            logits = self.through(run, images)
        counts = [stage.counts.double() for stage in recorder.stages]
        macs = method.macs(family, grid, counts)
        macs = torch.as_tensor(macs, dtype=torch.float64, device=logits.device)
        return Trace(logits, recorder.stages, macs.expand(len(images)), grid)

    def teach(self, dense: nn.Module, images: Tensor) -> DenseOutput:
        """What ``dense`` says of ``images`` (B, channels, H, W): the teacher of :meth:`losses`.

        It is a timm model in evaluation mode with weights of its own, such as a copy of the
        backbone from before training; no gradient reaches it.

        Raises:
            UnsupportedBackboneError: vitrim cannot run ``dense`` piece by piece.
        """
        said: DenseOutput = self.method.teach(family_of(dense), images)
        return said

    def losses(
        self,
        images: Tensor,
        target: Tensor | None = None,
        teacher: DenseOutput | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The method's loss terms by name and their weighted sum, ``"total"``.

        Args:
            images: (B, channels, H, W).
            target: class numbers (B,) or soft targets (B, classes); None leaves labels out.
            teacher: what the dense model says of the same images; None leaves distillation out.
            generator: source of the method's noise; None uses torch's global one.

        Raises:
            InputError: the batch is empty, or the teacher knows another number of classes.
            ConfigError: there are labels, and the backbone has no classifier.
        """
        if len(images) == 0:
            raise InputError("the batch is empty; a loss is a mean over at least one image")
        family = self.family
        if target is not None and getattr(self.backbone, "num_classes", None) == 0:
            raise ConfigError("the backbone has no classifier (num_classes=0); leave labels out")
        outputs: list[TrainingOutput] = []

        def run(images: Tensor) -> Tensor:
            outputs.append(self.method.train_forward(family, images, generator))
            return outputs[0].logits

        logits = self.through(run, images)
        if teacher is not None and teacher.logits.shape[1] != logits.shape[1]:
            raise InputError(
                f"the teacher gives {teacher.logits.shape[1]} logits, and this model "
                f"{logits.shape[1]}; distil from a model of the same classes"
            )
        return self.method.losses(replace(outputs[0], logits=logits), target, teacher)

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        """Change the keep ratio at run time.

        Raises:
            ConfigError: the ratio is out of range, or the method has none.
        """
        self.method.set_keep_ratio(keep_ratio)

    def set_density(self, density: float | None) -> None:
        """Change the density at run time; None is the dense model, bit for bit.

        Raises:
            ConfigError: the density is out of range, or the method has none.
        """
        self.method.set_density(density)

    def set_budget(self, macs: float, *, tolerance: float = TOLERANCE) -> None:
        """Turn the method's dial to a mean cost, at run time.

        Where every image keeps the same number of tokens, a formula says how far; where the counts
        depend on the images, the record of :func:`vitrim.calibrate` does: a budget that it was
        called for, or one between two of them.

        Args:
            macs: share of the dense model's MACs, such as 0.6.
            tolerance: relative difference that still meets a budget, where a formula is used.

        Raises:
            ConfigError: the budget cannot be reached, nothing was calibrated around it, the weights
                have changed since, or the method has no dial. The model is left as it was.
        """
        budget.check_budget(macs)
        trial, grid = copy.copy(self.method), self.family.grid()
        if self.macs() is None:
            if self.calibration and not self.is_calibrated:
                raise ConfigError(
                    "the weights have changed since vitrim.calibrate met its budgets; calibrate "
                    "again"
                )
            value = budget.value_by_record(self.calibration, trial.dial(), macs)
        else:
            fraction = partial(self._fraction_at, trial, grid)
            value = budget.value_by_formula(trial.dial(), fraction, macs, tolerance)
        self.method.turn(value)

    def _fraction_at(self, trial: Method, grid: Grid, value: float) -> float:
        """The share of the dense MACs with the dial at ``value``, by formula; turns the trial's."""
        trial.turn(value)
        counts = trial.counts(self._family, grid)
        if counts is None:
            raise ConfigError(f"{trial.name} at {value:g} keeps counts that no formula gives")
        return int(trial.macs(self._family, grid, counts)) / self._family.dense_macs(grid)

    def snapshot(self) -> Callable[[], None]:
        """What puts the method's settings and parameters, and the record, back as they are now."""
        method, record = self.method, (self._calibration, self._calibrated)
        settings = {name: value for name, value in vars(method).items() if name not in _OF_TORCH}
        parameters = {name: tensor.clone() for name, tensor in method.state_dict().items()}

        def restore() -> None:
            for name in vars(method).keys() - settings.keys() - _OF_TORCH:
                delattr(method, name)
            vars(method).update(settings)
            method.load_state_dict(parameters)
            self._calibration, self._calibrated = record

        return restore

    @property
    def is_untrained(self) -> bool:
        """Whether the method has parameters to learn, and they are still what they were at first.

        Judged by a sample of each; weights that were loaded count as learned.
        """
        now = _samples(self.method)
        return bool(self._newborn) and all(
            name in now
            and torch.allclose(sample.float(), now[name].to(sample).float(), rtol=1e-2, atol=1e-4)
            for name, sample in self._newborn.items()
        )

    def features_macs(self, image_size: tuple[int, int] | None = None) -> int | None:
        """MACs of :meth:`features` of one image of (height, width): of the backbone without its
        classifier; None where they depend on the image.
        """
        family, grid = self.family, self.family.grid(image_size)
        counts = self.method.counts(family, grid)
        if counts is None:
            return None
        return int(without_head(self.method.steps(family.with_maps(grid), grid, counts)))

    def dense_features_macs(self, image_size: tuple[int, int] | None = None) -> int:
        """The same of the backbone alone."""
        return int(without_head(self.family.dense_steps(self.family.grid(image_size))))

    def macs(self, image_size: tuple[int, int] | None = None) -> int | None:
        """MACs of one image of (height, width); None where they depend on the image."""
        grid = self.family.grid(image_size)
        counts = self.method.counts(self.family, grid)
        return None if counts is None else int(self.method.macs(self.family, grid, counts))

    def dense_macs(self, image_size: tuple[int, int] | None = None) -> int:
        """MACs of the backbone alone on one image of (height, width)."""
        return self.family.dense_macs(self.family.grid(image_size))

    def unwrap(self) -> nn.Module:
        """The plain timm model, with the weights that it has now."""
        for unused in self._unused:
            unused.requires_grad_()
        model: nn.Module = self.backbone
        return model

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        metrics: dict[str, Any] | None = None,
        origin: str | None = None,
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``; they appear whole or not at all.

        Args:
            folder: made if absent; an earlier checkpoint in it is replaced.
            metrics: what was measured and how, for the record.
            origin: where the weights came from, for the record.

        Raises:
            CheckpointError: what would be read back is not this model: timm did not make the
                backbone, something in it was replaced, adapted, tied, quantised or sharded, or a
                weight is not finite.
        """
        still = copy.copy(self)  # whatever another thread turns meanwhile
        still._modules = self._modules | {"method": self._settled()}
        weights = checkpoint.plain_weights(still.state_dict())
        records = self.calibration if self.calibration and self.is_calibrated else ()
        known = {
            "method": {"name": still.method.name, "config": to_plain(still.config)},
            "calibration": [to_plain(record) for record in records],
            "origin": origin or self.origin,
            "metrics": metrics or {},
            "labels": self._labels(),
        }
        description = checkpoint.described(self.backbone, self.data_config, known)
        check_rebuilt(SparseModel, still, description, weights)
        checkpoint.write(folder, description, weights)

    def push_to_hub(
        self,
        repository: str,
        *,
        metrics: dict[str, Any] | None = None,
        private: bool | None = None,
        revision: str | None = None,
        message: str | None = None,
    ) -> str:
        """Commit the checkpoint to Hugging Face's hub, with a card that says what it is.

        Args:
            repository: ``owner/name``; made if absent.
            metrics: what was measured and how, such as
                ``{"top-1 on 1,300 validation images": 81.0}``.
            private: whether a new repository is; None leaves that to the hub.
            revision: branch, made if absent; None takes the main one.
            message: of the commit.

        Returns:
            the address of the commit.

        Raises:
            CheckpointError: see :meth:`save_pretrained`; or the hub cannot be reached, or refuses.
        """
        options = {"private": private, "revision": revision, "message": message}
        return hub.push_model(self, repository, metrics, **options)

    def _labels(self) -> list[str] | None:
        """The names of the classes, if they are still those of the classifier."""
        labels = list(self.labels or ())
        return labels if labels and len(labels) == self.num_classes else None


_OF_TORCH = set(vars(nn.Module()))


def _samples(method: Method) -> dict[str, Tensor]:
    """The first values of each parameter, where a selector must be learned, and there are any."""
    if method.needs_training is None:
        return {}
    return {
        name: checkpoint.whole(parameter.detach()).flatten()[:8].clone()
        for name, parameter in method.named_parameters()
        if not parameter.is_meta
    }


def from_pretrained(
    folder: str | os.PathLike[str], *, revision: str | None = None, **method_options: Any
) -> SparseModel:
    """Load a checkpoint; the model is in evaluation mode, on the CPU.

    Args:
        folder: with ``config.json`` and ``model.safetensors``; or, where there is no such folder,
            a text ``owner/name``: a model on Hugging Face's hub.
        revision: branch, tag or commit on the hub.
        method_options: fields of the method's config to change, such as ``threshold=0.5``.

    Raises:
        CheckpointError: damaged, foreign, of another version, or of another architecture; or the
            hub cannot be reached.
        ConfigError: the method's fields are not valid.
    """
    folder = hub.folder_of(folder, revision)
    description, weights = checkpoint.read(folder)
    if "task" in description:
        raise CheckpointError(
            f"{folder} holds a detector or segmenter; open it by vitrim.tasks.from_pretrained"
        )
    model = made(
        SparseModel, description, weights, f"{folder}/{checkpoint.WEIGHTS_FILE}", method_options
    )
    model.origin = description.get("origin")
    model.data_config = description["data"]
    model.labels = checkpoint.read_labels(description, model.num_classes)
    if not method_options:  # other settings, other costs
        model.calibration = checkpoint.read_calibration(description)
    return model.eval()


def sparsify(
    model: nn.Module, config: Any, *, generator: torch.Generator | None = None
) -> SparseModel:
    """Make a trained timm model token-sparse.

    The weights are shared, not copied: training the result trains ``model``.

    Args:
        model: a timm model of a served family.
        config: a method's config, such as ``DynamicViTConfig(keep_ratio=0.7)``; its type chooses
            the method.
        generator: source of the new parameters' values; None uses torch's global one.

    Raises:
        UnsupportedBackboneError: the model cannot be run piece by piece.
        ConfigError: the config does not fit the model.
    """
    if isinstance(model, SparseModel):
        raise UnsupportedBackboneError(
            f"this model is sparse already, by {model.method.name}; set_budget changes its cost, "
            "and unwrap() gives the timm model, to make it sparse in another way"
        )
    return SparseModel(model, config, generator)
