"""Accuracy, paired comparison and cost, on hand-made answers and on tiny models."""

from __future__ import annotations

import gc
import json
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import vitrim
from tests.conftest import images, tiny_pit, tiny_swin, tiny_vit
from tests.training import write_images
from vitrim import (
    ASViTConfig,
    ConfigError,
    DynamicSpatialConfig,
    DynamicViTConfig,
    InputError,
)
from vitrim.cli import main
from vitrim.costs.macs import attention_macs, linear_macs
from vitrim.families import family_of
from vitrim.methods.records import StageTrace
from vitrim.model import Trace
from vitrim.tools.benchmark import macs_per_image
from vitrim.tools.evaluate import (
    Spread,
    _Answers,
    _Column,
    _Run,
    check_scores,
    compare,
    counted_macs,
    evaluate,
    evaluate_dense,
    evaluate_settings,
    paired_interval,
)


def answers(name: str, predictions: list[int], truth: list[int], classes: int = 6) -> _Answers:
    found = _Answers(name)
    logits = nn.functional.one_hot(torch.tensor(predictions), classes).float()
    found.add(logits, torch.tensor(truth))
    return found


def test_flips_agreement_and_difference():
    truth = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    dense = answers("dense", [0, 1, 2, 3, 4, 5, 0, 5, 5, 5], truth)  # 7 right
    sparse = answers("sparse", [0, 1, 2, 3, 5, 4, 0, 1, 4, 5], truth)  # 6 right
    pair = compare(dense, sparse)
    assert (pair.won, pair.lost) == (1, 2)
    assert pair.difference == pytest.approx(-10)
    assert pair.agreement == pytest.approx(60)  # six the same, one of them wrong
    assert dense.accuracy().top1 == pytest.approx(70)
    assert sparse.accuracy().top1 == pytest.approx(60)
    assert pair.low < -10 < pair.high


def test_interval_by_hand():
    # 100 images, 10 won, 2 lost: (10.5 - 2.5) / 102 and the adjusted Wald variance.
    low, high = paired_interval(10, 2, 100)
    centre = 8 / 102
    margin = 1.959964 * ((13 - 64 / 102) / 102**2) ** 0.5
    assert low == pytest.approx(100 * (centre - margin), abs=1e-4)
    assert high == pytest.approx(100 * (centre + margin), abs=1e-4)


def test_interval_without_flips_still_doubts():
    low, high = paired_interval(0, 0, 1000)
    assert low == pytest.approx(-high)
    assert 0 < high < 0.5


def test_interval_is_about_right_on_average():
    """The interval covers a known difference in about 95 of 100 draws."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.tensor([0.08, 0.05, 0.87])  # won, lost, same: the difference is 3 points
    draws = torch.multinomial(cells, 400 * 500, True, generator=generator).view(500, 400)
    covered = 0
    for draw in draws:
        low, high = paired_interval(int((draw == 0).sum()), int((draw == 1).sum()), 400)
        covered += low <= 3 <= high
    assert 0.92 <= covered / 500 <= 0.98


def test_top5_counts_ranks():
    found = _Answers("sparse")
    logits = torch.arange(8.0).flip(0).expand(3, 8)  # class 0 first, class 7 last
    found.add(logits, torch.tensor([0, 4, 5]))
    assert found.accuracy().top1 == pytest.approx(100 / 3)
    assert found.accuracy().top5 == pytest.approx(200 / 3)


def test_spread():
    spread = Spread.of(torch.tensor([1, 2, 3, 6]))
    assert spread == Spread(mean=3.0, std=pytest.approx(3.5**0.5), min=1.0, max=6.0)


def test_ranks_are_those_of_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 3, (400, 12), generator=generator).bfloat16()  # many ties
    truth = torch.randint(0, 12, (400,), generator=generator)
    found = _Answers("sparse")
    for part in (slice(0, 150), slice(150, 400)):
        found.add(logits[part], truth[part])
    order = logits.float().argsort(dim=1, descending=True, stable=True)
    ranks = (order == truth[:, None]).int().argmax(1)
    assert torch.equal(found.predictions, order[:, 0].int())
    assert torch.equal(found.right, ranks == 0)
    assert found.accuracy().top5 == 100 * float((ranks < 5).double().mean())


def test_an_evaluation_of_imagenet_keeps_some_bytes_per_image():
    """50,000 images and 1,000 classes: no view of a batch's logits, counts or costs is kept."""

    def held() -> int:
        gc.collect()
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in gc.get_objects()
            if type(tensor) is torch.Tensor and tensor.layout is torch.strided
        }
        return sum(storages.values())

    run, before = _Run(), held()
    for number in range(25):
        logits = torch.randn(2000, 1000, generator=torch.Generator().manual_seed(number))
        large = torch.ones(2000, 100)
        stages = [
            StageTrace(3, torch.ones(2000, 4), (2, 2), [], large[:, place] * 4) for place in (0, 1)
        ]
        run.add(Trace(logits, stages, large.double()[:, 3], (2, 2)), logits[:, :7].argmax(1))
    del logits, large, stages
    assert held() - before < 2**16 * 40
    found = run.evaluation(None, 1, ())
    assert found.images == 50_000
    assert found.stages[1].kept == Spread(4, 0, 4, 4)
    assert 0 < found.sparse.top1 < 5


