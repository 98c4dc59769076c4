"""Two drafters: the first where it has a draft, the second elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specsa_jax.config import ModelConfig
from specsa_jax.drafting.base import Context, Draft, Drafter, Seen, Target
from specsa_jax.drafting.tree import TreeTemplate


@dataclasses.dataclass(frozen=True)
class Combined(Drafter):
    """``first`` (prompt lookup, say) where it has a draft for a sequence, ``second`` for the others.

    Raises ValueError for a first drafter with weights, a state or a law of its own.
    """

    first: Drafter
    second: Drafter

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            if not isinstance(getattr(self, name), Drafter):
                raise ValueError(f"Combined.{name}: got {getattr(self, name)!r}, expected a Drafter")
        if self.first.has_law or self.first.observes:
            raise ValueError(f"Combined.first: got {self.first}, expected a drafter without a model, such as lookup")

    def __str__(self) -> str:
        return f"{self.first}+{self.second}"

    @property
    def features(self) -> tuple[int, ...]:
        return self.second.features

    @property
    def observes(self) -> bool:
        return self.second.observes

    @property
    def has_law(self) -> bool:
        return self.second.has_law

    def check(self, config: ModelConfig, template: TreeTemplate) -> None:
        self.first.check(config, template)
        self.second.check(config, template)

    def load(self, target: Target) -> Any:
        return self.second.load(target)

    def init(self, config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> Any:
        return self.second.init(config, batch, capacity, dtype)

    def observe(self, params: Any, state: Any, seen: Seen) -> Any:
        return self.second.observe(params, state, seen)

    def propose(self, params: Any, state: Any, context: Context, template: TreeTemplate) -> Draft:
        first = self.first.propose((), (), context, template)
        found = first.valid.any(axis=1) | ~context.active

        def other() -> Draft:
            return self.second.propose(params, state, context, template)

        # Where lookup serves all, the second is not run at all.
        nothing = jax.eval_shape(other)
        second = jax.lax.cond(
            found.all(), lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nothing), other
        )
        drawn = jnp.ones_like(found) if second.drawn is None else second.drawn

        def choose(first: jax.Array, second: jax.Array) -> jax.Array:
            return jnp.where(found[:, None], first, second)

        return Draft(
            choose(first.tokens, second.tokens),
            choose(first.valid, second.valid),
            None if first.parents is None or second.parents is None else choose(first.parents, second.parents),
            second.law,
            ~found & drawn,
        )
