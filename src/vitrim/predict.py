"""``vitrim predict`` of an exported bundle: neither torch nor timm is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vitrim.errors import InputError, printable
from vitrim.feature_files import check_output, write_features
from vitrim.runtime import Array, Bundle, open_image

_AT_ONCE = 16
"""Images per call where the network takes any number."""


def main(words: Sequence[str]) -> None:
    """``vitrim predict``: the likeliest classes of each image."""
    parser = argparse.ArgumentParser(
        prog="vitrim predict",
        description="Classify images with an exported bundle; neither torch nor timm is needed.",
    )
    parser.add_argument("bundle", type=Path, help="Folder written by vitrim export.")
    parser.add_argument("images", type=Path, nargs="+", help="Image files.")
    parser.add_argument(
        "--features",
        nargs="?",
        const="all",
        help="Write features in place of classes, of a bundle exported with --features: all, or "
        "some by name, such as embedding; needs --output. Give it after the images.",
    )
    parser.add_argument("--output", "-o", type=Path, help="For features: a .npz or .parquet file.")
    parser.add_argument("--top", type=_count, default=3, help="Classes to name per image.")
    parser.add_argument("--threads", type=_count, help="CPU threads.")
    options = parser.parse_args(words)
    if (options.features is None) != (options.output is None):
        parser.error("--features and --output are given together")
    bundle = Bundle(options.bundle, options.threads)
    if options.features is not None:
        _write_features(bundle, options)
        return
    for path in options.images:
        logits = bundle(bundle.prepare([open_image(path)]), [str(path)])[0].astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares)[: options.top]
        names = [bundle.labels[label] if bundle.labels else str(label) for label in best]
        answers = ", ".join(
            f"{name} {shares[label]:.1%}" for name, label in zip(names, best, strict=True)
        )
        print(printable(f"{path}: {answers}").replace("\n", "\\n"))


def _write_features(bundle: Bundle, options: argparse.Namespace) -> None:
    known, asked = bundle.feature_names, options.features.split(",")
    if known is None:
        raise InputError(f"{bundle.folder} gives logits; export the model with --features")
    wanted = list(known) if options.features == "all" else asked
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(f"{bundle.folder} has no {unknown[0]!r}; it has {', '.join(known)}")
    check_output(options.output)
    size, paths = bundle.batch or _AT_ONCE, options.images

    def rows() -> Iterator[tuple[list[str], dict[str, Array]]]:
        for start in range(0, len(paths), size):
            names = [str(path) for path in paths[start : start + size]]
            images = bundle.prepare([open_image(name) for name in names])
            found = bundle.features(images, names)
            yield names, {name: found[name] for name in wanted}

    write_features(options.output, rows(), len(paths))
    print(printable(f"{options.output}: {', '.join(wanted)} of {len(paths)} images"))


def _count(word: str) -> int:
    number = int(word)
    if not 1 <= number <= 10_000:
        raise argparse.ArgumentTypeError(f"{word} is no number from 1 to 10,000")
    return number
