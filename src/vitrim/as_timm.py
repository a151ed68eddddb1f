"""What timm's helpers ask a model for, answered by a sparse one.

Optimisers (weight decay, layer decay), data configs, moving averages and training scripts take a
sparse model as they take the backbone. Names of parameters have ``backbone.`` before timm's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from timm.models._features import FeatureInfo
from torch import Tensor, nn

from vitrim.errors import ConfigError
from vitrim.families import Family
from vitrim.families.base import Pyramid
from vitrim.families.inside import WithoutHead
from vitrim.features import FeaturesOnly, is_empty, one_for_none, taken_indices
from vitrim.methods.base import Method
from vitrim.methods.records import FeatureOutput
from vitrim.tokens.calls import called
from vitrim.tokens.plain import Sizes

Result = TypeVar("Result")

PREFIX = "backbone."
_THE_BACKBONES = frozenset(
    (
        *("pretrained_cfg", "default_cfg", "num_classes", "num_features", "head_hidden_size"),
        *("in_chans", "get_classifier", "reset_classifier"),
        *("set_grad_checkpointing", "set_input_size"),
    )
)
"""What is the backbone's own; what it does not have, the sparse model has not either."""


@dataclass(frozen=True)
class Embeddings:
    """What one forward of a plain vision transformer says of images."""

    logits: Tensor
    """(B, classes); where there is no classifier, :attr:`pooled`."""
    pooled: Tensor
    """(B, C): what the classifier reads, pooled of the tokens that are kept."""
    prefix: Tensor
    """(B, P, C): class, distillation and register tokens."""
    patches: Tensor
    """(B, N, C): all patches, row by row. A dropped one is as it was when it was dropped, a merged
    one as the token that it is in."""


