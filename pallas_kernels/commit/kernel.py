"""Commit as one Pallas kernel that writes into all of a layer's arrays in place.

A program takes some KV heads of one step of one sequence's path. It finds its page, its compressed entry and its ring
slots itself, loads what it is going to store from all arrays at once, then stores it: three rounds through memory.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._call import triton_call
from pallas_kernels.commit.arguments import Entries, Shape
from pallas_kernels.commit.config import CommitConfig

# A program holds all slots of its sequence, and a row of each array.
MAX_SLOTS, MAX_HEAD_DIM = 4096, 1024


def limit(slots: int, head_dim: int) -> str | None:
    """Why the kernel does not take these sizes; None if it does."""
    if slots > MAX_SLOTS:
        return f"slot: got {slots} slots, expected at most {MAX_SLOTS}"
    if head_dim > MAX_HEAD_DIM:
        return f"layer.key: got head dim {head_dim}, expected at most {MAX_HEAD_DIM}"
    return None


# A function of its own, so that a program traces and lowers it once for all layers.
@functools.partial(jax.jit, static_argnames=("compress_block", "shape", "config", "interpret"))
def commit(
    layer: Entries,
    new: Entries,
    page_table: jax.Array,
    lengths: jax.Array,
    path: jax.Array,
    count: jax.Array,
    slot: jax.Array,
    *,
    compress_block: int,
    shape: Shape,
    config: CommitConfig,
    interpret: bool,
) -> Entries:
    """See :func:`pallas_kernels.commit.commit`."""
    arrays = [name for name in Entries._fields if getattr(layer, name) is not None]
    inputs = {"page_table": page_table, "lengths": lengths, "path": path, "count": count, "slot": slot}
    if shape.slots == 0:
        del inputs["slot"]
    operands = [*inputs.values(), *(getattr(new, name) for name in arrays)]
    stored = [getattr(layer, name) for name in arrays]

    def commit_kernel(*refs: Any) -> None:
        read, written = refs[: len(operands)], refs[len(operands) + len(stored) :]
        _kernel(
            dict(zip(inputs, read, strict=False)),
            dict(zip(arrays, zip(read[len(inputs) :], written, strict=True), strict=True)),
            compress_block,
            config.heads,
        )

    outputs = triton_call(
        commit_kernel,
        *operands,
        *stored,
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in stored],
        grid=(shape.steps, pl.cdiv(shape.num_kv_heads, config.heads), shape.batch),
        num_warps=config.num_warps,
        interpret=interpret,
        aliases={len(operands) + index: index for index in range(len(stored))},
    )
    return layer._replace(**dict(zip(arrays, outputs, strict=True)))


def _kernel(refs: dict[str, Any], arrays: dict[str, tuple[Any, Any]], compress_block: int, heads: int) -> None:
    # From the last step to the first: interpret mode runs programs in order, which would hide who overwrites whom.
    step = pl.num_programs(0) - 1 - pl.program_id(0)
    first, batch = pl.program_id(1) * heads, pl.program_id(2)
    count, node, position = refs["count"][batch], refs["path"][batch, step], refs["lengths"][batch] + step
    table = refs["page_table"]
    num_pages, num_heads, page_size, dim = arrays["key"][1].shape

    @pl.when(step < count)
    def _():
        # Indices as whole matrices: interpret mode takes no masked mixture of vectors and slices.
        size = (heads, pl.next_power_of_2(dim))
        head, column = first + lax.broadcasted_iota(jnp.int32, size, 0), lax.broadcasted_iota(jnp.int32, size, 1)
        inside = (head < num_heads) & (column < dim)

        def owner(block, valid):
            """The pool's page that holds a block of the sequence, and whether there is one."""
            valid &= block < table.shape[1]
            page = plgpu.load(table.at[batch, block], mask=valid, other=num_pages)
            return page, page < num_pages

        page, owned = owner(position // page_size, True)
        places = {name: (page, position % page_size, owned) for name in ("key", "value")}
        sources: dict[str, tuple[Any, Any]] = dict.fromkeys(arrays, (node, True))
        for name in ("raw_key", "raw_value", "window_key", "window_value"):
            if name in arrays:
                # Of steps that meet in one slot only the last may write: programs have no order.
                ring = arrays[name][1].shape[2]
                places[name] = (batch, position % ring, step >= count - ring)
        if "slot" in refs and ("compressed_key" in arrays or "compressed_value" in arrays):
            slots = refs["slot"].shape[1]
            lane = lax.iota(jnp.int32, pl.next_power_of_2(slots))
            ends = plgpu.load(refs["slot"].at[batch, lane], mask=lane < slots, other=-1) == node
            slot = jnp.max(jnp.where(ends, lane, -1))
            for name in ("compressed_key", "compressed_value"):
                if name in arrays:
                    per_page = arrays[name][1].shape[2]
                    entry = jnp.maximum(position + 1 - compress_block, 0) // (page_size // per_page)
                    page, owned = owner(entry // per_page, slot >= 0)
                    places[name], sources[name] = (page, entry % per_page, owned), (jnp.maximum(slot, 0), slot >= 0)

        def load(name):
            row, valid = sources[name]
            return plgpu.load(arrays[name][0].at[batch, row, head, column], mask=inside & valid, other=0)

        # All loads before the first store, which the compiler would not move them across.
        values = {name: load(name) for name in places}
        for name, (row, offset, valid) in places.items():
            plgpu.store(arrays[name][1].at[row, head, offset, column], values[name], mask=inside & valid)
