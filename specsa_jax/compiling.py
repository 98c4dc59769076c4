"""What XLA is told of programs that are compiled for a GPU."""

from __future__ import annotations

import os
from typing import Any

import jax

from specsa_jax.nsa.rows import STRICT_OPTIONS

# XLA gathers kernels into CUDA graphs, but leaves out loops and conditions by default: then the host starts each step's
# graphs, and the device waits for it (measured: 14 % of the step of a model of 11M parameters, on an H200).
LOOPS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
}


def compiler_options(strict: bool = False, loops: bool = True) -> dict[str, Any] | None:
    """The options of ``jax.stages.Lowered.compile`` on the present backend; None: none.

    ``strict``: of a program of class strict. ``loops`` False leaves loops to the host, as a profiler wants it, which
    sees no kernel of a loop in a graph. What the environment's XLA_FLAGS say has precedence, but for class strict.
    """
    if jax.default_backend() != "gpu":
        return None
    flags = os.environ.get("XLA_FLAGS", "")
    found: dict[str, Any] = {name: value for name, value in LOOPS.items() if loops and f"--{name}" not in flags}
    return found | (STRICT_OPTIONS if strict else {})
