"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT|MODEL", help="Checkpoint folder, timm model name, or digits_vit."
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu or cuda; CUDA where it is, if not given.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the results here as well.")
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Safetensors file with timm's names: the weights of a timm model, or, with a "
        "checkpoint, those of the dense model to compare with.",
    ),
]
RatioOption = Annotated[
    str | None,
    typer.Option(help="Keep ratios to try instead of the checkpoint's, such as 0.7,0.5."),
]
DenseWeightsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Safetensors file with the timm model's weights."),
]
ChangesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="A setting of the method."),
]
SplitOption = Annotated[str | None, typer.Option(help="Split of a timm reader.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Images per batch.")]
ImagesAtOnceOption = Annotated[
    int | None,
    typer.Option(min=1, help="Images per batch: 64, of detectors and segmenters 8, if not given."),
]
AgainstOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="For detectors and segmenters: the checkpoint of the dense model to compare with; "
        "the sparse one's own backbone, run dense, if not given.",
    ),
]
ShareOption = Annotated[
    float | None,
    typer.Option("--macs", metavar="SHARE", help="Mean cost, as a share of the dense MACs."),
]
DenseArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="timm model name, or digits_vit; trained, dense.")
]
WorkersOption = Annotated[
    int, typer.Option(min=0, help="Processes that read images; 0 reads in this one.")
]
FramesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Of videos: frames of a clip; the model's, or 8 for one of images, if not.",
    ),
]
StrideOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Of videos: frames from one of a clip to the next, 0 for all over the video; what the "
        "model was trained with, or 0 for one of images, if not.",
    ),
]
ViewsOption = Annotated[
    str | None,
    typer.Option(
        metavar="CLIPSxCROPS", help="Of videos: views that are averaged, such as 4x3; 1x1, if not."
    ),
]
