"""What every method offers to the rest of the library."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitrim.config import require
from vitrim.costs import Step, total_macs
from vitrim.errors import ConfigError, UnsupportedBackboneError
from vitrim.families import Family
from vitrim.families.base import Pyramid, refuse_sizes
from vitrim.families.inside import Padded, WithMaps
from vitrim.layers import losses, sampling
from vitrim.layers.stages import fixed_counts
from vitrim.methods.records import (
    Action,
    DenseOutput,
    Dial,
    FeatureOutput,
    Plan,
    TrainingOutput,
)
from vitrim.tokens.attention import AttentionRecord
from vitrim.tokens.plain import Grid, Sizes, Tokens

SHARES = tuple(step / 400 for step in range(1, 401))
"""Of the positions: what training to a latency may start from."""
OF_CLIPS = {"video_swin": "it is of images; use stvit_video"}
"""What methods of images say of families of clips."""


class Method(nn.Module, ABC):
    """One way of sparsifying: its parameters, its loop over the blocks, its losses.

    A method never holds the backbone: it is handed the family that runs it. It is made by
    ``(family, config, generator)``; its config is a frozen dataclass that checks itself
    (``config.normalise``) and can be made without arguments.
    """

    name: ClassVar[str]
    config_class: ClassVar[type]
    needs_training: ClassVar[str | None] = None
    """The recipe that teaches a selector which knows nothing when new; None: none needs to be."""
    families: ClassVar[tuple[str, ...]] = ("vit", "eva", "naflex")
    """The families of backbones that this form of the method is written for."""
    refusals: ClassVar[Mapping[str, str]] = {}
    """Families that it does not run on, by name, and why not or what to use instead."""
    serves_dense: ClassVar[bool] = False
    """Whether the trained backbone is meant to be used dense too, so that validation looks."""
    most_stages: ClassVar[int | None] = None
    """At how many stages a schedule may have it drop patches; None: any number."""
    follows_schedules: ClassVar[bool] = False
    """Whether it drops patches of plain vision transformers where, and as many as, it is told."""
    usual_stages: ClassVar[int] = 3
    """The same, where nobody says how many."""
    actions: ClassVar[tuple[Action, ...]] = ("drop",)
    """What its stages can do; a schedule chooses for each of them."""
    unscheduled: ClassVar[str | None] = None
    """Why no schedule is solved for it, though it follows some; None: one can be."""
    keeps_its_cost: ClassVar[bool] = False
    """Whether what a trained model costs stays as it is when training goes on."""
    drops: ClassVar[bool] = True
    """Whether it computes fewer tokens; what does not has no stages, and takes no budget."""
    serves_sizes: ClassVar[bool] = False
    """Whether it leaves the padding of images out, on families that keep a map."""
    config: Any
    stages: tuple[int, ...]
    """Set when it is made: blocks before which it acts; ``counts`` has a number for each."""

    @classmethod
    def check_family(cls, family: Family) -> None:
        """Raise :class:`UnsupportedBackboneError` unless the method runs on ``family``."""
        if family.name not in cls.families:
            raise UnsupportedBackboneError(
                f"{cls.name} does not run on the family {family.name!r} "
                f"({cls.why_not(family.name)}); it serves {', '.join(cls.families)}"
            )

    @classmethod
    def why_not(cls, family: str) -> str:
        """Why it does not run on a family that is not among its own."""
        return cls.refusals.get(family) or OF_CLIPS.get(family, "it was not written for it")

    @classmethod
    def must_learn(cls, config: Any) -> bool:
        """Whether a model made with ``config`` is of no use before :attr:`needs_training` ran."""
        return cls.needs_training is not None

    @classmethod
    def kinds(cls) -> tuple[Any, ...]:
        """A config of every way of choosing that has a curve of its own in latency tables; what
        else a config says hardly matters to how long choosing takes.
        """
        return (cls.config_class(),)

    @classmethod
    def feature_config(cls) -> Any:
        """The config for dense prediction, where nobody says more."""
        return cls.config_class()

    def own_kinds(self) -> tuple[Any, ...]:
        """The same, of the ways in which this model chooses."""
        return (self.config,)

    @abstractmethod
    def infer(self, family: Any, images: Tensor, recorder: Any = None) -> Tensor:
        """Logits (B, classes), computing only what is kept; deterministic. ``recorder`` hears what
        each stage decides: a ``records.Told``, where maps are kept a ``records.Recorder``.
        """

    @abstractmethod
    def train_forward(
        self, family: Any, images: Tensor, generator: torch.Generator | None = None
    ) -> TrainingOutput:
        """The differentiable forward, with the method's noise. On plain vision transformers it has
        a ``recorder`` too, as :meth:`infer` does, so that maps can be trained.
        """

    def unused(self, family: Any) -> list[nn.Parameter]:
        """Parameters of the backbone that no forward of this method uses."""
        return []

    def features(
        self, family: Any, images: Tensor, indices: Sequence[int], sizes: Sizes = None
    ) -> FeatureOutput:
        """Maps (B, C, H, W), computed as :meth:`infer` does.

        Args:
            family: runs the backbone.
            images: (B, channels, H, W).
            indices: of the maps among those of timm's ``feature_info``.
            sizes: own height and width of each image, where they were padded to one size: padding
                is not kept, is seen by nobody, and holds 0 in the maps.

        Raises:
            ConfigError: the method gives no maps, or does not serve ``sizes``.
        """
        shown = self._shown(family, images, indices, sizes)
        self.infer(shown, images, shown.canvas)
        return FeatureOutput(shown.maps, shown.last)

    def train_features(
        self,
        family: Any,
        images: Tensor,
        indices: Sequence[int],
        sizes: Sizes = None,
        generator: torch.Generator | None = None,
    ) -> FeatureOutput:
        """The same by the differentiable forward, with the method's noise."""
        shown = self._shown(family, images, indices, sizes)
        train_forward: Any = self.train_forward
        output = train_forward(shown, images, generator, recorder=shown.canvas)
        keeps: list[Tensor | None] = [keep_BHW for _, keep_BHW in shown.shown.values()]
        return FeatureOutput(shown.maps, shown.last, keeps, self.own_losses(output))

    def _shown(self, family: Any, images: Tensor, indices: Sequence[int], sizes: Sizes) -> WithMaps:
        """A plain vision transformer on which the method's forward makes maps: its recorder is told
        of what is dropped and merged, and paints it.
        """
        require(
            not isinstance(family, Pyramid),
            f"{self.name} on the family {family.name!r} gives no feature maps; methods that keep a "
            "map in stages do, such as dynamic_spatial on Swin and ConvNeXt",
        )
        refuse_sizes(sizes, self.name)
        shown: WithMaps = family.with_maps(
            family.grid((images.shape[-2], images.shape[-1])), indices
        )
        return shown

    def padded(self, family: Any, sizes: Sizes) -> Any:
        """``family`` on images of which ``sizes`` are their own, the rest padding.

        Raises:
            ConfigError: the method does not serve them.
        """
        if sizes is None:
            return family
        if not (self.serves_sizes and family.keeps_map):
            refuse_sizes(sizes, self.name)
        return Padded(family, sizes)

    def own_losses(self, output: Any) -> dict[str, Tensor]:
        """Raw loss terms by name that need neither labels nor a teacher: of what was decided."""
        return {}

    @torch.no_grad()
    def teach(self, family: Any, images: Tensor) -> DenseOutput:
        """What :meth:`losses` wants to know from the dense teacher that ``family`` runs."""
        tokens = family.dense(images)
        return DenseOutput(family.training_head(tokens), family.patch_features(tokens))

    @abstractmethod
    def losses(
        self, output: Any, target: Tensor | None, teacher: DenseOutput | None
    ) -> dict[str, Tensor]:
        """Raw loss terms by name, and ``"total"``, their weighted sum.

        Terms that need labels or a teacher are left out when these are None.
        """

    @abstractmethod
    def counts(self, family: Any, grid: Grid) -> tuple[int, ...] | None:
        """Kept patches after each stage, of an image of ``grid`` patches, or None where they depend
        on the image.
        """

    @abstractmethod
    def steps(self, family: Any, grid: Grid, counts: Sequence[Any]) -> list[Step]:
        """What is computed for one image of ``grid`` patches, given the kept count after each stage
        (numbers or tensors). Choosing is a step too (``costs.select``), though it may cost no MACs.
        """

    def macs(self, family: Any, grid: Grid, counts: Sequence[Any]) -> Any:
        """MACs of one image of ``grid`` patches, given the kept count after each stage (numbers or
        tensors).
        """
        return total_macs(self.steps(family, grid, counts))

    def target_counts(self, family: Any, grid: Grid) -> tuple[int, ...]:
        """The counts that the settings ask for, whether or not the images decide."""
        counts = self.counts(family, grid)
        require(counts is not None, f"the settings of {self.name} ask for no counts")
        assert counts is not None
        return counts

    def variants(self, ratios: Sequence[float]) -> list[Any]:
        """Configs to measure one by one where how many tokens there are is a setting; ``ratios``
        are kept shares to take, for methods that have some.
        """
        return [self.config]

    def starts(self, family: Any, grid: Grid) -> list[Any]:
        """Configs that training to a latency may start from: the one whose :meth:`target_counts`
        are predicted nearest to the budget is taken.
        """
        return [self.config]

    @classmethod
    def one_stage(cls, config: Any, block: int, ratio: float, depth: int) -> Any:
        """``config`` with a single stage, before ``block`` of ``depth``, that drops a part of the
        tokens: what a latency table has a curve of.
        """
        return replace(config, stages=(block,)) if hasattr(config, "stages") else config

    @classmethod
    def says_where(cls, config: Any) -> bool:
        """Whether ``config`` names the blocks before which patches are dropped."""
        return getattr(config, "stages", None) is not None

    @classmethod
    def follow(cls, config: Any, plan: Plan) -> tuple[Any, str | None]:
        """``config`` with a schedule's stages and counts in place of its own, and what the user
        should know of it; None if it is exact.
        """
        raise ConfigError(f"{cls.name} cannot follow a schedule; its config says what it drops")

    @classmethod
    def fewest(cls, count: int, num_prefix: int, action: Action) -> int:
        """The fewest patch tokens that a stage can leave of ``count``."""
        return 1

    def fewer(self, tokens: Tokens, record: AttentionRecord, count: int, action: Action) -> Tokens:
        """``count`` of the patch tokens, or made of them, between attention and MLP of a block, as
        the stage behind it would; what schedules are measured by. Here by class attention, whatever
        a method learns to drop by.

        Args:
            tokens: between the halves of the block.
            record: of the block's attention.
            count: that go on; also fewer than one stage of the method can leave.
            action: one of :attr:`actions`.
        """
        return tokens.gather(sampling.top_k(record.patch_attention().mean(1).float(), count))

    def fit(self, family: Any, plan: Plan, batches: Sequence[Tensor]) -> None:
        """Find on images what :meth:`follow` could not set; in evaluation, without gradients."""

    def begin_epoch(self, epoch: int) -> None:
        """Told before each training epoch, counted from 0; methods with a schedule listen."""

    def begin_step(self, step: int) -> None:
        """Told before each optimiser step of the whole run, counted from 0."""

    def whole_last_block(self, family: Any) -> str | None:
        """Why the last block of a plain vision transformer computes more than the logits need; None
        where it does not: see ``ViT.answer``.
        """
        if not self.config.exact_last_block:
            return "exact_last_block is false"
        why: str | None = family.whole_last_block
        return why

    @property
    def score_name(self) -> str | None:
        """What tokens are scored by, where that is read off the attention, in words; else None."""
        return None

    @property
    def select_name(self) -> str:
        """What its way of choosing is called in latency tables."""
        merges = getattr(self.config, "merge_dropped", False)
        return f"{self.name}-merged" if merges else self.name

    def dial(self) -> Dial:
        """The number that calibration and :meth:`turn` move.

        Raises:
            ConfigError: the method's cost cannot be changed once it is set up.
        """
        raise ConfigError(f"the cost of {self.name} is fixed when the model is made sparse")

    def turn(self, value: float) -> None:
        """Set the :meth:`dial`."""
        raise ConfigError(f"the cost of {self.name} is fixed when the model is made sparse")

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        """Change the keep ratio at run time, where the method has one."""
        self.dial()  # says so where nothing can be turned
        raise ConfigError(
            f"{self.name} has no keep ratio; its cost is changed by vitrim.calibrate or set_budget"
        )

    def set_density(self, density: float | None) -> None:
        """Change the density at run time, where the method has one; None is the dense model."""
        self.dial()  # says so where nothing can be turned
        raise ConfigError(
            f"{self.name} has no density; its cost is changed by vitrim.calibrate or set_budget"
        )


