"""``sparsify`` and the model that it returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrim import budget, checkpoint
from vitrim.budget import TOLERANCE, Calibration
from vitrim.config import to_plain
from vitrim.errors import ConfigError
from vitrim.families import family_of
from vitrim.methods import method_of_config
from vitrim.methods.base import Method
from vitrim.methods.records import DenseOutput, Recorder, StageTrace
from vitrim.tokens.plain import Grid


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


class SparseModel(nn.Module):
    """A timm model that computes only the tokens that matter; made by :func:`sparsify`.

    ``backbone`` is the timm model itself, with its own weights and names; ``method`` adds what the
    method learns. Calling it gives logits (B, classes), in training mode by the differentiable
    forward, so it drops into any loop, DDP or exporter that takes a timm model.
    """

    def __init__(
        self, backbone: nn.Module, config: Any, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.family = family_of(backbone)
        method_class: Any = method_of_config(config)
        method_class.check_family(self.family)
        self.backbone = backbone
        self.method: Method = method_class(self.family, config, generator)
        parameter = next(backbone.parameters())
        self.method.to(device=parameter.device, dtype=parameter.dtype)
        self.train(backbone.training)
        self.origin: str | None = None
        self.data_config: dict[str, Any] = {}
        self.calibration: tuple[Calibration, ...] = ()
        """Budgets that :func:`vitrim.calibrate` met with the present weights."""
        self._newborn = _samples(self.method)

    @property
    def config(self) -> Any:
        """The method's config, with whatever was changed at run time."""
        return self.method.config

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of ``images`` (B, channels, H, W)."""
        if self.training:
            return self.method.train_forward(self.family, images).logits
        return self.method.infer(self.family, images)

    def features(self, images: Tensor) -> list[Tensor]:
        """The feature pyramid of ``images`` (B, channels, H, W) for heads of dense prediction: the
        map (B, C, H, W) after each of the backbone's stages, by the inference forward.

        Raises:
            ConfigError: the method does not keep the backbone's map.
        """
        return self.method.features(self.family, images)

    def trace(self, images: Tensor) -> Trace:
        """Logits, and what each stage kept, by the inference forward without gradients.

        Deterministic: a model in training mode is put into evaluation mode for it, and back.
        """
        if self.training:
            self.eval()
            try:
                return self.trace(images)
            finally:
                self.train()
        with torch.no_grad():
            grid = self.family.grid((images.shape[-2], images.shape[-1]))
            recorder = Recorder(grid)
            logits = self.method.infer(self.family, images, recorder)
        counts = [stage.counts.double() for stage in recorder.stages]
        macs = self.method.macs(self.family, grid, counts)
        macs = torch.as_tensor(macs, dtype=torch.float64, device=logits.device)
        return Trace(logits, recorder.stages, macs.expand(len(images)), grid)

    def losses(
        self,
        images: Tensor,
        target: Tensor | None = None,
        teacher: DenseOutput | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The method's loss terms by name and their weighted sum, ``"total"``.

        The record of a calibration is forgotten: it holds for the weights that it was made with.

        Args:
            images: (B, channels, H, W).
            target: class numbers (B,) or soft targets (B, classes); None leaves labels out.
            teacher: what the dense model says of the same images; None leaves distillation out.
            generator: source of the method's noise; None uses torch's global one.
        """
        self.calibration = ()
        output = self.method.train_forward(self.family, images, generator)
        return self.method.losses(output, target, teacher)

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
            ConfigError: the budget cannot be reached, nothing was calibrated around it, or the
                method has no dial. The model is left as it was.
        """
        budget.check_budget(macs)
        restore = self.snapshot()
        try:
            dial = self.method.dial
            if self.macs() is None:
                value = budget.value_by_record(self.calibration, dial, macs)
            else:
                value = budget.value_by_formula(dial, self._fraction_at, macs, tolerance)
            self.method.turn(value)
        except BaseException:
            restore()
            raise

    def _fraction_at(self, value: float) -> float:
        """The share of the dense MACs with the dial at ``value``, by formula; turns the dial."""
        self.method.turn(value)
        macs = self.macs()
        if macs is None:
            raise ConfigError(f"{self.method.name} at {value:g} keeps counts that no formula gives")
        return macs / self.dense_macs()

    def snapshot(self) -> Callable[[], None]:
        """What puts the method's settings and parameters, and the record, back as they are now."""
        method, record = self.method, self.calibration
        settings = {name: value for name, value in vars(method).items() if name not in _OF_TORCH}
        parameters = {name: tensor.clone() for name, tensor in method.state_dict().items()}

        def restore() -> None:
            for name in vars(method).keys() - settings.keys() - _OF_TORCH:
                delattr(method, name)
            vars(method).update(settings)
            method.load_state_dict(parameters)
            self.calibration = record

        return restore

    @property
    def is_untrained(self) -> bool:
        """Whether the method has parameters to learn, and they are still what they were at first.

        Judged by a sample of each; weights that were loaded count as learned.
        """
        now = _samples(self.method)
        return bool(now) and all(
            torch.allclose(sample.float(), now[name].to(sample).float(), rtol=1e-2, atol=1e-4)
            for name, sample in self._newborn.items()
        )

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
        return self.backbone

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
            CheckpointError: timm did not make the backbone, or no file can say how.
        """
        description = {
            "data": checkpoint.describe_data(self.backbone) | self.data_config,
            "method": {"name": self.method.name, "config": to_plain(self.config)},
            "calibration": [to_plain(record) for record in self.calibration],
            "origin": origin or self.origin,
            "metrics": metrics or {},
        }
        checkpoint.write(folder, self.backbone, description, self.state_dict())


_OF_TORCH = set(vars(nn.Module()))


def _samples(method: Method) -> dict[str, Tensor]:
    """The first values of each parameter, where a selector must be learned."""
    if method.needs_training is None:
        return {}
    return {name: p.detach().flatten()[:8].clone() for name, p in method.named_parameters()}


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation and inference mode; afterwards every module is as it was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def from_pretrained(folder: str | os.PathLike[str], **method_options: Any) -> SparseModel:
    """Load a checkpoint folder; the model is in evaluation mode, on the CPU.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.
        method_options: fields of the method's config to change, such as ``threshold=0.5``.

    Raises:
        CheckpointError: damaged, foreign, of another version, or of another architecture.
        ConfigError: the method's fields are not valid.
    """
    description, weights, backbone, config, calibration = checkpoint.read(folder, method_options)
    model = SparseModel(backbone, config)
    checkpoint.load_strict(model, weights, f"{folder}/{checkpoint.WEIGHTS_FILE}")
    model.origin = description.get("origin")
    model.data_config = description["data"]
    if not method_options:  # other settings, other costs
        model.calibration = calibration
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
    return SparseModel(model, config, generator)
