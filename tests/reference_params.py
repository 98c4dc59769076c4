"""Tiny configurations and random parameters, for tests of every implementation against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from specsa_jax import checkpoints
from specsa_jax.config import ModelConfig, NSAConfig, RopeConfig


def tiny_nsa(**switches: Any) -> NSAConfig:
    """An NSA layer small enough that 60 tokens choose among blocks: l=4, d=2, l'=8, n=4, w=6."""
    sizes = dict(
        num_heads=4, num_kv_heads=2, head_dim=8, compress_block=4, compress_stride=2, select_block=8, num_selected=4,
        window=6, compress_hidden=10,
    )  # fmt: skip
    return NSAConfig(**{**sizes, **switches})


MODEL_SWITCHES = ("mlp", "embed_scale", "residual_scale", "logit_scale")


def tiny_model(*, rope: RopeConfig | None = None, layers: int = 2, tied: bool = True, **switches: Any) -> ModelConfig:
    """A transformer over ``tiny_nsa(**switches)``: vocabulary 50, hidden 32. MODEL_SWITCHES are ModelConfig's."""
    of_model = {name: switches.pop(name) for name in MODEL_SWITCHES if name in switches}
    return ModelConfig(
        vocab_size=50, hidden=32, layers=layers, intermediate=48, max_length=512, nsa=tiny_nsa(**switches),
        rope=rope or RopeConfig(), tied=tied, **of_model,
    )  # fmt: skip


def random_tokens(config: ModelConfig, count: int, seed: int = 0) -> np.ndarray:
    """[count] uniform token ids."""
    return np.random.default_rng(seed).integers(config.vocab_size, size=count).astype(np.int32)


def random_params(config: ModelConfig, seed: int = 0, dtype: Any = np.float64) -> dict[Any, Any]:
    """A random parameter tree as ``docs/architecture.md`` lists it; one seed gives the same values in every dtype.

    Scales are such that nothing is accidentally neutral: attention and gates are far from uniform, norms are not 1,
    φ is not a mean.
    """
    rng = np.random.default_rng(seed)
    nsa = config.nsa

    def normal(*shape: int, std: float) -> np.ndarray:
        return (std * rng.standard_normal(shape)).astype(dtype)

    def kernel(rows: int, columns: int, gain: float = 1.0) -> dict[str, np.ndarray]:
        return {"kernel": normal(rows, columns, std=gain * rows**-0.5)}

    def norm() -> dict[str, np.ndarray]:
        return {"scale": (1.0 + 0.1 * rng.standard_normal(config.hidden)).astype(dtype)}

    def attention() -> dict[str, Any]:
        kv_width = nsa.branch_sets * nsa.num_kv_heads * nsa.head_dim
        params: dict[str, Any] = {
            "q_proj": kernel(config.hidden, nsa.num_heads * nsa.head_dim, gain=2.0),
            "k_proj": kernel(config.hidden, kv_width),
            "v_proj": kernel(config.hidden, kv_width),
            "o_proj": kernel(nsa.num_heads * nsa.head_dim, config.hidden),
        }
        if nsa.qk_norm:
            for name in ("q_norm", "k_norm"):
                params[name] = {"scale": (1.0 + 0.3 * rng.standard_normal(nsa.head_dim)).astype(dtype)}
        if nsa.gate == "query_mlp":
            params["gate_in"] = kernel(nsa.head_dim, nsa.gate_hidden) | {"bias": normal(nsa.gate_hidden, std=0.5)}
            params["gate_out"] = kernel(nsa.gate_hidden, 3, gain=2.0) | {"bias": normal(3, std=0.5)}
        elif nsa.gate != "none":
            params["gate_proj"] = kernel(config.hidden, nsa.gate_outputs, gain=2.0)
            if nsa.gate_bias:
                params["gate_proj"]["bias"] = normal(nsa.gate_outputs, std=1.0)
        for name, positions in (("compress_k", ("keys", "both")), ("compress_v", ("both",))):
            phi = compression(encode=nsa.compress_position in positions)
            if phi and (name == "compress_k" or nsa.compressed_output):
                params[name] = phi
        return params

    def compression(encode: bool) -> dict[str, np.ndarray]:
        heads, flat = nsa.num_kv_heads, nsa.compress_block * nsa.head_dim
        phi: dict[str, np.ndarray] = {}
        if encode:
            phi["position"] = normal(heads, nsa.compress_block, nsa.head_dim, std=0.5)
        if nsa.compression == "weighted":
            phi["weight"] = normal(heads, nsa.compress_block, std=nsa.compress_block**-0.5)
        elif nsa.compression == "linear":
            phi["weight"] = normal(heads, flat, nsa.head_dim, std=flat**-0.5)
        elif nsa.compression == "mlp":
            phi["weight_in"] = normal(heads, flat, nsa.compress_hidden, std=2.0 * flat**-0.5)
            phi["weight_out"] = normal(heads, nsa.compress_hidden, nsa.head_dim, std=2.0 * nsa.compress_hidden**-0.5)
        return phi

    params: dict[Any, Any] = {
        "embed": {"embedding": normal(config.vocab_size, config.hidden, std=1.0)},
        "layers": {
            i: {
                "attn_norm": norm(),
                "attn": attention(),
                "mlp_norm": norm(),
                "mlp": {
                    **({"gate_proj": kernel(config.hidden, config.intermediate)} if config.mlp == "swiglu" else {}),
                    "up_proj": kernel(config.hidden, config.intermediate),
                    "down_proj": kernel(config.intermediate, config.hidden),
                },
            }
            for i in range(config.layers)
        },
        "norm": norm(),
    }
    if not config.tied:
        params["head"] = kernel(config.hidden, config.vocab_size)
    return params


def save_tiny(where: Path, config: ModelConfig, words: Sequence[str]) -> Path:
    """A checkpoint of random weights whose tokenizer has a word for each of its 50 ids."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return checkpoints.save(where, random_params(config, dtype=np.float32), config, tokenizer, {})
