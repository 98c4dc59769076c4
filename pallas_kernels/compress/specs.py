"""Named arguments of ``compress``: one list for the tests, one for benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compress.arguments import Shape, Side


@dataclasses.dataclass(frozen=True)
class CompressSpec:
    """Arguments of one call.

    Attributes:
      name: what is special about it.
      used: of each sequence, how many slots are.
      slots: M; nodes: T; ring: R.
      hidden: W of an MLP; 0: φ is linear.
      position, values, rotated: whether there are learned positions, values, and a rotation.
      weights: their dtype; "": ``dtype``.
    """

    name: str
    used: tuple[int, ...]
    slots: int = 1
    nodes: int = 6
    heads: int = 2
    dim: int = 16
    block: int = 8
    ring: int = 9
    hidden: int = 32
    position: bool = True
    values: bool = True
    rotated: bool = True
    dtype: str = "float32"
    weights: str = ""

    @property
    def shape(self) -> Shape:
        """The call's sizes."""
        return Shape(len(self.used), self.slots, self.heads, self.dim, self.block, self.hidden or self.dim,
                     1 + self.values, self.hidden > 0,
                     max(jnp.dtype(name).itemsize for name in (self.dtype, self.weights or self.dtype)))  # fmt: skip

    @property
    def bytes(self) -> int:
        """What the operation has to read: all weights once, if any slot is used."""
        first = self.heads * self.block * self.dim * self.shape.width
        size = first + self.heads * self.hidden * self.dim
        return any(self.used) * self.shape.sides * size * jnp.dtype(self.weights or self.dtype).itemsize

    def abstract(self) -> tuple[Any, ...]:
        """Shapes and dtypes of the array arguments."""
        shape = self.shape

        def side() -> Side:
            def array(*dims: int, dtype: str = self.weights or self.dtype) -> Any:
                return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))

            return Side(
                array(shape.batch, self.heads, self.ring, self.dim, dtype=self.dtype),
                array(shape.batch, self.nodes, self.heads, self.dim, dtype=self.dtype),
                array(self.heads, self.block * self.dim, shape.width),
                array(self.heads, self.hidden, self.dim) if self.hidden else None,
                array(self.heads, self.block, self.dim) if self.position else None,
            )

        def integers(*dims: int) -> Any:
            return jax.ShapeDtypeStruct((shape.batch, self.slots, *dims), jnp.int32)

        rotation = jax.ShapeDtypeStruct((2, shape.batch, self.slots, self.dim // 2), jnp.float32)
        return (side(), side() if self.values else None, integers(), integers(self.block), integers(),
                rotation if self.rotated else None)  # fmt: skip

    def arguments(self, seed: int = 0) -> tuple[Any, ...]:
        """``key, value, slot, back, start, rotation`` in NumPy; entries that no used slot names are NaN."""
        rng = np.random.default_rng(seed)
        key, value, slot, back, start, rotation = self.abstract()
        scales = {"weight": (self.block * self.dim) ** -0.5, "weight_out": max(1, self.hidden) ** -0.5}

        def filled(side: Any) -> Any:
            arrays: dict[str, Any] = {
                name: None if leaf is None else
                (scales.get(name, 1.0) * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
                for name, leaf in side._asdict().items()
            }  # fmt: skip
            return Side(**arrays)

        sides = [None if side is None else filled(side) for side in (key, value)]
        slot, back = np.full(slot.shape, self.nodes, np.int32), np.zeros(back.shape, np.int32)
        start = rng.integers(0, 1000, start.shape).astype(np.int32)
        named = np.zeros((2, len(self.used), max(self.ring, self.nodes)), bool)
        for b, used in enumerate(self.used):
            slot[b, :used] = np.sort(rng.choice(self.nodes, used, replace=False))
            for m in range(used):
                path = [int(slot[b, m])]
                while path[0] > 0:
                    path.insert(0, int(rng.integers(path[0])))
                path = path[-self.block :]
                committed = self.block - len(path)
                back[b, m] = [-1] * committed + path
                named[0, b, (start[b, m] + np.arange(committed)) % self.ring] = True
                named[1, b, path] = True
        for side in sides:
            if side is not None:
                np.swapaxes(side.ring, 1, 2)[~named[0, :, : self.ring]] = np.nan
                side.fresh[~named[1, :, : self.nodes]] = np.nan
        if rotation is not None:
            angle = rng.uniform(0, 6, rotation.shape[1:])
            rotation = np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)
        return *sides, slot, back, start, rotation


TESTS = [
    CompressSpec("decode", (1,), nodes=1),
    CompressSpec("nothing-ends", (0, 0), slots=2),
    CompressSpec("ragged", (1, 0, 2), slots=2),
    CompressSpec("tree-of-two-row-tiles", (13, 0, 11), slots=20, nodes=20),
    CompressSpec("linear", (2, 1), slots=3, hidden=0),
    CompressSpec("linear-plain", (2, 1), slots=3, hidden=0, position=False, rotated=False),
    CompressSpec("keys-only", (1, 2), slots=2, values=False),
    CompressSpec("odd-sizes", (2, 1), slots=3, heads=3, dim=24, hidden=10, block=7, ring=6),
    CompressSpec("bfloat16", (2, 1), slots=2, dtype="bfloat16", dim=32),
    CompressSpec("head-dim-8", (2, 1), slots=2, dtype="bfloat16", dim=8, hidden=0),
    CompressSpec("bfloat16-of-float32-weights", (2, 1), slots=2, dtype="bfloat16", weights="float32"),
    CompressSpec("paper-sizes", (1, 0), dim=128, block=32, ring=32, hidden=256, dtype="bfloat16", heads=1),
]  # fmt: skip

# Layers of 8 KV heads: one token, a chain of 16, a tree of 64; no block ends, or one in each sequence.
BENCHMARKS = [
    CompressSpec(f"D{dim}-B{batch}-T{nodes}-{'one' if used else 'none'}", (used,) * batch, slots=slots, nodes=nodes,
                 heads=8, dim=dim, block=32, ring=32, hidden=256, dtype="bfloat16")
    for dim in (128, 64)
    for batch in (1, 8, 32)
    for nodes, slots in ((1, 1), (16, 1), (64, 64))
    for used in (0, 1)
]  # fmt: skip
