"""The draft head over whole sequences, several steps deep: what its training differentiates.

EAGLE-3's training-time test (arXiv 2503.01840): step k of the head reads what its step k − 1 put out, as in decoding,
so that it learns to go on from its own states.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from specsa_jax.drafting.head_model import HeadConfig, Params, bind, embed
from specsa_jax.nsa.softmax import Keys, attend


def unroll(
    config: HeadConfig, params: Params, target: Params, tokens: jax.Array, features: jax.Array, steps: int
) -> jax.Array:
    """States [steps, B, S, H] of slots 1 … S of whole sequences, differentiable in ``params``.

    ``tokens`` int32 [B, S] are x_1 … x_S; ``features`` [B, S, F, H] those of positions 0 … S − 1. Entry [k, :, i] is
    slot i + 1 as it is when the k slots before it were drafted: their states, and so its own input state, are the
    head's; the slots before those have the target's features. Entries with i < k have
    no such past and are meaningless. Computes in the dtype of ``features``.
    """
    dtype = features.dtype
    head = bind(config, params, dtype)
    token = embed(config, target, tokens, dtype)
    positions = 1 + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    state, outs = head.fused(features), []
    past: list[list[tuple[jax.Array, jax.Array]]] = [[] for _ in head.layers]  # K/V by layer, then by step
    graph, weights = nnx.split(head)

    @functools.partial(jax.checkpoint, static_argnums=0)
    def one_step(step: int, weights: Any, state: jax.Array, past: Any) -> tuple[jax.Array, list[Any]]:
        new = []
        for layer, earlier in zip(nnx.merge(graph, weights).layers, past, strict=True):
            query, key, value = layer.project(token, state, positions)
            new.append((key, value))
            state = layer.finish(state, _windowed(config, query, [*earlier, new[-1]]))
        return state, new

    for step in range(steps):
        if step:
            state = jnp.pad(state, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        state, new = one_step(step, weights, state, past)
        for earlier, entry in zip(past, new, strict=True):
            earlier.append(entry)
        outs.append(state)
    return jnp.stack(outs)


def _windowed(config: HeadConfig, query: jax.Array, steps: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Attention float32 [B, S, Hkv, G, D] of the last step's queries [B, S, Hkv, G, D].

    ``steps``: K/V [B, S, Hkv, D] of every step so far. With k steps behind it, query i sees step 0's keys up to i − k,
    and one key each of the steps m = 1 … k: that of slot i − k + m. Blocks of a window's size see two such blocks.
    """
    k, (batch, size) = len(steps) - 1, query.shape[:2]
    block = min(config.window, size)
    count = -(-size // block)

    def blocks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * block - size)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, count, block, *x.shape[2:])

    def two_blocks(x: jax.Array) -> jax.Array:
        own = blocks(x)
        before = jnp.pad(own, [(0, 0), (1, 0)] + [(0, 0)] * (own.ndim - 2))[:, :-1]
        return jnp.concatenate([before, own], axis=2)

    query, scale = blocks(query), config.head_dim**-0.5
    key, value = map(two_blocks, steps[0])
    at, key_at = jnp.arange(block), jnp.arange(2 * block) - block
    distance = at[:, None] - key_at
    first = (jnp.arange(count) > 0)[:, None, None] | (key_at >= 0)  # the first block has none before it
    visible = (distance >= k) & (distance < config.window) & first  # [count, block, 2·block]
    parts = [Keys(
        jnp.einsum("bnahgd,bnchd->bnahgc", query, key, preferred_element_type=jnp.float32) * scale,
        visible[None, :, :, None, None],
        lambda p: jnp.einsum("bnahgc,bnchd->bnahgd", p.astype(value.dtype), value, preferred_element_type=jnp.float32),
    )]  # fmt: skip
    if k:

        def own_path(kind: int) -> jax.Array:
            shifted = [
                jnp.pad(step[kind], ((0, 0), (k - m, 0), (0, 0), (0, 0)))[:, :size] for m, step in enumerate(steps)
            ]
            return blocks(jnp.stack(shifted[1:], axis=2))  # [B, count, block, k, Hkv, D]

        drafted_key, drafted_value = own_path(0), own_path(1)
        parts.append(Keys(
            jnp.einsum("bnahgd,bnamhd->bnahgm", query, drafted_key, preferred_element_type=jnp.float32) * scale,
            jnp.asarray(True),
            lambda p: jnp.einsum("bnahgm,bnamhd->bnahgd", p.astype(drafted_value.dtype), drafted_value,
                                 preferred_element_type=jnp.float32),
        ))  # fmt: skip
    return attend(parts).reshape(batch, count * block, *query.shape[3:])[:, :size]
