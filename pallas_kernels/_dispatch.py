"""The seam between an operation and its implementations."""

from __future__ import annotations

import re
from typing import Literal, get_args

import jax

Implementation = Literal["pallas", "xla"]


class UnsupportedError(NotImplementedError):
    """The implementation asked for does not take this device or shape; the message says which and why."""


def device_limit(ptx: bool = False) -> str | None:
    """Why Pallas kernels do not run where JAX computes now (an abstract mesh counts); None if they do.

    ``ptx``: they hold instructions of NVIDIA's, which Triton passes on as they are.
    """
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        platform = abstract.platform
    else:
        default = jax.config.jax_default_device  # type: ignore[attr-defined]
        platform = getattr(default, "platform", default) or jax.default_backend()
    if platform not in ("gpu", "cuda", "rocm"):
        return f"device: got {platform}, expected a GPU (or interpret=True)"
    if abstract is None:
        name = str(jax.local_devices(backend=platform)[0].compute_capability)  # of AMD's such as gfx942
        if (nvidia := name[0].isdigit()) and float(name) < 8.0:
            return f"device: got compute capability {name}, expected at least 8.0, which Triton needs"
    else:
        name = abstract.device_kind
        nvidia = re.search("AMD|Radeon|gfx", name) is None
    if ptx and not (nvidia and platform != "rocm"):
        return f"device: got {name}, expected a GPU of NVIDIA's, whose instructions (PTX) the kernels hold"
    return None


def device_kind() -> str:
    """The kind of device that JAX computes on now, such as "NVIDIA H200" (an abstract mesh counts)."""
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        return abstract.device_kind
    return jax.local_devices()[0].device_kind


def choose(
    op: str, implementation: Implementation | None, shape_limit: str | None, interpret: bool, ptx: bool = False
) -> Implementation:
    """The implementation of ``op`` to use.

    None stands for "pallas" where device and shape allow it (or in interpret mode), else "xla".

    Args:
      shape_limit: why the kernel does not take these shapes; None if it does.
      interpret: the kernel is to be interpreted, which any device can.
      ptx: the kernel holds instructions of NVIDIA's, as :func:`device_limit` says.

    Raises:
      UnsupportedError: "pallas" by name where it does not run.
      ValueError: an unknown name.
    """
    if implementation not in (None, *get_args(Implementation)):
        known = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"{op}: implementation: got {implementation!r}, expected None or one of {known}")
    if implementation == "xla":
        return "xla"
    limit = shape_limit or (None if interpret else device_limit(ptx))
    if limit is None:
        return "pallas"
    if implementation == "pallas" or interpret:
        raise UnsupportedError(f"{op}: implementation 'pallas': {limit}")
    return "xla"
