"""A model's decoding step as a loop that can be timed, on random caches of any length; its bytes. Shared by scripts."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax import model
from specsa_jax.cache import cache_bytes, chain, chain_slots, commit, create_cache, make_tail, pages_for
from specsa_jax.compiling import compiler_options
from specsa_jax.config import PRESETS, ModelConfig
from specsa_jax.nsa import kernels
from specsa_jax.nsa.cached import Backend
from specsa_jax.schedule import Sharing

# Of a device's memory; the rest is the allocator's, XLA's temporaries and what fragments.
USABLE = 0.92


def model_dtype() -> jnp.dtype:
    """bfloat16 on GPUs, float32 elsewhere, as the engine has it."""
    return jnp.dtype(jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32)


def random_cache(config: ModelConfig, context: int, room: int, batch: int, dtype):
    """``batch`` sequences of ``context`` committed tokens with values of no meaning."""
    columns = pages_for(config.nsa, context + room)
    table = np.arange(batch * columns).reshape(batch, columns)
    # Shapes alone: an empty cache beside the random one would take its memory twice.
    shapes = jax.eval_shape(lambda: create_cache(config, table, batch * columns, dtype))
    random = jax.jit(jax.random.normal, static_argnums=(1, 2))
    leaves, structure = jax.tree.flatten(shapes.layers)
    filled = [random(jax.random.key(i), leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
    lengths = jnp.full(batch, context, jnp.int32)
    return shapes._replace(
        layers=jax.tree.unflatten(structure, filled), page_table=jnp.asarray(table, jnp.int32), lengths=lengths
    )


def make_step(config: ModelConfig, sharing: Sharing, implementation, dtype, width: int):
    """One step as ``harness.measure`` wants it: (cache, tokens), params → the same.

    It verifies a chain of ``width`` tokens of each sequence, picks the most probable next ones, and commits one. A
    width of 1 is decoding one token at a time.
    """
    nsa = config.nsa
    backend = Backend(implementation, is_chain=True, group=sharing.group, group_mode=sharing.group_mode)

    def step(state, params):
        cache, tokens = state
        tail = make_tail(nsa, chain(width, nsa.compress_block), cache.lengths, chain_slots(nsa, width))
        hidden, tails = model.verify(
            config, params, tokens, cache, tail, dtype=dtype, backend=backend, schedule=sharing.schedule,
            keep_compressed=sharing.keep_compressed,
        )  # fmt: skip
        chosen = model.head(config, params, hidden, dtype).argmax(axis=-1).astype(jnp.int32)
        path = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
        after = commit(nsa, cache, tails, tail, path, jnp.ones_like(cache.lengths), implementation=implementation)
        return after._replace(lengths=cache.lengths), chosen  # the next step stands where this one did

    return step


def short(config: ModelConfig) -> int:
    """Tokens by which a timed step ends before its context, a multiple of d: half of d. So a compression block ends in
    it where one does in most steps of its T; where none does, φ has nothing to do."""
    return config.nsa.compress_stride // 2


def step_loop(
    config: ModelConfig,
    params: Any,
    context: int,
    batch: int,
    width: int,
    iterations: int,
    sharing: Sharing = Sharing(),
    loops: bool = False,
) -> harness.Loop:
    """The step's loop behind a random cache of ``context`` tokens, the step's own included, less :func:`short`.

    ``loops`` False: the host starts each step, so that the profiler sees its kernels."""
    dtype = model_dtype()
    implementation = kernels.choose(config.nsa, context, None)
    cache = random_cache(config, context - short(config) - width, width + short(config), batch, dtype)
    state = (cache, jnp.zeros((batch, width), jnp.int32))
    step = make_step(config, sharing, implementation, dtype, width)
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        options = compiler_options(dtype, loops=loops)
        return harness.Loop(step, state, [params], iterations, unroll=1, keep=False, options=options)


def steps_of(floor: float) -> int:
    """Steps between two looks at the clock, of at least ``floor`` µs each: a fifth of a second, as a call of
    ``Engine.generate`` has. Calling a compiled loop costs a GPU some milliseconds by itself."""
    return max(4, min(400, round(200e3 / floor)))


@dataclasses.dataclass(frozen=True)
class Needed:
    """Bytes that a step must read, each once: weights, and of the cache, per branch."""

    weights: int
    compressed: int
    selected: int
    window: int

    @property
    def total(self) -> int:
        return self.weights + self.compressed + self.selected + self.window

    @property
    def floor(self) -> float:
        """µs that the device takes to copy so many bytes."""
        return self.total / harness.copy_bandwidth() * 1e6


def needed_bytes(config: ModelConfig, context: int, batch: int, dtype, width: int) -> Needed:
    """What the step of ``width`` = T tokens in :func:`step_loop` must read at least.

    Of the selected blocks it counts n a sequence and KV head: as if all T queries of a step chose the same. Weights are
    all but the rows of an untied embedding that are not looked up, and φ where no compression block ends in the step.
    """
    nsa, item = config.nsa, jnp.dtype(dtype).itemsize
    shapes = jax.eval_shape(lambda: model.init_params(config, 0, dtype))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    if not config.tied:
        weights -= config.vocab_size * config.hidden * item
    if width <= short(config):
        phi = [
            layer["attn"][name] for layer in shapes["layers"].values() for name in layer["attn"] if "compress" in name
        ]
        weights -= sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(phi))
    token = nsa.num_kv_heads * nsa.head_dim * item * config.layers * batch
    entries = max(0, (context - nsa.compress_block) // nsa.compress_stride + 1)
    return Needed(
        weights=weights,
        compressed=(2 if nsa.compressed_output else 1) * entries * token,
        selected=2 * min(context, nsa.num_selected * nsa.select_block) * token,
        window=2 * min(context, nsa.window_tokens) * token if nsa.window_ring else 0,
    )


def device_memory() -> int | None:
    """Bytes that the device gives out; None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def too_large(config: ModelConfig, context: int, batch: int, dtype) -> str | None:
    """Why weights and cache do not fit the device, None if they do or it does not say."""
    limit = device_memory()
    shapes = jax.eval_shape(lambda: model.init_params(config, 0, dtype))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    cache = cache_bytes(config, batch * pages_for(config.nsa, context), batch, dtype).total
    if limit is None or weights + cache <= USABLE * limit:
        return None
    return f"needs {weights + cache:,} bytes of weights and cache, of {limit:,}"


def add_preset(parser: argparse.ArgumentParser, default: list[str]) -> None:
    """The option of the scripts that take presets with random weights."""
    parser.add_argument("--presets", nargs="+", choices=sorted(PRESETS), default=default, help="random weights")
