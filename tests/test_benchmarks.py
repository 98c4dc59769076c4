"""The benchmarks: their index and options, and what they compute."""

import argparse
import dataclasses
import itertools
import json
import re
import runpy
import sys
import types
from pathlib import Path

import divergence_growth
import end_to_end
import harness
import held_out_bounds
import jax
import jax.numpy as jnp
import numpy as np
import overhead
import planner_replay
import pytest
import real_selections
import selection
import steps
import strict
import train_target
import workloads

from pallas_kernels.attention import specs
from pallas_kernels.selection import SelectionConfig
from pallas_kernels.selection import specs as selection_specs
from specsa_jax import checkpoints, model, precision
from specsa_jax.calibration import Calibration, CalibrationError
from specsa_jax.checkpoints.records import AtContext, Measurement, Records, Searched
from specsa_jax.config import PRESETS
from specsa_jax.schedule import Sharing

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
INDEX = (FOLDER / "README.md").read_text(encoding="utf-8")
LISTED = re.findall(r"^\| \[`(\w+\.py)`\]", INDEX, flags=re.MULTILINE)


def test_the_index_lists_every_script():
    scripts = {
        file.name for file in FOLDER.glob("*.py") if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
    }
    assert sorted(LISTED) == sorted(scripts)


@pytest.mark.parametrize("script", LISTED)
def test_every_script_answers_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert ended.value.code == 0
    assert "usage: " + script in capsys.readouterr().out


@pytest.mark.parametrize("script", ["commit.py", "compress.py", "selection.py"])
def test_a_kernel_is_compared_with_xlas_code(script, monkeypatch, capsys):
    monkeypatch.setattr(harness, "copy_bandwidth", lambda: 1e12)  # seconds
    monkeypatch.setattr(sys, "argv", [script, "--interpret", "--tiny"])
    runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert re.search(r"tiny +pallas .*\n(.*\n)*tiny +xla ", capsys.readouterr().out)


