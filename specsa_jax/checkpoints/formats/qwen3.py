"""Dense Qwen3 (``Qwen3ForCausalLM``): Llama with RMSNorm on every query and key before RoPE."""

from __future__ import annotations

from typing import Any

from specsa_jax.checkpoints.formats.base import (
    Fields,
    Format,
    Shapes,
    llama_rows,
    read_decoder,
    read_heads,
    read_rope,
    write_decoder,
)
from specsa_jax.checkpoints.formats.dense import dense_nsa
from specsa_jax.checkpoints.transforms import Row
from specsa_jax.config import ModelConfig


def understand(raw: dict[str, Any], shapes: Shapes) -> ModelConfig:
    """The model that a config, and the tensors' shapes, describe: see :class:`Format`."""
    fields = Fields(raw)
    fields.only("use_sliding_window", False, why="the model is dense")
    heads, decoder, rope = read_heads(fields), read_decoder(fields, max_length=32768), read_rope(fields)
    fields.finish()
    return ModelConfig(nsa=dense_nsa(decoder["max_length"], **heads, qk_norm=True), rope=rope, **decoder)


def express(model: ModelConfig) -> dict[str, Any]:
    """The format's config of a model: see :class:`Format`."""
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **write_decoder(model)}


def table(model: ModelConfig) -> list[Row]:
    """The format's tensors for a model: see :class:`Format`."""
    return [
        *llama_rows(model),
        Row("model.layers.{i}.self_attn.q_norm.weight", "layers.{i}.attn.q_norm.scale"),
        Row("model.layers.{i}.self_attn.k_norm.weight", "layers.{i}.attn.k_norm.scale"),
    ]


FORMAT = Format(
    name="qwen3",
    title="dense Qwen3 (Qwen3ForCausalLM)",
    model_types=("qwen3", "Qwen3ForCausalLM"),
    has_keys=lambda shapes: "model.layers.0.self_attn.q_norm.weight" in shapes,
    understand=understand,
    express=express,
    table=table,
    dense=True,
)
