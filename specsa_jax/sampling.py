"""The target's next-token law: repetition penalty, temperature, top-k, top-p and min-p; and sampling from it.

A token's randomness is a function of its sequence's seed and its position alone. So the token sampled at a position
does not depend on how it came to be verified, nor on a sequence's neighbours in the batch.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax.nsa.rows import Rows, together


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens for one sequence.

    Attributes:
      temperature: 0 picks the most probable token (greedy); else logits are divided by it.
      top_k: only the k most probable tokens stay; 0: all.
      top_p: of those, renormalised, the smallest set whose probability reaches ``top_p``; 1: all.
      min_p: of those, the ones with at least ``min_p`` times the probability of the most probable token; 0: all.
      repetition_penalty: before all that, also when greedy: logits of tokens that the prompt or the output has so far
        are divided by it if positive, else multiplied (arXiv 1909.05858); 1: none.
      seed: of this sequence's randomness.

    Raises ValueError for values outside their ranges, NaN included.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        def number(name: str, wanted: type, text: str) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, wanted):
                raise ValueError(f"{name}: got {value!r}, expected {text}")

        number("temperature", numbers.Real, "a number")
        number("top_p", numbers.Real, "a number")
        number("min_p", numbers.Real, "a number")
        number("repetition_penalty", numbers.Real, "a number")
        number("top_k", numbers.Integral, "an integer")
        number("seed", numbers.Integral, "an integer")
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature: got {self.temperature}, expected a finite number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: got {self.min_p}, expected 0 to 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty: got {self.repetition_penalty}, expected a finite number above 0")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k: got {self.top_k}, expected at least 0 (0 keeps all tokens)")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed}, expected 0 to 2**32 - 1")


class Sampling(NamedTuple):
    """Sampling parameters of a batch, [B] each: float32 but for top_k, int32, and keys, PRNG keys."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    keys: jax.Array


def batch_sampling(params: Sequence[SamplingParams]) -> Sampling:
    """The arrays of a batch's parameters."""
    seeds = np.array([p.seed for p in params], np.uint32)
    return Sampling(
        jnp.asarray([p.temperature for p in params], jnp.float32),
        jnp.asarray([p.top_k for p in params], jnp.int32),
        jnp.asarray([p.top_p for p in params], jnp.float32),
        jnp.asarray([p.min_p for p in params], jnp.float32),
        jnp.asarray([p.repetition_penalty for p in params], jnp.float32),
        jax.vmap(jax.random.key)(jnp.asarray(seeds)),
    )


def penalised_logits(
    logits: jax.Array,
    sampling: Sampling,
    tokens: jax.Array,
    known: jax.Array,
    nodes: jax.Array,
    ancestor: jax.Array,
    rows: Rows = together,
) -> jax.Array:
    """Logits float32 [B, T, V] with the repetition penalty of each node.

    A node's penalised tokens are the first ``known`` [B] of ``tokens`` int32 [B, S], and those on its own path, of
    ``nodes`` int32 [B, T] as ``ancestor`` bool [B or 1, T, T] says.
    """

    def penalise(logits: jax.Array) -> jax.Array:
        batch, width, vocabulary = logits.shape
        own = jnp.arange(batch, dtype=jnp.int32)[:, None]
        counted = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < known[:, None]
        text = jnp.zeros((batch, vocabulary), bool).at[own, tokens].max(counted)
        node = jnp.arange(width, dtype=jnp.int32)[None, :, None]
        seen = jnp.broadcast_to(text[:, None], logits.shape)
        seen = seen.at[own[..., None], node, nodes[:, None, :]].max(jnp.broadcast_to(ancestor, (batch, width, width)))

        def apply(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
            return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)

        penalty = jnp.broadcast_to(sampling.repetition_penalty[:, None, None], (batch, width, 1))
        return rows(apply, logits, seen, penalty)

    return jax.lax.cond((sampling.repetition_penalty != 1).any(), penalise, lambda logits: logits, logits)


def filtered_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits float32 [B, T, V] of the law that is sampled from: scaled, and −inf outside top-k, top-p and min-p.

    Greedy rows (temperature 0) are left as they are. Equal logits rank by token id.
    """
    temperature = sampling.temperature[:, None, None]
    hot = temperature > 0
    # With the largest at 0, a small temperature cannot overflow them.
    scaled = jnp.where(
        hot, (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.where(hot, temperature, 1.0), logits
    )

    def cut(scaled: jax.Array) -> jax.Array:
        order = jnp.argsort(-scaled, axis=-1, stable=True)
        ranked = jnp.take_along_axis(scaled, order, axis=-1)
        rank = jnp.arange(scaled.shape[-1], dtype=jnp.int32)[None, None]
        top_k = sampling.top_k[:, None, None]
        ranked = jnp.where((top_k == 0) | (rank < top_k), ranked, -jnp.inf)
        probs = jax.nn.softmax(ranked, axis=-1)
        # A token stays while the tokens before it do not yet reach top_p; the first always stays.
        top_p = sampling.top_p[:, None, None]
        kept = (jnp.cumsum(probs, axis=-1) - probs < top_p) | (top_p >= 1) | (rank == 0)
        # Logits are relative to the most probable token's, which is 0.
        kept &= (ranked >= jnp.log(sampling.min_p)[:, None, None]) | (rank == 0)
        ranked = jnp.where(kept, ranked, -jnp.inf)
        return jnp.where(hot, jnp.put_along_axis(jnp.zeros_like(scaled), order, ranked, axis=-1, inplace=False), scaled)

    # Sorting the vocabulary is the dear part: only when some sequence asks for it.
    asked = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    needed = ((sampling.temperature > 0) & asked).any()
    return jax.lax.cond(needed, cut, lambda scaled: scaled, scaled)


def sample(logits: jax.Array, positions: jax.Array, sampling: Sampling, rows: Rows = together) -> jax.Array:
    """A token int32 [B, T] per row of logits float32 [B, T, V], for ``positions`` int32 [B, T] in the sequences.

    Greedy rows: the most probable token, ties to the lower id. Others: a draw from :func:`filtered_logits` with the
    randomness of (seed, position). ``rows`` says how to compute row by row.
    """
    if rows is not together:
        own = jnp.broadcast_to(jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None], positions.shape)

        def one(logits: jax.Array, positions: jax.Array, own: jax.Array) -> jax.Array:
            """Rows of any sequences [1, R, …], each as a batch entry of its own."""
            each = jax.tree.map(lambda values: values[own[0]], sampling)
            return sample(logits[0, :, None], positions[0, :, None], each)[None, :, 0]

        return rows(one, logits, positions, own)

    def draw(logits: jax.Array) -> jax.Array:
        law = filtered_logits(logits, sampling)
        keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(sampling.keys, positions)
        return jax.vmap(jax.vmap(jax.random.categorical))(keys, law).astype(jnp.int32)

    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    hot = sampling.temperature > 0
    drawn = jax.lax.cond(hot.any(), draw, lambda _: greedy, logits)
    return jnp.where(hot[:, None], drawn, greedy)
