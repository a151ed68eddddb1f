"""Sparse models for other runtimes: a folder with the network, its preprocessing and its labels.

What is exported is the inference forward. Fixed counts take batches of any size; where the counts
depend on the image, one image at a time, computed on what it keeps. Kept tokens are gathered with
plain index operations: no branch is in the graph, and with fixed counts no size depends on data.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from vitrim.config import closest, to_plain
from vitrim.errors import ConfigError, InputError, MissingExtraError
from vitrim.model import SparseModel, evaluating
from vitrim.runtime import BUNDLE_FILE, FORMAT, FORMAT_VERSION, Bundle

DTYPES = {
    "pt2": ("fp32", "fp16", "bf16"),
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "bf16"),
}
"""Format: the precisions that it is written in."""
NOT_YET = {
    "executorch": "not written yet; the nearest that works is onnx, or pt2 for torch itself",
}
RUNTIMES = {"pt2": "torch", "onnx": "onnxruntime", "openvino": "openvino"}
FILES = {"pt2": "model.pt2", "onnx": "model.onnx", "openvino": "model.xml"}
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
    """Largest absolute difference of a logit."""
    agreement: float
    """Share of the images with the same likeliest class."""


class _Exported(nn.Module):
    """The model in the precision that it is exported in, with single precision outside."""

    def __init__(self, model: SparseModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.to(self.dtype))
        return logits.float()


def export(
    sparse: SparseModel,
    folder: Path,
    to: str,
    *,
    data_config: dict[str, Any],
    dtype: str = "fp32",
    batch: int | None = None,
    labels: Sequence[str] | None = None,
    images: Tensor | None = None,
) -> Path:
    """Write ``sparse`` as a bundle; the folder appears whole or not at all.

    Args:
        sparse: on the CPU.
        folder: of the bundle; it must not exist yet.
        to: ``pt2`` (torch.export), ``onnx`` or ``openvino``.
        data_config: how images are prepared (timm's data config).
        dtype: ``fp32``, ``fp16``, ``bf16`` or ``int8``, as the format has it.
        batch: images per call; None takes any number, or 1 where the counts depend on the image.
        labels: names of the classes.
        images: (B, channels, H, W), prepared; what the scales of ``int8`` are measured on.

    Raises:
        ConfigError: the format, precision, batch or preprocessing is none that can be written.
        InputError: the folder exists, or there are too few images to measure scales on.
        MissingExtraError: the format's package is not installed.
    """
    check_format(to, dtype)
    batch = _batch(sparse, batch)
    if dtype == "int8" and (images is None or len(images) < MIN_CALIBRATION):
        found = 0 if images is None else len(images)
        raise InputError(
            f"int8 measures its scales on {MIN_CALIBRATION} images or more; found {found}"
        )
    if folder.exists():
        raise InputError(f"{folder} exists already; give a new folder")
    description = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "file": FILES[to],
        "runtime": RUNTIMES[to],
        "dtype": dtype,
        "batch": batch,
        "preprocessing": _preprocessing(data_config),
        "labels": None if labels is None else list(labels),
        "model": {
            "backbone": type(sparse.backbone).__name__,
            "method": sparse.method.name,
            "config": to_plain(sparse.config),
            "macs": sparse.macs(),
            "dense_macs": sparse.dense_macs(),
        },
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        work = Path(name) / "bundle"
        work.mkdir()
        program = _program(sparse, tuple(data_config["input_size"]), dtype, batch)
        _write(program, to, work / FILES[to], dtype, images, batch)
        (work / BUNDLE_FILE).write_text(json.dumps(description, indent=1) + "\n")
        shutil.move(work, folder)
    return folder


def check_format(to: str, dtype: str) -> None:
    """Raise :class:`ConfigError` unless ``to`` is a format that is written in ``dtype``."""
    if to in NOT_YET:
        raise ConfigError(f"{to} is {NOT_YET[to]}")
    if to not in DTYPES:
        raise ConfigError(f"unknown format {to!r}{closest(to, DTYPES)}; known: {', '.join(DTYPES)}")
    if dtype not in DTYPES[to]:
        able = [name for name, dtypes in DTYPES.items() if dtype in dtypes]
        others = f"; {dtype} is written by {', '.join(able)}" if able else ""
        raise ConfigError(f"{to} is written in {', '.join(DTYPES[to])}, not in {dtype!r}{others}")


def _batch(sparse: SparseModel, batch: int | None) -> int | None:
    if sparse.macs() is not None:
        return batch
    if batch not in (None, 1):
        raise ConfigError(
            f"the counts of this {sparse.method.name} depend on the image, so it is exported for "
            f"one image at a time, not for {batch}; leave the batch out, or fix the counts"
        )
    return 1


def _preprocessing(config: dict[str, Any]) -> dict[str, Any]:
    """What :func:`vitrim.runtime.prepare` needs, with timm's own defaults."""
    found: dict[str, Any] = {"interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"}
    found |= config
    _, height, width = found["input_size"]
    if found["crop_mode"] != "center" or height != width:
        raise ConfigError(
            f"images are prepared by crop_mode={found['crop_mode']!r} to {height} x {width}; a "
            "bundle has the crop from the centre, to a square, only"
        )
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct")
    return {key: found[key] for key in keys}


def _program(
    sparse: SparseModel, shape: tuple[int, ...], dtype: str, batch: int | None
) -> torch.export.ExportedProgram:
    """The inference forward as a graph, for ``batch`` images or any number."""
    kind = _TORCH_DTYPES.get(dtype, torch.float32)
    model = sparse
    if kind is not torch.float32:
        model = deepcopy(sparse).to(kind)
    example = torch.zeros(2 if batch is None else batch, *shape)
    sizes = ({0: torch.export.Dim("batch", min=1)},) if batch is None else None
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        return torch.export.export(_Exported(model, kind), (example,), dynamic_shapes=sizes)


def _write(
    program: torch.export.ExportedProgram,
    to: str,
    path: Path,
    dtype: str,
    images: Tensor | None,
    batch: int | None,
) -> None:
    if to == "pt2":
        torch.export.save(program, path)
        return
    onnx_path = path if to == "onnx" else path.with_name("network.onnx")
    write_onnx(program, onnx_path)
    if to == "openvino":
        _write_openvino(onnx_path, path, dtype)
    elif dtype == "int8":
        assert images is not None
        quantize(path, images, batch)


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a graph as ONNX."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("export to ONNX", error.name or "onnx", "export") from error
    with _quiet():
        try:
            written = torch.onnx.export(program, dynamo=True, verbose=False, optimize=True)
        except torch.onnx.errors.OnnxExporterError as error:
            raise ConfigError(
                f"the model has an operation that ONNX lacks ({_last_line(error)}); the nearest "
                "format that works is pt2"
            ) from error
    assert written is not None
    written.save(path)


def _last_line(error: BaseException) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return str(cause).strip().splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own progress and deprecations."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _write_openvino(onnx_path: Path, path: Path, dtype: str) -> None:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise MissingExtraError("export to OpenVINO", "openvino", "export") from error
    network = openvino.convert_model(onnx_path)
    openvino.save_model(network, path, compress_to_fp16=dtype == "fp16")
    for leftover in onnx_path.parent.glob(f"{onnx_path.name}*"):
        leftover.unlink()


def quantize(path: Path, images: Tensor, batch: int | None) -> None:
    """Integer weights and activations in every matrix product, scales from ``images``."""
    try:
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ModuleNotFoundError as error:
        raise MissingExtraError("export in int8", "onnxruntime", "export") from error

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # it has no types
        def __init__(self) -> None:
            size = batch or 8
            whole = images[: len(images) // size * size]
            self.parts = iter(torch.split(whole, size))

        def get_next(self) -> dict[str, Any] | None:
            part = next(self.parts, None)
            return None if part is None else {"images": part.numpy()}

    single = path.with_name("single.onnx")
    with _quiet():
        quant_pre_process(path, single, skip_optimization=True, skip_symbolic_shape=True)
        quantization.quantize_static(
            single,
            path,
            Reader(),
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],
            extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
        )
    for leftover in path.parent.glob("single.onnx*"):
        leftover.unlink()


def check(sparse: SparseModel, folder: Path, images: Tensor) -> Check:
    """Run a bundle beside the model on prepared images (B, channels, H, W)."""
    bundle = json.loads((folder / BUNDLE_FILE).read_text())
    if bundle["runtime"] == "torch":
        program: Any = torch.export.load(folder / bundle["file"]).module()
        size = bundle["batch"] or len(images)
        with torch.no_grad():
            found = torch.cat([program(part) for part in torch.split(images, size)]).numpy()
    else:
        found = Bundle(folder)(images.numpy())
    with evaluating(sparse):
        wanted = sparse(images).float().numpy()
    return Check(
        images=len(images),
        difference=float(np.abs(found - wanted).max()),
        agreement=float((found.argmax(1) == wanted.argmax(1)).mean()),
    )


def keeps_everything(sparse: SparseModel, images: Tensor) -> bool:
    """Whether a model whose counts depend on the image drops nothing from any of ``images``."""
    counts = [stage.counts < math.prod(stage.grid) for stage in sparse.trace(images).stages]
    return not any(bool(fewer.any()) for fewer in counts)