def test_make_runs_options_that_the_scripts_have(monkeypatch, capsys):
    """A part that ends at its command line would cost a GPU's time."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^\t\$\((?:BENCH|LARGE)\)/(\w+\.py)(.*)$", makefile, flags=re.MULTILINE)
    assert len(lines) >= 15
    for script, options in lines:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(FOLDER / script), run_name="__main__")
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        assert set(re.findall(r"--[\w-]+", options)) <= known, (script, options)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("plots.py {tmp}/half.json", "error: {tmp}/half.json: not readable JSON"),
        ("plots.py {tmp}/none.json", "error: paths: got {tmp}/none.json, expected an existing file"),
        ("dense_decode.py --resume --out {tmp}/half.json", "error: {tmp}/half.json: not readable JSON"),
        ("prefill.py --tokens -5", "argument --tokens: got '-5', expected a whole number of at least 1"),
        ("prefill.py --out {tmp}", "argument --out: got '{tmp}', expected the path of a file"),
        ("prefill.py --out {tmp}/half.json/x/y.json", "argument --out: got '{tmp}/half.json/x/y.json', expected the"),
        ("end_to_end.py --batches 0", "argument --batches: got '0', expected a whole number"),
        ("end_to_end.py --temperatures nan", "argument --temperatures: got 'nan', expected a finite number"),
        ("end_to_end.py --strategies nosuch", "error: drafter: got 'nosuch', expected one of lookup"),
        ("end_to_end.py --strategies lookup@bush", "error: tree: got 'bush', expected chain:K"),
        ("end_to_end.py --strategies model:/nosuch@chain:4", "error: drafter: model:/nosuch: checkpoint: got"),
        ("end_to_end.py --space nosuch@chain:4", "error: drafter: got 'nosuch', expected one of lookup"),
        ("end_to_end.py --contexts 96 --new-tokens 96", "error: contexts: got 96, expected more than the 96 of new_"),
        ("end_to_end.py --checkpoint /nosuch", "error: checkpoint: got '/nosuch', expected an existing directory"),
        ("ablations.py --context 96", "error: context: got 96, expected more than the 96 of new_tokens"),
        ("planner.py --cells 1", "argument --cells: got '1', expected BATCH:CONTEXT"),
    ],
)
def test_bad_options_of_a_script_end_with_one_line_before_any_work(command, reason, tmp_path, monkeypatch, capsys):
    (tmp_path / "half.json").write_text('{"rows": [')
    script, *words = command.format(tmp=tmp_path).split()
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and reason.format(tmp=tmp_path) in err.splitlines()[-1], err
    assert [file.name for file in tmp_path.iterdir()] == ["half.json"]


def test_the_planner_benchmark_without_time_leaves_a_file_without_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["planner.py", "--budget", "0", "--out", str(tmp_path / "planner.json")])
    runpy.run_path(str(FOLDER / "planner.py"), run_name="__main__")
    assert json.loads((tmp_path / "planner.json").read_text())["rows"] == []


def test_speedup_and_identity_are_against_the_right_rows():
    exact = {"tokens_per_second": 10.0, "tokens": ["1 2 3", "4 5 6"]}
    row = {"tokens_per_second": 25.0, "tokens": ["1 2 3", "4 5 7"]}
    found = end_to_end.against(row, exact, exact)
    assert found == {"tokens_per_second": 25.0, "speedup": 2.5, "identical": "1 of 2", "same_tokens": 2.5}
    assert end_to_end.against(exact, None, exact)["tokens"] == exact["tokens"]  # a base keeps them
    assert end_to_end.against({"not_run": "no"}, exact, exact) == {"not_run": "no"}
    assert "speedup" not in end_to_end.against(row, exact, {"not_run": "no"})


def test_needed_bytes_are_counted_by_hand():
    config = PRESETS["8b"]
    needed = steps.needed_bytes(config, 65536, 2, jnp.bfloat16, 16)
    token = 2 * 8 * 128 * 32 * 2  # bytes a sequence of a key in all layers, times two sequences
    assert needed.compressed == 2 * token * (65536 // 16 - 1)
    assert needed.selected == 2 * token * 16 * 64 and needed.window == 2 * token * 512
    # All but the embedding's rows, of the size that prefill_8b_64k.json has.
    assert needed.weights == 18_270_920_704 - 2 * 128256 * 4096
    assert needed.total == needed.weights + needed.compressed + needed.selected + needed.window
    # φ of keys and values, where a compression block ends: 4096 → 256 → 128 per KV head, and positions.
    decode = steps.needed_bytes(config, 65536, 2, jnp.bfloat16, 1)
    assert needed.weights - decode.weights == 2 * 32 * 2 * 8 * (4096 * 256 + 256 * 128 + 32 * 128)


def test_a_step_gives_the_next_tokens_and_leaves_its_place():
    config = dataclasses.replace(PRESETS["embedded"], layers=1, vocab_size=300)
    params = model.init_params(config, 0)
    cache = steps.random_cache(config, 200, 2, 1, jnp.float32)
    step = steps.make_step(config, steps.Sharing(), "xla", jnp.float32, 2)
    after, chosen = jax.jit(step)((cache, jnp.arange(2, dtype=jnp.int32)[None]), params)
    assert chosen.shape == (1, 2) and after.lengths.tolist() == [200]
    key, before = after.layers[0].key, cache.layers[0].key
    assert (key != before).any(axis=(1, 3)).sum() == 1  # one token is committed


EVENTS = [
    harness.Event(name, stream, 100.0 * step + start, duration)
    for step in range(10)
    for name, stream, start, duration in (("nsa_scores", "Stream #1", 0.0, 30.0), ("gemm_x", "Stream #1", 35.0, 40.0),
                                          ("fusion_3", "Stream #2", 40.0, 20.0))
]  # fmt: skip


def test_on_recorded_texts_the_planner_keeps_up_with_the_best_chain():
    """Of 32 greedy texts some repeat themselves from the beginning, others only later."""
    profile = planner_replay.read(planner_replay.PROFILE)
    costs = planner_replay.Costs.from_profile(profile, planner_replay.CONFIG)
    priors, recorded, ratios = planner_replay.Acceptance(profile.priors), planner_replay.load(), []
    for workload, batch, context in itertools.product(("prose", "code", "edit"), (8, 32), (4096, 65536)):
        found = planner_replay.compare(recorded[workload, 0.0], batch, context, costs, priors)
        assert {one["tokens"] for one in found.values()} == {32 * 512}
        assert found["autoregressive"]["steps"] == 32 // batch * 512 > found["lookup chain:32"]["steps"]
        seconds = {name: one["seconds"] for name, one in found.items()}
        planned = seconds.pop("planner")
        assert planned < 0.6 * seconds["autoregressive"]
        ratios.append(min(seconds.values()) / planned)
    assert np.exp(np.mean(np.log(ratios))) > 0.97


def test_a_lone_text_that_begins_to_go_round_gets_the_length_that_fares_best_then():
    """Of two of the target's prompts at 0.6 of the best, where lengths were judged by different parts of the text."""
    profile = planner_replay.read(planner_replay.POOR_PROFILE)
    costs = planner_replay.Costs.from_profile(profile, planner_replay.CONFIG)
    texts, priors = planner_replay.load(planner_replay.LONG), planner_replay.Acceptance(profile.priors)
    for workload, row in (("prose", 0), ("edit", 6)):
        text = texts[workload, 0.0].take(np.array([row]), 4096)
        found = {name: one["seconds"] for name, one in planner_replay.compare(text, 1, 4096, costs, priors).items()}
        assert min(found.values()) > 0.9 * found["planner"]


