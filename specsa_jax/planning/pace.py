"""How the sequences of a batch fare beside each other: a batch is done when its last sequence is."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np

_HALF_LIFE = 128.0  # steps after which evidence counts half
# Tokens after which half of what sets a sequence apart is expected to be gone: a text that does not repeat itself yet
# often begins to (of 32 greedy texts of a trained model, those that accepted least at first accepted like the others 64
# to 128 tokens on). Else one slow beginning in a batch would speak for a whole text.
_LASTS = 128.0
# Before a segment has shown which sequences fare better than others, what they accept is taken to vary so many times as
# if steps did not depend on each other and texts were alike (2 to 8 do: benchmarks/planner_replay.py).
_UNLIKE = 4.0
_LATE = 0.9  # sequences that need so much of what the slowest needs may be the last by bad luck


class Pace:
    """What each sequence accepts beside the mean of those that run, and how many tokens it may still give.

    Args:
      ends: int [B], tokens of each sequence at the most, its prompt included (that an end token comes before is not
        foreseen); None: nothing is known of single sequences.
      new_tokens: that each may give when the call begins; 0: not known, and nobody's luck is foreseen at first.
    """

    def __init__(self, ends: np.ndarray | None, new_tokens: int = 0):
        self._ends = ends
        size = 0 if ends is None else len(ends)
        self._accepted, self._steps, self._spread, self._unlike = np.zeros(size), 0.0, 0.0, _UNLIKE
        first = size if new_tokens else 0
        self._left, self._pace = np.full(first, float(new_tokens)), np.ones(first)  # of those that run

    def observe(self, since: np.ndarray, known: np.ndarray, done: np.ndarray, steps: int, spread: float) -> None:
        """``steps`` took sequences from ``since`` int [B] tokens to ``known`` int [B]; ``done`` bool [B] are over.

        ``spread``: variance of the tokens that a sequence accepts in a step, over the square of their mean. Sequences
        that are alike differ by it too: only what goes beyond that counts as their own.
        """
        if self._ends is None or done.all():
            return
        running = ~done
        accepted = np.maximum(0.0, (known - since) / max(1, steps) - 1.0)  # a step
        fade = 0.5 ** (steps / _HALF_LIFE)
        self._accepted, self._steps = fade * self._accepted, fade * self._steps
        if mean := float(accepted[running].mean()):  # else nothing was drafted, or nothing stood
            self._accepted, self._steps = self._accepted + steps * accepted / mean, self._steps + steps
            self._spread, self._unlike = spread, 1.0
        pace = np.ones(int(running.sum()))
        if self._accepted[running].any():  # those that are left may be those that never accepted anything
            seen = self._accepted[running] / self._steps
            chance, variance = self._spread / self._steps, float(seen.var())
            own = max(0.0, 1.0 - chance / variance) if variance else 0.0
            pace += own * (seen / seen.mean() - 1.0)
        self._left, self._pace = np.maximum(1.0, (self._ends - known)[running]), pace

    def tokens_per_step(self, length: np.ndarray, running: int, spread: np.ndarray) -> np.ndarray:
        """Tokens [...] that ``running`` sequences gain in a step, on average until the last of them is done;
        ``length`` [...]: what one of them gains on average now; ``spread`` [...]: of what it accepts
        (:class:`specsa_jax.planning.outlook.Outlook`). Where nothing is known of so many: ``running`` · ``length``."""
        if len(self._left) != running:
            return running * length
        drafted = np.maximum(0.0, length[..., None] - 1.0)
        # Steps: the integral of 1 / (tokens of a step), to which ``own`` adds less and less.
        mean, own, rate = 1.0 + drafted, drafted * (self._pace - 1.0), math.log(2.0) / _LASTS
        faded = mean + own * np.exp(-rate * self._left)
        steps = (self._left + np.log(faded / (mean + own)) / rate) / mean
        gain = np.maximum(0.0, self._left / steps - 1.0)
        # Drafts stand in bursts: their number makes the variance, so it grows as the gain does.
        luck = np.sqrt(self._left * self._unlike * spread[..., None] * drafted * gain / (1.0 + gain) ** 3)
        late = (steps >= _LATE * steps.max(axis=-1, keepdims=True)).sum(axis=-1)
        worst = np.reshape([_largest(count) for count in late.ravel().tolist()], late.shape)
        return self._left.sum() / (steps + worst[..., None] * luck).max(axis=-1)


@functools.lru_cache
def _largest(count: int) -> float:
    """The mean of the largest of so many standard normal numbers, after Blom; 0 of one."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))
