"""``sparsify`` and the model that it returns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.families import family_of
from vitrim.methods import method_of_config
from vitrim.methods.base import DenseOutput, Method, Recorder, StageTrace


@dataclass(frozen=True)
class Trace:
    """What a sparse model did with a batch."""

    logits: Tensor
    """(B, classes)"""
    stages: list[StageTrace]
    """One per stage, in order; places refer to the original patch grid."""
    macs: Tensor
    """(B,): multiply-accumulates spent on each image."""
    grid: tuple[int, int]
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
        self.backbone = backbone
        self.method: Method = method_class(self.family, config, generator)
        parameter = next(backbone.parameters())
        self.method.to(device=parameter.device, dtype=parameter.dtype)
        self.train(backbone.training)
        self.origin: str | None = None
        self.data_config: dict[str, Any] = {}

    @property
    def config(self) -> Any:
        """The method's config, with whatever was changed at run time."""
        return self.method.config

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of ``images`` (B, channels, H, W)."""
        if self.training:
            return self.method.train_forward(self.family, images).logits
        return self.method.infer(self.family, images)

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
            num_patches = grid[0] * grid[1]
            recorder = Recorder(num_patches)
            logits = self.method.infer(self.family, images, recorder)
        counts = [stage.counts.double() for stage in recorder.stages]
        macs = self.method.macs(self.family, num_patches, counts)
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

        Args:
            images: (B, channels, H, W).
            target: class numbers (B,) or soft targets (B, classes); None leaves labels out.
            teacher: what the dense model says of the same images; None leaves distillation out.
            generator: source of the method's noise; None uses torch's global one.
        """
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

    def macs(self, image_size: tuple[int, int] | None = None) -> int | None:
        """MACs of one image of (height, width); None where they depend on the image."""
        num_patches = self._num_patches(image_size)
        counts = self.method.counts(num_patches)
        if counts is None:
            return None
        return int(self.method.macs(self.family, num_patches, counts))

    def dense_macs(self, image_size: tuple[int, int] | None = None) -> int:
        """MACs of the backbone alone on one image of (height, width)."""
        family, num_patches = self.family, self._num_patches(image_size)
        num_tokens = num_patches + family.num_prefix
        blocks = sum(family.block_macs(block, num_tokens) for block in range(family.depth))
        return int(family.stem_macs(num_patches) + blocks + family.head_macs(num_tokens))

    def _num_patches(self, image_size: tuple[int, int] | None) -> int:
        rows, columns = self.family.grid(image_size)
        return rows * columns

    def unwrap(self) -> nn.Module:
        """The plain timm model, with the weights that it has now."""
        return self.backbone

    def save_pretrained(
        self, folder: str | os.PathLike[str], metrics: dict[str, Any] | None = None
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``; see ``checkpoint.save``."""
        from vitrim import checkpoint

        checkpoint.save(self, folder, metrics=metrics)


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
