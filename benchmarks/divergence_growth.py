"""Whether an approximation's divergence grows along the text that it has itself decoded.

``specsa precision`` scores 64 tokens behind a context that was read exactly. A call decodes more: all that it has
committed since was written by reuse layers, and is read again. Here ``--tokens`` tokens are scored one pass of 64 after
the other, each committed as the approximation verified it; a row has the divergence of each 64 of them, over all
places of the calibration text, beside that of the first 64. The context should be longer than what a query selects:
below that divergence grows with the context alone.

    python benchmarks/divergence_growth.py --out
"""

from __future__ import annotations

import harness
import numpy as np

from specsa_jax import Engine, Strategy, precision
from specsa_jax.calibration import read_calibration
from specsa_jax.schedule import Sharing

PASS = precision.TOKENS


def sharing_of(name: str, layers: int) -> Sharing:
    """``every:3``, or ``every:3,dropped`` for one that drops the compressed output of reuse layers."""
    schedule, _, dropped = name.partition(",")
    if dropped not in ("", "dropped"):
        raise ValueError(f"schedules: got {name!r}, expected a schedule, or one followed by ,dropped")
    strategy = Strategy(None, schedule=schedule, keep_compressed=not dropped, precision="approx")
    found = strategy.sharing(layers)
    if not found.approximates:
        raise ValueError(f"schedules: got {name!r}, whose divergence is 0, expected one with reuse layers")
    return found


def rows_of(divergence: precision.Divergence, **axes: object) -> list[dict[str, object]]:
    """A row each PASS scored tokens, from arrays [windows, tokens]."""
    found: list[dict[str, object]] = []
    for start in range(0, divergence.kl.shape[1], PASS):
        part = precision.Divergence(*(values[:, start : start + PASS] for values in divergence))
        at = precision.summarise(part, 0)
        found.append(axes | {"decoded": start, "tokens": at.tokens, "mean_kl": at.mean_kl,
                             "mean_kl_error": at.mean_kl_error, "top1": at.top1, "top1_error": at.top1_error,
                             "of_first": at.mean_kl / found[0]["mean_kl"] if found else 1.0})  # type: ignore[operator]  # fmt: skip
    return found


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--checkpoint", default="embedded", help="a packaged name or a checkpoint directory")
    parser.add_argument("--schedules", nargs="+", default=["every:3", "every:2,dropped", "FSSSSS"])
    parser.add_argument("--context", type=harness.count, default=2048, help="tokens read exactly")
    parser.add_argument("--tokens", type=harness.count, default=16 * PASS, help="scored behind it, a multiple of 64")
    parser.add_argument("--windows", type=harness.count, default=precision.WINDOWS, help="places in the text")
    parser.add_argument("--data", nargs="+", default=[], help="files or directories of other text")
    args = parser.parse_args()
    if args.tokens % PASS:
        parser.error(f"--tokens: got {args.tokens}, expected a multiple of {PASS}")
    engine = Engine.from_pretrained(args.checkpoint)
    text = read_calibration(args.checkpoint, engine.tokenizer, args.data)
    taken = text.windows(args.context, args.tokens, args.windows)
    kinds = {name: sharing_of(name, engine.config.layers) for name in args.schedules}
    parts: dict[str, list[precision.Divergence]] = {name: [] for name in kinds}
    for windows in precision.prepare(engine, taken, args.context, precision.BATCH, PASS):
        for name, sharing in kinds.items():
            parts[name].append(precision.diverge(engine, windows, sharing, PASS))
    rows = []
    for name, some in parts.items():
        joined = precision.Divergence(*(np.concatenate(column)[: len(taken)] for column in zip(*some, strict=True)))
        rows += rows_of(joined, schedule=kinds[name].describe())
    harness.print_table([{k: v if k != "mean_kl" else f"{v:.5f}" for k, v in row.items()} for row in rows])
    if path := harness.out_path(args):
        harness.save(path, rows, model=engine.fingerprint, dtype=str(engine.dtype), context=args.context,
                     windows=len(taken), text=text.source)  # fmt: skip


if __name__ == "__main__":
    harness.run(main)
