"""Family ``vit``: timm's VisionTransformer and its kin, run piece by piece.

Served: ViT, DeiT, distilled DeiT, DeiT-III (LayerScale), QK-norm, gated attention, register tokens,
CLIP-style pre-norm, norms behind the branches, DINOv2, SigLIP (attention pooling), hybrids (patches
of a convolutional network's map); class-token, average or attention pooling; any image size that
timm itself takes. Every piece is timm's own sub-module, called as timm calls
it, so that a model from which nothing is dropped gives timm's numbers exactly. What cannot be run
so (other block, attention or pooling types) is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from vitrim import costs
from vitrim.costs.macs import linear_macs, transformer_block_macs
from vitrim.errors import ConfigError
from vitrim.families import blocks, stems
from vitrim.families.base import Family, check_patched_images, refuse_sizes
from vitrim.families.blocks import Between, SomeTokens, block_obstacles, given, taken
from vitrim.families.inside import WithMaps
from vitrim.tokens.attention import AttentionRecord, Score, cross_attention
from vitrim.tokens.calls import bare, called, is_hooked, kind
from vitrim.tokens.graphs import exporting
from vitrim.tokens.packed import AnyTokens, PackedTokens
from vitrim.tokens.plain import Grid, Sizes, Tokens
from vitrim.tokens.projections import linears_of, width_of

_POOLS = ("token", "avg", "map")


class ViT(Family):
    """Runs one timm vision transformer piece by piece; holds no weights of its own."""

    name = "vit"
    classes: ClassVar[tuple[type[nn.Module], ...]] = (VisionTransformer, VisionTransformerDistilled)
    modules: ClassVar[Sequence[str]] = (
        "vision_transformer",
        "deit",
        "vision_transformer_hybrid",
        "vitamin",
    )
    smallest: ClassVar[Mapping[str, Any]] = {"depth": 1}
    serves = (
        "timm VisionTransformer and VisionTransformerDistilled with standard blocks "
        "(vit_*, deit_*, deit3_*, dinov2, clip, siglip and kin)"
    )

    @staticmethod
    def obstacles(model: Any) -> Iterator[str]:
        yield from stem_obstacles(model)
        yield from end_obstacles(model)
        if getattr(model, "distilled_training", False):
            yield "distilled_training=True (its forward returns two logits; switch it off)"
        yield from block_obstacles(model, (Block, ResPostBlock), (Attention,))

    def containers(self) -> Iterator[tuple[str, nn.Module]]:
        yield "blocks", self.backbone.blocks

    @property
    def depth(self) -> int:
        return len(self.backbone.blocks)

    @property
    def embed_dim(self) -> int:
        return int(self.backbone.embed_dim)

    @property
    def num_prefix(self) -> int:
        return int(self.backbone.num_prefix_tokens)

    @property
    def has_class(self) -> bool:
        """Whether token 0 is a class token (registers alone are none)."""
        return bool(self.backbone.has_class_token)

    @property
    def pools_patches(self) -> bool:
        """Whether the head pools patch tokens, and so needs at least one."""
        return bool(self.backbone.global_pool != "token")

    @property
    def pools_prefix(self) -> bool:
        """Whether that pooling takes the prefix tokens too."""
        return bool(self.backbone.pool_include_prefix)

    @property
    def turns(self) -> bool:
        """Whether queries and keys are turned by their tokens' places (rotary positions)."""
        return False

    def traits(self) -> dict[str, Any]:
        return {
            "depth": self.depth,
            "channels": self.embed_dim,
            "prefix tokens": self.num_prefix,
            "has a class token": self.has_class,
            "pools patches": self.pools_patches,
        }

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.backbone.patch_embed.img_size
        return int(height), int(width)

    def grid(self, image_size: tuple[int, int] | None = None) -> Grid:
        """Rows and columns of the patch grid of an image of ``image_size`` (height, width)."""
        height, width = image_size or self.image_size
        rows, columns = self.backbone.patch_embed.dynamic_feat_size((height, width))
        return int(rows), int(columns)

    def check_images(self, images: Tensor) -> None:
        check_patched_images(images, self.backbone, self.backbone.dynamic_img_size)

    def stem(self, images: Tensor) -> Tokens:
        """Patch embedding, prefix tokens and positions: the tokens before block 0."""
        self.check_images(images)
        model = self.backbone
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        return Tokens.of(x, self.num_prefix)

    def before(self, index: int, tokens: SomeTokens) -> SomeTokens:
        """The tokens as block ``index`` takes them."""
        return tokens

    def run_block(self, index: int, tokens: AnyTokens) -> AnyTokens:
        """Block ``index``: timm's own (fused) forward, masked under a keep mask, or packed."""
        return self.run_blocks((index,), tokens)

    def attention_half(
        self, index: int, tokens: AnyTokens, score: Score | None = None
    ) -> tuple[AnyTokens, Tensor | None]:
        """The first half of block ``index``: attention with its norm and residual.

        Args:
            index: of the block.
            tokens: what enters it.
            score: asks for a score of the patch tokens, read off this attention.

        Returns:
            the tokens between the halves, and the score, (B, N) or, packed, (patch rows,).
        """
        block, tokens = self.backbone.blocks[index], self.before(index, tokens)
        return blocks.attention_half(block, tokens, self.has_class, score)

    def mlp_half(self, index: int, tokens: AnyTokens) -> AnyTokens:
        """The second half of block ``index``: the MLP with its norm and residual."""
        return blocks.mlp_half(self.backbone.blocks[index], tokens)

    def split_block(
        self, index: int, tokens: AnyTokens, score: Score, between: Between | None = None
    ) -> tuple[AnyTokens, Tensor]:
        """Block ``index`` with a score of the patch tokens read off its attention, and something
        done between its halves; see :func:`vitrim.families.blocks.split_block`.
        """
        block, tokens = self.backbone.blocks[index], self.before(index, tokens)
        return blocks.split_block(block, tokens, self.has_class, score, between)

    def cross_block(
        self,
        index: int,
        query: Tokens,
        residual_BSC: Tensor,
        memory: Tokens,
        bias_N: Tensor | None = None,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, AttentionRecord]:
        """Block ``index`` between two sequences: its norms, projections and MLP, none new.

        Args:
            index: of the block.
            query: tokens that ask.
            residual_BSC: what the attention's output is added to.
            memory: tokens that give keys and values; not changed.
            bias_N: added to the attention logits of each token of the memory.
            scales: (C,) each, of what attention and MLP add, besides the block's own.

        Returns:
            (B, S, C), and what its attention did.
        """
        block = bare(self.backbone.blocks[index])
        query, memory = self.before(index, query), self.before(index, memory)
        angles = query.angles, memory.angles
        records: list[AttentionRecord] = []
        scale1, scale2 = scales or (None, None)

        def run(query_BSC: Tensor) -> Tensor:
            asking, asked = given(block, 1, query_BSC), given(block, 1, memory.x)
            out, record = cross_attention(block.attn, asking, asked, bias_N, angles)
            records.append(record)
            out = taken(block, 1, out)
            x = residual_BSC + (out if scale1 is None else scale1 * out)
            out = taken(block, 2, block.mlp(given(block, 2, x)))
            return x + (out if scale2 is None else scale2 * out)

        return called(block, run, query.x), records[0]

    @property
    def whole_last_block(self) -> str | None:
        """Why all of the last block is needed for the logits; None where :meth:`answer` does with
        the rows that the head reads.
        """
        if self.pools_patches:
            return "the head reads the patch tokens too"
        if is_hooked(self.backbone.norm):
            return "the final norm is hooked"
        return blocks.whole_for(self.backbone.blocks[-1])

    @property
    def read_rows(self) -> int:
        """Prefix tokens that the head reads, from the first: those that have a classifier."""
        return 2 if getattr(self.backbone, "head_dist", None) is not None else 1

    def answer(self, start: int, tokens: AnyTokens, exact: bool = True) -> Tensor:
        """Logits (B, classes), given what enters block ``start``.

        Args:
            start: the first block that is left to run.
            tokens: what enters it.
            exact: of the last block, compute no more than the logits need, where that can be: the
                same function, less work (:attr:`whole_last_block`). Training runs it whole.
        """
        last = self.depth - 1
        exact = exact and start <= last and not self.backbone.training
        if not exact or self.whole_last_block is not None:
            return self.head(self.run_blocks(range(start, self.depth), tokens))
        return self.head(self.last_rows(self.run_blocks(range(start, last), tokens)))

    def last_rows(self, tokens: AnyTokens) -> Tokens:
        """What leaves the last block, of the tokens that the head reads alone."""
        tokens = self.before(self.depth - 1, tokens)
        return blocks.first_rows(self.backbone.blocks[-1], tokens, self.read_rows)

    def head(self, tokens: AnyTokens) -> Tensor:
        """Logits (B, classes): final norm, pooling (of what is kept, each token as the patches that
        it stands for) and classifier.

        Package tokens behind the model's own prefix are pooled like patches.
        """
        model = self.backbone
        if isinstance(tokens, PackedTokens):
            if model.global_pool == "token":
                logits: Tensor = model.forward_head(model.norm(tokens.prefix_BPC))
                return logits
            tokens = tokens.padded()
        x = model.norm(tokens.x)
        if not blocks.is_changed(tokens) or model.global_pool == "token":
            logits = model.forward_head(x)
            return logits
        pooled = self._weighted_pool(x, tokens)
        logits = model.head(model.head_drop(model.fc_norm(pooled)))
        return logits

    def normed(self, tokens: AnyTokens) -> Tensor:
        """(B, P + K, C); where images keep different numbers, the others' places hold no token, and
        only the class token may be read.
        """
        if isinstance(tokens, PackedTokens):
            tokens = tokens.padded()
        if tokens.keep_BN is not None and self.pools_patches:
            raise ConfigError(
                "images of this batch keep different numbers of tokens, and the head pools them; "
                "give forward_features one image, or call the model"
            )
        if tokens.size_BN is not None and self.backbone.global_pool != "token":
            raise ConfigError(
                "the head pools tokens that stand for different numbers of patches, and features "
                "do not tell how many; call the model"
            )
        x: Tensor = self.backbone.norm(tokens.x)
        return x

    def patch_head(self, x_BNC: Tensor) -> Tensor:
        """Logits (B, classes) where no prefix token is left: the final norm, then the mean of all
        tokens, or the model's attention pooling, then its classifier (the mean of its two).
        """
        model = self.backbone
        pooled = self.patch_pool(x_BNC)
        logits: Tensor = model.head(pooled)
        second = getattr(model, "head_dist", None)
        return logits if second is None else (logits + second(pooled)) / 2

    def patch_pool(self, x_BNC: Tensor) -> Tensor:
        """(B, C): what the classifier of :meth:`patch_head` reads."""
        model = self.backbone
        x = model.norm(x_BNC)
        pooled = x.mean(1) if model.attn_pool is None else model.attn_pool(x)
        features: Tensor = model.head_drop(model.fc_norm(pooled))
        return features

    def pool(self, tokens: AnyTokens) -> Tensor:
        tokens = tokens.padded() if isinstance(tokens, PackedTokens) else tokens
        model = self.backbone
        x = model.norm(tokens.x)
        if not blocks.is_changed(tokens) or model.global_pool == "token":
            features: Tensor = model.forward_head(x, pre_logits=True)
            return features
        features = model.head_drop(model.fc_norm(self._weighted_pool(x, tokens)))
        return features

    def _weighted_pool(self, x: Tensor, tokens: Tokens) -> Tensor:
        """(B, C): of the tokens that a mask leaves, each as the patches that it stands for."""
        model = self.backbone
        keep = x.new_ones(x.shape[:2]) if tokens.keep_BN is None else tokens.keep_all
        log_size = x.new_zeros(x.shape[:2])
        if tokens.log_size is not None:
            log_size = tokens.log_size[:, 0, 0].to(x.dtype)
        if not self.pools_prefix:
            x, keep, log_size = (part[:, self.num_prefix :] for part in (x, keep, log_size))
        if model.global_pool == "map":
            visible = keep.detach() > 0.5
            visible = visible | ~visible.any(1, keepdim=True)  # nothing kept: look at all, no NaN
            bias = log_size.masked_fill(~visible, -torch.inf)
            with _plain_in_graphs(model.attn_pool):
                pooled: Tensor = model.attn_pool(x, attn_mask=bias[:, None, None, :])
            return pooled
        weights = (keep * log_size.exp()).unsqueeze(-1).to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1).clamp(min=0.5)

    def patch_features(self, tokens: Tokens) -> Tensor:
        """(B, N, C): the patch tokens after the final norm, wherever the model keeps that norm."""
        model = self.backbone
        features: Tensor = model.fc_norm(model.norm(tokens.x))
        return features[:, tokens.num_prefix :]

    @property
    def level_indices(self) -> tuple[int, ...]:
        return (self.depth - 1,)

    def pyramid(
        self, images: Tensor, indices: Sequence[int] | None = None, sizes: Sizes = None
    ) -> tuple[list[Tensor], Any]:
        """The patch tokens after some blocks, before the final norm, as maps."""
        refuse_sizes(sizes, self.name)
        grid = self.grid((images.shape[-2], images.shape[-1]))
        shown = self.with_maps(grid, self.level_indices if indices is None else indices)
        last = shown.dense(images)
        return shown.maps, last

    def with_maps(self, grid: Grid, indices: Sequence[int] = ()) -> WithMaps:
        return WithMaps(self, grid, indices)

    @property
    def head_parts(self) -> Sequence[str]:
        return "norm", "fc_norm", "attn_pool", "head", "head_dist"

    def dense(self, images: Tensor) -> Tokens:
        """All tokens after the last block, nothing dropped."""
        tokens = self.stem(images)
        return self.run_blocks(range(self.depth), tokens)

    def run_blocks(self, indices: Sequence[int], tokens: SomeTokens) -> SomeTokens:
        """Several blocks, one after the other."""
        # By their modules, whatever their indices: torch.compile shares what it makes of blocks
        # that differ in weights alone, and gives up on a function that it has made eight times.
        chosen = [self.backbone.blocks[index] for index in indices]
        again = self.backbone.grad_checkpointing and torch.is_grad_enabled()
        return blocks.run_blocks(chosen, tokens, self.has_class, again)

    def saliency(self, images: Tensor, blocks: Sequence[int]) -> tuple[Tokens, tuple[Tensor, ...]]:
        """How much each patch token matters to what the dense model predicts.

        The first-order change of the log-odds of the predicted class when a token that enters a
        block is removed: ``|<x, d log-odds / dx>|``, the Taylor criterion of Molchanov et al. 2017
        (arXiv 1611.06440, section 2.2) applied to tokens. One backward pass, no labels.

        Returns:
            the tokens after the last block, and (B, N) per block of ``blocks``, both detached.
        """
        inputs: list[Tensor] = []
        with torch.enable_grad():
            tokens = self.stem(images)
            for index in range(self.depth):
                if index in blocks:
                    if not inputs:  # nothing below the first of them needs a gradient
                        tokens = tokens.with_x(tokens.x.detach().requires_grad_())
                    inputs.append(tokens.x)
                tokens = self.run_blocks((index,), tokens)
            log_probs = self.head(tokens).float().log_softmax(-1)
            best = log_probs.topk(1).values
            rest = log_probs.scatter(1, log_probs.argmax(1, keepdim=True), -torch.inf)
            log_odds = best.sum() - rest.logsumexp(-1).sum()
            gradients = torch.autograd.grad(log_odds, inputs)
        saliency = tuple(
            (x.detach().float() * gradient).sum(-1).abs()[:, self.num_prefix :]
            for x, gradient in zip(inputs, gradients, strict=True)
        )
        return tokens.with_x(tokens.x.detach()), saliency

    def dense_steps(self, grid: Grid) -> list[costs.Step]:
        return costs.plain_steps(self, grid)

    def stem_macs(self, num_patches: int) -> int:
        """MACs of the patch embedding."""
        return stems.stem_macs(self.backbone.patch_embed, num_patches)

    def block_macs(self, index: int, num_tokens: Any) -> Any:
        """MACs of block ``index`` on ``num_tokens`` tokens, prefix tokens included."""
        block = self.backbone.blocks[index]
        return transformer_block_macs(num_tokens, linear_macs(block), width_of(block.attn))

    def last_rows_macs(self, num_tokens: Any) -> Any:
        """MACs of :meth:`last_rows` of ``num_tokens`` tokens."""
        block, rows = self.backbone.blocks[-1], self.read_rows
        attention, width = block.attn, self.embed_dim
        per_row = linear_macs(block)
        if isinstance(attention.k_norm, nn.Identity) and not self.turns:
            return rows * (per_row + 2 * attention.num_heads * width * num_tokens)
        keys, _ = keys_and_values_macs(attention)
        looking = rows * (width_of(attention) + attention.num_heads * width)
        return rows * (per_row - keys) + (keys + looking) * num_tokens

    def cross_block_macs(self, index: int, num_queries: Any, num_memory: Any) -> Any:
        """MACs of :meth:`cross_block`: ``num_queries`` tokens look at ``num_memory`` tokens."""
        block = self.backbone.blocks[index]
        keys_and_values = sum(keys_and_values_macs(block.attn))
        per_query = linear_macs(block) - keys_and_values
        attention = 2 * width_of(block.attn) * num_queries * num_memory
        return per_query * num_queries + keys_and_values * num_memory + attention

    def mlp_macs(self, index: int, num_tokens: Any) -> Any:
        """MACs of the second half of block ``index``: what is saved by dropping in between."""
        return linear_macs(self.backbone.blocks[index].mlp) * num_tokens

    def score_macs(self, index: int, num_tokens: Any) -> Any:
        """MACs that ``AttentionRecord.patch_attention`` of block ``index`` adds to the block's own:
        one row of the map, or all of it where there is no class token.
        """
        queries = 1 if self.has_class else num_tokens
        return width_of(self.backbone.blocks[index].attn) * num_tokens * queries

    def head_macs(self, num_tokens: Any, num_packages: Any = 0) -> Any:
        """MACs of pooling and classifier, given the number of tokens that reach the head, package
        tokens, which are pooled like patches, among them.
        """
        pooled = num_tokens if self.pools_prefix else num_tokens - self.num_prefix
        return self.patch_head_macs(pooled)

    def patch_head_macs(self, num_pooled: Any) -> Any:
        """MACs of pooling ``num_pooled`` tokens, and of the classifier."""
        model = self.backbone
        macs = sum(
            linear_macs(head) for head in (model.head, getattr(model, "head_dist", None)) if head
        )
        if model.attn_pool is None:
            return macs
        pool = model.attn_pool
        per_query = linear_macs(pool) - linear_macs(pool.kv)
        attention = 2 * pool.latent_len * pool.num_heads * pool.head_dim
        return macs + pool.latent_len * per_query + (linear_macs(pool.kv) + attention) * num_pooled


