"""Tuning parameters of the selection kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """How one row is mapped to the GPU; a program handles one row.

    Attributes:
      num_warps: warps that share the row. One warp counts without a barrier; more shorten long rows.
    """

    num_warps: int = 1

    @classmethod
    def heuristic(cls, rows: int, num_blocks: int) -> SelectionConfig:
        """The config for ``rows`` rows of ``num_blocks`` scores."""
        return cls(num_warps=1)

    @classmethod
    def search_space(cls, rows: int, num_blocks: int) -> Iterator[SelectionConfig]:
        """The configs worth measuring for that shape."""
        for num_warps in (1, 2, 4, 8):
            yield cls(num_warps=num_warps)
