"""Cache bytes per branch and token, against those of the arrays; the longest context of one sequence that fits.

``computed`` is specsa_jax.cache.cache_bytes, from which the engine decides what it admits; ``arrays`` is what
create_cache makes; on a GPU ``allocated`` is what the device then has in use. The longest context is computed for the
memory of the present device and for 80 and 141 GB (bfloat16; what the step's program takes besides is measured on a
GPU, elsewhere left out), and on a GPU a step is run there.

    python benchmarks/memory.py --out
"""

from __future__ import annotations

import gc
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from steps import USABLE, add_preset, device_memory, random_cache, step_loop

from specsa_jax import model
from specsa_jax.cache import cache_bytes, create_cache, pages_for
from specsa_jax.config import PRESETS, ModelConfig

BRANCHES = {"selected": "", "compressed": "compressed_", "window": "window_", "raw": "raw_"}


def array_bytes(config: ModelConfig, pages: int) -> dict[str, int]:
    """Of the arrays of one sequence's cache, per branch; nothing is allocated."""
    made = jax.eval_shape(lambda: create_cache(config, np.arange(pages)[None], pages, jnp.bfloat16))
    arrays = [layer._asdict() for layer in made.layers]
    return {
        branch: sum(layer[prefix + kind].size * layer[prefix + kind].dtype.itemsize
                    for layer in arrays for kind in ("key", "value") if layer[prefix + kind] is not None)
        for branch, prefix in BRANCHES.items()
    }  # fmt: skip


def allocated_bytes(config: ModelConfig, context: int) -> int | None:
    """What the device has in use for a cache more than before; None where it does not say."""
    gc.collect()
    before = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use")
    if before is None:
        return None
    cache = jax.block_until_ready(random_cache(config, context, 0, 1, jnp.bfloat16))
    after = jax.devices()[0].memory_stats()["bytes_in_use"]
    del cache
    return after - before


def weight_bytes(config: ModelConfig) -> int:
    shapes = jax.eval_shape(lambda: model.init_params(config, 0, jnp.bfloat16))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def longest_context(config: ModelConfig, memory: int, temporary: int) -> int:
    """Tokens of one sequence whose cache fits ``memory`` beside weights and temporaries, in whole pages."""
    fixed = cache_bytes(config, 0, 1).total
    page = cache_bytes(config, 1, 1).total - fixed
    room = USABLE * memory - weight_bytes(config) - temporary - fixed
    return max(0, int(room // page) * config.nsa.select_block)


def longest_rows(name: str, context: int, width: int) -> list[dict[str, Any]]:
    config, limit, temporary, params = PRESETS[name], device_memory(), 0, None
    if limit is not None:
        params = model.init_params(config, 0, jnp.bfloat16)
        temporary = step_loop(config, params, context, 1, width, 1).temporary_bytes
        gc.collect()  # of that loop's cache
    rows = []
    for memory in dict.fromkeys([*([limit] if limit else []), 80 * 10**9, 141 * 10**9]):
        tokens = longest_context(config, memory, temporary)
        row = {"kind": "longest", "preset": name, "memory": memory, "weights": weight_bytes(config),
               "temporary_bytes": temporary if limit else None, "width": width, "longest_context": tokens}  # fmt: skip
        if memory == limit:
            try:
                row["step_us"] = step_loop(config, params, tokens, 1, width, 4).timing(repeats=3).median
            except harness.FAILURES as error:
                row |= harness.not_run(error)
        rows.append(row)
    return rows


def main() -> None:
    parser = harness.arguments(__doc__)
    add_preset(parser, ["embedded", "120m", "1b", "8b"])
    parser.add_argument("--context", type=harness.count, default=65536)
    parser.add_argument("--width", type=harness.count, default=16, help="T of the step that must fit too")
    parser.add_argument("--longest", nargs="*", choices=sorted(PRESETS), default=["8b"])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.presets:
        config = PRESETS[name]
        pages = pages_for(config.nsa, args.context)
        computed, arrays = cache_bytes(config, pages, 1), array_bytes(config, pages)
        for branch in BRANCHES:
            wanted, found = getattr(computed, branch), arrays[branch]
            one_page = getattr(cache_bytes(config, 1, 1), branch) - getattr(cache_bytes(config, 0, 1), branch)
            rows.append({"kind": "cache", "preset": name, "context": args.context, "branch": branch,
                         "bytes_per_token": one_page / config.nsa.select_block, "computed": wanted, "arrays": found,
                         "equal": wanted == found})  # fmt: skip
        rows.append({"kind": "cache", "preset": name, "context": args.context, "branch": "all",
                     "bytes_per_token": sum(row["bytes_per_token"] for row in rows[-len(BRANCHES) :]),
                     "computed": computed.total, "arrays": sum(arrays.values()),
                     "equal": computed.total == sum(arrays.values())})  # fmt: skip
        allocated = allocated_bytes(config, args.context) if device_memory() else None
        if allocated is not None:
            rows[-1] |= {"allocated": allocated}
    harness.print_table([{name: row[name] for name in row if name != "allocated"} for row in rows])
    longest = [row for name in args.longest for row in longest_rows(name, args.context, args.width)]
    for row in longest:
        print(row)
    if path := harness.out_path(args):
        harness.save(path, rows + longest)


if __name__ == "__main__":
    harness.run(main)
