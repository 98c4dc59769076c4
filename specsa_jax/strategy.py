"""How a step decodes: everything that is static about it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, get_args

from pallas_kernels.attention.config import GroupMode
from specsa_jax.acceptance import Acceptance
from specsa_jax.config import ModelConfig
from specsa_jax.drafting import Drafter, PromptLookup
from specsa_jax.drafting.tree import Traversal, TreeTemplate, parse_tree
from specsa_jax.schedule import Sharing, check_schedule, parse_schedule

Precision = Literal["exact", "strict", "approx"]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Everything static about a decoding step; one trace each.

    Attributes:
      drafter: proposes tokens; None decodes one token at a time.
      tree: shape of the draft, as :func:`specsa_jax.drafting.parse_tree` reads it: ``chain:K`` for K drafted tokens
        in a row (a step then verifies K + 1), ``4-2-1-1``, ``best:64``.
      traversal: order of a tree's nodes, "breadth" or "depth" first.
      acceptance: which drafts stand (:mod:`specsa_jax.acceptance`): "coupled", "rejection", "block" or "typical".
      precision: "exact"; "strict": tokens are bit-identical to decoding one at a time in this class; "approx":
        acceptance may be lossy, layers and queries may share selections.
      schedule: which layers refresh and which reuse in decoding (the prompt is read with all refreshing), as
        :func:`specsa_jax.schedule.parse_schedule` reads it: "FSSFSS", ``every:3``, ``all``; or ``searched:K``, the one
        with K refresh layers (and this ``keep_compressed``) that ``specsa schedule`` has stored with the checkpoint.
      keep_compressed: reuse layers keep the output of their compressed branch.
      group: C, adjacent queries that the kernels serve together; 0: as they like it.
      group_mode: "merged": each attends to the blocks that it selected itself; "shared": to those of the group's query
        with the longest prefix.

    Raises ValueError for a drafter that is none, for a tree that cannot be read or is too large, and for options that
    contradict each other.
    """

    drafter: Drafter | None = PromptLookup()
    tree: str = "chain:5"
    traversal: Traversal = "breadth"
    acceptance: Acceptance = "coupled"
    precision: Precision = "exact"
    schedule: str = "all"
    keep_compressed: bool = True
    group: int = 0
    group_mode: GroupMode = "merged"

    def __post_init__(self) -> None:
        if not isinstance(self.drafter, Drafter | None):
            raise ValueError(f"drafter: got {self.drafter!r}, expected a Drafter, such as PromptLookup(), or None")
        template = parse_tree(self.tree, self.traversal)
        for name, choices in (
            ("acceptance", get_args(Acceptance)), ("precision", get_args(Precision)),
            ("group_mode", get_args(GroupMode)),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(map(repr, choices))}"
                )
        if self.acceptance == "typical" and self.precision != "approx":
            raise ValueError(f"acceptance: got 'typical', which is lossy, in precision {self.precision!r}, expected "
                             "precision 'approx'")  # fmt: skip
        if self.acceptance in ("rejection", "block"):
            if self.precision == "strict":
                raise ValueError(f"acceptance: got {self.acceptance!r} in precision 'strict', whose tokens are those "
                                 "of decoding one at a time, expected 'coupled'")  # fmt: skip
            if self.drafter is None or not self.drafter.has_law:
                raise ValueError(f"acceptance: got {self.acceptance!r} for drafter {self.drafter}, whose drafts are "
                                 "not drawn from a law, expected 'coupled'")  # fmt: skip
            if not template.is_static or (self.acceptance == "block" and not template.is_chain):
                wanted = "a chain" if self.acceptance == "block" else "a chain or fixed branchings"
                raise ValueError(f"acceptance: got {self.acceptance!r} for tree {self.tree}, expected {wanted}")

        check_schedule(self.schedule)
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 0:
            raise ValueError(f"group: got {self.group!r}, expected an integer of at least 1, or 0")
        if not isinstance(self.keep_compressed, bool):
            raise ValueError(f"keep_compressed: got {self.keep_compressed!r}, expected True or False")
        if self.group_mode == "shared" and self.group < 2:
            raise ValueError(f"group: got {self.group} in group_mode 'shared', expected at least 2 queries")
        if self.precision != "approx":
            kind, _, number = self.schedule.partition(":")
            if "S" in kind or kind == "searched" or (kind == "every" and int(number) > 1):
                raise ValueError(f"schedule: got {self.schedule!r}, which has reuse layers, in precision "
                                 f"{self.precision!r}, expected precision 'approx', or schedule 'all'")  # fmt: skip
            if self.group_mode == "shared":
                raise ValueError(f"group_mode: got 'shared' in precision {self.precision!r}, expected precision "
                                 "'approx', or group_mode 'merged'")  # fmt: skip
        if self.group and self.precision == "strict":
            raise ValueError(f"group: got {self.group} in precision 'strict', where queries are served one by one, "
                             "expected 0")  # fmt: skip

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    def __hash__(self) -> int:
        """Computed once: drafters have whole model configs in them, and planners look strategies up all the time."""
        return self._hash

    @functools.cached_property
    def template(self) -> TreeTemplate:
        """The tree, read."""
        return parse_tree(self.tree, self.traversal)

    @property
    def width(self) -> int:
        """T: tokens that a step verifies, the pending one included."""
        return 1 if self.drafter is None else self.template.nodes + 1

    @property
    def reach(self) -> int:
        """A: the most tokens that a step gives, and the nodes of the longest path."""
        return 1 if self.drafter is None else self.template.depth + 1

    def sharing(self, layers: int) -> Sharing:
        """Who takes whose selection in a model of so many layers. Raises ValueError for another schedule's length."""
        schedule = parse_schedule(self.schedule, layers)
        return Sharing(schedule, self.keep_compressed, self.group, self.group_mode)

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where tree, drafter, schedule and model do not go together."""
        self.sharing(config.layers)
        if self.drafter is not None:
            self.template.check(config)
            self.drafter.check(config, self.template)

    def describe(self) -> str:
        """One line for people."""
        words = ["autoregressive"] if self.drafter is None else [str(self.drafter), self.tree]
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("traversal", "acceptance", "precision"):
            if (value := getattr(self, name)) != defaults[name]:
                words.append(f"{value}-first" if name == "traversal" else value)
        if self.schedule != defaults["schedule"]:
            words.append(self.schedule)
        if not self.keep_compressed:
            words.append("compressed output dropped")
        if self.group:
            words.append(f"{self.group_mode} by {self.group}")
        return " ".join(words)


AUTOREGRESSIVE = Strategy(drafter=None)
