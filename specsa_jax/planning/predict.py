"""How many drafted tokens will stand: from a profile's priors, from replays on the prompt, from what decoding shows.

Evidence is counted per drafter and family (all chains are one: the third token of a head's chain of 4 fares as that of
its chain of 8), per position: of the drafts that came to a position, how many stood there. A prior counts for little,
so that a few steps outweigh it; and what one family shows moves the others of its drafter, as they draft for the same
text. Copies are another matter (:mod:`specsa_jax.planning.outlook`): chains of each length have evidence of their own,
and what follows from each for the length that is asked for weighs as many tokens as it is of. What copies and drafts
itself where there is nothing to copy (``lookup+head``) is taken for a head.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from specsa_jax.planning.outlook import POSITIONS, Outlook, far, of_copies, of_drafts, together
from specsa_jax.planning.profile import Prior

# Sequence steps that a prior is worth; that the guess is worth where there is no prior; and the steps after which live
# evidence counts half: the acceptance of a text changes along it.
_PRIOR_STEPS, _GUESS_STEPS, _HALF_LIFE = 4.0, 4.0, 16.0
# A draft in every second step, of which each token stands with this chance, as drafts so deep show. Where nothing is
# known.
_GUESSED_RATE, _GUESSED_CHANCE = 0.5, 0.6
_GUESSED_DEPTH = 16
_FORGOTTEN = 0.05  # steps
# Priors are of greedy texts. Where tokens are drawn, the most probable one is not always it, and a text repeats itself
# less: so much of each chance is expected to be left (anything from 0.75 to 0.9 does: benchmarks/planner_replay.py).
_DRAWN = 0.85


@dataclasses.dataclass
class _Counts:
    """Sequence steps, those with a draft, and these drafts' depths together; per position, float [64], drafts that came
    to it, and those that stood."""

    steps: float = 0.0
    drafted: float = 0.0
    depths: float = 0.0
    tried: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(POSITIONS))
    stood: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(POSITIONS))

    def add(self, drafted: Sequence[float] | np.ndarray, accepted: Sequence[float] | np.ndarray, weight: float) -> None:
        """Histograms over sequence steps by the draft's depth, and by accepted tokens, as ``decoding.Counts``."""
        at_least = [np.cumsum(np.asarray(x, float)[::-1])[::-1][: POSITIONS + 1] for x in (drafted, accepted)]
        reach = len(at_least[1])
        self.steps += weight * at_least[0][0]
        if reach > 1:
            deep, stood = at_least
            self.depths += weight * float(deep[1:].sum())
            if len(deep) != reach:
                deep = np.pad(deep, (0, max(0, reach - len(deep))))[:reach]
            self.drafted += weight * deep[1]
            # What came to position k was drafted that deep, and stood up to k − 1.
            self.tried[: reach - 1] += weight * np.minimum(deep[1:], stood[:-1])
            self.stood[: reach - 1] += weight * stood[1:]

    def scale(self, factor: float) -> None:
        self.steps *= factor
        self.drafted *= factor
        self.depths *= factor
        self.tried *= factor
        self.stood *= factor


# Chances, their log-odds, what they are worth, and the depth of the drafts that showed them.
_Expected = dict[tuple[str, str], tuple[np.ndarray, np.ndarray, float, float]]
_Outlooks = dict[tuple[str, str, int], Outlook]


def family(tree: str) -> str:
    """Trees whose positions fare alike."""
    return "chain" if tree.startswith("chain:") else tree


def _length(chain: str) -> int:
    return int(chain.partition(":")[2])


def copies(drafter: str, tree: str) -> bool:
    """Whether the tokens of such drafts fare alike, however deep they lie."""
    return drafter.partition(":")[0] == "lookup" and family(tree) == "chain"


