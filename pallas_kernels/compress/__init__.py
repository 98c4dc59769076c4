"""φ of the compression blocks that end among new tokens: an MLP or a linear map over l entries of a head."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch, tuned
from pallas_kernels.compress import kernel
from pallas_kernels.compress.arguments import Shape as Shape
from pallas_kernels.compress.arguments import Side as Side
from pallas_kernels.compress.arguments import check
from pallas_kernels.compress.config import CompressConfig as CompressConfig
from pallas_kernels.compress.kernel import limit as limit


def compress(
    key: Side,
    value: Side | None,
    slot: jax.Array,
    back: jax.Array,
    start: jax.Array,
    rotation: jax.Array | None = None,
    *,
    config: CompressConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Compressed keys and values of the blocks that end in the tail.

    Block m of a sequence holds the l entries at positions ``start[b, m]`` … ``start[b, m] + l − 1``; the k-th is node
    ``back[b, m, k]`` of the tail, or committed, in the ring. An MLP is W_out · SiLU(W_in · x) for x the entries (plus
    their position's vectors) side by side, a linear map W · x; sums are in float32, and entries, hidden units and
    results are rounded to the entries' dtype. If no slot is used, no weight is read.

    Args:
      key, value: see :class:`Side`; ``value`` None: keys only.
      slot: int32 [B, M], the nodes at which blocks end, T where unused.
      back: int32 [B, M, l], nodes, −1 for committed tokens.
      start: int32 [B, M].
      rotation: float32 [2, B, M, D/2], cosines and sines by which compressed keys are rotated (halves of D paired),
        after rounding; None: they are not.
      config: the tuning parameters; None: those measured on this kind of device (``pallas_kernels.tuned``), or else
        chosen from the sizes.
      interpret: interpret the kernels, on any device.

    Returns:
      keys and values [B, M, Hkv, D] in the entries' dtype, or None for ``value`` None. **Those of unused slots are
      arbitrary bits, NaN among them**: readers must mask, not multiply by 0.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
      UnsupportedError: sizes or a device that the kernels do not take, with the reason.
    """
    shape = check(key, value, slot, back, start, rotation)
    _dispatch.choose("compress", "pallas", limit(shape.head_dim, shape.width), interpret)
    if shape.rows == 0:
        empty = jnp.zeros((*slot.shape, shape.num_kv_heads, shape.head_dim), key.ring.dtype)
        return empty, None if value is None else empty
    if config is None and not interpret:
        config = tuned.lookup_compress(_dispatch.device_kind(), shape)
    return kernel.compress(
        key, value, slot, back, start, rotation,
        shape=shape, config=config or CompressConfig.heuristic(shape), interpret=interpret,
    )  # fmt: skip
