"""Selection as a Pallas kernel: a threshold by bisection over the bits of the scores, then compaction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._call import triton_call
from pallas_kernels.selection.config import SelectionConfig

# Two counts of blocks share one int32 in the kernel's cumsum.
MAX_BLOCKS = 2**14
_LARGEST_FINITE = np.float32(np.finfo(np.float32).max).view(np.int32)
_INFINITY = np.float32(np.inf).view(np.int32)
_FORCED = np.int32(2**31 - 1)


def limit(num_blocks: int, num_selected: int) -> str | None:
    """Why the kernel does not take these shapes; None if it does."""
    if num_blocks > MAX_BLOCKS:
        return f"importance: got {num_blocks} blocks, expected at most {MAX_BLOCKS}"
    if num_selected > MAX_BLOCKS:
        return f"num_selected: got {num_selected}, expected at most {MAX_BLOCKS}"
    return None


def select_blocks(
    importance: jax.Array,
    positions: jax.Array,
    *,
    select_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    config: SelectionConfig,
    interpret: bool,
) -> jax.Array:
    """See :func:`pallas_kernels.selection.select_blocks`; ``positions`` has the rank of ``importance`` less one."""
    *batch, num_blocks = importance.shape
    rows = math.prod(batch)
    if rows == 0:
        return jnp.zeros((*batch, num_selected), jnp.int32)

    def select_blocks_kernel(importance_ref, positions_ref, ids_ref):
        row = pl.program_id(0)
        own = positions_ref[_position_of(row, batch, positions.shape)] // select_block
        last = jnp.minimum(own, num_blocks - 1)
        parts = [plgpu.load(importance_ref.at[row, ids], mask=ids <= last, other=0.0) for ids in lane_parts(num_blocks)]
        rule = dict(num_selected=num_selected, num_initial=num_initial, num_local=num_local)
        store_ids(ids_ref, (row,), *choose(parts, own, num_blocks, **rule), num_selected)

    ids = triton_call(
        select_blocks_kernel,
        importance.reshape(rows, num_blocks),
        positions.reshape(-1),
        out_shape=jax.ShapeDtypeStruct((rows, num_selected), jnp.int32),
        grid=(rows,),
        num_warps=config.num_warps,
        interpret=interpret,
    )
    return ids.reshape(*batch, num_selected)


def lane_ranges(num_blocks: int) -> list[tuple[int, int]]:
    """The ids 0 … ``num_blocks`` − 1, and some more, as one or two ranges (first, size), the first the longer.

    Tensors in a Triton kernel have power-of-two sizes; one that holds all would often be half empty.
    """
    whole = 1 << (num_blocks.bit_length() - 1)
    rest = num_blocks - whole
    if rest == 0:
        return [(0, whole)]
    if rest > whole // 2:
        return [(0, 2 * whole)]
    return [(0, whole), (whole, max(32, pl.next_power_of_2(rest)))]


def lane_parts(num_blocks: int) -> list[Any]:
    """Inside a kernel: :func:`lane_ranges` as vectors."""
    return [first + lax.iota(jnp.int32, size) for first, size in lane_ranges(num_blocks)]


def choose(
    importance: Sequence[Any], own: Any, num_blocks: int, *, num_selected: int, num_initial: int, num_local: int
) -> tuple[list[Any], list[Any], Any]:
    """Inside a kernel: which blocks a query selects.

    Args:
      importance: float32 vectors, one for each of :func:`lane_parts`; any value where a block has not begun.
      own: int32 [], the query's own block; negative selects nothing.
      num_initial, num_local: forced blocks, together at most ``num_selected``.

    Returns:
      chosen: bool, as ``importance``; slot: int32, likewise: the rank of each chosen block, ``num_selected``
      elsewhere; count: int32 [], how many are chosen.
    """
    last = jnp.minimum(own, num_blocks - 1)
    count = jnp.minimum(last + 1, num_selected)

    def key_of(ids, importance):
        # Non-negative floats are ordered like their bits. Blocks that have not begun get -1, which is never counted.
        key = lax.bitcast_convert_type(importance, jnp.int32)
        key = jnp.where(key > _INFINITY, 0, jnp.clip(key, 0, _LARGEST_FINITE))
        key = jnp.where((ids < num_initial) | (ids > own - num_local), _FORCED, key)
        return jnp.where(ids <= last, key, -1)

    keys = [key_of(ids, part) for ids, part in zip(lane_parts(num_blocks), importance, strict=True)]

    def number(part_of):
        """int32 []: the sum over all keys of ``part_of`` them."""
        return sum((jnp.sum(part_of(key), dtype=jnp.int32) for key in keys), start=np.int32(0))

    # The largest threshold that `count` keys reach lies in low … high − 1: as many groups of keys have one each that
    # reaches the least of their maxima, and no key that is not forced exceeds the highest of these.
    low: Any = _least_maximum(keys[0], num_selected)
    high: Any = np.int32(0)
    for key in keys:
        high = jnp.maximum(high, jnp.max(jnp.where(key == _FORCED, 0, key)) + 1)

    # Two thresholds a round, whose counts share a word; done early once exactly `count` keys reach the lower end.
    def narrow(state):
        low, high, reached = state
        third = jnp.maximum(lax.div(high - low, np.int32(3)), 1)
        lower, upper = low + third, jnp.minimum(low + 2 * third, high - 1)
        both = number(lambda key: (key >= lower).astype(jnp.int32) + ((key >= upper).astype(jnp.int32) << 16))
        reach_lower, reach_upper = both & 0xFFFF, both >> 16
        some, more = reach_lower >= count, reach_upper >= count
        low = jnp.where(more, upper, jnp.where(some, lower, low))
        high = jnp.where(more, high, jnp.where(some, upper, lower))
        return low, high, jnp.where(more, reach_upper, jnp.where(some, reach_lower, reached))

    threshold, _, _ = lax.while_loop(
        lambda state: (state[1] - state[0] > 1) & (state[2] > count), narrow, (low, high, last + 1)
    )

    # Keys above the threshold are in; of those equal to it, the first `ties`. One cumsum counts both.
    both = [(key > threshold).astype(jnp.int32) + ((key == threshold).astype(jnp.int32) << 16) for key in keys]
    totals = [jnp.sum(part, dtype=jnp.int32) for part in both]
    ties = count - (sum(totals) & 0xFFFF)
    all_chosen, slots, before = [], [], jnp.zeros((), jnp.int32)
    # From `both`, not from the keys: then Triton moves one tensor into the layout that a cumsum takes, and none back.
    for part, total in zip(both, totals, strict=True):
        counts = before + lax.cumsum(part, axis=0)
        above_so_far, equal_so_far = counts & 0xFFFF, counts >> 16
        chosen = (part == 1) | ((part > 1) & (equal_so_far <= ties))
        all_chosen.append(chosen)
        # Interpret mode writes back what masked lanes read, so these must not name a slot in use.
        slots.append(jnp.where(chosen, above_so_far + jnp.minimum(equal_so_far, ties) - 1, num_selected))
        before = before + total
    return all_chosen, slots, count


def _least_maximum(key: Any, groups: int) -> Any:
    """int32 []: the least of the maxima of ``groups`` groups of keys or more, at least 0."""
    groups = pl.next_power_of_2(groups)
    if groups >= key.shape[0]:
        return np.int32(0)
    return jnp.maximum(jnp.min(jnp.max(key.reshape(-1, groups), axis=0)), 0)


def store_ids(
    ref: Any, at: tuple[Any, ...], chosen: Sequence[Any], slots: Sequence[Any], count: Any, num_selected: int
) -> None:
    """Inside a kernel: writes the chosen ids to ``ref[*at]`` int32 [num_selected], ascending, then −1."""
    first = 0
    for part, slot in zip(chosen, slots, strict=True):
        plgpu.store(ref.at[(*at, slot)], first + lax.iota(jnp.int32, part.shape[0]), mask=part)
        first += part.shape[0]
    slot = lax.iota(jnp.int32, pl.next_power_of_2(num_selected))
    plgpu.store(ref.at[(*at, slot)], jnp.full_like(slot, -1), mask=(slot >= count) & (slot < num_selected))


def _position_of(row, batch, shape):
    """Index into the flattened positions, of a shape that broadcasts to ``batch``, for a flattened row of ``batch``.

    Broadcasting by XLA would cost a launch of its own.
    """
    index, inner, stride = 0, 1, 1
    for size, own_size in zip(reversed(batch), reversed(shape), strict=True):
        if own_size > 1:
            index += row // inner % size * stride
            stride *= own_size
        inner *= size
    return index
