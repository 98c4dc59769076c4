"""What a planner may choose from, and the engine under it."""

import dataclasses
import functools
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import SlopeCosts, histogram, plan_depth
from reference_params import random_params, random_tokens, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from specsa_jax import Engine, PrecisionError, PromptError, PromptLookup, SamplingParams, Strategy, reading
from specsa_jax.admission import Bound
from specsa_jax.checkpoints import records
from specsa_jax.decoding import Counts
from specsa_jax.drafting import DraftModel
from specsa_jax.drafting.watching import Watching
from specsa_jax.planning import plan as plans
from specsa_jax.planning import space
from specsa_jax.planning.costs import Costs
from specsa_jax.planning.plan import Plan
from specsa_jax.planning.planner import Candidate, Planner, cheapest, watching
from specsa_jax.planning.predict import Acceptance
from specsa_jax.planning.profile import Point, Prior, Profile, StepTime
from specsa_jax.reading import Reader
from specsa_jax.schedule import Sharing

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
    return tiny_engine(dtype="float32")


def holding(engine, measurements, costs, profile=None, implementation="xla"):
    """The engine, as if all this had been found of its model."""
    engine._records = None, records.Records(engine.fingerprint, tuple(measurements))
    engine.__dict__ |= {"costs": costs, "profile": profile}
    engine.implementation = implementation
    engine._candidates.clear()
    engine._spaces.clear()


ROUNDS = st.lists(st.tuples(st.integers(0, 17), st.floats(1e-5, 1e-1)), min_size=4, max_size=8)


def planned(found, costs, rounds):
    """All strategies that a plan of a space has to choose from, and those that it chooses, while in the steps of each
    segment so many drafted tokens stand, and they take so many seconds."""
    row = random_tokens(CONFIG, 12, seed=1).tolist() * 2
    plan = found.plan(
        costs, Acceptance(), [np.asarray(row, np.int32)], 1000, context=160, layers=CONFIG.layers,
        compiled=lambda strategy: True, compile_seconds=1.0,
    )  # fmt: skip
    seen, chosen = {candidate.strategy for candidate in plan.candidates}, [plan.strategy]
    for stood, seconds in rounds:
        steps, depth = plan.steps_left, plan.strategy.reach - 1
        drafted, accepted = (steps * np.eye(depth + 1, dtype=int)[min(n, depth)] for n in (depth, stood))
        counts = Counts(np.array(steps), drafted, accepted, np.array(steps * depth))
        plan.observe(counts, steps * seconds, steps * (1 + min(stood, depth)), 1, 1000)
        chosen.append(plan.strategy)
    return seen, chosen


@settings(max_examples=50)
@given(profile=profiles(), precision=st.sampled_from(["exact", "strict"]), pallas=st.booleans(), rounds=ROUNDS)
def test_no_profile_makes_a_lossless_class_choose_an_approximation(engine, profile, precision, pallas, rounds):
    """Nor do measurements, however little diverges."""
    measured = [measurement("FS", 0.0), measurement("", 0.0, shared=4, width=5)]
    holding(engine, measured, Costs.from_profile(profile, CONFIG), profile, "pallas" if pallas else "xla")
    found = engine.space(Planner(precision), Bound(), 160)
    groups = {Sharing(), Sharing(group=2)} if pallas and precision == "exact" else {Sharing()}
    assert set(found.sharings) == groups and found.admitted == []
    for candidate in found.candidates:
        assert set(found.sharings_of(candidate.strategy)) <= groups
    seen, chosen = planned(found, engine.costs, rounds)
    assert len(seen) >= 3
    for strategy in seen | set(chosen):
        assert strategy.precision == precision and strategy.acceptance == "coupled"
        assert not strategy.sharing(CONFIG.layers).approximates


class Cheap(SlopeCosts):
    """Approximate steps take half of the time."""

    def step(self, point):
        return super().step(point) / (2 if point.sharing.approximates else 1)


