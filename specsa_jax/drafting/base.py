"""What a drafter is."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax


class Draft(NamedTuple):
    """Proposed continuations: tokens int32 [B, K], of which the first ``size`` int32 [B] are meant."""

    tokens: jax.Array
    size: jax.Array


class Drafter(Protocol):
    """A frozen, hashable rule; part of a :class:`specsa_jax.decoding.Strategy` and so of a trace's identity."""

    def propose(self, tokens: jax.Array, known: jax.Array, length: int) -> Draft:
        """Up to ``length`` tokens that may follow sequences int32 [B, S], of which the first ``known`` [B] count."""
        ...


def drafter_from_name(name: str) -> Drafter | None:
    """The drafter called ``name`` with its default settings; None for "none". Raises ValueError listing the names."""
    from specsa_jax.drafting.prompt_lookup import PromptLookup

    known: dict[str, Drafter | None] = {"lookup": PromptLookup(), "none": None}
    if name not in known:
        raise ValueError(f"drafter: got {name!r}, expected one of {', '.join(known)}")
    return known[name]
