"""Models of transformers become timm models with the same numbers, and go back."""

from __future__ import annotations

import pytest
import torch
from timm.data import create_transform
from torch import nn
from torchvision.transforms import ToPILImage

from tests.conftest import forge, images, jitter, tiny_swin, tiny_vit
from vitrim import (
    CheckpointError,
    ConfigError,
    DenseConfig,
    DynamicSpatialConfig,
    DynamicViTConfig,
    MergingConfig,
    STViTConfig,
    UnsupportedBackboneError,
    as_transformers,
    from_pretrained,
    from_transformers,
    sparsify,
    sparsify_inside,
)

hf = pytest.importorskip("transformers")

X = images(2)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
NAMES = {"id2label": dict(enumerate("abcde")), "label2id": {c: i for i, c in enumerate("abcde")}}
DINO = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
TEXT |= {"intermediate_size": 16, "max_position_embeddings": 8, "projection_size": 32}


def vision(kind, **options):
    return getattr(hf, f"{kind}VisionConfig")(**SIZES, **options)


def two_towers(kind):
    config = getattr(hf, f"{kind}Config")(
        text_config=TEXT | {"eos_token_id": 2}, vision_config=SIZES, projection_dim=24
    )
    return getattr(hf, f"{kind}Model")(config)


MODELS = {
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SIZES), add_pooling_layer=False),
    "vit classifier": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, **NAMES)),
    "vit without qkv bias": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(**SIZES, **NAMES, qkv_bias=False, hidden_act="gelu_new")
    ),
    "deit": lambda: hf.DeiTModel(hf.DeiTConfig(**SIZES), add_pooling_layer=False),
    "deit classifier": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**SIZES, **NAMES)),
    "deit distilled": lambda: hf.DeiTForImageClassificationWithTeacher(
        hf.DeiTConfig(**SIZES, **NAMES)
    ),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO, mlp_ratio=2)),
    "dinov2 swiglu": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO, use_swiglu_ffn=True)),
    "dinov2 with registers": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)
    ),
    "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SIZES)),
    "dinov3 with registers": lambda: hf.DINOv3ViTModel(
        hf.DINOv3ViTConfig(**SIZES, num_register_tokens=3, use_gated_mlp=True, hidden_act="silu")
    ),
    "dinov3 without biases": lambda: hf.DINOv3ViTModel(
        hf.DINOv3ViTConfig(**SIZES, query_bias=False, value_bias=False)
    ),
    "clip": lambda: hf.CLIPVisionModel(vision("CLIP")),
    "clip projected": lambda: hf.CLIPVisionModelWithProjection(vision("CLIP", projection_dim=24)),
    "clip with text": lambda: two_towers("CLIP"),
    "siglip": lambda: hf.SiglipVisionModel(vision("Siglip")),
    "siglip without a head": lambda: hf.SiglipVisionModel(vision("Siglip", vision_use_head=False)),
    "siglip classifier": lambda: hf.SiglipForImageClassification(
        hf.SiglipConfig(vision_config=SIZES, **NAMES)
    ),
    "siglip with text": lambda: two_towers("Siglip"),
}


def made(name):
    torch.manual_seed(0)
    return jitter(MODELS[name]()).eval()


def tower_of(model):
    return next(
        (getattr(model, n) for n in ("vit", "deit", "vision_model") if hasattr(model, n)), model
    )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_twin_has_the_models_numbers(name):
    model = made(name)
    sparse = from_transformers(model)
    tower = tower_of(model)(X)
    hidden = tower.last_hidden_state
    if "clip" in name and "siglip" not in name:
        hidden = tower_of(model).post_layernorm(hidden)
    torch.testing.assert_close(sparse.backbone.forward_features(X), hidden, atol=1e-5, rtol=1e-5)
    answer = sparse(X)
    if "classifier" in name or name in ("vit without qkv bias", "deit distilled"):
        torch.testing.assert_close(answer, model(X).logits, atol=1e-5, rtol=1e-5)
        assert sparse.labels == tuple("abcde")
    elif name == "clip projected":
        torch.testing.assert_close(answer, model(X).image_embeds, atol=1e-5, rtol=1e-5)
    elif hasattr(model, "get_image_features"):
        due = model.get_image_features(X).pooler_output
        torch.testing.assert_close(answer, due, atol=1e-5, rtol=1e-5)
    elif tower.pooler_output is not None:
        torch.testing.assert_close(answer, tower.pooler_output, atol=1e-5, rtol=1e-5)


