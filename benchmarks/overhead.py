"""What a step takes beside its kernels: step time against their sum, launches a step, with and without command buffers.

The engine's own loop continues a prompt of a checkpoint; with --presets, the step of a model with random weights in a
loop is looked at too (benchmarks/steps.py). Wall time is of runs without the profiler, kernels are of one with it.
``overhead`` is step time over the sum of the kernels, less 1. XLA gathers kernels into command buffers (CUDA graphs):
``on`` is how the engine compiles (specsa_jax/compiling.py), with loops and conditions in them; ``kernels`` is XLA's
default, without those, and ``off`` a process with XLA_FLAGS=--xla_gpu_enable_command_buffer= . The profiler sees no
kernel of a loop in a command buffer, so ``on`` is set beside the kernels of ``kernels``. One step of the trace is kept,
for benchmarks/plots.py to draw. Without a GPU there are no kernels to look at: wall times alone.

    python benchmarks/overhead.py --presets 8b 1b --out                                    # on a GPU
    python benchmarks/overhead.py --context 1024 --new-tokens 32 --buffers on --out        # on a CPU
"""

from __future__ import annotations

import os

# Two processes share a GPU here, one after the other at work.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import jax
from end_to_end import named
from steps import add_preset, model_dtype, needed_bytes, step_loop, steps_of, too_large
from workloads import prompts

from specsa_jax import Engine, model
from specsa_jax.config import PRESETS

EVENTS = 2000  # of one step, at most so many are kept
BUFFERS = {"kernels": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION", "off": ""}


def figures(events: list[harness.Event], steps: int, step_us: float) -> dict[str, Any]:
    """Of what ran on the GPU in ``steps`` steps that take ``step_us`` each without the profiler."""
    if not events:
        return {}
    kernels = sum(event.duration for event in events) / steps
    if step_us > 10 * kernels:  # the loop is in a command buffer
        return {}
    middle = events[len(events) // 2].start
    end = middle + 1.2 * harness.span(events) / steps
    shown = [event for event in events if middle <= event.start < end][:EVENTS]
    return {
        "kernel_us": kernels,
        "overhead": step_us / kernels - 1,
        "launches": len(events) / steps,
        "timeline": ["\t".join([f"{e.start - middle:.2f}", f"{e.duration:.2f}", e.stream, e.name]) for e in shown],
    }


def engine_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The engine's loop, by strategy."""
    engine, rows = Engine.from_pretrained(args.checkpoint), []
    prompt = prompts(engine, args.checkpoint, "edit", args.context - args.new_tokens, 1)
    for name in args.strategies:

        def run(name=name):
            return engine.generate(prompt, args.new_tokens, strategy=named(name, args.checkpoint)).stats

        run()
        times = [(stats := run()).decode_seconds / stats.steps for _ in range(args.repeats)]
        step_us = 1e6 * statistics.median(times)
        stats, events = harness.trace(run)
        # The prompt's kernels come before; decoding's end when it does.
        if events:
            begun = max(event.end for event in events) - 1e6 * stats.decode_seconds
            events = [event for event in events if event.start >= begun]
        rows.append({"model": args.checkpoint, "case": name, "context": args.context, "step_us": step_us,
                     "low": 1e6 * min(times), "high": 1e6 * max(times), "steps": stats.steps,
                     **figures(events, stats.steps, step_us)})  # fmt: skip
    return rows


def preset_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The step of random weights, by T."""
    rows = []
    for name in args.presets:
        config = PRESETS[name]
        if too_large(config, args.preset_context, 1, model_dtype()):
            continue
        params = model.init_params(config, 0, model_dtype())
        for width in args.widths:
            guess = needed_bytes(config, args.preset_context, 1, model_dtype(), width).floor
            loop = step_loop(config, params, args.preset_context, 1, width, steps_of(guess), loops=True)
            timing = loop.timing(seconds=0.5)
            rows.append({"model": name, "case": f"T = {width}", "context": args.preset_context,
                         "step_us": timing.median, "low": timing.low, "high": timing.high, "steps": loop.steps,
                         **figures(loop.events(), loop.steps, timing.median)})  # fmt: skip
    return rows


def in_a_process(buffers: str) -> list[dict[str, Any]]:
    """The rows of this script in a process of its own, which starts with other flags of XLA."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_PYTHON_CLIENT_PREALLOCATE"}
    if buffers in BUFFERS:
        flag = f"--xla_gpu_enable_command_buffer={BUFFERS[buffers]}"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--rows", str(file)], env=environment)
        if done.returncode:
            sys.exit(done.returncode)
        return [{"command_buffers": buffers, **row} for row in json.loads(file.read_text(encoding="utf-8"))]


def beside_kernels(rows: list[dict[str, Any]]) -> None:
    """Sets what has no kernels of its own beside those that the same step has outside of command buffers' loops."""
    looked = [row for row in rows if row["command_buffers"] == "kernels" and "kernel_us" in row]
    seen = {(row["model"], row["case"]): row for row in looked}
    for row in rows:
        if other := seen.get((row["model"], row["case"])):
            row.setdefault("kernel_us", other["kernel_us"])
            row.setdefault("overhead", row["step_us"] / row["kernel_us"] - 1)
            row.setdefault("launches", other["launches"])


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--checkpoint", default="embedded")
    add_preset(parser, [])
    parser.add_argument(
        "--context", type=harness.count, default=8192, help="of the checkpoint, the new tokens included"
    )
    parser.add_argument("--preset-context", type=harness.count, default=65536)
    parser.add_argument("--widths", type=harness.count, nargs="+", default=[1, 16], help="T of the presets' steps")
    parser.add_argument("--strategies", nargs="+", default=["none", "lookup@chain:4", "lookup+head@best:16:6"])
    parser.add_argument("--new-tokens", type=harness.count, default=256)
    parser.add_argument("--repeats", type=harness.count, default=5)
    parser.add_argument("--buffers", nargs="+", choices=["on", *BUFFERS], default=["on", *BUFFERS])
    parser.add_argument("--rows", help=argparse.SUPPRESS)  # where a process of this script leaves its rows
    args = parser.parse_args()
    if args.rows:
        Path(args.rows).write_text(json.dumps(engine_rows(args) + preset_rows(args)), encoding="utf-8")
        return
    rows: list[dict[str, Any]] = []
    for buffers in args.buffers:
        rows += in_a_process(buffers)
        beside_kernels(rows)
        if path := harness.out_path(args):
            harness.save(path, rows, backend_kind=jax.default_backend())
    harness.print_table([{name: row.get(name, "-") for name in
                          ("command_buffers", "model", "case", "step_us", "kernel_us", "overhead", "launches")}
                         for row in rows])  # fmt: skip


if __name__ == "__main__":
    harness.run(main)
