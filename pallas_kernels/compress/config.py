"""Tuning parameters of the compression kernels."""

from __future__ import annotations

import dataclasses

from jax.experimental import pallas as pl

from pallas_kernels import _check
from pallas_kernels._call import padded
from pallas_kernels.compress.arguments import Shape

# Where the sums that programs leave to the second kernel are more, there are fewer splits: most are of unused slots.
SUMS_BYTES = 64 << 20
SHARED_BYTES = 160 * 1024


@dataclasses.dataclass(frozen=True)
class CompressConfig:
    """How φ is mapped to the GPU; a program sums over some entries of a block, for some columns and all used slots.

    Attributes:
      rows: used slots in one step over them, a power of two of at least 16.
      columns: of the first weight; a power of two of at least 16.
      splits: programs that share out a block's entries; fewer if it has fewer steps.
      offsets: of a block, in one step.
      num_warps: warps of a program; finish_warps: of one of the second kernel's.
      num_stages: steps whose loads are in flight.
    """

    rows: int
    columns: int
    splits: int
    offsets: int
    num_warps: int
    num_stages: int
    finish_warps: int = 8

    def __post_init__(self) -> None:
        _check.whole_fields(self, "splits", "offsets", "num_stages")
        _check.whole_fields(self, "rows", "columns", least=16, power_of_two=True)
        _check.warps(self, "num_warps", "finish_warps")

    def share(self, shape: Shape) -> int:
        """Entries of a block that a program sums over: whole steps."""
        return -(-shape.block // (self.splits * self.offsets)) * self.offsets

    def parts(self, shape: Shape) -> int:
        """Programs that share out a block's entries."""
        return -(-shape.block // self.share(shape))

    def shared_bytes(self, shape: Shape) -> int:
        """Shared memory of the first product: weights, and rows of ring, tail and positions, of all stages."""
        lanes = padded(shape.head_dim)
        return self.num_stages * self.offsets * lanes * (self.columns + 3 * self.rows) * shape.itemsize

    @classmethod
    def heuristic(cls, shape: Shape) -> CompressConfig:
        """The config for a call of this shape: at 8 KV heads and 256 hidden units, two programs a multiprocessor."""
        lanes = padded(shape.head_dim)
        columns = max(16, min(64, pl.next_power_of_2(shape.width)))
        offsets = max(1, min(2, shape.block, 128 // lanes))
        splits = min(4, cls._most_splits(shape))
        rows = 16 if shape.batch <= 16 else 32  # of a draft one slot is used, or few, however many there are
        stages = (4, 3, 2) if offsets == 1 else (3, 2)
        fitting = [count for count in stages if cls(rows, columns, splits, offsets, 4, count).fits(shape)]
        return cls(rows, columns, splits, offsets, 4, (fitting or [1])[0])

    @staticmethod
    def _most_splits(shape: Shape) -> int:
        """Splits whose sums take no more than SUMS_BYTES, or 1; a power of two."""
        sums = 4 * shape.sides * shape.num_kv_heads * max(1, shape.rows) * shape.width
        return 1 << max(0, (SUMS_BYTES // sums).bit_length() - 1)

    def fits(self, shape: Shape) -> bool:
        """Whether a multiprocessor of an A100 or newer holds a program."""
        return self.shared_bytes(shape) <= SHARED_BYTES

    @classmethod
    def search_space(cls, shape: Shape) -> list[CompressConfig]:
        """The configs worth measuring for that shape."""
        most = min(16, cls._most_splits(shape))
        space = [
            cls(rows, columns, splits, offsets, warps, stages)
            for rows in (16, 32)
            for columns in (32, 64, 128)
            for splits in dict.fromkeys(max(1, most // part) for part in (4, 2, 1))
            for offsets in (1, 2)
            for warps in (4, 8)
            for stages in (3, 4)
            if rows <= max(16, pl.next_power_of_2(shape.rows)) and columns <= max(32, shape.width)
        ]
        return [config for config in space if config.fits(shape)]
