"""Result files: how they grow, are joined and drawn, and the documents that quote them."""

import argparse
import json
import math
import re
from pathlib import Path

import harness
import join
import overhead
import plots
import pytest
import readme_table
from test_benchmarks import EVENTS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
DOCUMENTS = [ROOT / "README.md", FOLDER / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_documents_name_are_there(document):
    """Figures lead to files; and links to whatever they name."""
    text = document.read_text(encoding="utf-8")
    users = {"conversion.json", "profile.json"}  # what commands leave with a user
    have = users | {file.name for part in ("benchmarks", "specsa_jax", "pallas_kernels", "docs")
                    for file in (ROOT / part).rglob("*.*")}  # fmt: skip
    named = set(re.findall(r"(?<![\w.*{-])[a-z\d_-]+\.(?:jsonl?|png)\b", text))
    assert named <= have, f"{named - have}"
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_documents_tables_are_those_of_the_result_files():
    for name, table, marker in readme_table.DOCUMENTS:
        document = (ROOT / name).read_text(encoding="utf-8")
        assert readme_table.replaced(document, table(), marker) == document, marker


def test_the_readmes_table_has_what_the_files_say(tmp_path):
    file = tmp_path / "benchmarks" / "results" / "nvidia-h100" / "end_to_end.json"
    rows = [
        {"precision": "exact", "workload": "code", "context": context, "batch": 1, "temperature": 0.0,
         "strategy": strategy, "tokens_per_second": 100 * speedup, "speedup": speedup, "mean_acceptance_length": 2.0,
         "identical": "2 of 2"}
        for context in (4096, 65536) for strategy, speedup in (("none", 1.0), ("auto", 3.0), ("head@chain:4", 2.0))
    ]  # fmt: skip
    harness.save(file, rows, command="end_to_end.py --out")
    line = readme_table.table(file.parents[1]).splitlines()[-1]
    assert "64K, batch 1, greedy" in line and "2.00x" in line and "head@chain:4" in line and "identical 2 of 2" in line
    assert "the planner 3.00x" in line
    assert "benchmarks/results/nvidia-h100/end_to_end.json" in line
    shorter, longer = readme_table.end_to_end_table(file.parents[1]).splitlines()[-2:]
    assert shorter.startswith("| exact | greedy | 1 | 4K |")
    assert longer == "| exact | greedy | 1 | 64K |  | 2.00 (head chain:4), planner 3.00 |  |"


def test_the_readmes_table_has_phi_at_one_shape(tmp_path):
    file = tmp_path / "benchmarks" / "results" / "nvidia-h100" / "compress.json"
    rows = [{"case": f"D128-B8-{case}", "variant": variant, "median": median} for case, variant, median in (
        ("T1-one", "pallas 16r", 1.0), ("T1-one", "xla", 2.0), ("T16-one", "pallas 16r", 20.4),
        ("T16-one", "xla", 31.0), ("T16-none", "pallas 16r", 3.0), ("T16-none", "xla", 30.0))]  # fmt: skip
    harness.save(file, rows[:4], command="compress.py D128-B8 --out")
    assert "φ" not in readme_table.table(file.parents[1])
    harness.save(file, rows, command="compress.py D128-B8 --out")
    line = readme_table.table(file.parents[1]).splitlines()[-1]
    assert "20 µs where a block ends in each sequence, XLA's code 31 µs; 3 and 30 µs where none does" in line


@pytest.mark.parametrize(
    ("kind", "folder"),
    [("cpu", "cpu"), ("NVIDIA H100 80GB HBM3", "nvidia-h100"), ("NVIDIA H200", "nvidia-h200"),
     ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"), ("NVIDIA A100-SXM4-80GB", "nvidia-a100")],
)  # fmt: skip
def test_results_go_to_a_folder_of_the_device(kind, folder):
    assert harness.device_folder(kind) == FOLDER / "results" / folder


def options(path, resume=True, budget=math.inf):
    return argparse.Namespace(out=str(path), resume=resume, budget=budget)


def test_a_result_file_grows_and_is_gone_on_with(tmp_path, capsys):
    path = tmp_path / "rows.json"
    rows = harness.Rows(options(path), ("a", "b"), model="m")
    assert rows.wanted(a=1, b=2)
    rows.add({"a": 1, "b": 2, "time": 3.0})
    assert json.loads(path.read_text())["complete"] is False  # cut off here, the file is whole
    again = harness.Rows(options(path), ("a", "b"), model="m")
    assert not again.wanted(a=1, b=2) and again.wanted(a=1, b=3) and again.find(a=1)["time"] == 3.0
    again.save()
    assert json.loads(path.read_text())["complete"] is True
    again.add({"a": 1, "b": 3, "not_run": "out of memory"})
    assert harness.Rows(options(path), ("a", "b"), model="m").wanted(a=1, b=3)  # perhaps it runs now
    # Another model's rows are not these.
    assert harness.Rows(options(path), ("a", "b"), model="n").rows == []
    assert harness.Rows(options(path, resume=False), ("a", "b"), model="m").rows == []


def test_no_row_begins_behind_the_budget(tmp_path):
    rows = harness.Rows(options(tmp_path / "rows.json", budget=-1.0), ("a",))
    assert not rows.wanted(a=1)
    rows.save()
    assert json.loads((tmp_path / "rows.json").read_text())["complete"] is False


def test_a_file_is_not_replaced_before_there_is_a_row(tmp_path):
    path = tmp_path / "rows.json"
    harness.Rows(options(path), ("a",), model="m").add({"a": 1}, None)
    before = path.read_bytes()
    for resume in (True, False):
        rows = harness.Rows(options(path, resume, budget=0.0), ("a",), model="n")
        assert rows.rows == [] and not rows.wanted(a=1)
        rows.save()
        assert path.read_bytes() == before
    rows.add({"a": 2}, None)
    assert [row["a"] for row in harness.read(path)["rows"]] == [2]


def test_rows_of_another_device_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({**result("x", [{"a": 1}]), "device": "TPU v4"}))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="resume: got .*rows.json, of device 'TPU v4', expected 'cpu'"):
        harness.Rows(options(path), ("a",))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [('{"rows": [', "not readable JSON"), ("[]", "got list, expected an object"), ("{}", "expected a result file"),
     (json.dumps({"device": "cpu", "command": "x.py", "rows": [1]}), "expected a result file"),
     (json.dumps({"device": "cpu", "command": "x.py", "rows": [{"b": 1}]}), "expected rows with a$")],
)  # fmt: skip
def test_a_damaged_file_is_not_gone_on_with(tmp_path, text, reason):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"rows.json.*{reason}"):
        harness.Rows(options(path), ("a",))
    assert path.read_text() == text


