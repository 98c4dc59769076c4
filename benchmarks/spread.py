"""Runs command lines beside each other on the GPUs of a host: each GPU takes the next line when it is free.

A line is a command as in a shell, without one: quotes, but no pipes or variables. ``{left}`` in it is replaced by the
whole seconds that remain for it when it begins, for ``--budget``. What is not over when the time is gets SIGINT (what
has a budget has kept its rows by then), and is killed 10 s later. Output goes to files in --logs, by the line's number,
from 0 on.

    python benchmarks/spread.py --seconds 540 --logs logs <<END
    python benchmarks/end_to_end.py --batches 1 --resume --budget {left} --out e2e-1.json
    python benchmarks/end_to_end.py --batches 8 --resume --budget {left} --out e2e-8.json
    END

Times of one GPU do not depend on the others, but what the host does may: it has fewer cores for each. join.py puts the
files together. Exit codes: 0, or 1 where a line failed or did not begin.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import harness

SPARE, PATIENCE = 25, 10  # seconds: that a line gets less than there are, and from SIGINT to SIGKILL


def count_gpus() -> int:
    """Of this host. Raises ValueError where the driver's tool finds none."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"gpus: got none, and nvidia-smi does not list them ({error}), expected a number") from error
    return listed.count("GPU ")


def words(line: str, left: float) -> list[str]:
    """A line's command and its arguments. Raises ValueError for quotes without an end."""
    try:
        return [word.replace("{left}", str(int(left))) for word in shlex.split(line)]
    except ValueError as error:
        raise ValueError(f"lines: got {line!r}: {error}, expected a command") from error


def run(command: list[str], gpu: int, log: Path, seconds: float, stopped: threading.Event) -> int:
    """The exit code of a command that sees one GPU, interrupted after ``seconds``, or when ``stopped`` is set."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}, stdout=out,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end and not stopped.wait(0.2):
            pass
        for kind in (signal.SIGINT, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, kind)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE)
        return process.wait()


def spread(lines: list[str], gpus: int, seconds: float, logs: Path) -> list[dict[str, Any]]:
    """What became of each line, in the order in which they ended; those that did not begin have no exit code."""
    end, waiting, rows = time.monotonic() + seconds, queue.SimpleQueue[tuple[int, str]](), []
    stopped = threading.Event()
    for job in enumerate(lines):
        waiting.put(job)

    def work(gpu: int) -> None:
        while (left := end - time.monotonic()) > SPARE and not stopped.is_set():
            try:
                number, line = waiting.get_nowait()
            except queue.Empty:
                return
            begun, log = time.monotonic(), logs / f"{number}.log"
            try:
                code = run(words(line, left - SPARE), gpu, log, left, stopped)
            except OSError as error:  # no such program
                log.write_text(f"{error}\n", encoding="utf-8")
                code = 127
            rows.append({"line": line, "gpu": gpu, "seconds": round(time.monotonic() - begun), "code": code})
            print(f"GPU {gpu}, {rows[-1]['seconds']} s, exit code {code}: {line}", flush=True)

    workers = [threading.Thread(target=work, args=(gpu,)) for gpu in range(gpus)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:  # for all of them
        stopped.set()
        raise
    while not waiting.empty():
        rows.append({"line": waiting.get()[1]})
        print(f"not begun: {rows[-1]['line']}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="of the lines; none: standard input")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all of them")
    parser.add_argument("--gpus", type=harness.count, help="default: those that nvidia-smi lists")
    parser.add_argument("--logs", type=Path, default=Path("logs"))
    args = parser.parse_args()
    text = sys.stdin.read() if args.file is None else args.file.read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines or any(not words(line, 0) for line in lines):
        raise ValueError("lines: got none, expected commands")
    gpus = args.gpus or count_gpus()
    args.logs.mkdir(parents=True, exist_ok=True)
    rows = spread(lines, gpus, args.seconds, args.logs)
    raise SystemExit(any(row.get("code") != 0 for row in rows))


if __name__ == "__main__":
    harness.run(main)