class Acceptance:
    """How drafts are known to fare on one text. ``priors``: of a profile; of copies, the longest chain's; ``alone``:
    what is added of copies is of the same text for chains of each length, so that each speaks for itself."""

    def __init__(self, priors: Iterable[Prior] = (), alone: bool = False):
        self._prior: dict[tuple[str, str], _Counts] = collections.defaultdict(_Counts)
        self._live: dict[tuple[str, str], _Counts] = collections.defaultdict(_Counts)
        self._scale, self.alone = 1.0, alone  # the first: of the chances that priors give
        # By key, what is expected without live evidence, and outlooks then; of greedy texts, and of drawn ones.
        self._tables: dict[bool, tuple[_Expected, _Outlooks]] = {False: ({}, {}), True: ({}, {})}
        self._known, self._unseen = self._tables[False]
        self._shifts: dict[str, float] = {}  # of a drafter, the shift in log-odds that live evidence shows
        # What :meth:`rate` and :meth:`outlook` have answered since evidence came; a plan asks for each candidate.
        self._rates: dict[str, float] = {}
        self._outlooks: _Outlooks = {}
        self._copies: dict[str, tuple[list[tuple[float, float, np.ndarray, int]], np.ndarray]] = {}
        priors = tuple(priors)
        longest: dict[str, int] = collections.defaultdict(int)
        for prior in priors:
            if copies(prior.drafter, prior.tree):
                longest[prior.drafter] = max(longest[prior.drafter], _length(prior.tree))
        for prior in priors:  # of copies those of one length, from which the others follow
            if not copies(prior.drafter, prior.tree) or _length(prior.tree) == longest[prior.drafter]:
                self._prior[prior.drafter, family(prior.tree)].add(prior.drafted, prior.accepted, 1.0)

    def fresh(self, drawn: bool = False, alone: bool = False) -> Acceptance:
        """The same priors, without what was learned: for other texts, whose tokens are ``drawn``, or are greedy, or for
        one that is ``alone``."""
        other = Acceptance(alone=alone)
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
            self._live[drafter, tree if copies(drafter, tree) else family(tree)].add(drafted, accepted, weight)
            self._changed()

    def leave_one(self) -> None:
        """One of several texts is left, and alone from now on: what all have shown counts as little as a prior."""
        self.alone = True
        for counts in self._live.values():
            counts.scale(min(1.0, _PRIOR_STEPS / counts.steps) if counts.steps else 1.0)
        self._changed()

    def decay(self, steps: int) -> None:
        """Older evidence counts less: ``steps`` have passed since the last call."""
        for counts in self._live.values():
            counts.scale(0.5 ** (steps / _HALF_LIFE))
        self._changed()

    def _changed(self) -> None:
        self._shifts.clear()
        self._rates.clear()
        self._outlooks.clear()
        self._copies.clear()

    def rate(self, drafter: str) -> float:
        """The fraction of a sequence's steps in which ``drafter`` has a draft, of drafts as deep as were seen."""
        if drafter not in self._rates:
            (prior_steps, prior_drafted), (steps, drafted) = _pooled(self._prior, drafter), _pooled(self._live, drafter)
            worth = min(_PRIOR_STEPS, prior_steps) or _GUESS_STEPS
            expected = prior_drafted / prior_steps if prior_steps else _GUESSED_RATE
            self._rates[drafter] = (expected * worth + drafted) / (worth + steps)
        return self._rates[drafter]

    def chances(self, drafter: str, tree: str, depth: int) -> np.ndarray:
        """float [depth]: the chance that a drafted token stands, given that those before it on its path do; of drafts
        as deep as were seen."""
        return self._chances(drafter, tree)[:depth]

    def outlook(self, drafter: str, tree: str, depth: int, rate: float | None = None, shift: float = 0.0) -> Outlook:
        """What a sequence's steps with this draft are expected to give.

        ``rate`` and ``shift`` (log-odds of each chance) replace and move what is known, for what might be.
        """
        if rate is not None or shift:
            return self._outlook(drafter, tree, depth, rate, shift)
        seen = any(name == drafter for name, _ in self._live) or self._shift(drafter)
        table, key = self._outlooks if seen else self._unseen, (drafter, family(tree), depth)
        if key not in table:
            table[key] = self._outlook(drafter, tree, depth, None, 0.0)
        return table[key]

    def length(self, drafter: str, tree: str, depth: int) -> float:
        """Expected tokens that a sequence gains in a step, the target's own included."""
        return self.outlook(drafter, tree, depth).length

    def _outlook(self, drafter: str, tree: str, depth: int, rate: float | None, shift: float) -> Outlook:
        def moved(chances: np.ndarray) -> np.ndarray:
            return sigmoid(logit(chances) + shift) if shift else chances

        if not copies(drafter, tree):
            return of_drafts(
                moved(self._chances(drafter, tree)), self.rate(drafter) if rate is None else rate, depth
            )  # fmt: skip
        stretches, every = self._copied(drafter)
        if self.alone and (same := [one for one in stretches[1:] if one[-1] == depth]):
            stretches = [stretches[0], *same]
        deepest = max(seen for *_, seen in stretches)
        goes_on = far(moved(every), deepest)
        parts = []
        for steps, own, chances, seen in stretches:
            chances, own = moved(chances), own if rate is None else rate
            parts.append((steps, of_drafts(chances, own, seen), of_copies(chances, own, depth, seen, goes_on)))
        return together(parts)

    def _copied(self, drafter: str) -> tuple[list[tuple[float, float, np.ndarray, int]], np.ndarray]:
        """Of a drafter that copies: :meth:`_stretches`, and chances [64] of all of them together."""
        if drafter not in self._copies:
            self._copies[drafter] = self._stretches(drafter), self._chances(drafter, "chain")
        return self._copies[drafter]

    def _stretches(self, drafter: str) -> list[tuple[float, float, np.ndarray, int]]:
        """Of a drafter that copies, by the length of its chains, the prior's first: steps that it is worth, the share
        of these that had a draft, chances [64], and the length."""
        chances, odds, _, seen = self._expected((drafter, "chain"))
        prior = self._prior.get((drafter, "chain")) or _Counts()
        rate, prior_steps = prior.drafted / prior.steps if prior.steps else _GUESSED_RATE, prior.steps
        found = [(min(_PRIOR_STEPS, prior_steps) or _GUESS_STEPS, rate, chances, min(POSITIONS, round(seen)))]
        for (name, tree), live in self._live.items():
            if name == drafter and copies(name, tree) and live.steps > _FORGOTTEN:
                own = (chances + live.stood) / (1.0 + live.tried)
                depth = min(POSITIONS, _length(tree))
                found.append((live.steps, (rate + live.drafted) / (1.0 + live.steps), own, depth))
        if shift := self._shift(drafter):
            found[0] = (found[0][0], rate, sigmoid(odds + shift), found[0][3])
        return found

    def _chances(self, drafter: str, tree: str) -> np.ndarray:
        """float [64]. Of copies, of chains of all lengths together."""
        _, odds, worth, _ = self._expected((drafter, family(tree)))
        tried, stood = np.full(POSITIONS, worth), sigmoid(odds + self._shift(drafter)) * worth
        for (name, other), live in self._live.items():
            if name == drafter and family(other) == family(tree):
                tried, stood = tried + live.tried, stood + live.stood
        return stood / tried

    def _expected(self, key: tuple[str, str]) -> tuple[np.ndarray, np.ndarray, float, float]:
        """Chances [64] before live evidence, their log-odds, the drafts that they are worth, and the depth of these."""
        if key not in self._known:
            prior = self._prior.get(key) or self._prior.get((key[0], "chain"))
            chances, worth, seen = np.full(POSITIONS, _GUESSED_CHANCE), _GUESS_STEPS, float(_GUESSED_DEPTH)
            if prior is not None and prior.tried[0]:
                chances = (prior.stood + _GUESSED_CHANCE) / (prior.tried + 1.0)
                # Behind the last position with evidence, as there.
                last = int(np.flatnonzero(prior.tried >= 4)[-1]) if (prior.tried >= 4).any() else 0
                chances[last + 1 :] = chances[last]
                worth, seen = min(_PRIOR_STEPS, float(prior.tried[0])), prior.depths / prior.drafted
            chances = self._scale * chances
            self._known[key] = chances, logit(chances), worth, seen
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
