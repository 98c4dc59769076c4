"""How long drafts are accepted, per drafter and tree, on held-out files and on edited copies of them.

Held-out: the embedded model continues pieces of files of the standard library that it has not seen. Edits: a piece of
such a file, then the beginning of a copy in which an identifier has another name, which the model goes on copying.
Greedy. Prints a table; writes JSON and, beside it, a plot.

    python benchmarks/acceptance.py --out benchmarks/results/cpu/acceptance.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=448, help="of each prompt")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--drafters", nargs="+", default=DRAFTERS)
    parser.add_argument("--trees", nargs="+", default=TREES)
    parser.add_argument("--out")
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
    if args.out:
        summary = {"files": [path for path, _ in found], "prompt_tokens": args.tokens, "new_tokens": args.new_tokens}
        harness.save(args.out, rows, **summary)
        plot(rows, args.drafters, args.trees, list(sets), Path(args.out).with_suffix(".png"))


def plot(rows: list[dict], drafters: list[str], trees: list[str], sets: list[str], path: Path) -> None:
    """Above, tokens a step by tree; below, acceptance by position in the longest chain."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    longest = max((tree for tree in trees if tree.startswith("chain")), key=lambda tree: int(tree.split(":")[1]))
    figure, axes = pyplot.subplots(2, len(sets), figsize=(5.5 * len(sets), 7), sharey="row", squeeze=False)
    for column, name in enumerate(sets):
        for place, drafter in enumerate(drafters):
            mine = {row["tree"]: row for row in rows if row["prompts"] == name and row["drafter"] == drafter}
            at = [index + place / (len(drafters) + 1) for index in range(len(trees))]
            lengths = [mine[tree]["mean_acceptance_length"] for tree in trees]
            axes[0][column].bar(at, lengths, 1 / (len(drafters) + 1), label=drafter)
            rates = mine[longest]["acceptance_per_position"]
            axes[1][column].plot(range(1, len(rates) + 1), rates, marker="o", label=drafter)
        axes[0][column].set_title(name)
        axes[0][column].set_xticks([index + 0.4 for index in range(len(trees))], trees)
        axes[1][column].set_xlabel(f"drafted token of {longest}")
    axes[0][0].set_ylabel("tokens a step")
    axes[1][0].set_ylabel("accepted, of the steps that drafted it")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