def test_in_long_calls_of_a_batch_the_planner_gives_a_bad_guess_up_soon():
    """Texts that begin to repeat themselves: chain:63 is twice as fast in the end as what is chosen at first."""
    profile = planner_replay.read(planner_replay.SHORT_PROFILE)
    costs = planner_replay.Costs.from_profile(profile, planner_replay.CONFIG)
    texts = planner_replay.load(planner_replay.LONG)["prose", 0.0]
    found = planner_replay.compare(texts, 8, 4096, costs, planner_replay.Acceptance(profile.priors))
    assert found["planner"]["seconds"] < 1.07 * found["lookup chain:63"]["seconds"]


def test_on_recorded_texts_chains_of_one_length_tell_what_those_of_others_gain():
    recorded = planner_replay.load()
    for kind in (("prose", 0.0), ("code", 0.7)):
        texts, found = recorded[kind], {}
        for depth in (4, 16, 63):
            drafted, accepted = np.zeros(depth + 1), np.zeros(depth + 1)
            for reach, stands, at, end in zip(texts.reach, texts.stands, texts.lengths, texts.ends, strict=True):
                while at < end:
                    stood = min(stands[at], depth)
                    drafted[min(reach[at], depth)] += 1
                    accepted[stood] += 1
                    at += 1 + stood
            found[depth] = drafted, accepted
        for seen in (4, 16, 63):
            acceptance = planner_replay.Acceptance()
            acceptance.add("lookup", f"chain:{seen}", *found[seen], worth=1e6)
            for depth, (drafted, accepted) in found.items():
                steps, outlook = drafted.sum(), acceptance.outlook("lookup", f"chain:{depth}", depth)
                assert outlook.length == pytest.approx(1 + accepted @ np.arange(depth + 1) / steps, rel=0.05)
                assert outlook.share == pytest.approx(1 - drafted[0] / steps, abs=0.03)


def test_overhead_is_step_time_over_kernels():
    found = overhead.figures(EVENTS, 10, 99.0)
    assert found["kernel_us"] == 90.0 and found["launches"] == 3.0 and found["overhead"] == pytest.approx(0.1)
    assert overhead.figures([], 10, 99.0) == {}
    assert overhead.figures(EVENTS, 10, 901.0) == {}  # what the profiler sees is not what runs
    starts = [float(line.split("\t")[0]) for line in found["timeline"]]
    assert starts[0] == 0.0 and max(starts) < 120.0


