"""What every family offers to the rest of the library, whatever the shape of its backbones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vitrim import costs
from vitrim.costs import Step, total_macs
from vitrim.errors import ConfigError, InputError
from vitrim.families.inside import Instead, OnlyLevels, WithoutBlocks
from vitrim.layers import losses
from vitrim.tokens.calls import called, kind
from vitrim.tokens.feature_map import FeatureMap, real_places
from vitrim.tokens.plain import Grid, Sizes, Tokens


class Family(ABC):
    """Runs one backbone piece by piece; holds no weights of its own.

    What else a family offers depends on the shape of its backbones: methods are written for the
    families that they name (``Method.families``).
    """

    name: ClassVar[str]
    serves: ClassVar[str]
    """The backbones that it runs, in words."""
    modules: ClassVar[Sequence[str]]
    """Of timm's registry, where models of its classes are."""
    smallest: ClassVar[Mapping[str, Any]] = {}
    """Arguments that make a model in little time, enough to see whether it can be run."""
    labels_patches: ClassVar[bool] = False
    """Whether its patch tokens have a classifier of their own."""
    keeps_map: ClassVar[bool] = False
    """Whether its blocks run on a map, from which nothing can be taken out, and not on tokens."""

    arguments: ClassVar[frozenset[str]] = frozenset()
    """What timm's makers of its backbones take beside what :attr:`classes` do."""

    classes: ClassVar[tuple[type[nn.Module], ...]]
    """Of its backbones; subclasses with forwards of their own are others."""

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Whether ``model`` is of this family's classes."""
        return kind(model) in cls.classes

    @staticmethod
    @abstractmethod
    def obstacles(model: Any) -> Iterator[str]:
        """What keeps an accepted ``model`` from being run piece by piece; empty when it can."""

    @classmethod
    def describe(cls, model: Any) -> tuple[str, dict[str, Any]] | None:
        """The timm name and the arguments that make such a model, read off it; None: timm's own
        record says them.
        """
        return None

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return int(self.backbone.in_chans)

    @abstractmethod
    def containers(self) -> Iterator[tuple[str, nn.Module]]:
        """What holds the backbone's blocks, by its name in there: blocks are run one by one, and
        what holds them is not called.
        """

    @property
    def num_prefix(self) -> int:
        """Tokens before the patch tokens, which are never dropped; a map has none."""
        return 0

    @abstractmethod
    def traits(self) -> dict[str, Any]:
        """What methods rely on once they are made, by name: a backbone in which one of these has
        changed is another one.
        """

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that the backbone was created for."""

    @property
    def clip_frames(self) -> int | None:
        """Frames of the clips that the backbone is meant for; None: it takes images. Where it takes
        clips (B, channels, frames, height, width), every size and every grid of it begins with
        frames.
        """
        return None

    @property
    def probe_size(self) -> tuple[int, int]:
        """Size of random images on which two models are compared."""
        return self.image_size

    def size_of(self, images: Tensor) -> tuple[int, int]:
        """Height and width of a batch of images."""
        return images.shape[-2], images.shape[-1]

    @abstractmethod
    def grid(self, image_size: tuple[int, int] | None = None) -> Grid:
        """Rows and columns of the patches that an image of ``image_size`` is first cut into."""

    @abstractmethod
    def check_images(self, images: Tensor) -> None:
        """Raise :class:`InputError` unless the backbone takes ``images`` (B, channels, H, W)."""

    def state(self, features: Tensor) -> Any:
        """Features (B, N, C) or (B, H, W, C) as the tokens, or the map, between two blocks."""
        return FeatureMap(features) if self.keeps_map else Tokens.of(features, self.num_prefix)

    def without_blocks(self, instead: Instead, with_mlp: bool) -> WithoutBlocks:
        """A plain vision transformer with something else for its blocks, on features in place of
        images; see :class:`WithoutBlocks`.
        """
        return WithoutBlocks(self, instead, with_mlp)

    def only(self, levels: Sequence[int]) -> OnlyLevels:
        """A backbone in levels of which only these have blocks, on the features that enter them."""
        return OnlyLevels(self, levels)

    @abstractmethod
    def head(self, state: Any, /) -> Tensor:
        """Logits (B, classes): what the model answers, given what left its last block."""

    @abstractmethod
    def normed(self, state: Any, /) -> Tensor:
        """What the backbone's own ``forward_head`` makes :meth:`head` of, where it can.

        Raises:
            ConfigError: it cannot: the tokens of some images are more than those of others.
        """

    def training_head(self, state: Any, /) -> Tensor:
        """Logits (B, classes) that losses look at; for most backbones, those of :meth:`head`."""
        return self.head(state)

    @staticmethod
    def token_loss(student_BNC: Tensor, teacher_BNC: Tensor, keep_BN: Tensor) -> Tensor:
        """How far a student's ``patch_features`` are from a teacher's where tokens are kept."""
        return losses.kept_token_mse(student_BNC, teacher_BNC, keep_BN)

    @abstractmethod
    def pool(self, state: Any, /) -> Tensor:
        """(B, C): what the classifier of :meth:`head` reads (the mean, if two read one each)."""

    @abstractmethod
    def pyramid(
        self, images: Tensor, indices: Sequence[int] | None = None, sizes: Sizes = None
    ) -> tuple[list[Tensor], Any]:
        """Maps (B, C, H, W) of the dense backbone, as timm's feature extraction gives them, and
        what left its last block.

        Args:
            images: (B, channels, H, W).
            indices: of the maps among those of timm's ``feature_info``; None:
                :attr:`level_indices`.
            sizes: own height and width of each image, where they were padded to one size.
        """

    @property
    @abstractmethod
    def level_indices(self) -> tuple[int, ...]:
        """The maps, among those of timm's ``feature_info``, that are the backbone's pyramid."""

    def with_maps(self, grid: Grid, indices: Sequence[int] = ()) -> Any:
        """The family where maps are asked for and no answer; see :class:`WithMaps`."""
        return self

    @property
    @abstractmethod
    def head_parts(self) -> Sequence[str]:
        """The backbone's modules, by name, that its maps do not pass."""

    @abstractmethod
    def dense_steps(self, grid: Grid) -> list[Step]:
        """What the backbone alone computes for one image of ``grid`` patches."""

    def dense_macs(self, grid: Grid) -> int:
        """MACs of the backbone alone on one image of ``grid`` patches."""
        return int(total_macs(self.dense_steps(grid)))


