"""Vision towers of Hugging Face's transformers in timm's words: names, arguments, weights.

Names are those of transformers 5.24 (``models/*/modeling_*.py``). Dropout and stochastic depth are
left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitrim.checkpoint import check_fit
from vitrim.errors import UnsupportedBackboneError
from vitrim.families.described import fill_buffers

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass
class Twin:
    """A vision tower in timm's words."""

    arguments: dict[str, Any]
    weights: dict[str, Tensor] = field(default_factory=dict)
    name: str = "plain_vit"
    """Timm's, of the architecture."""


def timm_twin(tower: Any, size: Size, heads: tuple[nn.Module, ...] = ()) -> Any:
    """The timm model with the weights of a vision tower, and of the linear layers that read it.

    Raises:
        CheckpointError: they are not those that its config tells of.
    """
    settings = tower.config
    twin = Twin(
        {
            "img_size": size,
            "patch_size": settings.patch_size,
            "in_chans": settings.num_channels,
            "embed_dim": settings.hidden_size,
            "depth": settings.num_hidden_layers,
            "num_heads": settings.num_attention_heads,
            "norm_eps": settings.layer_norm_eps,
            "act_layer": _activation(settings.hidden_act),
            "qkv_bias": getattr(settings, "qkv_bias", True),
            "num_classes": 0,
        },
        _renamed(tower.state_dict()),
    )
    hidden = twin.weights["blocks.0.mlp.fc1.weight"].shape[0]
    twin.arguments["mlp_ratio"] = mlp_ratio(settings.hidden_size, hidden)
    if hasattr(tower.embeddings, "interpolate_pos_encoding"):
        twin.weights["pos_embed"] = _positions(tower, size)
    _KINDS[settings.model_type](twin, settings, heads)
    for name, head in zip(("head", "head_dist"), heads, strict=False):
        weight: Any = head.weight
        bias: Any = head.bias
        twin.arguments["num_classes"] = len(weight)
        twin.weights[f"{name}.weight"] = weight
        twin.weights[f"{name}.bias"] = weight.new_zeros(len(weight)) if bias is None else bias
    source = f"this {type(tower).__name__} (vitrim knows those of transformers 5.24)"
    return filled(twin, source)


def filled(twin: Twin, source: str) -> Any:
    """The timm model of ``twin``, with a copy of its weights.

    Raises:
        CheckpointError: they do not fit; it names the model as ``source``.
    """
    with torch.device("meta"):
        backbone: Any = timm.create_model(twin.name, **twin.arguments)
    check_fit(backbone.state_dict(), twin.weights, source)
    weights = {name: tensor.detach().clone() for name, tensor in twin.weights.items()}
    backbone.load_state_dict(weights, assign=True)
    fill_buffers(backbone, {"name": twin.name, "kwargs": twin.arguments})
    return backbone.eval()


