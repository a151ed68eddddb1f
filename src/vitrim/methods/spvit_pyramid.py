"""SPViT on pyramids: a selector per stage of PiT and Swin, and a map restored where it is pooled.

Kong et al., "SPViT: Enabling Faster Vision Transformers via Latency-aware Soft Token Pruning", ECCV
2022 (arXiv 2112.13890); see ``spvit.py`` for the selector and the package token. A pyramid pools
its map between stages, so a dropped position must have some value there. The authors' code (PiT
only) hides dropped tokens from the others but lets them run on through all blocks, in evaluation
too: nothing is saved, and what removing them would mean is left open. It is
``SPViTPyramidConfig.official()``.

Ours, for PiT and Swin: a dropped position is carried. It keeps the features that it had when it was
dropped, takes no part in the remaining blocks of its stage, and is put back into the map for the
next pooling, merging or head. Every stage starts anew from its whole map.

* PiT: kept tokens are gathered behind the prefix tokens and the package token, images of different
  counts packed, so the rest of the stage costs what a shorter sequence costs. There is one package
  token: pooling widens it with the prefix tokens, and each stage adds to it what it drops; the
  blocks before the stage's selector do not see it (all this as in the authors' code).
* Swin: the linear layers of attention and MLP run on the kept positions alone, nine tenths of a
  block and more. The products of queries and keys still run on whole windows, in which dropped
  positions are hidden; that part is not saved. A package token per stage is one more key of every
  window, and stays as it is.

Training, and inference with ``execution="mask"``, compute all positions, hide the dropped ones as
keys, and blend: ``keep * computed + (1 - keep) * carried``. So the two executions are the same
function, and the decision gets a gradient from how much its position gained by staying (on PiT also
through attention, as in the authors' code).

Stages: by default the authors' for PiT-S, before the middle block of each stage, also for the other
sizes; on Swin, where no code was released, ours: before the first block of each later stage. Not
trained on ImageNet by us; forward, losses and gradients of the authors' PiT-S are reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vitrim import costs
from vitrim.config import require
from vitrim.families import PiT, Swin
from vitrim.layers import losses, sampling
from vitrim.layers.selector import Selector, masked, package_of
from vitrim.layers.sparse_windows import sparse_block_macs, sparse_blocks
from vitrim.layers.stages import check_stages
from vitrim.methods.base import with_total
from vitrim.methods.records import DenseOutput, Dial, FeatureOutput, Recorder, TrainingOutput
from vitrim.methods.selection import SelectorConfig, SelectorMethod
from vitrim.tokens.feature_map import FeatureMap, among_best, share_of
from vitrim.tokens.packed import AnyTokens, PackedTokens, select
from vitrim.tokens.plain import Grid, Sizes, Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class SPViTPyramidConfig(SelectorConfig):
    """How SPViT is set up on a pyramid; ratios are shares of each stage's whole map."""

    stages: tuple[int, ...] | None = None
    """Blocks before which positions are dropped, counted through all stages, one per stage at most;
    None takes the middle of each stage on PiT and the start of each but the first on Swin."""
    inference: Literal["argmax", "threshold", "top_k"] = "argmax"
    """How inference decides: the likelier class, per image (the paper); a keep score above
    ``threshold``, per image; or a fixed number, the likeliest."""
    execution: Literal["gather", "mask"] = "gather"
    """Whether inference computes only what is kept, or everything, and hides the rest: the same
    logits, no saving, and a shape that no image changes."""
    dropped: Literal["carry", "run"] = "carry"
    """What the next stage sees of a dropped position: its features when it was dropped (ours), or
    those after all blocks (the authors' code), which only ``execution="mask"`` computes."""
    bounded_package: bool = True
    """Leave out of the weighted mean the gradient of its decisions, which knows no bound where few
    tokens are dropped. The authors keep it."""
    sampling: Literal["gumbel", "argmax"] = "gumbel"
    """How training decides: a draw with Gumbel noise (the paper), or the likelier class."""

    def __post_init__(self) -> None:
        SelectorConfig.__post_init__(self)
        require(
            self.dropped == "carry" or self.execution == "mask",
            'dropped="run" computes dropped positions, so nothing can be removed; set '
            'execution="mask", or dropped="carry"',
        )

    @classmethod
    def official(cls, **changes: Any) -> SPViTPyramidConfig:
        """The settings of the authors' code for PiT, with ``changes``."""
        fields: dict[str, Any] = {
            "keep_ratio": (0.617, 0.369, 0.137),
            "execution": "mask",
            "dropped": "run",
            "bounded_package": False,
        }
        return cls(**fields | changes)