def test_a_twin_is_saved_and_read_back(tmp_path):
    model = made("vit classifier")
    sparse = from_transformers(model, MergingConfig(keep_ratio=0.6))
    assert "ViTForImageClassification" in sparse.origin
    sparse.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert torch.equal(again(X), sparse(X))
    assert again.labels == sparse.labels == tuple("abcde")
    assert again.backbone.norm.eps == 1e-12  # which no name of timm's has
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert not torch.equal(sparse.backbone.head.weight, model.classifier.weight)  # a copy


def test_a_saved_models_labels_are_checked(tmp_path):
    from_transformers(made("vit classifier")).save_pretrained(tmp_path)
    forge(tmp_path, lambda config: config["labels"].append("f"))
    with pytest.raises(CheckpointError, match="6 labels for 5 classes"):
        from_pretrained(tmp_path)
    forge(tmp_path, lambda config: config.update(labels=[1] * 5))
    with pytest.raises(CheckpointError, match="a list of texts is due"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.vit.layers[1].mlp, "activation_fn", nn.ReLU()),
        lambda m: setattr(m.vit.layers[0].attention, "scaling", 0.5),
        lambda m: m.classifier.register_forward_hook(lambda _m, _x, y: y * 1.01),
        lambda m: setattr(m.vit.layernorm, "eps", 0.1),
    ],
)
def test_a_model_that_is_not_as_its_config_says_is_refused(change):
    model = made("vit classifier")
    change(model)
    with pytest.raises(UnsupportedBackboneError, match="gives another"):
        from_transformers(model)


def test_a_model_with_other_weights_is_refused():
    model = made("vit classifier")
    model.vit.layers[0].extra = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="unexpected layers"):
        from_transformers(model)


@pytest.mark.parametrize(
    "name", ["vit", "dinov2", "dinov2 with registers", "dinov3", "clip", "siglip"]
)
@torch.no_grad()
def test_positions_are_interpolated_as_transformers_does(name):
    model = made(name)
    sparse = from_transformers(model, image_size=(48, 64))
    x = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    options = {} if "dino" in name else {"interpolate_pos_encoding": True}
    hidden = model(x, **options).last_hidden_state
    hidden = model.post_layernorm(hidden) if name == "clip" else hidden
    torch.testing.assert_close(sparse.backbone.forward_features(x), hidden, atol=1e-5, rtol=1e-5)
    assert sparse.data_config["input_size"] == (3, 48, 64)


PROCESSORS = {
    "ViTImageProcessor": {"size": {"height": 32, "width": 32}},
    "DeiTImageProcessor": {"size": {"height": 40, "width": 40}, "crop_size": 32},
    "BitImageProcessor": {"size": {"shortest_edge": 37}, "crop_size": 32},
    "CLIPImageProcessor": {"size": {"shortest_edge": 32}, "crop_size": 32},
    "SiglipImageProcessor": {"size": {"height": 32, "width": 32}},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_prepared_as_the_processor_does(name):
    processor = getattr(hf, name)(**PROCESSORS[name])
    sparse = from_transformers(made("vit"), processor=processor)
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(1, 3, 6, 7, generator=generator)
    smooth = nn.functional.interpolate(smooth, (60, 75), mode="bicubic").clamp(0, 1)[0]
    picture = ToPILImage()(smooth)
    ours = create_transform(**sparse.data_config)(picture)
    theirs = processor(picture, return_tensors="pt").pixel_values[0]
    assert (ours - theirs).abs().max() < 0.05  # of a width of 1: they resize bytes otherwise


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_resize": False}, "has no word"),
        ({"size": {"longest_edge": 40}}, "has no word|longest"),
        ({"do_center_crop": False}, "has no word"),
        ({"rescale_factor": 1 / 127.5}, "expected 1/255"),
    ],
)
def test_what_timm_has_no_word_for_is_refused(options, message):
    processor = hf.CLIPImageProcessor(
        **({"size": {"shortest_edge": 32}, "crop_size": 32} | options)
    )
    with pytest.raises(ConfigError, match=message):
        from_transformers(made("clip"), processor=processor)


