"""NSA over whole sequences, differentiable, in chunks of queries: for training, and where no cache is wanted.

The selected branch is a mask over all keys of a chunk of queries: O(chunk · S) memory, no array of size S × S, dense
arithmetic that matrix units like, and gradients without scatters. Gather-based sparsity belongs to the cached path.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specsa_jax.config import NSAConfig, RopeConfig
from specsa_jax.nsa.compression import Compress, compress_blocks
from specsa_jax.nsa.selection import block_importance, select_blocks
from specsa_jax.nsa.softmax import Keys, attend, combine, softmax_parts
from specsa_jax.rope import rotate


class Projected(NamedTuple):
    """What a layer's projections make of T new tokens.

    Attributes:
      query: [B, T, Hq, D], rotated.
      key, value: [B, T, sets, Hkv, D], raw (unrotated); set order compressed, selected, window, or one set for all.
      gates: float32 [B, T, Hq, 3] after the sigmoid, or None.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    gates: jax.Array | None


def split_groups(config: NSAConfig, heads: jax.Array) -> jax.Array:
    """[..., Hq, D] → [..., Hkv, G, D]."""
    return heads.reshape(*heads.shape[:-2], config.num_kv_heads, config.group, heads.shape[-1])


def attend_sequence(
    config: NSAConfig,
    rope: RopeConfig,
    phi_key: Compress,
    phi_value: Compress | None,
    projected: Projected,
    query_chunk: int,
) -> jax.Array:
    """Output [B, S, Hq, D] of every position of whole sequences, in the queries' dtype."""
    batch, length = projected.query.shape[:2]
    block, stride, page = config.compress_block, config.compress_stride, config.select_block
    compressed_set, selected_set, window_set = config.branch_set
    positions = jnp.arange(length, dtype=jnp.int32)

    rotated = rotate(projected.key, positions[None, :, None], rope)
    key, value = rotated[:, :, selected_set], projected.value[:, :, selected_set]
    num_compressed = max((length - block) // stride + 1, 0)
    starts = jnp.arange(num_compressed, dtype=jnp.int32) * stride
    offsets = starts[:, None] + jnp.arange(block, dtype=jnp.int32)
    compressed_key, compressed_value = compress_blocks(
        config, rope, phi_key, phi_value,
        projected.key[:, offsets, compressed_set], projected.value[:, offsets, compressed_set], starts[None],
    )  # fmt: skip
    num_blocks = -(-length // page)

    # The window's keys of a chunk are one slice; queries are padded to whole chunks.
    chunk = min(query_chunk, length)
    padded = -(-length // chunk) * chunk
    reach = config.window_tokens - 1
    pad = [(0, 0), (reach, padded - length), (0, 0), (0, 0)]
    window_key, window_value = jnp.pad(rotated[:, :, window_set], pad), jnp.pad(projected.value[:, :, window_set], pad)

    def dots(query: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.einsum("bthgd,bshd->bthgs", query, keys, preferred_element_type=jnp.float32) * config.softmax_scale

    def keys_of(query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> Keys:
        def weigh(probs: jax.Array) -> jax.Array:
            return jnp.einsum(
                "bthgs,bshd->bthgd", probs.astype(values.dtype), values, preferred_element_type=jnp.float32
            )

        return Keys(dots(query, keys), visible, weigh)

    @jax.checkpoint
    def one_chunk(start: jax.Array, query: jax.Array) -> tuple[jax.Array | None, ...]:
        """Branch outputs float32 [B, chunk, Hkv, G, D] of the queries [B, chunk, Hkv, G, D] from ``start`` on."""
        at = start + jnp.arange(chunk, dtype=jnp.int32)
        ended = (starts + block - 1)[None, :] <= at[:, None]
        compressed_out = None
        importance = jnp.zeros((batch, chunk, config.num_kv_heads, num_blocks))
        if num_compressed:
            part = keys_of(query, compressed_key, compressed_key if compressed_value is None else compressed_value,
                           ended[None, :, None, None, :])  # fmt: skip
            (probs,) = softmax_parts([part])
            # Selection is discrete: no gradient flows through it.
            summed = jax.lax.stop_gradient(probs).sum(axis=-2)
            importance = block_importance(config, summed, num_blocks)
            if config.compressed_output:
                compressed_out = part.weigh(probs)
        elif config.compressed_output:
            compressed_out = jnp.zeros(query.shape, jnp.float32)
        selected = select_blocks(config, importance, jnp.broadcast_to(at, (batch, chunk)))
        chosen = (selected[..., None] == jnp.arange(num_blocks, dtype=jnp.int32)).any(axis=-2)
        causal = positions[None, :] <= at[:, None]
        visible = jnp.repeat(chosen, page, axis=-1)[..., :length] & causal[None, :, None, :]
        if config.fused_selected_window:
            visible |= (positions[None, :] > at[:, None] - config.window_tokens)[None, :, None, :] & causal[
                None, :, None, :
            ]
        selected_keys = keys_of(query, key, value, visible[:, :, :, None, :])
        selected_out, window_out = attend([selected_keys]), None
        if not config.fused_selected_window:
            near_key = jax.lax.dynamic_slice_in_dim(window_key, start, reach + chunk, axis=1)
            near_value = jax.lax.dynamic_slice_in_dim(window_value, start, reach + chunk, axis=1)
            near = start - reach + jnp.arange(reach + chunk, dtype=jnp.int32)
            inside = (near >= 0) & (near <= at[:, None]) & (near > at[:, None] - config.window_tokens)
            window_out = attend([keys_of(query, near_key, near_value, inside[None, :, None, None, :])])
        dense_out = None
        if config.dense_len:
            dense_out = attend([selected_keys._replace(visible=causal[None, :, None, None, :])])
        return compressed_out, selected_out, window_out, dense_out

    query = split_groups(config, projected.query)
    query = jnp.pad(query, [(0, 0), (0, padded - length)] + [(0, 0)] * 3)
    chunks = jnp.moveaxis(query.reshape(batch, padded // chunk, chunk, *query.shape[2:]), 1, 0)
    begins = jnp.arange(padded // chunk, dtype=jnp.int32) * chunk
    outs = jax.lax.map(lambda args: one_chunk(*args), (begins, chunks))
    merged = [
        None if out is None else jnp.moveaxis(out, 0, 1).reshape(batch, padded, *projected.query.shape[2:])[:, :length]
        for out in outs
    ]
    out = combine(projected.gates, merged[:3])
    if merged[3] is not None:
        dense = (positions + 1 < config.dense_len)[None, :, None, None]
        out = jnp.where(dense, merged[3], out)
    return out.astype(projected.query.dtype)