@dataclass(frozen=True)
class Choice:
    """What a selector decided about the whole map of a stage."""

    keep_BN: Tensor
    """1 for a position that goes on, 0 for one that is dropped; may carry gradients."""
    package_BC: Tensor
    """What is dropped, condensed."""
    best_BK: Tensor | None = None
    """The kept positions, where their number is fixed."""


Choose = Callable[[int, Tokens, Tensor], Choice | None]
"""Chooses, given which selector it is, the stage's map as tokens, and the packages (B, S, C) beside
it; None: everything stays."""


@dataclass(frozen=True)
class PyramidOutput(TrainingOutput):
    """A training forward, and what was decided in it."""

    patch_features: Tensor
    """(B, N, C): of all positions of the last map."""
    last_keep_BN: Tensor
    """(B, N): 1 where the last stage kept a position to the end."""
    keeps: tuple[Tensor, ...]
    """Per selector (B, N): 1 for a position of its stage's map that goes on."""

    def kept_counts(self) -> list[Tensor]:
        return [keep_BN.sum(1) for keep_BN in self.keeps]


class SPViTPyramid(SelectorMethod):
    """The method on backbones that pool their map between stages."""

    name = "spvit_pyramid"
    config_class = SPViTPyramidConfig
    needs_training = "spvit_pyramid-pit-s"
    families = ("pit", "swin")
    follows_schedules = False
    serves_sizes = True
    refusals: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("vit", "eva", "naflex", "lvvit"), "it has no pooling between its blocks; use spvit"
    ) | {
        "swin_v2": "package tokens are no part of its cosine attention; use dynamic_spatial",
        "convnext": "its selector reads attention heads, ConvNeXt has none; use dynamic_spatial",
    }
    config: SPViTPyramidConfig

    def __init__(
        self,
        family: PiT | Swin,
        config: SPViTPyramidConfig,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        stages = config.stages or default_stages(family)
        check_stages(stages, sum(family.depths))
        config.ratios(len(stages))
        self.config = config
        self.stages = stages
        self._places = places_of(stages, family.depths)
        """See :func:`places_of`."""
        selectors = [
            Selector(family.stage_dim(stage), family.block(stage, 0).attn.num_heads, config)
            for stage in self._places
        ]
        for selector in selectors:
            selector.reset_parameters(generator)
        self.selectors = nn.ModuleList(selectors)

    def target_counts(self, family: PiT | Swin, grid: Grid) -> tuple[int, ...]:
        maps = (math.prod(family.stage_grid(grid, stage)) for stage in self._places)
        return tuple(self._fixed_counts(positions)[number] for number, positions in enumerate(maps))

    def _drops_nothing(self, number: int, num_positions: int) -> bool:
        """Whether inference is bound to keep everything at a selector, which is then skipped."""
        if self.config.inference == "top_k":
            return self._fixed_counts(num_positions)[number] == num_positions
        return self.config.inference == "threshold" and self.config.threshold == 0

    def infer(self, family: PiT | Swin, images: Tensor, recorder: Recorder | None = None) -> Tensor:
        return family.head(self._infer_levels(family, images, recorder)[-1])

    def features(
        self, family: PiT | Swin, images: Tensor, indices: Sequence[int], sizes: Sizes = None
    ) -> FeatureOutput:
        states = self._infer_levels(family, images, sizes=sizes)
        levels = [family.as_map(index, states[index]) for index in indices]
        return FeatureOutput(levels, states[-1])

    def _infer_levels(
        self,
        family: PiT | Swin,
        images: Tensor,
        recorder: Recorder | None = None,
        sizes: Sizes = None,
    ) -> list[Any]:
        """What leaves each stage, as the family keeps it."""
        grid = family.grid((images.shape[-2], images.shape[-1]))

        def choose(number: int, tokens: Tokens, packages_BSC: Tensor) -> Choice | None:
            skips = self._drops_nothing(number, tokens.num_patches)
            if skips and not recorder:
                return None
            scores = self.selectors[number](tokens, packages_BSC)
            rank, best = scores.log_probs[..., 0].exp(), None
            if self.config.inference == "top_k":
                keep, best = self._best(number, tokens, scores.log_odds)
            elif self.config.inference == "threshold":
                rank = scores.keep_score
                keep = (rank > (-torch.inf if skips else self.config.threshold)).to(rank.dtype)
            else:
                keep = sampling.hard_keep(scores.log_probs, noise=False)
            if tokens.keep_BN is not None:
                keep = keep * tokens.keep_BN
            if recorder:
                shape = (-1, *family.stage_grid(grid, list(self._places)[number]))
                block = self.stages[number]
                keep_BHW = keep.view(shape) > 0.5
                recorder.add_map(block, rank.view(shape), keep_BHW)
            if skips:
                return None
            package = package_of(tokens, scores, 1 - keep, self.config.package_mode)
            return Choice(keep, package, best)

        return self._run(family, images, choose, self.config.execution == "mask", sizes)

    def _best(self, number: int, tokens: Tokens, log_odds: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mask (B, N) of a fixed share; and where they are, if as many in each image."""
        if tokens.keep_BN is None:
            best = sampling.top_k(log_odds, self._fixed_counts(tokens.num_patches)[number])
            return torch.zeros_like(log_odds).scatter(1, best, 1.0), best
        ratio = self.config.ratios(len(self.stages))[number]
        counts_B1 = share_of(tokens.keep_BN > 0.5, ratio)
        log_odds = log_odds.masked_fill(tokens.keep_BN < 0.5, -torch.inf)
        return among_best(log_odds, counts_B1).to(log_odds.dtype), None

    def train_forward(
        self, family: PiT | Swin, images: Tensor, generator: torch.Generator | None = None
    ) -> PyramidOutput:
        states, keeps = self._train_levels(family, images, None, generator)
        features = family.patch_features(states[-1])
        last_has_selector = len(family.depths) - 1 in self._places
        last_keep = keeps[-1] if last_has_selector else features.new_ones(features.shape[:2])
        return PyramidOutput(family.training_head(states[-1]), features, last_keep, tuple(keeps))

    def train_features(
        self,
        family: PiT | Swin,
        images: Tensor,
        indices: Sequence[int],
        sizes: Sizes = None,
        generator: torch.Generator | None = None,
    ) -> FeatureOutput:
        states, kept = self._train_levels(family, images, sizes, generator)
        maps = [family.as_map(level, state) for level, state in enumerate(states)]
        keeps = [state.real_BHW if family.keeps_map else None for state in states]
        reals = [None if real is None else real.flatten(1) for real in keeps]
        ratio = self._ratio_loss(kept, [reals[level] for level in self._places])
        for level, (number, _) in self._places.items():
            keeps[level] = kept[number].view(len(images), *maps[level].shape[2:])
        levels, asked = [maps[index] for index in indices], [keeps[index] for index in indices]
        return FeatureOutput(levels, states[-1], asked, {"ratio": ratio})

    def _train_levels(
        self,
        family: PiT | Swin,
        images: Tensor,
        sizes: Sizes,
        generator: torch.Generator | None,
    ) -> tuple[list[Any], list[Tensor]]:
        """What leaves each stage in training, and what each selector drew (B, N)."""
        config, keeps = self.config, list[Tensor]()

        def choose(number: int, tokens: Tokens, packages_BSC: Tensor) -> Choice:
            scores = self.selectors[number](tokens, packages_BSC)
            keep_BN = sampling.hard_keep(
                scores.log_probs,
                noise=config.sampling == "gumbel",
                temperature=config.temperature,
                generator=generator,
            )
            keep_BN = keep_BN if tokens.keep_BN is None else keep_BN * tokens.keep_BN
            keeps.append(keep_BN)
            mode, bounded = config.package_mode, config.bounded_package
            package = package_of(tokens, scores, 1 - keep_BN, mode, bounded=bounded)
            return Choice(keep_BN, package)

        return self._run(family, images, choose, True, sizes), keeps

    def _run(
        self,
        family: Any,
        images: Tensor,
        choose: Choose,
        masks: bool,
        sizes: Sizes = None,
    ) -> list[Any]:
        """All blocks; what leaves each stage, as the family keeps it."""
        state: Any = family.stem(images, sizes)
        states = []
        for stage in range(len(family.depths)):
            state = family.enter_stage(stage, state)
            if not family.keeps_map:
                state = self._run_tokens(family, stage, state, choose, masks)
            elif masks or (self.config.inference == "top_k" and state.real_BHW is None):
                state = self._run_map(family, stage, state, choose, masks)
            else:
                state = self._run_map_eagerly(family, stage, state, choose, masks)
            states.append(state)
        return states

    def _run_tokens(
        self, family: PiT, stage: int, entered: Tokens, choose: Choose, masks: bool
    ) -> Tokens:
        """The blocks of a stage of PiT, from its whole map to its whole map."""
        number, place = self._places.get(stage, (0, -1))
        own, packages, patches = entered.x.tensor_split([family.num_prefix, entered.num_prefix], 1)
        # Not with_prefix, which may be a graph of its own: before torch 2.15 a graph that is handed
        # a tensor and a view of it fails once their sizes change.
        tokens: AnyTokens = Tokens.of(torch.cat([own, patches], 1), family.num_prefix)
        before, choice = entered, None
        for index in range(family.depths[stage]):
            if index == place:
                assert isinstance(tokens, Tokens)
                before, choice = tokens, choose(number, tokens, packages)
                if choice is not None:
                    # The package of earlier stages, if there is one, goes on in this one's.
                    package = packages.sum(1, keepdim=True) + choice.package_BC.unsqueeze(1)
                    tokens = _without_dropped(before, choice, package, masks)
            tokens = family.run_block(stage, index, tokens)
        if choice is None:
            assert isinstance(tokens, Tokens)
            return tokens.with_prefix(torch.cat([tokens.prefix_BPC, packages], 1))
        if masks:
            patches = self._blend(choice.keep_BN, tokens.patches, before.patches)
        else:
            patches = _put_back(tokens, before.patches)
        return Tokens.of(patches, 0).with_prefix(tokens.prefix_BPC)

    def _run_map(
        self, family: Swin, stage: int, fmap: FeatureMap, choose: Choose, masks: bool
    ) -> FeatureMap:
        """The blocks of a stage of Swin, from its whole map to its whole map."""
        depth = family.depths[stage]
        number, place = self._places.get(stage, (0, depth))
        place = min(place, depth)  # a level may be left out, see families/inside.py
        for index in range(place):
            fmap = family.run_block(stage, index, fmap)
        tokens = fmap.tokens
        choice = None if place == depth else choose(number, tokens, tokens.x[:, :0])
        if choice is None:
            for index in range(place, depth):
                fmap = family.run_block(stage, index, fmap)
            return fmap
        blocks = [family.block(stage, index) for index in range(place, depth)]
        before_RC = tokens.x.flatten(0, 1)
        if masks:
            row_R = torch.arange(before_RC.shape[0], device=before_RC.device)
            x_RC = _run_rows(blocks, before_RC, row_R, choice, fmap)
            x_RC = self._blend(choice.keep_BN.flatten(), x_RC, before_RC)
        else:
            x_RC = _run_kept(blocks, before_RC, choice, fmap)
        return fmap.with_x(x_RC.view(fmap.x_BHWC.shape))

    # Numbers of rows that only the image decides keep torch.compile tracing for a minute.
    _run_map_eagerly = torch.compiler.disable(_run_map)  # type: ignore[no-untyped-call]

    def _blend(self, keep: Tensor, computed: Tensor, carried: Tensor) -> Tensor:
        """The whole map (..., C), where all of it was computed under a mask (...)."""
        if self.config.dropped == "run":
            return computed
        keep = keep.unsqueeze(-1).to(computed.dtype)
        return keep * computed + (1 - keep) * carried

    def losses(
        self, output: PyramidOutput, target: Tensor | None, teacher: DenseOutput | None
    ) -> dict[str, Tensor]:
        parts = {"ratio": self._ratio_loss(output.keeps, [None] * len(output.keeps))}
        if target is not None:
            parts["classification"] = losses.classification_loss(output.logits, target)
        if teacher is not None:
            parts["distill"] = losses.distillation_loss(output.logits, teacher.logits)
            parts["token"] = losses.kept_token_mse(
                output.patch_features, teacher.patch_features, output.last_keep_BN
            )
        return with_total(self.config, parts)

    def _ratio_loss(self, keeps: Sequence[Tensor], reals: Sequence[Tensor | None]) -> Tensor:
        ratios = self.config.ratios(len(self.stages))
        parts = zip(keeps, ratios, reals, strict=True)
        return torch.stack([losses.batch_ratio_loss(*part) for part in parts]).mean()

    def steps(self, family: Any, grid: Grid, counts: Sequence[Any]) -> list[costs.Step]:
        levels, packages = [], 0
        for stage, depth in enumerate(family.depths):
            stage_grid = family.stage_grid(grid, stage)
            positions = math.prod(stage_grid)
            number, place = self._places.get(stage, (0, depth))
            drops = place < depth and not self._drops_nothing(number, positions)
            place = place if drops else depth
            kept = counts[number] if drops and self.config.execution == "gather" else positions
            macs: Any
            if not family.keeps_map:
                own = family.num_prefix
                macs = family.downsample_macs(stage, grid, own + packages)
                macs = macs + place * family.block_macs(stage, 0, positions + own)
                rest = family.block_macs(stage, 0, kept + own + 1)
            else:
                macs = family.downsample_macs(stage, grid)
                macs = macs + place * family.block_macs(stage, 0, grid)
                rest = sparse_block_macs(family.block(stage, 0), stage_grid, kept)
            macs = macs + (depth - place) * rest
            if not drops:
                levels.append(costs.level(family, stage, grid, macs))
                continue
            macs = macs + self.selectors[number].macs(positions, packages)  # type: ignore[operator]
            packages = int(not family.keeps_map)
            name = self.name if self.config.execution == "gather" else f"{self.name}-masked"
            levels.append(
                costs.sparse_levels(
                    name, (stage,), kept, macs, before=(place,), adaptive=self.images_decide
                )
            )
        return costs.pyramid_steps(family, grid, levels)

    def dial(self) -> Dial:
        require(
            self.config.execution == "gather",
            'spvit_pyramid with execution="mask" computes everything, whatever is dropped; make '
            'the model sparse with execution="gather" to change its cost',
        )
        return super().dial()


def default_stages(family: PiT | Swin) -> tuple[int, ...]:
    """The blocks before which positions are dropped where the config names none."""
    starts = accumulate(family.depths, initial=0)
    pairs = zip(starts, family.depths, strict=False)
    if not family.keeps_map:
        return tuple(start + depth // 2 for start, depth in pairs)
    return tuple(start for start, _ in pairs)[1:]


def places_of(stages: Sequence[int], depths: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Stage of the backbone: (number of its selector, block of the stage that it stands before)."""
    starts = list(accumulate(depths, initial=0))
    places: dict[int, tuple[int, int]] = {}
    for number, block in enumerate(stages):
        stage = sum(start <= block for start in starts) - 1
        require(
            stage not in places,
            f"stages are {tuple(stages)}: two of them lie in stage {stage} of the backbone (blocks "
            f"{starts[stage]} to {starts[stage + 1] - 1}); give one per stage at most",
        )
        places[stage] = number, block - starts[stage]
    return places


def _without_dropped(tokens: Tokens, choice: Choice, package_B1C: Tensor, masks: bool) -> AnyTokens:
    """The tokens that go on in a stage of PiT, and the package behind the prefix tokens."""
    prefix = torch.cat([tokens.prefix_BPC, package_B1C], 1)
    if masks:
        return masked(tokens, choice.keep_BN.to(tokens.x.dtype)).with_prefix(prefix)
    if choice.best_BK is not None:
        return tokens.gather(choice.best_BK).with_prefix(prefix)
    return select(tokens, choice.keep_BN > 0.5, package_B1C)


def _put_back(tokens: AnyTokens, map_BNC: Tensor) -> Tensor:
    """(B, N, C): the map with the present patch tokens in their places."""
    num_images, num_positions = map_BNC.shape[:2]
    if isinstance(tokens, PackedTokens):
        row_T = tokens.layout.image_N * num_positions + tokens.index_N
    else:
        start = torch.arange(num_images, device=map_BNC.device).unsqueeze(1) * num_positions
        row_T = (tokens.index_BN + start).flatten()
    patches = tokens.patches.reshape(-1, map_BNC.shape[2])
    return map_BNC.flatten(0, 1).index_copy(0, row_T, patches).view(map_BNC.shape)


def _run_rows(
    blocks: Sequence[Any], map_RC: Tensor, row_T: Tensor, choice: Choice, fmap: FeatureMap
) -> Tensor:
    """The map (B * N, C) after blocks of a stage of Swin that compute some of its rows."""
    x_TC, visible_BN = map_RC.index_select(0, row_T), choice.keep_BN.detach() > 0.5
    grid, real_BN = fmap.grid, fmap.real_BN
    x_TC = sparse_blocks(blocks, x_TC, choice.package_BC, grid, row_T, visible_BN, real_BN)
    return map_RC.index_copy(0, row_T, x_TC)


def _run_kept(blocks: Sequence[Any], map_RC: Tensor, choice: Choice, fmap: FeatureMap) -> Tensor:
    """The same, where they compute what was kept."""
    row_BN = torch.arange(map_RC.shape[0], device=map_RC.device).view(choice.keep_BN.shape)
    if choice.best_BK is None:
        row_T = row_BN[choice.keep_BN > 0.5]
    else:
        row_T = row_BN.gather(1, choice.best_BK).flatten()
    return _run_rows(blocks, map_RC, row_T, choice, fmap)
