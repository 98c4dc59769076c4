"""How fast a batch is done: by its last sequence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specsa_jax.planning import plan as plans
from specsa_jax.planning.pace import Pace


def bursts(rng, steps, chances, size=16):
    """Tokens that sequences accept in each step, int [steps, B]: all of a chain or none of it; ``chances`` [B], or of
    each step."""
    return size * (rng.random((steps, np.shape(chances)[-1])) < chances)


def test_pace_foresees_when_the_last_of_sequences_that_are_unlike_is_done():
    """On the mean of many calls, which the mean of the sequences misses by more. What is chance, and what the
    sequences' own, cannot be told for sure, and chance to come is not foreseen."""
    chances, tolerance = np.linspace(0.02, 0.4, 32), 0.3
    rng, size, left, found, true = np.random.default_rng(5), len(chances), 512, [], []
    for _ in range(60):
        seen = bursts(rng, 64, chances)
        known = 100 + 64 + seen.sum(axis=0)
        pace = Pace(known + left)
        histogram = np.bincount(seen.ravel(), minlength=17)
        pace.observe(np.full(size, 100), known, np.zeros(size, bool), 64, plans._spread(histogram))
        found.append(pace.tokens_per_step(1.0 + seen.mean(), size))
        # What sets them apart fades with the text, of which a sequence of the mean gets so much in a step.
        apart = 0.5 ** (np.arange(left)[:, None] * (1 + 16 * chances.mean()) / 128)
        gained = np.cumsum(1 + bursts(rng, left, chances.mean() + apart * (chances - chances.mean())), axis=0)
        true.append(size * left / (1 + int((gained < left).sum(axis=0).max())))
    by_mean = size * (1.0 + 16 * chances.mean())
    assert np.mean(found) == pytest.approx(np.mean(true), rel=tolerance)
    assert abs(np.mean(found) - np.mean(true)) < 0.3 * (by_mean - np.mean(true))


@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(0, 16), st.booleans()), min_size=2, max_size=8),
    st.floats(1.0, 17.0), st.floats(0.0, 10.0), st.lists(st.integers(0, 2**16), max_size=3),
)  # fmt: skip
def test_pace_never_promises_more_than_the_sequences_that_run_can_use(sequences, length, spread, earlier):
    left, gained, done = (np.array(column) for column in zip(*sequences, strict=True))
    length = np.float64(length)
    known, steps, running = np.full(len(left), 200), 10, int((~done).sum())
    pace = Pace(known + left)
    assert pace.tokens_per_step(length, len(left)) == len(left) * length  # nothing is known
    for seed in earlier:  # of sequences some accept nothing, and others end
        rng = np.random.default_rng(seed)
        before = known - steps * (1 + rng.integers(0, 2, len(left)) * rng.integers(0, 17))
        pace.observe(before, known, rng.random(len(left)) < 0.3, steps, spread)
    pace.observe(known - steps * (1 + gained), known, done, steps, spread)
    if running:
        tokens = pace.tokens_per_step(length, running)
        assert 0 < tokens <= running * length * (1 + 1e-9)
        assert pace.tokens_per_step(np.ones(1), running) == pytest.approx(
            left[~done].sum() / left[~done].max()
        )  # no drafts
    assert pace.tokens_per_step(length, len(left) + 1) == (len(left) + 1) * length  # of others than it knows


def test_what_one_sequence_accepts_is_forgotten_while_nothing_is_drafted():
    pace, known = Pace(np.array([600, 344])), np.array([100, 100])
    pace.observe(known, known + [64 * 5, 64], np.zeros(2, bool), 64, 0.1)
    before = pace.tokens_per_step(np.float64(3.0), 2)
    assert before < 2 * 2.0  # the second one accepts nothing
    known = known + [64 * 5, 64]
    for _ in range(40):
        pace.observe(known, known, np.zeros(2, bool), 100, 0.0)
    assert pace.tokens_per_step(np.float64(3.0), 2) > 2 * 2.5  # drafting is worth another try


def test_a_slow_beginning_does_not_speak_for_the_whole_text():
    """One of eight sequences accepts nothing in its first 40 steps: of 40 tokens that are left to it that says much, of
    2,000 little."""
    size, steps = 8, 40
    gained = np.array([0] + [9] * (size - 1))
    found = {}
    for left in (40, 2000):
        known = np.full(size, 100) + steps * (1 + gained)
        pace = Pace(known + left)
        pace.observe(np.full(size, 100), known, np.zeros(size, bool), steps, 0.1)
        found[left] = float(pace.tokens_per_step(np.float64(1 + gained.mean()), size)) / size
    assert found[40] < 2.0 and found[2000] > 0.8 * (1 + gained.mean())


def test_pace_answers_for_many_candidates_as_for_each():
    pace, lengths = Pace(np.array([500, 5000, 700])), np.array([100, 100, 100])
    pace.observe(lengths, lengths + [64 * 5, 64, 80], np.zeros(3, bool), 64, 0.7)
    several = np.array([1.0, 2.5, 9.0])
    for running in (3, 2):
        each = [float(pace.tokens_per_step(one, running)) for one in several]
        np.testing.assert_allclose(pace.tokens_per_step(several, running), each, rtol=1e-12)


def test_those_that_are_left_may_be_those_that_accepted_nothing():
    pace, lengths = Pace(np.array([500, 5000, 5000])), np.array([100, 100, 100])
    pace.observe(lengths, lengths + [64 * 5, 64, 64], np.zeros(3, bool), 64, 0.1)
    pace.observe(lengths + 64, lengths + 128, np.array([True, False, False]), 64, 0.0)
    assert 0 < pace.tokens_per_step(np.float64(3.0), 2) <= 2 * 3.0
