"""Step time and divergence against the number of refresh layers, of uniform and of searched schedules.

A step verifies T tokens of each sequence behind the context, picks the most probable next tokens, and commits one. With
a checkpoint, divergence from all-refresh is measured on its held-out text, and the searched schedules are those that
``specsa schedule`` has stored (found now where there are none). With --preset, weights and cache are random: step times
only.

    python benchmarks/refresh_reuse.py --out
    python benchmarks/refresh_reuse.py --preset 1b --context 65536 --batch 8 --out
"""

from __future__ import annotations

import argparse
import functools

import harness
import jax
import jax.numpy as jnp
import plots
from steps import make_step, model_dtype, random_cache

from specsa_jax import Engine, Strategy, model, precision
from specsa_jax.calibration import Calibration, read_calibration
from specsa_jax.checkpoints.records import AtContext
from specsa_jax.config import PRESETS, ModelConfig
from specsa_jax.nsa import kernels
from specsa_jax.schedule import Sharing, uniform_schedule


def counts_of(layers: int) -> list[int]:
    """The numbers of refresh layers that are tried unless some are asked for."""
    few = range(1, layers + 1) if layers <= 8 else (1, 2, 4, -(-layers // 3), layers // 2, layers)
    return sorted(set(few), reverse=True)


def candidates(
    config: ModelConfig, counts: list[int], engine: Engine | None, text: Calibration | None, args: argparse.Namespace
) -> list[tuple[str, Sharing]]:
    """(kind, sharing) of what is compared; of the searched ones, those of ``counts`` refresh layers."""
    sharings = [("all refresh", Sharing())]
    for keep in (True, False):
        searched = {}
        if engine is not None:
            searched = {s.refresh: s.schedule for s in engine.records.searched if s.keep_compressed == keep}
            if not searched:
                found = precision.search(engine, text, min(counts), keep_compressed=keep, contexts=(args.kl_context,),
                                         windows=args.windows)  # fmt: skip
                searched = {best.refresh: best.schedule for best, _ in found}
        for refresh in (count for count in counts if count < config.layers):
            sharings.append(("uniform", Sharing(uniform_schedule(config.layers, refresh), keep)))
            if refresh in searched:
                sharings.append(("searched", Sharing(searched[refresh], keep)))
    return sharings


def divergence(
    engine: Engine, sharings: list[tuple[str, Sharing]], text: Calibration, args: argparse.Namespace
) -> dict[Sharing, AtContext]:
    """Of each sharing that reuses, at one length of context."""
    kinds = dict.fromkeys(sharing for _, sharing in sharings if sharing.schedule)
    strategies = [
        Strategy(schedule=s.schedule, keep_compressed=s.keep_compressed, precision="approx") for s in kinds
    ]  # fmt: skip
    found = precision.measure(engine, strategies, text, contexts=(args.kl_context,), windows=args.windows, batch=8)
    return {m.sharing: m.contexts[0] for m in found}


def row_of(kind: str, sharing: Sharing, layers: int, timing: harness.Timing, base: harness.Timing, at) -> dict:
    """``at``: the measured divergence, or None."""
    row = {
        "schedules": kind,
        "refresh": sharing.schedule.count("F") or layers,
        "schedule": sharing.schedule or "F" * layers,
        "compressed": "kept" if sharing.keep_compressed else "dropped",
        "step, µs": timing.median,
        "low": timing.low,
        "high": timing.high,
        "speed-up": base.median / timing.median,
        "of the fastest": base.low / timing.low,  # what else a machine does only adds
    }
    if at is not None:
        row |= {
            "mean KL": at.mean_kl,
            "error": at.mean_kl_error,
            "KL bound": at.mean_kl_bound,
            "99 % KL": at.p99_kl,
            "top-1": at.top1,
            "top-1 bound": at.top1_bound,
            "loss change": at.loss_change,
        }
    return row


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--checkpoint", default="embedded")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="random weights of this size; step times alone")
    parser.add_argument("--context", type=harness.count, default=4096, help="tokens, of the timed steps")
    parser.add_argument("--batch", type=harness.count, default=1)
    parser.add_argument("--width", type=harness.count, default=6, help="T: tokens that a step verifies")
    parser.add_argument("--refresh", type=harness.count, nargs="+", help="numbers of refresh layers")
    parser.add_argument("--kl-context", type=harness.count, default=2048, help="context of the measured divergence")
    parser.add_argument(
        "--windows", type=harness.count, default=precision.WINDOWS, help="places in the text for the divergence"
    )
    # Calling a compiled loop costs a GPU some milliseconds by itself.
    parser.add_argument("--iterations", type=harness.count, default=64 if jax.default_backend() == "gpu" else 8,
                        help="steps between two looks at the clock")  # fmt: skip
    args = parser.parse_args()

    dtype, engine, text = model_dtype(), None, None
    if args.preset:
        config = PRESETS[args.preset]
        params = model.init_params(config, 0, dtype)
        cache = random_cache(config, args.context, args.width, args.batch, dtype)
        tokens = jnp.zeros((args.batch, args.width), jnp.int32)
    else:
        engine = Engine.from_pretrained(args.checkpoint, dtype=dtype)
        config, params = engine.config, engine.params
        text = read_calibration(args.checkpoint, engine.tokenizer)
        taken = text.windows(args.context, args.width, max(args.batch, 8), "measure")[: args.batch]
        cache = engine.prefill(list(taken[:, : args.context + 1]), args.width)
        tokens = jnp.asarray(taken[:, args.context : args.context + args.width])
    implementation = kernels.choose(config.nsa, args.context + args.width, None)
    counts = args.refresh or counts_of(config.layers)
    sharings = candidates(config, counts, engine, text, args)
    measured = {} if engine is None else divergence(engine, sharings, text, args)

    @functools.cache
    def time_of(sharing: Sharing) -> harness.Timing:
        step = make_step(config, sharing, implementation, dtype, args.width)
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
            return harness.measure(step, (cache, tokens), [params], iterations=args.iterations, seconds=2.0, unroll=1)

    suffix = (f"_{args.preset}" if args.preset else "") + (f"_t{args.width}" if args.width != 6 else "")
    rows, path = [], harness.out_path(args, suffix)
    for kind, sharing in sharings:
        rows.append(row_of(kind, sharing, config.layers, time_of(sharing), time_of(Sharing()), measured.get(sharing)))
        print(rows[-1], flush=True)
        if path:
            harness.save(path, rows, model=args.preset or args.checkpoint, context=args.context, batch=args.batch,
                         width=args.width, dtype=str(dtype), implementation=implementation, kl_context=args.kl_context,
                         kl_tokens=next((at.tokens for at in measured.values()), 0))  # fmt: skip
    small = ("mean KL", "error", "KL bound", "99 % KL", "loss change")
    shown = [{name: f"{v:.2g}" if name in small else v for name, v in row.items()} for row in rows]
    for has_kl in (False, True):
        if part := [row for row in shown if ("mean KL" in row) == has_kl]:
            harness.print_table(part)
    if path:
        plots.draw(path)


if __name__ == "__main__":
    harness.run(main)
