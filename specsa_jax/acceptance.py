"""Which drafted tokens stand, and the token that follows them.

The coupled rule: the target draws its own token at every node, with the randomness of that position, and a drafted
child stands iff it *is* the drawn token. For drafts that are a fixed function of the text this is speculative sampling
(arXiv 2302.01318) with all of the draft law's mass on one token: a draft x is accepted with probability p(x); after a
rejection the drawn token follows p without x, renormalised. It is lossless for any draft that does not know the
target's draws, on chains and trees, and it couples: with equal logits, the tokens are those that sampling one at a
time with the same seed gives. Greedy is the case of temperature 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specsa_jax.drafting.tree import Tree


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
    drawn = (tokens == jnp.take_along_axis(targets, above, axis=1)) & valid
    falls = ~drawn.at[:, 0].set(True)
    stands = ~(tree.topology.ancestor & falls[:, None, :]).any(axis=-1)
    depth = jnp.broadcast_to(tree.topology.depth, tokens.shape)
    last = jnp.argmax(jnp.where(stands, depth, -1), axis=1).astype(jnp.int32)
    path = path_to(tree, last, width)
    length = jnp.take_along_axis(depth, last[:, None], axis=1)[:, 0]
    return Accepted(path, length, jnp.take_along_axis(targets, path, axis=1))


def path_to(tree: Tree, last: jax.Array, width: int) -> jax.Array:
    """Nodes int32 [B, width] from node 0 to ``last`` int32 [B], then 0."""
    size = tree.topology.ancestor.shape[-1]
    ancestor = tree.topology.ancestor.reshape(-1, size, size)
    rows = jnp.arange(last.shape[0], dtype=jnp.int32) if ancestor.shape[0] > 1 else 0
    on_path = ancestor[rows, last]  # [B, T]
    depth = tree.topology.depth.reshape(-1, size)
    here = on_path[:, None, :] & (depth[:, None, :] == jnp.arange(width, dtype=jnp.int32)[:, None])
    return jnp.argmax(here, axis=-1).astype(jnp.int32)
