"""The planner: what it chooses, when, and for how long."""

import numpy as np
import pytest
from profiles import SlopeCosts, plan_depth

from specsa_jax import PromptLookup, Strategy
from specsa_jax.decoding import Counts
from specsa_jax.planning import plan as plans
from specsa_jax.planning import replay
from specsa_jax.planning.factors import Factors
from specsa_jax.planning.plan import SHORTEST, Plan
from specsa_jax.planning.planner import Candidate, Planner
from specsa_jax.planning.predict import Acceptance

CHAINS = ("chain:2", "chain:4", "chain:16")
CANDIDATES = [Candidate("none", Strategy(None)), *(Candidate("lookup", Strategy(tree=tree)) for tree in CHAINS)]


def make(
    slope, *, compiled=lambda strategy: True, acceptance=None, new_tokens=1000, replayed=(), lengths=None, batch=1,
    shortest=SHORTEST["cpu"], **options
):  # fmt: skip
    return Plan(
        Planner(**options), CANDIDATES, SlopeCosts(slope), acceptance or Acceptance(), batch=batch, context=64,
        layers=2, compiled=compiled, compile_seconds=100.0, new_tokens=new_tokens, replayed=replayed, lengths=lengths,
        shortest=shortest,
    )  # fmt: skip


def run(plan, accepted_of, slope, segments=12, remaining=1000):
    """Steps whose drafts stand for the first ``accepted_of(step)`` tokens (None: there is no draft)."""
    used = []
    for _ in range(segments):
        strategy, count = plan.strategy, plan.steps_left
        depth = strategy.reach - 1
        drafted, accepted, seconds = np.zeros(depth + 1, int), np.zeros(depth + 1, int), 0.0
        for step in range(count):
            stood = accepted_of(len(used) + step)
            has = depth > 0 and stood is not None
            drafted[depth if has else 0] += 1
            accepted[min(stood, depth) if has else 0] += 1
            seconds += 1.0 + slope * depth * has
        used += [strategy.tree if strategy.drafter else "none"] * count
        counts = Counts(np.array(count), drafted, accepted, np.array(depth * count))
        plan.observe(counts, seconds, int(count + accepted @ np.arange(depth + 1)), 1, remaining)
    return used


def test_it_drafts_as_far_as_drafts_stand():
    assert run(make(0.1), lambda step: 16, 0.1)[-1] == "chain:16"
    assert run(make(0.1), lambda step: 0, 0.1, segments=24)[-100:].count("none") > 70  # it tries again, briefly
    # A copy that always parts after two tokens is no copy's way: it tries what comes next, but nothing long.
    used = run(make(0.1), lambda step: 2, 0.1)[-60:]
    assert set(used) == {"chain:2", "chain:4"}


def test_a_batch_is_as_fast_as_its_slowest_sequence():
    """Of two sequences one takes every draft whole and the other none: the other one's steps are all that counts."""
    lengths, seconds = np.array([10, 10]), {}
    for told in (True, False):
        plan = make(0.2, batch=2, new_tokens=200, lengths=lengths if told else None)
        known, seconds[told] = lengths.copy(), 0.0
        while (known < lengths + 100).any():
            done, depth, count = known >= lengths + 100, plan.strategy.reach - 1, min(plan.steps_left, 4)
            running = int((~done).sum())
            drafted, accepted = np.zeros(depth + 1, int), np.zeros(depth + 1, int)
            drafted[depth] = accepted[0] = count * running
            if not done[0] and depth:
                accepted[depth] += count
                accepted[0] -= count
            before = known
            known = np.minimum(known + count * np.array([1 + depth, 1]) * ~done, lengths + 100)
            taken = count * (1.0 + 0.2 * depth)
            seconds[told] += taken
            done = known >= lengths + 100
            plan.look((), known, done)
            counts = Counts(np.array(count), drafted, accepted, np.array(depth * count))
            left = int((lengths + 100 - known).sum())
            plan.observe(counts, taken, int((known - before).sum()), int((~done).sum()), left)
    assert seconds[True] < 0.85 * seconds[False]
    assert seconds[True] < 110  # 100 without drafts


def test_it_follows_a_text_that_changes():
    used = run(make(0.1), lambda step: 16 if step < 100 else 0, 0.1, segments=24)
    assert used[99] == "chain:16"
    assert used[-100:].count("none") > 60 and "chain:2" in used[-100:]  # as evidence fades, it tries again, briefly


def test_it_goes_by_the_times_that_it_sees():
    """Costs say that drafts are all but free; steps show that a drafted token costs as much as a decoded one."""
    plan = make(0.01)
    assert set(run(plan, lambda step: 1, 1.0, segments=30)[-100:]) <= {"none", "chain:2"}


