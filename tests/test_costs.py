"""Seconds of steps and drafts: counted from bytes, or from a profile's times and between them."""

import dataclasses

import numpy as np
import pytest
from profiles import CONFIG, counted, full_profile, grid, profile, timed

from specsa_jax.drafting import parse_tree
from specsa_jax.planning.costs import Costs, interpolation_error
from specsa_jax.planning.profile import (
    Point,
    ProfileError,
)
from specsa_jax.schedule import Sharing


@pytest.fixture
def full():
    return full_profile()


def test_counted_costs_grow_with_tokens_batch_and_context():
    costs = counted()
    for low, high in (
        ({"width": 4}, {"width": 5}), ({"batch": 4}, {"batch": 5}), ({"context": 4096}, {"context": 4160}),
    ):  # fmt: skip
        base = {"batch": 2, "context": 2048, "width": 3}
        assert costs.step(Point(**{**base, **low})) < costs.step(Point(**{**base, **high}))
    few = Sharing("FSSSSS")
    assert costs.step(Point(1, 8192, 5, sharing=few)) < costs.step(Point(1, 8192, 5))
    dropped = dataclasses.replace(few, keep_compressed=False)
    assert costs.step(Point(1, 8192, 5, sharing=dropped)) < costs.step(Point(1, 8192, 5, sharing=few))
    assert costs.prefill(1, 1024) < costs.prefill(1, 2048) < costs.prefill(2, 2048)
    assert costs.watching(2, 2048) == pytest.approx(2 * costs.prefill(2, 2048) / costs.config.layers)
    assert not costs.measured


def test_a_step_costs_at_least_the_reading_of_the_weights():
    """11 million parameters of four bytes, most of them read by every step, at 40 GB/s."""
    alone = counted().step(Point(1, 64, 1))
    assert 0.5e-3 < alone < 3e-3
    assert counted(bandwidth=8e10).step(Point(1, 64, 1)) < 0.7 * alone


def test_counted_drafts_cost_nothing_for_none_and_more_for_more():
    costs = counted()
    assert costs.draft("none", "chain:4", 5, 1, 4096) == 0.0
    lookup, head, own = (costs.draft(name, "chain:4", 5, 1, 4096) for name in ("lookup", "head", "self"))
    assert 0 < lookup < head < own
    np.testing.assert_allclose(costs.draft("lookup+head", "chain:4", 5, 1, 4096), lookup + head)
    assert costs.draft("head", "chain:8", 9, 1, 4096) > head


@pytest.mark.parametrize("name", ["bandwidth", "flops", "overhead"])
def test_rates_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: got 0, expected above 0"):
        counted(**{name: 0})


def test_measured_points_come_back_exactly(full):
    costs = Costs.from_profile(full, CONFIG)
    assert costs.measured
    for one in full.steps:
        np.testing.assert_allclose(costs.step(one.point), one.seconds, rtol=1e-12)
    for draft in full.drafts:
        width = parse_tree(draft.tree).nodes + 1
        got = costs.draft(draft.drafter, draft.tree, width, draft.batch, draft.context)
        np.testing.assert_allclose(got, draft.seconds, rtol=1e-12)
    np.testing.assert_allclose(costs.prefill(1, 2048), 1.5, rtol=1e-12)


def synthetic(noise, seed=0):
    """Times of a device that does each thing at a speed of its own, measured with an error."""
    rng, truth = np.random.default_rng(seed), counted(bandwidth=1e10, flops=5e11, overhead=2e-5)
    steps = [timed(p, truth.step(p) * float(np.exp(noise * rng.standard_normal()))) for p in grid()]
    return truth, profile(steps=tuple(steps))


def test_the_fit_finds_a_device_of_another_balance():
    truth, measured = synthetic(0.0)
    costs = Costs.from_profile(measured, CONFIG)
    for point in (Point(4, 4096, 7), Point(16, 8192, 12), Point(1, 16384, 65)):
        np.testing.assert_allclose(costs.step(point), truth.step(point), rtol=0.05)


def test_the_stated_error_is_that_of_points_left_out():
    """Of noise that is in every time: between independent errors of 10 % there are about 14 %, and no miracle."""
    assert interpolation_error(synthetic(0.0)[1], CONFIG).worst < 0.05
    truth, measured = synthetic(0.1)
    stated = interpolation_error(measured, CONFIG)
    assert stated.points == len(grid()) and 0.04 < stated.median < 0.15 and stated.median < stated.p90 < stated.worst
    costs = Costs.from_profile(measured, CONFIG)
    between = [Point(b, c, t) for b in (1, 2, 4, 8) for c in (1024, 4096) for t in (2, 4, 7, 13, 25)]
    actual = [abs(costs.step(point) / truth.step(point) - 1) for point in between]
    assert np.median(actual) < stated.median + 0.02 and np.quantile(actual, 0.9) < stated.p90 + 0.02


def test_the_error_of_a_profile_with_too_few_times_is_not_stated():
    steps = synthetic(0.0)[1].steps
    assert interpolation_error(profile(steps=steps[:2]), CONFIG) is None
    assert interpolation_error(profile(steps=steps[:3]), CONFIG) is not None
    with pytest.raises(ProfileError, match="no step times"):
        Costs.from_profile(profile(), CONFIG)


def test_one_time_scales_what_is_counted_most_what_it_is_made_of():
    costs, one = counted(), Point(1, 2048, 5)
    scaled = Costs.from_profile(profile(steps=(timed(one, 3 * costs.step(one)),)), CONFIG)
    for point in (Point(1, 2048, 1), Point(8, 8192, 17)):  # bytes and operations, as it
        np.testing.assert_allclose(scaled.step(point), 3 * costs.step(point), rtol=0.05)


def test_a_few_small_steps_say_what_launches_take_and_not_that_bytes_are_free():
    """As on a GPU, whose graphs launch at a fifth of what one launch takes by itself: a step of one sequence is
    launches, one of 32 is not."""
    counting = counted(bandwidth=3e12, flops=6e14, overhead=1.7e-5)
    truth = counted(bandwidth=3e12, flops=6e14, overhead=3.6e-6)
    steps = tuple(timed(point, truth.step(point)) for point in (Point(1, 4096, width) for width in (1, 5, 9, 17)))
    rates = {"bandwidth": 3e12, "flops": 6e14, "overhead": 1.7e-5}
    costs = Costs.from_profile(dataclasses.replace(profile(steps=steps), **rates), CONFIG)
    for point in (Point(32, 65536, 17), Point(32, 65536, 1), Point(8, 32768, 64)):
        np.testing.assert_allclose(costs.step(point), truth.step(point), rtol=0.1)
        assert counting.step(point) > 1.2 * truth.step(point)


def test_class_strict_launches_for_each_block_of_rows():
    costs, rows = counted(overhead=1e-5), {"batch": 8, "context": 4096}

    def extra(width):
        return costs.step(Point(**rows, width=width, precision="strict")) - costs.step(Point(**rows, width=width))

    assert extra(1) == pytest.approx(2 * CONFIG.layers * 15e-5)  # a block of 8 rows, and the attention
    assert extra(17) == pytest.approx(18 / 2 * extra(1))
    assert extra(2) == pytest.approx(extra(1) * 3 / 2)
