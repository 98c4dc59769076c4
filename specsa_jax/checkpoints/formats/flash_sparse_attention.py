"""Flash-Sparse-Attention: ToyNSALlama with one gate per branch for all heads."""

from __future__ import annotations

import dataclasses
from functools import partial

from specsa_jax.checkpoints.formats import toy_nsa_llama

FORMAT = dataclasses.replace(
    toy_nsa_llama.FORMAT,
    name="flash-sparse-attention",
    title="Flash-Sparse-Attention (ToyNSALlama with a shared gate)",
    model_types=("flash-sparse-attention",),
    has_keys=lambda shapes: toy_nsa_llama.gate_rows(shapes) == 3,
    understand=partial(toy_nsa_llama.understand, gate="shared"),
    # The same table: the gate's weight has 3 rows in place of 3·Hq.
)
