"""Multiply-accumulates, by formula. One MAC is two FLOPs; the papers' "FLOPs" are MACs.

Only matrix products and convolutions count, as in ``torch.utils.flop_counter``: norms,
activations, softmax, sorting and gathering do not. Token counts may be plain numbers or tensors,
through which gradients flow (all formulas are polynomials in the count).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Count = TypeVar("Count", int, float, Tensor)


def linear_macs(module: nn.Module) -> int:
    """MACs of all linear layers in ``module`` for one token, adapters and quantised ones too."""
    return sum(_own_macs(layer) for layer in module.modules())


def _own_macs(layer: Any) -> int:
    """Of a layer itself: with numbers of features in and out, and none inside that counts."""
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    taken, given = (getattr(layer, name, None) for name in ("in_features", "out_features"))
    if not isinstance(taken, int) or not isinstance(given, int):
        return 0
    inside = any(_own_macs(part) for part in layer.modules() if part is not layer)
    return 0 if inside else taken * given


def conv_macs(module: nn.Module) -> int:
    """MACs of all convolutions in ``module`` for one place of their output."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))


def attention_macs(num_tokens: Count, width: int) -> Count:
    """MACs of the two N x N products, ``q k^T`` and ``weights v``, over all heads."""
    return 2 * width * num_tokens * num_tokens


def transformer_block_macs(num_tokens: Count, per_token: int, attention_width: int) -> Count:
    """A pre-norm block: its linear layers on each token, and attention among all of them."""
    return per_token * num_tokens + attention_macs(num_tokens, attention_width)


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Torch's counter of FLOPs, with attention by its plain kernel: which of the fused ones the
    counter knows depends on the version of torch and on the device.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter
