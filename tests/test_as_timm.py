"""A sparse model is a timm model to timm's helpers, and follows what is done to its backbone."""

from __future__ import annotations

import copy
import inspect
import threading

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from tests.conftest import images, seeded, tiny_convnext, tiny_pit, tiny_swin, tiny_vit
from tests.test_methods import BACKBONES, CASES, KEEPS_ALL, METHOD, OF_CLIPS, X, sparse_model
from tests.test_methods import each_case_of_images as each_case
from vitrim import (
    ASViTConfig,
    ConfigError,
    DynamicSpatialConfig,
    DynamicViTConfig,
    InputError,
    SaiTConfig,
    SPViTConfig,
    STViTConfig,
    UnsupportedBackboneError,
    sparsify,
)
from vitrim.families import family_of

TARGET = torch.tensor([1, 2, 3])
DECIDED_BY_IMAGES = (
    *("dynamicvit threshold", "asvit", "asvit values", "sait mass", "sait threshold", "spvit"),
    *("asvit merging", "merging threshold"),
    *("spvit threshold", "spvit_pyramid on pit", "spvit_pyramid threshold on pit"),
)
POOLING = ("average pool", "attention pool", "registers", "rotary", "naflex")
"""Backbones whose head pools their patch tokens; LV-ViT's takes the best of them."""
PAIRS = [
    (case, name)
    for case in KEEPS_ALL
    for name in [n for n in BACKBONES if n not in OF_CLIPS]
    if family_of(BACKBONES[name]()).name in METHOD[case].families
]


def dynamicvit(**kwargs):
    return sparsify(tiny_vit(**kwargs), DynamicViTConfig(stages=(1, 2), keep_ratio=0.6)).eval()


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin, tiny_convnext, tiny_pit])
def test_optimisers_group_parameters_as_for_the_backbone(make):
    model = make()
    config = {
        tiny_vit: DynamicViTConfig(stages=(1, 2)),
        tiny_pit: CASES["spvit_pyramid"],
    }.get(make, DynamicSpatialConfig())
    sparse = sparsify(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    choices = [{"weight_decay": 0.05}]
    if hasattr(model, "group_matcher"):  # PiT has none
        choices.append({"weight_decay": 0.05, "layer_decay": 0.7})
    for options in choices:
        settings = []
        for subject in (model, sparse):
            optimizer = create_optimizer_v2(subject, opt="adamw", lr=1e-3, **options)
            settings.append(
                {
                    names[id(p)]: (group["weight_decay"], group.get("lr_scale", 1.0))
                    for group in optimizer.param_groups
                    for p in group["params"]
                    if id(p) in names
                }
            )
            assert sum(len(g["params"]) for g in optimizer.param_groups) == len(
                list(subject.parameters())
            )
        assert settings[0] == settings[1]


def test_what_timms_scripts_ask():
    model = tiny_vit()
    sparse = sparsify(model, DynamicViTConfig(stages=(1, 2)))
    assert resolve_model_data_config(sparse) == resolve_model_data_config(model)
    create_transform(**resolve_model_data_config(sparse), is_training=True)
    for name in ("pretrained_cfg", "default_cfg", "num_classes", "num_features"):
        assert getattr(sparse, name) == getattr(model, name)
    assert sparse.head_hidden_size == model.head_hidden_size
    assert sparse.get_classifier() is model.head
    assert timm.models.get_model_args(sparse)["num_classes"] == 10
    assert sparse.no_weight_decay() == {f"backbone.{name}" for name in model.no_weight_decay()}
    sparse.set_grad_checkpointing()
    assert model.grad_checkpointing
    assert not hasattr(sparse, "nonsense")
    sparse.reset_classifier(7)
    assert sparse(X).shape == (3, 7)


def test_the_steps_of_timms_training_script():
    torch.manual_seed(0)
    sparse = dynamicvit().train()
    options = {"weight_decay": 0.05, "layer_decay": 0.8}
    optimizer = create_optimizer_v2(sparse, opt="adamw", lr=1e-3, **options)
    ema, losses = ModelEmaV3(sparse, decay=0.9), []
    for _ in range(8):
        loss = nn.functional.cross_entropy(sparse(X), TARGET)
        optimizer.zero_grad()
        loss.backward()
        timm.utils.dispatch_clip_grad(sparse.parameters(), 1.0)
        optimizer.step()
        ema.update(sparse)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert ema.module.eval()(X).shape == (3, 10)
    timm.utils.unwrap_model(sparse)
    other = dynamicvit()
    other.load_state_dict(timm.utils.get_state_dict(ema))
    assert torch.equal(other(X), ema.module.eval()(X))


@pytest.mark.parametrize(("case", "backbone"), PAIRS)
def test_features_of_everything_are_timms(case, backbone):
    model = BACKBONES[backbone]()
    sparse = sparsify(model, KEEPS_ALL[case]).eval()
    if (backbone == "lv-vit" and case.startswith("spvit")) or (
        backbone in (*POOLING, "lv-vit") and case == "asvit masked"
    ):
        return  # refused, see below
    if backbone in POOLING and case in ("dynamicvit merging", "merging threshold"):
        with pytest.raises(ConfigError, match="stand for different numbers of patches"):
            sparse.forward_features(X)
        return
    features, expected = sparse.forward_features(X), model.forward_features(X)
    if case.startswith("sait") or "fixed" in case or "threshold" in case or case == "asvit":
        features, expected = features.sum(1), expected.sum(1)  # in another order
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


@each_case
def test_head_of_features_is_the_model(case, backbone):
    sparse = sparse_model(case, backbone)
    has_own_head = case in ("stvit", "stvit learned pooling")
    is_ragged = any(len(stage.counts.unique()) > 1 for stage in sparse.trace(X).stages[-1:])
    is_hidden = is_ragged or case == "asvit masked"
    has_sizes = "merging" in case or case == "stvit with prefix"
    if (
        has_own_head
        or (backbone == "lv-vit" and (is_hidden or case.startswith("spvit")))
        or (backbone in POOLING and (is_hidden or has_sizes))
    ):
        with pytest.raises(ConfigError, match="call the model"):
            sparse.forward_features(X)
        return
    features = sparse.forward_features(X)
    torch.testing.assert_close(sparse.forward_head(features), sparse(X), atol=1e-5, rtol=0)
    width = sparse.forward_head(features, pre_logits=True).shape[1]
    assert width == sparse.head_hidden_size


def test_features_that_the_head_could_not_go_on_from_are_refused():
    sparse = sparsify(
        tiny_vit(class_token=False, global_pool="avg"), ASViTConfig(thresholds=0.06)
    ).eval()
    with pytest.raises(ConfigError, match="different numbers"):
        sparse.forward_features(X)
    assert sparse.forward_features(X[:1]).ndim == 3
    with pytest.raises(ConfigError, match="pools its tokens itself"):
        sparsify(tiny_vit(), STViTConfig(semantic_tokens=4)).eval().forward_features(X)


@pytest.mark.parametrize("make", [tiny_swin, tiny_convnext])
def test_intermediates_in_timms_manner(make):
    model = make()
    sparse = sparsify(model, DynamicSpatialConfig(stages=(1, 3), keep_ratio=(1.0, 1.0))).eval()
    for indices in (None, 2, [0, 3], [-1]):
        found = sparse.forward_intermediates(X, indices, intermediates_only=True)
        expected = model.forward_intermediates(X, indices, intermediates_only=True)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    last, maps = sparse.forward_intermediates(X)
    assert len(maps) == 4
    torch.testing.assert_close(last, model.forward_features(X), atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="output_fmt"):
        sparse.forward_intermediates(X, output_fmt="NHWC")


# --- facts are asked when they are needed ---


def test_another_backbone_is_run():
    sparse, other = dynamicvit(), tiny_vit()
    torch.nn.init.normal_(other.head.weight)
    before = sparse(X)
    sparse.backbone = other
    assert sparse.family.backbone is other
    assert not torch.equal(sparse(X), before)
    replica = sparse._replicate_for_data_parallel()
    replica._modules["backbone"] = other._replicate_for_data_parallel()
    assert replica.family.backbone is replica.backbone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: setattr(s, "backbone", tiny_vit(embed_dim=64)), "channels: 64, and 32"),
        (lambda s: setattr(s, "backbone", tiny_vit(depth=3)), "depth: 3, and 4"),
        (lambda s: setattr(s, "backbone", tiny_swin()), "does not run on the family 'swin'"),
        (lambda s: setattr(s, "backbone", nn.Linear(2, 2)), "Linear is not a backbone"),
        (lambda s: s.backbone.reset_classifier(0, ""), "global_pool=''"),
        (lambda s: s.reset_classifier(5, "avg"), "pools patches: True, and False"),
        (lambda s: setattr(s.backbone.blocks[2], "attn", nn.Identity()), "attention type Identity"),
        (lambda s: s.backbone.blocks.append(s.backbone.blocks[0]), "depth: 5, and 4"),
        (lambda s: setattr(s.backbone, "patch_drop", nn.Dropout()), "patch_drop"),
    ],
)
def test_a_backbone_that_changed_is_refused_at_the_next_call(change, message):
    sparse = dynamicvit()
    change(sparse)
    for call in (sparse, sparse.trace, lambda x: sparse.losses(x, TARGET), sparse.forward_features):
        with pytest.raises(UnsupportedBackboneError, match=message):
            call(X)


