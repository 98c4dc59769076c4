"""The jitted loops: prefill, and draft → verify → accept → commit until every sequence is done.

Autoregressive decoding is the same loop without a drafter (T = 1): baseline and speculation share every kernel.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from specsa_jax import model as transformer
from specsa_jax.acceptance import (
    Accepted,
    accept_block,
    accept_by_rejection,
    accept_coupled,
    accept_typical,
    draft_noise,
    step_keys,
)
from specsa_jax.cache import Cache, LayerTail, Tail, chain_slots, commit, make_tail, reads_first, topology
from specsa_jax.config import ModelConfig
from specsa_jax.drafting import Context, Draft, Drafter, Seen, depth_first
from specsa_jax.drafting.tree import Tree, TreeTemplate, grown_tree, static_tree
from specsa_jax.nsa.cached import Backend
from specsa_jax.sampling import Sampling, penalised_logits, sample
from specsa_jax.schedule import Sharing
from specsa_jax.strategy import Precision, Strategy


class State(NamedTuple):
    """A batch in progress; donated to each call and updated in place.

    Attributes:
      cache: holds all known tokens but the last, which is pending.
      tokens: int32 [B, S] prompt and output; ``known`` int32 [B] of them are valid.
      limit: int32 [B]; a sequence is done when ``known`` reaches it, or at its end token.
      done: bool [B].
      draft: the drafter's state.
      logprobs: float32 [B, S] of output tokens in the model's own law (temperature 1, nothing filtered or penalised).
    """

    cache: Cache
    tokens: jax.Array
    known: jax.Array
    limit: jax.Array
    done: jax.Array
    logprobs: jax.Array
    draft: Any = ()


class Counts(NamedTuple):
    """What happened in a call, in active sequences' steps.

    Attributes:
      steps: int32 [].
      drafted: int32 [A]: sequences' steps by the depth of the draft.
      accepted: int32 [A]: sequences' steps by accepted tokens.
      nodes: int32 []: drafted tokens, all branches.
    """

    steps: jax.Array
    drafted: jax.Array
    accepted: jax.Array
    nodes: jax.Array


def add_counts(one: Counts | None, other: Counts) -> Counts:
    """The sum of two calls' counts, as NumPy arrays int64; strategies may reach unequally far."""
    if one is None:
        return Counts(*(np.asarray(count, np.int64) for count in other))  # type: ignore[arg-type]

    def add(a: Any, b: Any) -> Any:
        a, b = np.asarray(a, np.int64), np.asarray(b, np.int64)
        if not a.ndim:
            return a + b
        reach = max(len(a), len(b))
        return np.pad(a, (0, reach - len(a))) + np.pad(b, (0, reach - len(b)))

    return Counts(*map(add, one, other))


class _Verified(NamedTuple):
    """What a step's forward pass leaves: what it accepts, and what a commit and the drafter need."""

    accepted: Accepted
    logprobs: jax.Array
    tails: list[LayerTail]
    features: jax.Array | None


