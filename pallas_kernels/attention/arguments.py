"""What the attention kernels are given: the layer's static sizes, its cache, and a tail of new tokens."""

from __future__ import annotations

import dataclasses
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _check

_LARGEST_FINITE = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """The static choices of an NSA layer, in the paper's terms (arXiv 2502.11089); sizes in tokens.

    Attributes:
      compress_block, compress_stride: l and d; compression block i covers tokens [i·d, i·d+l).
      select_block, num_selected: l' and n, the forced blocks included.
      num_initial, num_local: blocks that every query selects, at the start and at its own end.
      window: tokens in the window, the query's own included.
      scale: of the dot products, before the softmax.
      compressed_output: False: the compressed branch only selects.

    Raises ValueError for sizes out of range or that do not divide.
    """

    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    num_initial: int = 1
    num_local: int = 2
    window: int = 512
    scale: float = 128**-0.5
    compressed_output: bool = True

    def __post_init__(self) -> None:
        names = "compress_block", "compress_stride", "select_block", "num_selected", "num_local", "window"
        _check.whole_fields(self, *names)
        _check.whole_fields(self, "num_initial", least=0)
        # NaN is not at most anything.
        if not (isinstance(self.scale, numbers.Real) and abs(self.scale) <= _LARGEST_FINITE):
            raise ValueError(f"scale: got {self.scale!r}, expected a finite number")
        l, d, lp = self.compress_block, self.compress_stride, self.select_block
        if l % d or lp % d or l > lp:
            raise ValueError(f"Sparsity: got l = {l}, d = {d}, l' = {lp}, expected d to divide l and l', and l <= l'")
        if self.num_selected < self.num_initial + self.num_local:
            raise ValueError(
                f"Sparsity: got num_selected {self.num_selected}, num_initial {self.num_initial}, num_local "
                f"{self.num_local}, expected num_selected >= num_initial + num_local"
            )

    @property
    def entries_per_page(self) -> int:
        """l'/d: compression blocks that begin in a selection block."""
        return self.select_block // self.compress_stride


class Layer(NamedTuple):
    """A layer's cache. P pages of one selection block each; R slots of a ring, at least the w − 1 before a query,
    position p in slot p mod R.

    Attributes:
      key, value: [P, Hkv, l', D].
      compressed_key, compressed_value: [P, Hkv, l'/d, D]; the value is None without ``compressed_output``.
      window_key, window_value: [B, Hkv, R, D], the window branch's own; None: it reads ``key`` and ``value``.
    """

    key: jax.Array
    value: jax.Array
    compressed_key: jax.Array
    compressed_value: jax.Array | None
    window_key: jax.Array | None
    window_value: jax.Array | None


class Tail(NamedTuple):
    """T new tokens per sequence, behind the committed ones, as a tree whose node 0 is the root.

    Attributes:
      positions: int32 [B, T].
      ancestor: bool [B or 1, T, T]; [i, j]: j is an ancestor of i, or i itself. None: node i − 1 is i's parent.
      slot: int32 [B, M]: nodes at which a compression block ends, ascending, then T where unused.
      key, value: [B, T, Hkv, D]; window_key, window_value: as these, None where ``Layer``'s are.
      compressed_key, compressed_value: [B, M, Hkv, D], the blocks that end at ``slot``; anything, NaN too, where that
        is unused.
    """

    positions: jax.Array
    ancestor: jax.Array | None
    slot: jax.Array
    key: jax.Array
    value: jax.Array
    window_key: jax.Array | None
    window_value: jax.Array | None
    compressed_key: jax.Array
    compressed_value: jax.Array | None


class Selection(NamedTuple):
    """The blocks that queries selected, alone and as groups of C adjacent queries (U = min(C·n, N) at most).

    Attributes:
      ids: int32 [B, T, Hkv, n], ascending, −1 padded.
      pages: int32 [B, Hkv, T/C, U]: the pages of the distinct blocks of a group that committed tokens fill, in the
        blocks' order; of these the first ``size`` int32 [B, Hkv, T/C] are meant.
      owners: int32 [B, Hkv, T/C, ⌈C/32⌉, U]: bit q % 32 of word q // 32 says whether query q of the group owns it.
      All three are None where queries are not grouped (C = 1).
    """

    ids: jax.Array
    pages: jax.Array | None
    owners: jax.Array | None
    size: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one call, read off its arguments."""

    batch: int
    width: int  # T
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    table: int  # N, page-table columns
    slots: int  # M
    ring: int  # R, 0 without a ring

    @property
    def group(self) -> int:
        """G, query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def lanes(self) -> int:
        """G, up to a power of two: rows that a query takes."""
        return 1 << (self.group - 1).bit_length()

    @property
    def rows(self) -> int:
        """Rows of a (sequence, KV head): row t·lanes + g is head g of query t."""
        return self.width * self.lanes


