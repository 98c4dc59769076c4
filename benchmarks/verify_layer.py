"""One NSA layer's verification of T draft tokens (class ``exact``), in a captured loop on inputs larger than L2.

    python benchmarks/verify_layer.py --out
    python benchmarks/verify_layer.py --heads 32x8 --context 64 --batch 8 --width 8 --overlap 50,70,90 --group 1,2,4,8,T
    python benchmarks/verify_layer.py --batch 8 --width 8 --xla --stages
    python benchmarks/verify_layer.py --tiny --interpret      # does the script run? (on a CPU)

A row is a case and a group size C: the refresh layer (scores, selection, three branches, merge), the reuse layer, the
XLA path with ``--xla``, and the peer. Times are medians in µs of a loop that runs 5 ms or more, less ``link``, the
cost of what makes one call depend on the one before. ``floor`` is the time that HBM takes to deliver every needed byte
once (compressed entries, windows, the union of the blocks that were selected); ``of floor`` its fraction of the
refresh layer's. Configs are those that the kernels take on this device, measured ones where there are any. Group 1 is
our per-query path. ``--overlap real`` is what queries of the embedded model share (benchmarks/real_selections.py).

The XLA path is ``specsa_jax.nsa.cached.attend_cached`` on the same arrays. Besides what the kernels do it rotates the
tail's keys and compresses the blocks that end in the tail (mean pooling: the cheapest there is).

Before a group is timed, its output and selection are compared with group 1's; the XLA path's output too. XLA's loop
takes three of the inputs, or it would compile for minutes: at batch 1 they fit L2, which is in its favour.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import real_selections
from jax.stages import Compiled

from pallas_kernels.attention import AttentionConfig, Sparsity, attend, configure, specs

STAGES = ("compressed+window", "selection", "selected", "merge")
L2_BYTES = 60e6
LOOP_US = 5000
# µs of Scalable-Flash-Native-Sparse-Attention (Triton, paged, split-K, CUDA graph), one layer, T draft tokens as T
# rows that share a page table: l 32, d 16, l' 64, n 16, w 512, D 128, bf16, measured by us on an NVIDIA H200.
# (heads, context in K, batch) → T → µs.
PEER = {
    ("32x8", 16, 1): {1: 52, 4: 54, 8: 58, 16: 70, 32: 94, 64: 161, 128: 289},
    ("32x8", 16, 8): {1: 69, 4: 106, 8: 178, 16: 314},
    ("32x8", 16, 32): {1: 144, 4: 345, 8: 611, 16: 1139},
    ("32x8", 64, 1): {1: 72, 4: 78, 8: 87, 16: 109, 32: 185, 64: 339, 128: 628},
    ("32x8", 64, 8): {1: 105, 4: 201, 8: 353, 16: 658},
    ("32x8", 64, 32): {1: 289, 4: 705, 8: 1285, 16: 2492},
    ("64x4", 16, 1): {1: 54, 4: 56, 8: 57, 16: 62},
    ("64x4", 16, 8): {1: 62, 4: 80, 8: 114, 16: 199},
    ("64x4", 16, 32): {1: 95, 4: 213, 8: 373, 16: 685},
    ("64x4", 64, 1): {1: 71, 4: 73, 8: 78, 16: 88},
    ("64x4", 64, 8): {1: 86, 4: 120, 8: 204, 16: 379},
    ("64x4", 64, 32): {1: 169, 4: 397, 8: 723, 16: 1386},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A spec with the axes that it comes from; ``context`` in units of 1024 tokens."""

    spec: specs.AttentionSpec
    heads: str
    context: int
    overlap: str

    @property
    def axes(self) -> dict[str, Any]:
        return {
            "heads": self.heads, "context": self.context, "batch": len(self.spec.lengths), "width": self.spec.width,
            "overlap": self.overlap,
        }  # fmt: skip

    @property
    def peer(self) -> int | None:
        if "H200" not in jax.devices()[0].device_kind:
            return None
        return PEER.get((self.heads, self.context, len(self.spec.lengths)), {}).get(self.spec.width)


