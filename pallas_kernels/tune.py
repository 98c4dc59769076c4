"""Measures the kernels' configs on the present device: ``python -m pallas_kernels.tune [NAME ...]``.

For each benchmark spec whose name contains a NAME it walks through the config's search space, of attention one axis at
a time, keeping the fastest value of each, and writes the winner into the device's data file after every spec. A run
that was cut off goes on where it stopped; ``--again`` measures what the file holds anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch, tuned
from pallas_kernels.attention import MAX_GROUP, AttentionConfig, attend
from pallas_kernels.attention import specs as attention_specs
from pallas_kernels.commit import CommitConfig, commit
from pallas_kernels.commit import specs as commit_specs
from pallas_kernels.compress import CompressConfig, compress
from pallas_kernels.compress import specs as compress_specs
from pallas_kernels.selection import SelectionConfig, select_blocks
from pallas_kernels.selection import specs as selection_specs

# Inputs rotate, so that each call reads from HBM: together they are larger than an L2 cache.
ROTATED_BYTES, LOOP_US = 120e6, 4000


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """One entry to be measured.

    Attributes:
      name: the spec's, with its group.
      kind: of ``tuned.KINDS``: the list of the file.
      key: what identifies the entry, and what :mod:`pallas_kernels.tuned` looks it up by.
      space: the configs, the heuristic's first.
      prepare: makes the inputs and gives a function that compiles a config, to one that measures microseconds a call.
    """

    name: str
    kind: str
    key: dict[str, Any]
    space: Sequence[Any]
    prepare: Callable[[], Callable[[Any], Callable[[], float]]]


def tasks(names: Sequence[str] = ()) -> list[Task]:
    """The tasks whose names contain any of ``names``, in the names' order; all if there are none.

    Raises ValueError where none does.
    """
    found = [*map(_selection, selection_specs.BENCHMARKS), *map(_commit, commit_specs.BENCHMARKS)]
    for spec in attention_specs.BENCHMARKS:
        group = AttentionConfig.heuristic(spec.sparsity, spec.shape).group
        found += [_attention(spec, own) for own in dict.fromkeys((group, min(spec.width, MAX_GROUP), 1))]
    # Of tails of one shape the longest, in which blocks end most often; where none does, no config matters.
    found += map(_compress, {spec.shape: spec for spec in compress_specs.BENCHMARKS if any(spec.used)}.values())
    chosen = list(dict.fromkeys(task for name in names or ("",) for task in found if name in task.name))
    if not chosen:
        raise ValueError(f"names: got {', '.join(names)}, expected parts of names such as {found[-1].name}")
    return chosen


def tune(
    todo: Iterable[Task],
    path: Path,
    *,
    budget: float = math.inf,
    again: bool = False,
    clock: Callable[[], float] = time.monotonic,
    report: Callable[[Task, dict[str, Any] | None], None] = lambda task, entry: None,
) -> bool:
    """Measures ``todo`` into the file ``path``; entries that it holds are kept, and not measured unless ``again``.

    Args:
      budget: seconds after which nothing else is begun; a task that it interrupts leaves no entry.
      report: is told of each task, with its entry, or None when it begins.

    Returns whether all tasks are in the file. Raises TuningError for a file that is broken or of another device,
    OSError for one that cannot be read, ValueError for a budget that is none.
    """
    if not budget >= 0:  # NaN is not
        raise ValueError(f"budget: got {budget}, expected at least 0 seconds")
    start, device = clock(), jax.devices()[0].device_kind
    data: dict[str, Any] = {"schema": tuned.SCHEMA, "device": device} | {kind: [] for kind in tuned.KINDS}
    if path.exists():
        data = tuned.parse(path.read_bytes(), str(path))
        if data["device"] != device:
            raise tuned.TuningError(f"{path}: was measured on {data['device']}, this is {device}")
    data["jax"] = jax.__version__
    path.parent.mkdir(parents=True, exist_ok=True)  # now, not when the first task has taken minutes
    for task in todo:
        known = [entry for entry in data[task.kind] if task.key.items() <= entry.items()]
        if known and not again:
            continue
        report(task, None)
        build = task.prepare()
        times: dict[Any, float] = {}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for configs in descend(task.space, times):
                # Compiling takes many times as long as measuring, on one core; but what compiles slows launches down.
                programs = [pool.submit(build, config) for config in configs]
                wait(programs)
                for config, program in zip(configs, programs, strict=True):
                    if clock() - start > budget:
                        return False
                    times[config] = _measured(program)
        best = min(times, key=lambda config: times[config])
        entry = {
            **task.key, "config": dataclasses.asdict(best), "microseconds": round(times[best], 2),
            "heuristic_microseconds": round(times[task.space[0]], 2),
        }  # fmt: skip
        data[task.kind] = [other for other in data[task.kind] if other not in known] + [entry]
        write(path, data)
        report(task, entry)
    return True


def _measured(program: Future[Callable[[], float]]) -> float:
    """Microseconds; infinite for a config that asks for more than the device has."""
    try:
        return program.result()()
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|out of resource|shared memory", str(error)):
            raise
        return math.inf


def descend(space: Sequence[Any], times: dict[Any, float]) -> Iterable[list[Any]]:
    """Configs to measure next, all of which the caller puts into ``times``: the first of ``space``, then that with what
    others of it have along one of its ``AXES`` after the other, the rest at its best. All combinations would take hours
    of compilation. A config without ``AXES`` has one, of all fields.
    """
    best = space[0]
    yield [best]
    for axis in getattr(best, "AXES", [[field.name for field in dataclasses.fields(best)]]):
        values = [{name: getattr(config, name) for name in axis} for config in space]
        others = list(dict.fromkeys(dataclasses.replace(best, **change) for change in values))
        yield [config for config in others if config not in times]
        best = min(others, key=lambda config: times[config])


def write(path: Path, data: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def default_path() -> Path:
    """Where the present device's file lies in this installation."""
    return Path(tuned.__file__).with_name(f"{tuned.slug(jax.devices()[0].device_kind)}.json")


