"""The jitted loops: prefill, and draft → verify → accept → commit until every sequence is done.

Autoregressive decoding is the same loop without a drafter (T = 1): baseline and speculation share every kernel.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import Implementation
from specsa_jax import model as transformer
from specsa_jax.acceptance import accept_chain
from specsa_jax.cache import Cache, LayerTail, Tail, chain, chain_slots, commit, make_tail
from specsa_jax.config import ModelConfig
from specsa_jax.drafting import Drafter, PromptLookup
from specsa_jax.nsa.cached import Backend
from specsa_jax.sampling import Sampling, sample


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Everything static about a decoding step; one trace each.

    Attributes:
      drafter: proposes tokens; None decodes one token at a time.
      tree: shape of the draft, ``chain:K`` for K drafted tokens (a step then verifies K + 1).

    Raises ValueError for a drafter that is none, and for a tree that cannot be read or is too large.
    """

    drafter: Drafter | None = PromptLookup()
    tree: str = "chain:5"

    def __post_init__(self) -> None:
        if self.drafter is not None and not callable(getattr(self.drafter, "propose", None)):
            raise ValueError(f"drafter: got {self.drafter!r}, expected a Drafter, such as PromptLookup(), or None")
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


def _reads_first(true: jax.Array, read: Callable[[], Any]) -> Any:
    """``read()``, under a condition that always holds, which the compiler cannot know.

    What a branch reads of the cache is read before the commit that follows. Without the branch nothing would order
    the two, and XLA would copy the cache at every step, to write one copy and read the other.
    """
    nothing = jax.eval_shape(read)
    return jax.lax.cond(true, read, lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nothing))


