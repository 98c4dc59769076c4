"""The profile: its file, what is measured into it, and the costs that come out of it."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from reference_params import random_params, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers

from specsa_jax import Engine, Strategy, checkpoints
from specsa_jax.calibration import Calibration, CalibrationError, edited
from specsa_jax.checkpoints.records import AtContext, Measurement, Text
from specsa_jax.cli import main
from specsa_jax.config import PRESETS
from specsa_jax.drafting import parse_tree
from specsa_jax.planning import measure, show
from specsa_jax.planning import steps as steps_module
from specsa_jax.planning.costs import Costs, interpolation_error
from specsa_jax.planning.overlap import overlaps
from specsa_jax.planning.profile import (
    DraftTime,
    Interpolation,
    Overlap,
    Point,
    PrefillTime,
    Prior,
    Profile,
    ProfileError,
    StepTime,
    default_path,
    load,
    read,
    save,
)
from specsa_jax.planning.steps import Fixed
from specsa_jax.schedule import Sharing

CONFIG = PRESETS["embedded"]
RATES = {"bandwidth": 4e10, "flops": 1e11, "overhead": 1e-6}
HERE = {"fingerprint": "abc", "device": "cpu"}


def profile(**fields):
    same = {"versions": {"jax": "0"}, "dtype": "float32", "implementation": "xla", "max_context": 8192}
    return Profile(**{**HERE, **same, **RATES, **fields})


def timed(point, seconds):
    return StepTime(point, seconds, 0.9 * seconds, 1.2 * seconds)


def grid():
    return [Point(b, c, t) for b in (1, 8) for c in (512, 2048, 8192) for t in (1, 3, 5, 9, 17, 33)]


@pytest.fixture
def full():
    """A profile with one of everything."""
    at = AtContext(512, 8, 512, 1.0, 0.1, 0.01, 0.2, 0.3, 0.9, 0.01, 0.8, 0.0, 0.01)
    text = Text("chance", 400, "00")
    sharing = Sharing("FSFSFS", False, 4, "shared")
    points = [*grid(), Point(1, 2048, 17, chain=False), Point(1, 2048, 5, sharing=sharing),
              Point(1, 8192, 5, precision="strict")]  # fmt: skip
    return profile(
        steps=tuple(timed(point, 1e-3 * point.batch * (5 + point.width)) for point in points),
        drafts=(DraftTime("lookup", "chain:4", 1, 2048, 1e-4), DraftTime("head", "best:16:6", 1, 2048, 2e-3)),
        prefills=(PrefillTime(1, 2048, 1.5),),
        priors=(Prior("lookup", "chain:2", "edit", 512, 10, (3, 0, 7), (5, 2, 3), 14),),
        overlaps=tuple(Overlap(layer, 2048, d, 0.9 - 0.1 * d, 0.5) for layer in range(6) for d in (1, 2)),
        measurements=(Measurement(sharing, 5, 0.95, "float32", text, (at,)),), text=text,
        interpolation=Interpolation(3, 0.01, 0.02, 0.03), seconds=12.5,
    )  # fmt: skip


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_profile_comes_back_as_it_was_kept(tmp_path, full):
    path = save(default_path(tmp_path, "NVIDIA H100 80GB HBM3"), full)
    assert path == tmp_path / "profile-nvidia-h100-80gb-hbm3.json"
    assert load(path, **HERE) == full
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_profile_of_another_model_device_or_engine_is_refused_with_the_reason(tmp_path, full):
    path = save(tmp_path / "profile.json", full)
    for changed, reason in (
        ({"fingerprint": "xyz"}, "another model.*abc.*expected xyz"),
        ({"device": "TPU v4"}, "device: got 'cpu', expected 'TPU v4'.*--allow-mismatch"),
        ({"dtype": "bfloat16"}, "dtype: got 'float32', expected 'bfloat16'"),
        ({"implementation": "pallas"}, "implementation: got 'xla', expected 'pallas'"),
    ):
        with pytest.raises(ProfileError, match=reason):
            load(path, **{**HERE, **changed})
        if "fingerprint" not in changed:
            assert load(path, **{**HERE, **changed}, allow_mismatch=True) == full
    with pytest.raises(ProfileError, match="another model"):
        load(path, fingerprint="xyz", device="cpu", allow_mismatch=True)


def test_a_damaged_file_is_refused_with_the_place_of_the_damage(tmp_path, full):
    path = save(tmp_path / "profile.json", full)
    text = path.read_text()
    values = json.loads(text)
    first = values["steps"][0]
    for broken, reason in (
        (text[: len(text) // 2], "truncated or damaged"),
        ("[]", "schema: got None, expected 2"),
        (json.dumps({**values, "schema": 1}), "schema: got 1, expected 2"),
        (json.dumps({**values, "more": 1}), "expected the fields fingerprint"),
        (json.dumps({n: v for n, v in values.items() if n != "drafts"}), "expected the fields"),
        (json.dumps({**values, "bandwidth": float("nan")}), "Profile.bandwidth: got nan, expected float"),
        (json.dumps({**values, "bandwidth": 0.0}), "Profile.bandwidth: got 0.0, expected above 0"),
        (json.dumps({**values, "implementation": "cuda"}), "implementation: got 'cuda', expected 'xla' or 'pallas'"),
        (json.dumps({**values, "steps": {}}), "Profile.steps: got {}, expected tuple"),
        (json.dumps({**values, "steps": [{**first, "low": 1e9}]}), "expected 0 < low <= seconds <= high"),
        (json.dumps({**values, "steps": [{**first, "point": {**first["point"], "width": 0}}]}), "width: got 0"),
        (json.dumps({**values, "steps": [{**first, "point": {**first["point"], "width": True}}]}),
         r"Profile.steps\[0\].point.width: got True, expected int"),
        (json.dumps({**values, "priors": [{**values["priors"][0], "steps": 11}]}), "add up to 11 steps"),
    ):  # fmt: skip
        path.write_text(broken)
        with pytest.raises(ProfileError, match=f"(?s)profile.json.*{reason}"):
            read(path)
    with pytest.raises(ProfileError, match="expected a readable file"):
        read(tmp_path / "absent.json")


def test_a_writer_that_is_killed_leaves_the_file_that_was_there(tmp_path, full, monkeypatch):
    path = save(tmp_path / "profile.json", full)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(path, profile())
    assert read(path) == full
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# Begins, for each line that it is given, a process that writes profiles over one until it is killed.
WRITERS = """
import dataclasses, itertools, os, sys
from pathlib import Path
from specsa_jax.planning.profile import read, save

