"""What a drafter is: a frozen rule, its weights and its state, all of it inside the jitted loop."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from specsa_jax.cache import Cache, grown_topology
from specsa_jax.config import ModelConfig
from specsa_jax.drafting.tree import TreeTemplate
from specsa_jax.nsa.cached import Backend
from specsa_jax.sampling import Sampling

# So many largest are found one by one, more by sorting: of so many values at most.
_REDUCTIONS, _SORTED = 8, 4096


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
      params, config: the target's.
      backend: how to compute attention.
      keep_law: acceptance needs ``Draft.law``; only drafters that have one (``has_law``) are asked for it.
    """

    tokens: jax.Array
    known: jax.Array
    active: jax.Array
    sampling: Sampling
    noise: jax.Array
    cache: Cache
    params: Any
    config: ModelConfig
    backend: Backend = Backend()
    keep_law: bool = False


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
      tokens: int32 [B, A], of which the first ``size`` int32 [B] count; the first stands at ``start`` int32 [B].
      following: int32 [B, A]: the token after each of them, known too. After the last: the pending token.
      features: [B, A, F, H] in the dtype of computation, the target's hidden states that the drafter asked for, or
        None.
      backend: how to compute attention (static).
    """

    tokens: jax.Array
    following: jax.Array
    start: jax.Array
    size: jax.Array
    features: jax.Array | None
    backend: Backend = Backend()


@dataclasses.dataclass(frozen=True)
class Drafter:
    """Base class of drafters. Subclasses are frozen dataclasses: they are part of a
    :class:`specsa_jax.strategy.Strategy`, and so of a compiled program's identity.

    Only :meth:`propose` has to be written. All but :meth:`load` and :meth:`replay` is traced.
    """

    name: ClassVar[str] = ""  # as :func:`drafter_from_name` reads it

    def __str__(self) -> str:
        """The name, and the fields that are not their defaults."""
        fields = [field for field in dataclasses.fields(self) if field.init and field.repr]
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields if getattr(self, f.name) != f.default]
        return (self.name or type(self).__name__) + (f"({', '.join(changed)})" if changed else "")

    @property
    def features(self) -> tuple[int, ...]:
        """Which hidden states of the target :meth:`observe` needs: behind so many layers each, 1 … layers."""
        return ()

    @property
    def has_law(self) -> bool:
        """Whether its drafts can be drawn from a law that it gives; else they are a fixed function of the text."""
        return False

    @property
    def observes(self) -> bool:
        """Whether it wants to see committed tokens; else :meth:`observe` is not called."""
        return type(self).observe is not Drafter.observe

    @property
    def replays(self) -> bool:
        """Whether there is :meth:`replay`: then planners try it on prompts (:mod:`specsa_jax.planning.replay`)."""
        return type(self).replay is not Drafter.replay

    def replay(self, text: np.ndarray, known: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """What :meth:`propose` gives behind the first ``known`` int32 [N], 1 to T, of the tokens of ``text`` int32 [T],
        where it reads nothing else: chains int32 [N, depth], and bool [N, depth] where there are any. On the host."""
        raise NotImplementedError

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

    def propose(self, params: Any, state: Any, context: Context, template: TreeTemplate) -> Draft:
        """Drafts in the template's form for all sequences. It changes no state: a step may do without."""
        raise NotImplementedError


def depth_first(draft: Draft, depth: int) -> Draft:
    """The same trees, at most ``depth`` deep and grown (with parents of their own), numbered depth-first."""
    assert draft.parents is not None and draft.law is None
    parents = jnp.pad(draft.parents, ((0, 0), (1, 0)), constant_values=-1)
    tree = grown_topology(parents, depth, 1)
    node = jnp.arange(parents.shape[1], dtype=jnp.int32)
    # Before a node come its ancestors, and the subtrees of its and their elder siblings.
    offspring = tree.ancestor.sum(axis=1, dtype=jnp.int32)  # [B, T], each node itself included
    elder = (parents[:, :, None] == parents[:, None, :]) & (node[None, :] < node[:, None])
    before = jnp.where(elder, offspring[:, None, :], 0).sum(axis=-1)
    place = tree.depth + jnp.where(tree.ancestor, before[:, None, :], 0).sum(axis=-1)
    order = jnp.argsort(place, axis=1)[:, 1:]  # old numbers by their new ones
    above = jnp.take_along_axis(place, jnp.take_along_axis(parents, order, axis=1), axis=1)
    return draft._replace(
        tokens=jnp.take_along_axis(draft.tokens, order - 1, axis=1),
        valid=jnp.take_along_axis(draft.valid, order - 1, axis=1),
        parents=above.astype(jnp.int32),
    )


