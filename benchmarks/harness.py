"""Timing of operations inside one compiled loop, and the form of results."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax.extend.backend import get_backend


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, fastest and slowest repeat."""

    median: float
    low: float
    high: float


def measure(
    step: Callable[[Any, Any], Any],
    state: Any,
    buffers: Sequence[Any],
    *,
    iterations: int = 128,
    repeats: int = 15,
    seconds: float = 1.0,
) -> Timing:
    """Times ``state = step(state, buffer)`` in a :class:`Loop`; at most about ``seconds`` are spent on repeats."""
    loop = Loop(step, state, buffers, iterations)
    times = [loop.seconds()]
    while len(times) < repeats and (len(times) < 3 or sum(times) < seconds):
        times.append(loop.seconds())
    scale = 1e6 / loop.steps
    return Timing(statistics.median(times) * scale, min(times) * scale, max(times) * scale)


class Loop:
    """``state = step(state, buffer)`` as a compiled loop over ``buffers``, ``iterations`` times or more through all.

    Dispatch is paid once a loop. ``buffers`` are separate arguments, because slicing one big array in the loop would
    copy; together they should exceed the L2 cache where the operation reads from HBM in real use. Every step must
    depend on the state before it, or XLA moves it out of the loop. The loop's body has at least 8 steps: between two
    rounds of a loop a GPU rests for some 10 µs.

    The loop's state is donated, so that a step can update it in place; repeats go on from it. ``state`` is left alone.
    """

    def __init__(self, step: Callable[[Any, Any], Any], state: Any, buffers: Sequence[Any], iterations: int):
        rounds = -(-8 // len(buffers)) if iterations > 1 else 1
        iterations = -(-iterations // rounds)
        self.steps = iterations * rounds * len(buffers)

        @partial(jax.jit, donate_argnums=0)
        def loop(state, buffers):
            def body(_, state):
                for _ in range(rounds):
                    for buffer in buffers:
                        state = step(state, buffer)
                return state

            return jax.lax.fori_loop(0, iterations, body, state)

        self._compiled, self._buffers = loop.lower(state, buffers).compile(), buffers
        self._state = jax.tree.map(jnp.copy, state)
        self.seconds()  # loads the program and captures its graphs

    def seconds(self) -> float:
        """Wall time of one run."""
        start = time.perf_counter()
        self._state = jax.block_until_ready(self._compiled(self._state, self._buffers))
        return time.perf_counter() - start

    def kernels(self) -> dict[str, float]:
        """µs a step of each GPU kernel, by name, from the profiler; and ``span``, from the first one's start to the
        last one's end. Empty where there is no GPU."""
        total: collections.Counter[str] = collections.Counter()
        starts, ends = [], []
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                self.seconds()
            (path,) = Path(folder).rglob("*.xplane.pb")
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                streams = [line for line in plane.lines if "GPU" in plane.name and "Stream" in line.name]
                for event in (event for line in streams for event in line.events):
                    total[event.name] += event.duration_ns
                    starts.append(event.start_ns)
                    ends.append(event.start_ns + event.duration_ns)
        if not total:
            return {}
        total["span"] = max(ends) - min(starts)
        return {name: value / 1e3 / self.steps for name, value in total.most_common()}


def environment() -> dict[str, str | int | None]:
    """What a figure depends on: device, versions, commit, command line."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return {
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "backend": get_backend().platform_version,
        "python": platform.python_version(),
        "commit": git.stdout.strip() or None,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows that share their keys; numbers right-aligned."""
    cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    header = list(rows[0])
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    for row in [header, *cells]:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(len(first)), *rest]))


def save(path: str | Path, rows: Sequence[dict[str, Any]], **summary: Any) -> None:
    """Writes the rows, and what sums them up, with :func:`environment` as JSON: beside ``path``, then renamed."""
    path = Path(path)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps({**environment(), **summary, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)
