"""A piece of a network in the runtime that will run it.

torch, torch.compile, onnxruntime and OpenVINO turn a module into a function of an input, which
gives a call without arguments: the thing to time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.config import closest
from vitrim.errors import ConfigError
from vitrim.export import formats
from vitrim.runtime import import_quietly, session_options

RUNTIMES: dict[str, tuple[str, ...]] = {
    "torch": ("fp32", "bf16"),
    "torch-compile": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16"),
}
"""The precisions that each runs in."""

Call = Callable[[], Any]
Bound = Callable[[Tensor], Call]


def check_runtime(runtime: str, dtype: str, device: torch.device) -> None:
    """Raise :class:`ConfigError` unless ``runtime`` runs in ``dtype`` on ``device``, and
    :class:`MissingExtraError` unless it is installed.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(
            f"unknown runtime {runtime!r}{closest(runtime, RUNTIMES)}; known: {', '.join(RUNTIMES)}"
        )
    if dtype not in RUNTIMES[runtime]:
        able = [name for name, dtypes in RUNTIMES.items() if dtype in dtypes]
        others = f"; {dtype} is run by {', '.join(able)}" if able else ""
        raise ConfigError(
            f"{runtime} is profiled in {', '.join(RUNTIMES[runtime])}, not in {dtype!r}{others}"
        )
    if runtime.startswith("torch"):
        return
    if device.type != "cpu":
        raise ConfigError(f"{runtime} is profiled on the cpu, not on {str(device)!r}")
    import_quietly(runtime, f"profiling {runtime}")


def torch_dtype(runtime: str, dtype: str) -> torch.dtype:
    """The type of modules and inputs; runtimes other than torch convert single precision."""
    in_bfloat16 = dtype == "bf16" and runtime.startswith("torch")
    return torch.bfloat16 if in_bfloat16 else torch.float32


def version_of(runtime: str) -> str:
    """The version of a runtime, as tables record it."""
    if runtime.startswith("torch"):
        return torch.__version__
    return str(import_quietly(runtime, f"profiling {runtime}").__version__)


def bind(
    module: nn.Module, example: Tensor, varies: bool, runtime: str, dtype: str, threads: int
) -> Bound:
    """``module`` in ``runtime``: a function of an input that gives the call to time.

    Args:
        module: in evaluation mode, in its precision and on its device.
        example: an input.
        varies: whether the second dimension of later inputs differs from the example's.
        runtime: one of :data:`RUNTIMES`.
        dtype: of it; ``int8`` is calibrated on the example.
        threads: CPU threads of runtimes other than torch, whose threads are the process's.
    """
    if runtime == "torch":
        return lambda x: lambda: module(x)
    if runtime == "torch-compile":
        return _compiled(module)
    program = _program(module, example, varies)
    with tempfile.TemporaryDirectory() as folder:
        if runtime == "onnxruntime":
            return _onnxruntime(program, Path(folder), example, dtype, threads)
        return _openvino(program, Path(folder), dtype, threads)


def _compiled(module: nn.Module) -> Bound:
    def bound(x: Tensor) -> Call:
        # A compilation of its own for each shape, as a model of fixed counts has: made now, as
        # torch makes so many only when told to.
        compiled = torch.compile(module, dynamic=False)
        with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=1000):
            compiled(x)
        return lambda: compiled(x)

    return bound


def _program(module: nn.Module, example: Tensor, varies: bool) -> torch.export.ExportedProgram:
    sizes = ({1: torch.export.Dim.DYNAMIC},) if varies else None
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=sizes)


def _onnxruntime(
    program: torch.export.ExportedProgram, folder: Path, example: Tensor, dtype: str, threads: int
) -> Bound:
    onnxruntime = import_quietly("onnxruntime", "profiling onnxruntime")
    path = folder / "part.onnx"
    formats.write_onnx(program, path)
    if dtype == "int8" and any(node.op == "call_function" for node in program.graph.nodes):
        formats.quantize(path, example, len(example))
    options = session_options(threads)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def bound(x: Tensor) -> Call:
        feeds = {name: x.numpy()}
        return lambda: session.run(None, feeds)

    return bound


def _openvino(
    program: torch.export.ExportedProgram, folder: Path, dtype: str, threads: int
) -> Bound:
    openvino = import_quietly("openvino", "profiling openvino")
    path = folder / "part.onnx"
    formats.write_onnx(program, path)
    core, model = openvino.Core(), openvino.convert_model(path)
    precision = {"bf16": "bf16"}.get(dtype, "f32")
    config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}

    def bound(x: Tensor) -> Call:
        fixed = model.clone()
        fixed.reshape(list(x.shape))
        compiled, array = core.compile_model(fixed, "CPU", config), x.numpy()
        return lambda: compiled([array])

    return bound
