"""What each mechanism brings, on a real checkpoint: one thing changed at a time, by ``Engine.generate``.

grouping       exact C = 1 (without), 2, 4, 8, T, at T = 16
shared index   one query's blocks for C = 2, 4 adjacent ones (class approx)
schedules      every layer refreshes; every second, every third; without the compressed output of reuse layers
lengths        T = 4, 64, 128
trees          shapes, and the two traversals
drafters       each with a chain of 4, decoding one at a time, and what the engine chooses by itself (auto)

Columns as in benchmarks/end_to_end.py; ``identical`` compares with decoding one token at a time in class exact, so that
approximate rows show what they change. On XLA's path groups are not formed, and exact C changes nothing but noise: rows
say so under ``note``.

    python benchmarks/ablations.py --checkpoint run/checkpoint --context 65536 --resume --out     # on a GPU
    python benchmarks/ablations.py --context 2048 --sets trees drafters --out                     # on a CPU
"""

from __future__ import annotations

from typing import Any

import harness
import jax
from end_to_end import against, default_space, measure, named, warm
from workloads import WORKLOADS, prompts

from specsa_jax import Engine, Strategy
from specsa_jax.planning.planner import Planner

SETS = ("grouping", "shared index", "schedules", "lengths", "trees", "drafters")
AXES = ("workload", "set", "case")
SHOWN = (*AXES, "tokens_per_second", "speedup", "mean_acceptance_length", "identical", "note", "not_run")
# T = 16 of prompt lookup: as many adjacent queries as groups are for.
LONG = "lookup@chain:15"


def cases(name: str, checkpoint: str) -> list[tuple[str, Strategy | Planner]]:
    """(case, strategy) of a set."""

    def make(drafter: str, **options: Any) -> Strategy | Planner:
        return named(drafter, checkpoint, default_space(checkpoint), **options)

    if name == "grouping":
        return [(f"C = {c}", make(LONG, group=c)) for c in (1, 2, 4, 8, 16)]
    if name == "shared index":
        return [("own blocks", make(LONG))] + [
            (f"C = {c}", make(LONG, precision="approx", group=c, group_mode="shared")) for c in (2, 4)
        ]  # fmt: skip
    if name == "schedules":
        approx = [("every:2", True), ("every:3", True), ("every:3", False)]
        return [("all refresh", make("lookup@chain:4"))] + [
            (f"{schedule}, compressed output {'kept' if keep else 'dropped'}",
             make("lookup@chain:4", precision="approx", schedule=schedule, keep_compressed=keep))
            for schedule, keep in approx
        ]  # fmt: skip
    if name == "lengths":
        return [(f"T = {t}", make(f"lookup@{tree}")) for t, tree in
                ((4, "chain:3"), (64, "chain:63"), (128, "best:127:16"))]  # fmt: skip
    if name == "trees":
        shapes = ["chain:4", "chain:8", "4-2-1-1", "best:16:6", "best:32:8"]
        return [(tree, make(f"lookup+head@{tree}")) for tree in shapes] + [
            (f"{tree} depth-first", make(f"lookup+head@{tree}", traversal="depth")) for tree in ("4-2-1-1", "best:32:8")
        ]  # fmt: skip
    drafters = ["none", "lookup@chain:4", "head@chain:4", "lookup+head@chain:4", "self@chain:4", "auto"]
    return [(drafter, make(drafter)) for drafter in drafters]


def main() -> None:
    gpu = jax.default_backend() == "gpu"
    parser = harness.arguments(__doc__, rows=True)
    parser.add_argument("--checkpoint", default="embedded")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--workloads", nargs="+", default=["edit", "code"], choices=WORKLOADS)
    parser.add_argument("--context", type=harness.count, default=16384 if gpu else 4096, help="the new tokens included")
    parser.add_argument("--batch", type=harness.count, default=1)
    parser.add_argument("--new-tokens", type=harness.count, default=2048 if gpu else 96)
    parser.add_argument("--prompts", type=harness.count, default=2, help="batches of prompts, one after the other")
    parser.add_argument("--repeats", type=harness.count, default=2, help="timed runs of each")
    args = parser.parse_args()
    if args.context <= args.new_tokens:
        raise ValueError(f"context: got {args.context}, expected more than the {args.new_tokens} of new_tokens, which "
                         "it includes")  # fmt: skip

    engine = Engine.from_pretrained(args.checkpoint)
    rows = harness.Rows(args, AXES, checkpoint=args.checkpoint, fingerprint=engine.fingerprint, dtype=str(engine.dtype),
                        implementation=engine.implementation, context=args.context, batch=args.batch,
                        new_tokens=args.new_tokens, prompts=args.prompts)  # fmt: skip
    note = {} if engine.implementation == "pallas" else {"note": "XLA's path forms no groups"}
    found = {}
    for workload in args.workloads:
        texts = prompts(engine, args.checkpoint, workload, args.context - args.new_tokens, args.prompts * args.batch)
        found[workload] = [texts[i :: args.prompts] for i in range(args.prompts)]

    def add(workload: str, name: str, case: str, strategy: Strategy | Planner) -> None:
        axes = {"workload": workload, "set": name, "case": case}
        base = rows.find(workload=workload, set="baseline")
        if (base is not None or name == "baseline") and rows.wanted(**axes):
            row = measure(engine, found[workload], args.new_tokens, strategy, 0.0, args.repeats)
            rows.add(axes | against(row, base, base or row) | (note if name == "grouping" else {}), SHOWN)

    # Workloads take turns, since they share compiled programs.
    for workload in args.workloads:
        add(workload, "baseline", "none", named("none", args.checkpoint))
    for name in args.sets:
        left = [one for case, one in cases(name, args.checkpoint)
                if any(rows.wanted(workload=workload, set=name, case=case) for workload in args.workloads)]  # fmt: skip
        warm(engine, found[args.workloads[0]], args.new_tokens, left)
        for case, strategy in cases(name, args.checkpoint):
            for workload in args.workloads:
                add(workload, name, case, strategy)
    rows.save()


if __name__ == "__main__":
    harness.run(main)