def test_a_strategys_factor_is_what_its_steps_take_against_the_prediction():
    plan = make(0.1, hysteresis=100.0)  # it stays
    for _ in range(4):
        count, depth = plan.steps_left, plan.strategy.reach - 1
        stood = np.eye(depth + 1, dtype=int)[depth] * count
        seconds = 2.0 * count * (1.0 + 0.1 * depth)
        plan.observe(Counts(np.array(count), stood, stood, np.array(0)), seconds, count, 1, 10**6)
        assert plan._factors(plan.strategy) == pytest.approx(2.0)


def test_steps_that_something_else_held_up_do_not_speak_against_a_strategy_for_ever():
    held, other = CANDIDATES[1].strategy, CANDIDATES[2].strategy
    factors = Factors(0.8)
    assert factors(held) == 1.0
    factors.observe(other, 1.0, 4)
    factors.observe(held, 20.0, 4)  # four steps
    assert factors(held) == pytest.approx(20.0) and 1.0 == factors(other) < factors(CANDIDATES[3].strategy)
    for _ in range(8):
        factors.observe(other, 1.0, 16)
    assert factors(held) < 1.6
    for _ in range(16):  # what many steps have shown holds
        factors.observe(held, 2.0, 16)
    factors.observe(other, 1.0, 64)
    assert factors(held) == pytest.approx(2.0)


def test_a_draftless_step_does_not_make_a_strategy_look_fast():
    plan = make(0.5)
    run(plan, lambda step: None, 0.5)
    chain = CANDIDATES[-1].strategy
    assert plan.options(CANDIDATES[-1:], 1, rate=1.0)[0].step_seconds == pytest.approx(1.0 + 0.5 * 16, rel=0.01)
    assert chain.width == 17


def test_a_switch_must_repay_compilation_and_promise_enough():
    ready = {Strategy(tree="chain:4")}
    stays = make(0.1, compiled=ready.__contains__, new_tokens=50)
    assert stays.strategy.tree == "chain:4"
    assert set(run(stays, lambda step: 16, 0.1, remaining=50)) == {"chain:4"}  # 50 tokens gain less than 100 s
    assert run(stays, lambda step: 16, 0.1, remaining=5000)[-1] == "chain:16"
    assert set(run(make(0.1, hysteresis=100.0), lambda step: 0, 0.1)) == {make(0.1).strategy.tree}
    once = make(0.1, switch=False)
    assert len(set(run(once, lambda step: 0, 0.1))) == 1


def test_a_segment_goes_to_the_end_where_nothing_could_change_the_choice():
    ready = [Strategy(tree="chain:4")]
    plan = make(0.1, compiled=ready.__contains__, new_tokens=60)
    assert plan.steps_left == 60 and "compiling another would not repay" in plan.decisions[0].reason
    assert make(0.1, new_tokens=60).steps_left == 4  # the others are compiled
    assert make(0.1, compiled=ready.__contains__).steps_left == 4  # 1000 tokens repay 100 s
    assert make(0.1, switch=False).steps_left == 1000
    run(plan, lambda step: 0, 1e-3, segments=1)
    assert plan.decisions[0].observed_steps == 60 and len(plan.decisions) == 2


@pytest.mark.parametrize("slope, stands, longest", [(0.1, 16, 16), (10.0, 0, 64)], ids=["drafts", "none"])
def test_segments_grow_while_the_strategy_stays(slope, stands, longest):
    """The longer where nothing is drafted, so that nothing could be seen."""
    plan = make(slope, segment=4, new_tokens=10**6)
    lengths = []
    for _ in range(12):
        lengths.append(plan.steps_left)
        run(plan, lambda step: stands, slope, segments=1, remaining=10**6)
    assert lengths[0] == 4 and lengths[-1] == longest and sorted(lengths[-4:]) == lengths[-4:]


def test_every_decision_says_what_was_predicted_and_observed():
    plan = make(0.1)
    run(plan, lambda step: 16, 0.1, segments=3)
    first = plan.decisions[0]
    assert {option.strategy for option in first.options} == {"autoregressive", *(f"lookup {tree}" for tree in CHAINS)}
    speeds = [option.tokens_per_second for option in first.options]
    assert speeds == sorted(speeds, reverse=True)
    assert first.observed_steps == 4 and first.observed_acceptance_length == min(16, plan_depth(first.chosen)) + 1
    assert all(decision.reason for decision in plan.decisions)


