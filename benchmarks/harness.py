"""Timing of operations inside one compiled loop, traces, the form of results and where they go."""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import typer
from jax.extend.backend import get_backend
from rich.console import Console

from specsa_jax.checkpoints.store import read_json, write_text
from specsa_jax.terminal import check_writable, clear_errors


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, fastest and slowest repeat."""

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Event:
    """A GPU kernel or copy of a trace: its stream, and when it ran, in µs from the trace's first one."""

    name: str
    stream: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


def measure(
    step: Callable[[Any, Any], Any],
    state: Any,
    buffers: Sequence[Any],
    *,
    iterations: int = 128,
    repeats: int = 15,
    seconds: float = 1.0,
    unroll: int = 8,
) -> Timing:
    """Times ``state = step(state, buffer)`` in a :class:`Loop`; at most about ``seconds`` are spent on repeats."""
    return Loop(step, state, buffers, iterations, unroll).timing(repeats, seconds)


class Loop:
    """``state = step(state, buffer)`` as a compiled loop over ``buffers``, ``iterations`` times or more through all.

    Dispatch is paid once a loop. ``buffers`` are separate arguments, because slicing one big array in the loop would
    copy; together they should exceed the L2 cache where the operation reads from HBM in real use. Every step must
    depend on the state before it, or XLA moves it out of the loop. The loop's body has at least ``unroll`` steps:
    between two rounds of a loop a GPU rests for some 10 µs. For a step of a whole model that is nothing, but eight of
    them take minutes to compile: ``unroll`` 1.

    The loop's state is donated, so that a step can update it in place; repeats go on from it. ``state`` is left alone,
    unless ``keep`` is False: then it is given up, and no second one is in memory. Where ``state`` and ``buffers`` are
    shapes (``jax.ShapeDtypeStruct``) there is nothing to run before :meth:`on` gives arrays. ``options``: of the
    compiler.
    """

    def __init__(
        self,
        step: Callable[[Any, Any], Any],
        state: Any,
        buffers: Sequence[Any],
        iterations: int,
        unroll: int = 8,
        keep: bool = True,
        options: dict[str, Any] | None = None,
    ):
        rounds = -(-unroll // len(buffers)) if iterations > 1 else 1
        iterations = -(-iterations // rounds)
        self.steps = iterations * rounds * len(buffers)

        @functools.partial(jax.jit, donate_argnums=0)
        def loop(state, buffers):
            def body(_, state):
                for _ in range(rounds):
                    for buffer in buffers:
                        state = step(state, buffer)
                return state

            return jax.lax.fori_loop(0, iterations, body, state)

        begun = time.perf_counter()
        self._compiled, self._buffers = loop.lower(state, buffers).compile(options), buffers
        self.compile_seconds = time.perf_counter() - begun
        abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
        self._state = jax.tree.map(jnp.copy, state) if keep and not abstract else state
        self._warm = False

    def on(self, state: Any, buffers: Sequence[Any]) -> Loop:
        """The same program on other arrays of these shapes; ``state`` is left alone."""
        other = copy.copy(self)
        other._state, other._buffers, other._warm = jax.tree.map(jnp.copy, state), buffers, False
        return other

    def seconds(self) -> float:
        """Wall time of one run; of the second, before the first one: that loads the program and captures its graphs."""
        if not self._warm:
            self._warm = True
            self.seconds()
        start = time.perf_counter()
        self._state = jax.block_until_ready(self._compiled(self._state, self._buffers))
        return time.perf_counter() - start

    def timing(self, repeats: int = 15, seconds: float = 1.0) -> Timing:
        """Of a step, from at least 3 runs (fewer if ``repeats`` are) and at most about ``seconds``."""
        times = [self.seconds()]
        while len(times) < repeats and (len(times) < 3 or sum(times) < seconds):
            times.append(self.seconds())
        scale = 1e6 / self.steps
        return Timing(statistics.median(times) * scale, min(times) * scale, max(times) * scale)

    @property
    def temporary_bytes(self) -> int:
        """What the compiled loop takes besides its arguments and results."""
        return self._compiled.memory_analysis().temp_size_in_bytes

    def events(self) -> list[Event]:
        """What ran on the GPU in one run."""
        return trace(self.seconds)[1]

    def kernels(self) -> dict[str, float]:
        """µs a step of each GPU kernel, by name, from the profiler; and ``span``, from the first one's start to the
        last one's end. Empty where there is no GPU."""
        events = self.events()
        if not events:
            return {}
        total = by_name(events)
        return {name: value / self.steps for name, value in [*total.items(), ("span", span(events))]}


def trace(function: Callable[[], Any]) -> tuple[Any, list[Event]]:
    """What ``function`` gives, and what ran on GPUs meanwhile, in order; nothing where there is no GPU.

    The profiler itself takes time: time the function in another run.
    """
    events = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            result = function()
        (path,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            streams = [line for line in plane.lines if "GPU" in plane.name and "Stream" in line.name]
            events += [(event.start_ns, event.duration_ns, event.name, line.name)
                       for line in streams for event in line.events]  # fmt: skip
    events.sort()
    return result, [Event(name, stream, (start - events[0][0]) / 1e3, duration / 1e3)
                    for start, duration, name, stream in events]  # fmt: skip


def by_name(events: Sequence[Event]) -> dict[str, float]:
    """Total µs of the events of each name, the longest first."""
    total: collections.Counter[str] = collections.Counter()
    for event in events:
        total[event.name] += event.duration
    return dict(total.most_common())


def span(events: Sequence[Event]) -> float:
    """µs from the first event's start to the last one's end."""
    return max(event.end for event in events) - min(event.start for event in events)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second at which the device reads and writes an array larger than its caches, each byte counted twice.

    What floors are computed from. The fastest of several loops: whatever else runs only takes away.
    """
    size = 2**30 if jax.default_backend() == "gpu" else 2**27
    step = lambda state, _: state + 1.0  # noqa: E731
    # One step a round: several would become one addition.
    loop = Loop(step, jnp.zeros(size // 4, jnp.float32), [()], iterations=16, unroll=1, keep=False)
    return 2 * size / (loop.timing(repeats=7).low / 1e6)


@functools.cache
def environment() -> dict[str, str | int | None]:
    """What a figure depends on: device, versions, commit, command line."""
    return {
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "backend": get_backend().platform_version,
        "python": platform.python_version(),
        "commit": _commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _commit() -> str | None:
    """The commit's short hash, with ``-dirty`` where files other than results differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parents[1], capture_output=True, text=True).stdout

    commit = git("rev-parse", "--short", "HEAD").strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return commit + ("-dirty" if changed else "") if commit else None


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows that share their keys; numbers right-aligned."""
    cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    header = list(rows[0])
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    for row in [header, *cells]:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(len(first)), *rest]))


def save(path: str | Path, rows: Sequence[dict[str, Any]], **summary: Any) -> None:
    """Writes the rows, and what sums them up, with :func:`environment` as JSON. Whole files only."""
    write(Path(path), {**environment(), **summary, "rows": rows})


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result file, beside its place and then into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A result file, as :func:`save` writes it. Raises ValueError for any other."""
    result = read_json(path)
    rows = result.get("rows")
    if not {"device", "command"} <= set(result) or not isinstance(rows, list) or not all(
        isinstance(row, dict) for row in rows
    ):  # fmt: skip
        raise ValueError(f"{path}: got other JSON, expected a result file with device, command and rows")
    return result


def device_folder(kind: str | None = None) -> Path:
    """``benchmarks/results/DEVICE`` of a device kind, by default of the present one: ``cpu``, ``nvidia-h100``, …"""
    words = re.findall(r"[a-z0-9]+", (kind or jax.devices()[0].device_kind).lower())
    # Up to the model's name: what follows is memory and form factor.
    last = next((index for index, word in enumerate(words) if any(map(str.isdigit, word))), len(words) - 1)
    return Path(__file__).parent / "results" / "-".join(words[: last + 1])


def run(main: Callable[[], None]) -> None:
    """A script: bad input ends with one line and exit code 2, as in the commands; what fails later also says where."""
    Rows.begun = False
    try:
        with clear_errors(Console(stderr=True, highlight=False)):
            main()
    except typer.Exit as ended:
        if Rows.begun and ended.__cause__ is not None:
            traceback.print_exception(ended.__cause__)
        sys.exit(ended.exit_code)


def _option(kind: Callable[[str], Any], wanted: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """What reads an argument of a command line: a value of ``kind`` that ``holds``."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {wanted}")

    return parse


count = _option(int, "a whole number of at least 1", lambda value: value >= 1)
number = _option(float, "a finite number of at least 0", lambda value: 0 <= value < math.inf)
seconds = _option(float, "seconds, at least 0", lambda value: value >= 0)


def out_file(text: str) -> str:
    """Of a command line: where results can be written; "": in their usual place."""
    try:
        if text:
            check_writable("out", Path(text), parents=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("out: ")) from error
    return text


def arguments(doc: str | None, *, rows: bool = False) -> argparse.ArgumentParser:
    """A script's parser: its docstring as the help, ``--out``; with ``rows`` the options of :class:`Rows` too."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", nargs="?", const="", type=out_file, help="write JSON to this path; without one, to "
                        "the script's name in benchmarks/results/DEVICE/")  # fmt: skip
    if rows:
        parser.add_argument("--resume", action="store_true", help="keep the rows that the file holds, of this "
                            "commit and options, and measure the others; of another device: refused")  # fmt: skip
        parser.add_argument("--budget", type=seconds, default=math.inf, help="seconds after which no other row begins")
    return parser


def out_path(args: argparse.Namespace, suffix: str = "") -> Path | None:
    """Where ``--out`` says that results go, with ``suffix`` behind the script's name; None: nowhere."""
    if args.out is None:
        return None
    return Path(args.out) if args.out else device_folder() / f"{Path(sys.argv[0]).stem}{suffix}.json"


# What a figure may fail by without spoiling the others: kernels that do not take a shape, a device without memory.
FAILURES = (NotImplementedError, jax.errors.JaxRuntimeError)


def not_run(error: Exception) -> dict[str, str]:
    """What a row has in place of figures."""
    if "RESOURCE_EXHAUSTED" in str(error):
        return {"not_run": "out of memory"}
    return {"not_run": f"{type(error).__name__}: {error}"[:400]}


class Rows:
    """A result file that grows row by row, so that a run may be stopped and gone on with.

    ``axes`` name what tells rows apart; ``summary`` is written beside them. With ``--resume`` the rows of a file that
    was written on the same device, at the same commit and with the same summary are kept, but those that did not run.
    One of another commit or summary is replaced as soon as there is a row, and never by a file without any. Raises
    ValueError for one of another device, and for one that holds no such rows.
    """

    begun = False  # whether there has been a row

    def __init__(self, args: argparse.Namespace, axes: Sequence[str], suffix: str = "", **summary: Any):
        self.path, self.axes, self.summary = out_path(args, suffix), axes, summary
        self.rows: list[dict[str, Any]] = []
        self._end, self.complete = time.perf_counter() + args.budget, True
        if args.resume and self.path is not None and self.path.exists():
            before, here = read(self.path), environment()
            if before["device"] != here["device"]:
                raise ValueError(f"resume: got {self.path}, of device {before['device']!r}, expected "
                                 f"{here['device']!r}, or another --out")  # fmt: skip
            if not all(axis in row for row in before["rows"] for axis in axes):
                raise ValueError(f"resume: got {self.path}, expected rows with {', '.join(axes)}")
            now = {"commit": here["commit"]} | json.loads(json.dumps(summary))
            other = [name for name, value in now.items() if before.get(name) != value]
            if other:
                print(f"{self.path} has another {', '.join(other)}: replaced as soon as there is a row", flush=True)
            else:
                self.rows = [row for row in before["rows"] if "not_run" not in row]
        self._known = {self._key(row) for row in self.rows}

    def _key(self, row: dict[str, Any]) -> str:
        return json.dumps([row[axis] for axis in self.axes])

    def wanted(self, **axes: Any) -> bool:
        """Whether a row of these axes is still to be measured, and there is time."""
        if self._key(axes) in self._known:
            return False
        return self.in_time()

    def in_time(self) -> bool:
        """Whether another row may begin."""
        self.complete &= time.perf_counter() < self._end
        return self.complete

    def find(self, **axes: Any) -> dict[str, Any] | None:
        """The row of these values, if it is there; of several the first."""
        return next((row for row in self.rows if all(row[name] == value for name, value in axes.items())), None)

    def add(self, row: dict[str, Any], shown: Sequence[str] | None = ()) -> None:
        """Keeps and saves a row; prints its columns ``shown`` (empty: all that are no lists; None: nothing)."""
        Rows.begun = True
        self.rows.append(row)
        self._known.add(self._key(row))
        if shown is not None:
            words = {name: row[name] for name in shown or row if not isinstance(row.get(name, []), (list, dict))}
            print("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                            for name, value in words.items()), flush=True)  # fmt: skip
        self.save(complete=False)

    def save(self, complete: bool | None = None, **summary: Any) -> None:
        """Writes the file; ``complete``: no row is missing for lack of time."""
        self.summary |= summary
        if self.path is not None and (self.rows or not self.path.exists()):
            save(self.path, self.rows, complete=self.complete if complete is None else complete, **self.summary)


def kernel_arguments(doc: str | None) -> argparse.ArgumentParser:
    """The parser of the scripts that compare a kernel with XLA's code on named cases."""
    parser = arguments(doc)
    parser.add_argument("cases", nargs="*", help="only cases whose name contains one of these")
    parser.add_argument("--tune", action="store_true", help="measure every config of the search space")
    parser.add_argument("--interpret", action="store_true", help="interpret the kernel")
    parser.add_argument("--tiny", action="store_true", help="one small case, once")
    parser.add_argument("--seconds", type=float, default=0.2, help="spent on each figure's repeats")
    return parser


def run_cases(
    args: argparse.Namespace, cases: Sequence[Any], tiny: Any, run: Callable[[Any, Any], list[dict[str, Any]]]
) -> None:
    """``run(case, args)`` of each of the cases that ``args`` name, as a table and, where asked, JSON."""
    chosen = [tiny] if args.tiny else cases
    rows = [row for case in chosen if not args.cases or any(part in case.name for part in args.cases)
            for row in run(case, args)]  # fmt: skip
    if not rows:
        raise ValueError(f"cases: got {' '.join(args.cases)}, expected parts of {', '.join(c.name for c in chosen)}")
    print_table(rows)
    if path := out_path(args):
        save(path, rows)


def floor_fraction(needed: int, times: dict[str, float]) -> float:
    """The fraction of the speed at which the ``needed`` bytes could be moved, of a call's ``times`` in µs."""
    return needed / copy_bandwidth() * 1e6 / times["median"]