def result(script, rows, **summary):
    return {**harness.environment(), "command": f"{script}.py --out", **summary, "rows": rows}


def test_every_kind_of_file_has_its_picture(tmp_path, monkeypatch):
    step = overhead.figures(EVENTS, 10, 99.0) | {"step_us": 99.0, "model": "8b", "case": "T = 1", "context": 65536}
    decoded = {"precision": "exact", "workload": "code", "context": 65536, "batch": 1, "temperature": 0.0}
    tokens = {"tokens_per_second": 3.0, "speedup": 1.5, "mean_acceptance_length": 2.0}
    files = {
        "overhead": result("overhead", [step | {"command_buffers": "on"}]),
        "end_to_end": result("end_to_end", [decoded | tokens | {"strategy": "lookup+head@best:16:6"}], checkpoint="x"),
        "shapes": result("shapes", [
            {"preset": "8b", "context": 65536, "batch": 1, "width": width, "step_us": 1000.0 + width, "floor_us": 800.0,
             "kernels": {"nsa_scores": 500.0, "gemm_x": 400.0, "others": 10.0}} for width in (1, 16)
        ]),
        "ablations": result("ablations", [tokens | {"workload": "code", "set": "trees", "case": "chain:4"}],
                            checkpoint="x", context=4096, batch=1),
    }  # fmt: skip
    for name, found in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    for name in files:
        assert plots.draw(tmp_path / f"{name}.json")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert (tmp_path / "shapes_kernels.png").exists()
    assert plots.measured_lengths(tmp_path)[-1] == ("end_to_end, code 65536, lookup+head@best:16:6", 2.0)
    for name in ("acceptance", "refresh_reuse"):
        assert plots.draw(FOLDER / "results" / "cpu" / f"{name}.json", tmp_path / f"{name}.png")


