"""What a drafter is: a frozen rule, its weights and its state, all of it inside the jitted loop."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from specsa_jax.cache import Cache
from specsa_jax.config import ModelConfig
from specsa_jax.drafting.tree import TreeTemplate
from specsa_jax.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Target:
    """The model that drafts are made for: what :meth:`Drafter.load` may look at."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    dtype: jnp.dtype


class Context(NamedTuple):
    """What a drafter is given in each step.

    Attributes:
      tokens: int32 [B, S], of which the first ``known`` int32 [B] count; the last of these is the pending token.
      active: bool [B]; nobody reads the drafts of the others.
      sampling: the sequences' sampling parameters.
      noise: PRNG keys [B, D]; [:, δ − 1] is the randomness of the drafted tokens at depth δ, whatever their parent.
      cache: the target's, which holds all known tokens but the pending one. To be read only.
      params: the target's.
    """

    tokens: jax.Array
    known: jax.Array
    active: jax.Array
    sampling: Sampling
    noise: jax.Array
    cache: Cache
    params: Any


class Draft(NamedTuple):
    """Proposed continuations as trees in a template of K nodes, numbered 1 … K behind the pending token, node 0.

    Attributes:
      tokens: int32 [B, K].
      valid: bool [B, K]: the nodes that are meant. The ancestors of a valid node are valid.
      parents: int32 [B, K], each before its node (0: the pending token); None where the template is static.
      law: float32 [B, K + 1, V]: log-probabilities from which the children of each node were drawn without
        replacement, in the order of their numbers. None: the draft is a fixed function of the text.
      drawn: bool [B]: the sequences whose draft was drawn from ``law``. None: all, if there is a law.
    """

    tokens: jax.Array
    valid: jax.Array
    parents: jax.Array | None = None
    law: jax.Array | None = None
    drawn: jax.Array | None = None


class Seen(NamedTuple):
    """Tokens that have just been committed to the target's cache, of a prompt or of an accepted path.

    Attributes:
      tokens: int32 [B, A], of which the first ``count`` int32 [B] count; the first stands at ``start`` int32 [B].
      following: int32 [B, A]: the token after each of them, known too. After the last: the pending token.
      features: [B, A, F, H] in the dtype of computation, the target's hidden states that the drafter asked for, or
        None.
    """

    tokens: jax.Array
    following: jax.Array
    start: jax.Array
    count: jax.Array
    features: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Drafter:
    """Base class of drafters. Subclasses are frozen dataclasses: they are part of a
    :class:`specsa_jax.decoding.Strategy`, and so of a compiled program's identity.

    Only :meth:`propose` has to be written. All but :meth:`load` is traced.
    """

    @property
    def features(self) -> tuple[int, ...]:
        """Which hidden states of the target :meth:`observe` needs: behind so many layers each, 1 … layers."""
        return ()

    @property
    def observes(self) -> bool:
        """Whether it wants to see committed tokens; else :meth:`observe` is not called."""
        return type(self).observe is not Drafter.observe

    def check(self, config: ModelConfig, template: TreeTemplate) -> None:
        """Raises ValueError where the drafter cannot draft such trees for such a model. Before any work."""

    def load(self, target: Target) -> Any:
        """Its weights, a pytree that is passed to the compiled loop beside the target's; on the host, once an engine.

        Raises ValueError where it does not belong to this target.
        """
        return ()

    def init(self, config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> Any:
        """The state, a pytree of arrays, before any token, for ``batch`` sequences of up to ``capacity`` tokens.

        ``config`` is the target's. The state is donated to each call and updated in place.
        """
        return ()

    def observe(self, params: Any, state: Any, seen: Seen) -> Any:
        """The state after tokens were committed: prompt tokens in chunks, then the accepted path of each step."""
        return state

    def propose(self, params: Any, state: Any, context: Context, template: TreeTemplate) -> tuple[Draft, Any]:
        """Drafts in the template's form for all sequences, and the state."""
        raise NotImplementedError


def drafter_from_name(name: str) -> Drafter | None:
    """The drafter called ``name`` with its default settings; None for "none". Raises ValueError listing the names."""
    from specsa_jax.drafting.prompt_lookup import PromptLookup

    known: dict[str, Drafter | None] = {"lookup": PromptLookup(), "none": None}
    if name not in known:
        raise ValueError(f"drafter: got {name!r}, expected one of {', '.join(known)}")
    return known[name]
