"""The branches in a form whose result for a query depends on nothing but the query, its prefix and its path.

Everywhere else tiles of the cache and of the tail are told apart, and splits follow length and batch: so the order of a
query's sums depends on what is committed and who its neighbours are. Here

- a program holds one query: its heads, in the same rows always;
- tiles begin at multiples of their size, counted from the sequence's beginning (from the list's, where blocks are
  selected), and a key is taken from the cache or from the path's node in the tail, whichever holds it;
- splits are as long as they are, and those that a query does not reach add exactly nothing to it;
- every tile takes the same code, masked, since two loops may round differently.

So a token's output has the bits that decoding it alone would have given, if the compiler sees the same code in the two
calls. T, M, and whether the tail is a tree are in the code: so tails of up to 128 nodes are all shown as trees of 128
nodes and slots (:func:`pad`), of which those that are there have programs. Not in the code are the numbers of
sequences, of pages, and of the nodes that are there: they are in no tile's shape. The page table's columns N are in the
selection's, which over a long table sums a query's heads in two halves: they must be the same. Every query loads its
own blocks, several times what a group would load.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention.arguments import Selection, Shape, Sparsity, Tail
from pallas_kernels.attention.config import AttentionConfig, Branch, selection_warps
from pallas_kernels.attention.launch import Launch
from pallas_kernels.attention.scores import entry_of_lane, store_scores
from pallas_kernels.attention.tiles import (
    Rows,
    State,
    attend_tile,
    finish,
    load_rows,
    parts,
    query_rows,
    scale,
    score,
    start,
)  # fmt: skip

# Of every split, in tiles; and nodes of a tail.
SPLIT, WIDTH = 16, 128


def pad(
    query: jax.Array, gates: jax.Array | None, lengths: jax.Array, tail: Tail, selected: Selection | None
) -> tuple[jax.Array, jax.Array | None, Tail, Selection | None]:
    """The arguments with a tree of WIDTH nodes and slots for a tail of no more; a longer one as it is.

    Raises ValueError where so few nodes have more slots than that.
    """
    batch, size = len(lengths), query.shape[1]
    if size > WIDTH:
        return query, gates, tail, selected
    if tail.slot.shape[1] > WIDTH:
        raise ValueError(f"tail.slot: got {tail.slot.shape[1]} slots of {size} nodes, expected at most {WIDTH}")

    def wide(array: jax.Array | None, axes: int = 1, fill: int = 0) -> Any:
        if array is None:
            return None
        widths = [(0, WIDTH - array.shape[axis] if 0 < axis <= axes else 0) for axis in range(array.ndim)]
        return jnp.pad(array, widths, constant_values=fill)

    ancestor = jnp.tril(jnp.ones((size, size), bool)) if tail.ancestor is None else tail.ancestor
    padded = {name: wide(array) for name, array in tail._asdict().items() if name.endswith(("key", "value"))}
    tree = Tail(
        positions=wide(tail.positions, fill=-1),  # before everything: such a query sees nothing
        ancestor=wide(jnp.broadcast_to(ancestor, (batch, size, size)), axes=2),
        slot=wide(jnp.where(tail.slot < size, tail.slot, WIDTH), fill=WIDTH),
        **padded,
    )
    if selected is not None:
        selected = selected._replace(ids=wide(selected.ids, fill=-1))
    return wide(query), wide(gates), tree, selected


def config_for(sparsity: Sparsity, shape: Shape, dtype: Any) -> AttentionConfig:
    """The one config of the deterministic form: as many splits as the longest sequence may need."""
    usual = AttentionConfig.heuristic(sparsity, shape, 1, dtype=dtype)
    rows, tile = max(16, shape.lanes), min(usual.tile, 32)
    reach = shape.table + -(-shape.width // sparsity.select_block) + 1

    def branch(keys: int) -> Branch:
        return Branch(rows, max(1, -(-keys // (tile * SPLIT))))

    return AttentionConfig(
        group=1,
        compressed=branch(reach * sparsity.entries_per_page),
        selected=branch(sparsity.num_selected * sparsity.select_block),
        window=branch(sparsity.window + tile),
        tile=tile,
        num_stages=3,
        warp_rows=usual.warp_rows,
        selection_warps=selection_warps(shape),
    )


def tables(launch: Launch, lengths: jax.Array, tail: Tail) -> dict[str, jax.Array]:
    """Which node, and which of the tail's compressed entries, a query meets on its path.

    ``tail_path`` int32 [B, T, T]: the node at each depth; ``tail_entry`` int32 [B, T, M]: the slot of each entry that
    the path completes, in order. Places that the path does not reach say T and M, and rows of queries that are not
    there are never read. A chain needs neither.
    """
    if tail.ancestor is None:
        return {}
    sparsity, shape, nodes = launch.sparsity, launch.shape, launch.nodes
    batch, width, slots = shape.batch, shape.width, shape.slots
    ancestor = jnp.broadcast_to(tail.ancestor[:, :nodes, :nodes], (batch, nodes, nodes))
    sequence, query, node = jnp.ogrid[:batch, :nodes, :nodes]
    depth = tail.positions[:, :nodes] - lengths[:, None]
    path = jnp.full((batch, width, width), width, jnp.int32)
    path = path.at[sequence, query, jnp.where(ancestor, depth[:, None], width)].set(node, mode="drop")
    used = tail.slot < nodes
    end = jnp.where(used, tail.slot, 0)
    block, stride = sparsity.compress_block, sparsity.compress_stride
    entry = (jnp.take_along_axis(tail.positions, end, axis=1) + 1 - block) // stride
    place = entry - jnp.maximum(lengths - block + stride, 0)[:, None] // stride
    on_path = used[:, None] & jnp.take_along_axis(ancestor, end[:, None], axis=2)
    sequence, query, slot = jnp.ogrid[:batch, :nodes, :slots]
    found = jnp.full((batch, width, slots), slots, jnp.int32)
    found = found.at[sequence, query, jnp.where(on_path, place[:, None], slots)].set(slot, mode="drop")
    return {"tail_path": path, "tail_entry": found}


class _Query:
    """A program's query: its rows, position, and what of its sequence is committed."""

    def __init__(self, launch: Launch, refs: dict[str, Any], token: Any, rows: int):
        lanes = launch.shape.lanes
        first = token * lanes
        self.rows: Rows = query_rows(launch, refs, rows, first, first + lanes)
        self.token, self.batch, self.head = token, refs["batch"], refs["head"]
        self.length = refs["lengths"][self.batch]
        self.position = jnp.where(self.length >= 0, refs["tail_positions"][self.batch, token], -1)
        self._refs = refs

    def entries(self, sparsity: Sparsity, tokens: Any) -> Any:
        """Compressed entries of the first ``tokens`` tokens."""
        rest = tokens - sparsity.compress_block + sparsity.compress_stride
        return jnp.maximum(rest, 0) // sparsity.compress_stride

    def on_path(self, table: str, place: Any, live: Any) -> Any:
        """What ``table`` says of places int32 [keys] of this query's path; on a chain it is the place itself."""
        if table not in self._refs:
            return jnp.where(live, place, 0)
        at = (self.batch, self.token, jnp.where(live, place, 0))
        return plgpu.load(self._refs[table].at[at], mask=live, other=0)

    def page(self, block: Any, live: Any) -> Any:
        return plgpu.load(self._refs["page_table"].at[self.batch, block], mask=live, other=0)

    def take(self, cached: str, at: Any, new: str, node: Any, own: Any, live: Any) -> Any:
        """Rows [keys, D] of the cache where ``own``, else of the tail's ``node``; 0 where not ``live``."""
        own = own & live
        old = load_rows(self._refs[cached], at, own)
        fresh = load_rows(self._refs[new], (self.batch, node, self.head), live & ~own)
        return jnp.where(own[:, None], old, fresh)

    def tokens(self, launch: Launch, state: State, names: tuple[str, ...], at: Any, position: Any, live: Any) -> State:
        """The state after one more tile: the tokens at ``position`` int32 [keys], cached at ``at``."""
        own = position < self.length
        node = self.on_path("tail_path", position - self.length, live & ~own)
        scores = score(launch, self.rows, self.take(names[0], at, names[2], node, own, live))
        visible = jnp.broadcast_to(live[None, :], scores.shape)
        return attend_tile(launch, state, scores, visible, self.take(names[1], at, names[3], node, own, live))[1]


