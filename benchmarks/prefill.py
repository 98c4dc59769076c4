"""Time and peak memory of prefilling a long prompt, for a preset with random weights.

python benchmarks/prefill.py --preset 8b --tokens 65536 --out
"""

from __future__ import annotations

import resource
import sys
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax.cache import cache_bytes, create_cache, pages_for
from specsa_jax.config import PRESETS, preset
from specsa_jax.decoding import Decoder, State
from specsa_jax.model import init_params
from specsa_jax.nsa import kernels


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="embedded")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--chunk", type=int, default=512 if jax.default_backend() == "gpu" else 64)
    parser.add_argument("--implementation", choices=("pallas", "xla"), help="of attention; default: what runs here")
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
    prefill = decoder.prefill.lower(params, state(), jnp.int32(2**30), chunk=args.chunk).compile()
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
    harness.print_table([row])
    if path := harness.out_path(args, f"_{args.preset}_{args.tokens // 1024}k"):
        harness.save(path, [row])


if __name__ == "__main__":
    main()
