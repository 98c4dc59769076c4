"""Drafters: frozen rules that propose tokens inside the jitted loop, as trees within a template."""

from specsa_jax.drafting.base import Context, Draft, Drafter, Seen, Target, drafter_from_name
from specsa_jax.drafting.prompt_lookup import PromptLookup
from specsa_jax.drafting.tree import TreeTemplate, parse_tree

__all__ = [
    "Context", "Draft", "Drafter", "PromptLookup", "Seen", "Target", "TreeTemplate", "drafter_from_name", "parse_tree",
]  # fmt: skip
