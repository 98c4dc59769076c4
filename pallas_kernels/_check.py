"""Checks that all operations share. They raise ValueError: the argument's name, what came, and what is expected."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

# Sizes and positions are int32 on the device.
LARGEST = 2**31 - 1
MAX_WARPS = 32


def whole(name: str, value: Any, least: int = 1, most: int = LARGEST, power_of_two: bool = False) -> int:
    """``value``, one of NumPy's integers too, as an int."""
    # The type first: asking an abstract class takes longer than all the rest.
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise ValueError(f"{name}: got {value!r}, expected a whole number")
    number = int(value)
    if not least <= number <= most or (power_of_two and number & (number - 1)):
        kind = "a power of two of " if power_of_two else ""
        above = "" if most == LARGEST >= number else f" and at most {most}"
        raise ValueError(f"{name}: got {number}, expected {kind}at least {least}{above}")
    return number


def whole_fields(config: Any, *names: str, least: int = 1, most: int = LARGEST, power_of_two: bool = False) -> None:
    """:func:`whole` of fields of a frozen dataclass, which are ints afterwards; for its ``__post_init__``."""
    for name in names:
        object.__setattr__(config, name, whole(name, getattr(config, name), least, most, power_of_two))


def warps(config: Any, *names: str) -> None:
    """:func:`whole_fields` for numbers of warps."""
    whole_fields(config, *names, most=MAX_WARPS, power_of_two=True)


def dims(name: str, array: Any, expected: str, empty: str = "") -> None:
    """Refuses other dimensions than ``expected`` names, such as "[B, T]", and those of size 0 but for ``empty``'s."""
    letters, shape = expected[1:-1].split(", "), getattr(array, "shape", None)
    if shape is None or len(shape) != len(letters):
        raise ValueError(f"{name}: got {_described(array)}, expected {expected}")
    for letter, size in zip(letters, shape, strict=True):
        if size == 0 and letter not in empty:
            raise ValueError(f"{name}: got {_described(array)}, expected {expected} with {letter} of at least 1")


def exact(name: str, array: Any, shape: tuple[int, ...], dtype: Any = None, why: str = "") -> None:
    """Refuses another shape, or another dtype than ``dtype``; None: any."""
    if getattr(array, "shape", None) != shape or (dtype is not None and array.dtype != dtype):
        got, wanted = (_described(array), "") if dtype is None else (_described(array, True), f"{np.dtype(dtype)} ")
        raise ValueError(f"{name}: got {got}, expected {wanted}{shape}{why}")


def _described(array: Any, with_dtype: bool = False) -> str:
    if not hasattr(array, "shape"):
        return "None" if array is None else type(array).__name__
    return f"{array.dtype if with_dtype else 'shape'} {array.shape}"
