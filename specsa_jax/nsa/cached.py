"""NSA of T new tokens against a cache: one token, a draft tree, a chunk of a prompt.

Each branch attends to committed tokens (read from the cache) and to the tail (its K/V are at hand, dense, under the
ancestor mask) in one softmax. Compression blocks that end inside the tail depend on a node's path: they get a slot
each, visible to the nodes below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import Implementation
from pallas_kernels.attention.config import GroupMode
from specsa_jax.cache import Cache, LayerCache, LayerTail, Tail, gather_pages, ring_positions
from specsa_jax.config import NSAConfig, RopeConfig
from specsa_jax.nsa import kernels
from specsa_jax.nsa.compression import Compress, compress_blocks
from specsa_jax.nsa.rows import Rows, in_blocks, together
from specsa_jax.nsa.selection import block_importance, select_blocks
from specsa_jax.nsa.sequence import Projected, split_groups
from specsa_jax.nsa.softmax import Keys, attend, combine, softmax_parts
from specsa_jax.nsa.strict import attend_strict
from specsa_jax.rope import rotate


@dataclasses.dataclass(frozen=True)
class Backend:
    """How attention against a cache is computed.

    Attributes:
      implementation: "xla", or "pallas": the kernels of ``pallas_kernels.attention``, and of ``compress`` for φ.
      is_chain: every tail is a chain, whose ancestor mask the kernels need not read.
      interpret: interpret the kernels, on any device; slow.
      deterministic: for the strict class: the bits of a row depend on nothing but its own sequence and path. The page
        table's width must be the same in all calls.
      group, group_mode: C adjacent queries that kernels serve together, 0: as they like it; in mode "shared" all of
        them attend to the blocks of the one with the longest prefix (of several, the last), which is approximate.
    """

    implementation: Implementation = "xla"
    is_chain: bool = False
    interpret: bool = False
    deterministic: bool = False
    group: int = 0
    group_mode: GroupMode = "merged"

    def rows(self, cache: Cache) -> Rows:
        """How to compute row by row."""
        return in_blocks(cache.lengths) if self.deterministic else together


class Reuse(NamedTuple):
    """What makes a layer a reuse layer.

    Attributes:
      selected: what :func:`attend_cached` gave in the nearest refresh layer below.
      keep_compressed: keep the output of the compressed branch (static).
      when: bool []: it is one if true, by XLA's code alone: a schedule known only to the running program. None: it is.
    """

    selected: Any
    keep_compressed: bool = True
    when: jax.Array | None = None


def attend_cached(
    config: NSAConfig,
    rope: RopeConfig,
    phi_key: Compress,
    phi_value: Compress | None,
    projected: Projected,
    cache: Cache,
    layer: LayerCache,
    tail: Tail,
    backend: Backend = Backend(),
    reuse: Reuse | None = None,
) -> tuple[jax.Array, LayerTail, Any]:
    """Output [B, T, Hq, D] of the tail's queries, the layer's tail for a later commit, and the selection for layers
    that ``reuse`` it: ids int32 [B, T, Hkv, n], or the kernels' Selection; None in the strict class, where none does.

    Unless layers or queries share selections, the output of node i equals sequential decoding of the committed prefix
    and path(i) (the project's definition of exactness); tokens on other paths are invisible in all three branches.
    """
    new = _tail_kv(config, rope, phi_key, phi_value, projected, cache, layer, tail, backend)
    if backend.deterministic:
        assert reuse is None
        if backend.implementation == "pallas":
            out = kernels.attend_deterministic(
                config, projected, cache, layer, tail, new, is_chain=backend.is_chain, interpret=backend.interpret
            )  # fmt: skip
            return out, new, None
        return attend_strict(config, projected, cache, layer, tail, new), new, None
    if backend.implementation == "pallas":
        assert reuse is None or reuse.when is None
        out, chosen = kernels.attend(
            config, projected, cache, layer, tail, new, is_chain=backend.is_chain,
            selected=None if reuse is None else reuse.selected,
            keep_compressed=reuse is None or reuse.keep_compressed,
            group=backend.group, group_mode=backend.group_mode, interpret=backend.interpret,
        )  # fmt: skip
        return out, new, chosen
    query = split_groups(config, projected.query)  # [B, T, Hkv, G, D]
    compressed_out, importance = _compressed_branch(config, query, cache, layer, tail, new)
    if reuse is not None and reuse.when is None:  # importance, which nobody reads, is not computed
        selected = reuse.selected
        if not reuse.keep_compressed:
            compressed_out = None
    else:
        selected = select_blocks(config, importance, tail.positions)
        if backend.group_mode == "shared":
            selected = _share(selected, tail.positions, backend.group)
        if reuse is not None and reuse.when is not None:
            selected = jnp.where(reuse.when, reuse.selected, selected)
            if compressed_out is not None and not reuse.keep_compressed:
                compressed_out = jnp.where(reuse.when, 0.0, compressed_out)
    window_part = _window_part(config, query, cache, layer, tail)
    selected_part, tail_selected = _selected_part(config, query, cache, layer, tail, selected)

    tail_scores = _dots(config, query, new.key)
    own_branch = tail.ancestor[:, :, None, None, :]
    if config.fused_selected_window:
        near = _inside_window(config, tail.positions[:, :, None], tail.positions[:, None, :])
        # A token may be selected and in the window: it counts once, as selected.
        unselected = window_part.visible & ~_is_selected(config, selected, _window_positions(config, cache, layer))
        parts = [
            selected_part,
            window_part._replace(visible=unselected),
            Keys(tail_scores, own_branch & (tail_selected | near[:, :, None, None, :]), _weigh_tail(new.value)),
        ]
        branches = [compressed_out, attend(parts), None]
    else:
        window_key = new.key if new.window_key is None else new.window_key
        window_value = new.value if new.window_value is None else new.window_value
        near = _inside_window(config, tail.positions[:, :, None], tail.positions[:, None, :])
        window_tail = Keys(
            _dots(config, query, window_key), own_branch & near[:, :, None, None, :], _weigh_tail(window_value)
        )
        branches = [
            compressed_out,
            attend([selected_part, Keys(tail_scores, own_branch & tail_selected, _weigh_tail(new.value))]),
            attend([window_part, window_tail]),
        ]
    heads = projected.query.shape
    out = combine(projected.gates, [None if b is None else b.reshape(heads) for b in branches])
    if config.dense_len:
        dense_part = _dense_part(config, query, cache, layer, tail)
        dense_out = attend([dense_part, Keys(tail_scores, own_branch, _weigh_tail(new.value))]).reshape(heads)
        out = jnp.where((tail.positions + 1 < config.dense_len)[..., None, None], dense_out, out)
    return out.astype(projected.query.dtype), new, selected


def _share(selected: jax.Array, positions: jax.Array, group: int) -> jax.Array:
    """``selected`` [B, T, Hkv, n] with that of the query with the longest prefix, the last of several, for all of each
    ``group`` adjacent queries."""
    size = positions.shape[1]
    node = jnp.arange(size, dtype=jnp.int32)
    together = node[:, None] // group == node // group
    longest = jnp.where(together, positions[:, None, :] * size + node, -1).max(axis=-1) % size  # [B, T]
    return jnp.take_along_axis(selected, longest[..., None, None], axis=1)


def _dots(config: NSAConfig, query: jax.Array, keys: jax.Array) -> jax.Array:
    """Scaled scores float32 [B, T, Hkv, G, K] of keys [B, K, Hkv, D] that all queries share."""
    scores = jnp.einsum("bthgd,bkhd->bthgk", query, keys, preferred_element_type=jnp.float32)
    return scores * config.softmax_scale


def _weigh_tail(values: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Σ p·v over tail values [B, K, Hkv, D]."""

    def weigh(probs: jax.Array) -> jax.Array:
        return jnp.einsum("bthgk,bkhd->bthgd", probs.astype(values.dtype), values, preferred_element_type=jnp.float32)

    return weigh


def _shared_part(config: NSAConfig, query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> Keys:
    """Keys and values [B, Hkv, K, D] of committed tokens that all queries share, ``visible`` bool [B, T or 1, K]."""

    def weigh(probs: jax.Array) -> jax.Array:
        return jnp.einsum("bthgk,bhkd->bthgd", probs.astype(values.dtype), values, preferred_element_type=jnp.float32)

    scores = jnp.einsum("bthgd,bhkd->bthgk", query, keys, preferred_element_type=jnp.float32)
    return Keys(scores * config.softmax_scale, visible[:, :, None, None, :], weigh)


def _inside_window(config: NSAConfig, query_at: jax.Array, key_at: jax.Array) -> jax.Array:
    return key_at > query_at - config.window_tokens


def _tail_kv(
    config: NSAConfig,
    rope: RopeConfig,
    phi_key: Compress,
    phi_value: Compress | None,
    projected: Projected,
    cache: Cache,
    layer: LayerCache,
    tail: Tail,
    backend: Backend,
) -> LayerTail:
    """Rotated and raw K/V of the tail, and the compressed entries of the blocks that end in it."""
    compressed_set, selected_set, window_set = config.branch_set
    rotated = backend.rows(cache)(
        lambda key, at: rotate(key, at[..., None], rope), projected.key, tail.positions
    )  # fmt: skip
    raw_key, raw_value = projected.key[:, :, compressed_set], projected.value[:, :, compressed_set]

    node = jnp.minimum(tail.slot, tail.positions.shape[1] - 1)
    starts = jnp.take_along_axis(tail.positions, node, axis=1) + 1 - config.compress_block
    if (
        backend.implementation == "pallas"
        and not backend.deterministic  # whose readers, and XLA's, would multiply an unused slot's NaN by 0
        and kernels.compresses(config, phi_key, layer, tail)
    ):
        compressed_key, compressed_value = kernels.compress_blocks(
            config, rope, phi_key, phi_value, layer, raw_key, raw_value, tail, starts, interpret=backend.interpret
        )
    else:
        compressed_key, compressed_value = _compress_blocks(
            config, rope, phi_key, phi_value, layer, raw_key, raw_value, tail, starts, backend.rows(cache)
        )
    separate = config.window_ring
    return LayerTail(
        key=rotated[:, :, selected_set],
        value=projected.value[:, :, selected_set],
        raw_key=raw_key,
        raw_value=None if layer.raw_value is None else raw_value,
        window_key=rotated[:, :, window_set] if separate else None,
        window_value=projected.value[:, :, window_set] if separate else None,
        compressed_key=compressed_key,
        compressed_value=compressed_value,
    )


def _compress_blocks(
    config: NSAConfig,
    rope: RopeConfig,
    phi_key: Compress,
    phi_value: Compress | None,
    layer: LayerCache,
    raw_key: jax.Array,
    raw_value: jax.Array,
    tail: Tail,
    starts: jax.Array,
    rows: Rows,
) -> tuple[jax.Array, jax.Array | None]:
    """Compressed entries [B, M, Hkv, D] of the blocks from ``starts`` int32 [B, M] on, whether their slots are used or
    not."""
    block_at = starts[..., None] + jnp.arange(config.compress_block, dtype=jnp.int32)  # [B, M, l]

    def block_entries(ring: jax.Array, entries: jax.Array) -> jax.Array:
        """[B, M, l, Hkv, D]: committed entries from the ring, the others from the tail."""
        rows = jnp.arange(ring.shape[0], dtype=jnp.int32)[:, None, None]
        committed = ring[rows, :, block_at % ring.shape[2]]
        fresh = entries[rows, jnp.maximum(tail.slot_back, 0)]
        return jnp.where((tail.slot_back < 0)[..., None, None], committed, fresh)

    values = None if layer.raw_value is None else block_entries(layer.raw_value, raw_value)
    keys = block_entries(layer.raw_key, raw_key)
    return rows(
        lambda *blocks: compress_blocks(config, rope, phi_key, phi_value, *blocks),
        keys, keys if values is None else values, starts,
    )  # fmt: skip


def _compressed_branch(
    config: NSAConfig, query: jax.Array, cache: Cache, layer: LayerCache, tail: Tail, new: LayerTail
) -> tuple[jax.Array | None, jax.Array]:
    """Branch output [B, T, Hkv, G, D] (or None) and importance float32 [B, T, Hkv, blocks] of every block in reach."""
    size = tail.positions.shape[1]
    keys = gather_pages(layer.compressed_key, cache.page_table)
    values = keys if layer.compressed_value is None else gather_pages(layer.compressed_value, cache.page_table)
    entry = jnp.arange(keys.shape[2], dtype=jnp.int32)
    complete = entry * config.compress_stride + config.compress_block <= cache.lengths[:, None]
    committed = _shared_part(config, query, keys, values, complete[:, None, :])

    # A slot is visible to the nodes that have its last token on their path.
    ancestor = jnp.broadcast_to(tail.ancestor, (tail.slot.shape[0], size, size))
    node = jnp.minimum(tail.slot, size - 1)
    below = jnp.take_along_axis(ancestor, node[:, None, :], axis=2) & (tail.slot < size)[:, None, :]
    slot_value = new.compressed_key if new.compressed_value is None else new.compressed_value
    slots = Keys(_dots(config, query, new.compressed_key), below[:, :, None, None, :], _weigh_tail(slot_value))

    probs, slot_probs = softmax_parts([committed, slots])
    # A node sees at most one slot per compression block: put each at its block's index.
    num_blocks = cache.page_table.shape[1] + -(-size // config.select_block) + 1
    slot_entry = (
        jnp.take_along_axis(tail.positions, node, axis=1) + 1 - config.compress_block
    ) // config.compress_stride
    place = slot_entry[..., None] == jnp.arange(num_blocks * config.blocks_per_page, dtype=jnp.int32)
    by_entry = jnp.pad(
        probs.sum(axis=3), [(0, 0)] * 3 + [(0, num_blocks * config.blocks_per_page - keys.shape[2])]
    ) + jnp.einsum("bthm,bmc->bthc", slot_probs.sum(axis=3), place.astype(jnp.float32), precision="highest")
    importance = block_importance(config, by_entry, num_blocks)
    if not config.compressed_output:
        return None, importance
    return committed.weigh(probs) + slots.weigh(slot_probs), importance


def _selected_part(
    config: NSAConfig, query: jax.Array, cache: Cache, layer: LayerCache, tail: Tail, selected: jax.Array
) -> tuple[Keys, jax.Array]:
    """Committed tokens of each query's selected blocks; and which tail tokens it selects, bool [B, T, Hkv, 1, T]."""
    page, pages = config.select_block, cache.page_table.shape[1]
    batch = selected.shape[0]
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None, None, None]
    owner = cache.page_table[rows, jnp.clip(selected, 0, pages - 1)]  # [B, T, Hkv, n]
    heads = jnp.arange(config.num_kv_heads, dtype=jnp.int32)[:, None]

    block = owner * config.num_kv_heads + heads

    def gather(pool: jax.Array) -> jax.Array:
        # Whole (page, head) blocks by one index: XLA copies them in long runs, 3 times faster on CPUs than by two.
        taken = jnp.take(pool.reshape(-1, page, pool.shape[-1]), block, axis=0, mode="clip")  # [B, T, Hkv, n, l', D]
        return taken.reshape(*taken.shape[:3], -1, taken.shape[-1])

    keys, values = gather(layer.key), gather(layer.value)
    at = selected[..., None] * page + jnp.arange(page, dtype=jnp.int32)
    committed = (selected[..., None] >= 0) & (at < cache.lengths[:, None, None, None, None])
    visible = committed.reshape(*selected.shape[:3], 1, -1)

    def weigh(probs: jax.Array) -> jax.Array:
        return jnp.einsum("bthgk,bthkd->bthgd", probs.astype(values.dtype), values, preferred_element_type=jnp.float32)

    return Keys(_own_dots(config, query, keys), visible, weigh), _is_selected(config, selected, tail.positions)


def _own_dots(config: NSAConfig, query: jax.Array, keys: jax.Array) -> jax.Array:
    """Scaled scores float32 [B, T, Hkv, G, K] of each query's own keys [B, T, Hkv, K, D]."""
    if jax.default_backend() != "cpu":
        scores = jnp.einsum("bthgd,bthkd->bthgk", query, keys, preferred_element_type=jnp.float32)
        return scores * config.softmax_scale
    # XLA's CPU code copies a product's right side unless it is contracted along its first axis: so the few queries
    # stand there, and barriers keep XLA from undoing it. On two cores 6 of these products' 30 ms are left at batch 8,
    # T = 17, of a prompt's chunk 2 of 5, of one query two thirds (tried once).
    columns = jax.lax.optimization_barrier(jnp.swapaxes(query, -1, -2))
    scores = jnp.einsum("bthkd,bthdg->bthkg", keys, columns, preferred_element_type=jnp.float32)
    return jnp.swapaxes(jax.lax.optimization_barrier(scores), -1, -2) * config.softmax_scale


def _is_selected(config: NSAConfig, selected: jax.Array, positions: jax.Array) -> jax.Array:
    """bool [B, T, Hkv, 1, K]: is the block of ``positions`` int32 [B, K] among the queries' selected ones?"""
    block = (positions // config.select_block)[:, None, None, None, :]
    return (selected[..., None] == block).any(axis=-2)[..., None, :]


def _window_pages(config: NSAConfig, cache: Cache) -> tuple[jax.Array, jax.Array]:
    """Page-table columns int32 [B, W] of the pages that hold the last w tokens, and the tokens' positions [B, W·l']."""
    count = min(-(-(config.window_tokens - 1) // config.select_block) + 1, cache.page_table.shape[1])
    last = jnp.maximum(cache.lengths - 1, 0) // config.select_block
    block = last[:, None] - count + 1 + jnp.arange(count, dtype=jnp.int32)
    at = block[..., None] * config.select_block + jnp.arange(config.select_block, dtype=jnp.int32)
    return block, at.reshape(block.shape[0], -1)


def _window_positions(config: NSAConfig, cache: Cache, layer: LayerCache) -> jax.Array:
    """Positions int32 [B, K] of the committed keys that :func:`_window_part` lists, negative where there is none."""
    if layer.window_key is not None:
        return ring_positions(cache.lengths, layer.window_key.shape[2])
    return _window_pages(config, cache)[1]


def _window_part(config: NSAConfig, query: jax.Array, cache: Cache, layer: LayerCache, tail: Tail) -> Keys:
    """The committed tokens of the window: the ring as it lies, or the last pages when K/V are shared."""
    at = _window_positions(config, cache, layer)
    if layer.window_key is not None and layer.window_value is not None:
        keys, values = layer.window_key, layer.window_value
    else:
        block, _ = _window_pages(config, cache)
        owner = jnp.take_along_axis(cache.page_table, jnp.maximum(block, 0), axis=1)
        keys, values = gather_pages(layer.key, owner), gather_pages(layer.value, owner)
    committed = ((at >= 0) & (at < cache.lengths[:, None]))[:, None, :]
    near = _inside_window(config, tail.positions[:, :, None], at[:, None, :])
    return _shared_part(config, query, keys, values, committed & near)


def _dense_part(config: NSAConfig, query: jax.Array, cache: Cache, layer: LayerCache, tail: Tail) -> Keys:
    """All committed tokens below ``dense_len``."""
    pages = min(-(-config.dense_len // config.select_block), cache.page_table.shape[1])
    table = cache.page_table[:, :pages]
    at = jnp.arange(pages * config.select_block, dtype=jnp.int32)
    committed = (at < cache.lengths[:, None])[:, None, :]
    return _shared_part(config, query, gather_pages(layer.key, table), gather_pages(layer.value, table), committed)
