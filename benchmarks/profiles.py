"""Where a run's time goes, by kind of work, in each runtime; and where a saving is lost.

A profiler slows what it watches, so these times are compared with each other, never published as
speeds.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrim.runtime import import_quietly

Profile = dict[str, float]
"""Milliseconds per call, by kind of work."""

_CALLS = 3
_KINDS = (
    ("attention", r"scaled_dot|flash|ScaledDotProduct|MultiHeadAttention|Attention"),
    ("selecting", r"topk|sort|gather|index|scatter|nonzero|cumsum|argmax|where|one_hot|select"),
    ("linear", r"linear|addmm|bmm|\bmm\b|matmul|gemm|fullyconnected|convolution|\bconv"),
    ("norm and activation", r"norm|gelu|erf|softmax|sigmoid|tanh|mvn|exp\b"),
    (
        "copies",
        r"copy|clone|cat\b|concat|split|slice|reorder|transpose|reshape|convert|expand|to\b",
    ),
)
"""Kind of work: what the names of its operations contain; the first that fits."""


def kind_of(operation: str) -> str:
    """The kind of work of an operation, by its name."""
    fits = (kind for kind, names in _KINDS if re.search(names, operation, re.IGNORECASE))
    return next(fits, "other")


def excess(dense: Mapping[str, float], sparse: Mapping[str, float], macs_ratio: float) -> Profile:
    """Milliseconds that each kind of work takes beyond its share of the dense model's.

    Args:
        dense: profile of the dense model.
        sparse: profile of the sparse one.
        macs_ratio: MACs of the sparse model over those of the dense one.
    """
    found = {kind: ms - macs_ratio * dense.get(kind, 0.0) for kind, ms in sparse.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def of_torch(run: Callable[[Tensor], Any], images: Tensor) -> Profile:
    """Of eager or compiled torch, by the time that each operation spends itself."""
    with torch.inference_mode(), torch.profiler.profile() as profiler:
        for _ in range(_CALLS):
            run(images)
    found: Profile = defaultdict(float)
    for event in profiler.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e3 / _CALLS
    return dict(found)


def of_onnxruntime(network: Path, images: Tensor, threads: int) -> Profile:
    """Of an ONNX file, by node."""
    onnxruntime = import_quietly("onnxruntime", "this benchmark")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = threads, True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(str(network), options)
        name = session.get_inputs()[0].name
        for _ in range(1 + _CALLS):
            session.run(None, {name: images.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
    found: Profile = defaultdict(float)
    start = sorted(e["ts"] for e in events if e["name"] == "model_run")[1]  # after the warm-up
    for event in events:
        is_kernel = event["cat"] == "Node" and event["name"].endswith("_kernel_time")
        if is_kernel and event["ts"] >= start:
            found[kind_of(event["args"]["op_name"])] += event["dur"] / 1e3 / _CALLS
    return dict(found)


def of_openvino(network: Path, images: Tensor, threads: int) -> Profile:
    """Of an OpenVINO network, by layer."""
    openvino = import_quietly("openvino", "this benchmark")
    config = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERF_COUNT": True,
    }
    request = openvino.Core().compile_model(str(network), "CPU", config).create_infer_request()
    found: Profile = defaultdict(float)
    for call in range(1 + _CALLS):
        request.infer([np.asarray(images)])
        for layer in request.profiling_info if call else ():
            found[kind_of(layer.node_type)] += layer.real_time.total_seconds() * 1e3 / _CALLS
    return dict(found)