path = Path(sys.argv[1])
first = read(path)
for _ in sys.stdin:
    pid = os.fork()
    if not pid:
        for digit in itertools.cycle("123456789"):
            save(path, dataclasses.replace(first, device=digit, versions={"long": digit * 10**6}))
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("ended", flush=True)
"""


def test_whenever_a_writer_is_killed_the_file_is_a_whole_one(tmp_path):
    """By SIGKILL at random moments, until 3 of them were in the middle of a write, which leaves its part beside."""
    path, random = save(tmp_path / "profile.json", profile()), np.random.default_rng(0)
    with subprocess.Popen([sys.executable, "-c", WRITERS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True, bufsize=1) as writers:  # fmt: skip
        for _ in range(100):
            print(file=writers.stdin)
            pid = int(writers.stdout.readline())
            time.sleep(random.uniform(0.0, 0.03))
            os.kill(pid, signal.SIGKILL)
            assert writers.stdout.readline() == "ended\n"
            found = read(path)
            assert found in (profile(), profile(device=found.device, versions={"long": found.device * 10**6}))
            if len(list(tmp_path.iterdir())) > 3:
                break
    assert len(list(tmp_path.iterdir())) > 3 and writers.returncode == 0 and found != profile()


# --- costs -----------------------------------------------------------------------------------------------------------


def counted(**changes):
    return Costs.from_bytes(CONFIG, "float32", **{**RATES, **changes})


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


def test_one_time_scales_what_is_counted():
    costs, one = counted(), Point(1, 2048, 5)
    scaled = Costs.from_profile(profile(steps=(timed(one, 3 * costs.step(one)),)), CONFIG)
    for point in (Point(1, 2048, 1), Point(8, 8192, 17)):
        np.testing.assert_allclose(scaled.step(point), 3 * costs.step(point), rtol=1e-6)


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint of a tiny model whose tokenizer has a word of letters for each of its 50 ids."""
    config = tiny_model()
    words = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(50)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    where = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return checkpoints.save(where, random_params(config, dtype=np.float32), config, tokenizer, {})


