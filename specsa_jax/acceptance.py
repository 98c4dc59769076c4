"""Which drafted tokens stand, and the token that follows them.

For drafts that are a fixed function of the text so far (prompt lookup), the target draws its own token at every node,
with the randomness of that position, and a drafted child stands iff it *is* the drawn token. This is speculative
sampling (arXiv 2302.01318) for a draft law with all its mass on one token: a draft x is accepted with probability
p(x); after a rejection the drawn token follows p without x, renormalised. It is lossless, and it couples: with equal
logits, the tokens are those that sampling one at a time with the same seed gives. Greedy is the case of temperature 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def accept_chain(tokens: jax.Array, drafted: jax.Array, targets: jax.Array) -> jax.Array:
    """How many drafted tokens of each chain stand: int32 [B], 0 to T − 1.

    ``tokens`` int32 [B, T]: the pending token, then the draft; ``drafted`` int32 [B]: how many of the T − 1 places
    hold a draft; ``targets`` int32 [B, T]: the target's own token after each node. The step emits
    ``targets[:, :accepted + 1]``: the drafts that stand, and one more.
    """
    place = jnp.arange(tokens.shape[1] - 1, dtype=jnp.int32)[None]
    stands = (tokens[:, 1:] == targets[:, :-1]) & (place < drafted[:, None])
    return jnp.cumprod(stands.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
