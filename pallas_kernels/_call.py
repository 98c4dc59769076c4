"""The one place that calls ``pl.pallas_call``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def padded(head_dim: int) -> int:
    """D in a kernel: Triton's tensors are powers of two long, and its products of bfloat16 along fewer than 16 come out
    doubled on a GPU (jax 0.11.2), without a word."""
    return max(16, pl.next_power_of_2(head_dim))


def triton_call(
    kernel: Callable[..., None],
    *operands: jax.Array,
    out_shape: Any,
    grid: Sequence[int],
    num_warps: int,
    num_stages: int = 1,
    interpret: bool = False,
    aliases: Mapping[int, int] | None = None,
    name: str | None = None,
) -> Any:
    """Runs ``kernel`` over ``grid`` on whole-array refs, lowered through Triton.

    ``aliases`` maps operands to the outputs that take their place in memory. The compiler parameters are always
    given: without them jax 0.10 lowers through Mosaic. jax 0.11 and later emit a DeprecationWarning when the call is
    lowered, which is not hidden here: by then we are no longer on the stack, and Python's default filters drop it.
    """
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=tuple(grid),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        name=name or kernel.__name__,
        interpret=interpret,
        input_output_aliases=dict(aliases or {}),
    )(*operands)
