"""Selection of blocks: the top n of each row, forced ones included."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _check, _dispatch
from pallas_kernels._dispatch import Implementation
from pallas_kernels.selection import kernel, xla
from pallas_kernels.selection.config import SelectionConfig as SelectionConfig


def unsupported(num_blocks: int, num_selected: int) -> str | None:
    """Why the Pallas kernel does not run for these shapes on the present device; None if it does."""
    return kernel.limit(num_blocks, num_selected) or _dispatch.device_limit()


def select_blocks(
    importance: jax.Array,
    positions: jax.Array,
    *,
    select_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    implementation: Implementation | None = None,
    interpret: bool = False,
    config: SelectionConfig | None = None,
) -> jax.Array:
    """The blocks that each query attends to.

    First the forced blocks: the ``num_initial`` first ones, the query's own (``position // select_block``) and the
    ``num_local − 1`` before it. The rest by importance, ties to the lower id. Only blocks up to the query's own count;
    all of them are selected when there are no more than ``num_selected``. A negative position selects nothing.

    Args:
      importance: float32 [..., N], non-negative (a sum of probabilities). Negative values, NaN and possibly subnormals
        count as 0, +inf as the largest finite number. No gradient flows through.
      positions: int32, a shape that broadcasts to ``importance.shape[:-1]``.
      select_block: tokens per block.
      num_selected, num_initial, num_local: n, and how many of these are forced at either end.
      implementation: "pallas", "xla", or None: "pallas" on a GPU for shapes that it takes, else "xla".
      interpret: interpret the Pallas kernel, on any device.
      config: the kernel's tuning parameters; None: those measured on this kind of device, or chosen from the shape.

    Returns:
      int32 [..., n]: ids in ascending order, then −1.

    Raises:
      ValueError: shapes, dtypes or counts that do not fit together, or an unknown implementation.
      UnsupportedError: "pallas" by name where :func:`unsupported` gives a reason.
    """
    importance, positions = jnp.asarray(importance), jnp.asarray(positions)
    counts = _checked(importance, positions, select_block, num_selected, num_initial, num_local)
    *batch, num_blocks = importance.shape
    positions = positions.reshape((1,) * (len(batch) - positions.ndim) + positions.shape)
    importance = jax.lax.stop_gradient(importance)
    limit = kernel.limit(num_blocks, counts["num_selected"])
    if _dispatch.choose("select_blocks", implementation, limit, interpret) == "xla":
        return xla.select_blocks(importance, positions, **counts)
    rows = importance.size // num_blocks
    if config is None and not interpret:
        from pallas_kernels import tuned  # which imports the configs of all operations

        config = tuned.lookup_selection(_dispatch.device_kind(), rows, num_blocks)
    config = config or SelectionConfig.heuristic(rows, num_blocks)
    return kernel.select_blocks(importance, positions, **counts, config=config, interpret=interpret)


def _checked(
    importance: jax.Array, positions: jax.Array, select_block: Any, num_selected: Any, num_initial: Any, num_local: Any
) -> dict[str, int]:
    """The counts, as ints: to JAX's caches 4.0 is 4, and what they keep of a failure meets the next call."""
    if importance.dtype != jnp.float32 or importance.ndim < 1 or importance.shape[-1] < 1:
        raise ValueError(
            f"select_blocks: importance: got {importance.dtype} {importance.shape}, expected float32 [..., N], N ≥ 1"
        )
    batch = importance.shape[:-1]
    fits = positions.ndim <= len(batch) and all(
        own in (1, size) for own, size in zip(reversed(positions.shape), reversed(batch), strict=False)
    )
    if positions.dtype != jnp.int32 or not fits:
        raise ValueError(
            f"select_blocks: positions: got {positions.dtype} {positions.shape}, "
            f"expected int32 of a shape that broadcasts to {batch}"
        )
    counts = {}
    for name, value, least in (
        ("select_block", select_block, 1), ("num_initial", num_initial, 0), ("num_local", num_local, 0),
    ):  # fmt: skip
        counts[name] = _check.whole(f"select_blocks: {name}", value, least)
    least = max(1, counts["num_initial"] + counts["num_local"])
    return counts | {"num_selected": _check.whole("select_blocks: num_selected", num_selected, least)}
