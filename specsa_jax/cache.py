"""The cache of a batch: pages of one selection block, rings for what only the recent past needs, commit and rollback.

A cache holds L *committed* tokens per sequence (``lengths``). New tokens live in a :class:`Tail` until a path of them
is accepted; :func:`commit` then writes the path. Nothing is ever written for a rejected token.

Layout, for a batch of B with P pages in the pool (page = one selection block of l' tokens):

    page_table [B, pages of the longest sequence] → pool index, or P where a sequence owns no page
    pages      key, value               [P, Hkv, l', D]      selected branch (all branches when K/V are shared)
               compressed key, value    [P, Hkv, l'/d, D]    entry i of a sequence: page i // (l'/d), slot i mod (l'/d)
    rings      raw key, value           [B, Hkv, R, D]       the last l entries before compression, at position mod R
               window key, value        [B, Hkv, R', D]      the last w tokens, when the window has K/V of its own

Rings hold ``max_rollback`` tokens more than a query needs: so far, and no farther, can lengths be taken back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from pallas_kernels import commit as kernels
from specsa_jax.config import ModelConfig, NSAConfig


class CapacityError(ValueError):
    """A request that does not fit the cache; the message has the numbers."""


class LayerCache(NamedTuple):
    """One layer's arrays (module docstring). Value and window arrays are None where the config has no use for them."""

    key: jax.Array
    value: jax.Array
    compressed_key: jax.Array
    compressed_value: jax.Array | None
    raw_key: jax.Array
    raw_value: jax.Array | None
    window_key: jax.Array | None
    window_value: jax.Array | None


class Cache(NamedTuple):
    """All layers, with the page table int32 [B, N] and committed lengths int32 [B] that they share."""

    layers: list[LayerCache]
    page_table: jax.Array
    lengths: jax.Array


class Topology(NamedTuple):
    """A tree of T nodes; node 0 is the root, parents come before children. Arrays may have a leading batch axis.

    Attributes:
      depth: int32 [T].
      ancestor: bool [T, T]; [i, j]: j is an ancestor of i, or i itself.
      back: int32 [T, l]; [i, k]: the node k steps above i, −1 beyond the root.
    """

    depth: jax.Array
    ancestor: jax.Array
    back: jax.Array


class Tail(NamedTuple):
    """T new tokens per sequence, as a tree behind the committed ones.

    Attributes:
      positions: int32 [B, T], L + depth.
      ancestor: bool [B or 1, T, T].
      slot: int32 [B, M]: the nodes at which a compression block ends (with room for M of them), T where unused.
      slot_back: int32 [B, M, l]: the block's tokens, first to last, as nodes; −1 for committed tokens.
    """

    positions: jax.Array
    ancestor: jax.Array
    slot: jax.Array
    slot_back: jax.Array


class LayerTail(NamedTuple):
    """A layer's K/V of a tail, ready to be committed: [B, T, Hkv, D], compressed entries [B, M, Hkv, D].

    Compressed entries of unused slots are arbitrary bits where the kernels computed them: their attention masks, and a
    commit takes those of its path. XLA's code multiplies them by 0, and computes its own.
    """

    key: jax.Array
    value: jax.Array
    raw_key: jax.Array
    raw_value: jax.Array | None
    window_key: jax.Array | None
    window_value: jax.Array | None
    compressed_key: jax.Array
    compressed_value: jax.Array | None


def topology(parents: Sequence[int], block: int) -> Topology:
    """The tree given by ``parents`` (−1 for node 0, then any earlier node); ``block`` is l.

    Raises ValueError for a parent that does not come before its node.
    """
    size = len(parents)
    if not size or parents[0] != -1:
        raise ValueError(f"parents: got {list(parents[:1])} first, expected -1 (the root)")
    depth = np.zeros(size, np.int32)
    ancestor = np.eye(size, dtype=bool)
    back = np.full((size, block), -1, np.int32)
    back[:, 0] = np.arange(size)
    for node, parent in enumerate(parents[1:], 1):
        if not 0 <= parent < node:
            raise ValueError(f"parents: node {node} got parent {parent}, expected one of 0 to {node - 1}")
        depth[node] = depth[parent] + 1
        ancestor[node] |= ancestor[parent]
        back[node, 1:] = back[parent, :-1]
    return Topology(jnp.asarray(depth), jnp.asarray(ancestor), jnp.asarray(back))


