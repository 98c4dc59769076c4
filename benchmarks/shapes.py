"""Step times of decoding (T = 1) and verification at the shapes of large models, with random weights and caches.

Beside each time: the bytes that a step must read at least, the fraction of the speed at which the device copies so many
(``of_floor``), the ratio to T = 1 (``over_decode``), and, on a GPU, the time of each kernel, by the profiler. Random
weights give step times, never acceptance: benchmarks/plots.py draws the speed-up as a function of the mean acceptance
length, and marks on it what trained models were measured to have, as what it is.

    python benchmarks/shapes.py --resume --out                               # on a GPU: 8b and 1b
    python benchmarks/shapes.py --presets embedded --contexts 4096 --out     # on a CPU
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import harness
import jax
from steps import add_preset, model_dtype, needed_bytes, step_loop, steps_of, too_large

from specsa_jax import model
from specsa_jax.config import PRESETS, ModelConfig

AXES = ("preset", "context", "batch", "width")
SHOWN = (*AXES, "step_us", "low", "high", "over_decode", "of_floor", "kernel_us", "launches", "compile_s", "not_run")
KERNELS = 24  # of a row's kernels the slowest; the others are added up


def row_of(config: ModelConfig, params: Any, context: int, batch: int, width: int, seconds: float) -> dict[str, Any]:
    """One point's figures, or under ``not_run`` why there are none."""
    dtype = model_dtype()
    if reason := too_large(config, context, batch, dtype):
        return {"not_run": reason}
    needed = needed_bytes(config, context, batch, dtype, width)
    try:
        loop = step_loop(config, params, context, batch, width, steps_of(needed.floor))
        timing = loop.timing(seconds=seconds)
    except harness.FAILURES as error:
        return harness.not_run(error)
    return {
        "step_us": timing.median,
        "low": timing.low,
        "high": timing.high,
        "floor_us": needed.floor,
        "of_floor": needed.floor / timing.median,
        "bytes": dataclasses.asdict(needed),
        "compile_s": loop.compile_seconds,
        "temporary_bytes": loop.temporary_bytes,
        **kernels_of(loop),
    }


def kernels_of(loop: harness.Loop) -> dict[str, Any]:
    """µs a step of each kernel, launches a step; nothing where there is no GPU."""
    events = loop.events()
    if not events:
        return {}
    times = {name: time / loop.steps for name, time in harness.by_name(events).items()}
    slowest = dict(list(times.items())[:KERNELS])
    return {
        "kernel_us": sum(times.values()),
        "span_us": harness.span(events) / loop.steps,
        "launches": len(events) / loop.steps,
        "kernels": slowest | {"others": sum(times.values()) - sum(slowest.values())},
    }


def points(args: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(context, batch, T), the most important first."""
    return [(context, batch, width) for batch in args.batches for context in args.contexts for width in args.widths]


def main() -> None:
    gpu = jax.default_backend() == "gpu"
    parser = harness.arguments(__doc__, rows=True)
    add_preset(parser, ["8b", "1b"] if gpu else ["embedded"])
    parser.add_argument("--contexts", type=harness.count, nargs="+", default=[65536, 16384] if gpu else [4096],
                        help="tokens, the step's own included")  # fmt: skip
    parser.add_argument("--batches", type=harness.count, nargs="+", default=[1, 8, 32] if gpu else [1])
    parser.add_argument("--widths", type=harness.count, nargs="+", default=[1, 16, 4, 8, 64], help="T; 1 is decoding")
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on each figure's repeats")
    args = parser.parse_args()
    rows = harness.Rows(args, AXES, dtype=str(model_dtype()))
    rows_of_presets(rows, args)
    rows.save(bytes_per_second=harness.copy_bandwidth())


def rows_of_presets(rows: harness.Rows, args: argparse.Namespace) -> None:
    for name in args.presets:
        config, params = PRESETS[name], None
        for context, batch, width in points(args):
            axes = {"preset": name, "context": context, "batch": batch, "width": width}
            if not rows.wanted(**axes):
                continue
            if params is None:
                params = model.init_params(config, 0, model_dtype())
            row = axes | row_of(config, params, context, batch, width, args.seconds)
            decode = rows.find(**(axes | {"width": 1})) or row
            if "step_us" in row and "step_us" in decode and decode["width"] == 1:
                row["over_decode"] = row["step_us"] / decode["step_us"]
            rows.add(row, SHOWN)


if __name__ == "__main__":
    harness.run(main)
