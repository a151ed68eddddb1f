"""Writing an exported program as a file of each format.

The graphs are what torch.export gives; where a runtime stumbles over a form of it, the form is
changed here and the reason is said.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrim.errors import ConfigError, MissingExtraError
from vitrim.runtime import import_quietly

Program = torch.export.ExportedProgram


def write_pt2(program: Program, path: Path) -> None:
    """A file that torch itself loads."""
    content = BytesIO()  # on a full disk torch would end the process
    torch.export.save(program, content)
    path.write_bytes(content.getvalue())


def write_onnx(program: Program, path: Path, outputs: Sequence[str] | None = None) -> None:
    """An ONNX file, and its weights beside it if they are many; ``outputs`` names what it gives.

    Raises:
        ConfigError: ONNX lacks an operation; it is named.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("export to ONNX", error.name or "onnx", "export") from error
    with quiet():
        try:
            written = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                optimize=True,
                output_names=outputs,
                custom_translation_table={
                    torch.ops.aten.scaled_dot_product_attention.default: _attention,
                    torch.ops.aten.linear.default: _linear,
                },
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ConfigError(
                f"the model has an operation that ONNX lacks ({_reason(error)}); the nearest "
                "format that works is pt2"
            ) from error
    assert written is not None
    _count_axes_from_the_front(written.model)
    written.save(path)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention (B, H, N, D) in five operations. torch's own form takes the keys apart by their
    shape, nine operations more, which cost a runtime as much for few tokens as for many.
    """
    from onnx_ir import DataType
    from onnxscript import opset18 as op

    assert not is_causal
    assert not enable_gqa
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = op.MatMul(query * scale, op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None and attn_mask.dtype == DataType.BOOL:
        logits = op.Where(attn_mask, logits, float("-inf"))
    elif attn_mask is not None:
        logits = logits + attn_mask
    return op.MatMul(op.Softmax(logits, axis=-1), value)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """A linear layer on the rows of all dimensions but the last: Gemm adds the bias as it goes,
    which saves onnxruntime 5 to 10 % of a model's time. Where more sizes are unknown than a reshape
    can find out, as torch has it.
    """
    from onnxscript import opset18

    op: Any = opset18  # its types do not take what its constants give
    *sizes, channels = x.shape
    known = [size if isinstance(size, int) else -1 for size in sizes]
    if bias is None or known.count(-1) > 1:
        product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        return product if bias is None else op.Add(product, bias)
    rows = op.Reshape(x, op.Constant(value_ints=[-1, channels]))
    out = op.Gemm(rows, weight, bias, transB=1)
    return op.Reshape(out, op.Constant(value_ints=[*known, weight.shape[0]]))


def _count_axes_from_the_front(model: Any) -> None:
    """Where an image keeps nothing, onnxruntime reduces empty tensors, and gets their shape wrong
    along an axis that is counted from the end.
    """
    import onnx_ir

    for node in model.graph:
        if not node.op_type.startswith("Reduce") or len(node.inputs) < 2 or node.inputs[1] is None:
            continue
        axes, shape = node.inputs[1].const_value, node.inputs[0].shape
        if axes is None or shape is None or (axes.numpy() >= 0).all():
            continue
        positive = np.where(axes.numpy() < 0, axes.numpy() + len(shape), axes.numpy())
        value = onnx_ir.Value(
            name=f"{node.outputs[0].name}_axes", const_value=onnx_ir.tensor(positive)
        )
        model.graph.register_initializer(value)
        node.replace_input_with(1, value)


def write_openvino(
    program: Program, path: Path, dtype: str, outputs: Sequence[str] | None = None
) -> None:
    """OpenVINO's pair of files, by way of ONNX."""
    openvino = import_quietly("openvino", "export to OpenVINO")
    onnx_path = path.with_name("network.onnx")
    write_onnx(program, onnx_path, outputs)
    try:
        network = openvino.convert_model(onnx_path)
    except Exception as error:  # its errors are of its own C++ classes
        raise ConfigError(
            f"the model has an operation that OpenVINO lacks ({_reason(error)}); the nearest "
            "format that works is onnx"
        ) from error
    openvino.save_model(network, path, compress_to_fp16=dtype == "fp16")
    for leftover in onnx_path.parent.glob(f"{onnx_path.name}*"):
        leftover.unlink()


def write_executorch(program: Program, path: Path) -> None:
    """A file for ExecuTorch: XNNPACK's kernels where it has them, the portable ones elsewhere."""
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "export to ExecuTorch", error.name or "executorch", "export-executorch"
        ) from error
    with quiet():
        try:
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            written = edge.to_executorch()
        except Exception as error:  # its passes raise errors of many classes
            raise ConfigError(
                f"the model has an operation that ExecuTorch lacks ({_reason(error)}); the nearest "
                "format that works is onnx"
            ) from error
    path.write_bytes(written.buffer)


def load_executorch(path: Path) -> Callable[[Tensor], Tensor]:
    """What runs a file of :func:`write_executorch`."""
    try:
        from executorch.runtime import Runtime
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "running an ExecuTorch bundle", error.name or "executorch", "export-executorch"
        ) from error
    method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None

    def run(images: Tensor) -> Tensor:
        # Outputs live in memory that the next call writes to.
        logits: Tensor = method.execute([images.contiguous()])[0].clone()
        return logits

    return run


def write_int8(
    program: Program,
    path: Path,
    images: Tensor,
    batch: int | None,
    outputs: Sequence[str] | None = None,
) -> None:
    """ONNX with integer weights and activations, scales from ``images``."""
    write_onnx(program, path, outputs)
    quantize(path, images, batch)


def quantize(path: Path, images: Tensor, batch: int | None) -> None:
    """Integer weights and activations in every matrix product, scales from ``images``."""
    quantization = import_quietly("onnxruntime.quantization", "export in int8")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined,misc]  # untyped
        def __init__(self) -> None:
            size = batch or 8
            whole = images[: len(images) // size * size]
            self.parts = iter(torch.split(whole, size))

        def get_next(self) -> dict[str, Any] | None:
            part = next(self.parts, None)
            return None if part is None else {"images": part.numpy()}

    single = path.with_name("single.onnx")
    with quiet():
        quantization.quant_pre_process(
            path, single, skip_optimization=True, skip_symbolic_shape=True
        )
        try:
            quantization.quantize_static(
                single,
                path,
                Reader(),
                per_channel=True,
                op_types_to_quantize=["MatMul", "Gemm"],
                extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
            )
        except Exception as error:  # of numpy, onnx or onnxruntime's own C++ classes
            raise ConfigError(
                f"onnxruntime cannot measure the scales of int8 ({_reason(error)}); the nearest "
                "format that works is onnx in fp32"
            ) from error
    for leftover in path.parent.glob("single.onnx*"):
        leftover.unlink()


def _reason(error: BaseException) -> str:
    """The first line of what an error goes back to."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(cause).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own progress and deprecations."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
