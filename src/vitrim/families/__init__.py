"""How to run each kind of backbone piece by piece.

A family offers primitives and no loop: ``stem``, ``run_block``, ``head`` and the MACs of each.
To add one, write ``families/<name>.py`` after the model of ``vit.py`` and list its class here.
"""

from __future__ import annotations

from torch import nn

from vitrim.errors import UnsupportedBackboneError
from vitrim.families.base import Family
from vitrim.families.convnext import ConvNeXt
from vitrim.families.lvvit import LVViT
from vitrim.families.pit import PiT
from vitrim.families.swin import Swin
from vitrim.families.video_swin import VideoSwin
from vitrim.families.vit import ViT
from vitrim.tokens.calls import bare

FAMILIES: tuple[type[Family], ...] = (ViT, LVViT, PiT, Swin, ConvNeXt, VideoSwin)
__all__ = [
    "FAMILIES",
    "ConvNeXt",
    "Family",
    "LVViT",
    "PiT",
    "Swin",
    "ViT",
    "VideoSwin",
    "family_of",
]


def family_of(backbone: nn.Module) -> Family:
    """The family that runs ``backbone``.

    Raises:
        UnsupportedBackboneError: no family can run it without changing its numbers.
    """
    name = type(backbone).__name__
    if bare(backbone) is not backbone:
        raise UnsupportedBackboneError(
            "this model is compiled; make the model sparse first, and compile the sparse model"
        )
    for family in FAMILIES:
        if family.accepts(backbone):
            obstacles = list(family.obstacles(backbone))
            if obstacles:
                raise UnsupportedBackboneError(
                    f"this {name} cannot be made sparse: {'; '.join(obstacles)}"
                )
            return family(backbone)
    served = "; ".join(f"{family.name}: {family.serves}" for family in FAMILIES)
    raise UnsupportedBackboneError(
        f"{name} is not a backbone that vitrim knows, and running it by guesswork could change its "
        f"numbers silently. Served: {served}"
    )
