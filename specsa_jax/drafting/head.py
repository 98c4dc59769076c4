"""The trained head as a drafter: chains and trees out of the target's own hidden states.

The network is :mod:`specsa_jax.drafting.head_model` (EAGLE-3, arXiv 2503.01840); ``specsa train-draft`` trains one.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp

from specsa_jax.config import ModelConfig
from specsa_jax.drafting import head_model
from specsa_jax.drafting.base import Context, Draft, Drafter, Seen, Target
from specsa_jax.drafting.grow import Level, expanded_nodes, grow
from specsa_jax.drafting.head_model import HeadCache, HeadConfig
from specsa_jax.drafting.tree import TreeTemplate


@dataclasses.dataclass(frozen=True)
class TrainedHead(Drafter):
    """Attributes:
    path: a head's directory, a checkpoint that has one in ``draft/``, or a packaged name.
    config: the head's, read from there.

    Raises CheckpointError (a ValueError) where ``path`` has no head.
    """

    path: str | os.PathLike[str] = "embedded"
    config: HeadConfig = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        from specsa_jax.checkpoints import draft_head

        object.__setattr__(self, "config", draft_head.read_config(self.path))
        object.__setattr__(self, "path", os.fspath(self.path))

    def __str__(self) -> str:
        return f"head:{self.path}"

    @property
    def features(self) -> tuple[int, ...]:
        return self.config.features

    @property
    def has_law(self) -> bool:
        return True

    def check(self, config: ModelConfig, template: TreeTemplate) -> None:
        if config != self.config.target:
            from specsa_jax.checkpoints import draft_head

            raise ValueError(
                f"drafter: the head {self.path} belongs to a target of another config: "
                + draft_head.differences(self.config.target, config)
            )
        if template.depth >= self.config.window:
            raise ValueError(
                f"tree: got {template.text}, {template.depth} tokens deep, expected less than the head's window of "
                f"{self.config.window}"
            )

    def load(self, target: Target) -> Any:
        from specsa_jax.checkpoints import draft_head

        head = draft_head.load(self.path)
        draft_head.check_target(head, target.config, target.params, target.tokenizer)
        return {
            "head": jax.tree.map(lambda leaf: jnp.asarray(leaf, target.dtype), head.params),
            "target": {"embed": target.params["embed"]},  # shared, not copied
        }

    def init(self, config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> HeadCache:
        return head_model.create_cache(self.config, batch, dtype)

    def observe(self, params: Any, state: HeadCache, seen: Seen) -> HeadCache:
        """A committed token's features and the token after it make a slot."""
        assert seen.features is not None
        return head_model.extend(
            self.config, params["head"], params["target"], state, seen.following, seen.features, seen.size
        )

    def propose(self, params: Any, state: HeadCache, context: Context, template: TreeTemplate) -> Draft:
        """Grown by the head's probabilities, depth by depth; drafted nodes never enter the state."""
        width, batch = template.width, context.tokens.shape[0]

        def law(states: jax.Array) -> jax.Array:
            return head_model.logits(self.config, params["head"], context.params, states)

        def evaluate(carry: Any, level: Level) -> tuple[jax.Array, Any]:
            states, drafted = carry
            above = jnp.take_along_axis(states, level.parent[..., None], axis=1)
            states, drafted = head_model.grow(
                self.config, params["head"], context.params, state, drafted, level.step * width, level.tokens, above,
                level.step[None, None], level.ancestor,
            )  # fmt: skip
            return law(states), (states, drafted)

        pending = jnp.broadcast_to(state.state[:, None], (batch, width, state.state.shape[1]))
        drafted = head_model.create_drafted(self.config, batch, expanded_nodes(template), state.state.dtype)
        return grow(evaluate, (pending, drafted), context, template, law(state.state), small=True)
