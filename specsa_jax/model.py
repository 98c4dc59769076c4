"""The transformer (Flax NNX): pre-RMSNorm, RoPE, GQA, SwiGLU, NSA in every layer.

Two forward passes share all weights and projections: :func:`hidden_states` over whole sequences (differentiable) and
:func:`verify` of a tail of new tokens against a cache (prefill, decode, verification). Both take parameters as a plain
nested dict (docs/architecture.md lists it) and merge it into the module inside the traced function.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from specsa_jax.cache import Cache, LayerCache, LayerTail, Tail
from specsa_jax.config import ModelConfig
from specsa_jax.nsa.cached import Backend, Reuse, attend_cached
from specsa_jax.nsa.compression import Compress
from specsa_jax.nsa.rows import Rows, in_company, together
from specsa_jax.nsa.sequence import Projected, attend_sequence
from specsa_jax.rope import rotate_query

Params = dict[str, Any]


class Attention(nnx.Module):
    """An NSA layer: projections, gates and the two φ around the attention operations of ``specsa_jax.nsa``."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        nsa = config.nsa
        self.config = config
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kv_width = nsa.branch_sets * nsa.num_kv_heads * nsa.head_dim
        self.q_proj = linear(config.hidden, nsa.num_heads * nsa.head_dim, use_bias=False)
        self.k_proj = linear(config.hidden, kv_width, use_bias=False)
        self.v_proj = linear(config.hidden, kv_width, use_bias=False)
        self.o_proj = linear(nsa.num_heads * nsa.head_dim, config.hidden, use_bias=False)
        if nsa.qk_norm:
            norm = functools.partial(nnx.RMSNorm, nsa.head_dim, epsilon=config.norm_eps)
            self.q_norm = norm(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            self.k_norm = norm(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if nsa.gate_outputs:
            self.gate_proj = linear(config.hidden, nsa.gate_outputs, use_bias=nsa.gate_bias)
        elif nsa.gate == "query_mlp":
            self.gate_in = linear(nsa.head_dim, nsa.gate_hidden)
            self.gate_out = linear(nsa.gate_hidden, 3)
        phi = functools.partial(Compress, nsa, dtype=dtype, rngs=rngs)
        self.compress_k = phi(has_position=nsa.compress_position != "none")
        if nsa.compressed_output:
            self.compress_v = phi(has_position=nsa.compress_position == "both")

    def project(self, x: jax.Array, positions: jax.Array) -> Projected:
        """Queries, raw keys and values, and gates of x [B, T, H] at ``positions`` int32 [B or 1, T]."""
        nsa, lead = self.config.nsa, x.shape[:2]
        sets = (*lead, nsa.branch_sets, nsa.num_kv_heads, nsa.head_dim)
        query = self.q_proj(x).reshape(*lead, nsa.num_heads, nsa.head_dim)
        key = self.k_proj(x).reshape(sets)
        if nsa.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate_query(query, positions, self.config.rope)
        gates = None
        if nsa.gate_outputs:
            gates = jax.nn.sigmoid(self.gate_proj(x).astype(jnp.float32))
            gates = gates.reshape(*lead, -1, 3)
            gates = jnp.broadcast_to(gates, (*lead, nsa.num_heads, 3))
        elif nsa.gate == "query_mlp":
            pooled = query.reshape(*lead, nsa.num_kv_heads, nsa.group, nsa.head_dim).mean(axis=-2)
            inner = jax.nn.silu(self.gate_in(pooled))
            gates = jax.nn.softmax(self.gate_out(inner).astype(jnp.float32), axis=-1)
            gates = jnp.repeat(gates, nsa.group, axis=-2)
        return Projected(query, key, self.v_proj(x).reshape(sets), gates)

    @property
    def _phi_value(self) -> Compress | None:
        return self.compress_v if self.config.nsa.compressed_output else None

    def sequence(self, x: jax.Array, query_chunk: int) -> jax.Array:
        """[B, S, H] → [B, S, H] over whole sequences."""
        projected = self.project(x, jnp.arange(x.shape[1], dtype=jnp.int32)[None])
        out = attend_sequence(
            self.config.nsa, self.config.rope, self.compress_k, self._phi_value, projected, query_chunk
        )
        return self.o_proj(out.reshape(*x.shape[:2], -1))

    def attend(
        self,
        projected: Projected,
        cache: Cache,
        layer: LayerCache,
        tail: Tail,
        backend: Backend,
        reuse: Reuse | None = None,
    ) -> tuple[jax.Array, LayerTail, Any]:
        """Attention's output [B, T, Hq, D] for the tail's tokens against the cache, what a commit needs, and the
        selection."""
        return attend_cached(
            self.config.nsa, self.config.rope, self.compress_k, self._phi_value, projected, cache, layer, tail, backend,
            reuse,
        )  # fmt: skip


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)), or without a gate: down(silu(up(x)))."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gated = config.mlp == "swiglu"
        if self.gated:
            self.gate_proj = linear(config.hidden, config.intermediate)
        self.up_proj = linear(config.hidden, config.intermediate)
        self.down_proj = linear(config.intermediate, config.hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x) if self.gated else jax.nn.silu(self.up_proj(x))
        return self.down_proj(inner)


