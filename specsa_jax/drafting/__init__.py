"""Drafters: frozen rules that propose tokens inside the jitted loop, as trees within a template."""

from specsa_jax.drafting.base import (
    Context,
    Draft,
    Drafter,
    Seen,
    Target,
    depth_first,
    drafter_from_name,
    register_drafter,
)
from specsa_jax.drafting.combined import Combined
from specsa_jax.drafting.draft_model import DraftModel, SelfDraft
from specsa_jax.drafting.grow import Level, grow
from specsa_jax.drafting.head import TrainedHead
from specsa_jax.drafting.prompt_lookup import PromptLookup
from specsa_jax.drafting.tree import TreeTemplate, parse_tree

__all__ = [
    "Combined", "Context", "Draft", "DraftModel", "Drafter", "Level", "PromptLookup", "Seen", "SelfDraft", "Target",
    "TrainedHead", "TreeTemplate", "depth_first", "drafter_from_name", "grow", "parse_tree",
    "register_drafter",
]  # fmt: skip

register_drafter("lookup", lambda where, checkpoint: PromptLookup())
register_drafter("head", lambda where, checkpoint: TrainedHead(where or checkpoint))
register_drafter("self", lambda where, checkpoint: SelfDraft())
register_drafter("model", lambda where, checkpoint: DraftModel(where))
register_drafter("none", lambda where, checkpoint: None)