def _tiles(split: Any, total: Any) -> tuple[Any, Any]:
    """The tiles of a split, of ``total`` in all."""
    return jnp.minimum(split * SPLIT, total), jnp.minimum((split + 1) * SPLIT, total)


def _compressed(launch: Launch, refs: dict[str, Any], token: Any, split: Any, splits: int, base: int) -> None:
    sparsity, per_page = launch.sparsity, launch.sparsity.entries_per_page
    query = _Query(launch, refs, token, launch.branch(0).rows)
    entries = query.entries(sparsity, query.position + 1)
    cached = query.entries(sparsity, query.length)
    lane = entry_of_lane(launch, lax.iota(jnp.int32, launch.entry_tile))

    def step(i, state):
        entry = i * launch.entry_tile + lane
        live, own = entry < entries, entry < cached
        block, offset = parts(entry, per_page)
        at = (query.page(block, own), query.head, offset)
        slot = query.on_path("tail_entry", entry - cached, live & ~own)

        def rows_of(name):
            return query.take(f"compressed_{name}", at, f"tail_compressed_{name}", slot, own, live)

        scores = score(launch, query.rows, rows_of("key"))
        values = rows_of("value") if sparsity.compressed_output else None
        visible = jnp.broadcast_to(live[None, :], scores.shape)
        weights, state = attend_tile(launch, state, scores, visible, values)
        if launch.scored:
            scores = jnp.where(visible, scores * scale(launch), -jnp.inf)
            store_scores(launch, refs, query.rows, i, scores, weights, state.top)
        return state

    state = start(query.rows, sparsity.compressed_output)
    state = lax.fori_loop(*_tiles(split, pl.cdiv(entries, launch.entry_tile)), step, state)
    finish(refs, query.rows, base + split, state)


