"""The planner: what it predicts, chooses and never chooses; and the engine under it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_params import random_params, random_tokens, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from specsa_jax import Engine, PromptError, PromptLookup, Strategy
from specsa_jax.admission import Bound
from specsa_jax.checkpoints import records
from specsa_jax.decoding import Counts
from specsa_jax.drafting import Context, DraftModel, parse_tree
from specsa_jax.drafting.watching import Watching
from specsa_jax.planning import planner, replay, space
from specsa_jax.planning.pace import Pace
from specsa_jax.planning.planner import Candidate, Plan, Planner, cheapest
from specsa_jax.planning.predict import Acceptance
from specsa_jax.planning.profile import Point, Prior, Profile, StepTime
from specsa_jax.schedule import Sharing

CHAINS = ("chain:2", "chain:4", "chain:16")
CANDIDATES = [Candidate("none", Strategy(None)), *(Candidate("lookup", Strategy(tree=tree)) for tree in CHAINS)]


class Costs:
    """A step takes 1 and ``slope`` for each drafted token; drafting nothing."""

    measured = True

    def __init__(self, slope):
        self.slope = slope

    def step(self, point):
        return 1.0 + self.slope * (point.width - 1)

    def draft(self, *args):
        return 0.0


def make(
    slope, *, compiled=lambda strategy: True, acceptance=None, new_tokens=1000, replayed=(), lengths=None, batch=1,
    shortest=planner.SHORTEST["cpu"], **options
):  # fmt: skip
    return Plan(
        Planner(**options), CANDIDATES, Costs(slope), acceptance or Acceptance(), batch=batch, context=64, layers=2,
        compiled=compiled, compile_seconds=100.0, new_tokens=new_tokens, replayed=replayed, lengths=lengths,
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
    assert run(make(0.1), lambda step: 0, 0.1, segments=24)[-100:].count("none") > 80  # it tries again, briefly
    assert run(make(0.1), lambda step: 2, 0.1)[-1] == "chain:2"


def test_a_batch_is_as_fast_as_its_slowest_sequence():
    """Of two sequences one takes every draft whole and the other none: the other one's steps are all that counts."""
    lengths, seconds = np.array([10, 10]), {}
    for told in (True, False):
        plan = make(0.2, batch=2, new_tokens=2000, lengths=lengths if told else None)
        known, seconds[told] = lengths.copy(), 0.0
        while (known < lengths + 1000).any():
            done, depth, count = known >= lengths + 1000, plan.strategy.reach - 1, min(plan.steps_left, 4)
            running = int((~done).sum())
            drafted, accepted = np.zeros(depth + 1, int), np.zeros(depth + 1, int)
            drafted[depth] = accepted[0] = count * running
            if not done[0] and depth:
                accepted[depth] += count
                accepted[0] -= count
            before = known
            known = np.minimum(known + count * np.array([1 + depth, 1]) * ~done, lengths + 1000)
            taken = count * (1.0 + 0.2 * depth)
            seconds[told] += taken
            done = known >= lengths + 1000
            plan.look((), known, done)
            counts = Counts(np.array(count), drafted, accepted, np.array(depth * count))
            left = int((lengths + 1000 - known).sum())
            plan.observe(counts, taken, int((known - before).sum()), int((~done).sum()), left)
    assert seconds[True] < 0.95 * seconds[False]
    assert seconds[True] < 1080  # 1000 without drafts


def bursts(rng, steps, chances, size=16):
    """Tokens that sequences accept in each step, int [steps, B]: all of a chain or none of it."""
    return size * (rng.random((steps, len(chances))) < chances)


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
        pace.observe(np.full(size, 100), known, np.zeros(size, bool), 64, planner._spread(histogram))
        found.append(pace.tokens_per_step(1.0 + seen.mean(), size))
        gained = np.cumsum(1 + bursts(rng, left, chances), axis=0)
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
    pace, lengths = Pace(np.array([5000, 5000])), np.array([100, 100])
    pace.observe(lengths, lengths + [64 * 5, 64], np.zeros(2, bool), 64, 0.1)
    before = pace.tokens_per_step(np.float64(3.0), 2)
    assert before < 2 * 2.0  # the second one accepts nothing
    for step in range(40):
        pace.observe(lengths + 100 * step, lengths + 100 * (step + 1), np.zeros(2, bool), 100, 0.0)
    assert pace.tokens_per_step(np.float64(3.0), 2) > 2 * 2.5  # drafting is worth another try


