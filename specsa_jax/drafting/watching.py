"""One drafter drafts, others watch: so that a drafter with a state of its own can take over in the middle of a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from specsa_jax.config import ModelConfig
from specsa_jax.drafting.base import Context, Draft, Drafter, Seen, Target
from specsa_jax.drafting.combined import Combined
from specsa_jax.drafting.tree import TreeTemplate


def watcher(drafter: Drafter | None) -> Drafter | None:
    """The drafter whose state it is that ``drafter`` drafts from; None where it has none."""
    while isinstance(drafter, Combined):
        drafter = drafter.second
    return drafter if drafter is not None and drafter.observes else None


@dataclasses.dataclass(frozen=True)
class Watching(Drafter):
    """``drafter`` drafts (None: nobody does, and the target decodes one token at a time); all of ``watchers`` see what
    is committed. With the same watchers the state is the same, whoever drafts.

    Raises ValueError for a watcher that keeps no state, and for a drafter with a state that is none of the watchers'.
    """

    drafter: Drafter | None
    watchers: tuple[Drafter, ...]

    def __post_init__(self) -> None:
        for index, one in enumerate(self.watchers):
            if watcher(one) != one:
                raise ValueError(f"watchers[{index}]: got {one}, expected a drafter with a state of its own")
        own = watcher(self.drafter)
        if own is not None and own not in self.watchers:
            raise ValueError(f"drafter: got {self.drafter}, expected its {own} among the watchers")

    def __str__(self) -> str:
        return str(self.drafter)

    @property
    def features(self) -> tuple[int, ...]:
        return tuple(sorted({feature for one in self.watchers for feature in one.features}))

    @property
    def observes(self) -> bool:
        return bool(self.watchers)

    @property
    def has_law(self) -> bool:
        return self.drafter is not None and self.drafter.has_law

    def check(self, config: ModelConfig, template: TreeTemplate) -> None:
        if self.drafter is not None:
            self.drafter.check(config, template)

    def load(self, target: Target) -> Any:
        return self.gather(lambda one: one.load(target))

    def gather(self, load: Callable[[Drafter], Any]) -> Any:
        """The weights, by ``load`` of each drafter: (those of one that drafts without watching, the watchers')."""
        alone = () if self.drafter is None or self._own is not None else load(self.drafter)
        return alone, tuple(map(load, self.watchers))

    def init(self, config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> Any:
        return tuple(one.init(config, batch, capacity, dtype) for one in self.watchers)

    def observe(self, params: Any, state: Any, seen: Seen) -> Any:
        def show(one: Drafter, params: Any, state: Any) -> Any:
            features = None
            if one.features:
                assert seen.features is not None
                at = [self.features.index(feature) for feature in one.features]
                # A drafter that gets all of them gets them as they are.
                features = seen.features if one.features == self.features else seen.features[:, :, jnp.asarray(at)]
            return one.observe(params, state, seen._replace(features=features))

        return tuple(map(show, self.watchers, params[1], state))

    def propose(self, params: Any, state: Any, context: Context, template: TreeTemplate) -> Draft:
        if self.drafter is None:
            shape = (context.tokens.shape[0], template.nodes)
            parents = None if template.is_static else jnp.zeros(shape, jnp.int32)
            return Draft(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), parents)
        if self._own is None:
            return self.drafter.propose(params[0], (), context, template)
        return self.drafter.propose(params[1][self._own], state[self._own], context, template)

    @property
    def _own(self) -> int | None:
        """Which watcher's state the drafter drafts from."""
        own = watcher(self.drafter)
        return None if own is None else self.watchers.index(own)
