"""What a planner is asked to do, what it chooses from, and what it says of the choices that a plan makes."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, get_args

from specsa_jax.drafting import Drafter, parse_tree
from specsa_jax.drafting.watching import Watching, watcher
from specsa_jax.planning.costs import Costs
from specsa_jax.planning.profile import Point
from specsa_jax.schedule import Sharing
from specsa_jax.strategy import Precision, Strategy


@dataclasses.dataclass(frozen=True)
class Planner:
    """How strategies are chosen for a call of :meth:`specsa_jax.Engine.generate`.

    Attributes:
      precision: the class that strategies are chosen in; None: the engine's.
      drafters: (name as :func:`specsa_jax.drafting.drafter_from_name` reads it, trees) that are considered; (): those
        of the profile, or :data:`specsa_jax.planning.space.DRAFTERS`. Not to speculate is always considered.
      hysteresis: a switch has to promise so much more throughput, as a fraction.
      segment: steps of the first segment; as long as the strategy stays, each is twice the one before, up to 4 times
        the first, or 16 times where nothing is drafted. One that would take less than 30 ms (where the strategy has
        stayed, 100 ms on a GPU, and up to fourfold), or less than 125 times what choosing took, is longer; where
        nothing could change the choice any more, it goes to the end.
      switch: False: chosen once, before the first token.

    Raises ValueError for values outside their ranges.
    """

    precision: Precision | None = None
    drafters: tuple[tuple[str, tuple[str, ...]], ...] = ()
    hysteresis: float = 0.05
    segment: int = 4
    switch: bool = True

    def __post_init__(self) -> None:
        if self.precision is not None and not (
            isinstance(self.precision, str) and self.precision in get_args(Precision)
        ):
            raise ValueError(f"precision: got {self.precision!r}, expected one of {', '.join(get_args(Precision))}")
        number = isinstance(self.hysteresis, numbers.Real) and not isinstance(self.hysteresis, bool)
        if not (number and 0 <= self.hysteresis < math.inf):
            raise ValueError(f"hysteresis: got {self.hysteresis!r}, expected a fraction of at least 0")
        if isinstance(self.segment, bool) or not isinstance(self.segment, numbers.Integral) or self.segment < 1:
            raise ValueError(f"segment: got {self.segment!r}, expected an integer of at least 1 step")
        object.__setattr__(self, "segment", int(self.segment))  # NumPy's overflow
        if not isinstance(self.switch, bool):
            raise ValueError(f"switch: got {self.switch!r}, expected True or False")
        object.__setattr__(self, "drafters", _drafters(self.drafters))


def _drafters(given: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Names with trees, also from lists: planners are compared and hashed. Raises ValueError."""

    def is_list(value: Any, size: int | None = None) -> bool:
        return isinstance(value, list | tuple) and size in (None, len(value))

    if not is_list(given) or not all(
        is_list(one, 2) and isinstance(one[0], str) and is_list(one[1]) and one[1] for one in given
    ):
        raise ValueError(f"drafters: got {given!r}, expected pairs of a name and its trees, such as "
                         "(('lookup', ('chain:4', 'chain:16')),)")  # fmt: skip
    for _, trees in given:
        for tree in trees:
            parse_tree(tree)
    return tuple((name, tuple(trees)) for name, trees in given)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A member of the space: the drafter's name, and a strategy with it."""

    drafter: str
    strategy: Strategy

    def describe(self) -> str:
        """The strategy in words, by the drafter's name; and who watches in vain."""
        return self._words

    @functools.cached_property
    def _words(self) -> str:
        drafter = self.strategy.drafter
        drafter = drafter.drafter if isinstance(drafter, Watching) else drafter
        words = dataclasses.replace(self.strategy, drafter=drafter).describe().replace(str(drafter), self.drafter, 1)
        return words + "".join(f", {str(one).partition(':')[0]} watching" for one in self.idle)  # without its path

    @functools.cached_property
    def watchers(self) -> tuple[Drafter, ...]:
        """All drafters whose states it keeps up; ``idle``: those that it does not draft from."""
        drafter = self.strategy.drafter
        own = () if self.watcher is None else (self.watcher,)
        return drafter.watchers if isinstance(drafter, Watching) else own

    @property
    def idle(self) -> tuple[Drafter, ...]:
        return tuple(one for one in self.watchers if one != self.watcher)

    @functools.cached_property
    def watcher(self) -> Drafter | None:
        """The drafter whose state it drafts from."""
        drafter = self.strategy.drafter
        return watcher(drafter.drafter if isinstance(drafter, Watching) else drafter)


@dataclasses.dataclass(frozen=True)
class Option:
    """What a plan predicts of a candidate: tokens that a running sequence gains in a step, the target's own included;
    seconds of a step; tokens of the batch per second, until its last sequence is done; whether its program is there
    already."""

    strategy: str
    acceptance_length: float
    step_seconds: float
    tokens_per_second: float
    compiled: bool


@dataclasses.dataclass(frozen=True)
class Decision:
    """A choice between two segments.

    Attributes:
      steps: target passes before it; ``running``: sequences that are not done.
      chosen: the strategy, in words; ``reason``: why it was taken or kept.
      options: all that were considered, the fastest first.
      observed_steps, observed_acceptance_length, observed_tokens_per_second: of the segment that followed.
    """

    steps: int
    running: int
    chosen: str
    reason: str
    options: tuple[Option, ...]
    observed_steps: int = 0
    observed_acceptance_length: float = 0.0
    observed_tokens_per_second: float = 0.0


def timed_as(strategy: Strategy) -> Literal["exact", "strict"]:
    """A step of class approx takes what an exact one with its sharing takes."""
    return "strict" if strategy.precision == "strict" else "exact"


@functools.lru_cache
def watching(strategy: Strategy, watchers: tuple[Drafter, ...]) -> Strategy:
    """``strategy`` with others watching; without watchers, itself."""
    if not watchers:
        return strategy
    tree = "chain:1" if strategy.drafter is None else strategy.tree
    return dataclasses.replace(strategy, drafter=Watching(strategy.drafter, watchers), tree=tree)


@functools.lru_cache
def watched(candidate: Candidate, watchers: tuple[Drafter, ...]) -> Candidate:
    """``candidate`` with ``watchers`` watching."""
    return Candidate(candidate.drafter, watching(candidate.strategy, watchers))


def cheapest(strategy: Strategy, sharings: Sequence[Sharing], costs: Costs, batch: int, context: int) -> Strategy:
    """``strategy`` with the sharing by which its step takes the least time: sharing decides about nothing else.

    All refreshing, grouped as the kernels like it, is among ``sharings`` if nothing better is known.
    """
    chain = strategy.width == 1 or strategy.template.is_chain

    def seconds(sharing: Sharing) -> float:
        return costs.step(Point(batch, context, strategy.width, chain, sharing, timed_as(strategy)))

    first, *others = sharings
    if not others and first == Sharing():
        return strategy
    best = min(sharings, key=seconds)
    return dataclasses.replace(
        strategy, schedule=best.schedule or "all", keep_compressed=best.keep_compressed, group=best.group,
        group_mode=best.group_mode,
    )  # fmt: skip
