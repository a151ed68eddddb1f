"""torch.compile: one graph for fixed counts, and none made anew for the counts of a batch."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import vitrim
from tests.conftest import images, seeded, tiny_vit
from tests.test_methods import FIRST_OF_IMAGES as FIRST
from tests.test_methods import is_fixed, sparse_model
from vitrim import ASViTConfig, DynamicViTConfig, MergingConfig, SaiTConfig, SPViTConfig
from vitrim.tokens.graphs import exporting

ADAPTIVE = {
    "dynamicvit": DynamicViTConfig(threshold=0.45),
    "asvit": ASViTConfig(thresholds=0.0125),
    "asvit merging": ASViTConfig(thresholds=0.0125, merge_dropped=True),
    "sait": SaiTConfig(min_kept=1, mass=0.6),
    "merging": MergingConfig(threshold=0.02),  # all images unlike at every stage
    "spvit": SPViTConfig(inference="threshold", threshold=0.48),
}
"""Of twelve blocks and 64 patches; the images keep unlike numbers of them."""


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("case", "backbone"), [pair for pair in FIRST if is_fixed(*pair)])
def test_fixed_counts_are_one_graph(case, backbone):
    """Compiled once for a shape: no break, and no recompilation for other images."""
    sparse, counter = sparse_model(case, backbone), CompileCounter()
    compiled = torch.compile(sparse, backend=counter, fullgraph=True)
    with torch.no_grad():
        for seed in range(3):
            x = images(3, seed=seed)
            torch.testing.assert_close(compiled(x), sparse(x), atol=1e-5, rtol=0)
    assert counter.frame_count == 1


def decisive(config):
    """A sparse model whose images keep different counts."""
    dense = tiny_vit(depth=12, img_size=64)
    sparse = vitrim.sparsify(dense, config, generator=seeded(3)).eval()
    with torch.no_grad():
        for block in sparse.backbone.blocks:
            block.attn.qkv.weight.mul_(6)
        for parameter in sparse.method.parameters():
            parameter.mul_(16 if parameter.ndim > 1 else 1)
    return sparse


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_counts_of_images_share_their_graphs(name, batch):
    """After a warm-up, batches with other counts run on the graphs that are there; twelve blocks
    share theirs, as torch gives up on a function after eight versions of it.
    """
    sparse, counter = decisive(ADAPTIVE[name]), CompileCounter()
    compiled = torch.compile(sparse, backend=counter)
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for seed in range(6):
            x = images(batch, 64, seed)
            torch.testing.assert_close(compiled(x), sparse(x), atol=1e-4, rtol=0)
        graphs, seen = counter.frame_count, set()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(6, 10):
                x = images(batch, 64, seed)
                compiled(x)
                stages = sparse.trace(x).stages
                seen.add(tuple(tuple(stage.counts.tolist()) for stage in stages))
    assert counter.frame_count == graphs
    assert len(seen) > 1


@pytest.mark.parametrize("strict", [False, True])
def test_a_compiled_graph_is_not_an_exported_one(strict):
    class Asks(torch.nn.Module):
        def forward(self, x):
            return x + 1 if exporting() else x

    asks, x = Asks(), torch.zeros(2)
    assert torch.compile(asks, backend="eager", fullgraph=True)(x).sum() == 0
    assert torch.export.export(asks, (x,), strict=strict).module()(x).sum() == 2
    assert asks(x).sum() == 0
