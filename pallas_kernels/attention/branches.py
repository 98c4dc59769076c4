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

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._call import triton_call
from pallas_kernels.attention.arguments import Layer, Selection, Shape, Sparsity, Tail
from pallas_kernels.attention.config import AttentionConfig, Branch

# Finite, so that the difference of two such scores is 0 and never NaN.
MASKED = np.float32(-1e30)
LOG2E = math.log2(math.e)
TAIL_TILE = 64


@dataclasses.dataclass(frozen=True)
class Launch:
    """Which branches a launch computes, as (branch index, how it is split), and whether it scores blocks."""

    sparsity: Sparsity
    shape: Shape
    config: AttentionConfig
    branches: tuple[int, ...]
    scored: bool = False

    def branch(self, index: int) -> Branch:
        """The split of the compressed (0), the selected (1) or the window branch (2)."""
        return (self.config.compressed, self.config.selected, self.config.window)[index]

    def row_tiles(self, index: int) -> int:
        """Row tiles of a (sequence, KV head); those of the selected branch do not cross groups."""
        rows = self.branch(index).rows
        if index == 1:
            return self.groups * -(-self.config.group * self.shape.lanes // rows)
        return -(-self.shape.rows // rows)

    @property
    def groups(self) -> int:
        return -(-self.shape.width // self.config.group)

    @property
    def segments(self) -> list[tuple[int, int, int]]:
        """(branch, first split, splits) in the launch's partial outputs."""
        found, first = [], 0
        for index in self.branches:
            found.append((index, first, self.branch(index).splits))
            first += self.branch(index).splits
        return found

    @property
    def splits(self) -> int:
        return sum(count for _, _, count in self.segments)

    @property
    def page_tile(self) -> int:
        """Pages whose compressed entries make a tile."""
        return max(1, self.config.tile // self.sparsity.entries_per_page)

    @property
    def entry_tile(self) -> int:
        return self.page_tile * self.sparsity.entries_per_page

    @property
    def identity(self) -> bool:
        """Whether each compression block is one selection block (l = l' = d): its score is the block's."""
        return self.sparsity.compress_block == self.sparsity.select_block == self.sparsity.compress_stride

    @property
    def num_warps(self) -> int:
        """One warp for 16 rows."""
        return max(1, min(8, max(self.branch(index).rows for index in self.branches) // 16))

    @property
    def mask_words(self) -> int:
        return -(-self.config.group // 32)

    @property
    def workspace(self) -> int:
        """Words per (sequence, KV head) that the selection wants zeroed: who owns which block, and who has arrived.

        Per group, ``mask_words`` rows of the table's N blocks and one that nobody reads; then one counter per group.
        """
        return self.groups * (self.mask_words * (self.shape.table + 1) + 1) if self.config.group > 1 else 0


def run(
    launch: Launch,
    query: jax.Array,
    layer: Layer,
    page_table: jax.Array,
    lengths: jax.Array,
    tail: Tail,
    selection: Selection | None,
    interpret: bool,
) -> dict[str, jax.Array]:
    """The launch's partial outputs, and the scores of blocks when it is ``scored``.

    Returns:
      out: float32 [B, Hkv, splits, rows, D], each split's softmax-weighted values;
      lse: float32 [B, Hkv, splits, rows], log2 of the sums of its exponentials, −inf where it saw nothing;
      scores: float32 [B, Hkv, rows, N]: sums over the entries that begin in a block of overlap · 2^(score − top), with
        tops [B, Hkv, rows, ⌈N/page_tile⌉] of each tile of blocks (where a block is one entry: its score, no tops);
        carry, where entries reach into the next block: the same with their overlap there;
        slot_scores [B, Hkv, rows, M]: the scores of the tail's entries;
      workspace: int32 [B, Hkv, ...], zeros (``Launch.workspace``).
    """
    shape = launch.shape
    inputs: dict[str, jax.Array | None] = {
        "query": query,
        **{name: value for name, value in layer._asdict().items()},
        "page_table": page_table,
        "lengths": lengths,
        **{f"tail_{name}": value for name, value in tail._asdict().items()},
    }
    if selection is not None and 1 in launch.branches:
        inputs.update(selection._asdict())
    inputs = {name: value for name, value in inputs.items() if value is not None}
    lead = (shape.batch, shape.num_kv_heads)
    out_shapes: dict[str, tuple[Any, ...]] = {
        "out": (jnp.float32, launch.splits, shape.rows, shape.head_dim),
        "lse": (jnp.float32, launch.splits, shape.rows),
    }
    if launch.scored:
        out_shapes |= {
            "scores": (jnp.float32, shape.rows, shape.table),
            "slot_scores": (jnp.float32, shape.rows, shape.slots),
        }
        if not launch.identity:
            out_shapes["tops"] = (jnp.float32, shape.rows, -(-shape.table // launch.page_tile))
        if launch.sparsity.compress_block > launch.sparsity.compress_stride:
            out_shapes["carry"] = (jnp.float32, shape.rows, shape.table)
        if launch.workspace:
            out_shapes["workspace"] = (jnp.int32, launch.workspace)
    names = [*inputs, *out_shapes]

    def branches_kernel(*refs: Any) -> None:
        _kernel(launch, dict(zip(names, refs, strict=True)))

    works = sum(launch.row_tiles(index) * launch.branch(index).splits for index in launch.branches)
    outputs = triton_call(
        branches_kernel,
        *[value for value in inputs.values() if value is not None],
        out_shape=[jax.ShapeDtypeStruct((*lead, *dims), dtype) for dtype, *dims in out_shapes.values()],
        grid=(works, shape.num_kv_heads, shape.batch),
        num_warps=launch.num_warps,
        num_stages=launch.config.num_stages,
        interpret=interpret,
        name="nsa_" + "_".join(("compressed", "selected", "window")[index] for index in launch.branches),
    )
    return dict(zip(out_shapes, outputs, strict=True))


def _kernel(launch: Launch, refs: dict[str, Any]) -> None:
    work, first = pl.program_id(0), 0
    # Here, not where they are used: interpret mode knows program ids at the top level only.
    refs |= {"head": pl.program_id(1), "batch": pl.program_id(2), "programs": pl.num_programs(0)}
    if launch.scored and launch.workspace:
        _clear(launch, refs, work)
    for index, split_base, splits in launch.segments:
        count = launch.row_tiles(index) * splits
        body = (_compressed, _selected, _window)[index]

        @pl.when((work >= first) & (work < first + count))
        def _(first=first, body=body, splits=splits, split_base=split_base):
            own = work - first
            body(launch, refs, own // splits, own % splits, splits, split_base)

        first += count


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


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A program's rows: where they lie, the query and head of each, and their queries."""

    index: Any  # int32 [rows], within the (sequence, KV head)
    token: Any  # int32 [rows]
    valid: Any  # bool [rows]
    query: Any  # [rows, D]
    size: int


def _load_rows(launch: Launch, refs: dict[str, Any], size: int, first: Any, end: Any) -> _Rows:
    """Rows ``first`` … ``first`` + size − 1, of which those before ``end`` count."""
    shape = launch.shape
    index = first + lax.iota(jnp.int32, size)
    token, lane = parts(index, shape.lanes)
    valid = (index < end) & (lane < shape.group)
    head = refs["head"] * shape.group + lane
    query = load_rows(refs["query"], (refs["batch"], token, head), valid)
    return _Rows(index, token, valid, query, size)


def parts(index: Any, size: int) -> tuple[Any, Any]:
    """``index // size`` and ``index % size`` for indices that are not negative, ``size`` a power of two.

    jnp's own operators round for signs that do not occur: in a tile's addresses that was a tenth of all instructions.
    """
    return index >> (size.bit_length() - 1), index & (size - 1)


def load_rows(ref: Any, at: tuple[Any, ...], live: Any) -> Any:
    """``ref[*at, :]`` for index vectors ``at`` of one length (or scalars), 0 where not ``live``; [rows, D padded].

    ``live`` None: all are. Masks are dear in a tile, so the loops have none but for what the last split does.
    """
    dim = ref.shape[-1]
    lanes = pl.next_power_of_2(dim)
    shape = (max(index.shape[0] for index in at if jnp.ndim(index)), lanes)
    # Indices as whole matrices: interpret mode takes no masked mixture of vectors and slices.
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    wide = [jnp.broadcast_to(index[:, None], shape) if jnp.ndim(index) else index for index in at]
    mask = None if lanes == dim else column < dim
    if live is not None:
        mask = live[:, None] & (column < dim) if lanes != dim else jnp.broadcast_to(live[:, None], shape)
    return plgpu.load(ref.at[(*wide, column)], mask=mask, other=None if mask is None else 0.0)


def dot(a: Any, b: Any, **transposed: bool) -> Any:
    """float32 a·b, either transposed if so asked; float32 factors are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, precision=precision, **transposed)


def _scores(launch: Launch, rows: _Rows, keys: Any) -> Any:
    """float32 [rows, keys], scaled."""
    return dot(rows.query, keys, trans_b=True) * np.float32(launch.sparsity.scale * LOG2E)


def _start(rows: _Rows, values: bool = True) -> tuple[Any, ...]:
    """The running maximum, sum and weighted values of no keys."""
    state = (jnp.full(rows.size, MASKED, jnp.float32), jnp.zeros(rows.size, jnp.float32))
    return (*state, jnp.zeros((rows.size, rows.query.shape[1]), jnp.float32)) if values else state


def _attend(state: tuple[Any, ...], scores: Any, visible: Any, values: Any) -> tuple[Any, tuple[Any, ...]]:
    """One more tile: its weights relative to the new maximum, and the new state.

    ``visible`` None: all keys are; ``values`` None: sums only.
    """
    top, total, *weighted = state
    if visible is not None:
        scores = jnp.where(visible, scores, MASKED)
    highest = jnp.maximum(top, jnp.max(scores, axis=1))
    weights = jnp.exp2(scores - highest[:, None])
    if visible is not None:
        weights = jnp.where(visible, weights, 0.0)
    fade = jnp.exp2(top - highest)
    state = (highest, total * fade + jnp.sum(weights, axis=1))
    if values is None:
        return weights, state
    return weights, (*state, weighted[0] * fade[:, None] + dot(weights.astype(values.dtype), values))


def _finish(refs: dict[str, Any], rows: _Rows, split: Any, state: tuple[Any, ...]) -> None:
    """Stores a split's output and log-sum-exp."""
    top, total, *weighted = state
    at = (refs["batch"], refs["head"], split)
    lse = jnp.where(total > 0, top + jnp.log(total) * np.float32(LOG2E), -jnp.inf)
    plgpu.store(refs["lse"].at[(*at, rows.index)], lse, mask=rows.valid)
    if weighted:
        ref = refs["out"]
        out = weighted[0] / jnp.where(total > 0, total, 1.0)[:, None]
        dim, lanes = ref.shape[-1], out.shape[1]
        row = jnp.broadcast_to(rows.index[:, None], out.shape)
        column = lax.broadcasted_iota(jnp.int32, out.shape, 1)
        mask = jnp.broadcast_to(rows.valid[:, None], out.shape)
        plgpu.store(ref.at[(*at, row, column)], out, mask=mask if lanes == dim else mask & (column < dim))


def _share(steps: Any, split: Any, splits: int) -> tuple[Any, Any]:
    """The ``split``-th share of ``steps`` steps over the cache: equal, and nothing for the last of several splits."""
    if splits == 1:
        return 0, steps
    each = pl.cdiv(steps, splits - 1)
    first = split * each
    return jnp.minimum(first, steps), jnp.minimum(first + each, steps)


def _walk(first: Any, end: Any, page_of: Any, step: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    """The state after the steps ``first`` … ``end`` − 1; each gets its page, and returns the next step's.

    A page looked up one step ahead is there when the keys are asked for. Looked up in the same step, it would take one
    of the stages in which tiles are in flight.
    """
    return lax.fori_loop(first, end, step, (page_of(first), state))[1]


def _ancestors(refs: dict[str, Any], rows: _Rows, node: Any, live: Any) -> Any:
    """bool [rows, nodes]: is the node on the row's path?"""
    mask = rows.valid[:, None] & live[None, :]
    if "tail_ancestor" not in refs:
        return mask & (node[None, :] <= rows.token[:, None])
    ref = refs["tail_ancestor"]
    batch = refs["batch"] if ref.shape[0] > 1 else 0
    size = (rows.size, node.shape[0])
    token = jnp.broadcast_to(jnp.where(rows.valid, rows.token, 0)[:, None], size)
    node = jnp.broadcast_to(jnp.where(live, node, 0)[None, :], size)
    return plgpu.load(ref.at[batch, token, node]) & mask


def _compressed(launch: Launch, refs: dict[str, Any], tile: Any, split: Any, splits: int, base: int) -> None:
    sparsity, shape = launch.sparsity, launch.shape
    batch, head, per_page = refs["batch"], refs["head"], sparsity.entries_per_page
    size = launch.branch(0).rows
    rows = _load_rows(launch, refs, size, tile * size, shape.rows)
    length = refs["lengths"][batch]
    entries = jnp.maximum(length - sparsity.compress_block + sparsity.compress_stride, 0) // sparsity.compress_stride
    lane = lax.iota(jnp.int32, launch.entry_tile)
    with_values = sparsity.compressed_output

    def page_of(i):
        entry = i * launch.entry_tile + lane
        return plgpu.load(refs["page_table"].at[batch, parts(entry, per_page)[0]], mask=entry < entries, other=0)

    def attend_entries(i, page, state, live):
        at = (page, head, parts(i * launch.entry_tile + lane, per_page)[1])
        scores = _scores(launch, rows, load_rows(refs["compressed_key"], at, live))
        values = load_rows(refs["compressed_value"], at, live) if with_values else None
        visible = None if live is None else live[None, :]
        weights, state = _attend(state, scores, visible, values)
        if launch.scored:
            scores = scores if visible is None else jnp.where(visible, scores, -jnp.inf)
            _store_scores(launch, refs, rows, i, scores, weights, state[0])
        return state

    def step(i, carry):
        page, state = carry
        return page_of(i + 1), attend_entries(i, page, state, None)

    def partial_step(i, state):
        return attend_entries(i, page_of(i), state, i * launch.entry_tile + lane < entries)

    last = (split == splits - 1) & (length >= 0)
    full = entries // launch.entry_tile
    state = _walk(*_share(full, split, splits), page_of, step, _start(rows, with_values))
    state = lax.fori_loop(full, jnp.where(last, pl.cdiv(entries, launch.entry_tile), full), partial_step, state)

    # The blocks that end in the tail: each visible below the node at which it ends.
    slot_tile = min(TAIL_TILE, max(16, pl.next_power_of_2(shape.slots)))

    def slots(i, state):
        slot = i * slot_tile + lax.iota(jnp.int32, slot_tile)
        inside = slot < shape.slots
        node = plgpu.load(refs["tail_slot"].at[batch, slot], mask=inside, other=shape.width)
        used = node < shape.width
        visible = _ancestors(refs, rows, node, used)
        scores = _scores(launch, rows, load_rows(refs["tail_compressed_key"], (batch, slot, head), used))
        values = load_rows(refs["tail_compressed_value"], (batch, slot, head), used) if with_values else None
        if launch.scored:
            where = (jnp.broadcast_to(index, scores.shape) for index in (rows.index[:, None], slot[None, :]))
            plgpu.store(
                refs["slot_scores"].at[(batch, head, *where)],
                jnp.where(visible, scores, -jnp.inf),
                mask=rows.valid[:, None] & inside[None, :],
            )
        return _attend(state, scores, visible, values)[1]

    state = lax.fori_loop(0, jnp.where(last, jnp.int32(-(-shape.slots // slot_tile)), jnp.int32(0)), slots, state)
    _finish(refs, rows, base + split, state)


def _store_scores(
    launch: Launch, refs: dict[str, Any], rows: _Rows, tile: Any, scores: Any, weights: Any, top: Any
) -> None:
    """What a tile's entries give to the blocks in which they begin, and to the blocks after those.

    Sums relative to the running maximum, which is stored too: a logarithm here would cost more than all else.
    """
    sparsity, shape, pages = launch.sparsity, launch.shape, launch.page_tile
    at = refs["batch"], refs["head"]
    if launch.identity:
        sums = {"scores": scores}
    else:
        per_page = sparsity.entries_per_page
        entry = lax.broadcasted_iota(jnp.int32, (1, 1, per_page), 2)
        weights = weights.reshape(rows.size, pages, per_page)
        sums = {
            name: jnp.sum(weights * overlap(sparsity, entry, block).astype(jnp.float32), axis=2)
            for name, block in (("scores", 0), ("carry", 1))
            if name in refs
        }
        plgpu.store(refs["tops"].at[(*at, rows.index, jnp.full_like(rows.index, 0) + tile)], top, mask=rows.valid)
    for name, values in sums.items():
        block = tile * pages + lax.broadcasted_iota(jnp.int32, values.shape, 1)
        row = jnp.broadcast_to(rows.index[:, None], values.shape)
        plgpu.store(refs[name].at[(*at, row, block)], values, mask=rows.valid[:, None] & (block < shape.table))


def overlap(sparsity: Sparsity, entry: Any, block: Any) -> Any:
    """int32: the chunks of d tokens that compression block ``entry`` shares with selection block ``block``."""
    chunks, per_page = sparsity.compress_block // sparsity.compress_stride, sparsity.entries_per_page
    low = jnp.maximum(entry, per_page * block)
    return jnp.maximum(jnp.minimum(entry + chunks, per_page * (block + 1)) - low, 0)


def _tail_tiles(launch: Launch, rows: _Rows, last: Any) -> Any:
    """Tiles of the tail that a program reads: none but in the last split, and on a chain none behind its rows."""
    return jnp.where(last, jnp.minimum(jnp.max(rows.token), launch.shape.width - 1) // _tail_tile(launch) + 1, 0)


def _tail_tile(launch: Launch) -> int:
    return min(TAIL_TILE, max(16, pl.next_power_of_2(launch.shape.width)))


def _window(launch: Launch, refs: dict[str, Any], tile: Any, split: Any, splits: int, base: int) -> None:
    sparsity, shape = launch.sparsity, launch.shape
    batch, head, page = refs["batch"], refs["head"], sparsity.select_block
    size = launch.branch(2).rows
    rows = _load_rows(launch, refs, size, tile * size, shape.rows)
    length = refs["lengths"][batch]
    place = plgpu.load(refs["tail_positions"].at[batch, rows.token], mask=rows.valid, other=0)
    oldest = place - sparsity.window  # the window begins after it
    lane = lax.iota(jnp.int32, launch.config.tile)
    ring = "window_key" in refs
    first_page_tile = jnp.maximum(length - sparsity.window, 0) // launch.config.tile

    def step(i, state):
        if ring:
            slot = i * launch.config.tile + lane
            newest = length - 1
            back = newest % shape.ring - slot  # how long ago the slot was written, in this round or the one before
            key_at = newest - jnp.where(back < 0, back + shape.ring, back)
            # Slots hold the last R positions; a short sequence has not filled them all.
            live = (slot < shape.ring) & (key_at >= 0)
            at, keys, values = (batch, head, slot), refs["window_key"], refs["window_value"]
        else:
            key_at = (first_page_tile + i) * launch.config.tile + lane
            live = key_at < length
            block, offset = parts(key_at, page)
            owner = plgpu.load(refs["page_table"].at[batch, block], mask=live, other=0)
            at, keys, values = (owner, head, offset), refs["key"], refs["value"]
        scores = _scores(launch, rows, load_rows(keys, at, live))
        visible = live[None, :] & (key_at[None, :] > oldest[:, None])
        return _attend(state, scores, visible, load_rows(values, at, live))[1]

    # Where the ring is not full yet, its slots are those of the positions.
    span = jnp.clip(length, 0, shape.ring) if ring else jnp.maximum(length - first_page_tile * launch.config.tile, 0)
    steps = pl.cdiv(span, launch.config.tile)
    state = lax.fori_loop(*_share(steps, split, splits), step, _start(rows))

    own = "tail_window_key" if ring else "tail_key", "tail_window_value" if ring else "tail_value"
    tail_lane = lax.iota(jnp.int32, _tail_tile(launch))

    def near(i, state):
        node = i * _tail_tile(launch) + tail_lane
        inside = node < shape.width
        node_at = plgpu.load(refs["tail_positions"].at[batch, node], mask=inside, other=0)
        visible = _ancestors(refs, rows, node, inside) & (node_at[None, :] > oldest[:, None])
        scores = _scores(launch, rows, load_rows(refs[own[0]], (batch, node, head), inside))
        return _attend(state, scores, visible, load_rows(refs[own[1]], (batch, node, head), inside))[1]

    last = (split == splits - 1) & (length >= 0)
    state = lax.fori_loop(0, _tail_tiles(launch, rows, last), near, state)
    _finish(refs, rows, base + split, state)


def _selected(launch: Launch, refs: dict[str, Any], tile: Any, split: Any, splits: int, base: int) -> None:
    sparsity, shape, config = launch.sparsity, launch.shape, launch.config
    batch, head, page = refs["batch"], refs["head"], sparsity.select_block
    size = launch.branch(1).rows
    per_group = -(-config.group * shape.lanes // size)
    group = tile // per_group
    first = group * config.group * shape.lanes
    end = jnp.minimum(first + config.group * shape.lanes, shape.rows)
    rows = _load_rows(launch, refs, size, first + tile % per_group * size, end)
    length = refs["lengths"][batch]
    grouped = config.group > 1
    bit = jnp.maximum(rows.token - group * config.group, 0)
    lane = lax.iota(jnp.int32, config.tile)
    several = config.tile > page  # blocks of the list in a tile

    def item_of(i):
        """The tile's item of the list, and its tokens' places in their blocks."""
        item, offset = parts(i * config.tile + (lane if several else 0), page)
        return item, offset if several else offset + lane

    def page_of(i):
        item, _ = item_of(i)
        listed = refs["union"].at[batch, head, group, item] if grouped else refs["ids"].at[batch, group, head, item]
        block = plgpu.load(listed, mask=item < count, other=0)
        return plgpu.load(refs["page_table"].at[batch, block], mask=item < count, other=0)

    def attend_blocks(i, owner, state, live):
        item, offset = item_of(i)
        at = (owner, head, offset)
        scores = _scores(launch, rows, load_rows(refs["key"], at, live))
        visible = None if live is None else jnp.broadcast_to(live[None, :], scores.shape)
        if grouped:
            owned = jnp.zeros((size, config.tile), jnp.int32)
            for word in range(launch.mask_words):
                owners = refs["owners"].at[batch, head, group, jnp.full_like(item, word), item]
                mask = plgpu.load(owners, mask=item < count, other=0)
                mask = mask[None, :] if several else mask
                bits = (mask >> (bit & 31)[:, None]) & 1
                owned = jnp.where((bit >> 5 == word)[:, None], bits, owned) if launch.mask_words > 1 else bits
            owned = jnp.broadcast_to(owned, scores.shape) > 0
            visible = owned if visible is None else visible & owned
        return _attend(state, scores, visible, load_rows(refs["value"], at, live))[1]

    def step(i, carry):
        owner, state = carry
        return page_of(i + 1), attend_blocks(i, owner, state, None)

    def partial_step(i, state):
        return attend_blocks(i, page_of(i), state, item_of(i)[0] < count)

    if grouped:
        count = jnp.where(length > 0, refs["size"][batch, head, group], 0)
    else:
        ids = lax.iota(jnp.int32, pl.next_power_of_2(sparsity.num_selected))
        ids = plgpu.load(refs["ids"].at[batch, group, head, ids], mask=ids < sparsity.num_selected, other=-1)
        count = jnp.sum(((ids >= 0) & ((ids + 1) * page <= length)).astype(jnp.int32))
    last = (split == splits - 1) & (length >= 0)
    full = count * page // config.tile
    state = _walk(*_share(full, split, splits), page_of, step, _start(rows))
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
        scores = _scores(launch, rows, load_rows(refs["key"], at, live))
        visible = jnp.broadcast_to(live[None, :], scores.shape)
        if not always:
            visible &= selects(parts(token, page)[0])
        return _attend(state, scores, visible, load_rows(refs["value"], at, live))[1]

    state = lax.fori_loop(0, jnp.where(last, pl.cdiv(jnp.maximum(length, 0) % page, config.tile), 0), begun, state)
    tail_lane = lax.iota(jnp.int32, _tail_tile(launch))

    def near(i, state):
        node = i * _tail_tile(launch) + tail_lane
        inside = node < shape.width
        visible = _ancestors(refs, rows, node, inside)
        if not always:
            node_at = plgpu.load(refs["tail_positions"].at[batch, node], mask=inside, other=0)
            visible &= selects(parts(node_at, page)[0])
        scores = _scores(launch, rows, load_rows(refs["tail_key"], (batch, node, head), inside))
        return _attend(state, scores, visible, load_rows(refs["tail_value"], (batch, node, head), inside))[1]

    state = lax.fori_loop(0, _tail_tiles(launch, rows, last), near, state)
    _finish(refs, rows, base + split, state)
