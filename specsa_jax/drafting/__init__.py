"""Drafters: frozen rules that propose tokens inside the jitted loop, as trees within a template."""

from collections.abc import Callable

from specsa_jax.drafting.base import (
    Context,
    Draft,
    Drafter,
    Seen,
    Target,
    depth_first,
    drafter_from_name,
    is_registered,
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
    "TrainedHead", "TreeTemplate", "depth_first", "drafter_from_name", "grow", "is_registered", "parse_tree",
    "register_drafter",
]  # fmt: skip


def _plain(name: str, make: Callable[[], Drafter | None]) -> None:
    """Registers a drafter that there is one of: nothing may stand behind a colon."""

    def checked(where: str, checkpoint: str) -> Drafter | None:
        if where:
            raise ValueError(f"drafter: got '{name}:{where}', expected {name!r}, with nothing behind it")
        return make()

    register_drafter(name, checked)


_plain("lookup", PromptLookup)
register_drafter("head", lambda where, checkpoint: TrainedHead(where or checkpoint))
_plain("self", SelfDraft)
register_drafter("model", lambda where, checkpoint: DraftModel(where))
_plain("none", lambda: None)
