"""Selection in NumPy, one row at a time: what the operation means."""

from __future__ import annotations

import numpy as np


def select_blocks(
    importance: np.ndarray,
    positions: np.ndarray,
    *,
    select_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
) -> np.ndarray:
    """See :func:`pallas_kernels.selection.select_blocks`."""
    *batch, num_blocks = importance.shape
    positions = np.broadcast_to(positions, batch)
    result = np.full((*batch, num_selected), -1, np.int32)
    for row in np.ndindex(*batch):
        own = int(positions[row]) // select_block
        score = np.nan_to_num(importance[row], nan=0.0).clip(0.0)

        def rank(block: int, own: int = own, score: np.ndarray = score) -> tuple[bool, float, int]:
            forced = block < num_initial or own - num_local < block
            return not forced, 0.0 if forced else -score[block], block

        chosen = sorted(sorted(range(min(own + 1, num_blocks)), key=rank)[:num_selected])
        result[row][: len(chosen)] = chosen
    return result
