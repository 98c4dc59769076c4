"""The planner on a mixed workload, against every strategy of its space fixed, and against the best of them per prompt.

Cells: workload (edit-like, fresh code, prose; benchmarks/workloads.py), context (of the prompt), batch, temperature. In
each, the planner (with the checkpoint's profile or the one that --profile names) and each member of its space (on a GPU
a part of the usual one, since each compiles in every cell) run in turns, compiled and warm; a figure is the median of
--repeats runs. Time is that of decoding, the planner's own work included. ``best`` is the fastest fixed strategy of the
cell, found by trying all (with --only those that it names, say where others are known to be far behind); ``default`` is
prompt lookup with chain:4, all layers refreshing. Fixed strategies have the groups that the kernels choose, which are
no slower than none; the planner may take others. Over all cells: tokens by seconds.

In bfloat16 steps of different widths round differently, so what is sampled soon differs between strategies, and greedy
text from some near-tie on; a text that repeats itself and one that does not differ more than strategies do. In float32
texts are the same (``identical``); and planner_replay.py has recorded ones.

    specsa profile embedded --budget 600 --out profile.json
    python benchmarks/planner.py --profile profile.json --out
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import harness
import jax
import numpy as np
import plots
from end_to_end import check_names, choosing, default_space
from workloads import WORKLOADS, prompts

from specsa_jax import Engine, Strategy
from specsa_jax.planning.planner import Planner

AXES = ("workload", "context", "batch", "temperature", "strategy")
DEFAULT = "lookup chain:4"


def fixed(engine: Engine, planner: Planner) -> dict[str, Strategy]:
    """The planner's space in class exact, by name, and the default."""
    found = {one.describe(): one.strategy for one in engine.space(planner).candidates}
    return {DEFAULT: Strategy(tree="chain:4"), **found}


def cell(
    engine: Engine, rows: list[list[list[int]]], strategies: dict[str, Any], temperature: float, warm: bool, args: Any
) -> list[dict[str, Any]]:
    """Figures of each strategy on batches of prompts, all programs compiled ahead; ``warm``: fixed strategies have run
    in these shapes already (what a planner takes depends on the text)."""
    longest = max(len(row) for batch in rows for row in batch)
    engine.warmup(list(strategies.values()), batch=len(rows[0]), prompt_tokens=longest, max_new_tokens=args.new_tokens)
    times: dict[str, list[float]] = {name: [] for name in strategies}
    stats: dict[str, Any] = {}
    tokens: dict[str, Any] = {}
    for turn in range(args.repeats + 1):
        for name, strategy in strategies.items():
            if not turn and warm and name != "planner":
                continue
            results = [
                engine.generate(batch, args.new_tokens, temperature=temperature, seed=3, strategy=strategy)
                for batch in rows
            ]
            if turn:  # the first one loads programs
                times[name].append(sum(r.stats.decode_seconds + r.stats.planning_seconds for r in results))
            stats[name] = [r.stats for r in results]
            tokens[name] = [g.tokens.tolist() for r in results for g in r]
    found = []
    for name, taken in times.items():
        new = sum(s.new_tokens for s in stats[name])
        found.append(
            {
                "strategy": name,
                "tokens": new,
                "seconds": statistics.median(taken),
                "low": min(taken),
                "high": max(taken),
                "tokens_per_second": new / statistics.median(taken),
                "mean_acceptance_length": 1 + sum(s.accepted for s in stats[name])
                / sum(s.sequence_steps for s in stats[name]),
                "planning": sum(s.planning_seconds for s in stats[name]) / sum(s.decode_seconds for s in stats[name]),
                "identical": tokens[name] == tokens[DEFAULT],
                "used": [s.strategy for s in stats[name]] if name == "planner" else [],
            }
        )  # fmt: skip
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens by seconds over all cells: of the planner, each fixed strategy, and the best of each cell."""
    cells: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(tuple(row[axis] for axis in AXES[:-1]), {})[row["strategy"]] = row
    names = [name for name in next(iter(cells.values())) if all(name in each for each in cells.values())]
    best = {key: max((r for n, r in each.items() if n != "planner"), key=lambda r: r["tokens_per_second"])
            for key, each in cells.items()}  # fmt: skip
    total = sum(row["tokens"] for row in best.values())
    speed = {
        name: sum(each[name]["tokens"] for each in cells.values()) / sum(each[name]["seconds"]
                                                                        for each in cells.values())
        for name in names
    }  # fmt: skip
    exhaustive = total / sum(row["seconds"] for row in best.values())
    planned = [each["planner"] for each in cells.values()]
    ratios = [each["planner"]["tokens_per_second"] / best[key]["tokens_per_second"] for key, each in cells.items()]
    return {
        "tokens_per_second": speed,
        "best_per_cell_tokens_per_second": exhaustive,
        "planner_of_best": speed["planner"] / exhaustive,
        "planner_of_best_by_cell": float(np.exp(np.mean(np.log(ratios)))),
        "planner_over_default": speed["planner"] / speed[DEFAULT],
        "planner_over_default_by_cell": float(np.exp(np.mean([
            np.log(each["planner"]["tokens_per_second"] / each[DEFAULT]["tokens_per_second"])
            for each in cells.values()
        ]))),
        "planning_share": float(np.average([r["planning"] for r in planned], weights=[r["seconds"] for r in planned])),
        "identical": all(row["identical"] for row in rows),
    }  # fmt: skip


def place(text: str) -> tuple[int, int]:
    """Of a command line: a cell's batch and context."""
    batch, _, context = text.partition(":")
    try:
        return harness.count(batch), harness.count(context)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected BATCH:CONTEXT, whole numbers of at least 1"
        ) from error


