"""Checkpoints on Hugging Face's hub, with a card that says what they are and how that was measured.

``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and ``HF_HOME`` are huggingface_hub's own. What is
fetched is a stranger's: it is read as any other checkpoint, and nothing in it is run.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitrim.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_config
from vitrim.errors import CheckpointError, MissingExtraError, printable

CARD_FILE = "README.md"

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_hub_name(source: Any) -> bool:
    """Whether a text can be the name of a model on the hub. A ``Path`` never is: what a file says
    of a checkpoint is made one, and so reaches no network.
    """
    return isinstance(source, str) and _NAME.fullmatch(source) is not None


def folder_of(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a checkpoint: ``source`` where it is one, else what the hub has by that name.

    Args:
        source: a folder, or ``owner/name``. A folder that is there always wins.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: there is neither, the hub cannot be reached, or what it has is no
            checkpoint of vitrim's; its weights are fetched after its config was checked.
    """
    if Path(source).exists() or not is_hub_name(source):
        if revision is not None:
            raise CheckpointError(
                f"revision={revision!r} is of models on the hub, and {source} is none; leave it out"
            )
        return Path(source)
    client = _client(f"fetching {source} from the hub")
    endpoint = {"endpoint": os.environ.get("HF_ENDPOINT")}
    try:
        with _quiet():
            found = client.hf_hub_download(source, CONFIG_FILE, revision=revision, **endpoint)
            folder = Path(found).parent
            read_config(folder)
            # The second file is asked for by the commit of the first, which names the folder.
            client.hf_hub_download(source, WEIGHTS_FILE, revision=folder.name, **endpoint)
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client raises errors of many libraries
        what = source if revision is None else f"{source} at revision {revision}"
        raise CheckpointError(
            f"{what} is no folder here, and cannot be fetched from the hub ({_reason(error)}); "
            "check the name, the revision and the network, or give a folder"
        ) from error
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the hub's client's remarks on each time that it tries again."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def push_model(sparse: Any, repository: str, metrics: dict[str, Any] | None, **options: Any) -> str:
    """Save a sparse model, write its card, and :func:`push` both."""
    _check_name(repository)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sparse.save_pretrained(folder, metrics)
        known = getattr(sparse.backbone, "pretrained_cfg", None) or {}
        facts = {
            "macs": sparse.macs(),
            "dense_macs": sparse.dense_macs(),
            "licence": known.get("license"),
            "source": known.get("hf_hub_id"),
        }
        (folder / CARD_FILE).write_text(card(read_config(folder), facts), encoding="utf-8")
        return push(folder, repository, **options)


def _check_name(repository: str) -> None:
    if not is_hub_name(repository):
        raise CheckpointError(
            f"{repository!r:.100} is no name of a model on the hub; expected owner/name"
        )


def push(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Commit a checkpoint and its card to the hub; all of its files, or none.

    Returns:
        the address of the commit.

    Raises:
        CheckpointError: the name is none, or the hub cannot be reached or refuses.
    """
    _check_name(repository)
    client = _client("pushing to the hub")
    files = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)
    operations = [client.CommitOperationAdd(name, str(folder / name)) for name in files]
    api = client.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    message = message or "A sparse model by vitrim"
    try:
        with _quiet():
            api.create_repo(repository, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            commit = api.create_commit(
                repository, operations, commit_message=message, revision=revision
            )
    except Exception as error:  # the hub's client raises errors of many libraries
        raise CheckpointError(
            f"{repository} cannot be pushed to the hub ({_reason(error)}); check the name, the "
            "network, and that you are logged in (hf auth login, or HF_TOKEN)"
        ) from error
    return str(commit.commit_url)


def _client(purpose: str) -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise MissingExtraError(purpose, "huggingface_hub", "hf") from error
    return huggingface_hub


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {printable(lines[0])[:200] if lines else 'no reason given'}"


def card(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The model card, in Markdown, of a checkpoint.

    Args:
        config: its ``config.json``.
        facts: ``macs`` and ``dense_macs`` of an image (``macs`` None: it depends on the image),
            ``licence`` and ``source`` of the backbone's weights, each None where it is not known.
    """
    backbone, method = config["backbone"]["name"], config["method"]
    licence = facts["licence"]
    front = {
        "library_name": "vitrim",
        "pipeline_tag": "image-classification",
        "license": licence or "other",
        "tags": ["vitrim", "token-reduction", method["name"], backbone],
    }
    size = " x ".join(str(side) for side in config["data"]["input_size"][1:])
    rows = {
        "method": f"`{method['name']}`: {_words(method['config'])}",
        "backbone": f"`{backbone}`, images of {size}",
        "cost": _cost(facts),
        "budgets met": _budgets(config["calibration"]) or "none recorded",
        **{_cell(name): _words(value) for name, value in config["metrics"].items()},
        "licence of the backbone": licence or "not recorded",
        "weights of the backbone": facts["source"] or "not recorded",
        "origin": config["origin"] or "not recorded",
        "written with": ", ".join(f"{name} {v}" for name, v in config["versions"].items()),
    }
    if "top1" not in "".join(config["metrics"]).replace("-", "").lower():
        rows["top-1"] = "not measured"
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    return f"""---
{header}
---

# {backbone}, made sparse by {method["name"]}

A vision transformer that computes only the tokens that matter, made with
[vitrim](https://pypi.org/project/vitrim/).

| | |
|---|---|
{table}

MACs are multiply-accumulates per image, by formula; milliseconds are of the device, runtime and
batch that stand beside them. What was not measured is not given.

```python
import vitrim

sparse = vitrim.from_pretrained("this/model")
logits = sparse(images)
```
"""


def _cost(facts: Mapping[str, Any]) -> str:
    macs, dense = facts["macs"], facts["dense_macs"]
    if macs is None:
        return f"depends on the image; dense {dense / 1e9:.3f} GMACs"
    return f"{macs / 1e9:.3f} GMACs, {macs / dense:.0%} of dense ({dense / 1e9:.3f})"


def _budgets(calibration: list[dict[str, Any]]) -> str:
    return "; ".join(
        f"{point['budget']:g} of dense at {point['dial']} {point['value']:.6g} "
        f"({point['images']} images)"
        for point in calibration
    )


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(part)}" for name, part in value.items())
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def _cell(text: str) -> str:
    """A text as a cell of a table: on one line, without the bars that would end it."""
    return printable(" ".join(str(text).split())).replace("|", "\\|")
