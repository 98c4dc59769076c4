"""Tuning parameters of the compression kernels."""

from __future__ import annotations

import dataclasses

from jax.experimental import pallas as pl

from pallas_kernels.compress.arguments import Shape

# Programs, about four for each multiprocessor, and the least and most bytes of weights that one reads: 64 KiB are 64
# registers of each of 256 threads.
PROGRAMS, LEAST, MOST = 512, 8 * 1024, 64 * 1024
# Of shares' sums, at most.
SUMS_BYTES = 64 << 20
SHARED_BYTES = 160 * 1024


@dataclasses.dataclass(frozen=True)
class CompressConfig:
    """How φ is mapped to the GPU; a program sums over some entries of a block, for some columns and all used slots.

    Attributes:
      rows: used slots in one step over them, a power of two of at least 16.
      columns: of the first weight; a power of two of at least 16.
      splits: programs that share out a block's entries; fewer if it has fewer steps.
      offsets: of a block, in one step. If a program has one step only, it reads its weights once and keeps them;
        else it goes over them for each ``rows`` slots.
      num_warps: warps of a program; finish_warps: of one of the second kernel's.
      num_stages: steps whose loads are in flight; 1 where there is one step.
    """

    rows: int
    columns: int
    splits: int
    offsets: int
    num_warps: int
    num_stages: int
    finish_warps: int = 8

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            if (size := getattr(self, name)) < 16 or size & (size - 1):
                raise ValueError(f"{name}: got {size}, expected a power of two of at least 16")

    def share(self, shape: Shape) -> int:
        """Entries of a block that a program sums over: whole steps."""
        return -(-shape.block // (self.splits * self.offsets)) * self.offsets

    def parts(self, shape: Shape) -> int:
        """Programs that share out a block's entries."""
        return -(-shape.block // self.share(shape))

    def shared_bytes(self, shape: Shape) -> int:
        """Shared memory of the first product: weights, and rows of ring, tail and positions, of all stages."""
        lanes = pl.next_power_of_2(shape.head_dim)
        weights = self.offsets * lanes * self.columns
        if self.share(shape) == self.offsets:
            return (weights + lanes * self.rows) * shape.itemsize
        return self.num_stages * (weights + self.offsets * lanes * 3 * self.rows) * shape.itemsize

    @classmethod
    def heuristic(cls, shape: Shape) -> CompressConfig:
        """The config for a call of this shape: programs of equal, small work, several on each multiprocessor."""
        lanes = pl.next_power_of_2(shape.head_dim)
        size = shape.sides * shape.num_kv_heads * shape.block * lanes * shape.width * shape.itemsize
        numbers = min(MOST, max(LEAST, size // PROGRAMS)) // shape.itemsize
        columns = max(16, min(128, pl.next_power_of_2(shape.width)))
        while columns > 16 and lanes * columns > numbers:
            columns //= 2
        offsets = max(1, min(4, shape.block, numbers // (lanes * columns)))
        splits = -(-shape.block // offsets)
        # Sums take memory, mostly for slots that are not used.
        sums = 4 * shape.sides * shape.num_kv_heads * shape.rows * shape.width
        while splits > 1 and columns > 32 and splits * sums > SUMS_BYTES:
            columns, offsets = columns // 2, min(shape.block, offsets * 2)
            splits = -(-shape.block // offsets)
        rows = 16 if shape.rows <= 64 else 32
        if splits == 1 or splits * sums <= SUMS_BYTES:
            warps = 8 if offsets * lanes * columns * shape.itemsize > MOST // 2 else 4
            return cls(rows, columns, splits, offsets, warps, 1)
        while splits > 1 and splits * sums > SUMS_BYTES:
            splits = -(-splits // 2)
        offsets = max(1, min(4, shape.block, 4096 // (lanes * columns)))
        fitting = [stages for stages in (4, 3, 2) if cls(rows, columns, splits, offsets, 4, stages).fits(shape)]
        return cls(rows, columns, splits, offsets, 4, (fitting or [1])[0])

    def fits(self, shape: Shape) -> bool:
        """Whether a multiprocessor of an A100 or newer holds a program."""
        return self.shared_bytes(shape) <= SHARED_BYTES

    @classmethod
    def search_space(cls, shape: Shape) -> list[CompressConfig]:
        """The configs worth measuring for that shape."""
        space = [
            cls(rows, columns, splits, offsets, warps, stages)
            for rows in (16, 32)
            for columns in (32, 64, 128)
            for splits in (4, 8, 16)
            for offsets in (1, 2, 4, 8)
            for warps in (4, 8)
            for stages in (1, 3, 4, 6)
            if rows <= max(16, pl.next_power_of_2(shape.rows)) and columns <= max(16, shape.width)
        ]
        return [
            config
            for config in space
            if config.fits(shape) and (config.num_stages == 1) == (config.share(shape) == config.offsets)
        ]
