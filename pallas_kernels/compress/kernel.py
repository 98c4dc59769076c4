"""φ of the blocks that end in a tail, as two Pallas kernels: rows of entries times wide weights, then the rest.

Of a layer's step the weights are nearly all bytes, and mostly no block ends. So both kernels go over the used slots
only, packed into tiles of rows, each of which reads the weights once, and a program that finds none leaves.

``compress_project`` gathers a row's entries from ring and tail by itself and multiplies them by the MLP's first weight
(or the linear map's). Its programs share out columns and entries of a block. ``compress_finish`` adds up the shares in
order, for an MLP makes them hidden units and multiplies by the second weight, and rotates. Hidden units are rounded
once, as in XLA's code.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._call import padded, triton_call
from pallas_kernels.attention.tiles import dot, load_rows
from pallas_kernels.compress.arguments import Shape, Side
from pallas_kernels.compress.config import CompressConfig

MAX_HEAD_DIM, MAX_WIDTH = 256, 4096
# Of ``compress_finish``: columns in each half of D, hidden units of a step, and shares loaded at once.
HALF_COLUMNS, HIDDEN, SEVERAL = 16, 256, 8


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
    place = jnp.where(back < 0, committed, -1 - back).reshape(shape.rows, shape.block)
    shared = {
        "count": jnp.sum(used, dtype=jnp.int32)[None],
        "order": order,
        "place": place[jnp.minimum(order, shape.rows - 1)],
    }
    heads = (shape.num_kv_heads, shape.sides)

    def call(name: str, body: Any, parts: int, inputs: dict[str, Any], outputs: Any, warps: int, stages: int) -> Any:
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
            kernel, *inputs.values(), out_shape=outputs, grid=(parts, *heads), num_warps=warps,
            num_stages=stages, interpret=interpret, name=name,
        )  # fmt: skip

    def arrays(*fields: str) -> dict[str, Any]:
        found = {f"{field}_{i}": getattr(side, field) for i, side in enumerate(sides) for field in fields}
        return {name: array for name, array in found.items() if array is not None}

    splits = config.parts(shape)
    [sums] = call(
        "compress_project", _project, splits * pl.cdiv(shape.width, config.columns),
        shared | arrays("ring", "fresh", "weight", "position"),
        [jax.ShapeDtypeStruct((splits, *reversed(heads), shape.rows, shape.width), jnp.float32)],
        config.num_warps, config.num_stages,
    )  # fmt: skip
    inputs = {"count": shared["count"], "order": order, "sums": sums} | arrays("weight_out")
    if rotation is not None:
        inputs["rotation"] = rotation.reshape(2, shape.rows, -1)
    pooled = call(
        "compress_finish", _finish, pl.cdiv(shape.head_dim // 2, HALF_COLUMNS), inputs,
        [jax.ShapeDtypeStruct((shape.rows, shape.num_kv_heads, shape.head_dim), dtype)] * shape.sides,
        config.finish_warps, 1 if shape.width <= HIDDEN else 2,
    )  # fmt: skip
    pooled = [array.reshape(shape.batch, shape.slots, *array.shape[1:]) for array in pooled]
    return pooled[0], pooled[1] if shape.sides == 2 else None


def _project(
    shape: Shape, config: CompressConfig, refs: dict[str, Any], part: Any, head: Any, side: int, count: Any
) -> None:
    """Stores float32 sums over a share of a block, of a tile of columns: [splits, sides, Hkv, B·M, W], packed rows."""
    dtype, lanes = refs["ring"].dtype, padded(shape.head_dim)
    tiles, share = pl.cdiv(shape.width, config.columns), config.share(shape)
    tile, split = part % tiles, part // tiles
    dim = lax.broadcasted_iota(jnp.int32, (lanes, config.columns), 0)
    column = tile * config.columns + lax.broadcasted_iota(jnp.int32, (lanes, config.columns), 1)
    whole = lanes == shape.head_dim and shape.width % config.columns == 0
    inside = None if whole else (dim < shape.head_dim) & (column < shape.width)
    even = share * config.parts(shape) == shape.block

    def weights(step):
        """Of all offsets of a step."""
        found = []
        for own in range(config.offsets):
            offset, mask = split * share + step * config.offsets + own, inside
            if not even:
                live = jnp.full(dim.shape, offset < shape.block)
                mask = live if inside is None else inside & live
            at = refs["weight"].at[head, offset * shape.head_dim + dim, column]
            found.append(plgpu.load(at, mask=mask, other=None if mask is None else 0))
        return found

    def live(offset, valid):
        return valid if even else valid & (offset < shape.block)

    def at(step):
        """Index of a tile's rows, which of them are, and their sequences."""
        index = step * config.rows + lax.iota(jnp.int32, config.rows)
        valid = index < count
        return index, valid, plgpu.load(refs["order"].at[index], mask=valid, other=0) // shape.slots

    def look_up(rows, step):
        """Where the entries of a step are."""
        index, valid, _ = rows
        found = []
        for own in range(config.offsets):
            offset = split * share + step * config.offsets + own
            place = refs["place"].at[index, jnp.full_like(index, offset)]
            found.append(plgpu.load(place, mask=live(offset, valid), other=0))
        return tuple(found)

    def entries(rows, step, places):
        """A step's entries plus their positions' vectors, of each offset."""
        index, valid, sequence = rows
        loaded = []
        for own, place in enumerate(places):
            offset = split * share + step * config.offsets + own
            fresh, real = place < 0, live(offset, valid)
            old = load_rows(refs["ring"], (sequence, head, jnp.where(fresh, 0, place)), real & ~fresh)
            new = load_rows(refs["fresh"], (sequence, jnp.where(fresh, -1 - place, 0), head), real & fresh)
            # Once for each row, which costs rows that are none nothing: one vector for all is too narrow for the
            # asynchronous copies that hide the latency of all else here.
            here = (head, jnp.full_like(index, offset))
            loaded.append((old, new, load_rows(refs["position"], here, real) if "position" in refs else None))
        found = []
        for (old, new, position), place in zip(loaded, places, strict=True):
            entry = jnp.where((place < 0)[:, None], new, old)
            if position is not None:
                # bfloat16 sums are rounded float32 ones.
                entry = (entry.astype(jnp.float32) + position.astype(dtype).astype(jnp.float32)).astype(dtype)
            found.append(entry)
        return tuple(found)

    def add(total, factors, others):
        for factor, weight in zip(factors, others, strict=True):
            total = total + dot(factor, weight.astype(dtype))
        return total

    def go_over(row_tile, carry):
        rows, last = at(row_tile), share // config.offsets - 1

        # A step ahead: what a load's address depends on would take stages of Triton's pipeline.
        def ahead(step, carry):
            places, total = carry
            following = look_up(rows, jnp.minimum(step + 1, last))
            return following, add(total, entries(rows, step, places), weights(step))

        zeros = jnp.zeros((config.rows, config.columns), jnp.float32)
        _, total = lax.fori_loop(0, last + 1, ahead, (look_up(rows, 0), zeros))
        _store(refs["0"], (split, side, head, rows[0]), tile * config.columns, total, rows[1])
        return carry

    lax.fori_loop(0, pl.cdiv(count, config.rows), go_over, 0)


