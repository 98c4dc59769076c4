"""benchmarks/spread.py: command lines on all GPUs of a host."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest
import spread

PYTHON = f"{sys.executable} -c"


def test_each_gpu_takes_the_next_line_and_output_and_exit_codes_are_kept(tmp_path):
    lines = [f"{PYTHON} 'import os; print(os.environ[\"CUDA_VISIBLE_DEVICES\"], {{left}})'"] * 3
    lines += [f"{PYTHON} 'raise SystemExit(3)'", "no-such-program"]
    rows = spread.spread(lines, 2, 60.0, tmp_path)
    assert sorted(row["code"] for row in rows) == [0, 0, 0, 3, 127]
    by_line = {row["line"]: row["code"] for row in rows}
    assert by_line["no-such-program"] == 127 and by_line[lines[3]] == 3
    seen = [(tmp_path / f"{number}.log").read_text().split() for number in range(3)]
    assert {gpu for gpu, _ in seen} <= {"0", "1"}
    assert all(0 < int(left) <= 60 - spread.SPARE for _, left in seen)
    assert "no-such-program" in (tmp_path / "4.log").read_text()


def test_what_is_not_over_in_time_is_interrupted_and_what_is_left_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(spread, "SPARE", 1)
    monkeypatch.setattr(spread, "PATIENCE", 1)
    kept = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    lines = [f'{PYTHON} "{kept}"', f'{PYTHON} "{deaf}"', "true"]
    begun = time.monotonic()
    rows = spread.spread(lines, 2, 3.0, tmp_path)
    assert time.monotonic() - begun < 30
    assert {row["line"]: row.get("code") for row in rows} == {lines[0]: 0, lines[1]: -9, "true": None}
    assert (tmp_path / "0.log").read_text() == "kept\n"


def test_ctrl_c_ends_what_runs_and_what_waits(tmp_path):
    (tmp_path / "lines").write_text(f"{PYTHON} \"import time; print('up', flush=True); time.sleep(60)\"\n" * 2)
    command = [sys.executable, spread.__file__, str(tmp_path / "lines"), "--gpus", "1", "--logs", str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(spread.__file__).parents[1])
    begun = time.monotonic()
    while not ((tmp_path / "0.log").exists() and (tmp_path / "0.log").read_text()) and time.monotonic() < begun + 60:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert "KeyboardInterrupt" in (tmp_path / "0.log").read_text() and not (tmp_path / "1.log").exists()


@pytest.mark.parametrize("text, words", [("", "lines: got none"), ("echo 'x\n", 'lines: got "echo \'x": No closing')])
def test_lines_that_are_none_are_refused_before_anything_runs(text, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "lines").write_text(text)
    monkeypatch.setattr(
        sys, "argv", ["spread.py", str(tmp_path / "lines"), "--gpus", "1", "--logs", str(tmp_path / "x")]
    )
    with pytest.raises(SystemExit) as ended:
        harness.run(spread.main)
    assert ended.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "x").exists()