def test_joined_files_keep_the_newest_rows_and_say_what_each_is_of():
    def part(commit, cases, device="NVIDIA H200", **more):
        rows = [{"case": case, "median": value} for case, value in cases.items()]
        return result("commit", rows, **more) | {"device": device, "commit": commit,
                                                 "command": f"commit.py {commit} --out x.json"}  # fmt: skip

    new, other = part("b2", {"one": 1.0}, complete=True), part("b2", {"two": 2.0}, complete=True)
    old = part("a1", {"one": 9.0, "three": 3.0}, complete=False)
    found = join.joined([("new", new), ("other", other), ("old", old)], ["case"])
    assert found["rows"] == [{"case": "one", "median": 1.0}, {"case": "two", "median": 2.0},
                             {"case": "three", "median": 3.0, "commit": "a1"}]  # fmt: skip
    assert found["commit"] == "b2" and found["complete"] is False and found["note"] == join.NOTE
    assert found["command"] == "commit.py b2 --out; commit.py a1 --out"
    # Again, over itself: nothing changes but that only what is left in it is named.
    assert join.joined([("new", new), ("found", found)], ["case"])["rows"] == [
        found["rows"][0], found["rows"][1], found["rows"][2]
    ]  # fmt: skip
    with pytest.raises(ValueError, match="old: device: got 'NVIDIA A100', expected 'NVIDIA H200'"):
        join.joined([("new", new), ("old", part("a1", {}, device="NVIDIA A100"))], ["case"])
    with pytest.raises(ValueError, match="got results of selection, expected those of commit"):
        join.joined([("new", new), ("s", new | {"command": "selection.py --out"})], ["case"])
    with pytest.raises(ValueError, match="by: got batch, which rows of new lack"):
        join.joined([("new", new)], ["case", "batch"])


def test_joined_end_to_end_files_have_speedups_over_class_exact_of_their_commit_or_of_one_that_they_name():
    def row(precision, strategy, speed, **more):
        return {"precision": precision, "context": 4096, "batch": 1, "temperature": 0.0, "workload": "code",
                "strategy": strategy, "tokens_per_second": speed, "tokens": ["1 2"], **more}  # fmt: skip

    def part(commit, rows):
        return result("end_to_end", rows) | {"commit": commit, "command": "end_to_end.py --out"}

    exact, strict_class = part("b2", [row("exact", "none", 100.0)]), part("b2", [row("strict", "chain:4", 250.0)])
    old = part("a1", [row("approx", "none", 90.0), row("approx", "chain:4", 90.0, speedup=1.5)])
    by = ["precision", "context", "batch", "temperature", "workload", "strategy"]
    rows = join.joined([("exact", exact), ("strict", strict_class), ("old", old)], by)["rows"]
    assert [one.get("speedup") for one in rows] == [1.0, 2.5, 0.9, 1.5]
    assert [one.get("over_commit") for one in rows] == [None, None, "b2", None]
    newer = part("c3", [row("approx", "none", 80.0)])
    assert join.joined([("newer", newer), ("exact", exact)], by)["rows"][0] == {
        key: value for key, value in row("approx", "none", 80.0, speedup=0.8, over_commit="b2").items()
        if key != "tokens"
    }  # fmt: skip
    assert not any("tokens" in one for one in rows)


def test_joined_steps_are_over_that_of_one_token_at_their_own_commit():
    def row(width, step, **more):
        return {"preset": "1b", "context": 4096, "batch": 1, "width": width, "step_us": step, **more}

    new = result("shapes", [row(1, 100.0)]) | {"commit": "b2", "command": "shapes.py --out"}
    old = result("shapes", [row(1, 200.0), row(16, 300.0, over_decode=1.5)]) | {"commit": "a1", "command": "shapes.py"}
    rows = join.joined([("new", new), ("old", old)], ["preset", "context", "batch", "width"])["rows"]
    assert [one.get("over_decode") for one in rows] == [1.0, None]
    assert join.joined([("old", old)], ["width"])["rows"][1]["over_decode"] == 1.5
