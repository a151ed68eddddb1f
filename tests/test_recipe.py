"""Recipes: what is packaged, what overrides do, and what bad ones are told."""

from __future__ import annotations

import json

import pytest

from tests.training import tiny_recipe
from vitrim import ConfigError, DynamicViTConfig
from vitrim.config import to_plain
from vitrim.train.recipe import list_recipes, load_recipe, recipe_from_plain


def test_every_packaged_recipe_is_read_and_described():
    recipes = list_recipes()
    assert {"dynamicvit-deit-t", "dynamicvit-deit-s", "dynamicvit-deit-b"} <= recipes.keys()
    assert {"dynamicvit-adapt", "digits-dense", "digits-dynamicvit"} <= recipes.keys()
    for name, description in recipes.items():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert description == recipe.description != ""


@pytest.mark.parametrize(
    ("name", "ratio_weight", "drop_path"), [("s", 2.0, {}), ("b", 5.0, {"drop_path_rate": 0.2})]
)
def test_the_published_recipe(name, ratio_weight, drop_path):
    recipe = load_recipe(f"dynamicvit-deit-{name}")
    assert recipe.method.build() == DynamicViTConfig(keep_ratio=0.7, ratio_weight=ratio_weight)
    assert recipe.model.kwargs == drop_path
    optim, augment, run = recipe.optim, recipe.augment, recipe.run
    assert (optim.lr, optim.lr_batch, optim.backbone_lr_scale) == (1e-3, None, 0.01)
    assert (optim.freeze_backbone_epochs, optim.warmup_epochs, optim.min_lr) == (5, 5, 1e-6)
    assert (optim.train_embeddings, optim.weight_decay, optim.clip_grad) == (False, 0.05, None)
    assert (optim.ema_decay, run.epochs, run.precision) == (0.9999, 30, "fp32")
    assert (augment.mixup, augment.cutmix, augment.label_smoothing) == (0.8, 1.0, 0.1)
    assert (augment.random_erase, augment.rand_augment) == (0.25, "rand-m9-mstd0.5-inc1")
    assert recipe.data.batch_size * 8 == 1024


def test_overrides_are_toml_or_bare_words():
    overrides = [
        "method.keep_ratio=0.6",
        "optim.lr=1e-4",
        "data.train=/my/images",
        "optim.ema_decay=none",
        "optim.betas=[0.8, 0.9]",
        "data.labels=true",
        "model.kwargs.drop_path_rate=0.1",
    ]
    recipe = load_recipe("dynamicvit-deit-s", overrides)
    assert recipe.method.build().keep_ratio == 0.6
    assert recipe.optim.lr == 1e-4
    assert recipe.optim.ema_decay is None
    assert recipe.optim.betas == (0.8, 0.9)
    assert recipe.data.train == "/my/images"
    assert recipe.model.kwargs == {"drop_path_rate": 0.1}


def test_a_file_and_its_plain_form_agree(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\n[model]\nname = "x"\n[data]\ntrain = "y"\n[run]\nepochs = 1\n')
    recipe = load_recipe(file)
    assert recipe.method.name is None
    assert recipe_from_plain(json.loads(json.dumps(to_plain(recipe)))) == recipe
    sparse = tiny_recipe("z", method__keep_ratio=0.5)
    assert recipe_from_plain(json.loads(json.dumps(to_plain(sparse)))) == sparse


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.learning_rate=1"], "unknown key 'optim.learning_rate'"),
        (["optim.warmup_epoch=1"], "did you mean 'warmup_epochs'"),
        (["method.keep_ratoi=0.6"], "did you mean 'keep_ratio'"),
        (["method.keep_ratio=1.5"], "keep_ratio is 1.5"),
        (["method.name=dynamicvitt"], "did you mean 'dynamicvit'"),
        (["run.precision=int8"], "run.precision is 'int8'; use one of"),
        (["run.epochs=0"], "run.epochs is 0; expected 1 or more"),
        (["data.max_unreadable=2"], "expected a share from 0 to 1"),
        (["optim.ema_decay=1.5"], "optim.ema_decay is 1.5"),
        (["augment.scale=[1.0, 0.5]"], "the smaller first"),
        (["model.weights=a.safetensors"], "model.pretrained and model.weights are both set"),
        (["optim"], "'optim' is no override"),
        (["name.x=1"], "which is no table"),
        (["data.labels=false", "model.teacher=false"], "a teacher must say what to learn"),
    ],
)
def test_bad_values_name_the_recipe_and_the_value(overrides, message):
    with pytest.raises(ConfigError, match="recipe dynamicvit-deit-s with") as caught:
        load_recipe("dynamicvit-deit-s", overrides)
    assert message in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'digits-dense'"):
        load_recipe("digit-dense")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(ConfigError, match=r"broken.toml is no TOML file"):
        load_recipe(broken)
    for damage in ("[" * 100_000, "1" * 5000):
        broken.write_text(f"name = {damage}")
        with pytest.raises(ConfigError, match=r"broken.toml is no TOML file"):
            load_recipe(broken)
    with pytest.raises(ConfigError, match="no recipe"):
        load_recipe(tmp_path)
    broken.write_text('name = "x"\n[model]\nname = "y"\n[run]\nepochs = 1\n')
    with pytest.raises(ConfigError, match=r"broken.toml: the recipe has no 'data'"):
        load_recipe(broken)
    broken.write_text('name = "x"\n[model]\nname = "y"\n[data]\nval = "z"\n[run]\nepochs = 1\n')
    with pytest.raises(ConfigError, match=r"the recipe has no data.train"):
        load_recipe(broken)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "is damaged"),
        (b"name = " + b"[" * 100_000, "is no TOML file"),
        (b"name = " + b"1" * 5000, "is no TOML file"),
        (b"seed = 0x" + b"f" * 5000, "more than 64 bits"),
        (b".".join([b"a"] * 50_000) + b" = 1", "49999 dots"),
        (b"# " * 100_000, "larger than"),
        (b".".join([b"a"] * 40) + b" = 1", "nested deeper"),
        (b"description = 2026-11-30", "JSON has no word for"),
        (b"method = [1]", "method is \\[1\\]"),
        (b"[method]\nconfig = 3", "method.config is 3"),
        (b"[method]\nname = 'dynamicvit'\nschedule = 3", "method.schedule is 3"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content, message):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


