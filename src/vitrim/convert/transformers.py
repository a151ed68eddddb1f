"""Vision models of Hugging Face's transformers as sparse timm models.

ViT, DeiT, DINOv2 (with registers), DINOv3, and the vision towers of CLIP, SigLIP and SigLIP 2. A
model's weights get the names that timm's twin of it has, and the twin must give the model's numbers
on a probe before it is used.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.config import closest
from vitrim.convert.processor import USUAL, data_of_processor
from vitrim.convert.towers import Size, sides, timm_twin
from vitrim.errors import UnsupportedBackboneError
from vitrim.methods.dense import DenseConfig
from vitrim.model import SparseModel
from vitrim.modes import eval_mode
from vitrim.tokens.calls import bare

PROBE = 2e-5
"""Largest difference between a model and its twin, in shares of the largest value."""


@dataclass(frozen=True)
class Part:
    """Where a model of transformers keeps its vision tower, and what reads it."""

    tower: str = ""
    """The tower's name in the model; empty: the model is one."""
    heads: tuple[str, ...] = ()
    """Names of the linear layers that give its answer."""
    answer: str = "logits"
    """What its output calls that answer."""


PARTS = {
    "ViTModel": Part(),
    "ViTForImageClassification": Part("vit", ("classifier",)),
    "DeiTModel": Part(),
    "DeiTForImageClassification": Part("deit", ("classifier",)),
    "DeiTForImageClassificationWithTeacher": Part(
        "deit", ("cls_classifier", "distillation_classifier")
    ),
    "Dinov2Model": Part(),
    "Dinov2WithRegistersModel": Part(),
    "DINOv3ViTModel": Part(),
    "CLIPVisionModel": Part(),
    "CLIPVisionModelWithProjection": Part("vision_model", ("visual_projection",), "image_embeds"),
    "CLIPModel": Part("vision_model", ("visual_projection",), "image_embeds"),
    "SiglipVisionModel": Part(),
    "SiglipForImageClassification": Part("vision_model", ("classifier",)),
    "SiglipModel": Part("vision_model"),
}
"""The models that are converted, by the names of their classes."""


def from_transformers(
    model: nn.Module,
    config: Any = None,
    *,
    processor: Any = None,
    image_size: int | Size | None = None,
    generator: torch.Generator | None = None,
) -> SparseModel:
    """A model of transformers as a sparse timm model with a copy of its weights.

    Of a model with a text tower it is the image tower, whose answer is the image embedding before
    it is normalised (CLIP), or what the tower pools (SigLIP). Names of classes go with it.

    Args:
        model: one of :data:`PARTS`, with its weights.
        config: a method's config, as for :func:`vitrim.sparsify`; None: ``DenseConfig()``.
        processor: the model's image processor, which says how images are prepared; None: as is
            usual for models of its kind.
        image_size: side, or height and width, in pixels, for which positions are interpolated as
            transformers does; None: the processor's, or the model's own.
        generator: source of the new parameters' values; None uses torch's global one.

    Raises:
        UnsupportedBackboneError: it is no model that can be converted, or its twin gives other
            numbers.
        CheckpointError: its weights are not those that its config tells of.
        ConfigError: the processor prepares images in a way that has no word, or the method's config
            does not fit.
    """
    _, tower = find_tower(model)
    if getattr(tower, "pooler", None) is not None:
        warnings.warn(
            f"the pooler of this {type(tower).__name__} is in no timm model, and is left out; give "
            "it to vitrim.as_transformers(sparse, pooler=model.pooler), or load the model with "
            "add_pooling_layer=False",
            stacklevel=2,
        )
    return converted(model, config, processor, image_size, generator)


def converted(
    model: nn.Module,
    config: Any,
    processor: Any,
    image_size: int | Size | None,
    generator: torch.Generator | None,
) -> SparseModel:
    """See :func:`from_transformers`; of a pooler nothing is said."""
    part, tower = find_tower(model)
    whole: Any = bare(model)
    data = USUAL[tower.config.model_type] if processor is None else data_of_processor(processor)
    usual = tower.config.image_size if processor is None else data["input_size"][1:]
    size = sides(usual if image_size is None else image_size)
    twin = timm_twin(tower, size, tuple(whole.get_submodule(head) for head in part.heads))
    prove(whole, part, tower, twin, size)
    twin.train(whole.training)
    sparse = SparseModel(twin, DenseConfig() if config is None else config, generator)
    sparse.data_config = data | {"input_size": (twin.in_chans, *size)}
    sparse.labels = _labels(whole, part)
    name = getattr(whole.config, "_name_or_path", "") or "no name"
    sparse.origin = f"converted from transformers' {type(whole).__name__} ({name})"
    return sparse