class RatioMethod(Method):
    """A method that keeps a share of the positions at each stage, the ``keep_ratio`` of its config,
    unless a setting lets every image decide.
    """

    follows_schedules = True
    fixed_by: ClassVar[str] = "other settings"
    """With what setting the images do not decide, as a user writes it."""

    @classmethod
    def decides(cls, config: Any) -> bool:
        """Whether, with ``config``, each image decides how many positions are kept."""
        return False

    @property
    def images_decide(self) -> bool:
        """Whether each image decides how many positions are kept."""
        return self.decides(self.config)

    def counts(self, family: Any, grid: Grid) -> tuple[int, ...] | None:
        return None if self.images_decide else self.target_counts(family, grid)

    def target_counts(self, family: Any, grid: Grid) -> tuple[int, ...]:
        return self._fixed_counts(math.prod(grid))

    def _fixed_counts(self, num_positions: int) -> tuple[int, ...]:
        """The same, each of so many positions."""
        return fixed_counts(self.config.ratios(len(self.stages)), num_positions)

    def dial(self) -> Dial:
        """The keep ratio of fixed counts; else the threshold, which decides once it is turned."""
        if self.images_decide:
            return Dial("threshold", self._threshold, cheapest=1 - 1e-6, dearest=0.0)
        least = self.least_ratio
        return Dial("keep_ratio", max(self._first_ratio, least), cheapest=least, dearest=1.0)

    @property
    def least_ratio(self) -> float:
        """The smallest keep ratio of the method's rule."""
        return 1e-3

    @property
    def _threshold(self) -> float:
        threshold: float = self.config.threshold
        return threshold

    @property
    def _first_ratio(self) -> float:
        ratio: float | tuple[float, ...] = self.config.keep_ratio
        return ratio[0] if isinstance(ratio, tuple) else ratio

    def turn(self, value: float) -> None:
        if self.images_decide:
            self.config = self._with_threshold(value)
        else:
            self.set_keep_ratio(value)

    def _with_threshold(self, value: float) -> Any:
        return replace(self.config, threshold=value)

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        """Keep another share from now on: one number for the method's rule, or one per stage.

        A model is trained for one ratio and best used near it.

        Raises:
            ConfigError: out of range, or every image decides how much it keeps.
        """
        require(
            not self.images_decide,
            f"the image decides how many positions are kept, not a keep ratio; make the model "
            f"sparse with {self.fixed_by} to set ratios",
        )
        config = replace(self.config, keep_ratio=keep_ratio)
        config.ratios(len(self.stages))
        self.config = config

    def variants(self, ratios: Sequence[float]) -> list[Any]:
        if self.images_decide:
            return [self.config]
        stages = len(self.stages)
        return [replace(self.config, keep_ratio=(ratio,) * stages) for ratio in (*ratios, 1.0)]

    def starts(self, family: Any, grid: Grid) -> list[Any]:
        """One ratio for the method's rule; ratios per stage, as of a schedule, scaled together."""
        ratio = self.config.keep_ratio
        if not isinstance(ratio, tuple):
            shares = [share for share in SHARES if share >= self.least_ratio]
            return [replace(self.config, keep_ratio=share) for share in shares]
        factors = [share / ratio[-1] for share in SHARES]
        scaled = [tuple(min(factor * each, 1.0) for each in ratio) for factor in factors]
        return [replace(self.config, keep_ratio=each) for each in scaled]

    @classmethod
    def one_stage(cls, config: Any, block: int, ratio: float, depth: int) -> Any:
        return replace(config, stages=(block,), keep_ratio=ratio)

    @classmethod
    def follow(cls, config: Any, plan: Plan) -> tuple[Any, str | None]:
        remark = "training aims at these shares; at inference every image decides"
        followed = replace(config, stages=plan.stages, keep_ratio=plan.keep_ratios)
        return followed, remark if cls.decides(config) else None