@pytest.fixture(scope="module")
def engine(directory):
    return Engine.from_pretrained(directory, implementation="xla", prefill_chunk=16)


@pytest.fixture(scope="module")
def text():
    return Calibration(np.random.default_rng(0).integers(50, size=3000).astype(np.int32), "chance")


SMALL = {"batches": (1,), "contexts": (64, 128), "drafters": (("self", ("chain:2",)), ("head", ("chain:2",)))}


@pytest.fixture
def stub(monkeypatch):
    """Tasks that take no time: three steps, the names of those done, and one at which something happens."""
    done, at = [], {}

    def task(width):
        def run():
            if width in at:
                at[width]()
            done.append(width)
            return {"steps": (timed(Point(1, 64, width), 1e-3 * width),)}

        return measure._Task(f"step {width}", ("step", Point(1, 64, width)), run)

    monkeypatch.setattr(measure._Bench, "tasks", lambda self: [task(width) for width in (1, 2, 3)])
    return done, at


def test_what_is_measured_is_not_measured_twice(engine, text, stub):
    done, _ = stub
    half, missing = measure.measure(engine, text, profile(steps=(timed(Point(1, 64, 2), 1.0),)), **SMALL)
    assert done == [1, 3] and len(half.steps) == 3 and half.steps[0].seconds == 1.0
    assert half.interpolation.points == 3 and half.seconds > 0
    again, _ = measure.measure(engine, text, half, **SMALL)
    assert done == [1, 3] and again == half


def test_a_spent_budget_begins_nothing_and_names_what_is_missing(engine, text, stub):
    done, _ = stub
    found, missing = measure.measure(engine, text, profile(), budget=0.0, **SMALL)
    assert done == [] and found.steps == ()
    assert missing[-3:] == ["step 1", "step 2", "step 3"]
    assert missing[0].startswith("drafter head: ")  # this checkpoint has none


def test_an_interrupted_measurement_keeps_what_was_measured(engine, text, stub, tmp_path):
    done, at = stub
    path = tmp_path / "profile.json"

    def interrupted():
        raise KeyboardInterrupt

    at[3] = interrupted
    with pytest.raises(KeyboardInterrupt):
        measure.measure(engine, text, profile(), keep=lambda found: save(path, found), **SMALL)
    kept = read(path)
    assert [s.point.width for s in kept.steps] == [1, 2]
    del at[3]
    whole, missing = measure.measure(engine, text, kept, **SMALL)
    assert done == [1, 2, 3] and len(whole.steps) == 3


def test_bad_axes_and_text_too_small_are_refused_before_any_work(engine, text):
    for changed, reason in (
        ({"batches": (0,)}, "batch: got .0., expected whole numbers from 1"),
        ({"contexts": (64, 1000)}, "context: got .64, 1000., expected whole numbers from 1 to 512"),
        ({"contexts": ()}, "context: got .., expected"),
        ({"drafters": (("nobody", ("chain:2",)),)}, "drafter: got 'nobody'"),
        ({"drafters": (("lookup", ("star:2",)),)}, "tree: got 'star:2'"),
    ):
        with pytest.raises(ValueError, match=reason):
            measure.measure(engine, text, profile(), **{**SMALL, **changed})
    with pytest.raises(CalibrationError, match="100 tokens of chance make . windows"):
        measure.measure(engine, Calibration(text.stream[:100], "chance"), profile(), **SMALL)


