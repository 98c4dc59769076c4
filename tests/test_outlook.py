"""What drafts of other depths are expected to give."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specsa_jax.planning.outlook import POSITIONS, Outlook, of_copies, of_drafts, together


def flat(chance):
    return np.full(POSITIONS, chance)


def steps_of(runs, depth):
    """Tokens accepted in each step, int [N], of a text of runs of so many tokens that a copy foresees (-1: a token for
    which it has no draft), each with a token behind it that it does not; and the steps that have a draft."""
    accepted, drafted = [], 0
    for run in runs:
        drafted += (run >= 0) * (max(run, 0) // (depth + 1) + 1)
        accepted += [depth] * (max(run, 0) // (depth + 1)) + [max(run, 0) % (depth + 1)]
    return np.array(accepted), drafted


def seen_of(runs, depth):
    """Chances [64] by position and rate, as drafts of ``depth`` show them."""
    accepted, drafted = steps_of(runs, depth)
    came = [drafted, *((accepted >= place).sum() for place in range(1, depth + 1))]
    chances = [stood / max(1, tried) for tried, stood in zip(came, came[1:], strict=False)]
    return np.array(chances + [chances[-1]] * (POSITIONS - depth)), drafted / len(accepted)


@pytest.mark.parametrize("lasting, often", [(0.98, 0.15), (0.9, 0.5), (0.995, 0.05)])
def test_copies_of_one_depth_tell_what_those_of_another_give(lasting, often):
    """Of a text in which few runs are long and most are short, as of one that repeats itself at times."""
    rng = np.random.default_rng(6)
    short, long = rng.geometric(0.6, 20_000) - 2, rng.geometric(1 - lasting, 20_000)
    runs = np.where(rng.random(20_000) < often, long, short)
    for seen in (4, 16, 63):
        chances, rate = seen_of(runs, seen)
        for depth in (2, 4, 16, 32, 63):
            accepted, drafted = steps_of(runs, depth)
            found = of_copies(chances, rate, depth, seen)
            assert found.length == pytest.approx(1 + accepted.mean(), rel=0.05)
            assert found.share == pytest.approx(drafted / len(accepted), abs=0.02)


def test_where_each_token_stands_alike_a_run_is_a_geometric_one():
    """Then steps of any depth begin alike, and what follows from drafts of one depth is what of_drafts says."""
    for chance in (0.3, 0.6, 0.9):
        for seen, depth in ((4, 16), (16, 4), (63, 8), (16, 16)):
            copied, drafted = of_copies(flat(chance), 1.0, depth, seen), of_drafts(flat(chance), 1.0, depth)
            assert copied.length == pytest.approx(drafted.length, rel=0.01)
            assert copied.share == drafted.share == 1.0


def test_drafts_of_a_head_are_taken_as_they_are():
    """Of simulated steps, which have a draft in seven of ten."""
    rng, chances = np.random.default_rng(4), np.concatenate([[0.9, 0.8, 0.95, 0.5], flat(0.5)[4:]])
    stood = np.cumprod(rng.random((40_000, 4)) < chances[:4], axis=1).sum(axis=1) * (rng.random(40_000) < 0.7)
    for depth in (2, 4):
        seen, found = np.minimum(stood, depth), of_drafts(chances, 0.7, depth)
        assert found.length == pytest.approx(1 + seen.mean(), rel=0.01) and found.share == 0.7


@given(
    st.lists(st.floats(0.0, 1.0), min_size=POSITIONS, max_size=POSITIONS), st.floats(0.0, 1.0),
    st.integers(1, POSITIONS), st.integers(1, POSITIONS),
)  # fmt: skip
def test_outlooks_are_numbers_of_some_sense(chances, rate, depth, seen):
    for found in (of_copies(np.array(chances), rate, depth, seen), of_drafts(np.array(chances), rate, depth)):
        assert 1.0 <= found.length <= 1 + depth * found.share + 1e-9 and -1e-9 <= found.share <= 1.0 + 1e-9
    same = of_copies(np.array(chances), rate, seen, seen)
    assert same.length == pytest.approx(min(of_drafts(np.array(chances), rate, seen).length, 1 + seen * same.share))
    if not rate or not chances[0]:
        assert of_copies(np.array(chances), rate, depth, seen).length == pytest.approx(1.0)


def test_a_text_that_is_copied_all_along_takes_whole_drafts():
    for seen, depth in ((16, 63), (63, 4), (1, 16)):
        assert of_copies(flat(1.0), 1.0, depth, seen).length == pytest.approx(depth + 1, rel=0.1)


def test_stretches_weigh_the_tokens_that_they_have():
    """Ten steps of 17 tokens, which drafts of four take 34 steps for, and 34 without a draft."""
    some = together([(10, Outlook(17.0, 1.0), Outlook(5.0, 1.0)), (34, Outlook(1.0, 0.0), Outlook(1.0, 0.0))])
    assert some.length == pytest.approx((170 + 34) / (34 + 34)) and some.share == pytest.approx(0.5)


def test_deeper_copies_give_more_tokens_a_step_and_have_a_draft_less_often():
    rng = np.random.default_rng(7)
    chances, rate = seen_of(np.where(rng.random(5000) < 0.2, rng.geometric(0.03, 5000), rng.integers(-1, 3, 5000)), 16)
    found = [of_copies(chances, rate, depth, 16) for depth in range(1, 64)]
    assert all(a.length < b.length and a.share > b.share for a, b in zip(found, found[1:], strict=False))