@pytest.mark.parametrize("content", [None, 3, "text", ["text"], [["a", 1]]])
def test_a_plain_form_that_is_no_table_is_refused(content):
    with pytest.raises(ConfigError, match="a table was expected"):
        recipe_from_plain(content)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[" * 50_000, "is no value"),
        ("1" * 5000, "is no value"),
        ("[" * 40 + "]" * 40, "nested deeper"),
        ("0x" + "f" * 5000, "more than 64 bits"),
        ("nan", "optim.lr is nan"),
    ],
)
def test_a_damaged_override_is_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("digits-dense", [f"optim.lr={value}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.keep_ratio=0.7"], r"method\.name is not set, but its fields are: keep_ratio"),
        (["augment.scale=[0.5, 3]"], "shares end at 1"),
        (["augment.interpolation=foo"], "use one of 'bilinear'"),
        (["optim.lr=inf"], r"optim\.lr is inf"),
        (["data.image_size=-5"], r"data\.image_size is -5"),
        (["data.crop_pct=-1.0"], r"data\.crop_pct is -1"),
        (["optim.lr=1e38"], r"optim\.lr is 1e\+38; expected 1000000000 or less"),
        (["optim.weight_decay=1e300"], r"optim\.weight_decay is 1e\+300"),
        ([f"optim.lr=1{'0' * 400}"], "more than 64 bits"),
        ([f"optim.lr=1{'0' * 5000}"], "is no value"),
        (["optim.lr=" + "[" * 100_000], "is no value"),
        (["data.length=999999999999"], r"data\.length is 9+; expected 10000000 or less"),
        (["data.val_length=999999999999"], r"data\.val_length is 9+"),
        (["data.batch_size=999999999999"], r"data\.batch_size is 9+"),
        (["data.workers=100000"], r"data\.workers is 100000; expected 1000 or less"),
        (["run.epochs=999999999999"], r"run\.epochs is 9+"),
        (["run.seed=9999999999999999999"], "more than 64 bits"),
        (["data.crop_pct=1e-300"], r"data\.crop_pct is 1e-300; expected 0.01 to 1"),
        (["optim.lr_batch=0"], r"optim\.lr_batch is 0; expected 1 or more"),
    ],
)
def test_values_that_would_fail_later_fail_at_once(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("digits-dense", overrides)


def test_a_score_loss_needs_a_teacher():
    with pytest.raises(ConfigError, match="needs a teacher"):
        load_recipe("dynamicvit-adapt", ["model.teacher=false", "data.labels=true"])


def test_sparse_recipes_start_from_the_dense_model_of_their_family():
    for name in list_recipes():
        _, _, family = name.removeprefix("digits-").partition("-")
        if name.startswith("digits-") and family and load_recipe(name).task.name != "video":
            dense, sparse = load_recipe(f"digits-{family}").model, load_recipe(name).model
            assert (sparse.name, sparse.kwargs) == (dense.name, dense.kwargs), name


@pytest.mark.parametrize("name", ["hfds/someone/data", "hfids/x", "tfds/x", "HFDS/x"])
def test_a_recipes_file_does_not_send_us_to_a_hub(tmp_path, name):
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'name = "x"\n[model]\nname = "vit_tiny_patch16_224"\n[data]\ntrain = "{name}"\n'
        "[run]\nepochs = 1\n"
    )
    with pytest.raises(ConfigError, match=r"read from a hub; .* give it by hand"):
        load_recipe(path)
    path.write_text(path.read_text().replace(name, "digits"))
    assert load_recipe(path, [f"data.train={name}"]).data.train == name


@pytest.mark.parametrize(
    "kwargs", ["{ pretrained = true }", '{ checkpoint_path = "/etc/passwd" }', "{ depth = [[1]] }"]
)
def test_a_recipes_arguments_are_an_architectures(tmp_path, kwargs):
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'name = "x"\n[model]\nname = "vit_tiny_patch16_224"\nkwargs = {kwargs}\n[data]\n'
        'train = "digits"\n[run]\nepochs = 1\n'
    )
    with pytest.raises(ConfigError, match=r"model\.kwargs"):
        load_recipe(path)
