"""The contract on a CUDA device; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import images, seeded
from tests.test_families import VARIANTS, backbone, variant_images
from vitrim import DynamicViTConfig, sparsify
from vitrim.families import family_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_dropped_is_timm(variant):
    model = backbone(variant).cuda()
    x = variant_images(model, 3).cuda()
    family = family_of(model)
    with torch.no_grad():
        torch.testing.assert_close(family.head(family.dense(x)), model(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_choice_and_logits_as_on_the_cpu(variant):
    sparse = sparsify(backbone(variant), DynamicViTConfig(stages=(1, 2), keep_ratio=0.6))
    x = variant_images(sparse.backbone, 3)
    on_cpu = sparse.trace(x)
    on_cuda = sparse.cuda().trace(x.cuda())
    torch.testing.assert_close(on_cuda.logits.cpu(), on_cpu.logits, atol=1e-3, rtol=1e-3)
    for one, other in zip(on_cpu.stages, on_cuda.stages, strict=True):
        assert all(torch.equal(a, b.cpu()) for a, b in zip(one.kept, other.kept, strict=True))


def test_inference_does_not_synchronise():
    sparse = sparsify(backbone("vit"), DynamicViTConfig(keep_ratio=0.6)).eval().cuda()
    x = images(4).cuda()
    sparse(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            sparse(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_step_under_autocast(dtype):
    sparse = sparsify(backbone("vit"), DynamicViTConfig(keep_ratio=0.6)).train().cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.autocast("cuda", dtype):
        parts = sparse.losses(images(4).cuda(), torch.arange(4).cuda(), generator=generator)
    parts["total"].backward()
    assert all(p.grad.isfinite().all() for p in sparse.parameters())


def test_compiled():
    sparse = (
        sparsify(backbone("vit"), DynamicViTConfig(keep_ratio=0.6), generator=seeded(0))
        .eval()
        .cuda()
    )
    x = images(4).cuda()
    with torch.no_grad():
        compiled = torch.compile(sparse, fullgraph=True)
        torch.testing.assert_close(compiled(x), sparse(x), atol=1e-3, rtol=1e-3)
