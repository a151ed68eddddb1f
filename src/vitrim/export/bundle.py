"""Models for other runtimes: a folder with the network, its preprocessing and its labels.

What is exported is the inference forward. Fixed counts take batches of any size; no branch is in
the graph and no size depends on data. Where the counts depend on the image, one image at a time is
computed on what it keeps; or a fixed number of them, on as many tokens as the fullest keeps, the
others' padding under a mask (``tokens/padding.py``). Dense timm models go the same way, to compare.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from vitrim.config import closest, to_plain
from vitrim.errors import ConfigError, InputError
from vitrim.export import formats
from vitrim.families import Family, family_of
from vitrim.families.base import Pyramid
from vitrim.features import FeaturesOnly
from vitrim.model import SparseModel
from vitrim.modes import evaluating
from vitrim.runtime import (
    BUNDLE_FILE,
    FORMAT,
    FORMAT_VERSION,
    Bundle,
    check_description,
    check_finite,
    check_preprocessing,
    input_shape,
    read_description,
)

DTYPES = {
    "pt2": ("fp32", "fp16", "bf16"),
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "bf16"),
    "executorch": ("fp32",),
}
"""Format: the precisions that it is written in."""
RUNTIMES = {
    "pt2": "torch",
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "executorch": "executorch",
}
FILES = {
    "pt2": "model.pt2",
    "onnx": "model.onnx",
    "openvino": "model.xml",
    "executorch": "model.pte",
}
TOLERANCE = 1e-4
"""Largest difference of a logit that single precision may make."""
MIN_CALIBRATION = 32
"""Images that integer scales are measured on, at least."""

_TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Check:
    """An exported network beside the model that it was made of."""

    images: int
    difference: float
    """Largest absolute difference of a logit; of features, which have larger values, in shares of
    the largest value of the same output, or of 1."""
    agreement: float | None
    """Share of the images with the same likeliest class; None for features, which name none."""


class _Exported(nn.Module):
    """The model in the precision that it is exported in, with single precision outside."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.to(self.dtype))
        return logits.float()


class _ExportedFeatures(_Exported):
    """The same of a pyramid and, for a classifier, what it would read."""

    model: FeaturesOnly

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        levels, embedding = self.model.embedded(images.to(self.dtype))
        outputs = [*levels, embedding] if _pools(self.model.family) else levels
        return tuple(output.float() for output in outputs)


def _pools(family: Family) -> bool:
    """Whether there is an embedding: of classifiers, and of all plain vision transformers."""
    return bool(family.backbone.num_classes) or not isinstance(family, Pyramid)


def feature_names(features: FeaturesOnly) -> list[str]:
    """What a bundle of features gives, in its order: the levels by their numbers in
    ``feature_info`` and the pooled ``embedding`` that a classifier reads; a pyramid without a
    classifier has none.
    """
    names = [f"level{index}" for index in features.out_indices]
    return [*names, "embedding"] if _pools(features.family) else names


def export(
    model: nn.Module,
    folder: Path,
    to: str,
    *,
    data_config: dict[str, Any],
    dtype: str = "fp32",
    batch: int | None = None,
    labels: Sequence[str] | None = None,
    images: Tensor | None = None,
) -> Path:
    """Write ``model`` as a bundle; the folder appears whole or not at all.

    Args:
        model: a sparse model, or a dense timm model of a served family; or ``FeaturesOnly`` of one,
            of which the bundle gives :func:`feature_names` in place of logits. On the CPU.
        folder: of the bundle; it must not exist yet.
        to: ``pt2`` (torch.export), ``onnx``, ``openvino`` or ``executorch``.
        data_config: how images are prepared (timm's data config).
        dtype: ``fp32``, ``fp16``, ``bf16`` or ``int8``, as the format has it.
        batch: images per call; None takes any number, or 1 where the counts depend on the image
            and in ExecuTorch, whose sizes are fixed.
        labels: names of the classes.
        images: (B, channels, H, W), prepared; what the scales of ``int8`` are measured on.

    Raises:
        ConfigError: the format, precision, batch or preprocessing is none that can be written.
        InputError: the folder exists, or there are too few images to measure scales on.
        MissingExtraError: the format's package is not installed.
    """
    check_format(to, dtype)
    batch = _batch(model, to, batch)
    outputs = feature_names(model) if isinstance(model, FeaturesOnly) else None
    if outputs is not None and to == "executorch":
        raise ConfigError("executorch is written with logits; features with pt2, onnx or openvino")
    if dtype == "int8" and (images is None or len(images) < MIN_CALIBRATION):
        found = 0 if images is None else len(images)
        raise InputError(
            f"int8 measures its scales on {MIN_CALIBRATION} images or more; found {found}"
        )
    if folder.exists():
        raise InputError(f"{folder} exists already; give a new folder")
    description: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "file": FILES[to],
        "runtime": RUNTIMES[to],
        "dtype": dtype,
        "batch": batch,
        "preprocessing": _preprocessing(data_config),
        "labels": None if labels is None or outputs else list(labels),
        "outputs": outputs,
        "model": _description(model),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    check_description(description, ConfigError, "the bundle")
    shape = input_shape(description["preprocessing"])
    _family(model).check_images(torch.zeros(1, *shape))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        work = Path(name) / "bundle"
        work.mkdir()
        program = _program(model, shape, dtype, batch)
        _write(program, to, work / FILES[to], dtype, images, batch, outputs)
        (work / BUNDLE_FILE).write_text(json.dumps(description, indent=1) + "\n")
        shutil.move(work, folder)
    return folder


