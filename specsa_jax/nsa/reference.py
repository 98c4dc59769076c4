"""The definition of native sparse attention: one query against its prefix, in plain NumPy.

Slow and obvious on purpose, to be read beside the paper (arXiv 2502.11089); every faster implementation of this
project is tested against it. There is no mask and no batch: a query at position t is given the t+1 tokens that it may
see, and nothing else. Everything, softmax included, happens in the dtype of the inputs.

Letters in shapes and formulas (and their fields in ``NSAConfig``):

    t       position of the query, which sees tokens 0 … t
    l, d    tokens in a compression block, and its stride (compress_block, compress_stride)
    l'      tokens in a selection block (select_block);  n: blocks selected (num_selected);  w: window
    C       compression blocks complete at t;  block i covers tokens [i·d, i·d+l)
    J       selection blocks begun at t;       block j covers tokens [j·l', (j+1)·l')
    Hkv, G  KV heads, and the query heads that share one;  Hq = Hkv·G;  D: head dim
    sets    separate K/V projections of a layer: 3 (compressed, selected, window), or 1 shared by all branches
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from specsa_jax.config import NSAConfig

# RoPE of the model at hand: (x [N, …, D], positions [N]) -> x with row r rotated by positions[r].
Rotate = Callable[[np.ndarray, np.ndarray], np.ndarray]


def attend(
    config: NSAConfig,
    params: Mapping[str, Any],
    q: np.ndarray,
    gates: np.ndarray | None,
    keys: np.ndarray,
    values: np.ndarray,
    rotate: Rotate,
    reused: np.ndarray | None = None,
    keep_compressed: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """NSA's output for one query, the last token of the prefix that ``keys`` and ``values`` hold (eq. 5).

    Args:
      config: the layer.
      params: the layer's attention parameters; only ``compress_k`` and ``compress_v`` are read.
      q: [Hq, D], rotated to position t.
      gates: [Hq, 3] in the order compressed, selected, window; None: every gate is 1.
      keys, values: [t+1, sets, Hkv, D], as projected: keys are *not* rotated.
      rotate: the model's RoPE, for keys.
      reused: [Hkv, n], ids that a refresh layer below selected for this query: the layer is a reuse layer.
      keep_compressed: False: a reuse layer leaves the compressed branch's output out.

    Returns:
      output [Hq, D], and the ids of the selected blocks [Hkv, n]: ascending, then −1 (all −1 under ``dense_len``).
    """
    gates = np.ones((config.num_heads, 3), q.dtype) if gates is None else gates
    output = np.zeros_like(q)
    selection = np.full((config.num_kv_heads, config.num_selected), -1, np.int32)
    for h in range(config.num_kv_heads):
        group = slice(h * config.group, (h + 1) * config.group)  # the G query heads that share KV head h
        phi_k, phi_v = head_params(params, "compress_k", h), head_params(params, "compress_v", h)
        output[group], blocks = attend_group(
            config, phi_k, phi_v, q[group], gates[group], keys[:, :, h], values[:, :, h], rotate,
            None if reused is None else [int(j) for j in reused[h] if j >= 0], keep_compressed,
        )  # fmt: skip
        selection[h, : len(blocks)] = blocks
    return output, selection


def attend_group(
    config: NSAConfig,
    phi_k: Mapping[str, np.ndarray],
    phi_v: Mapping[str, np.ndarray],
    q: np.ndarray,
    gates: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    rotate: Rotate,
    reused: list[int] | None = None,
    keep_compressed: bool = True,
) -> tuple[np.ndarray, list[int]]:
    """One KV head and its group: q [G, D], gates [G, 3], keys, values [t+1, sets, D] -> [G, D] and selected ids."""
    t = len(keys) - 1
    cmp, slc, win = (0, 1, 2) if config.separate_kv else (0, 0, 0)
    rotated = rotate(keys, np.arange(t + 1))

    def over(tokens: Sequence[int], branch: int) -> np.ndarray:
        return softmax_attention(config, q, rotated[tokens, branch], values[tokens, branch])

    if t + 1 < config.dense_len:
        return over(range(t + 1), slc), []  # dense attention: nothing is selected, nothing gated

    k_cmp = compress_keys(config, phi_k, keys[:, cmp], rotate)
    p_cmp = compressed_probabilities(config, q, k_cmp)
    blocks = select_blocks(config, block_importance(config, p_cmp, t), t) if reused is None else reused
    selected, window = selected_tokens(config, blocks, t), window_tokens(config, t)

    g_cmp, g_slc, g_win = gates.T[:, :, None]  # each [G, 1]
    output = np.zeros_like(q)
    if config.compressed_output and (reused is None or keep_compressed):
        v_cmp = compress_values(config, phi_v, values[:, cmp])
        output += g_cmp * (p_cmp @ v_cmp)  # without a visible block (C = 0) an empty sum: 0
    if config.fused_selected_window:
        output += g_slc * over(sorted({*selected, *window}), slc)
    else:
        output += g_slc * over(selected, slc)
        output += g_win * over(window, win)
    return output, blocks


def compress(config: NSAConfig, phi: Mapping[str, np.ndarray], x: np.ndarray, encode: bool) -> np.ndarray:
    """φ (eq. 7): each complete block of l tokens of one head becomes one, [tokens, D] -> [C, D].

    ``phi`` holds the head's parameters; ``encode`` says whether its position encoding [l, D] is added first.
    """
    l, d = config.compress_block, config.compress_stride
    count = max(0, (len(x) - l) // d + 1)  # block i is complete when its last token, i·d + l − 1, exists
    blocks = x[np.arange(count)[:, None] * d + np.arange(l)]  # [C, l, D]
    if encode:
        blocks = blocks + phi["position"]
    flat = blocks.reshape(count, l * x.shape[-1])  # offset-major: all of token 0, then all of token 1, …
    match config.compression:
        case "mean":
            return blocks.mean(axis=1)
        case "weighted":
            return np.einsum("r,crD->cD", phi["weight"], blocks)
        case "linear":
            return flat @ phi["weight"]
        case "mlp":
            return silu(flat @ phi["weight_in"]) @ phi["weight_out"]


def compress_keys(config: NSAConfig, phi: Mapping[str, np.ndarray], k: np.ndarray, rotate: Rotate) -> np.ndarray:
    """K̃_cmp of one head: raw keys [t+1, D] -> [C, D], rotated as ``compressed_rope`` says."""
    encode = config.compress_position in ("keys", "both")
    if config.compressed_rope == "before":
        return compress(config, phi, rotate(k, np.arange(len(k))), encode)
    pooled = compress(config, phi, k, encode)
    if config.compressed_rope == "after":
        return rotate(pooled, np.arange(len(pooled)) * config.compress_stride)
    return pooled


def compress_values(config: NSAConfig, phi: Mapping[str, np.ndarray], v: np.ndarray) -> np.ndarray:
    """Ṽ_cmp of one head: values [t+1, D] -> [C, D]."""
    return compress(config, phi, v, encode=config.compress_position == "both")


def compressed_probabilities(config: NSAConfig, q: np.ndarray, k_cmp: np.ndarray) -> np.ndarray:
    """p_cmp (eq. 8): what each head of a group gives to each visible block; q [G, D], k_cmp [C, D] -> [G, C]."""
    return softmax(q @ k_cmp.T * config.softmax_scale)


def block_importance(config: NSAConfig, p_cmp: np.ndarray, t: int) -> np.ndarray:
    """p_slc′ (eqs. 9, 10): the score of each selection block, summed over the group; p_cmp [G, C] -> [J].

    A selection block is l'/d chunks of d tokens, a compression block is l/d chunks. The chunk m of selection block j
    lies in the compression blocks (l'/d)·j + m − k, so a probability counts once per chunk that the two share. The
    paper prints − m − k, which points before block j: ``score_map="paper"``. InfLLM-V2 (arXiv 2509.24663) takes the
    largest of them in place of the sum: ``score_map="max"``.
    """
    chunks, spans = config.select_block // config.compress_stride, config.compress_block // config.compress_stride
    p = p_cmp.sum(axis=0)
    importance = np.zeros(t // config.select_block + 1, p.dtype)
    for j in range(len(importance)):
        for m in range(chunks):
            for k in range(spans):
                i = chunks * j - m - k if config.score_map == "paper" else chunks * j + m - k
                if 0 <= i < len(p):
                    importance[j] = max(importance[j], p[i]) if config.score_map == "max" else importance[j] + p[i]
    return importance


def select_blocks(config: NSAConfig, importance: np.ndarray, t: int) -> list[int]:
    """I_t (eq. 11): ids of at most n of the J blocks begun at t, ascending.

    The first ``num_initial`` blocks and the last ``num_local`` are forced, and count towards n. The others follow by
    importance, ties to the lower id.
    """
    local = t // config.select_block  # the query's own block, the last one

    def rank(j: int) -> tuple[bool, float, int]:
        forced = j < config.num_initial or j > local - config.num_local
        return (not forced, -importance[j] if not forced else 0.0, j)

    return sorted(sorted(range(local + 1), key=rank)[: config.num_selected])


def selected_tokens(config: NSAConfig, blocks: Sequence[int], t: int) -> list[int]:
    """The tokens s ≤ t of the selected blocks (eq. 12), ascending."""
    size = config.select_block
    return [s for j in blocks for s in range(j * size, (j + 1) * size) if s <= t]


def window_tokens(config: NSAConfig, t: int) -> list[int]:
    """The last w tokens, the query's own among them, or w and the query's own (``window_excludes_query``)."""
    first = t - config.window if config.window_excludes_query else t - config.window + 1
    return list(range(max(0, first), t + 1))


def softmax_attention(config: NSAConfig, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention of a group over the N tokens of one KV head that were gathered for it: q [G, D], k, v [N, D]."""
    return softmax(q @ k.T * config.softmax_scale) @ v


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, which may be empty."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
    return weights / weights.sum(axis=-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^−x), in the form that cannot overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def silu(x: np.ndarray) -> np.ndarray:
    """x · sigmoid(x)."""
    return x * sigmoid(x)


def head_params(params: Mapping[str, Any], name: str, head: int) -> dict[str, np.ndarray]:
    """φ's parameters of one KV head; empty when φ has none (mean pooling without a position encoding)."""
    return {key: value[head] for key, value in params.get(name, {}).items()}
