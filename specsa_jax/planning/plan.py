"""A call's plan: which strategy decodes next, and for how long.

Expected tokens of a step come from :mod:`specsa_jax.planning.predict`, its seconds from
:mod:`specsa_jax.planning.costs`, corrected by what the call's own steps took. Decoding runs in segments; between two of
them the plan may change the strategy. Nothing moves then: all strategies share one cache, and drafters with a state of
their own watch (:mod:`specsa_jax.drafting.watching`) until a strategy without them is chosen.

After arXiv 2605.19893, section on profile-guided orchestration; acceptance per position, the costs of switching and the
corrections are ours.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from specsa_jax.decoding import Counts, add_counts
from specsa_jax.drafting import Drafter
from specsa_jax.planning import replay
from specsa_jax.planning.costs import Costs
from specsa_jax.planning.factors import Factors
from specsa_jax.planning.outlook import Outlook
from specsa_jax.planning.pace import Pace
from specsa_jax.planning.planner import Candidate, Decision, Option, Planner, timed_as, watched, watching
from specsa_jax.planning.predict import Acceptance
from specsa_jax.planning.profile import Point
from specsa_jax.strategy import Strategy

# Watching costs time in every step. A drafter with a state watches if what it promises when a call begins is this much
# of the best; that may end after any segment, but it cannot begin again.
_WORTH_WATCHING = 0.9
# A strategy that has not run is taken to be off by this power of what those that have are off by: with a profile a
# strategy that is slower than predicted is a reason to try others; counted times are all off together.
_SHARED_MEASURED, _SHARED_COUNTED = 0.8, 1.0
_ALONE = Outlook(1.0, 0.0)
# Of a segment's time, what choosing may take.
_SHARE = 0.008
# As long as the strategy stays, a segment has so many times the steps of the one before, up to so many times those of
# the first, and takes at least so many times the shortest. Where drafts show how they fare, a text that begins to
# repeat itself is to be seen soon; where nothing is drafted, nothing is seen, and what follows may be drafts in vain.
_GROWTH, _LONGEST, _LONGEST_DRAFTLESS, _LONGER = 2, 4, 16, 4
# The last segment takes so many times the steps that are expected to be left, in case that is wrong.
_TO_THE_END = 1.5
# Seconds that a segment takes at least, by backend: calling a compiled loop again costs some of them, on a GPU, whose
# graphs are updated, a millisecond or two. A strategy's first segment takes no more than the least of them: what it was
# chosen by may be wrong.
SHORTEST = {"cpu": 0.03, "gpu": 0.1}


@dataclasses.dataclass
class Fixed:
    """What :class:`Plan` is, for a strategy that somebody has chosen."""

    strategy: Strategy
    steps_left: float = math.inf
    decisions: Sequence[Decision] = ()
    seconds: float = 0.0
    wants_text: bool = False

    def look(self, tokens: Any, known: np.ndarray, done: np.ndarray) -> None:
        """Nothing follows from it."""

    def observe(self, counts: Counts, seconds: float, new_tokens: int, running: int, remaining: int) -> None:
        """Nothing follows from it."""


class Plan:
    """The choices of one call: ``strategy``, for ``steps_left`` steps, until :meth:`observe` changes them.

    Args:
      planner: how to choose.
      candidates: the space, without watchers; of the class of precision that was asked for.
      costs: seconds of steps and drafts.
      acceptance: of this call's texts: priors, and replays.
      batch: B of the compiled programs.
      context: tokens that a step's time depends on (:class:`specsa_jax.planning.profile.Point`).
      layers: of the target.
      compiled: whether a strategy's program is there; ``compile_seconds``: what it takes where it is not.
      new_tokens: the budget of all sequences together.
      counted: seconds of steps, as plans of the same costs, batch and context have looked them up; adds to them.
      watchers: the drafters that watch; None: those that promise enough.
      replayed: drafters that can be tried on a text that is known: name, drafter, depths of their drafts, ascending.
      lengths: int [B], of the prompts.
      shortest: seconds that a segment takes at least, as far as is known before it.
    """

    def __init__(
        self,
        planner: Planner,
        candidates: Sequence[Candidate],
        costs: Costs,
        acceptance: Acceptance,
        *,
        batch: int,
        context: int,
        layers: int,
        compiled: Callable[[Strategy], bool],
        compile_seconds: float,
        new_tokens: int,
        counted: dict[tuple[Strategy, int], float] | None = None,
        watchers: tuple[Drafter, ...] | None = None,
        replayed: Sequence[tuple[str, Drafter, tuple[int, ...]]] = (),
        lengths: np.ndarray | None = None,
        shortest: float = SHORTEST["cpu"],
    ):
        begun = time.perf_counter()
        self.planner, self.costs, self.acceptance = planner, costs, acceptance
        self.batch, self.context, self.layers = batch, context, layers
        self._compiled, self._compile_seconds, self._shortest = compiled, compile_seconds, shortest
        self._counted = {} if counted is None else counted
        self.words = {candidate.strategy: candidate.describe() for candidate in candidates}
        each = new_tokens // batch
        self._pace = Pace(None if lengths is None or batch == 1 else lengths + each)
        self._factors = Factors(_SHARED_MEASURED if costs.measured else _SHARED_COUNTED)
        self.decisions: list[Decision] = []
        # Of a drafter with a state, the name that costs know it by.
        self._names = {one.watcher: one.drafter.rpartition("+")[2] for one in candidates if one.watcher is not None}
        self._alone = [candidate for candidate in candidates if candidate.watcher is None]
        self.watchers = self._promising(candidates, new_tokens) if watchers is None else watchers
        # A call begins with one of ``_first``: a segment shows what it is worth that the others watch.
        self._first = self._watched(candidates) if self.watchers else self._alone
        self._at_first = self.candidates = [*self._first, *self._alone] if self.watchers else self._alone
        self._named = {self.words[candidate.strategy]: candidate for candidate in self.candidates}
        self.strategy, self._steps, self._length = self._first[0].strategy, 0, planner.segment
        self._replayed, self._looked = replayed, lengths
        self._text: tuple[Any, np.ndarray, np.ndarray] = ((), np.zeros(0, int), np.zeros(0, bool))
        # Decisions before the segment from whose beginning on a sequence is alone; 0, too, where none is.
        self._single_from = 0
        self._choosing = 0.0  # seconds that the last choice took
        self._least = 0.0  # that this segment takes at least, but the first
        self._speed = 0.0  # tokens a second of the strategy that decodes: as expected, then as its segment showed
        self._seen: tuple[Counts | None, float, int] = (None, 0.0, 0)
        self.choose(batch, new_tokens)
        self.seconds = time.perf_counter() - begun

    # --- the space ----------------------------------------------------------------------------------------------------

    def _promising(self, candidates: Sequence[Candidate], new_tokens: int) -> tuple[Drafter, ...]:
        """The drafters that watch when a call begins."""
        if not self._names:
            return ()

        speeds = {}
        for one, option in zip(candidates, self.options(candidates, self.batch), strict=True):
            beside = () if one.watcher is None else (one.watcher,)  # programs are those in which it watches
            once = 0.0 if self._compiled(watching(one.strategy, beside)) else self._compile_seconds
            once += self.costs.watching(self.batch, self.context) if beside else 0.0
            speeds[one] = 1.0 / (1.0 / option.tokens_per_second + once / new_tokens)
        enough = _WORTH_WATCHING * max(speeds.values())
        own = (one.watcher for one in candidates if speeds[one] >= enough)
        return tuple(dict.fromkeys(one for one in own if one is not None))

    def _watched(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that can be had while all of ``watchers`` watch, in programs in which they do."""
        found = [one for one in candidates if one.watcher is None or one.watcher in self.watchers]
        found = [watched(one, self.watchers) for one in found]
        self.words |= {candidate.strategy: candidate.describe() for candidate in found}
        return found

    def contenders(self) -> list[Strategy]:
        """The strategies that would be chosen at some acceptance of drafts, from none to all: what is worth compiling
        ahead."""
        found = [self.strategy]
        # Whoever drafts: of two drafters one may fare well on a text, and the other badly.
        drafters: dict[tuple[str, bool], list[Candidate]] = {}
        for one in self._at_first:
            drafters.setdefault((one.drafter, bool(one.watchers)), []).append(one)
        for rate in (0.0, 0.25, 0.5, 0.75, 1.0):
            for shift in np.linspace(-3.0, 4.0, 15):
                options = self.options(self._at_first, self.batch, rate, shift)
                speeds = {c: option.tokens_per_second for c, option in zip(self._at_first, options, strict=True)}
                found += [max(some, key=lambda c: speeds[c]).strategy for some in (self._first, *drafters.values())]
        return list(dict.fromkeys(found))

    # --- choosing -----------------------------------------------------------------------------------------------------

    def options(
        self, candidates: Sequence[Candidate], running: int, rate: float | None = None, shift: float = 0.0
    ) -> list[Option]:
        """What is to be expected of each candidate while ``running`` sequences of the batch are not done.

        ``rate`` and ``shift`` (log-odds of each position's chance) replace and move what acceptance is expected.
        """
        outlooks = [self._outlook(candidate, rate, shift) for candidate in candidates]
        # All at once: between two segments the device waits for this.
        tokens = self._pace.tokens_per_step(np.array([one.length for one in outlooks]), running).tolist()
        seconds = [self._seconds(*each, running) for each in zip(candidates, (o.share for o in outlooks), strict=True)]
        return [
            Option(self.words[one.strategy], outlook.length, taken, many / taken, self._compiled(one.strategy))
            for one, outlook, taken, many in zip(candidates, outlooks, seconds, tokens, strict=True)
        ]

    def _outlook(self, candidate: Candidate, rate: float | None, shift: float) -> Outlook:
        if candidate.drafter == "none":
            return _ALONE
        tree, depth = candidate.strategy.tree, candidate.strategy.template.depth
        return self.acceptance.outlook(candidate.drafter, tree, depth, rate, shift)

    def _seconds(self, candidate: Candidate, share: float, running: int) -> float:
        """Of a step, where ``share`` of the running sequences' steps have a draft."""
        seconds = self.step_seconds(candidate, 1)
        if candidate.drafter != "none":
            # Where nobody in the batch has a draft, a step decodes one token.
            some = 1.0 - (1.0 - share) ** running
            seconds = some * self.step_seconds(candidate, candidate.strategy.width) + (1.0 - some) * seconds
        return seconds * self._factors(candidate.strategy)

    def step_seconds(self, candidate: Candidate, width: int) -> float:
        """Of drafting and verifying ``width`` tokens; 1: of a step without a draft, the search for one included."""
        strategy = candidate.strategy
        if (strategy, width) not in self._counted:
            sharing = strategy.sharing(self.layers)
            if width == 1:
                sharing = dataclasses.replace(sharing, group=0, group_mode="merged")
            chain = width == 1 or strategy.template.is_chain
            point = Point(self.batch, self.context, width, chain, sharing, timed_as(strategy))
            draft = self.costs.draft(candidate.drafter, strategy.tree, strategy.width, self.batch, self.context)
            # A drafter's shortest draft is what it has seen anyway, and the output matrix.
            draft += sum(self.costs.draft(self._names[one], "chain:1", 2, self.batch, self.context)
                         for one in candidate.idle)  # fmt: skip
            self._counted[strategy, width] = self.costs.step(point) + draft
        return self._counted[strategy, width]

    def choose(self, running: int, remaining: int) -> None:
        """Chooses for the next segment; ``remaining``: tokens that the running sequences may still give."""
        found = self.options(self.candidates, running)
        options = {candidate.strategy: option for candidate, option in zip(self.candidates, found, strict=True)}
        current = options.get(self.strategy) if self.decisions else None
        best, reason = self.strategy, ""

        def total(strategy: Strategy) -> float:
            """Seconds until the end with this strategy, compilation included."""
            option = options[strategy]
            return remaining / option.tokens_per_second + (0.0 if option.compiled else self._compile_seconds)

        allowed = self._first if self.planner.switch and not self.decisions else self.candidates
        fastest = min((candidate.strategy for candidate in allowed), key=total)
        if current is None:
            best, reason = fastest, "fastest"
        elif not self.planner.switch or fastest == self.strategy:
            reason = "still the fastest" if self.planner.switch else "chosen once"
        elif options[fastest].tokens_per_second < (1.0 + self.planner.hysteresis) * current.tokens_per_second:
            reason = f"nothing is more than {self.planner.hysteresis:.0%} faster"
        else:
            best = fastest
            reason = f"{options[fastest].tokens_per_second / current.tokens_per_second - 1:+.0%} over the one before"
        others = [option for strategy, option in options.items() if strategy != best]
        # Twice as long as it is expected to take, in case that is wrong.
        settled = 2 * remaining / options[best].tokens_per_second < self._compile_seconds
        if not self.planner.switch or not any(option.compiled for option in others) and (settled or not others):
            self._length = max(1, remaining)  # a step gives at least a token
            reason += "; to the end" + ("; compiling another would not repay" if self.planner.switch else "")
        else:
            stays = best == self.strategy and len(self.decisions) != self._single_from
            times = _LONGEST_DRAFTLESS if self.candidate_of(best).drafter == "none" else _LONGEST
            length = min(_GROWTH * self._length, times * self.planner.segment) if stays else self.planner.segment
            if self.decisions:
                longer = max(self._shortest, _LONGER * min(self._least, self._shortest))
                self._least = longer if stays else min(SHORTEST.values())
            least = max(self._least, self._choosing / _SHARE) if self.decisions else min(SHORTEST.values())
            least = math.ceil(least / options[best].step_seconds)
            self._length = max(length, least)
            # Where what is left behind it would be too short for another choice, it goes on to the end.
            left = remaining / (options[best].tokens_per_second * options[best].step_seconds)
            if stays and left < self._length + least:
                self._length = max(self._length, math.ceil(_TO_THE_END * left))
        self._speed = options[best].tokens_per_second
        self._take(best)
        ranked = tuple(sorted(options.values(), key=lambda option: -option.tokens_per_second))
        self.decisions.append(Decision(self._steps, running, self.words[best], reason, ranked))

    def _take(self, strategy: Strategy) -> None:
        """It decodes from now on. Drafters that it does not show what is decoded are out: that is not made up for."""
        self.strategy = strategy
        if self.watchers and not self._named[self.words[strategy]].watchers:
            self.watchers, self.candidates = (), self._alone

    @property
    def chosen(self) -> Candidate:
        """Whose strategy decodes now."""
        return self.candidate_of(self.strategy)

    def candidate_of(self, strategy: Strategy) -> Candidate:
        """The candidate whose strategy this is."""
        return self._named[self.words[strategy]]

    @property
    def steps_left(self) -> int:
        """Steps until the next choice."""
        return self._length - (0 if self._seen[0] is None else int(self._seen[0].steps))

    @property
    def wants_text(self) -> bool:
        """Whether, at a segment's end, its text shows how drafts fare that were not drafted."""
        return self.planner.switch and any(self._walked(name, depths) for name, _, depths in self._replayed)

    def _walked(self, drafter: str, depths: tuple[int, ...]) -> tuple[int, ...]:
        """Of its depths those that this segment's text is walked at: of another drafter than the one that drafts the
        deepest; all others where a sequence is alone. In a text that goes round, chains of each length begin at other
        places: where one finds what misleads it in each round, another never does. Of many texts that is evened out.
        What could not be chosen is left out. A lone text may begin to go round in its first segment, and what is known
        of a batch's last one is of others, too: at the end of the first segment in which it is alone all are walked
        alike, or what drafted before would have done worse than what did not."""
        if self.acceptance.alone:
            first = len(self.decisions) == self._single_from + 1
            found = tuple(one for one in depths if first or not self._drafts(drafter, one))
            if first and self._single_from:  # what is expected, and would have to be beaten, is of others
                return found
        else:
            found = depths[-1:] if drafter != self.chosen.drafter else ()
        return tuple(one for one in found if self._may_win(drafter, one))

    def _drafts(self, drafter: str, depth: int) -> bool:
        """Whether this segment's strategy is such a chain."""
        return (drafter, f"chain:{depth}") == (self.chosen.drafter, self.chosen.strategy.tree)

    def _may_win(self, drafter: str, depth: int) -> bool:
        """Whether, if all drafts stood, one no deeper than this would be chosen over what decodes now."""
        running, least = self.decisions[-1].running, (1.0 + self.planner.hysteresis) * self._speed
        return any(
            running * one.strategy.reach > least * self._seconds(one, 1.0, running)
            for one in self.candidates
            if one.drafter == drafter and one.strategy.template.depth <= depth
        )

    def look(self, tokens: Any, known: np.ndarray, done: np.ndarray) -> None:
        """The text, for the :meth:`observe` that follows: ``tokens`` int32 [B, S], or () where it is not at hand; how
        many of them are ``known`` int32 [B], of sequences of which some are ``done``."""
        self._text = tokens, known, done

    def _walk(self, new_tokens: int) -> bool:
        """Tries what has not drafted on what was decoded in this segment, ``new_tokens`` of all sequences. Whether what
        has drafted was tried like the others."""
        tokens, known, done = self._text
        since, tried = self._looked, False
        if len(tokens) and since is not None and self.planner.switch:
            for name, drafter, depths in self._replayed:
                if walked := self._walked(name, depths):
                    found = replay.walk(tokens[~done], since[~done], known[~done], drafter, walked)
                    for depth, (drafted, accepted) in zip(walked, found, strict=True):
                        tried |= self._drafts(name, depth)
                        worth = float(np.sum(drafted))
                        if self.acceptance.alone:
                            # The end of a lone sequence's segment stands for all of it. A few steps would say little
                            # beside those of what drafted all along.
                            seen = float(np.arange(1, len(accepted) + 1) @ accepted)
                            worth *= max(1.0, new_tokens / seen) if seen else 1.0
                        self.acceptance.add(name, f"chain:{depth}", drafted, accepted, worth)
        if len(known):
            self._looked = known
        return tried

    def observe(self, counts: Counts, seconds: float, new_tokens: int, running: int, remaining: int) -> None:
        """What some steps of ``strategy`` showed. At the end of a segment, chooses for the next.

        Args:
          counts, seconds, new_tokens: of these steps, the whole batch's.
          running, remaining: sequences that are not done, and the tokens that they may still give.
        """
        begun = time.perf_counter()
        seen = add_counts(self._seen[0], counts), self._seen[1] + seconds, self._seen[2] + new_tokens
        self._seen = seen
        if self.steps_left <= 0 or not running:
            self._learn(*seen)
            self._seen = (None, 0.0, 0)
            if running:
                _, known, done = self._text
                if self._looked is not None and len(known) > 1:
                    self._pace.observe(self._looked, known, done, int(seen[0].steps), _spread(seen[0].accepted))
                if not self._walk(seen[2]) and self.chosen.drafter != "none":
                    drafted, stood = np.asarray(seen[0].drafted), np.asarray(seen[0].accepted)
                    self.acceptance.add(self.chosen.drafter, self.strategy.tree, drafted, stood)
                if running == 1 and self._replayed and not self.acceptance.alone:
                    self.acceptance.leave_one()
                    self._single_from = len(self.decisions)
                self.choose(running, remaining)
            self._choosing = time.perf_counter() - begun
        self.seconds += time.perf_counter() - begun

    def _learn(self, counts: Counts, seconds: float, new_tokens: int) -> None:
        steps, sequence_steps = int(counts.steps), int(counts.accepted.sum())
        if not sequence_steps:
            return
        candidate = self.chosen
        # Steps without a draft are cheaper: the time is compared with what such a mixture should have taken.
        rate = float(np.sum(counts.drafted[1:])) / sequence_steps
        expected = self._seconds(candidate, rate, max(1, round(sequence_steps / steps)))
        self.acceptance.decay(steps)
        self._factors.observe(self.strategy, self._factors(self.strategy) * (seconds / steps) / expected, steps)
        self._steps, self._speed = self._steps + steps, new_tokens / seconds
        accepted = float(counts.accepted @ np.arange(len(counts.accepted)))
        self.decisions[-1] = dataclasses.replace(
            self.decisions[-1], observed_steps=steps, observed_acceptance_length=1.0 + accepted / sequence_steps,
            observed_tokens_per_second=new_tokens / seconds,
        )  # fmt: skip


def _spread(histogram: np.ndarray | Any) -> float:
    """Variance over squared mean, of a histogram over 0, 1, …; 0 where all are 0."""
    counts = np.asarray(histogram, float)
    mean, square = (counts @ np.arange(len(counts)) ** power / max(1.0, counts.sum()) for power in (1, 2))
    return float(square / mean**2 - 1.0) if mean else 0.0