class Decoder:
    """The compiled functions of one model at one dtype.

    ``Strategy`` is the only static argument of :meth:`decode` (``chunk``, and a drafter that observes, those of
    :meth:`prefill`); shapes do the rest. ``traces`` counts how often each was traced.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        end_tokens: tuple[int, ...] = (),
        implementation: Implementation = "xla",
        interpret: bool = False,
    ):
        self.backend = Backend(implementation, interpret=interpret)
        self.config, self.dtype, self.end_tokens = config, jnp.dtype(dtype), end_tokens
        self.traces: collections.Counter[Strategy | int] = collections.Counter()
        self.decode = jax.jit(self._decode, static_argnames="strategy", donate_argnames="state")
        self.prefill = jax.jit(
            self._prefill, static_argnames=("chunk", "drafter", "precision"), donate_argnames="state"
        )
        self.score = jax.jit(self._score, static_argnames=("precision", "sharing"), donate_argnames="cache")

    def check(self, strategy: Strategy) -> None:
        """Raises ValueError where strategy and model do not go together."""
        strategy.check(self.config)

    def _backend(self, precision: Precision, is_chain: bool = True, sharing: Sharing = Sharing()) -> Backend:
        return dataclasses.replace(
            self.backend, is_chain=is_chain, deterministic=precision == "strict", group=sharing.group,
            group_mode=sharing.group_mode,
        )  # fmt: skip

    def _tail(self, cache: Cache, tree: Tree, template: TreeTemplate | None = None) -> Tail:
        """``tree`` behind the cache; None: a chain."""
        nsa = self.config.nsa
        slots = chain_slots(nsa, tree.parents.shape[-1]) if template is None else template.slots(nsa.compress_stride)
        return make_tail(nsa, tree.topology, cache.lengths, slots)

    def _chain(self, size: int) -> Tree:
        """The chain of ``size`` tokens."""
        nodes = [node - 1 for node in range(size)]
        return Tree(jnp.asarray(nodes, jnp.int32), topology(nodes, self.config.nsa.compress_block))

    def _forward(
        self,
        params: transformer.Params,
        tokens: jax.Array,
        cache: Cache,
        tail: Tail,
        backend: Backend,
        features: tuple[int, ...] = (),
        sharing: Sharing = Sharing(),
        reused: jax.Array | None = None,
    ) -> tuple[jax.Array, list[LayerTail], jax.Array | None]:
        """``tokens`` int32 [B, T] against the cache: hidden states [B, T, H], what a commit needs, and the features."""
        found = transformer.verify(
            self.config, params, tokens, cache, tail, dtype=self.dtype, features=features, backend=backend,
            schedule=sharing.schedule if reused is None else reused, keep_compressed=sharing.keep_compressed,
        )  # fmt: skip
        return found if features else (*found, None)

    def _commit(self, cache: Cache, tails: list[LayerTail], tail: Tail, path: jax.Array, count: jax.Array) -> Cache:
        """The cache with the first ``count`` int32 [B] nodes of ``path`` int32 [B, A]."""
        return commit(
            self.config.nsa, cache, tails, tail, path, count,
            implementation=self.backend.implementation, interpret=self.backend.interpret,
        )  # fmt: skip

    def _prefill(
        self,
        params: transformer.Params,
        state: State,
        max_chunks: jax.Array,
        chunk: int,
        drafter: Drafter | None = None,
        precision: Precision = "exact",
        draft_params: Any = (),
    ) -> State:
        """Commits known tokens but the last, ``chunk`` at a time, at most ``max_chunks`` int32 [] of them.

        A ``drafter`` is shown them; to be given only if it observes.
        """
        self.traces[chunk] += 1
        buffer, target = state.tokens, jnp.maximum(state.known - 1, 0)
        features = () if drafter is None else drafter.features
        tree, backend = self._chain(chunk), self._backend(precision)
        step = jnp.arange(chunk, dtype=jnp.int32)

        def body(carry: tuple[Cache, Any, jax.Array]) -> tuple[Cache, Any, jax.Array]:
            cache, draft, chunks = carry
            at = jnp.minimum(cache.lengths[:, None] + step, buffer.shape[1] - 1)
            tokens = jnp.take_along_axis(buffer, at, axis=1)
            tail = self._tail(cache, tree)
            _, tails, seen = reads_first(
                (cache.lengths < target).any(), lambda: self._forward(params, tokens, cache, tail, backend, features)
            )
            count = jnp.minimum(target - cache.lengths, chunk)
            if drafter is not None:
                following = jnp.take_along_axis(buffer, jnp.minimum(at + 1, buffer.shape[1] - 1), axis=1)
                shown = Seen(tokens, following, cache.lengths, count, seen, self.backend)
                draft = drafter.observe(draft_params, draft, shown)
            path = jnp.broadcast_to(step, tokens.shape)
            return self._commit(cache, tails, tail, path, count), draft, chunks + 1

        def unfinished(carry: tuple[Cache, Any, jax.Array]) -> jax.Array:
            return (carry[0].lengths < target).any() & (carry[2] < max_chunks)

        cache, draft, _ = jax.lax.while_loop(unfinished, body, (state.cache, state.draft, jnp.int32(0)))
        return state._replace(cache=cache, draft=draft)

    def _score(
        self,
        params: transformer.Params,
        tokens: jax.Array,
        cache: Cache,
        count: jax.Array,
        precision: Precision = "exact",
        sharing: Sharing = Sharing(),
        reused: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Log-probabilities float32 [B, T, V] after each of the tokens int32 [B, T]; commits ``count`` [B] of them.

        ``reused`` bool [layers], true in reuse layers, takes the place of the sharing's schedule (XLA's path alone).
        """
        tail = self._tail(cache, self._chain(tokens.shape[1]))
        backend = self._backend(precision, sharing=sharing)
        hidden, tails, _ = reads_first(
            (count > 0).any(),
            lambda: self._forward(params, tokens, cache, tail, backend, sharing=sharing, reused=reused),
        )
        rows = backend.rows(cache)
        logprobs = rows(jax.nn.log_softmax, transformer.head(self.config, params, hidden, self.dtype, rows))
        path = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return logprobs, self._commit(cache, tails, tail, path, count)

    def _decode(
        self,
        params: transformer.Params,
        state: State,
        sampling: Sampling,
        max_steps: jax.Array,
        strategy: Strategy,
        draft_params: Any = (),
    ) -> tuple[State, Counts]:
        """Steps until all sequences are done, at most ``max_steps`` int32 []. Prefill must be complete."""
        self.traces[strategy] += 1
        zeros = jnp.zeros(strategy.reach, jnp.int32)

        def body(carry: tuple[State, Counts]) -> tuple[State, Counts]:
            return self._step(params, draft_params, carry[0], sampling, carry[1], strategy)

        def unfinished(carry: tuple[State, Counts]) -> jax.Array:
            return ~carry[0].done.all() & (carry[1].steps < max_steps)

        return jax.lax.while_loop(unfinished, body, (state, Counts(jnp.int32(0), zeros, zeros, jnp.int32(0))))

    def _step(
        self,
        params: transformer.Params,
        draft_params: Any,
        state: State,
        sampling: Sampling,
        counts: Counts,
        strategy: Strategy,
    ) -> tuple[State, Counts]:
        drafter, template, width, reach = strategy.drafter, strategy.template, strategy.width, strategy.reach
        features = () if drafter is None or not drafter.observes else drafter.features
        sharing = strategy.sharing(self.config.layers)
        pending = jnp.take_along_axis(state.tokens, state.known[:, None] - 1, axis=1)
        active = ~state.done
        place = jnp.arange(reach, dtype=jnp.int32)[None]

        def verify(
            tokens: jax.Array, valid: jax.Array, tree: Tree, template: TreeTemplate | None, draft: Draft | None
        ) -> _Verified:
            """Of a tree int32 [B, t] of 1 or T nodes, padded to T."""
            tail = self._tail(state.cache, tree, template)
            is_chain = template is None or template.is_chain
            backend = self._backend(strategy.precision, is_chain, sharing)
            rows = backend.rows(state.cache)
            hidden, tails, seen = self._forward(params, tokens, state.cache, tail, backend, features, sharing)
            logits = transformer.head(self.config, params, hidden, self.dtype, rows)
            depth = jnp.broadcast_to(tree.topology.depth, tokens.shape)
            law = penalised_logits(logits, sampling, state.tokens, state.known, tokens, tree.topology.ancestor, rows)
            targets = sample(law, state.known[:, None] + depth, sampling, rows)
            if draft is None or strategy.acceptance == "coupled":
                accepted = accept_coupled(tree, tokens, valid, targets, reach)
            elif strategy.acceptance == "typical":
                accepted = accept_typical(tree, tokens, valid, law, targets, sampling, reach)
            elif strategy.acceptance == "block":
                accepted = accept_block(tokens, draft, law, sampling, keys)
            else:
                child = jnp.asarray(strategy.template.child)
                accepted = accept_by_rejection(child, tokens, draft, law, sampling, keys, reach)
            given = jnp.take_along_axis(logits, accepted.path[..., None], axis=1)  # [B, A, V]
            chosen = jnp.take_along_axis(given, accepted.tokens[..., None], axis=2)[..., 0]
            logprobs = rows(lambda chosen, given: chosen - jax.nn.logsumexp(given, axis=-1), chosen, given)

            def pad(leaf: jax.Array, size: int) -> jax.Array:
                return jnp.pad(leaf, [(0, 0), (0, size - leaf.shape[1])] + [(0, 0)] * (leaf.ndim - 2))

            if tokens.shape[1] < width:
                sizes = {name: slots if name.startswith("compressed") else width for name in LayerTail._fields}
                tails = [
                    tail._replace(**{n: pad(leaf, sizes[n]) for n, leaf in tail._asdict().items() if leaf is not None})
                    for tail in tails
                ]
                seen = None if seen is None else pad(seen, width)
            return _Verified(accepted, logprobs, tails, seen)

        alone, draft_state = self._chain(1), state.draft
        nothing = jnp.zeros((pending.shape[0], width), bool)
        if drafter is None:
            tree, valid, tail = alone, nothing, self._tail(state.cache, alone)
            slots = tail.slot.shape[1]
            verified = verify(pending, nothing, alone, None, None)
        else:
            keys = step_keys(sampling, state.known)
            context = self._context(params, state, sampling, keys, strategy)
            draft = drafter.propose(draft_params, state.draft, context, template)
            if template.traversal == "depth" and not template.is_static:
                draft = depth_first(draft, template.depth)
            draft = draft._replace(valid=draft.valid & active[:, None])
            valid = jnp.pad(draft.valid, ((0, 0), (1, 0)))
            tokens = jnp.concatenate([pending, draft.tokens], axis=1)
            block = self.config.nsa.compress_block
            tree = (
                static_tree(template, block) if draft.parents is None
                else grown_tree(draft.parents, template.depth, block)
            )  # fmt: skip
            tail = self._tail(state.cache, tree, template)
            slots = tail.slot.shape[1]
            # A step in which nobody has a draft costs what decoding one token costs. The cache is only read in here:
            # a branch that wrote to it would copy it.
            verified = jax.lax.cond(
                valid.any(), lambda: verify(tokens, valid, tree, template, draft),
                lambda: verify(pending, nothing[:, :1], alone, None, None),
            )  # fmt: skip
        path, accepted, targets = verified.accepted
        emitted = self._emitted(state, targets, accepted)
        ended = self._is_end(targets) & (place < emitted[:, None])
        at = jnp.where(place < emitted[:, None], state.known[:, None] + place, state.tokens.shape[1])
        rows = jnp.arange(at.shape[0], dtype=jnp.int32)[:, None]
        known = state.known + emitted
        drafted = jnp.where(valid, tree.topology.depth, 0).max(axis=1)
        counts = Counts(
            counts.steps + 1,
            counts.drafted.at[drafted].add(active.astype(jnp.int32)),
            counts.accepted.at[accepted].add(active.astype(jnp.int32)),
            counts.nodes + valid.sum(dtype=jnp.int32),
        )
        if drafter is not None and drafter.observes:
            taken = jnp.concatenate([pending, targets[:, :-1]], axis=1)
            seen = verified.features
            if seen is not None:
                seen = jnp.take_along_axis(seen, path[..., None, None], axis=1)
            shown = Seen(taken, targets, state.cache.lengths, emitted, seen, self.backend)
            draft_state = drafter.observe(draft_params, draft_state, shown)
        return State(
            cache=self._commit(state.cache, verified.tails, tail, path, emitted),
            tokens=state.tokens.at[rows, at].set(targets, mode="drop"),
            known=known,
            limit=state.limit,
            done=state.done | ended.any(axis=1) | (known >= state.limit),
            logprobs=state.logprobs.at[rows, at].set(verified.logprobs, mode="drop"),
            draft=draft_state,
        ), counts

    def _context(
        self, params: transformer.Params, state: State, sampling: Sampling, keys: jax.Array, strategy: Strategy
    ) -> Context:
        """What the drafter is given, with the randomness that the rule of acceptance wants of it."""
        depth, drawn = strategy.template.depth, strategy.acceptance in ("rejection", "block")
        if drawn:
            noise = draft_noise(keys, depth)
        else:
            # The target's own: a draft drawn with it is likely to be what the target draws.
            at = state.known[:, None] + jnp.arange(depth, dtype=jnp.int32)
            noise = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(sampling.keys, at)
        return Context(
            state.tokens, state.known, ~state.done, sampling, noise, state.cache, params, self.config, self.backend,
            keep_law=drawn,
        )  # fmt: skip

    def _is_end(self, tokens: jax.Array) -> jax.Array:
        """bool, as tokens."""
        return functools.reduce(
            jnp.logical_or, (tokens == end for end in self.end_tokens), jnp.zeros(tokens.shape, bool)
        )

    def _emitted(self, state: State, targets: jax.Array, accepted: jax.Array) -> jax.Array:
        """How many of ``targets`` [B, A] a sequence takes: accepted + 1, cut at its budget and an end token."""
        width = targets.shape[1]
        place = jnp.arange(width, dtype=jnp.int32)[None]
        first_end = jnp.min(jnp.where(self._is_end(targets), place, width), axis=1)
        emitted = jnp.minimum(jnp.minimum(accepted, first_end) + 1, state.limit - state.known)
        # Token ids are never negative; but XLA does not know, so the commit waits for the targets, which every read of
        # the cache precedes. Without such a dependency it would copy layers, to write one copy and read the other.
        return jnp.where(state.done | (targets < 0).any(axis=1), 0, emitted)