def chain(size: int, block: int) -> Topology:
    """The chain of ``size`` nodes."""
    return topology([node - 1 for node in range(size)], block)


def grown_topology(parents: jax.Array, depth: int, block: int) -> Topology:
    """As :func:`topology` for trees known only on the device: ``parents`` int32 [B, T], at most ``depth`` deep."""
    batch, size = parents.shape
    node = jnp.arange(size, dtype=jnp.int32)
    upward = jnp.pad(parents, ((0, 0), (0, 1)), constant_values=-1)  # the last: what −1 finds
    steps = [jnp.broadcast_to(node, (batch, size))]
    for _ in range(depth):
        steps.append(jnp.take_along_axis(upward, steps[-1] % (size + 1), axis=1))
    back = jnp.stack(steps, axis=-1)  # [B, T, depth + 1]
    ancestor = (back[..., None] == node).any(axis=-2)
    padded = jnp.pad(back, ((0, 0), (0, 0), (0, max(0, block - depth - 1))), constant_values=-1)
    return Topology((back >= 0).sum(axis=-1, dtype=jnp.int32) - 1, ancestor, padded[..., :block])


def make_tail(config: NSAConfig, tree: Topology, lengths: jax.Array, slots: int | None = None) -> Tail:
    """The tail that ``tree`` makes behind ``lengths`` committed tokens int32 [B].

    ``slots`` is M, room for the compression blocks that end in the tail: by default T; a chain needs ⌈T/d⌉.
    """
    size = tree.depth.shape[-1]
    positions = lengths[:, None] + tree.depth.reshape(-1, size)
    ends = ((positions + 1) % config.compress_stride == 0) & (positions + 1 >= config.compress_block)
    node = jnp.arange(size, dtype=jnp.int32)[None]
    slot = jnp.sort(jnp.where(ends, node, size), axis=-1)[:, : size if slots is None else slots]
    back = tree.back.reshape(-1, size, config.compress_block)
    back = jnp.broadcast_to(back, (slot.shape[0], *back.shape[1:]))
    taken = jnp.take_along_axis(back, jnp.minimum(slot, size - 1)[..., None], axis=1)
    return Tail(positions, tree.ancestor.reshape(-1, size, size), slot, taken[..., ::-1])


