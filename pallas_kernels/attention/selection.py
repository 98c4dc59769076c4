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
from pallas_kernels.attention.tiles import overlap
from pallas_kernels.selection.kernel import choose, lane_parts, store_ids


def run(launch: Launch, partial: dict[str, jax.Array], lengths: jax.Array, tail: Tail) -> Selection:
    """The selection from the partial results of a ``scored`` launch."""
    shape, sparsity, config = launch.shape, launch.sparsity, launch.config
    grouped = config.group > 1
    union = min(config.group * sparsity.num_selected, shape.table)
    lead = (shape.batch, shape.num_kv_heads, launch.groups)
    inputs: dict[str, jax.Array] = {
        name: partial[name]
        for name in ("lse", "scores", "tops", "carry", "slot_scores", "workspace")
        if name in partial
    }
    inputs |= {"lengths": lengths, "positions": tail.positions, "slot": tail.slot}
    outputs: dict[str, tuple[int, ...]] = {"ids": (shape.batch, shape.width, shape.num_kv_heads, sparsity.num_selected)}
    if grouped:
        outputs |= {
            "union": (*lead, union),
            "owners": (*lead, launch.mask_words, union),
            "size": lead,
            # The inputs' workspace, changed in place; reading the output is right in interpret mode too.
            "marks": partial["workspace"].shape,
        }
    names = [*inputs, *outputs]

    def nsa_selection(*refs: Any) -> None:
        _kernel(launch, dict(zip(names, refs, strict=True)))

    result = triton_call(
        nsa_selection,
        *inputs.values(),
        out_shape=[jax.ShapeDtypeStruct(dims, jnp.int32) for dims in outputs.values()],
        grid=(shape.width, shape.num_kv_heads, shape.batch),
        num_warps=config.selection_warps,
        interpret=launch.interpret,
        aliases={names.index("workspace"): [*outputs].index("marks")} if grouped else None,
    )
    named = dict(zip(outputs, result, strict=True))
    return Selection(named["ids"], named.get("union"), named.get("owners"), named.get("size"))