class Decoder:
    """The compiled functions of one model at one dtype.

    ``Strategy`` is the only static argument of :meth:`decode` (``chunk`` that of :meth:`prefill`); shapes do the rest.
    ``traces`` counts how often each was traced.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        end_tokens: tuple[int, ...] = (),
        implementation: Implementation = "xla",
        interpret: bool = False,
    ):
        # Every tail of these loops is a chain.
        self.backend = Backend(implementation, is_chain=True, interpret=interpret)
        self.config, self.dtype, self.end_tokens = config, jnp.dtype(dtype), end_tokens
        self.traces: collections.Counter[Strategy | int] = collections.Counter()
        self.decode = jax.jit(self._decode, static_argnames="strategy", donate_argnames="state")
        self.prefill = jax.jit(self._prefill, static_argnames="chunk", donate_argnames="state")
        self.score = jax.jit(self._score, donate_argnames="cache")

    def _tail(self, cache: Cache, width: int) -> Tail:
        """The chain of ``width`` tokens behind the cache."""
        nsa = self.config.nsa
        return make_tail(nsa, chain(width, nsa.compress_block), cache.lengths, chain_slots(nsa, width))

    def _forward(
        self, params: transformer.Params, tokens: jax.Array, cache: Cache
    ) -> tuple[jax.Array, list[LayerTail]]:
        """The chain ``tokens`` int32 [B, T] against the cache: hidden states [B, T, H], and what a commit needs."""
        tail = self._tail(cache, tokens.shape[1])
        return transformer.verify(self.config, params, tokens, cache, tail, dtype=self.dtype, backend=self.backend)

    def _commit(self, cache: Cache, tails: list[LayerTail], count: jax.Array) -> Cache:
        """The cache with the first ``count`` int32 [B] tokens of the chain."""
        batch, width = tails[0].key.shape[:2]
        path = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
        return commit(
            self.config.nsa, cache, tails, self._tail(cache, width), path, count,
            implementation=self.backend.implementation, interpret=self.backend.interpret,
        )  # fmt: skip

    def _prefill(self, params: transformer.Params, state: State, max_chunks: jax.Array, chunk: int) -> State:
        """Commits known tokens but the last, ``chunk`` at a time, at most ``max_chunks`` int32 [] of them."""
        self.traces[chunk] += 1
        buffer, target = state.tokens, jnp.maximum(state.known - 1, 0)

        def body(carry: tuple[Cache, jax.Array]) -> tuple[Cache, jax.Array]:
            cache, chunks = carry
            at = cache.lengths[:, None] + jnp.arange(chunk, dtype=jnp.int32)
            tokens = jnp.take_along_axis(buffer, jnp.minimum(at, buffer.shape[1] - 1), axis=1)
            tails = _reads_first((cache.lengths < target).any(), lambda: self._forward(params, tokens, cache)[1])
            return self._commit(cache, tails, jnp.minimum(target - cache.lengths, chunk)), chunks + 1

        def unfinished(carry: tuple[Cache, jax.Array]) -> jax.Array:
            return (carry[0].lengths < target).any() & (carry[1] < max_chunks)

        cache, _ = jax.lax.while_loop(unfinished, body, (state.cache, jnp.int32(0)))
        return state._replace(cache=cache)

    def _score(
        self, params: transformer.Params, tokens: jax.Array, cache: Cache, count: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Log-probabilities float32 [B, T, V] after each of the tokens int32 [B, T]; commits ``count`` [B] of them."""
        hidden, tails = _reads_first((count > 0).any(), lambda: self._forward(params, tokens, cache))
        logits = transformer.head(self.config, params, hidden, self.dtype)
        return jax.nn.log_softmax(logits, axis=-1), self._commit(cache, tails, count)

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
        place = jnp.arange(width, dtype=jnp.int32)[None]

        def verify(tokens: jax.Array) -> tuple[jax.Array, list[LayerTail]]:
            """Targets int32 and layer tails of a chain int32 [B, T], padded to the strategy's width."""
            hidden, tails = self._forward(params, tokens, state.cache)
            logits = transformer.head(self.config, params, hidden, self.dtype)
            targets = sample(logits, state.known[:, None] + place[:, : tokens.shape[1]], sampling)
            missing = width - tokens.shape[1]
            slots = chain_slots(self.config.nsa, width)

            def pad(leaf: jax.Array, size: int) -> jax.Array:
                return jnp.pad(leaf, [(0, 0), (0, size - leaf.shape[1])] + [(0, 0)] * (leaf.ndim - 2))

            if missing:
                targets = pad(targets, width)
                sizes = {name: slots if name.startswith("compressed") else width for name in LayerTail._fields}
                tails = [
                    tail._replace(**{n: pad(leaf, sizes[n]) for n, leaf in tail._asdict().items() if leaf is not None})
                    for tail in tails
                ]
            return targets, tails

        tokens, drafted = pending, jnp.zeros_like(state.known)
        if strategy.drafter is None:
            targets, tails = verify(pending)
        else:
            draft = strategy.drafter.propose(state.tokens, state.known, width - 1)
            drafted = jnp.where(state.done, 0, draft.size)
            tokens = jnp.concatenate([pending, draft.tokens], axis=1)
            # A step in which nobody has a draft costs what decoding one token costs. The cache is only read in here:
            # a branch that wrote to it would copy it.
            targets, tails = jax.lax.cond((drafted > 0).any(), lambda: verify(tokens), lambda: verify(pending))
        accepted = accept_chain(tokens, drafted, targets)
        emitted = self._emitted(state, targets, accepted)
        active = ~state.done
        ended = self._is_end(targets) & (place < emitted[:, None])
        at = jnp.where(place < emitted[:, None], state.known[:, None] + place, state.tokens.shape[1])
        rows = jnp.arange(at.shape[0], dtype=jnp.int32)[:, None]
        known = state.known + emitted
        counts = Counts(
            counts.steps + 1,
            counts.drafted.at[drafted].add(active.astype(jnp.int32)),
            counts.accepted.at[accepted].add(active.astype(jnp.int32)),
        )
        return State(
            cache=self._commit(state.cache, tails, emitted),
            tokens=state.tokens.at[rows, at].set(targets, mode="drop"),
            known=known,
            limit=state.limit,
            done=state.done | ended.any(axis=1) | (known >= state.limit),
        ), counts

    def _is_end(self, tokens: jax.Array) -> jax.Array:
        """bool, as tokens."""
        return functools.reduce(
            jnp.logical_or, (tokens == end for end in self.end_tokens), jnp.zeros(tokens.shape, bool)
        )

    def _emitted(self, state: State, targets: jax.Array, accepted: jax.Array) -> jax.Array:
        """How many of ``targets`` [B, width] a sequence takes: accepted + 1, cut at its budget and an end token."""
        width = targets.shape[1]
        place = jnp.arange(width, dtype=jnp.int32)[None]
        first_end = jnp.min(jnp.where(self._is_end(targets), place, width), axis=1)
        emitted = jnp.minimum(jnp.minimum(accepted, first_end) + 1, state.limit - state.known)
        # Token ids are never negative; but XLA does not know, so the commit waits for the targets, which every read of
        # the cache precedes. Without such a dependency it would copy layers, to write one copy and read the other.
        return jnp.where(state.done | (targets < 0).any(axis=1), 0, emitted)