def test_more_images_than_the_array_was_made_for():
    column = _Column(torch.int32)
    for start in (0, 65_000, 200_000):
        column.add(torch.arange(start, {0: 65_000, 65_000: 200_000, 200_000: 200_001}[start]))
    assert torch.equal(column.values, torch.arange(200_001, dtype=torch.int32))


@pytest.fixture
def loader():
    labels = torch.arange(10).repeat(2)[:14]
    pictures = images(14, seed=3)
    return [(pictures[:6], labels[:6]), (pictures[6:], labels[6:])]


def test_evaluate_matches_the_models(loader):
    sparse = vitrim.sparsify(tiny_vit(), DynamicViTConfig(keep_ratio=0.5))
    sparse.train()
    seen: list[int] = []
    found = evaluate(sparse, loader, progress=seen.append)
    assert sparse.training
    assert seen == [6, 14]
    pictures, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    sparse.eval()
    with torch.no_grad():
        top1 = (sparse(pictures).argmax(1) == labels).double().mean() * 100
        dense_top1 = (sparse.backbone(pictures).argmax(1) == labels).double().mean() * 100
        agree = (sparse(pictures).argmax(1) == sparse.backbone(pictures).argmax(1)).double().mean()
    assert found.images == 14
    assert found.sparse.top1 == pytest.approx(float(top1))
    assert found.dense.top1 == pytest.approx(float(dense_top1))
    assert found.paired.agreement == pytest.approx(float(100 * agree))
    assert found.paired.difference == pytest.approx(float(top1 - dense_top1))
    assert found.macs.mean == sparse.macs()
    assert found.dense_macs == sparse.dense_macs()
    assert [stage.kept.mean for stage in found.stages] == list(
        sparse.method.counts(sparse.family, (4, 4))
    )
    assert [stage.block for stage in found.stages] == [1, 2, 3]


def test_settings_share_one_pass_and_one_dense_run(loader):
    sparse = vitrim.sparsify(tiny_vit(), DynamicViTConfig(keep_ratio=0.9))
    dense_calls: list[int] = []
    sparse_calls: list[int] = []
    hook = sparse.backbone.register_forward_hook(lambda *_: dense_calls.append(1))
    sparse.method.register_forward_hook(lambda *_: sparse_calls.append(1))
    reads: list[int] = []

    class Counted(list):
        def __iter__(self):
            reads.append(1)
            return super().__iter__()

    settings = {str(r): partial(sparse.set_keep_ratio, r) for r in (0.7, 0.3, 0.5)}
    found = evaluate_settings(sparse, Counted(loader), settings)
    assert len(reads) == 1
    assert len(sparse_calls) == 3 * len(loader)
    assert len(dense_calls) - len(sparse_calls) == len(loader)  # the sparse model's call it too
    hook.remove()
    assert sparse.config.keep_ratio == 0.9
    assert list(found) == ["0.7", "0.3", "0.5"]
    for ratio, evaluation in found.items():
        sparse.set_keep_ratio(float(ratio))
        assert evaluation == evaluate(sparse, loader)


def test_settings_are_restored_after_a_failure(loader):
    sparse = vitrim.sparsify(tiny_vit(), DynamicViTConfig(keep_ratio=0.9))
    with pytest.raises(ConfigError):
        evaluate_settings(
            sparse,
            loader,
            {
                "0.5": partial(sparse.set_keep_ratio, 0.5),
                "2": partial(sparse.set_keep_ratio, 2.0),
            },
        )
    assert sparse.config.keep_ratio == 0.9


def test_evaluate_with_another_dense_model(loader):
    sparse = vitrim.sparsify(tiny_vit(), DynamicViTConfig())
    other = tiny_vit()
    nn.init.zeros_(other.head.weight)
    with torch.no_grad():
        other.head.bias.copy_(torch.arange(10.0).flip(0))  # always class 0
    found = evaluate(sparse, loader, dense=other)
    assert found.dense.top1 == pytest.approx(100 * 2 / 14)
    assert evaluate(sparse, loader, dense=False).dense is None


def test_adaptive_counts_have_a_spread():
    sparse = vitrim.sparsify(tiny_vit(), DynamicViTConfig(threshold=0.5))
    with torch.no_grad():
        for predictor in sparse.method.predictors:
            for layer in predictor.classify:
                if isinstance(layer, nn.Linear):
                    layer.weight.mul_(20)
    singles = [(picture[None], torch.tensor([1])) for picture in images(8, seed=1)]
    found = evaluate(sparse, singles)
    kept = found.stages[0].kept
    assert kept.min < kept.mean < kept.max
    assert found.macs.std > 0
    assert found.macs.max <= found.dense_macs * 1.1


def test_dense_alone_counts_its_macs(loader):
    model = tiny_vit()
    found = evaluate_dense(model, loader)
    sparse = vitrim.sparsify(model, DynamicViTConfig())
    assert found.dense_macs == sparse.dense_macs()
    assert found.dense == evaluate(sparse, loader).dense
    assert counted_macs(model, images(3)) == found.dense_macs


