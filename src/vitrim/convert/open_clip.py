"""open_clip's own vision transformer as a timm model (``open_clip/transformer.py``, 3.3)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.convert.towers import Twin, filled, mlp_ratio
from vitrim.convert.transformers import check_same
from vitrim.errors import UnsupportedBackboneError
from vitrim.modes import eval_mode

_NAMES = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1": "patch_embed.proj",
    "ln_pre": "norm_pre",
    "ln_post": "norm",
}
_BLOCK = {
    "ln_1": "norm1",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj": "attn.proj",
    "ls_1": "ls1",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ls_2": "ls2",
}


def is_open_clip_tower(module: Any) -> bool:
    """Whether it is open_clip's own vision transformer."""
    cls = type(module)
    return (cls.__module__, cls.__name__) == ("open_clip.transformer", "VisionTransformer")


def open_clip_twin(tower: Any) -> Any:
    """The timm model with the weights of open_clip's vision transformer: its answer is the image
    embedding before it is normalised. Patch dropout is left out.

    Raises:
        UnsupportedBackboneError: timm's has no word for something in it, or gives other numbers.
        CheckpointError: the weights do not fit.
    """
    obstacles = list(_obstacles(tower))
    if obstacles:
        raise UnsupportedBackboneError(
            f"this vision transformer of open_clip has no twin in timm: {'; '.join(obstacles)}. "
            "open_clip's timm towers (such as ViT-B-16-SigLIP) are made sparse as they are"
        )
    block, (hidden, width) = _blocks(tower)[0], _blocks(tower)[0].mlp.c_fc.weight.shape
    weights = _renamed(tower.state_dict())
    pre_norm = isinstance(tower.ln_pre, nn.LayerNorm)
    if not pre_norm:  # timm's has a bias there, then
        weights["patch_embed.proj.bias"] = weights["cls_token"].new_zeros(width)
    averages = tower.pool_type == "avg"
    after = averages and tower.final_ln_after_pool
    if after:
        for kind in ("weight", "bias"):
            weights[f"fc_norm.{kind}"] = weights.pop(f"norm.{kind}")
    arguments = {
        "img_size": tuple(tower.image_size),
        "patch_size": tuple(tower.patch_size),
        "embed_dim": width,
        "depth": len(_blocks(tower)),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": mlp_ratio(width, hidden),
        "norm_eps": tower.ln_post.eps,
        "act_layer": _activation(block.mlp.gelu),
        "init_values": 1.0 if hasattr(block.ls_1, "gamma") else None,
        "pre_norm": pre_norm,
        "global_pool": "avg" if averages else "token",
        "fc_norm": after,
        "num_classes": len(weights["head.weight"]) if "head.weight" in weights else 0,
    }
    twin = filled(Twin(arguments, weights), "this VisionTransformer of open_clip")
    _prove(tower, twin)
    return twin.train(tower.training)


def _obstacles(tower: Any) -> Iterator[str]:
    if tower.attn_pool is not None:
        yield "attentional pooling"
    if tower.output_tokens:
        yield "output_tokens=True (it answers with tokens too)"
    if tower.pool_type not in ("tok", "avg"):
        yield f"pool_type={tower.pool_type!r}"
    for block in _blocks(tower):
        if type(block).__name__ != "ResidualAttentionBlock":
            yield f"blocks of type {type(block).__name__}"
            return
    if _activation(_blocks(tower)[0].mlp.gelu) is None:
        yield f"activation {_blocks(tower)[0].mlp.gelu}"


def _blocks(tower: Any) -> Any:
    return tower.transformer.resblocks


def _activation(module: nn.Module) -> str | None:
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return "quick_gelu" if type(module).__name__ == "QuickGELU" else None


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under timm's names; what is not known keeps its own."""
    weights = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        inside, names = (block[2], _BLOCK) if block else (name, _NAMES)
        start, _, last = inside.rpartition(".")
        renamed = names.get(inside) or f"{names.get(start, start)}.{last}"
        weights[f"blocks.{block[1]}.{renamed}" if block else renamed] = tensor
    weights["cls_token"] = weights["cls_token"].view(1, 1, -1)
    weights["pos_embed"] = weights["pos_embed"][None]
    projection = weights.pop(".proj", None)
    if projection is not None:
        weights["head.weight"] = projection.T.contiguous()
        weights["head.bias"] = projection.new_zeros(projection.shape[1])
    return weights


@torch.no_grad()
def _prove(tower: Any, twin: Any) -> None:
    weight = next(twin.parameters())
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *tower.image_size, generator=noise).to(weight)
    with eval_mode(tower, twin):
        check_same(tower, "embedding", twin(images), tower(images))