def test_pace_answers_for_many_candidates_as_for_each():
    pace, lengths = Pace(np.array([500, 5000, 700])), np.array([100, 100, 100])
    pace.observe(lengths, lengths + [64 * 5, 64, 80], np.zeros(3, bool), 64, 0.7)
    several = np.array([1.0, 2.5, 9.0])
    for running in (3, 2):
        each = [float(pace.tokens_per_step(length, running)) for length in several]
        np.testing.assert_allclose(pace.tokens_per_step(several, running), each, rtol=1e-12)


def test_those_that_are_left_may_be_those_that_accepted_nothing():
    pace, lengths = Pace(np.array([500, 5000, 5000])), np.array([100, 100, 100])
    pace.observe(lengths, lengths + [64 * 5, 64, 64], np.zeros(3, bool), 64, 0.1)
    pace.observe(lengths + 64, lengths + 128, np.array([True, False, False]), 64, 0.0)
    assert 0 < pace.tokens_per_step(np.float64(3.0), 2) <= 2 * 3.0


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
        assert plan._factors[plan.strategy] == pytest.approx(2.0)


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


def test_segments_grow_while_the_strategy_stays():
    plan = make(0.1, segment=4)
    lengths = []
    for _ in range(12):
        lengths.append(plan.steps_left)
        run(plan, lambda step: 16, 0.1, segments=1)
    assert lengths[0] == 4 and lengths[-1] == 64 and sorted(lengths[-4:]) == lengths[-4:]


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
    monkeypatch.setattr(Costs, "step", lambda self, point: 1e-3)
    assert make(0.0, segment=4).steps_left == 30 and make(0.0, segment=40).steps_left == 40
    plan = make(0.0, segment=4, shortest=planner.SHORTEST["gpu"])
    assert plan.steps_left == 30  # a guess
    depth, lengths = plan.strategy.reach - 1, []
    for _ in range(4):
        count = plan.steps_left
        stood = np.eye(depth + 1, dtype=int)[depth] * count
        plan.observe(Counts(np.array(count), stood, stood, np.array(count * depth)), 1e-3 * count, count, 1, 10**6)
        lengths.append(plan.steps_left)
    assert lengths == pytest.approx([100, 400, 400, 400], abs=1)  # as long as the strategy stays


def plan_depth(words):
    return int(words.rsplit(":", 1)[1])


def test_contenders_are_all_that_win_at_some_acceptance():
    assert {strategy.tree for strategy in make(0.1).contenders()} >= {"chain:16"}
    assert Strategy(None) in make(0.1).contenders()
    assert make(1.0).contenders()[0] == make(1.0).strategy


@pytest.mark.parametrize("bad", [{"hysteresis": -1}, {"hysteresis": float("nan")}, {"segment": 0}, {"segment": True},
                                 {"precision": "fp8"}])  # fmt: skip
def test_a_planner_of_no_sense_is_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: got"):
        Planner(**bad)


# --- prediction -------------------------------------------------------------------------------------------------------


def histogram(depth, lengths, draftless=0):
    drafted = np.zeros(depth + 1)
    drafted[depth], drafted[0] = len(lengths), draftless
    return drafted, np.bincount([*lengths, *[0] * draftless], minlength=depth + 1).astype(float)


def test_prediction_tends_to_what_is_observed():
    random, chance = np.random.default_rng(0), 0.7
    lengths = [int(np.argmin([*(random.random(4) < chance), False])) for _ in range(4000)]
    acceptance = Acceptance()
    acceptance.add("lookup", "chain:4", *histogram(4, lengths, draftless=1000))
    assert acceptance.rate("lookup") == pytest.approx(0.8, abs=0.01)
    np.testing.assert_allclose(acceptance.chances("lookup", "chain:4", 4), chance, atol=0.04)  # 4 errors at the last
    assert acceptance.length("lookup", "chain:4", 4) == pytest.approx(1 + 0.8 * np.mean(lengths), abs=0.02)


def test_chains_of_other_lengths_and_other_trees_learn_too():
    def prior(tree, depth):
        drafted, accepted = histogram(depth, [1, 2] * 50)
        return Prior("lookup", tree, "continuation", 64, 100, tuple(map(int, drafted)), tuple(map(int, accepted)), 0)

    acceptance = Acceptance([prior("chain:4", 4), prior("best:8:4", 4)])
    before = [acceptance.length("lookup", tree, 4) for tree in ("chain:4", "best:8:4")]
    acceptance.add("lookup", "chain:2", *histogram(2, [2] * 50))
    after = [acceptance.length("lookup", tree, 4) for tree in ("chain:4", "best:8:4")]
    assert after[0] > before[0] + 0.2 and after[1] > before[1] + 0.2
    assert acceptance.length("head", "chain:4", 4) == Acceptance().length("head", "chain:4", 4)


