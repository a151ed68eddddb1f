"""What timm's helpers ask a model for, answered by a sparse one.

Optimisers (weight decay, layer decay), data configs, moving averages and training scripts take a
sparse model as they take the backbone. Names of parameters have ``backbone.`` before timm's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vitrim.errors import ConfigError
from vitrim.families import Family
from vitrim.families.inside import WithoutHead
from vitrim.tokens.calls import called
from vitrim.tokens.graphs import exporting

Result = TypeVar("Result")

PREFIX = "backbone."
_THE_BACKBONES = frozenset(
    (
        *("pretrained_cfg", "default_cfg", "num_classes", "num_features", "head_hidden_size"),
        *("feature_info", "in_chans", "get_classifier", "reset_classifier"),
        *("set_grad_checkpointing", "set_input_size"),
    )
)
"""What is the backbone's own; what it does not have, the sparse model has not either."""


class TimmModel(nn.Module):
    """The face of a sparse model that timm's helpers know."""

    backbone: Any
    method: Any

    @property
    def family(self) -> Family:
        """What runs the backbone piece by piece."""
        raise NotImplementedError

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

    def features(self, images: Tensor) -> list[Tensor]:
        """The feature pyramid of ``images`` (B, channels, H, W) for heads of dense prediction: the
        map (B, C, H, W) after each of the backbone's stages, by the inference forward.

        Raises:
            ConfigError: the method does not keep the backbone's map.
        """
        if is_empty(images):
            return [level[:0] for level in self.features(one_for_none(images))]
        levels: list[Tensor] = self.through(partial(self.method.features, self.family), images)
        return levels

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
        """The maps (B, C, H, W) after chosen stages, in timm's manner, for methods that keep a map.

        Args:
            images: (B, channels, H, W).
            indices: of stages; a number takes the last so many, None all.
            norm: not served: a map is as its stage left it.
            stop_early: has no effect; all stages are run.
            output_fmt: ``"NCHW"``; no other is served.
            intermediates_only: leave out what :meth:`forward_features` gives.

        Raises:
            ConfigError: the method keeps no map, or an option is not served.
        """
        if norm or output_fmt != "NCHW":
            raise ConfigError(
                f"norm={norm} and output_fmt={output_fmt!r} are not served; use norm=False and "
                "output_fmt='NCHW'"
            )
        maps = self.features(images)
        chosen, _ = feature_take_indices(len(maps), indices)
        taken = [maps[index] for index in chosen]
        return taken if intermediates_only else (self.forward_features(images), taken)


def is_empty(images: Tensor) -> bool:
    """Whether this is a batch of no image; exporters are not asked."""
    return not exporting() and images.ndim > 0 and len(images) == 0


def one_for_none(images: Tensor) -> Tensor:
    """(1, ...): one image in place of a batch of none; of what it gives, none is taken."""
    return images.new_zeros(1, *images.shape[1:])


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
