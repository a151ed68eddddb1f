"""The contract on a CUDA device; skipped where there is none."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.conftest import images, seeded
from tests.test_families import VARIANTS, backbone, variant_images
from vitrim import DynamicViTConfig, sparsify
from vitrim.families import family_of
from vitrim.tokens import packed as packing
from vitrim.tokens.packed import select

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


COUNTS = (3, 16, 1, 7, 3, 9)


def packed_run(device, dtype, variant="vit"):
    """Logits and class attention of images with different counts, by packed execution."""
    family = family_of(backbone(variant).to(device, dtype))
    rank = torch.rand(len(COUNTS), 16, generator=seeded(0)).argsort(1).argsort(1)
    keep = (rank < torch.tensor(COUNTS).unsqueeze(1)).to(device)
    with torch.no_grad():
        tokens = select(family.stem(images(len(COUNTS)).to(device, dtype)), keep)
        tokens, score = family.attention_half(0, tokens, lambda r: r.patch_attention().mean(1))
        tokens = family.mlp_half(0, tokens)
        for block in range(1, family.depth):
            tokens = family.run_block(block, tokens)
        return family.head(tokens), tokens.on_grid(score, 16, 0.0)


@pytest.mark.parametrize("variant", ["vit", "qk-norm", "registers-class", "average-pool"])
def test_packed_is_as_on_the_cpu(variant):
    for found, expected in zip(
        packed_run("cuda", torch.float32, variant),
        packed_run("cpu", torch.float32, variant),
        strict=True,
    ):
        torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_in_half_precision_is_varlen(dtype, monkeypatch):
    calls = []
    varlen = packing.varlen_attn
    monkeypatch.setattr(packing, "varlen_attn", lambda *args: calls.append(1) or varlen(*args))
    logits, score = packed_run("cuda", dtype)
    assert len(calls) == 4
    expected, expected_score = packed_run("cpu", torch.float32)
    torch.testing.assert_close(logits.cpu().float(), expected, atol=0.2, rtol=0.1)
    torch.testing.assert_close(score.cpu().float(), expected_score, atol=0.02, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_stage_synchronises_once(dtype):
    family = family_of(backbone("vit").cuda().to(dtype))
    tokens = family.stem(images(6).cuda().to(dtype))
    keep = (torch.arange(16) < torch.tensor(COUNTS).unsqueeze(1)).cuda()
    with torch.no_grad():
        family.head(family.run_block(0, select(tokens, keep)))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                packed = select(tokens, keep)
                fewer = select(packed, keep.roll(1, 1))
                family.head(family.run_block(1, family.run_block(0, fewer)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchronizing" in str(w.message)]) == 2