class Layer(nnx.Module):
    """x + r·attention(norm(x)), then x + r·mlp(norm(x)), where r is ``residual_scale``."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.residual_scale = config.residual_scale
        self.attn_norm = nnx.RMSNorm(config.hidden, epsilon=config.norm_eps, **kinds)
        self.attn = Attention(config, **kinds)
        self.mlp_norm = nnx.RMSNorm(config.hidden, epsilon=config.norm_eps, **kinds)
        self.mlp = MLP(config, **kinds)

    def sequence(self, x: jax.Array, query_chunk: int) -> jax.Array:
        x = x + self._scaled(self.attn.sequence(self.attn_norm(x), query_chunk))
        return x + self._scaled(self.mlp(self.mlp_norm(x)))

    def _scaled(self, x: jax.Array) -> jax.Array:
        return x if self.residual_scale == 1.0 else x * self.residual_scale

    def tail(
        self, x: jax.Array, cache: Cache, layer: LayerCache, tail: Tail, backend: Backend, reuse: Reuse | None = None
    ) -> tuple[jax.Array, LayerTail, Any]:
        """[B, T, H] → [B, T, H] for the tail's tokens against the cache, what a commit of them needs, and the
        selection."""
        rows = backend.rows(cache)
        rows = in_company if rows is together else rows
        projected = rows(lambda x, at: self.attn.project(self.attn_norm(x), at), x, tail.positions)
        out, layer_tail, selected = self.attn.attend(projected, cache, layer, tail, backend, reuse)

        def finish(x: jax.Array, out: jax.Array) -> jax.Array:
            x = x + self._scaled(self.attn.o_proj(out.reshape(*x.shape[:2], -1)))
            return x + self._scaled(self.mlp(self.mlp_norm(x)))

        return rows(finish, x, out), layer_tail, selected


class Transformer(nnx.Module):
    """The module tree that gives parameters their names; computes in ``dtype``, stores in ``param_dtype``."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        scale = nnx.initializers.normal(config.hidden**-0.5)
        self.embed = nnx.Embed(config.vocab_size, config.hidden, embedding_init=scale, **kinds)
        self.layers = nnx.List([Layer(config, **kinds) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.hidden, epsilon=config.norm_eps, **kinds)
        if not config.tied:
            self.head = nnx.Linear(config.hidden, config.vocab_size, use_bias=False, **kinds)

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """[..., H] of tokens int32 [...]."""
        x = self.embed(tokens)
        return x if self.config.embed_scale == 1.0 else x * self.config.embed_scale

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., V] of final-normed hidden states [..., H]."""
        kernel = self.embed.embedding[...].T if self.config.tied else self.head.kernel[...]
        logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale


@functools.lru_cache
def _structure(config: ModelConfig, dtype: jnp.dtype, param_dtype: jnp.dtype) -> tuple[Any, Any]:
    def build() -> Transformer:
        return Transformer(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))

    return nnx.split(nnx.eval_shape(build))


def bind(config: ModelConfig, params: Params, dtype: jnp.dtype) -> Transformer:
    """The module around ``params``; to be called inside traced functions, where it costs nothing."""
    graph, state = _structure(config, jnp.dtype(dtype), jnp.dtype(jnp.float32))
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def init_params(config: ModelConfig, seed: int, dtype: jnp.dtype = jnp.float32) -> Params:
    """Fresh parameters as a nested dict of ``dtype`` arrays; output projections shrink with depth (GPT-2)."""
    # One compiled layer, called once a layer: compiling the random numbers of all 8B parameters takes minutes.
    ends, *keys = jax.random.split(jax.random.key(seed), 1 + config.layers)
    params = _init_ends(dataclasses.replace(config, layers=1), jnp.dtype(dtype), ends)
    return params | {"layers": {i: _init_layer(config, jnp.dtype(dtype), key) for i, key in enumerate(keys)}}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init_ends(config: ModelConfig, dtype: jnp.dtype, key: jax.Array) -> Params:
    model = Transformer(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(key))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    del params["layers"]
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init_layer(config: ModelConfig, dtype: jnp.dtype, key: jax.Array) -> Params:
    layer = Layer(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(key))
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    for owner, name in (("attn", "o_proj"), ("mlp", "down_proj")):
        params[owner][name]["kernel"] *= (2 * config.layers) ** -0.5
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: bool = True,
    query_chunk: int = 256,
    features: tuple[int, ...] = (),
) -> Any:
    """Final-normed hidden states [B, S, H] of whole sequences int32 [B, S]; causal, differentiable.

    Attention works in chunks of ``query_chunk`` queries and never holds an S × S array; with ``remat`` a layer's
    activations are recomputed in the backward pass.

    ``features`` are counts of layers, 1 … layers: with them the result is (hidden states, features [B, S, F, H]), the
    residual stream behind so many layers, before any norm.
    """
    model = bind(config, params, dtype)
    # One traced layer, scanned: compile time does not grow with depth.
    graph, _ = nnx.split(model.layers[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(layer) for layer in model.layers))

    x = model.embedded(tokens)
    wanted = jnp.arange(1, config.layers + 1)[:, None] == jnp.asarray(features, jnp.int32)  # [layers, F]
    taken = jnp.zeros((*x.shape[:2], len(features), x.shape[2]), x.dtype)

    def run(carry: tuple[jax.Array, jax.Array], xs: tuple[Any, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], None]:
        (x, taken), (state, here) = carry, xs
        x = nnx.merge(graph, state).sequence(x, query_chunk)
        return (x, jnp.where(here[:, None], x[:, :, None], taken)), None

    (x, taken), _ = jax.lax.scan(jax.checkpoint(run) if remat else run, (x, taken), (stacked, wanted))
    return (model.norm(x), taken) if features else model.norm(x)


def head(
    config: ModelConfig, params: Params, hidden: jax.Array, dtype: jnp.dtype = jnp.float32, rows: Rows = together
) -> jax.Array:
    """Logits float32 [..., V] of final-normed hidden states [..., H]; [B, T, H] by ``rows``."""
    return rows(bind(config, params, dtype).logits, hidden)


# A function of its own, so that a program traces and lowers it once for all layers of a kind.
@functools.partial(jax.jit, static_argnames=("graph", "backend", "reuse", "keep_compressed"))
def _tail(
    state: Any, x: jax.Array, cache: Cache, layer_cache: LayerCache, tail: Tail, selected: Any, when: jax.Array | None,
    *, graph: Any, backend: Backend, reuse: bool, keep_compressed: bool,
) -> tuple[jax.Array, LayerTail, Any]:  # fmt: skip
    """:meth:`Layer.tail` of the layer with parameters ``state``."""
    own = Reuse(selected, keep_compressed, when) if reuse else None
    return nnx.merge(graph, state).tail(x, cache, layer_cache, tail, backend, own)


def verify(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    cache: Cache,
    tail: Tail,
    *,
    dtype: jnp.dtype = jnp.float32,
    backend: Backend = Backend(),
    features: tuple[int, ...] = (),
    schedule: str | jax.Array = "",
    keep_compressed: bool = True,
) -> Any:
    """Final-normed hidden states [B, T, H] of the tail's tokens int32 [B, T] against ``cache``; and each layer's tail.

    The cache is only read: :func:`specsa_jax.cache.commit` writes the accepted path. ``features``, as for
    :func:`hidden_states`, adds a third result [B, T, F, H].

    ``schedule`` has a letter a layer (:func:`specsa_jax.schedule.parse_schedule`); "": all refresh. Or it is bool
    [layers], true where a layer reuses, for many schedules by one program: on XLA's path, where every layer then does a
    refresh layer's work. ``keep_compressed``: reuse layers keep the output of their compressed branch.
    """
    model = bind(config, params, dtype)
    graph, _ = nnx.split(model.layers[0])
    x, tails, behind, selected = model.embedded(tokens), [], {}, None
    for depth, (layer, layer_cache) in enumerate(zip(model.layers, cache.layers, strict=True), 1):
        reuse, when = False, None
        if not isinstance(schedule, str):
            reuse, when = depth > 1, schedule[depth - 1]
        elif schedule:
            reuse = schedule[depth - 1] == "S"
        x, layer_tail, selected = _tail(
            nnx.state(layer), x, cache._replace(layers=[]), layer_cache, tail, selected if reuse else None, when,
            graph=graph, backend=backend, reuse=reuse, keep_compressed=keep_compressed,
        )  # fmt: skip
        tails.append(layer_tail)
        behind[depth] = x
    if features:
        return backend.rows(cache)(model.norm, x), tails, jnp.stack([behind[depth] for depth in features], axis=2)
    return backend.rows(cache)(model.norm, x), tails
