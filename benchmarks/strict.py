"""The strict class on held-out prompts: every drafter and tree against decoding one token at a time, to the bit.

Compares tokens and the bits of their log-probabilities, greedy and sampled, alone and in ragged batches of 8. The
prompts are pieces of held-out files. Results are saved after each group of 8 prompts, so that a run may be stopped: the
JSON says how many prompts it got through. All of it takes one to two hours of two idle cores; compiled programs are
kept where JAX_COMPILATION_CACHE_DIR says.

    python benchmarks/strict.py --out benchmarks/results/cpu/strict.json
"""

from __future__ import annotations

import argparse
import time

import harness
import numpy as np
from held_out import held_out_files

from specsa_jax import Engine, SamplingParams, Strategy
from specsa_jax.drafting import drafter_from_name

DRAFTERS = ["lookup", "self", "head", "model:embedded", "lookup+head"]
TREES = ["chain:4", "3-1-1", "2-2", "best:6:3", "best:8:4"]


def prompts(engine: Engine, count: int, longest: int) -> list[list[int]]:
    """Pieces of held-out files of 1 to ``longest`` tokens."""
    random, files, found = np.random.default_rng(0), held_out_files(engine), []
    while len(found) < count:
        ids = files[int(random.integers(len(files)))][1]
        size = int(random.integers(1, longest + 1))
        if len(ids) > size:
            start = int(random.integers(len(ids) - size))
            found.append(ids[start : start + size])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=304)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--longest", type=int, default=64, help="tokens of a prompt, at most")
    parser.add_argument("--drafters", nargs="+", default=DRAFTERS)
    parser.add_argument("--trees", nargs="+", default=TREES)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no group of prompts after so many")
    parser.add_argument("--out")
    args = parser.parse_args()

    engine = Engine.from_pretrained("embedded", max_length=args.longest + 64, precision="strict")
    one_by_one = Strategy(None, precision="strict")
    strategies = [
        Strategy(drafter_from_name(drafter), tree, precision="strict")
        for drafter in args.drafters
        for tree in args.trees
    ]
    found, begun = prompts(engine, args.prompts, args.longest), time.perf_counter()
    same = np.zeros((len(strategies), 2, 2), int)  # by greedy or sampled, alone or in a batch
    accepted, done = np.zeros(len(strategies), int), 0

    def bits(rows, sampling, strategy):
        result = engine.generate(rows, args.new_tokens, sampling=sampling, strategy=strategy)
        return [(g.tokens.tolist(), g.logprobs.tobytes()) for g in result], result.stats.accepted

    for start in range(0, len(found), 8):
        if time.perf_counter() - begun > args.seconds:
            break
        group = found[start : start + 8]
        for kind in range(2):
            sampling = [SamplingParams(temperature=0.8 * kind, top_p=0.95, seed=start + i) for i in range(len(group))]
            expected = [bits([row], [params], one_by_one)[0][0] for row, params in zip(group, sampling, strict=True)]
            for index, strategy in enumerate(strategies):
                alone = [bits([row], [params], strategy)[0][0] for row, params in zip(group, sampling, strict=True)]
                together, stood = bits(group, sampling, strategy)
                accepted[index] += stood
                for place, got in enumerate((alone, together)):
                    same[index, kind, place] += sum(a == b for a, b in zip(got, expected, strict=True))
        done += len(group)
        rows = [
            {
                "drafter": args.drafters[index // len(args.trees)],
                "tree": args.trees[index % len(args.trees)],
                "greedy": int(same[index, 0, 0]),
                "greedy, batch of 8": int(same[index, 0, 1]),
                "sampled": int(same[index, 1, 0]),
                "sampled, batch of 8": int(same[index, 1, 1]),
                "drafts accepted": int(accepted[index]),
            }
            for index in range(len(strategies))
        ]
        print(f"{done} prompts, {int((same == done).sum())} of {same.size} cases identical for all of them", flush=True)
        if args.out:
            harness.save(args.out, rows, prompts=done, new_tokens=args.new_tokens, longest_prompt=args.longest,
                         identical=bool((same == done).all()))  # fmt: skip
    harness.print_table(rows)


if __name__ == "__main__":
    main()
