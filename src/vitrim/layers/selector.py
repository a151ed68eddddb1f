"""SPViT's token selector and its package token, which the forms of the method share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrim.config import require
from vitrim.costs.macs import linear_macs
from vitrim.tokens.packed import AnyTokens
from vitrim.tokens.plain import Tokens


@dataclass(frozen=True)
class Scores:
    """A selector's opinion of each patch token."""

    log_probs: Tensor
    """(..., 2): log-probabilities of (keep, drop), by which a token is kept."""
    keep_score: Tensor
    """(...): mean of the heads' keep probabilities, which weighs a token in the package."""

    @property
    def log_odds(self) -> Tensor:
        """(...): of keeping."""
        return self.log_probs[..., 0] - self.log_probs[..., 1]


class Selector(nn.Module):
    """Scores each patch token head by head, from its own slice and the mean slice of the image.

    ``MultiheadPredictorLG`` of the authors' code. Package tokens take part in the mean. ``config``
    has ``share_heads``, ``fuse`` and ``split``, see ``methods.selection.SelectorConfig``.
    """

    def __init__(self, dim: int, num_heads: int, config: Any) -> None:
        super().__init__()
        width = dim // num_heads
        require(
            dim == width * num_heads and width % 2 == 0 and width >= 4,
            f"{num_heads} heads share {dim} channels; SPViT needs an even number per head, 4 or "
            "more",
        )
        self.num_heads, self.fuse, self.split = num_heads, config.fuse, config.split
        hidden = max(1, num_heads // 2)
        self.head_attention = nn.Sequential(
            nn.Linear(num_heads, hidden), nn.GELU(), nn.Linear(hidden, num_heads), nn.Sigmoid()
        )
        embedded = width if config.split == "half" else width // 2
        copies = range(1 if config.share_heads else num_heads)
        self.embed = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embedded), nn.GELU())
            for _ in copies
        )
        self.classify = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, width // 2),
                nn.GELU(),
                nn.Linear(width // 2, width // 4),
                nn.GELU(),
                nn.Linear(width // 4, 2),
            )
            for _ in copies
        )

    def forward(self, tokens: AnyTokens, packages_BSC: Tensor) -> Scores:
        """Scores of the patch tokens; under a mask the kept ones are pooled."""
        slices = self._slices(tokens.patches)
        local, pooled = self._embedded(slices)
        total = tokens.sum_per_image(pooled)
        if packages_BSC.shape[1]:  # some runtimes cannot reshape an empty tensor
            total = total + self._embedded(self._slices(packages_BSC))[1].sum(1)
        # A count is at least 1 or exactly 0: the bound only turns 0 / 0 into 0.
        counts = (tokens.counts_B + packages_BSC.shape[1]).clamp(min=0.5)
        mean = tokens.spread(total / counts[:, None, None]).to(local.dtype)
        logits = _per_head(self.classify, torch.cat([local, mean], -1))
        weights = self.head_attention(slices.mean(-1))
        weights = (weights / weights.sum(-1, keepdim=True)).unsqueeze(-1)
        log_probs = (weights * logits.log_softmax(-1)).sum(-2)
        probs = (weights * logits.softmax(-1)).sum(-2)
        if self.fuse == "prob":
            log_probs = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
        return Scores(log_probs.log_softmax(-1), probs[..., 0])

    def _slices(self, x: Tensor) -> Tensor:
        """(..., H, D) of (..., C)."""
        return x.view(*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads)

    def _embedded(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """The local part, and the part that is averaged over the image."""
        embedded = _per_head(self.embed, slices)
        if self.split == "shared":
            return embedded, embedded
        local, pooled = embedded.chunk(2, -1)
        return local, pooled

    def macs(self, num_patches: Any, num_packages: int) -> Any:
        """MACs for one image."""
        copies = self.num_heads // len(self.embed)
        embed = copies * linear_macs(self.embed)
        rest = copies * linear_macs(self.classify) + linear_macs(self.head_attention)
        return (embed + rest) * num_patches + embed * num_packages

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of width 0.02 and zero biases, as the authors'."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)


def _per_head(modules: nn.ModuleList, x: Tensor) -> Tensor:
    """Each head's slice of ``x`` (..., H, D) through its own module, or all through one."""
    if len(modules) == 1:
        shared: Tensor = modules[0](x)
        return shared
    parts = [module(part) for module, part in zip(modules, x.unbind(-2), strict=True)]
    return torch.stack(parts, -2)


def package_of(
    tokens: AnyTokens,
    scores: Scores,
    dropped: Tensor,
    mode: Literal["keep_weighted", "mean", "sum"],
    *,
    bounded: bool = True,
) -> Tensor:
    """(B, C): what a stage drops, condensed; zero where that is nothing.

    Args:
        tokens: what the stage saw.
        scores: of its patch tokens.
        dropped: 1 for a patch token that goes, 0 for one that stays; may carry gradients.
        mode: mean weighted by the keep scores, plain mean, or weighted sum.
        bounded: leave out, of the weighted mean, the gradient that ``dropped`` carries: a kept
            token's score over the sum of the dropped ones' knows no bound.
    """
    x = tokens.patches
    weights = dropped.to(torch.promote_types(x.dtype, torch.float32))
    if mode == "keep_weighted" and bounded:
        weights = weights.detach()
    if mode != "mean":
        weights = weights * scores.keep_score
    package = tokens.sum_per_image(weights.unsqueeze(-1) * x)
    if mode != "sum":
        total = tokens.sum_per_image(weights).unsqueeze(-1)
        package = package / total.where(total > 0, 1)
    return package.to(x.dtype)


def masked(tokens: Tokens, keep_BN: Tensor) -> Tokens:
    """The tokens with further ones dropped under the mask."""
    return tokens.with_keep(keep_BN if tokens.keep_BN is None else tokens.keep_BN * keep_BN)