def check_format(to: str, dtype: str) -> None:
    """Raise :class:`ConfigError` unless ``to`` is a format that is written in ``dtype``."""
    if to not in DTYPES:
        raise ConfigError(f"unknown format {to!r}{closest(to, DTYPES)}; known: {', '.join(DTYPES)}")
    if dtype not in DTYPES[to]:
        able = [name for name, dtypes in DTYPES.items() if dtype in dtypes]
        others = f"; {dtype} is written by {', '.join(able)}" if able else ""
        raise ConfigError(f"{to} is written in {', '.join(DTYPES[to])}, not in {dtype!r}{others}")


def images_decide(model: nn.Module) -> bool:
    """Whether the counts of ``model`` depend on the image."""
    model = _whole(model)
    return isinstance(model, SparseModel) and model.macs() is None


def _whole(model: nn.Module) -> nn.Module:
    """The model that features are of, or itself."""
    return model.model if isinstance(model, FeaturesOnly) else model


def _family(model: nn.Module) -> Family:
    return model.family if isinstance(model, SparseModel | FeaturesOnly) else family_of(model)


def _batch(model: nn.Module, to: str, batch: int | None) -> int | None:
    decide = images_decide(model)
    if decide and to == "executorch":
        raise ConfigError(
            "executorch needs sizes that are known beforehand, and the counts of this "
            f"{_method_name(model)} depend on the image; fix the counts, or use onnx, the nearest "
            "format that works"
        )
    return 1 if batch is None and (decide or to == "executorch") else batch


def _method_name(model: nn.Module) -> str | None:
    model = _whole(model)
    return model.method.name if isinstance(model, SparseModel) else None


def _description(model: nn.Module) -> dict[str, Any]:
    """What the bundle says of the model in it."""
    family, whole, config = _family(model), _whole(model), None
    macs: int | None
    macs = dense_macs = family.dense_macs(family.grid())
    if isinstance(model, FeaturesOnly):
        macs, dense_macs = model.macs(), model.dense_macs()
    elif isinstance(model, SparseModel):
        macs = model.macs()
    if isinstance(whole, SparseModel):
        config = to_plain(whole.config)
    return {
        "backbone": type(family.backbone).__name__,
        "method": _method_name(model),
        "config": config,
        "macs": macs,
        "dense_macs": dense_macs,
    }


def _preprocessing(config: dict[str, Any]) -> dict[str, Any]:
    """What :func:`vitrim.runtime.prepare` needs, with timm's own defaults."""
    check_preprocessing(config, ConfigError)
    found: dict[str, Any] = {"interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"}
    found |= config
    _, height, width = found["input_size"]
    if found["crop_mode"] not in ("center", "squash") or height != width:
        raise ConfigError(
            f"images are prepared by crop_mode={found['crop_mode']!r} to {height} x {width}; a "
            "bundle has the crop from the centre, to a square, only"
        )
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode", "frames")
    return {key: found[key] for key in keys if key in found}


