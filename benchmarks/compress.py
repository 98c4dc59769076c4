"""φ of the compression blocks that end in a tail: the Pallas kernels against XLA's code, each in a captured loop.

    python benchmarks/compress.py --out
    python benchmarks/compress.py --tune                      # every config of the search space
    python benchmarks/compress.py --interpret --tiny          # does the script run? (on a CPU)

All times in µs a layer. The loop carries rings and tails, as if they depended on the layer before; ``link`` is the cost
of that, which is taken off the others. ``floor`` is the fraction of the speed at which φ's weights could be read; none
where no block ends: there the kernels leave at once, and XLA's code computes the unused slots.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from functools import partial

import harness
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import tuned
from pallas_kernels.compress import CompressConfig, Side, compress, specs
from specsa_jax.cache import LayerCache, Tail
from specsa_jax.config import NSAConfig, RopeConfig
from specsa_jax.nsa import cached
from specsa_jax.nsa.compression import Compress
from specsa_jax.nsa.rows import together
from specsa_jax.rope import cos_sin

# φ's weights rotate, so that each call reads them from HBM: together they are larger than an L2 cache.
ROTATED_BYTES, ROPE = 120e6, RopeConfig()


def xla(spec: specs.CompressSpec, slot, back, start):
    """What a model does without the kernels, as a function of the keys' and the values' :class:`Side`."""
    nsa = NSAConfig(num_heads=spec.heads, num_kv_heads=spec.heads, head_dim=spec.dim, compress_block=spec.block,
                    compress_stride=spec.block, select_block=spec.block, compress_hidden=spec.hidden)  # fmt: skip
    build = partial(Compress, nsa, has_position=True, dtype=jnp.dtype(spec.dtype))
    graph, state = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    tail = Tail(positions=None, ancestor=None, slot=slot, slot_back=back)

    def phi(side):
        weights = {"position": side.position, "weight_in": side.weight, "weight_out": side.weight_out}
        nnx.replace_by_pure_dict(own := jax.tree.map(lambda leaf: leaf, state), weights)
        return nnx.merge(graph, own)

    def run(key, value):
        layer = LayerCache(*[None] * len(LayerCache._fields))._replace(raw_key=key.ring, raw_value=value.ring)
        return cached._compress_blocks(
            nsa, ROPE, phi(key), phi(value), layer, key.fresh, value.fresh, tail, start, together
        )

    return run


def link(entries, out):
    """Entries that depend on all of ``out`` and are what they were, if none of its first values is infinite, which XLA
    does not know. (Where no slot is used they may be anything; values do not change what a call takes.)"""
    firsts = jnp.stack([array.reshape(-1)[0] for array in jax.lax.optimization_barrier(out)])
    infinite = jnp.isinf(firsts).any()
    return jax.lax.optimization_barrier(jax.tree.map(lambda array: array + infinite.astype(array.dtype), entries))


def run(spec: specs.CompressSpec, args: argparse.Namespace) -> list[dict]:
    *sides, slot, back, start, _ = jax.device_put(spec.arguments())
    entries, weights = [side[:2] for side in sides], [side[2:] for side in sides]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    # Where they lie matters, not what they are.
    copies = 0 if args.tiny else math.ceil(ROTATED_BYTES / size) - 1
    buffers = [weights, *(jax.tree.map(jnp.copy, weights) for _ in range(copies))]
    measured = tuned.lookup_compress(jax.devices()[0].device_kind, spec.shape)
    configs = [measured or CompressConfig.heuristic(spec.shape)]
    if args.tune:
        configs = CompressConfig.search_space(spec.shape)
    others = dict(slot=slot, back=back, start=start, rotation=cos_sin(start, spec.dim, ROPE), interpret=args.interpret)
    functions = {
        f"pallas {config.rows}r{config.columns}c{config.splits}s{config.offsets}o{config.num_warps}w"
        f"{config.num_stages}p": partial(compress, **others, config=config)
        for config in configs
    }
    functions["xla"] = xla(spec, slot, back, start)

    # No figures from a wrong kernel; what unused slots hold is arbitrary.
    expected, used = jax.jit(functions["xla"])(*sides), np.asarray(slot) < spec.nodes
    tolerance = 2e-2 if spec.dtype == "bfloat16" else 2e-5
    for name, function in functions.items():
        for actual, wanted in zip(jax.jit(function)(*sides), expected, strict=True):
            actual, wanted = (np.asarray(array)[used].astype(np.float32) for array in (actual, wanted))
            if not np.allclose(actual, wanted, rtol=tolerance, atol=tolerance):
                raise SystemExit(f"{spec.name}: {name} gives other entries than xla")

    sizes = dict(iterations=1, repeats=1) if args.tiny else dict(seconds=args.seconds)
    empty = harness.measure(link, entries, [expected] * len(buffers), **sizes).median
    rows = []
    for name, function in functions.items():

        def step(entries, weights, function=function):
            return link(entries, function(*(Side(*own, *phi) for own, phi in zip(entries, weights, strict=True))))

        timing = harness.measure(step, entries, buffers, **sizes)
        times = {field: value - empty for field, value in dataclasses.asdict(timing).items()}
        floor = harness.floor_fraction(spec.bytes, times) if spec.bytes else None
        rows.append({"case": spec.name, "variant": name, **times, "link": empty, "floor": floor})
    return rows


def main() -> None:
    tiny = specs.CompressSpec("tiny", (1, 0), slots=2)
    harness.run_cases(harness.kernel_arguments(__doc__).parse_args(), specs.BENCHMARKS, tiny, run)


if __name__ == "__main__":
    harness.run(main)
