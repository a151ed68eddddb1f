"""How images are prepared, from the words of transformers' image processors to timm's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from PIL import Image

from vitrim.errors import ConfigError
from vitrim.runtime import check_preprocessing

_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_OPENAI = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
_CROPPED = {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}

USUAL: dict[str, dict[str, Any]] = {
    "vit": _HALF | {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"},
    "deit": _IMAGENET | _CROPPED | {"crop_mode": "squash"},
    "dinov2": _IMAGENET | _CROPPED,
    "dinov2_with_registers": _IMAGENET | _CROPPED,
    "dinov3_vit": _IMAGENET | {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"},
    "clip_vision_model": _OPENAI | _CROPPED | {"crop_pct": 1.0},
    "siglip_vision_model": _HALF
    | {"interpolation": "bicubic", "crop_pct": 1.0}
    | {"crop_mode": "squash"},
}
"""As the published models of a kind have it (their ``preprocessor_config.json``), in timm's words,
by the ``model_type`` of their tower."""


def data_of_processor(processor: Any) -> dict[str, Any]:
    """Timm's data config of an image processor, or of a processor that holds one.

    Raises:
        ConfigError: timm has no word for what it does.
    """
    processor = getattr(processor, "image_processor", processor)
    if hasattr(processor, "data_config"):  # of a timm model inside transformers
        return dict(processor.data_config)

    def asked(name: str) -> Any:
        return getattr(processor, name, None)

    resized = _sides(asked("size")) if asked("do_resize") else None
    crops = _sides(asked("crop_size")) if asked("do_center_crop") else None
    if resized is None:
        raise ConfigError(
            f"a {type(processor).__name__} with size={asked('size')!r}, "
            f"do_resize={asked('do_resize')!r} has no word in timm; expected a shortest edge, or "
            "height and width"
        )
    (resized_height, resized_width), (height, width) = resized, crops or resized
    squash = resized_width is not None
    bent = resized_width is not None and resized_height * (width or 0) != resized_width * height
    if width is None or bent:
        raise ConfigError(
            f"a {type(processor).__name__} that resizes to {asked('size')!r} and crops to "
            f"{asked('crop_size')!r} has no word in timm; expected a crop of the same shape"
        )
    factor = asked("rescale_factor") if asked("do_rescale") else 1.0
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ConfigError(
            f"a {type(processor).__name__} multiplies pixels by {factor}; expected 1/255"
        )
    mean, std = (asked("image_mean"), asked("image_std")) if asked("do_normalize") else (0.0, 1.0)
    data = {
        "input_size": (3, height, width),
        "mean": _three(mean),
        "std": _three(std),
        "interpolation": Image.Resampling(int(asked("resample"))).name.lower(),
        "crop_pct": _share(height, resized_height),
        "crop_mode": "squash" if squash else "center",
    }
    check_preprocessing(data, ConfigError, f"the {type(processor).__name__}")
    return data


def data_of_open_clip(prepared: Mapping[str, Any]) -> dict[str, Any]:
    """The same of open_clip's ``preprocess_cfg``.

    Raises:
        ConfigError: timm has no word for what it does.
    """
    size, modes = prepared["size"], {"shortest": "center", "squash": "squash"}
    height, width = (size, size) if isinstance(size, int) else size
    mode = prepared.get("resize_mode", "shortest")
    if mode not in modes:
        raise ConfigError(
            f"resize_mode {mode!r} of open_clip has no word in timm; known: {', '.join(modes)}"
        )
    data = {
        "input_size": (3, height, width),
        "mean": _three(prepared["mean"]),
        "std": _three(prepared["std"]),
        "interpolation": prepared.get("interpolation", "bicubic"),
        "crop_pct": 1.0,
        "crop_mode": modes[mode],
    }
    check_preprocessing(data, ConfigError, "open_clip's preprocess_cfg")
    return data


def _sides(size: Any) -> tuple[int, int | None] | None:
    """Height and width; one of a shortest edge has a width of None."""
    if isinstance(size, int):
        return size, size
    words = {} if size is None else dict(size)
    if set(words) == {"height", "width"}:
        return words["height"], words["width"]
    return (words["shortest_edge"], None) if set(words) == {"shortest_edge"} else None


def _share(side: int, resized: int) -> float:
    """What timm divides ``side`` by, rounding down, to resize to ``resized``."""
    share = side / resized
    return share if math.floor(side / share) == resized else math.nextafter(share, 0.0)


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = values if isinstance(values, list | tuple) else (values,) * 3
    return float(first), float(second), float(third)