def compiled(step: Callable[[Any, Any], Any], state: Any, buffers: Sequence[Any], guess: float) -> Callable[[], float]:
    """Compiles a loop of ``state = step(state, buffer)``; gives what measures a step's median microseconds.

    ``guess``: of them, for the loop's length. Steps may update the state in place; ``state`` itself is left alone.
    """
    iterations = max(1, math.ceil(LOOP_US / (guess * len(buffers))))

    def loop(state: Any, buffers: Any) -> Any:
        def body(_, state):
            for buffer in buffers:
                state = step(state, buffer)
            return state

        return jax.lax.fori_loop(0, iterations, body, state)

    program = jax.jit(loop, donate_argnums=0).lower(state, buffers).compile()

    def measure() -> float:
        times, own = [], jax.tree.map(jnp.copy, state)
        for _ in range(10):
            start = time.perf_counter()
            own = jax.block_until_ready(program(own, buffers))
            times.append(time.perf_counter() - start)
        # The first ones load the program and capture graphs.
        return 1e6 * statistics.median(times[2:]) / (iterations * len(buffers))

    return measure


def _depending(integers: jax.Array, out: jax.Array) -> jax.Array:
    """``integers``, as if they depended on ``out``: without that XLA moves a call out of the loop."""
    out = jax.lax.optimization_barrier(out).reshape(-1)[0]
    return jax.lax.optimization_barrier(integers + jnp.minimum(jnp.abs(out).astype(jnp.int32), 0))


def _attention(spec: attention_specs.AttentionSpec, group: int) -> Task:
    shape = spec.shape
    key = {
        "dtype": spec.dtype,
        "shape": {name: getattr(shape, name) for name in (*tuned.EXACT, *tuned.NEAREST)},
        "sparsity": {name: getattr(spec.sparsity, name) for name in tuned.BLOCKS},
        "group": group,
    }

    def prepare() -> Callable[[AttentionConfig], Callable[[], float]]:
        token = 2 * shape.num_kv_heads * shape.head_dim * jnp.dtype(spec.dtype).itemsize
        read = shape.batch * token * (shape.table * spec.sparsity.entries_per_page + spec.sparsity.window)
        buffers = [spec.arguments(seed) for seed in range(max(1, min(24, math.ceil(ROTATED_BYTES / read))))]

        def build(config: AttentionConfig) -> Callable[[], float]:
            @jax.jit  # traced once for all buffers
            def step(lengths, arguments):
                arguments = (*arguments[:4], lengths, arguments[5])
                return _depending(lengths, attend(spec.sparsity, *arguments, config=config)[0])

            return compiled(step, buffers[0][4], buffers, guess=max(15, read / 3e6))

        return build

    return Task(f"{spec.name}-C{group}", "attention", key,
                AttentionConfig.search_space(spec.sparsity, shape, group, dtype=spec.dtype), prepare)  # fmt: skip


