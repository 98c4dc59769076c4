"""Attention over several lists of keys that share one softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a row without visible keys gives 0 and never NaN, forward and backward.
MASKED = -1e30


class Keys(NamedTuple):
    """One list of keys as seen by all queries.

    Attributes:
      scores: float32 [..., K] scaled dot products.
      visible: bool, broadcastable to ``scores``.
      weigh: maps probabilities [..., K] (in the values' dtype) to Σ p·v, float32 [..., D].
    """

    scores: jax.Array
    visible: jax.Array
    weigh: Callable[[jax.Array], jax.Array]


def softmax_parts(parts: Sequence[Keys]) -> list[jax.Array]:
    """Probabilities float32 [..., K] per part, one softmax over the visible keys of all; 0 where nothing is visible."""
    masked = [jnp.where(part.visible, part.scores, MASKED) for part in parts]
    top = masked[0].max(axis=-1, keepdims=True)
    for scores in masked[1:]:
        top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    weights = [jnp.where(part.visible, jnp.exp(scores - top), 0.0) for part, scores in zip(parts, masked, strict=True)]
    total = sum(weight.sum(axis=-1, keepdims=True) for weight in weights)
    return [weight / jnp.where(total == 0.0, 1.0, total) for weight in weights]


def attend(parts: Sequence[Keys]) -> jax.Array:
    """The attention output float32 [..., D] over all parts."""
    probs = softmax_parts(parts)
    return sum(part.weigh(p) for part, p in zip(parts[1:], probs[1:], strict=True)) + parts[0].weigh(probs[0])


def combine(gates: jax.Array | None, branches: Sequence[jax.Array | None]) -> jax.Array:
    """Σ gate·branch over (compressed, selected, window); gates float32 [..., Hq, 3], or None: all 1."""
    terms = [
        branch if gates is None else gates[..., index, None] * branch
        for index, branch in enumerate(branches)
        if branch is not None
    ]
    return sum(terms[1:], terms[0])
