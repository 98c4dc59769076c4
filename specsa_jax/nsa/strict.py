"""Attention of the strict class: one query at a time, by one program of fixed shapes.

As :mod:`specsa_jax.nsa.cached`, with every key and every compressed entry at its absolute place, be it committed or on
the query's path through the tail. So a query's program, its operands and the order of its sums are those of sequential
decoding, whatever T, tree, batch or neighbours. Shapes depend on the page table's width: callers keep it fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specsa_jax.cache import Cache, LayerCache, LayerTail, Tail
from specsa_jax.config import NSAConfig
from specsa_jax.nsa.rows import in_blocks
from specsa_jax.nsa.selection import block_importance, select_blocks
from specsa_jax.nsa.sequence import Projected
from specsa_jax.nsa.softmax import Keys, attend, combine, softmax_parts


class _Query(NamedTuple):
    """One query: its row, sequence and node int32 []; its position; q [Hkv, G, D], gates [Hq, 3] or None."""

    row: jax.Array
    node: jax.Array
    position: jax.Array
    query: jax.Array
    gates: jax.Array | None


def attend_strict(
    config: NSAConfig, projected: Projected, cache: Cache, layer: LayerCache, tail: Tail, new: LayerTail
) -> jax.Array:
    """Output [B, T, Hq, D] of the tail's queries."""
    batch, size, heads, dim = projected.query.shape
    depth = tail.positions - cache.lengths[:, None]
    ancestor = jnp.broadcast_to(tail.ancestor, (batch, size, size))
    # The node of a query's path at each depth: where to find the keys of positions L, L + 1, …
    step = jnp.arange(size, dtype=jnp.int32)
    on_path = ancestor[:, :, None, :] & (depth[:, None, None, :] == step[:, None])
    path = jnp.argmax(on_path, axis=-1).astype(jnp.int32)  # [B, T, T]

    def one(row: jax.Array, node: jax.Array, position: jax.Array, query: jax.Array, *gates: jax.Array) -> jax.Array:
        """Output [1, 1, Hq, D]; all arguments with the two leading axes."""
        asked = _Query(
            row[0, 0], node[0, 0], position[0, 0], query.reshape(config.num_kv_heads, config.group, dim),
            gates[0][0, 0] if gates else None,
        )  # fmt: skip
        return _attend(config, asked, cache, layer, tail, new, ancestor, path).reshape(1, 1, heads, dim)

    rows = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], (batch, size))
    nodes = jnp.broadcast_to(step, (batch, size))
    gates = () if projected.gates is None else (projected.gates,)
    return in_blocks(cache.lengths, 1)(one, rows, nodes, tail.positions, projected.query, *gates)