def _selection(spec: selection_specs.SelectionSpec) -> Task:
    counts: dict[str, Any] = spec.counts

    def prepare() -> Callable[[SelectionConfig], Callable[[], float]]:
        arguments = [jax.device_put(spec.arguments(seed)) for seed in range(4)]

        def build(config: SelectionConfig) -> Callable[[], float]:
            def step(positions, scores):
                return _depending(positions, select_blocks(scores, positions, config=config, **counts))

            return compiled(step, arguments[0][1], [scores for scores, _ in arguments], guess=5)

        return build

    return Task(f"select-{spec.name}", "selection", {"rows": spec.rows, "num_blocks": spec.shape[-1]},
                _space(SelectionConfig, spec.rows, spec.shape[-1]), prepare)  # fmt: skip


def _commit(spec: commit_specs.CommitSpec) -> Task:
    def prepare() -> Callable[[CommitConfig], Callable[[], float]]:
        layer, page_table, buffers = jax.device_put(spec.rotated(8))

        def build(config: CommitConfig) -> Callable[[], float]:
            def step(layer, buffer):
                return commit(layer, buffer[0], page_table, *buffer[1:], compress_block=spec.block, config=config)

            return compiled(step, layer, buffers, guess=5)

        return build

    return Task(f"commit-{spec.name}", "commit", {"shape": dataclasses.asdict(spec.shape)},
                _space(CommitConfig, spec.shape), prepare)  # fmt: skip


def _compress(spec: compress_specs.CompressSpec) -> Task:
    def prepare() -> Callable[[CompressConfig], Callable[[], float]]:
        first = jax.device_put(spec.arguments())
        # Weights that lie elsewhere: what they are does not matter.
        copies = [jax.tree.map(jnp.copy, first) for _ in range(math.ceil(ROTATED_BYTES / spec.bytes) - 1)]

        def build(config: CompressConfig) -> Callable[[], float]:
            @jax.jit  # traced once for all buffers
            def step(start, arguments):
                key, value, slot, back, _, rotation = arguments
                return _depending(start, compress(key, value, slot, back, start, rotation, config=config)[0])

            return compiled(step, first[4], [first, *copies], guess=max(15, spec.bytes / 3e6))

        return build

    return Task(f"compress-{spec.name}", "compress", {"shape": dataclasses.asdict(spec.shape)},
                _space(CompressConfig, spec.shape), prepare)  # fmt: skip


def _space(config: type[Any], *sizes: Any) -> list[Any]:
    """Its search space for these sizes, the heuristic's first."""
    return list(dict.fromkeys([config.heuristic(*sizes), *config.search_space(*sizes)]))


def run(names: Sequence[str] = (), out: Path | None = None, budget: float = math.inf, again: bool = False) -> bool:
    """:func:`tune` with progress on the terminal; True when everything that was asked for is in the file.

    Raises UnsupportedError where the kernels do not run, before anything is measured.
    """
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    todo, path = tasks(names), out or default_path()
    if reason := _dispatch.device_limit(ptx=any(task.kind == "attention" for task in todo)):
        raise _dispatch.UnsupportedError(reason)
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(todo))

        def report(task: Task, entry: dict[str, Any] | None) -> None:
            progress.update(bar, completed=todo.index(task) + (entry is not None), description=task.name)
            if entry:
                progress.console.print(
                    f"{task.name}: {entry['microseconds']} µs, {entry['heuristic_microseconds']} by the heuristic"
                )

        complete = tune(todo, path, budget=budget, again=again, report=report)
        progress.console.print(f"{'complete' if complete else 'the budget is spent; run again to go on'}: {path}")
    return complete


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Bad input, or no GPU, ends with one line on standard error and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of spec names, e.g. B8-T8-H32x8; none: all")
    parser.add_argument("--out", type=Path, help="the data file; by default the one that the kernels read")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin nothing after that")
    parser.add_argument("--again", action="store_true", help="measure entries that the file holds anew")
    args = parser.parse_args(argv)
    try:
        run(args.names, args.out, args.budget, args.again)
    except ModuleNotFoundError as error:  # the kernels need nothing but JAX
        name = str(error.name).partition(".")[0]
        parser.exit(2, f"error: {name}, which shows the progress, is not installed: pip install {name}\n")
    except (_dispatch.UnsupportedError, ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
