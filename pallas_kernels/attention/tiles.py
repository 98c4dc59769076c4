"""Inside a kernel: rows of queries, tiles of keys, and the running softmax of one over the other."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._call import padded
from pallas_kernels.attention.arguments import Sparsity
from pallas_kernels.attention.launch import Launch

# Finite, so that the difference of two such scores is 0 and never NaN.
MASKED = np.float32(-1e30)
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A program's rows: where they lie, the query and head of each, and their queries."""

    index: Any  # int32 [rows], within the (sequence, KV head)
    token: Any  # int32 [rows]
    valid: Any  # bool [rows]
    query: Any  # [rows, D]
    size: int


def query_rows(launch: Launch, refs: dict[str, Any], size: int, first: Any, end: Any) -> Rows:
    """Rows ``first`` … ``first`` + size − 1, of which those before ``end`` count."""
    shape = launch.shape
    index = first + lax.iota(jnp.int32, size)
    token, lane = parts(index, shape.lanes)
    valid = (index < end) & (lane < shape.group)
    head = refs["head"] * shape.group + lane
    query = load_rows(refs["query"], (refs["batch"], token, head), valid)
    return Rows(index, token, valid, query, size)


def parts(index: Any, size: int) -> tuple[Any, Any]:
    """``index // size`` and ``index % size`` for indices that are not negative, ``size`` a power of two.

    jnp's own operators round for signs that do not occur: in a tile's addresses that was a tenth of all instructions.
    """
    return index >> (size.bit_length() - 1), index & (size - 1)


def load_rows(ref: Any, at: tuple[Any, ...], live: Any) -> Any:
    """``ref[*at, :]`` for index vectors ``at`` of one length (or scalars), 0 where not ``live``; [rows, D padded].

    ``live`` None: all are. Masks are dear in a tile, so the loops have none but for what the last split does.
    """
    dim = ref.shape[-1]
    lanes = padded(dim)
    shape = (max(index.shape[0] for index in at if jnp.ndim(index)), lanes)
    # Indices as whole matrices: interpret mode takes no masked mixture of vectors and slices.
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    wide = [jnp.broadcast_to(index[:, None], shape) if jnp.ndim(index) else index for index in at]
    whole = lanes == dim
    mask = None if whole else column < dim
    if live is not None:
        mask = jnp.broadcast_to(live[:, None], shape) if whole else live[:, None] & (column < dim)
    return plgpu.load(ref.at[(*wide, column)], mask=mask, other=None if mask is None else 0.0)


def dot(a: Any, b: Any, **transposed: bool) -> Any:
    """float32 a·b, either transposed if so asked; float32 factors are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, precision=precision, **transposed)


def score(launch: Launch, rows: Rows, keys: Any) -> Any:
    """float32 [rows, keys], not scaled yet."""
    return dot(rows.query, keys, trans_b=True)


def scale(launch: Launch) -> np.float32:
    """What makes of a score the binary logarithm of a weight."""
    return np.float32(launch.sparsity.scale * LOG2E)


class State(NamedTuple):
    """A running softmax over the keys so far.

    ``top`` float32 [rows], the maximum; ``total`` [rows, 8], the sum of weights, in parts that no two threads share;
    ``out`` [rows, D], the weighted values, None where there are none; ``rounded`` [rows, 16], 16 times the sum of the
    weights as the product with the values rounds them, None where it is not needed.
    """

    top: Any
    total: Any
    out: Any = None
    rounded: Any = None


def start(rows: Rows, values: bool = True) -> State:
    """The state of no keys."""

    def zeros(columns: int) -> Any:
        return jnp.zeros((rows.size, columns), jnp.float32)

    top = jnp.full(rows.size, MASKED, jnp.float32)
    if not values:
        return State(top, zeros(8))
    return State(top, zeros(8), zeros(rows.query.shape[1]), zeros(16) if rows.size == 32 else None)


def attend_tile(launch: Launch, state: State, scores: Any, visible: Any, values: Any) -> tuple[Any, State]:
    """One more tile of unscaled ``scores``: its weights relative to the new maximum, and the new state.

    ``visible`` None: all keys are; ``values`` None: sums only.
    """
    if visible is not None:
        scores = jnp.where(visible, scores, MASKED)
    top = jnp.maximum(state.top, jnp.max(scores, axis=1) * scale(launch))
    # Scaled here, where it costs nothing: one fused multiplication and subtraction.
    weights = exp2(launch, scores * scale(launch) - top[:, None])
    if visible is not None:
        weights = jnp.where(visible, weights, 0.0)
    fade = exp2(launch, state.top - top)[:, None]
    size, keys = weights.shape
    # A tensor core leaves 2 neighbouring columns of every 8 with a thread: nothing here is another thread's.
    total = state.total * fade + jnp.sum(weights.reshape(size, keys // 8, 8), axis=1)
    if values is None:
        return weights, State(top, total)
    factors, rounded = weights.astype(values.dtype), state.rounded
    out = state.out * fade + dot(factors, values)
    if rounded is not None:
        # Triton lays two warps along the longer side of the last of these products. They must lie along the rows: along
        # the columns, every tile's maxima, sums and weights go from warp to warp through shared memory. So the last
        # product is a narrow one, and a useful one: what the output is to be divided by. (16 rows have one warp, 64 an
        # instruction of their own, with its warps along the rows.)
        rounded = rounded * fade + dot(factors, jnp.ones((keys, 16), factors.dtype))
    return weights, State(top, total, out, rounded)


def exp2(launch: Launch, x: Any) -> Any:
    """2^x, 0 below 2^-126: the hardware's own, without the three instructions that save what lies below."""
    if launch.interpret:
        return jnp.exp2(x)
    return plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )[0]


