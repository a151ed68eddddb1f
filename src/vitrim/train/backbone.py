"""The dense model that a recipe starts from, whatever it is trained for."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vitrim.capabilities import require_served
from vitrim.checkpoint import load_strict, read_weights
from vitrim.config import closest
from vitrim.errors import CheckpointError, ConfigError
from vitrim.model import SparseModel
from vitrim.train.recipe import ModelRecipe, Recipe
from vitrim.train.samples import mix_seed, seeded


def create_dense(recipe: ModelRecipe, seed: int) -> nn.Module:
    """The dense timm model of ``recipe``, on the CPU; new weights are a function of ``seed``."""
    name = recipe.name or ""
    if not timm.is_model(name):
        near = closest(name.partition(".")[0], timm.list_models())
        raise ConfigError(f"model.name {name!r} is unknown to timm{near}")
    if recipe.pretrained and not recipe.kwargs:
        require_served(name)  # before weights are fetched
    try:
        with seeded(seed, 3):
            model: nn.Module = timm.create_model(
                name, pretrained=recipe.pretrained, **recipe.kwargs
            )
            if recipe.init == "fan_in":
                model.apply(_init_fan_in)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"timm cannot create {name!r} with {recipe.kwargs}: {error}") from error
    if recipe.weights is not None:
        path = weights_path(recipe.weights)
        load_strict(model, read_weights(path), str(path))
    return model


def new_sparse(backbone: nn.Module, config: Any, recipe: Recipe) -> SparseModel:
    """``backbone`` made sparse; new parameters are a function of the recipe's seed."""
    generator = torch.Generator().manual_seed(mix_seed(recipe.run.seed, 4))
    return SparseModel(backbone, config, generator)


def _init_fan_in(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")


def package_file(name: str) -> Path:
    """Where the package keeps the weights called ``name``."""
    return Path(str(resources.files("vitrim") / "assets" / f"{name}.safetensors"))


def weights_path(weights: str) -> Path:
    """The file that ``weights`` means: a path, or ``package:NAME`` for one shipped with vitrim."""
    prefix, _, name = weights.partition("package:")
    if prefix or not name:
        return Path(weights)
    path = package_file(name)
    if not path.is_file():
        raise CheckpointError(f"no weights {weights!r} are shipped with this vitrim ({path})")
    return path
