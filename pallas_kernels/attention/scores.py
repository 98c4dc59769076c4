"""What a tile of compressed entries gives to the importance of selection blocks."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention.launch import Launch
from pallas_kernels.attention.tiles import Rows, overlap, parts

# What a compiler knows that it may leave out of a sum: x + 0 is not x where x is −0.
NOTHING = np.float32(-0.0)


def _lanes(launch: Launch) -> tuple[int, int, int, int]:
    """How the entries of a tile are spread over its columns: (run, per_page // b, runs, b), ``run`` pages a thread.

    A tensor core leaves 2 neighbouring columns of every 8 with a thread: a row of the tile lies with 4 threads. Each
    takes a quarter of the tile's pages, in pairs of entries, and sums their weights alone, what reaches from one page
    into the next too. In the entries' natural order it would need other threads' for each sum.
    """
    per_page, pages = launch.sparsity.entries_per_page, launch.page_tile
    run = launch.page_run
    return (run, per_page // 2, pages // run, 2) if per_page % 2 == 0 and pages % 4 == 0 else (1, 1, pages, per_page)


def entry_of_lane(launch: Launch, lane: Any) -> Any:
    """int32: the entry, within its tile, that a column of the tile holds."""
    run, far, side, near = _lanes(launch)
    rest, b = parts(lane, near)
    rest, place = parts(rest, side)
    page, a = parts(rest, far)
    return ((place * run + page) * far + a) * near + b


def store_scores(
    launch: Launch, refs: dict[str, Any], rows: Rows, tile: Any, scores: Any, weights: Any, top: Any
) -> None:
    """What a tile's entries give to the blocks in which they begin, and to the blocks after those.

    Sums relative to the running maximum, which is stored too: a logarithm here would cost more than all else.
    """
    sparsity, pages = launch.sparsity, launch.page_tile
    at = refs["batch"], refs["head"]

    def store(name: str, values: Any, first: Any) -> None:
        index = first + lax.broadcasted_iota(jnp.int32, values.shape, 1)
        row = jnp.broadcast_to(rows.index[:, None], values.shape)
        plgpu.store(refs[name].at[(*at, row, index)], values, mask=jnp.broadcast_to(rows.valid[:, None], values.shape))

    if launch.identity:
        store("scores", scores, tile * pages)
        return
    run, far, side, near = _lanes(launch)
    entry = lax.broadcasted_iota(jnp.int32, (1, 1, far, 1, near), 2) * near
    entry += lax.broadcasted_iota(jnp.int32, (1, 1, far, 1, near), 4)
    weights = weights.reshape(rows.size, run, far, side, near)

    def sums(block: int) -> Any:
        """float32 [rows, run, side]: what each page's entries give to it (0), or to the page after it (1)."""
        chunks = overlap(sparsity, entry, block).astype(jnp.float32)
        given = jnp.where(chunks > 0, weights * chunks, NOTHING)
        return jnp.sum(jnp.sum(given, axis=4), axis=2)

    def shifted(values: Any, size: int, by: int) -> Any:
        """float32 [rows, size, side]: page p's of ``values`` at p + ``by``; nothing where there is no such page."""
        shape = (rows.size, run, size, side)
        old, new = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
        return jnp.sum(jnp.where(old + by == new, values[:, :, None, :], NOTHING), axis=1)

    def in_order(values: Any) -> Any:
        return values.transpose(0, 2, 1).reshape(rows.size, -1)

    own = sums(0)
    if "carry" in refs:
        carry = sums(1)
        if run > 1:
            own += shifted(carry, run, by=1)
            carry = shifted(carry, 1, by=1 - run)
        store("carry", in_order(carry), tile * side + 1)
    store("scores", in_order(own), tile * pages)
    plgpu.store(refs["tops"].at[(*at, rows.index, jnp.full_like(rows.index, 0) + tile)], top, mask=rows.valid)
