"""Per-image token counts without padding waste.

Linear layers, norms and MLPs run on the packed rows of all images, (sum of counts, C); only
attention needs to know where an image ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor

from vitrim.attention import AttentionRecord, Score
from vitrim.tokens import Tokens


class Layout:
    """Where each image's rows lie in a packed batch; made once per stage, shared by its blocks.

    Args:
        counts: patch tokens of each image.
        num_prefix: prefix tokens of every image.
    """

    def __init__(self, counts: list[int], num_prefix: int, device: torch.device) -> None:
        self.counts = counts
        self.num_prefix = num_prefix
        self.device = device

    @property
    def num_images(self) -> int:
        return len(self.counts)

    @cached_property
    def counts_B(self) -> Tensor:
        """(B,) int64."""
        return torch.tensor(self.counts, device=self.device)

    @cached_property
    def visible_BN(self) -> Tensor:
        """(B, longest) bool: which places of the padded sequences are tokens."""
        lengths = self.counts_B + self.num_prefix
        return torch.arange(int(max(self.counts)) + self.num_prefix, device=self.device) < (
            lengths.unsqueeze(1)
        )

    @cached_property
    def patch_visible_BN(self) -> Tensor:
        return self.visible_BN[:, self.num_prefix :]

    @cached_property
    def image_N(self) -> Tensor:
        """(patch rows,): image of each patch row."""
        images = torch.arange(self.num_images, device=self.device)
        return images.repeat_interleave(self.counts_B, output_size=sum(self.counts))


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """Prefix and patch tokens of a batch whose images keep different numbers of patches.

    The packed twin of :class:`vitrim.tokens.Tokens`: what the two have in common has the same name.
    """

    x: Tensor
    """(rows, C): image after image, each with its prefix tokens first."""
    layout: Layout
    index_N: Tensor
    """(patch rows,) int64: place of each patch token in the original row-major patch grid."""

    @property
    def num_prefix(self) -> int:
        return self.layout.num_prefix

    @property
    def num_images(self) -> int:
        return self.layout.num_images

    @property
    def counts_B(self) -> Tensor:
        """(B,): patch tokens of each image."""
        return self.layout.counts_B

    @property
    def patches(self) -> Tensor:
        """(patch rows, C)"""
        return self._padded()[:, self.num_prefix :][self.layout.patch_visible_BN]

    @property
    def prefix_BPC(self) -> Tensor:
        return self._padded()[:, : self.num_prefix]

    def _padded(self) -> Tensor:
        visible = self.layout.visible_BN
        out = self.x.new_zeros(*visible.shape, self.x.shape[-1])
        out[visible] = self.x
        return out

    def with_x(self, x: Tensor) -> PackedTokens:
        return replace(self, x=x)

    def with_prefix(self, prefix_BPC: Tensor) -> PackedTokens:
        """The same patch tokens behind other prefix tokens, as many as there are now."""
        lengths = self.counts_B + self.num_prefix
        place = torch.arange(self.num_prefix, device=self.x.device)
        rows = (lengths.cumsum(0) - lengths).unsqueeze(1) + place
        return self.with_x(self.x.index_copy(0, rows.flatten(), prefix_BPC.flatten(0, 1)))

    def sum_per_image(self, values: Tensor) -> Tensor:
        """(B, ...): sum over each image's patch tokens of ``values`` (patch rows, ...)."""
        out = values.new_zeros(self.num_images, *values.shape[1:])
        return out.index_add(0, self.layout.image_N, values)

    def spread(self, per_image: Tensor) -> Tensor:
        """(patch rows, ...): each image's value of ``per_image`` (B, ...) for all its patches."""
        return per_image.index_select(0, self.layout.image_N)

    def on_grid(self, values: Tensor, num_patches: int, fill: float) -> Tensor:
        """(B, num_patches): ``values`` (patch rows,) on the original grid, ``fill`` elsewhere."""
        grid = values.new_full((self.num_images, num_patches), fill)
        grid[self.layout.image_N, self.index_N] = values
        return grid

    def places(self) -> list[Tensor]:
        """Per image: the original places of its patch tokens, sorted."""
        return [part.sort().values for part in torch.split(self.index_N, self.layout.counts)]

    def padded(self) -> Tokens:
        """The same tokens padded to the longest image, under a keep mask."""
        visible = self.layout.patch_visible_BN
        index = self.index_N.new_zeros(visible.shape)
        index[visible] = self.index_N
        return Tokens(self._padded(), self.num_prefix, index, visible.to(self.x.dtype))


AnyTokens = Tokens | PackedTokens


def select(tokens: AnyTokens, keep_BN: Tensor, packages_BPC: Tensor | None = None) -> AnyTokens:
    """Only the patch tokens that ``keep_BN`` names, a number that may differ between images.

    One device synchronisation, to learn the counts. A single image stays a plain ``Tokens``.

    Args:
        tokens: what is there now.
        keep_BN: (B, N) bool, on the original grid.
        packages_BPC: tokens to put behind each image's prefix, as further prefix tokens.
    """
    num_patches = keep_BN.shape[1]
    if isinstance(tokens, Tokens):
        present = tokens.index_BN
        x = tokens.x
        alive = keep_BN.gather(1, present)
    else:
        padded = tokens.padded()
        assert padded.keep_BN is not None
        x, present = padded.x, padded.index_BN
        alive = keep_BN.gather(1, present) & (padded.keep_BN > 0.5)
    assert num_patches >= alive.shape[1]
    prefix, patches = x[:, : tokens.num_prefix], x[:, tokens.num_prefix :]
    if packages_BPC is not None:
        prefix = torch.cat([prefix, packages_BPC], dim=1)
    counts = alive.sum(1).tolist()
    if len(x) == 1:
        position = alive[0].nonzero().T
        kept = patches[:, position[0]]
        return Tokens(torch.cat([prefix, kept], 1), prefix.shape[1], present.gather(1, position))
    layout = Layout(counts, prefix.shape[1], x.device)
    both = torch.cat([prefix, patches], 1)
    mask = torch.cat([alive.new_ones(len(x), prefix.shape[1]), alive], 1)
    return PackedTokens(both[mask], layout, present[alive])


def packed_attention(
    attention: Attention,
    x_TC: Tensor,
    layout: Layout,
    score: Score | None = None,
    has_class: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Timm's attention layer on packed rows, each image seeing itself alone.

    Args:
        attention: a ``timm.layers.Attention``; its own projections and norms are used.
        x_TC: packed rows, normalised for attention.
        layout: where the images lie.
        score: asks for a score of the patch tokens.
        has_class: whether each image's token 0 is a class token.

    Returns:
        the layer's output (rows, C), and the score (patch rows,) if it was asked for.
    """
    visible = layout.visible_BN
    heads, dim = attention.num_heads, attention.head_dim
    qkv = x_TC.new_zeros(*visible.shape, 3 * attention.attn_dim)
    qkv[visible] = attention.qkv(x_TC)
    qkv = qkv.reshape(*visible.shape, 3, heads, dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None, :])
    out = attention.norm(context.transpose(1, 2)[visible].flatten(1))
    if attention.gate is not None:
        out = out * attention.gate(x_TC).sigmoid()
    out = attention.proj_drop(attention.proj(out))
    if score is None:
        return out, None
    record = AttentionRecord(
        q, k, v, context, attention.scale, layout.num_prefix, has_class, visible
    )
    return out, score(record)[layout.patch_visible_BN]
