"""The three branches as one kernel: rows of queries against lists of keys, split over programs.

A row is one head of one query; the G heads of a KV head stand together, so a tile of rows is a matrix that one load of
K and V serves. Every program walks over its share of the keys with a running softmax and leaves a partial output and
its log-sum-exp; ``merge`` joins them. What a branch attends to besides the cache, the tail, is the last split's work:
all of it where there are several, so that no program waits for the cache and then for the tail.

A warp holds 16 rows, the least that a tensor core takes, and all keys of a tile: so softmax needs no word between
warps. More warps than that would do the same work twice, and keys on the warps' side would meet in shared memory at
every tile (measured: 2.5 times the instructions).

Scores are kept in units of log 2, because exp2 is what the hardware has.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._call import triton_call
from pallas_kernels.attention import deterministic
from pallas_kernels.attention.arguments import Layer, Selection, Tail
from pallas_kernels.attention.launch import Launch
from pallas_kernels.attention.scores import entry_of_lane, store_scores
from pallas_kernels.attention.tiles import (
    ancestors,
    attend_tile,
    finish,
    load_rows,
    parts,
    query_rows,
    scale,
    score,
    share,
    start,
    tail_tiles,
    walk,
)  # fmt: skip


def run(
    launch: Launch,
    query: jax.Array,
    layer: Layer,
    page_table: jax.Array,
    lengths: jax.Array,
    tail: Tail,
    selection: Selection | None,
) -> dict[str, jax.Array]:
    """The launch's partial outputs, and the scores of blocks when it is ``scored``: see :func:`results`."""
    inputs = arguments(launch, query, layer, page_table, lengths, tail, selection)
    out_shapes = results(launch)
    if launch.scored and launch.workspace:
        out_shapes["workspace"] = jax.ShapeDtypeStruct((*out_shapes["lse"].shape[:2], launch.workspace), jnp.int32)
    names = [*inputs, *out_shapes]

    def branches_kernel(*refs: Any) -> None:
        named = dict(zip(names, refs, strict=True))
        # Here, not where they are used: interpret mode knows program ids at the top level only.
        named |= {"head": pl.program_id(0), "batch": pl.program_id(1), "programs": pl.num_programs(2)}
        work, first = pl.program_id(2), 0
        if launch.scored and launch.workspace:
            _clear(launch, named, work)
        for index in launch.branches:
            perform(launch, named, index, work, first)
            first += works(launch, index)

    outputs = triton_call(
        branches_kernel,
        *inputs.values(),
        out_shape=list(out_shapes.values()),
        # Heads run side by side: what they read of a page lies side by side. And the last work, which is the shortest,
        # starts last, when it evens out what the multiprocessors have to do.
        grid=(launch.shape.num_kv_heads, launch.shape.batch, sum(works(launch, index) for index in launch.branches)),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages(query.dtype.itemsize),
        interpret=launch.interpret,
        name="nsa_" + "_".join(("compressed", "selected", "window")[index] for index in launch.branches),
    )
    return dict(zip(out_shapes, outputs, strict=True))


def arguments(
    launch: Launch,
    query: jax.Array,
    layer: Layer,
    page_table: jax.Array,
    lengths: jax.Array,
    tail: Tail,
    selection: Selection | None,
) -> dict[str, jax.Array]:
    """What the branches read, by the names that they have in a kernel."""
    inputs: dict[str, jax.Array | None] = {
        "query": query,
        **{name: value for name, value in layer._asdict().items()},
        "page_table": page_table,
        "lengths": lengths,
        **{f"tail_{name}": value for name, value in tail._asdict().items()},
        **(deterministic.tables(launch, lengths, tail) if launch.deterministic else {}),
    }
    if selection is not None and 1 in launch.branches:
        inputs.update(selection._asdict())
    return {name: value for name, value in inputs.items() if value is not None}


