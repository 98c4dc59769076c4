"""What XLA is told of programs that are compiled for a GPU."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp

from specsa_jax.nsa.rows import STRICT_OPTIONS

# XLA gathers kernels into CUDA graphs, but leaves out loops and conditions by default: then the host starts each step's
# graphs, and the device waits for it (measured: 14 % of the step of a model of 11M parameters, on an H200).
LOOPS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
}

# For products in float32 that mean float32 XLA tries its own kernels, too, at many sizes, which takes the compiler
# longer than all else and gains nothing (measured on an H200 with the trained target: a prompt's program 36 s with
# them, 11 s without; steps of 17 tokens take the same, those of one 5 % less without). In bfloat16 they gain 6 % at 17
# tokens, for 2 s.
FLOAT32 = {"xla_gpu_enable_triton_gemm": False}


def compiler_options(dtype: Any, strict: bool = False, loops: bool = True) -> dict[str, Any] | None:
    """The options of ``jax.stages.Lowered.compile`` on the present backend; None: none.

    ``dtype``: what the program computes in. ``strict``: it is of class strict, whose kernels are nobody's choice.
    ``loops`` False leaves loops to the host, as a profiler wants it, which sees no kernel of a loop in a graph. What
    the environment's XLA_FLAGS say has precedence, but for class strict.
    """
    if jax.default_backend() != "gpu":
        return None
    wanted = (LOOPS if loops else {}) | (FLOAT32 if jnp.dtype(dtype) == jnp.float32 and not strict else {})
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in wanted.items() if f"--{name}" not in flags} | (
        STRICT_OPTIONS if strict else {}
    )