def test_a_segment_is_long_enough_to_be_worth_a_call(monkeypatch):
    monkeypatch.setattr(SlopeCosts, "step", lambda self, point: 1e-3)
    monkeypatch.setattr(plans, "_SHARE", 1.0)  # or it is a matter of this machine's speed
    assert make(0.0, segment=4).steps_left == 30 and make(0.0, segment=40).steps_left == 40
    plan = make(0.0, segment=4, shortest=SHORTEST["gpu"])
    assert plan.steps_left == 30  # a guess
    depth, lengths = plan.strategy.reach - 1, []
    for _ in range(4):
        count = plan.steps_left
        stood = np.eye(depth + 1, dtype=int)[depth] * count
        plan.observe(Counts(np.array(count), stood, stood, np.array(count * depth)), 1e-3 * count, count, 1, 10**6)
        lengths.append(plan.steps_left)
    assert lengths == pytest.approx([100, 400, 400, 400], abs=1)  # as long as the strategy stays


def test_a_strategys_first_segment_is_as_short_as_the_calls(monkeypatch):
    """On a GPU, whose segments are long otherwise: what it was chosen by may be as wrong as the first guess."""
    monkeypatch.setattr(SlopeCosts, "step", lambda self, point: 1e-3 * (1.0 + 0.1 * (point.width - 1)))
    monkeypatch.setattr(plans, "_SHARE", 1.0)  # or it is a matter of this machine's speed
    plan, lasts = make(0.0, segment=4, shortest=SHORTEST["gpu"]), []
    for stands in (True, True, False, False):
        strategy, count, depth = plan.strategy, plan.steps_left, plan.strategy.reach - 1
        stood = np.eye(depth + 1, dtype=int)[depth if stands else 0] * count
        counts = Counts(np.array(count), np.eye(depth + 1, dtype=int)[depth] * count, stood, np.array(count * depth))
        taken = count * 1e-3 * (1.0 + 0.1 * depth)
        plan.observe(counts, taken, count * (1 + depth * stands), 1, 10**6)
        option = next(one for one in plan.decisions[-1].options if one.strategy == plan.decisions[-1].chosen)
        lasts.append((plan.strategy == strategy, plan.steps_left * option.step_seconds))
    assert [stays for stays, _ in lasts] == [False, True, False, False]
    assert all((seconds > SHORTEST["gpu"]) if stays else (seconds < 0.04) for stays, seconds in lasts)


def test_a_segment_of_numpys_does_not_overflow():
    assert Planner(segment=np.int8(100)) == Planner(segment=100) and 2 * Planner(segment=np.int8(100)).segment == 200


def test_contenders_are_all_that_win_at_some_acceptance():
    assert {strategy.tree for strategy in make(0.1).contenders()} >= {"chain:16"}
    assert Strategy(None) in make(0.1).contenders()
    assert make(1.0).contenders()[0] == make(1.0).strategy


@pytest.mark.parametrize("bad", [
    {"hysteresis": -1}, {"hysteresis": float("nan")}, {"hysteresis": "x"}, {"hysteresis": None}, {"segment": 0},
    {"segment": True}, {"precision": "fp8"},
    {"precision": np.array(["exact", "exact"])}, {"switch": "no"}, {"drafters": "lookup"}, {"drafters": 5},
    {"drafters": (3, ("chain:2",))}, {"drafters": ((3, ("chain:2",)),)}, {"drafters": (("lookup", "chain:2"),)},
    {"drafters": (("lookup", ()),)},
])  # fmt: skip
def test_a_planner_of_no_sense_is_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: got"):
        Planner(**bad)


def test_a_planners_drafters_may_be_lists_of_trees_that_can_be_read():
    listed = Planner(drafters=[["lookup", ["chain:2", "chain:4"]]])
    assert listed == Planner(drafters=(("lookup", ("chain:2", "chain:4")),)) and hash(listed)
    with pytest.raises(ValueError, match="tree: got 'star:2'"):
        Planner(drafters=[("lookup", ["star:2"])])


