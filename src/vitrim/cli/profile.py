"""``vitrim profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vitrim.cli import common, tables
from vitrim.cli.options import DeviceOption, ModelArgument
from vitrim.errors import ConfigError
from vitrim.families import family_of
from vitrim.latency.table import LatencyTable
from vitrim.model import SparseModel


def profile_command(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: table.json.")],
    runtime: Annotated[
        str, typer.Option(help="torch, torch-compile, onnxruntime or openvino.")
    ] = "torch",
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    dtype: Annotated[
        str,
        typer.Option(help="fp32; bf16 in torch and openvino; int8 in onnxruntime."),
    ] = "fp32",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods whose selectors are measured too, such as dynamicvit,sait; all that run "
            "on the model, or a checkpoint's own, if not given."
        ),
    ] = None,
    points: Annotated[
        int | None, typer.Option(min=2, help="Numbers of tokens that blocks are timed on.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of everything.")] = 15,
    seconds: Annotated[float, typer.Option(min=0, help="Length of a turn.")] = 0.02,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels; for a timm name.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Picture of the curves: svg, png or pdf.")
    ] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Measure how long each part of a model takes on this device, by its number of tokens.

    The table predicts the latency of schedules that were never run. An interrupted measurement
    goes on where it was, from TABLE.partial. Keep the machine quiet meanwhile.
    """
    from vitrim.latency.measure import profile
    from vitrim.latency.plot import draw_table
    from vitrim.latency.probes import kinds_of
    from vitrim.tools.curve import check_plot

    common.check_writable(output)
    if plot is not None:
        common.check_writable(plot)
        check_plot(plot)
    loaded = common.load_model(model, pretrained=False, image_size=image_size)
    backbone = loaded.backbone if isinstance(loaded, SparseModel) else loaded
    configs = None
    if methods is not None:
        if isinstance(loaded, SparseModel):
            raise ConfigError(f"{model} is a checkpoint, which has a method; leave --methods out")
        names = [name.strip() for name in methods.split(",")]
        configs = kinds_of(family_of(backbone), names)
    side_file = output.with_name(f"{output.name}.partial")
    if side_file.exists():
        common.note(f"going on with {side_file}")
    with common.progress("measuring, in percent", 100) as advance:
        table = profile(
            loaded,
            runtime=runtime,
            batch=batch,
            threads=threads,
            dtype=dtype,
            configs=configs,
            points=points,
            rounds=rounds,
            min_seconds=seconds,
            device=common.device_of(device),
            side_file=side_file,
            progress=advance,
        )
    table.save(output)
    side_file.unlink(missing_ok=True)
    if plot is not None:
        draw_table(plot, table)
    common.out().print(_summary(table))
    common.out().print(_dense(table, family_of(backbone)))
    common.out().print(f"written: {output}", soft_wrap=True)


def _dense(table: LatencyTable, family: Any) -> str:
    """How well the sum of the parts meets the dense model, which was measured beside them."""
    from vitrim.latency.probes import DENSE
    from vitrim.latency.table import predict

    predicted = predict(table, None, family, family.grid())
    measured = table.curves[DENSE].median[0]
    return (
        f"dense model: {measured:.2f} ms measured, {predicted:.2f} ms predicted from its parts "
        f"({predicted / measured - 1:+.1%})"
    )


def _summary(table: LatencyTable) -> object:
    """Each part at its fewest and most tokens."""
    shown = tables.plain_table(
        "Milliseconds per batch", "part", "tokens", "fewest", "most", "spread (quartiles)"
    )
    for part, curve in table.curves.items():
        spreads = [
            (high - low) / median
            for low, median, high in zip(curve.low, curve.median, curve.high, strict=True)
            if median > 0
        ]
        span = f"{curve.tokens[0]} to {curve.tokens[-1]}"
        spread = f"{sorted(spreads)[len(spreads) // 2]:.0%}" if spreads else "-"
        shown.add_row(part, span, f"{curve.median[0]:.3f}", f"{curve.median[-1]:.3f}", spread)
    return shown
