"""Decoding one token at a time with dense attention, by a model of the same shape: what sparse attention is up against.

Attention is jax.nn.dot_product_attention over a full KV cache, by cuDNN where there is a GPU and by XLA: the fastest
public call of JAX. The weights are random, and the step is as lean as it gets, in dense attention's favour: no page
table, no mask (every sequence fills its cache), no rotary embedding, one K/V projection where NSA has three. The whole
step is one compiled loop, on a GPU inside a CUDA graph or not, whichever is faster.

    python benchmarks/dense_decode.py --checkpoint embedded --contexts 4096 --batches 1 --out
    python benchmarks/dense_decode.py --preset 8b --contexts 65536 --batches 1 8 --out
"""

from __future__ import annotations

import dataclasses
import functools

import harness
import jax
import jax.numpy as jnp
from steps import USABLE, device_memory, model_dtype, steps_of

from specsa_jax import checkpoints
from specsa_jax.compiling import compiler_options
from specsa_jax.config import PRESETS, ModelConfig
from specsa_jax.nsa.rows import in_company


def shapes(config: ModelConfig) -> dict:
    """The weights, as shapes: a matrix each."""
    nsa, hidden = config.nsa, config.hidden
    layer = {
        "q": (hidden, nsa.num_heads * nsa.head_dim), "k": (hidden, nsa.num_kv_heads * nsa.head_dim),
        "v": (hidden, nsa.num_kv_heads * nsa.head_dim), "o": (nsa.num_heads * nsa.head_dim, hidden),
        "gate": (hidden, config.intermediate), "up": (hidden, config.intermediate),
        "down": (config.intermediate, hidden),
    }  # fmt: skip
    head = {} if config.tied else {"head": (hidden, config.vocab_size)}
    return {"embed": (config.vocab_size, hidden), "layers": [layer] * config.layers, **head}


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_array(key, shape, dtype):
    return (0.02 * jax.random.normal(key, shape)).astype(dtype)


def is_shape(leaf) -> bool:
    return isinstance(leaf, tuple) and isinstance(leaf[0], int)


def random_arrays(tree, dtype):
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_shape)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return structure.unflatten([random_array(key, shape, dtype) for key, shape in zip(keys, leaves, strict=True)])


def norm(x):
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt((x32 * x32).mean(axis=-1, keepdims=True) + 1e-5)).astype(x.dtype)


def make_step(config: ModelConfig, context: int, implementation: str | None):
    """(caches, tokens int32 [B, 1]), weights → the same: the token that ends ``context`` tokens."""
    nsa = config.nsa

    def project(x, layer):
        h = norm(x)
        return [(h @ layer[name]).reshape(*h.shape[:2], -1, nsa.head_dim) for name in "qkv"]

    def finish(x, out, layer):
        x = x + out.reshape(*x.shape[:2], -1) @ layer["o"]
        h = norm(x)
        return x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]

    def step(state, weights):
        caches, tokens = state
        x, after = weights["embed"][tokens], []
        for layer, (key, value) in zip(weights["layers"], caches, strict=True):
            query, *new = in_company(functools.partial(project, layer=layer), x)
            at = (0, context - 1, 0, 0)
            key, value = (jax.lax.dynamic_update_slice(*pair, at) for pair in zip((key, value), new, strict=True))
            out = jax.nn.dot_product_attention(query, key, value, implementation=implementation)
            x = in_company(functools.partial(finish, layer=layer), x, out)
            after.append((key, value))
        logits = norm(x) @ (weights["embed"].T if config.tied else weights["head"])
        return after, logits.argmax(axis=-1).astype(jnp.int32)

    return step


def row_of(config: ModelConfig, context: int, batch: int, implementation: str, seconds: float) -> dict:
    """One point's figures, or under ``not_run`` why there are none."""
    dtype, item, nsa = model_dtype(), model_dtype().itemsize, config.nsa
    cache = (batch, context, nsa.num_kv_heads, nsa.head_dim)
    tree = shapes(config)
    weight_bytes = item * sum(a * b for a, b in jax.tree.leaves(tree, is_leaf=is_shape))
    cache_bytes = item * 2 * config.layers * batch * context * nsa.num_kv_heads * nsa.head_dim
    looked_up = 0 if config.tied else item * config.vocab_size * config.hidden
    needed = weight_bytes - looked_up + cache_bytes
    limit = device_memory()
    if limit is not None and weight_bytes + cache_bytes > USABLE * limit:
        return {"not_run": f"needs {weight_bytes + cache_bytes:,} bytes of weights and cache, of {limit:,}"}
    weights, step = random_arrays(tree, dtype), make_step(config, context, implementation)

    def timing(loops: bool) -> harness.Timing:
        state = (random_arrays([(cache, cache)] * config.layers, dtype), jnp.zeros((batch, 1), jnp.int32))
        options, iterations = compiler_options(dtype, loops=loops), steps_of(needed / harness.copy_bandwidth() * 1e6)
        loop = harness.Loop(step, state, [weights], iterations, unroll=1, keep=False, options=options)
        return loop.timing(seconds=seconds)

    try:
        # The loop inside a CUDA graph, as the engine has it, or XLA's default: where a graph cannot hold all of a loop,
        # the option costs what graphs there are inside.
        timings = {loops: timing(loops) for loops in ((True, False) if jax.default_backend() == "gpu" else (False,))}
    except (ValueError, RuntimeError, *harness.FAILURES) as error:  # cuDNN has many ways to say no
        return harness.not_run(error)
    best = min(timings, key=lambda loops: timings[loops].median)
    return {
        "loops_in_graphs": best,
        "step_us": dataclasses.asdict(timings[best]),
        "tokens_per_second": batch * 1e6 / timings[best].median,
        "bytes": needed,
        "of_floor": harness.floor_fraction(needed, dataclasses.asdict(timings[best])),
    }


def main() -> None:
    parser = harness.arguments(__doc__, rows=True)
    parser.add_argument("--checkpoint", default="embedded", help="whose shape it is")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="a preset's shape instead")
    parser.add_argument("--contexts", type=harness.count, nargs="+", default=[65536, 16384, 4096])
    parser.add_argument("--batches", type=harness.count, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each figure's repeats")
    args = parser.parse_args()
    config = PRESETS[args.preset] if args.preset else checkpoints.load(args.checkpoint).config
    rows = harness.Rows(args, ("context", "batch", "implementation"),
                        f"_{args.preset}" if args.preset else "", model=args.preset or args.checkpoint,
                        dtype=str(model_dtype()))  # fmt: skip
    implementations = ["cudnn", "xla"] if jax.default_backend() == "gpu" else ["xla"]
    for context in args.contexts:
        for batch in args.batches:
            for implementation in implementations:
                axes = {"context": context, "batch": batch, "implementation": implementation}
                if rows.wanted(**axes):
                    rows.add(axes | row_of(config, context, batch, implementation, args.seconds))
    rows.save()


if __name__ == "__main__":
    harness.run(main)
