"""Drafters: frozen rules that propose tokens inside the jitted loop."""

from specsa_jax.drafting.base import Draft, Drafter, drafter_from_name
from specsa_jax.drafting.prompt_lookup import PromptLookup

__all__ = ["Draft", "Drafter", "PromptLookup", "drafter_from_name"]
