"""Multiply-accumulates, by formula. One MAC is two FLOPs; the papers' "FLOPs" are MACs.

Only matrix products and convolutions count, as in ``torch.utils.flop_counter``: norms,
activations, softmax, sorting and gathering do not. Token counts may be plain numbers or tensors,
through which gradients flow (all formulas are polynomials in the count).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Count = TypeVar("Count", int, float, Tensor)


def linear_macs(module: nn.Module) -> int:
    """MACs of all linear layers in ``module`` for one token."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


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