def test_a_model_of_no_family_is_counted_with_its_attention():
    """Whatever fused kernels torch's counter knows."""
    model = timm.create_model("eva02_tiny_patch14_224", depth=2, num_classes=10)
    tokens, width = 257, 192
    per_token = linear_macs(model.blocks)
    expected = 256 * model.patch_embed.proj.weight.numel() + linear_macs(model.head)
    expected += per_token * tokens + 2 * attention_macs(tokens, width)
    assert macs_per_image(model, images(1, size=224)) == expected
    found = evaluate_dense(model, [(images(2, size=224), torch.tensor([1, 2]))])
    assert found.dense_macs == expected


def test_macs_are_counted_in_inference_mode_where_parameters_enter_modules():
    model = tiny_pit()
    with torch.inference_mode():
        found = counted_macs(model, torch.zeros(1, 3, 32, 32))
    assert found == family_of(model).dense_macs(family_of(model).grid())


def test_bfloat16_autocast_is_close(loader):
    sparse = vitrim.sparsify(tiny_vit(), DynamicViTConfig(keep_ratio=1.0))
    found = evaluate(sparse, loader, dtype=torch.bfloat16)
    exact = evaluate(sparse, loader)
    assert found.images == exact.images
    assert abs(found.sparse.top1 - exact.sparse.top1) < 30


def test_dictionary_is_json_ready(loader):
    class Named(list):
        unreadable = ("a.jpg", "b.jpg")

    sparse = vitrim.sparsify(tiny_vit(), DynamicViTConfig())
    plain = evaluate(sparse, Named(loader)).to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["num_unreadable"] == 2
    assert plain["unreadable"] == ["a.jpg", "b.jpg"]
    assert plain["paired"].keys() >= {"won", "lost", "agreement", "difference", "low", "high"}
    assert plain["stages"][0]["kept"].keys() == {"mean", "std", "min", "max"}


def test_nan_is_named(loader):
    sparse = vitrim.sparsify(tiny_vit(), DynamicViTConfig())
    nn.init.constant_(sparse.backbone.head.bias, torch.nan)
    with pytest.raises(InputError, match="NaN or infinity"):
        evaluate(sparse, loader)


SELECTORS = {
    "dynamicvit": (tiny_vit, DynamicViTConfig(stages=(1, 2)), "predictors.1"),
    "threshold": (tiny_vit, DynamicViTConfig(stages=(1, 2), threshold=0.5), "predictors.0"),
    "swin": (tiny_swin, DynamicSpatialConfig(stages=(1, 3), keep_ratio=0.6), "predictors.1"),
    "asvit": (tiny_vit, ASViTConfig(thresholds=0.06), "thresholds"),
}


@pytest.mark.parametrize("case", list(SELECTORS))
def test_nan_in_a_selector_is_named_though_the_logits_are_finite(loader, case):
    make, config, name = SELECTORS[case]
    sparse = vitrim.sparsify(make(), config).eval()
    check_scores(sparse.trace(images(4)))
    for key, parameter in sparse.method.named_parameters():
        if key.startswith(name):
            nn.init.constant_(parameter, torch.nan)
    trace = sparse.trace(images(4))
    assert trace.logits.isfinite().all()
    with pytest.raises(InputError, match="sparse model hold NaN or infinity, such as method"):
        evaluate(sparse, loader)
    if case != "asvit":  # whose scores are the attention's
        with pytest.raises(InputError, match=r"scores before block \d hold NaN or infinity"):
            check_scores(trace)


def test_scores_that_are_no_numbers_are_named(loader, monkeypatch):
    """Weights that are finite may still overflow."""
    sparse = vitrim.sparsify(tiny_vit(), DynamicViTConfig(stages=(1, 2)))
    for parameter in sparse.method.predictors[1].parameters():
        nn.init.constant_(parameter, 1e30)
    with pytest.raises(InputError, match="scores before block 2 hold NaN or infinity"):
        evaluate(sparse, loader)


def test_eval_of_a_selector_that_is_no_number_exits_with_2(tmp_path, capsys):
    model = tiny_vit(num_classes=3)
    vitrim.sparsify(model, DynamicViTConfig()).save_pretrained(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    name = next(name for name in weights if name.startswith("method."))
    safetensors.torch.save_file(weights | {name: weights[name] * torch.nan}, file)
    data = str(write_images(tmp_path / "data", classes=3, per_class=2))
    words = ["eval", str(tmp_path / "checkpoint"), "--data", data, "--workers", "0"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--device", "cpu"])
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_outside_the_head_are_named(label):
    with pytest.raises(InputError, match="10 classes"):
        evaluate_dense(tiny_vit(), [(images(1), torch.tensor([label]))])


def test_no_image_is_named():
    class Empty(list):
        unreadable = ("broken.png",)

    with pytest.raises(InputError, match="no image"):
        evaluate_dense(tiny_vit(), [])
    with pytest.raises(InputError, match=r"broken\.png"):
        evaluate_dense(tiny_vit(), Empty())