@pytest.mark.slow
def test_a_tiny_model_is_profiled_and_the_engine_finds_the_times_plausible(engine, text, monkeypatch):
    monkeypatch.setattr(measure, "WIDTHS", (1, 5))
    monkeypatch.setattr(measure, "CORNERS", (5,))
    monkeypatch.setattr(measure, "SCHEDULES", ("every:2",))
    monkeypatch.setattr(measure, "PRIOR_TOKENS", 32)
    monkeypatch.setattr(steps_module, "CALL_SECONDS", 0.01)
    axes = {"batches": (2,), "contexts": (128,), "drafters": (("self", ("chain:4",)),)}
    names = []
    found, missing = measure.measure(engine, text, measure.new_profile(engine, (128,)), **axes,
                                     progress=lambda done, total, name: names.append(name))  # fmt: skip
    named = [name for name in names if not name.startswith("compiling")]
    assert missing == [] and len(named) == len(set(named)) < len(names)
    assert found.fingerprint == engine.fingerprint and found.dtype == "float32" and found.text == text.text
    times = {s.point: s for s in found.steps}
    exact = {p.width: times[p].seconds for p in times if p.chain and p.precision == "exact" and p.sharing == Sharing()}
    assert set(exact) == {1, 5} and all(p.batch == 2 and p.context >= 128 for p in times)
    assert {p.width for p in times if p.precision == "strict" and p.context == 512} == {1, 5}
    assert Point(2, 128, 5, sharing=Sharing("FS")) in times
    # Drafting runs the model once for each token drafted.
    assert [d.tree for d in found.drafts] == ["chain:4"] and found.drafts[0].seconds > 0.5 * exact[1]
    assert [p.tokens for p in found.prefills] == [128] and found.prefills[0].seconds > exact[1]
    assert [p.text for p in found.priors] == ["continuation", "edit"]
    for prior in found.priors:  # 8 places
        assert 8 * 32 <= prior.steps + sum(n * count for n, count in enumerate(prior.accepted)) < 8 * (32 + 4)
    assert {o.layer for o in found.overlaps} == {0, 1} and 0 < min(o.shared for o in found.overlaps)
    assert [m.sharing.schedule for m in found.measurements] == ["FS"]
    assert found.interpolation.points == len(found.steps)
    again, missing = measure.measure(engine, text, found, **axes)
    assert again == found and missing == []


def test_a_timed_step_verifies_as_many_tokens_as_it_says(engine, text):
    """Nothing is timed in which the loop falls back to one token, or ends."""
    bench = measure._Bench(engine, text, (2,), (128,), ())
    for tree in ("chain:4", "best:8:2"):
        strategy = Strategy(Fixed(), tree)
        state, sampling = bench._filled(2, 128, strategy)
        arguments = (engine.params, state, sampling, jnp.int32(8))
        decode, _ = bench.timer.executable("decode", {"strategy": strategy}, *arguments, draft_params=())
        state, counts = decode(*arguments, draft_params=())
        assert int(counts.steps) == 8 and not np.asarray(state.done).any()
        assert int(counts.nodes) == 2 * 8 * strategy.template.nodes
        assert int(counts.drafted[strategy.template.depth]) == 16
        bench.held = ((2, 128, 16), state)  # what the next one goes on with, from the same place
    assert int(bench._filled(2, 128, Strategy(None))[0].known[0]) == 64 and bench.held is not None
    bench._filled(2, 64, Strategy(None))
    assert bench.held is None  # of other shapes


def test_what_a_call_takes_by_itself_is_no_part_of_a_step(monkeypatch):
    now = 0.0

    def steps(state, count):
        nonlocal now
        now += 3e-3 + 4e-4 * count
        return state + 1

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    seconds, calls = steps_module.timed(steps, 0, most=250)
    assert seconds == pytest.approx((4e-4,) * 3)
    assert calls > 5


