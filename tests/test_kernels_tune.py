"""Tuning without a GPU: times are made up."""

import dataclasses
import json
import math
import os
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _dispatch, report, tune, tuned
from pallas_kernels.attention import MAX_GROUP, AttentionConfig
from pallas_kernels.attention import specs as attention_specs
from pallas_kernels.commit import CommitConfig, commit
from pallas_kernels.commit import specs as commit_specs
from pallas_kernels.compress import CompressConfig, compress
from pallas_kernels.compress import specs as compress_specs
from pallas_kernels.selection import SelectionConfig

KIND = jax.devices()[0].device_kind
SPEC = next(spec for spec in attention_specs.BENCHMARKS if spec.name == "B8-T8-H32x8-L64K-o70")


def made_up(config):
    """Microseconds with one best config: twice the heuristic's splits and warps, most stages."""
    if isinstance(config, SelectionConfig):
        return 5.0 + config.num_warps
    if isinstance(config, CommitConfig):
        return 5.0 + config.heads + config.num_warps
    if isinstance(config, CompressConfig):
        return 1000.0 - config.splits - 10 * config.num_stages - config.num_warps - config.columns / 100
    splits = config.compressed.splits + config.selected.splits + config.window.splits
    return 1000.0 - splits - config.num_stages - config.selection_warps


def tasks(*names, log=None, fail_at=None):
    log = [] if log is None else log

    def prepared(config):
        def measure():
            if len(log) == fail_at:
                raise KeyboardInterrupt
            log.append(config)
            return made_up(config)

        return measure

    return [dataclasses.replace(task, prepare=lambda: prepared) for task in tune.tasks(names)]


@pytest.fixture
def installed(monkeypatch):
    """Puts a data file's text where ``tuned`` reads it."""

    def install(path):
        monkeypatch.setattr(tuned, "_load", lambda kind: tuned.parse(path.read_text(), path.name))

    return install


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A data file's text, with entries of all kinds."""
    path = tmp_path_factory.mktemp("written") / "device.json"
    tune.tune(tasks("B8-T8-H32x8-L64K", "select-B8-T8-H8-N1024", "commit-B8-A8", "compress-D128-B8-T64"), path)
    return path.read_text()


def test_the_fastest_config_is_written_and_found(tmp_path, installed):
    path = tmp_path / "device.json"
    assert tune.tune(tasks("B8-T8-H32x8-L64K", "select-B8-T8-H8-N1024"), path)
    data = json.loads(path.read_text())
    assert (data["schema"], data["device"], data["jax"]) == (tuned.SCHEMA, KIND, jax.__version__)
    [selection] = data["selection"]
    assert selection["config"] == {"num_warps": 1} and selection["microseconds"] == 6.0
    assert {entry["group"] for entry in data["attention"]} == {1, 8}
    installed(path)
    for group in (1, 8):
        space = AttentionConfig.search_space(SPEC.sparsity, SPEC.shape, group)
        found = tuned.lookup(KIND, SPEC.sparsity, SPEC.shape, group)
        best = space[0]
        for axis in AttentionConfig.AXES:
            values = ({name: getattr(config, name) for name in axis} for config in space)
            best = min((dataclasses.replace(best, **own) for own in values), key=made_up)
        assert found == best
        assert made_up(found) < min(map(made_up, space)), "it is better along several axes"
        assert tuned.lookup(KIND, SPEC.sparsity, SPEC.shape, group, jnp.float32) is None  # measured in bfloat16
    assert tuned.lookup_selection(KIND, 8 * 8 * 8, 1024) == SelectionConfig(1)
    assert tuned.lookup_selection(KIND, 8 * 8 * 8, 1023) is None


def test_lookup_takes_the_nearest_entry_not_above_nor_far_below(tmp_path, installed):
    path = tmp_path / "device.json"
    tune.tune(tasks("B1-T8-H32x8-L16K", "B8-T8-H32x8-L16K", "B8-T8-H32x8-L64K", "B8-T16-H32x8-L64K"), path)
    installed(path)
    entries = json.loads(path.read_text())["attention"]

    def found(group=8, sparsity=SPEC.sparsity, **sizes):
        return tuned.lookup(KIND, sparsity, dataclasses.replace(SPEC.shape, **sizes), group)

    def written(batch, width, table, group):
        wanted = {"batch": batch, "width": width, "table": table}.items()
        [config] = [
            entry["config"] for entry in entries if entry["group"] == group and wanted <= entry["shape"].items()
        ]
        return tuned.attention_config(config)

    table = SPEC.shape.table
    assert found() == written(8, 8, table, 8)
    assert found(batch=12, table=table + 300) == written(8, 8, table, 8)
    assert found(table=500) == written(8, 8, 256, 8)
    # Splits are of a size: an entry of less than half is none; nor is one of other queries or groups.
    assert found(batch=17) is found(batch=15, table=table + 100) is found(batch=7) is None
    assert found(width=10) is found(width=32) is found(group=4) is None
    assert found(group=None).group == 8  # the faster one of its entries, by the times made up
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention": [e for e in entries if e["group"] == 1]}))
    installed(path)
    assert found(group=None) is None and found(group=1) == written(8, 8, table, 1)
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention": entries}))
    installed(path)
    for sizes in ({"table": 200}, {"width": 7}, {"num_heads": 64}, {"head_dim": 64}):
        assert found(**sizes) is None
    assert found(sparsity=dataclasses.replace(SPEC.sparsity, num_selected=8)) is None
    assert found(sparsity=dataclasses.replace(SPEC.sparsity, scale=1.0)) == found()


