"""Exported bundles: as the model, whole or not there, and usable without torch."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torch import nn

import vitrim
from tests.conftest import images, seeded, tiny_vit
from tests.test_methods import sparse_model
from vitrim import (
    ASViTConfig,
    ConfigError,
    DenseConfig,
    DynamicViTConfig,
    InputError,
    MergingConfig,
    SaiTConfig,
    SPViTConfig,
    STViTConfig,
)
from vitrim.errors import CheckpointError, MissingExtraError
from vitrim.export.bundle import DTYPES, check, export, keeps_everything
from vitrim.predict import main
from vitrim.runtime import (
    BUNDLE_FILE,
    INTERPOLATIONS,
    Bundle,
    check_preprocessing,
    open_image,
    prepare,
)
from vitrim.train.data import eval_transform

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("openvino")

DATA = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}
FIXED = {
    "dense": DenseConfig(),
    "dynamicvit": DynamicViTConfig(stages=(1, 2), keep_ratio=0.6),
    "dynamicvit merging": DynamicViTConfig(stages=(1, 2), keep_ratio=0.6, merge_dropped=True),
    "merging": MergingConfig(stages=(1, 3), keep_ratio=0.6),
    "merging tome": MergingConfig.tome(2.5),
    "merging and dropping": MergingConfig(stages=(1, 2), action=("merge", "drop"), metric="keys"),
    "sait": SaiTConfig(selector="density", where="mid"),
    "spvit": SPViTConfig(stages=(1, 2), keep_ratio=0.6, inference="top_k"),
    "stvit": STViTConfig(semantic_tokens=(2, 3)),
    "stvit learned pooling": STViTConfig(semantic_tokens=4, pooling="intra_inter"),
}
ADAPTIVE = {
    "dynamicvit": DynamicViTConfig(stages=(1, 2), threshold=0.45),
    "asvit": ASViTConfig(thresholds=0.05),
    "asvit merging": ASViTConfig(thresholds=0.05, merge_dropped=True),
    "sait": SaiTConfig(min_kept=1, mass=0.6),
    "merging": MergingConfig(stages=(1, 2, 3), threshold=0.1),
    "spvit": SPViTConfig(stages=(1, 2), inference="threshold", threshold=0.45),
}


def sparse_vit(config, **kwargs):
    sparse = vitrim.sparsify(tiny_vit(**kwargs), config, generator=seeded(3)).eval()
    with torch.no_grad():  # fresh selectors tie to the last digits, and attention is all but equal
        for block in sparse.backbone.blocks:
            block.attn.qkv.weight.mul_(6)
        for parameter in sparse.method.parameters():
            parameter.mul_(16 if parameter.ndim > 1 else 1)
    return sparse


def exported(tmp_path, config, to="onnx", **options):
    sparse = sparse_vit(config)
    return sparse, export(sparse, tmp_path / "bundle", to, data_config=DATA, **options)


def same(sparse, folder, batch=5, x=None):
    found = check(sparse, folder, images(batch, seed=9) if x is None else x)
    assert found.images == batch
    assert found.difference < 1e-4
    assert found.agreement == 1


STRUCTURED = [
    ("dynamicvit", "lv-vit"),
    ("merging", "lv-vit"),
    ("dynamicvit", "rotary"),
    ("merging", "rotary per block"),
    ("stvit with prefix", "rotary"),
    ("dynamicvit", "naflex"),
    ("dynamic_spatial", "swin v2"),
    ("dynamic_spatial", "convolutions as mlp"),
    ("dynamic_spatial", "swin"),
    ("dynamic_spatial", "convnext"),
    ("spvit_pyramid fixed", "pit"),
    ("spvit_pyramid fixed", "swin"),
    ("stvit_r", "swin"),
    ("stvit_swin", "swin"),
]
"""Fixed counts on other families: a case and a backbone of the methods' contract."""


