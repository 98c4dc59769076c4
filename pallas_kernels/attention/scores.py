"""What a tile of compressed entries gives to the importance of selection blocks."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention.launch import Launch
from pallas_kernels.attention.tiles import Rows, overlap, parts


def _lanes(launch: Launch) -> tuple[int, int, int, int]:
    """How the entries of a tile are spread over its columns: (pages // k, per_page // b, k, b), k pages side by side.

    A tensor core leaves 2 neighbouring columns of every 8 with a thread. The entries of a page take such pairs, so
    that a thread sums a page's weights alone; in their natural order, it would need others' for each sum.
    """
    per_page, pages = launch.sparsity.entries_per_page, launch.page_tile
    if per_page % 2 or pages % 4:
        return pages, 1, 1, per_page
    return pages // 4, per_page // 2, 4, 2


def entry_of_lane(launch: Launch, lane: Any) -> Any:
    """int32: the entry, within its tile, that a column of the tile holds."""
    _, far, side, near = _lanes(launch)
    rest, b = parts(lane, near)
    rest, page = parts(rest, side)
    rest, a = parts(rest, far)
    return ((rest * side + page) * far + a) * near + b


def store_scores(
    launch: Launch, refs: dict[str, Any], rows: Rows, tile: Any, scores: Any, weights: Any, top: Any
) -> None:
    """What a tile's entries give to the blocks in which they begin, and to the blocks after those.

    Sums relative to the running maximum, which is stored too: a logarithm here would cost more than all else.
    """
    sparsity, pages = launch.sparsity, launch.page_tile
    at = refs["batch"], refs["head"]
    if launch.identity:
        sums = {"scores": scores}
    else:
        split = _lanes(launch)
        whole = (1, *split)
        entry = lax.broadcasted_iota(jnp.int32, whole, 2) * split[3] + lax.broadcasted_iota(jnp.int32, whole, 4)
        weights = weights.reshape(rows.size, *split)
        sums = {}
        for name, block in (("scores", 0), ("carry", 1)):
            if name in refs:
                part = jnp.sum(weights * overlap(sparsity, entry, block).astype(jnp.float32), axis=4)
                sums[name] = jnp.sum(part, axis=2).reshape(rows.size, pages)
        plgpu.store(refs["tops"].at[(*at, rows.index, jnp.full_like(rows.index, 0) + tile)], top, mask=rows.valid)
    for name, values in sums.items():
        block = tile * pages + (name == "carry") + lax.broadcasted_iota(jnp.int32, values.shape, 1)
        row = jnp.broadcast_to(rows.index[:, None], values.shape)
        plgpu.store(refs[name].at[(*at, row, block)], values, mask=jnp.broadcast_to(rows.valid[:, None], values.shape))
