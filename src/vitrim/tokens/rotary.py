"""Rotary positions: queries and keys are turned by angles that say where a token came from.

A backbone makes its angles once a forward, for the whole grid. Kept tokens look theirs up by their
original places, image by image; nothing is computed again. What has no place (prefix and package
tokens, padding) is not turned. A merged token keeps the place of the token that the others went
into: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rotary:
    """Sines and cosines (A numbers a head) by original place; the last place is nowhere."""

    tables_LHNA: Tensor
    """(L, H, N + 1, A): of each block (L is 1 where all have the same) and of each head (or 1)."""
    table_HNA: Tensor
    """Of the block that comes next."""

    @classmethod
    def of(cls, angles: Tensor) -> Rotary:
        """From what timm's embeddings give: (N, A), or (L, H, N, A) for each block and head."""
        angles_LHNA = angles if angles.ndim == 4 else angles[None, None]
        half = angles_LHNA.shape[-1] // 2
        unturned = torch.cat([angles_LHNA.new_zeros(half), angles_LHNA.new_ones(half)])
        nowhere = unturned.expand(*angles_LHNA.shape[:2], 1, 2 * half)
        tables = torch.cat([angles_LHNA, nowhere], 2)
        return cls(tables, tables[0])

    @property
    def is_shared(self) -> bool:
        """Whether all blocks have the same."""
        return len(self.tables_LHNA) == 1

    def at(self, block: int) -> Rotary:
        """The same before ``block``."""
        return self if self.is_shared else replace(self, table_HNA=self.tables_LHNA[block])

    @property
    def nowhere(self) -> int:
        """The place of what has none."""
        return self.table_HNA.shape[1] - 1

    def of_images(self, index_BN: Tensor, num_prefix: int) -> Tensor:
        """(B, H, P + N, A): of tokens at these places behind ``num_prefix`` that have none."""
        place_BT = F.pad(index_BN, (num_prefix, 0), value=self.nowhere)
        angles_HRA = self.table_HNA.index_select(1, place_BT.flatten())
        return angles_HRA.view(-1, *place_BT.shape, angles_HRA.shape[-1]).transpose(0, 1)

    def of_rows(self, index_N: Tensor, row_N: Tensor, num_rows: int) -> Tensor:
        """(rows, H, A): of packed rows; ``row_N`` are at these places, the others nowhere."""
        place_T = index_N.new_full((num_rows,), self.nowhere).index_copy(0, row_N, index_N)
        return self.table_HNA.index_select(1, place_T).transpose(0, 1)