def test_distilled_training_is_refused_at_the_next_call():
    model = tiny_vit("deit_tiny_distilled_patch16_224")
    sparse = sparsify(model, DynamicViTConfig(stages=(1, 2)))
    model.set_distilled_training(True)
    with pytest.raises(UnsupportedBackboneError, match="distilled_training"):
        sparse.losses(X, TARGET)


def test_other_sizes_and_classes_are_followed():
    sparse = dynamicvit()
    sparse.set_input_size(img_size=64)
    assert sparse(images(2, 64)).shape == (2, 10)
    assert sparse.macs() > dynamicvit().macs()
    sparse.reset_classifier(3)
    assert sparse(images(2, 64)).shape == (2, 3)
    assert sparse.macs() < sparse.dense_macs()


# --- single faults ---


@each_case
def test_an_empty_batch_has_empty_answers(case, backbone):
    sparse = sparse_model(case, backbone)
    for mode in (False, True):
        out = sparse.train(mode)(X[:0])
        assert out.shape == (0, 10)
        out.sum().backward()
    trace = sparse.trace(X[:0])
    assert trace.logits.shape == (0, 10)
    assert trace.macs.shape == (0,)
    assert all(len(stage.kept) == 0 and len(stage.counts) == 0 for stage in trace.stages)
    with pytest.raises(InputError, match="empty"):
        sparse.losses(X[:0], TARGET[:0])
    for call in (sparse.forward_features, sparse.features, sparse.forward_intermediates):
        try:
            found = call(X[:0])
        except ConfigError:  # it has none, of any batch
            with pytest.raises(ConfigError):
                call(X)
            continue
        tensors = [found] if isinstance(found, torch.Tensor) else [*found]
        assert all(len(t) == 0 for t in tensors if isinstance(t, torch.Tensor))


def test_a_trace_leaves_every_module_in_its_mode():
    model = tiny_vit(proj_drop_rate=0.5).train()
    model.blocks.eval()
    sparse = sparsify(model, DynamicViTConfig(stages=(1, 2)))
    assert sparse.training
    assert not any(module.training for module in model.blocks.modules())
    model.eval()
    sparse.trace(X)
    assert sparse.training
    assert sparse.method.training
    assert not any(module.training for module in sparse.backbone.modules())


