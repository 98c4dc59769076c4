"""MiniCPM4 and MiniCPM4.1 (``MiniCPMForCausalLM`` with ``sparse_config``): InfLLM-V2 (arXiv 2509.24663).

Llama's keys and no parameters more. Mean-pooled rotated keys choose blocks, by the largest probability among the
pooled keys that touch a block. The window's blocks are forced, beside ``topk`` others; all tokens of selected blocks
and window meet in one softmax, without gates. Queries that see fewer than ``dense_len`` tokens attend to all.
"""

from __future__ import annotations

import math
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
from specsa_jax.config import ConfigError, ModelConfig, NSAConfig


def understand(raw: dict[str, Any], shapes: Shapes) -> ModelConfig:
    """The model that a config, and the tensors' shapes, describe: see :class:`Format`."""
    fields = Fields(raw)
    sparse = raw.get("sparse_config")
    if not isinstance(sparse, dict):
        raise ConfigError(
            f"sparse_config: got {sparse!r:.80}, expected InfLLM-V2's settings (kernel_size, …); where the "
            "checkpoint's config.json lacks them, add those of its model card"
        )
    inner = Fields(sparse)
    inner.only("use_nope", False, why="queries and keys are rotated where blocks are chosen")
    block, window = inner.whole("block_size", 64), inner.whole("window_size", 2048)
    length, stride = inner.whole("kernel_size", 32), inner.whole("kernel_stride", 16)
    if length != 2 * stride:
        inner.problems.append(f"kernel_size: got {length}, expected twice kernel_stride = {stride}")
    if window % block:
        inner.problems.append(f"window_size: got {window}, expected a multiple of block_size = {block}")
    nsa: dict[str, Any] = {
        **read_heads(fields), "compress_block": length, "compress_stride": stride, "select_block": block,
        "num_selected": inner.whole("topk", 64) + window // block,
        "num_initial": inner.whole("init_blocks", 1, least=0),
        "num_local": window // block + 1, "window": window, "compression": "mean", "compress_position": "none",
        "compressed_rope": "before", "separate_kv": False, "gate": "none", "score_map": "max",
        "compressed_output": False, "fused_selected_window": True,
        "dense_len": inner.whole("dense_len", 8192, least=0),
    }  # fmt: skip
    fields.problems += [f"sparse_config.{problem}" for problem in inner.problems]
    decoder, rope = read_decoder(fields, max_length=32768), read_rope(fields)
    depth = fields.whole("mup_denominator", decoder["layers"])
    scales: dict[str, Any] = {
        "embed_scale": fields.number("scale_emb", 1.0),
        "residual_scale": fields.number("scale_depth", 1.0) / math.sqrt(depth) if "scale_depth" in raw else 1.0,
        "logit_scale": fields.number("dim_model_base", decoder["hidden"]) / decoder["hidden"],
    }
    fields.finish()
    return ModelConfig(nsa=NSAConfig(**nsa), rope=rope, **decoder, **scales)


def express(model: ModelConfig) -> dict[str, Any]:
    """The format's config of a model: see :class:`Format`."""
    nsa = model.nsa
    base = model.logit_scale * model.hidden
    return {
        "architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", **write_decoder(model),
        "scale_emb": model.embed_scale, "scale_depth": model.residual_scale * math.sqrt(model.layers),
        "dim_model_base": int(base) if base == int(base) else base,
        "sparse_config": {
            "kernel_size": nsa.compress_block, "kernel_stride": nsa.compress_stride, "init_blocks": nsa.num_initial,
            "block_size": nsa.select_block, "window_size": nsa.window,
            "topk": nsa.num_selected - nsa.window // nsa.select_block, "use_nope": False, "dense_len": nsa.dense_len,
        },
    }  # fmt: skip


FORMAT = Format(
    name="minicpm4",
    title="MiniCPM4 with InfLLM-V2 (MiniCPMForCausalLM)",
    model_types=("minicpm", "minicpm4", "MiniCPMForCausalLM"),
    has_keys=lambda shapes: False,  # the keys are Llama's
    understand=understand,
    express=express,
    table=llama_rows,
    notes=(
        "block scores use the exact softmax over pooled keys, of which the format's kernel approximates the normaliser",
        "dense_len counts the tokens that a query sees, as in the format's decoding; its prefill counts the whole text",
    ),
)
