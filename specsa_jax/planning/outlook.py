"""What drafts of some depth give in a step, from how the tokens of others fared.

A head's tokens fare the worse the deeper they lie in its draft, wherever in the text the draft begins. A copy's do not.
It is right for a run of tokens, the target's own among them, up to the first that it has wrong. Runs, as steps without
a draft, are the text's, whatever the drafts' depth d: a run of X tokens takes X // (d + 1) steps that accept all d, and
one that accepts X mod (d + 1). So deeper drafts take fewer steps along long runs, and more of these end one.

With P(k) = P(X ≥ k), a run has P(k) + P(k + d+1) + P(k + 2(d+1)) + … steps that accept k or more of d tokens, and
1 + P(d+1) + P(2(d+1)) + … steps in all. From the shares of steps that accepted k or more, at one depth, follow P(k)
and the number of runs for each step, if runs that are longer than that go on with one chance a token; from these, the
steps at any depth.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

POSITIONS = 64  # of a draft, by which evidence is counted; usual pages have as many tokens, and paths no more
_MOST_WHOLE, _LEAST_GOING_ON, _MOST_GOING_ON = 0.999, 0.05, 0.9995


class Outlook(NamedTuple):
    """What is expected of a sequence's steps.

    Attributes:
      length: tokens that it gains in one, the target's own included.
      share: the fraction of steps that have a draft.
    """

    length: float
    share: float


def of_drafts(chances: np.ndarray, rate: float, depth: int) -> Outlook:
    """Of a drafter that has a draft in so many steps (``rate``), whose tokens stand, once those before them do, with
    ``chances`` float [POSITIONS]."""
    return Outlook(1 + rate * float(np.cumprod(chances[:depth]).sum()), rate)


def far(chances: np.ndarray, seen: int) -> float:
    """The chance of a run to go on by a token, far from its beginning: as at the deeper half of what was seen."""
    half = seen // 2
    return min(max(float(chances[half:seen].prod()) ** (1 / (seen - half)), _LEAST_GOING_ON), _MOST_GOING_ON)


def of_copies(chances: np.ndarray, rate: float, depth: int, seen: int, goes_on: float | None = None) -> Outlook:
    """As :func:`of_drafts`, of a drafter that copies text, where rate and chances are those of drafts ``seen`` tokens
    deep; ``goes_on``: what is known of :func:`far` from deeper ones."""
    accepts = rate * np.cumprod(chances[:seen])  # the share of steps that accept k tokens or more
    whole = min(float(accepts[-1]), _MOST_WHOLE)  # else a text that was copied all along would have no runs
    goes_on = far(chances, seen) if goes_on is None else goes_on
    # A step that accepts all that was seen is followed by another of its run if the target's own token is right, too.
    runs = 1 - whole * goes_on  # for each step
    places = _places(depth, seen)
    powers = goes_on**places.tokens
    reaches = powers * (whole * (goes_on**-seen - goes_on) / runs)  # P(k)
    # Where chances do not fall as those of runs do, P would, else, rise again.
    within = np.minimum.accumulate(np.minimum(1.0, (accepts - whole * goes_on * powers[:seen]) / runs))
    reaches[:seen] = np.maximum(within, reaches[seen - 1])
    behind = reaches[-1] / (1 - goes_on ** (depth + 1))  # steps behind the last place
    steps = 1 + float(places.begins @ reaches) + behind  # of a run
    share = 1 - (1 - rate) / runs / steps
    return Outlook(min((1 + float(accepts.sum())) / runs / steps, 1 + share * depth), share)


def together(parts: Sequence[tuple[float, Outlook, Outlook]]) -> Outlook:
    """Of several stretches of text: steps, and the outlooks at the depth that these had and at the one that is asked
    for. Stretches weigh what tokens they have."""
    tokens = steps = drafts = 0.0
    for had, there, here in parts:
        text = had * there.length
        taken = text / here.length
        tokens, steps, drafts = tokens + text, steps + taken, drafts + taken * here.share
    return Outlook(tokens / steps, drafts / steps)


class _Places(NamedTuple):
    """Of the tokens of a run, in whole drafts, at least as many as were seen: their numbers, from 1 on; and 1 where
    another draft begins behind it, but behind the last."""

    tokens: np.ndarray
    begins: np.ndarray


@functools.lru_cache(maxsize=1024)
def _places(depth: int, seen: int) -> _Places:
    tokens = np.arange(1, (depth + 1) * -(-seen // (depth + 1)) + 1)
    begins = (tokens % (depth + 1) == 0).astype(float)
    begins[-1] = 0.0
    return _Places(tokens, begins)