class Pyramid(Family):
    """A family whose backbones pool their tokens, or shrink their map, from stage to stage.

    Every ``grid`` is that of the stem; :meth:`stage_grid` gives that of a stage.
    """

    stages_name: ClassVar[str]
    """Of the backbone's module that holds its stages; each has ``blocks``."""

    def containers(self) -> Iterator[tuple[str, nn.Module]]:
        stages = getattr(self.backbone, self.stages_name)
        yield self.stages_name, stages
        for number, stage in enumerate(stages):
            yield f"{self.stages_name}.{number}", stage
            yield f"{self.stages_name}.{number}.blocks", stage.blocks

    @property
    @abstractmethod
    def depths(self) -> tuple[int, ...]:
        """Number of blocks of each stage."""

    def traits(self) -> dict[str, Any]:
        dims = tuple(self.stage_dim(stage) for stage in range(len(self.depths)))
        return {"depths": self.depths, "channels": dims, "prefix tokens": self.num_prefix}

    @abstractmethod
    def block(self, stage: int, index: int) -> Any:
        """Timm's block ``index`` of a stage."""

    @abstractmethod
    def stage_dim(self, stage: int) -> int:
        """Channels in a stage's blocks."""

    @abstractmethod
    def stage_grid(self, grid: Grid, stage: int) -> Grid:
        """Rows and columns of the map in a stage's blocks, for an image of ``grid`` patches."""

    @abstractmethod
    def stem(self, images: Tensor, sizes: Sizes = None) -> Any:
        """The tokens, or the map, before stage 0. Where a map is kept, ``sizes`` are the own height
        and width of each image, if they were padded below and right to one size.
        """

    @abstractmethod
    def enter_stage(self, stage: int, state: Any, /) -> Any:
        """The downsampling before a stage's blocks; the same state where there is none."""

    @abstractmethod
    def run_block(self, stage: int, index: int, state: Any, /) -> Any:
        """Block ``index`` of a stage on every position: timm's own forward."""

    def run_stage(self, stage: int, state: Any, *options: Any) -> Any:
        """A whole stage: its downsampling and all its blocks; ``options`` are the blocks'."""
        state = self.enter_stage(stage, state)
        for index in range(self.depths[stage]):
            state = self.run_block(stage, index, state, *options)
        return state

    def dense(self, images: Tensor) -> Any:
        """What leaves the last block, every position fully computed."""
        state = self.stem(images)
        for stage in range(len(self.depths)):
            state = self.run_stage(stage, state)
        return state

    @abstractmethod
    def as_map(self, stage: int, state: Any, /) -> Tensor:
        """(B, C, rows, columns): what a stage leaves, all positions present and in order."""

    def pyramid(
        self, images: Tensor, indices: Sequence[int] | None = None, sizes: Sizes = None
    ) -> tuple[list[Tensor], Any]:
        state, levels = self.stem(images, sizes), []
        for stage in range(len(self.depths)):
            state = self.run_stage(stage, state)
            levels.append(self.as_map(stage, state).contiguous())
        return levels if indices is None else [levels[index] for index in indices], state

    @property
    def level_indices(self) -> tuple[int, ...]:
        return tuple(range(len(self.depths)))

    @abstractmethod
    def stem_macs(self, grid: Grid) -> int:
        """MACs of the stem."""

    @abstractmethod
    def level_macs(self, stage: int, grid: Grid) -> int:
        """MACs of :meth:`run_stage`."""

    @abstractmethod
    def head_macs(self) -> int:
        """MACs of the classifier."""

    def dense_steps(self, grid: Grid) -> list[Step]:
        return costs.pyramid_steps(self, grid, costs.dense_levels(self, grid))