def finish(refs: dict[str, Any], rows: Rows, split: Any, state: State) -> None:
    """Stores a split's output and log-sum-exp."""
    at = (refs["batch"], refs["head"], split)
    total = jnp.sum(state.total, axis=1)
    lse = jnp.where(total > 0, state.top + jnp.log(total) * np.float32(LOG2E), -jnp.inf)
    plgpu.store(refs["lse"].at[(*at, rows.index)], lse, mask=rows.valid)
    if state.out is None:
        return
    divisor = total if state.rounded is None else jnp.max(state.rounded, axis=1)  # its columns are equal
    ref, out = refs["out"], state.out / jnp.where(divisor > 0, divisor, 1.0)[:, None]
    row = jnp.broadcast_to(rows.index[:, None], out.shape)
    column = lax.broadcasted_iota(jnp.int32, out.shape, 1)
    mask = jnp.broadcast_to(rows.valid[:, None], out.shape) & (column < ref.shape[-1])
    plgpu.store(ref.at[(*at, row, column)], out, mask=mask)


def share(steps: Any, split: Any, splits: int) -> tuple[Any, Any]:
    """The ``split``-th share of ``steps`` steps over the cache: equal, and nothing for the last of several splits."""
    if splits == 1:
        return 0, steps
    each = pl.cdiv(steps, splits - 1)
    first = split * each
    return jnp.minimum(first, steps), jnp.minimum(first + each, steps)


def walk(launch: Launch, first: Any, end: Any, look_up: Any, step: Any, state: State) -> State:
    """``state = step(i, look_up(i), state)`` for i from ``first`` to ``end`` − 1.

    What a load's address depends on takes stages of Triton's pipeline. Looked up a step ahead, and carried from step to
    step, it takes none. Not in the launch with scores, which was slower with it, most of all with 64 rows.
    """
    if launch.scored:
        return lax.fori_loop(first, end, lambda i, state: step(i, look_up(i), state), state)

    def one(i, carry):
        found, state = carry
        return look_up(i + 1), step(i, found, state)

    return lax.fori_loop(first, end, one, (look_up(first), state))[1]


def ancestors(refs: dict[str, Any], rows: Rows, node: Any, live: Any) -> Any:
    """bool [rows, nodes]: is the node on the row's path?"""
    mask = rows.valid[:, None] & live[None, :]
    if "tail_ancestor" not in refs:
        return mask & (node[None, :] <= rows.token[:, None])
    ref = refs["tail_ancestor"]
    batch = refs["batch"] if ref.shape[0] > 1 else 0
    size = (rows.size, node.shape[0])
    token = jnp.broadcast_to(jnp.where(rows.valid, rows.token, 0)[:, None], size)
    node = jnp.broadcast_to(jnp.where(live, node, 0)[None, :], size)
    return plgpu.load(ref.at[batch, token, node]) & mask


def overlap(sparsity: Sparsity, entry: Any, block: Any) -> Any:
    """int32: the chunks of d tokens that compression block ``entry`` shares with selection block ``block``."""
    chunks, per_page = sparsity.compress_block // sparsity.compress_stride, sparsity.entries_per_page
    low = jnp.maximum(entry, per_page * block)
    return jnp.maximum(jnp.minimum(entry + chunks, per_page * (block + 1)) - low, 0)


def tail_tiles(launch: Launch, rows: Rows, last: Any) -> Any:
    """Tiles of the tail that a program reads: none but in the last split, and on a chain none behind its rows."""
    return jnp.where(last, jnp.minimum(jnp.max(rows.token), launch.shape.width - 1) // launch.near_tile + 1, 0)
