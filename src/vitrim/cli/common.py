"""What the commands share: consoles, models by name, lists of numbers, files, progress."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import nn

from vitrim import checkpoint
from vitrim.errors import CheckpointError, ConfigError, InputError, printable
from vitrim.families import FAMILIES, ConvNeXt, NaFlex
from vitrim.families.described import describe_data
from vitrim.hub import is_hub_name
from vitrim.model import SparseModel, from_pretrained
from vitrim.tools.benchmark import checked_device

Value = TypeVar("Value", int, float)

_OF_ANY_SIZE = (*ConvNeXt.modules, *NaFlex.modules)
"""Timm's modules whose models no argument makes for one image size."""

# Of several processes only the first speaks.
_QUIET = int(os.environ.get("RANK", "0")) > 0


class _Console(Console):
    """Prints every text as it is: no part of a name or label is markup, or commands a terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(quiet=_QUIET, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def out() -> Console:
    """Where results go. Files and pipes get room enough for whole tables."""
    return _Console(width=None if sys.stdout.isatty() else 120)


def notes() -> Console:
    """Where remarks and progress go: the error stream."""
    return _Console(stderr=True, soft_wrap=True)


def note(text: str) -> None:
    """A remark for the user."""
    notes().print(text, style="dim")


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, one plain line elsewhere; yields what takes the number done so far."""
    console = notes()
    if not console.is_terminal:
        note(f"{label} ...")
        yield lambda done: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)


