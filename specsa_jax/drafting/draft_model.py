"""Drafting with a whole model: a smaller checkpoint with a cache of its own, or the target itself with fewer blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax import model as transformer
from specsa_jax.cache import (
    Cache,
    Topology,
    chain,
    chain_slots,
    commit,
    create_cache,
    grown_topology,
    make_tail,
    pages_for,
    reads_first,
)
from specsa_jax.config import ConfigError, ModelConfig
from specsa_jax.drafting.base import Context, Draft, Drafter, Seen, Target
from specsa_jax.drafting.grow import Level, expanded_nodes, grow
from specsa_jax.drafting.tree import TreeTemplate


def _grow(config: ModelConfig, params: Any, cache: Cache, context: Context, template: TreeTemplate) -> Draft:
    """The draft of a model whose cache holds all known tokens but the pending one.

    The tree so far is a tail behind the cache, evaluated anew for each depth: nothing is written for a draft.
    """
    dtype, nsa = cache.layers[0].key.dtype, config.nsa
    pending = jnp.take_along_axis(context.tokens, context.known[:, None] - 1, axis=1)
    nodes, width = expanded_nodes(template), template.width

    def forward(tokens: jax.Array, tree: Topology, is_chain: bool) -> jax.Array:
        slots = chain_slots(nsa, tokens.shape[1]) if is_chain else None
        tail = make_tail(nsa, tree, cache.lengths, slots)
        backend = dataclasses.replace(context.backend, is_chain=is_chain)
        return transformer.verify(config, params, tokens, cache, tail, dtype=dtype, backend=backend)[0]

    def evaluate(carry: tuple[jax.Array, jax.Array], level: Level) -> tuple[jax.Array, Any]:
        tokens, parents = carry  # [B, 1 + N]: the pending token, then the levels
        start = 1 + level.step * width
        above = jnp.where(level.step == 0, 0, level.parent + start - width)
        tokens = jax.lax.dynamic_update_slice(tokens, level.tokens, (0, start))
        parents = jax.lax.dynamic_update_slice(parents, above.astype(jnp.int32), (0, start))
        hidden = forward(
            tokens, grown_topology(parents, template.depth - 1, nsa.compress_block), template.is_chain
        )  # fmt: skip
        hidden = jax.lax.dynamic_slice_in_dim(hidden, start, width, axis=1)
        return transformer.head(config, params, hidden, dtype), (tokens, parents)

    # Places not yet reached hang below the pending token (in a chain, one below the other): nobody looks at them.
    waiting = jnp.arange(nodes, dtype=jnp.int32) if template.is_chain else jnp.zeros(nodes, jnp.int32)
    parents = jnp.broadcast_to(jnp.concatenate([jnp.full(1, -1, jnp.int32), waiting]), (pending.shape[0], nodes + 1))
    start = jnp.pad(pending, ((0, 0), (0, nodes))), parents
    first = forward(pending, chain(1, nsa.compress_block), True)
    return grow(evaluate, start, context, template, transformer.head(config, params, first[:, 0], dtype))


@dataclasses.dataclass(frozen=True)
class DraftModel(Drafter):
    """Another checkpoint with the same tokenizer drafts, from its own cache.

    The cache holds what the target's does: drafts are never written to it, so there is nothing to roll back.

    Attributes:
      checkpoint: a packaged name or a checkpoint directory.
      config: of the checkpoint's model; read from it where None.

    Raises CheckpointError for a checkpoint that is none.
    """

    checkpoint: str
    config: ModelConfig | None = None

    def __post_init__(self) -> None:
        if self.config is None:
            from specsa_jax.checkpoints import load_config

            object.__setattr__(self, "config", load_config(self.checkpoint))

    def __str__(self) -> str:
        return f"model:{self.checkpoint}"

    @property
    def has_law(self) -> bool:
        return True

    @property
    def _model(self) -> ModelConfig:
        assert self.config is not None
        return self.config

    def check(self, config: ModelConfig, template: TreeTemplate) -> None:
        if self._model.vocab_size != config.vocab_size:
            raise ValueError(
                f"drafter: the draft model {self.checkpoint} has vocab_size {self._model.vocab_size}, expected the "
                f"target's, {config.vocab_size}"
            )

    def load(self, target: Target) -> Any:
        from specsa_jax import checkpoints

        loaded = checkpoints.load(self.checkpoint)
        if loaded.config != self.config:
            raise ValueError(f"drafter: {self.checkpoint} has another config than DraftModel.config")
        if loaded.tokenizer.get_vocab() != target.tokenizer.get_vocab():
            raise ValueError(f"drafter: the draft model {self.checkpoint} has another tokenizer than the target")
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, target.dtype), loaded.params)

    def init(self, config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> Any:
        columns = pages_for(self._model.nsa, capacity)
        table = np.arange(batch * columns).reshape(batch, columns)
        return create_cache(self._model, table, batch * columns, dtype)

    def observe(self, params: Any, state: Any, seen: Seen) -> Any:
        config, nsa, width = self._model, self._model.nsa, seen.tokens.shape[1]
        backend = dataclasses.replace(seen.backend, is_chain=True)
        tail = make_tail(nsa, chain(width, nsa.compress_block), state.lengths, chain_slots(nsa, width))
        _, tails = reads_first(
            (state.lengths >= 0).all(),
            lambda: transformer.verify(
                config, params, seen.tokens, state, tail, dtype=state.layers[0].key.dtype, backend=backend
            ),
        )
        path = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), seen.tokens.shape)
        return commit(
            nsa, state, tails, tail, path, seen.size,
            implementation=backend.implementation, interpret=backend.interpret,
        )  # fmt: skip

    def propose(self, params: Any, state: Any, context: Context, template: TreeTemplate) -> Draft:
        return _grow(self._model, params, state, context, template)


@dataclasses.dataclass(frozen=True)
class SelfDraft(Drafter):
    """The target drafts for itself with cheaper sparsity: the same weights and cache, fewer selected blocks.

    Attributes:
      num_selected: n while drafting, the forced blocks included.

    Raises ValueError for a number below 1.
    """

    name = "self"

    num_selected: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.num_selected, bool) or not isinstance(self.num_selected, int) or self.num_selected < 1:
            raise ValueError(f"SelfDraft: got num_selected {self.num_selected!r}, expected an integer of at least 1")

    @property
    def has_law(self) -> bool:
        return True

    def _cheap(self, config: ModelConfig) -> ModelConfig:
        return dataclasses.replace(config, nsa=dataclasses.replace(config.nsa, num_selected=self.num_selected))

    def check(self, config: ModelConfig, template: TreeTemplate) -> None:
        if self.num_selected > config.nsa.num_selected:
            raise ValueError(
                f"SelfDraft: got num_selected {self.num_selected}, expected at most the model's, "
                f"{config.nsa.num_selected}"
            )
        try:
            self._cheap(config)
        except ConfigError as error:
            raise ValueError(f"SelfDraft: {error}") from error

    def propose(self, params: Any, state: Any, context: Context, template: TreeTemplate) -> Draft:
        return _grow(self._cheap(context.config), context.params, context.cache, context, template)
