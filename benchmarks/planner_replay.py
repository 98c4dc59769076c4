"""The planner on recorded texts, with the step times of a device's profile: no GPU is needed, nor the model.

What lookup would have drafted, and how much of it stands, follows from a text alone. So a call can be gone through step
by step: each takes what the profile says that a step of its batch, context and tokens takes, and each segment
``CALL_SECONDS`` more. The planner is told what it would be told in :meth:`specsa_jax.Engine.generate`, and set beside
one token at a time and lookup with each of its chains. What the times of the real device do beyond the profile's is
not in it; what the planner makes of a text is.

``recorded_texts.npz`` has texts of the trained target (train_target.py), 32 prompts of each kind with the 512 tokens
that the model made of them, greedy and at temperature 0.7; ``recorded_long_texts.npz`` 8 of each kind with 12,288,
greedy; ``recorded_profile.json`` is its profile on an H200, ``recorded_short_profile.json`` one of 195 seconds, which
times 12 steps where the other times 51; of float32 ``recorded_float32_profile.json`` times 7, from the shortest to the
longest, and ``recorded_poor_profile.json`` three, all short and of other kernels. Speeds are over one token at a time.

    python benchmarks/planner_replay.py --out                          # a minute on a CPU
    python benchmarks/planner_replay.py --record CHECKPOINT            # other texts; a GPU, or two hours
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np

from specsa_jax import Engine, PromptLookup, Strategy
from specsa_jax.config import PRESETS
from specsa_jax.decoding import Counts
from specsa_jax.planning.costs import Costs
from specsa_jax.planning.plan import SHORTEST, Plan
from specsa_jax.planning.planner import Candidate, Planner
from specsa_jax.planning.predict import Acceptance
from specsa_jax.planning.profile import read
from specsa_jax.planning.space import Space, candidates
from specsa_jax.schedule import Sharing


class Recorded(NamedTuple):
    """Texts in a file: so many sequences of each kind, with so many tokens of prompt and behind it."""

    path: Path
    sequences: int
    prompt: int
    new_tokens: int
    temperatures: tuple[float, ...]


USUAL = Recorded(Path(__file__).with_name("recorded_texts.npz"), 32, 1024, 512, (0.0, 0.7))
LONG = Recorded(Path(__file__).with_name("recorded_long_texts.npz"), 8, 4096, 12288, (0.0,))
PROFILE = Path(__file__).with_name("recorded_profile.json")
SHORT_PROFILE = Path(__file__).with_name("recorded_short_profile.json")
POOR_PROFILE = Path(__file__).with_name("recorded_poor_profile.json")
TREES = ("chain:4", "chain:16", "chain:32", "chain:63")
CALL_SECONDS = 1e-3
CONFIG = PRESETS["embedded"]


@dataclasses.dataclass(frozen=True)
class Texts:
    """Sequences of one kind.

    Attributes:
      tokens: int32 [N, S]; lengths: int [N], of the prompts; ends: int [N], of prompts and continuations.
      reach, stands: int [N, S], of a draft behind so many tokens: how long it is, and how much of it stands.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    reach: np.ndarray
    stands: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> Texts:
        depth, lookup = max(int(tree.partition(":")[2]) for tree in TREES), PromptLookup()
        reach, stands = np.zeros(tokens.shape, int), np.zeros(tokens.shape, int)
        for row, text in enumerate(tokens):
            begin, end = lengths[row], ends[row]
            places = np.arange(begin, end, dtype=np.int32)
            chains, valid = lookup.replay(text[:end], places, depth)
            at = places[:, None] + np.arange(depth)
            right = valid & (at < end) & (chains == text[np.minimum(at, end - 1)])
            reach[row, begin:end], stands[row, begin:end] = valid.sum(axis=1), np.cumprod(right, axis=1).sum(axis=1)
        return cls(tokens, lengths, ends, reach, stands)

    @property
    def new_tokens(self) -> int:
        return int((self.ends - self.lengths).max())

    def take(self, rows: np.ndarray, context: int) -> Texts:
        """Some sequences, as if their prompts had ``context`` tokens less what is new: with zeros before them."""
        before = max(0, context - self.tokens.shape[1])

        def padded(array: np.ndarray) -> np.ndarray:
            return np.pad(array[rows], ((0, 0), (before, 0)))

        return Texts(padded(self.tokens), self.lengths[rows] + before, self.ends[rows] + before,
                     padded(self.reach), padded(self.stands))  # fmt: skip


def load(recorded: Recorded = USUAL) -> dict[tuple[str, float], Texts]:
    """By workload and temperature."""
    with np.load(recorded.path) as saved:
        names = [kind for kind in kinds(recorded) if "{}-{}-tokens".format(*kind) in saved]
        return {
            kind: Texts.of(*(saved["{}-{}-{}".format(*kind, part)].astype(np.int32)
                             for part in ("tokens", "lengths", "ends")))
            for kind in names
        }  # fmt: skip


def kinds(recorded: Recorded) -> list[tuple[str, float]]:
    return [(workload, temperature) for temperature in recorded.temperatures for workload in ("prose", "code", "edit")]


def record(checkpoint: str, recorded: Recorded) -> None:
    """Decodes prompts of each kind, and keeps prompts and continuations in its file."""
    from workloads import prompts

    engine, found = Engine.from_pretrained(checkpoint), {}
    for workload, temperature in kinds(recorded):
        rows = prompts(engine, checkpoint, workload, recorded.prompt, recorded.sequences)
        result = engine.generate(rows, recorded.new_tokens, temperature=temperature, seed=3,
                                 strategy=Strategy(tree="chain:16"))  # fmt: skip
        found |= packed(workload, temperature, [[*row, *made.tokens] for row, made in zip(rows, result, strict=True)],
                        [len(row) for row in rows])  # fmt: skip
    np.savez_compressed(recorded.path, **found)


