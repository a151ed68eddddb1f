"""The inside of a model: a family on features in place of images and logits.

A method's inference on a family of which a part is missing is the method's own work, or some levels
of a pyramid: that is what latency tables time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vitrim.errors import ConfigError
from vitrim.layers.canvas import Canvas
from vitrim.tokens.feature_map import FeatureMap
from vitrim.tokens.plain import Grid

Instead = Callable[[Sequence[int], Any], Any]
"""Takes the indices of blocks and the tokens that enter them; gives those that leave."""


class Changed:
    """A family that is in all but what a class below says the ``whole`` one."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["whole"], name)


class WithoutHead(Changed):
    """A family that gives what the backbone's head reads, for logits."""

    def answer(self, start: int, tokens: Any, exact: bool = True) -> Tensor:
        """The whole last block, whatever the classifier reads: all tokens are asked for."""
        return self.head(self.whole.run_blocks(range(start, self.whole.depth), tokens))

    def head(self, state: Any) -> Tensor:
        features: Tensor = self.whole.normed(state)
        return features

    def patch_head(self, x_BNC: Tensor) -> Tensor:
        raise ConfigError(
            "without prefix tokens this method pools its tokens itself, so the backbone's "
            "forward_head could not go on from forward_features; call the model"
        )


class WithMaps(Changed):
    """A plain vision transformer that shows its map after some of its blocks; of its answer nothing
    is wanted.
    """

    whole_last_block = "the map is asked for"

    def __init__(self, whole: Any, grid: Grid, indices: Sequence[int]) -> None:
        super().__init__(whole)
        self.canvas = Canvas(grid)
        self.shown = dict.fromkeys(indices, (Tensor(), Tensor()))
        """By block: the map (B, C, H, W), and which of its places were computed (B, H, W)."""
        self.last: Any = None
        """The tokens after the last block that was run."""

    @property
    def maps(self) -> list[Tensor]:
        """(B, C, H, W) after each of the blocks that were asked for."""
        return [map_BCHW for map_BCHW, _ in self.shown.values()]

    def dense(self, images: Tensor) -> Any:
        return self.run_blocks(range(self.whole.depth), self.whole.stem(images))

    def run_block(self, index: int, tokens: Any) -> Any:
        return self.run_blocks((index,), tokens)

    def run_blocks(self, indices: Sequence[int], tokens: Any) -> Any:
        for index in indices:
            tokens = self._show(index, self.whole.run_blocks((index,), tokens))
        return tokens

    def split_block(
        self, index: int, tokens: Any, score: Any, between: Any = None
    ) -> tuple[Any, Tensor]:
        after, scores = self.whole.split_block(index, tokens, score, between)
        return self._show(index, after), scores

    def _show(self, index: int, tokens: Any) -> Any:
        self.last = tokens
        if index in self.shown:
            self.canvas.paint(tokens)
            self.shown[index] = self.canvas.map_BCHW, self.canvas.keep_BHW
        return tokens

    def answer(self, start: int, tokens: Any, exact: bool = True) -> Tensor:
        return self.head(self.run_blocks(range(start, self.whole.depth), tokens))

    def head(self, state: Any) -> Tensor:
        return features_of(state)

    training_head = patch_features = head


class Padded(Changed):
    """A family that keeps a map, on images that were padded to one size: it knows their own."""

    def __init__(self, whole: Any, sizes: Sequence[Grid]) -> None:
        super().__init__(whole)
        self.sizes = sizes

    def stem(self, images: Tensor, sizes: None = None) -> FeatureMap:
        """The map before stage 0, which says what of it is padding."""
        fmap: FeatureMap = self.whole.stem(images, self.sizes)
        return fmap


class Inside(Changed):
    """A family that takes features for images, and gives features for logits."""

    def grid(self, image_size: tuple[int, int] | None = None) -> Grid:
        """Of the images that the backbone was created for: features do not tell."""
        grid: Grid = self.whole.grid()
        return grid

    def stem(self, features: Tensor, sizes: None = None) -> Any:
        """The features as the tokens, or the map, that they are inside the model."""
        return self.whole.state(features)

    def head(self, state: Any) -> Tensor:
        """The features of tokens or of a map."""
        return features_of(state)


class WithoutBlocks(Inside):
    """A plain vision transformer without its blocks: ``instead`` of some it has something else. The
    MLP of a block in which a method chooses is there, if ``with_mlp``.
    """

    def __init__(self, whole: Any, instead: Instead, with_mlp: bool) -> None:
        super().__init__(whole)
        self.instead, self.with_mlp = instead, with_mlp

    def run_block(self, index: int, tokens: Any) -> Any:
        return self.instead((index,), tokens)

    def run_blocks(self, indices: Sequence[int], tokens: Any) -> Any:
        return self.instead(indices, tokens)

    def answer(self, start: int, tokens: Any, exact: bool = True) -> Tensor:
        return self.head(self.run_blocks(range(start, self.whole.depth), tokens))

    def mlp_half(self, index: int, tokens: Any) -> Any:
        return self.whole.mlp_half(index, tokens) if self.with_mlp else tokens

    def split_block(
        self, index: int, tokens: Any, score: Any, between: Any = None
    ) -> tuple[Any, Tensor]:
        half, scores = self.whole.attention_half(index, tokens, score)
        return self.mlp_half(index, half if between is None else between(half, scores)), scores

    def patch_head(self, x_BNC: Tensor) -> Tensor:
        return x_BNC


class OnlyLevels(Inside):
    """A pyramid of which only some levels are there: the others have no blocks, and no downsampling
    before them.
    """

    def __init__(self, whole: Any, levels: Sequence[int]) -> None:
        super().__init__(whole)
        self.levels = levels

    @property
    def depths(self) -> tuple[int, ...]:
        depths = enumerate(self.whole.depths)
        return tuple(depth if level in self.levels else 0 for level, depth in depths)

    def stage_grid(self, grid: Grid, stage: int) -> Grid:
        found: Grid = self.whole.stage_grid(self.grid(), stage)
        return found

    def enter_stage(self, stage: int, state: Any) -> Any:
        return self.whole.enter_stage(stage, state) if stage in self.levels else state

    def run_stage(self, stage: int, state: Any, *options: Any) -> Any:
        return self.whole.run_stage(stage, state, *options) if stage in self.levels else state


def features_of(state: Any) -> Tensor:
    """The features of tokens or of a map."""
    x: Tensor = state.x_BHWC if isinstance(state, FeatureMap) else state.x
    return x