def _finish(
    shape: Shape, config: CompressConfig, refs: dict[str, Any], tile: Any, head: Any, side: int, count: Any
) -> None:
    """Stores some columns of each half of D, which rotation pairs, of the side's entries [B·M, Hkv, D]."""
    dtype, half = refs[str(side)].dtype, shape.head_dim // 2
    size = (config.rows, HALF_COLUMNS)
    first = tile * HALF_COLUMNS
    own = min(HIDDEN, max(16, pl.next_power_of_2(shape.width)))  # no product has fewer

    def rows(step, carry):
        index = step * config.rows + lax.iota(jnp.int32, config.rows)
        valid = index < count

        def hidden(start, columns, end, load=lambda step: ()):
            """The sums' totals, activated and rounded, and what ``load`` gives, loaded at the same time."""
            parts = config.parts(shape)
            several = math.gcd(parts, SEVERAL)

            def share(split):
                return _load(refs["sums"], (split, side, head, index), start, end, columns, valid)

            def more(step, carry):
                total = functools.reduce(jnp.add, [share(step * several + own) for own in range(several)], carry[0])
                return total, load(step)

            # A loop, and of a count that the compiler does not know: else it would have every warp add up and activate
            # all of them, in the layout of a product's factor.
            steps = jnp.minimum(count * (parts // several), parts // several)
            empty = (
                jnp.zeros((config.rows, columns), jnp.float32),
                tuple(jnp.zeros((own, HALF_COLUMNS), refs["weight_out"].dtype) for _ in range(2))
                if shape.is_mlp
                else (),
            )
            total, other = lax.fori_loop(0, steps, more, empty)
            if shape.is_mlp:
                total = total / (1.0 + jnp.exp(-total))  # SiLU
            return total.astype(dtype), other

        if shape.is_mlp:

            def add(i, totals):
                def weights(step):
                    # min(step, 0) is 0, and keeps the loads in the loop, where they do not wait for one another.
                    units = i * own + jnp.minimum(step, 0) + lax.iota(jnp.int32, own)
                    return tuple(
                        _load(refs["weight_out"], (head, units), first + begin, begin + half, HALF_COLUMNS,
                              units < shape.width)
                        for begin in (0, half)
                    )  # fmt: skip

                factor, others = hidden(i * own, own, shape.width, weights)
                return tuple(
                    total + dot(factor, weight.astype(dtype)) for total, weight in zip(totals, others, strict=True)
                )

            zeros = jnp.zeros(size, jnp.float32)
            low, high = lax.fori_loop(0, pl.cdiv(shape.width, own), add, (zeros, zeros))
            low, high = low.astype(dtype), high.astype(dtype)
        else:
            low, high = (hidden(first + begin, HALF_COLUMNS, begin + half)[0] for begin in (0, half))
        row = plgpu.load(refs["order"].at[index], mask=valid, other=shape.rows)
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
