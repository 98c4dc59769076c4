"""How the sequences of a batch fare beside each other: a batch is done when its last sequence is.

That the last of many that are alike has bad luck, too, is left out: on recorded texts plans are none the worse for it.
"""

from __future__ import annotations

import math

import numpy as np

_HALF_LIFE = 128.0  # steps after which evidence counts half
# Tokens after which half of what sets a sequence apart is expected to be gone: a text that does not repeat itself yet
# often begins to (of 32 greedy texts of a trained model, those that accepted least at first accepted like the others 64
# to 128 tokens on). Else one slow beginning in a batch would speak for a whole text.
_LASTS = 128.0


class Pace:
    """What each sequence accepts beside the mean of those that run, and how many tokens it may still give.

    Args:
      ends: int [B], tokens of each sequence at the most, its prompt included (that an end token comes before is not
        foreseen); None: nothing is known of single sequences.
    """

    def __init__(self, ends: np.ndarray | None):
        self._ends = ends
        size = 0 if ends is None else len(ends)
        self._accepted, self._steps, self._spread = np.zeros(size), 0.0, 0.0
        self._left, self._pace = np.zeros(0), np.ones(0)  # of those that run

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
            self._spread = spread
        pace = np.ones(int(running.sum()))
        if self._accepted[running].any():  # those that are left may be those that never accepted anything
            seen = self._accepted[running] / self._steps
            chance, variance = self._spread / self._steps, float(seen.var())
            own = max(0.0, 1.0 - chance / variance) if variance else 0.0
            pace += own * (seen / seen.mean() - 1.0)
        self._left, self._pace = np.maximum(1.0, (self._ends - known)[running]), pace

    def tokens_per_step(self, length: np.ndarray, running: int) -> np.ndarray:
        """Tokens [...] that ``running`` sequences gain in a step, on average until the last of them is done;
        ``length`` [...]: what one of them gains on average now. Where nothing is known of so many: ``running`` ·
        ``length``."""
        if len(self._left) != running:
            return running * length
        drafted = np.maximum(0.0, length[..., None] - 1.0)
        # Steps: the integral of 1 / (tokens of a step), to which ``own`` adds less and less.
        mean, own, rate = 1.0 + drafted, drafted * (self._pace - 1.0), math.log(2.0) / _LASTS
        faded = mean + own * np.exp(-rate * self._left)
        steps = (self._left + np.log(faded / (mean + own)) / rate) / mean
        return self._left.sum() / steps.max(axis=-1)
