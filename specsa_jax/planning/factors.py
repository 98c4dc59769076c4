"""What the steps of a call take against what costs predict: of strategies that have run, and of those that have not."""

from __future__ import annotations

import math

from specsa_jax.strategy import Strategy

# Steps after which what was seen of a strategy in one segment counts half, while others run, of two segments twice as
# many, and so on, up to so many times; steps that are taken at their word; and those that count as no more.
_HALF_LIFE, _LONGEST, _SURE, _MOST = 32.0, 64.0, 2.0, 64.0


class Factors:
    """Seconds of steps over predicted ones, by strategy.

    One that has not run is taken to be off by a power (``shared``) of what those that have are off by on average. And
    so is one that ran long ago, the sooner the fewer its steps were: where something else held up the four steps of a
    short segment, their strategy looks many times as slow as it is, and would never show that it is not.
    """

    def __init__(self, shared: float):
        self._power, self._shared = shared, 0.0
        # The ratio's logarithm, what it is worth in steps, and how slowly that fades.
        self._seen: dict[Strategy, tuple[float, float, float]] = {}

    def __call__(self, strategy: Strategy) -> float:
        """By how much the steps of ``strategy`` are expected to take longer than predicted."""
        log, worth, _ = self._seen.get(strategy, (0.0, 0.0, 0.0))
        sure = min(1.0, worth / _SURE)
        return math.exp(sure * log + (1.0 - sure) * self._shared)

    def observe(self, strategy: Strategy, ratio: float, steps: int) -> None:
        """``steps`` of ``strategy`` took ``ratio`` (above 0) times what was predicted."""
        for other, (log, worth, slowly) in self._seen.items():
            self._seen[other] = log, worth * 0.5 ** (steps / (_HALF_LIFE * slowly)), slowly
        log, worth, slowly = self._seen.get(strategy, (0.0, 0.0, 0.5))
        kept = min(worth, float(steps))  # the newest steps count at least as much as those before
        log = (kept * log + steps * math.log(ratio)) / (kept + steps)
        self._seen[strategy] = log, min(worth + steps, _MOST), min(2 * slowly, _LONGEST)
        total = sum(worth for _, worth, _ in self._seen.values())
        self._shared = self._power * sum(log * worth for log, worth, _ in self._seen.values()) / total
