"""Run an exported bundle with onnxruntime or OpenVINO alone: neither torch nor timm is loaded.

A bundle is the folder that ``vitrim export`` writes: the network, and ``bundle.json`` with its
preprocessing and labels. ``vitrim predict BUNDLE IMAGE...`` runs it; from Python:

    bundle = vitrim.runtime.Bundle("deit_s_onnx", threads=2)
    logits = bundle(bundle.prepare([Image.open("cat.jpg")]))
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrim.config import read_json
from vitrim.errors import CheckpointError, InputError, MissingExtraError, VitrimError

BUNDLE_FILE = "bundle.json"
FORMAT = "vitrim-bundle"
FORMAT_VERSION = 1
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
MOST_VALUES = 2**30
"""Of the images of one call."""
MOST_FRAMES = 1024
"""Of a clip."""
MOST_PIXELS = 4096
"""A side of a prepared image."""
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
"""What image files may hold: others are read by programs of their own (EPS by Ghostscript)."""
MOST_ELONGATED = 50
"""The longer side of an image over its shorter one; more would fill the memory when resized."""

Array = NDArray[np.float32]
Network = Callable[[Array], list[Array]]
Started = tuple[Network, tuple[int | None, ...]]
"""A network, and the shape (B, channels, H, W) of its images; None is any number."""


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
        self.description = read_description(self.folder)
        start = _RUNTIMES.get(self.description["runtime"])
        if start is None:
            raise CheckpointError(
                f"{folder} is for {self.description['runtime']!r}, which is loaded by its own "
                f"means; this runs {', '.join(_RUNTIMES)}"
            )
        network = self.folder / self.description["file"]
        self._network, shape = start(network, threads, self.description)
        described = (self.batch, *input_shape(self.description["preprocessing"]))
        if shape != described:
            raise CheckpointError(
                f"{network} takes images of shape {shape}, and {BUNDLE_FILE} says {described}, "
                "where None is any number; export the model again"
            )

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

    @property
    def feature_names(self) -> Sequence[str] | None:
        """Of what a bundle of features gives; None: it gives logits."""
        names: Sequence[str] | None = self.description.get("outputs")
        return names

    def __call__(self, images_BCHW: Array, names: Sequence[str] | None = None) -> Array:
        """Logits (B, classes) of prepared images, in calls of as many as the network takes.

        Args:
            images_BCHW: as :meth:`prepare` makes them, one at least.
            names: what an error calls the images; None gives their numbers.

        Raises:
            InputError: the images are of another shape, the answers are not finite, or the bundle
                gives features.
            CheckpointError: the network fails, or gives something else than logits.
        """
        if self.feature_names is not None:
            raise InputError(
                f"{self.folder} gives features ({', '.join(self.feature_names)}) and no logits; "
                "call its features, or export the model without --features"
            )
        return self.outputs(images_BCHW, names)[0]

    def features(self, images_BCHW: Array, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Maps (B, C, H, W), and what the classifier would read (B, C), by their names.

        Raises:
            InputError: as :meth:`__call__`, or the bundle gives logits.
            CheckpointError: the network fails, or gives something else than features.
        """
        if self.feature_names is None:
            raise InputError(f"{self.folder} gives logits; export the model with --features")
        return dict(zip(self.feature_names, self.outputs(images_BCHW, names), strict=True))

    def outputs(self, images_BCHW: Array, names: Sequence[str] | None = None) -> list[Array]:
        """All that the network gives, see :meth:`__call__`."""
        images, shape = np.asarray(images_BCHW, np.float32), self.input_shape
        if not len(images) or images.shape[1:] != shape:
            raise InputError(
                f"images have shape {images.shape}; expected (1 or more, "
                f"{', '.join(map(str, shape))})"
            )
        size = self.batch or len(images)
        extra = np.repeat(images[-1:], -len(images) % size, axis=0)
        parts = np.split(np.concatenate([images, extra]), (len(images) + len(extra)) // size)
        answers = zip(*[self._run(part) for part in parts], strict=True)
        outputs = [np.concatenate(answer)[: len(images)] for answer in answers]
        for output in outputs:
            check_finite(output.reshape(len(output), -1), names)
        return outputs

    def _run(self, images: Array) -> list[Array]:
        try:
            answers = self._network(images)
        except Exception as error:  # its errors are of its own C++ classes
            raise CheckpointError(f"the network of {self.folder} fails: {error}") from error
        if self.feature_names is not None:
            shapes = [answer.shape for answer in answers]
            wanted = [4 if name.startswith("level") else 2 for name in self.feature_names]
            if [len(shape) for shape in shapes] != wanted or any(
                shape[0] != len(images) for shape in shapes
            ):
                raise CheckpointError(
                    f"the network of {self.folder} gives arrays of shapes {shapes} for "
                    f"{len(images)} images; expected {', '.join(self.feature_names)} of each"
                )
            return answers
        logits = answers[0]
        classes = len(self.labels) if self.labels else logits.shape[-1] if logits.ndim else 0
        if logits.shape != (len(images), classes) or not np.issubdtype(logits.dtype, np.floating):
            raise CheckpointError(
                f"the network of {self.folder} gives {logits.dtype} of shape {logits.shape} for "
                f"{len(images)} images; expected numbers for {classes} classes each"
            )
        return [logits]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of a prepared image or clip, see :func:`input_shape`."""
        return input_shape(self.description["preprocessing"])

    def prepare(self, images: Sequence[Image.Image]) -> Array:
        """(B, channels, H, W): images resized, cropped in the middle and normalised. Of a model of
        clips, (B, channels, frames, H, W): the images are the frames of one clip after the other.
        """
        data = self.description["preprocessing"]
        prepared = np.stack([prepare(image, data) for image in images])
        if "frames" not in data:
            return prepared
        if len(images) % data["frames"]:
            raise InputError(
                f"{self.folder} takes clips of {data['frames']} frames; found {len(images)} "
                "images, which make no whole number of them"
            )
        clips = prepared.reshape(-1, data["frames"], *prepared.shape[1:])
        return np.ascontiguousarray(clips.swapaxes(1, 2))


def input_shape(data: Mapping[str, Any]) -> tuple[int, ...]:
    """(channels, H, W) of prepared images, or (channels, frames, H, W) of prepared clips, by what
    says how they are prepared, see :func:`check_preprocessing`.
    """
    channels, *size = data["input_size"]
    frames = [data["frames"]] if "frames" in data else []
    return (channels, *frames, *size)


def prepare(image: Image.Image, config: dict[str, Any]) -> Array:
    """(channels, H, W): ``image`` as timm's evaluation transform makes it."""
    channels, height, width = config["input_size"]
    if channels not in (1, 3):
        raise InputError(f"the model takes {channels} channels; an image has 1 or 3")
    image = image.convert("L" if channels == 1 else "RGB")
    shorter = math.floor(height / config["crop_pct"])
    size = [int(shorter * side / min(image.size)) for side in image.size]
    if config.get("crop_mode") == "squash":
        size = [shorter, shorter]
    image = image.resize(size, getattr(Image.Resampling, config["interpolation"].upper()))
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    cropped = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(cropped, np.float32).reshape(height, width, channels) / np.float32(255)
    normal = (pixels - np.float32(config["mean"])) / np.float32(config["std"])
    return np.ascontiguousarray(normal.transpose(2, 0, 1), np.float32)


def read_description(folder: Path) -> dict[str, Any]:
    """The checked ``bundle.json`` of a bundle, all of whose files are its own.

    Raises:
        CheckpointError: no bundle, of another version, damaged, or with a way out of its folder.
    """
    path = folder / BUNDLE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is no exported bundle: it has no {BUNDLE_FILE}")
    for entry in folder.rglob("*"):
        if not (entry.is_file() or entry.is_dir()):
            raise CheckpointError(f"{entry} is neither a file nor a folder; remove it")
        if not entry.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{entry} leads out of the bundle; put a copy in its place")
    description = read_json(path, CheckpointError)
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} is damaged: it holds no table")
    missing = {"file", "runtime", "dtype", "batch", "preprocessing", "labels"} - description.keys()
    known = description.get("format") == FORMAT and description.get("version") == FORMAT_VERSION
    if not known or missing:
        found = f"lacks {', '.join(sorted(missing))}" if missing else "is of another format"
        raise CheckpointError(f"{path} {found}; export the model again with this vitrim")
    check_description(description, CheckpointError, str(path))
    if not (folder / description["file"]).is_file():
        raise CheckpointError(f"{folder} is damaged: it lacks {description['file']}")
    return description


