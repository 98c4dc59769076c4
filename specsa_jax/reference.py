"""The whole transformer in NumPy, over the definition of NSA in ``specsa_jax/nsa/reference.py``.

Slow, obvious and independent of the JAX code; its three entry points define what the fast paths must compute:

    forward       logits of every position of a sequence
    decode        the same, one token at a time
    verify_tree   logits of every node of a draft tree: sequential decoding of the prefix and the node's path

Parameters are the nested dict of ``docs/architecture.md`` with NumPy leaves (see ``to_numpy``); their dtype is the
dtype of every computation, except that RoPE's angles are always formed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specsa_jax.config import ModelConfig, NSAConfig, RopeConfig
from specsa_jax.nsa.reference import attend, sigmoid, silu, softmax

Params = Mapping[Any, Any]

# One (keys, values) pair per layer, each [tokens, sets, Hkv, D] and un-rotated. Never changed in place: `extend`
# returns a new cache, so the branches of a tree can continue from the same one.
Cache = list[tuple[np.ndarray, np.ndarray]]


def forward(
    config: ModelConfig, params: Params, tokens: Sequence[int], schedule: str = "", keep_compressed: bool = True
) -> np.ndarray:
    """Logits of every position of a sequence: tokens [S] -> [S, V]. For the schedule see ``extend``."""
    return extend(config, params, empty_cache(config, params), tokens, schedule, keep_compressed)[0]


def decode(config: ModelConfig, params: Params, tokens: Sequence[int]) -> np.ndarray:
    """The same by sequential decoding, one token at a time: tokens [S] -> [S, V]."""
    cache, logits = empty_cache(config, params), []
    for token in tokens:
        row, cache = extend(config, params, cache, [token])
        logits.append(row[0])
    return np.stack(logits)


def verify_tree(
    config: ModelConfig,
    params: Params,
    prefix: Sequence[int],
    tokens: Sequence[int],
    parents: Sequence[int],
    schedule: str = "",
    keep_compressed: bool = True,
) -> np.ndarray:
    """Logits of every node of a draft tree after a committed prefix [L]: tokens, parents [T] -> [T, V].

    Node 0 is the root (``parents[0] == -1``) and stands at position L; ``parents[i] < i``. The logits of node i are
    those of the last token of prefix + path(i), decoded sequentially: node i continues from its parent's cache,
    which holds the prefix and the parent's path and nothing else. The prefix was read with all layers refreshing; the
    tree follows the schedule.
    """
    _, committed = extend(config, params, empty_cache(config, params), prefix)
    caches: list[Cache] = []
    logits = []
    for i, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if (i == 0) != (parent == -1) or not -1 <= parent < i:
            raise ValueError(f"parents[{i}]: got {parent}, expected -1 at the root and an earlier node elsewhere")
        before = committed if parent == -1 else caches[parent]
        row, cache = extend(config, params, before, [token], schedule, keep_compressed)
        caches.append(cache)
        logits.append(row[0])
    return np.stack(logits)


def extend(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    tokens: Sequence[int],
    schedule: str = "",
    keep_compressed: bool = True,
) -> tuple[np.ndarray, Cache]:
    """Append tokens [N] to a cache of P tokens, at positions P … P+N−1: logits [N, V] and the longer cache.

    ``schedule`` has a letter a layer ("": all F). ``F``: the layer selects blocks. ``S``: for each token it takes those
    that the nearest F below selected for this very token; its K/V are kept like any other's. ``keep_compressed``: S
    layers keep the output of their compressed branch.
    """
    x = config.embed_scale * params["embed"]["embedding"][np.asarray(tokens, np.int64)]  # [N, H]
    longer: Cache = []
    selected = None
    for i in range(config.layers):
        layer = params["layers"][i]
        h = rms_norm(x, layer["attn_norm"]["scale"], config.norm_eps)
        reused = selected if schedule and schedule[i] == "S" else None
        attended, selected, keys, values = attention(
            config.nsa,
            config.rope,
            layer["attn"],
            h,
            *cache[i],
            reused,
            keep_compressed,
            norm_eps=config.norm_eps,
        )
        longer.append((keys, values))
        x = x + config.residual_scale * attended
        x = x + config.residual_scale * mlp(layer["mlp"], rms_norm(x, layer["mlp_norm"]["scale"], config.norm_eps))
    x = rms_norm(x, params["norm"]["scale"], config.norm_eps)
    logits = x @ (params["embed"]["embedding"].T if config.tied else params["head"]["kernel"])
    return config.logit_scale * logits, longer


def empty_cache(config: ModelConfig, params: Params) -> Cache:
    """The cache of no tokens, in the parameters' dtype."""
    nsa = config.nsa
    empty = np.zeros((0, nsa.branch_sets, nsa.num_kv_heads, nsa.head_dim), params["norm"]["scale"].dtype)
    return [(empty, empty)] * config.layers


