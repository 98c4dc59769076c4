"""From compressed-attention probabilities to the selection blocks of each query (the paper's equations 8 to 12)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from specsa_jax.config import NSAConfig


def block_importance(config: NSAConfig, probs: jax.Array, num_blocks: int) -> jax.Array:
    """Importance float32 [..., num_blocks] of selection blocks.

    ``probs`` float32 [..., C]: probability of compression block c, summed over the G heads of the group.
    """
    weights, per_block = config.overlap_weights(), config.blocks_per_page
    before = max(0, -min(weights))
    after = max(0, num_blocks * per_block + max(weights) - probs.shape[-1])
    padded = jnp.pad(probs, [(0, 0)] * (probs.ndim - 1) + [(before, after)])
    reach = (num_blocks - 1) * per_block + 1
    total = jnp.zeros((*probs.shape[:-1], num_blocks), probs.dtype)
    for offset, weight in weights.items():
        start = before + offset
        part = jax.lax.slice_in_dim(padded, start, start + reach, per_block, axis=-1)
        total = jnp.maximum(total, part) if config.score_map == "max" else total + weight * part
    return total


def select_blocks(config: NSAConfig, importance: jax.Array, positions: jax.Array) -> jax.Array:
    """Ids int32 [..., Hkv, n] of the selected blocks, ascending, −1 padded.

    ``importance`` float32 [..., Hkv, N]; ``positions`` int32 [...] of the queries. Forced blocks come first, then by
    importance, ties to the lower id; only blocks that begin at or before the query.
    """
    num_blocks, n = importance.shape[-1], config.num_selected
    ids = jnp.arange(num_blocks, dtype=jnp.int32)
    own = (positions // config.select_block)[..., None]
    begun = ids.reshape((1,) * positions.ndim + (-1,)) <= own
    forced = (ids < config.num_initial) | (ids > own - config.num_local)
    score = jnp.where(begun[..., None, :], jnp.where(forced[..., None, :], jnp.inf, importance), -jnp.inf)
    # top_k keeps the lower index first among equals, which is the tie rule.
    top, chosen = jax.lax.top_k(score, min(n, num_blocks))
    chosen = jnp.sort(jnp.where(top > -jnp.inf, chosen.astype(jnp.int32), num_blocks), axis=-1)
    chosen = jnp.where(chosen == num_blocks, -1, chosen)
    return jnp.pad(chosen, [(0, 0)] * (chosen.ndim - 1) + [(0, n - chosen.shape[-1])], constant_values=-1)
