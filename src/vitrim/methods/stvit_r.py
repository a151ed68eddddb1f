"""STViT-R: semantic tokens work for the image, then give it back; for Swin transformers.

Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View", CVPR 2023
(arXiv 2303.08685), as released by the authors. The blocks of the third stage work in units of six.
In each unit, with X the positions of the map and S the semantic tokens:

    0  a Swin block without shift                     X  among the positions of a window
    1  generation: centres P pooled in each window    S  looks at P and a larger window of X
    2  generation                                     S  looks at S and X, everywhere
    3  a block among the semantic tokens              S  of one window
    4  a block among the semantic tokens              S  everywhere
    5  recovery                                       X  looks at S, everywhere

so that four of six blocks run on few tokens, and the map survives for the next unit, for the next
stage, and for dense prediction. Training computes exactly what inference does.

``form="dense"`` is what the authors run under a detector, for images of any size: blocks 1, 2 and 5
look at windows (14, 21 and, of semantic tokens, 27) instead of everywhere, and 1 and 2 not at
semantic tokens; block 1 has a residual; Swin's own blocks pad the map before they shift it, where
timm's pad it after. :meth:`STViTRConfig.dense_prediction` also asks for a
LayerNorm on each level that ``features`` gives. Names and shapes of the weights are the same.

What differs from the released code, on purpose; both ways give the same numbers where not said:

* Keys and values are projected once per token, not again in every window that overlaps it, which
  makes the released dense form dearer than Swin; ``project_once=False`` costs what theirs does.
* A window that hangs over the border sees no padding (``pad_mask="correct"``). The authors' masks
  miss most of it, or all; ``"official"`` and ``"off"`` give their numbers.
* The classification form takes other image sizes; what is learned for one size (global centres) is
  interpolated, or refused (the position biases of block 4). Theirs takes 224 x 224 alone.
* The authors changed the stem to two convolutions; ``conv_stem_swin_*`` are timm models with it.
  The method itself runs on any Swin.

From a dense Swin every block maps one to one, as in ``stvit_swin``: blocks 1 to 5 of a unit take
its projections, norms and MLP, but not the position biases of its windows, which stay in the
backbone and are not used. New are two layer scales per block, which start at 1e-5 in the released
code, so that a converted model must be trained; ``layer_scale=None`` has none.

Published with the code: top-1 82.7 (Swin-S) and 83.2 (Swin-B); under Cascade Mask R-CNN on COCO,
box and mask AP 51.8 and 44.7, 52.2 and 45.2. By other people's notes on the paper the dense models
have 83.0 and 83.5, and STViT-R costs 5.8 and 10.3 GMACs. We reproduce costs, forwards, losses and
gradients of the code on fixed weights; training was not re-run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor, nn

from vitrim import costs
from vitrim.config import require
from vitrim.families import Swin
from vitrim.layers.pooling import POOLINGS
from vitrim.layers.semantic_attention import Keys, WindowRecord
from vitrim.layers.semantic_keys import Look, classification_look, dense_look, token_order
from vitrim.layers.semantic_windows import Windows, global_centres, resized_centres
from vitrim.methods.records import FeatureOutput, PooledOutput, Recorder
from vitrim.methods.semantic import STAGE, WindowConfig, WindowMethod
from vitrim.tokens.feature_map import FeatureMap
from vitrim.tokens.plain import Grid, Sizes

UNIT = 6
GENERATION, AGAIN, LOCAL, GLOBAL, RECOVERY = range(1, UNIT)
"""The blocks of a unit after its first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class STViTRConfig(WindowConfig):
    """How STViT-R is set up; the defaults are the released weights' settings. In the dense form
    ``key_window`` is twice a window's side, if not given (authors: 14 for 7).
    """

    form: Literal["classification", "dense"] = "classification"
    """Whether the blocks between map and semantic tokens look everywhere, as the authors classify,
    or at windows, as they detect."""
    second_key_window: int | None = None
    """Side of the larger window of the second generation block in the dense form; None: three times
    a window's. Authors: 21."""
    recovery_windows: int = 9
    """Side, in windows, of what the recovery block looks at in the dense form. Authors: 27 semantic
    tokens, which are 9 windows."""
    residual: bool = False
    """Whether the first generation block's attention is added to the centres P; the dense form
    always does."""
    global_centres: bool = False
    """Learn centres G that are added to the second generation block's queries, in the first unit.
    Paper: yes; the released weights have none."""
    position_convolution: bool = False
    """Learn a depthwise convolution on the centres of each window."""
    position_biases: bool = False
    """Learn biases of the relative position in blocks 3 and 4."""
    layer_scale: float | None = 1e-5
    """Initial value of the learned scales per channel of blocks 1 to 5; None has none."""
    pad_mask: Literal["correct", "official", "off"] = "correct"
    """What the dense form hides of the padding where windows hang over the border: all of it, what
    the authors' masks hide of it, or nothing."""
    project_once: bool = True
    """Whether keys and values are projected once per token; else in every window, as released."""
    level_norms: bool = False
    """Learn a LayerNorm for each of the levels that ``features`` gives, as the authors' detector
    does."""

    def __post_init__(self) -> None:
        WindowConfig.__post_init__(self)
        for name in ("second_key_window", "recovery_windows"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}; expected 1 or more")
        windows = self.recovery_windows
        require(windows % 2 == 1, f"recovery_windows is {windows}; expected an odd number")
        require(
            self.form == "dense" or (self.pad_mask == "correct" and self.second_key_window is None),
            'pad_mask and second_key_window belong to form="dense"',
        )

    @classmethod
    def dense_prediction(cls, **changes: Any) -> STViTRConfig:
        """The authors' backbone for detection, with correct masks."""
        preset: dict[str, Any] = {"form": "dense", "level_norms": True}
        return cls(**(preset | changes))


