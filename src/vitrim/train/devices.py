"""The devices and the precision of a run, by Accelerate."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vitrim.errors import ConfigError, MissingExtraError

logger = logging.getLogger(__name__)


@contextmanager
def accelerator_of(precision: str) -> Iterator[Any]:
    """An ``accelerate.Accelerator`` for this process, alone or as one of several.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16``; ``auto``: see :func:`native`.

    Raises:
        MissingExtraError: Accelerate is not installed.
        ConfigError: the precision does not run on this device.
    """
    try:
        from accelerate import Accelerator  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError("training", "accelerate", "train") from error
    # Told nothing, Accelerate lets every process of a launch without GPUs train alone.
    cpu = not torch.accelerator.is_available()
    precision = native(cpu) if precision == "auto" else precision
    joined_before = torch.distributed.is_available() and torch.distributed.is_initialized()
    try:
        accelerator = Accelerator(mixed_precision=precision.replace("fp32", "no"), cpu=cpu)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"run.precision = {precision!r} does not run here: {error}") from error
    if accelerator.num_processes == 1 and _meant_for_several():
        logger.warning(
            "accelerate launch was asked for several processes and started this one alone, as it "
            "does without GPUs; use: torchrun --nproc-per-node N -m vitrim train ..."
        )
    try:
        yield accelerator
    finally:
        if accelerator.num_processes > 1 and not joined_before:
            # A process that ends while gloo's threads still run is aborted.
            torch.distributed.destroy_process_group()
        # It keeps the precision for the life of the process unless it is told to forget.
        type(accelerator.state)._reset_state()


def native(cpu: bool) -> str:
    """``bf16`` where this device has instructions for it, ``fp32`` elsewhere: without them bf16
    takes twenty times as long.
    """
    if not cpu:
        has_it = not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
    else:
        found = torch.cpu.get_capabilities()
        has_it = any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16" if has_it else "fp32"


def _meant_for_several() -> bool:
    """Whether Accelerate's launcher of one process was asked for more: then it still says where the
    processes meet.
    """
    return "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ
