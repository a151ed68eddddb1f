"""The pyramid alone, for heads of dense prediction."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from operator import index
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models._features import FeatureInfo, feature_take_indices
from torch import Tensor, nn

from vitrim.costs import without_head
from vitrim.errors import ConfigError, InputError
from vitrim.families import family_of
from vitrim.layers.losses import kept_token_mse
from vitrim.methods.records import FeatureOutput
from vitrim.tokens.calls import called
from vitrim.tokens.graphs import exporting
from vitrim.tokens.plain import Sizes


class FeaturesOnly(nn.Module):
    """A sparse model, or a dense timm model of a served family, that gives its pyramid: what timm's
    ``features_only`` models are to heads.

    Called, it gives a list of maps (B, C, H, W), in training mode by the differentiable forward,
    with the method's noise; :meth:`losses` has what training adds to the head's own losses. The
    model inside stays whole: it can be traced and turned to a budget. Parameters that no map passes
    (classifier, final norm) require no gradient from now on.

    Args:
        model: what :func:`vitrim.sparsify` made, or the timm model.
        out_indices: of the maps among those of ``model.feature_info``; a number takes the last so
            many, None the model's own.
    """

    generator: torch.Generator | None = None
    """Source of the method's noise in training; None is torch's global one."""

    def __init__(self, model: nn.Module, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.training = model.training
        self.is_sparse = hasattr(model, "method")
        family = self.family
        if family.clip_frames is not None:
            raise ConfigError(
                "a pyramid is of images, and this backbone takes clips; call the model for logits"
            )
        infos = deepcopy(family.backbone.feature_info)
        asked = family.level_indices if out_indices is None else out_indices
        self.out_indices = taken_indices(len(infos), asked)
        self.feature_info = FeatureInfo(infos, tuple(self.out_indices))
        self.output: FeatureOutput | None = None
        """Of the last forward in training mode, until :meth:`losses` is asked."""
        for name in family.head_parts:
            part = getattr(family.backbone, name, None)
            if part is not None:
                part.requires_grad_(False)

    @property
    def family(self) -> Any:
        """What runs the backbone piece by piece."""
        return self.model.family if self.is_sparse else family_of(self.model)

    def forward(self, images: Tensor, sizes: Sizes = None) -> list[Tensor]:
        """The maps of ``images``; ``sizes`` see :meth:`vitrim.model.SparseModel.features`."""
        self.output = None
        if not self.is_sparse and is_empty(images):
            return self.embedded(images)[0]
        if not self.is_sparse:
            return self._dense(images, sizes)[0]
        if not self.training or len(images) == 0:
            levels: list[Tensor] = self.model.features(images, sizes, self.out_indices)
            return levels
        self.output = self.model.train_features(images, sizes, self.out_indices, self.generator)
        return self.output.levels

    def embedded(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The maps, by the inference forward, and what the model's classifier reads (B, C)."""
        if not self.is_sparse and is_empty(images):
            levels, read = self.embedded(one_for_none(images))
            return [level[:0] for level in levels], read[:0]
        if not self.is_sparse:
            levels, state = self._dense(images, None)
            return levels, self.family.pool(state)
        embedded: tuple[list[Tensor], Tensor] = self.model.embedded_features(
            images, self.out_indices
        )
        return embedded

    def macs(self, image_size: tuple[int, int] | None = None) -> int | None:
        """MACs of the maps of one image of (height, width); None where they depend on the image."""
        if not self.is_sparse:
            return self.dense_macs(image_size)
        macs: int | None = self.model.features_macs(image_size)
        return macs

    def traced_macs(self, images: Tensor) -> float:
        """Mean MACs of the maps of ``images``, by what a trace says that each of them keeps."""
        macs = self.macs((images.shape[-2], images.shape[-1]))
        if macs is not None:
            return float(macs)
        trace, family = self.model.trace(images), self.family
        counts = [stage.counts.double() for stage in trace.stages]
        steps = self.model.method.steps(family.with_maps(trace.grid), trace.grid, counts)
        return float(torch.as_tensor(without_head(steps)).double().mean())

    def dense_macs(self, image_size: tuple[int, int] | None = None) -> int:
        """The same of the backbone alone."""
        family = self.family
        return int(without_head(family.dense_steps(family.grid(image_size))))

    def _dense(self, images: Tensor, sizes: Sizes) -> tuple[list[Tensor], Any]:
        run = partial(self.family.pyramid, indices=self.out_indices, sizes=sizes)
        pyramid: tuple[list[Tensor], Any] = called(self.model, run, images)
        return pyramid

    def losses(
        self, teacher: Sequence[Tensor] | None = None, pyramid_weight: float = 1.0
    ) -> dict[str, Tensor]:
        """Loss terms of the last forward in training mode by name, not weighted, and ``"total"``,
        their sum weighted as the method's config says.

        Args:
            teacher: the dense model's pyramid of the same images; then ``"pyramid"`` is the mean
                over the levels of the squared error where positions took the full computation.
            pyramid_weight: of that term in the total.

        Raises:
            InputError: there was no such forward since the last call, or the maps do not match.
        """
        output, self.output = self.output, None
        if output is None:
            raise InputError("no forward in training mode has been run since the last losses")
        parts, total = dict(output.losses), output.levels[0].new_zeros(())
        for name, part in parts.items():
            total = total + getattr(self.model.config, f"{name}_weight") * part
        if teacher is not None:
            parts["pyramid"] = pyramid_loss(output, teacher)
            total = total + pyramid_weight * parts["pyramid"]
        return parts | {"total": total}

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without what the last forward left."""
        return self.__dict__ | {"output": None, "generator": None}


def is_empty(images: Tensor) -> bool:
    """Whether this is a batch of no image; exporters are not asked."""
    return not exporting() and images.ndim > 0 and len(images) == 0


def one_for_none(images: Tensor) -> Tensor:
    """(1, ...): one image in place of a batch of none; of what it gives, none is taken."""
    return images.new_zeros(1, *images.shape[1:])


def taken_indices(count: int, asked: int | Sequence[int]) -> list[int]:
    """Which of ``count`` maps are asked for: those of these numbers, or the last so many.

    Raises:
        InputError: there are no such maps, or none is asked for.
    """
    try:
        places = asked if isinstance(asked, int) else [index(place) for place in asked]
        taken, _ = feature_take_indices(count, places)
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(
            f"the maps asked for are {asked!r}; expected some of 0 to {count - 1}, or how many of "
            "the last"
        ) from error
    return taken


class TimmPyramid(nn.Module):
    """The same maps by timm's own forward, to compare the speed with."""

    def __init__(self, features: FeaturesOnly) -> None:
        super().__init__()
        self.backbone, self.out_indices = features.family.backbone, features.out_indices
        self.training = self.backbone.training

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps of ``images``."""
        levels: list[Tensor] = self.backbone.forward_intermediates(
            images, indices=self.out_indices, intermediates_only=True
        )
        return levels


def pyramid_loss(output: FeatureOutput, teacher: Sequence[Tensor]) -> Tensor:
    """The mean over the levels of the squared distance from a dense teacher's maps, where positions
    took the full computation.

    Raises:
        InputError: the maps do not match.
    """
    shapes = [[tuple(level.shape) for level in levels] for levels in (output.levels, teacher)]
    if shapes[0] != shapes[1]:
        raise InputError(f"the teacher's maps are {shapes[1]}; expected {shapes[0]}")
    terms = []
    for student, wanted, keep in zip(output.levels, teacher, output.keeps, strict=True):
        keep_BN = torch.ones_like(student[:, 0]) if keep is None else keep
        found, taught = (x.flatten(2).transpose(1, 2) for x in (student, wanted.detach()))
        terms.append(kept_token_mse(found, taught, keep_BN.flatten(1).to(found.dtype)))
    return torch.stack(terms).mean()


class MapsOfOne(nn.Module):
    """Four maps for heads from one, at 4, 2, 1 and 1/2 times its side.

    Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (ViTDet), ECCV
    2022 (arXiv 2203.16527), section 3: by two transposed convolutions, one, none, or a max-pool;
    each then has a 1 x 1 and a 3 x 3 convolution with a norm.

    Args:
        width: channels of the one map.
        channels: of each map that this gives.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        half = width // 2
        four_times = nn.Sequential(_twice(width), LayerNorm2d(half), nn.GELU(), _twice(half))
        self.resize = nn.ModuleList([four_times, _twice(width), nn.Identity(), nn.MaxPool2d(2)])
        self.project = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(entering, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for entering in (half // 2, half, width, width)
        )

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Maps (B, channels, H, W), from the largest to the smallest."""
        levels = zip(self.resize, self.project, strict=True)
        return [project(resize(x_BCHW)) for resize, project in levels]


class SimplePyramid(nn.Module):
    """Four maps for heads from the one map of a plain vision transformer, by :class:`MapsOfOne`:
    strides 4, 8, 16 and 32 for patches of 16.

    Args:
        features: gives one map.
        channels: of each map that this gives.
    """

    def __init__(self, features: FeaturesOnly, channels: int = 256) -> None:
        super().__init__()
        given = features.feature_info
        if len(given.out_indices) != 1:
            raise InputError(
                f"the backbone gives {len(given.out_indices)} maps; a simple pyramid is made of "
                "one (out_indices=1)"
            )
        self.features = features
        (width,), (reduction,) = given.channels(), given.reduction()
        self.maps = MapsOfOne(width, channels)
        strides = (reduction / 4, reduction / 2, reduction, reduction * 2)
        infos = [
            {"num_chs": channels, "reduction": _whole(stride), "module": f"maps.project.{number}"}
            for number, stride in enumerate(strides)
        ]
        self.feature_info = FeatureInfo(infos, tuple(range(len(infos))))

    def forward(self, images: Tensor, sizes: Sizes = None) -> list[Tensor]:
        """Maps (B, channels, H, W), from the largest to the smallest."""
        (x,) = self.features(images, sizes)
        maps: list[Tensor] = self.maps(x)
        return maps

    def losses(
        self, teacher: Sequence[Tensor] | None = None, pyramid_weight: float = 1.0
    ) -> dict[str, Tensor]:
        """Those of :attr:`features`, whose one map a teacher's is compared with."""
        return self.features.losses(teacher, pyramid_weight)


def _whole(reduction: float) -> float:
    return int(reduction) if reduction == int(reduction) else reduction


def _twice(width: int) -> nn.ConvTranspose2d:
    """Doubles the side of a map, and halves its channels."""
    return nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)
