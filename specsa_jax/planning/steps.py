"""Parts of a step by themselves, and how they are timed: verifying without drafting, drafting without verifying."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax.cache import Cache
from specsa_jax.decoding import Decoder, State
from specsa_jax.drafting import Context, Draft, Drafter, Seen, TreeTemplate
from specsa_jax.sampling import Sampling
from specsa_jax.strategy import Strategy

# A call of the loop has at least so many steps, and takes so long if there is room for the tokens; so many calls, or so
# long, for one figure.
STEPS, CALL_SECONDS, REPEATS, SECONDS = 8, 0.1, 5, 1.0


@dataclasses.dataclass(frozen=True)
class Fixed(Drafter):
    """Drafts what stands elsewhere in the text, at no cost: steps that only verify, of any tree."""

    def propose(self, params: Any, state: Any, context: Context, template: TreeTemplate) -> Draft:
        parents = _parents(template)
        depth = np.zeros(template.nodes + 1, np.int32)
        for node, parent in enumerate(parents, 1):
            depth[node] = depth[parent] + 1
        at = context.known[:, None] // 2 + depth[1:]  # text from elsewhere: it seldom stands, so steps stay in place
        tokens = jnp.take_along_axis(context.tokens, at, axis=1)
        grown = None if template.is_static else jnp.broadcast_to(jnp.asarray(parents, jnp.int32), tokens.shape)
        return Draft(tokens, jnp.ones(tokens.shape, bool), grown)


def _parents(template: TreeTemplate) -> Sequence[int]:
    """Of nodes 1 … K; grown trees as chains side by side, as long as they may be."""
    if template.is_static:
        return template.parents[1:]
    side = -(-template.nodes // template.depth)
    return [max(0, node - side) for node in range(1, template.nodes + 1)]


def with_values(state: Any, lengths: np.ndarray) -> Any:
    """A state with all its caches filled with values of no meaning, ``lengths`` int32 [B] of them committed."""
    values = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)

    def filled(node: Any) -> Any:
        if not isinstance(node, Cache):
            return node
        layers = jax.tree.map(lambda leaf: jnp.asarray(np.resize(values, leaf.shape), leaf.dtype), node.layers)
        return node._replace(layers=layers, lengths=jnp.asarray(lengths, jnp.int32))

    return jax.tree.map(filled, state, is_leaf=lambda node: isinstance(node, Cache))


def timed(steps: Callable[[Any, int], Any], state: Any, most: int) -> tuple[tuple[float, float, float], Any]:
    """Seconds that a step adds to a call of ``steps(state, count)``, which gives the next state: median, least and most
    of several calls; and the last state.

    A call itself is left out: on a GPU it takes some milliseconds, as several small steps do, and decoding makes few.

    ``most``: steps of a call, at least STEPS all the same.
    """

    def call(count: int) -> float:
        nonlocal state
        begun = time.perf_counter()
        state = jax.block_until_ready(steps(state, count))
        return time.perf_counter() - begun

    call(1)
    one = min(call(1) for _ in range(3))
    rough = max((call(STEPS) - one) / (STEPS - 1), 1e-6)
    count = max(STEPS, min(most, int(CALL_SECONDS / rough)))
    times: list[float] = []

    def again() -> None:
        total = call(count)
        times.append((total - one) / (count - 1) if total > one else total / count)  # a disturbed call says little

    while len(times) < 3 or (len(times) < REPEATS and sum(times) * count < SECONDS):
        again()
    while max(times) > 1.5 * min(times) and len(times) < 3 * REPEATS and sum(times) * count < 2 * SECONDS:
        again()  # the machine does something else, too
    return (statistics.median(times), min(times), max(times)), state


def draft_steps(
    decoder: Decoder, strategy: Strategy, params: Any, draft_params: Any, draft: Any, state: State, sampling: Sampling,
    count: jax.Array,
) -> Any:  # fmt: skip
    """The drafter's state, and ``known``, after ``count`` steps that propose, and observe one token each."""
    drafter, reach = strategy.drafter, strategy.reach
    assert drafter is not None
    place = jnp.arange(reach, dtype=jnp.int32)
    shape = (*state.known.shape, reach, len(drafter.features), decoder.config.hidden)
    features = jnp.zeros(shape, decoder.dtype) if drafter.features else None

    def body(carry: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, jax.Array, jax.Array]:
        draft, known, step = carry
        here = state._replace(known=known, cache=state.cache._replace(lengths=known - 1))
        context = decoder._context(params, here, sampling, sampling.keys, strategy)
        made = drafter.propose(draft_params, draft, context, strategy.template)
        # Token ids are never negative; but XLA does not know, so each step waits for the draft of the one before.
        size = jnp.where((made.valid & (made.tokens < 0)).any(axis=1), 2, 1).astype(jnp.int32)
        if drafter.observes:
            at = known[:, None] - 1 + place
            taken = jnp.take_along_axis(state.tokens, jnp.minimum(at, state.tokens.shape[1] - 1), axis=1)
            following = jnp.take_along_axis(state.tokens, jnp.minimum(at + 1, state.tokens.shape[1] - 1), axis=1)
            seen = Seen(taken, following, known - 1, size, features, decoder.backend)
            draft = drafter.observe(draft_params, draft, seen)
        return draft, known + size, step + 1

    # Both are given back: drafts that nobody observes would not be computed otherwise, nor waited for.
    return jax.lax.while_loop(lambda carry: carry[2] < count, body, (draft, state.known, jnp.int32(0)))[:2]