def mlp_ratio(width: int, hidden: int) -> float:
    """The share that timm makes ``hidden`` channels of ``width`` by, rounding down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


_WHOLE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.class_embedding": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.patch_embedding": "patch_embed.proj",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "pre_layrnorm": "norm_pre",
    "layernorm": "norm",
    "post_layernorm": "norm",
    "head.probe": "attn_pool.latent",
    "head.attention": "attn_pool",
    "head.attention.out_proj": "attn_pool.proj",
    "head.layernorm": "attn_pool.norm",
    "head.mlp.fc1": "attn_pool.mlp.fc1",
    "head.mlp.fc2": "attn_pool.mlp.fc2",
}
"""Of a tower's parts: timm's names."""
_BLOCK = {
    "layernorm_before": "norm1",
    "layer_norm1": "norm1",
    "norm1": "norm1",
    "attention.o_proj": "attn.proj",
    "self_attn.out_proj": "attn.proj",
    "layer_scale1": "ls1",
    "layernorm_after": "norm2",
    "layer_norm2": "norm2",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.down_proj": "mlp.fc2",
    "layer_scale2": "ls2",
}
"""The same of a block's."""
_JOINED = {
    "q_proj": ("attn.qkv", 0),
    "k_proj": ("attn.qkv", 1),
    "v_proj": ("attn.qkv", 2),
    "gate_proj": ("mlp.fc1", 0),
    "up_proj": ("mlp.fc1", 1),
}
"""Layers that are one in timm, and their order in it."""
_ELSEWHERE = re.compile(
    r"embeddings\.(mask_token|position_(embeddings|embedding\.weight))|pooler\."
)
"""What is read otherwise, or used in training alone. The pooler is transformers' own."""


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tower's weights under timm's names; what is not known keeps its own."""
    weights, joined = dict[str, Tensor](), dict[str, dict[int, Tensor]]()
    for name, tensor in state.items():
        if _ELSEWHERE.match(name):
            continue
        block = re.fullmatch(r"(?:(?:encoder|model)\.)?layers?\.(\d+)\.(.+)", name)
        inside, last = (block[2] if block else name).rpartition(".")[::2]
        if block and (found := _JOINED.get(inside.rpartition(".")[2])):
            whole, place = found
            joined.setdefault(f"blocks.{block[1]}.{whole}.{last}", {})[place] = tensor
        elif block and inside in _BLOCK:
            last = "gamma" if last == "lambda1" else last
            weights[f"blocks.{block[1]}.{_BLOCK[inside]}.{last}"] = tensor
        elif name in _WHOLE:
            weights[_WHOLE[name]] = tensor
        else:
            weights[name if block else f"{_WHOLE.get(inside, inside)}.{last}"] = tensor
    for name, parts in joined.items():
        weights[name] = torch.cat([parts[place] for place in sorted(parts)])
    return weights


def _positions(tower: Any, size: Size) -> Tensor:
    """(1, P + N, C): of images of ``size``, as the tower itself interpolates them."""
    patch, width = tower.config.patch_size, tower.config.hidden_size
    table = tower.embeddings
    several = getattr(table, "position_embeddings", None)
    known: Tensor = table.position_embedding.weight[None] if several is None else several
    own = sides(tower.config.image_size)
    if size == own:
        return known
    prefix = known.shape[1] - (own[0] // patch) * (own[1] // patch)
    tokens = known.new_zeros(1, prefix + (size[0] // patch) * (size[1] // patch), width)
    with torch.no_grad():
        positions: Tensor = table.interpolate_pos_encoding(tokens, *size)
    return positions


def _vit(twin: Twin, settings: Any, heads: tuple[nn.Module, ...]) -> None:
    """A class token before the patches."""


def _deit(twin: Twin, settings: Any, heads: tuple[nn.Module, ...]) -> None:
    """The distillation token is one of two that are read, or a register."""
    if len(heads) == 2:
        twin.arguments["distilled"] = True
    else:
        twin.arguments["reg_tokens"] = 1
        twin.weights["reg_token"] = twin.weights.pop("dist_token")


def _dinov2(twin: Twin, settings: Any, heads: tuple[nn.Module, ...]) -> None:
    """LayerScale, and registers without positions; SwiGLU in the largest."""
    twin.arguments["init_values"] = 1.0
    if settings.use_swiglu_ffn:
        twin.arguments |= {"gated_mlp": True, "act_layer": "silu"}
    registers = getattr(settings, "num_register_tokens", 0)
    if registers:
        twin.arguments |= {"reg_tokens": registers, "no_embed_class": True}
        positions = twin.weights["pos_embed"]
        twin.weights["cls_token"] = twin.weights["cls_token"] + positions[:, :1]
        twin.weights["pos_embed"] = positions[:, 1:]


def _dinov3(twin: Twin, settings: Any, heads: tuple[nn.Module, ...]) -> None:
    """Rotary positions, on timm's own architecture of the name; SwiGLU in some."""
    biases = settings.query_bias, settings.key_bias, settings.value_bias
    if (
        biases not in ((True, False, True), (False, False, False))
        or settings.layer_norm_eps != 1e-5
    ):
        raise UnsupportedBackboneError(
            f"this DINOv3 has query, key and value biases {biases} and layer_norm_eps "
            f"{settings.layer_norm_eps}; timm's has both but the key's or none, and 1e-05"
        )
    twin.name = "vit_base_patch16_dinov3"
    for unknown in ("norm_eps", "act_layer", "qkv_bias"):
        del twin.arguments[unknown]
    twin.arguments |= {
        "num_reg_tokens": settings.num_register_tokens,
        "qkv_bias": biases[0],
        "rope_temperature": settings.rope_theta,
        "global_pool": "token",
    }
    if settings.use_gated_mlp:
        twin.arguments |= {"swiglu_mlp": True, "swiglu_align_to": 0}
    twin.arguments["mlp_ratio"] = mlp_ratio(settings.hidden_size, settings.intermediate_size)
    if not settings.num_register_tokens:
        del twin.weights["reg_token"]
    for name, weight in list(twin.weights.items()):
        if name.endswith("attn.qkv.bias"):  # of queries and values
            start = name.removesuffix("qkv.bias")
            twin.weights[f"{start}q_bias"], twin.weights[f"{start}v_bias"] = weight.chunk(2)
            del twin.weights[name]
        elif scale := re.fullmatch(r"(blocks\.\d+)\.ls(\d)\.gamma", name):
            twin.weights[f"{scale[1]}.gamma_{scale[2]}"] = twin.weights.pop(name)


def _clip(twin: Twin, settings: Any, heads: tuple[nn.Module, ...]) -> None:
    """A norm before the blocks, and no bias in the patch embedding."""
    twin.arguments["pre_norm"] = True
    twin.weights["cls_token"] = twin.weights["cls_token"].view(1, 1, -1)


def _siglip(twin: Twin, settings: Any, heads: tuple[nn.Module, ...]) -> None:
    """No class token; attention pooling, or the mean, which a classifier reads."""
    pooled = {name for name in twin.weights if name.startswith("attn_pool.")}
    attends = bool(pooled) and not heads
    twin.arguments |= {"class_token": False, "global_pool": "map" if attends else "avg"}
    twin.arguments |= {} if attends else {"fc_norm": False}
    for kind in ("weight", "bias"):
        joined = twin.weights.pop(f"attn_pool.in_proj_{kind}", None)
        if joined is not None:
            width = len(joined) // 3
            twin.weights[f"attn_pool.q.{kind}"] = joined[:width]
            twin.weights[f"attn_pool.kv.{kind}"] = joined[width:]
    if not attends:
        twin.weights = {
            name: weight for name, weight in twin.weights.items() if "attn_pool." not in name
        }


_KINDS: dict[str, Callable[[Twin, Any, tuple[nn.Module, ...]], None]] = {
    "vit": _vit,
    "deit": _deit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "dinov3_vit": _dinov3,
    "clip_vision_model": _clip,
    "siglip_vision_model": _siglip,
}
"""What is true of one kind of tower, by its config's ``model_type``."""

_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise UnsupportedBackboneError(
            f"hidden_act {name!r} has no word in timm; known: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def sides(size: int | Any) -> Size:
    """Height and width of a square's side, or of both."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
