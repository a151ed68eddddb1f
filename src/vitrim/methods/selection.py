"""What methods with learned selectors share: settings, the teacher's saliency, and losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vitrim.config import check_weights, normalise, require
from vitrim.families import ViT
from vitrim.layers import losses
from vitrim.layers.stages import check_keep_ratio, check_stages, stage_ratios
from vitrim.methods.base import RatioMethod, answer_parts, with_total
from vitrim.methods.records import Decision, DenseOutput, SelectionOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioConfig:
    """What a method with selectors and a ratio loss is set by."""

    keep_ratio: float | tuple[float, ...] = 0.7
    """Kept share of the positions: the target of the ratio loss, and, where no image decides, what
    is kept. One number r gives r, r^2, r^3 ... at the stages; a tuple gives the share at each."""
    stages: tuple[int, ...] | None = None
    """Blocks before which positions are dropped; None takes a quarter, a half and three quarters of
    the depth, if the method does not say otherwise."""
    temperature: float = 1.0
    """Of the relaxed draw in training. Papers: 1, not annealed."""
    classification_weight: float = 1.0
    """Weight of the cross entropy. Papers: 1."""
    ratio_weight: float = 2.0
    """Weight of the ratio loss, mean over the stages. Papers: 2."""
    distill_weight: float = 0.5
    """Weight of KL(teacher || student) on the logits. Papers: 0.5."""
    token_weight: float = 0.5
    """Weight of the squared error on what is kept to the end, after the final norm (LV-ViT: of the
    KL divergence on their logits). Papers: 0.5."""
    version: int = 1
    may_rise: ClassVar[bool] = False
    """Whether a later stage may keep more than an earlier one."""

    def __post_init__(self) -> None:
        normalise(self)
        check_keep_ratio(self.keep_ratio, self.may_rise)
        if self.stages is not None:
            check_stages(self.stages)
            self.ratios(len(self.stages))
        require(self.temperature > 0, f"temperature is {self.temperature}; expected more than 0")
        check_weights(self, "classification", "ratio", "distill", "token")

    def ratios(self, num_stages: int) -> tuple[float, ...]:
        """The kept share of the original positions at each stage."""
        return stage_ratios(self.keep_ratio, num_stages)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectorConfig(RatioConfig):
    """What both forms of SPViT are set by."""

    threshold: float = 0.5
    """Of ``inference="threshold"``, on the mean of the heads' keep probabilities. In [0, 1)."""
    package_mode: Literal["keep_weighted", "mean", "sum"] = "keep_weighted"
    """The package token: mean of the dropped tokens weighted by their keep scores (the authors'
    code for PiT); plain mean; or weighted sum (their last file)."""
    share_heads: bool = True
    """One selector MLP for all heads (the authors' code) or one per head."""
    fuse: Literal["log", "prob"] = "log"
    """What is averaged over the heads to decide: log-probabilities (the authors' code), or
    probabilities, of which the logarithm is then taken (the paper's equation)."""
    split: Literal["half", "shared"] = "half"
    """Whether one half of a token's embedding is local and the other averaged over the image (the
    authors' code), or the same, half as wide, is both (the paper's equation)."""

    def __post_init__(self) -> None:
        RatioConfig.__post_init__(self)
        threshold = self.threshold
        require(0 <= threshold < 1, f"threshold is {threshold}; expected a probability in [0, 1)")


class SelectorMethod(RatioMethod):
    """Either form of SPViT: how inference chooses is its config's ``inference``."""

    fixed_by = 'inference="top_k"'

    @classmethod
    def decides(cls, config: Any) -> bool:
        return bool(config.inference != "top_k")

    @classmethod
    def kinds(cls) -> tuple[Any, ...]:
        return cls.config_class(inference="top_k"), cls.config_class()

    @property
    def _threshold(self) -> float:
        return float(self.config.threshold) if self.config.inference == "threshold" else 0.5

    def _with_threshold(self, value: float) -> Any:
        return replace(self.config, inference="threshold", threshold=value)


def check_scores(config: Any) -> None:
    """Raise :class:`ConfigError` unless ``score_weight``, ``score_noise`` and ``sampling`` are in
    range and go together.
    """
    check_weights(config, "score")
    noise = config.score_noise
    require(noise >= 0, f"score_noise is {noise}; expected 0 or more")
    require(
        config.sampling != "top_k" or config.score_weight > 0,
        'sampling="top_k" teaches the selectors by the score loss alone; set score_weight',
    )


def salient_teacher(family: ViT, images: Tensor, blocks: Sequence[int]) -> DenseOutput:
    """A teacher's output with the saliency of the tokens that enter ``blocks``."""
    tokens, saliency = family.saliency(images, blocks)
    with torch.no_grad():
        return DenseOutput(family.training_head(tokens), family.patch_features(tokens), saliency)


def selection_losses(
    config: Any,
    output: SelectionOutput,
    own: dict[str, Tensor],
    target: Tensor | None,
    teacher: DenseOutput | None,
    counts: Sequence[int],
) -> dict[str, Tensor]:
    """The losses of a method whose selectors are learned, by name, and their ``"total"``.

    Args:
        config: has ``<name>_weight`` for ratio, classification, distill, token and score.
        output: of the training forward.
        own: the method's own terms: its ratio loss.
        target: labels, or None.
        teacher: what the dense model says, or None; with its saliency if scores are taught.
        counts: tokens that each stage should keep, for the score loss.
    """
    require(
        not config.score_weight or (teacher is not None and len(teacher.saliency) > 0),
        "score_weight is above 0, so the loss needs a dense teacher's saliency (ViT.saliency)",
    )
    parts = own | answer_parts(output, target, teacher)
    if teacher is not None:
        parts["token"] = _token_loss(output, teacher)
        if config.score_weight:
            parts["score"] = _score_loss(output.decisions, teacher, counts)
    return with_total(config, parts)


def _token_loss(output: SelectionOutput, teacher: DenseOutput) -> Tensor:
    tokens, features = output.tokens, output.patch_features
    index = tokens.index_BN.unsqueeze(-1).expand_as(features)
    keep_BK = tokens.keep_BN
    if keep_BK is None:
        keep_BK = features.new_ones(features.shape[:2])
    return output.token_loss(features, teacher.patch_features.gather(1, index), keep_BK)


def _score_loss(
    decisions: Sequence[Decision], teacher: DenseOutput, counts: Sequence[int]
) -> Tensor:
    """How far the selectors are from keeping the most salient of the tokens they see."""
    terms = []
    for decision, saliency, count in zip(decisions, teacher.saliency, counts, strict=True):
        seen = saliency.gather(1, decision.before.index_BN)
        alive = decision.before.keep_BN
        terms.append(losses.best_tokens_loss(decision.log_probs, seen, alive, count))
    return torch.stack(terms).mean()
