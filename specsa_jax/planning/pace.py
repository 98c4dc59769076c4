"""How the sequences of a batch fare beside each other: a batch is done when its last sequence is."""

from __future__ import annotations

import numpy as np

# Steps after which evidence counts half, and those that it is worth that all fare alike.
_HALF_LIFE, _ALIKE = 128.0, 32.0


class Pace:
    """Which part of the batch's accepted tokens each sequence gets, and how many it may still give.

    Args:
      ends: int [B], tokens of each sequence at the most, its prompt included; None: nothing is known of single ones.
    """

    def __init__(self, ends: np.ndarray | None):
        self._ends = ends
        size = 0 if ends is None else len(ends)
        self._shares, self._steps = np.zeros(size), 0.0
        self._left, self._pace = np.zeros(0), np.zeros(0)  # of those that run

    def observe(self, since: np.ndarray, known: np.ndarray, done: np.ndarray, steps: int) -> None:
        """``steps`` took the sequences from ``since`` int [B] tokens to ``known`` int [B]; ``done`` [B] are over."""
        if self._ends is None or done.all():
            return
        running = ~done
        accepted = np.maximum(0.0, (known - since) / max(1, steps) - 1.0)  # a step
        if mean := float(accepted[running].mean()):
            fade = 0.5 ** (steps / _HALF_LIFE)
            self._shares = fade * self._shares + steps * accepted / mean
            self._steps = fade * self._steps + steps
        pace = ((self._shares + _ALIKE) / (self._steps + _ALIKE))[running]
        self._left, self._pace = np.maximum(1.0, (self._ends - known)[running]), pace / pace.mean()

    def tokens_per_step(self, length: float, running: int) -> float:
        """Tokens that ``running`` sequences gain in a step, on average until the last of them is done, if together they
        begin with ``length`` each."""
        if len(self._left) != running:
            return running * length
        steps = self._left / (1.0 + (length - 1.0) * self._pace)
        return float(self._left.sum() / steps.max())
