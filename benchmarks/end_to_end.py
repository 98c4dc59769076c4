"""Tokens a second of decoding, by ``Engine.generate``: one token at a time, and speculating by each strategy.

Rows: precision class, workload (benchmarks/workloads.py), context (the new tokens included), batch, temperature,
strategy. ``none`` is the same loop with the same kernels without drafts, ``auto`` the planner; on a GPU its space is a
part of the usual one (--space), since all of it is compiled at each point. Programs are compiled and have run before
they are timed; time is the wall time of decoding (and planning), prefill left out. ``speedup`` is over ``none`` in
class exact; whether tokens are identical is said of ``none`` in the same class and schedule. A strategy that does not
run here has its reason under ``not_run``. Rows come in the order of their importance, which --budget cuts: the first
strategy and ``auto`` at each context, in the first class, temperature and batch; the other strategies at the first
context; then the other points, those with the fewest tokens first, without other strategies. Workloads take turns,
since they share compiled programs.

    python benchmarks/end_to_end.py --contexts 4096 --batches 1 --out                    # on a CPU
    python benchmarks/end_to_end.py --checkpoint run/checkpoint --resume --out           # on a GPU

``not identical`` on a GPU, in bfloat16, is what docs/drafting.md says of near-ties: ``same_tokens`` is how many tokens
the two begin with alike.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import os
import statistics
from collections.abc import Sequence
from typing import Any

import harness
import jax
from workloads import WORKLOADS, prompts

from specsa_jax import CheckpointError, Engine, Strategy
from specsa_jax.drafting import drafter_from_name
from specsa_jax.planning.planner import Planner
from specsa_jax.strategy import Precision

STRATEGIES = ["lookup@chain:16", "auto", "lookup@chain:32", "lookup@chain:4", "lookup+head@best:16:6", "head@chain:4",
              "lookup+head@chain:4"]  # fmt: skip
AXES = ("precision", "workload", "context", "batch", "temperature", "strategy")
SHOWN = (*AXES, "tokens_per_second", "speedup", "mean_acceptance_length", "identical", "not_run")


# What a planner chooses from on a GPU, beside not speculating: programs take longer to compile than to measure there.
SPACE = ["lookup@chain:4", "lookup@chain:16", "lookup@chain:32", "lookup@chain:63", "head@chain:4",
         "lookup+head@chain:8", "lookup+head@best:16:6"]  # fmt: skip


def default_space(checkpoint: str) -> list[str]:
    """SPACE, without a head where the checkpoint has none; all of the usual space where there is no GPU."""

    def there(name: str) -> bool:
        with contextlib.suppress(ValueError):  # CheckpointError is one
            return drafter_from_name(name.partition("@")[0], checkpoint) is not None
        return False

    return [name for name in SPACE if there(name)] if jax.default_backend() == "gpu" else []


def choosing(names: Sequence[str], precision: Precision | None = None) -> Planner:
    """A planner whose space has these drafters and trees (``lookup@chain:4``) beside not speculating; none: all."""
    trees: dict[str, list[str]] = {}
    for name in names:
        drafter, _, tree = name.partition("@")
        trees.setdefault(drafter, []).append(tree or "chain:4")
    drafters = tuple((drafter, tuple(some)) for drafter, some in trees.items())
    return Planner(precision=precision, drafters=drafters)


def named(name: str, checkpoint: str, space: Sequence[str] = (), **options: Any) -> Strategy | Planner:
    """``none``, ``auto`` (what a planner with this space chooses), or a drafter and a tree: ``lookup@chain:4``."""
    if name == "auto":
        return choosing(space, options.get("precision"))
    drafter, _, tree = name.partition("@")
    return Strategy(drafter_from_name(drafter, checkpoint), tree or "chain:4", **options)


def check_names(names: Sequence[str], checkpoint: str) -> None:
    """Raises ValueError for one that no checkpoint could run. That this one has no head, its row will say."""
    for name in names:
        try:
            named(name, checkpoint)
        except CheckpointError:
            if ":" in name.partition("@")[0]:  # another checkpoint than this one
                raise


def warm(engine: Engine, batches: list[list[list[int]]], new_tokens: int, strategies: list[Strategy | Planner]) -> None:
    """Compiles what continuing the batches may take, but for what does not run: its own row will say why."""
    sizes = {"batch": len(batches[0]), "prompt_tokens": max(len(row) for batch in batches for row in batch),
             "max_new_tokens": new_tokens}  # fmt: skip
    for approximate in (False, True):
        some = [one for one in strategies if (one.precision == "approx") == approximate]
        bound = math.inf if approximate else None  # whatever it does
        try:
            if some:
                engine.warmup(some, **sizes, max_kl=bound)
        except (ValueError, *harness.FAILURES):
            for one in some:
                with contextlib.suppress(ValueError, *harness.FAILURES):
                    engine.warmup(one, **sizes, max_kl=bound)


def measure(
    engine: Engine,
    batches: list[list[list[int]]],
    new_tokens: int,
    strategy: Strategy | Planner,
    temperature: float,
    repeats: int,
) -> dict[str, Any]:
    """Figures of continuing each of the batches, and the tokens themselves; or why there are none."""
    options: dict[str, Any] = {"temperature": temperature, "strategy": strategy}
    if strategy.precision == "approx":
        options["max_kl"] = math.inf  # whatever it does: benchmarks/refresh_reuse.py measures that
    runs = []
    try:
        warm(engine, batches, new_tokens, [strategy])
        for batch in batches:
            engine.generate(batch, new_tokens, **options)
            runs.append([engine.generate(batch, new_tokens, **options) for _ in range(repeats)])
    except (ValueError, *harness.FAILURES) as error:
        return harness.not_run(error)
    stats = [run[0].stats for run in runs]
    times = [[result.stats.decode_seconds + result.stats.planning_seconds for result in run] for run in runs]
    count, steps = sum(s.new_tokens for s in stats), sum(s.steps for s in stats)
    sequence_steps = sum(s.sequence_steps for s in stats)
    seconds = sum(map(statistics.median, times))
    return {
        "tokens_per_second": count / seconds,
        "low": count / sum(map(max, times)),
        "high": count / sum(map(min, times)),
        "step_ms": 1e3 * seconds / steps,
        "new_tokens": count,
        "mean_acceptance_length": 1 + sum(s.accepted for s in stats) / max(1, sequence_steps),
        "drafted_per_step": sum(s.drafted for s in stats) / max(1, sequence_steps),
        "acceptance_per_position": [round(rate, 4) for rate in stats[0].acceptance_per_position],
        "prefill_seconds": statistics.median(result.stats.prefill_seconds for run in runs for result in run),
        "planning_seconds": sum(statistics.median(result.stats.planning_seconds for result in run) for run in runs),
        "strategy_used": stats[0].strategy,
        "tokens": [" ".join(map(str, generation.tokens.tolist())) for run in runs for generation in run[0]],
    }


def against(row: dict[str, Any], base: dict[str, Any] | None, exact: dict[str, Any] | None) -> dict[str, Any]:
    """The row with its speed-up over ``exact``, and how its tokens compare with those of ``base`` in place of them.

    Without a ``base`` it keeps them: it is one.
    """
    if "not_run" in row:
        return row
    speedup = {} if exact is None or "not_run" in exact else {
        "speedup": row["tokens_per_second"] / exact["tokens_per_second"]
    }  # fmt: skip
    if base is None:
        return row | speedup
    row = row | speedup
    tokens = [text.split() for text in row.pop("tokens")]
    if "not_run" not in base:
        wanted = [text.split() for text in base["tokens"]]
        pairs = list(zip(tokens, wanted, strict=True))
        row["identical"] = f"{sum(a == b for a, b in pairs)} of {len(pairs)}"
        row["same_tokens"] = statistics.mean(len(os.path.commonprefix(pair)) for pair in pairs)
    return row


def points(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All but workloads and strategies, the most important first."""
    found = [
        {"precision": precision, "context": context, "batch": batch, "temperature": temperature}
        for precision in args.precisions
        for temperature in args.temperatures
        for batch in args.batches
        for context in args.contexts
    ]
    first = {name: found[0][name] for name in ("precision", "batch", "temperature")}

    def rank(point: dict[str, Any]) -> int:
        return 0 if first.items() <= point.items() else point["batch"] * point["context"]

    return sorted(found, key=rank)  # stable