@pytest.mark.slow
def test_commits_and_compressions_take_their_measured_configs(tmp_path, installed):
    """Whatever the benchmarks call; calls without a config lower with it."""
    path = tmp_path / "device.json"
    assert tune.tune(tasks("commit-", "compress-"), path)
    installed(path)
    for spec in commit_specs.BENCHMARKS:
        found, space = tuned.lookup_commit(KIND, spec.shape), CommitConfig.search_space(spec.shape)
        assert found in space and made_up(found) == min(map(made_up, space))
        [kernel] = report.kernels(report.lower(partial(commit, compress_block=spec.block), *spec.abstract()))
        assert (kernel.grid[1], kernel.num_warps) == (-(-spec.heads // found.heads), found.num_warps)
    for spec in compress_specs.BENCHMARKS:
        found, space = tuned.lookup_compress(KIND, spec.shape), CompressConfig.search_space(spec.shape)
        assert found in space and made_up(found) == min(map(made_up, space))
        if spec.nodes == 16:  # of the shape of one token's
            continue
        first, second = report.kernels(report.lower(partial(compress), *spec.abstract()))
        assert first.grid[0] == found.parts(spec.shape) * -(-spec.hidden // found.columns)
        assert (first.num_warps, first.num_stages) == (found.num_warps, found.num_stages)
        assert second.num_warps == found.finish_warps


def test_commits_and_compressions_take_the_nearest_entry_too(tmp_path, installed):
    path = tmp_path / "device.json"
    tune.tune(tasks("commit-B8-A8", "commit-B8-A16", "compress-D128-B8-T64"), path)
    data = json.loads(path.read_text())
    data["commit"][0]["config"]["num_warps"] = 8
    path.write_text(json.dumps(data))
    installed(path)

    def shape_of(specs, name):
        return next(spec.shape for spec in specs.BENCHMARKS if spec.name == name)

    def found(lookup, shape, **sizes):
        return lookup(KIND, dataclasses.replace(shape, **sizes))

    short, long = (CommitConfig(**entry["config"]) for entry in data["commit"])
    near = partial(found, tuned.lookup_commit, shape_of(commit_specs, "B8-A8"))
    assert near() == near(steps=15) == near(batch=16, slots=64) == short != long == near(steps=16) == near(steps=32)
    for sizes in ({"steps": 7}, {"batch": 7}, {"batch": 17}, {"num_kv_heads": 4}, {"head_dim": 64}):
        assert near(**sizes) is None

    near = partial(found, tuned.lookup_compress, shape_of(compress_specs, "D128-B8-T64-one"))
    assert near() == near(batch=16) == near(slots=128) == CompressConfig(**data["compress"][0]["config"])
    for sizes in ({"batch": 7}, {"batch": 12, "slots": 96}, {"slots": 63}, {"num_kv_heads": 4}, {"head_dim": 64},
                  {"block": 16}, {"width": 128}, {"sides": 1}, {"is_mlp": False}, {"itemsize": 4}):  # fmt: skip
        assert near(**sizes) is None


def test_a_device_without_a_file_has_no_configs():
    assert tuned.lookup("Abacus 9000", SPEC.sparsity, SPEC.shape, None) is None
    assert tuned.lookup_selection("Abacus 9000", 64, 256) is None
    assert tuned.lookup_commit("Abacus 9000", commit_specs.BENCHMARKS[0].shape) is None
    assert tuned.lookup_compress("Abacus 9000", compress_specs.BENCHMARKS[0].shape) is None


def test_shipped_files_are_whole():
    folder = os.path.dirname(tuned.__file__)
    for name in os.listdir(folder):
        if name.endswith(".json"):
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                data = tuned.parse(file.read(), name)
            assert name == f"{tuned.slug(data['device'])}.json"


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    path, log = tmp_path / "device.json", []
    names = ("B8-T8-H32x8-L64K",)
    once = []
    tune.tune(tasks(*names, log=once), tmp_path / "whole.json")
    with pytest.raises(KeyboardInterrupt):
        tune.tune(tasks(*names, log=log, fail_at=len(once) - 1), path)
    assert len(json.loads(path.read_text())["attention"]) == 1
    rest = []
    assert tune.tune(tasks(*names, log=rest), path)
    assert 0 < len(rest) < len(once)
    assert json.loads(path.read_text()) == json.loads((tmp_path / "whole.json").read_text())
    assert tune.tune(tasks(*names, fail_at=0), path), "complete: nothing is measured"
    again = []
    assert tune.tune(tasks(*names, log=again), path, again=True)
    assert again == once and len(json.loads(path.read_text())["attention"]) == 2


def test_a_budget_ends_it(tmp_path):
    path, log = tmp_path / "device.json", []
    assert not tune.tune(tasks("B8-T8-H32x8-L64K", log=log), path, budget=2.5, clock=iter(range(100)).__next__)
    assert len(log) == 2 and not path.exists()


def test_a_config_that_does_not_fit_loses_and_other_failures_end_the_search(tmp_path):
    def task(error):
        def prepared(config):
            if config.num_stages > 4:
                raise jax.errors.JaxRuntimeError(error)
            return lambda: made_up(config)

        return [dataclasses.replace(task, prepare=lambda: prepared) for task in tune.tasks(["B8-T8-H32x8-L64K"])]

    path = tmp_path / "device.json"
    assert tune.tune(task("RESOURCE_EXHAUSTED: Shared memory size limit exceeded"), path)
    assert all(entry["config"]["num_stages"] <= 4 for entry in json.loads(path.read_text())["attention"])
    with pytest.raises(jax.errors.JaxRuntimeError, match="illegal address"):
        tune.tune(task("INTERNAL: an illegal address"), tmp_path / "other.json")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "device.json"
    path.write_text("old")

    def full(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        tune.write(path, {"schema": 1})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: "{", "device.json: Expecting property name"),
        (lambda data: "[]", "device.json: list indices must be"),
        (lambda data: json.dumps(data | {"schema": 7}), "device.json: schema 7, expected 1"),
        (lambda data: json.dumps({"schema": 1, "attention": []}), "device.json: lacks 'selection'"),
        (lambda data: json.dumps({"schema": 1, "attention": [], "selection": []}), "device.json: lacks 'device'"),
        (lambda data: json.dumps(data | {"device": 9}), "device.json: device: got 9, expected"),
        (lambda data: json.dumps(data | {"selection": {}}), "device.json: selection: got dict, expected a list"),
        (lambda data: "[" * 100_000, "device.json: maximum recursion depth"),
        (lambda data: data["attention"][0]["config"].update(tile=17) or json.dumps(data), "tile: got 17, expected a"),
        (lambda data: data["attention"][0]["config"].update(mood=1) or json.dumps(data), "unexpected keyword .*mood"),
        (
            lambda data: data["attention"][0]["shape"].pop("table") and json.dumps(data),
            "device.json: attention.0.: lacks 'table'",
        ),
    ],
)
def test_a_broken_file_is_named(tmp_path, written, change, message):
    path = tmp_path / "device.json"
    path.write_text(change(json.loads(written)))
    with pytest.raises(tuned.TuningError, match=message):
        tune.tune([], path)


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("attention", lambda entry: entry["shape"].update(batch=0), "batch: got 0, expected at least 1"),
        ("attention", lambda entry: entry["shape"].update(table=10**400), "table: got 1000.* and at most 2147483647"),
        ("attention", lambda entry: entry["sparsity"].update(num_selected=4.0), "num_selected: got 4.0, expected a"),
        ("attention", lambda entry: entry["config"].update(selection_warps=-7), "selection_warps: got -7, expected"),
        ("attention", lambda entry: entry["config"].update(window=4), "window: got 4, expected a Branch"),
        ("attention", lambda entry: entry.update(microseconds=math.nan), "microseconds: got nan, expected at least 0"),
        ("attention", lambda entry: entry.update(microseconds=10**400), "too large to convert to float"),
        ("selection", lambda entry: entry.update(rows=0), "rows: got 0, expected at least 1"),
        ("selection", lambda entry: entry.update(rows="1"), "rows: got '1', expected a whole number"),
        ("selection", lambda entry: entry["config"].update(num_warps=0), "num_warps: got 0, expected a power of two"),
        ("commit", lambda entry: entry["shape"].update(steps=0), "steps: got 0, expected at least 1"),
        ("compress", lambda entry: entry["shape"].update(slots="1"), "slots: got '1', expected a whole number"),
        ("commit", lambda entry: entry["config"].update(heads=3), "heads: got 3, expected a power of two"),
        ("commit", lambda entry: entry["shape"].pop("steps"), "missing 1 required positional argument: 'steps'"),
        ("commit", lambda entry: entry.pop("microseconds"), "lacks 'microseconds'"),
        ("compress", lambda entry: entry["config"].update(columns=8), "columns: got 8, expected a power of two"),
        ("compress", lambda entry: entry["config"].update(num_stages=60), "more shared memory than there is"),
        ("compress", lambda entry: entry["shape"].update(mood=1), "unexpected keyword argument 'mood'"),
    ],
)
def test_broken_entries_are_named(written, kind, change, message):
    data = json.loads(written)
    change(data[kind][0])
    with pytest.raises(tuned.TuningError, match=rf"device.json: {kind}\[0\]: .*{message}"):
        tuned.parse(json.dumps(data), "device.json")


