"""Recipes: everything that a training run is made of, in one TOML file.

``load_recipe("dynamicvit-deit-s", ["method.keep_ratio=0.6"])`` reads a packaged recipe (or a file)
and changes single values by their dotted names.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from vitrim.budgets.schedule import load as load_schedule
from vitrim.config import check_plain, from_plain, require, shown, to_plain
from vitrim.errors import ConfigError
from vitrim.families.described import check_arguments
from vitrim.methods import method_by_name
from vitrim.tasks.config import TaskRecipe
from vitrim.train.toml import apply_override, packaged, read_toml

_MOST = 10**9
"""Of the numbers in a recipe: larger ones overflow on their way into a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRecipe:
    """The dense model that training starts from."""

    name: str | None = None
    """timm name; None only with ``checkpoint``."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the architecture, such as ``num_classes`` or ``drop_path_rate``."""
    pretrained: bool = False
    """Take timm's pretrained weights, from its cache or from where timm knows them: the one setting
    that asks the network."""
    weights: str | None = None
    """A safetensors file with timm's names, loaded strictly, or a checkpoint folder, of which the
    backbone is taken, whatever it was trained for; ``package:NAME`` is a shipped file."""
    init: Literal["timm", "fan_in"] = "timm"
    """New weights of linear and convolution layers: timm's, or normal with variance 1 / fan-in.
    timm's standard deviation of 0.02 suits the published widths; a much narrower model stays at
    chance for a thousand steps with it."""
    checkpoint: str | None = None
    """A vitrim checkpoint folder to go on from; its method's fields are changed by ``[method]``."""
    teacher: bool = True
    """Distil from a frozen copy of the dense model as it is before training. With ``checkpoint``
    and ``name`` the teacher is the named model, with ``checkpoint`` alone its own backbone."""

    def __post_init__(self) -> None:
        check_arguments(self.kwargs, "model.kwargs")
        require(
            self.name is not None or self.checkpoint is not None,
            "model has no name; give model.name (a timm model) or model.checkpoint (a folder)",
        )
        require(
            not (self.pretrained and self.weights),
            "model.pretrained and model.weights are both set; choose one source of weights",
        )
        require(
            self.init == "timm" or not (self.pretrained or self.weights or self.checkpoint),
            f"model.init is {self.init!r}, but the weights are loaded; leave one of them out",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodRecipe:
    """How the model is made sparse. In TOML the method's own fields stand beside ``name``."""

    name: str | None = None
    """Method name; None trains the dense model itself."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the method's config."""

    def __post_init__(self) -> None:
        if self.name is not None:
            self.build()

    def build(self) -> Any:
        """The method's config object."""
        if self.name is None:
            raise ConfigError("method.name is not set, so there is no method config to build")
        config_class: Any = method_by_name(self.name).config_class
        return from_plain(config_class, self.config, "method")


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetRecipe:
    """A latency to train for, as a table of ``vitrim profile`` predicts it."""

    milliseconds: float | None = None
    """Mean per batch of the table; None trains for what the method's own settings say."""
    table: str | None = None
    """The table's file. It may be of another machine than the one that trains."""
    weight: float = 2.0
    """Of the loss term, where counts are learned: the squared distance of the predicted latency
    from the budget, relative to it."""
    images: int = 256
    """Training images on which the dial is set before a result is validated and saved, where
    counts depend on the images."""

    def __post_init__(self) -> None:
        asked = self.milliseconds
        require(
            asked is None or 0 < asked < math.inf,
            f"budget.milliseconds is {asked}; expected more than 0",
        )
        require(
            (asked is None) == (self.table is None),
            "budget needs both milliseconds and table, as in "
            'budget = { milliseconds = 12.0, table = "table.json" }',
        )
        _require_at_least("budget", self, 0, "weight")
        _require_at_least("budget", self, 1, "images")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRecipe:
    """Where images come from, and how many at a time."""

    train: str
    """Source of training images: a folder with one folder per class, a tar of it, a timm reader
    name (``hfds/...``, ``wds/...``, ``tfds/...``), or ``digits``."""
    val: str | None = None
    """Source of validation images, of the same kinds; None validates nothing."""
    root: str | None = None
    """Where the data of a prefixed reader lie."""
    train_split: str | None = None
    """Split of a prefixed reader; None takes ``train``."""
    val_split: str | None = None
    """Split of a prefixed reader; None takes ``validation``."""
    class_map: str | None = None
    """Text file with the class folders in label order; None takes the folders' natural order."""
    labels: bool = True
    """False ignores labels: the run learns from the teacher alone."""
    batch_size: int = 128
    """Images per device and forward pass."""
    workers: int = 4
    """Processes per device that read images; 0 reads in the training process."""
    max_unreadable: float = 0.01
    """Share of the training images that may be unreadable before the run stops."""
    image_size: int | None = None
    """Side of the images in pixels; None takes the model's."""
    crop_pct: float | None = None
    """Share of the resized image that the evaluation crop keeps; None takes the model's."""
    length: int = 20_000
    """Embedded set only: training pictures per epoch; every epoch has new ones."""
    val_length: int = 2_000
    """Embedded set only: number of validation pictures."""
    curriculum_epochs: int = 0
    """Embedded set only: epochs over which the clutter rises from none to all of it."""

    def __post_init__(self) -> None:
        _require_at_least("data", self, 1, "batch_size")
        _require_at_least("data", self, 1, "length", "val_length", most=10**7)
        _require_at_least("data", self, 0, "workers", most=1000)
        _require_at_least("data", self, 0, "curriculum_epochs")
        _require_share("data", self, "max_unreadable")
        size, crop = self.image_size, self.crop_pct
        require(size is None or 0 < size <= 10**4, f"data.image_size is {size}; expected pixels")
        require(crop is None or 0.01 <= crop <= 1, f"data.crop_pct is {crop}; expected 0.01 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentRecipe:
    """Random changes to the training images, all by timm."""

    none: bool = False
    """Prepare training images as for evaluation, without any random change."""
    scale: tuple[float, ...] = (0.08, 1.0)
    """Smallest and largest share of the area that the random resized crop takes."""
    ratio: tuple[float, ...] = (0.75, 4 / 3)
    """Smallest and largest width / height of that crop."""
    hflip: float = 0.5
    """Probability of a mirror image."""
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    """Of the random resized crop."""
    rand_augment: str | None = None
    """timm's name of an automatic augmentation, such as ``rand-m9-mstd0.5-inc1``."""
    color_jitter: float = 0.0
    """Strength of the colour jitter; timm leaves it out when ``rand_augment`` is set."""
    random_erase: float = 0.0
    """Probability of erasing a rectangle (filled with noise per pixel)."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is off. With both mixup and CutMix each batch takes either, half and half.
    """
    cutmix: float = 0.0
    """Alpha of CutMix; 0 is off."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):
            low_high = getattr(self, name)
            good = len(low_high) == 2 and 0 < low_high[0] <= low_high[1] < math.inf
            require(good, f"augment.{name} is {low_high}; expected two numbers, the smaller first")
        require(self.scale[1] <= 1, f"augment.scale is {self.scale}; shares end at 1")
        _require_share("augment", self, "hflip", "random_erase", "label_smoothing")
        _require_at_least("augment", self, 0, "color_jitter", "mixup", "cutmix")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimRecipe:
    """AdamW, its schedule, and what is averaged."""

    lr: float = 1e-3
    """Peak learning rate of the method's parameters (of the whole model in a dense run)."""
    lr_batch: int | None = None
    """Global batch that ``lr`` is meant for: it is scaled linearly to the one in use. None takes
    ``lr`` as it is."""
    backbone_lr_scale: float = 1.0
    """Learning rate of the backbone relative to the method's; sparse runs only."""
    backbone_schedule: Literal["cosine", "constant"] = "cosine"
    """Whether the backbone's rate falls with the method's, or stays at ``backbone_lr_scale`` times
    the peak, though never above the method's (the SPViT authors')."""
    freeze_backbone_epochs: int = 0
    """First epochs in which the backbone does not move; sparse runs only."""
    train_embeddings: bool = True
    """Train the class token, position embedding and other learned tokens. The DynamicViT authors
    leave them out of the optimiser."""
    weight_decay: float = 0.05
    """Decoupled decay; none on vectors, biases and the learned tokens."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """AdamW's moment decays."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0, step by step."""
    schedule: Literal["cosine", "linear", "steps"] = "cosine"
    """How the rate falls after the warm-up: along half a cosine, along a line, or to a tenth at the
    start of each of ``step_epochs``."""
    step_epochs: tuple[int, ...] = ()
    """Epochs, counted from 0, for the schedule ``steps``."""
    min_lr: float = 0.0
    """Where a cosine or line ends, before ``backbone_lr_scale``."""
    clip_grad: float | None = None
    """Largest gradient norm; None does not clip."""
    ema_decay: float | None = None
    """Decay of the moving average of the weights, which is then what is saved; None keeps none."""
    accumulate: int = 1
    """Batches whose gradients are added up before a step."""

    def __post_init__(self) -> None:
        names = ("lr", "backbone_lr_scale", "weight_decay", "warmup_epochs", "min_lr")
        _require_at_least("optim", self, 0, *names, "freeze_backbone_epochs")
        _require_at_least("optim", self, 1, "accumulate")
        if self.lr_batch is not None:
            _require_at_least("optim", self, 1, "lr_batch")
        good = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(good, f"optim.betas is {self.betas}; expected two numbers in [0, 1)")
        require(
            (self.schedule == "steps") == bool(self.step_epochs),
            f"optim.schedule is {self.schedule!r} and optim.step_epochs are {self.step_epochs}; "
            "steps need epochs, and epochs need schedule = 'steps'",
        )
        clip, decay = self.clip_grad, self.ema_decay
        require(clip is None or clip > 0, f"optim.clip_grad is {clip}; expected more than 0")
        require(decay is None or 0 <= decay < 1, f"optim.ema_decay is {decay}; expected [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecipe:
    """How long to train, and what to write down."""

    epochs: int
    """Passes over the training images; the schedule spans them all."""
    seed: int = 0
    """Data order, augmentation, new parameters and the method's noise are functions of it."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Of the forward and backward pass; weights stay in fp32. ``"auto"`` is bf16 where the device
    has instructions for it, and fp32 elsewhere."""
    checkpoint_steps: int = 500
    """Optimiser steps between two saved trainer states; the end of an epoch saves one too."""
    eval_every: int = 1
    """Epochs between two validations; the end of the run validates in any case."""
    log_every: int = 10
    """Optimiser steps between two lines of the log."""
    max_seconds: float | None = None
    """Stop after the step in which a call has taken this long, validate and save; the schedule
    stays that of ``epochs``, and a later call goes on from there. None never stops early."""
    tensorboard: bool = True
    """Write TensorBoard files as well, where it is installed."""

    def __post_init__(self) -> None:
        names = ("epochs", "checkpoint_steps", "eval_every", "log_every")
        _require_at_least("run", self, 1, *names)
        _require_at_least("run", self, 0, "seed", most=2**63 - 1)
        limit = self.max_seconds
        require(limit is None or limit > 0, f"run.max_seconds is {limit}; expected more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A training run."""

    name: str
    """Short name."""
    description: str = ""
    """One line for lists."""
    task: TaskRecipe = field(default_factory=TaskRecipe)
    """What for."""
    model: ModelRecipe
    """What is trained."""
    method: MethodRecipe = field(default_factory=MethodRecipe)
    """How it is made sparse."""
    budget: BudgetRecipe = field(default_factory=BudgetRecipe)
    """For what latency."""
    data: DataRecipe
    """On what."""
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    """Changed how."""
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    """By which optimiser."""
    run: RunRecipe
    """For how long."""

    def __post_init__(self) -> None:
        dense = self.method.name is None and self.model.checkpoint is None
        given = ", ".join(self.method.config)
        require(not (dense and given), f"method.name is not set, but its fields are: {given}")
        require(
            self.budget.milliseconds is None or not dense,
            "budget is for sparse models; name a method, or leave the budget out",
        )
        score_weight = self.method.config.get("score_weight", 0)
        require(
            self.model.teacher or not score_weight,
            "method.score_weight needs a teacher; set model.teacher = true",
        )
        require(
            self.data.labels or (self.model.teacher and not dense),
            "data.labels is false, so a teacher must say what to learn: use a method, with "
            "model.teacher = true",
        )
        require(
            self.data.labels or self.data.val is None or self.data.val != self.data.train,
            "data.val is the unlabelled training data; give labelled validation data or none",
        )


def recipe_from_plain(data: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data, as TOML gives it: the fields of the method, and those of the task,
    stand beside its name.

    Raises:
        ConfigError: an unknown key, a missing table, or a value that does not fit.
    """
    require(isinstance(data, Mapping), f"the recipe is {shown(data)}; a table was expected")
    tables = dict(data)
    method, values = _named(tables, "method")
    tables["method"] = {"name": method, "config": _scheduled(method, values)}
    if "task" in tables:
        task, values = _named(tables, "task")
        tables["task"] = {"name": task, "config": values}
    needed = {"name": "", "model": "name", "data": "train", "run": "epochs"}
    for table, key in needed.items():
        require(table in tables, f"the recipe has no {table!r}")
        inside = tables[table]
        missing = key and table != "model" and isinstance(inside, Mapping) and key not in inside
        require(not missing, f"the recipe has no {table}.{key}")
    return from_plain(Recipe, tables)


def _named(tables: Mapping[str, Any], table: str) -> tuple[Any, dict[str, Any]]:
    """The name in a table, and the fields beside it."""
    content = tables.get(table, {})
    require(isinstance(content, Mapping), f"{table} is {shown(content)}; a table was expected")
    values = {key: value for key, value in content.items() if key != "name"}
    if values.keys() == {"config"}:  # the form of recipe.json
        values = values["config"]
        require(isinstance(values, dict), f"{table}.config is {shown(values)}; expected a table")
    return content.get("name"), values


def _scheduled(name: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The method's fields, with those that a schedule's file gives in place of ``schedule``.

    Where a method has a setting of that name (SaiT), a file's name ends in .json.
    """
    path = values.get("schedule")
    if path is None:
        return values
    require(isinstance(name, str), "method.schedule needs method.name")
    config_class: Any = method_by_name(name).config_class
    is_setting = "schedule" in {entry.name for entry in fields(config_class)}
    if is_setting and not str(path).endswith(".json"):
        return values
    require(isinstance(path, str), f"method.schedule is {shown(path)}; a file was expected")
    values = {key: value for key, value in values.items() if key != "schedule"}
    config = from_plain(config_class, values, "method")
    before, after = to_plain(config), to_plain(load_schedule(path).apply(config))
    return values | {key: value for key, value in after.items() if value != before[key]}


def load_recipe(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: a packaged recipe's name (see :func:`list_recipes`) or a TOML file.
        overrides: such as ``"optim.lr=1e-4"``; the value is TOML, a bare word is a string, and
            ``none`` unsets an optional value.

    Raises:
        ConfigError: no such recipe, no TOML, or a key or value that does not fit; it names the
            file.
    """
    data = read_toml(source)
    try:
        _refuse_hubs(data)
        for override in overrides:
            apply_override(data, override)
        check_plain(data)
        return recipe_from_plain(data)
    except ConfigError as error:
        changes = f" with {shown(', '.join(overrides))}" if overrides else ""
        raise ConfigError(f"recipe {os.fspath(source)}{changes}: {error}") from error


def _refuse_hubs(data: dict[str, Any]) -> None:
    """Refuse data of a hub that a file names: only the command line may send us there."""
    table = data.get("data")
    for key in ("train", "val"):
        name = table.get(key) if isinstance(table, dict) else None
        require(
            not (isinstance(name, str) and name.lower().startswith(("hfds/", "hfids/", "tfds/"))),
            f"data.{key} is {shown(name)}, which is read from a hub; a recipe's file may not ask "
            f"the network, so give it by hand: --set data.{key}=...",
        )


def list_recipes() -> dict[str, str]:
    """Packaged recipes: name to one-line description."""
    return {name: read_toml(name).get("description", "") for name in sorted(packaged())}


def _require_at_least(
    table: str, config: Any, least: float, *names: str, most: float = _MOST
) -> None:
    for name in names:
        value = getattr(config, name)
        require(least <= value, f"{table}.{name} is {value}; expected {least} or more")
        require(value <= most, f"{table}.{name} is {value}; expected {most} or less")


def _require_share(table: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, f"{table}.{name} is {value}; expected a share from 0 to 1")
