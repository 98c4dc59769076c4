"""``zen-E/NSA-1B``: ``LlamaNSAForCausalLM``, Llama's keys with ``g_proj``; weights on Hugging Face.

Keys are rotated, then averaged over blocks of ``block_size``; compression and selection blocks are the same. Of the
blocks that a query may select, its own is forced and no other.
"""

from __future__ import annotations

from typing import Any

from specsa_jax.checkpoints.formats.base import (
    Fields,
    Format,
    Shapes,
    llama_rows,
    power_of_two,
    read_decoder,
    read_heads,
    read_rope,
    write_decoder,
)
from specsa_jax.checkpoints.transforms import LINEAR, Row
from specsa_jax.config import ModelConfig, NSAConfig


def understand(raw: dict[str, Any], shapes: Shapes) -> ModelConfig:
    """The model that a config, and the tensors' shapes, describe: see :class:`Format`."""
    fields = Fields(raw)
    block = fields.whole("block_size")
    nsa: dict[str, Any] = {
        **read_heads(fields), "compress_block": block, "compress_stride": block, "select_block": block,
        # Its kernel selects a power of two.
        "num_selected": power_of_two(fields.whole("block_counts")), "num_initial": 0, "num_local": 1,
        "window": fields.whole("window_size"), "compression": "mean", "compress_position": "none",
        "compressed_rope": "before", "separate_kv": False,
    }  # fmt: skip
    decoder, rope = read_decoder(fields, norm_eps=1e-6), read_rope(fields, 500000.0)
    fields.finish()
    return ModelConfig(nsa=NSAConfig(**nsa), rope=rope, **decoder)


def express(model: ModelConfig) -> dict[str, Any]:
    """The format's config of a model: see :class:`Format`."""
    nsa = model.nsa
    return {
        "architectures": ["LlamaNSAForCausalLM"], "model_type": "llama-nsa", **write_decoder(model), "mlp_bias": False,
        "block_size": nsa.select_block, "block_counts": nsa.num_selected, "window_size": nsa.window,
    }  # fmt: skip


def table(model: ModelConfig) -> list[Row]:
    """The format's tensors for a model: see :class:`Format`."""
    gate = Row("model.layers.{i}.self_attn.g_proj.weight", "layers.{i}.attn.gate_proj.kernel", LINEAR)
    return [*llama_rows(model), gate]


FORMAT = Format(
    name="llama-nsa",
    title="LlamaNSAForCausalLM (zen-E/NSA-1B)",
    model_types=("llama-nsa", "LlamaNSAForCausalLM"),
    has_keys=lambda shapes: "model.layers.0.self_attn.g_proj.weight" in shapes,
    understand=understand,
    express=express,
    table=table,
)
