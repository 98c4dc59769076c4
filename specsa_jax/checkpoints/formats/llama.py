"""Dense Llama (``LlamaForCausalLM``): runs as it is, densely, or as the start of an NSA model (``--adapt nsa``)."""

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
from specsa_jax.config import ModelConfig


def understand(raw: dict[str, Any], shapes: Shapes) -> ModelConfig:
    """The model that a config, and the tensors' shapes, describe: see :class:`Format`."""
    fields = Fields(raw)
    heads, decoder, rope = read_heads(fields), read_decoder(fields, max_length=2048), read_rope(fields)
    fields.finish()
    return ModelConfig(nsa=dense_nsa(decoder["max_length"], **heads), rope=rope, **decoder)


def express(model: ModelConfig) -> dict[str, Any]:
    """The format's config of a model: see :class:`Format`."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **write_decoder(model), "mlp_bias": False}


FORMAT = Format(
    name="llama",
    title="dense Llama (LlamaForCausalLM)",
    model_types=("llama", "LlamaForCausalLM"),
    has_keys=lambda shapes: (
        "model.layers.0.self_attn.q_proj.weight" in shapes
        and not {"model.layers.0.self_attn.g_proj.weight", "model.layers.0.self_attn.q_norm.weight"} & set(shapes)
    ),
    understand=understand,
    express=express,
    table=llama_rows,
    dense=True,
)