def order(args: argparse.Namespace) -> list[tuple[dict[str, Any], list[str]]]:
    """Points with strategies: ``none``, the first and ``auto`` in each; the first point's others when it is the turn of
    points that are not of its class, temperature or batch."""
    few = ["none", *(name for name in args.strategies if name in ("auto", args.strategies[0]))]
    found = [(point, few) for point in points(args)]
    others = [name for name in args.strategies if name not in few]
    return [*found[: len(args.contexts)], (found[0][0], others), *found[len(args.contexts) :]]


def main() -> None:
    gpu = jax.default_backend() == "gpu"
    parser = harness.arguments(__doc__, rows=True)
    parser.add_argument("--checkpoint", default="embedded")
    parser.add_argument("--precisions", nargs="+", default=["exact", "approx", "strict"],
                        choices=["exact", "approx", "strict"])  # fmt: skip
    parser.add_argument("--schedule", default="every:3", help="of class approx")
    parser.add_argument("--workloads", nargs="+", default=["edit", "code", "prose"], choices=WORKLOADS)
    parser.add_argument(
        "--contexts", type=harness.count, nargs="+", default=[65536, 16384, 4096, 32768] if gpu else [4096]
    )
    parser.add_argument("--batches", type=harness.count, nargs="+", default=[1, 8, 32] if gpu else [1])
    parser.add_argument("--temperatures", type=harness.number, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, help="DRAFTER@TREE, or auto; none comes first")
    parser.add_argument("--space", nargs="*", help="DRAFTER@TREE: what auto chooses from; none: all that there is")
    parser.add_argument("--new-tokens", type=harness.count, default=512 if gpu else 96)
    parser.add_argument("--prompts", type=harness.count, default=2, help="one after the other, where the batch is 1")
    parser.add_argument("--repeats", type=harness.count, default=2, help="timed runs of each")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as the device has it")
    args = parser.parse_args()
    args.space = default_space(args.checkpoint) if args.space is None else args.space
    check_names([*args.strategies, *args.space], args.checkpoint)
    if min(args.contexts) <= args.new_tokens:
        raise ValueError(f"contexts: got {min(args.contexts)}, expected more than the {args.new_tokens} of new_tokens, "
                         "which it includes")  # fmt: skip

    engine = Engine.from_pretrained(args.checkpoint, dtype=args.dtype)
    suffix = f"_{args.dtype}" if args.dtype else ""
    rows = harness.Rows(args, AXES, suffix, checkpoint=args.checkpoint, fingerprint=engine.fingerprint,
                        dtype=str(engine.dtype), implementation=engine.implementation, new_tokens=args.new_tokens,
                        prompts=args.prompts, schedule=args.schedule, space=args.space)  # fmt: skip
    for point, names in order(args):
        precision, count = point["precision"], args.prompts if point["batch"] == 1 else 1
        options = {"precision": precision} | ({"schedule": args.schedule} if precision == "approx" else {})

        @functools.cache
        def batches(workload: str, point=point, count=count) -> list[list[list[int]]]:
            size = point["context"] - args.new_tokens
            found = prompts(engine, args.checkpoint, workload, size, count * point["batch"])
            return [found[i::count] for i in range(count)]

        todo = []  # all of a point's programs are compiled at once
        for name in names:
            if any(rows.wanted(**point, workload=one, strategy=name) for one in args.workloads):
                with contextlib.suppress(ValueError):
                    todo.append(named(name, args.checkpoint, args.space, **options))
        with contextlib.suppress(ValueError):  # of a text that is too short
            warm(engine, batches(args.workloads[0]), args.new_tokens, todo)
        for name, workload in itertools.product(names, args.workloads):
            axes = point | {"workload": workload, "strategy": name}
            if not rows.wanted(**axes):
                continue
            try:
                strategy = named(name, args.checkpoint, args.space, **options)
                row = measure(engine, batches(workload), args.new_tokens, strategy, point["temperature"], args.repeats)
            except ValueError as error:
                row = harness.not_run(error)
            base = rows.find(**(axes | {"strategy": "none"}))
            exact = rows.find(**(axes | {"strategy": "none", "precision": "exact"}))
            rows.add(axes | against(row, base, exact or (row if precision == "exact" else None)), SHOWN)
    rows.save()


if __name__ == "__main__":
    harness.run(main)
