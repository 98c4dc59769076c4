"""Commit of an accepted path: one Pallas kernel a layer against XLA's scatters, each in a captured loop.

    python benchmarks/commit.py --out
    python benchmarks/commit.py --tune                        # every config of the search space
    python benchmarks/commit.py --interpret --tiny            # does the script run? (on a CPU)

All times in µs a layer, of several layers that a step commits one after the other; the loop carries their arrays, which
are updated in place. ``floor`` is the fraction of the speed at which the committed bytes could be read and written.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial

import harness
import jax
import jax.numpy as jnp

from pallas_kernels.commit import CommitConfig, Entries, commit, specs
from specsa_jax import cache
from specsa_jax.config import NSAConfig


def pallas(spec: specs.CommitSpec, page_table, interpret: bool, config: CommitConfig):
    """A step of the kernel: every layer gets the same new tokens, as a buffer holds them."""
    write = partial(commit, compress_block=spec.block, config=config, interpret=interpret)
    return lambda layers, buffer: [write(layer, buffer[0], page_table, *buffer[1:]) for layer in layers]


def xla(spec: specs.CommitSpec, page_table):
    """The same by ``specsa_jax.cache``, which computes the indices once for all layers."""
    sizes = dict(compress_block=spec.block, compress_stride=spec.stride, select_block=spec.page)
    nsa = NSAConfig(num_heads=spec.heads, num_kv_heads=spec.heads, head_dim=spec.dim, **sizes)

    def step(layers, buffer):
        new, lengths, path, count, slot = buffer
        positions = lengths[:, None] + jnp.arange(spec.width, dtype=jnp.int32)
        tail = cache.Tail(positions, ancestor=None, slot=slot, slot_back=None)
        before = cache.Cache([cache.LayerCache(**layer._asdict()) for layer in layers], page_table, lengths)
        tails = [cache.LayerTail(**new._asdict())] * len(layers)
        after = cache.commit(nsa, before, tails, tail, path, count, implementation="xla")
        return [Entries(**layer._asdict()) for layer in after.layers]

    return step


def run(spec: specs.CommitSpec, args: argparse.Namespace) -> list[dict]:
    layer, page_table, buffers = jax.device_put(spec.rotated(8))
    layers = [jax.tree.map(jnp.copy, layer) for _ in range(args.layers)]
    configs = CommitConfig.search_space(spec.shape) if args.tune else [CommitConfig.heuristic(spec.shape)]
    steps = {
        f"pallas {config.heads}h{config.num_warps}w": pallas(spec, page_table, args.interpret, config)
        for config in configs
    }
    steps["xla"] = xla(spec, page_table)

    # No figures from a wrong kernel.
    expected = jax.jit(steps["xla"])(layers, buffers[0])
    for name, step in steps.items():
        pairs = zip(jax.tree.leaves(jax.jit(step)(layers, buffers[0])), jax.tree.leaves(expected), strict=True)
        if not all(jnp.array_equal(actual, wanted, equal_nan=True) for actual, wanted in pairs):
            raise SystemExit(f"{spec.name}: {name} leaves another cache than xla")

    rows = []
    for name, step in steps.items():
        sizes = dict(iterations=1, repeats=1) if args.tiny else dict(seconds=args.seconds)
        timing = dataclasses.asdict(harness.measure(step, layers, buffers, **sizes))
        times = {field: value / args.layers for field, value in timing.items()}
        floor = harness.floor_fraction(spec.bytes, times)
        rows.append({"case": spec.name, "variant": name, **times, "floor": floor})
    return rows


def main() -> None:
    parser = harness.kernel_arguments(__doc__)
    parser.add_argument("--layers", type=harness.count, default=4, help="layers that a step commits")
    harness.run_cases(parser.parse_args(), specs.BENCHMARKS, specs.CommitSpec("tiny", (20, 9), (4, 3), width=4), run)


if __name__ == "__main__":
    harness.run(main)
