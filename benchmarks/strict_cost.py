"""What class strict costs: decoding one token at a time and speculating, in class exact and in class strict.

The embedded model continues a held-out file. Programs are compiled and warm; the four strategies run in turns, and the
fastest of ``--repeats`` runs counts for each. Prints a table, writes JSON.

    python benchmarks/strict_cost.py --out benchmarks/results/cpu/strict_cost.json
"""

from __future__ import annotations

import argparse
from typing import Any

import harness
from held_out import held_out_prompts

from specsa_jax import Engine, PromptLookup, Strategy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=harness.count, default=1024, help="of the prompt")
    parser.add_argument("--new-tokens", type=harness.count, default=96)
    parser.add_argument("--repeats", type=harness.count, default=7)
    parser.add_argument("--out", type=harness.out_file)
    args = parser.parse_args()

    engine = Engine.from_pretrained("embedded")
    ((path, ids),) = held_out_prompts(engine, 1, args.tokens)
    strategies = [
        Strategy(drafter, "chain:5", precision=precision)
        for precision in ("exact", "strict")
        for drafter in (None, PromptLookup())
    ]
    runs: dict[Strategy, list[Any]] = {strategy: [] for strategy in strategies}
    for _ in range(args.repeats + 1):
        for strategy in strategies:
            runs[strategy].append(engine.generate([ids], args.new_tokens, strategy=strategy))
    rows = []
    for strategy, results in runs.items():
        warm = [result.stats for result in results[1:]]
        rows.append(
            {
                "precision": strategy.precision,
                "drafts": 0 if strategy.drafter is None else strategy.width - 1,
                "milliseconds_per_step": min(1e3 * stats.decode_seconds / stats.steps for stats in warm),
                "prefill_seconds": min(stats.prefill_seconds for stats in warm),
                "tokens_per_second": max(stats.tokens_per_second for stats in warm),
                "tokens_per_step": warm[0].mean_acceptance_length,
                "same_tokens": results[0][0].tokens.tolist() == runs[strategies[0]][0][0].tokens.tolist(),
            }
        )
    harness.print_table(rows)
    if args.out:
        harness.save(args.out, rows, prompt=path, prompt_tokens=args.tokens, new_tokens=args.new_tokens)


if __name__ == "__main__":
    harness.run(main)
