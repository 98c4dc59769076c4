"""Prompt lookup: the continuation of the longest n-gram that ended the text before and ends it now.

After Saxena's prompt lookup decoding and arXiv 2304.04487; over prompt and output, on the device.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from specsa_jax.drafting.base import Draft


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Attributes:
    max_ngram: longest suffix that is compared; longer matches count as this long.
    min_ngram: shortest match that gives a draft.
    """

    max_ngram: int = 8
    min_ngram: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram <= 64:
            raise ValueError(
                f"PromptLookup: got min_ngram {self.min_ngram} and max_ngram {self.max_ngram}, "
                "expected 1 <= min_ngram <= max_ngram <= 64"
            )

    def propose(self, tokens: jax.Array, known: jax.Array, length: int) -> Draft:
        """The longest match wins, then the most recent; a match that overlaps the end continues periodically.

        Costs ``max_ngram`` comparisons over the buffer int32 [B, S].
        """
        batch, size = tokens.shape
        end = jnp.arange(size, dtype=jnp.int32)[None]  # a candidate: the n-gram that ends just before ``end``
        alive = (end >= 1) & (end < known[:, None])
        match = jnp.zeros((batch, size), jnp.int32)
        for back in range(1, self.max_ngram + 1):
            suffix = jnp.take_along_axis(tokens, jnp.maximum(known[:, None] - back, 0), axis=1)
            shifted = jnp.pad(tokens, ((0, 0), (back, 0)))[:, :size]
            alive &= (shifted == suffix) & (end >= back)
            match += alive
        best = jnp.max(match, axis=1)
        latest = jnp.max(jnp.where((match == best[:, None]) & (end < known[:, None]), end, 0), axis=1)
        found = best >= self.min_ngram
        period = jnp.maximum(known - latest, 1)
        source = latest[:, None] + jnp.arange(length, dtype=jnp.int32)[None] % period[:, None]
        draft = jnp.take_along_axis(tokens, jnp.clip(source, 0, size - 1), axis=1)
        return Draft(draft, jnp.where(found, length, 0).astype(jnp.int32))
