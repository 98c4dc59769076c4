"""Selection in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def select_blocks(
    importance: jax.Array,
    positions: jax.Array,
    *,
    select_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
) -> jax.Array:
    """See :func:`pallas_kernels.selection.select_blocks`; ``positions`` has the rank of ``importance`` less one."""
    num_blocks = importance.shape[-1]
    ids = lax.broadcasted_iota(jnp.int32, importance.shape, importance.ndim - 1)
    own = (positions // select_block)[..., None]
    score = jnp.where(importance > 0, jnp.minimum(importance, jnp.finfo(jnp.float32).max), 0)
    score = jnp.where((ids < num_initial) | (ids > own - num_local), jnp.inf, score)
    # top_k keeps the lower index first among equals, which is the tie rule.
    score, chosen = lax.top_k(jnp.where(ids <= own, score, -1), min(num_selected, num_blocks))
    chosen = jnp.sort(jnp.where(score >= 0, chosen.astype(jnp.int32), num_blocks), axis=-1)
    padding = [(0, 0)] * (importance.ndim - 1) + [(0, num_selected - chosen.shape[-1])]
    return jnp.pad(jnp.where(chosen == num_blocks, -1, chosen), padding, constant_values=-1)
