"""Compression in NumPy, one block after the other: what the operation means."""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_kernels.compress.arguments import Side


def compress(key: Side, value: Side | None, slot: Any, back: Any, start: Any, rotation: Any = None) -> tuple[Any, Any]:
    """See :func:`pallas_kernels.compress.compress`; sums in float64, 0 in unused slots."""
    dtype = key.ring.dtype

    def rounded(x: Any) -> Any:
        return np.asarray(x, np.float64).astype(dtype).astype(np.float64)

    results: list[Any] = []
    for side in (key, value):
        if side is None:
            results.append(None)
            continue
        out = np.zeros((*slot.shape, *side.ring.shape[1::2]), dtype)
        for b, m, head in np.ndindex(out.shape[:3]):
            if slot[b, m] == side.fresh.shape[1]:
                continue
            ring, fresh = side.ring[b, head], side.fresh[b, :, head]
            entries = [fresh[node] if node >= 0 else ring[(start[b, m] + k) % len(ring)]
                       for k, node in enumerate(back[b, m])]  # fmt: skip
            x = np.array(entries, np.float64)
            if side.position is not None:
                x = rounded(x + rounded(side.position[head]))
            x = x.reshape(-1) @ rounded(side.weight[head])
            if side.weight_out is not None:
                x = rounded(x / (1 + np.exp(-x))) @ rounded(side.weight_out[head])
            if side is key and rotation is not None:
                (low, high), (cos, sin) = np.split(rounded(x), 2), rotation[:, b, m].astype(np.float64)
                x = np.concatenate([low * cos - high * sin, high * cos + low * sin])
            out[b, m, head] = x
        results.append(out)
    return results[0], results[1]