def main() -> None:
    gpu = jax.default_backend() == "gpu"
    parser = harness.arguments(__doc__, rows=True)
    parser.add_argument("--checkpoint", default="embedded")
    parser.add_argument("--profile", help="a file of specsa profile; default: the checkpoint's own, if there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as the device has it; with it, a "
                        "--profile of another dtype or device is taken too")  # fmt: skip
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--cells", nargs="+", type=place, default=[(1, 4096), (1, 32768), (8, 4096), (8, 32768)] if gpu
                        else [(1, 256), (1, 1024), (8, 256)], help="BATCH:CONTEXT")  # fmt: skip
    parser.add_argument("--space", nargs="*", help="DRAFTER@TREE: of the planner; none: all that there is")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="fixed strategies that run beside the default, by "
                        "their names in the table; default: all")  # fmt: skip
    parser.add_argument("--temperatures", type=harness.number, nargs="+", default=[0.0])
    # What planning takes is a matter of the call: a GPU gives a small model's 4096 tokens in a tenth of a second.
    parser.add_argument("--new-tokens", type=harness.count, default=24576 if gpu else 128)
    parser.add_argument(
        "--prompts", type=harness.count, default=4, help="batches of prompts in cells of batch 1; else one"
    )
    parser.add_argument("--repeats", type=harness.count, default=3 if gpu else 2)
    args = parser.parse_args()
    args.space = default_space(args.checkpoint) if args.space is None else args.space
    check_names(args.space, args.checkpoint)

    engine = Engine.from_pretrained(args.checkpoint, profile=args.profile, dtype=args.dtype,
                                    allow_mismatch=args.dtype is not None)  # fmt: skip
    planner = choosing(args.space)
    strategies: dict[str, Any] = {"planner": planner, **fixed(engine, planner)}
    if args.only:
        if unknown := sorted(set(args.only) - set(strategies)):
            raise ValueError(f"only: got {', '.join(unknown)}, expected some of {', '.join(strategies)}")
        strategies = {name: one for name, one in strategies.items() if name in ("planner", DEFAULT, *args.only)}
    suffix = f"_{args.dtype}" if args.dtype else ""
    rows = harness.Rows(args, AXES, suffix, checkpoint=args.checkpoint, dtype=str(engine.dtype),
                        new_tokens=args.new_tokens, implementation=engine.implementation,
                        profiled=engine.profile is not None, space=args.space)  # fmt: skip
    ran: set[tuple[tuple[int, ...], ...]] = set()  # prompts' tokens, by batch
    for batch, context in args.cells:
        for temperature in args.temperatures:
            for workload in args.workloads:
                key = {"workload": workload, "context": context, "batch": batch, "temperature": temperature}
                if not rows.wanted(**key, strategy="planner"):
                    continue
                count = args.prompts if batch == 1 else 1
                found = prompts(engine, args.checkpoint, workload, context, count * batch)
                batches = [found[i::count] for i in range(count)]
                shape = tuple(tuple(map(len, each)) for each in batches)
                for row in cell(engine, batches, strategies, temperature, shape in ran, args):
                    rows.add(key | row, (*AXES, "tokens_per_second", "mean_acceptance_length", "planning"))
                ran.add(shape)
    found = summary(rows.rows) if rows.rows else {}
    rows.save(**found)
    for name, value in found.items():
        print(f"{name}: {value}")
    if rows.path is not None and rows.rows:
        plots.draw(rows.path)


if __name__ == "__main__":
    harness.run(main)