def test_a_file_of_older_kinds_of_entries_gets_the_others(tmp_path):
    path = tmp_path / "device.json"
    tune.write(path, {"schema": 1, "device": KIND, "jax": "0", "attention": [], "selection": []})
    assert tune.tune(tasks("commit-B8-A8"), path)
    data = json.loads(path.read_text())
    assert len(data["commit"]) == 1 and data["compress"] == []


def test_a_file_of_another_device_is_refused(tmp_path):
    path = tmp_path / "device.json"
    tune.write(path, {"schema": 1, "device": "Abacus 9000", "jax": "0", "attention": [], "selection": []})
    with pytest.raises(tuned.TuningError, match=f"was measured on Abacus 9000, this is {KIND}"):
        tune.tune(tasks("B8-T8-H32x8-L64K"), path)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="names: got bush, expected parts of names such as compress-D"):
        tune.tasks(["bush"])


@pytest.mark.parametrize("budget", [math.nan, -1.0])
def test_a_budget_that_is_none_is_refused(tmp_path, budget):
    with pytest.raises(ValueError, match=f"budget: got {budget}, expected at least 0 seconds"):
        tune.tune(tasks("B8-T8-H32x8-L64K", fail_at=0), tmp_path / "device.json", budget=budget)


@pytest.mark.parametrize(
    "options, data, message",
    [
        (["bush"], None, "names: got bush, expected parts of names"),
        (["--budget", "nan"], None, "budget: got nan, expected at least 0"),
        (["--out", "{folder}"], None, "Is a directory"),
        (["--out", "{folder}/device.json"], '{"schema": 1, "attention": [], "selection": []}', "lacks 'device'"),
        (["--out", "{folder}/device.json"], "[" * 100_000, "device.json: maximum recursion"),
        (["--out", "{folder}/device.json"], "\udcff", "device.json: 'utf-8' codec can't decode"),
        (["--out", "{folder}/device.json/of-a-file"], "", "File exists"),
    ],
)
def test_the_command_ends_with_one_line_and_code_2(options, data, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_dispatch, "device_limit", lambda ptx: None)
    if data is not None:
        (tmp_path / "device.json").write_text(data, errors="surrogateescape")
    with pytest.raises(SystemExit) as end:
        tune.main([option.format(folder=tmp_path) for option in options])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ") and message in error


