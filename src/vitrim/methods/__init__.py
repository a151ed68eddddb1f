"""The methods. To add one, write ``methods/<name>.py`` and list its class here; or, elsewhere, put
:func:`register` before the class.
"""

from __future__ import annotations

from vitrim.config import closest
from vitrim.errors import ConfigError
from vitrim.methods.asvit import ASViT
from vitrim.methods.base import Method
from vitrim.methods.dynamic_spatial import DynamicSpatial
from vitrim.methods.dynamicvit import DynamicViT
from vitrim.methods.sait import SaiT
from vitrim.methods.spvit import SPViT
from vitrim.methods.spvit_pyramid import SPViTPyramid
from vitrim.methods.stvit import STViT
from vitrim.methods.stvit_r import STViTR
from vitrim.methods.stvit_swin import STViTSwin

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        DynamicViT,
        DynamicSpatial,
        ASViT,
        SaiT,
        SPViT,
        SPViTPyramid,
        STViT,
        STViTSwin,
        STViTR,
    )
}


def register(method: type[Method]) -> type[Method]:
    """Make a method of your own known, by its name and its config's class; a decorator."""
    METHODS[method.name] = method
    return method


def method_by_name(name: str) -> type[Method]:
    """The method called ``name`` at the edges (JSON, TOML, command line)."""
    if name not in METHODS:
        raise ConfigError(
            f"unknown method {name!r}{closest(name, METHODS)}; known: {', '.join(METHODS)}"
        )
    return METHODS[name]


def method_of_config(config: object) -> type[Method]:
    """The method whose config class ``config`` is an instance of."""
    for method in METHODS.values():
        if type(config) is method.config_class:
            return method
    known = ", ".join(method.config_class.__name__ for method in METHODS.values())
    raise ConfigError(f"{type(config).__name__} is not a method config; pass one of: {known}")
