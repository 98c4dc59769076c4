"""Step time and divergence against the number of refresh layers, of uniform and of searched schedules.

A step verifies T tokens of each sequence behind the context, picks the most probable next tokens, and commits one. With
a checkpoint, divergence from all-refresh is measured on its held-out text, and the searched schedules are those that
``specsa schedule`` has stored (found now where there are none). With --preset, weights and cache are random: step times
only.

    python benchmarks/refresh_reuse.py --out benchmarks/results/cpu/refresh_reuse.json
    python benchmarks/refresh_reuse.py --preset 1b --context 65536 --batch 8 --out refresh_reuse_1b.json
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax import Engine, Strategy, model, precision
from specsa_jax.cache import chain, chain_slots, commit, create_cache, make_tail, pages_for
from specsa_jax.calibration import read_calibration
from specsa_jax.config import PRESETS
from specsa_jax.nsa import kernels
from specsa_jax.nsa.cached import Backend
from specsa_jax.schedule import Sharing, uniform_schedule


def random_cache(config, context: int, room: int, batch: int, dtype):
    """``batch`` sequences of ``context`` committed tokens with values of no meaning."""
    columns = pages_for(config.nsa, context + room)
    table = np.arange(batch * columns).reshape(batch, columns)
    cache = create_cache(config, table, batch * columns, dtype)
    fill = jax.jit(lambda key, like: jax.random.normal(key, like.shape, like.dtype), donate_argnums=1)
    leaves, structure = jax.tree.flatten(cache.layers)
    filled = [fill(jax.random.key(i), leaf) for i, leaf in enumerate(leaves)]
    lengths = jnp.full(batch, context, jnp.int32)
    return cache._replace(layers=jax.tree.unflatten(structure, filled), lengths=lengths)


def make_step(config, sharing: Sharing, implementation, dtype, width: int):
    """One step as ``harness.measure`` wants it: (cache, tokens), params → the same."""
    nsa = config.nsa
    backend = Backend(implementation, is_chain=True)

    def step(state, params):
        cache, tokens = state
        tail = make_tail(nsa, chain(width, nsa.compress_block), cache.lengths, chain_slots(nsa, width))
        hidden, tails = model.verify(
            config, params, tokens, cache, tail, dtype=dtype, backend=backend, schedule=sharing.schedule,
            keep_compressed=sharing.keep_compressed,
        )  # fmt: skip
        chosen = model.head(config, params, hidden, dtype).argmax(axis=-1).astype(jnp.int32)
        path = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
        after = commit(nsa, cache, tails, tail, path, jnp.ones_like(cache.lengths), implementation=implementation)
        return after._replace(lengths=cache.lengths), chosen  # the next step stands where this one did

    return step


def counts_of(layers: int) -> list[int]:
    """The numbers of refresh layers that are tried unless some are asked for."""
    few = range(1, layers + 1) if layers <= 8 else (1, 2, 4, -(-layers // 3), layers // 2, layers)
    return sorted(set(few), reverse=True)


def plot(rows, path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    has_kl = any("mean KL" in row for row in rows)
    figure, axes = pyplot.subplots(1, 1 + has_kl, figsize=(5 * (1 + has_kl), 4), squeeze=False)
    panels = [(axes[0, 0], "step, µs", "step, µs", False)]
    if has_kl:
        panels.append((axes[0, 1], "mean KL", "mean KL to all-refresh, nats", True))
    kinds = sorted({(row["schedules"], row["compressed"]) for row in rows if row["schedules"] != "all refresh"})
    for axis, name, label, logarithmic in panels:
        for kind in kinds:
            points = [row for row in rows if (row["schedules"], row["compressed"]) == kind and name in row]
            if not logarithmic:
                points = [row for row in rows if row["schedules"] == "all refresh"] + points
            if points:
                axis.plot([row["refresh"] for row in points], [row[name] for row in points], "o-",
                          label=f"{kind[0]}, compressed output {kind[1]}")  # fmt: skip
        axis.set_xlabel("refresh layers")
        axis.set_xticks(sorted({row["refresh"] for row in rows}))
        axis.set_ylabel(label)
        if logarithmic:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.1 * max(row[name] for row in rows))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="embedded")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="random weights of this size; step times alone")
    parser.add_argument("--context", type=int, default=4096, help="tokens, of the timed steps")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width", type=int, default=6, help="T: tokens that a step verifies")
    parser.add_argument("--refresh", type=int, nargs="+", help="numbers of refresh layers")
    parser.add_argument("--kl-context", type=int, default=2048, help="context of the measured divergence")
    parser.add_argument("--windows", type=int, default=precision.WINDOWS, help="places in the text for the divergence")
    parser.add_argument("--iterations", type=int, default=8, help="steps between two looks at the clock")
    parser.add_argument("--out", help="JSON; the plot goes beside it, as .png")
    args = parser.parse_args()

    on_gpu = jax.default_backend() == "gpu"
    dtype = jnp.dtype(jnp.bfloat16 if on_gpu else jnp.float32)
    engine, config = None, None
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

    measured = {}
    if engine is not None:
        kinds = list(dict.fromkeys(sharing for _, sharing in sharings if sharing.schedule))
        strategies = [
            Strategy(schedule=s.schedule, keep_compressed=s.keep_compressed, precision="approx") for s in kinds
        ]  # fmt: skip
        found = precision.measure(engine, strategies, text, contexts=(args.kl_context,), windows=args.windows, batch=8)
        measured = {m.sharing: m.contexts[0] for m in found}

    @functools.cache
    def time_of(sharing: Sharing) -> harness.Timing:
        step = make_step(config, sharing, implementation, dtype, args.width)
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
            return harness.measure(step, (cache, tokens), [params], iterations=args.iterations, seconds=2.0)

    rows = []
    for name, sharing in sharings:
        timing, at = time_of(sharing), measured.get(sharing)
        row = {
            "schedules": name,
            "refresh": sharing.schedule.count("F") or config.layers,
            "schedule": sharing.schedule or "F" * config.layers,
            "compressed": "kept" if sharing.keep_compressed else "dropped",
            "step, µs": timing.median,
            "low": timing.low,
            "high": timing.high,
            "speed-up": time_of(Sharing()).median / timing.median,
            "of the fastest": time_of(Sharing()).low / timing.low,  # what else a machine does only adds
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
        rows.append(row)
        print(row, flush=True)
    small = ("mean KL", "error", "KL bound", "99 % KL", "loss change")
    shown = [{name: f"{v:.2g}" if name in small else v for name, v in row.items()} for row in rows]
    for has_kl in (False, True):
        if part := [row for row in shown if ("mean KL" in row) == has_kl]:
            harness.print_table(part)
    if args.out:
        harness.save(args.out, rows, model=args.preset or args.checkpoint, context=args.context, batch=args.batch,
                     width=args.width, dtype=str(dtype), implementation=implementation, kl_context=args.kl_context,
                     kl_tokens=next((at.tokens for at in measured.values()), 0))  # fmt: skip
        title = f"{args.preset or args.checkpoint}, context {args.context}, batch {args.batch}, T = {args.width}"
        plot(rows, Path(args.out).with_suffix(".png"), f"{title}, {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