def load_model(
    source: str,
    weights: Path | None = None,
    *,
    pretrained: bool = True,
    image_size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """A checkpoint folder or a timm name as a model in evaluation mode.

    Args:
        source: what the user typed.
        weights: safetensors file with a timm model's weights.
        pretrained: whether a timm name without ``weights`` gets timm's own weights, or random ones.
        image_size: side, or height and width, in pixels that a timm model is made for; None takes
            its own.
    """
    path = Path(source)
    if path.is_dir():
        if image_size is not None:
            raise ConfigError("the image size of a checkpoint is fixed; leave --image-size out")
        refuse({"--weights": weights}, f"{source} is a checkpoint, which has its own")
        return from_pretrained(path)
    if path.is_file():
        raise CheckpointError(
            f"{source} is a file; a vitrim checkpoint is a folder. For an authors' file use: "
            "vitrim convert; for weights of a timm model: its name and --weights"
        )
    return _load_dense(source, weights, pretrained, image_size)


def _load_dense(
    name: str,
    weights: Path | None,
    pretrained: bool,
    image_size: int | tuple[int, int] | None,
) -> nn.Module:
    """The timm model called ``name``, or the dense model of the embedded set (``digits_vit``)."""
    from vitrim.train.shipped import DIGITS_NAME, digits_backbone

    if name == DIGITS_NAME:
        return digits_backbone(weights)
    if not timm.is_model(name):
        if is_hub_name(name) and weights is None and image_size is None:
            return from_pretrained(name)
        raise InputError(
            f"{name!r} is neither a checkpoint folder nor a timm model{_close_model(name)}; "
            "see: vitrim list models"
        )
    if weights is None and pretrained:
        try:
            return timm.create_model(name, pretrained=True).eval()
        except Exception as error:  # the hub's client raises errors of many libraries
            reason = next(iter(str(error).strip().splitlines()), "no reason given")
            raise InputError(
                f"timm cannot fetch the pretrained weights of {name!r} "
                f"({type(error).__name__}: {reason}); give a file with --weights"
            ) from error
    takes_any = any(name in timm.list_models(module=m) for m in _OF_ANY_SIZE)
    size: dict[str, Any] = {}
    if image_size is not None and not takes_any:
        size = {"img_size": image_size}
    try:
        model: nn.Module = timm.create_model(name, **size)
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        raise InputError(f"timm cannot create {name!r} with {size}: {error}") from error
    if weights is not None:
        checkpoint.load_strict(model, checkpoint.read_weights(weights), str(weights))
    return model.eval()


def _close_model(name: str) -> str:
    """Likely meanings of a misspelt name; the part before the patch size may stand alone."""
    from vitrim.train.shipped import DIGITS_NAME

    modules = [module for family in FAMILIES for module in family.modules]
    models = [model for module in modules for model in timm.list_models(module=module)]
    starts = {full.partition("_patch")[0]: full for full in [*reversed(models), DIGITS_NAME]}
    near = get_close_matches(name, models) or [
        starts[start] for start in get_close_matches(name, starts)
    ]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def require_sparse(model: nn.Module, source: str) -> SparseModel:
    """``model``, if it is a sparse one."""
    if not isinstance(model, SparseModel):
        raise InputError(
            f"{source!r} is a dense model; this command needs a vitrim checkpoint folder, "
            "as written by vitrim train or vitrim convert"
        )
    return model


def data_config_of(model: nn.Module, source: str = "") -> dict[str, Any]:
    """How images are prepared for ``model``; the embedded data have a preparation of their own.

    Raises:
        CheckpointError: the checkpoint's record of it is damaged.
    """
    from vitrim.train.data import digits_data_config, is_digits

    stored = getattr(model, "data_config", None)
    config = stored or describe_data(backbone_of(model))
    missing = [key for key in ("input_size", "mean", "std") if key not in config]
    if missing:
        raise CheckpointError(f"the checkpoint's data config is damaged: no {', '.join(missing)}")
    if is_digits(source) and not stored:
        return digits_data_config(config["input_size"][-1])
    return dict(config)


def data_source(source: str) -> str:
    """What the data readers call ``source``: the embedded set means its test split here."""
    from vitrim.train.data import is_digits

    return "digits/test" if source == "digits" and is_digits(source) else source


def backbone_of(model: nn.Module) -> nn.Module:
    """The timm model in ``model``, or itself."""
    return model.backbone if isinstance(model, SparseModel) else model


def num_classes_of(model: nn.Module) -> int:
    """Outputs of the classifier."""
    return int(backbone_of(model).num_classes)  # type: ignore[arg-type]  # timm sets an int


def class_names_of(model: nn.Module, dataset: Any = None) -> Sequence[str] | None:
    """Names of the classes: the data's, the model's, or ImageNet's for a thousand outputs."""
    classes: Sequence[str] | None = getattr(dataset, "classes", None)
    classes = getattr(model, "labels", None) if classes is None else classes
    if classes is None and num_classes_of(model) == 1000:
        from timm.data.imagenet_info import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        classes = [info.index_to_description(label) for label in range(1000)]
    return classes


def setting_name(model: SparseModel) -> str:
    """What a result is called: the method and what it is set to."""
    if not model.method.drops:
        return f"{model.method.name} by vitrim"  # beside the timm model
    if model.macs() is None:
        return f"{model.method.name}, adaptive"
    ratio = getattr(model.config, "keep_ratio", None)
    if ratio is None:
        return model.method.name
    dial = model.method.dial()
    if dial.name != "keep_ratio":  # another setting is in the ratio's place
        return f"{model.method.name}, {dial.name} {dial.value:g}"
    ratios = ratio if isinstance(ratio, tuple) else (ratio,)
    return f"{model.method.name} {', '.join(f'{each:g}' for each in ratios)}"


def refuse(options: Mapping[str, Any], reason: str) -> None:
    """Raise :class:`ConfigError` where an option, by name, is given that would not be heeded."""
    given = [name for name, value in options.items() if value]
    if given:
        are = "is" if len(given) == 1 else "are"
        raise ConfigError(f"{' and '.join(given)} {are} given, but {reason}")


def numbers(text: str, kind: Callable[[str], Value], option: str) -> list[Value]:
    """``"1,16"`` as numbers."""
    try:
        return [kind(word.strip()) for word in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} is {text!r}; expected numbers with commas between them, such as "
            f"{'1,16' if kind is int else '0.7,0.5'}"
        ) from None


def device_of(name: str | None) -> torch.device:
    """The device called ``name``; None takes CUDA where it is."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return checked_device(name)


def check_writable(path: Path | None) -> None:
    """Fail before the work, not after it, if ``path`` cannot be written as a file."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file to write")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path} cannot be written: the folder {path.parent} does not exist")


def check_new_folder(folder: Path) -> None:
    """Fail before the work if ``folder`` cannot be written to as a folder."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder to write to")


def name_unreadable(names: tuple[str, ...]) -> None:
    """Tell which images were left out."""
    if names:
        listed = "\n  ".join(name.replace("\n", "\\n") for name in names[:20])
        more = f"\n  and {len(names) - 20} more" if len(names) > 20 else ""
        note(f"left out, {len(names)} unreadable image(s):\n  {listed}{more}")


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write ``content`` with the command that made it; the file appears whole or not at all."""
    if path is None:
        return
    content = {"command": " ".join(["vitrim", *sys.argv[1:]]), **content}
    checkpoint.write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())
    note(f"written: {path}")
