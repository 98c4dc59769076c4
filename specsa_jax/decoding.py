"""The jitted loops: prefill, and draft → verify → accept → commit until every sequence is done.

Autoregressive decoding is the same loop without a drafter (T = 1): baseline and speculation share every kernel.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specsa_jax import model as transformer
from specsa_jax.acceptance import accept_chain
from specsa_jax.cache import Cache, chain, chain_slots, commit, make_tail
from specsa_jax.config import ModelConfig
from specsa_jax.drafting import Drafter, PromptLookup
from specsa_jax.sampling import Sampling, sample


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Everything static about a decoding step; one trace each.

    Attributes:
      drafter: proposes tokens; None decodes one token at a time.
      tree: shape of the draft, ``chain:K`` for K drafted tokens (a step then verifies K + 1).

    Raises ValueError for a tree that cannot be read or is too large.
    """

    drafter: Drafter | None = PromptLookup()
    tree: str = "chain:7"

    def __post_init__(self) -> None:
        match = re.fullmatch(r"chain:(\d+)", self.tree) if isinstance(self.tree, str) else None
        if not match or not 1 <= int(match[1]) <= 127:
            raise ValueError(f"tree: got {self.tree!r}, expected chain:K with K from 1 to 127")

    @property
    def width(self) -> int:
        """T: tokens that a step verifies, the pending one included."""
        return 1 if self.drafter is None else int(self.tree.split(":")[1]) + 1

    def describe(self) -> str:
        """One line for people."""
        return "autoregressive" if self.drafter is None else f"{self.drafter} {self.tree}"


AUTOREGRESSIVE = Strategy(drafter=None)


class State(NamedTuple):
    """A batch in progress; donated to each call and updated in place.

    Attributes:
      cache: holds all known tokens but the last, which is pending.
      tokens: int32 [B, S] prompt and output; ``known`` int32 [B] of them are valid.
      limit: int32 [B]; a sequence is done when ``known`` reaches it, or at its end token.
      done: bool [B].
    """

    cache: Cache
    tokens: jax.Array
    known: jax.Array
    limit: jax.Array
    done: jax.Array


class Counts(NamedTuple):
    """What happened in a call: steps int32 []; sequences' steps by drafted and by accepted tokens, int32 [T] each."""

    steps: jax.Array
    drafted: jax.Array
    accepted: jax.Array