def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(SystemExit) as end:
        tune.main(["B8-T8-H32x8-L64K", "--out", str(tmp_path / "device.json")])
    assert end.value.code == 2 and not any(tmp_path.iterdir())
    assert capsys.readouterr().err == "error: device: got cpu, expected a GPU (or interpret=True)\n"


def test_slug():
    assert tuned.slug("NVIDIA H200") == "nvidia-h200"
    assert tuned.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_prompts_chunk_is_tuned_in_groups_that_the_kernels_take():
    names = [task.name for task in tune.tasks(["B1-T512-H32x8"])]
    assert names == [f"B1-T512-H32x8-L64K-C{group}" for group in (8, MAX_GROUP, 1)]


def test_the_search_goes_along_one_axis_at_a_time():
    space = AttentionConfig.search_space(SPEC.sparsity, SPEC.shape)
    times = {}
    for configs in tune.descend(space, times):
        times |= {config: made_up(config) for config in configs}
    # The rest at its best: the last axis was measured with twice the heuristic's splits, and the most stages.
    assert len(times) <= len(space)
    assert {config.tile for config in times} == {config.tile for config in space}
    [last, *_] = [config for config in times if config.selection_warps > space[0].selection_warps]
    assert last.window.splits == 2 * space[0].window.splits and last.num_stages == 5
    assert made_up(last) == min(times.values())


def test_without_rich_the_command_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(SystemExit) as stopped:
        tune.main(["B8-T8-H32x8-L64K"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(
        "error: rich, which shows the progress, is not installed: pip install rich\n"
    )
