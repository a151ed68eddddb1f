"""``vitrim export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from vitrim.cli import common, tables
from vitrim.cli.clips import ClipOptions, predict
from vitrim.cli.images import prepared_images
from vitrim.cli.options import (
    DenseWeightsOption,
    FramesOption,
    JsonOption,
    ShareOption,
    StrideOption,
    ViewsOption,
)
from vitrim.errors import ConfigError, VitrimError
from vitrim.export import bundle as exporting
from vitrim.features import FeaturesOnly
from vitrim.model import SparseModel
from vitrim.predict import main as predict_bundle
from vitrim.tools.benchmark import limited_threads


class DifferentAnswerError(VitrimError):
    """An exported network does not answer as the model that it was made of."""


def export_command(
    model: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder, or a timm name: dense."),
    ],
    to: Annotated[str, typer.Option(help=f"{', '.join(exporting.DTYPES)}.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; a new one.")],
    dtype: Annotated[
        str, typer.Option(help="fp32, fp16, bf16 or int8; not every format has all of them.")
    ] = "fp32",
    batch: Annotated[
        str, typer.Option(help="Images per call, or dynamic for any number.")
    ] = "dynamic",
    weights: DenseWeightsOption = None,
    macs: ShareOption = None,
    features: Annotated[
        bool,
        typer.Option(
            "--features",
            help="The feature pyramid in place of logits and, of a classifier, what it reads.",
        ),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Run the result beside the model, on --data.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Images for --check and int8, of any layout; or digits."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many of them.")] = 64,
    json: JsonOption = None,
) -> None:
    """Write a model for another runtime, with its preprocessing and labels.

    vitrim predict runs the result with onnxruntime or OpenVINO alone, without torch.
    """
    common.check_writable(json)
    exporting.check_format(to, dtype)
    size = _batch(batch)
    network = common.load_model(model, weights)
    if macs is not None:
        common.require_sparse(network, model).set_budget(macs)
    seen = None if data is None else prepared_images(network, data, images, min(images, 32))
    if seen is None and (check or dtype == "int8"):
        raise ConfigError(f"{'--check' if check else 'int8'} needs images; give them by --data")
    if isinstance(network, SparseModel):
        _warn(network, seen)
    config, names = common.data_config_of(network, data or ""), common.class_names_of(network)
    common.note(f"exporting to {to} ...")
    written = FeaturesOnly(network) if features else network
    exporting.export(
        written, output, to, data_config=config, dtype=dtype, batch=size, labels=names, images=seen
    )
    facts = {"written": str(output), "format": f"{to}, {dtype}", "images per call": batch}
    if isinstance(written, FeaturesOnly):
        facts["features"] = ", ".join(exporting.feature_names(written))
    if size is None and exporting.images_decide(network):
        facts["images per call"] = "1 (the counts depend on the image)"
    elif size is None and to == "executorch":
        facts["images per call"] = "1 (executorch has fixed sizes)"
    content: dict[str, Any] = {
        "model": model,
        "to": to,
        "dtype": dtype,
        "batch": batch,
        "check": None,
    }
    if check and seen is not None:
        found = exporting.check(written, output, seen)
        facts[f"largest difference of a {_what(found)}"] = f"{found.difference:.2g}"
        if found.agreement is not None:
            facts["same answer"] = f"{found.agreement:.1%} of {found.images} images"
        content["check"] = vars(found)
    common.out().print(tables.fact_table(facts))
    common.write_json(json, content)
    if check and dtype == "fp32":
        _refuse_other_answers(found, output)


def predict_command(
    model: Annotated[
        Path, typer.Argument(metavar="BUNDLE|CHECKPOINT", help="Folder written by vitrim.")
    ],
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Images; videos for a checkpoint's model of clips."),
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes to name per file.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="[NAMES]",
            help="Write features in place of classes, of a bundle exported with --features: all, "
            "or some by name, such as embedding.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="For features: a .npz or .parquet file."),
    ] = None,
    frames: FramesOption = None,
    stride: StrideOption = None,
    views: ViewsOption = None,
) -> None:
    """Classify images with an exported bundle, or images and videos with a checkpoint.

    A bundle needs neither torch nor timm: ``vitrim.cli.main`` runs it before it loads either. A
    model of images looks at frames of a video.
    """
    if not (model / "model.safetensors").is_file():
        options = ["--top", str(top), *([] if threads is None else ["--threads", str(threads)])]
        options += ["--features", features] if features else []
        options += ["--output", str(output)] if output else []
        predict_bundle([str(model), *map(str, files), *options])
        return
    given = {"--features": features is not None, "--output": output is not None}
    common.refuse(given, f"{model} is a checkpoint; export it with --features first")
    with limited_threads(threads):
        loaded = common.load_model(str(model))
        for line in predict(loaded, files, ClipOptions(frames, stride, views), top):
            common.out().print(line, soft_wrap=True)


def _refuse_other_answers(found: exporting.Check, output: Path) -> None:
    agreement = 1.0 if found.agreement is None else found.agreement
    if not found.difference <= exporting.TOLERANCE or agreement < 1:
        raise DifferentAnswerError(
            f"{output} differs from the model by {found.difference:.2g} in a {_what(found)} and "
            f"answers {1 - agreement:.1%} of the images otherwise; {exporting.TOLERANCE:g} and "
            "none are due. Two scores that are equal to the last digits can be ranked either way; "
            "otherwise this is a fault of the runtime or of vitrim"
        )


def _what(found: exporting.Check) -> str:
    return "logit" if found.agreement is not None else "feature, of the largest of its map"


def _batch(word: str) -> int | None:
    if word == "dynamic":
        return None
    if not word.isdigit() or int(word) < 1:
        raise ConfigError(f"--batch is {word!r}; expected a number of images, or dynamic")
    return int(word)


def _warn(sparse: SparseModel, images: Tensor | None) -> None:
    """Say what a user would otherwise find out in production."""
    if sparse.is_untrained:
        recipe = sparse.method.needs_training
        common.note(
            f"warning: the selectors of this {sparse.method.name} were never trained, so what they "
            f"keep is arbitrary; train them: vitrim train {recipe}"
        )
    if sparse.macs() is None and images is not None and exporting.keeps_everything(sparse, images):
        common.note(
            f"warning: this {sparse.method.name} keeps every token of these {len(images)} images, "
            "so nothing is saved; calibrate it first: vitrim sparsify, or vitrim.calibrate"
        )
