"""STViT on Video Swin: semantic tokens replace the frames of a clip in the third stage.

Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View", CVPR 2023
(arXiv 2303.08685), section 4.2: semantic tokens of Video Swin are made frame by frame. The first
blocks of the third stage run on all positions of all frames. Then, in each frame alone, s x s
centres P are pooled in every window and two generation layers turn them into semantic tokens S,
each window's centres looking at themselves and at a larger window of their frame:

    S1 = block(query P,      keys and values concat(P, X),   residual P)
    S2 = block(query S1 + G, keys and values concat(S1, X),  residual S1 + G)

with X the positions of the larger window, which are not used any more after this, and G learned
global centres, where they are asked for. The other blocks of the stage, and those of the last one,
run on semantic tokens alone: each looks at the tokens of its window in all frames of the window's
extent in time (8), together. Between the stages they are merged 2 x 2 in each frame, as positions
would be. Their mean after the final norm goes to the classifier. Depth stays as it was. Training
computes exactly what inference does.

Nobody has released this variant, and the text was known to us through reading notes, which say that
tokens are made per frame and what is saved, and no more. All else is ours:

* the generation block: 5/8 of all blocks come before the generation layers (``base_layers`` 3 of
  Swin-T, 11 of Swin-S and Swin-B), which with 9 tokens per window saves what was published;
* larger windows of 10 for windows of 7, keys and values projected once per position, without
  position biases: what ``stvit_swin`` takes from the released code of STViT-R;
* windows of s x s tokens in place of 7 x 7 positions, in the last stage too; in time they are the
  backbone's own, shifted in the same blocks, and in space they are not shifted;
* a token that was pooled keeps its place, the middle of its region, and attention among tokens adds
  the backbone's position biases of the offsets between these places, in time and in space. Global
  centres have no places, and tokens that start from them no biases, of time neither; without them
  is the default here, so that the biases which the backbone has learned go on to be used;
* at borders, a window that hangs over sees no padding, and tokens that stand for padding alone are
  dropped. Where a clip's maps of tokens do not fill whole windows they are padded as torchvision
  pads the backbone's: with zeros, which are seen.

From a dense Video Swin every block maps one to one. New are global centres, and the parameters of a
learned pooling or layer scale, where they are asked for. The blocks after the base layers meet
other tokens than they knew, so a converted model must be trained.

Published (from notes; Kinetics-400, 4 x 3 views), of Video Swin-T and Swin-S alike: top-1 0.3 below
the dense model's at 27 % fewer MACs. We reproduce the cost: 28 % fewer than torchvision's own at 32
frames of 224 x 224. Absolute values were not obtained; training on Kinetics was not run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitrim import costs
from vitrim.families import VideoSwin
from vitrim.layers.semantic_attention import WindowRecord
from vitrim.layers.semantic_windows import Windows, windows_of
from vitrim.methods.records import Recorder
from vitrim.methods.semantic import STAGE, GenerationConfig, GenerationMethod
from vitrim.tokens.clip_map import ClipMap, Volume
from vitrim.tokens.plain import Grid


@dataclass(frozen=True, kw_only=True, slots=True)
class STViTVideoConfig(GenerationConfig):
    """How STViT is set up on a Video Swin transformer."""

    global_centres: bool = False
    """Learn centres G that are added to the second generation layer's queries: then tokens have no
    places, and attention among them no position biases. Paper: yes, on images."""
    residual: bool = True
    """Whether the first generation layer's residual holds the pooled centres P. Paper: yes; the
    released code of STViT-R for classification: no."""


class STViTVideo(GenerationMethod):
    """The method on a Video Swin transformer."""

    name = "stvit_video"
    config_class = STViTVideoConfig
    families = ("video_swin",)
    refusals: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("vit", "eva", "naflex", "lvvit", "pit", "swin_v2", "convnext"),
            "it is of images, and this of clips",
        ),
        "swin": "it is of images, and this of clips: use stvit_swin",
    }
    base_share = (5, 8)
    config: STViTVideoConfig

    def _largest_window(self, family: VideoSwin) -> Grid:
        _, rows, columns = family.window
        return rows, columns

    def _windows_on(self, map_grid: Volume) -> Windows:
        """The windows of each frame's map; they shrink to smaller maps, as the backbone's do."""
        _, *grid = map_grid
        rows, columns = (min(pair) for pair in zip(grid, self.window, strict=True))
        return windows_of((grid[0], grid[1]), (rows, columns), self.config.window_tokens)

    def unused(self, family: VideoSwin) -> list[nn.Parameter]:
        """The position biases of the generation layers, and of all blocks behind them where tokens
        have no places.
        """
        blocks = self._semantic_blocks(family)
        blocks = blocks if self.config.global_centres else blocks[:2]
        return [family.block(*place).attn.relative_position_bias_table for place in blocks]

    def _run(self, family: VideoSwin, images: Tensor, recorder: Recorder | None = None) -> ClipMap:
        clip: ClipMap = self._base(family, images)
        windows = self._windows_on(clip.grid)
        x_BTHWC, record = self._generate(family, clip.x_BTHWC, windows, self.config.residual)
        if recorder:
            looks_BSN = _looks(record, windows, len(images))
            count = looks_BSN.shape[1]
            recorder.stages.append(self.semantic_trace(self.stages[0], clip.grid, looks_BSN, count))
        clip = clip.with_x(x_BTHWC)
        for stage, index in self._semantic_blocks(family)[2:]:
            if stage > STAGE and index == 0:
                clip = family.enter_stage(stage, clip)
            clip = clip.with_x(self._token_block(family, stage, index, clip.x_BTHWC, windows))
        return clip

    def _token_block(
        self, family: VideoSwin, stage: int, index: int, x_BTHWC: Tensor, windows: Windows
    ) -> Tensor:
        """A block among the semantic tokens of each window, over its frames."""
        scales = self._scales(stage, index, x_BTHWC)

        def run(x: Tensor) -> Tensor:
            mixed = family.mix(stage, index, x, windows.places, not self.config.global_centres)
            x = x + family.attention_drop_path(stage, index)(scales[0] * mixed)
            return self._second_half(family, stage, index, x, scales[1])

        return family.in_name_of(stage, index, run, x_BTHWC)

    def counts(self, family: VideoSwin, grid: Volume) -> tuple[int, ...] | None:
        return (grid[0] * math.prod(self._windows(family, grid).visible_tokens),)

    def steps(self, family: VideoSwin, grid: Volume, counts: Sequence[Any]) -> list[costs.Step]:
        return self._steps(family, grid, counts[0], self._semantic_macs(family, grid))

    def _semantic_macs(self, family: VideoSwin, grid: Volume) -> Any:
        """MACs from the third stage on."""
        windows, frames = self._windows(family, grid), grid[0]
        total: Any = self._base_macs(family, grid)
        total += frames * self._generation_macs(family, windows)
        size, window = (
            (frames, *windows.visible_tokens),
            (family.window[0], windows.side, windows.side),
        )
        for stage, index in self._semantic_blocks(family)[2:]:
            tokens = family.stage_grid(size, stage - STAGE)
            if stage > STAGE and index == 0:
                total += family.merge_macs(stage, math.prod(tokens))
            total += family.windows_macs(stage, index, tokens, window)
            total += family.channel_macs(stage, index, math.prod(tokens))
        return total


def _looks(record: WindowRecord, windows: Windows, num_clips: int) -> Tensor:
    """(B, S, N): how much each semantic token of each frame looks at each place of each frame; at
    those of other frames not at all. Both go frame by frame, row by row.
    """
    rows, columns = windows.visible_tokens
    looks = record.looks(windows, windows.num_tokens)[:, :rows, :columns].flatten(1, 2)
    looks_BTSN = looks.reshape(num_clips, -1, *looks.shape[1:])
    own = torch.eye(looks_BTSN.shape[1], device=looks.device)
    return torch.einsum("btsn,tu->btsun", looks_BTSN, own).flatten(3, 4).flatten(1, 2)