def results(launch: Launch) -> dict[str, jax.ShapeDtypeStruct]:
    """What the branches leave.

    Returns:
      out: float32 [B, Hkv, splits, rows, D], each split's softmax-weighted values;
      lse: float32 [B, Hkv, splits, rows], log2 of the sums of its exponentials, −inf where it saw nothing;
      where ``scored``:
      scores: float32 [B, Hkv, rows, blocks], ``Launch.blocks`` of them: sums over the entries that begin in a block of
        overlap · 2^(score − top), with tops [B, Hkv, rows, blocks/page_tile] of each tile of blocks (where a block is
        one entry: its score, no tops); carry [B, Hkv, rows, blocks/page_run], where entries reach into the block after
        theirs: the sums that the first of every ``page_run`` blocks gets from the one before, relative to its tile's
        top;
        slot_scores [B, Hkv, rows, M]: the scores of the tail's entries.
    """
    shape = launch.shape
    sizes: dict[str, tuple[int, ...]] = {
        "out": (launch.splits, shape.rows, shape.head_dim),
        "lse": (launch.splits, shape.rows),
    }
    if launch.scored:
        sizes |= {"scores": (shape.rows, launch.blocks), "slot_scores": (shape.rows, shape.slots)}
        if not launch.identity:
            sizes["tops"] = (shape.rows, launch.blocks // launch.page_tile)
        if launch.sparsity.compress_block > launch.sparsity.compress_stride:
            sizes["carry"] = (shape.rows, launch.blocks // launch.page_run)
    lead = (shape.batch, shape.num_kv_heads)
    return {name: jax.ShapeDtypeStruct((*lead, *size), jnp.float32) for name, size in sizes.items()}


def works(launch: Launch, index: int) -> int:
    """Programs of a branch for each (sequence, KV head)."""
    return launch.row_tiles(index) * launch.branch(index).splits


def perform(launch: Launch, refs: dict[str, Any], index: int, work: Any, first: int) -> None:
    """Inside a kernel: the ``work``-th program's share of a branch, if it is one of those from ``first`` on."""
    split_base, splits = next((base, splits) for branch, base, splits in launch.segments if branch == index)
    if launch.deterministic:
        # The code must not depend on how many nodes there are: the grid says it.
        nodes = refs["programs"] // launch.splits
        split, token = work // nodes, work % nodes

        @pl.when((split >= split_base) & (split < split_base + splits))
        def _():
            deterministic.BODIES[index](launch, refs, token, split - split_base, splits, split_base)

        return
    tiles, body = launch.row_tiles(index), (_compressed, _selected, _window)[index]

    @pl.when((work >= first) & (work < first + works(launch, index)))
    def _():
        own = work - first
        body(launch, refs, own % tiles, own // tiles, splits, split_base)


def _clear(launch: Launch, refs: dict[str, Any], work: Any) -> None:
    programs = refs["programs"]
    lane = lax.iota(jnp.int32, 1024)

    def clear(step, carry):
        at = (step * programs + work) * 1024 + lane
        plgpu.store(
            refs["workspace"].at[refs["batch"], refs["head"], at],
            jnp.zeros(1024, jnp.int32),
            mask=at < launch.workspace,
        )
        return carry

    lax.fori_loop(0, pl.cdiv(launch.workspace, 1024 * programs), clear, 0)


def _compressed(launch: Launch, refs: dict[str, Any], tile: Any, split: Any, splits: int, base: int) -> None:
    sparsity, shape = launch.sparsity, launch.shape
    batch, head, per_page = refs["batch"], refs["head"], sparsity.entries_per_page
    size = launch.branch(0).rows
    rows = query_rows(launch, refs, size, tile * size, shape.rows)
    length = refs["lengths"][batch]
    entries = jnp.maximum(length - sparsity.compress_block + sparsity.compress_stride, 0) // sparsity.compress_stride
    lane = entry_of_lane(launch, lax.iota(jnp.int32, launch.entry_tile))
    with_values = sparsity.compressed_output

    def page_of(i):
        entry = i * launch.entry_tile + lane
        return plgpu.load(refs["page_table"].at[batch, parts(entry, per_page)[0]], mask=entry < entries, other=0)

    def attend_entries(i, page, state, live):
        at = (page, head, parts(lane, per_page)[1])
        scores = score(launch, rows, load_rows(refs["compressed_key"], at, live))
        values = load_rows(refs["compressed_value"], at, live) if with_values else None
        visible = None if live is None else live[None, :]
        weights, state = attend_tile(launch, state, scores, visible, values)
        if launch.scored:
            scores = scores * scale(launch)
            scores = scores if visible is None else jnp.where(visible, scores, -jnp.inf)
            store_scores(launch, refs, rows, i, scores, weights, state.top)
        return state

    def step(i, page, state):
        return attend_entries(i, page, state, None)

    def partial_step(i, state):
        return attend_entries(i, page_of(i), state, i * launch.entry_tile + lane < entries)

    last = (split == splits - 1) & (length >= 0)
    full = entries // launch.entry_tile
    state = walk(launch, *share(full, split, splits), page_of, step, start(rows, with_values))
    state = lax.fori_loop(full, jnp.where(last, pl.cdiv(entries, launch.entry_tile), full), partial_step, state)

    # The blocks that end in the tail: each visible below the node at which it ends.
    slot_tile = launch.near_tile

    def slots(i, state):
        slot = i * slot_tile + lax.iota(jnp.int32, slot_tile)
        inside = slot < shape.slots
        node = plgpu.load(refs["tail_slot"].at[batch, slot], mask=inside, other=shape.width)
        used = node < shape.width
        visible = ancestors(refs, rows, node, used)
        scores = score(launch, rows, load_rows(refs["tail_compressed_key"], (batch, slot, head), used))
        at = (batch, slot, head)
        values = load_rows(refs["tail_compressed_value"], at, used) if with_values else None
        if launch.scored:
            where = (jnp.broadcast_to(index, scores.shape) for index in (rows.index[:, None], slot[None, :]))
            plgpu.store(
                refs["slot_scores"].at[(batch, head, *where)],
                jnp.where(visible, scores * scale(launch), -jnp.inf),
                mask=rows.valid[:, None] & inside[None, :],
            )
        return attend_tile(launch, state, scores, visible, values)[1]

    state = lax.fori_loop(0, jnp.where(last, jnp.int32(-(-shape.slots // slot_tile)), jnp.int32(0)), slots, state)
    finish(refs, rows, base + split, state)


def _window(launch: Launch, refs: dict[str, Any], tile: Any, split: Any, splits: int, base: int) -> None:
    sparsity, shape = launch.sparsity, launch.shape
    batch, head, page = refs["batch"], refs["head"], sparsity.select_block
    size = launch.branch(2).rows
    rows = query_rows(launch, refs, size, tile * size, shape.rows)
    length = refs["lengths"][batch]
    place = plgpu.load(refs["tail_positions"].at[batch, rows.token], mask=rows.valid, other=0)
    oldest = place - sparsity.window  # the window begins after it
    ring = "window_key" in refs
    tile_size = launch.near_tile if ring else launch.config.tile
    lane = lax.iota(jnp.int32, tile_size)
    first_page_tile = jnp.maximum(length - sparsity.window, 0) // tile_size

    def step(i, state):
        if ring:
            slot = i * tile_size + lane
            newest = length - 1
            back = newest % shape.ring - slot  # how long ago the slot was written, in this round or the one before
            key_at = newest - jnp.where(back < 0, back + shape.ring, back)
            # Slots hold the last R positions; a short sequence has not filled them all.
            live = (slot < shape.ring) & (key_at >= 0)
            at, keys, values = (batch, head, slot), refs["window_key"], refs["window_value"]
        else:
            key_at = (first_page_tile + i) * tile_size + lane
            live = key_at < length
            block, offset = parts(key_at, page)
            owner = plgpu.load(refs["page_table"].at[batch, block], mask=live, other=0)
            at, keys, values = (owner, head, offset), refs["key"], refs["value"]
        scores = score(launch, rows, load_rows(keys, at, live))
        visible = live[None, :] & (key_at[None, :] > oldest[:, None])
        return attend_tile(launch, state, scores, visible, load_rows(values, at, live))[1]

    # Where the ring is not full yet, its slots are those of the positions.
    span = jnp.clip(length, 0, shape.ring) if ring else jnp.maximum(length - first_page_tile * tile_size, 0)
    steps = pl.cdiv(span, tile_size)
    state = lax.fori_loop(*share(steps, split, splits), step, start(rows))

    own = "tail_window_key" if ring else "tail_key", "tail_window_value" if ring else "tail_value"
    tail_lane = lax.iota(jnp.int32, launch.near_tile)

    def near(i, state):
        node = i * launch.near_tile + tail_lane
        inside = node < shape.width
        node_at = plgpu.load(refs["tail_positions"].at[batch, node], mask=inside, other=0)
        visible = ancestors(refs, rows, node, inside) & (node_at[None, :] > oldest[:, None])
        scores = score(launch, rows, load_rows(refs[own[0]], (batch, node, head), inside))
        return attend_tile(launch, state, scores, visible, load_rows(refs[own[1]], (batch, node, head), inside))[1]

    last = (split == splits - 1) & (length >= 0)
    state = lax.fori_loop(0, tail_tiles(launch, rows, last), near, state)
    finish(refs, rows, base + split, state)


def _selected(launch: Launch, refs: dict[str, Any], tile: Any, split: Any, splits: int, base: int) -> None:
    sparsity, shape, config = launch.sparsity, launch.shape, launch.config
    batch, head, page = refs["batch"], refs["head"], sparsity.select_block
    size = launch.branch(1).rows
    per_group = -(-config.group * shape.lanes // size)
    group = tile // per_group
    first = group * config.group * shape.lanes
    end = jnp.minimum(first + config.group * shape.lanes, shape.rows)
    rows = query_rows(launch, refs, size, first + tile % per_group * size, end)
    length = refs["lengths"][batch]
    grouped = config.group > 1
    bit = jnp.maximum(rows.token - group * config.group, 0)
    lane = lax.iota(jnp.int32, config.tile)
    several = config.tile > page  # blocks of the list in a tile

    def item_of(i):
        """The tile's item of the list, and its tokens' places in their blocks."""
        item, offset = parts(i * config.tile + (lane if several else 0), page)
        return item, offset if several else offset + lane

    def listed_at(i):
        """Page of the item's block, and the words that say whose it is."""
        item, _ = item_of(i)
        inside = item < count
        if not grouped:
            block = plgpu.load(refs["ids"].at[batch, group, head, item], mask=inside, other=0)
            return plgpu.load(refs["page_table"].at[batch, block], mask=inside, other=0), []
        found = plgpu.load(refs["pages"].at[batch, head, group, item], mask=inside, other=0)
        words = [refs["owners"].at[batch, head, group, jnp.full_like(item, word), item]
                 for word in range(launch.mask_words)]  # fmt: skip
        return found, [plgpu.load(word, mask=inside, other=0) for word in words]

    def attend_blocks(i, listed, state, live):
        found, words = listed
        _, offset = item_of(i)
        at = (found, head, offset)
        scores = score(launch, rows, load_rows(refs["key"], at, live))
        visible = None if live is None else jnp.broadcast_to(live[None, :], scores.shape)
        if grouped:
            owned = jnp.zeros((size, config.tile), jnp.int32)
            for word, mask in enumerate(words):
                mask = mask[None, :] if several else mask
                bits = (mask >> (bit & 31)[:, None]) & 1
                owned = jnp.where((bit >> 5 == word)[:, None], bits, owned) if launch.mask_words > 1 else bits
            owned = jnp.broadcast_to(owned, scores.shape) > 0
            visible = owned if visible is None else visible & owned
        return attend_tile(launch, state, scores, visible, load_rows(refs["value"], at, live))[1]

    def step(i, listed, state):
        return attend_blocks(i, listed, state, None)

    def partial_step(i, state):
        return attend_blocks(i, listed_at(i), state, item_of(i)[0] < count)

    if grouped:
        count = jnp.where(length > 0, refs["size"][batch, head, group], 0)
    else:
        ids = lax.iota(jnp.int32, pl.next_power_of_2(sparsity.num_selected))
        ids = plgpu.load(refs["ids"].at[batch, group, head, ids], mask=ids < sparsity.num_selected, other=-1)
        count = jnp.sum(((ids >= 0) & ((ids + 1) * page <= length)).astype(jnp.int32))
    last = (split == splits - 1) & (length >= 0)
    full = count * page // config.tile
    state = walk(launch, *share(full, split, splits), listed_at, step, start(rows))
    if several:
        total = pl.cdiv(count * page, config.tile)
        state = lax.fori_loop(full, jnp.where(last, total, full), partial_step, state)

    # A query's own block and the num_local − 1 before it are selected: no tail token lies before those, nor does the
    # block that committed tokens fill in part.
    always = shape.width - 1 <= (sparsity.num_local - 1) * page and config.mode == "merged"

    def selects(block):
        """bool [rows, keys]: does the row's query select the blocks int32 [keys]?"""
        token = jnp.where(rows.valid, rows.token, 0)

        def one(k, found):
            own = plgpu.load(refs["ids"].at[batch, token, head, jnp.broadcast_to(k, token.shape)])
            return found | (own[:, None] == block[None, :]).astype(jnp.int32)

        return lax.fori_loop(0, sparsity.num_selected, one, jnp.zeros((size, block.shape[0]), jnp.int32)) > 0

    def begun(i, state):
        """The committed tokens of the block that they fill in part."""
        token = length // page * page + i * config.tile + lane
        live = token < length
        owner = plgpu.load(refs["page_table"].at[batch, jnp.full_like(lane, 0) + length // page], mask=live, other=0)
        at = (owner, head, parts(token, page)[1])
        scores = score(launch, rows, load_rows(refs["key"], at, live))
        visible = jnp.broadcast_to(live[None, :], scores.shape)
        if not always:
            visible &= selects(parts(token, page)[0])
        return attend_tile(launch, state, scores, visible, load_rows(refs["value"], at, live))[1]

    state = lax.fori_loop(0, jnp.where(last, pl.cdiv(jnp.maximum(length, 0) % page, config.tile), 0), begun, state)
    tail_lane = lax.iota(jnp.int32, launch.near_tile)

    def near(i, state):
        node = i * launch.near_tile + tail_lane
        inside = node < shape.width
        visible = ancestors(refs, rows, node, inside)
        if not always:
            node_at = plgpu.load(refs["tail_positions"].at[batch, node], mask=inside, other=0)
            visible &= selects(parts(node_at, page)[0])
        scores = score(launch, rows, load_rows(refs["tail_key"], (batch, node, head), inside))
        return attend_tile(launch, state, scores, visible, load_rows(refs["tail_value"], (batch, node, head), inside))[
            1
        ]

    state = lax.fori_loop(0, tail_tiles(launch, rows, last), near, state)
    finish(refs, rows, base + split, state)
