"""What is measured into a profile, and the command that does it."""

import copy
import dataclasses
import io
import json
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from profiles import profile, timed
from reference_params import save_tiny, tiny_model
from tokenizers import Tokenizer, models

from specsa_jax import Engine, Strategy, calibration
from specsa_jax.calibration import Calibration, CalibrationError, edited
from specsa_jax.cli import main
from specsa_jax.planning import bench, measure
from specsa_jax.planning import steps as steps_module
from specsa_jax.planning.bench import Bench, Task
from specsa_jax.planning.overlap import overlaps
from specsa_jax.planning.profile import (
    Point,
    default_path,
    read,
    save,
)
from specsa_jax.planning.steps import Fixed
from specsa_jax.schedule import Sharing


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Of a tiny model whose words are of letters."""
    words = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(50)]
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", tiny_model(), words)


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

        return Task(f"step {width}", ("step", Point(1, 64, width)), run)

    monkeypatch.setattr(measure, "tasks", lambda bench: [task(width) for width in (1, 2, 3)])
    return done, at


def test_what_is_measured_is_not_measured_twice(engine, text, stub):
    done, _ = stub
    half, missing = measure.measure(engine, text, profile(steps=(timed(Point(1, 64, 2), 1.0),)), **SMALL)
    assert done == [1, 3] and len(half.steps) == 3 and half.steps[0].seconds == 1.0
    assert half.interpolation.points == 3 and half.seconds > 0
    again, _ = measure.measure(engine, text, half, **SMALL)
    assert done == [1, 3] and again == half


def test_measured_anew_is_what_there_is_time_for_and_the_rest_stays(engine, text, stub, monkeypatch):
    done, at = stub
    monkeypatch.setattr(measure, "measure_bandwidth", lambda dtype: (1.0, 2.0, 0.5))
    before = profile(steps=tuple(timed(Point(1, 64, width), 1.0) for width in (1, 2, 5)))
    untouched, _ = measure.measure(engine, text, before, again=True, budget=0.0, **SMALL)
    assert untouched == before
    found, _ = measure.measure(engine, text, before, again=True, **SMALL)
    assert done == [1, 2, 3]
    assert {s.point.width: s.seconds for s in found.steps} == {1: 1e-3, 2: 2e-3, 3: 3e-3, 5: 1.0}


def test_a_spent_budget_begins_nothing_and_names_what_is_missing(engine, text, stub):
    done, _ = stub
    told = []
    found, missing = measure.measure(
        engine, text, profile(), budget=0.0, progress=lambda *state: told.append(state), **SMALL
    )
    assert done == [] and found.steps == () and told == [(0, 3, "")]  # of three nothing is done, and nothing goes on
    assert missing[-3:] == ["step 1", "step 2", "step 3"]
    assert missing[0].startswith("drafter head: ")  # this checkpoint has none


def test_of_programs_that_are_compiled_a_budget_has_to_hold_the_runs_alone(engine, text, stub, monkeypatch):
    """By a clock on which three programs take 40 s and each run 1 s."""
    done, at = stub
    now = 0.0

    def passes(seconds):
        nonlocal now
        now += seconds

    stubs = measure.tasks(None)
    monkeypatch.setattr(measure, "tasks", lambda bench: [task._replace(compile=int) for task in stubs])
    monkeypatch.setattr(measure, "_compile", lambda tasks: passes(40.0) or 40.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(measure, "_cores", lambda: 4)
    at |= dict.fromkeys((1, 2, 3), lambda: passes(1.0))
    _, missing = measure.measure(engine, text, profile(), budget=39.0, **SMALL)
    assert done == [] and missing[1:] == ["step 1", "step 2", "step 3"]  # compiling took all of it
    found, missing = measure.measure(engine, text, profile(), budget=44.0, **SMALL)
    assert done == [1, 2, 3] and missing[1:] == [] and found.seconds == pytest.approx(43.0)


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


def test_bad_axes_and_text_too_small_are_refused_before_any_work(engine, text, monkeypatch):
    monkeypatch.setattr(measure, "measure_bandwidth", None)  # which takes long
    for changed, reason in (
        ({"batches": (0,)}, "batch: got .0., expected whole numbers from 1"),
        ({"contexts": (64, 1000)}, "context: got .64, 1000., expected whole numbers from 1 to 512"),
        ({"contexts": ()}, "context: got .., expected"),
        ({"drafters": (("nobody", ("chain:2",)),)}, "drafter: got 'nobody'"),
        ({"drafters": (("lookup", ("star:2",)),)}, "tree: got 'star:2'"),
    ):
        with pytest.raises(ValueError, match=reason):
            measure.measure(engine, text, **{**SMALL, **changed})
    with pytest.raises(CalibrationError, match="100 tokens of chance make . windows"):
        measure.measure(engine, Calibration(text.stream[:100], "chance"), **SMALL)


@pytest.mark.slow
@pytest.mark.long
def test_a_tiny_model_is_profiled_and_the_engine_finds_the_times_plausible(engine, text, monkeypatch):
    monkeypatch.setattr(measure, "WIDTHS", (1, 5))
    monkeypatch.setattr(measure, "CORNERS", (5,))
    monkeypatch.setattr(measure, "SCHEDULES", ("every:2",))
    monkeypatch.setattr(bench, "PRIOR_TOKENS", 32)
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


@pytest.mark.slow
@pytest.mark.long
def test_a_timed_step_verifies_as_many_tokens_as_it_says(engine, text):
    """Nothing is timed in which the loop falls back to one token, or ends."""
    timer = Bench(engine, text, (2,), (128,), ())
    for tree in ("chain:4", "best:8:2"):
        strategy = Strategy(Fixed(), tree)
        state, sampling = timer._filled(2, 128, strategy)
        arguments = (engine.params, state, sampling, jnp.int32(8))
        decode, _ = timer.timer.executable("decode", {"strategy": strategy}, *arguments, draft_params=())
        state, counts = decode(*arguments, draft_params=())
        assert int(counts.steps) == 8 and not np.asarray(state.done).any()
        assert int(counts.nodes) == 2 * 8 * strategy.template.nodes
        assert int(counts.drafted[strategy.template.depth]) == 16
        timer.held = ((2, 128, 16), state)  # what the next one goes on with, from the same place
    assert int(timer._filled(2, 128, Strategy(None))[0].known[0]) == 64 and timer.held is not None
    timer._filled(2, 64, Strategy(None))
    assert timer.held is None  # of other shapes


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
    # Measured anew, it is replaced as soon as something was measured.
    before = path.read_bytes()
    code, _, err = specsa(*common, "--again", "--budget", 0)
    assert code == 0 and path.read_bytes() == before and "nothing new to store" in err
    code, out, err = specsa(*common, "--again")
    assert code == 0 and json.loads(out)["steps"] == 3 and read(path).dtype == "float32"
    done.clear()
    assert specsa(*common, "--again", "--budget", 0)[0] == 0 and done == [] and len(read(path).steps) == 3
    # What is no profile stays.
    for other in ("{", "[]", "some notes"):
        path.write_text(other)
        assert specsa(*common)[0] == specsa(*common, "--again")[0] == 2
        assert path.read_text() == other
    path.unlink()


def test_the_command_stops_where_its_budget_is_spent_and_goes_on_with_the_rest(
    specsa, directory, tmp_path, stub, monkeypatch
):
    """By a clock on which loading the model takes 2 s, reading the text 5 s and each task 10 s."""
    done, at = stub
    now = 0.0

    def passes(seconds):
        nonlocal now
        now += seconds

    def read_calibration(*arguments):
        passes(5.0)
        return original(*arguments)

    def load(*arguments, **options):
        passes(2.0)
        return loaded(*arguments, **options)

    original, loaded = calibration.read_calibration, Engine.from_pretrained
    monkeypatch.setattr(calibration, "read_calibration", read_calibration)
    monkeypatch.setattr(Engine, "from_pretrained", load)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(measure, "measure_bandwidth", lambda dtype: (1.0, 2.0, 0.5))
    at |= dict.fromkeys((1, 2, 3), lambda: passes(10.0))
    (tmp_path / "text.py").write_text(" ".join(f"word{chr(97 + i % 2)}{chr(97 + i % 26)}" for i in range(2000)))
    path = tmp_path / "profile.json"
    command = ["profile", directory, "--data", tmp_path, "--context", 64, "--out", path, "--json"]
    # What would end behind the budget is not begun: the second task at 27 s, the third at 37 s.
    for budget, steps in ((26.9, [1]), (36.9, [1, 2])):
        path.unlink(missing_ok=True)
        done.clear()
        code, out, err = specsa(*command, "--budget", budget)
        kept, report = read(path), json.loads(out)
        assert code == 0 and done == [s.point.width for s in kept.steps] == steps, err
        assert report["steps"] == len(steps) and kept.seconds == 10.0 * len(steps)
        assert report["missing"][-3 + len(steps) :] == [f"step {width}" for width in (1, 2, 3) if width not in steps]
    code, out, err = specsa(*command, "--budget", 36.9)
    assert code == 0 and done == [1, 2, 3] and [s.point.width for s in read(path).steps] == [1, 2, 3], err
    assert read(path).seconds == 30.0 and "step" not in " ".join(json.loads(out)["missing"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--budget", "-1"], "budget: got -1.0, expected seconds"),
        (["--budget", "nan"], "budget: got nan, expected seconds"),
        (["--allow-mismatch"], "allow_mismatch: got it without --show"),
        (["--dtype", "float16"], "dtype: got 'float16', expected 'auto', 'float32' or 'bfloat16'"),
        (["--show", "page.pdf"], "show: got 'page.pdf', expected a path that ends in .html"),
        (["--show", "/missing/x.html"], "show: got '/missing/x.html', expected the path of a file in a directory"),
        (
            ["--show", "x.html", "--again", "--batch", 0, "--data", "/nosuch"],
            "batch, data, again: got a value with --sh",
        ),
        (["--again", "--out", "/"], "out: got '/', expected the path of a file in a directory"),
        (["--out", "/missing/x.json"], "out: got '/missing/x.json', expected the path of a file in a directory"),
    ],
)
def test_bad_options_end_with_one_line(specsa, options, reason):
    code, out, err = specsa("profile", "embedded", *options)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and reason in err


def test_the_smallest_and_the_largest_steps_are_timed_before_those_between(engine, text, monkeypatch):
    """From a short budget's few steps others follow, but not what is beyond them."""

    def first(engine, count):
        found = measure.tasks(Bench(engine, text, (1, 4), (64, 128), ()))
        steps = [task.key[1] for task in found if task.key[0] == "step"]
        farthest = max(step.context for step in steps if step.precision == "exact")
        assert [step.context for step in steps[count : count + 2]] == [farthest, farthest]
        return [(step.batch, step.width) for step in steps[: count + 2]]

    assert first(engine, 3) == [(1, 1), (1, 17), (1, 5), (4, 1), (4, 17)]
    kernels = copy.copy(engine)
    kernels.implementation = "pallas"
    monkeypatch.setattr(measure, "CORNERS", (1, 3, 5))
    monkeypatch.setattr(measure, "LONG", (7, 9, 1000))  # the last is deeper than a page
    assert first(kernels, 4) == [(1, 1), (1, 9), (1, 3), (1, 5), (4, 1), (4, 9)]
