"""How many drafted tokens will stand: from a profile's priors, from replays on the prompt, from what decoding shows.

Evidence is counted per drafter and family (all chains are one: the third token of a chain of 4 fares as that of a chain
of 8), per position: of the drafts that came to a position, how many stood there. A prior counts for little, so that a
few steps outweigh it; and what one family shows moves the others of its drafter, as they draft for the same text.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from specsa_jax.planning.profile import Prior

# Sequence steps that a prior is worth; that the guess is worth where there is no prior; and the steps after which live
# evidence counts half: the acceptance of a text changes along it.
_PRIOR_STEPS, _GUESS_STEPS, _HALF_LIFE = 4.0, 4.0, 16.0
# A draft in every second step, of which each token stands with this chance. Where nothing is known.
_GUESSED_RATE, _GUESSED_CHANCE = 0.5, 0.6
_POSITIONS = 64  # a path is no longer than a page
_ODD, _TINY = 2 * np.arange(1, _POSITIONS + 1) - 1, 1e-9  # k² is the sum of the first k odd numbers
# Priors are of greedy texts. Where tokens are drawn, the most probable one is not always it, and a text repeats itself
# less: so much of each chance is expected to be left (anything from 0.75 to 0.9 does: benchmarks/planner_replay.py).
_DRAWN = 0.85


@dataclasses.dataclass
class _Counts:
    """Sequence steps, those with a draft; per position, float [64], drafts that came to it, and those that stood."""

    steps: float = 0.0
    drafted: float = 0.0
    tried: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(_POSITIONS))
    stood: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(_POSITIONS))

    def add(self, drafted: Sequence[float] | np.ndarray, accepted: Sequence[float] | np.ndarray, weight: float) -> None:
        """Histograms over sequence steps by the draft's depth, and by accepted tokens, as ``decoding.Counts``."""
        at_least = [np.cumsum(np.asarray(x, float)[::-1])[::-1] for x in (drafted, accepted)]
        reach = len(at_least[1])
        self.steps += weight * at_least[0][0]
        if reach > 1:
            deep, stood = at_least
            if len(deep) != reach:
                deep = np.pad(deep, (0, max(0, reach - len(deep))))[:reach]
            self.drafted += weight * deep[1]
            # What came to position k was drafted that deep, and stood up to k − 1.
            self.tried[: reach - 1] += weight * np.minimum(deep[1:], stood[:-1])
            self.stood[: reach - 1] += weight * stood[1:]

    def scale(self, factor: float) -> None:
        self.steps *= factor
        self.drafted *= factor
        self.tried *= factor
        self.stood *= factor


_Expected = dict[tuple[str, str], tuple[np.ndarray, np.ndarray, float]]  # chances, their log-odds, what they are worth
_Gains = dict[tuple[str, str], tuple[list[float], list[float]]]  # of a draft, by depth: see :meth:`Acceptance._drafted`


def family(tree: str) -> str:
    """Trees whose positions fare alike."""
    return "chain" if tree.startswith("chain:") else tree


