"""Whether the stored divergences of a checkpoint's approximations hold on text that they were not measured on.

Each strategy that ``precision.json`` has in the engine's dtype is measured as it was (``specsa precision``), behind one
context, at places of the same held-out text whose scored tokens neither a measurement nor a search has scored; or, with
--data, on other text. ``inside``: the mean KL is at most, and the top-1 agreement at least, what the strategy is
admitted by. The expectations are meant to be, so a figure may lie beyond by some of its standard errors. Prints rows,
writes JSON.

    python benchmarks/held_out_bounds.py --out
"""

from __future__ import annotations

import argparse
import dataclasses

import harness
import numpy as np

from specsa_jax import Engine, PromptLookup, Strategy, precision
from specsa_jax.calibration import MIN_WINDOWS, Calibration, CalibrationError, read_calibration
from specsa_jax.checkpoints.records import Measurement, Records


@dataclasses.dataclass(frozen=True)
class Elsewhere(Calibration):
    """Text of which only tokens are scored that are not ``seen``, bool [N]."""

    seen: np.ndarray

    def windows(self, context: int, tokens: int, count: int, part: str = "measure") -> np.ndarray:
        """As :meth:`Calibration.windows`, but that ``part`` makes no difference."""
        firsts = np.arange(context, len(self.stream) - tokens, tokens)
        firsts = firsts[~self.seen[firsts[:, None] + np.arange(tokens)].any(axis=1)]
        count = min(count, len(firsts))
        if count < MIN_WINDOWS:
            raise CalibrationError(f"windows: got {count} of {tokens} unseen tokens behind {context} of context, "
                                   f"expected at least {MIN_WINDOWS}")  # fmt: skip
        starts = firsts[np.arange(count) * len(firsts) // count] - context
        return self.stream[starts[:, None] + np.arange(context + tokens + 1)]


def elsewhere(text: Calibration, records: Records) -> Elsewhere:
    """``text`` but for what ``records`` have scored of it: the measurements' places, and of the searches, whose sizes
    are not stored, all that they may have had."""
    seen = np.zeros(len(text.stream), bool)
    places = Calibration(np.arange(len(text.stream), dtype=np.int32), "places")
    sizes = {(at.context, at.tokens // at.windows, at.windows, "measure")
             for m in records.measurements if m.text.sha256 == text.text.sha256 for at in m.contexts}  # fmt: skip
    if any(found.text.sha256 == text.text.sha256 for found in records.searched):
        sizes |= {(context, tokens, len(text.stream), "search") for context, tokens, _, _ in sizes}
        sizes.add((2048, precision.TOKENS, len(text.stream), "search"))
    for context, tokens, count, part in sizes:
        seen[places.windows(context, tokens, count, part)[:, context:-1]] = True
    return Elsewhere(text.stream, text.source, seen)


def strategy_of(measured: Measurement) -> Strategy:
    """A strategy that does what was measured."""
    sharing, drafts = measured.sharing, {}
    if sharing.group_mode == "shared":
        drafts = {"drafter": PromptLookup(), "tree": f"chain:{measured.width - 1}"}
    options = dataclasses.asdict(sharing) | {"schedule": sharing.schedule or "all"}
    return Strategy(**{"drafter": None, **drafts, **options}, precision="approx")


def row_of(measured: Measurement, found: Measurement) -> dict[str, object]:
    """A stored measurement beside one on other text."""
    (at,) = found.contexts
    return {
        "strategy": measured.sharing.describe(), "width": measured.width, "tokens": at.tokens,
        "mean_kl": at.mean_kl, "mean_kl_error": at.mean_kl_error, "stored_mean_kl": measured.mean_kl,
        "top1": at.top1, "top1_error": at.top1_error, "stored_top1": measured.top1,
        "inside": at.mean_kl <= measured.mean_kl and at.top1 >= measured.top1,
    }  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    parser = harness.arguments(__doc__, rows=True)
    parser.add_argument("--checkpoint", default="embedded", help="a packaged name or a checkpoint directory")
    parser.add_argument("--context", type=harness.count, default=2048)
    parser.add_argument("--windows", type=harness.count, default=precision.WINDOWS, help="places in the text")
    parser.add_argument("--tokens", type=harness.count, default=precision.TOKENS, help="scored at each place")
    parser.add_argument("--data", nargs="+", default=[], help="files or directories of other text")
    return parser


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.checkpoint)
    text = elsewhere(read_calibration(args.checkpoint, engine.tokenizer, args.data), engine.records)
    rows = harness.Rows(
        args, ("strategy", "width"), model=engine.fingerprint, dtype=str(engine.dtype),
        implementation=engine.implementation, context=args.context, windows=args.windows, text=text.source,
        unseen_tokens=int((~text.seen).sum()),
    )  # fmt: skip
    stored = [measured for measured in engine.records.measurements if measured.dtype == str(engine.dtype)]
    if not stored:
        parser.error(f"--checkpoint: got {args.checkpoint!r}, of which nothing is measured in {engine.dtype}")
    reach = min(measured.reach for measured in stored)
    if args.context + args.tokens > reach:
        parser.error(f"--context: got {args.context}, expected at most {reach - args.tokens}: what is stored says "
                     "nothing of longer ones")  # fmt: skip
    for width in dict.fromkeys(measured.width for measured in stored):
        wanted = [measured for measured in stored if measured.width == width
                  and rows.wanted(strategy=measured.sharing.describe(), width=width)]  # fmt: skip
        if wanted:  # together, as those of one width share the exact passes
            found = precision.measure(engine, list(map(strategy_of, wanted)), text, contexts=(args.context,),
                                      windows=args.windows, tokens=args.tokens)  # fmt: skip
            for pair in zip(wanted, found, strict=True):
                rows.add(row_of(*pair))
    inside = sum(row["inside"] for row in rows.rows)
    rows.save(inside=inside)
    print(f"{inside} of {len(rows.rows)} inside")


if __name__ == "__main__":
    harness.run(main)