DECIDING = [
    ("asvit", "rotary"),
    ("asvit", "lv-vit"),
    ("sait mass", "lv-vit"),
    ("spvit", "lv-vit"),
    ("spvit_pyramid", "pit"),
    ("spvit_pyramid", "swin"),
]
"""The same where each image decides."""


def sharp(case, backbone):
    """A model whose selectors tell tokens apart: fresh ones tie to the last digits."""
    sparse = sparse_model(case, backbone)
    with torch.no_grad():
        for parameter in sparse.method.parameters():
            parameter.mul_(16 if parameter.ndim > 1 else 1)
    return sparse


@pytest.mark.parametrize(("case", "backbone"), DECIDING)
def test_counts_per_image_on_other_families(case, backbone, tmp_path):
    sparse = sharp(case, backbone)
    folder = export(sparse, tmp_path / "bundle", "onnx", data_config=DATA)
    assert Bundle(folder).batch == 1
    same(sparse, folder)


def decided(sparse, batch):
    """Images whose scores part at every cut: of scores that are equal to the last digits, either
    may be kept, whatever torch drew for the selectors.
    """
    x = images(64, seed=9)
    clear = torch.ones(len(x), dtype=torch.bool)
    for stage in sparse.trace(x).stages:
        scores, count = stage.scores.nan_to_num(-torch.inf), int(stage.counts[0])
        falling = scores.sort(1, descending=True).values
        if stage.assignment is None and count < falling.shape[1]:
            clear &= falling[:, count - 1] - falling[:, count] > 5e-6
    assert clear.sum() >= batch
    return x[clear][:batch]


@pytest.mark.parametrize(("case", "backbone"), STRUCTURED)
def test_fixed_counts_on_other_families(case, backbone, tmp_path):
    sparse = sharp(case, backbone)
    folder = export(sparse, tmp_path / "bundle", "onnx", data_config=DATA)
    for batch in (1, 2, 5):
        same(sparse, folder, batch, decided(sparse, batch))
    check_sizes_are_known(folder / "model.onnx")


def check_sizes_are_known(path):
    """No branch or loop, and every TopK takes a number that is written in the network."""
    graph = onnx.load(path).graph
    known = {each.name for each in graph.initializer}
    known |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    for node in graph.node:
        assert node.op_type not in {"If", "Loop", "Scan", "NonZero", "Unique", "Compress"}
        assert node.op_type != "TopK" or node.input[1] in known


@pytest.mark.parametrize("name", FIXED)
def test_fixed_counts_take_any_batch(name, tmp_path):
    sparse, folder = exported(tmp_path, FIXED[name])
    assert Bundle(folder).batch is None
    for batch in (1, 2, 5):
        same(sparse, folder, batch)
    check_sizes_are_known(folder / "model.onnx")


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_heads_that_pool_merged_tokens(pool, tmp_path):
    sparse = sparse_vit(FIXED["merging"], class_token=False, global_pool=pool)
    folder = export(sparse, tmp_path / "bundle", "onnx", data_config=DATA)
    for batch in (1, 16):
        same(sparse, folder, batch)


@pytest.mark.parametrize("batch", [None, 1])
def test_products_take_as_few_operations_as_can_be(batch, tmp_path):
    """Weights in Gemm, which adds the bias; attention's two products, and in the exact last block
    those with the weights of keys and values; no sizes asked for in it.
    """
    sparse, folder = exported(tmp_path, FIXED["dynamicvit"], batch=batch)
    found = Counter(node.op_type for node in onnx.load(folder / "model.onnx").graph.node)
    linear = sum(isinstance(module, nn.Linear) for module in sparse.modules())
    assert found["Gemm"] == linear
    assert found["MatMul"] == 2 * len(sparse.backbone.blocks) + 2
    assert found["Shape"] == (batch is None)  # how many images there are