def needed_bytes(spec: specs.AttentionSpec, ids: np.ndarray) -> int:
    """What a refresh layer must read once: compressed entries, windows, and the union of ``ids`` [B, T, Hkv, n]."""
    sparsity, item = spec.sparsity, jnp.dtype(spec.dtype).itemsize
    token, tokens = 2 * spec.dim * item, 0  # of one KV head
    for own, length in zip(ids, spec.lengths, strict=True):
        entries = max(0, (length - sparsity.compress_block) // sparsity.compress_stride + 1)
        tokens += spec.heads[1] * (entries + min(max(length, 0), sparsity.window))
        committed = -(-length // sparsity.select_block)
        for head in range(spec.heads[1]):
            union = np.unique(own[:, head])
            tokens += sparsity.select_block * int(((union >= 0) & (union < committed)).sum())
    return token * tokens


def link(lengths, out):
    """Lengths that depend on ``out`` and are what they were, which XLA does not know."""
    out = jax.lax.optimization_barrier(out)  # all of it, not the element that is used
    return jax.lax.optimization_barrier(lengths + jnp.minimum(jnp.abs(out.reshape(-1)[:1]).astype(jnp.int32), 0)[0])


def with_lengths(arguments, lengths):
    query, gates, layer, page_table, _, tail = arguments
    return query, gates, layer, page_table, lengths, tail


def xla_path(spec: specs.AttentionSpec):
    """``attend_cached`` as a function of the kernels' arguments, giving the output and the tail's entries."""
    from flax import nnx

    from specsa_jax import cache as caches
    from specsa_jax.config import NSAConfig, RopeConfig
    from specsa_jax.nsa.cached import attend_cached
    from specsa_jax.nsa.compression import Compress
    from specsa_jax.nsa.sequence import Projected

    sizes = dataclasses.asdict(spec.sparsity)
    config = NSAConfig(
        num_heads=spec.heads[0], num_kv_heads=spec.heads[1], head_dim=spec.dim, compression="mean",
        compress_position="none", compressed_rope="none", **sizes,
    )  # fmt: skip
    # The arguments are rotated already: so slow a rotation is the identity.
    rope = RopeConfig(kind="linear", factor=1e12)
    phi = Compress(config, has_position=False, dtype=jnp.dtype(spec.dtype), rngs=nnx.Rngs(0))
    tree, slots = caches.chain(spec.width, config.compress_block), caches.chain_slots(config, spec.width)
    ring = caches.ring_sizes(config, 1)[0]

    def run(arguments):
        query, gates, layer, page_table, lengths, tail = arguments
        # The raw ring, which the kernels do not read, has the window's values: any would do.
        raw = [jnp.tile(x, (1, 1, -(-ring // x.shape[2]), 1))[:, :, :ring] for x in layer[4:]]
        own = caches.LayerCache(*layer[:4], *raw, *layer[4:])
        cache = caches.Cache([own], page_table, lengths)
        keys = jnp.stack([tail.key, tail.key, tail.window_key], axis=2)
        values = jnp.stack([tail.value, tail.value, tail.window_value], axis=2)
        # Its positions are the arguments', not the loop's: made once.
        new = caches.make_tail(config, tree, tail.positions[:, 0], slots)
        return attend_cached(config, rope, phi, phi, Projected(query, keys, values, gates), cache, own, new)[:2]

    return run


def chosen(spec: specs.AttentionSpec, group: int | None, untuned: bool) -> AttentionConfig:
    """The config of a call with groups of so many queries, or as the kernels choose: measured, or the heuristic's."""
    return configure(spec.sparsity, spec.shape, group, interpret=untuned)


def compare(name: str, out, expected, dtype: str) -> None:
    """Stops unless ``out`` is ``expected`` to what the dtype allows: no figures from a wrong kernel."""
    out, expected = (np.asarray(x, np.float32) for x in (out, expected))
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype] * max(1.0, float(np.abs(expected).max()))
    error = float(np.abs(out - expected).max())
    if not error <= tolerance:
        raise SystemExit(f"{name}: an output is off by {error:.2g}, expected at most {tolerance:.2g}")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A config's programs: both layers on one input, and the loops over them."""

    config: AttentionConfig
    layers: Compiled
    refresh: harness.Loop
    reuse: harness.Loop


class Programs:
    """What is compiled for the cases of one shape, which differ in their values. No arrays are needed for that."""

    def __init__(self, spec: specs.AttentionSpec, args: argparse.Namespace):
        self.spec, self.args = spec, args
        least = needed_bytes(spec, np.full((len(spec.lengths), 1, spec.heads[1], 1), -1))
        self.count = 1 if args.tiny else max(1, min(24, math.ceil(2 * L2_BYTES / least)))
        self.guess = least / harness.copy_bandwidth() * 1e6
        self.link = self.loop(lambda arguments: arguments[4])

    def config(self, group: int) -> AttentionConfig:
        return chosen(self.spec, group, self.args.untuned)

    @functools.cached_property
    def arguments(self) -> Any:
        """Shapes of one input."""
        return self.spec.abstract()

    def loop(self, function, *rest: Any, count: int | None = None, guess: float = 0.0, unroll: int = 8) -> harness.Loop:
        """A compiled loop over ``function(arguments, *rest)`` of ``count`` inputs (None: all).

        ``guess``: µs of a call, for the loop's length; ``unroll``: as of :class:`harness.Loop`.
        """

        def step(lengths, buffer):
            arguments, *rest = buffer
            return link(lengths, function(with_lengths(arguments, lengths), *rest))

        buffers = [(self.arguments, *rest)] * (count or self.count)
        # Never faster than what must be read, nor than a launch.
        guess = max(guess, self.guess, 5.0)
        iterations = 1 if self.args.tiny else math.ceil(LOOP_US / (guess * len(buffers)))
        return harness.Loop(step, self.arguments[4], buffers, iterations, unroll)

    def variant(self, group: int) -> Variant:
        """Both layers with groups of so many queries."""
        spec, config, arguments = self.spec, self.config(group), self.arguments
        layer = functools.partial(attend, spec.sparsity, config=config, interpret=self.args.interpret)

        # Jitted, so that a loop lowers a layer once.
        @jax.jit
        def refresh(arguments):
            return layer(*arguments)

        @jax.jit
        def reuse(arguments, selected):
            return layer(*arguments, selected=selected)[0]

        def layers(arguments):
            out, selected = refresh(arguments)
            return out, selected, reuse(arguments, selected)

        selected = jax.eval_shape(refresh, arguments)[1]
        return Variant(config, jax.jit(layers).lower(arguments).compile(),
                       self.loop(lambda arguments: refresh(arguments)[0]), self.loop(reuse, selected))  # fmt: skip

    def xla(self) -> tuple[Compiled, harness.Loop] | str:
        """XLA's path on one input and in a loop, or why there is none."""
        path = jax.jit(xla_path(self.spec))
        try:
            few, guess = min(3, self.count), 10 * self.guess
            loop = self.loop(lambda arguments: path(arguments)[0], count=few, guess=guess, unroll=1)
            return path.lower(self.arguments).compile(), loop
        except jax.errors.JaxRuntimeError as error:
            return out_of_memory(error)


class Inputs:
    """One case's arrays on the device, and what group 1 makes of them."""

    def __init__(self, case: Case, programs: Programs, baseline: Variant):
        self.case, self.spec, self.args, self.programs = case, case.spec, programs.args, programs
        self.buffers = [(self.spec.arguments(seed),) for seed in range(programs.count)]
        self.expected, selected, _ = baseline.layers(*self.buffers[0])
        self.ids = np.asarray(selected.ids)
        self.bytes = needed_bytes(self.spec, self.ids)
        self.floor = self.bytes / harness.copy_bandwidth() * 1e6
        self.link = 0.0
        self.link = self.time(self.on(programs.link))["median"]

    def time(self, loop: harness.Loop) -> dict[str, float]:
        """µs of a call, less those of what makes it depend on the one before."""
        timing = loop.timing(1) if self.args.tiny else loop.timing(9, self.args.seconds)
        return {field: value - self.link for field, value in dataclasses.asdict(timing).items()}

    def on(self, loop: harness.Loop, buffers=None) -> harness.Loop:
        """The loop over this case's arrays."""
        buffers = buffers or self.buffers
        return loop.on(buffers[0][0][4], buffers)

    def row(self, group: int, variant: Variant) -> dict[str, Any]:
        """All figures of one group size, if its results are right."""
        name = f"{self.spec.name}, group {group}"
        out, selected, reused = variant.layers(*self.buffers[0])
        compare(name, out, self.expected, self.spec.dtype)
        compare(f"{name}, reuse layer", reused, self.expected, self.spec.dtype)
        if not np.array_equal(selected.ids, self.ids):
            raise SystemExit(f"{name}: other blocks than group 1")
        pairs = [(arguments, variant.layers(arguments)[1]) for (arguments,) in self.buffers]
        refresh_loop = self.on(variant.refresh)
        refresh = self.time(refresh_loop)
        peer = self.case.peer
        row = {
            **self.case.axes, "group": group, "refresh": refresh["median"], "low": refresh["low"],
            "high": refresh["high"], "floor": self.floor, "of floor": self.floor / refresh["median"],
            "reuse": self.time(self.on(variant.reuse, pairs))["median"], "peer": peer,
            "speed-up": peer and peer / refresh["median"],
        }  # fmt: skip
        if self.args.stages:
            row |= stages(refresh_loop)
        details = {
            "bytes": self.bytes,
            "link": self.link,
            "buffers": len(self.buffers),
            "measured overlap": overlap(self.ids),
            "default": group == chosen(self.spec, None, self.args.untuned).group,
        }
        return row | details | {"config": dataclasses.asdict(variant.config)}

    def xla(self, compiled: tuple[Compiled, harness.Loop] | str, baseline: Variant) -> float | str:
        """The XLA path's median, or why it has none."""
        if isinstance(compiled, str):
            return compiled
        path, loop = compiled
        *others, tail = self.buffers[0][0]
        try:
            out, new = path(self.buffers[0][0])
            # The path compresses the tail's blocks itself; the kernels are given its entries.
            tail = tail._replace(compressed_key=new.compressed_key, compressed_value=new.compressed_value)
            compare(f"{self.spec.name}, XLA", out, baseline.layers((*others, tail))[0], self.spec.dtype)
            return self.time(self.on(loop, self.buffers[:3]))["median"]
        except jax.errors.JaxRuntimeError as error:
            return out_of_memory(error)


def stages(loop: harness.Loop) -> dict[str, float]:
    """µs of each of a refresh layer's launches, by the profiler."""
    kernels = loop.kernels()
    return {name: sum(time for kernel, time in kernels.items() if kernel.startswith(f"nsa_{name.split('+')[0]}"))
            for name in STAGES}  # fmt: skip


def out_of_memory(error: Exception) -> str:
    """What stands for a figure where there was too little memory; other errors are raised."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return "out of memory"


def overlap(ids: np.ndarray) -> float | None:
    """Mean share of their blocks that adjacent queries have in common, of ids [B, T, Hkv, n]."""
    if ids.shape[1] < 2:
        return None
    both = (ids[:, :-1, :, :, None] == ids[:, 1:, :, None, :]) & (ids[:, 1:, :, None, :] >= 0)
    return float(both.any(axis=-1).mean())


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that fit a screen."""
    hidden = {"low", "high", "bytes", "link", "buffers", "config", "measured overlap", "default"}
    return {key: "-" if value is None else value for key, value in row.items() if key not in hidden}


def cases(args: argparse.Namespace) -> list[Case]:
    def with_overlap(spec: specs.AttentionSpec, share: str) -> specs.AttentionSpec:
        if share != "real":
            return dataclasses.replace(spec, overlap=int(share) / 100)
        return dataclasses.replace(spec, overlap=None, recorded=real_selections.load(), name=f"{spec.name}-real")

    shares = args.overlap.split(",")
    if args.tiny:
        sparsity = Sparsity(8, 4, 16, 8, window=20, scale=0.25)
        return [Case(with_overlap(specs.AttentionSpec(f"tiny-T{width}", width, (700 - width,) * 2, sparsity=sparsity),
                                  share), "4x2", 0, share)
                for width in (1, 3) for share in shares]  # fmt: skip
    return [
        Case(with_overlap(specs.benchmark(batch, width, 1024 * context, heads), share),
             "x".join(map(str, heads)), context, share)
        for heads in [tuple(map(int, text.split("x"))) for text in args.heads.split(",")]
        for context in map(int, args.context.split(","))
        for batch in map(int, args.batch.split(","))
        for width in map(int, args.width.split(","))
        for share in shares
        # Adjacent queries are what overlaps.
        if width > 1 or share == shares[0]
    ]  # fmt: skip


def main() -> None:
    parser = harness.arguments(__doc__, rows=True)
    parser.add_argument("--heads", default="32x8,64x4", help="query x KV heads")
    parser.add_argument("--context", default="64,16", help="in units of 1024 tokens, the draft included")
    parser.add_argument("--overlap", default="70", help="percent of their blocks that adjacent queries share, or real")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--width", default="1,4,8,16,64", help="T, up to 128")
    parser.add_argument("--group", default="auto,1", help="C: numbers, T, or auto, what the kernels choose; "
                        "those above T are left out")  # fmt: skip
    parser.add_argument("--untuned", action="store_true", help="the heuristic's configs, not the measured ones")
    parser.add_argument("--xla", action="store_true", help="time the XLA path too")
    parser.add_argument(
        "--stages", action="store_true", help="the time of each of a refresh layer's launches, by the profiler"
    )
    parser.add_argument("--together", type=harness.count, default=3, help="shapes that are compiled at a time")
    parser.add_argument("--seconds", type=float, default=0.2, help="spent on each figure's repeats")
    parser.add_argument("--interpret", action="store_true", help="interpret the kernels")
    parser.add_argument("--tiny", action="store_true", help="two small cases, once")
    args = parser.parse_args()
    rows = harness.Rows(args, ("heads", "context", "batch", "width", "overlap", "group"))
    header = True
    todo: dict[tuple[Any, ...], list[tuple[Case, list[int]]]] = {}  # by shape
    for case in cases(args):
        width = case.spec.width
        sizes = {"T": width, "auto": chosen(case.spec, None, args.untuned).group}
        groups = dict.fromkeys(sizes.get(text) or int(text) for text in args.group.split(","))
        if wanted := [group for group in groups if group <= width and rows.wanted(**case.axes, group=group)]:
            shape = tuple(value for name, value in case.axes.items() if name != "overlap")
            todo.setdefault(shape, []).append((case, wanted))
    if not todo and not rows.rows and rows.complete:
        raise ValueError("heads, context, batch, width, overlap: got axes that no case has; see --help")
    harness.copy_bandwidth()
    # What compiles slows launches down, so several shapes are compiled first, on all cores, and then measured.
    shapes = list(todo.values())
    while shapes and rows.in_time():
        some, shapes = shapes[: args.together], shapes[args.together :]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            compiled = list(pool.map(lambda shape: Programs(shape[0][0].spec, args), some))
            variants = [{group: pool.submit(programs.variant, group)
                         for group in dict.fromkeys([1, *(group for _, groups in shape for group in groups)])}
                        for programs, shape in zip(compiled, some, strict=True)]  # fmt: skip
            xla = [pool.submit(programs.xla) if args.xla else None for programs in compiled]
        for programs, own, path, shape in zip(compiled, variants, xla, some, strict=True):
            for case, groups in shape:
                if not rows.in_time():
                    break
                results = {group: future.result() for group, future in own.items()}
                for row in measured(case, groups, programs, results, path and path.result()):
                    rows.add(row, None)
                    print_row(shown(row), header)
                    header = False
    rows.save()


def measured(
    case: Case, groups: list[int], programs: Programs, variants: dict[int, Variant], xla: Any
) -> Iterator[dict[str, Any]]:
    """A case's rows; its arrays go with the last one."""
    inputs = Inputs(case, programs, variants[1])
    beside = {} if xla is None else {"xla": inputs.xla(xla, variants[1])}
    for group in groups:
        yield inputs.row(group, variants[group]) | beside


def print_row(row: dict[str, Any], header: bool) -> None:
    """A row of a table whose columns' widths are known from the first one, so that rows can be printed as they come."""
    cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()]
    widths = [max(8, len(name)) for name in row]
    if header:
        print("  ".join(name.rjust(width) for name, width in zip(row, widths, strict=True)))
    print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), flush=True)


if __name__ == "__main__":
    harness.run(main)