def test_old_evidence_fades():
    acceptance = Acceptance()
    acceptance.add("lookup", "chain:4", *histogram(4, [4] * 100))
    acceptance.decay(200)
    acceptance.add("lookup", "chain:4", *histogram(4, [0] * 20))
    assert acceptance.chances("lookup", "chain:4", 1)[0] < 0.2


def test_a_replay_is_what_lookup_would_have_drafted_of_the_prompt():
    """By hand: of a text of period 5, all drafts behind the first period and the shortest match stand."""
    row = np.array([1, 2, 3, 4, 5] * 12, np.int32)
    known = replay.places(np.array([len(row)]), 8)[:, 0]
    assert known[0] >= 1 and known[-1] == len(row) - 8 and len(known) == replay.PLACES
    drafted, accepted = replay.replay([row], PromptLookup(), 8)
    late = int((known >= 7).sum())
    assert drafted[8] == late and accepted[8] == late and drafted[0] == accepted[0] == len(known) - late
    drafted, accepted = replay.fates(np.roll(row, 1), known, *PromptLookup().replay(row, known, 8))
    assert accepted[0] == len(known) and drafted[8] == late  # another text: nothing stands
    assert replay.replay([row[:1], row[:2]], PromptLookup(min_ngram=4), 8)[0].tolist() == [32] + 8 * [0]  # too short
    drafted, accepted = replay.replay([row, row[:20], row[:1]], PromptLookup(), 8)
    assert drafted.sum() == accepted.sum() >= replay.PLACES and accepted[8] > 0 and drafted[0] > 0


def test_a_walk_is_the_steps_that_lookup_would_have_taken():
    """By hand: of a text of period 5, a draft of 4 stands at each step; the last is right as far as the text goes."""
    row = np.array([1, 2, 3, 4, 5] * 8, np.int32)
    texts, since, known = np.stack([row, row]), np.array([20, 7]), np.array([38, 7])
    drafted, accepted = replay.walk(texts, since, known, PromptLookup(), 4)
    # Of 32 tokens for two texts the last 16: steps from 22, 27, 32 and, with one token left, from 37.
    assert drafted.tolist() == accepted.tolist() == [0, 1, 0, 0, 3]
    wrong = texts.copy()
    # The draft of 22 stands for three tokens; of 26 and 27 there is none; that of 28 repeats the 9, and stands for two;
    # that of 31 stands; of 36's, two are known.
    wrong[0, 25] = 9
    drafted, accepted = replay.walk(wrong, since, known, PromptLookup(), 4)
    assert accepted.tolist() == [2, 0, 2, 1, 1] and drafted.tolist() == [2, 0, 1, 0, 3]


def test_of_a_large_batch_some_texts_are_walked_far_enough_for_whole_drafts():
    row = np.array([1, 2, 3, 4, 5] * 4000, np.int32)  # longer than what is looked up in
    texts, since, known = np.stack([row] * 32), np.full(32, 19000), np.full(32, 19500)
    drafted, accepted = replay.walk(texts, since, known, PromptLookup(), 16)
    assert drafted.tolist() == accepted.tolist() == [0] * 15 + [4, 4]  # 17 and 15 tokens of four texts
    drafted, accepted = replay.replay(list(texts), PromptLookup(), 16)
    assert drafted[16] == accepted[16] == drafted.sum() == replay.PLACES  # of four of them


