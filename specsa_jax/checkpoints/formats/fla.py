"""flash-linear-attention's NSA models (``model_type`` ``nsa``).

Keys are rotated, then averaged over blocks of ``block_size``; compression and selection blocks are the same. Blocks 0,
the query's own and the one before are forced, inside the count; the count is rounded up to a power of two.
"""

from __future__ import annotations

from typing import Any

from specsa_jax.checkpoints.formats.base import (
    Fields,
    Format,
    Shapes,
    power_of_two,
    read_rope,
    write_rope,
)
from specsa_jax.checkpoints.transforms import LINEAR, Row
from specsa_jax.config import ModelConfig, NSAConfig


def understand(raw: dict[str, Any], shapes: Shapes) -> ModelConfig:
    """The model that a config, and the tensors' shapes, describe: see :class:`Format`."""
    fields = Fields(raw)
    fields.only("qkv_bias", False, why="biases are not supported")
    fields.only("elementwise_affine", True, why="norms have scales")
    fields.only("hidden_act", "swish", "silu", why="the MLP is a SwiGLU")
    fields.only("attn", why="layers that mix kinds of attention are not supported")
    heads, hidden = fields.whole("num_heads", 64), fields.whole("hidden_size", 2048)
    block = fields.whole("block_size", 64)
    inside = int(hidden * fields.number("hidden_ratio", 4) * 2 / 3)
    nsa: dict[str, Any] = {
        "num_heads": heads, "num_kv_heads": fields.whole("num_kv_heads", heads),
        "head_dim": fields.whole("head_dim", 32), "compress_block": block, "compress_stride": block,
        "select_block": block, "num_selected": power_of_two(fields.whole("block_counts", 16)), "num_initial": 1,
        "num_local": 2, "window": fields.whole("window_size", 512), "compression": "mean",
        "compress_position": "none", "compressed_rope": "before", "separate_kv": False,
    }  # fmt: skip
    decoder: dict[str, Any] = {
        "vocab_size": fields.whole("vocab_size", 32000), "hidden": hidden,
        "layers": fields.whole("num_hidden_layers", 24),
        "intermediate": fields.whole("intermediate_size", -(-inside // 256) * 256),
        "max_length": fields.whole("max_position_embeddings", 2048), "norm_eps": fields.number("norm_eps", 1e-6),
        "tied": fields.flag("tie_word_embeddings", False),
    }  # fmt: skip
    rope = read_rope(fields, 10000.0)
    fields.finish()
    return ModelConfig(nsa=NSAConfig(**nsa), rope=rope, **decoder)


def express(model: ModelConfig) -> dict[str, Any]:
    """The format's config of a model: see :class:`Format`."""
    nsa, rope = model.nsa, write_rope(model.rope, model.max_length)
    return {
        "architectures": ["NSAForCausalLM"], "model_type": "nsa", "vocab_size": model.vocab_size,
        "hidden_size": model.hidden, "num_hidden_layers": model.layers, "num_heads": nsa.num_heads,
        "num_kv_heads": nsa.num_kv_heads, "head_dim": nsa.head_dim, "qkv_bias": False,
        "block_size": nsa.select_block, "block_counts": nsa.num_selected, "window_size": nsa.window,
        "rope_theta": rope["rope_theta"], "max_position_embeddings": model.max_length,
        "intermediate_size": model.intermediate, "hidden_act": "swish", "norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
    }  # fmt: skip


def table(model: ModelConfig) -> list[Row]:
    """The format's tensors for a model: see :class:`Format`."""
    rows = [
        Row("model.embeddings.weight", "embed.embedding"),
        Row("model.layers.{i}.attn_norm.weight", "layers.{i}.attn_norm.scale"),
        Row("model.layers.{i}.attn.q_proj.weight", "layers.{i}.attn.q_proj.kernel", LINEAR),
        Row("model.layers.{i}.attn.k_proj.weight", "layers.{i}.attn.k_proj.kernel", LINEAR),
        Row("model.layers.{i}.attn.v_proj.weight", "layers.{i}.attn.v_proj.kernel", LINEAR),
        Row("model.layers.{i}.attn.g_proj.weight", "layers.{i}.attn.gate_proj.kernel", LINEAR),
        Row("model.layers.{i}.attn.o_proj.weight", "layers.{i}.attn.o_proj.kernel", LINEAR),
        Row("model.layers.{i}.mlp_norm.weight", "layers.{i}.mlp_norm.scale"),
        Row("model.layers.{i}.mlp.gate_proj.weight", "layers.{i}.mlp.gate_proj.kernel", LINEAR),
        Row("model.layers.{i}.mlp.up_proj.weight", "layers.{i}.mlp.up_proj.kernel", LINEAR),
        Row("model.layers.{i}.mlp.down_proj.weight", "layers.{i}.mlp.down_proj.kernel", LINEAR),
        Row("model.norm.weight", "norm.scale"),
    ]
    return rows if model.tied else [*rows, Row("lm_head.weight", "head.kernel", LINEAR)]


FORMAT = Format(
    name="fla",
    title="flash-linear-attention NSA (model_type nsa)",
    model_types=("nsa", "NSAForCausalLM"),
    has_keys=lambda shapes: "model.layers.0.attn.g_proj.weight" in shapes,
    understand=understand,
    express=express,
    table=table,
    ignored=(".rotary.inv_freq",),
    notes=("block_counts is rounded up to a power of two, as the library's kernel does",),
)
