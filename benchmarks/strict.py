"""The strict class on held-out prompts: every drafter and tree against decoding one token at a time, to the bit.

Compares tokens and the bits of their log-probabilities, greedy and sampled, alone and in ragged batches of 8. The
prompts are pieces of held-out files. Results are saved after each group of 8 prompts, so that a run may be stopped: the
JSON says how many prompts it got through with each drafter. Compiled programs are kept where JAX_COMPILATION_CACHE_DIR
says.

    python benchmarks/strict.py --out benchmarks/results/cpu/strict.json
"""

from __future__ import annotations

import argparse
import time

import harness
import jax
import numpy as np
from held_out import held_out_files

from specsa_jax import Engine, SamplingParams, Strategy
from specsa_jax.drafting import drafter_from_name

DRAFTERS = ["lookup", "self", "head", "model:embedded", "lookup+head"]
TREES = ["chain:4", "3-1-1", "2-2", "best:6:3", "best:8:4"]


def prompts(engine: Engine, count: int) -> list[list[list[int]]]:
    """Groups of 8 pieces of held-out files: of 1 to 56 tokens, and of 57 to 120. With 8 new tokens each group's
    sequences have one page or two, so that all groups share a few programs; every other one crosses a page's end."""
    random, files = np.random.default_rng(0), held_out_files(engine)
    groups: list[list[list[int]]] = [[] for _ in range(-(-count // 8))]
    for place in range(count):
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

    def group(self, index: int, strategies: list[Strategy]) -> tuple[np.ndarray, np.ndarray]:
        """int [strategies, greedy or sampled, alone or in a batch] of identical sequences; accepted drafts."""
        rows = self.groups[index]
        same, accepted = np.zeros((len(strategies), 2, 2), int), np.zeros(len(strategies), int)
        for kind in range(2):
            sampling = [
                SamplingParams(temperature=0.8 * kind, top_p=0.95, seed=8 * index + i) for i in range(len(rows))
            ]
            each = list(zip(rows, sampling, strict=True))
            if (index, kind) not in self.expected:
                plain = Strategy(None, precision="strict")
                self.expected[index, kind] = [self.bits([row], [params], plain)[0][0] for row, params in each]
            for at, strategy in enumerate(strategies):
                alone = [self.bits([row], [params], strategy)[0][0] for row, params in each]
                together, stood = self.bits(rows, sampling, strategy)
                accepted[at] += stood
                for place, got in enumerate((alone, together)):
                    same[at, kind, place] = sum(
                        a == b for a, b in zip(got, self.expected[index, kind], strict=True)
                    )  # fmt: skip
        return same, accepted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=304)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--drafters", nargs="+", default=DRAFTERS)
    parser.add_argument("--trees", nargs="+", default=TREES)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no group of prompts after so many")
    parser.add_argument(
        "--implementation", choices=["xla", "pallas"], help="of attention; default: as the device has it"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as the device has it")
    parser.add_argument("--out")
    args = parser.parse_args()

    engine = Engine.from_pretrained(
        "embedded", max_length=128, precision="strict", prefill_chunk=16, implementation=args.implementation,
        dtype=args.dtype,
    )  # fmt: skip
    check, begun = Check(engine, prompts(engine, args.prompts), args.new_tokens), time.perf_counter()
    rows = []
    for drafter in args.drafters:
        strategies = [Strategy(drafter_from_name(drafter), tree, precision="strict") for tree in args.trees]
        same, accepted, done = np.zeros((len(strategies), 2, 2), int), np.zeros(len(strategies), int), 0
        before = rows
        for index, group in enumerate(check.groups):
            if time.perf_counter() - begun > args.seconds:
                break
            found, stood = check.group(index, strategies)
            same, accepted, done = same + found, accepted + stood, done + len(group)
            rows = before + [
                {
                    "drafter": drafter,
                    "tree": tree,
                    "prompts": done,
                    "greedy": int(same[at, 0, 0]),
                    "greedy, batch of 8": int(same[at, 0, 1]),
                    "sampled": int(same[at, 1, 0]),
                    "sampled, batch of 8": int(same[at, 1, 1]),
                    "drafts accepted": int(accepted[at]),
                }
                for at, tree in enumerate(args.trees)
            ]
            print(f"{drafter}: {done} prompts, {int((same == done).sum())} of {same.size} cases identical for all of "
                  "them", flush=True)  # fmt: skip
            if args.out:
                harness.save(
                    args.out, rows, new_tokens=args.new_tokens, prompts=min(row["prompts"] for row in rows),
                    drafters=sorted({row["drafter"] for row in rows}), dtype=str(engine.dtype),
                    implementation=engine.implementation, identical=all(_identical(row) for row in rows),
                )  # fmt: skip
        # Each drafter has programs of its own, and a process room for a few hundred.
        engine._compiled.clear()
        jax.clear_caches()
    harness.print_table(rows)


def _identical(row: dict) -> bool:
    return all(row[name] == row["prompts"] for name in
               ("greedy", "greedy, batch of 8", "sampled", "sampled, batch of 8"))  # fmt: skip


if __name__ == "__main__":
    main()