# What may be None, as far as the rest of the arguments allows it.
_OPTIONAL = (
    "gates", "layer.compressed_value", "layer.window_key", "layer.window_value", "tail.ancestor", "tail.window_key",
    "tail.window_value", "tail.compressed_value",
)  # fmt: skip


def check(
    sparsity: Sparsity,
    query: jax.Array,
    gates: jax.Array | None,
    layer: Layer,
    page_table: jax.Array,
    lengths: jax.Array,
    tail: Tail,
) -> Shape:
    """The call's sizes. Raises ValueError naming the first argument of a wrong shape or dtype."""
    for name, array, expected in (
        ("query", query, "[B, T, Hq, D]"),
        ("layer.key", layer.key, "[P, Hkv, l', D]"),
        ("layer.window_key", layer.window_key, "[B, Hkv, R, D]"),
        ("page_table", page_table, "[B, N]"),
        ("tail.ancestor", tail.ancestor, "[B or 1, T, T]"),
        ("tail.slot", tail.slot, "[B, M]"),
    ):
        if array is not None or name not in _OPTIONAL:
            _check.dims(name, array, expected)
    batch, width, heads, dim = query.shape
    pages, kv_heads = layer.key.shape[:2]
    if heads % kv_heads:
        raise ValueError(f"query: got {heads} heads, expected a multiple of layer.key's {kv_heads}")
    slots = tail.slot.shape[1]
    ring = 0 if layer.window_key is None else layer.window_key.shape[2]
    per_page = sparsity.entries_per_page
    ancestors = 1 if tail.ancestor is None else tail.ancestor.shape[0]
    dtype, integer, boolean = query.dtype, jnp.dtype(jnp.int32), jnp.dtype(bool)
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"query: got {dtype}, expected bfloat16 or float32")
    if ancestors not in (1, batch):
        raise ValueError(f"tail.ancestor: got a batch of {ancestors}, expected 1 or {batch}")
    token, slot = (batch, width, kv_heads, dim), (batch, slots, kv_heads, dim)
    page, entry = (pages, kv_heads, sparsity.select_block, dim), (pages, kv_heads, per_page, dim)
    near = (batch, kv_heads, ring, dim)
    for name, array, shape, wanted in (
        ("gates", gates, (batch, width, heads, 3), jnp.dtype(jnp.float32)),
        ("layer.key", layer.key, page, dtype),
        ("layer.value", layer.value, page, dtype),
        ("layer.compressed_key", layer.compressed_key, entry, dtype),
        ("layer.compressed_value", layer.compressed_value, entry, dtype),
        ("layer.window_key", layer.window_key, near, dtype),
        ("layer.window_value", layer.window_value, near, dtype),
        ("page_table", page_table, (batch, page_table.shape[1]), integer),
        ("lengths", lengths, (batch,), integer),
        ("tail.positions", tail.positions, (batch, width), integer),
        ("tail.ancestor", tail.ancestor, (ancestors, width, width), boolean),
        ("tail.slot", tail.slot, (batch, slots), integer),
        ("tail.key", tail.key, token, dtype),
        ("tail.value", tail.value, token, dtype),
        ("tail.window_key", tail.window_key, token, dtype),
        ("tail.window_value", tail.window_value, token, dtype),
        ("tail.compressed_key", tail.compressed_key, slot, dtype),
        ("tail.compressed_value", tail.compressed_value, slot, dtype),
    ):
        if array is not None or name not in _OPTIONAL:
            _check.exact(name, array, shape, wanted)
    for name, values in (
        ("compressed_value", (layer.compressed_value, tail.compressed_value)),
        ("window_key", (layer.window_key, tail.window_key)),
        ("window_value", (layer.window_value, tail.window_value)),
    ):
        if len({value is None for value in values}) != 1:
            raise ValueError(f"{name}: given in one of layer and tail, expected in both or neither")
    if (layer.window_key is None) != (layer.window_value is None):
        raise ValueError("layer.window_key, layer.window_value: got one of them, expected both or neither")
    if (layer.compressed_value is None) == sparsity.compressed_output:
        raise ValueError(
            f"layer.compressed_value: expected {'an array' if sparsity.compressed_output else 'None'}, as "
            f"compressed_output = {sparsity.compressed_output} says"
        )
    if 0 < ring < sparsity.window - 1:
        raise ValueError(
            f"layer.window_key: got a ring of {ring}, expected at least {sparsity.window - 1}: the window's tokens "
            "before a query"
        )
    return Shape(batch, width, heads, kv_heads, dim, pages, page_table.shape[1], slots, ring)
