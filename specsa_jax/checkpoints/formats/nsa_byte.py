"""``seconds-0/nsa-117m-byte``: K/V per branch, gates from the queries, a plain SiLU MLP, bytes for tokens.

RoPE turns adjacent pairs; over the queries its frequencies run once over all heads together, over the keys head by
head. Keys are rotated before they are pooled. Gates are a softmax over the branches, from the mean query of a group.
"""

from __future__ import annotations

from typing import Any

from specsa_jax.checkpoints.formats.base import Fields, Format, Shapes
from specsa_jax.checkpoints.transforms import LINEAR, Depthwise, Joined, Linear, Row
from specsa_jax.config import ModelConfig, NSAConfig, RopeConfig

_FC1 = "blocks.0.attn.gate.fc1.weight"


def understand(raw: dict[str, Any], shapes: Shapes) -> ModelConfig:
    """The model that a config, and the tensors' shapes, describe: see :class:`Format`."""
    # Nested as in the training configs (model, nsa), or flat.
    flat = dict(raw)
    for part in ("model", "nsa"):
        flat |= raw[part] if isinstance(raw.get(part), dict) else {}
    fields = Fields(flat)
    heads, dim, hidden = fields.whole("n_heads"), fields.whole("d_k"), fields.whole("dim")
    if fields.whole("d_v", dim) != dim:
        fields.problems.append(f"d_v: got {flat['d_v']}, expected d_k = {dim}")
    fields.only("phi", "avg", "mlp", why="average pooling, or the depthwise convolution that the code calls mlp")
    fields.only("gate_temp", 1, 1.0, why="gates have no temperature")
    gate_hidden = shapes[_FC1][0] if _FC1 in shapes else max(1, dim // 2)
    nsa: dict[str, Any] = {
        "num_heads": heads, "num_kv_heads": fields.whole("n_kv_groups"), "head_dim": dim,
        "compress_block": fields.whole("l", 32), "compress_stride": fields.whole("d", 16),
        "select_block": fields.whole("l_sel", 64), "num_selected": fields.whole("n_sel", 16), "num_initial": 1,
        "num_local": 2, "window": fields.whole("w", 512),
        "compression": "linear" if flat.get("phi") == "mlp" else "mean", "compress_position": "none",
        "compressed_rope": "before", "separate_kv": True, "gate": "query_mlp",
        "gate_hidden": fields.whole("gate_hidden", gate_hidden),
    }  # fmt: skip
    vocab = shapes["embed.weight"][0] if "embed.weight" in shapes else 256
    decoder: dict[str, Any] = {
        "vocab_size": fields.whole("vocab_size", vocab), "hidden": hidden, "layers": fields.whole("n_layers"),
        "intermediate": fields.whole("intermediate_size", 4 * hidden), "max_length": fields.whole("seq_len", 2048),
        "norm_eps": fields.number("norm_eps", 1e-6), "tied": fields.flag("tie_word_embeddings", False),
        "mlp": "silu",
    }  # fmt: skip
    rope = RopeConfig(theta=fields.number("rope_theta", 10000.0), query_span="all_heads")
    fields.finish()
    return ModelConfig(nsa=NSAConfig(**nsa), rope=rope, **decoder)


def express(model: ModelConfig) -> dict[str, Any]:
    """The format's config of a model: see :class:`Format`."""
    nsa = model.nsa
    return {
        "model": {
            "dim": model.hidden, "n_layers": model.layers, "n_heads": nsa.num_heads, "n_kv_groups": nsa.num_kv_heads,
            "d_k": nsa.head_dim, "d_v": nsa.head_dim, "vocab_size": model.vocab_size, "seq_len": model.max_length,
            "norm_eps": model.norm_eps, "rope_theta": model.rope.theta, "gate_hidden": nsa.gate_hidden,
            "intermediate_size": model.intermediate, "tie_word_embeddings": model.tied,
        },
        "nsa": {
            "l": nsa.compress_block, "d": nsa.compress_stride, "l_sel": nsa.select_block, "n_sel": nsa.num_selected,
            "w": nsa.window, "phi": "mlp" if nsa.compression == "linear" else "avg",
        },
    }  # fmt: skip


def table(model: ModelConfig) -> list[Row]:
    """The format's tensors for a model: see :class:`Format`."""
    dim, at = model.nsa.head_dim, "blocks.{i}.attn."
    rotated = Linear(rotated_out=dim)
    rows = [
        Row("embed.weight", "embed.embedding"),
        Row("blocks.{i}.norm1.weight", "layers.{i}.attn_norm.scale"),
        Row(at + "W_Q.weight", "layers.{i}.attn.q_proj.kernel", rotated),
        Row((at + "W_K_cmp.weight", at + "W_K_sel.weight", at + "W_K_win.weight"), "layers.{i}.attn.k_proj.kernel",
            Joined(3, rotated)),
        Row((at + "W_V_cmp.weight", at + "W_V_sel.weight", at + "W_V_win.weight"), "layers.{i}.attn.v_proj.kernel",
            Joined(3)),
        Row(at + "out.weight", "layers.{i}.attn.o_proj.kernel", LINEAR),
        Row(at + "gate.fc1.weight", "layers.{i}.attn.gate_in.kernel", Linear(rotated_in=dim)),
        Row(at + "gate.fc1.bias", "layers.{i}.attn.gate_in.bias"),
        Row(at + "gate.fc2.weight", "layers.{i}.attn.gate_out.kernel", LINEAR),
        Row(at + "gate.fc2.bias", "layers.{i}.attn.gate_out.bias"),
        Row("blocks.{i}.norm2.weight", "layers.{i}.mlp_norm.scale"),
        Row("blocks.{i}.mlp.fc1.weight", "layers.{i}.mlp.up_proj.kernel", LINEAR),
        Row("blocks.{i}.mlp.fc2.weight", "layers.{i}.mlp.down_proj.kernel", LINEAR),
        Row("norm_f.weight", "norm.scale"),
    ]  # fmt: skip
    if not model.tied:
        rows.append(Row("lm_head.weight", "head.kernel", LINEAR))
    if model.nsa.compression == "linear":
        rows += [
            Row(at + "phi_k_conv.weight", "layers.{i}.attn.compress_k.weight", Depthwise(rotated=dim)),
            Row(at + "phi_v_conv.weight", "layers.{i}.attn.compress_v.weight", Depthwise()),
        ]
    return rows


FORMAT = Format(
    name="nsa-byte",
    title="nsa-vibe (seconds-0/nsa-117m-byte)",
    model_types=("nsa-byte", "nsa-117m-byte"),
    has_keys=lambda shapes: "blocks.0.attn.W_K_sel.weight" in shapes,
    understand=understand,
    express=express,
    table=table,
    notes=("selection scores come from the keys before the query alone, as in the format's decoding; its prefill "
           "normalises them over the whole text",),
    byte_tokens=True,
)  # fmt: skip
