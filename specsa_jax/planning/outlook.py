"""What drafts of some depth give in a step, from how the tokens of others fared.

A head's tokens fare the worse the deeper they lie in its draft, wherever in the text the draft begins. A copy's do not:
a text agrees with what it is copied from for a run of tokens, and parts from it. Drafts twice as deep take half the
steps along long runs, and as many where runs are short, so that more of their steps are at a run's end: of what they
give a step, the drafts of one depth say nothing by themselves. But a run of k tokens takes k // (depth + 1) steps that
accept all of a draft, and one more.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

POSITIONS = 64  # a path is no longer than a page
_ODD = 2 * np.arange(1, POSITIONS + 1) - 1  # k² is the sum of the first k odd numbers
_MOST_WHOLE, _LEAST_LASTING, _MOST_LASTING = 0.999, 0.05, 0.9995


class Outlook(NamedTuple):
    """What is expected of a sequence's steps.

    Attributes:
      length: tokens that it gains in one, the target's own included.
      share: the fraction of steps that have a draft.
      spread: variance of the drafted tokens that stand in one, over the square of their mean (0 where none do); as if
        steps did not depend on each other.
    """

    length: float
    share: float
    spread: float


def of_drafts(chances: np.ndarray, rate: float, depth: int) -> Outlook:
    """Of a drafter that has a draft in so many steps (``rate``), whose tokens stand, once those before them do, with
    ``chances`` float [POSITIONS]."""
    stands = np.cumprod(chances[:depth])
    return _outlook(rate * float(stands.sum()), rate, rate * float(_ODD[:depth] @ stands))


def of_copies(chances: np.ndarray, rate: float, depth: int, seen: int) -> Outlook:
    """As :func:`of_drafts`, of a drafter that copies text, where rate and chances are those of drafts ``seen`` tokens
    deep."""
    stands = rate * np.cumprod(chances[:seen])  # in a step, so many tokens or more
    if not stands[-1] > 0:
        return of_drafts(np.concatenate([chances[:seen], np.zeros(POSITIONS)]), rate, depth)
    # The chance of a run to go on, far from its beginning: as in the deeper half.
    half = seen // 2
    lasts = (stands[-1] / stands[half - 1]) ** (1 / (seen - half)) if half else float(chances[0])
    lasts = min(max(float(lasts), _LEAST_LASTING), _MOST_LASTING)
    # A step that accepts all that was seen is followed by another of its run, if its last token, too, is the copy's.
    once = 1 - min(float(stands[-1]), _MOST_WHOLE) * lasts  # runs for each step
    places = _places(depth, seen)
    powers = lasts**places.tokens
    goes = powers * (stands[-1] * (lasts**-seen - lasts) / once)  # a run goes so far
    goes[:seen] = np.maximum((stands - (stands[-1] * lasts) * powers[:seen]) / once, goes[seen - 1])
    beyond = goes[-1] / (1 - lasts ** (depth + 1))  # drafts behind the last place
    steps = 1 + float(places.begins @ goes) + beyond  # of a run
    square = float(places.odd @ goes) + beyond * float(_ODD[:depth] @ powers[:depth])
    share = 1 - (1 - rate) / once / steps
    length = min((1 + float(stands.sum())) / once / steps, 1 + share * depth)
    return _outlook(length - 1, share, square / steps)


class _Places(NamedTuple):
    """Of the tokens of a run, in whole drafts, at least as many as were seen: their numbers, from 1 on; 1 where another
    draft begins behind it, but behind the last; and 2·k − 1 where it is the k-th of a draft."""

    tokens: np.ndarray
    begins: np.ndarray
    odd: np.ndarray


@functools.lru_cache
def _places(depth: int, seen: int) -> _Places:
    tokens = np.arange(1, (depth + 1) * -(-seen // (depth + 1)) + 1)
    place = tokens % (depth + 1)  # in the draft; 0: the token behind it
    begins = (place == 0).astype(float)
    begins[-1] = 0.0
    return _Places(tokens, begins, np.maximum(0, 2 * place - 1).astype(float))


def _outlook(mean: float, share: float, square: float) -> Outlook:
    return Outlook(1 + mean, share, max(0.0, square / mean**2 - 1) if mean > 1e-9 else 0.0)