def test_what_others_decode_shows_how_lookup_would_fare():
    text, lookup = np.array([[1, 2, 3, 4, 5] * 40], np.int32), [("lookup", PromptLookup(), 16)]
    plan = make(0.1, replayed=lookup, lengths=np.array([20]), segment=64)

    def segment(strategy, known):
        plan._take(strategy)
        steps, depth = plan.steps_left, strategy.reach - 1
        counts = np.eye(depth + 1, dtype=int)[0] * steps  # without a draft, each of them
        plan.look(text if plan.wants_text else (), np.array([known]), np.array([False]))
        plan.observe(Counts(np.array(steps), counts, counts, np.array(0)), float(steps), steps, 1, 1000)
        return plan.acceptance.gain("lookup", "chain:16", 16)

    before = plan.acceptance.gain("lookup", "chain:16", 16)
    assert segment(CANDIDATES[0].strategy, 90) > before + 2  # however long the segment was
    own = segment(CANDIDATES[1].strategy, 154)
    assert not plan.wants_text or plan.strategy.drafter is None
    # What lookup has drafted itself is not looked at again.
    looked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "walk", lambda texts, since, known, *rest: looked.append((since, known)) or ([1], [1]))
        segment(CANDIDATES[0].strategy, 158)
    assert [(int(since[0]), int(known[0])) for since, known in looked] == [(154, 158)] and own > 0
    assert not make(0.1, switch=False, replayed=lookup).wants_text


@pytest.mark.parametrize("drafter", [PromptLookup(), PromptLookup(max_ngram=3, min_ngram=1), PromptLookup(64, 5)])
def test_a_replay_on_the_host_drafts_what_the_loop_would(drafter):
    texts = np.random.default_rng(1).integers(0, 3, (40, 50)).astype(np.int32)
    texts[:20, 30:], known = texts[:20, :20], np.arange(5, 45).astype(np.int32)
    context = Context(jnp.asarray(texts), jnp.asarray(known), jnp.ones(40, bool), *[None] * 5)
    draft = jax.device_get(drafter.propose((), (), context, parse_tree("chain:8")))
    found = [drafter.replay(text, one[None], 8) for text, one in zip(texts, known, strict=True)]
    chains, valid = (np.concatenate(parts) for parts in zip(*found, strict=True))
    np.testing.assert_array_equal(valid, draft.valid)
    np.testing.assert_array_equal(chains[valid], draft.tokens[valid])
    assert 0 < valid.sum() < valid.size or drafter.min_ngram == 1


# --- the space --------------------------------------------------------------------------------------------------------

CONFIG = tiny_model(layers=2)


def tiny_engine(config=CONFIG, **options):
    words = Tokenizer(WordLevel({f"t{token}": token for token in range(50)}, "t0"))
    return Engine(config, random_params(config, seed=3), words, max_length=160, **options)


def measurement(schedule, kl, shared=0, width=0):
    at = records.AtContext(64, 8, 4096, 2.0, kl / 2, 0.0, kl, kl, 0.99, 0.0, 0.98, 0.0, 0.0)
    sharing = Sharing(schedule, group=shared, group_mode="shared" if shared else "merged")
    return records.Measurement(sharing, width, 0.95, "float32", records.Text("a text", 4096, "0" * 64), (at,))


