"""Scores of compressed entries → the blocks of each query, and the union of each group's blocks.

One program a (query, KV head). It normalises its heads' block scores, adds those of the tail's compression blocks, and
chooses the top n. The last program of a group to arrive then marks all its queries' blocks in a table of owners, and
compacts that into the union. So the union costs no launch of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._call import triton_call
from pallas_kernels.attention.arguments import Selection, Tail
from pallas_kernels.attention.config import AttentionConfig
from pallas_kernels.attention.launch import Launch
from pallas_kernels.attention.tiles import exp2, overlap, parts
from pallas_kernels.selection.kernel import choose, lane_parts, lane_ranges, store_ids

# Scores that a thread loads before it waits for them: more would spill.
_IN_FLIGHT = 64
# So few programs load whole rows of scores, written or not, sooner than they know the sequence's length.
_EAGER = 256


def run(
    launch: Launch, partial: dict[str, jax.Array], page_table: jax.Array, lengths: jax.Array, tail: Tail
) -> Selection:
    """The selection from the partial results of a ``scored`` launch."""
    shape, config = launch.shape, launch.config
    grouped = config.group > 1
    inputs: dict[str, jax.Array] = {
        name: partial[name]
        for name in ("lse", "scores", "tops", "carry", "slot_scores", "workspace")
        if name in partial
    }
    inputs |= {"page_table": page_table, "lengths": lengths, "tail_positions": tail.positions, "tail_slot": tail.slot}
    outputs = results(launch)
    if grouped:
        # The inputs' workspace, changed in place; reading the output is right in interpret mode too.
        outputs["marks"] = jax.ShapeDtypeStruct(partial["workspace"].shape, jnp.int32)
    names = [*inputs, *outputs]

    def nsa_selection(*refs: Any) -> None:
        named = dict(zip(names, refs, strict=True))
        # Interpret mode knows program ids at the top level only.
        token, named["head"], named["batch"] = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        perform(launch, named, token)

    result = triton_call(
        nsa_selection,
        *inputs.values(),
        out_shape=list(outputs.values()),
        grid=(launch.nodes, shape.num_kv_heads, shape.batch),
        num_warps=config.selection_warps,
        interpret=launch.interpret,
        aliases={names.index("workspace"): [*outputs].index("marks")} if grouped else None,
    )
    named = dict(zip(outputs, result, strict=True))
    return Selection(named["ids"], named.get("pages"), named.get("owners"), named.get("size"))


def results(launch: Launch) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a :class:`Selection`."""
    shape, sparsity, group = launch.shape, launch.sparsity, launch.config.group
    lead, union = (shape.batch, shape.num_kv_heads, launch.groups), min(group * sparsity.num_selected, shape.table)
    sizes: dict[str, tuple[int, ...]] = {"ids": (shape.batch, shape.width, shape.num_kv_heads, sparsity.num_selected)}
    if group > 1:
        sizes |= {"pages": (*lead, union), "owners": (*lead, launch.mask_words, union), "size": lead}
    return {name: jax.ShapeDtypeStruct(size, jnp.int32) for name, size in sizes.items()}