@pytest.mark.parametrize("name", ADAPTIVE)
def test_counts_per_image_take_one_image(name, tmp_path):
    sparse, folder = exported(tmp_path, ADAPTIVE[name])
    assert Bundle(folder).batch == 1
    counts = {tuple(stage.counts.tolist()) for stage in sparse.trace(images(5, seed=9)).stages}
    assert any(len(set(stage)) > 1 for stage in counts)
    same(sparse, folder)
    operations = {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}
    assert not operations & {"If", "Loop"}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_counts_per_image_in_batches(name, tmp_path):
    """Padded to the fullest image of each call; the last call is filled up."""
    sparse, folder = exported(tmp_path, ADAPTIVE[name], batch=3)
    assert Bundle(folder).batch == 3
    same(sparse, folder, batch=8)


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_counts_per_image_in_batches_without_a_class_token(pool, tmp_path):
    sparse = sparse_vit(ADAPTIVE["asvit"], class_token=False, global_pool=pool)
    folder = export(sparse, tmp_path / "bundle", "onnx", data_config=DATA, batch=2)
    same(sparse, folder, batch=6)


DROPS_ALL = {
    "dynamicvit": DynamicViTConfig(stages=(1, 2), threshold=0.999),
    "asvit": ASViTConfig(thresholds=0.5),
    "asvit merging": ASViTConfig(thresholds=0.5, merge_dropped=True),
    "spvit": SPViTConfig(stages=(1, 2), inference="threshold", threshold=0.9999),
}


@pytest.mark.parametrize("name", DROPS_ALL)
def test_images_that_keep_nothing(name, tmp_path):
    sparse = sparse_vit(DROPS_ALL[name])
    with torch.no_grad():  # whatever values torch drew
        for layer in sparse.method.modules():
            if isinstance(layer, nn.Linear) and layer.out_features == 2:
                layer.bias.copy_(torch.tensor([-40.0, 40.0]))
    folder = export(sparse, tmp_path / "bundle", "onnx", data_config=DATA)
    assert not any(stage.counts.any() for stage in sparse.trace(images(5, seed=9)).stages)
    same(sparse, folder)


def test_images_that_keep_nothing_in_int8(tmp_path):
    sparse, folder = exported(tmp_path, DROPS_ALL["asvit"], dtype="int8", images=images(40))
    assert check(sparse, folder, images(8, seed=9)).difference < 0.2


def test_dense_models_go_the_same_way(tmp_path):
    dense = tiny_vit()
    folder = export(dense, tmp_path / "bundle", "onnx", data_config=DATA)
    same(dense, folder)
    described = json.loads((folder / BUNDLE_FILE).read_text())["model"]
    assert described["method"] is None
    assert described["macs"] == described["dense_macs"] > 0


@pytest.mark.parametrize("name", ["dynamicvit", "merging"])
def test_executorch(name, tmp_path):
    pytest.importorskip("executorch")
    sparse, folder = exported(tmp_path, FIXED[name], "executorch")
    same(sparse, folder, batch=2)