def _program(
    model: nn.Module, shape: tuple[int, ...], dtype: str, batch: int | None
) -> torch.export.ExportedProgram:
    """The inference forward as a graph, for ``batch`` images or any number."""
    kind = _TORCH_DTYPES.get(dtype, torch.float32)
    if kind is not torch.float32:
        model = deepcopy(model).to(kind)
    example = torch.zeros(2 if batch is None else batch, *shape)
    sizes = ({0: torch.export.Dim("batch", min=1)},) if batch is None else None
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        try:
            wrap = _ExportedFeatures if isinstance(model, FeaturesOnly) else _Exported
            return torch.export.export(wrap(model, kind), (example,), dynamic_shapes=sizes)
        except Exception as error:  # the tracer's errors have no class in common
            if not images_decide(model):
                raise
            raise ConfigError(
                f"this {_method_name(model)}, whose counts depend on the image, cannot be "
                f"exported for {example.shape[0]} image(s) at a time "
                f"({type(error).__name__}); leave the batch out for one at a time, or fix the "
                "counts"
            ) from error


def _write(
    program: torch.export.ExportedProgram,
    to: str,
    path: Path,
    dtype: str,
    images: Tensor | None,
    batch: int | None,
    outputs: Sequence[str] | None,
) -> None:
    if dtype == "int8":
        assert images is not None
        formats.write_int8(program, path, images, batch, outputs)
    elif to == "onnx":
        formats.write_onnx(program, path, outputs)
    elif to == "openvino":
        formats.write_openvino(program, path, dtype, outputs)
    elif to == "pt2":
        formats.write_pt2(program, path)
    else:
        formats.write_executorch(program, path)


def check(model: nn.Module, folder: Path, images: Tensor) -> Check:
    """Run a bundle beside the model on prepared images (B, channels, H, W).

    Raises:
        InputError: either answers with NaN or infinity.
        CheckpointError: the bundle is damaged.
    """
    with evaluating(model):
        if isinstance(model, FeaturesOnly):
            return _check_features(model, folder, images)
        wanted = model(images).float().numpy()
    check_finite(wanted)
    found = run(folder, images)
    return Check(
        images=len(images),
        difference=float(np.abs(found - wanted).max()),
        agreement=float((found.argmax(1) == wanted.argmax(1)).mean()),
    )


def _check_features(model: FeaturesOnly, folder: Path, images: Tensor) -> Check:
    parts = _ExportedFeatures(model, next(model.parameters()).dtype)(images)
    wanted, found = [part.numpy() for part in parts], run_all(folder, images)
    for part in wanted:
        check_finite(part.reshape(len(part), -1))
    pairs = zip(found, wanted, strict=True)
    worst = max(float(np.abs(a - b).max()) / max(1.0, float(np.abs(b).max())) for a, b in pairs)
    return Check(len(images), worst, None)


def run(folder: Path, images: Tensor) -> np.ndarray:
    """Logits (B, classes) by a bundle of any runtime."""
    (logits,) = run_all(folder, images)
    return logits


def run_all(folder: Path, images: Tensor) -> list[np.ndarray]:
    """Everything that a bundle of any runtime gives."""
    bundle = read_description(folder)
    network = folder / bundle["file"]
    if bundle["runtime"] in ("onnxruntime", "openvino"):
        return Bundle(folder).outputs(images.numpy())
    if bundle["runtime"] == "torch":
        with formats.quiet():  # torch 2.11 remarks on a buffer of its own
            program: Any = torch.export.load(network).module()
    else:
        program = formats.load_executorch(network)
    size = bundle["batch"] or len(images)
    # The last call is filled up with the last image.
    extra = images[-1:].expand(-len(images) % size, *images.shape[1:])
    calls = torch.split(torch.cat([images, extra]), size)
    with torch.no_grad():
        answers = [_several(program(call)) for call in calls]
    outputs = [torch.cat(parts)[: len(images)].numpy() for parts in zip(*answers, strict=True)]
    for output in outputs:
        check_finite(output.reshape(len(output), -1))
    return outputs


def _several(answer: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (answer,) if isinstance(answer, Tensor) else answer


def keeps_everything(sparse: SparseModel, images: Tensor) -> bool:
    """Whether a model whose counts depend on the image drops nothing from any of ``images``."""
    counts = [stage.counts < math.prod(stage.grid) for stage in sparse.trace(images).stages]
    return not any(bool(fewer.any()) for fewer in counts)