_REGISTERED: dict[str, Callable[[str, str], Drafter | None]] = {}


def register_drafter(name: str, make: Callable[[str, str], Drafter | None]) -> None:
    """Gives a drafter a name, for :func:`drafter_from_name` and ``specsa generate --drafter``.

    ``make(where, checkpoint)`` is given what stands behind a colon ("" without one) and the target's checkpoint.
    Raises ValueError for a name that is taken, or has ``+``, ``:`` or ``.`` in it.
    """
    if not name or name in _REGISTERED or set(name) & set("+:."):
        raise ValueError(f"name: got {name!r}, expected a new name without +, : and .")
    _REGISTERED[name] = make


def is_registered(name: str) -> bool:
    """Whether ``name`` (``a+b``, too) is of this package's drafters, or registered ones, not of a class by its path."""
    return all(part.partition(":")[0] in _REGISTERED for part in name.split("+"))


def drafter_from_name(name: str, checkpoint: str = "embedded") -> Drafter | None:
    """The drafter called ``name``, for the target ``checkpoint``, with its default settings; None for "none".

    ``head`` is the target's trained head, ``head:PATH`` one from elsewhere; ``model:PATH`` drafts with a checkpoint;
    ``a+b`` takes a where it has a draft, else b; ``package.module:Name`` is a class of one's own, or a function that
    makes a drafter.

    Raises ValueError listing the names, and what the drafter raises.
    """
    first, plus, second = name.partition("+")
    if plus:
        from specsa_jax.drafting.combined import Combined

        left, right = drafter_from_name(first, checkpoint), drafter_from_name(second, checkpoint)
        if left is None or right is None:
            raise ValueError(f"drafter: got {name!r}, expected two drafters around the +")
        return Combined(left, right)
    kind, colon, where = name.partition(":")
    if kind in _REGISTERED:
        try:
            return _REGISTERED[kind](where, checkpoint)
        except ValueError as error:
            if str(error).startswith("drafter:"):
                raise
            raise type(error)(f"drafter: {name}: {error}") from error
    known = ", ".join([*_REGISTERED, "a+b", "package.module:Name"])
    if not (colon and kind and where):
        raise ValueError(f"drafter: got {name!r}, expected one of {known}")
    try:
        made = getattr(importlib.import_module(kind), where)()
    except Exception as error:  # whatever the code of others raises
        raise ValueError(f"drafter: got {name!r}, expected one of {known}: {error!r}") from error
    if not isinstance(made, Drafter):
        raise ValueError(f"drafter: {name} makes {made!r}, expected a Drafter")
    return made


def top(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The ``count`` largest [..., C] of ``values`` [..., N], and where they are, int32; among equals the first comes
    first.

    ``jax.lax.top_k``; on a GPU by other means, where they are not too slow: a loop with its kernel was seen outside of
    CUDA graphs there.
    """
    if jax.default_backend() != "gpu" or (count > _REDUCTIONS and values.shape[-1] > _SORTED):
        found, at = jax.lax.top_k(values, count)
        return found, at.astype(jnp.int32)
    if count > _REDUCTIONS:
        at = jnp.argsort(-values, axis=-1, stable=True)[..., :count].astype(jnp.int32)
        return jnp.take_along_axis(values, at, axis=-1), at
    place, taken, each = jnp.arange(values.shape[-1], dtype=jnp.int32), None, []
    for _ in range(count):
        left = values if taken is None else jnp.where(taken, -jnp.inf, values)
        at = jnp.argmax(left, axis=-1, keepdims=True).astype(jnp.int32)
        found = jnp.take_along_axis(left, at, axis=-1)
        if taken is not None:  # the first of all is found either way; XLA took seconds to reduce a constant
            at = jnp.where(found == -jnp.inf, jnp.argmin(taken, axis=-1, keepdims=True), at).astype(jnp.int32)
        each.append((found, at))
        taken = place == at if taken is None else taken | (place == at)
    found, at = (jnp.concatenate(parts, axis=-1) for parts in zip(*each, strict=True))
    return found, at
