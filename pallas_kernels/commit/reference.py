"""Commit in NumPy, one token after the other: what the operation means."""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_kernels.commit.arguments import Entries


def commit(
    layer: Entries,
    new: Entries,
    page_table: np.ndarray,
    lengths: np.ndarray,
    path: np.ndarray,
    count: np.ndarray,
    slot: np.ndarray,
    *,
    compress_block: int,
) -> Entries:
    """See :func:`pallas_kernels.commit.commit`; arrays of NumPy's, returned as copies."""
    result: dict[str, Any] = {
        name: None if array is None else np.array(array) for name, array in layer._asdict().items()
    }
    num_pages, _, page_size, _ = layer.key.shape

    def to_page(name: str, sequence: int, index: int, value: Any) -> None:
        pool = result[name]
        block, offset = divmod(index, pool.shape[2])
        if block < page_table.shape[1] and page_table[sequence, block] < num_pages:
            pool[page_table[sequence, block], :, offset] = value

    for sequence, steps in enumerate(count):
        for position, node in enumerate(path[sequence, :steps], int(lengths[sequence])):
            for name, source in new._asdict().items():
                if source is None:
                    continue
                if name in ("key", "value"):
                    to_page(name, sequence, position, source[sequence, node])
                elif name.startswith("compressed"):
                    stride = page_size // result[name].shape[2]
                    for place in np.flatnonzero(slot[sequence] == node):
                        entry = (position + 1 - compress_block) // stride
                        to_page(name, sequence, entry, source[sequence, place])
                else:
                    result[name][sequence, :, position % result[name].shape[2]] = source[sequence, node]
    return Entries(**result)
