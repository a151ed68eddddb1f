"""For whom a graph is made, where that decides how something is computed."""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def exporting() -> bool:
    """Whether ``torch.export`` makes the graph.

    Compilers call this function instead of looking into it: the question itself is answered with
    yes in any graph that torch 2.11 compiles, which then gets what only exporters need.
    """
    return torch.compiler.is_exporting()