def test_what_others_decode_shows_how_lookup_would_fare():
    text, lookup = np.array([[1, 2, 3, 4, 5] * 40], np.int32), [("lookup", PromptLookup(), (2, 4, 16))]
    plan = make(0.1, replayed=lookup, lengths=np.array([20]), segment=64, acceptance=Acceptance(alone=True))

    def segment(strategy, known):
        plan._take(strategy)
        steps, depth = plan.steps_left, strategy.reach - 1
        counts = np.eye(depth + 1, dtype=int)[0] * steps  # without a draft, each of them
        plan.look(text if plan.wants_text else (), np.array([known]), np.array([False]))
        plan.observe(Counts(np.array(steps), counts, counts, np.array(0)), float(steps), steps, 1, 1000)
        return plan.acceptance.length("lookup", "chain:16", 16)

    before = plan.acceptance.length("lookup", "chain:16", 16)
    assert segment(CANDIDATES[0].strategy, 90) > before + 2  # however long the segment was
    segment(CANDIDATES[1].strategy, 154)
    looked = []

    def walk(texts, since, known, drafter, depths):
        looked.append((int(since[0]), int(known[0]), depths))
        return [([1], [1])] * len(depths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "walk", walk)
        segment(CANDIDATES[0].strategy, 158)
        segment(CANDIDATES[2].strategy, 162)
    # Of what lookup has drafted itself other lengths are looked at.
    assert looked == [(154, 158, (2, 4, 16)), (158, 162, (2, 16))]
    assert not make(0.1, switch=False, replayed=lookup).wants_text
    # What would not be chosen if all that it drafts stood is not looked at; and nothing when the call is over.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "walk", walk)
        for candidate, running in ((CANDIDATES[3], 1), (CANDIDATES[0], 0)):
            plan._take(candidate.strategy)
            steps, depth = plan.steps_left, candidate.strategy.reach - 1
            stood = np.eye(depth + 1, dtype=int)[depth] * steps
            counts = Counts(np.array(steps), stood, stood, np.array(steps * depth))
            plan.look(text, np.array([166]), np.array([not running]))
            plan.observe(counts, (1.0 + 0.1 * depth) * steps, (1 + depth) * steps, running, 1000)
            assert running == 0 or not plan.wants_text
    assert len(looked) == 2 and plan.wants_text
    # Of many texts only drafters that have not drafted, by their longest chains.
    many = make(0.1, replayed=lookup, lengths=np.array([20, 20]), batch=2)
    assert [many._take(one.strategy) or many._walked("lookup", (2, 16)) for one in CANDIDATES[:2]] == [(16,), ()]


def test_a_lone_texts_first_segment_judges_all_lengths_by_its_end(monkeypatch):
    """Where the text began to go round: before, no length had a chance, and one of them drafted."""
    monkeypatch.setattr(replay, "PAIRS", 100 * 400)  # the last 100 tokens
    text = np.array([[*range(20, 220), *[1, 2, 3, 4, 5] * 40]], np.int32)

    def length(first):
        plan = make(0.01, replayed=[("lookup", PromptLookup(), (2, 4, 16))], lengths=np.array([20]), segment=205,
                    new_tokens=10**5, acceptance=Acceptance(alone=True))  # fmt: skip
        if not first:
            run(plan, lambda step: 0, 0.01, segments=1, remaining=10**5)
        plan._looked = np.array([20])
        plan._take(CANDIDATES[3].strategy)
        steps = plan.steps_left
        stood = np.eye(17, dtype=int)[0] * (steps - 12) + np.eye(17, dtype=int)[16] * 12
        plan.look(text, np.array([400]), np.array([False]))
        plan.observe(Counts(np.array(steps), stood, stood, np.array(0)), 1.16 * steps, 380, 1, 10**5)
        return plan.acceptance.length("lookup", "chain:16", 16)

    assert length(first=True) > 12
    assert length(first=False) < 4  # later, what drafts has shown how it fares


@pytest.mark.parametrize("streamed", [False, True])
def test_the_last_sequence_of_a_batch_is_looked_at_like_a_lone_one(streamed, monkeypatch):
    """What the seven others have shown for hundreds of steps, and what follows for other lengths, says little of it."""
    monkeypatch.setattr(plans, "_SHARE", 1.0)  # or it is a matter of this machine's speed
    looked = []

    def walk(texts, since, known, drafter, depths):
        looked.append((len(texts), int(known[0]), depths))
        return [(np.eye(depth + 1)[depth] * 8, stand(depth, 8)) for depth in depths]

    def stand(depth, count):
        """Of chains of 16 three of four are misled, of those of 4 none."""
        lost = count * 3 // 4 if depth == 16 else 0
        return np.eye(depth + 1, dtype=int)[0] * lost + np.eye(depth + 1, dtype=int)[depth] * (count - lost)

    monkeypatch.setattr(replay, "walk", walk)
    plan = make(0.05, replayed=[("lookup", PromptLookup(), (2, 4, 16))], lengths=np.full(8, 20), batch=8,
                new_tokens=10**6, segment=8)  # fmt: skip
    plan._take(CANDIDATES[3].strategy)
    text, known, steps, trees = np.zeros((8, 9000), np.int32), np.full(8, 20), [], []
    for others, running in ((7, 8), (7, 8), (7, 1), (0, 1), (0, 1)):  # in the segment, and behind it
        if others:
            plan._length = 200
        count, depth = plan.steps_left, plan.strategy.reach - 1
        whole = np.eye(depth + 1, dtype=int)[depth] * count
        stood, drafted = stand(depth, count) + others * whole, (1 + others) * whole
        known = known + count * np.array([1 + depth] * 7 + [1])
        plan.look(text if streamed or plan.wants_text else (), known, np.arange(8) < 8 - running)
        new = int(drafted.sum() + stood @ np.arange(depth + 1))
        counts = Counts(np.array(count), drafted, stood, np.array(depth * count))
        plan.observe(counts, (1.0 + 0.05 * depth) * count, new, running, 10**6)
        steps.append(count)
        trees.append(plan.strategy.tree)
    # As soon as it is alone the segment is short again; at the end of that all lengths are tried on its text.
    assert trees == ["chain:16"] * 3 + ["chain:4"] * 2 and steps == [200, 200, 200, 8, 8]
    assert looked[0][0] == 1 and looked[0][2] == (2, 4, 16)


