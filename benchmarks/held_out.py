"""Speculative against autoregressive decoding of the embedded model, on held-out files of the standard library.

Each prompt is the first half of a held-out file, of which the last ``--tokens`` tokens are kept. Both loops are
compiled and warm; the best of ``--repeats`` runs counts for each, in turns. Prints a table, writes JSON.

    python benchmarks/held_out.py --out
"""

from __future__ import annotations

import statistics
import sysconfig
from pathlib import Path

import harness

from specsa_jax import Engine, Strategy
from specsa_jax.training import is_held_out


def held_out_files(engine: Engine, smallest: int = 0) -> list[tuple[str, list[int]]]:
    """(path, token ids) of the held-out files, outside the test suite, of at least ``smallest`` bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if "-packages/" in path or "test" in path or path.startswith(("encodings/", "pydoc_data/")):
            continue
        if is_held_out(path, 0.05) and file.stat().st_size > smallest:
            files.append((path, engine.tokenizer.encode(file.read_text(encoding="utf-8")).ids))
    return files


def held_out_prompts(engine: Engine, count: int, tokens: int) -> list[tuple[str, list[int]]]:
    """(path, token ids) of the ``count`` first held-out files that are long enough."""
    files = held_out_files(engine, 8 * tokens)
    return [(path, ids[: len(ids) // 2][-tokens:]) for path, ids in files if len(ids) // 2 >= tokens][:count]


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--prompts", type=harness.count, default=8, help="at most so many files")
    parser.add_argument("--tokens", type=harness.count, default=2048)
    parser.add_argument("--new-tokens", type=harness.count, default=192)
    parser.add_argument("--repeats", type=harness.count, default=2)
    args = parser.parse_args()

    engine, rows = Engine.from_pretrained("embedded"), []
    for path, ids in held_out_prompts(engine, args.prompts, args.tokens):
        runs = [
            (engine.generate([ids], args.new_tokens, speculate=False), engine.generate([ids], args.new_tokens))
            for _ in range(args.repeats)
        ]
        plain = max(run[0].stats.tokens_per_second for run in runs)
        drafted = max(run[1].stats.tokens_per_second for run in runs)
        rows.append(
            {
                "file": path,
                "identical": all(a[0].tokens.tolist() == b[0].tokens.tolist() for a, b in runs),
                "baseline_tokens_per_second": plain,
                "tokens_per_second": drafted,
                "speedup": drafted / plain,
                "mean_acceptance_length": runs[0][1].stats.mean_acceptance_length,
                "acceptance_per_position": runs[0][1].stats.acceptance_per_position,
            }
        )
    harness.print_table(
        [{name: value for name, value in row.items() if name != "acceptance_per_position"} for row in rows]
    )
    summary = {
        "strategy": Strategy().describe(),
        "prompt_tokens": args.tokens,
        "new_tokens": args.new_tokens,
        "median_speedup": statistics.median(row["speedup"] for row in rows),
        "mean_acceptance_length": statistics.mean(row["mean_acceptance_length"] for row in rows),
    }
    harness.print_table([summary])
    if path := harness.out_path(args):
        harness.save(path, rows, **summary)


if __name__ == "__main__":
    harness.run(main)
