"""Row-wise computation: together, or in blocks of one fixed size whose results cannot depend on anything else.

What the strict class needs: the bits of a row are the same whoever is computed beside it, in whichever program. A
compiler gives that for a loop with a body of fixed shapes: the body is compiled on its own (nothing outside is fused
into it, nothing of it moved out), so that it is the same code in the program that decodes one token and in the one
that verifies a tree. Its trip count must be unknown to the compiler, which unrolls or inlines short loops.

That leaves one thing that may differ between two executables of the same body. On a GPU, XLA chooses between cuBLAS's
algorithms, its own Triton products (and, in newer versions, the tiles of other fusions) by measuring them at each
compilation. Within a process its cache of choices usually makes equal instructions equal; but the key is the whole
fusion, a program that comes from a compilation cache brings another process's choice, and not all choices are kept on
disk (openxla/xla issue 37902). So the strict class compiles with :data:`STRICT_OPTIONS`: nothing is measured, and what
is chosen is a function of the instruction alone. cuBLAS then takes the first of its heuristics for the shape, which is
fixed here, and gives the same bits at every run on one kind of device (cuBLAS documentation, "Results
Reproducibility"). Every product is of as many rows (:func:`block_rows`), so what splits it along the inner dimension,
if anything, does so for all rows alike. XLA's fusion passes themselves are reproducible within a process; between
processes they are said not to be in near-ties (issue 49047), so bits are to be compared within one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Of GPU executables: no choice by measurement.
STRICT_OPTIONS = {"xla_gpu_autotune_level": 0}

# run(function, *arrays): function maps arrays [B, T, …] to a pytree of arrays [B, T, …], row by row.
Rows = Callable[..., Any]


def block_rows() -> int:
    """Rows of one matrix product in the strict class, on the present backend: 64 on a GPU, else 8.

    More cost less a row, and waste more where there are few: a GPU takes as long for 64 as for 8, of which most are
    launches, a CPU for each row.
    """
    return 64 if jax.default_backend() == "gpu" else 8


def together(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """All rows at once, as the shapes are."""
    return function(*arrays)


def in_company(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """As :func:`together`, for functions with matrix products; on a GPU, a row that is alone is given one of zeros.

    Of a single row XLA makes an elementwise product with the whole matrix, which it writes and reads again, and sums.
    """
    if arrays[0].shape[:2] != (1, 1) or jax.default_backend() != "gpu":
        return function(*arrays)
    outs = function(*(jnp.pad(a, [(0, 0), (0, 1)] + [(0, 0)] * (a.ndim - 2)) for a in arrays))
    return jax.tree.map(lambda out: out[:, :1], outs)


def in_blocks(lengths: jax.Array, size: int | None = None) -> Rows:
    """Rows in blocks [1, size, …], the last one padded with zeros; ``lengths`` int32, never negative, hides the count.
    Without a ``size``: :func:`block_rows`.

    A row must not depend on the others, nor on its place in a block: matrix products of so few rows compute each alike
    (tests/test_strict.py checks it).
    """
    size = size or block_rows()
    never = (lengths < 0).any().astype(jnp.int32)

    def run(function: Callable[..., Any], *arrays: jax.Array) -> Any:
        batch, width = arrays[0].shape[:2]
        count = batch * width
        blocks = -(-count // size)
        padding = blocks * size - count
        flat = [
            jnp.pad(a.reshape(count, *a.shape[2:]), [(0, padding)] + [(0, 0)] * (a.ndim - 2)) for a in arrays
        ]  # fmt: skip

        def block(index: jax.Array) -> Any:
            parts = [jax.lax.dynamic_slice_in_dim(a, index * size, size)[None] for a in flat]
            parts = jax.lax.optimization_barrier(parts)
            outs = jax.lax.optimization_barrier(function(*parts))
            return jax.tree.map(lambda out: out[0], outs)

        def body(index: jax.Array, outs: Any) -> Any:
            def put(out: jax.Array, new: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(out, new, index * size, axis=0)

            return jax.tree.map(put, outs, block(index))

        empty = jax.tree.map(
            lambda out: jnp.zeros((blocks * size, *out.shape[1:]), out.dtype), jax.eval_shape(block, jnp.int32(0))
        )
        outs = jax.lax.fori_loop(0, blocks + never, body, empty)
        return jax.tree.map(lambda out: out[:count].reshape(batch, width, *out.shape[1:]), outs)

    return run