def test_nothing_is_in_the_space_nor_chosen_but_what_the_bound_admits(engine):
    """A fuzz of records, bounds and requests: each approximation was measured in the engine's dtype, far enough, and
    inside the bound at every context length; and all that were are considered."""
    random, outcomes = np.random.default_rng(0), set()
    shared = [Sharing(group=group, group_mode="shared") for group in (2, 4)]
    kinds = [(Sharing("FS"), 0), (Sharing("FS", False), 0), (shared[0], 3), (shared[0], 5), (shared[1], 5)]
    planner = Planner("approx", (("lookup", ("chain:2", "chain:4")),))

    def fuzzed(sharing, width, dtype):
        contexts = tuple(
            records.AtContext(context, 8, 80, 2.0, 0.0, 0.0, kl, kl, 1.0, 0.0, top1, 0.0, 0.0)
            for context, kl, top1 in zip(random.integers(50, 200, 2).tolist(), random.exponential(0.01, 2),
                                         random.uniform(0.9, 1.0, 2), strict=True)
        )  # fmt: skip
        return records.Measurement(sharing, width, 0.95, dtype, records.Text("a text", 4096, "0" * 64), contexts)

    def kind(sharing, width):
        return (sharing, width if sharing.group_mode == "shared" else 0) if sharing.approximates else "exact"

    for _ in range(30):
        held = [fuzzed(*one, dtype) for dtype in ("bfloat16", "float32") for one in kinds if random.random() < 0.7]
        holding(engine, held, Cheap(0.1))
        for _ in range(4):
            max_kl = [None, math.inf, *random.exponential(0.02, 3)][random.integers(5)]
            min_top1 = [None, None, *random.uniform(0.9, 1.0, 2)][random.integers(4)]
            reach = int(random.integers(50, 200))
            inside = [
                m for m in held if (max_kl, min_top1) != (None, None) and m.dtype == "float32"
                and all(max_kl is None or at.mean_kl_bound <= max_kl for at in m.contexts)
                and all(min_top1 is None or at.top1_bound >= min_top1 for at in m.contexts)
                and any(at.context + 10 >= reach for at in m.contexts)
            ]  # fmt: skip
            found = engine.space(planner, Bound(max_kl, min_top1), reach)
            assert found.sharings == [Sharing()] and found.admitted == inside
            allowed = {"exact"} | {(m.sharing, m.width) for m in inside}
            for one in found.candidates:
                assert {kind(sharing, one.strategy.width) for sharing in found.sharings_of(one.strategy)} <= allowed
            rounds = zip(random.integers(0, 6, 4).tolist(), random.uniform(0.1, 3.0, 4), strict=True)
            seen, chosen = planned(found, engine.costs, rounds)
            for strategies in (seen, chosen):
                used = {kind(one.sharing(CONFIG.layers), one.width) for one in strategies}
                assert used <= allowed
            outcomes |= used
    assert outcomes >= {"exact", *kinds[:1]} and len(outcomes) >= 4


