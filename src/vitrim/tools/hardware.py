"""What a measured time depends on besides the model."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch


def hardware(device: torch.device) -> dict[str, Any]:
    """Device, threads and versions, as results and tables record them."""
    from vitrim import __version__

    stamp: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vitrim": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        stamp["gpu"] = torch.cuda.get_device_name(device)
    return stamp


def synchronise() -> None:
    """Wait until a CUDA device, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