def test_an_absent_executorch_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    name = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="export-executorch"):
        exported(tmp_path, FIXED["dynamicvit"], "executorch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["pt2", "openvino"])
@pytest.mark.parametrize(
    "config",
    [FIXED["dense"], FIXED["dynamicvit"], FIXED["merging"], ADAPTIVE["asvit"]],
    ids=["dense", "fixed", "merging", "own"],
)
def test_other_formats(to, config, tmp_path):
    sparse, folder = exported(tmp_path, config, to)
    same(sparse, folder)


@pytest.mark.parametrize(
    ("to", "dtype"), [(to, dtype) for to, dtypes in DTYPES.items() for dtype in dtypes[1:]]
)
def test_other_precisions(to, dtype, tmp_path):
    sparse, folder = exported(tmp_path, FIXED["stvit"], to, dtype=dtype, images=images(40))
    found = check(sparse, folder, images(8, seed=9))
    assert 1e-7 < found.difference < 0.1
    assert sparse.backbone.head.weight.dtype == torch.float32  # the model is as it was


@pytest.mark.parametrize(("dtype", "hint"), [("fp32", "f32"), ("fp16", "f16"), ("bf16", "bf16")])
def test_openvino_is_told_the_precision(dtype, hint, tmp_path, monkeypatch):
    """Left to itself it computes in bfloat16 where the processor can, and parity is lost."""
    import openvino

    _, folder = exported(tmp_path, FIXED["sait"], "openvino", dtype=dtype, batch=1)
    configs = []

    class Core(openvino.Core):
        def compile_model(self, model, device, config):
            configs.append(config)
            return super().compile_model(model, device, config)

    monkeypatch.setattr(openvino, "Core", Core)
    Bundle(folder)(np.zeros((1, 3, 32, 32), np.float32))
    assert [config["INFERENCE_PRECISION_HINT"] for config in configs] == [hint]


@pytest.mark.parametrize("name", ["dynamicvit", "dense", "merging", "dynamicvit merging"])
def test_a_batch_that_is_not_a_whole_number_of_calls(tmp_path, name):
    """Of as many images as the model has heads, which an exporter once took for each other."""
    sparse, folder = exported(tmp_path, FIXED[name], batch=2)
    assert Bundle(folder).batch == 2 == sparse.backbone.blocks[0].attn.num_heads
    same(sparse, folder, batch=5)


@pytest.mark.parametrize("size", [(40, 60), (61, 47), (32, 32), (300, 33)])
def test_preprocessing_is_the_one_of_evaluation(size):
    pixels = torch.randint(0, 256, (*size, 3), generator=seeded(1), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    for config in (DATA, DATA | {"interpolation": "bilinear", "crop_pct": 1.0}):
        wanted = eval_transform(config)(image).numpy()
        np.testing.assert_allclose(prepare(image, config), wanted, atol=1e-6)


def test_the_bundle_says_what_it_is(tmp_path):
    sparse, folder = exported(tmp_path, FIXED["sait"], labels=[f"class {i}" for i in range(10)])
    described = json.loads((folder / BUNDLE_FILE).read_text())
    assert described["model"]["method"] == "sait"
    assert described["model"]["macs"] == sparse.macs()
    assert Bundle(folder).labels[3] == "class 3"


def site_without_torch(folder):
    """A folder of packages with numpy, Pillow, onnxruntime and vitrim, and nothing else."""
    folder.mkdir()
    for module in (np, PIL, onnxruntime, vitrim):
        package = Path(module.__file__).parent
        (folder / package.name).symlink_to(package)
    for libraries in Path(PIL.__file__).parents[1].glob("*.libs"):  # of numpy and Pillow
        (folder / libraries.name).symlink_to(libraries)
    return folder


def test_predicts_without_torch(tmp_path):
    sparse, folder = exported(tmp_path, FIXED["dynamicvit"], labels=list("abcdefghij"))
    noise = torch.randint(0, 256, (50, 40, 3), generator=seeded(2), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "image.png")
    site = site_without_torch(tmp_path / "site")

    def run(*words):
        return subprocess.run(
            [sys.executable, "-S", *words], capture_output=True, text=True, env={"PYTHONPATH": site}
        )

    assert "No module named 'torch'" in run("-c", "import torch").stderr
    words = ["-m", "vitrim", "predict", folder, tmp_path / "image.png", "--top", "1"]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "image.png") as image:
        best = sparse(eval_transform(DATA)(image.convert("RGB"))[None]).argmax()
    assert f"image.png: {'abcdefghij'[best]} " in done.stdout
    assert run(*words[:3], tmp_path / "none", tmp_path / "image.png").returncode == 2


def test_untrained_thresholds_that_keep_everything_are_noticed():
    assert keeps_everything(sparse_vit(ASViTConfig(thresholds=1e-9)), images(2))
    assert not keeps_everything(sparse_vit(ADAPTIVE["asvit"]), images(2))


def test_what_cannot_be_exported_says_why(tmp_path):
    def refused(error, pattern, config=FIXED["sait"], to="onnx", **options):
        with pytest.raises(error, match=pattern):
            exported(tmp_path, config, to, **options)
        assert not list(tmp_path.iterdir())

    refused(ConfigError, "did you mean 'onnx'", to="onx")
    refused(ConfigError, "executorch needs sizes", ADAPTIVE["asvit"], to="executorch")
    refused(ConfigError, "int8 is written by onnx", to="openvino", dtype="int8")
    refused(InputError, "32 images or more; found 8", dtype="int8", images=images(8))
    (tmp_path / "bundle").mkdir()
    with pytest.raises(InputError, match="exists already"):
        exported(tmp_path, FIXED["sait"])
    sparse = sparse_vit(FIXED["sait"])
    with pytest.raises(ConfigError, match="crop from the centre"):
        export(sparse, tmp_path / "b", "onnx", data_config=DATA | {"crop_mode": "border"})


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("vitrim.export.formats.write_onnx", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exported(tmp_path, FIXED["sait"])
    assert not list(tmp_path.iterdir())


def test_damaged_bundles(tmp_path):
    with pytest.raises(CheckpointError, match="no exported bundle"):
        Bundle(tmp_path)
    _, folder = exported(tmp_path, FIXED["sait"])
    (folder / "model.onnx").write_bytes(b"truncated")
    with pytest.raises(CheckpointError, match="cannot load"):
        Bundle(folder)
    (folder / "model.onnx").unlink()
    with pytest.raises(CheckpointError, match="lacks model"):
        Bundle(folder)
    other = '{"format": "other", "version": 1}'
    long = '{"batch": 1' + "0" * 30 + "}"
    for text, words in (
        ("{", "damaged"),
        (other, "lacks batch"),
        ("[1]", "no table"),
        (long, "more than 64 bits"),
    ):
        (folder / BUNDLE_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=words):
            Bundle(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A bundle, the description in it, and what is not to be read, beside it."""
    folder = tmp_path_factory.mktemp("whole")
    exported(folder, FIXED["sait"], batch=2, labels=list("abcdefghij"))
    (folder / "secret.onnx").write_bytes((folder / "bundle" / "model.onnx").read_bytes())
    return folder / "bundle", json.loads((folder / "bundle" / BUNDLE_FILE).read_text())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("file", value) for value in ("../secret.onnx", "", "..", "sub/model.onnx", 3, None)),
        ("file", BUNDLE_FILE),
        *(("runtime", value) for value in ([], None, 1, {"onnxruntime": 1})),
        *(("dtype", value) for value in ("fp31", None, ["fp32"])),
        *(("batch", value) for value in (0, -1, True, 2.0, "2", 10**6, [2])),
        *(("labels", value) for value in ({}, "abcdefghij", [1, 2], [None] * 10, 3)),
        *(("preprocessing", value) for value in (None, [], {}, "bicubic")),
    ],
)
def test_every_field_of_a_bundle_is_checked(whole, tmp_path, field, value):
    folder, description = whole
    shutil.copytree(folder, tmp_path / "bundle")
    (tmp_path / "bundle" / BUNDLE_FILE).write_text(json.dumps(description | {field: value}))
    with pytest.raises(CheckpointError, match=rf"{field} of .* is .*; (expected|a table)"):
        Bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("input_size", value) for value in (None, 32, [32, 32], [3, 0, 32], [3, 10**9, 10**9])),
        *(("input_size", value) for value in ([3, 32.0, 32], [True, 32, 32], "abc", [3, 32, -1])),
        *((name, value) for name in ("mean", "std") for value in (None, 0.5, [0.5], [0.5] * 4)),
        *((name, ["a"] * 3) for name in ("mean", "std")),
        *(
            (name, [float(word)] * 3)
            for name in ("mean", "std")
            for word in ("nan", "inf", "1e300")
        ),
        *((name, [10**400] * 3) for name in ("mean", "std")),
        *(("std", [value, 1, 1]) for value in (0, -0.5, True)),
        *(("crop_pct", value) for value in (0, -1, 1e-9, 2, "x", None, float("nan"), True)),
        *(
            ("interpolation", value)
            for value in ("evil", "random", None, 3, ["bicubic"], "BICUBIC")
        ),
        *(("crop_mode", value) for value in ("evil", None, [])),
    ],
)
def test_preprocessing_is_checked(field, value):
    with pytest.raises(InputError, match=rf"{field} of the preprocessing is .*expected"):
        check_preprocessing(DATA | {field: value}, InputError)


def test_preprocessing_that_can_be_is_taken():
    for interpolation in INTERPOLATIONS:
        check_preprocessing(DATA | {"interpolation": interpolation}, InputError)
    check_preprocessing(
        {"input_size": [1, 24, 48], "mean": [0], "std": [1], "crop_mode": "squash"}, InputError
    )


@pytest.mark.parametrize("link", ["model.onnx", "extra.data", "folder"])
def test_a_bundle_has_no_way_out(whole, tmp_path, link):
    folder, _ = whole
    shutil.copytree(folder, tmp_path / "bundle")
    (tmp_path / "bundle" / link).unlink(missing_ok=True)
    goal = folder.parent if link == "folder" else folder.parent / "secret.onnx"
    (tmp_path / "bundle" / link).symlink_to(goal)
    with pytest.raises(CheckpointError, match="leads out of the bundle"):
        Bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / link).unlink()
    os.mkfifo(tmp_path / "bundle" / link)
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        Bundle(tmp_path / "bundle")


@pytest.mark.parametrize("location", ["../secret.onnx", "/dev/zero", "sub/../../secret.onnx"])
def test_weights_of_a_network_lie_in_its_folder(whole, tmp_path, location):
    folder, _ = whole
    shutil.copytree(folder, tmp_path / "bundle")
    (tmp_path / "secret.onnx").write_bytes(bytes(10**6))
    (tmp_path / "bundle" / "sub").mkdir()
    network = onnx.load(tmp_path / "bundle" / "model.onnx")
    tensor = next(each for each in network.graph.initializer if len(each.raw_data) > 1000)
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "bundle" / "model.onnx").write_bytes(network.SerializeToString())
    with pytest.raises(CheckpointError, match="cannot load"):
        Bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 3}, r"shape \(2, 3, 32, 32\), and bundle.json says \(3, 3, 32, 32\)"),
        ({"batch": None}, "where None is any number"),
        ({"preprocessing": DATA | {"input_size": [3, 64, 64]}}, "says .2, 3, 64, 64"),
    ],
)
def test_a_description_fits_its_network(whole, tmp_path, change, message):
    folder, description = whole
    shutil.copytree(folder, tmp_path / "bundle")
    (tmp_path / "bundle" / BUNDLE_FILE).write_text(json.dumps(description | change))
    with pytest.raises(CheckpointError, match=message):
        Bundle(tmp_path / "bundle")


def test_labels_fit_the_answers_and_images_the_network(whole, tmp_path):
    folder, description = whole
    shutil.copytree(folder, tmp_path / "bundle")
    (tmp_path / "bundle" / BUNDLE_FILE).write_text(json.dumps(description | {"labels": ["a"]}))
    with pytest.raises(CheckpointError, match="numbers for 1 classes"):
        Bundle(tmp_path / "bundle")(images(2).numpy())
    for x in (images(0), images(1)[0], images(1, size=64)):
        with pytest.raises(InputError, match=r"expected \(1 or more, 3, 32, 32\)"):
            Bundle(folder)(x.numpy())


def spoilt(tmp_path, to="onnx", **options):
    """A model whose finite weights give logits that are not, and a bundle of it."""
    sparse = sparse_vit(FIXED["dynamicvit"])
    with torch.no_grad():
        sparse.backbone.head.weight.fill_(3e38)
    return sparse, export(sparse, tmp_path / "bundle", to, data_config=DATA, **options)


def test_answers_that_are_not_finite_are_errors(tmp_path, capsys):
    sparse, folder = spoilt(tmp_path)
    with pytest.raises(InputError, match="logits of image 0 hold NaN or infinity"):
        Bundle(folder)(images(2).numpy())
    with pytest.raises(InputError, match="hold NaN or infinity"):
        check(sparse, folder, images(2))
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"logits of .*a\.png hold NaN"):
        main([str(folder), str(tmp_path / "a.png")])
    assert "nan" not in capsys.readouterr().out


def test_labels_do_not_command_the_terminal(whole, tmp_path, capsys):
    folder, description = whole
    shutil.copytree(folder, tmp_path / "bundle")
    labels = ["\x1b]0;evil\x07\x9b31m\nb"] * 10
    (tmp_path / "bundle" / BUNDLE_FILE).write_text(json.dumps(description | {"labels": labels}))
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    main([str(tmp_path / "bundle"), str(tmp_path / "a.png")])
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert out.strip().isprintable()
    assert r"\x1b]0;evil\x07\x9b31m\nb" in out


@pytest.mark.parametrize("words", [["--top", "0"], ["--threads", "-1"], ["--threads", "1000000"]])
def test_counts_of_predict_are_checked(whole, capsys, words):
    with pytest.raises(SystemExit) as stop:
        main([str(whole[0]), "a.png", *words])
    assert stop.value.code == 2


@pytest.mark.timeout(20)
def test_images_are_opened_with_care(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "eps.png", "EPS")
    Image.new("L", (1, 1001)).save(tmp_path / "thin.png")
    for name, message in (
        ("pipe.png", "it is no file"),
        ("", "it is no file"),
        ("eps.png", "cannot identify"),
        ("thin.png", "1 x 1001 pixels"),
        ("absent.png", "No such file"),
    ):
        with pytest.raises(InputError, match=message):
            open_image(tmp_path / name)
    with pytest.raises(InputError, match="it is no file"):
        open_image(Path("/dev/zero"))
    Image.new("L", (1, 50)).save(tmp_path / "long.png")
    assert open_image(tmp_path / "long.png").mode == "RGB"
    for kind in ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"):
        Image.new("RGB", (20, 10)).save(tmp_path / "x.png", kind)
        assert open_image(tmp_path / "x.png").size == (20, 10)


SILENCE = """
import pathlib, socket, sys
def note(*words, **options):
    (pathlib.Path.home() / "looked up").write_text(str(words))
    raise OSError("the test has no network")
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, note)
socket.socket.connect = note
from vitrim.cli import main
for command in sys.argv[2].split(";"):
    try:
        main(command.split())
    except SystemExit as stop:
        assert not stop.code, command
# What vitrim profile does with each of many parts.
import torch
from vitrim.latency import runners
layer, x = torch.nn.Linear(4, 4).eval(), torch.zeros(1, 3, 4)
runners.check_runtime(sys.argv[1], "fp32", torch.device("cpu"))
runners.bind(layer, x, False, sys.argv[1], "fp32", 1)(x)()
runners.version_of(sys.argv[1])
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("to", "runtime"), [("openvino", "openvino"), ("onnx", "onnxruntime")])
def test_no_command_reports_to_anyone(to, runtime, tmp_path):
    home, data, site = tmp_path / "home", tmp_path / "data", Path(vitrim.__file__).parents[1]
    home.mkdir()
    data.mkdir()
    sparse_vit(FIXED["dynamicvit"]).save_pretrained(tmp_path / "made")
    for number in range(2):
        Image.new("RGB", (32, 32), (80 * number, 90, 100)).save(data / f"{number}.png")
    commands = [
        f"export {tmp_path}/made --to {to} --check --data {data} -o {tmp_path}/bundle",
        f"predict {tmp_path}/bundle {data}/0.png",
    ]
    done = subprocess.run(
        [sys.executable, "-c", SILENCE, runtime, ";".join(commands)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(site), "HOME": str(home), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_runtimes_are_imported_in_one_place():
    source = Path(vitrim.__file__).parent
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            roots = {name.partition(".")[0] for name in names}
            assert not roots & {"onnxruntime", "openvino"}, path
