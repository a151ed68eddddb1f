"""Modules in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is as it was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    modes = [(module, training) for module, training in modes if training]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation and inference mode; afterwards every module is as it was."""
    with eval_mode(*models), torch.inference_mode():
        yield