def test_an_edit_is_a_copy_with_another_name(engine):
    ids = [1, 2, 1, 3, 4, 5]
    assert edited(engine.tokenizer, ids, 6) == [1, 2, 1, 3, 0, 2]  # the new name is no word of this tokenizer: 0
    with pytest.raises(CalibrationError, match="without a name"):
        edited(Tokenizer(models.WordLevel({"1": 0}, unk_token="1")), [0, 0, 0], 3)


def test_overlap_counts_blocks_that_both_queries_selected():
    nsa = dataclasses.replace(tiny_model().nsa, num_initial=1, num_local=1)
    # Two queries at positions 40 and 41, in block 5; forced: 0 and 5.
    one = np.array([[0, 1, 2, 5], [0, 1, 3, 5]])  # of four, the second query shares 0, 1, 5
    other = np.array([[0, 1, 5, -1], [0, 1, 2, 5]])
    selected = np.stack([one, other])[:, None, :, None]  # [layers, B, T, Hkv, n]
    found = list(overlaps(selected, 40, nsa))
    assert [(o.layer, o.distance) for o in found] == [(0, 1), (1, 1)]
    assert [o.shared for o in found] == [0.75, 0.75] and [o.free for o in found] == [0.5, 0.5]
    same = np.stack([one[:1].repeat(2, axis=0)])[:, None, :, None]
    assert [(o.shared, o.free) for o in overlaps(same, 40, nsa)] == [(1.0, 1.0)]


# --- pictures and the command ----------------------------------------------------------------------------------------


def test_expected_tokens_follow_the_law_of_acceptance():
    for a in (0.0, 0.5, 0.9):
        np.testing.assert_allclose(show.expected_tokens("chain:4", a), sum(a**n for n in range(5)))
    # Two children: the second catches half as much of what the first leaves.
    np.testing.assert_allclose(show.expected_tokens("2-1", 0.5), 1 + 0.625 + 0.625 * 0.5)
    # The likeliest: 0.8, 0.8², 0.8³, and so on, until a sibling is likelier.
    np.testing.assert_allclose(show.expected_tokens("best:3:3", 0.8), 1 + 0.8 + 0.64 + 0.512)
    assert show.expected_tokens("best:8:2", 0.3) > show.expected_tokens("chain:2", 0.3)


def test_drafts_win_where_enough_of_them_stands():
    trees = ("chain:2", "chain:8")
    best = show.best_trees(counted(), "lookup", trees, 1, (2048,), (0.0, 0.4, 0.97))
    assert best[0, 0] == len(trees)  # one token at a time
    assert best[2, 0] == 1


class PerToken:
    """A step takes 1 and 0.1 for each drafted token; drafts of the head 0.4."""

    def step(self, point):
        return 1.0 + 0.1 * (point.width - 1)

    def draft(self, drafter, *_):
        return 0.4 * (drafter == "head")


def test_of_all_drafters_the_one_wins_whose_drafts_are_worth_their_time():
    """Lookup, which costs nothing, has a draft in 9 of 10 steps, whose tokens stand with chance 0.3; the head always,
    with 0.7. Their log-odds are opposite, so a mean chance of 0.5 is that of the priors."""
    drafts = [("lookup", "chain:4"), ("head", "chain:2"), ("head", "chain:4")]
    rates, stood = {"lookup": 0.9, "head": 1.0}, {"lookup": 0.3, "head": 0.7}

    class Acceptance:
        def rate(self, drafter):
            return rates[drafter]

        def chances(self, drafter, tree, depth):
            return np.full(depth, stood[drafter])

    def best(mean, batch=1, among=drafts):
        return show.best_drafts(PerToken(), Acceptance(), among, batch, (512, 2048), mean).tolist()

    def expected(mean):
        odds = {name: mean / (1 - mean) * chance / (1 - chance) for name, chance in stood.items()}
        lookup, head = (odds[name] / (1 + odds[name]) for name in ("lookup", "head"))
        tokens = [1 + 0.9 * sum(lookup**n for n in range(1, 5)), *(sum(head**n for n in range(k)) for k in (3, 5)), 1]
        return int(np.argmax(np.array(tokens) / [0.9 * 1.4 + 0.1, 1.2 + 0.4, 1.4 + 0.4, 1.0]))

    means = (0.05, 0.3, 0.6, 0.8, 0.97)
    assert best(means) == [[expected(mean)] * 2 for mean in means]
    assert {expected(mean) for mean in means} == {0, 1, 2, 3}
    # In a batch of many somebody always has a draft, so that each step takes its whole time.
    rates["lookup"] = 0.5
    assert [best((0.4,), batch, drafts[:1])[0][0] for batch in (1, 99)] == [0, 1]