# --- and back ---


@pytest.mark.parametrize(
    "name", ["vit classifier", "dinov2 with registers", "dinov3", "clip", "siglip"]
)
@torch.no_grad()
def test_as_transformers_gives_the_models_outputs(name):
    model = made(name)
    back = as_transformers(from_transformers(model))
    assert isinstance(back, hf.PreTrainedModel)
    output, due = back(pixel_values=X), tower_of(model)(X)
    torch.testing.assert_close(
        output.last_hidden_state, due.last_hidden_state, atol=1e-5, rtol=1e-5
    )
    if name == "vit classifier":
        answer = model(X, labels=torch.tensor([1, 2]))
        found = back(X, labels=torch.tensor([1, 2]))
        torch.testing.assert_close(found.logits, answer.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.loss, answer.loss, atol=1e-5, rtol=1e-5)
        assert back.config.id2label == model.config.id2label
    else:
        torch.testing.assert_close(output.pooler_output, due.pooler_output, atol=1e-5, rtol=1e-5)
        assert output.logits is None
    assert back(X, return_dict=False)[-1].shape == output.pooler_output.shape


@torch.no_grad()
def test_dropped_patches_are_where_and_as_they_were():
    sparse = from_transformers(made("vit"), DynamicViTConfig(stages=(1,), keep_ratio=0.5))
    output = as_transformers(sparse)(X)
    assert output.last_hidden_state.shape == (2, 17, 32)
    map_BCHW = sparse.features(X)[0]
    due = sparse.backbone.norm(map_BCHW.flatten(2).transpose(1, 2))
    assert torch.equal(output.last_hidden_state[:, 1:], due)
    kept = sparse.trace(X).stages[-1].kept[0]
    inside = sparse.forward_features(X)[0, 1:]
    torch.testing.assert_close(
        due[0, kept].sort(0).values, inside.sort(0).values, atol=1e-5, rtol=1e-5
    )
    found = sparse.embeddings(X)
    torch.testing.assert_close(found.pooled, sparse(X), atol=1e-5, rtol=1e-5)
    assert torch.equal(found.pooled, output.pooler_output)
    assert sparse.embeddings(X[:0]).patches.shape == (0, 16, 32)


def test_a_pooler_is_kept_by_whoever_reads_it():
    torch.manual_seed(0)
    model = hf.ViTModel(hf.ViTConfig(**SIZES)).eval()
    with pytest.warns(UserWarning, match="pooler of this ViTModel is in no timm model"):
        sparse = from_transformers(model)
    with torch.no_grad():
        back = as_transformers(sparse, pooler=model.pooler)(X)
        due = model(X).pooler_output
        torch.testing.assert_close(back.pooler_output, due, atol=1e-5, rtol=1e-5)


def test_what_a_sparse_model_has_not_is_refused():
    back = as_transformers(from_transformers(made("vit")))
    with pytest.raises(ConfigError, match="does not serve output_hidden_states"):
        back(X, output_hidden_states=True)
    stvit = from_transformers(made("vit"), STViTConfig(semantic_tokens=4))
    with pytest.raises(ConfigError, match="map"):
        as_transformers(stvit)(X)
    assert as_transformers(stvit, logits_only=True)(X).logits.shape == (2, 32)
    with pytest.raises(UnsupportedBackboneError, match="no sparse model"):
        as_transformers(tiny_vit())
    with pytest.raises(ConfigError, match="plain vision transformers"):
        sparsify(tiny_swin(), DynamicSpatialConfig()).eval().embeddings(X)


