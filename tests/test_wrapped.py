"""Modules are called, not read: hooks, adapters, quantised layers and shards do what they do in
the backbone itself, on every method.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.utils import parametrizations, prune

from tests.conftest import seeded, tiny_swin, tiny_vit
from tests.test_methods import BACKBONES, CASES, KEEPS_ALL, METHOD, OF_CLIPS, X, sparse_model
from tests.test_methods import each_case_of_images as each_case
from vitrim import ASViTConfig, DynamicViTConfig, UnsupportedBackboneError, sparsify
from vitrim.families import FAMILIES, family_of

BLOCKS = (Block, SwinTransformerBlock, ConvNeXtBlock)

READS_WEIGHTS = ("swin v2",)
"""Backbones whose attention, in timm too, reads the weight of a layer and does not call it."""


def blocks_of(sparse):
    return [module for module in sparse.backbone.modules() if isinstance(module, BLOCKS)]


def linears_of(sparse):
    """(owner, name, layer) of every linear layer."""
    return [
        (owner, name, layer)
        for owner in sparse.modules()
        for name, layer in owner.named_children()
        if type(layer) is nn.Linear
    ]


class Adapter(nn.Module):
    """A LoRA layer as adapters' libraries make them: weight and bias are the base layer's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(0.2 * torch.randn(4, base.weight.shape[1], generator=seeded(1)))
        self.up = nn.Parameter(0.2 * torch.randn(base.weight.shape[0], 4, generator=seeded(2)))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@each_case
@pytest.mark.parametrize("training", [False, True])
def test_hooks_of_blocks_and_attention_run_once_a_call(case, backbone, training):
    sparse = sparse_model(case, backbone).train(training)
    seen = []
    watched = blocks_of(sparse) + [
        block.attn for block in blocks_of(sparse) if hasattr(block, "attn")
    ]
    for module in watched:
        module.register_forward_hook(lambda module, *_: seen.append(module))
    logits = sparse(X)
    if not (training and CASES[case].__class__.__name__ == "SaiTConfig"):
        assert sorted(map(id, seen)) == sorted(map(id, watched))
    assert logits.isfinite().all()
    logits.sum().backward()


@each_case
def test_hooks_of_backbone_and_method_run_in_every_entry(case, backbone):
    sparse, seen = sparse_model(case, backbone), []
    for module in (sparse.backbone, sparse.method):
        module.register_forward_hook(lambda module, *_: seen.append(module))

    def runs(call):
        seen.clear()
        call()
        return seen == [sparse.method, sparse.backbone]

    assert runs(lambda: sparse(X))
    assert runs(lambda: sparse.trace(X))
    assert runs(lambda: sparse.losses(X, torch.tensor([1, 2, 3])))
    if case.startswith("dynamic_spatial"):
        assert runs(lambda: sparse.features(X))
        assert runs(lambda: sparse.forward_features(X))


def test_a_hook_that_changes_logits_changes_the_loss():
    sparse = sparse_model("dynamicvit").train()
    target = torch.tensor([1, 2, 3])
    torch.manual_seed(0)
    before = sparse.losses(X, target)["classification"]
    sparse.backbone.register_forward_hook(lambda _module, _inputs, out: out * 0)
    torch.manual_seed(0)
    after = sparse.losses(X, target)["classification"]
    assert before != after
    torch.testing.assert_close(after, torch.tensor(10.0).log())


def test_hooks_of_compiled_blocks_and_of_all_modules_run():
    model = tiny_vit()
    sparse = sparsify(model, ASViTConfig(thresholds=1e-9)).eval()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
        model.blocks[index].register_forward_hook(lambda _m, _i, out: out * 1.1)
    with torch.no_grad():
        torch.testing.assert_close(sparse(X), model(X), atol=2e-5, rtol=1e-5)
    other = sparse_model("spvit_pyramid", "swin")
    watched, seen = [other.backbone, *blocks_of(other)], []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        other(X)
    finally:
        handle.remove()
    assert {id(module) for module in watched} <= {id(module) for module in seen}


def whole(sparse):
    """The same model with a last block that runs whole, as where something hangs on it."""
    other = copy.deepcopy(sparse)
    if hasattr(other.config, "exact_last_block"):
        other.method.config = replace(other.config, exact_last_block=False)
    return other