class TimmModel(nn.Module):
    """The face of a sparse model that timm's helpers know."""

    backbone: Any
    method: Any

    @property
    def family(self) -> Family:
        """What runs the backbone piece by piece."""
        raise NotImplementedError

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels, reductions and names of the maps that the backbone can give, in timm's form.
        Those of ``out_indices`` are what :meth:`features` gives if it is not told which.
        """
        return FeatureInfo(deepcopy(self.backbone.feature_info), self.family.level_indices)

    def __getattr__(self, name: str) -> Any:
        if name in _THE_BACKBONES:
            return getattr(self.backbone, name)
        if name == "group_matcher":
            return partial(_group_matcher, self.backbone.group_matcher)
        return super().__getattr__(name)

    def through(self, run: Callable[..., Result], images: Tensor) -> Result:
        """``run(images)`` as a call of backbone and method, for whoever hangs on them."""
        return called(self.backbone, partial(called, self.method, run), images)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that timm would not decay, whatever their shape."""
        names: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {PREFIX + name for name in names}

    def features(
        self,
        images: Tensor,
        sizes: Sizes = None,
        indices: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """The feature pyramid for heads of dense prediction, by the inference forward: maps
        (B, C, H, W) after the backbone's stages, or the one before the final norm of a plain vision
        transformer. With nothing dropped they are those of timm's feature extraction.

        A place whose token was dropped shows the features that it had when it was dropped, and one
        whose token was merged those of the token that it is in.

        Args:
            images: (B, channels, H, W).
            sizes: own (height, width) of each image in the upper left corner, where images were
                padded to one size, a multiple of the last reduction. Padding is never kept, seen by
                nobody, and 0 in the maps; shares are of each image's own positions, and its numbers
                do not depend on how far it was padded. Windows that hang over the border are padded
                before they are shifted and see none of it, where timm pads after and has it seen;
                whole windows give the numbers of a call without sizes.
            indices: of the maps among those of :attr:`feature_info`; of plain vision transformers
                they are the blocks.

        Raises:
            ConfigError: the method gives no maps, or does not serve ``sizes``.
            InputError: the images, or their sizes, do not suit the backbone.
        """
        if is_empty(images):
            sizes = None if sizes is None else [(images.shape[2], images.shape[3])]
            return [level[:0] for level in self.features(one_for_none(images), sizes, indices)]
        family = self.family
        indices = self._taken(indices)
        return self._maps(partial(self._settled().features, family), images, indices, sizes).levels

    def embedded_features(
        self, images: Tensor, indices: Sequence[int] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The pyramid, see :meth:`features`, and what the classifier reads (B, C): one forward."""
        if is_empty(images):
            levels, read = self.embedded_features(one_for_none(images), indices)
            return [level[:0] for level in levels], read[:0]
        family = self.family
        indices = self._taken(indices)
        output = self._maps(partial(self._settled().features, family), images, indices, None)
        return output.levels, family.pool(output.state)

    def embeddings(self, images: Tensor, norm: bool = True) -> Embeddings:
        """What other models, searches and probes go on from, in one forward.

        Args:
            images: (B, channels, H, W).
            norm: whether prefix tokens and patches have passed the final norm, as in timm's
                ``forward_features``.

        Raises:
            ConfigError: the method gives no maps, or the backbone is a pyramid.
        """
        if is_empty(images):
            one = self.embeddings(one_for_none(images), norm)
            return Embeddings(one.logits[:0], one.pooled[:0], one.prefix[:0], one.patches[:0])
        family, method = self.family, self._settled()
        if isinstance(family, Pyramid):
            raise ConfigError(
                f"embeddings are of plain vision transformers; of {family.name!r}, "
                "embedded_features gives the maps and what the classifier reads"
            )
        make = method.train_features if self.training else method.features
        output = self._maps(partial(make, family), images, family.level_indices, None)
        prefix_BPC = output.state.prefix_BPC[:, : family.num_prefix]
        x_BNC = torch.cat([prefix_BPC, output.levels[0].flatten(2).transpose(1, 2)], 1)
        x_BNC = self.backbone.norm(x_BNC) if norm else x_BNC
        logits, pooled = family.head(output.state), family.pool(output.state)
        return Embeddings(logits, pooled, *x_BNC.tensor_split([family.num_prefix], 1))

    def _maps(
        self, make: Callable[..., FeatureOutput], images: Tensor, indices: Any, sizes: Sizes
    ) -> FeatureOutput:
        """What a method makes of images, as a call of backbone and method that gives the maps."""
        outputs: list[FeatureOutput] = []

        def run(images: Tensor) -> list[Tensor]:
            outputs.append(make(images, indices, sizes))
            return outputs[0].levels

        levels = self.through(run, images)
        return replace(outputs[0], levels=levels)

    def train_features(
        self,
        images: Tensor,
        sizes: Sizes = None,
        indices: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> FeatureOutput:
        """The pyramid by the differentiable forward, with the method's noise from ``generator``;
        and what its training needs besides. See :meth:`features`.
        """
        family = self.family
        indices = self._taken(indices)
        make = partial(self.method.train_features, family, generator=generator)
        return self._maps(make, images, indices, sizes)

    def features_only(self, out_indices: int | Sequence[int] | None = None) -> FeaturesOnly:
        """A module that gives the pyramid alone, as timm's ``features_only`` models do; see
        :class:`FeaturesOnly`.
        """
        return FeaturesOnly(self, out_indices)

    def _taken(self, indices: Sequence[int] | None) -> Sequence[int]:
        """The maps that are asked for; None means the backbone's own."""
        if indices is None:
            return self.family.level_indices
        return taken_indices(self._num_maps, indices)

    @property
    def _num_maps(self) -> int:
        """How many maps the backbone can give; one that is not timm's has one per stage."""
        return len(getattr(self.backbone, "feature_info", self.family.level_indices))

    def _settled(self) -> Method:
        """The method with the settings that it has now, whatever another thread turns meanwhile."""
        method: Method = self.method
        return method if torch.compiler.is_compiling() else copy(method)

    def forward_features(self, images: Tensor) -> Tensor:
        """What timm's ``forward_features`` gives, after the final norm, of the tokens that are
        kept: (B, P + K, C) for plain transformers, the map for those that keep one.

        Raises:
            ConfigError: images of the batch keep different numbers of tokens and the head pools
                them, or the method has a head of its own.
        """
        if is_empty(images):
            return self.forward_features(one_for_none(images))[:0]
        features: Tensor = self.through(
            partial(self.method.infer, WithoutHead(self.family)), images
        )
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes), or with ``pre_logits`` what the classifier reads, of
        :meth:`forward_features`.
        """
        if not hasattr(self.backbone, "forward_head"):
            raise ConfigError("this backbone is not timm's and has no forward_head; call the model")
        return self.backbone.forward_head(features, pre_logits=pre_logits)  # type: ignore[no-any-return]

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps (B, C, H, W) after chosen stages or blocks, in timm's manner.

        Args:
            images: (B, channels, H, W).
            indices: of :attr:`feature_info`; a number takes the last so many, None all.
            norm: not served: a map is as its stage left it.
            stop_early: has no effect; all stages are run.
            output_fmt: ``"NCHW"``; no other is served.
            intermediates_only: leave out what :meth:`forward_features` gives.

        Raises:
            ConfigError: the method gives no map, or an option is not served.
        """
        if norm or output_fmt != "NCHW":
            raise ConfigError(
                f"norm={norm} and output_fmt={output_fmt!r} are not served; use norm=False and "
                "output_fmt='NCHW'"
            )
        count = self._num_maps
        chosen = taken_indices(count, count if indices is None else indices)
        taken = self.features(images, indices=chosen)
        return taken if intermediates_only else (self.forward_features(images), taken)


def _group_matcher(theirs: Any, coarse: bool = False) -> dict[str, Any]:
    """Which layer each parameter is of, for layer decay: timm's patterns for the backbone; what the
    method learns is new, and of the last layer.
    """
    return {
        layer: _behind_prefix(rule)
        if isinstance(rule, str)
        else [(_behind_prefix(pattern), place) for pattern, place in rule]
        for layer, rule in theirs(coarse).items()
    }


def _behind_prefix(pattern: str) -> str:
    """A pattern that timm matches from a name's start, for names behind :data:`PREFIX`."""
    inside = re.sub(r"(?<![\\\[])\^", "", pattern)
    return f"^{re.escape(PREFIX)}(?:{inside})"
