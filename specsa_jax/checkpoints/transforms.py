"""How tensors of a foreign checkpoint become parameters, and back: moves of elements alone, so that no bit changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

Shape = tuple[int, ...]


class InexpressibleError(ValueError):
    """A format cannot express a model; the message says what and why."""


class Transform(Protocol):
    """One parameter from its source tensors, and the source tensors from it.

    ``shapes`` gives the source tensors' shapes for a parameter's shape; None where the format leaves one to choose.
    """

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray: ...

    def backward(self, array: np.ndarray) -> list[np.ndarray]: ...

    def shapes(self, shape: Shape) -> list[Shape]: ...


@dataclasses.dataclass(frozen=True)
class Copy:
    """The same tensor."""

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        return arrays[0]

    def backward(self, array: np.ndarray) -> list[np.ndarray]:
        return [array]

    def shapes(self, shape: Shape) -> list[Shape]:
        return [shape]


@dataclasses.dataclass(frozen=True)
class Linear:
    """A PyTorch linear weight [out, in] and a kernel [in, out].

    Attributes:
      rotated_out, rotated_in: head dim D of outputs (inputs) that RoPE rotates in adjacent pairs (2p, 2p+1); the
        kernel has them in the rotate-half order (p, p + D/2). 0: as they are.
    """

    rotated_out: int = 0
    rotated_in: int = 0

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        weight = _halves(arrays[0], self.rotated_out, 0)
        return np.ascontiguousarray(_halves(weight, self.rotated_in, 1).T)

    def backward(self, array: np.ndarray) -> list[np.ndarray]:
        weight = _pairs(array.T, self.rotated_out, 0)
        return [np.ascontiguousarray(_pairs(weight, self.rotated_in, 1))]

    def shapes(self, shape: Shape) -> list[Shape]:
        return [shape[::-1]]


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several linear weights [out, in], side by side in one kernel [in, parts · out]."""

    parts: int
    each: Linear = Linear()

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        return np.concatenate([self.each.forward([array], shape) for array in arrays], axis=1)

    def backward(self, array: np.ndarray) -> list[np.ndarray]:
        return [self.each.backward(part)[0] for part in np.split(array, self.parts, axis=1)]

    def shapes(self, shape: Shape) -> list[Shape]:
        return [(shape[1] // self.parts, shape[0])] * self.parts


@dataclasses.dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution over time [D, 1, l], shared by the heads, and a linear φ [Hkv, l·D, D].

    ``rotated``: D where RoPE rotates the channels in adjacent pairs (see Linear), else 0.
    """

    rotated: int = 0

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        heads, _, dim = shape
        weight = _halves(arrays[0][:, 0], self.rotated, 0)  # [D, l]
        out = np.zeros((heads, weight.shape[1], dim, dim), weight.dtype)
        channel = np.arange(dim)
        out[:, :, channel, channel] = weight.T
        return out.reshape(shape)

    def backward(self, array: np.ndarray) -> list[np.ndarray]:
        heads, flat, dim = array.shape
        channel = np.arange(dim)
        weight = array.reshape(heads, flat // dim, dim, dim)[0][:, channel, channel].T  # [D, l]
        if not np.array_equal(self.forward([_pairs(weight, self.rotated, 0)[:, None]], array.shape), array):
            raise InexpressibleError("compression: mixes channels or differs between heads, which a depthwise "
                                     "convolution shared by the heads cannot")  # fmt: skip
        return [np.ascontiguousarray(_pairs(weight, self.rotated, 0)[:, None])]

    def shapes(self, shape: Shape) -> list[Shape]:
        return [(shape[2], 1, shape[1] // shape[2])]


@dataclasses.dataclass(frozen=True)
class Filled:
    """A parameter without a source: ``values`` repeated to its shape. Used where a dense model is adapted."""

    values: tuple[float, ...]

    def forward(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        return np.resize(np.asarray(self.values, np.float32), shape)

    def backward(self, array: np.ndarray) -> list[np.ndarray]:
        return []

    def shapes(self, shape: Shape) -> list[Shape]:
        return []


COPY, LINEAR = Copy(), Linear()


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a format's table.

    Attributes:
      source: the tensor's key, or several; ``{i}`` stands for a layer's number.
      target: the parameter's dotted path (docs/architecture.md).
      how: from the one to the other.
    """

    source: str | tuple[str, ...]
    target: str
    how: Transform = COPY

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source


def expand(rows: Sequence[Row], layers: int) -> list[Row]:
    """The rows with ``{i}`` replaced by 0 … layers − 1."""
    out = []
    for row in rows:
        if "{i}" not in row.target:
            out.append(row)
            continue
        for i in range(layers):
            sources = tuple(source.replace("{i}", str(i)) for source in row.sources)
            out.append(Row(sources, row.target.replace("{i}", str(i)), row.how))
    return out


def _halves(x: np.ndarray, dim: int, axis: int) -> np.ndarray:
    """Adjacent pairs of each ``dim`` entries along ``axis`` become first and second halves."""
    if not dim:
        return x
    shape = (*x.shape[:axis], -1, dim // 2, 2, *x.shape[axis + 1 :])
    return x.reshape(shape).swapaxes(axis + 1, axis + 2).reshape(x.shape)


def _pairs(x: np.ndarray, dim: int, axis: int) -> np.ndarray:
    """The inverse of :func:`_halves`."""
    if not dim:
        return x
    shape = (*x.shape[:axis], -1, 2, dim // 2, *x.shape[axis + 1 :])
    return x.reshape(shape).swapaxes(axis + 1, axis + 2).reshape(x.shape)