@st.composite
def profiles(draw):
    """Profiles in which approximate steps may be much faster, and anything may be measured of drafts."""
    sharings = [Sharing(), Sharing("FS"), Sharing("FS", False), Sharing(group=4, group_mode="shared"), Sharing(group=2)]
    steps = []
    for sharing in sharings:
        for width in draw(st.lists(st.sampled_from([1, 3, 5, 17]), min_size=1, unique=True)):
            seconds = draw(st.floats(1e-5, 1e-1))
            steps.append(StepTime(Point(1, 160, width, True, sharing), seconds, seconds, seconds))
    priors = []
    for tree in draw(st.lists(st.sampled_from(["chain:1", "chain:2", "chain:4"]), min_size=1, unique=True)):
        drafted, accepted = histogram(plan_depth(tree), draw(st.lists(st.integers(0, 1), min_size=1)))
        total = int(drafted.sum())
        priors.append(
            Prior("lookup", tree, "edit", 64, total, tuple(map(int, drafted)), tuple(map(int, accepted)), 0)
        )  # fmt: skip
    return Profile(
        "model", "cpu", {}, "float32", "xla", 160, 1e10, 1e11, 1e-6, tuple(steps), (), (), tuple(priors), (),
        (measurement("FS", 1e-6), measurement("", 1e-6, shared=4, width=5)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    return tiny_engine()


@given(profile=profiles(), precision=st.sampled_from(["exact", "strict"]), pallas=st.booleans())
def test_no_profile_makes_a_lossless_class_choose_an_approximation(engine, profile, precision, pallas):
    from specsa_jax.planning.costs import Costs as Measured

    engine.__dict__["profile"], engine.__dict__["costs"] = profile, Measured.from_profile(profile, CONFIG)
    found = engine.space(Planner(precision), Bound(), 160)
    for candidate in found.candidates:
        sharings = found.sharings_of(candidate.strategy)
        strategy = cheapest(candidate.strategy, sharings, engine.costs, 1, 160)
        assert strategy.precision == precision and strategy.acceptance == "coupled"
        assert not strategy.sharing(CONFIG.layers).approximates


def test_class_approx_chooses_among_what_the_bound_admits(engine):
    class Cheap(Costs):
        def step(self, point):
            return super().step(point) / (2 if point.sharing.schedule else 1)

    measured = [measurement("FS", 0.01), measurement("", 0.01, shared=4, width=5)]

    def choice(max_kl, tree="chain:4"):
        admitted = [m for m in measured if Bound(max_kl).admits(m)]
        strategy = Strategy(tree=tree, precision="approx")
        found = space.Space(Planner("approx"), [], [Sharing()], admitted)
        return cheapest(strategy, found.sharings_of(strategy), Cheap(0.1), 1, 160), found.sharings_of(strategy)

    assert choice(0.02)[0].schedule == "FS" and choice(0.005)[0].schedule == "all"
    assert len(choice(0.02)[1]) == 3 and len(choice(0.02, "chain:2")[1]) == 2  # shared groups: of their width alone


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture
def restless(monkeypatch):
    """Plans that take the next candidate after each segment, whatever was observed."""

    def choose(self, running, remaining):
        original(self, running, remaining)
        self.strategy = self._first[len(self.decisions) % len(self._first)].strategy
        words = self.words[self.strategy]
        self.decisions[-1] = dataclasses.replace(self.decisions[-1], chosen=words)
        self._length = 2

    original = Plan.choose
    monkeypatch.setattr(Plan, "choose", choose)


def prompts(count=2):
    return [random_tokens(CONFIG, 6 + index, seed=index).tolist() * 3 for index in range(count)]


ONE = tiny_model(layers=1)  # compiles fast
TREES = Planner(drafters=(("lookup", ("chain:2", "chain:4")),))


@pytest.mark.slow
def test_tokens_do_not_depend_on_switches_and_each_strategy_is_traced_once(restless):
    engine = tiny_engine(ONE, precision="strict")
    plain = engine.generate(prompts(), 40, temperature=0.8, seed=5, speculate=False)
    for _ in range(2):
        planned = engine.generate(prompts(), 40, temperature=0.8, seed=5, strategy=TREES)
        assert len({decision.chosen for decision in planned.stats.plan}) == 3
        for a, b in zip(plain, planned, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist() and a.logprobs.tobytes() == b.logprobs.tobytes()
    decoded = {strategy: count for strategy, count in engine.decoder.traces.items() if isinstance(strategy, Strategy)}
    assert len(decoded) == 3 and set(decoded.values()) == {1}
    assert planned.stats.compile_seconds == 0 and planned.stats.new_tokens == 80
    assert sum(decision.observed_steps for decision in planned.stats.plan) == planned.stats.steps


MODEL = DraftModel("the same", config=ONE)
STATEFUL = [
    Candidate("none", Strategy(None)), Candidate("lookup", Strategy(PromptLookup(min_ngram=1), "chain:2")),
    Candidate("model", Strategy(MODEL, "chain:2")),
]  # fmt: skip


@pytest.fixture
def drafting_for_itself(monkeypatch):
    """An engine whose target may draft for itself, as a draft model."""
    monkeypatch.setattr(planner, "_WORTH_WATCHING", 0.0)  # lookup's replay promises more
    engine = tiny_engine(ONE)
    engine._draft_params[MODEL] = engine.params
    found = space.Space(Planner(), STATEFUL, [Sharing()], [])
    engine.space, engine.__dict__["costs"] = lambda *args: found, Costs(0.1)
    return engine


@pytest.mark.slow
@pytest.mark.long
def test_a_drafter_that_watches_takes_over_in_the_middle(restless, drafting_for_itself, guarded):
    """A draft model whose state is kept while lookup drafts, or nobody: it drafts as if it had drafted all along.
    Nothing crosses between host and device inside a segment."""
    engine = drafting_for_itself
    alone = engine.generate(prompts(1), 50, strategy=STATEFUL[-1].strategy)
    planned = engine.generate(prompts(1), 50, strategy="auto")
    assert planned[0].tokens.tolist() == alone[0].tokens.tolist()
    modelled = [d for d in planned.stats.plan if d.chosen.startswith("model") and d.observed_steps >= 2]
    assert len(modelled) > 2
    # The target drafts for itself: every draft stands, if its state is that of the text.
    assert all(decision.observed_acceptance_length == 3 for decision in modelled[:-1])
    drafting = {one.drafter.drafter for one in guarded if isinstance(one.drafter, Watching)}
    assert drafting == {one.strategy.drafter for one in STATEFUL}


@pytest.mark.slow
def test_watching_ends_where_it_is_not_worth_its_time(drafting_for_itself, monkeypatch):
    """Decoding goes on with the programs of a call in which nobody ever watched, and with the same tokens."""
    engine = drafting_for_itself
    alone = engine.generate(prompts(1), 50, strategy=STATEFUL[1].strategy)
    costs = engine.costs
    monkeypatch.setattr(costs, "draft", lambda name, *rest: 100.0 * (name == "model"))
    planned = engine.generate(prompts(1), 50, strategy="auto")
    assert planned[0].tokens.tolist() == alone[0].tokens.tolist()
    first, *others = [decision.chosen for decision in planned.stats.plan]
    assert first.endswith(", model watching") and not any("model" in other for other in others[1:])
    assert all("model" not in option.strategy for option in planned.stats.plan[-1].options) or len(others) == 1
    assert engine.decoder.traces[STATEFUL[1].strategy] == 1  # the program of the first call, which knows no state


@pytest.mark.slow
def test_all_that_a_planner_may_choose_is_compiled_ahead_and_stops_and_streams_as_ever(drafting_for_itself):
    engine, row = drafting_for_itself, prompts(1)
    words = engine.warmup("auto", prompt_tokens=len(row[0]), max_new_tokens=50)
    assert {one.split(",")[0].split(" ")[0] for one in words} == {"autoregressive", "lookup", "model"}
    assert any(one.endswith("watching") for one in words)
    alone = engine.generate(row, 50, strategy=STATEFUL[1].strategy)[0]
    stop = alone.text.split()[9]
    for strategy in ("auto", STATEFUL[1].strategy):
        stream = engine.stream(row, 50, stop=[f" {stop}"], strategy=strategy)
        text = "".join(chunk.text for chunk in stream)
        assert text == stream.result[0].text == alone.text[: alone.text.index(f" {stop}")]
        assert stream.result[0].finish == "stop"
    assert engine.generate(row, 50, strategy="auto").stats.compile_seconds == 0


@pytest.mark.slow
def test_warmup_leaves_nothing_to_compile():
    engine = tiny_engine(ONE)
    words = engine.warmup(TREES, batch=2, prompt_tokens=18, max_new_tokens=40)
    assert "autoregressive" in words and len(words) >= 2
    rows = [random_tokens(CONFIG, 18, seed=index).tolist() for index in range(2)]
    stats = engine.generate(rows, 40, strategy=TREES).stats
    assert stats.compile_seconds == 0
    assert {decision.chosen for decision in stats.plan} <= set(words)
    several = [Strategy(tree="chain:2"), Strategy(None), Strategy(tree="chain:2")]
    assert engine.warmup(several, prompt_tokens=18, max_new_tokens=40) == ["lookup chain:2", "autoregressive"]
    assert engine.generate(rows[:1], 40, strategy=several[0]).stats.compile_seconds == 0
    with pytest.raises(PromptError, match="strategy: got an empty list, expected at least one"):
        engine.warmup([], prompt_tokens=18)


def test_a_planner_and_no_speculation_contradict_each_other(engine):
    with pytest.raises(PromptError, match="speculate: got 'no', expected True or False"):
        engine.generate("x", speculate="no")
    with pytest.raises(PromptError, match="speculate: got False with a planner"):
        engine.generate(prompts(), 4, strategy="auto", speculate=False)
    with pytest.raises(PromptError, match="strategy: got 'best', expected a Strategy, a Planner or 'auto'"):
        engine.generate(prompts(), 4, strategy="best")
    with pytest.raises(ValueError, match="max_kl: got 0.1 in precision 'exact'"):
        engine.generate(prompts(), 4, strategy="auto", max_kl=0.1)


def test_watchers_and_drafters_must_fit():
    model = DraftModel("another", config=CONFIG)
    with pytest.raises(ValueError, match=r"watchers\[0\]: got lookup, expected a drafter with a state"):
        Watching(None, (PromptLookup(),))
    with pytest.raises(ValueError, match="drafter: got model:another, expected its model:another among the watchers"):
        Watching(model, ())
    assert str(Watching(model, (model,))) == "model:another"