class Decoder:
    """The compiled functions of one model at one dtype.

    ``Strategy`` is the only static argument of :meth:`decode` (``chunk`` that of :meth:`prefill`); shapes do the rest.
    ``traces`` counts how often each was traced.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, end_tokens: tuple[int, ...] = ()):
        self.config, self.dtype, self.end_tokens = config, jnp.dtype(dtype), end_tokens
        self.traces: collections.Counter[Strategy | int] = collections.Counter()
        self.decode = jax.jit(self._decode, static_argnames="strategy", donate_argnames="state")
        self.prefill = jax.jit(self._prefill, static_argnames="chunk", donate_argnames="state")
        self.score = jax.jit(self._score, donate_argnames="cache")

    def _forward(self, params: transformer.Params, tokens: jax.Array, cache: Cache):
        """The chain ``tokens`` int32 [B, T] behind the cache: hidden states [B, T, H], and what commits their path."""
        nsa, width = self.config.nsa, tokens.shape[1]
        tail = make_tail(nsa, chain(width, nsa.compress_block), cache.lengths, chain_slots(nsa, width))
        hidden, tails = transformer.verify(self.config, params, tokens, cache, tail, dtype=self.dtype)
        path = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
        return hidden, functools.partial(commit, nsa, cache, tails, tail, path)

    def _prefill(self, params: transformer.Params, state: State, max_chunks: jax.Array, chunk: int) -> State:
        """Commits known tokens but the last, ``chunk`` at a time, at most ``max_chunks`` int32 [] of them."""
        self.traces[chunk] += 1
        buffer, target = state.tokens, jnp.maximum(state.known - 1, 0)

        def body(carry: tuple[Cache, jax.Array]) -> tuple[Cache, jax.Array]:
            cache, chunks = carry
            at = cache.lengths[:, None] + jnp.arange(chunk, dtype=jnp.int32)
            tokens = jnp.take_along_axis(buffer, jnp.minimum(at, buffer.shape[1] - 1), axis=1)
            _, write = self._forward(params, tokens, cache)
            return write(jnp.minimum(target - cache.lengths, chunk)), chunks + 1

        def unfinished(carry: tuple[Cache, jax.Array]) -> jax.Array:
            return (carry[0].lengths < target).any() & (carry[1] < max_chunks)

        cache, _ = jax.lax.while_loop(unfinished, body, (state.cache, jnp.int32(0)))
        return state._replace(cache=cache)

    def _score(self, params: transformer.Params, tokens: jax.Array, cache: Cache, count: jax.Array):
        """Log-probabilities float32 [B, T, V] after each of the tokens int32 [B, T]; commits ``count`` int32 [B] of them."""
        hidden, write = self._forward(params, tokens, cache)
        logits = transformer.head(self.config, params, hidden, self.dtype)
        return jax.nn.log_softmax(logits, axis=-1), write(count)

    def _decode(
        self, params: transformer.Params, state: State, sampling: Sampling, max_steps: jax.Array, strategy: Strategy
    ) -> tuple[State, Counts]:
        """Steps until all sequences are done, at most ``max_steps`` int32 []. Prefill must be complete."""
        self.traces[strategy] += 1
        zeros = jnp.zeros(strategy.width, jnp.int32)

        def body(carry: tuple[State, Counts]) -> tuple[State, Counts]:
            return self._step(params, carry[0], sampling, carry[1], strategy)

        def unfinished(carry: tuple[State, Counts]) -> jax.Array:
            return ~carry[0].done.all() & (carry[1].steps < max_steps)

        return jax.lax.while_loop(unfinished, body, (state, Counts(jnp.int32(0), zeros, zeros)))

    def _step(
        self, params: transformer.Params, state: State, sampling: Sampling, counts: Counts, strategy: Strategy
    ) -> tuple[State, Counts]:
        width = strategy.width
        pending = jnp.take_along_axis(state.tokens, state.known[:, None] - 1, axis=1)
        tokens, drafted = pending, jnp.zeros_like(state.known)
        if strategy.drafter is not None:
            draft = strategy.drafter.propose(state.tokens, state.known, width - 1)
            tokens, drafted = jnp.concatenate([pending, draft.tokens], axis=1), draft.count

        hidden, write = self._forward(params, tokens, state.cache)
        logits = transformer.head(self.config, params, hidden, self.dtype)
        place = jnp.arange(width, dtype=jnp.int32)[None]
        targets = sample(logits, state.known[:, None] + place, sampling)
        accepted = accept_chain(tokens, drafted, targets)

        # The step emits targets[: accepted + 1], cut at the budget and after an end token.
        emitted = jnp.minimum(accepted + 1, state.limit - state.known)
        ended = jnp.zeros_like(state.done)
        for end_token in self.end_tokens:
            at = jnp.min(jnp.where(targets == end_token, place, width), axis=1)
            ended |= at < emitted
            emitted = jnp.minimum(emitted, at + 1)
        active = ~state.done
        emitted = jnp.where(active, emitted, 0)
        at = jnp.where(place < emitted[:, None], state.known[:, None] + place, state.tokens.shape[1])
        rows = jnp.arange(at.shape[0], dtype=jnp.int32)[:, None]
        known = state.known + emitted
        counts = Counts(
            counts.steps + 1,
            counts.drafted.at[drafted].add(active.astype(jnp.int32)),
            counts.accepted.at[accepted].add(active.astype(jnp.int32)),
        )
        return State(
            cache=write(emitted),
            tokens=state.tokens.at[rows, at].set(targets, mode="drop"),
            known=known,
            limit=state.limit,
            done=state.done | (active & (ended | (known >= state.limit))),
        ), counts
