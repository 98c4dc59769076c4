"""Rotary position embedding, rotate-half layout (Su et al. 2021), with the scalings of public checkpoints."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax.config import RopeConfig


@functools.lru_cache
def frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angular frequencies float32 [D/2], and the factor on cos and sin (1 except for YaRN and LongRoPE)."""
    pairs = head_dim // 2
    base = config.theta ** -(np.arange(pairs, dtype=np.float64) * 2 / head_dim)
    attention_factor = 1.0
    if config.kind == "linear":
        base = base / config.factor
    elif config.kind == "llama3":
        wavelength = 2 * np.pi / base
        low, high = config.low_freq_factor, config.high_freq_factor
        # 0: stretched in full; 1: left alone; in between: blended by how many turns fit the original context.
        keep = np.clip((config.original_length / wavelength - low) / (high - low), 0.0, 1.0)
        base = base * (keep + (1 - keep) / config.factor)
    elif config.kind == "yarn":

        def pair_that_turns(rotations: float) -> float:
            turns = math.log(config.original_length / (rotations * 2 * math.pi))
            return head_dim * turns / (2 * math.log(config.theta))

        low_pair = max(math.floor(pair_that_turns(config.beta_fast)), 0)
        high_pair = min(math.ceil(pair_that_turns(config.beta_slow)), head_dim - 1)
        ramp = np.clip((np.arange(pairs) - low_pair) / max(high_pair - low_pair, 0.001), 0.0, 1.0)
        base = base * ((1 - ramp) + ramp / config.factor)
        attention_factor = 0.1 * math.log(config.factor) + 1.0
    elif config.kind == "longrope":
        base = base / np.asarray(config.factors, np.float64)
        attention_factor = math.sqrt(1.0 + math.log(config.factor) / math.log(config.original_length))
    return base.astype(np.float32), attention_factor


def rotate(x: jax.Array, positions: jax.Array, config: RopeConfig) -> jax.Array:
    """Rotates x [..., heads, D] by its positions int32 [...]; angles in float32, result in x's dtype."""
    freqs, factor = frequencies(config, x.shape[-1])
    return _rotate(x, positions, freqs.reshape((1,) * positions.ndim + (1, -1)), factor)


def rotate_query(x: jax.Array, positions: jax.Array, config: RopeConfig) -> jax.Array:
    """:func:`rotate` for queries, whose frequencies may span all heads."""
    if config.query_span == "head":
        return rotate(x, positions, config)
    freqs, factor = frequencies(config, x.shape[-2] * x.shape[-1])
    return _rotate(x, positions, freqs.reshape((1,) * positions.ndim + (x.shape[-2], -1)), factor)


def cos_sin(positions: jax.Array, head_dim: int, config: RopeConfig) -> jax.Array:
    """What :func:`rotate` multiplies by at positions int32 [...]: cosines and sines, float32 [2, ..., D/2]."""
    freqs, factor = frequencies(config, head_dim)
    angles = positions.astype(jnp.float32)[..., None] * freqs
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * factor


def _rotate(x: jax.Array, positions: jax.Array, freqs: np.ndarray, factor: float) -> jax.Array:
    angles = positions.astype(jnp.float32)[..., None, None] * freqs
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
