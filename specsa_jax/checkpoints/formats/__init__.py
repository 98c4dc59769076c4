"""Public checkpoint formats: one file each, a table of (source key, target, transformation) read in both directions."""

from specsa_jax.checkpoints.formats import (
    fla,
    flash_sparse_attention,
    llama,
    llama_nsa,
    minicpm4,
    nsa_byte,
    qwen3,
    toy_nsa_llama,
)  # fmt: skip
from specsa_jax.checkpoints.formats.base import Format

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (llama_nsa, nsa_byte, fla, toy_nsa_llama, flash_sparse_attention, minicpm4, llama, qwen3)
}

__all__ = ["FORMATS", "Format"]
