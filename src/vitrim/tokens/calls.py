"""Modules are called, not read: hooks, wrappers and adapters do what they do in timm's forward.

vitrim runs the parts of some modules one by one: a block by its halves, attention with its inner
values at hand. Whoever hangs on the module as a whole (hooks of users, of FSDP, of accelerate) is
asked all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from vitrim.errors import UnsupportedBackboneError

Result = TypeVar("Result")

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_WRAPPERS = ("torch.distributed", "torch.nn.utils.parametrize")
_one_at_a_time = threading.RLock()


def bare(module: Any) -> Any:
    """What ``torch.compile`` has wrapped; the module itself where nothing has."""
    return module._orig_mod if "_orig_mod" in getattr(module, "_modules", ()) else module


def kind(module: Any) -> type:
    """The class of a module, whatever torch made of it: compiled, sharded or parametrized."""
    classes = type(bare(module)).__mro__
    return next(c for c in classes if not c.__module__.startswith(_WRAPPERS))


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward."""
    return "forward" in vars(module) or _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


def called(module: nn.Module, run: Callable[..., Result], *inputs: Any) -> Result:
    """``run(*inputs)`` in the name of ``module``: its hooks run as if its forward did that.

    Args:
        module: whose parts ``run`` runs one by one.
        run: takes what the module's forward takes, and gives what it gives.
        inputs: tensors first of all: hooks that change or watch gradients look for them.

    Raises:
        UnsupportedBackboneError: somebody gave this module a forward of its own.
    """
    inside = bare(module)
    if inside is not module:
        run = partial(called, inside, run)
        if not _has_hooks(module):
            return run(*inputs)
    elif not is_hooked(module) and not _watched_by_all():
        return run(*inputs)
    if torch.compiler.is_compiling():
        result: Result = _called_eagerly(module, run, *inputs)
        return result
    return _called(module, run, *inputs)


def _called(module: nn.Module, run: Callable[..., Result], *inputs: Any) -> Result:
    # Accelerate's hooks are a forward of the module's own, which calls the one that they replaced.
    name = "_old_forward" if "_hf_hook" in vars(module) else "forward"
    with _one_at_a_time:
        before = vars(module).get(name)
        if name == "forward" and before is not None and bare(module) is module:
            raise UnsupportedBackboneError(
                f"a {type(module).__name__} of the backbone was given another forward, and vitrim, "
                "which runs its parts one by one, would pass it over; use hooks, or put a module "
                "of its own class in its place"
            )
        own, thread = getattr(module, name), threading.get_ident()

        def put_back() -> None:
            vars(module).pop(name, None)
            if before is not None:
                vars(module)[name] = before

        def forward(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return own(*args, **kwargs)
            put_back()  # the first call is ours; what hooks call or copy is the module as it was
            given = [word for word, value in kwargs.items() if value is not None]
            if given:
                raise UnsupportedBackboneError(
                    f"a hook gives a {type(module).__name__} of the backbone {', '.join(given)}, "
                    "which vitrim, running its parts one by one, would pass over"
                )
            return run(*args)

        vars(module)[name] = forward
        try:
            result: Result = module(*inputs)
        finally:
            put_back()
    return result


def _watched_by_all() -> bool:
    """Whether hooks are set for all modules, as by torch's counter of operations."""
    is_compiling = torch.compiler.is_compiling()
    return not is_compiling and bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


_called_eagerly = torch.compiler.disable(_called)  # type: ignore[no-untyped-call]


def linear_part(linear: Any, x: Tensor, start: int, stop: int) -> Tensor:
    """Outputs ``start`` to ``stop`` of a linear layer, (..., stop - start).

    The rows of a plain layer's weight say it for less; any other (quantised, wrapped, adapted,
    pruned, sharded) is called, and the rest of what it gives is dropped.
    """
    if not _is_plain(linear):
        whole: Tensor = linear(x)
        return whole[..., start:stop]
    bias = None if linear.bias is None else linear.bias[start:stop]
    return F.linear(x, linear.weight[start:stop], bias)


def of_zeros(linear: Any, x: Tensor) -> Tensor:
    """(1, C_out): what a linear layer makes of a row of zeros; ``x`` (..., C) shows its kind."""
    if not _is_plain(linear):
        row: Tensor = linear(x.new_zeros(1, x.shape[-1]))
        return row
    bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
    zeros: Tensor = bias.unsqueeze(0)
    return zeros


def _is_plain(linear: Any) -> bool:
    return type(linear) is nn.Linear and not is_hooked(linear)


def in_features(linear: nn.Module) -> int:
    """Channels that a linear layer or a convolution, or the one that a wrapper holds, takes."""
    names = ("in_features", "in_channels")
    sizes = (getattr(part, name, None) for part in linear.modules() for name in names)
    return next(size for size in sizes if isinstance(size, int))


def hidden_of(mlp: Any) -> int:
    """Channels inside of one of timm's MLPs, between its layers."""
    last = getattr(mlp, "w2", None)  # of GeGluMlp; the others' last layer is called fc2
    return in_features(mlp.fc2 if last is None else last)
