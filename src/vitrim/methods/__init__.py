"""The methods. To add one, write ``methods/<name>.py`` and list its class here; or, elsewhere, put
:func:`register` before the class.
"""

from __future__ import annotations

from typing import TypeVar

from vitrim.config import closest, require
from vitrim.errors import ConfigError
from vitrim.families import FAMILIES
from vitrim.methods.asvit import ASViT
from vitrim.methods.base import Method
from vitrim.methods.dense import Dense
from vitrim.methods.dynamic_spatial import DynamicSpatial
from vitrim.methods.dynamicvit import DynamicViT
from vitrim.methods.merging import Merging
from vitrim.methods.sait import SaiT
from vitrim.methods.spvit import SPViT
from vitrim.methods.spvit_pyramid import SPViTPyramid
from vitrim.methods.stvit import STViT
from vitrim.methods.stvit_r import STViTR
from vitrim.methods.stvit_swin import STViTSwin
from vitrim.methods.stvit_video import STViTVideo

Kind = TypeVar("Kind", bound=Method)

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Merging,
        Dense,
        DynamicViT,
        DynamicSpatial,
        ASViT,
        SaiT,
        SPViT,
        SPViTPyramid,
        STViT,
        STViTSwin,
        STViTVideo,
        STViTR,
    )
}


def register(method: type[Kind]) -> type[Kind]:
    """Make a method of your own known, by its name and its config's class; a decorator.

    Raises:
        ConfigError: it is not whole, or its name or config is that of another method.
    """
    lacks = set(getattr(method, "__abstractmethods__", ()))
    lacks |= {"name", "config_class"} - vars(method).keys()
    require(not lacks, f"{method.__name__} lacks {', '.join(sorted(lacks))}")
    unknown = set(method.families) - {family.name for family in FAMILIES}
    require(not unknown, f"{method.__name__} names unknown families: {', '.join(sorted(unknown))}")
    for other in METHODS.values():
        taken = method.name == other.name or method.config_class is other.config_class
        again = (method.__module__, method.__qualname__) == (other.__module__, other.__qualname__)
        message = f"{method.name} with {method.config_class.__name__} is {other.__name__} already"
        require(again or not taken, f"{message}; give it a name and a config class of its own")
    METHODS[method.name] = method
    return method


def method_by_name(name: str) -> type[Method]:
    """The method called ``name`` at the edges (JSON, TOML, command line)."""
    if name not in METHODS:
        raise ConfigError(
            f"unknown method {name!r}{closest(name, METHODS)}; known: {', '.join(METHODS)}. One of "
            "your own is known once it was imported, see vitrim.methods.register"
        )
    return METHODS[name]


def method_of_config(config: object) -> type[Method]:
    """The method whose config class ``config`` is an instance of."""
    for method in METHODS.values():
        if type(config) is method.config_class:
            return method
    known = ", ".join(method.config_class.__name__ for method in METHODS.values())
    raise ConfigError(f"{type(config).__name__} is not a method config; pass one of: {known}")
