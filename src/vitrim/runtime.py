"""Run an exported bundle with onnxruntime or OpenVINO alone: neither torch nor timm is loaded.

A bundle is the folder that ``vitrim export`` writes: the network, and ``bundle.json`` with its
preprocessing and labels. ``vitrim predict BUNDLE IMAGE...`` calls :func:`main`; from Python:

    bundle = vitrim.runtime.Bundle("deit_s_onnx", threads=2)
    logits = bundle(bundle.prepare([Image.open("cat.jpg")]))
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrim.errors import CheckpointError, InputError, MissingExtraError

BUNDLE_FILE = "bundle.json"
FORMAT = "vitrim-bundle"
FORMAT_VERSION = 1

Array = NDArray[np.float32]
Network = Callable[[Array], Array]


class Bundle:
    """An exported model, ready to run.

    Args:
        folder: what ``vitrim export`` wrote.
        threads: CPU threads; None leaves the choice to the runtime.

    Raises:
        CheckpointError: the folder holds no bundle, or a damaged one.
        MissingExtraError: its runtime is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], threads: int | None = None) -> None:
        self.folder = Path(folder)
        self.description = _read_description(self.folder)
        network = self.folder / self.description["file"]
        if not network.is_file():
            raise CheckpointError(f"{folder} is damaged: it lacks {network.name}")
        start = _RUNTIMES.get(self.description["runtime"])
        if start is None:
            raise CheckpointError(
                f"{folder} is for {self.description['runtime']!r}, which is loaded by its own "
                f"means; this runs {', '.join(_RUNTIMES)}"
            )
        self._network = start(network, threads, self.description)

    @property
    def labels(self) -> Sequence[str] | None:
        """Names of the classes, where they are known."""
        labels: Sequence[str] | None = self.description["labels"]
        return labels

    @property
    def batch(self) -> int | None:
        """Images that each call takes; None takes any number."""
        batch: int | None = self.description["batch"]
        return batch

    def __call__(self, images_BCHW: Array) -> Array:
        """Logits (B, classes) of prepared images, in calls of as many as the network takes."""
        if self.batch is None:
            return self._network(images_BCHW)
        whole = math.ceil(len(images_BCHW) / self.batch) * self.batch
        extra = np.repeat(images_BCHW[-1:], whole - len(images_BCHW), axis=0)
        parts = np.split(np.concatenate([images_BCHW, extra]), whole // self.batch)
        return np.concatenate([self._network(part) for part in parts])[: len(images_BCHW)]

    def prepare(self, images: Sequence[Image.Image]) -> Array:
        """(B, channels, H, W): images resized, cropped in the middle and normalised."""
        return np.stack([prepare(image, self.description["preprocessing"]) for image in images])


def prepare(image: Image.Image, config: dict[str, Any]) -> Array:
    """(channels, H, W): ``image`` as timm's evaluation transform makes it."""
    channels, height, width = config["input_size"]
    image = image.convert("L" if channels == 1 else "RGB")
    shorter = math.floor(height / config["crop_pct"])
    size = [int(shorter * side / min(image.size)) for side in image.size]
    image = image.resize(size, getattr(Image.Resampling, config["interpolation"].upper()))
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    cropped = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(cropped, np.float32).reshape(height, width, channels) / np.float32(255)
    normal = (pixels - np.float32(config["mean"])) / np.float32(config["std"])
    return np.ascontiguousarray(normal.transpose(2, 0, 1), np.float32)


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / BUNDLE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is no exported bundle: it has no {BUNDLE_FILE}")
    try:
        description: dict[str, Any] = json.loads(path.read_text())
        known = description["format"] == FORMAT and description["version"] == FORMAT_VERSION
        needed = {"file", "runtime", "dtype", "batch", "preprocessing", "labels"}
        missing = needed - description.keys()
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not known or missing:
        found = f"lacks {', '.join(sorted(missing))}" if missing else "is of another format"
        raise CheckpointError(f"{path} {found}; export the model again with this vitrim")
    return description


def session_options(threads: int | None) -> Any:
    """``onnxruntime.SessionOptions`` for so many threads; None takes all."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    # Left to themselves its threads spin for tens of milliseconds after a call, and slow whatever
    # runs next on their cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _onnxruntime(path: Path, threads: int | None, description: dict[str, Any]) -> Network:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError("running an ONNX bundle", "onnxruntime", "export") from error
    options = session_options(threads)
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its errors are of its own C++ classes
        raise CheckpointError(f"onnxruntime cannot load {path}: {error}") from error
    name = session.get_inputs()[0].name

    def run(images: Array) -> Array:
        logits: Array = session.run(None, {name: images})[0]
        return logits

    return run


def _openvino(path: Path, threads: int | None, description: dict[str, Any]) -> Network:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise MissingExtraError("running an OpenVINO bundle", "openvino", "export") from error
    # Left to itself the CPU runtime takes bfloat16 wherever the processor has it.
    precision = {"bf16": "bf16", "fp16": "f16"}.get(description["dtype"], "f32")
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    try:
        model = openvino.Core().compile_model(str(path), "CPU", config)
    except Exception as error:  # its errors are of its own C++ classes
        raise CheckpointError(f"openvino cannot load {path}: {error}") from error

    def run(images: Array) -> Array:
        logits: Array = model([images])[0]
        return logits

    return run


_RUNTIMES: dict[str, Callable[[Path, int | None, dict[str, Any]], Network]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def open_image(path: Path) -> Image.Image:
    """An image from a file.

    Raises:
        InputError: it is absent or damaged.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def main(words: Sequence[str]) -> None:
    """``vitrim predict``: the likeliest classes of each image."""
    parser = argparse.ArgumentParser(
        prog="vitrim predict",
        description="Classify images with an exported bundle; neither torch nor timm is needed.",
    )
    parser.add_argument("bundle", type=Path, help="Folder written by vitrim export.")
    parser.add_argument("images", type=Path, nargs="+", help="Image files.")
    parser.add_argument("--top", type=int, default=3, help="Classes to name per image.")
    parser.add_argument("--threads", type=int, help="CPU threads.")
    options = parser.parse_args(words)
    bundle = Bundle(options.bundle, options.threads)
    for path in options.images:
        logits = bundle(bundle.prepare([open_image(path)]))[0].astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares)[: options.top]
        names = [bundle.labels[label] if bundle.labels else str(label) for label in best]
        answers = ", ".join(
            f"{name} {shares[label]:.1%}" for name, label in zip(names, best, strict=True)
        )
        print(f"{path}: {answers}")