def require_one_stage(plan: Plan, why: str) -> None:
    """Raise :class:`ConfigError` unless the schedule has one stage; ``why`` that must be."""
    require(
        len(plan.stages) == 1,
        f"{why}, and the schedule has {len(plan.stages)} stages; solve it with one "
        "(vitrim schedule --stages 1)",
    )


@torch.no_grad()
def whole_answer(family: Any, images: Tensor) -> DenseOutput:
    """A teacher's answer as it is at inference: of LV-ViT, what both classifiers say."""
    tokens = family.dense(images)
    return DenseOutput(family.head(tokens), family.patch_features(tokens))


def answer_parts(
    output: TrainingOutput, target: Tensor | None, teacher: DenseOutput | None
) -> dict[str, Tensor]:
    """The loss terms of answers, not weighted: of labels, and of a teacher, where there are any."""
    parts = dict[str, Tensor]()
    if target is not None:
        parts["classification"] = losses.classification_loss(output.logits, target)
    if teacher is not None:
        parts["distill"] = losses.distillation_loss(output.logits, teacher.logits)
    return parts


def answer_losses(
    method: Method, output: TrainingOutput, target: Tensor | None, teacher: DenseOutput | None
) -> dict[str, Tensor]:
    """The losses of a method that learns from answers alone: of labels, and of a teacher."""
    parts = answer_parts(output, target, teacher)
    require(
        len(parts) > 0, f"{method.name} learns from labels or from a dense teacher; give either"
    )
    return with_total(method.config, parts)


def with_total(config: Any, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss terms and ``"total"``, their sum weighted by ``<name>_weight`` of ``config``."""
    weighted = [getattr(config, f"{name}_weight") * part for name, part in parts.items()]
    return parts | {"total": torch.stack(weighted).sum()}
