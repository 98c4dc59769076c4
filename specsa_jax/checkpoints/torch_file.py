"""Tensors of a PyTorch file (``torch.save``), weights only and without PyTorch.

The file is a ZIP archive: a pickle of the object, in which each storage is a persistent reference, and the storages'
bytes. The unpickler here knows the few names that a state dict is made of; any other is refused before it is imported,
so that no code of the file can run.
"""

from __future__ import annotations

import collections
import dataclasses
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

# Storage classes and their elements. Tensors of the others are listed, and refused by their dtype.
_STORAGES = {
    "FloatStorage": np.dtype(np.float32), "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype(np.float16), "DoubleStorage": np.dtype(np.float64), "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32), "ShortStorage": np.dtype(np.int16), "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8), "BoolStorage": np.dtype(np.bool_),
}  # fmt: skip
# Keys under which training scripts keep the state dict beside other things, and those of its config.
_NESTED = ("state_dict", "model_state_dict", "model", "module")
_CONFIGS = ("config", "cfg", "model_config")
_LONGEST_PICKLE = 1 << 28  # bytes; a state dict has about 200 a tensor


class TorchFileError(ValueError):
    """The file is no weights-only PyTorch file; the message says why."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in the file: element ``offset`` of storage ``key``, with strides in elements."""

    key: str
    dtype: np.dtype
    storage_elements: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    elements: int


class TorchFile:
    """One file's tensors by name, and the config saved with them, if any. Raises TorchFileError."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
                if len(pickles) != 1:
                    raise TorchFileError(f"{path}: a ZIP archive without data.pkl, so not written by torch.save")
                self.root = pickles[0][: -len("data.pkl")]
                if archive.getinfo(pickles[0]).file_size > _LONGEST_PICKLE:
                    raise TorchFileError(f"{path}: its pickle is too large for a state dict")
                order = self.root + "byteorder"
                if order in archive.namelist() and archive.read(order).strip() != b"little":
                    raise TorchFileError(f"{path}: byte order {archive.read(order)!r}, expected little")
                with archive.open(pickles[0]) as file:
                    value = _Unpickler(file).load()
        except zipfile.BadZipFile as error:
            raise TorchFileError(f"{path}: {_why_no_zip(path)}") from error
        except TorchFileError as error:
            raise TorchFileError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
        except Exception as error:  # a damaged or malicious pickle fails in any way it likes
            raise TorchFileError(f"{path}: not readable: {type(error).__name__}: {str(error)[:200]}") from error
        top = value if isinstance(value, dict) else {}
        self.config: dict[str, Any] | None = next((top[k] for k in _CONFIGS if isinstance(top.get(k), dict)), None)
        self.tensors = _state_dict(value, path)

    def read(self, name: str) -> np.ndarray:
        """A tensor's elements, C-contiguous. Raises TorchFileError."""
        tensor = self.tensors[name]
        count = _span(tensor)
        if min((tensor.offset, *tensor.strides, *tensor.shape), default=0) < 0 or (
            tensor.offset + count > tensor.storage_elements
        ):
            raise TorchFileError(f"{self.path}: {name}: lies outside its storage")
        size = tensor.dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive:
                info = archive.getinfo(f"{self.root}data/{tensor.key}")
                if info.file_size != tensor.storage_elements * size:
                    raise TorchFileError(f"{self.path}: {name}: its storage has {info.file_size} bytes, expected "
                                         f"{tensor.storage_elements * size}")  # fmt: skip
                with archive.open(info) as file:
                    file.seek(tensor.offset * size)
                    flat = np.empty(count, tensor.dtype)
                    if file.readinto(flat.view(np.uint8).data) != flat.nbytes:  # type: ignore[attr-defined]
                        raise TorchFileError(f"{self.path}: {name}: the file ends inside the tensor")
        except KeyError as error:
            raise TorchFileError(f"{self.path}: {name}: storage {tensor.key} is missing") from error
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise TorchFileError(f"{self.path}: {name}: {error}") from error
        strides = tuple(stride * size for stride in tensor.strides)
        view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
        return view if view.flags.c_contiguous else np.array(view, order="C")


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last of a tensor."""
    if 0 in tensor.shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True))


def _state_dict(value: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, which may lie under one of the usual keys."""
    for _ in range(4):
        if isinstance(value, dict) and any(isinstance(item, Tensor) for item in value.values()):
            return {str(k).removeprefix("module."): v for k, v in value.items() if isinstance(v, Tensor)}
        nested = [key for key in _NESTED if isinstance(value, dict) and isinstance(value.get(key), dict)]
        if not nested:
            break
        value = value[nested[0]]
    raise TorchFileError(f"{path}: holds no state dict (a dictionary of tensors)")


def _why_no_zip(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"PK"):
        return "a damaged or truncated ZIP archive"
    if head.startswith(b"\x80"):
        return "a bare pickle (PyTorch before 1.6, or not PyTorch's); save it again with torch.save or as safetensors"
    return "not a PyTorch file"


# --- the pickle ------------------------------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return _NAMES[module, name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name.isidentifier() and name in _DTYPES:
            return name
        raise TorchFileError(f"refers to {module}.{name}, which is not part of a state dict; nothing of it was run")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, elements = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(elements, int):
            raise TorchFileError(f"persistent reference {pid!r:.80}, expected a storage")
        if not isinstance(key, str) or "/" in key or ".." in key:
            raise TorchFileError(f"storage named {key!r:.80}, expected a number")
        return _Storage(key, dtype, elements)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    whole = [offset, *shape, *strides]
    if not isinstance(storage, _Storage) or not all(type(x) is int for x in whole) or len(shape) != len(strides):
        raise TorchFileError("a tensor that is no view of a storage")
    return Tensor(storage.key, storage.dtype, storage.elements, offset, tuple(shape), tuple(strides))


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _size(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


_DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
# Every name that the pickle may use, and what stands for it here: containers, and functions without effects.
_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): _size,
}