def chain_slots(config: NSAConfig, size: int) -> int:
    """How many compression blocks can end within a chain of ``size`` tokens."""
    return -(-size // config.compress_stride)


def pages_for(config: NSAConfig, tokens: int) -> int:
    """Pages that ``tokens`` tokens occupy."""
    return -(-tokens // config.select_block)


def ring_sizes(config: NSAConfig, max_rollback: int) -> tuple[int, int]:
    """Entries of the raw ring and the window ring: what a query at L can need of the past, plus the rollback."""
    return config.compress_block - 1 + max_rollback, max(config.window_tokens - 1, 1) + max_rollback


def create_cache(
    config: ModelConfig, page_table: np.ndarray, num_pages: int, dtype: jnp.dtype, max_rollback: int = 1
) -> Cache:
    """An empty cache for the sequences of ``page_table`` int32 [B, N], whose entries are pool indices or ``num_pages``.

    Raises CapacityError when a page belongs to two sequences or lies outside the pool.
    """
    nsa = config.nsa
    owned = page_table[page_table != num_pages]
    if owned.size and (owned.min() < 0 or owned.max() >= num_pages):
        raise CapacityError(f"page_table: got pages {owned.min()} to {owned.max()}, expected 0 to {num_pages - 1}")
    if np.unique(owned).size != owned.size:
        raise CapacityError("page_table: a page is listed twice; each belongs to one sequence")
    batch = page_table.shape[0]
    raw, near = ring_sizes(nsa, max_rollback)

    def pages(entries: int) -> jax.Array:
        return jnp.zeros((num_pages, nsa.num_kv_heads, entries, nsa.head_dim), dtype)

    def ring(entries: int) -> jax.Array:
        return jnp.zeros((batch, nsa.num_kv_heads, entries, nsa.head_dim), dtype)

    layers = [
        LayerCache(
            key=pages(nsa.select_block),
            value=pages(nsa.select_block),
            compressed_key=pages(nsa.blocks_per_page),
            compressed_value=pages(nsa.blocks_per_page) if nsa.compressed_output else None,
            raw_key=ring(raw),
            raw_value=ring(raw) if nsa.compressed_output else None,
            window_key=ring(near) if nsa.window_ring else None,
            window_value=ring(near) if nsa.window_ring else None,
        )
        for _ in range(config.layers)
    ]
    return Cache(layers, jnp.asarray(page_table, jnp.int32), jnp.zeros(batch, jnp.int32))


def ring_positions(lengths: jax.Array, size: int) -> jax.Array:
    """Positions int32 [B, size] in the slots of a ring: the largest p < L with p mod size = slot, or negative."""
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(size, dtype=jnp.int32)[None]) % size


def gather_pages(pool: jax.Array, page_table: jax.Array) -> jax.Array:
    """Pages [P, Hkv, E, D] of each sequence, in order: [B, Hkv, N·E, D]. Missing pages give arbitrary finite values."""
    taken = jnp.swapaxes(pool.at[page_table].get(mode="clip"), 1, 2)
    return taken.reshape(*taken.shape[:2], -1, taken.shape[-1])


def commit(
    config: NSAConfig,
    cache: Cache,
    tails: Sequence[LayerTail],
    tail: Tail,
    path: jax.Array,
    count: jax.Array,
    *,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Cache:
    """Writes the first ``count`` int32 [B] nodes of ``path`` int32 [B, A] to positions L … L + count − 1.

    ``path`` starts at the root and each node is a child of the one before; positions beyond a sequence's pages are
    dropped, so callers bound ``count``. The result equals the cache that sequential decoding leaves.

    ``implementation`` is "pallas" (one kernel a layer), "xla" (a scatter for each array), or None: "pallas" on a GPU
    for sizes that it takes, else "xla". ``interpret`` interprets the kernel, on any device. Both write the same bits.

    Raises UnsupportedError for "pallas" where the kernel does not run.
    """
    if kernels.choose(tail.slot.shape[1], config.head_dim, implementation, interpret) == "pallas":
        layers = []
        for layer, new in zip(cache.layers, tails, strict=True):
            entries = kernels.Entries(**new._asdict())
            written = kernels.commit(
                kernels.Entries(**layer._asdict()), entries, cache.page_table, cache.lengths, path, count, tail.slot,
                compress_block=config.compress_block, interpret=interpret,
            )  # fmt: skip
            layers.append(LayerCache(**written._asdict()))
        return cache._replace(layers=layers, lengths=cache.lengths + count)
    batch, steps = path.shape
    page, per_page = config.select_block, config.blocks_per_page
    num_pages = cache.layers[0].key.shape[0]
    step = jnp.arange(steps, dtype=jnp.int32)[None]
    taken = step < count[:, None]
    positions = cache.lengths[:, None] + step

    def owner(block: jax.Array, valid: jax.Array) -> jax.Array:
        """Pool index of a sequence's block; out of the pool, hence dropped, where invalid."""
        looked_up = jnp.take_along_axis(cache.page_table, block, axis=1, mode="fill", fill_value=num_pages)
        return jnp.where(valid, looked_up, num_pages)

    token_page, token_offset = owner(positions // page, taken), positions % page

    # Slot m is committed when its node is on the accepted path.
    node = jnp.minimum(tail.slot, tail.positions.shape[1] - 1)
    end = jnp.take_along_axis(tail.positions, node, axis=1)
    on_path = jnp.take_along_axis(path, jnp.clip(end - cache.lengths[:, None], 0, steps - 1), axis=1) == tail.slot
    slot_taken = on_path & (end - cache.lengths[:, None] < count[:, None])
    entry = (end + 1 - config.compress_block) // config.compress_stride
    slot_page, slot_offset = owner(jnp.maximum(entry, 0) // per_page, slot_taken), entry % per_page

    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def to_pages(pool: jax.Array, values: jax.Array) -> jax.Array:
        along = jnp.take_along_axis(values, path[..., None, None], axis=1)
        return pool.at[token_page, :, token_offset].set(along, mode="drop")

    def to_ring(ring: Any, values: Any) -> Any:
        if ring is None:
            return None
        # Of entries that meet in one slot only the last may be written: scatters have no order.
        size = ring.shape[2]
        kept = taken & (step >= count[:, None] - size)
        along = jnp.take_along_axis(values, path[..., None, None], axis=1)
        return ring.at[rows, :, jnp.where(kept, positions % size, size)].set(along, mode="drop")

    def to_slots(pool: Any, values: Any) -> Any:
        if pool is None:
            return None
        return pool.at[slot_page, :, slot_offset].set(values, mode="drop")

    def write(layer: LayerCache, new: LayerTail) -> LayerCache:
        return LayerCache(
            key=to_pages(layer.key, new.key),
            value=to_pages(layer.value, new.value),
            compressed_key=to_slots(layer.compressed_key, new.compressed_key),
            compressed_value=to_slots(layer.compressed_value, new.compressed_value),
            raw_key=to_ring(layer.raw_key, new.raw_key),
            raw_value=to_ring(layer.raw_value, new.raw_value),
            window_key=to_ring(layer.window_key, new.window_key),
            window_value=to_ring(layer.window_value, new.window_value),
        )

    layers = [write(layer, new) for layer, new in zip(cache.layers, tails, strict=True)]
    return cache._replace(layers=layers, lengths=cache.lengths + count)


def reads_first(true: jax.Array, read: Callable[[], Any]) -> Any:
    """``read()``, under a condition that always holds, which the compiler cannot know.

    What a branch reads of the cache is read before the commit that follows. Without the branch nothing would order
    the two, and XLA would copy the cache at every step, to write one copy and read the other.
    """
    nothing = jax.eval_shape(read)
    return jax.lax.cond(true, read, lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nothing))


def rollback(cache: Cache, lengths: jax.Array) -> Cache:
    """Takes committed lengths back to ``lengths`` int32 [B]; what lies behind them is unread from now on.

    Exact for up to the ``max_rollback`` tokens that the rings were made for, counted from the longest length ever
    committed since; :func:`check_rollback` refuses more.
    """
    return cache._replace(lengths=jnp.minimum(lengths, cache.lengths).astype(jnp.int32))


def check_rollback(config: NSAConfig, cache: Cache, lengths: np.ndarray) -> None:
    """Raises CapacityError unless the rings of ``cache`` still hold what a rollback to ``lengths`` int [B] needs.

    Counted from the present lengths: of several rollbacks in a row the sum must stay within ``max_rollback``, which
    the cache does not record.
    """
    current = np.asarray(cache.lengths)
    room = cache.layers[0].raw_key.shape[2] - (config.compress_block - 1)
    if lengths.shape != current.shape or (lengths > current).any() or (lengths < 0).any():
        raise CapacityError(f"lengths: got {lengths.tolist()}, expected values from 0 to {current.tolist()}")
    if (current - lengths > room).any():
        raise CapacityError(
            f"lengths: got {lengths.tolist()} from {current.tolist()}, expected at most {room} back (max_rollback)"
        )


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache, per branch."""

    selected: int
    compressed: int
    window: int
    raw: int

    @property
    def total(self) -> int:
        return self.selected + self.compressed + self.window + self.raw


def cache_bytes(
    config: ModelConfig, pages: int, batch: int, dtype: jnp.dtype = jnp.bfloat16, max_rollback: int = 1
) -> CacheBytes:
    """What :func:`create_cache` allocates for ``pages`` pages and ``batch`` sequences, in bytes."""
    nsa = config.nsa
    entry = nsa.num_kv_heads * nsa.head_dim * jnp.dtype(dtype).itemsize * config.layers
    raw, near = ring_sizes(nsa, max_rollback)
    kinds = 2 if nsa.compressed_output else 1
    return CacheBytes(
        selected=2 * pages * nsa.select_block * entry,
        compressed=kinds * pages * nsa.blocks_per_page * entry,
        window=2 * batch * near * entry if nsa.window_ring else 0,
        raw=kinds * batch * raw * entry,
    )
