"""The authors' published checkpoints as vitrim models."""

from vitrim.convert.official import load_dense, load_official, read_file

__all__ = ["load_dense", "load_official", "read_file"]
