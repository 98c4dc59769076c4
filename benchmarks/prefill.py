"""Time and peak memory of prefilling a long prompt, for a preset with random weights.

With --dense also what dense causal attention of the same heads takes for the whole prompt, by JAX's fastest public call
(jax.nn.dot_product_attention: cuDNN on a GPU, else XLA): a layer's time, times layers, without projections; and, on a
GPU, from a traced run, the time in attention's launches, nsa_kernel_seconds (φ and commit are not in it), and that in
all kernels.

    python benchmarks/prefill.py --preset 8b --tokens 65536 --dense --out
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax.cache import cache_bytes, create_cache, pages_for
from specsa_jax.compiling import compiler_options
from specsa_jax.config import PRESETS, ModelConfig, preset
from specsa_jax.decoding import Decoder, State
from specsa_jax.model import init_params
from specsa_jax.nsa import kernels


def dense_attention(config: ModelConfig, tokens: int, dtype) -> dict[str, Any]:
    """Seconds of dense attention over a prompt in all layers, or why there are none."""
    nsa, implementation = config.nsa, "cudnn" if jax.default_backend() == "gpu" else "xla"
    query, key, value = (
        jax.random.normal(jax.random.key(seed), (1, tokens, heads, nsa.head_dim), dtype)
        for seed, heads in enumerate((nsa.num_heads, nsa.num_kv_heads, nsa.num_kv_heads))
    )

    def step(query, keys):
        return jax.nn.dot_product_attention(query, *keys, is_causal=True, implementation=implementation)

    try:
        timing = harness.measure(step, query, [(key, value)], iterations=4, repeats=5, unroll=1)
    except (ValueError, RuntimeError, *harness.FAILURES) as error:  # cuDNN has many ways to say no
        return {"dense_not_run": harness.not_run(error)["not_run"]}
    return {"dense_implementation": implementation, "dense_seconds": config.layers * timing.median / 1e6}


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="embedded")
    parser.add_argument("--tokens", type=harness.count, default=16384)
    parser.add_argument("--chunk", type=harness.count, default=512 if jax.default_backend() == "gpu" else 64)
    parser.add_argument("--implementation", choices=("pallas", "xla"), help="of attention; default: what runs here")
    parser.add_argument("--dense", action="store_true", help="compare with dense attention")
    args = parser.parse_args()

    config = preset(args.preset)
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    params = jax.block_until_ready(init_params(config, 0, dtype))
    pages = pages_for(config.nsa, args.tokens + 1)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(1, pages * config.nsa.select_block + 1))

    def state() -> State:
        cache = create_cache(config, np.arange(pages)[None], pages, dtype)
        known = jnp.array([args.tokens + 1], jnp.int32)
        return State(cache, jnp.asarray(tokens, jnp.int32), known, known + 1, jnp.zeros(1, bool),
                     jnp.zeros(tokens.shape, jnp.float32))  # fmt: skip

    implementation = kernels.choose(config.nsa, args.tokens, args.implementation)
    decoder = Decoder(config, dtype, implementation=implementation)
    begun = time.perf_counter()
    prefill = decoder.prefill.lower(params, state(), jnp.int32(2**30), chunk=args.chunk)
    prefill = prefill.compile(compiler_options(dtype, loops=False))  # the profiler shall see its kernels
    compiled = time.perf_counter()
    print(f"compiled in {compiled - begun:.0f} s", file=sys.stderr, flush=True)
    done = jax.block_until_ready(prefill(params, state(), jnp.int32(2**30)))
    seconds = time.perf_counter() - compiled
    assert int(done.cache.lengths[0]) == args.tokens
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    host_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    row = {
        "preset": args.preset,
        "dtype": str(jnp.dtype(dtype)),
        "tokens": args.tokens,
        "chunk": args.chunk,
        "implementation": implementation,
        "seconds": seconds,
        "tokens_per_second": args.tokens / seconds,
        "compile_seconds": compiled - begun,
        "peak_bytes": stats.get("peak_bytes_in_use", host_peak),
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "cache_bytes": cache_bytes(config, pages, 1, dtype).total,
        "temporary_bytes": prefill.memory_analysis().temp_size_in_bytes,
    }
    if args.dense:
        del done
        _, events = harness.trace(lambda: jax.block_until_ready(prefill(params, state(), jnp.int32(2**30))).known)
        if events:
            row["nsa_kernel_seconds"] = sum(e.duration for e in events if e.name.startswith("nsa_")) / 1e6
            row["kernel_seconds"] = sum(e.duration for e in events) / 1e6
        row |= dense_attention(config, args.tokens, dtype)
    harness.print_table([row])
    if path := harness.out_path(args, f"_{args.preset}_{args.tokens // 1024}k"):
        harness.save(path, [row])


if __name__ == "__main__":
    harness.run(main)