@each_case
def test_attributes_can_be_listed(case, backbone):
    for module in sparse_model(case, backbone).modules():
        inspect.getmembers(module)


@each_case
@pytest.mark.filterwarnings("ignore")
def test_jit_traces_fixed_counts_and_refuses_others(case, backbone):
    sparse = sparse_model(case, backbone)
    if {case, f"{case} on {backbone}"} & set(DECIDED_BY_IMAGES):
        with pytest.raises(ConfigError, match=r"torch\.jit\.trace"):
            torch.jit.trace(sparse, X, check_trace=False)
        return
    traced = torch.jit.trace(sparse, X, check_trace=False)
    y = images(3, seed=5)
    torch.testing.assert_close(traced(y), sparse(y), atol=1e-5, rtol=0)


@each_case
def test_every_parameter_that_asks_for_a_gradient_gets_one(case, backbone):
    sparse = sparse_model(case, backbone).train()
    losses = sparse.losses(X, TARGET, sparse.method.teach(sparse.family, X), generator=seeded(0))
    losses["total"].backward()
    missing = {n for n, p in sparse.named_parameters() if p.requires_grad and p.grad is None}
    assert not missing
    assert all(p.requires_grad for p in sparse.unwrap().parameters())


@pytest.mark.parametrize(
    "config",
    [
        ASViTConfig(thresholds=0.06),
        DynamicViTConfig(stages=(1, 2), threshold=0.5),
        SPViTConfig(stages=(1, 2), inference="threshold", threshold=0.5),
        SaiTConfig(mass=0.8),
    ],
    ids=lambda config: type(config).__name__,
)
def test_adaptive_models_are_exported_for_any_number_of_images(config):
    sparse = sparsify(tiny_vit(), config, generator=seeded(1)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(sparse, (X,), dynamic_shapes=({0: batch},)).module()
    for count in (1, 2, 7):
        y = images(count, seed=count)
        torch.testing.assert_close(exported(y), sparse(y), atol=1e-5, rtol=0)


@pytest.mark.parametrize("set_by", ["budget", "keep_ratio"])
def test_a_dial_is_turned_while_others_infer(set_by):
    sparse = dynamicvit()
    low, high, stop, found = (0.3, 0.3), (0.9, 0.9), threading.Event(), []

    def turn(which):
        if set_by == "budget":
            sparse.set_budget(0.5 if which == low else 0.75)
        else:
            sparse.set_keep_ratio(which)

    answers = []
    for which in (low, high):
        turn(which)
        answers.append(sparse(X))

    def infer():
        while not stop.is_set():
            found.append(sparse(X))

    thread = threading.Thread(target=infer)
    thread.start()
    for number in range(60):
        turn((low, high)[number % 2])
    stop.set()
    thread.join()
    assert found
    assert all(any(torch.equal(one, answer) for answer in answers) for one in found)


def test_models_on_meta_may_be_asked_whether_they_are_trained():
    with torch.device("meta"):
        sparse = sparsify(tiny_vit(), DynamicViTConfig(stages=(1, 2)))
    sparse.to_empty(device="cpu").load_state_dict(dynamicvit().state_dict())
    assert not sparse.is_untrained
    assert copy.deepcopy(sparse).eval()(X).shape == (3, 10)


def test_a_teacher_of_other_classes_and_a_missing_head_are_named():
    sparse = dynamicvit()
    teacher = sparse.method.teach(sparse.family, X)
    sparse.reset_classifier(5)
    with pytest.raises(InputError, match="gives 10 logits, and this model 5"):
        sparse.losses(X, None, teacher)
    sparse.reset_classifier(0)
    with pytest.raises(ConfigError, match="no classifier"):
        sparse.losses(X, TARGET)


def test_what_the_backbone_lacks_the_sparse_model_lacks_too():
    sparse = sparsify(tiny_pit(), CASES["spvit_pyramid"])
    assert not hasattr(sparse, "group_matcher")
    assert hasattr(dynamicvit(), "group_matcher")