def check_description(description: Mapping[str, Any], error: type[VitrimError], where: str) -> None:
    """Raise ``error`` unless every field that is used has a value that can be."""
    file, runtime, batch = (description[name] for name in ("file", "runtime", "batch"))
    labels, preprocessing = description["labels"], description["preprocessing"]
    outputs = description.get("outputs")
    check_preprocessing(preprocessing, error, f"the preprocessing of {where}")
    most = MOST_VALUES // math.prod(input_shape(preprocessing))
    suffix = {"onnxruntime": ".onnx", "openvino": ".xml"}.get(str(runtime), "")
    plain = isinstance(file, str) and Path(file).name == file and file != ".."
    texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    named = isinstance(outputs, list) and all(isinstance(name, str) for name in outputs)
    square = preprocessing["input_size"][1] == preprocessing["input_size"][2]
    central = preprocessing.get("crop_mode", "center") in ("center", "squash")
    given = {"interpolation", "crop_pct"} <= preprocessing.keys()
    checks = {
        "file": (plain and file.endswith(suffix), f"the name of a {suffix} file in the folder"),
        "runtime": (isinstance(runtime, str), "a name"),
        "dtype": (description["dtype"] in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
        "batch": (
            batch is None or (_is_whole(batch) and 1 <= batch <= most),
            f"null, or a whole number from 1 to {most}",
        ),
        "labels": (labels is None or texts, "null, or a list of texts"),
        "outputs": (outputs is None or (named and len(outputs) > 0), "null, or a list of names"),
        "preprocessing": (
            square and central and given,
            "interpolation and crop_pct, and a crop from the centre to a square",
        ),
    }
    for name, (sound, expected) in checks.items():
        if not sound:
            found = repr(description[name])[:200]
            raise error(f"{name} of {where} is {found}; expected {expected}")


def check_preprocessing(
    data: Any, error: type[VitrimError], where: str = "the preprocessing"
) -> None:
    """Check what says how images are prepared, in timm's words: ``input_size`` (channels, height,
    width), ``mean`` and ``std`` of each channel in pixel values from 0 to 1, and, where they are
    given, ``interpolation``, ``crop_pct``, ``crop_mode`` and ``frames`` (of clips). Messages call
    it ``where``.

    Raises:
        error: a value is absent, of another kind, or out of range.
    """
    if not isinstance(data, Mapping):
        raise error(f"{where} is {repr(data)[:200]}; a table was expected")

    def require(name: str, condition: bool, expected: str) -> None:
        if not condition:
            found = f"is {repr(data[name])[:200]}" if name in data else "is missing"
            raise error(f"{name} of {where} {found}; expected {expected}")

    size: Any = data.get("input_size")
    sides = isinstance(size, list | tuple) and len(size) == 3 and all(map(_is_whole, size))
    require(
        "input_size",
        sides and all(1 <= side <= MOST_PIXELS for side in size),
        f"channels, height and width, whole numbers from 1 to {MOST_PIXELS}",
    )
    channels = size[0]
    for name, least in (("mean", -1e6), ("std", 1e-6)):
        values: Any = data.get(name)
        each = isinstance(values, list | tuple) and len(values) == channels
        require(
            name,
            each and all(_is_number(value) and least <= value <= 1e6 for value in values),
            f"{channels} numbers from {least:g} to 1e+06, one per channel",
        )
    known = data.get("interpolation", "bilinear") in INTERPOLATIONS
    require("interpolation", known, f"one of {', '.join(INTERPOLATIONS)}")
    share = data.get("crop_pct", 1.0)
    require("crop_pct", _is_number(share) and 0.1 <= share <= 1, "a number from 0.1 to 1")
    known = data.get("crop_mode", "center") in ("center", "border", "squash")
    require("crop_mode", known, "center, border or squash")
    frames = data.get("frames", 1)
    known = _is_whole(frames) and 1 <= frames <= MOST_FRAMES
    require("frames", known, f"a whole number from 1 to {MOST_FRAMES}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_finite(logits: NDArray[Any], names: Sequence[str] | None = None) -> None:
    """Raise :class:`InputError` if logits (B, classes) hold NaN or infinity; it names the image."""
    spoilt = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(spoilt):
        first = int(spoilt[0])
        raise InputError(
            f"the logits of {names[first] if names else f'image {first}'} hold NaN or infinity; "
            "check the weights of the model, its precision, and that its input is finite"
        )


def import_quietly(module: str, purpose: str) -> Any:
    """Import onnxruntime or openvino, or a part of it, without reports to their makers.

    Every import of theirs goes through here: they look for these settings once, as they load.

    Raises:
        MissingExtraError: it is not installed; ``purpose`` needs it.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if absent
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = error.name or module
        raise MissingExtraError(purpose, package.partition(".")[0], "export") from error


def session_options(threads: int | None) -> Any:
    """``onnxruntime.SessionOptions`` for so many threads; None takes all."""
    options = import_quietly("onnxruntime", "running ONNX").SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    # Left to themselves its threads spin for tens of milliseconds after a call, and slow whatever
    # runs next on their cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _onnxruntime(path: Path, threads: int | None, description: dict[str, Any]) -> Started:
    onnxruntime = import_quietly("onnxruntime", "running an ONNX bundle")
    options = session_options(threads)
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        (images,) = session.get_inputs()
    except Exception as error:  # its errors are of its own C++ classes
        raise CheckpointError(f"onnxruntime cannot load {path}: {error}") from error

    def run(images_BCHW: Array) -> list[Array]:
        return [np.asarray(output) for output in session.run(None, {images.name: images_BCHW})]

    return run, tuple(size if isinstance(size, int) else None for size in images.shape)


def _openvino(path: Path, threads: int | None, description: dict[str, Any]) -> Started:
    openvino = import_quietly("openvino", "running an OpenVINO bundle")
    # Left to itself the CPU runtime takes bfloat16 wherever the processor has it.
    precision = {"bf16": "bf16", "fp16": "f16"}.get(description["dtype"], "f32")
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    try:
        model = openvino.Core().compile_model(str(path), "CPU", config)
        sizes = list(model.input().partial_shape)
    except Exception as error:  # its errors are of its own C++ classes
        raise CheckpointError(f"openvino cannot load {path}: {error}") from error

    def run(images_BCHW: Array) -> list[Array]:
        return [np.array(output) for output in model([images_BCHW]).values()]

    return run, tuple(size.get_length() if size.is_static else None for size in sizes)


_RUNTIMES: dict[str, Callable[[Path, int | None, dict[str, Any]], Started]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


class UnreadableImageError(InputError):
    """An image file, or one of another ``kind``, is damaged, or is none; ``name`` is the file and
    ``reason`` is why.
    """

    def __init__(self, name: str, reason: str, kind: str = "an image") -> None:
        super().__init__(f"{name} cannot be read as {kind}: {reason}")
        self.name = name
        self.reason = reason


def open_file(path: Path) -> BinaryIO:
    """An image file, open; what is no file of its own (a pipe, a device) raises :class:`OSError`,
    where opening it could wait for ever.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    return path.open("rb")


def decode(file: BinaryIO) -> Image.Image:
    """The RGB image in an open file: where everything that reads images does it. Damaged bytes
    raise nearly anything.
    """
    with Image.open(file, formats=IMAGE_FORMATS) as opened:
        check_proportions(*opened.size)
        return opened.convert("RGB")


def check_proportions(width: int, height: int) -> None:
    """Raise :class:`ValueError` for an image that is very long and thin."""
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise ValueError(
            f"it has {width} x {height} pixels; one side may be {MOST_ELONGATED} times as long as "
            "the other, at most"
        )


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """An image from a file.

    Raises:
        UnreadableImageError: it is absent, damaged, of another kind, or very long and thin.
    """
    try:
        with open_file(Path(path)) as file:
            return decode(file)
    except Exception as error:
        raise UnreadableImageError(str(path), str(error) or repr(error)) from error
