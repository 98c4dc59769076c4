"""What the dense formats share: a dense model in this project's terms, and its adaptation to NSA.

A dense model is one whose queries never reach ``dense_len``: it runs, exports and measures like any other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from specsa_jax.checkpoints.transforms import Filled, Row
from specsa_jax.config import ConfigError, ModelConfig, NSAConfig

# Gates start at σ(±GATE): 0.9975 for the selected branch and 0.0025 for the others.
GATE = 6.0


def dense_nsa(max_length: int, **heads: Any) -> NSAConfig:
    """The layer of a dense model: no gates, no compressed output, every query below ``dense_len``."""
    return NSAConfig(
        **heads, compression="mean", compress_position="none", compressed_rope="before", separate_kv=False,
        gate="none", compressed_output=False, fused_selected_window=True, dense_len=max_length + 1,
    )  # fmt: skip


def adapted(model: ModelConfig, **options: Any) -> ModelConfig:
    """The NSA model that a dense one becomes; ``options`` are NSAConfig's sizes (window, num_selected, …).

    Three gated branches over shared K/V; φ is weighted pooling of rotated keys. Raises ConfigError for options that
    the adaptation decides itself, or that do not fit.
    """
    allowed = (
        "compress_block", "compress_stride", "select_block", "num_selected", "num_initial", "num_local", "window",
    )  # fmt: skip
    if unknown := sorted(set(options) - set(allowed)):
        raise ConfigError(f"adapt: unknown option(s) {', '.join(unknown)}; known: {', '.join(allowed)}")
    nsa = dataclasses.replace(
        model.nsa, compression="weighted", gate="per_head", gate_bias=True, compressed_output=True,
        fused_selected_window=False, dense_len=0, **options,
    )  # fmt: skip
    if nsa.num_selected * nsa.select_block >= model.max_length or nsa.window >= model.max_length:
        raise ConfigError(
            f"adapt: got num_selected = {nsa.num_selected} blocks of select_block = {nsa.select_block} and window = "
            f"{nsa.window}, expected fewer tokens than max_length = {model.max_length} in each, or nothing is sparse"
        )
    return dataclasses.replace(model, nsa=nsa)


def added_rows(model: ModelConfig) -> list[Row]:
    """The parameters that an adapted model has beyond the dense one's, and what they start as.

    φ starts as mean pooling. Gates start independent of the input, with the selected branch open and the others shut:
    at first the output is close to attention over the selected blocks, which is dense attention while they are all.
    """
    pooling = Filled((1.0 / model.nsa.compress_block,))
    return [
        Row((), "layers.{i}.attn.compress_k.weight", pooling),
        Row((), "layers.{i}.attn.compress_v.weight", pooling),
        Row((), "layers.{i}.attn.gate_proj.kernel", Filled((0.0,))),
        Row((), "layers.{i}.attn.gate_proj.bias", Filled((-GATE, GATE, -GATE))),
    ]
