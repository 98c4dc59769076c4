"""Partial outputs of splits → branches → the gated output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._call import triton_call
from pallas_kernels.attention.launch import Launch

# A launch, how its partial outputs' names end, and the branches of it that count.
Part = tuple[Launch, str, tuple[int, ...]]


def run(
    parts: Sequence[tuple[Launch, dict[str, jax.Array]]],
    gates: jax.Array | None,
    branches: Sequence[int],
    dtype: jnp.dtype,
) -> jax.Array:
    """Σ over ``branches`` of gate · branch, [B, T, Hq, D]; ``parts`` are launches with their partial results."""
    shape = parts[0][0].shape
    inputs: dict[str, jax.Array] = {} if gates is None else {"gates": gates}
    named: list[Part] = []
    for number, (launch, partial) in enumerate(parts):
        inputs |= {f"out{number}": partial["out"], f"lse{number}": partial["lse"]}
        named.append((launch, str(number), tuple(branches)))
    names = [*inputs, "merged"]

    def nsa_merge(*refs: Any) -> None:
        where = {"head": pl.program_id(1), "batch": pl.program_id(2)}
        perform(named, dict(zip(names, refs, strict=True)) | where, pl.program_id(0))

    return triton_call(
        nsa_merge,
        *inputs.values(),
        out_shape=result(parts[0][0], dtype),
        grid=(works(named), shape.num_kv_heads, shape.batch),
        num_warps=parts[0][0].config.merge_warps,
        interpret=parts[0][0].interpret,
    )


def result(launch: Launch, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    """[B, T, Hq, D]."""
    shape = launch.shape
    return jax.ShapeDtypeStruct((shape.batch, shape.width, shape.num_heads, shape.head_dim), dtype)


def _segments(parts: Sequence[Part]) -> list[tuple[Launch, str, int, int, int]]:
    return [(launch, name, index, first, count) for launch, name, wanted in parts
            for index, first, count in launch.segments if index in wanted]  # fmt: skip


def _rows(parts: Sequence[Part]) -> int:
    """Of a program, with all splits of a branch at once."""
    shape, values = parts[0][0].shape, parts[0][0].config.merge_values
    most = max(pl.next_power_of_2(count) for *_, count in _segments(parts))
    return min(pl.next_power_of_2(shape.rows), max(1, values // (most * pl.next_power_of_2(shape.head_dim))))


def works(parts: Sequence[Part]) -> int:
    """Programs for each (sequence, KV head)."""
    launch = parts[0][0]
    return pl.cdiv(launch.nodes * launch.shape.lanes, _rows(parts))


def perform(parts: Sequence[Part], refs: dict[str, Any], work: Any) -> None:
    """Inside a kernel: the ``work``-th program's rows."""
    shape, size = parts[0][0].shape, _rows(parts)
    lanes = pl.next_power_of_2(shape.head_dim)
    head, batch = refs["head"], refs["batch"]
    row = work * size + lax.iota(jnp.int32, size)
    token, lane = row // shape.lanes, row % shape.lanes
    valid = (row < shape.rows) & (lane < shape.group)
    query_head = head * shape.group + lane
    total = jnp.zeros((size, lanes), jnp.float32)
    for launch, name, index, first, count in _segments(parts):
        branch = _branch_in_turn if launch.deterministic else _branch
        where = (batch, head)
        merged = branch(refs[f"out{name}"], refs[f"lse{name}"], where, row, valid, first, count, lanes)
        if "gates" in refs:
            gate = plgpu.load(
                refs["gates"].at[batch, token, query_head, jnp.full_like(token, index)], mask=valid, other=0.0
            )
            merged = merged * gate[:, None]
        total += merged
    column = lax.broadcasted_iota(jnp.int32, (size, lanes), 1)
    at = [jnp.broadcast_to(value[:, None], (size, lanes)) for value in (token, query_head)]
    mask = valid[:, None] & (column < shape.head_dim)
    plgpu.store(refs["merged"].at[(batch, *at, column)], total.astype(refs["merged"].dtype), mask=mask)


def _branch(out: Any, lse: Any, where: Any, row: Any, valid: Any, first: int, count: int, lanes: int) -> Any:
    """float32 [rows, lanes]: the splits ``first`` … ``first + count − 1``, each weighed by its share of the sum."""
    splits = pl.next_power_of_2(count)
    size = row.shape[0]
    split = lax.broadcasted_iota(jnp.int32, (splits, size), 0)
    mask = (split < count) & valid[None, :]
    at = (*where, first + jnp.minimum(split, count - 1), jnp.broadcast_to(row[None, :], (splits, size)))
    sums = plgpu.load(lse.at[at], mask=mask, other=-jnp.inf)
    top = jnp.max(sums, axis=0)
    top = jnp.where(top > -jnp.inf, top, 0.0)
    weight = jnp.exp2(sums - top[None, :])
    total = jnp.sum(weight, axis=0)
    weight = weight / jnp.where(total > 0, total, 1.0)[None, :]
    wide = (splits, size, lanes)
    column = lax.broadcasted_iota(jnp.int32, wide, 2)
    own = (jnp.broadcast_to(index[:, :, None], wide) for index in at[2:])
    mask = jnp.broadcast_to(mask[:, :, None], wide) & (column < out.shape[-1])
    values = plgpu.load(out.at[(*where, *own, column)], mask=mask, other=0.0)
    return jnp.sum(weight[:, :, None] * values, axis=0)


def _branch_in_turn(out: Any, lse: Any, where: Any, row: Any, valid: Any, first: int, count: int, lanes: int) -> Any:
    """:func:`_branch`, one split after the other: splits that saw nothing leave the others' bits alone."""
    wide = (row.shape[0], lanes)
    row_at, column = jnp.broadcast_to(row[:, None], wide), lax.broadcasted_iota(jnp.int32, wide, 1)
    mask = valid[:, None] & (column < out.shape[-1])

    def weigh(split, top):
        own = plgpu.load(lse.at[(*where, jnp.full_like(row, first) + split, row)], mask=valid, other=-jnp.inf)
        highest = jnp.maximum(top, own)
        safe = jnp.where(highest > -jnp.inf, highest, 0.0)
        return highest, jnp.exp2(top - safe), jnp.exp2(own - safe)

    def add(split, carry):
        top, total, merged = carry
        highest, fade, weight = weigh(split, top)
        values = plgpu.load(
            out.at[(*where, jnp.full_like(row_at, first) + split, row_at, column)], mask=mask, other=0.0
        )
        return highest, total * fade + weight, merged * fade[:, None] + values * weight[:, None]

    nothing = (
        jnp.full(row.shape, -jnp.inf, jnp.float32),
        jnp.zeros(row.shape, jnp.float32),
        jnp.zeros(wide, jnp.float32),
    )
    _, total, merged = lax.fori_loop(0, count, add, nothing)
    return merged / jnp.where(total > 0, total, 1.0)[:, None]
