"""How fast a batch is done: by its last sequence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specsa_jax.planning import plan as plans
from specsa_jax.planning.pace import Pace

LITTLE = np.float64(0.1)  # spread


def bursts(rng, steps, chances, size=16):
    """Tokens that sequences accept in each step, int [steps, B]: all of a chain or none of it; ``chances`` [B], or of
    each step."""
    return size * (rng.random((steps, np.shape(chances)[-1])) < chances)


@pytest.mark.parametrize(
    "chances, tolerance",
    [
        (np.full(32, 0.12), 0.05),
        (np.full(8, 0.12), 0.05),
        (np.linspace(0.02, 0.4, 32), 0.3),  # what is chance and what is the sequences' own cannot be told for sure
    ],
    ids=["32 alike", "8 alike", "32 unlike"],
)
def test_pace_foresees_when_the_last_sequence_of_a_batch_is_done(chances, tolerance):
    """On the mean of many calls, which the mean of the sequences misses by more, if they are unlike by far."""
    rng, size, left, found, true = np.random.default_rng(5), len(chances), 512, [], []
    for _ in range(60):
        seen = bursts(rng, 64, chances)
        known = 100 + 64 + seen.sum(axis=0)
        pace = Pace(known + left)
        histogram = np.bincount(seen.ravel(), minlength=17)
        spread = np.float64(plans._spread(histogram))
        pace.observe(np.full(size, 100), known, np.zeros(size, bool), 64, spread)
        found.append(pace.tokens_per_step(1.0 + seen.mean(), size, spread))
        # What sets them apart fades with the text, of which a sequence of the mean gets so much in a step.
        apart = 0.5 ** (np.arange(left)[:, None] * (1 + 16 * chances.mean()) / 128)
        gained = np.cumsum(1 + bursts(rng, left, chances.mean() + apart * (chances - chances.mean())), axis=0)
        true.append(size * left / (1 + int((gained < left).sum(axis=0).max())))
    by_mean = size * (1.0 + 16 * chances.mean())
    assert np.mean(found) == pytest.approx(np.mean(true), rel=tolerance)
    assert abs(np.mean(found) - np.mean(true)) < 0.3 * (by_mean - np.mean(true))


@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(0, 16), st.booleans()), min_size=2, max_size=8),
    st.floats(1.0, 17.0), st.floats(0.0, 10.0), st.floats(0.0, 10.0), st.lists(st.integers(0, 2**16), max_size=3),
)  # fmt: skip
def test_pace_never_promises_more_than_the_sequences_that_run_can_use(sequences, length, spread, expected, earlier):
    left, gained, done = (np.array(column) for column in zip(*sequences, strict=True))
    length, law = np.float64(length), np.float64(expected)
    known, steps, running = np.full(len(left), 200), 10, int((~done).sum())
    pace = Pace(known + left)
    assert pace.tokens_per_step(length, len(left), law) == len(left) * length  # nothing is known
    for seed in earlier:  # of sequences some accept nothing, and others end
        rng = np.random.default_rng(seed)
        before = known - steps * (1 + rng.integers(0, 2, len(left)) * rng.integers(0, 17))
        pace.observe(before, known, rng.random(len(left)) < 0.3, steps, spread)
    pace.observe(known - steps * (1 + gained), known, done, steps, spread)
    if running:
        tokens = pace.tokens_per_step(length, running, law)
        assert 0 < tokens <= running * length * (1 + 1e-9)
        assert pace.tokens_per_step(np.ones(1), running, np.ones(1)) == pytest.approx(
            left[~done].sum() / left[~done].max()
        )  # no drafts
    assert pace.tokens_per_step(length, len(left) + 1, law) == (len(left) + 1) * length  # of others than it knows


def test_what_one_sequence_accepts_is_forgotten_while_nothing_is_drafted():
    pace, known = Pace(np.array([600, 344])), np.array([100, 100])
    pace.observe(known, known + [64 * 5, 64], np.zeros(2, bool), 64, 0.1)
    before = pace.tokens_per_step(np.float64(3.0), 2, LITTLE)
    assert before < 2 * 2.0  # the second one accepts nothing
    known = known + [64 * 5, 64]
    for _ in range(40):
        pace.observe(known, known, np.zeros(2, bool), 100, 0.0)
    assert pace.tokens_per_step(np.float64(3.0), 2, LITTLE) > 2 * 2.5  # drafting is worth another try


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
        found[left] = float(pace.tokens_per_step(np.float64(1 + gained.mean()), size, LITTLE)) / size
    assert found[40] < 2.0 and found[2000] > 0.8 * (1 + gained.mean())


def test_pace_answers_for_many_candidates_as_for_each():
    pace, lengths = Pace(np.array([500, 5000, 700])), np.array([100, 100, 100])
    pace.observe(lengths, lengths + [64 * 5, 64, 80], np.zeros(3, bool), 64, 0.7)
    several, spreads = np.array([1.0, 2.5, 9.0]), np.array([0.0, 0.4, 1.3])
    for running in (3, 2):
        each = [float(pace.tokens_per_step(one, running, own)) for one, own in zip(several, spreads, strict=True)]
        np.testing.assert_allclose(pace.tokens_per_step(several, running, spreads), each, rtol=1e-12)


def test_those_that_are_left_may_be_those_that_accepted_nothing():
    pace, lengths = Pace(np.array([500, 5000, 5000])), np.array([100, 100, 100])
    pace.observe(lengths, lengths + [64 * 5, 64, 64], np.zeros(3, bool), 64, 0.1)
    pace.observe(lengths + 64, lengths + 128, np.array([True, False, False]), 64, 0.0)
    assert 0 < pace.tokens_per_step(np.float64(3.0), 2, LITTLE) <= 2 * 3.0


def test_before_anything_is_seen_the_last_of_a_batch_is_expected_to_have_bad_luck():
    drafts, none, spread = np.array([4.0]), np.array([1.0]), np.array([0.25])
    pace = Pace(np.full(32, 640), 512)
    assert pace.tokens_per_step(none, 32, spread)[0] == pytest.approx(32)  # there is no luck without drafts
    found = pace.tokens_per_step(drafts, 32, spread)[0]
    assert 0.5 * 32 * 4 < found < 0.95 * 32 * 4
    # Long texts even it out.
    assert found < Pace(np.full(32, 8320), 8192).tokens_per_step(drafts, 32, spread)[0] < 32 * 4
    assert Pace(np.full(32, 640)).tokens_per_step(drafts, 32, spread)[0] == 32 * 4  # where lengths are not known


def test_luck_is_as_large_as_a_drafts_spread_and_more_before_a_segment_has_shown_how_texts_differ():
    size, steps, known = 8, 64, np.full(8, 400)

    def tokens(spread, seen):
        pace = Pace(known + 512, 512)
        if seen:
            pace.observe(known - 4 * steps, known, np.zeros(size, bool), steps, 0.3)  # all are alike
        return pace.tokens_per_step(np.array([4.0]), size, np.array([spread]))[0]

    assert tokens(2.0, seen=True) < tokens(0.5, seen=True) < tokens(0.0, seen=True) == pytest.approx(size * 4)
    assert tokens(0.5, seen=False) == pytest.approx(tokens(2.0, seen=True))
