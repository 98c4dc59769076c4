"""Which blocks the embedded model's queries select on held-out files: what ``verify_layer.py --overlap real`` takes.

At the longest context that the model serves, of the last QUERIES tokens of each text: block numbers uint8
[texts, layers * KV heads, QUERIES, free], ascending, without the blocks that every query selects. The model is asked
for as many as the benchmarks' layer selects (16), twice as many as it was trained with.

    python benchmarks/real_selections.py      # writes real_selections.npz beside itself; a minute on a CPU
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from pallas_kernels.attention import Sparsity
from specsa_jax import Engine, checkpoints
from specsa_jax.calibration import read_calibration
from specsa_jax.planning.overlap import selected_blocks

FILE = Path(__file__).with_suffix(".npz")
TEXTS, QUERIES = 4, 64


def load() -> np.ndarray:
    with np.load(FILE) as saved:
        return saved["blocks"].astype(np.int32)


def record(context: int, texts: int, queries: int) -> np.ndarray:
    found, sparsity = checkpoints.load("embedded"), Sparsity()
    nsa = dataclasses.replace(found.config.nsa, num_selected=sparsity.num_selected)
    engine = Engine(dataclasses.replace(found.config, nsa=nsa), found.params, found.tokenizer)
    stream = read_calibration("embedded", engine.tokenizer).stream
    blocks = []
    for start in np.linspace(0, len(stream) - context, texts + 2)[1:-1].astype(int):
        row, before = stream[start : start + context], context - queries
        cache = engine.prefill([row[: before + 1]], queries - 1)
        ids = np.asarray(selected_blocks(engine, engine.params, row[None, before:], cache))[:, 0]  # [layers, T, Hkv, n]
        own = np.arange(before, context)[:, None, None] // nsa.select_block
        free = (ids >= nsa.num_initial) & (ids <= own - nsa.num_local)
        assert (free.sum(axis=-1) == nsa.num_selected - nsa.num_initial - nsa.num_local).all()
        blocks.append(
            np.moveaxis(ids[free].reshape(*ids.shape[:-1], -1), 2, 1).reshape(-1, queries, free[0, 0, 0].sum())
        )
    return np.stack(blocks).astype(np.uint8)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    blocks = record(checkpoints.load("embedded").config.max_length, TEXTS, QUERIES)
    np.savez_compressed(FILE, blocks=blocks)
    shared = np.mean([(blocks[:, :, 1:, :, None] == blocks[:, :, :-1, None, :]).any(axis=-1)])
    print(f"{FILE}: {blocks.shape}, adjacent queries share {shared:.2f} of their free blocks")


if __name__ == "__main__":
    main()
