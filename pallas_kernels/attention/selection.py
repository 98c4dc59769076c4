"""Scores of compressed entries → the blocks of each query, and the union of each group's blocks.

One program a (query, KV head). It normalises its heads' block scores, adds those of the tail's compression blocks,
chooses the top n, and marks them in its group's table of owners; the last program of a group to arrive then compacts
the table into the union. So the union costs no launch of its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._call import triton_call
from pallas_kernels.attention.arguments import Selection, Tail
from pallas_kernels.attention.launch import Launch
from pallas_kernels.attention.tiles import exp2, overlap, parts
from pallas_kernels.selection.kernel import choose, lane_parts, lane_ranges, store_ids


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
        grid=(shape.width, shape.num_kv_heads, shape.batch),
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
        _unite(launch, refs, chosen, length)


def _importance(launch: Launch, refs: dict[str, Any], num_blocks: int, length: Any) -> list[Any]:
    """Importance float32 of all blocks for this program's query: Σ over heads of the probabilities, by overlap."""
    sparsity, shape = launch.sparsity, launch.shape
    token, head, batch = refs["token"], refs["head"], refs["batch"]
    first, splits = next((first, count) for index, first, count in launch.segments if index == 0)
    # As [lines, pages of a run]: what these share is then one value, and their loads are vectors.
    tables = [_Blocks(launch, *span) for span in lane_ranges(num_blocks)]
    # The tokens whose entries the scoring launch went over, tile by tile; the rest are the tail's slots.
    tokens = jnp.where(length >= 0, refs["tail_positions"][batch, token] + 1, 0) if launch.deterministic else length
    entries = jnp.maximum(tokens - sparsity.compress_block + sparsity.compress_stride, 0) // sparsity.compress_stride
    tiles = pl.cdiv(entries, launch.entry_tile)
    split = lax.iota(jnp.int32, pl.next_power_of_2(splits))
    slots = None if launch.deterministic else _Slots(launch, refs, length)

    def norm_of(row):
        """log2 of the sum of the row's weights: subtracting it from a score is dividing by the sum."""
        lse = plgpu.load(refs["lse"].at[batch, head, first + split, jnp.full_like(split, 0) + row],
                         mask=split < splits, other=-jnp.inf)  # fmt: skip
        top = jnp.max(lse)
        top = jnp.where(top > -jnp.inf, top, 0.0)
        if launch.deterministic:  # one split after the other, whatever their number
            total = lax.fori_loop(
                0, splits, lambda k, total: total + jnp.exp2(refs["lse"][batch, head, first + k, row] - top), 0.0
            )
        else:
            total = jnp.sum(jnp.exp2(lse - top))
        # No entry is visible where the sum is 0.
        return top + jnp.log2(jnp.where(total > 0, total, 1.0))

    # Heads side by side, since the loads of one then need not wait for another's; more than 4 take Triton long.
    together = max(count for count in (1, 2, 3, 4) if shape.group % count == 0)

    def add_heads(i, importance):
        rows = [token * shape.lanes + i * together + g for g in range(together)]
        norms = [norm_of(row) for row in rows]
        for row, norm in zip(rows, norms, strict=True):
            importance = [
                part + _probability(launch, refs, row, table, tiles, norm)
                for part, table in zip(importance, tables, strict=True)
            ]
        return importance if slots is None else slots.add(importance, tables, rows, norms)

    importance = [jnp.zeros(table.block.shape, jnp.float32) for table in tables]
    if together == shape.group:
        importance = add_heads(0, importance)
    else:
        importance = lax.fori_loop(0, shape.group // together, add_heads, importance)
    return [part.reshape(-1) for part in importance]


class _Slots:
    """The compression blocks that end in the tail."""

    def __init__(self, launch: Launch, refs: dict[str, Any], length: Any):
        self._refs, self._sparsity, self._at = refs, launch.sparsity, (refs["batch"], refs["head"])
        width, slots = launch.shape.width, launch.shape.slots
        self.lane = lax.iota(jnp.int32, pl.next_power_of_2(slots))
        node = plgpu.load(refs["tail_slot"].at[refs["batch"], self.lane], mask=self.lane < slots, other=width)
        self.used = (node < width) & (length >= 0)
        node = jnp.where(self.used, node, 0)
        end = plgpu.load(refs["tail_positions"].at[refs["batch"], node], mask=self.used, other=0) + 1
        self.entry = (end - self._sparsity.compress_block) // self._sparsity.compress_stride
        self.count = jnp.sum(self.used.astype(jnp.int32))

    def add(self, importance: list[Any], tables: list[_Blocks], rows: list[Any], norms: list[Any]) -> list[Any]:
        """``importance`` and what the slots give to it, of the heads in ``rows``."""
        given = jnp.zeros(self.lane.shape, jnp.float32)
        for row, norm in zip(rows, norms, strict=True):
            scores = self._refs["slot_scores"].at[(*self._at, jnp.full_like(self.lane, 0) + row, self.lane)]
            given += jnp.exp2(plgpu.load(scores, mask=self.used, other=-jnp.inf) - norm)

        def add_slot(m, importance):
            # Out of vectors by a sum: a load would take longer.
            probability = jnp.sum(jnp.where(self.lane == m, given, 0.0))
            entry = jnp.sum(jnp.where(self.lane == m, self.entry, 0))
            return [
                part + probability * overlap(self._sparsity, entry, table.block).astype(jnp.float32)
                for part, table in zip(importance, tables, strict=True)
            ]

        return lax.fori_loop(0, self.count, add_slot, importance)


class _Blocks:
    """A range of blocks as [lines, pages], a line being a run of adjacent pages: ``block`` int32 of that shape, and the
    ``line`` int32 [lines]."""

    def __init__(self, launch: Launch, first: int, size: int):
        run = launch.page_run if not launch.identity else min(launch.page_tile, size)
        shape = (size // run, run)
        line, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        self.block = first + line * run + column
        self.line = first // run + lax.iota(jnp.int32, shape[0])
        self.tile = parts(self.line * run, launch.page_tile)[0]


def _probability(launch: Launch, refs: dict[str, Any], row: Any, blocks: _Blocks, tiles: Any, norm: Any) -> Any:
    """float32 [lines, pages]: what a row's entries in the cache give to ``blocks``, as probabilities."""
    at = (refs["batch"], refs["head"], row)
    block, tile, line = blocks.block, blocks.tile, blocks.line

    def load(live, other):
        """Masked by lines, so that vectors stay whole."""
        live = jnp.broadcast_to(live[:, None], block.shape)
        return plgpu.load(refs["scores"].at[(*at, jnp.where(live, block, 0))], mask=live, other=other)

    def factor(tile):
        live = (tile >= 0) & (tile < tiles)
        top = plgpu.load(refs["tops"].at[(*at, jnp.where(live, tile, 0))], mask=live, other=-jnp.inf)
        return exp2(launch, top - norm)

    if launch.identity:
        return exp2(launch, load(tile < tiles, -jnp.inf) - norm)
    total = load(tile < tiles, 0.0) * factor(tile)[:, None]
    if "carry" in refs:  # from the line before, which may be of the tile before, into a line's first block
        runs = launch.page_tile // launch.page_run
        live = (line > 0) & (line <= tiles * runs)  # that before the first was never written
        carry = plgpu.load(refs["carry"].at[(*at, jnp.where(live, line, 0))], mask=live, other=0.0)
        carry = carry * factor(jnp.where(live, parts(line + (runs - 1), runs)[0] - 1, -1))
        first = lax.broadcasted_iota(jnp.int32, block.shape, 1) == 0
        total += jnp.where(first, carry[:, None], 0.0)
    return total


def _unite(launch: Launch, refs: dict[str, Any], chosen: list[Any], length: Any) -> None:
    """Marks the chosen blocks; in the group's last program, compacts its union."""
    sparsity, shape, config, interpret = launch.sparsity, launch.shape, launch.config, launch.interpret
    token, head, batch = refs["token"], refs["head"], refs["batch"]
    group, member = token // config.group, token % config.group
    marks, row = refs["marks"], shape.table + 1
    base = group * launch.mask_words * row
    first = 0
    for part in chosen:
        block = first + lax.iota(jnp.int32, part.shape[0])
        first += part.shape[0]
        # Blocks that committed tokens do not fill are left to the tail.
        marked = part & ((block + 1) * sparsity.select_block <= length)
        # Interpret mode has no masked atomics: there the row's last word is for lanes that mark nothing.
        at = base + member // 32 * row + jnp.where(marked, block, shape.table)
        bit = jnp.where(marked, 1 << (member % 32), 0)
        # A query sets its own bit once: adding it is setting it, and interpret mode has no atomic_or.
        if interpret:
            plgpu.atomic_add(marks, (batch, head, at), bit)
        else:
            # Not atomic_add: of a tensor of integers it lowers to an addition of floats.
            plgpu.atomic_or(marks, (batch, head, at), bit, mask=marked)
    if not interpret:
        plgpu.debug_barrier()  # ids and marks are written
    counter = launch.groups * launch.mask_words * row + group
    members = jnp.minimum(config.group, shape.width - group * config.group)
    arrived = plgpu.atomic_add(marks, (batch, head, counter), jnp.asarray(1, jnp.int32))

    @pl.when(arrived == members - 1)
    def _():
        size, filled = refs["pages"].shape[-1], jnp.zeros((), jnp.int32)
        for block in lane_parts(shape.table):
            words, owned = [], jnp.zeros(block.shape, bool)
            inside = block < shape.table
            # All pages, so that this load need not wait for the marks.
            page = plgpu.load(refs["page_table"].at[batch, jnp.where(inside, block, 0)], mask=inside, other=0)
            for word in range(launch.mask_words):
                # Volatile: past L1, which does not know what others wrote.
                at = base + word * row + jnp.where(inside, block, 0)
                words.append(plgpu.load(marks.at[batch, head, at], mask=inside, other=0, volatile=True))
                owned |= words[-1] != 0
            if config.mode == "shared":
                owned = _representative(launch, refs, group, members, block, length)
                words = [jnp.where(owned, -1, 0) for _ in words]
            slot = jnp.where(owned, filled + lax.cumsum(owned.astype(jnp.int32), axis=0) - 1, size)
            plgpu.store(refs["pages"].at[batch, head, group, slot], page, mask=owned)
            for word, mark in enumerate(words):
                at_word = jnp.full_like(slot, word)
                plgpu.store(refs["owners"].at[batch, head, group, at_word, slot], mark, mask=owned)
            filled = filled + jnp.sum(owned.astype(jnp.int32))
        refs["size"][batch, head, group] = filled


def _representative(launch: Launch, refs: dict[str, Any], group: Any, members: Any, block: Any, length: Any) -> Any:
    """bool [lanes]: the blocks of the group's query with the longest prefix, which become those of all its queries."""
    sparsity, config = launch.sparsity, launch.config
    head, batch = refs["head"], refs["batch"]
    member = lax.iota(jnp.int32, pl.next_power_of_2(config.group))
    token = group * config.group + member
    position = plgpu.load(refs["tail_positions"].at[batch, token], mask=member < members, other=-1)
    longest = jnp.max(position)
    best = jnp.max(jnp.where(position == longest, token, -1))
    owned = jnp.zeros(block.shape, jnp.int32)

    def one(k, owned):
        own = plgpu.load(refs["ids"].at[batch, best, head, k], volatile=True)
        plgpu.store(refs["ids"].at[batch, token, head, jnp.full_like(token, 0) + k],
                    jnp.broadcast_to(own, token.shape), mask=member < members)  # fmt: skip
        return owned | (block == own).astype(jnp.int32)

    owned = lax.fori_loop(0, sparsity.num_selected, one, owned)
    return (owned > 0) & ((block + 1) * sparsity.select_block <= length)
