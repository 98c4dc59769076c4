"""The strategies that the planner considers."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from specsa_jax.checkpoints.records import Measurement
from specsa_jax.config import ModelConfig
from specsa_jax.drafting import Drafter, drafter_from_name, is_registered, parse_tree
from specsa_jax.planning import replay
from specsa_jax.planning.costs import Costs
from specsa_jax.planning.plan import Plan
from specsa_jax.planning.planner import Candidate, Planner, cheapest, watching
from specsa_jax.planning.predict import Acceptance
from specsa_jax.planning.profile import Profile
from specsa_jax.schedule import Sharing
from specsa_jax.strategy import Precision, Strategy

# Drafters with the trees worth trying: short chains for texts that are hard to foresee, long ones for copies, trees for
# drafters that know more than one likely token. ``head`` counts where the checkpoint has one.
DRAFTERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lookup", ("chain:2", "chain:4", "chain:8", "chain:16", "chain:32", "chain:63")),
    ("head", ("chain:2", "chain:4", "best:8:4", "best:16:6", "best:32:8")),
    ("lookup+head", ("chain:4", "chain:8", "chain:16", "best:16:6")),
    ("self", ("chain:2", "chain:4")),
)


def candidates(
    drafters: Sequence[tuple[str, Sequence[str]]], config: ModelConfig, checkpoint: str, precision: Precision,
    asked: bool = True,
) -> list[Candidate]:  # fmt: skip
    """Not to speculate, and each of ``drafters`` (name, trees); all layers refreshing.

    Of drafters that the user has ``asked`` for, raises ValueError for what does not suit the model, a head that the
    checkpoint has not, and names and trees that are none. Else these are left out, as are classes of one's own: nobody
    but the user says which code runs.
    """
    found = [Candidate("none", Strategy(None, precision=precision))]
    for name, trees in drafters:
        if not (asked or is_registered(name)):
            continue
        for tree in trees:
            try:
                strategy = Strategy(drafter_from_name(name, checkpoint), tree, precision=precision)
                strategy.check(config)
            except ValueError:  # CheckpointError is one
                if asked:
                    raise
                continue
            if strategy.drafter is not None:
                found.append(Candidate(name, strategy))
    return found


def profiled(profile: Profile, config: ModelConfig) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The drafters whose acceptance a profile knows (name, trees): on the trees that it names, of which one chain
    stands for all, and on those of :data:`DRAFTERS` that are no deeper than a page of the model."""
    depth = config.nsa.select_block
    usual = {name: [tree for tree in some if parse_tree(tree).depth <= depth] for name, some in DRAFTERS}
    trees: dict[str, dict[str, None]] = {}
    for prior in profile.priors:
        trees.setdefault(prior.drafter, dict.fromkeys(usual.get(prior.drafter, ())))[prior.tree] = None
    return tuple((name, tuple(found)) for name, found in trees.items())


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """What a planner may choose from in a call. Engines keep it: all that does not depend on the texts is known once.

    Attributes:
      candidates: drafters and trees.
      sharings: of class exact; ``admitted``: measurements of the approximate ones that the user's bound admits.
    """

    planner: Planner
    candidates: list[Candidate]
    sharings: list[Sharing]
    admitted: list[Measurement]

    @functools.cached_property
    def _priced(self) -> dict[Any, tuple[list[Candidate], dict[tuple[Strategy, int], float]]]:
        return {}

    def priced(
        self, costs: Costs, batch: int, context: int
    ) -> tuple[list[Candidate], dict[tuple[Strategy, int], float]]:
        """The candidates with the sharings that cost least in calls of this batch and context, and what plans have
        looked up of their costs (``counted`` of :class:`specsa_jax.planning.plan.Plan`)."""
        key = costs, batch, context
        if key not in self._priced:
            found = [
                dataclasses.replace(one, strategy=cheapest(one.strategy, self.sharings_of(one.strategy), costs, batch,
                                                           context))
                for one in self.candidates
            ]  # fmt: skip
            self._priced[key] = found, {}
        return self._priced[key]

    @functools.cached_property
    def watched_last(self) -> dict[Any, tuple[Drafter, ...]]:
        """Who watched from the beginning of the last call, by the shapes of its programs and whether it sampled."""
        return {}

    @property
    def precision(self) -> Precision:
        return self.candidates[0].strategy.precision

    @functools.cached_property
    def watching(self) -> list[tuple[Drafter, ...]]:
        """Sets of drafters that may watch when a call begins: nobody, one, or, last, all that keep a state. With three
        and more of these there are others, which are not worth compiling ahead."""
        own = dict.fromkeys(candidate.watcher for candidate in self.candidates)
        every = tuple(one for one in own if one is not None)
        return list(dict.fromkeys([(), *((one,) for one in every), every]))

    @functools.cached_property
    def largest(self) -> Strategy:
        """One that needs the most memory: all drafters that keep a state watch."""
        return watching(self.candidates[0].strategy, self.watching[-1])

    @functools.cached_property
    def replayed(self) -> list[tuple[str, Drafter, tuple[int, ...]]]:
        """The drafters that can be tried on a text: name, drafter, depths of their drafts, ascending."""
        depths: dict[tuple[str, Drafter], set[int]] = {}
        for candidate in self.candidates:
            drafter, template = candidate.strategy.drafter, candidate.strategy.template
            if drafter is not None and drafter.replays:
                key = candidate.drafter, drafter
                depths.setdefault(key, set()).add(template.depth)
        return [(name, drafter, tuple(sorted(found))) for (name, drafter), found in depths.items()]

    def plan(
        self, costs: Costs, priors: Acceptance, rows: Sequence[np.ndarray], max_new_tokens: int, *, context: int,
        replays: bool = True, drawn: bool = False, **call: Any,
    ) -> Plan:  # fmt: skip
        """A call's plan, after replays on its prompts.

        Args:
          costs, priors: of steps and drafts; of acceptance, without what a text has shown.
          rows: the prompts, int32 [T] each; ``max_new_tokens``: of each.
          context: tokens that a step's time depends on.
          replays: False: nothing is tried on the prompts.
          drawn: tokens are sampled: drafts are expected to fare worse than on greedy texts, of which the priors are.
          call: what else :class:`specsa_jax.planning.plan.Plan` takes.
        """
        begun = time.perf_counter()
        found, counted = self.priced(costs, len(rows), context)
        acceptance = priors.fresh(drawn, alone=len(rows) == 1)
        for name, drafter, (*_, depth) in self.replayed if replays else ():
            drafted, accepted = replay.replay(rows, drafter, depth)
            worth = min(len(rows), replay.PROMPTS) * replay.WORTH
            acceptance.add(name, f"chain:{depth}", drafted, accepted, worth=worth)
        plan = Plan(
            self.planner, found, costs, acceptance, batch=len(rows), context=context, counted=counted,
            new_tokens=len(rows) * max_new_tokens, replayed=self.replayed,
            lengths=np.array([len(row) for row in rows]), **call,
        )  # fmt: skip
        plan.seconds = time.perf_counter() - begun
        return plan

    def sharings_of(self, strategy: Strategy) -> list[Sharing]:
        """How layers and queries may share selections in it; what a measurement of shared groups says holds for chains
        of that width alone."""
        found = [sharing for sharing in self.sharings if not sharing.group or strategy.drafter is not None]
        for measured in self.admitted:
            shared = measured.sharing.group_mode == "shared"
            fits = strategy.drafter is not None and strategy.template.is_chain and measured.width == strategy.width
            if fits or not shared:
                found.append(measured.sharing)
        return found
