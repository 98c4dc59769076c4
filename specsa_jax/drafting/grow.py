"""Growing a tree depth by depth from the laws of an autoregressive drafter.

A template with fixed branchings takes each node's most probable children. ``best:K`` expands the nodes with the highest
joint probability of each depth and keeps the K best of all candidates (after EAGLE-2, arXiv 2406.16858); a child's
joint probability is never above its parent's, so what is kept is a tree.

Sequences that sample rank children by perturbed log-probabilities, law + Gumbel noise: the first child is then a draw
from the law, the next a draw from what is left, and so on (Gumbel top-k, arXiv 1903.06059).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax.drafting.base import Context, Draft, top
from specsa_jax.drafting.tree import TreeTemplate
from specsa_jax.sampling import filtered_logits

# Depths that are compiled one by one at most, of a small model on a GPU.
_APART = 8


class Level(NamedTuple):
    """Nodes of one depth to be evaluated: W of them; of depth ``step`` + 1, at position known + ``step``.

    Attributes:
      step: int32 [].
      tokens: int32 [B, W].
      parent: int32 [B, W]: the node's parent, as its number among those of the level above (0 in the first level,
        where it is the pending token).
      ancestor: bool [B, W, N], N = max(D − 1, 1)·W: [w, s·W + v]: node v of level s is an ancestor of
        node w, or itself.
      valid: bool [B, W]; the others are padding.
    """

    step: jax.Array
    tokens: jax.Array
    parent: jax.Array
    ancestor: jax.Array
    valid: jax.Array


Evaluate = Callable[[Any, Level], tuple[jax.Array, Any]]


def expanded_nodes(template: TreeTemplate) -> int:
    """N: the nodes that :func:`grow` evaluates, over all levels."""
    return max(template.depth - 1, 1) * template.width


def grow(
    evaluate: Evaluate, carry: Any, context: Context, template: TreeTemplate, logits: jax.Array, small: bool = False
) -> Draft:
    """The draft of a model that gives the next token's logits for a node, from those float32 [B, V] of the pending one.

    ``evaluate(carry, level)`` returns the logits float32 [B, W, V] after the nodes of a level, and the next carry; it
    is called for one depth after the other, D − 1 times, inside a ``lax.scan``; or, on a GPU, one by one if they are
    few and the model is ``small``, so that compiling it several times takes little: with a loop inside, the loop of
    decoding was seen outside of CUDA graphs.
    """
    batch, vocabulary = logits.shape
    width, count, depth = template.width, min(template.children, vocabulary), template.depth
    nodes = expanded_nodes(template)
    slot = jnp.arange(width, dtype=jnp.int32)

    def candidates(step: jax.Array, logits: jax.Array, joint: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        """Tokens int32 and joint log-probabilities [B, W, C] of the children of a level, and its law, if kept."""
        law = jax.nn.log_softmax(filtered_logits(logits, context.sampling), axis=-1)
        ranked = jax.nn.log_softmax(_perturbed(law, context, step), axis=-1)
        score, tokens = top(ranked, count)
        return tokens, joint[..., None] + score, law if context.keep_law else None

    def pick(step: jax.Array, scores: jax.Array) -> jax.Array:
        """Which candidates int32 [B, W] of [B, W · C] the next level evaluates."""
        if template.is_static:
            table = jnp.asarray(_places(template, count)[0])[jnp.minimum(step, depth - 1)]
            return jnp.broadcast_to(table, (batch, width))
        return top(scores, width)[1]

    def expand(loop: Any, step: jax.Array) -> tuple[Any, Any]:
        carry, tokens, scores, ancestor = loop
        chosen = pick(step, scores)
        parent = chosen // count
        joint = jnp.take_along_axis(scores, chosen, axis=1)
        ancestor = jnp.take_along_axis(ancestor, parent[..., None], axis=1)
        ancestor |= jnp.arange(nodes, dtype=jnp.int32) == step * width + slot[:, None]
        level = Level(step, jnp.take_along_axis(tokens, chosen, axis=1), parent, ancestor, joint > -jnp.inf)
        logits, carry = evaluate(carry, level)
        tokens, scores, law = candidates(step + 1, logits, joint)
        found = tokens.reshape(batch, -1), scores.reshape(batch, -1)
        return (carry, *found, ancestor), (*found, chosen, law)

    alone = jnp.where(slot == 0, 0.0, -jnp.inf)  # the pending token is a level of one node
    rooted = jnp.broadcast_to(logits[:, None], (batch, width, vocabulary)) if width > 1 else logits[:, None]
    tokens, scores, law = candidates(jnp.int32(0), rooted, jnp.broadcast_to(alone, (batch, width)))
    first = tokens.reshape(batch, -1), scores.reshape(batch, -1)
    start = (carry, *first, jnp.zeros((batch, width, nodes), bool))
    apart = small and 1 < depth <= _APART and jax.default_backend() == "gpu"
    _, (more_tokens, more_scores, chosen, laws) = jax.lax.scan(
        expand, start, jnp.arange(depth - 1, dtype=jnp.int32), unroll=apart or 1
    )

    def pool(first: jax.Array, more: jax.Array) -> jax.Array:
        """[B, D · W · C], by depth."""
        return jnp.moveaxis(jnp.concatenate([first[None], more]), 0, 1).reshape(batch, -1)

    tokens, scores = pool(first[0], more_tokens), pool(first[1], more_scores)
    if template.is_static:
        _, place, where = _places(template, count)
        kept = None
        if law is not None:
            flat = jnp.moveaxis(jnp.concatenate([law[None], laws]), 0, 1).reshape(batch, -1, vocabulary)
            kept = flat[:, where]
        return Draft(tokens[:, place], scores[:, place] > -jnp.inf, law=kept)
    return _best(tokens, scores, chosen, template.nodes, width * count, count)


def _perturbed(law: jax.Array, context: Context, step: jax.Array) -> jax.Array:
    """law [B, W, V] with the noise of depth ``step`` + 1 on the sequences that sample."""
    hot = context.sampling.temperature > 0

    def noisy() -> jax.Array:
        keys = jnp.take(context.noise, step, axis=1)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, law.shape[-1:], law.dtype))(keys)
        return jnp.where(hot[:, None, None], law + noise[:, None], law)

    return jax.lax.cond(hot.any(), noisy, lambda: law)


def _best(tokens: jax.Array, scores: jax.Array, chosen: jax.Array, nodes: int, per_level: int, count: int) -> Draft:
    """The ``nodes`` best of all candidates [B, N] as a tree; ``chosen`` int32 [D − 1, B, W] were expanded."""
    batch, size = tokens.shape
    levels = size // per_level
    above = chosen + jnp.arange(levels - 1, dtype=jnp.int32)[:, None, None] * per_level
    above = jnp.repeat(jnp.moveaxis(above, 0, 1), count, axis=2).reshape(batch, -1)
    above = jnp.concatenate([jnp.full((batch, per_level), -1, jnp.int32), above], axis=1)  # candidates' parents
    room = max(0, nodes - size)
    score, best = top(jnp.pad(scores, ((0, 0), (0, room)), constant_values=-jnp.inf), nodes)
    # Among equals the first counts, and parents come first.
    best = jnp.sort(jnp.where(score > -jnp.inf, best, size), axis=1)
    valid, taken = best < size, jnp.minimum(best, size - 1)
    parent = jnp.where(valid, jnp.take_along_axis(above, taken, axis=1), -1)
    found = jnp.argmax(best[:, None, :] == parent[..., None], axis=-1).astype(jnp.int32)
    return Draft(jnp.take_along_axis(tokens, taken, axis=1), valid, jnp.where(parent >= 0, found + 1, 0))


@functools.lru_cache
def _places(template: TreeTemplate, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a static template's nodes are among candidates.

    Which candidates [D, W] of a level are the next level's nodes; the candidate of each node [K] among all; and the
    place of each node [K + 1] among evaluated ones, the pending token's level first (0 for leaves).
    """
    width, depth, levels = template.width, template.depth, template.levels
    slot = {int(node): (step, w) for step, row in enumerate(levels) for w, node in enumerate(row)}
    follow = np.zeros((depth, width), np.int32)
    place = np.zeros(template.nodes, np.int32)
    where = np.zeros(template.nodes + 1, np.int32)
    for node in range(template.nodes + 1):
        step, w = slot.get(node, (0, 0))
        where[node] = step * width + w
        for rank, child in enumerate(template.child[node]):
            if child <= template.nodes:
                place[child - 1] = (step * width + w) * count + rank
                if int(child) in slot:
                    follow[step, slot[int(child)][1]] = w * count + rank
    return follow, place, where
