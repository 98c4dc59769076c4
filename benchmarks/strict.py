"""The strict class on held-out prompts: every drafter and tree against decoding one token at a time, to the bit.

Compares tokens and the bits of their log-probabilities, greedy and sampled, alone and in ragged batches of 8. The
prompts are pieces of held-out files. Results are saved after each group of 8 prompts, so that a run may be stopped: the
JSON says how many prompts it got through with each drafter. A run goes on where the one that wrote ``--out`` stopped,
if model, settings, device and versions are the same. Compiled programs are kept where JAX_COMPILATION_CACHE_DIR says.

    python benchmarks/strict.py --out benchmarks/results/cpu/strict.json
    python benchmarks/strict.py --jobs 16 --out benchmarks/results/cpu/strict.json    # on a CPU of 16 cores
    XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/strict.py --prompts 56 --jobs 25 --dtype bfloat16 --out \
        strict.json    # on a GPU
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import harness
import numpy as np
from held_out import held_out_files

from specsa_jax import Engine, SamplingParams, Strategy
from specsa_jax.drafting import drafter_from_name

DRAFTERS = ["lookup", "self", "head", "model:embedded", "lookup+head"]
CASES = ["greedy", "greedy, batch of 8", "sampled", "sampled, batch of 8"]
TREES = ["chain:4", "3-1-1", "2-2", "best:6:3", "best:8:4"]


def prompts(engine: Engine, count: int) -> list[list[list[int]]]:
    """Groups of 8 pieces of held-out files: of 1 to 56 tokens, and of 57 to 120. With 8 new tokens each group's
    sequences have one page or two, so that all groups share a few programs; every other one crosses a page's end."""
    random, files = np.random.default_rng(0), held_out_files(engine)
    groups: list[list[list[int]]] = [[] for _ in range(-(-count // 8))]
    for place in range(8 * len(groups)):
        shortest, longest = ((1, 56), (57, 120))[place // 8 % 2]
        size = int(random.integers(shortest, longest + 1))
        ids: list[int] = []
        while len(ids) <= size:
            ids = files[int(random.integers(len(files)))][1]
        start = int(random.integers(len(ids) - size))
        groups[place // 8].append(ids[start : start + size])
    return groups


class Check:
    """Bits of strategies against those of decoding one token at a time, alone."""

    def __init__(self, engine: Engine, groups: list[list[list[int]]], new_tokens: int):
        self.engine, self.groups, self.new_tokens = engine, groups, new_tokens
        self.expected: dict[tuple[int, int], list] = {}

    def bits(self, rows, sampling, strategy):
        result = self.engine.generate(rows, self.new_tokens, sampling=sampling, strategy=strategy)
        return [(g.tokens.tolist(), g.logprobs.tobytes()) for g in result], result.stats.accepted

    def group(self, index: int, strategy: Strategy) -> tuple[np.ndarray, int]:
        """int [greedy or sampled, alone or in a batch] of identical sequences; accepted drafts."""
        rows = self.groups[index]
        same, accepted = np.zeros((2, 2), int), 0
        for kind in range(2):
            sampling = [
                SamplingParams(temperature=0.8 * kind, top_p=0.95, seed=8 * index + i) for i in range(len(rows))
            ]
            each = list(zip(rows, sampling, strict=True))
            if (index, kind) not in self.expected:
                plain = Strategy(None, precision="strict")
                self.expected[index, kind] = [self.bits([row], [params], plain)[0][0] for row, params in each]
            alone = [self.bits([row], [params], strategy)[0][0] for row, params in each]
            together, stood = self.bits(rows, sampling, strategy)
            accepted += stood
            for place, got in enumerate((alone, together)):
                same[kind, place] = sum(a == b for a, b in zip(got, self.expected[index, kind], strict=True))
        return same, accepted


class Worker:
    """A process's engine and its comparisons, made once."""

    check: Check
    drafter: str | None = None

    @classmethod
    def start(cls, options: argparse.Namespace, cores: list[int]) -> None:
        """In a process of its own, with cores of its own where there are as many."""
        if cores:
            os.sched_setaffinity(0, cores)
        engine = make_engine(options)
        cls.check = Check(engine, prompts(engine, options.prompts), options.new_tokens)

    @classmethod
    def group(cls, until: float, drafter: str, tree: str, checkpoint: str, index: int) -> tuple[np.ndarray, int] | None:
        """As :meth:`Check.group`; None behind the time ``until``."""
        if time.time() > until:
            return None
        if drafter != cls.drafter:
            # Each drafter has programs of its own, and a process room for a few hundred.
            cls.check.engine.forget_programs()
            cls.drafter = drafter
        return cls.check.group(index, Strategy(drafter_from_name(drafter, checkpoint), tree, precision="strict"))


def make_engine(options: argparse.Namespace) -> Engine:
    return Engine.from_pretrained(
        options.checkpoint, max_length=128, precision="strict", prefill_chunk=16,
        implementation=options.implementation, dtype=options.dtype,
    )  # fmt: skip


def results(options: argparse.Namespace, tasks: list[tuple[str, str, int]]) -> Iterator[tuple[str, str, int, Any]]:
    """(drafter, tree, group, what :meth:`Check.group` gives); the groups of a drafter and tree in their order; none
    begun after ``--seconds``."""
    until = time.time() + options.seconds
    work = {task: (until, *task[:2], options.checkpoint, task[2]) for task in tasks}
    if options.jobs == 1:
        Worker.start(options, [])
        for task, arguments in work.items():
            if (found := Worker.group(*arguments)) is None:
                return
            yield *task, found
        return
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would lose
    cores = sorted(os.sched_getaffinity(0))
    pools = [
        ProcessPoolExecutor(1, context, initializer=Worker.start,
                            initargs=(options, cores[job :: options.jobs] or [cores[job % len(cores)]]))
        for job in range(options.jobs)
    ]  # fmt: skip
    # Groups of one length, drafter and tree are one process's: no other compiles their programs.
    kinds = list(dict.fromkeys((drafter, tree, index % 2) for drafter, tree, index in tasks))
    futures = {
        pools[kinds.index((drafter, tree, index % 2)) % options.jobs].submit(Worker.group, *work[drafter, tree, index]):
        (drafter, tree, index) for drafter, tree, index in tasks
    }  # fmt: skip
    following: dict[tuple[str, str], list[int]] = {}
    for drafter, tree, index in tasks:
        following.setdefault((drafter, tree), []).append(index)
    early: dict[tuple[str, str, int], Any] = {}
    try:
        for future in as_completed(futures):
            drafter, tree, index = futures[future]
            early[drafter, tree, index] = future.result()
            left = following[drafter, tree]
            while left and early.get((drafter, tree, left[0])) is not None:
                index = left.pop(0)
                yield drafter, tree, index, early.pop((drafter, tree, index))
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=harness.count, default=304, help="up to a multiple of 8")
    parser.add_argument("--new-tokens", type=harness.count, default=8)
    parser.add_argument("--drafters", nargs="+", default=DRAFTERS)
    parser.add_argument("--trees", nargs="+", default=TREES)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no group of prompts after so many")
    parser.add_argument("--jobs", type=harness.count, default=1, help="processes, which share drafters, trees and "
                        "lengths of prompts; on a GPU all need its memory: set "
                        "XLA_PYTHON_CLIENT_PREALLOCATE=false")  # fmt: skip
    parser.add_argument(
        "--implementation", choices=["xla", "pallas"], help="of attention; default: as the device has it"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as the device has it")
    parser.add_argument("--checkpoint", default="embedded", help="a packaged name or a checkpoint directory")
    parser.add_argument("--out", type=harness.out_file, help="JSON; a run that it holds in part is gone on with")
    args = parser.parse_args()

    engine = make_engine(args)
    settings = {
        "model": engine.fingerprint, "dtype": str(engine.dtype), "implementation": engine.implementation,
        "new_tokens": args.new_tokens, "trees": args.trees,
    }  # fmt: skip
    try:
        before = resumed(args.out, settings)
    except ValueError as error:
        parser.error(str(error))
    del engine
    rows = {(row["drafter"], row["tree"]): row for row in before}
    groups = -(-args.prompts // 8)
    tasks = [(drafter, tree, index) for drafter in args.drafters for index in range(groups) for tree in args.trees
             if index >= rows.get((drafter, tree), {"prompts": 0})["prompts"] // 8]  # fmt: skip
    for drafter, tree, index, (found, stood) in results(args, tasks):
        old = rows.get((drafter, tree), dict.fromkeys([*CASES, "drafts accepted"], 0))
        rows[drafter, tree] = {
            "drafter": drafter,
            "tree": tree,
            "prompts": 8 * (index + 1),
            **{name: old[name] + int(more) for name, more in zip(CASES, found.ravel(), strict=True)},
            "drafts accepted": old["drafts accepted"] + int(stood),
        }
        print(f"{drafter}, {tree}: {8 * (index + 1)} prompts, "
              f"{'all' if _identical(rows[drafter, tree]) else 'not all'} identical", flush=True)  # fmt: skip
        if args.out:
            harness.save(
                args.out, list(rows.values()), **settings,
                prompts=min(rows.get((drafter, tree), {"prompts": 0})["prompts"] for drafter in args.drafters
                            for tree in args.trees),
                drafters=sorted({drafter for drafter, _ in rows}), identical=all(map(_identical, rows.values())),
            )  # fmt: skip
    if rows:
        harness.print_table(list(rows.values()))


def resumed(out: str | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that ``out`` holds, none where there is no such file.

    Raises ValueError for a file of another model, of other settings, device or versions, or that cannot be read.
    """
    if out is None or not Path(out).exists():
        return []
    try:
        found = json.loads(Path(out).read_text(encoding="utf-8"))
        rows = found["rows"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"--out: {out}: holds no results of this benchmark, expected none or some: {error!r}"
        ) from error
    here = harness.environment()
    for name, expected in {**settings, **{name: here[name] for name in ("device", "jax", "jaxlib")}}.items():
        if found.get(name) != expected:
            raise ValueError(
                f"--out: {out} is of a run with {name} {found.get(name)!r}, expected {expected!r} or a new file"
            )
    return rows


def _identical(row: dict[str, Any]) -> bool:
    return all(row[name] == row["prompts"] for name in CASES)


if __name__ == "__main__":
    harness.run(main)
