"""What a planner may choose from, and the engine under it."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import SlopeCosts, histogram, plan_depth
from reference_params import random_params, random_tokens, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from specsa_jax import Engine, PromptError, PromptLookup, Strategy
from specsa_jax.admission import Bound
from specsa_jax.checkpoints import records
from specsa_jax.drafting import DraftModel
from specsa_jax.drafting.watching import Watching
from specsa_jax.planning import plan as plans
from specsa_jax.planning import space
from specsa_jax.planning.costs import Costs
from specsa_jax.planning.plan import Plan
from specsa_jax.planning.planner import Candidate, Planner, cheapest
from specsa_jax.planning.profile import Point, Prior, Profile, StepTime
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
    return tiny_engine()


@given(profile=profiles(), precision=st.sampled_from(["exact", "strict"]), pallas=st.booleans())
def test_no_profile_makes_a_lossless_class_choose_an_approximation(engine, profile, precision, pallas):

    engine.__dict__["profile"], engine.__dict__["costs"] = profile, Costs.from_profile(profile, CONFIG)
    found = engine.space(Planner(precision), Bound(), 160)
    for candidate in found.candidates:
        sharings = found.sharings_of(candidate.strategy)
        strategy = cheapest(candidate.strategy, sharings, engine.costs, 1, 160)
        assert strategy.precision == precision and strategy.acceptance == "coupled"
        assert not strategy.sharing(CONFIG.layers).approximates


def test_class_approx_chooses_among_what_the_bound_admits(engine):
    class Cheap(SlopeCosts):
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