class BlockExtras(nn.Module):
    """What a block has beside its weights in the backbone."""

    def __init__(
        self, dim: int, config: STViTRConfig, role: int, heads: int, tokens: Grid, generator: Any
    ) -> None:
        super().__init__()
        self.scale1 = self.scale2 = None
        if config.layer_scale is not None:
            self.scale1 = nn.Parameter(torch.full((dim,), config.layer_scale))
            self.scale2 = nn.Parameter(torch.full((dim,), config.layer_scale))
        self.position: nn.Conv2d | None = None
        if config.position_convolution and role == GENERATION:
            self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
            for parameter in self.position.parameters():  # torch's own range, by the generator
                nn.init.uniform_(parameter, -1 / 3, 1 / 3, generator=generator)
        self.bias_table: nn.Parameter | None = None
        self.tokens = (config.side, config.side) if role == LOCAL else tokens
        if config.position_biases and role in (LOCAL, GLOBAL):
            size = (2 * self.tokens[0] - 1) * (2 * self.tokens[1] - 1)
            table = torch.empty(size, heads)
            self.bias_table = nn.Parameter(
                nn.init.trunc_normal_(table, std=0.02, generator=generator)
            )

    def bias(self, tokens: Grid, order: Tensor | None = None) -> Tensor | None:
        """(H, S, S): biases of the relative position of semantic tokens on a map, or in another
        order than row by row.
        """
        if self.bias_table is None:
            return None
        require(
            tokens == self.tokens,
            f"position_biases were made for {self.tokens[0]} x {self.tokens[1]} semantic tokens; "
            f"images of this size have {tokens[0]} x {tokens[1]}",
        )
        index = get_relative_position_index(*tokens, device=self.bias_table.device)
        if order is not None:
            index = index[order][:, order]
        return self.bias_table[index].permute(2, 0, 1)


