"""How a drafter would have fared on the prompt itself: it drafts at places of the prompt's tail, whose next tokens are
known. Costs no pass of the target."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax.drafting import Context, Drafter, parse_tree

PLACES, SPAN = 32, 256  # drafts, spread over so many last tokens
# Steps of decoding that a replay counts for: a text is harder to foresee than what a model makes of it.
WORTH = 8.0


@functools.partial(jax.jit, static_argnames=("drafter", "depth"))
def drafts(tokens: jax.Array, known: jax.Array, *, drafter: Drafter, depth: int) -> tuple[jax.Array, jax.Array]:
    """Chains int32 [N, depth] that ``drafter`` (one that ``replays``) proposes behind the first ``known`` int32 [N] of
    ``tokens`` int32 [S], and bool [N, depth] where it does."""
    shape = (known.shape[0], tokens.shape[0])
    nothing: Any = None  # what a drafter that replays does not look at
    context = Context(
        jnp.broadcast_to(tokens, shape), known, jnp.ones(shape[0], bool), nothing, nothing, nothing, nothing, nothing
    )
    draft = drafter.propose((), (), context, parse_tree(f"chain:{depth}"))
    return draft.tokens, draft.valid


def places(length: int, depth: int) -> np.ndarray:
    """int32 [PLACES]: how much of a prompt of ``length`` tokens is known at each draft; as far as that goes, so that
    all ``depth`` next tokens are known too."""
    last = max(1, length - depth)
    first = max(1, last - SPAN)
    return np.linspace(first, last, PLACES).astype(np.int32)


def fates(row: np.ndarray, known: np.ndarray, chains: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Histograms float [depth + 1] of drafts by depth, and by the tokens of them that ``row`` int32 [T] has."""
    depth = chains.shape[1]
    at = known[:, None] + np.arange(depth)
    there = at < len(row)
    stands = valid & there & (chains == row[np.minimum(at, len(row) - 1)])
    accepted = np.cumprod(stands, axis=1).sum(axis=1)
    drafted = np.where(valid[:, 0], np.maximum((valid & there).sum(axis=1), accepted), 0)
    return tuple(np.bincount(x, minlength=depth + 1).astype(float) for x in (drafted, accepted))  # type: ignore[return-value]
