"""Tuning parameters of the compression kernels."""

from __future__ import annotations

import dataclasses

from jax.experimental import pallas as pl

from pallas_kernels.compress.arguments import Shape

# About as many programs as a GPU has multiprocessors; each streams its own columns of the weights.
PROGRAMS = 128
SHARED_BYTES = 160 * 1024


@dataclasses.dataclass(frozen=True)
class CompressConfig:
    """How φ is mapped to the GPU; a program computes some columns of one head's first product, for all used slots.

    Attributes:
      rows: used slots that share one reading of the weights, a power of two of at least 16.
      columns: of the first weight; a power of two of at least 16.
      offsets: of a block, in one step of the loop over it.
      num_warps: warps of a program.
      num_stages: steps whose loads are in flight.
    """

    rows: int
    columns: int
    offsets: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            if (size := getattr(self, name)) < 16 or size & (size - 1):
                raise ValueError(f"{name}: got {size}, expected a power of two of at least 16")

    def shared_bytes(self, shape: Shape) -> int:
        """Shared memory of the first product's loop: weights, and rows of ring, tail and positions, of all stages."""
        lanes = pl.next_power_of_2(shape.head_dim)
        return self.num_stages * self.offsets * lanes * (3 * self.rows + self.columns) * shape.itemsize

    @classmethod
    def heuristic(cls, shape: Shape) -> CompressConfig:
        """The config for a call of this shape: most slots are unused, so few rows; steps of about 8 KiB of weights."""
        rows = 16 if shape.rows <= 64 else 32
        share = shape.width * shape.num_kv_heads * shape.sides // PROGRAMS
        columns = max(16, min(64, pl.next_power_of_2(share)))
        offsets = max(1, min(4, shape.block, 4096 // (columns * pl.next_power_of_2(shape.head_dim))))
        fitting = [stages for stages in (6, 5, 4, 3, 2) if cls(rows, columns, offsets, 4, stages).fits(shape)]
        return cls(rows, columns, offsets, 4, (fitting or [1])[0])

    def fits(self, shape: Shape) -> bool:
        """Whether a multiprocessor of an A100 or newer holds a program."""
        return self.shared_bytes(shape) <= SHARED_BYTES

    @classmethod
    def search_space(cls, shape: Shape) -> list[CompressConfig]:
        """The configs worth measuring for that shape."""
        space = [
            cls(rows, columns, offsets, warps, stages)
            for rows in (16, 32, 64)
            for columns in (16, 32, 64)
            for offsets in (1, 2, 4)
            for warps in (4, 8)
            for stages in (3, 4, 6, 8)
            if rows <= max(16, pl.next_power_of_2(shape.rows)) and columns <= max(16, shape.width)
        ]
        return [config for config in space if config.fits(shape)]
