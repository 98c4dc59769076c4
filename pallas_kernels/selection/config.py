"""Tuning parameters of the selection kernel."""

from __future__ import annotations

import dataclasses

from jax.experimental import pallas as pl

from pallas_kernels import _check


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """How one row is mapped to the GPU; a program handles one row.

    Attributes:
      num_warps: warps that share the row. One warp counts without a barrier; more shorten long rows.
    """

    num_warps: int

    def __post_init__(self) -> None:
        _check.warps(self, "num_warps")

    @classmethod
    def heuristic(cls, rows: int, num_blocks: int) -> SelectionConfig:
        """The config for ``rows`` rows of ``num_blocks`` scores."""
        return cls(num_warps=min(16, max(1, pl.next_power_of_2(num_blocks) // 1024)))

    @classmethod
    def search_space(cls, rows: int, num_blocks: int) -> list[SelectionConfig]:
        """The configs worth measuring for that shape: 1 to 64 scores a thread, more would spill."""
        lanes = pl.next_power_of_2(num_blocks)
        return [cls(num_warps=warps) for warps in (1, 2, 4, 8, 16) if 32 * warps <= max(32, lanes) <= 64 * 32 * warps]