def _kernel(launch: Launch, refs: dict[str, Any]) -> None:
    sparsity, shape = launch.sparsity, launch.shape
    token, head, batch = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    # Interpret mode knows program ids at the top level only.
    refs |= {"token": token, "head": head, "batch": batch}
    length, position = refs["lengths"][batch], refs["positions"][batch, token]
    own = jnp.where(length >= 0, position // sparsity.select_block, -1)
    num_blocks = shape.table + -(-shape.width // sparsity.select_block) + 1
    importance = _importance(launch, refs, num_blocks, length)
    rule = dict(num_selected=sparsity.num_selected, num_initial=sparsity.num_initial, num_local=sparsity.num_local)
    chosen, slot, count = choose(importance, own, num_blocks, **rule)
    store_ids(refs["ids"], (batch, token, head), chosen, slot, count, sparsity.num_selected)
    if launch.config.group > 1:
        _unite(launch, refs, chosen, num_blocks, length)


def _importance(launch: Launch, refs: dict[str, Any], num_blocks: int, length: Any) -> list[Any]:
    """Importance float32 of all blocks for this program's query: Σ over heads of the probabilities, by overlap."""
    sparsity, shape = launch.sparsity, launch.shape
    token, head, batch = refs["token"], refs["head"], refs["batch"]
    first, splits = next((first, count) for index, first, count in launch.segments if index == 0)
    parts = lane_parts(num_blocks)
    entries = jnp.maximum(length - sparsity.compress_block + sparsity.compress_stride, 0) // sparsity.compress_stride
    tiles = pl.cdiv(entries, launch.entry_tile)  # what the scoring launch went over
    reached = jnp.minimum(tiles * launch.page_tile, shape.table)
    split = lax.iota(jnp.int32, pl.next_power_of_2(splits))
    slots = jnp.sum((_load(refs["slot"], batch, shape.slots, shape.width) < shape.width).astype(jnp.int32))
    slots = jnp.where(length >= 0, slots, 0)

    importance = [jnp.zeros(block.shape, jnp.float32) for block in parts]

    def add_head(g, importance):
        row = token * shape.lanes + g
        lse = plgpu.load(refs["lse"].at[batch, head, first + split, jnp.full_like(split, 0) + row],
                         mask=split < splits, other=-jnp.inf)  # fmt: skip
        top = jnp.max(lse)
        top = jnp.where(top > -jnp.inf, top, 0.0)
        total = jnp.sum(jnp.exp2(lse - top))
        # Adding a log is dividing by the sum; no entry is visible where the sum is 0.
        norm = top + jnp.log2(jnp.where(total > 0, total, 1.0))
        sums = []
        for part, block in zip(importance, parts, strict=True):
            part = part + _probability(launch, refs, "scores", row, block, reached, norm)
            if "carry" in refs:  # the block before reaches into this one
                part = part + _probability(launch, refs, "carry", row, block - 1, reached, norm)
            sums.append(part)

        def add_slot(m, sums):
            node = refs["slot"][batch, m]
            end = refs["positions"][batch, node] + 1
            entry = (end - sparsity.compress_block) // sparsity.compress_stride
            probability = jnp.exp2(refs["slot_scores"][batch, head, row, m] - norm)
            return [
                part + probability * overlap(sparsity, entry, block).astype(jnp.float32)
                for part, block in zip(sums, parts, strict=True)
            ]

        return lax.fori_loop(0, slots, add_slot, sums)

    if shape.group > 4:  # unrolled, 16 heads take Triton minutes to compile
        return lax.fori_loop(0, shape.group, add_head, importance)
    for g in range(shape.group):  # unrolled, the heads' loads overlap
        importance = add_head(g, importance)
    return importance


def _probability(launch: Launch, refs: dict[str, Any], name: str, row: Any, block: Any, reached: Any, norm: Any) -> Any:
    """float32 [lanes]: a row's ``scores`` or ``carry`` of blocks as probabilities, 0 outside 0 … ``reached`` − 1."""
    at = (refs["batch"], refs["head"], row)
    mask = (block >= 0) & (block < reached)
    block = jnp.where(mask, block, 0)
    other = -jnp.inf if launch.identity else 0.0
    values = plgpu.load(refs[name].at[(*at, block)], mask=mask, other=other)
    if launch.identity:
        return jnp.exp2(values - norm)
    top = plgpu.load(refs["tops"].at[(*at, block // launch.page_tile)], mask=mask, other=-jnp.inf)
    return values * jnp.exp2(top - norm)


def _load(ref: Any, row: Any, size: int, other: int) -> Any:
    lane = lax.iota(jnp.int32, pl.next_power_of_2(size))
    return plgpu.load(ref.at[row, lane], mask=lane < size, other=other)


def _unite(launch: Launch, refs: dict[str, Any], chosen: list[Any], num_blocks: int, length: Any) -> None:
    """Marks the chosen blocks; in the group's last program, compacts its union."""
    sparsity, shape, config = launch.sparsity, launch.shape, launch.config
    token, head, batch = refs["token"], refs["head"], refs["batch"]
    group, member = token // config.group, token % config.group
    marks, row = refs["marks"], shape.table + 1
    base = group * launch.mask_words * row
    # Blocks that committed tokens do not fill are left to the tail. The row's last word is for lanes that mark nothing:
    # masked on a GPU, where they would all meet there; interpret mode has no masked atomics.
    for block, part in zip(lane_parts(num_blocks), chosen, strict=True):
        marked = part & ((block + 1) * sparsity.select_block <= length)
        at = base + member // 32 * row + jnp.where(marked, block, shape.table)
        bit = jnp.where(marked, 1 << (member % 32), 0)
        # A query sets its own bit once: adding it is setting it, and interpret mode has no atomic_or.
        if launch.interpret:
            plgpu.atomic_add(marks, (batch, head, at), bit)
        else:
            # Not atomic_add: of a tensor of integers it lowers to an addition of floats.
            plgpu.atomic_or(marks, (batch, head, at), bit, mask=marked)
    if not launch.interpret:
        plgpu.debug_barrier()
    counter = launch.groups * launch.mask_words * row + group
    members = jnp.minimum(config.group, shape.width - group * config.group)
    arrived = plgpu.atomic_add(marks, (batch, head, counter), jnp.asarray(1, jnp.int32))

    @pl.when(arrived == members - 1)
    def _():
        size, filled = refs["union"].shape[-1], jnp.zeros((), jnp.int32)
        for block in lane_parts(shape.table):
            words, owned = [], jnp.zeros(block.shape, bool)
            for word in range(launch.mask_words):
                # An atomic operation that changes nothing reads past L1, which does not know what others wrote.
                at = base + word * row + jnp.minimum(block, shape.table)
                mark = _read(marks, (batch, head, at), jnp.zeros(block.shape, jnp.int32), launch.interpret)
                words.append(jnp.where(block < shape.table, mark, 0))
                owned |= words[-1] != 0
            if config.mode == "shared":
                owned = _representative(launch, refs, group, members, block, length)
                words = [jnp.where(owned, -1, 0) for _ in words]
            slot = jnp.where(owned, filled + lax.cumsum(owned.astype(jnp.int32), axis=0) - 1, size)
            plgpu.store(refs["union"].at[batch, head, group, slot], block, mask=owned)
            for word, mark in enumerate(words):
                at_word = jnp.full_like(slot, word)
                plgpu.store(refs["owners"].at[batch, head, group, at_word, slot], mark, mask=owned)
            filled = filled + jnp.sum(owned.astype(jnp.int32))
        refs["size"][batch, head, group] = filled


def _read(ref: Any, at: tuple[Any, ...], zeros: Any, interpret: bool) -> Any:
    """``ref[*at]`` as an atomic operation reads it."""
    return plgpu.atomic_add(ref, at, zeros) if interpret else plgpu.atomic_or(ref, at, zeros)


def _representative(launch: Launch, refs: dict[str, Any], group: Any, members: Any, block: Any, length: Any) -> Any:
    """bool [lanes]: the blocks of the group's query with the longest prefix, which become those of all its queries."""
    sparsity, config = launch.sparsity, launch.config
    head, batch = refs["head"], refs["batch"]
    member = lax.iota(jnp.int32, pl.next_power_of_2(config.group))
    token = group * config.group + member
    position = plgpu.load(refs["positions"].at[batch, token], mask=member < members, other=-1)
    longest = jnp.max(position)
    best = jnp.max(jnp.where(position == longest, token, -1))
    owned = jnp.zeros(block.shape, jnp.int32)

    # Read as _unite does.
    def one(k, owned):
        own = _read(refs["ids"], (batch, best, head, k), jnp.asarray(0, jnp.int32), launch.interpret)
        plgpu.store(refs["ids"].at[batch, token, head, jnp.full_like(token, 0) + k],
                    jnp.broadcast_to(own, token.shape), mask=member < members)  # fmt: skip
        return owned | (block == own).astype(jnp.int32)

    owned = lax.fori_loop(0, sparsity.num_selected, one, owned)
    return (owned > 0) & ((block + 1) * sparsity.select_block <= length)
