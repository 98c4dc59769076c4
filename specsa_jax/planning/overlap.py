"""What adjacent queries share of the blocks that they select."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax import model as transformer
from specsa_jax.cache import Cache, chain, chain_slots, make_tail
from specsa_jax.config import NSAConfig
from specsa_jax.engine import Engine
from specsa_jax.nsa.cached import Backend
from specsa_jax.planning.profile import Overlap

DISTANCES = (1, 2, 4, 8, 16)


def selected_blocks(engine: Engine, params: Any, tokens: jax.Array, cache: Cache) -> jax.Array:
    """Block ids int32 [layers, B, T, Hkv, n] that the queries of a chain int32 [B, T] behind the cache select."""
    config, nsa, width = engine.config, engine.config.nsa, tokens.shape[1]
    tail = make_tail(nsa, chain(width, nsa.compress_block), cache.lengths, chain_slots(nsa, width))
    model = transformer.bind(config, params, engine.dtype)
    x, found = model.embedded(tokens), []
    for layer, layer_cache in zip(model.layers, cache.layers, strict=True):
        x, _, selected = layer.tail(x, cache, layer_cache, tail, Backend("xla"))
        found.append(selected)
    return jnp.stack(found)


def overlaps(selected: np.ndarray, context: int, nsa: NSAConfig) -> Iterator[Overlap]:
    """What adjacent queries share of the blocks int32 [layers, B, T, Hkv, n] that they select (−1: none).

    Query t stands at position ``context`` + t.
    """
    own = (context + np.arange(selected.shape[2])) // nsa.select_block
    back = own[:, None, None] - selected
    forced = (selected < nsa.num_initial) | ((back >= 0) & (back < nsa.num_local))
    for layer, (blocks, is_forced) in enumerate(zip(selected, forced, strict=True)):
        for distance in (one for one in DISTANCES if one < selected.shape[2]):
            later, before = blocks[:, distance:], blocks[:, :-distance]
            real = later >= 0
            found = (later[..., :, None] == before[..., None, :]).any(axis=-1) & real
            free = real & ~is_forced[:, distance:]
            yield Overlap(layer, context, distance, float(found.sum() / real.sum()),
                          float(found[free].mean()) if free.any() else 0.0)  # fmt: skip
