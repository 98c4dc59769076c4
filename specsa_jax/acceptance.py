"""Which drafted tokens stand, and the token that follows them.

``coupled``
    The target draws its own token at every node, with the randomness of that position, and a drafted child stands iff
    it *is* the drawn token. Lossless for any draft that is a function of the text and of that randomness, on chains
    and trees; tokens are those that sampling one at a time with the same seed gives. For a draft that is fixed by the
    text it is speculative sampling (arXiv 2302.01318): a draft x stands with probability p(x), and after it falls the
    drawn token follows p without x. Drafters that draw with the target's noise agree with it more often than that.
``rejection``
    Speculative sampling for drafts drawn from a law q with noise of their own: x stands with probability
    min(1, p(x)/q(x)), else p becomes (p − q)⁺, normalised. Token by token on chains; on trees recursively over
    siblings, which are drawn without replacement (arXiv 2402.14160, 2402.12374).
``block``
    Block verification of chains (arXiv 2403.10444): decides on prefixes at once and accepts at least as many tokens.
``typical``
    A draft stands if the target finds it probable enough for the entropy of its law (Medusa, arXiv 2401.10774). Not
    lossless.

Greedy sequences (temperature 0) are exact under every rule.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from specsa_jax.drafting.base import Draft
from specsa_jax.drafting.tree import Tree
from specsa_jax.sampling import Sampling, filtered_logits

Acceptance = Literal["coupled", "rejection", "block", "typical"]

# Of Medusa: stands above min(threshold, scale · exp(−entropy)).
_TYPICAL_THRESHOLD, _TYPICAL_SCALE = 0.09, 0.3

# What a step's own randomness is for, beside the noise of depths 1, 2, … (the draft's).
_STEP_STREAM, _DECISIONS, _RESIDUAL = 0x5EED, 0, 2**31 - 1


class Accepted(NamedTuple):
    """What a step accepts of each tree.

    Attributes:
      path: int32 [B, A]: node 0 and the accepted nodes below it, of which 1 + ``length`` count.
      length: int32 [B]: accepted drafted tokens, 0 to A − 1.
      tokens: int32 [B, A]: the 1 + ``length`` tokens that the step gives: the accepted drafts, and one more.
    """

    path: jax.Array
    length: jax.Array
    tokens: jax.Array


def accept_coupled(tree: Tree, tokens: jax.Array, valid: jax.Array, targets: jax.Array, width: int) -> Accepted:
    """The longest path of drafts that the target drew as well.

    ``tokens`` int32 [B, T]: the pending token, then the drafts, ``valid`` bool [B, T] where there is one; ``targets``
    int32 [B, T]: the target's own token after each node; ``width`` is A, the nodes of the longest path.
    """
    above = jnp.broadcast_to(jnp.maximum(tree.parents, 0), tokens.shape)
    drawn = tokens == jnp.take_along_axis(targets, above, axis=1)
    return _longest(tree, drawn & valid, targets, width)


def accept_typical(
    tree: Tree, tokens: jax.Array, valid: jax.Array, logits: jax.Array, targets: jax.Array, sampling: Sampling,
    width: int,
) -> Accepted:  # fmt: skip
    """The longest path of drafts that the target finds typical; then its own token. Arguments as for the others."""
    law = jax.nn.log_softmax(filtered_logits(logits, sampling), axis=-1)
    entropy = -jnp.where(law > -jnp.inf, jnp.exp(law) * law, 0.0).sum(axis=-1)
    threshold = jnp.minimum(_TYPICAL_THRESHOLD, _TYPICAL_SCALE * jnp.exp(-entropy))  # [B, T]
    above = jnp.broadcast_to(jnp.maximum(tree.parents, 0), tokens.shape)
    chance = jnp.exp(law[jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None], above, tokens])
    typical = chance > jnp.take_along_axis(threshold, above, axis=1)
    exact = tokens == jnp.take_along_axis(targets, above, axis=1)
    stands = jnp.where((sampling.temperature > 0)[:, None], typical, exact) & valid
    accepted = _longest(tree, stands, targets, width)
    return accepted._replace(tokens=_given(accepted, tokens, _at(accepted.tokens, accepted.length)))


def step_keys(sampling: Sampling, known: jax.Array) -> jax.Array:
    """PRNG keys [B] of a step of sequences of ``known`` int32 [B] tokens: never used twice, nor by the target."""
    fold = jax.vmap(jax.random.fold_in)
    return jax.vmap(jax.random.fold_in, (0, None))(fold(sampling.keys, known), _STEP_STREAM)


def draft_noise(keys: jax.Array, depth: int) -> jax.Array:
    """PRNG keys [B, D] of a draft that must be independent of the acceptance, from a step's keys [B]."""
    depths = jnp.arange(1, depth + 1, dtype=jnp.int32)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, depths)


