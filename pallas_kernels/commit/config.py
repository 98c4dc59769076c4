"""Tuning parameters of the commit kernel."""

from __future__ import annotations

import dataclasses

from jax.experimental import pallas as pl

from pallas_kernels import _check
from pallas_kernels.commit.arguments import Shape


@dataclasses.dataclass(frozen=True)
class CommitConfig:
    """How a path is mapped to the GPU; a program writes some heads of one token, in all arrays.

    Attributes:
      heads: KV heads of a program, a power of two.
      num_warps: warps that share them.
    """

    heads: int
    num_warps: int

    def __post_init__(self) -> None:
        _check.whole_fields(self, "heads", power_of_two=True)
        _check.warps(self, "num_warps")

    @classmethod
    def heuristic(cls, shape: Shape) -> CommitConfig:
        """The config for a call of this shape: 1024 elements a program, a warp for 256 (16 bytes a thread in bf16)."""
        dim = pl.next_power_of_2(shape.head_dim)
        heads = min(pl.next_power_of_2(shape.num_kv_heads), max(1, 1024 // dim))
        return cls(heads, max(1, min(8, heads * dim // 256)))

    @classmethod
    def search_space(cls, shape: Shape) -> list[CommitConfig]:
        """The configs worth measuring for that shape."""
        dim, most = pl.next_power_of_2(shape.head_dim), pl.next_power_of_2(shape.num_kv_heads)
        return [
            cls(heads, warps)
            for heads in (1, 2, 4, 8, 16)
            for warps in (1, 2, 4, 8)
            if heads <= most and (warps == 1 or 128 * warps <= heads * dim) and heads * dim <= 2048 * warps
        ]