def test_a_step_without_kernels_to_see_stands_beside_those_of_the_same_step():
    step = {"model": "m", "case": "none"}
    rows = [step | {"command_buffers": "on", "step_us": 90.0}, {**step, "case": "other", "command_buffers": "on"},
            step | {"command_buffers": "kernels", "step_us": 120.0, "kernel_us": 100.0, "overhead": 0.2,
                    "launches": 3.0}]  # fmt: skip
    overhead.beside_kernels(rows)
    assert rows[0]["kernel_us"] == 100.0 and rows[0]["launches"] == 3.0
    assert rows[0]["overhead"] == pytest.approx(-0.1) and rows[2]["overhead"] == 0.2
    assert "kernel_us" not in rows[1]


def test_selection_is_measured_with_the_config_that_a_call_takes_on_its_device(monkeypatch):
    spec = next(spec for spec in selection_specs.BENCHMARKS if spec.name == "B1-T8-H8-N1024")
    ours = [SelectionConfig.heuristic(spec.rows, spec.shape[-1])]
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="Abacus 9000")])
    assert selection.chosen(spec, tune=False, interpret=False) == ("heuristic", ours)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="NVIDIA H200")])
    source, configs = selection.chosen(spec, tune=False, interpret=False)
    assert source == "tuned" and len(configs) == 1 and configs != ours
    assert selection.chosen(spec, tune=False, interpret=True) == ("heuristic", ours)
    assert selection.chosen(spec, tune=True, interpret=False)[0] == "searched"


def test_recorded_selections_are_shared_as_they_were():
    recorded = real_selections.load()
    assert recorded.shape == (4, 12, 64, 13)
    spec = dataclasses.replace(specs.benchmark(2, 8, 16384), overlap=None, recorded=recorded)
    ids = spec.wanted(seed=1)
    assert ids.shape == (2, 8, 8, 16) and (np.diff(ids) > 0).all() and ids.min() == 0 and ids.max() < 256
    for b, h in np.ndindex(2, 8):
        ours, theirs = ids[b, :, h], recorded[b + 1, h, :8]
        for t in range(1, 8):
            assert np.isin(ours[t], ours[0]).sum() == 3 + np.isin(theirs[t], theirs[0]).sum()  # 3 are forced


def test_the_headlines_rows_come_first():
    args = argparse.Namespace(precisions=["exact", "strict"], temperatures=[0.0, 0.7], batches=[1, 8],
                              contexts=[65536, 4096], strategies=["a", "b", "auto"])  # fmt: skip
    found = [(*point.values(), names) for point, names in end_to_end.order(args)]
    few = ["none", "a", "auto"]
    assert found[:5] == [
        ("exact", 65536, 1, 0.0, few), ("exact", 4096, 1, 0.0, few), ("exact", 65536, 1, 0.0, ["b"]),
        ("exact", 4096, 1, 0.7, few), ("strict", 4096, 1, 0.0, few),
    ]  # fmt: skip
    assert found[-1] == ("strict", 65536, 8, 0.7, few) and len(found) == 17


def test_text_without_names_makes_no_edit(monkeypatch):
    engine = types.SimpleNamespace(tokenizer=checkpoints.load("embedded").tokenizer)
    text = "A1" * 300 + "value = other\n" * 300
    stream = np.asarray(engine.tokenizer.encode(text).ids)
    monkeypatch.setattr(workloads, "_code", lambda *_: stream)
    found = workloads.prompts(engine, "embedded", "edit", 60, 8)
    assert len(found) == 8 and all("alue" in engine.tokenizer.decode(row) for row in found)
    monkeypatch.setattr(workloads, "_code", lambda *_: stream[:150])
    with pytest.raises(ValueError, match="without a name"):
        workloads.prompts(engine, "embedded", "edit", 60, 8)


def test_a_checkpoint_is_stretched_to_longer_contexts(tmp_path):
    before, after = (checkpoints.load(where) for where in ("embedded", train_target.longer("embedded", tmp_path / "x")))
    assert after.config.max_length == 65536 and after.config.rope.factor == 8.0
    assert dataclasses.replace(after.config, max_length=8192, rope=before.config.rope) == before.config
    again = checkpoints.load(train_target.longer(str(tmp_path / "x"), tmp_path / "y"))
    assert again.config == after.config