def find_tower(model: Any) -> tuple[Part, Any]:
    """What ``model`` is, and its vision tower.

    Raises:
        UnsupportedBackboneError: it is none that can be converted.
    """
    found, name = bare(model), type(bare(model)).__name__
    if isinstance(model, str):
        raise UnsupportedBackboneError(
            f"{model!r:.100} is a name; load the model first (transformers.AutoModel."
            "from_pretrained) and give it, or make a timm model of that name sparse"
        )
    if name in PARTS and type(found).__module__.startswith("transformers."):
        part = PARTS[name]
        return part, found.get_submodule(part.tower) if part.tower else found
    inside = [
        f"{path} ({type(module).__name__})"
        for path, module in (found.named_modules() if isinstance(found, nn.Module) else ())
        if path and type(module).__name__ in PARTS
    ]
    advice = (
        f"It holds {', '.join(inside[:3])}: vitrim.sparsify_inside(model, config) makes that "
        "sparse in its place"
        if inside
        else f"Converted are: {', '.join(PARTS)}{closest(name, PARTS)}"
    )
    raise UnsupportedBackboneError(f"a {name} has no twin in timm. {advice}")


def is_tower(module: Any) -> bool:
    """Whether it is a vision tower of transformers that can be converted."""
    cls = type(module)
    return cls.__module__.startswith("transformers.") and PARTS.get(cls.__name__) == Part()


def _labels(model: Any, part: Part) -> tuple[str, ...] | None:
    """Names of the classes; None where there are none, or those that stand for no name."""
    if not part.heads or part.answer != "logits":
        return None
    names = model.config.id2label
    labels = tuple(str(names.get(number, number)) for number in range(len(names)))
    return None if all(re.fullmatch(r"LABEL_\d+", label) for label in labels) else labels


@torch.no_grad()
def prove(model: Any, part: Part, tower: Any, twin: Any, size: Size) -> None:
    """Raise :class:`UnsupportedBackboneError` unless ``twin`` gives the numbers of ``tower``, and
    of the model around it, on a probe.
    """
    weight = next(twin.parameters())
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(2, twin.in_chans, *size, generator=noise).to(weight)
    resized = {} if size == sides(tower.config.image_size) else {"interpolate_pos_encoding": True}
    if tower.config.model_type.startswith("dino"):
        resized = {}  # always does
    with eval_mode(model, twin):
        output = tower(images, **resized)
        hidden, pooled = output.last_hidden_state, output.pooler_output
        if hasattr(tower, "pre_layrnorm"):  # CLIP gives them before its last norm
            hidden = tower.post_layernorm(hidden)
        features = twin.forward_features(images)
        pairs = {"last_hidden_state": (features, hidden)}
        if pooled is not None and getattr(tower, "pooler", None) is None and _pools(twin, part):
            pairs["pooler_output"] = (twin.forward_head(features, pre_logits=True), pooled)
        if part.heads:
            pairs[part.answer] = (twin(images), _answer(model, part, pooled, images, resized))
    for name, (found, due) in pairs.items():
        check_same(model, name, found, due)


def check_same(model: nn.Module, name: str, found: Tensor, due: Tensor) -> None:
    """Raise :class:`UnsupportedBackboneError` unless the ``name`` that a twin of ``model`` gives is
    the model's.
    """
    gap = float((found - due).abs().max()) / max(float(due.abs().max()), 1e-12)
    if not gap <= max(PROBE, 64 * torch.finfo(due.dtype).eps):
        raise UnsupportedBackboneError(
            f"timm's twin of this {type(model).__name__} gives another {name}: the largest "
            f"difference on a probe is {gap:.1g} of its largest value. Something in the model "
            "is not as its config says (an adapter, another head, a changed module)"
        )


def _pools(twin: Any, part: Part) -> bool:
    """Whether the twin pools as the tower does, and not as a classifier behind it wants."""
    return twin.global_pool != "avg" and part.answer == "logits" and len(part.heads) < 2


def _answer(model: Any, part: Part, pooled: Tensor, images: Tensor, resized: dict[str, Any]) -> Any:
    if part.answer == "logits":
        return model(images, **resized).logits
    return model.get_submodule(part.heads[0])(pooled)
