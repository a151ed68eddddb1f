"""The most that an exported model can keep of its saving: its weight products alone.

``python benchmarks/products.py`` (a minute) times the linear layers of DeiT-Small's blocks, and
nothing else of it, on 197 tokens throughout and on those of DynamicViT at r = 0.7, for one image in
onnxruntime and OpenVINO. Speed-up over the ratio of MACs is the efficiency that the runtime's own
kernels have on so few rows, whatever graph stands around them; ``results/export.md`` holds the
whole models' against it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping

import timm
import torch
from torch import Tensor, nn

from vitrim import DynamicViTConfig, sparsify
from vitrim.costs.macs import linear_macs
from vitrim.latency.runners import bind
from vitrim.tools.benchmark import limited_threads, take_turns

MODEL = "deit_small_patch16_224"
RUNTIMES = ("onnxruntime", "openvino")


class Products(nn.Module):
    """The linear layers of a vision transformer's blocks, one after the other.

    Args:
        blocks: of timm.
        counts: tokens that are left before a block, by its index.
    """

    def __init__(self, blocks: nn.Sequential, counts: Mapping[int, int]) -> None:
        super().__init__()
        self.blocks, self.counts = blocks, counts

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = x[:, : self.counts.get(index, x.shape[1])]
            x = block.attn.proj(block.attn.qkv(x)[..., : x.shape[2]])
            x = block.mlp.fc2(block.mlp.fc1(x))
        return x

    def macs(self, num_tokens: int) -> int:
        """Per image."""
        total = 0
        for index, block in enumerate(self.blocks):
            num_tokens = self.counts.get(index, num_tokens)
            total += num_tokens * linear_macs(block)
        return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    backbone = timm.create_model(MODEL).eval().requires_grad_(False)
    sparse = sparsify(backbone, DynamicViTConfig(keep_ratio=0.7))
    family, method = sparse.family, sparse.method
    kept = method.counts(family, family.grid())
    counts = {block: count + 1 for block, count in zip(method.stages, kept, strict=True)}
    models = {"dense": Products(backbone.blocks, {}), "sparse": Products(backbone.blocks, counts)}
    x = torch.randn(1, math.prod(family.grid()) + 1, family.embed_dim)
    limit = models["dense"].macs(x.shape[1]) / models["sparse"].macs(x.shape[1])
    for threads in options.threads:
        for runtime in RUNTIMES:
            calls = {n: bind(m, x, False, runtime, "fp32", threads)(x) for n, m in models.items()}
            runs = {name: lambda _, call=call: call() for name, call in calls.items()}
            with limited_threads(threads), torch.inference_mode():
                timing = take_turns(runs, [x], options.rounds, 0.1, math.inf, time.perf_counter)
            speedup = timing["sparse"].speedup(timing["dense"])
            of = speedup / limit
            print(
                f"{runtime}, {threads} thread(s): speed-up {speedup.median:.3f} of {limit:.3f}, "
                f"efficiency {of.median:.3f} [{of.low:.3f}, {of.high:.3f}]",
                flush=True,
            )


if __name__ == "__main__":
    main()
