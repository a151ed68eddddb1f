"""The learned predictor of DynamicViT and of dynamic spatial sparsification: keep or drop?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrim.config import require
from vitrim.tokens.packed import AnyTokens


class Predictor(nn.Module):
    """Log-probabilities of (keep, drop) per patch token, from itself and the mean of the rest.

    ``PredictorLG`` of the authors' code (section 3.2, eqs 2 to 5): half of the embedding stays
    with its token, half is averaged over the kept tokens.
    """

    def __init__(self, dim: int, norm_eps: float = 1e-5) -> None:
        super().__init__()
        require(dim % 4 == 0, f"the embedding has {dim} channels; DynamicViT needs a multiple of 4")
        norm = nn.LayerNorm(dim, eps=norm_eps)
        self.embed = nn.Sequential(norm, nn.Linear(dim, dim), nn.GELU())
        self.classify = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, tokens: AnyTokens) -> Tensor:
        """Log-probabilities (..., 2) of the patch tokens; under a mask the kept ones are pooled."""
        local, pooled = self.embed(tokens.patches).chunk(2, dim=-1)
        # A kept count is at least 1 or exactly 0: the bound only turns 0 / 0 into 0.
        counts = tokens.counts_B.clamp(min=0.5).unsqueeze(-1)
        pooled = tokens.spread(tokens.sum_per_image(pooled) / counts)
        out: Tensor = self.classify(torch.cat([local, pooled.to(local.dtype)], dim=-1))
        return out

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of width 0.02 and zero biases, as the authors'."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)
