"""What every family offers to the rest of the library, whatever the shape of its backbones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from vitrim import losses
from vitrim.errors import InputError
from vitrim.tokens import Grid


class Family(ABC):
    """Runs one backbone piece by piece; holds no weights of its own.

    What else a family offers depends on the shape of its backbones: methods are written for the
    families that they name (``Method.families``).
    """

    name: ClassVar[str]
    serves: ClassVar[str]
    """The backbones that it runs, in words."""
    labels_patches: ClassVar[bool] = False
    """Whether its patch tokens have a classifier of their own."""

    @staticmethod
    @abstractmethod
    def accepts(model: nn.Module) -> bool:
        """Whether ``model`` is of this family's classes; subclasses with own forwards are not."""

    @staticmethod
    @abstractmethod
    def obstacles(model: Any) -> Iterator[str]:
        """What keeps an accepted ``model`` from being run piece by piece; empty when it can."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that the backbone was created for."""

    @abstractmethod
    def grid(self, image_size: tuple[int, int] | None = None) -> Grid:
        """Rows and columns of the patches that an image of ``image_size`` is first cut into."""

    @abstractmethod
    def check_images(self, images: Tensor) -> None:
        """Raise :class:`InputError` unless the backbone takes ``images`` (B, channels, H, W)."""

    @abstractmethod
    def head(self, state: Any, /) -> Tensor:
        """Logits (B, classes): what the model answers, given what left its last block."""

    def training_head(self, state: Any, /) -> Tensor:
        """Logits (B, classes) that losses look at; for most backbones, those of :meth:`head`."""
        return self.head(state)

    @staticmethod
    def token_loss(student_BNC: Tensor, teacher_BNC: Tensor, keep_BN: Tensor) -> Tensor:
        """How far a student's ``patch_features`` are from a teacher's where tokens are kept."""
        return losses.kept_token_mse(student_BNC, teacher_BNC, keep_BN)

    @abstractmethod
    def dense_macs(self, grid: Grid) -> int:
        """MACs of the backbone alone on one image of ``grid`` patches."""


def check_patched_images(images: Tensor, backbone: Any, flexible: bool) -> None:
    """Raise :class:`InputError` unless ``images`` suit a backbone with timm's patch embedding.

    Args:
        images: (B, channels, H, W).
        backbone: has ``in_chans`` and ``patch_embed``.
        flexible: whether it takes other sizes than the one it was created for.
    """
    patch_embed, shape = backbone.patch_embed, tuple(images.shape)
    if images.ndim != 4 or shape[1] != backbone.in_chans:
        raise InputError(
            f"images have shape {shape}; expected (batch, {backbone.in_chans}, height, width)"
        )
    if not flexible:
        height, width = patch_embed.img_size
        if shape[2:] != (height, width):
            raise InputError(
                f"images are {shape[2]} x {shape[3]} pixels; this backbone takes {height} x "
                f"{width}. Resize them, or create the backbone with img_size=... or "
                "dynamic_img_size=True"
            )
    elif not patch_embed.dynamic_img_pad:
        height, width = patch_embed.patch_size
        if shape[2] % height or shape[3] % width:
            raise InputError(
                f"images are {shape[2]} x {shape[3]} pixels; both sides must be multiples of the "
                f"patch size {height} x {width}"
            )
