"""A whole layer in one launch: branches, selection and merge, each program waiting for those that it needs.

Between two launches a GPU drains: its last programs leave most of it idle, then the next launch starts from nothing.
In one launch the selection of one sequence runs beside the branches of another.

A program first draws a ticket, which says what it does: compressed branch and window of all (sequence, KV head)s first,
then the selections, the selected branches, the merges. It may wait for tickets drawn before its own, and for no others;
whoever drew those is running or done, so there is no deadlock, in whatever order a device starts its programs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._call import triton_call
from pallas_kernels.attention import branches, merge, selection
from pallas_kernels.attention.arguments import Layer, Selection, Tail
from pallas_kernels.attention.launch import Launch

# What has been counted of a (sequence, KV head): programs done of the compressed branch; selections; of the other
# branches.
SCORED, SELECTED, ATTENDED = range(3)


def run(
    launch: Launch,
    query: jax.Array,
    gates: jax.Array | None,
    layer: Layer,
    page_table: jax.Array,
    lengths: jax.Array,
    tail: Tail,
    selected: Selection | None,
    shown: tuple[int, ...],
) -> tuple[jax.Array, Selection]:
    """See :func:`pallas_kernels.attention.attend`; ``shown``: the branches whose outputs add up.

    ``launch`` has the branches in the order compressed, window, selected, and is scored where ``selected`` is None.
    """
    shape = launch.shape
    units = shape.batch * shape.num_kv_heads
    inputs = branches.arguments(launch, query, layer, page_table, lengths, tail, selected)
    if gates is not None:
        inputs["gates"] = gates
    # Zeros: the table of owners, then the counters, of each unit; and the next ticket.
    table = launch.workspace if launch.scored else 0
    workspace = jnp.zeros((shape.batch, shape.num_kv_heads, table + 3), jnp.int32)
    inputs |= {"workspace": workspace, "tickets": jnp.zeros(1, jnp.int32)}
    outputs = {name: jax.ShapeDtypeStruct(inputs[name].shape, jnp.int32) for name in ("workspace", "tickets")}
    outputs |= {"merged": merge.result(launch, query.dtype), **branches.results(launch)}
    if launch.scored:
        outputs |= selection.results(launch)
    # Both are changed in place; reading the output is right in interpret mode too.
    names = [*(f"{name}_before" if name in ("workspace", "tickets") else name for name in inputs), *outputs]
    parts = [(launch, "", shown)]
    counts = {index: branches.works(launch, index) for index in launch.branches}
    merges = merge.works(parts)
    selections = shape.width if launch.scored else 0
    attended = sum(counts.values()) - (counts[0] if launch.scored else 0)

    def kernel(*values: Any) -> None:
        refs = dict(zip(names, values, strict=True))
        ticket = pl.program_id(0)
        if not launch.interpret:
            ticket = plgpu.atomic_add(refs["tickets"], (0,), jnp.asarray(1, jnp.int32))
        work, unit = ticket // units, ticket % units
        refs |= {"head": unit % shape.num_kv_heads, "batch": unit // shape.num_kv_heads, "marks": refs["workspace"]}

        def wait(counter: int, count: int) -> Any:
            return lambda: _wait(launch, refs, table + counter, count)

        def signal(counter: int) -> Any:
            return lambda: _signal(launch, refs, table + counter)

        first = 0
        for index in launch.branches:
            if index == 1 and launch.scored:

                @pl.when((work >= first) & (work < first + selections))
                def _(first=first):
                    wait(SCORED, counts[0])()
                    selection.perform(launch, refs, work - first)
                    signal(SELECTED)()

                first += selections
            before = wait(SELECTED, selections) if index == 1 and launch.scored else None
            after = signal(SCORED if index == 0 and launch.scored else ATTENDED)
            branches.perform(launch, refs, index, work, first, before, after)
            first += counts[index]

        @pl.when(work >= first)
        def _():
            wait(ATTENDED, attended)()
            merge.perform(parts, refs, work - first)

    result = triton_call(
        kernel,
        *inputs.values(),
        out_shape=list(outputs.values()),
        grid=(units * (sum(counts.values()) + selections + merges),),
        num_warps=max(2, launch.num_warps),
        num_stages=launch.config.num_stages,
        interpret=launch.interpret,
        aliases={[*inputs].index(name): [*outputs].index(name) for name in ("workspace", "tickets")},
        name="nsa_layer" if launch.scored else "nsa_reuse_layer",
    )
    named = dict(zip(outputs, result, strict=True))
    if selected is None:
        selected = Selection(named["ids"], named.get("pages"), named.get("owners"), named.get("size"))
    return named["merged"], selected


def _wait(launch: Launch, refs: dict[str, Any], counter: int, count: int) -> None:
    """Until ``count`` programs have counted."""
    if launch.interpret:  # which runs one program after the other
        return
    at = (refs["batch"], refs["head"], counter)

    def read(_: Any) -> Any:
        # An atomic operation that changes nothing: it acquires what the counting programs released.
        return plgpu.atomic_or(refs["workspace"], at, jnp.asarray(0, jnp.int32))

    lax.while_loop(lambda seen: seen < count, read, read(None))
    plgpu.debug_barrier()


def _signal(launch: Launch, refs: dict[str, Any], counter: int) -> None:
    """Counts, when all that the program stored is there."""
    if launch.interpret:
        return
    plgpu.debug_barrier()
    plgpu.atomic_add(refs["workspace"], (refs["batch"], refs["head"], counter), jnp.asarray(1, jnp.int32))
