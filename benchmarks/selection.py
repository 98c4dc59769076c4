"""Block selection: the Pallas kernel against ``lax.top_k``, each in a captured loop.

    python benchmarks/selection.py --out
    python benchmarks/selection.py --tune                     # every config of the search space
    python benchmarks/selection.py --interpret --tiny         # does the script run? (on a CPU)

All times in µs. ``config``: the kernel's is what a call takes on the device, "tuned" where ``specsa tune`` has measured
one, else "heuristic"; with --tune "searched". ``link`` is the cost of the operation that makes one call depend on the
one before; it is taken off the others. ``floor`` is the kernel's fraction of the speed at which its bytes could move.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial

import harness
import jax
import jax.numpy as jnp

from pallas_kernels import tuned
from pallas_kernels.selection import SelectionConfig, select_blocks, specs


def link(positions, ids):
    """Positions that depend on ``ids`` and are what they were: full rows hold no −1, which XLA does not know."""
    least = ids.min(axis=(-2, -1))[..., None]
    return jax.lax.optimization_barrier(positions + (least >> 31))


def chosen(spec: specs.SelectionSpec, tune: bool, interpret: bool) -> tuple[str, list[SelectionConfig]]:
    """The configs to measure, and where they are from."""
    sizes = spec.rows, spec.shape[-1]
    if tune:
        return "searched", SelectionConfig.search_space(*sizes)
    # As ``select_blocks`` does.
    found = None if interpret else tuned.lookup_selection(jax.devices()[0].device_kind, *sizes)
    return ("tuned", [found]) if found else ("heuristic", [SelectionConfig.heuristic(*sizes)])


def variants(spec: specs.SelectionSpec, configs: list[SelectionConfig], interpret: bool):
    """Name → function of (importance, positions) that gives ids."""
    select = partial(select_blocks, **spec.counts)
    functions = {
        f"pallas {config.num_warps}w": partial(select, implementation="pallas", interpret=interpret, config=config)
        for config in configs
    }
    functions["xla"] = partial(select, implementation="xla")
    # One mask, for the dependence on positions, but no forced blocks, order or padding.
    functions["top_k"] = lambda scores, positions: jax.lax.top_k(
        jnp.where(positions[..., None] < 0, 0, scores), spec.num_selected
    )[1]
    return functions


def run(spec: specs.SelectionSpec, args: argparse.Namespace) -> list[dict]:
    arguments = [spec.arguments(seed) for seed in range(1 if args.tiny else 8)]
    buffers = [jax.device_put(scores) for scores, _ in arguments]
    positions = jax.device_put(arguments[0][1])
    source, configs = chosen(spec, args.tune, args.interpret)
    functions = variants(spec, configs, args.interpret)

    # No figures from a wrong kernel.
    expected = jax.jit(functions["xla"])(buffers[0], positions)
    for name, function in functions.items():
        if name != "top_k" and not jnp.array_equal(jax.jit(function)(buffers[0], positions), expected):
            raise SystemExit(f"{spec.name}: {name} selects other blocks than xla")

    sizes = dict(iterations=1, repeats=1) if args.tiny else dict(seconds=args.seconds)
    empty = harness.measure(link, positions, [expected] * len(buffers), **sizes).median
    rows = []
    for name, function in functions.items():

        def step(positions, scores, function=function):
            return link(positions, function(scores, positions))

        timing = harness.measure(step, positions, buffers, **sizes)
        times = {field: value - empty for field, value in dataclasses.asdict(timing).items()}
        floor = harness.floor_fraction(spec.bytes, times)
        config = source if name.startswith("pallas") else ""
        rows.append({"case": spec.name, "variant": name, "config": config, **times, "link": empty, "floor": floor})
    return rows


def main() -> None:
    tiny = specs.SelectionSpec("tiny", (1, 2, 2, 32), positions_shape=(1, 2, 1))
    harness.run_cases(harness.kernel_arguments(__doc__).parse_args(), specs.BENCHMARKS, tiny, run)


if __name__ == "__main__":
    harness.run(main)