def _attend(
    config: NSAConfig,
    asked: _Query,
    cache: Cache,
    layer: LayerCache,
    tail: Tail,
    new: LayerTail,
    ancestor: jax.Array,
    path: jax.Array,
) -> jax.Array:
    """Output [Hq, D] of one query."""
    row, position, page = asked.row, asked.position, config.select_block
    table, length, count = cache.page_table[row], cache.lengths[row], cache.page_table.shape[1]
    heads = jnp.arange(config.num_kv_heads, dtype=jnp.int32)[:, None]
    nodes = path[row, asked.node]  # [T], of which those up to the query count
    at = length + jnp.arange(nodes.shape[0], dtype=jnp.int32)
    on_path = at <= position

    def overlay(committed: jax.Array, fresh: jax.Array, place: jax.Array) -> jax.Array:
        """[Hkv, K, D] with the path's entries at ``place`` int32 [Hkv or 1, T]; K drops one."""
        place = jnp.broadcast_to(jnp.where(on_path, place, committed.shape[1]), (heads.shape[0], at.shape[0]))
        return committed.at[heads, place].set(jnp.swapaxes(fresh[row, nodes], 0, 1), mode="drop")

    def in_blocks_of(blocks: jax.Array, pool: jax.Array, fresh: jax.Array) -> jax.Array:
        """[Hkv, n · l', D]: the tokens of ``blocks`` int32 [Hkv, n], which are distinct where not negative."""
        owner = jnp.minimum(table[jnp.clip(blocks, 0, count - 1)], pool.shape[0] - 1)
        # Whole (page, head) blocks by one index: XLA copies them in long runs.
        pages = jnp.take(pool.reshape(-1, page, pool.shape[-1]), owner * pool.shape[1] + heads, axis=0)
        found = blocks[:, None, :] == (at // page)[:, None]  # [Hkv, T, n]
        first = jnp.where(found.any(axis=-1), jnp.argmax(found, axis=-1) * page + at % page, blocks.shape[1] * page)
        return overlay(pages.reshape(pages.shape[0], -1, pages.shape[-1]), fresh, first.astype(jnp.int32))

    def in_window(pool: jax.Array, ring: jax.Array | None, fresh: jax.Array) -> jax.Array:
        """[Hkv, w, D]: the last w tokens, the query's own the last."""
        start = position - config.window_tokens + 1
        if ring is None:
            blocks = jnp.arange(-(-(config.window_tokens - 1) // page) + 1, dtype=jnp.int32)
            blocks = jnp.broadcast_to(blocks + start // page, (heads.shape[0], blocks.shape[0]))
            near = in_blocks_of(blocks, pool, fresh)
            return jax.lax.dynamic_slice_in_dim(near, start % page, config.window_tokens, axis=1)
        turned = jnp.concatenate([ring[row], ring[row]], axis=1)
        near = jax.lax.dynamic_slice_in_dim(turned, start % ring.shape[2], config.window_tokens, axis=1)
        return overlay(near, fresh, jnp.where(at >= start, at - start, near.shape[1])[None])

    def part(keys: jax.Array, values: jax.Array, visible: jax.Array) -> Keys:
        """Of keys and values [Hkv, K, D], ``visible`` bool [Hkv or 1, K]."""
        scores = jnp.einsum("hgd,hkd->hgk", asked.query, keys, preferred_element_type=jnp.float32)

        def weigh(probs: jax.Array) -> jax.Array:
            return jnp.einsum("hgk,hkd->hgd", probs.astype(values.dtype), values, preferred_element_type=jnp.float32)

        return Keys(scores * config.softmax_scale, visible[:, None, :], weigh)

    compressed_out, importance = _compressed(config, asked, table, layer, tail, new, ancestor, part)
    selected = select_blocks(config, importance[None], position[None])[0]  # [Hkv, n]
    listed = (selected[..., None] * page + jnp.arange(page, dtype=jnp.int32)).reshape(config.num_kv_heads, -1)
    seen = (jnp.repeat(selected, page, axis=1) >= 0) & (listed <= position)
    chosen = part(in_blocks_of(selected, layer.key, new.key), in_blocks_of(selected, layer.value, new.value), seen)

    near = position - config.window_tokens + 1 + jnp.arange(config.window_tokens, dtype=jnp.int32)
    window_key = new.key if new.window_key is None else new.window_key
    window_value = new.value if new.window_value is None else new.window_value
    window = part(
        in_window(layer.key, layer.window_key, window_key),
        in_window(layer.value, layer.window_value, window_value),
        (near >= 0)[None],
    )
    if config.fused_selected_window:
        # A token may be selected and in the window: it counts once, as selected.
        twice = (selected[:, None, :] == (near // page)[:, None]).any(axis=-1)
        branches = [compressed_out, attend([chosen, window._replace(visible=window.visible & ~twice[:, None])]), None]
    else:
        branches = [compressed_out, attend([chosen]), attend([window])]
    flat = (config.num_heads, config.head_dim)
    out = combine(asked.gates, [None if branch is None else branch.reshape(flat) for branch in branches])
    if config.dense_len:
        blocks = jnp.arange(-(-config.dense_len // page), dtype=jnp.int32)
        every = jnp.broadcast_to(blocks, (config.num_kv_heads, blocks.shape[0]))
        dense = part(
            in_blocks_of(every, layer.key, new.key), in_blocks_of(every, layer.value, new.value),
            (jnp.arange(blocks.shape[0] * page, dtype=jnp.int32) <= position)[None],
        )  # fmt: skip
        out = jnp.where(position + 1 < config.dense_len, attend([dense]).reshape(flat), out)
    return out.astype(asked.query.dtype)


def _compressed(
    config: NSAConfig,
    asked: _Query,
    table: jax.Array,
    layer: LayerCache,
    tail: Tail,
    new: LayerTail,
    ancestor: jax.Array,
    part: Callable[[jax.Array, jax.Array, jax.Array], Keys],
) -> tuple[jax.Array | None, jax.Array]:
    """Branch output [Hkv, G, D] (or None) and importance float32 [Hkv, N]."""
    row, size = asked.row, ancestor.shape[1]
    slot = tail.slot[row]
    node = jnp.minimum(slot, size - 1)
    below = ancestor[row, asked.node, node] & (slot < size)
    entry = (tail.positions[row, node] + 1 - config.compress_block) // config.compress_stride
    count = table.shape[0] * config.blocks_per_page
    place = jnp.where(below, entry, count)

    def entries(pool: jax.Array, fresh: jax.Array) -> jax.Array:
        """[Hkv, C, D]: committed entries, and over them those that end on the path."""
        pages = jnp.swapaxes(pool.at[table].get(mode="clip"), 0, 1)  # [Hkv, N, l'/d, D]
        flat = pages.reshape(pages.shape[0], count, pages.shape[-1])
        return flat.at[:, place].set(jnp.swapaxes(fresh[row], 0, 1), mode="drop")

    keys = entries(layer.compressed_key, new.compressed_key)
    values = keys
    if layer.compressed_value is not None and new.compressed_value is not None:
        values = entries(layer.compressed_value, new.compressed_value)
    ends = jnp.arange(count, dtype=jnp.int32) * config.compress_stride + config.compress_block - 1
    shown = part(keys, values, (ends <= asked.position)[None])
    (probs,) = softmax_parts([shown])
    importance = block_importance(config, probs.sum(axis=1), table.shape[0])
    return (shown.weigh(probs) if config.compressed_output else None), importance
