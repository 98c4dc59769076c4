"""What a compression is given: where raw entries lie, which blocks end where, and φ's weights."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _check


class Side(NamedTuple):
    """A layer's keys or its values, with their φ.

    Attributes:
      ring: [B, Hkv, R, D], committed entries, position p in slot p mod R; R is at least l − 1.
      fresh: [B, T, Hkv, D], the new tokens' entries, of that dtype.
      weight: [Hkv, l·D, W], offset-major; of any dtype, rounded to the entries'.
      weight_out: [Hkv, W, D], the second layer of an MLP; None: φ is linear, and W = D.
      position: [Hkv, l, D], what is added to the entries, rounded to their dtype; or None.
    """

    ring: jax.Array
    fresh: jax.Array
    weight: jax.Array
    weight_out: jax.Array | None = None
    position: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one call, read off its arguments."""

    batch: int
    slots: int  # M
    num_kv_heads: int
    head_dim: int
    block: int  # l
    width: int  # W
    sides: int
    is_mlp: bool
    itemsize: int  # bytes of an entry or a weight, whichever has more

    @property
    def rows(self) -> int:
        """Slots of all sequences."""
        return self.batch * self.slots


def check(
    key: Side, value: Side | None, slot: jax.Array, back: jax.Array, start: jax.Array, rotation: jax.Array | None
) -> Shape:
    """The call's sizes. Raises ValueError naming the first argument of a wrong shape or dtype."""
    for name, array, expected in (
        ("key.ring", key.ring, "[B, Hkv, R, D]"),
        ("key.fresh", key.fresh, "[B, T, Hkv, D]"),
        ("key.weight", key.weight, "[Hkv, l·D, W]"),
        ("back", back, "[B, M, l]"),
    ):
        # Of no sequences or slots there is nothing to be done.
        _check.dims(name, array, expected, empty="BM")
    batch, heads, ring, dim = key.ring.shape
    slots, block = back.shape[1:]
    for name, array, own in (("slot", slot, ()), ("back", back, (block,)), ("start", start, ())):
        _check.exact(name, array, (batch, slots, *own), jnp.int32)
    if rotation is not None:
        _check.exact("rotation", rotation, (2, batch, slots, dim // 2), jnp.float32)
    if ring < block - 1:
        raise ValueError(
            f"key.ring: got a ring of {ring}, expected at least {block - 1}: a block's tokens before its last"
        )
    width = key.weight.shape[2]
    for name, side in (("key", key), ("value", value)):
        if side is None:
            continue
        if (side.weight_out is None) != (key.weight_out is None):
            raise ValueError("value.weight_out: given for one side, expected for both or neither")
        wide = dim if side.weight_out is None else width
        shapes = {
            "ring": (batch, heads, ring, dim), "fresh": (batch, key.fresh.shape[1], heads, dim),
            "weight": (heads, block * dim, wide), "weight_out": (heads, wide, dim), "position": (heads, block, dim),
        }  # fmt: skip
        for field, shape in shapes.items():
            array = getattr(side, field)
            if array is not None or field not in ("weight_out", "position"):
                dtype = key.ring.dtype if field in ("ring", "fresh") else None
                _check.exact(f"{name}.{field}", array, shape, dtype)
    return Shape(
        batch, slots, heads, dim, block, width, 1 if value is None else 2, key.weight_out is not None,
        max(key.ring.dtype.itemsize, key.weight.dtype.itemsize),
    )  # fmt: skip