class STViTR(WindowMethod):
    """The method on a Swin transformer."""

    name = "stvit_r"
    config_class = STViTRConfig
    needs_training = "stvit_r-t"
    serves_sizes = True
    config: STViTRConfig

    def __init__(
        self, family: Swin, config: STViTRConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        depths = family.depths
        require(
            len(depths) > STAGE and depths[STAGE] % UNIT == 0,
            f"the backbone's stages have {depths} blocks; expected a multiple of {UNIT} in the "
            "third stage",
        )
        self.config = config
        self.units = range(0, depths[STAGE], UNIT)
        before = sum(depths[:STAGE])
        self.stages = tuple(before + first + LOCAL for first in self.units)
        self.window: Grid = family.block(STAGE, 0).window_size
        dim, heads = family.stage_dim(STAGE), family.block(STAGE, 0).attn.num_heads
        tokens = self.centres_grid = self._windows(family, family.grid()).tokens
        if config.form == "dense":
            narrow = (config.key_window, config.second_key_window)
            require(
                min(side or max(self.window) for side in narrow) >= max(self.window),
                f"key_window and second_key_window are {narrow[0]} and {narrow[1]}; expected at "
                f"least a window's {max(self.window)} positions",
            )
        self.pooling = POOLINGS[config.pooling](dim)
        self.pooling.reset_parameters(generator)
        self.centres_SC: nn.Parameter | None = None
        if config.global_centres:
            self.centres_SC = global_centres(tokens, dim, generator)
        self.blocks = nn.ModuleDict(
            {
                str(first + role): BlockExtras(dim, config, role, heads, tokens, generator)
                for first in self.units
                for role in range(1, UNIT)
            }
        )
        stages = range(len(depths)) if config.level_norms else range(0)
        self.level_norms = nn.ModuleList(
            nn.LayerNorm(family.stage_dim(stage), eps=1e-5) for stage in stages
        )

    @classmethod
    def feature_config(cls) -> STViTRConfig:
        return STViTRConfig.dense_prediction()

    def unused(self, family: Swin) -> list[nn.Parameter]:
        """The position biases of the blocks that run on semantic tokens."""
        used_again = (family.block(STAGE, int(index)) for index in self.blocks)
        return [block.attn.relative_position_bias_table for block in used_again]

    @property
    def _sees_padding(self) -> bool:
        return self.config.pad_mask != "correct"

    def _reaches(self, windows: Windows) -> tuple[Grid, Grid, Grid]:
        """Rows and columns of what the blocks 1, 2 and 5 look at in the dense form, the last in
        semantic tokens; the first also in the classification form.
        """
        config = self.config
        if config.form == "classification":
            return windows.reach(config.key_window, 10 / 7), (0, 0), (0, 0)
        first, second = (
            (side, side) if side else (times * windows.size[0], times * windows.size[1])
            for side, times in ((config.key_window, 2), (config.second_key_window, 3))
        )
        last = config.recovery_windows * config.side
        return first, second, (last, last)

    def _look(self, windows: Windows, fmap: FeatureMap) -> Look:
        """What each block looks at; :meth:`_unit` makes the memories."""
        reaches, device = self._reaches(windows), fmap.x_BHWC.device
        if self.config.form == "dense":
            return dense_look(windows, reaches, self.config.pad_mask, device, fmap.own_B2)
        return classification_look(windows, reaches[0], device)

    def padded(self, family: Any, sizes: Sizes) -> Any:
        config = self.config
        require(
            sizes is None
            or (
                config.form == "dense"
                and config.pad_mask == "correct"
                and config.pooling != "intra_inter"
                and not config.global_centres
            ),
            'sizes of padded images are served by form="dense" with pad_mask="correct", pooling '
            '"max" or "avg" and no global_centres: STViTRConfig.dense_prediction(). Else give '
            "images of one size, without sizes",
        )
        return super().padded(family, sizes)

    def _memory(self, *parts: Tensor) -> Tensor:
        """Rows that a block looks at; where padding is seen, with a last one for it."""
        memory = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        if self._sees_padding:
            memory = torch.cat([memory, memory.new_zeros(len(memory), 1, memory.shape[-1])], 1)
        return memory

    def infer(self, family: Swin, images: Tensor, recorder: Recorder | None = None) -> Tensor:
        return family.head(self._levels(family, images, recorder)[-1])

    def features(
        self, family: Swin, images: Tensor, indices: Sequence[int], sizes: Sizes = None
    ) -> FeatureOutput:
        """The map after each stage, (B, C, H, W), normalised where ``level_norms`` were learned."""
        return self.train_features(family, images, indices, sizes)

    def train_features(
        self,
        family: Swin,
        images: Tensor,
        indices: Sequence[int],
        sizes: Sizes = None,
        generator: torch.Generator | None = None,
    ) -> FeatureOutput:
        """The same as :meth:`features`: there is no noise, and nothing is decided."""
        states = maps = self._levels(family, images, sizes=sizes)
        if len(self.level_norms):
            pairs = zip(self.level_norms, maps, strict=True)
            maps = [fmap.with_x(norm(fmap.x_BHWC)) for norm, fmap in pairs]
        levels = [maps[index].x_BCHW.contiguous() for index in indices]
        return FeatureOutput(levels, states[-1], [maps[index].real_BHW for index in indices])

    def _levels(
        self,
        family: Swin,
        images: Tensor,
        recorder: Recorder | None = None,
        sizes: Sizes = None,
    ) -> list[FeatureMap]:
        """The map after each stage."""
        fmap, levels = self.padded(family, sizes).stem(images), []
        dense = self.config.form == "dense"
        windows = self._windows(family, fmap.grid)
        for stage in range(len(family.depths)):
            if stage == STAGE:
                fmap = family.enter_stage(stage, fmap)
                look = self._look(windows, fmap)
                for first in self.units:
                    fmap = self._unit(family, first, fmap, look, recorder)
            else:
                fmap = family.run_stage(stage, fmap, dense)
            levels.append(fmap)
        return levels

    def _unit(
        self, family: Swin, first: int, fmap: FeatureMap, look: Look, recorder: Recorder | None
    ) -> FeatureMap:
        """Six blocks: the map to semantic tokens and back."""
        windows, dense = look.windows, self.config.form == "dense"
        fmap = family.run_block(STAGE, first, fmap, dense)
        x_BNC = fmap.x_BHWC.flatten(1, 2)

        initial = self._centres(first + GENERATION, fmap, windows)
        memory = self._memory(x_BNC) if dense else torch.cat([initial.flatten(1, 2), x_BNC], 1)
        residual = initial if dense or self.config.residual else None
        semantic, _ = self._block(
            family, first + GENERATION, initial, residual, memory, look.generation
        )

        query = semantic
        if self.centres_SC is not None and first == 0:
            centres = resized_centres(self.centres_SC, self.centres_grid, windows.tokens)
            query = semantic + windows.split_tokens(centres)
        if not dense:
            memory = torch.cat([semantic.flatten(1, 2), x_BNC], 1)
            query = query.flatten(1, 2).unsqueeze(1)
        semantic, record = self._block(family, first + AGAIN, query, query, memory, look.again)
        if recorder:
            first_row = 0 if dense else windows.num_tokens
            looks_BSN = record.looks(windows, first_row).flatten(1, 2)
            block = self.stages[first // UNIT]
            recorder.stages.append(
                self.semantic_trace(block, windows.grid, looks_BSN, windows.num_tokens)
            )

        semantic = semantic.reshape(initial.shape)
        bias = self._extras(first + LOCAL).bias((windows.side, windows.side))
        memory = semantic.flatten(1, 2)
        semantic, _ = self._block(
            family, first + LOCAL, semantic, semantic, memory, look.local, bias
        )

        memory = semantic.flatten(1, 2)
        query = memory.unsqueeze(1)
        bias = self._extras(first + GLOBAL).bias(windows.tokens, token_order(windows, query.device))
        semantic, _ = self._block(
            family, first + GLOBAL, query, query, memory, look.everywhere, bias
        )

        memory = self._memory(semantic.squeeze(1)) if dense else semantic.squeeze(1)
        index, once = first + RECOVERY, self.config.project_once

        def recover(x_BHWC: Tensor) -> Tensor:
            query = x_BHWC.flatten(1, 2).unsqueeze(1)
            if dense:
                query = windows.split(windows.pad(x_BHWC))
            out, _ = family.attend(STAGE, index, query, memory, look.recovery, None, once)
            out = windows.join(out) if dense else out.reshape(x_BHWC.shape)
            return self._after_attention(family, index, out, x_BHWC)

        return fmap.with_x(family.in_name_of(STAGE, index, recover, fmap.x_BHWC))

    def _extras(self, index: int) -> BlockExtras:
        extras = self.blocks[str(index)]
        assert isinstance(extras, BlockExtras)
        return extras

    def _centres(self, index: int, fmap: FeatureMap, windows: Windows) -> Tensor:
        """(B, W, S, C): initial centres."""
        centres = windows.pool(fmap.bordered(), self.pooling, zeros=self._sees_padding)
        convolution = self._extras(index).position
        if convolution is None:
            return centres
        side = windows.side
        maps = centres.reshape(-1, side, side, centres.shape[-1]).permute(0, 3, 1, 2)
        moved: Tensor = convolution(maps).permute(0, 2, 3, 1).reshape(centres.shape)
        return centres + moved

    def _block(
        self,
        family: Swin,
        index: int,
        query: Tensor,
        residual: Tensor | None,
        memory: Tensor,
        keys: Keys,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, WindowRecord]:
        """A block of the backbone between the windows of ``query`` and the rows of ``memory``."""
        records: list[WindowRecord] = []

        def run(query: Tensor) -> Tensor:
            once = self.config.project_once
            out, record = family.attend(STAGE, index, query, memory, keys, bias, once)
            records.append(record)
            return self._after_attention(family, index, out, residual)

        return family.in_name_of(STAGE, index, run, query), records[0]

    def _after_attention(
        self, family: Swin, index: int, out: Tensor, residual: Tensor | None
    ) -> Tensor:
        """The rest of a block: layer scales, residuals and MLP."""
        extras, block = self._extras(index), family.block(STAGE, index)
        out = out if extras.scale1 is None else extras.scale1 * out
        x = out if residual is None else residual + block.drop_path1(out)
        out = family.channel(STAGE, index, x)
        out = out if extras.scale2 is None else extras.scale2 * out
        after: Tensor = x + family.drop_path(STAGE, index)(out)
        return after

    def train_forward(
        self, family: Swin, images: Tensor, generator: torch.Generator | None = None
    ) -> PooledOutput:
        fmap = self._levels(family, images)[-1]
        return PooledOutput(family.head(fmap), family.pool(fmap))

    def counts(self, family: Swin, grid: Grid) -> tuple[int, ...] | None:
        return (self._windows(family, grid).num_tokens,) * len(self.units)

    def steps(self, family: Swin, grid: Grid, counts: Sequence[Any]) -> list[costs.Step]:
        windows = self._windows(family, grid)
        macs: Any = family.downsample_macs(STAGE, grid)
        for first, count in zip(self.units, counts, strict=True):
            macs = macs + family.block_macs(STAGE, first, grid)
            macs = macs + self._unit_macs(family, first, windows, count)
        levels = costs.dense_levels(family, grid)
        mean = sum(counts) / len(counts)
        name = self.name if self.config.form == "classification" else f"{self.name}-dense"
        levels[STAGE] = costs.sparse_levels(name, (STAGE,), mean, macs)
        return costs.pyramid_steps(family, grid, levels)

    def _unit_macs(self, family: Swin, first: int, windows: Windows, tokens: Any) -> Any:
        """MACs of the blocks of a unit after its first."""
        dense, once = self.config.form == "dense", self.config.project_once
        positions, own = math.prod(windows.grid), self.config.window_tokens
        generation, again, recovery = map(math.prod, self._reaches(windows))
        padding = 1 if self._sees_padding else 0  # a row of its own
        queries = math.prod(windows.whole) if dense else positions
        if dense:
            looks = [
                (GENERATION, tokens, positions + padding, generation),
                (AGAIN, tokens, positions + padding, again),
                (RECOVERY, queries, tokens + padding, recovery),
            ]
        else:
            looks = [(GENERATION, tokens, tokens + positions, own + generation)]
        if not once:
            looks = [(role, q, windows.count * keys, keys) for role, q, _, keys in looks]
        if not dense:
            looks += [
                (AGAIN, tokens, tokens + positions, tokens + positions),
                (RECOVERY, queries, tokens, tokens),
            ]
        looks += [(LOCAL, tokens, tokens, own), (GLOBAL, tokens, tokens, tokens)]
        total: Any = self.pooling.macs(math.prod(windows.whole), tokens)
        for role, asking, rows, keys in looks:
            total = total + family.attend_macs(STAGE, first + role, asking, rows, keys)
            rows = positions if role == RECOVERY else asking
            total = total + family.channel_macs(STAGE, first + role, rows)
        if self.config.position_convolution:
            total = total + 9 * family.stage_dim(STAGE) * tokens
        return total
