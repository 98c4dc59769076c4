"""The attention of a tail in plain NumPy: one query at a time, the keys that it sees gathered into lists."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from pallas_kernels.attention.arguments import Layer, Sparsity, Tail

Array: TypeAlias = Any  # a NumPy array, or what has become one of a JAX array


def attend(
    sparsity: Sparsity,
    query: Array,
    gates: Array | None,
    layer: Layer,
    page_table: Array,
    lengths: Array,
    tail: Tail,
    selected: Array | None = None,
    shown: tuple[int, ...] = (0, 1, 2),
) -> tuple[Array, Array, Array]:
    """Output float64 [B, T, Hq, D], ids int32 [B, T, Hkv, n], and the blocks' importance float64 [B, T, Hkv, J].

    Arguments as those of the kernels, as NumPy arrays; importance is −inf where a block has not begun.
    ``selected`` int32 [B, T, Hkv, n] takes the place of the queries' own selection; ``shown`` names the branches whose
    outputs add up (0 compressed, 1 selected, 2 window).
    """
    batch, width, heads, _ = query.shape
    kv_heads = layer.key.shape[1]
    group = heads // kv_heads
    out = np.zeros(query.shape, np.float64)
    ids = np.full((batch, width, kv_heads, sparsity.num_selected), -1, np.int32)
    scores = np.full((batch, width, kv_heads, tail.positions.max() // sparsity.select_block + 1), -np.inf)
    for b, t, h in np.ndindex(batch, width, kv_heads):
        if lengths[b] < 0:
            continue
        seen = _Seen(sparsity, layer, page_table[b], int(lengths[b]), tail, b, t, h)
        own = slice(h * group, (h + 1) * group)
        q = query[b, t, own].astype(np.float64) * sparsity.scale
        g = np.ones((group, 3)) if gates is None else gates[b, t, own]
        entries, keys, values = seen.compressed()
        p = softmax(q @ keys.T)
        own_scores = importance(sparsity, p.sum(axis=0), entries, seen.position)
        scores[b, t, h, : len(own_scores)] = own_scores
        if selected is None:
            blocks = choose(sparsity, own_scores, seen.position)
        else:
            blocks = [int(block) for block in selected[b, t, h] if block >= 0]
        ids[b, t, h, : len(blocks)] = blocks
        if 0 in shown:
            out[b, t, own] += g[:, :1] * (p @ values)
        block_of, window = seen.positions // sparsity.select_block, seen.position - sparsity.window
        for branch, visible, (keys, values) in (
            (1, np.isin(block_of, blocks), seen.tokens(near=False)),
            (2, seen.positions > window, seen.tokens(near=True)),
        ):
            if branch in shown:
                out[b, t, own] += g[:, branch : branch + 1] * (softmax(q @ keys[visible].T) @ values[visible])
    return out, ids, scores


class _Seen:
    """What one (query, KV head) sees: committed tokens in order, then its path in the tail."""

    def __init__(self, sparsity: Sparsity, layer: Layer, table: Array, length: int, tail: Tail, b: int, t: int, h: int):
        self.sparsity, self.layer, self.table, self.length = sparsity, layer, table, length
        self.tail, self.b, self.h = tail, b, h
        width = tail.positions.shape[1]
        if tail.ancestor is None:
            self.path = np.arange(t + 1)
        else:
            self.path = np.flatnonzero(tail.ancestor[b if len(tail.ancestor) > 1 else 0, t])
        self.slots = [m for m, node in enumerate(tail.slot[b]) if node < width and node in self.path]
        self.position = int(tail.positions[b, t])
        self.positions = np.concatenate([np.arange(length), tail.positions[b, self.path]])

    def compressed(self) -> tuple[Array, Array, Array]:
        """Compression blocks' ids [C] and their keys and values [C, D]."""
        l, d, per = self.sparsity.compress_block, self.sparsity.compress_stride, self.sparsity.entries_per_page
        complete = np.arange(max(0, (self.length - l) // d + 1))
        ends = self.tail.positions[self.b, self.tail.slot[self.b, self.slots]] + 1
        entries = np.concatenate([complete, (ends - l) // d])

        def both(pages: Array, fresh: Array) -> Array:
            return _join(pages[self.table[complete // per], self.h, complete % per], fresh[self.b, self.slots, self.h])

        keys = both(self.layer.compressed_key, self.tail.compressed_key)
        if self.layer.compressed_value is None or self.tail.compressed_value is None:
            return entries, keys, np.zeros_like(keys)
        return entries, keys, both(self.layer.compressed_value, self.tail.compressed_value)

    def tokens(self, near: bool) -> tuple[Array, Array]:
        """Keys and values [tokens, D] of ``positions``; with ``near`` those of the window's ring, where there is one.

        Of tokens that the ring has overwritten it gives what lies there now; no window reaches them.
        """
        layer, tail, at = self.layer, self.tail, np.arange(self.length)
        page = self.sparsity.select_block
        lists = []
        for pages, ring, fresh, fresh_near in (
            (layer.key, layer.window_key, tail.key, tail.window_key),
            (layer.value, layer.window_value, tail.value, tail.window_value),
        ):
            if near and ring is not None and fresh_near is not None:
                committed, new = ring[self.b, self.h, at % ring.shape[2]], fresh_near
            else:
                committed, new = pages[self.table[at // page], self.h, at % page], fresh
            lists.append(_join(committed, new[self.b, self.path, self.h]))
        return lists[0], lists[1]


def _join(committed: Array, fresh: Array) -> Array:
    return np.concatenate([committed, fresh]).astype(np.float64)


def softmax(scores: Array) -> Array:
    """Over the last axis, which may be empty."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)


def importance(sparsity: Sparsity, p: Array, entries: Array, position: int) -> Array:
    """Importance [J] of the blocks begun at ``position``: a probability counts per chunk of d tokens that is shared."""
    chunks, per = sparsity.compress_block // sparsity.compress_stride, sparsity.entries_per_page
    blocks = np.arange(position // sparsity.select_block + 1)[:, None]
    shared = np.minimum(entries + chunks, per * (blocks + 1)) - np.maximum(entries, per * blocks)
    return np.maximum(shared, 0) @ p


def choose(sparsity: Sparsity, scores: Array, position: int) -> list[int]:
    """Ids of the selected blocks: forced ones, then by score, ties to the lower id; ascending."""
    own = position // sparsity.select_block
    blocks = np.arange(own + 1)
    forced = (blocks < sparsity.num_initial) | (blocks > own - sparsity.num_local)
    order = np.lexsort((blocks, -scores, ~forced))
    return sorted(order[: sparsity.num_selected].tolist())