def test_class_approx_chooses_among_what_the_bound_admits():
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
def test_tokens_do_not_depend_on_switches_and_each_strategy_is_traced_once(restless, guarded):
    """And nothing crosses between host and device inside a segment."""
    engine = tiny_engine(ONE, precision="strict")
    plain = engine.generate(prompts(), 40, temperature=0.8, seed=5, speculate=False)
    for _ in range(2):
        planned = engine.generate(prompts(), 40, temperature=0.8, seed=5, strategy=TREES)
        assert len({decision.chosen for decision in planned.stats.plan}) == 3
        for a, b in zip(plain, planned, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist() and a.logprobs.tobytes() == b.logprobs.tobytes()
    decoded = {strategy: count for strategy, count in engine.decoder.traces.items() if isinstance(strategy, Strategy)}
    assert len(decoded) == 3 and set(decoded.values()) == {1} and guarded == set(decoded)
    assert planned.stats.compile_seconds == 0 and planned.stats.new_tokens == 80
    assert sum(decision.observed_steps for decision in planned.stats.plan) == planned.stats.steps


MODEL = DraftModel("the same", config=ONE)
STATEFUL = [
    Candidate("none", Strategy(None)), Candidate("lookup", Strategy(PromptLookup(min_ngram=1), "chain:2")),
    Candidate("model", Strategy(MODEL, "chain:2")),
]  # fmt: skip


def test_nobody_watches_who_costs_more_to_be_shown_a_prompt_than_drafting_is_worth():
    costs = SlopeCosts(0.1)

    def watchers(seconds, new_tokens):
        costs.watching = lambda batch, tokens: seconds
        return Plan(Planner(), STATEFUL, costs, Acceptance(), batch=1, context=64, layers=1, compiled=lambda _: True,
                    compile_seconds=0.0, new_tokens=new_tokens).watchers  # fmt: skip

    assert watchers(0.0, 100) == (MODEL,) == watchers(50.0, 10_000)
    assert watchers(50.0, 100) == ()


@pytest.mark.parametrize("first", STATEFUL)
def test_contenders_are_of_those_that_watched_at_first_though_the_choice_may_be_another(first, monkeypatch):
    costs = SlopeCosts(0.1)
    costs.draft = lambda name, *rest: 100.0 * (name != first.drafter)
    plan = Plan(Planner(switch=False), STATEFUL, costs, Acceptance(), batch=1, context=64, layers=1,
                compiled=lambda _: True, compile_seconds=0.0, new_tokens=100, watchers=(MODEL,))  # fmt: skip
    assert plan.strategy.tree == first.strategy.tree
    assert {plan.words[one].split(" ")[0].rstrip(",") for one in plan.contenders()} >= {"lookup", "model"}


def test_a_profile_names_no_code_and_nothing_that_is_not_there(tmp_path, monkeypatch):
    """Its drafters that are classes by their path, or heads that the checkpoint lacks, are left out; those that a
    user names are not."""
    (tmp_path / "told.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    priors = [Prior(name, "chain:2", "edit", 64, 2, (0, 0, 2), (0, 0, 2), 4) for name in ("told:Drafter", "head")]
    priors += [Prior("lookup", tree, "edit", 64, 2, (0, 0, 2), (0, 0, 2), 4) for tree in ("chain:2", "chain:100")]
    point = Point(1, 160, 1)
    profile = Profile("model", "cpu", {}, "float32", "xla", 160, 1e10, 1e11, 1e-6, (StepTime(point, 1.0, 1.0, 1.0),),
                      (), (), tuple(priors), (), ())  # fmt: skip
    engine = tiny_engine(ONE, profile=profile)
    assert {one.drafter for one in engine.space(Planner()).candidates} == {"none", "lookup"}
    assert "told" not in sys.modules
    with pytest.raises(ValueError, match="drafter: head"):
        engine.space(Planner(drafters=(("head", ("chain:2",)),)))


@pytest.fixture
def drafting_for_itself(monkeypatch):
    """An engine whose target may draft for itself, as a draft model."""
    monkeypatch.setattr(plans, "_WORTH_WATCHING", 0.0)  # lookup's replay promises more
    engine = tiny_engine(ONE)
    engine._draft_params[MODEL] = engine.params
    found = space.Space(Planner(), STATEFUL, [Sharing()], [])
    engine.space, engine.__dict__["costs"] = lambda *args: found, SlopeCosts(0.1)
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
@pytest.mark.long
def test_watching_ends_where_it_is_not_worth_its_time(drafting_for_itself, guarded, monkeypatch):
    """Decoding goes on with the programs of a call in which nobody ever watched, and with the same tokens. Nothing
    crosses between host and device inside a segment, while somebody watches and after."""
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
    assert {isinstance(one.drafter, Watching) for one in guarded} == {True, False}


@pytest.mark.slow
def test_a_call_is_planned_while_its_prompts_are_read(drafting_for_itself, monkeypatch):
    """As soon as it is known who watched in such a call before; if others are to watch, reading begins anew. What a
    plan takes is counted once, or not at all while the device is busy."""
    engine, events, states = drafting_for_itself, [], []
    alone = engine.generate(prompts(1), 50, strategy=STATEFUL[1].strategy)
    start, plan = Reader.start, engine._plan

    def counted_start(self, observer):
        events.append(len(observer.watchers))
        initial = self._initial

        def again():
            states.append(1)
            return initial()

        self._initial = again
        start(self, observer)
        self._initial = initial

    def slow_plan(*arguments, **options):
        events.append("plan")
        course = plan(*arguments, **options)
        course.seconds = 1000.0
        return course

    monkeypatch.setattr(Reader, "start", counted_start)
    monkeypatch.setattr(engine, "_plan", slow_plan)

    def call(busy=True, **options):
        monkeypatch.setattr(Reader, "is_busy", busy)
        events.clear()
        states.clear()
        result = engine.generate(prompts(1), 50, strategy="auto", **options)
        if not options:
            assert result[0].tokens.tolist() == alone[0].tokens.tolist()
        return events, result.stats.planning_seconds, result.stats.prefill_seconds

    seen, planning, reading = call()
    assert seen == ["plan", 1] and planning >= 1000 and 0 < reading < 500  # nothing was known: one after the other
    seen, planning, reading = call()
    assert seen == [1, "plan"] and 0 < planning < 500 and 0 < reading < 500
    seen, planning, reading = call(busy=False)
    assert seen == [1, "plan"] and planning >= 1000 and planning + reading < 500  # as reading took no such time here
    assert call(temperature=0.8)[0] == ["plan", 1]  # others may be worth watching where tokens are drawn
    monkeypatch.setattr(plans, "_WORTH_WATCHING", math.inf)
    seen, planning, reading = call()
    assert seen == [1, "plan", 0] and 0 < planning < 500 and 0 < reading < 500
    assert len(states) == 0  # it went on with what was read
    seen, planning, reading = call()
    assert seen == [0, "plan"] and 0 < planning < 500 and 0 < reading < 500
    monkeypatch.setattr(plans, "_WORTH_WATCHING", 0.0)
    seen, planning, reading = call()
    assert seen == [0, "plan", 1] and planning >= 1000 and planning + reading < 500
    assert len(states) == 1  # what was read had not been shown


@pytest.mark.slow
def test_a_reader_goes_on_without_a_watcher_in_the_middle_and_begins_anew_with_one(drafting_for_itself, monkeypatch):
    engine = drafting_for_itself
    monkeypatch.setattr(reading, "_TOKENS", {"cpu": 16})
    engine.prefill_chunk = 16
    rows = [random_tokens(ONE, 90, seed=2)]
    pages, _ = engine.plan_pages(rows, 8, watching(STATEFUL[0].strategy, (MODEL,)))

    def read(*observers):
        reader, calls = Reader(engine, rows, pages, 8, "exact"), []
        for watchers in observers:
            reader.start(Watching(None, watchers))
            send = reader._send
            reader._send = lambda state, send=send: (calls.append(1), send(state))
        state = reader.finish()
        assert not jax.tree.leaves(reader.__dict__.get("state", ())) and reader.seconds > 0
        return jax.tree.map(np.asarray, (state.cache, state.known)), state.draft, len(calls)

    plain, nothing, several = read(())
    assert several == 4 and nothing == ()  # of six pieces two are sent at once
    shown, own, _ = read((MODEL,))
    for found, draft, _ in (read((MODEL,), ()), read((), (MODEL,))):
        jax.tree.map(np.testing.assert_array_equal, found, plain)
        assert draft == () or all(map(np.array_equal, jax.tree.leaves(draft), jax.tree.leaves(own)))
    jax.tree.map(np.testing.assert_array_equal, shown, plain)


def test_a_reader_is_busy_until_what_it_sent_is_ready():
    engine = tiny_engine(ONE)
    rows = [np.asarray(row, np.int32) for row in prompts(1)]
    reader = Reader(engine, rows, engine.plan_pages(rows, 8, Strategy(None))[0], 8, "exact")

    class Lengths:
        ready = False

        def is_ready(self):
            return self.ready

    lengths = Lengths()
    reader.state = reader.state._replace(cache=reader.state.cache._replace(lengths=lengths))
    assert reader.is_busy
    lengths.ready = True
    assert not reader.is_busy


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
@pytest.mark.long
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


@pytest.mark.slow
def test_a_planned_call_decodes_by_what_the_bound_admits_and_nothing_else():
    """The embedded model, by its own records; reuse pays, and drafts do not."""

    class Reusing(SlopeCosts):
        def step(self, point):
            return super().step(point) / (1 + point.sharing.schedule.count("S"))

    engine = Engine.from_pretrained("embedded", dtype="float32", implementation="xla", precision="approx")
    engine.__dict__["costs"] = Reusing(10.0)
    asked, space_of = [], engine.space
    engine.space = lambda *args: asked.append(space_of(*args)) or asked[-1]
    stored = sorted((m for m in engine.records.measurements if not m.width), key=lambda m: m.mean_kl)
    limit, worst, inside = stored[3], stored[-1], {m.sharing for m in stored[:4]}
    max_kl = 1.001 * limit.mean_kl
    prompt = [engine.tokenizer.encode(Path(plans.__file__).read_text(encoding="utf-8")).ids[:140]]
    stats = engine.generate(prompt, 16, strategy="auto", max_kl=max_kl).stats
    ran = {one.sharing(engine.config.layers) for one in engine.decoder.traces if isinstance(one, Strategy)}
    assert ran and ran <= inside
    options = {option.strategy.split("approx ")[1] for decision in stats.plan for option in decision.options}
    assert {words.split()[0] for words in options} <= {sharing.schedule for sharing in inside}
    engine.stream(prompt, limit.reach - 139, strategy="auto", max_kl=max_kl)  # a token further than was measured
    assert [bool(found.admitted) for found in asked] == [True, False]
    refused = Strategy(None, precision="approx", schedule=worst.sharing.schedule,
                       keep_compressed=worst.sharing.keep_compressed)  # fmt: skip
    with pytest.raises(PrecisionError, match=f"outside max_kl = .*; the nearest that can: {limit.describe()} "):
        engine.generate(prompt, 16, strategy=refused, max_kl=max_kl)


def test_a_planner_and_no_speculation_contradict_each_other(engine):
    with pytest.raises(PromptError, match="speculate: got 'no', expected True or False"):
        engine.generate("x", speculate="no")
    with pytest.raises(PromptError, match="speculate: got False with a planner"):
        engine.generate(prompts(), 4, strategy="auto", speculate=False)
    with pytest.raises(PromptError, match="strategy: got 'best', expected a Strategy, a Planner or 'auto'"):
        engine.generate(prompts(), 4, strategy="best")
    with pytest.raises(ValueError, match="max_kl: got 0.1 in precision 'exact'"):
        engine.generate(prompts(), 4, strategy="auto", max_kl=0.1)


def test_a_profile_without_step_times_gives_costs_counted_from_its_rates():
    """What a budget of nothing leaves, in a file or as the checkpoint's own."""
    fields = {"fingerprint": "x", "device": "cpu", "versions": {}, "dtype": "float32", "implementation": "xla"}
    empty = Profile(**fields, max_context=160, bandwidth=1e10, flops=1e11, overhead=1e-6)
    engine = tiny_engine(profile=empty)
    counted = Costs.from_bytes(CONFIG, "float32", 1e10, 1e11, 1e-6)
    assert not engine.costs.measured and engine.costs.step(Point(1, 64, 5)) == counted.step(Point(1, 64, 5))
    assert len(engine.space(TREES).candidates) == 3


def test_watchers_and_drafters_must_fit():
    model = DraftModel("another", config=CONFIG)
    with pytest.raises(ValueError, match=r"watchers\[0\]: got lookup, expected a drafter with a state"):
        Watching(None, (PromptLookup(),))
    with pytest.raises(ValueError, match="drafter: got model:another, expected its model:another among the watchers"):
        Watching(model, ())
    assert str(Watching(model, (model,))) == "model:another"


def test_prompts_of_near_lengths_are_planned_by_the_same_costs(monkeypatch):
    """Or each length would be priced anew, and kept."""
    engine, contexts = tiny_engine(), set()
    monkeypatch.setattr(space.Space, "plan", lambda self, *args, context, **call: contexts.add(context))
    found, calls = engine.space(Planner()), []
    for length in (97, 99, 104):
        rows = [np.zeros(length, np.int32)]
        pages, _ = engine.plan_pages(rows, 8, found.largest)
        calls.append((rows, jax.eval_shape(functools.partial(engine.initial_state, rows, pages, 8))))
    engine.implementation = "pallas"  # XLA's path goes by what a page table has room for
    for rows, state in calls:
        engine._plan(found, rows, 8, state)
    assert contexts == {104}


def test_a_plan_knows_whether_most_of_a_batch_samples(monkeypatch):
    class Asked(Exception):
        pass

    def plan(self, *arguments, drawn, **options):
        raise Asked(drawn)

    monkeypatch.setattr(space.Space, "plan", plan)
    engine = tiny_engine()
    rows = [random_tokens(CONFIG, 12, seed=seed).tolist() for seed in range(3)]
    for temperatures, drawn in (((0.0, 0.0, 0.0), False), ((0.7, 0.0, 0.0), False), ((0.7, 0.0, 0.3), True)):
        sampling = [SamplingParams(temperature=temperature) for temperature in temperatures]
        with pytest.raises(Asked) as caught:
            engine.generate(rows, 4, strategy="auto", sampling=sampling)
        assert caught.value.args == (drawn,)
