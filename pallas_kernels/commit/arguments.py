"""What a commit is given: a layer's cache, the new tokens' entries, and which of them go where."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _check


class Entries(NamedTuple):
    """A layer's keys and values: stored ones, or those of T new tokens and of the M blocks that end among them.

    P pages of l' tokens; d tokens between compression blocks; position p in slot p mod R of a ring of R.

    Attributes:
      key, value: stored in pages [P, Hkv, l', D]; new [B, T, Hkv, D].
      compressed_key, compressed_value: stored in pages [P, Hkv, l'/d, D]; new [B, M, Hkv, D].
      raw_key, raw_value: before compression; stored in a ring [B, Hkv, R, D]; new [B, T, Hkv, D].
      window_key, window_value: the window branch's own; stored in a ring [B, Hkv, R', D]; new [B, T, Hkv, D].
    All but ``key`` and ``value`` may be None.
    """

    key: jax.Array
    value: jax.Array
    compressed_key: jax.Array | None = None
    compressed_value: jax.Array | None = None
    raw_key: jax.Array | None = None
    raw_value: jax.Array | None = None
    window_key: jax.Array | None = None
    window_value: jax.Array | None = None


PAGED = ("key", "value", "compressed_key", "compressed_value")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one call, read off its arguments."""

    batch: int
    steps: int  # A
    slots: int  # M
    num_kv_heads: int
    head_dim: int


def check(
    layer: Entries,
    new: Entries,
    page_table: jax.Array,
    lengths: jax.Array,
    path: jax.Array,
    count: jax.Array,
    slot: jax.Array,
) -> Shape:
    """The call's sizes. Raises ValueError naming the first argument of a wrong shape or dtype."""
    for field in Entries._fields:
        if (getattr(layer, field) is None) != (getattr(new, field) is None):
            raise ValueError(f"{field}: given in one of layer and new, expected in both or neither")
    stored = [(field, array) for field, array in layer._asdict().items() if array is not None or field in PAGED[:2]]
    for name, array, expected in (
        *(
            (f"layer.{field}", array, "[P, Hkv, l', D]" if field in PAGED else "[B, Hkv, R, D]")
            for field, array in stored
        ),
        ("new.key", new.key, "[B, T, Hkv, D]"),
        ("page_table", page_table, "[B, N]"),
        ("path", path, "[B, A]"),
        ("slot", slot, "[B, M]"),
    ):
        # Of no sequences, steps or slots there is nothing to be done.
        _check.dims(name, array, expected, empty="BAM")
    pages, heads, page, dim = layer.key.shape
    batch, width = new.key.shape[:2]
    slots = slot.shape[1]
    for name, array, own in (
        ("page_table", page_table, page_table.shape[1:]),
        ("lengths", lengths, ()),
        ("path", path, path.shape[1:]),
        ("count", count, ()),
        ("slot", slot, slot.shape[1:]),
    ):
        _check.exact(name, array, (batch, *own), jnp.int32)
    per_page = next((array.shape[2] for field, array in stored if field.startswith("compressed")), page)
    if page % per_page:
        raise ValueError(f"layer.compressed_key: got {per_page} entries per page, expected a divisor of l' = {page}")
    for field, array in stored:
        compressed = field.startswith("compressed")
        entries = per_page if compressed else page if field in PAGED else array.shape[2]
        source = getattr(new, field)
        for name, given, shape in (
            (f"layer.{field}", array, (pages if field in PAGED else batch, heads, entries, dim)),
            (f"new.{field}", source, (batch, slots if compressed else width, heads, dim)),
        ):
            _check.exact(name, given, shape, layer.key.dtype)
    return Shape(batch, path.shape[1], slots, heads, dim)
