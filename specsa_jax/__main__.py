"""``python -m specsa_jax``."""

from specsa_jax.cli import console

console()
