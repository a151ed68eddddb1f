"""What vitrim does not run, why, and what to use instead: by timm's module, and by part."""

from __future__ import annotations

from collections.abc import Mapping

_CONVOLUTIONS = "convolutions between its blocks need every place of a map; use convnext"
_POOLED = "its tokens are pooled between its blocks, which needs every place; use pit or swin"
_PAIRS = (
    "it adds a bias to every pair of tokens, and gathering it for the pairs that each image keeps "
    "is not built (benchmarks/pair_bias.py says what it costs); use a ViT, or eva, whose positions "
    "are rotary"
)
_SIDE_BY_SIDE = "attention and MLP run side by side, and one layer makes both"

MODULES: Mapping[str, str] = {
    "beit": _PAIRS,
    "cait": "its heads mix their attention maps before and after the softmax, so that whole maps "
    "must be made; use deit3",
    "coat": _CONVOLUTIONS,
    "convit": "its attention adds a gated map of positions to every pair of tokens; use deit",
    "crossvit": "its two branches hand tokens to each other between blocks; use vit or deit",
    "davit": "it takes turns attending among channels, over every place; use swin",
    "deepseek_vit": "an encoder of a language model, which wants all patches in order; use vit",
    "edgenext": _CONVOLUTIONS,
    "efficientformer": _POOLED,
    "efficientformer_v2": _POOLED,
    "focalnet": "it mixes places by convolutions, not by attention; use convnext",
    "gcvit": "its windows ask with queries made of the whole map; use swin",
    "gemma4_vit": "an encoder of a language model, which wants all patches in order; use vit",
    "hiera": "its tokens lie in units that are pooled by their places between stages; use vit",
    "hieradet_sam2": _POOLED,
    "levit": "it adds a bias to every pair of tokens and shrinks its map; use deit",
    "maxxvit": _CONVOLUTIONS,
    "mvitv2": _POOLED,
    "nest": _POOLED,
    "pvt_v2": _POOLED,
    "qwen3_vit": "an encoder of a language model, which wants all patches in order; use vit",
    "tiny_vit": _CONVOLUTIONS,
    "tnt": "every patch token has tokens of its pixels beside it; use deit",
    "twins": _CONVOLUTIONS,
    "vision_transformer_relpos": _PAIRS,
    "vision_transformer_sam": "it attends in windows of its map, with a bias for every pair of "
    "tokens; use vit, or swin where a map is wanted",
    "visformer": _CONVOLUTIONS,
    "volo": "its outlookers spread every place over its neighbours; use deit",
    "xcit": "it attends among channels, and convolutions follow; use deit",
}
"""The other modules of timm with vision transformers and their kin in them."""

PARTS: Mapping[str, str] = {
    "ParallelScalingBlock": _SIDE_BY_SIDE,
    "DiffParallelScalingBlock": _SIDE_BY_SIDE,
    "ParallelThingsBlock": "several attentions run side by side",
    "DiffAttention": "it subtracts two attention maps of each head",
}
"""Blocks and attention layers of models that are served otherwise."""
