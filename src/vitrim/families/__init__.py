"""How to run each kind of backbone piece by piece.

A family offers primitives and no loop: ``stem``, ``run_block``, ``head`` and the MACs of each.
To add one, write ``families/<name>.py`` after the model of ``vit.py`` and list its class here.
"""

from __future__ import annotations

from torch import nn

from vitrim.errors import UnsupportedBackboneError
from vitrim.families.base import Family
from vitrim.families.convnext import ConvNeXt
from vitrim.families.eva import Eva
from vitrim.families.foreign import advice, check_bare
from vitrim.families.lvvit import LVViT
from vitrim.families.naflex import NaFlex
from vitrim.families.pit import PiT
from vitrim.families.refused import MODULES
from vitrim.families.swin import Swin
from vitrim.families.swin_v2 import SwinV2, SwinV2Cr
from vitrim.families.vit import ViT

FAMILIES: tuple[type[Family], ...] = (
    ViT,
    Eva,
    NaFlex,
    LVViT,
    PiT,
    Swin,
    SwinV2,
    SwinV2Cr,
    ConvNeXt,
)
__all__ = [
    "FAMILIES",
    "ConvNeXt",
    "Eva",
    "Family",
    "LVViT",
    "NaFlex",
    "PiT",
    "Swin",
    "SwinV2",
    "SwinV2Cr",
    "ViT",
    "family_of",
]


def family_of(backbone: nn.Module) -> Family:
    """The family that runs ``backbone``.

    Raises:
        UnsupportedBackboneError: no family can run it without changing its numbers.
    """
    check_bare(backbone)
    name = type(backbone).__name__
    for family in FAMILIES:
        if family.accepts(backbone):
            obstacles = list(family.obstacles(backbone))
            if obstacles:
                raise UnsupportedBackboneError(
                    f"this {name} cannot be made sparse: {'; '.join(obstacles)}"
                )
            return family(backbone)
    if (hint := advice(backbone)) is not None:
        raise UnsupportedBackboneError(f"{name} is no timm model. {hint}")
    served = "; ".join(f"{family.name}: {family.serves}" for family in FAMILIES)
    module = type(backbone).__module__
    why = MODULES.get(module.rpartition(".")[2]) if module.startswith("timm.") else None
    if why is not None:
        raise UnsupportedBackboneError(
            f"{name} ({module}) cannot be made sparse: {why}. Served: {served}"
        )
    raise UnsupportedBackboneError(
        f"{name} is not a backbone that vitrim knows, and running it by guesswork could change its "
        f"numbers silently. Served: {served}"
    )