def perform(launch: Launch, refs: dict[str, Any], token: Any) -> None:
    """Inside a kernel: the selection of one query."""
    sparsity, shape = launch.sparsity, launch.shape
    head, batch = refs["head"], refs["batch"]
    refs = refs | {"token": token}
    length, position = refs["lengths"][batch], refs["tail_positions"][batch, token]
    own = jnp.where(length >= 0, position // sparsity.select_block, -1)
    num_blocks = shape.table + -(-shape.width // sparsity.select_block) + 1
    importance = _importance(launch, refs, num_blocks, length)
    rule = dict(num_selected=sparsity.num_selected, num_initial=sparsity.num_initial, num_local=sparsity.num_local)
    chosen, slot, count = choose(importance, own, num_blocks, **rule)
    store_ids(refs["ids"], (batch, token, head), chosen, slot, count, sparsity.num_selected)
    if launch.config.group > 1:
        _unite(launch, refs, length)


def _importance(launch: Launch, refs: dict[str, Any], num_blocks: int, length: Any) -> list[Any]:
    """Importance float32 of all blocks for this program's query: Σ over heads of the probabilities, by overlap."""
    sparsity, shape = launch.sparsity, launch.shape
    token, batch = refs["token"], refs["batch"]
    # The tokens whose entries the scoring launch went over, tile by tile; the rest are the tail's slots.
    tokens = jnp.where(length >= 0, refs["tail_positions"][batch, token] + 1, 0) if launch.deterministic else length
    entries = jnp.maximum(tokens - sparsity.compress_block + sparsity.compress_stride, 0) // sparsity.compress_stride
    tiles = pl.cdiv(entries, launch.entry_tile)
    slots = None if launch.deterministic else _Slots(launch, refs, length)
    spans = lane_ranges(num_blocks)
    # Heads as a dimension of all tensors: the loads of one need not wait for another's.
    together = shape.lanes
    while together > 1 and together * spans[0][1] > _IN_FLIGHT * 32 * launch.config.selection_warps:
        together //= 2

    def add_heads(i, state):
        importance, given = state
        heads = _Heads(launch, refs, i * together + lax.iota(jnp.int32, together))
        # All other loads come before that of the norms, which are waited for first. ptxas would move some behind.
        of_blocks = [heads.probability(span, tiles) if span in cached else None for span in spans]
        of_slots = None if slots is None else slots.probability(heads)
        if not launch.interpret:
            plgpu.debug_barrier()
        norm = heads.norm()
        importance = [
            part if of_norm is None else part + of_norm(norm)
            for part, of_norm in zip(importance, of_blocks, strict=True)
        ]
        return importance, given if of_slots is None else given + of_slots(norm)

    # Blocks behind the table have what the tail gives them alone.
    cached = [span for span in spans if launch.deterministic or span[0] < shape.table]
    state = [jnp.zeros(size, jnp.float32) for _, size in spans], 0.0 if slots is None else slots.nothing
    if together == shape.lanes:
        importance, given = add_heads(0, state)
    else:
        importance, given = lax.fori_loop(0, shape.lanes // together, add_heads, state)
    return importance if slots is None else slots.add(importance, lane_parts(num_blocks), given)


class _Heads:
    """Some of the query's heads: their rows, and what these hold."""

    def __init__(self, launch: Launch, refs: dict[str, Any], head: Any):
        self._launch, self._refs = launch, refs
        programs = launch.shape.batch * launch.shape.num_kv_heads * launch.shape.width
        self._eager = programs <= _EAGER and not launch.deterministic
        self._at, self._row = (refs["batch"], refs["head"]), refs["token"] * launch.shape.lanes + head
        self._valid = None if launch.shape.group == launch.shape.lanes else head < launch.shape.group
        self._first, self._splits = next((first, count) for index, first, count in launch.segments if index == 0)

    def norm(self) -> Any:
        """float32 [heads]: log2 of the sum of each one's weights. To subtract it from a score is to divide by the
        sum."""
        size = (pl.next_power_of_2(self._splits), self._row.shape[0])
        split = lax.broadcasted_iota(jnp.int32, size, 0)
        row, mask = jnp.broadcast_to(self._row[None, :], size), self._live(split < self._splits, 1)
        lse = plgpu.load(self._refs["lse"].at[(*self._at, self._first + split, row)], mask=mask, other=-jnp.inf)
        top = jnp.max(lse, axis=0)
        top = jnp.where(top > -jnp.inf, top, 0.0)
        if self._launch.deterministic:  # one split after the other, whatever their number

            def add(k, total):
                of_split = self._refs["lse"].at[(*self._at, jnp.full_like(self._row, 0) + self._first + k, self._row)]
                other = None if self._valid is None else -jnp.inf
                return total + jnp.exp2(plgpu.load(of_split, mask=self._valid, other=other) - top)

            total = lax.fori_loop(0, self._splits, add, jnp.zeros_like(top))
        else:
            total = jnp.sum(jnp.exp2(lse - top[None, :]), axis=0)
        # No entry is visible where the sum is 0.
        return top + jnp.log2(jnp.where(total > 0, total, 1.0))

    def _live(self, mask: Any, axis: int) -> Any:
        """``mask``, less what is no head, heads being along ``axis``."""
        if self._valid is None:
            return mask
        return mask & lax.broadcast_in_dim(self._valid, mask.shape, (axis,))

    def load(self, name: str, index: Any, live: Any, other: float) -> Any:
        """[heads, …]: what the heads' rows of an array hold at ``index``, which is alike for all heads."""
        ref, size = self._refs[name], (self._row.shape[0], *index.shape)
        row = lax.broadcast_in_dim(self._row, size, (0,))
        index, live = (jnp.broadcast_to(x[None], size) for x in (index, live))
        live = self._live(live, 0)
        mask = self._live((index >= 0) & (index < ref.shape[-1]), 0) if self._eager else live
        # Nothing but the mask keeps dead lanes off: an address that depends on it is no vector any more.
        loaded = plgpu.load(ref.at[(*self._at, row, index)], mask=mask, other=other)
        return jnp.where(live, loaded, other) if self._eager else loaded

    def probability(self, span: tuple[int, int], tiles: Any) -> Callable[[Any], Any]:
        """What entries in the cache give to a range of blocks, as probabilities, of all heads: float32 [blocks], as a
        function of their norms."""
        launch, (first, size), pages = self._launch, span, self._launch.page_tile
        block = first + lax.iota(jnp.int32, size)
        scores = self.load("scores", block, block < tiles * pages, -jnp.inf if launch.identity else 0.0)
        if launch.identity:
            return lambda norm: jnp.sum(exp2(launch, scores - norm[:, None]), axis=0)
        # Of blocks: [tiles, lines, run], a line being a run of adjacent pages.
        in_tile = min(pages, size)
        run = min(launch.page_run, in_tile)
        shape = (size // in_tile, in_tile // run, run)
        tile = parts(first + lax.iota(jnp.int32, shape[0]) * in_tile, pages)[0]

        def tops(tile):
            return self.load("tops", tile, (tile >= 0) & (tile < tiles), -jnp.inf)

        own = tops(tile)
        if "carry" in self._refs:
            # From the line before, which may be of the tile before, into a line's first block. That before the first
            # was never written.
            runs = pages // launch.page_run
            line, column = (lax.broadcasted_iota(jnp.int32, shape[:2], axis) for axis in (0, 1))
            line = first // run + line * shape[1] + column
            carry, before = self.load("carry", line, (line > 0) & (line <= tiles * runs), 0.0), tops(tile - 1)

        def of_norm(norm):
            factor = exp2(launch, own - norm[:, None])[:, :, None]
            total = jnp.sum(scores.reshape(-1, *shape) * factor[..., None], axis=0)
            if "carry" in self._refs:
                begins = parts(line, runs)[1] == 0
                factor = jnp.where(begins[None], exp2(launch, before - norm[:, None])[:, :, None], factor)
                given = jnp.sum(carry * factor, axis=0)
                total += jnp.where(lax.broadcasted_iota(jnp.int32, shape, 2) == 0, given[:, :, None], 0.0)
            return total.reshape(-1)

        return of_norm


class _Slots:
    """The compression blocks that end in the tail."""

    def __init__(self, launch: Launch, refs: dict[str, Any], length: Any):
        self._sparsity = launch.sparsity
        width, slots = launch.shape.width, launch.shape.slots
        self.lane = lax.iota(jnp.int32, pl.next_power_of_2(slots))
        node = plgpu.load(refs["tail_slot"].at[refs["batch"], self.lane], mask=self.lane < slots, other=width)
        self.used = (node < width) & (length >= 0)
        node = jnp.where(self.used, node, 0)
        end = plgpu.load(refs["tail_positions"].at[refs["batch"], node], mask=self.used, other=0) + 1
        self.entry = (end - self._sparsity.compress_block) // self._sparsity.compress_stride
        self.count = jnp.sum(self.used.astype(jnp.int32))
        self.nothing = jnp.zeros(self.lane.shape, jnp.float32)

    def probability(self, heads: _Heads) -> Callable[[Any], Any]:
        """float32 [slots], of all heads, as a function of their norms."""
        scores = heads.load("slot_scores", self.lane, self.used, -jnp.inf)
        return lambda norm: jnp.sum(jnp.exp2(scores - norm[:, None]), axis=0)

    def add(self, importance: list[Any], blocks: list[Any], given: Any) -> list[Any]:
        """``importance`` and what the slots give to ``blocks``, of probabilities ``given``."""

        def add_slot(m, importance):
            # Out of vectors by a sum: a load would take longer.
            probability = jnp.sum(jnp.where(self.lane == m, given, 0.0))
            entry = jnp.sum(jnp.where(self.lane == m, self.entry, 0))
            return [
                part + probability * overlap(self._sparsity, entry, block).astype(jnp.float32)
                for part, block in zip(importance, blocks, strict=True)
            ]

        return lax.fori_loop(0, self.count, add_slot, importance)


def _unite(launch: Launch, refs: dict[str, Any], length: Any) -> None:
    """In the last of a group's programs to arrive: compacts the group's union."""
    shape, config, interpret = launch.shape, launch.config, launch.interpret
    token, head, batch = refs["token"], refs["head"], refs["batch"]
    group = token // config.group
    marks, row = refs["marks"], shape.table + 1
    base = group * launch.mask_words * row
    if not interpret:
        plgpu.debug_barrier()  # ids are written
    counter = launch.groups * launch.mask_words * row + group
    members = jnp.minimum(config.group, shape.width - group * config.group)
    arrived = plgpu.atomic_add(marks, (batch, head, counter), jnp.asarray(1, jnp.int32))

    @pl.when(arrived == members - 1)
    def _():
        # Pages of all blocks, so that these loads need not wait for the marks; no vectors, whose layout is not that in
        # which Triton has marks and slots.
        pages = [
            plgpu.load(refs["page_table"].at[batch, jnp.where(block < shape.table, block, 0)])
            for block in lane_parts(shape.table)
        ]
        _mark(launch, refs, group, members, base, length)
        if not interpret:
            plgpu.debug_barrier()  # marks are written
        size, filled = refs["pages"].shape[-1], jnp.zeros((), jnp.int32)
        for block, page in zip(lane_parts(shape.table), pages, strict=True):
            words, owned = [], jnp.zeros(block.shape, bool)
            inside = block < shape.table
            for word in range(launch.mask_words):
                # Volatile: past L1, which does not know what atomics wrote.
                at = base + word * row + block
                words.append(plgpu.load(marks.at[batch, head, at], mask=inside, other=0, volatile=True))
                owned |= words[-1] != 0
            slot = jnp.where(owned, filled + lax.cumsum(owned.astype(jnp.int32), axis=0) - 1, size)
            plgpu.store(refs["pages"].at[batch, head, group, slot], page, mask=owned)
            for word, mark in enumerate(words):
                at_word = jnp.full_like(slot, word)
                plgpu.store(refs["owners"].at[batch, head, group, at_word, slot], mark, mask=owned)
            filled = filled + jnp.sum(owned.astype(jnp.int32))
        refs["size"][batch, head, group] = filled


def _mark(launch: Launch, refs: dict[str, Any], group: Any, members: Any, base: Any, length: Any) -> None:
    """Marks the blocks of a group's queries in its table of owners, all with few atomics: each waits for all writes."""
    sparsity, shape, config, interpret = launch.sparsity, launch.shape, launch.config, launch.interpret
    head, batch, marks = refs["head"], refs["batch"], refs["marks"]
    # Interpret mode's atomics forget all but one of those to one address: there a query at a time.
    steps = config.group if interpret else 1
    size = pl.next_power_of_2(sparsity.num_selected)
    lane = lax.iota(jnp.int32, pl.next_power_of_2(config.group // steps) * size)
    source = _representative(refs, group, members, config) if config.mode == "shared" else None

    def mark(step, carry):
        first, place = parts(lane, size)
        member = step * (config.group // steps) + first
        token = group * config.group + member
        live = (member < members) & (place < sparsity.num_selected)
        at = batch, token if source is None else jnp.full_like(token, 0) + source, head, place
        block = plgpu.load(refs["ids"].at[at], mask=live, other=-1, volatile=True)  # past L1
        if source is not None:
            plgpu.store(refs["ids"].at[batch, token, head, place], block, mask=live)
        # Blocks that committed tokens do not fill are left to the tail.
        marked = (block >= 0) & ((block + 1) * sparsity.select_block <= length)
        # Interpret mode has no masked atomics: there the row's last word is for lanes that mark nothing.
        row = shape.table + 1
        where = base + member // 32 * row + jnp.where(marked, block, shape.table)
        bit = jnp.where(marked, 1 << (member % 32), 0)
        # A query sets its own bit once: adding it is setting it, and interpret mode has no atomic_or.
        if interpret:
            plgpu.atomic_add(marks, (batch, head, where), bit)
        else:
            # Not atomic_add: of a tensor of integers it lowers to an addition of floats.
            plgpu.atomic_or(marks, (batch, head, where), bit, mask=marked)
        return carry

    lax.fori_loop(0, steps, mark, 0) if steps > 1 else mark(0, 0)


def _representative(refs: dict[str, Any], group: Any, members: Any, config: AttentionConfig) -> Any:
    """int32 []: the group's query with the longest prefix, whose blocks become those of all its queries."""
    member = lax.iota(jnp.int32, pl.next_power_of_2(config.group))
    token = group * config.group + member
    position = plgpu.load(refs["tail_positions"].at[refs["batch"], token], mask=member < members, other=-1)
    return jnp.max(jnp.where(position == jnp.max(position), token, -1))