class Acceptance:
    """What is known of the acceptance of drafts on one text. ``priors``: of a profile."""

    def __init__(self, priors: Iterable[Prior] = ()):
        self._prior: dict[tuple[str, str], _Counts] = collections.defaultdict(_Counts)
        self._live: dict[tuple[str, str], _Counts] = collections.defaultdict(_Counts)
        self._scale = 1.0  # of the chances that priors give
        # By key, what is expected without live evidence, and the gains then; of greedy texts, and of drawn ones.
        self._tables: dict[bool, tuple[_Expected, _Gains]] = {False: ({}, {}), True: ({}, {})}
        self._known, self._unseen = self._tables[False]
        self._shifts: dict[str, float] = {}  # of a drafter, the shift in log-odds that live evidence shows
        # What :meth:`rate` and :meth:`_drafted` have answered since evidence came; a plan asks for each candidate.
        self._rates: dict[str, float] = {}
        self._gains: _Gains = {}
        for prior in priors:
            self._prior[prior.drafter, family(prior.tree)].add(prior.drafted, prior.accepted, 1.0)

    def fresh(self, drawn: bool = False) -> Acceptance:
        """The same priors, without what was learned: for other texts, whose tokens are ``drawn``, or are greedy."""
        other = Acceptance()
        other._prior, other._tables = self._prior, self._tables  # all calls share what follows from priors alone
        other._known, other._unseen = self._tables[drawn]
        other._scale = _DRAWN if drawn else 1.0
        return other

    def add(
        self, drafter: str, tree: str, drafted: Sequence[float] | np.ndarray, accepted: Sequence[float] | np.ndarray,
        worth: float | None = None,
    ) -> None:  # fmt: skip
        """Evidence of this very text, as histograms (:class:`specsa_jax.decoding.Counts`); all of it counts as
        ``worth`` sequence steps, or as it is."""
        steps = float(np.sum(drafted))
        if steps:
            weight = 1.0 if worth is None else worth / steps
            self._live[drafter, family(tree)].add(drafted, accepted, weight)
            self._changed()

    def decay(self, steps: int) -> None:
        """Older evidence counts less: ``steps`` have passed since the last call."""
        for counts in self._live.values():
            counts.scale(0.5 ** (steps / _HALF_LIFE))
        self._changed()

    def _changed(self) -> None:
        self._shifts.clear()
        self._rates.clear()
        self._gains.clear()

    def rate(self, drafter: str) -> float:
        """The fraction of a sequence's steps in which ``drafter`` has a draft."""
        if drafter not in self._rates:
            (prior_steps, prior_drafted), (steps, drafted) = _pooled(self._prior, drafter), _pooled(self._live, drafter)
            worth = min(_PRIOR_STEPS, prior_steps) or _GUESS_STEPS
            expected = prior_drafted / prior_steps if prior_steps else _GUESSED_RATE
            self._rates[drafter] = (expected * worth + drafted) / (worth + steps)
        return self._rates[drafter]

    def chances(self, drafter: str, tree: str, depth: int) -> np.ndarray:
        """float [depth]: the chance that a drafted token stands, given that those before it on its path do."""
        key = drafter, family(tree)
        _, odds, worth = self._expected(key)
        expected = sigmoid(odds + self._shift(drafter))
        if key in self._live:
            live = self._live[key]
            expected = (expected * worth + live.stood) / (worth + live.tried)
        return expected[:depth]

    def gain(self, drafter: str, tree: str, depth: int) -> float:
        """Drafted tokens that are expected to stand where there is a draft."""
        return self._drafted(drafter, tree)[0][min(depth, _POSITIONS) - 1]

    def spread(self, drafter: str, tree: str, depth: int) -> float:
        """Variance of the drafted tokens that stand in a step, with a draft or without, over the square of their mean;
        as if steps did not depend on each other."""
        return max(0.0, self._drafted(drafter, tree)[1][min(depth, _POSITIONS) - 1] / self.rate(drafter) - 1.0)

    def _drafted(self, drafter: str, tree: str) -> tuple[list[float], list[float]]:
        """Of the tokens that stand where there is a draft, the mean, and the mean square over the mean's; [64] each, by
        depth: all depths are computed at once."""
        key = drafter, family(tree)
        gains = self._gains if key in self._live or self._shift(drafter) else self._unseen
        if key not in gains:
            stands = np.cumprod(self.chances(drafter, tree, _POSITIONS))  # that so many do, or more
            mean, square = np.cumsum(stands), np.cumsum(_ODD * stands)
            gains[key] = mean.tolist(), (square / np.maximum(mean, _TINY) ** 2).tolist()
        return gains[key]

    def length(self, drafter: str, tree: str, depth: int) -> float:
        """Expected tokens that a sequence gains in a step, the target's own included."""
        return 1.0 + self.rate(drafter) * self.gain(drafter, tree, depth)

    def _expected(self, key: tuple[str, str]) -> tuple[np.ndarray, np.ndarray, float]:
        """Chances [64] before live evidence, their log-odds, and the drafts that they are worth."""
        if key not in self._known:
            prior = self._prior.get(key) or self._prior.get((key[0], "chain"))
            chances, worth = np.full(_POSITIONS, _GUESSED_CHANCE), _GUESS_STEPS
            if prior is not None and prior.tried[0]:
                chances = (prior.stood + _GUESSED_CHANCE) / (prior.tried + 1.0)
                # Behind the last position with evidence, as there.
                last = int(np.flatnonzero(prior.tried >= 4)[-1]) if (prior.tried >= 4).any() else 0
                chances[last + 1 :] = chances[last]
                worth = min(_PRIOR_STEPS, float(prior.tried[0]))
            chances = self._scale * chances
            self._known[key] = chances, logit(chances), worth
        return self._known[key]

    def _shift(self, drafter: str) -> float:
        """By how much, in log-odds, a drafter's drafts fare better on this text than was expected: at other positions
        and in other trees too. A drafter of which this one is a part, or that is a part of it, counts half."""
        if drafter not in self._shifts:
            tried = stood = expected = 0.0
            for key, live in self._live.items():
                if set(key[0].split("+")) & set(drafter.split("+")):
                    weight = 1.0 if key[0] == drafter else 0.5
                    tried += weight * float(live.tried.sum())
                    stood += weight * float(live.stood.sum())
                    expected += weight * float(live.tried @ self._expected(key)[0])
            shift = 0.0
            if tried:
                mean = expected / tried
                shifted = (stood + _PRIOR_STEPS * mean) / (tried + _PRIOR_STEPS)
                shift = float(logit(np.array(shifted)) - logit(np.array(mean)))
            self._shifts[drafter] = shift
        return self._shifts[drafter]


def _pooled(table: dict[tuple[str, str], _Counts], drafter: str) -> tuple[float, float]:
    """Steps and drafts of all families: whether there is a draft does not depend on its shape."""
    found = [counts for (name, _), counts in table.items() if name == drafter]
    return sum(c.steps for c in found), sum(c.drafted for c in found)


def logit(x: np.ndarray) -> np.ndarray:
    """Log-odds of chances, which count as 0.005 to 0.995."""
    x = np.clip(x, 0.005, 0.995)
    return np.log(x) - np.log1p(-x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The chances whose log-odds these are."""
    return 1.0 / (1.0 + np.exp(-x))