def test_the_page_is_whole_by_itself(tmp_path, full):
    page, *pictures = show.write(full, CONFIG, tmp_path / "profile.html")
    text = page.read_text()
    names = ("steps", "regions", "winners", "overlap")
    assert {path.name for path in pictures} == {f"profile-{name}.png" for name in names}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert text.count("data:image/png;base64,") == 4
    assert not re.search(r"<script|<link|(src|href)\s*=\s*[\"'](?!data:)|@import|url\(", text)
    assert "FSFSFS" in text and "relative error 1.0% median" in text
    show.write(dataclasses.replace(full, overlaps=(), drafts=(), priors=()), CONFIG, tmp_path / "few.html")
    assert {path.name for path in tmp_path.glob("few-*")} == {"few-steps.png", "few-regions.png"}
    assert "Not measured." in (tmp_path / "few.html").read_text()


@pytest.fixture
def specsa(monkeypatch, capsys):
    """Runs a command: exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["specsa", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        with pytest.raises(SystemExit) as stopped:
            main()
        return (stopped.value.code or 0, *capsys.readouterr())

    return run


def test_the_command_measures_goes_on_and_draws(specsa, directory, tmp_path, stub):
    done, at = stub
    (tmp_path / "text.py").write_text(" ".join(f"word{chr(97 + i % 2)}{chr(97 + i % 26)}" for i in range(2000)))
    path = default_path(directory, "cpu")
    common = ["profile", directory, "--data", tmp_path, "--context", 64, "--json"]
    at[3] = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    code, out, err = specsa(*common)
    assert code == 130 and out == "" and "the same command goes on" in err
    assert [s.point.width for s in read(path).steps] == [1, 2]
    at.clear()
    code, out, err = specsa(*common)
    report = json.loads(out)
    assert code == 0 and report["steps"] == 3 and report["profile"] == str(path) and done == [1, 2, 3]
    assert "relative error" in err and "drafter head: " in " ".join(report["missing"])
    code, out, err = specsa("profile", directory, "--show", tmp_path / "page.html", "--json")
    assert code == 0 and (tmp_path / "page.html").exists() and (tmp_path / "page-steps.png").exists()
    # Another device's is not added to, nor drawn unless that is wanted.
    save(path, dataclasses.replace(read(path), device="TPU v4"))
    code, _, err = specsa(*common)
    assert code == 2 and "device: got 'TPU v4', expected 'cpu'" in err
    assert specsa("profile", directory, "--show", tmp_path / "page.html")[0] == 2
    assert specsa("profile", directory, "--show", tmp_path / "page.html", "--allow-mismatch")[0] == 0
    save(path, dataclasses.replace(read(path), device="cpu", dtype="bfloat16"))
    code, _, err = specsa(*common)
    assert code == 2 and "dtype: got bfloat16, expected float32" in err
    path.write_text("{")
    assert specsa(*common)[0] == 2
    code, out, err = specsa(*common, "--again")
    assert code == 0 and json.loads(out)["steps"] == 3
    path.unlink()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--budget", "-1"], "budget: got -1.0, expected seconds"),
        (["--budget", "nan"], "budget: got nan, expected seconds"),
        (["--allow-mismatch"], "allow_mismatch: got it without --show"),
        (["--show", "page.pdf"], "show: got 'page.pdf', expected a path that ends in .html"),
    ],
)
def test_bad_options_end_with_one_line(specsa, options, reason):
    code, out, err = specsa("profile", "embedded", *options)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and reason in err