def accept_by_rejection(
    child: jax.Array, tokens: jax.Array, draft: Draft, logits: jax.Array, sampling: Sampling, keys: jax.Array,
    width: int,
) -> Accepted:  # fmt: skip
    """Recursive rejection sampling down a static tree, siblings in the order in which they were drawn.

    ``child`` int32 [T, C]: each node's children, T where there are fewer; ``tokens`` int32 [B, T]; ``draft`` with the
    law that its children were drawn from; ``logits`` float32 [B, T, V], of the target; ``keys`` of the step.
    """
    batch, size, vocabulary = logits.shape
    rows = jnp.arange(batch, dtype=jnp.int32)
    target, decisions = _laws(logits, sampling), _uniform(keys, size)
    valid = jnp.pad(draft.valid, ((0, 0), (1, 1)))
    padded, decisions = jnp.pad(tokens, ((0, 0), (0, 1))), jnp.pad(decisions, ((0, 0), (0, 1)))
    assert draft.law is not None
    laws = jnp.exp(draft.law)

    def sibling(rank: jax.Array, at: Any) -> Any:
        node, p, q, chosen = at
        kid = child[node, rank]  # [B]
        here = valid[rows, kid] & (chosen == size)
        token = padded[rows, kid]
        mass = _single(q, token, draft, vocabulary)
        stands = here & (decisions[rows, kid] * mass[rows, token] < p[rows, token])
        falls = (here & ~stands)[:, None]
        p = jnp.where(falls, _residual(p, mass), p)
        q = jnp.where(falls, _without(q, token), q)
        return node, p, q, jnp.where(stands, kid, chosen)

    def descend(at: Any, step: jax.Array) -> tuple[Any, jax.Array]:
        node, p, length, going = at
        start = (node, p, laws[rows, node], jnp.full(batch, size, jnp.int32))
        _, rest, _, chosen = jax.lax.fori_loop(0, child.shape[1], sibling, start)
        stands = going & (chosen < size)
        node = jnp.where(stands, chosen, node)
        p = jnp.where(stands[:, None], target[rows, node], jnp.where(going[:, None], rest, p))
        return (node, p, length + stands, stands), node

    start = (jnp.zeros(batch, jnp.int32), target[:, 0], jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool))
    (_, p, length, _), nodes = jax.lax.scan(descend, start, jnp.arange(width - 1, dtype=jnp.int32))
    path = jnp.pad(jnp.moveaxis(nodes, 0, 1), ((0, 0), (1, 0)))
    accepted = Accepted(path, length, path)
    return accepted._replace(tokens=_given(accepted, tokens, _draw(p, keys)))


