"""The authors' published checkpoints, and models of other libraries, as vitrim models."""

from vitrim.convert.inside import as_transformers, sparsify_inside
from vitrim.convert.official import SYSTEMS, load_dense, load_official, read_file
from vitrim.convert.transformers import from_transformers

__all__ = [
    "SYSTEMS",
    "as_transformers",
    "from_transformers",
    "load_dense",
    "load_official",
    "read_file",
    "sparsify_inside",
]
