"""The authors' published checkpoints as vitrim models."""

from vitrim.convert.official import SYSTEMS, load_dense, load_official, read_file

__all__ = ["SYSTEMS", "load_dense", "load_official", "read_file"]
