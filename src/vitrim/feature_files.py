"""Features of many images in one file, one row an image: ``.npz`` or ``.parquet``.

Rows are written as they come, so the file may be larger than the memory; it appears whole or not
at all. Nothing here loads torch.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrim.errors import ConfigError, InputError, MissingExtraError

Rows = Iterable[tuple[Sequence[str], Mapping[str, NDArray[Any]]]]
"""Names of some images, and their features by name, each (images, ...)."""


def check_output(path: Path) -> None:
    """Raise :class:`ConfigError` or :class:`InputError` unless features can be written to ``path``;
    :class:`MissingExtraError` if what writes them is not installed.
    """
    if path.suffix not in _WRITERS:
        raise ConfigError(f"{path} is neither .npz nor .parquet; give a file of one of these kinds")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{path} cannot be written: it is a folder, or its folder is absent")
    if path.suffix == ".parquet":
        _pyarrow()


def write_features(path: Path, rows: Rows, count: int) -> None:
    """Write ``rows``, of ``count`` images, as the ending of ``path`` says.

    ``.npz`` holds an array ``name`` and one array (images, ...) per feature. ``.parquet`` has a
    column ``name`` and one per feature, of lists of floats; the shapes of an image's features are
    in the metadata of the columns, as ``shape``.
    """
    check_output(path)
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as work:
        written = Path(work) / path.name
        _WRITERS[path.suffix](written, rows, count)
        os.replace(written, path)


def _write_npz(path: Path, rows: Rows, count: int) -> None:
    names: list[str] = []
    arrays: dict[str, NDArray[Any]] = {}
    for some, features in rows:
        for name, values in features.items():
            if name not in arrays:
                arrays[name] = np.lib.format.open_memmap(
                    path.with_name(f"{name}.npy"), "w+", np.float32, (count, *values.shape[1:])
                )
            arrays[name][len(names) : len(names) + len(values)] = values
        names += some
    np.save(path.with_name("name.npy"), np.array(names))
    files = ["name", *arrays]
    arrays.clear()  # closes them
    with zipfile.ZipFile(path, "w") as archive:
        for name in files:
            archive.write(path.with_name(f"{name}.npy"), f"{name}.npy")


def _write_parquet(path: Path, rows: Rows, count: int) -> None:
    pyarrow = _pyarrow()
    from pyarrow import parquet

    writer = None
    try:
        for names, features in rows:
            columns = {"name": pyarrow.array(names, pyarrow.string())}
            fields = [pyarrow.field("name", pyarrow.string())]
            for name, values in features.items():
                flat = np.ascontiguousarray(values, np.float32).reshape(len(values), -1)
                kind = pyarrow.list_(pyarrow.float32(), flat.shape[1])
                columns[name] = pyarrow.FixedSizeListArray.from_arrays(
                    pyarrow.array(flat.reshape(-1)), flat.shape[1]
                )
                shape = {"shape": ",".join(map(str, values.shape[1:]))}
                fields.append(pyarrow.field(name, kind, metadata=shape))
            schema = pyarrow.schema(fields)
            writer = writer or parquet.ParquetWriter(path, schema)
            writer.write_table(pyarrow.table(columns, schema=schema))
    finally:
        if writer is not None:
            writer.close()


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise MissingExtraError("writing .parquet", "pyarrow", "parquet") from error
    return pyarrow


_WRITERS: dict[str, Callable[[Path, Rows, int], None]] = {
    ".npz": _write_npz,
    ".parquet": _write_parquet,
}