def _selected(launch: Launch, refs: dict[str, Any], token: Any, split: Any, splits: int, base: int) -> None:
    page, tile = launch.sparsity.select_block, launch.config.tile
    query = _Query(launch, refs, token, launch.branch(1).rows)
    place = lax.iota(jnp.int32, pl.next_power_of_2(launch.sparsity.num_selected))
    ids = refs["ids"].at[query.batch, token, query.head, place]
    ids = plgpu.load(ids, mask=place < launch.sparsity.num_selected, other=-1)
    count = jnp.where(query.position >= 0, jnp.sum((ids >= 0).astype(jnp.int32)), 0)

    def step(i, state):
        item, offset = parts(i * tile + lax.iota(jnp.int32, tile), page)
        listed = item < count
        block = plgpu.load(refs["ids"].at[query.batch, token, query.head, item], mask=listed, other=0)
        position = block * page + offset
        live = listed & (position <= query.position)
        at = (query.page(block, live & (position < query.length)), query.head, offset)
        return query.tokens(launch, state, ("key", "value", "tail_key", "tail_value"), at, position, live)

    state = lax.fori_loop(*_tiles(split, pl.cdiv(count * page, tile)), step, start(query.rows))
    finish(refs, query.rows, base + split, state)


def _window(launch: Launch, refs: dict[str, Any], token: Any, split: Any, splits: int, base: int) -> None:
    page, tile, window = launch.sparsity.select_block, launch.config.tile, launch.sparsity.window
    query = _Query(launch, refs, token, launch.branch(2).rows)
    ring = "window_key" in refs
    names = ("window_key", "window_value", "tail_window_key", "tail_window_value")
    names = names if ring else ("key", "value", "tail_key", "tail_value")
    first = jnp.maximum(query.position - window + 1, 0) // tile

    def step(i, state):
        position = (first + i) * tile + lax.iota(jnp.int32, tile)
        live = (position <= query.position) & (position > query.position - window)
        own = live & (position < query.length)
        if ring:
            at = (query.batch, query.head, position % launch.shape.ring)
        else:
            block, offset = parts(position, page)
            at = (query.page(block, own), query.head, offset)
        return query.tokens(launch, state, names, at, position, live)

    total = jnp.where(query.position >= 0, query.position // tile - first + 1, 0)
    state = lax.fori_loop(*_tiles(split, total), step, start(query.rows))
    finish(refs, query.rows, base + split, state)


BODIES = _compressed, _selected, _window