def test_the_image_classification_pipeline_runs(caplog):
    sparse = from_transformers(made("vit classifier"), MergingConfig(keep_ratio=0.6))
    processor = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    pipe = hf.pipeline(
        "image-classification", model=as_transformers(sparse), image_processor=processor
    )
    picture = ToPILImage()(torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0)))
    found = pipe(picture, top_k=5)
    inputs = processor(picture, return_tensors="pt").pixel_values
    shares = sparse(inputs).detach().softmax(-1)[0]
    assert {entry["label"] for entry in found} == set("abcde")
    for entry in found:
        assert entry["score"] == pytest.approx(
            float(shares["abcde".index(entry["label"])]), abs=1e-5
        )
    assert "not supported" not in caplog.text


def test_a_model_learns_through_transformers_loss():
    sparse = from_transformers(
        made("vit classifier").train(), DynamicViTConfig(stages=(1,), keep_ratio=0.6)
    )
    back = as_transformers(sparse)
    back(X, labels=torch.tensor([1, 2])).loss.backward()
    assert sparse.backbone.blocks[0].attn.qkv.weight.grad is not None


@pytest.mark.parametrize("name", ["clip with text", "siglip with text"])
@torch.no_grad()
def test_zero_shot_runs_on_a_tower_made_sparse_in_its_place(name):
    model = made(name)
    words = torch.tensor([[1, 5, 9, 2], [1, 7, 3, 2]])
    due = model(input_ids=words, pixel_values=X)
    sparse = sparsify_inside(model, DenseConfig())
    found = model(input_ids=words, pixel_values=X)
    torch.testing.assert_close(found.logits_per_image, due.logits_per_image, atol=1e-4, rtol=1e-5)
    sparse.unwrap()
    fewer = made(name)
    inside = sparsify_inside(fewer, MergingConfig(keep_ratio=0.5))
    assert inside.macs() < 0.8 * inside.dense_macs()
    other = fewer.get_image_features(X).pooler_output
    assert other.shape == model.get_image_features(X).pooler_output.shape
    assert fewer(input_ids=words, pixel_values=X).logits_per_image.shape == (2, 2)


@pytest.mark.parametrize("head", ["Dinov2ForImageClassification", "CLIPForImageClassification"])
@torch.no_grad()
def test_heads_that_timm_has_not_stay_around_the_tower(head):
    torch.manual_seed(0)
    config = hf.Dinov2Config(**DINO, **NAMES)
    if "CLIP" in head:
        config = hf.CLIPConfig(text_config=TEXT, vision_config=SIZES, **NAMES)
    model = jitter(getattr(hf, head)(config)).eval()
    with pytest.raises(UnsupportedBackboneError, match="sparsify_inside"):
        from_transformers(model)
    due = model(X).logits
    sparsify_inside(model, DenseConfig())
    torch.testing.assert_close(model(X).logits, due, atol=1e-5, rtol=1e-5)


def test_other_models_of_transformers_are_refused_by_name():
    model = hf.ResNetModel(hf.ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=4))
    with pytest.raises(UnsupportedBackboneError, match="a ResNetModel has no twin in timm"):
        from_transformers(model)
    with pytest.raises(UnsupportedBackboneError, match="is a name; load the model first"):
        from_transformers("google/vit-base-patch16-224")
    with pytest.raises(UnsupportedBackboneError, match="from_transformers"):
        sparsify(made("vit"), DenseConfig())
    with pytest.raises(UnsupportedBackboneError, match="from_transformers converts it"):
        sparsify_inside(made("vit"), DenseConfig())


@torch.no_grad()
def test_a_timm_model_inside_transformers_is_made_sparse_in_its_place():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    config = hf.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=5
    )
    torch.manual_seed(0)
    model = hf.TimmWrapperForImageClassification(config).eval()
    due = model(X).logits
    with pytest.raises(UnsupportedBackboneError, match="sparsify_inside"):
        sparsify(model, DenseConfig())
    sparse = sparsify_inside(model, DenseConfig())
    assert model.timm_model is sparse
    torch.testing.assert_close(model(X).logits, due, atol=1e-5, rtol=1e-5)
    assert model(X, output_hidden_states=True).hidden_states[0].shape == (2, 32, 4, 4)
    with pytest.raises(UnsupportedBackboneError, match="sparse already"):
        sparsify_inside(model, DenseConfig())
