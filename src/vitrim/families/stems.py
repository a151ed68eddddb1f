"""What a plain vision transformer cuts images into patches with, and what that costs."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from timm.layers import HybridEmbed, PatchEmbed
from torch import nn
from torch.func import functional_call

from vitrim.costs.macs import conv_macs, counting
from vitrim.tokens.calls import kind

SERVED = (PatchEmbed, HybridEmbed)
"""One convolution, or a convolutional network and one behind it."""
_counted: WeakKeyDictionary[nn.Module, dict[Any, int]] = WeakKeyDictionary()


def stem_macs(embed: Any, num_patches: int) -> int:
    """MACs of making ``num_patches`` patches.

    No formula knows a network that stands before the patches: what it does to an image of its own
    size is counted, once, and other images cost in proportion.
    """
    if kind(embed) is PatchEmbed:
        return num_patches * conv_macs(embed.proj)
    known = _counted.setdefault(embed, {})
    if embed.img_size not in known:
        known[embed.img_size] = _count(embed)
    return known[embed.img_size] * num_patches // int(embed.num_patches)


@torch.no_grad()
def _count(embed: Any) -> int:
    """MACs of one image, counted without memory for it."""
    tensors = {**dict(embed.named_parameters()), **dict(embed.named_buffers())}
    without = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    image = torch.empty(1, embed.in_chans, *embed.img_size, device="meta")
    dtype = next(embed.parameters()).dtype
    with counting() as counter:
        functional_call(embed, without, (image.to(dtype),))
    return int(counter.get_total_flops()) // 2
