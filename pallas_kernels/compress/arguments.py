"""What a compression is given: where raw entries lie, which blocks end where, and φ's weights."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Side(NamedTuple):
    """A layer's keys or its values, with their φ.

    Attributes:
      ring: [B, Hkv, R, D], committed entries, position p in slot p mod R.
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
        if array.ndim != expected.count(",") + 1 or 0 in array.shape[2:]:
            raise ValueError(f"{name}: got shape {array.shape}, expected {expected}")
    batch, heads, _, dim = key.ring.shape
    slots, block = back.shape[1:]
    for name, array, own in (("slot", slot, ()), ("back", back, (block,)), ("start", start, ())):
        if array.shape != (batch, slots, *own) or array.dtype != jnp.int32:
            raise ValueError(f"{name}: got {array.dtype} {array.shape}, expected int32 {(batch, slots, *own)}")
    if rotation is not None and (rotation.shape != (2, batch, slots, dim // 2) or rotation.dtype != jnp.float32):
        expected = f"float32 {(2, batch, slots, dim // 2)}"
        raise ValueError(f"rotation: got {rotation.dtype} {rotation.shape}, expected {expected}")
    width = key.weight.shape[2]
    for name, side in (("key", key), ("value", value)):
        if side is None:
            continue
        if (side.weight_out is None) != (key.weight_out is None):
            raise ValueError("value.weight_out: given for one side, expected for both or neither")
        wide = dim if side.weight_out is None else width
        shapes = {
            "ring": (batch, heads, *key.ring.shape[2:]), "fresh": (batch, key.fresh.shape[1], heads, dim),
            "weight": (heads, block * dim, wide), "weight_out": (heads, wide, dim), "position": (heads, block, dim),
        }  # fmt: skip
        for field, shape in shapes.items():
            array = getattr(side, field)
            if array is None:
                continue
            if array.shape != shape:
                raise ValueError(f"{name}.{field}: got shape {array.shape}, expected {shape}")
            if field in ("ring", "fresh") and array.dtype != key.ring.dtype:
                raise ValueError(f"{name}.{field}: got {array.dtype}, expected {key.ring.dtype}")
    return Shape(
        batch, slots, heads, dim, block, width, 1 if value is None else 2, key.weight_out is not None,
        max(key.ring.dtype.itemsize, key.weight.dtype.itemsize),
    )  # fmt: skip
