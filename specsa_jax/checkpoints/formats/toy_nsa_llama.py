"""ToyNSALlama of native-sparse-attention-triton.

φ comes before RoPE: the position encoding is added to the keys of a block (not to its values), and the compressed key
is rotated at position i·stride. The window holds ``window_size`` tokens and the query's own. A directory of this
format is the fields of ``ToyNSALlamaConfig`` in ``config.json`` beside the weights.
"""

from __future__ import annotations

from typing import Any

from specsa_jax.checkpoints.formats.base import Fields, Format, Shapes, read_rope, write_rope
from specsa_jax.checkpoints.transforms import LINEAR, Row
from specsa_jax.config import ModelConfig, NSAConfig

COMPRESSION = {"avgpool": "mean", "weightedpool": "weighted", "linear": "linear"}


def understand(raw: dict[str, Any], shapes: Shapes, *, gate: str = "per_head") -> ModelConfig:
    """The model that a config, and the tensors' shapes, describe: see :class:`Format`."""
    fields = Fields(raw)
    heads = fields.whole("num_attention_heads")
    kind = raw.get("compress_type")
    if kind is None:  # the first release had linear φ alone; else the tensor's shape says it
        rank = next((len(shape) for key, shape in shapes.items() if key.endswith("nsa.compress_key")), 0)
        kind = {0: "avgpool", 2: "weightedpool", 3: "linear"}.get(rank)
    if not isinstance(kind, str) or kind not in COMPRESSION:
        fields.problems.append(f"compress_type: got {kind!r}, expected {', '.join(COMPRESSION)}")
    nsa: dict[str, Any] = {
        "num_heads": heads, "num_kv_heads": fields.whole("num_key_value_heads", heads),
        "head_dim": fields.whole("head_dim"), "compress_block": fields.whole("kernel_size", 32),
        "compress_stride": fields.whole("kernel_stride", 16), "select_block": fields.whole("block_size", 64),
        "num_selected": fields.whole("topk", 16), "num_initial": fields.whole("init_blocks", 1, least=0),
        "num_local": fields.whole("local_blocks", 2), "window": fields.whole("window_size", 512),
        "window_excludes_query": True, "compression": COMPRESSION.get(str(kind), "mean"), "compress_position": "keys",
        "compressed_rope": "after", "separate_kv": False, "gate": gate,
    }  # fmt: skip
    decoder: dict[str, Any] = {
        "vocab_size": fields.whole("vocab_size"), "hidden": fields.whole("hidden_size"),
        "layers": fields.whole("num_hidden_layers"), "intermediate": fields.whole("intermediate_size"),
        "max_length": fields.whole("max_position_embeddings", 131072), "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tied": False,
    }  # fmt: skip
    rope = read_rope(fields, 500000.0)
    fields.finish()
    return ModelConfig(nsa=NSAConfig(**nsa), rope=rope, **decoder)


def express(model: ModelConfig) -> dict[str, Any]:
    """The format's config of a model: see :class:`Format`."""
    nsa = model.nsa
    return {
        "vocab_size": model.vocab_size, "hidden_size": model.hidden, "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers, "num_attention_heads": nsa.num_heads,
        "num_key_value_heads": nsa.num_kv_heads, "head_dim": nsa.head_dim, **write_rope(model.rope, model.max_length),
        "compress_type": {v: k for k, v in COMPRESSION.items()}.get(nsa.compression, nsa.compression),
        "kernel_size": nsa.compress_block, "kernel_stride": nsa.compress_stride, "block_size": nsa.select_block,
        "topk": nsa.num_selected, "init_blocks": nsa.num_initial, "local_blocks": nsa.num_local,
        "window_size": nsa.window, "rms_norm_eps": model.norm_eps,
    }  # fmt: skip


def table(model: ModelConfig) -> list[Row]:
    """The format's tensors for a model: see :class:`Format`."""
    rows = [
        Row("embedding.weight", "embed.embedding"),
        Row("layers.{i}.attn_norm.weight", "layers.{i}.attn_norm.scale"),
        Row("layers.{i}.nsa.proj_q.weight", "layers.{i}.attn.q_proj.kernel", LINEAR),
        Row("layers.{i}.nsa.proj_k.weight", "layers.{i}.attn.k_proj.kernel", LINEAR),
        Row("layers.{i}.nsa.proj_v.weight", "layers.{i}.attn.v_proj.kernel", LINEAR),
        Row("layers.{i}.nsa.proj_o.weight", "layers.{i}.attn.o_proj.kernel", LINEAR),
        Row("layers.{i}.nsa.intra_block_pe", "layers.{i}.attn.compress_k.position"),
        Row("layers.{i}.nsa.gate.0.weight", "layers.{i}.attn.gate_proj.kernel", LINEAR),  # row 3·head + branch
        Row("layers.{i}.ffn_norm.weight", "layers.{i}.mlp_norm.scale"),
        Row("layers.{i}.ffn.gate_proj.weight", "layers.{i}.mlp.gate_proj.kernel", LINEAR),
        Row("layers.{i}.ffn.up_proj.weight", "layers.{i}.mlp.up_proj.kernel", LINEAR),
        Row("layers.{i}.ffn.down_proj.weight", "layers.{i}.mlp.down_proj.kernel", LINEAR),
        Row("norm.weight", "norm.scale"),
        Row("lm_head.weight", "head.kernel", LINEAR),
    ]
    if model.nsa.compression != "mean":
        rows += [
            Row("layers.{i}.nsa.compress_key", "layers.{i}.attn.compress_k.weight"),
            Row("layers.{i}.nsa.compress_value", "layers.{i}.attn.compress_v.weight"),
        ]
    return rows


def gate_rows(shapes: Shapes) -> int:
    """Rows of the first layer's gate; 0 where the keys are others'."""
    if "layers.0.nsa.proj_q.weight" not in shapes:
        return 0
    shape = shapes.get("layers.0.nsa.gate.0.weight", ())
    return shape[0] if shape else 0


FORMAT = Format(
    name="toy-nsa-llama",
    title="ToyNSALlama (native-sparse-attention-triton)",
    model_types=("ToyNSALlama", "toy-nsa-llama"),
    has_keys=lambda shapes: gate_rows(shapes) > 3,
    understand=understand,
    express=express,
    table=table,
)