class MapPyramid(Pyramid):
    """A pyramid that keeps a map from stem to head."""

    keeps_map = True

    def as_map(self, stage: int, fmap: FeatureMap) -> Tensor:
        return fmap.x_BCHW

    def in_name_of(
        self, stage: int, index: int, run: Callable[[Tensor], Tensor], x_BHWC: Tensor
    ) -> Tensor:
        """``run(x)`` as a block's own forward: whoever hooked the block sees it."""
        return called(self.block(stage, index), run, x_BHWC)

    def finish(self, stage: int, index: int, x_BHWC: Tensor) -> Tensor:
        """What a block does to each position behind both of its parts; for most, nothing."""
        return x_BHWC

    @property
    @abstractmethod
    def reduction(self) -> int:
        """Pixels per side of what a position of the last map stands for."""

    def real_pixels(self, images: Tensor, sizes: Sequence[Grid]) -> Tensor:
        """The images with 0 where they were padded to one size."""
        check_sizes(images, sizes, self.reduction)
        whole = (images.shape[2], images.shape[3])
        real_BHW = real_places(sizes, whole, whole, images.device)
        return images.masked_fill(~real_BHW.unsqueeze(1), 0)

    @abstractmethod
    def downsample_macs(self, stage: int, grid: Grid) -> int:
        """MACs of :meth:`enter_stage`."""

    @abstractmethod
    def mix_macs(self, stage: int, index: int, grid: Grid) -> int:
        """MACs of the part of a block that mixes positions."""

    @abstractmethod
    def channel_macs(self, stage: int, index: int, num_positions: Any) -> Any:
        """MACs of the rest of a block on ``num_positions`` positions (a number or a tensor)."""

    def block_macs(self, stage: int, index: int, grid: Grid) -> int:
        """MACs of a whole block."""
        positions = math.prod(self.stage_grid(grid, stage))
        return self.mix_macs(stage, index, grid) + int(self.channel_macs(stage, index, positions))

    def level_macs(self, stage: int, grid: Grid) -> int:
        blocks = (self.block_macs(stage, index, grid) for index in range(self.depths[stage]))
        return self.downsample_macs(stage, grid) + sum(blocks)


def check_sizes(images: Tensor, sizes: Sequence[Grid], reduction: int) -> None:
    """Raise :class:`InputError` unless ``sizes`` can be the own heights and widths of ``images``,
    padded to whole positions of the smallest map.
    """
    height, width = images.shape[-2:]
    if height % reduction or width % reduction:
        raise InputError(
            f"images are padded to {height} x {width} pixels; with sizes, both sides must be "
            f"multiples of {reduction}, what a position of the smallest map stands for"
        )
    if len(sizes) != len(images):
        raise InputError(f"there are {len(sizes)} sizes for {len(images)} images; give one each")
    for number, size in enumerate(sizes):
        if len(size) != 2 or not (1 <= size[0] <= height and 1 <= size[1] <= width):
            raise InputError(
                f"the size of image {number} is {tuple(size)}; expected its own height and width, "
                f"at most the {height} x {width} that it was padded to"
            )


def refuse_sizes(sizes: Any, name: str) -> None:
    """Raise :class:`ConfigError` where ``sizes`` are given to what does not serve them."""
    if sizes is not None:
        raise ConfigError(
            f"{name} does not serve sizes: it cannot leave the padding of images out; give images "
            "of one size without sizes. They are served by dynamic_spatial on Swin and ConvNeXt, "
            "spvit_pyramid on Swin, stvit_r, and dense Swin and ConvNeXt"
        )


def check_channels(images: Tensor, channels: int) -> None:
    """Raise :class:`InputError` unless ``images`` are (batch, ``channels``, height, width), of a
    pixel at least.
    """
    if images.ndim != 4 or images.shape[1] != channels or 0 in images.shape[2:]:
        raise InputError(
            f"images have shape {tuple(images.shape)}; expected (batch, {channels}, height, width)"
        )


def check_patched_images(images: Tensor, backbone: Any, flexible: bool) -> None:
    """Raise :class:`InputError` unless ``images`` suit a backbone with timm's patch embedding.

    Args:
        images: (B, channels, H, W).
        backbone: has ``in_chans`` and ``patch_embed``.
        flexible: whether it takes other sizes than the one it was created for.
    """
    patch_embed, shape = backbone.patch_embed, tuple(images.shape)
    check_channels(images, backbone.in_chans)
    if not flexible:
        height, width = patch_embed.img_size
        if shape[2:] != (height, width):
            raise InputError(
                f"images are {shape[2]} x {shape[3]} pixels; this backbone takes {height} x "
                f"{width}. Resize them, or create the backbone with img_size=... or "
                "dynamic_img_size=True"
            )
    elif not patch_embed.dynamic_img_pad:
        height, width = patch_embed.feat_ratio(as_scalar=False)
        if shape[2] % height or shape[3] % width:
            raise InputError(
                f"images are {shape[2]} x {shape[3]} pixels; both sides must be multiples of the "
                f"patch size {height} x {width}"
            )