def attention(
    nsa: NSAConfig,
    rope: RopeConfig,
    params: Params,
    x: np.ndarray,
    past_keys: np.ndarray,
    past_values: np.ndarray,
    reused: np.ndarray | None = None,
    keep_compressed: bool = True,
    norm_eps: float = 1e-5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The attention layer for N new tokens x [N, H] after P past ones.

    Past keys and values are [P, sets, Hkv, D], un-rotated; ``reused`` [N, Hkv, n] makes it a reuse layer. Returns the
    output [N, H], the selected blocks [N, Hkv, n], and the keys and values with the new ones appended.
    """
    sets = (nsa.branch_sets, nsa.num_kv_heads, nsa.head_dim)
    past, new = len(past_keys), len(x)
    q = (x @ params["q_proj"]["kernel"]).reshape(new, nsa.num_heads, nsa.head_dim)
    k = (x @ params["k_proj"]["kernel"]).reshape(new, *sets)
    if nsa.qk_norm:
        q = rms_norm(q, params["q_norm"]["scale"], norm_eps)
        k = rms_norm(k, params["k_norm"]["scale"], norm_eps)
    keys = np.concatenate([past_keys, k])
    values = np.concatenate([past_values, (x @ params["v_proj"]["kernel"]).reshape(new, *sets)])
    q = rotate_query(rope, q, past + np.arange(new))
    g = gates(nsa, params, x, q)

    def rotate_keys(k: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return rotate(rope, k, positions)

    outputs, selections = np.zeros_like(q), np.full((new, nsa.num_kv_heads, nsa.num_selected), -1, np.int32)
    for r in range(new):
        seen = past + r + 1  # the query at position past + r sees itself and everything before
        outputs[r], selections[r] = attend(
            nsa, params, q[r], g[r], keys[:seen], values[:seen], rotate_keys,
            None if reused is None else reused[r], keep_compressed,
        )  # fmt: skip
    return outputs.reshape(new, nsa.num_heads * nsa.head_dim) @ params["o_proj"]["kernel"], selections, keys, values


def gates(nsa: NSAConfig, params: Params, x: np.ndarray, q: np.ndarray | None = None) -> np.ndarray:
    """g = sigmoid(x·W_g), or 1 without gates: x [N, H] -> [N, Hq, 3], order compressed, selected, window.

    ``query_mlp`` gates come from the rotated queries q [N, Hq, D] instead, one triple a KV head, which adds up to 1.
    """
    if nsa.gate == "none":
        return np.ones((len(x), nsa.num_heads, 3), x.dtype)
    if nsa.gate == "query_mlp":
        assert q is not None
        pooled = q.reshape(len(x), nsa.num_kv_heads, nsa.group, nsa.head_dim).mean(axis=2)
        inner = silu(pooled @ params["gate_in"]["kernel"] + params["gate_in"]["bias"])
        return np.repeat(softmax(inner @ params["gate_out"]["kernel"] + params["gate_out"]["bias"]), nsa.group, axis=1)
    logits = x @ params["gate_proj"]["kernel"]
    if nsa.gate_bias:
        logits = logits + params["gate_proj"]["bias"]
    per_head = logits.reshape(len(x), nsa.gate_outputs // 3, 3)  # [N, Hq or 1, 3]: column 3·head + branch
    return np.broadcast_to(sigmoid(per_head), (len(x), nsa.num_heads, 3))


def mlp(params: Params, x: np.ndarray) -> np.ndarray:
    """SwiGLU: down(silu(gate(x)) · up(x)), [N, H] -> [N, H]; without gate_proj down(silu(up(x)))."""
    up = x @ params["up_proj"]["kernel"]
    inner = silu(x @ params["gate_proj"]["kernel"]) * up if "gate_proj" in params else silu(up)
    return inner @ params["down_proj"]["kernel"]


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """x / √(mean x² + ε) · scale, over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate(rope: RopeConfig, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """RoPE, rotate-half layout: x [N, …, D] with row r rotated to positions[r].

    Channel c of the first half and channel c of the second are the two coordinates of one rotated pair.
    """
    frequencies, magnitude = rope_frequencies(rope, x.shape[-1])
    return _rotate(x, positions, frequencies, magnitude)


def rotate_query(rope: RopeConfig, q: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """RoPE of queries [N, Hq, D]: as ``rotate``, or with the frequencies of one vector of Hq·D (``query_span``)."""
    if rope.query_span == "head":
        return rotate(rope, q, positions)
    frequencies, magnitude = rope_frequencies(rope, q.shape[-2] * q.shape[-1])
    return _rotate(q, positions, frequencies.reshape(q.shape[-2], -1), magnitude)


def _rotate(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray, magnitude: float) -> np.ndarray:
    angles = np.asarray(positions, np.float64).reshape(-1, *[1] * (x.ndim - 1)) * frequencies  # [N, …, D/2]
    cos, sin = (magnitude * np.cos(angles)).astype(x.dtype), (magnitude * np.sin(angles)).astype(x.dtype)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per position of each channel pair, [D/2] in float64, and the factor on cos and sin (YaRN's)."""
    pair = np.arange(head_dim // 2)
    base = rope.theta ** (-2.0 * pair / head_dim)
    stretched = base / rope.factor
    match rope.kind:
        case "default":
            return base, 1.0
        case "linear":
            return stretched, 1.0
        case "llama3":
            # By the rotations a pair makes within the original context: fewer than low_freq_factor are stretched,
            # more than high_freq_factor kept, those between blended in proportion.
            rotations = rope.original_length * base / (2 * math.pi)
            keep = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            keep = np.clip(keep, 0.0, 1.0)
            return keep * base + (1.0 - keep) * stretched, 1.0
        case "yarn":
            # Also by rotations, but blended linearly in the pair's index, between the pairs that make beta_fast and
            # beta_slow rotations (arXiv 2309.00071, section 3.2), rounded outwards as the public code does.
            def pair_with(rotations: float) -> float:
                wavelength = rope.original_length / rotations
                return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

            low = max(math.floor(pair_with(rope.beta_fast)), 0)
            high = min(math.ceil(pair_with(rope.beta_slow)), head_dim - 1)
            keep = 1.0 - np.clip((pair - low) / max(high - low, 0.001), 0.0, 1.0)
            return keep * base + (1.0 - keep) * stretched, 0.1 * math.log(rope.factor) + 1.0
        case "longrope":
            return base / np.asarray(rope.factors), math.sqrt(
                1.0 + math.log(rope.factor) / math.log(rope.original_length)
            )


def to_numpy(params: Params, dtype: Any) -> dict[Any, Any]:
    """A copy of a nested parameter dict (NumPy or JAX leaves, any float dtype) with NumPy leaves of one dtype."""
    return {
        key: to_numpy(value, dtype) if isinstance(value, Mapping) else np.asarray(value).astype(dtype)
        for key, value in params.items()
    }