def test_hooks_may_call_and_copy_their_block():
    sparse = sparse_model("asvit")
    expected, copies = whole(sparse)(X), []

    def hook(block, inputs):
        copies.append(copy.deepcopy(block))
        block.norm1(inputs[0])

    handles = [block.register_forward_pre_hook(hook) for block in blocks_of(sparse)]
    assert torch.equal(sparse(X), expected)
    for handle in handles:
        handle.remove()
    block = sparse.backbone.blocks[1]
    block.register_forward_hook(
        lambda module, inputs, out: copies.append(copy.deepcopy(module)) or None
    )
    sparse(X)
    x = torch.randn(1, 17, 32, generator=seeded(0))
    assert torch.equal(copies[-1](x), type(block).forward(block, x))
    block.register_forward_pre_hook(
        lambda _m, inputs, words: (inputs, words | {"attn_mask": None}), with_kwargs=True
    )
    sparse(X)
    block.register_forward_pre_hook(
        lambda _m, inputs, words: (inputs, words | {"attn_mask": x}), with_kwargs=True
    )
    with pytest.raises(UnsupportedBackboneError, match=r"gives a Block .* attn_mask"):
        sparse(X)


@each_case
def test_backward_hooks_see_gradients(case, backbone):
    sparse, seen = sparse_model(case, backbone), []
    for block in blocks_of(sparse):
        block.register_full_backward_hook(lambda module, *_: seen.append(module))
    sparse(X).sum().backward()
    assert {id(module) for module in seen} == {id(block) for block in blocks_of(sparse)}


@pytest.mark.parametrize(
    ("case", "backbone"),
    [
        (c, b)
        for c in KEEPS_ALL
        for b in [n for n in BACKBONES if n not in OF_CLIPS]
        if family_of(BACKBONES[b]()).name in METHOD[c].families
    ],
)
def test_hooks_that_change_numbers_change_the_dense_models(case, backbone):
    model = BACKBONES[backbone]()
    sparse = sparsify(model, KEEPS_ALL[case]).eval()
    for block in blocks_of(sparse):
        block.register_forward_hook(lambda _module, _inputs, out: out * 1.1)
        if hasattr(block, "attn"):
            block.attn.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 0.9,))
    torch.testing.assert_close(sparse(X), model(X), atol=2e-5, rtol=1e-5)


@each_case
def test_attention_maps_are_there_when_fused_attention_is_off(case, backbone):
    sparse, maps = sparse_model(case, backbone), []
    expected = sparse(X)
    layers = [block.attn for block in blocks_of(sparse) if hasattr(block, "attn")]
    for attention in layers:
        attention.fused_attn = False
        attention.attn_drop.register_forward_hook(lambda _m, inputs, _out: maps.append(inputs[0]))
    torch.testing.assert_close(sparse(X), expected, atol=1e-5, rtol=0)
    assert len(maps) == len(layers)
    for map_ in maps:
        torch.testing.assert_close(map_.sum(-1), torch.ones(map_.shape[:-1]))


@each_case
def test_adapters_count_as_merged_weights(case, backbone):
    if backbone in READS_WEIGHTS:
        return
    sparse = sparse_model(case, backbone)
    merged, adapted = copy.deepcopy(sparse), []
    for (owner, name, layer), (_, _, other) in zip(
        linears_of(sparse), linears_of(merged), strict=True
    ):
        adapter = Adapter(layer)
        adapted.append((owner, name, adapter))
        setattr(owner, name, adapter)
        other.weight.data += (adapter.up @ adapter.down).detach()
    expected = merged(X)
    expected.sum().backward()
    torch.testing.assert_close(sparse(X), expected, atol=2e-4, rtol=1e-4)
    assert sparse.macs() == whole(merged).macs()
    assert sparse.dense_macs() == merged.dense_macs()
    sparse(X).sum().backward()
    for (_, _, adapter), (_, _, other) in zip(adapted, linears_of(merged), strict=True):
        assert (adapter.up.grad is None) == (other.weight.grad is None)


