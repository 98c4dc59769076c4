"""φ of the blocks that end in a tail, as two Pallas kernels: rows of entries times wide weights, then the rest.

Of a layer's step the weights are nearly all bytes, and mostly no block ends. So both kernels go over the used slots
only, packed into tiles of rows that share one reading of the weights, and a program that finds none leaves.

``compress_project`` gathers a row's entries from ring and tail by itself and gives the MLP's hidden units (or the
linear map's result). Its programs share out the columns, so that each sums over a whole block: nothing is left to add
up between programs, and hidden units are rounded once, as in XLA's code. ``compress_finish`` multiplies by the second
weight and rotates.
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
from pallas_kernels.attention.tiles import dot, load_rows
from pallas_kernels.compress.arguments import Shape, Side
from pallas_kernels.compress.config import CompressConfig

MAX_HEAD_DIM, MAX_WIDTH = 256, 4096
# Of ``compress_finish``: columns in each half of D, and hidden units of a step.
HALF_COLUMNS, HIDDEN = 16, 256


def limit(head_dim: int, width: int) -> str | None:
    """Why the kernels do not take these sizes; None if they do."""
    if head_dim > MAX_HEAD_DIM or head_dim % 2:
        return f"key.ring: got head dim {head_dim}, expected an even one of at most {MAX_HEAD_DIM}"
    if width > MAX_WIDTH:
        return f"key.weight: got {width} columns, expected at most {MAX_WIDTH}"
    return None


# A function of its own, so that a program traces and lowers it once for all layers.
@functools.partial(jax.jit, static_argnames=("shape", "config", "interpret"))
def compress(
    key: Side,
    value: Side | None,
    slot: jax.Array,
    back: jax.Array,
    start: jax.Array,
    rotation: jax.Array | None,
    *,
    shape: Shape,
    config: CompressConfig,
    interpret: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """See :func:`pallas_kernels.compress.compress`."""
    sides = [side for side in (key, value) if side is not None]
    dtype = key.ring.dtype
    # The same in all layers of a step, so XLA computes it once: the used slots in order, and where their entries lie,
    # in slot p of the ring as p, in node t of the tail as −1 − t.
    used = (slot < key.fresh.shape[1]).reshape(-1)
    order = jnp.sort(jnp.where(used, jnp.arange(shape.rows, dtype=jnp.int32), shape.rows))
    committed = (start[..., None] + jnp.arange(shape.block, dtype=jnp.int32)) % key.ring.shape[2]
    shared = {
        "count": jnp.sum(used, dtype=jnp.int32)[None],
        "order": order,
        "place": jnp.where(back < 0, committed, -1 - back).reshape(shape.rows, shape.block),
    }
    heads = (shape.num_kv_heads, shape.sides)

    def call(name: str, body: Any, parts: int, inputs: dict[str, Any], outputs: Any, stages: int) -> Any:
        def kernel(*refs: Any) -> None:
            named = dict(zip([*inputs, *map(str, range(len(outputs)))], refs, strict=True))
            # Here, not where they are used: interpret mode knows program ids at the top level only.
            tile, head, which = (pl.program_id(axis) for axis in range(3))
            count = named["count"][0]
            for side in range(shape.sides):
                own = {name.removesuffix(f"_{side}"): ref for name, ref in named.items()}

                @pl.when((which == side) & (count > 0))
                def _(own=own, side=side):
                    body(shape, config, own, tile, head, side, count)

        return triton_call(
            kernel, *inputs.values(), out_shape=outputs, grid=(parts, *heads), num_warps=config.num_warps,
            num_stages=stages, interpret=interpret, name=name,
        )  # fmt: skip

    def arrays(*fields: str) -> dict[str, Any]:
        found = {f"{field}_{i}": getattr(side, field) for i, side in enumerate(sides) for field in fields}
        return {name: array for name, array in found.items() if array is not None}

    [hidden] = call(
        "compress_project", _project, pl.cdiv(shape.width, config.columns),
        shared | arrays("ring", "fresh", "weight", "position"),
        [jax.ShapeDtypeStruct((*reversed(heads), shape.rows, shape.width), dtype)], config.num_stages,
    )  # fmt: skip
    inputs = {"count": shared["count"], "order": order, "hidden": hidden} | arrays("weight_out")
    if rotation is not None:
        inputs["rotation"] = rotation.reshape(2, shape.rows, -1)
    pooled = call(
        "compress_finish", _finish, pl.cdiv(shape.head_dim // 2, HALF_COLUMNS), inputs,
        [jax.ShapeDtypeStruct((shape.rows, shape.num_kv_heads, shape.head_dim), dtype)] * shape.sides, 2,
    )  # fmt: skip
    pooled = [array.reshape(shape.batch, shape.slots, *array.shape[1:]) for array in pooled]
    return pooled[0], pooled[1] if shape.sides == 2 else None


def _project(
    shape: Shape, config: CompressConfig, refs: dict[str, Any], tile: Any, head: Any, side: int, count: Any
) -> None:
    """Stores a tile of columns of the hidden units [sides, Hkv, B·M, W], packed rows first."""
    dtype, lanes = refs["ring"].dtype, pl.next_power_of_2(shape.head_dim)
    dim = lax.broadcasted_iota(jnp.int32, (lanes, config.columns), 0)
    column = tile * config.columns + lax.broadcasted_iota(jnp.int32, (lanes, config.columns), 1)
    whole = lanes == shape.head_dim and shape.width % config.columns == 0
    inside = None if whole else (dim < shape.head_dim) & (column < shape.width)

    def rows(step, carry):
        index = step * config.rows + lax.iota(jnp.int32, config.rows)
        valid = index < count
        row = plgpu.load(refs["order"].at[index], mask=valid, other=shape.rows)
        sequence = row // shape.slots

        def add(offset, total):
            place = plgpu.load(refs["place"].at[row, jnp.full_like(row, 0) + offset], mask=valid, other=0)
            fresh = place < 0
            old = load_rows(refs["ring"], (sequence, head, jnp.where(fresh, 0, place)), valid & ~fresh)
            new = load_rows(refs["fresh"], (sequence, jnp.where(fresh, -1 - place, 0), head), valid & fresh)
            entries = jnp.where(fresh[:, None], new, old)
            if "position" in refs:
                # Once for each row, which costs rows that are none nothing: one vector for all is too narrow for the
                # asynchronous copies that hide the latency of all else here.
                at = (head, jnp.full_like(row, 0) + offset)
                position = load_rows(refs["position"], at, valid).astype(dtype)
                # bfloat16 sums are rounded float32 ones.
                entries = (entries.astype(jnp.float32) + position.astype(jnp.float32)).astype(dtype)
            at = refs["weight"].at[head, offset * shape.head_dim + dim, column]
            weight = plgpu.load(at, mask=inside, other=None if whole else 0)
            return total + dot(entries, weight.astype(dtype))

        def several(i, total):
            for own in range(config.offsets):
                total = add(i * config.offsets + own, total)
            return total

        steps = shape.block // config.offsets
        total = lax.fori_loop(0, steps, several, jnp.zeros((config.rows, config.columns), jnp.float32))
        for offset in range(steps * config.offsets, shape.block):
            total = add(jnp.int32(offset), total)
        if shape.is_mlp:
            total = total / (1.0 + jnp.exp(-total))  # SiLU
        _store(refs["0"], (side, head, index), tile * config.columns, total, valid)
        return carry

    lax.fori_loop(0, pl.cdiv(count, config.rows), rows, 0)


def _finish(
    shape: Shape, config: CompressConfig, refs: dict[str, Any], tile: Any, head: Any, side: int, count: Any
) -> None:
    """Stores some columns of each half of D, which rotation pairs, of the side's entries [B·M, Hkv, D]."""
    dtype, half = refs["hidden"].dtype, shape.head_dim // 2
    size = (config.rows, HALF_COLUMNS)
    first = tile * HALF_COLUMNS
    own = min(HIDDEN, pl.next_power_of_2(shape.width))

    def rows(step, carry):
        index = step * config.rows + lax.iota(jnp.int32, config.rows)
        valid = index < count
        row = plgpu.load(refs["order"].at[index], mask=valid, other=shape.rows)

        def hidden(start, columns, end):
            return _load(refs["hidden"], (side, head, index), start, end, columns, valid)

        if shape.is_mlp:

            def add(i, totals):
                units = i * own + lax.iota(jnp.int32, own)
                factor = hidden(i * own, own, shape.width)
                sums = []
                for begin, total in zip((0, half), totals, strict=True):
                    at, live = (head, units), units < shape.width
                    weight = _load(refs["weight_out"], at, first + begin, begin + half, HALF_COLUMNS, live)
                    sums.append(total + dot(factor, weight.astype(dtype)))
                return tuple(sums)

            zeros = jnp.zeros(size, jnp.float32)
            low, high = lax.fori_loop(0, pl.cdiv(shape.width, own), add, (zeros, zeros))
            low, high = low.astype(dtype), high.astype(dtype)
        else:
            low, high = (hidden(first + begin, HALF_COLUMNS, begin + half) for begin in (0, half))
        if side == 0 and "rotation" in refs:
            cos, sin = (_load(refs["rotation"], (part, row), first, half, HALF_COLUMNS, valid) for part in (0, 1))
            low, high = low.astype(jnp.float32), high.astype(jnp.float32)
            low, high = low * cos - high * sin, high * cos + low * sin
        for begin, part in ((0, low), (half, high)):
            _store(refs[str(side)], (row, head), first + begin, part, valid, begin + half)
        return carry

    lax.fori_loop(0, pl.cdiv(count, config.rows), rows, 0)


def _matrix(at: tuple[Any, ...], start: Any, end: int, columns: int, live: Any) -> tuple[Any, Any]:
    """Indices of rows ``at`` (vectors of one length, or scalars) and ``columns`` columns from ``start`` on, as whole
    matrices (interpret mode takes no masked mixture of vectors and slices), and which of them lie before ``end``."""
    size = (live.shape[0], columns)
    column = start + lax.broadcasted_iota(jnp.int32, size, 1)
    wide = [jnp.broadcast_to(index[:, None], size) if jnp.ndim(index) else index for index in at]
    return (*wide, column), jnp.broadcast_to(live[:, None], size) & (column < end)


def _load(ref: Any, at: tuple[Any, ...], start: Any, end: int, columns: int, live: Any) -> Any:
    index, mask = _matrix(at, start, end, columns, live)
    return plgpu.load(ref.at[index], mask=mask, other=0)


def _store(ref: Any, at: tuple[Any, ...], start: Any, values: Any, live: Any, end: int | None = None) -> None:
    index, mask = _matrix(at, start, ref.shape[-1] if end is None else end, values.shape[1], live)
    plgpu.store(ref.at[index], values.astype(ref.dtype), mask=mask)