def test_growth_is_of_each_64_tokens_over_all_places():
    kl = np.concatenate([np.full((8, 64), value) for value in (0.001, 0.002, 0.004)], axis=1)
    same, loss = np.ones((8, 192), bool), np.zeros((8, 192))
    rows = divergence_growth.rows_of(precision.Divergence(kl, same, loss, loss), schedule="FS")
    assert [row["decoded"] for row in rows] == [0, 64, 128]
    assert [row["of_first"] for row in rows] == pytest.approx([1, 2, 4])
    assert all(row["tokens"] == 8 * 64 and row["top1"] == 1 and row["schedule"] == "FS" for row in rows)
    with pytest.raises(ValueError, match="schedules: got 'all', whose divergence is 0"):
        divergence_growth.sharing_of("all", 6)
    assert divergence_growth.sharing_of("every:2,dropped", 4).keep_compressed is False


def test_the_strict_benchmark_goes_on_only_with_a_run_like_its_own(tmp_path):
    out, settings, rows = (
        tmp_path / "strict.json",
        {"model": "a1", "new_tokens": 8, "trees": ["chain:2"]},
        [{"prompts": 8}],
    )
    assert strict.resumed(str(out), settings) == strict.resumed(None, settings) == []
    harness.save(out, rows, **settings)
    assert strict.resumed(str(out), settings) == rows
    for name, value in {"model": "b2", "new_tokens": 9, "trees": ["2-2"]}.items():
        with pytest.raises(ValueError, match=f"is of a run with {name} .*, expected {re.escape(repr(value))} or a new"):
            strict.resumed(str(out), settings | {name: value})
    for text in ("", "[]", "{}"):
        out.write_text(text)
        with pytest.raises(ValueError, match="holds no results of this benchmark"):
            strict.resumed(str(out), settings)


def test_bounds_are_tried_on_tokens_that_nothing_has_scored():
    text = Calibration(np.arange(4000, dtype=np.int32), "numbers")
    at = AtContext(100, 8, 80, 2.0, 0.01, 0.001, 0.02, 0.1, 0.95, 0.01, 0.9, 0.0, 0.0)
    shared = Measurement(Sharing(group=2, group_mode="shared"), 5, 0.95, "float32", text.text, (at,))
    dropped = dataclasses.replace(shared, sharing=Sharing("FSS", False), width=0)
    records = Records("", (shared, dropped), (Searched("FSS", False, 0.1, 0.01, text.text),))
    tried = held_out_bounds.elsewhere(text, records).windows(100, 10, 24)
    assert len(tried) == 24 and (np.diff(tried, axis=1) == 1).all()
    for part, count in (("measure", 8), ("search", 1000)):  # what was measured, and all that may have been searched on
        assert not np.isin(tried[:, 100:-1], text.windows(100, 10, count, part)[:, 100:-1]).any()
    with pytest.raises(CalibrationError, match="windows: got 3 of 10 unseen tokens .*, expected at least 8"):
        held_out_bounds.Elsewhere(text.stream[:140], "numbers", np.zeros(140, bool)).windows(100, 10, 24)
    # Another text has no place that was seen.
    assert not held_out_bounds.elsewhere(dataclasses.replace(text, stream=text.stream[1:]), records).seen.any()
    for measured in (shared, dropped):
        strategy = held_out_bounds.strategy_of(measured)
        assert (strategy.sharing(3), strategy.width if measured.width else 0) == measured.key[:2]
        row = held_out_bounds.row_of(measured, measured)
        assert row["inside"] and (row["mean_kl"], row["stored_mean_kl"], row["stored_top1"]) == (0.01, 0.02, 0.9)
    worse = dataclasses.replace(shared, contexts=(dataclasses.replace(at, top1=0.89),))
    assert not held_out_bounds.row_of(shared, worse)["inside"]