@each_case
@pytest.mark.parametrize("kind", ["pruned", "weight norm", "parametrized", "old weight norm"])
def test_reparametrized_layers_count_as_their_weights(case, backbone, kind):
    if backbone in READS_WEIGHTS:
        return
    sparse = sparse_model(case, backbone)
    merged = copy.deepcopy(sparse)
    for (_, _, layer), (_, _, other) in zip(linears_of(sparse), linears_of(merged), strict=True):
        if kind == "pruned":
            prune.l1_unstructured(layer, "weight", amount=0.3)
            layer.weight_mask.copy_(
                layer.weight_mask.flip(0)
            )  # what was pruned is seen when called
            other.weight.data = layer.weight_orig.detach() * layer.weight_mask
        elif kind == "old weight norm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nn.utils.weight_norm(layer)
            layer.weight_g.data *= 0.5
            other.weight.data *= 0.5
        else:
            normed = parametrizations.weight_norm if kind == "weight norm" else None
            if normed is not None:
                normed(layer)
            else:
                nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
                other.weight.data *= 0.5
    torch.testing.assert_close(sparse(X), merged(X), atol=2e-5, rtol=1e-4)
    assert sparse.macs() == whole(merged).macs()


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@each_case
@pytest.mark.filterwarnings("ignore:.*(quantization|quantize|qint8|TypedStorage|reduce_range).*")
def test_quantised_layers_are_called(case, backbone):
    if backbone in READS_WEIGHTS:
        return
    sparse = sparse_model(case, backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(sparse, {nn.Linear}, dtype=torch.qint8)
        found = quantised(X)
    assert found.shape == (3, 10)
    assert found.isfinite().all()
    assert quantised.macs() == whole(sparse).macs()
    assert quantised.dense_macs() == sparse.dense_macs()
    quantised.trace(X)


def test_a_forward_of_its_own_is_refused_by_name_where_a_block_is_run_by_halves():
    sparse = sparsify(tiny_vit(), ASViTConfig(thresholds=0.06, stages=(2,))).eval()
    attention = sparse.backbone.blocks[1].attn
    forward = attention.forward
    attention.forward = lambda x: forward(x)
    with pytest.raises(UnsupportedBackboneError, match=r"Attention .* was given another forward"):
        sparse(X)


def test_hooks_of_a_stage_are_told_that_they_do_not_run():
    sparse = sparsify(tiny_swin(), CASES["dynamic_spatial"]).eval()
    sparse.backbone.layers[2].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"layers\.2 are not run"):
        sparse(X)


def test_threads_do_not_meet_in_a_hooked_block():
    from concurrent.futures import ThreadPoolExecutor

    sparse = sparse_model("asvit")
    expected = whole(sparse)(X)
    for block in blocks_of(sparse):
        block.register_forward_hook(lambda *_: None)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: sparse(X), range(24)):
            assert torch.equal(found, expected)
    assert all("forward" not in vars(block) for block in blocks_of(sparse))


@pytest.fixture
def mesh(monkeypatch, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@each_case
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("each_block", [True, False])
def test_sharded_by_block_and_as_a_whole(case, backbone, each_block, mesh):
    sparse = sparse_model(case, backbone)
    expected, training = sparse(X), copy.deepcopy(sparse).train()
    torch.manual_seed(0)
    taught = training(X)
    taught.sum().backward()
    gradients = {name: p.grad for name, p in training.named_parameters() if p.grad is not None}
    if each_block:
        for block in blocks_of(sparse):
            fully_shard(block, mesh=mesh)
    fully_shard(sparse, mesh=mesh)
    with torch.no_grad():
        torch.testing.assert_close(sparse(X), expected, atol=1e-5, rtol=0)
    assert sparse.macs() == (whole(training) if each_block else training).macs()
    sparse.train()
    torch.manual_seed(0)
    sparse(X).sum().backward()
    for name, parameter in sparse.named_parameters():
        if name in gradients:
            found = parameter.grad.full_tensor()
            torch.testing.assert_close(found, gradients[name], atol=2e-4, rtol=1e-3)
    for entry in ("losses", "trace"):
        register_fsdp_forward_method(sparse, entry)
    target = torch.tensor([1, 2, 3])
    torch.manual_seed(0)
    due = training.losses(X, target)["total"]
    torch.manual_seed(0)
    loss = sparse.losses(X, target)["total"]
    torch.testing.assert_close(loss, due, atol=1e-4, rtol=1e-4)
    loss.backward()
    due = training.eval()(X)  # LV-ViT's stem has seen the images since
    torch.testing.assert_close(sparse.trace(X).logits, due, atol=1e-4, rtol=1e-3)
    assert sparse.is_untrained == training.is_untrained


@each_case
def test_offloaded_by_accelerate(case, backbone):
    if backbone in READS_WEIGHTS:
        return
    accelerate = pytest.importorskip("accelerate")
    sparse = sparse_model(case, backbone)
    expected = sparse(X)
    torch.manual_seed(0)
    loss = whole(sparse).losses(X, torch.tensor([1, 2, 3]))["total"]
    method, blocks = type(sparse.method).__name__, {type(b).__name__ for b in blocks_of(sparse)}
    accelerate.cpu_offload(sparse, torch.device("cpu"), preload_module_classes=[method, *blocks])
    with torch.no_grad():
        torch.testing.assert_close(sparse(X), expected, atol=1e-5, rtol=0)
        torch.manual_seed(0)
        found = sparse.losses(X, torch.tensor([1, 2, 3]))["total"]
        torch.testing.assert_close(found, loss)
    assert not sparse.is_untrained


def test_families_know_what_they_pass_over():
    for family in FAMILIES:
        assert family.containers is not None
    sparse = sparsify(tiny_vit(), DynamicViTConfig(stages=(1, 2)))
    assert [name for name, _ in sparse.family.containers()] == ["blocks"]