def test_the_end_of_a_lone_texts_segment_stands_for_all_of_it():
    """Else a few long steps at its end would say little beside what a length showed before."""
    plan = make(0.1, replayed=[("lookup", PromptLookup(), (2, 4, 16))], lengths=np.array([20]), segment=64,
                new_tokens=10**6, acceptance=Acceptance(alone=True))  # fmt: skip
    plan.acceptance.add("lookup", "chain:16", np.eye(17)[16] * 50, np.eye(17)[0] * 50)
    worths = []

    def walk(texts, since, known, drafter, depths):
        return [(np.eye(depth + 1)[depth] * 10, np.eye(depth + 1)[depth] * 10) for depth in depths]

    def add(drafter, tree, drafted, accepted, worth=None):
        worths.append((tree, worth))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "walk", walk)
        patch.setattr(plan.acceptance, "add", add)
        plan._take(CANDIDATES[2].strategy)
        counts = np.eye(5, dtype=int)[4] * 200
        plan.look(np.zeros((1, 2000), np.int32), np.array([1020]), np.array([False]))
        plan.observe(Counts(np.array(200), counts, counts, np.array(0)), 280.0, 1000, 1, 10**6)
    # Of 1000 tokens 170 were walked through, in 10 steps. Shorter chains could not win, and what drafted is counted.
    assert worths == [("chain:16", pytest.approx(1000 / 17)), ("chain:4", None)]


def test_the_last_segment_goes_to_the_end(monkeypatch):
    """Where what it would leave is too short for another choice."""
    monkeypatch.setattr(plans, "_SHARE", 1.0)  # or it is a matter of this machine's speed
    plan = make(0.1, segment=4, new_tokens=10**4)
    run(plan, lambda step: 16, 0.1, segments=4, remaining=10**4)
    assert plan.strategy.tree == "chain:16" and plan.steps_left == 16
    run(plan, lambda step: 16, 0.1, segments=1, remaining=200)
    expected = plan.decisions[-1].options[0].acceptance_length
    assert plan.steps_left == pytest.approx(1.5 * 200 / expected, abs=1)


@pytest.mark.parametrize("depths, chosen", [((2, 4, 16), "chain:16"), ((), "chain:4")])
def test_a_length_that_a_text_misleads_each_time_is_left_for_one_that_it_does_not(depths, chosen):
    """Of drafts of 4 half are wrong at once, those of 16 would all stand: seen on the text, without trying them."""
    replayed = [("lookup", PromptLookup(), depths)] if depths else []
    alone = Acceptance(alone=True)
    plan = make(0.2, replayed=replayed, lengths=np.array([20]), new_tokens=10**6, acceptance=alone)

    def walk(texts, since, known, drafter, depths):
        return [(np.eye(depth + 1)[depth] * 20, np.eye(depth + 1)[depth if depth > 4 else 0] * 20) for depth in depths]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "walk", walk)
        for _ in range(3):
            plan._take(CANDIDATES[2].strategy)
            steps = plan.steps_left
            drafted, accepted = np.array([0, 0, 0, 0, steps]), np.array([steps // 2, 0, 0, 0, steps - steps // 2])
            plan.look(np.zeros((1, 900), np.int32), np.array([400]), np.array([False]))
            plan.observe(Counts(np.array(steps), drafted, accepted, np.array(0)), 1.8 * steps, 3 * steps, 1, 10**6)
    assert plan.strategy.tree == chosen
