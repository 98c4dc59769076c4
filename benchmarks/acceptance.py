"""How long drafts are accepted, per drafter and tree, on held-out files and on edited copies of them.

Held-out: the embedded model continues pieces of files of the standard library that it has not seen. Edits: a piece of
such a file, then the beginning of a copy in which an identifier has another name, which the model goes on copying.
Greedy. Prints a table; writes JSON and, beside it, a plot.

    python benchmarks/acceptance.py --out
"""

from __future__ import annotations

import harness
import plots
from held_out import held_out_files

from specsa_jax import Engine, Strategy
from specsa_jax.calibration import edited
from specsa_jax.drafting import drafter_from_name

DRAFTERS = ["lookup", "self", "head", "lookup+head"]
TREES = ["chain:4", "chain:8", "4-2-1-1", "best:16:6", "best:32:8"]


def pieces(engine: Engine, count: int, tokens: int) -> list[tuple[str, list[int]]]:
    """(path, ids) of ``tokens`` tokens from the middle of the ``count`` first held-out files that are long enough."""
    files = [(path, ids) for path, ids in held_out_files(engine) if len(ids) >= 2 * tokens]
    return [(path, ids[len(ids) // 2 - tokens : len(ids) // 2]) for path, ids in files[:count]]


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--prompts", type=harness.count, default=8)
    parser.add_argument("--tokens", type=harness.count, default=448, help="of each prompt")
    parser.add_argument("--new-tokens", type=harness.count, default=96)
    parser.add_argument("--drafters", nargs="+", default=DRAFTERS)
    parser.add_argument("--trees", nargs="+", default=TREES)
    args = parser.parse_args()

    engine, rows = Engine.from_pretrained("embedded"), []
    found = pieces(engine, args.prompts, args.tokens)
    sets = {
        "held-out": [ids for _, ids in found],
        "edits": [edited(engine.tokenizer, ids, args.tokens) for _, ids in found],
    }
    plain = {
        name: [g.tokens.tolist() for g in engine.generate(prompts, args.new_tokens, speculate=False)]
        for name, prompts in sets.items()
    }
    for drafter in args.drafters:
        for tree in args.trees:
            strategy = Strategy(drafter_from_name(drafter), tree)
            for name, prompts in sets.items():
                result = engine.generate(prompts, args.new_tokens, strategy=strategy)
                stats = result.stats
                rows.append(
                    {
                        "prompts": name,
                        "drafter": drafter,
                        "tree": tree,
                        "mean_acceptance_length": stats.mean_acceptance_length,
                        "drafted_per_step": stats.drafted / stats.sequence_steps,
                        "identical": sum(
                            g.tokens.tolist() == tokens for g, tokens in zip(result, plain[name], strict=True)
                        ),
                        "acceptance_per_position": [round(rate, 4) for rate in stats.acceptance_per_position],
                        "accepted_histogram": stats.accepted_histogram,
                    }
                )
                hidden = ("acceptance_per_position", "accepted_histogram")
                harness.print_table([{key: value for key, value in rows[-1].items() if key not in hidden}])
    if path := harness.out_path(args):
        summary = {"files": [path for path, _ in found], "prompt_tokens": args.tokens, "new_tokens": args.new_tokens}
        harness.save(path, rows, **summary)
        plots.draw(path)


if __name__ == "__main__":
    harness.run(main)