def accept_block(tokens: jax.Array, draft: Draft, logits: jax.Array, sampling: Sampling, keys: jax.Array) -> Accepted:
    """Block verification of chains int32 [B, T]; arguments as for :func:`accept_by_rejection`."""
    batch, size, vocabulary = logits.shape
    target, decisions = _laws(logits, sampling), _uniform(keys, size)
    assert draft.law is not None
    q = _single(jnp.exp(draft.law[:, :-1]), tokens[:, 1:], draft, vocabulary)  # [B, K, V], from which each was drawn
    ahead = tokens[:, 1:, None]
    ratio = jnp.take_along_axis(target[:, :-1], ahead, axis=2) / jnp.take_along_axis(q, ahead, axis=2)
    ratio = jnp.where(draft.valid, ratio[..., 0], 0.0)

    def follow(mass: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
        mass = jnp.minimum(mass * ratio, 1.0)
        return mass, mass

    _, mass = jax.lax.scan(follow, jnp.ones(batch), jnp.moveaxis(ratio, 0, 1))
    mass = jnp.pad(jnp.moveaxis(mass, 0, 1), ((0, 0), (1, 0)), constant_values=1.0)  # p_i of the paper, [B, T]
    # After the last draft nothing was drawn: q is 0 there, and what is left is the target's law.
    meant = draft.valid.sum(axis=1, dtype=jnp.int32)
    place = jnp.arange(size, dtype=jnp.int32)[None]
    q = jnp.where((place < meant[:, None])[..., None], jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0.0)
    left = jnp.maximum(mass[..., None] * target - q, 0.0)
    total = left.sum(axis=-1)
    chance = total / jnp.where(total + 1.0 - mass > 0, total + 1.0 - mass, 1.0)
    chance = jnp.where(place == meant[:, None], mass, jnp.where(total + 1.0 - mass > 0, chance, 1.0))
    stands = ((decisions < chance) & (place <= meant[:, None])) | (place == 0)
    length = jnp.max(jnp.where(stands, place, 0), axis=1)
    rest = _residual(_at(target, length), _at(q, length), _at(mass, length))
    path = jnp.broadcast_to(place, tokens.shape)
    accepted = Accepted(path, length, path)
    return accepted._replace(tokens=_given(accepted, tokens, _draw(rest, keys)))


def path_to(tree: Tree, last: jax.Array, width: int) -> jax.Array:
    """Nodes int32 [B, width] from node 0 to ``last`` int32 [B], then 0."""
    size = tree.topology.ancestor.shape[-1]
    ancestor = tree.topology.ancestor.reshape(-1, size, size)
    rows = jnp.arange(last.shape[0], dtype=jnp.int32) if ancestor.shape[0] > 1 else 0
    on_path = ancestor[rows, last]  # [B, T]
    depth = tree.topology.depth.reshape(-1, size)
    here = on_path[:, None, :] & (depth[:, None, :] == jnp.arange(width, dtype=jnp.int32)[:, None])
    return jnp.argmax(here, axis=-1).astype(jnp.int32)


def _longest(tree: Tree, drawn: jax.Array, targets: jax.Array, width: int) -> Accepted:
    """The longest path on which every drafted node is among ``drawn`` bool [B, T]; the target's tokens after it."""
    falls = ~drawn.at[:, 0].set(True)
    stands = ~(tree.topology.ancestor & falls[:, None, :]).any(axis=-1)
    depth = jnp.broadcast_to(tree.topology.depth, drawn.shape)
    last = jnp.argmax(jnp.where(stands, depth, -1), axis=1).astype(jnp.int32)
    path = path_to(tree, last, width)
    return Accepted(path, _at(depth, last), jnp.take_along_axis(targets, path, axis=1))


def _laws(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The target's probabilities float32 [B, T, V]; for greedy sequences all on one token."""
    law = jax.nn.softmax(filtered_logits(logits, sampling), axis=-1)
    first = jnp.argmax(logits, axis=-1)[..., None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.where((sampling.temperature > 0)[:, None, None], law, first.astype(jnp.float32))


def _single(q: jax.Array, token: jax.Array, draft: Draft, vocabulary: int) -> jax.Array:
    """q [B, …, V] that ``token`` int32 [B, …] was drawn from: all of it on the token where nothing was drawn."""
    if draft.drawn is None:
        return q
    drawn = draft.drawn.reshape(-1, *[1] * (q.ndim - 1))
    return jnp.where(drawn, q, (token[..., None] == jnp.arange(vocabulary, dtype=jnp.int32)).astype(q.dtype))


def _residual(p: jax.Array, q: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """(scale · p − q)⁺ [B, V], normalised: what p gives beyond q, ``scale`` [B] being 1 by default."""
    return _normalise(jnp.maximum((p if scale is None else scale[:, None] * p) - q, 0.0), p)


def _without(q: jax.Array, token: jax.Array) -> jax.Array:
    """q [B, V] after ``token`` int32 [B] was drawn from it."""
    return _normalise(q.at[jnp.arange(token.shape[0], dtype=jnp.int32), token].set(0.0), q)


def _normalise(mass: jax.Array, otherwise: jax.Array) -> jax.Array:
    """``mass`` [B, V] made to add up to 1; ``otherwise`` where there is none."""
    total = mass.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, mass / jnp.where(total > 0, total, 1.0), otherwise)


def _uniform(keys: jax.Array, size: int) -> jax.Array:
    """float32 [B, size] in [0, 1), a decision per node."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, _DECISIONS), (size,)))(keys)


def _draw(p: jax.Array, keys: jax.Array) -> jax.Array:
    """A token int32 [B] from p [B, V]."""
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, _RESIDUAL)
    return jax.vmap(jax.random.categorical)(own, jnp.log(p)).astype(jnp.int32)


def _at(values: jax.Array, place: jax.Array) -> jax.Array:
    """values [B, A, …] at ``place`` int32 [B]."""
    return values[jnp.arange(place.shape[0], dtype=jnp.int32), place]


def _given(accepted: Accepted, tokens: jax.Array, last: jax.Array) -> jax.Array:
    """The accepted drafts of the tree's ``tokens`` int32 [B, T], then ``last`` int32 [B]: int32 [B, A]."""
    drafts = jnp.take_along_axis(tokens, accepted.path, axis=1)
    drafts = jnp.pad(drafts[:, 1:], ((0, 0), (0, 1)))
    place = jnp.arange(drafts.shape[1], dtype=jnp.int32)[None]
    return jnp.where(place == accepted.length[:, None], last[:, None], drafts)