def packed(workload: str, temperature: float, texts: list[list[int]], lengths: list[int]) -> dict[str, np.ndarray]:
    """A kind's arrays in a file, by name."""
    ends = [len(text) for text in texts]
    tokens = np.zeros((len(texts), max(ends)), np.uint16)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    arrays = {"tokens": tokens, "lengths": np.array(lengths, np.int32), "ends": np.array(ends, np.int32)}
    return {f"{workload}-{temperature}-{part}": array for part, array in arrays.items()}


def decode(texts: Texts, plan: Plan, fixed: Candidate | None) -> tuple[float, int]:
    """Seconds and steps of one call: by the plan's choices, or by ``fixed`` alone."""
    known, seconds, total = texts.lengths.copy(), 0.0, 0
    rows = np.arange(len(known))
    while (known < texts.ends).any():
        chosen = fixed or plan.chosen
        depth, before, steps, taken = chosen.strategy.reach - 1, known.copy(), 0, 0.0
        drafted, accepted = np.zeros(depth + 1, int), np.zeros(depth + 1, int)
        while (known < texts.ends).any() and (fixed or steps < max(1, plan.steps_left)):
            running = known < texts.ends
            at = np.minimum(known, texts.reach.shape[1] - 1)
            reach = np.minimum(texts.reach[rows, at], depth) * running
            stood = np.minimum(texts.stands[rows, at], depth) * running
            drafted += np.bincount(reach[running], minlength=depth + 1)
            accepted += np.bincount(stood[running], minlength=depth + 1)
            known = np.where(running, np.minimum(known + 1 + stood, texts.ends), known)
            taken += plan.step_seconds(chosen, chosen.strategy.width if reach.any() else 1)
            steps += 1
        seconds, total, done = seconds + taken + CALL_SECONDS, total + steps, known >= texts.ends
        if fixed is None:
            nodes = np.array(drafted @ np.arange(depth + 1))
            plan.look(texts.tokens if plan.wants_text else (), known, done)
            plan.observe(Counts(np.array(steps), drafted, accepted, nodes), taken, int((known - before).sum()),
                         int((~done).sum()), int((texts.ends - known)[~done].sum()))  # fmt: skip
    return seconds, total


def compare(
    texts: Texts, batch: int, context: int, costs: Costs, priors: Acceptance, drawn: bool = False
) -> dict[str, dict[str, Any]]:
    """Figures by strategy, the planner's among them, of all sequences in batches of ``batch``; ``drawn`` texts are
    sampled."""
    space = Space(Planner(), candidates((("lookup", TREES),), CONFIG, "", "exact"), [Sharing()], [])
    found: dict[str, dict[str, Any]] = {}
    for first in range(0, len(texts.tokens), batch):
        some = texts.take(np.arange(first, first + batch), context)
        prompts = [row[:length] for row, length in zip(some.tokens, some.lengths, strict=True)]
        new = functools.partial(
            space.plan, costs, priors, prompts, texts.new_tokens, context=context, layers=CONFIG.layers,
            compiled=lambda strategy: True, compile_seconds=0.0, shortest=SHORTEST["gpu"], drawn=drawn,
        )  # fmt: skip
        for name, fixed in [("planner", None), *((one.describe(), one) for one in new().candidates)]:
            seconds, steps = decode(some, new(), fixed)
            one = found.setdefault(name, {"tokens": 0, "seconds": 0.0, "steps": 0})
            one["tokens"] += int((some.ends - some.lengths).sum())
            one["seconds"] += seconds
            one["steps"] += steps
    return found


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--profile", type=Path, default=PROFILE, help="a file of specsa profile; of whatever device")
    parser.add_argument("--batches", type=harness.count, nargs="+", default=[1, 8, 32])
    parser.add_argument("--contexts", type=harness.count, nargs="+", default=[4096, 65536])
    parser.add_argument("--record", metavar="CHECKPOINT", help="record the texts that this one makes, and end")
    args = parser.parse_args()
    if args.record:
        record(args.record, USUAL)
        record(args.record, LONG)
        return
    if any(USUAL.sequences % batch for batch in args.batches):
        raise ValueError(f"batches: got {args.batches}, expected divisors of {USUAL.sequences}")
    profile = read(args.profile)
    costs, priors, rows = Costs.from_profile(profile, CONFIG), Acceptance(profile.priors), []
    points = [(USUAL, batch, context) for batch in args.batches for context in args.contexts]
    points += [(LONG, batch, LONG.prompt) for batch in args.batches if LONG.sequences % batch == 0]
    texts = {recorded: load(recorded) for recorded, *_ in points}
    for recorded, batch, context in points:
        for (workload, temperature), some in texts[recorded].items():
            found = compare(some, batch, context, costs, priors, temperature > 0)
            speeds = {name: one["tokens"] / one["seconds"] for name, one in found.items()}
            planned = speeds.pop("planner")
            none = speeds.pop("autoregressive")
            rows.append({
                "workload": workload, "temperature": temperature, "batch": batch, "context": context,
                "new_tokens": recorded.new_tokens, "of_best": planned / max(none, *speeds.values()),
                "planner": planned / none, **{name: speed / none for name, speed in speeds.items()},
            })  # fmt: skip
    harness.print_table(rows)
    mean = math.exp(np.mean(np.log([row["of_best"] for row in rows])))
    print(f"planner of best, geometric mean: {mean:.3f}")
    if path := harness.out_path(args):
        harness.save(path, rows, times_of=profile.device, of_best=mean)


if __name__ == "__main__":
    harness.run(main)