@contextmanager
def _plain_in_graphs(pool: Any) -> Iterator[None]:
    """Without the fused kernel where an exporter looks on: of a number of tokens that is found at
    run time, some want to know whether it is 1.
    """
    if not exporting() or not pool.fused_attn:
        yield
        return
    pool.fused_attn = False
    try:
        yield
    finally:
        pool.fused_attn = True


def stem_obstacles(model: Any) -> Iterator[str]:
    """What keeps the patch embedding of a plain vision transformer from being run here."""
    if kind(model.patch_embed) not in stems.SERVED:
        served = ", ".join(each.__name__ for each in stems.SERVED)
        yield f"patch embedding {kind(model.patch_embed).__name__} (served: {served})"


def end_obstacles(model: Any) -> Iterator[str]:
    """What keeps the pooling of a plain vision transformer from being run on fewer tokens."""
    if model.global_pool not in _POOLS:
        yield f"global_pool={model.global_pool!r} (served: {', '.join(_POOLS)})"


def keys_and_values_macs(attention: Any) -> tuple[int, int]:
    """MACs of making a token's keys, and its values."""
    linears = linears_of(attention)
    if len(linears) == 1:
        return (linear_macs(linears[0]) // 3,) * 2
    return linear_macs(linears[1]), linear_macs(linears[2])
