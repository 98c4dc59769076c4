"""The trained head's network: a small transformer on the target's hidden states that predicts several tokens ahead.

After EAGLE-3 (arXiv 2503.01840). *Slot* t holds token x_t and a state of position t − 1, and predicts x_{t+1}; slots
begin at t = 1. Where the target has computed position t − 1, the state is the fusion of its features there (residual
streams behind a low, a middle and the top layer); beyond, it is the head's own output of slot t − 1. Embedding and
output head are the target's. Attention is windowed, so the head's cache is a ring of constant size.

Three ways through the same layers: :func:`extend` by tokens whose features are known, :func:`grow` by drafted nodes,
which never enter the ring, and :func:`specsa_jax.training.draft_unroll.unroll` over whole sequences.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from specsa_jax import model as transformer
from specsa_jax.cache import ring_positions
from specsa_jax.config import ModelConfig, _Config, _require
from specsa_jax.nsa.rows import in_company
from specsa_jax.nsa.softmax import Keys, attend
from specsa_jax.rope import rotate

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class HeadConfig(_Config):
    """A draft head of one target.

    Attributes:
      target: the target's config: width, vocabulary, RoPE and norm ε are its own.
      features: behind how many of the target's layers its residual stream is read, 1 … layers, ascending.
      layers: the head's own.
      num_heads, num_kv_heads, head_dim: of its attention.
      intermediate: SwiGLU width.
      window: slots that a slot attends to, itself included.
    """

    target: ModelConfig
    features: tuple[int, ...]
    layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    window: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))  # JSON has lists
        self._check_types()
        for name in ("layers", "num_heads", "num_kv_heads", "head_dim", "intermediate"):
            _require(getattr(self, name) >= 1, f"HeadConfig.{name}: got {getattr(self, name)}, expected at least 1")
        depth = self.target.layers
        _require(
            bool(self.features)
            and all(isinstance(at, int) and 1 <= at <= depth for at in self.features)
            and sorted(set(self.features)) == list(self.features),
            f"HeadConfig.features: got {list(self.features)}, expected layers from 1 to {depth}, ascending",
        )
        _require(self.num_heads % self.num_kv_heads == 0,
                 f"HeadConfig.num_heads: got {self.num_heads}, expected a multiple of {self.num_kv_heads}")  # fmt: skip
        _require(self.head_dim % 2 == 0, f"HeadConfig.head_dim: got {self.head_dim}, expected an even number")
        _require(self.window >= 16, f"HeadConfig.window: got {self.window}, expected at least 16")

    @classmethod
    def of(cls, target: ModelConfig, **changes: Any) -> HeadConfig:
        """The default head of a target: one layer, sized like the target's own, a window of 512. Raises ConfigError."""
        depth, nsa = target.layers, target.nsa
        low_to_top = sorted({-(-depth // 3), -(-2 * depth // 3), depth})
        values: dict[str, Any] = {
            "features": tuple(low_to_top), "layers": 1, "num_heads": nsa.num_heads, "num_kv_heads": nsa.num_kv_heads,
            "head_dim": nsa.head_dim, "intermediate": target.intermediate, "window": 512,
        }  # fmt: skip
        return cls(target=target, **(values | changes))


class HeadLayer(nnx.Module):
    """state + attention(norm(token), norm(state)), then state + mlp(norm(state))."""

    def __init__(self, config: HeadConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        width = config.target.hidden
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": jnp.float32, "rngs": rngs}
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
        norm = functools.partial(nnx.RMSNorm, width, epsilon=config.target.norm_eps, **kinds)
        self.token_norm, self.state_norm, self.mlp_norm = norm(), norm(), norm()
        self.q_proj = linear(2 * width, config.num_heads * config.head_dim)
        self.k_proj = linear(2 * width, config.num_kv_heads * config.head_dim)
        self.v_proj = linear(2 * width, config.num_kv_heads * config.head_dim)
        self.o_proj = linear(config.num_heads * config.head_dim, width)
        mlp = dataclasses.replace(config.target, intermediate=config.intermediate)
        self.mlp = transformer.MLP(mlp, dtype=dtype, param_dtype=jnp.dtype(jnp.float32), rngs=rngs)

    def project(self, token: jax.Array, state: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
        """Query [B, T, Hkv, G, D], key and value [B, T, Hkv, D] of [B, T, H] twice; query and key rotated."""
        config, lead = self.config, state.shape[:2]
        x = jnp.concatenate([self.token_norm(token), self.state_norm(state)], axis=-1)
        query = rotate(self.q_proj(x).reshape(*lead, -1, config.head_dim), positions, config.target.rope)
        key = rotate(self.k_proj(x).reshape(*lead, -1, config.head_dim), positions, config.target.rope)
        grouped = query.reshape(*lead, config.num_kv_heads, -1, config.head_dim)
        return grouped, key, self.v_proj(x).reshape(key.shape)

    def finish(self, state: jax.Array, attended: jax.Array) -> jax.Array:
        """The next state of [B, T, H] and the attention's [B, T, Hkv, G, D]."""
        state = state + self.o_proj(attended.astype(state.dtype).reshape(*state.shape[:2], -1))
        return state + self.mlp(self.mlp_norm(state))


class Head(nnx.Module):
    """The module tree that gives the head's parameters their names."""

    def __init__(self, config: HeadConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.target.hidden
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": jnp.float32, "rngs": rngs}
        norm = functools.partial(nnx.RMSNorm, width, epsilon=config.target.norm_eps, **kinds)
        self.feature_norm = norm()
        self.fuse = nnx.Linear(len(config.features) * width, width, use_bias=False, **kinds)
        self.layers = nnx.List([HeadLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.layers)])
        self.norm = norm()

    def fused(self, features: jax.Array) -> jax.Array:
        """The state [B, T, H] that stands for a target's features [B, T, F, H]."""
        return self.fuse(self.feature_norm(features).reshape(*features.shape[:2], -1))


@functools.lru_cache
def _structure(config: HeadConfig, dtype: jnp.dtype) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Head(config, dtype=dtype, rngs=nnx.Rngs(0))))


def bind(config: HeadConfig, params: Params, dtype: jnp.dtype) -> Head:
    """The module around ``params``; to be called inside traced functions, where it costs nothing."""
    graph, state = _structure(config, jnp.dtype(dtype))
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: HeadConfig, seed: int) -> Params:
    """Fresh float32 parameters as a nested dict; projections back into the state start small."""
    module = Head(config, dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(jax.random.key(seed)))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    for layer in params["layers"].values():
        for owner in (layer["o_proj"], layer["mlp"]["down_proj"]):
            owner["kernel"] *= (2 * config.layers) ** -0.5
    return params


def embed(config: HeadConfig, target: Params, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The target's embedding [..., H] of tokens int32 [...]."""
    return target["embed"]["embedding"][tokens].astype(dtype)


def logits(config: HeadConfig, params: Params, target: Params, state: jax.Array) -> jax.Array:
    """float32 [..., V] after states [..., H], by the target's own output head."""
    dtype = state.dtype
    return transformer.head(config.target, target, bind(config, params, dtype).norm(state), dtype)


# --- with a cache -----------------------------------------------------------------------------------------------------


class HeadCache(NamedTuple):
    """The head's memory of a batch.

    Attributes:
      keys, values: [B, Hkv, window, D] a layer: slot t at t mod window.
      state: [B, H], the output of the last slot; zeros before the first.
      length: int32 [B], one more than the last slot; 1 before the first.
    """

    keys: list[jax.Array]
    values: list[jax.Array]
    state: jax.Array
    length: jax.Array


class Drafted(NamedTuple):
    """K/V [B, N, Hkv, D] a layer of up to N drafted nodes."""

    keys: list[jax.Array]
    values: list[jax.Array]


def create_cache(config: HeadConfig, batch: int, dtype: jnp.dtype) -> HeadCache:
    """An empty cache."""

    def rings() -> list[jax.Array]:
        shape = (batch, config.num_kv_heads, config.window, config.head_dim)
        return [jnp.zeros(shape, dtype) for _ in range(config.layers)]

    return HeadCache(rings(), rings(), jnp.zeros((batch, config.target.hidden), dtype), jnp.ones(batch, jnp.int32))


def create_drafted(config: HeadConfig, batch: int, nodes: int, dtype: jnp.dtype) -> Drafted:
    """Room for the K/V of ``nodes`` drafted nodes."""
    shape = (batch, nodes, config.num_kv_heads, config.head_dim)
    return Drafted(*([jnp.zeros(shape, dtype) for _ in range(config.layers)] for _ in range(2)))


def extend(
    config: HeadConfig,
    params: Params,
    target: Params,
    cache: HeadCache,
    tokens: jax.Array,
    features: jax.Array,
    count: jax.Array,
) -> HeadCache:
    """The cache with ``count`` int32 [B] more slots, of T given: a chain behind the last.

    ``tokens`` int32 [B, T] are the slots' own, ``features`` [B, T, F, H] the target's at the position before each.
    """
    size, dtype = tokens.shape[1], cache.state.dtype
    head = bind(config, params, dtype)
    place = jnp.arange(size, dtype=jnp.int32)
    positions = cache.length[:, None] + place
    chain = (place[None, :] <= place[:, None]) & (place[None, :] > place[:, None] - config.window)
    state, drafted = _run(
        config, head, embed(config, target, tokens, dtype), head.fused(features.astype(dtype)), positions, cache,
        create_drafted(config, tokens.shape[0], size, dtype), jnp.int32(0), chain[None],
    )  # fmt: skip
    # Of slots that meet in one place of the ring only the last may be written: scatters have no order.
    kept = (place < count[:, None]) & (place >= count[:, None] - config.window)
    rows, where = jnp.arange(tokens.shape[0])[:, None], jnp.where(kept, positions % config.window, config.window)

    def written(ring: jax.Array, new: jax.Array) -> jax.Array:
        return ring.at[rows, :, where].set(new, mode="drop")

    last = jnp.take_along_axis(state, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return HeadCache(
        list(map(written, cache.keys, drafted.keys)),
        list(map(written, cache.values, drafted.values)),
        jnp.where((count > 0)[:, None], last, cache.state),
        cache.length + count,
    )


def grow(
    config: HeadConfig,
    params: Params,
    target: Params,
    cache: HeadCache,
    drafted: Drafted,
    first: jax.Array,
    tokens: jax.Array,
    states: jax.Array,
    depth: jax.Array,
    visible: jax.Array,
) -> tuple[jax.Array, Drafted]:
    """States [B, M, H] of M more drafted nodes, and ``drafted`` with their K/V at ``first`` … ``first`` + M − 1.

    ``tokens`` int32 [B, M]; ``states`` [B, M, H] of their parents; ``depth`` int32 [B or 1, M], 0 for the children of
    the last slot; ``visible`` bool [B or 1, M, N]: the drafted nodes on their paths, themselves included.
    """
    dtype = cache.state.dtype
    head = bind(config, params, dtype)
    positions = cache.length[:, None] + depth
    token = embed(config, target, tokens, dtype)
    return _run(config, head, token, states, positions, cache, drafted, first, visible)


def _run(
    config: HeadConfig,
    head: Head,
    token: jax.Array,
    state: jax.Array,
    positions: jax.Array,
    cache: HeadCache,
    drafted: Drafted,
    first: jax.Array,
    visible: jax.Array,
) -> tuple[jax.Array, Drafted]:
    """The layers over new slots that see the ring and, where ``visible`` [B or 1, T, N], ``drafted`` and each other."""
    scale = config.head_dim**-0.5
    at = ring_positions(cache.length, config.window)[:, None, :]
    near = (at >= 1) & (at > positions[:, :, None] - config.window)
    keys, values = [], []
    for index, layer in enumerate(head.layers):
        query, key, value = in_company(layer.project, token, state, positions)
        keys.append(jax.lax.dynamic_update_slice_in_dim(drafted.keys[index], key, first, axis=1))
        values.append(jax.lax.dynamic_update_slice_in_dim(drafted.values[index], value, first, axis=1))
        ring = _keys(query, cache.keys[index], cache.values[index], near, scale, "bhcd")
        own = _keys(query, keys[-1], values[-1], visible, scale, "bchd")
        state = in_company(layer.finish, state, attend([ring, own]))
    return state, Drafted(keys, values)


def _keys(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, scale: float, order: str) -> Keys:
    """Keys and values, of axes ``order``, shared by all queries [B, T, Hkv, G, D], ``visible`` bool [B or 1, T, K]."""
    scores = jnp.einsum(f"bthgd,{order}->bthgc", query, key, preferred_element_type=jnp.float32) * scale

    def weigh(probs: jax.Array) -> jax.Array:
        return jnp.einsum(f"bthgc,{order}->bthgd", probs.astype(value.dtype), value, preferred_element_type=jnp.float32)

    return Keys(scores, visible[:, :, None, None, :], weigh)
