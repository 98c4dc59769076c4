"""Checkpoints as they lie on disk: tensors by name, read one at a time, whatever the container."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from specsa_jax.checkpoints.torch_file import TorchFile, TorchFileError
from specsa_jax.checkpoints.transforms import Shape
from specsa_jax.checkpoints.trees import CheckpointError, TreeReader

INDEX = "model.safetensors.index.json"
# safetensors' names of element types that NumPy has; others go by safetensors' name.
DTYPES = {
    "F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Info:
    """A tensor's shape, and its dtype by NumPy's name (or safetensors' where NumPy has none)."""

    shape: Shape
    dtype: str


class Source(Protocol):
    """Tensors by name.

    Attributes:
      infos: what there is; known without reading any tensor.
      files: the files that hold the tensors.
      config: the config saved among the tensors, if any.
    """

    infos: dict[str, Info]
    files: list[Path]
    config: dict[str, Any] | None

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own. Raises CheckpointError."""
        ...


class SafetensorsSource:
    """One or several safetensors files. Raises CheckpointError for what is damaged or listed twice."""

    config: dict[str, Any] | None = None

    def __init__(self, files: list[Path]):
        self.files = files
        self.infos: dict[str, Info] = {}
        self._at: dict[str, tuple[Path, int]] = {}
        for file in files:
            self._open(file)

    def _open(self, file: Path) -> None:
        try:
            with file.open("rb") as stream, safe_open(str(file), "np"):  # which checks header and length
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(size))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from error
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in self._at:
                raise CheckpointError(f"{file}: {name} is also in {self._at[name][0].name}")
            dtype = DTYPES.get(entry["dtype"])
            self.infos[name] = Info(tuple(entry["shape"]), entry["dtype"] if dtype is None else dtype.name)
            self._at[name] = (file, 8 + size + entry["data_offsets"][0])

    def holds(self, name: str, file: str) -> bool:
        """Whether the tensor is in the file of that name."""
        return name in self._at and self._at[name][0].name == file

    def read(self, name: str) -> np.ndarray:
        # Not mapped: pages of a mapped file stay in the process's memory while it reads on.
        file, offset = self._at[name]
        info = self.infos[name]
        count = int(np.prod(info.shape, dtype=np.int64))
        try:
            flat = np.fromfile(file, np.dtype(info.dtype), count, offset=offset)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: {name}: {error}") from error
        if len(flat) != count:
            raise CheckpointError(f"{file}: {name}: the file ends inside the tensor")
        return flat.reshape(info.shape)


class TorchSource:
    """One or several files of ``torch.save``, weights only."""

    def __init__(self, files: list[Path]):
        self.files = files
        self.infos: dict[str, Info] = {}
        self._in: dict[str, TorchFile] = {}
        self.config: dict[str, Any] | None = None
        for file in files:
            try:
                opened = TorchFile(file)
            except (TorchFileError, OSError) as error:
                raise CheckpointError(str(error)) from error
            self.config = self.config or opened.config
            for name, tensor in opened.tensors.items():
                if name in self._in:
                    raise CheckpointError(f"{file}: {name} is also in {self._in[name].path.name}")
                self._in[name] = opened
                self.infos[name] = Info(tensor.shape, tensor.dtype.name)

    def holds(self, name: str, file: str) -> bool:
        """Whether the tensor is in the file of that name."""
        return name in self._in and self._in[name].path.name == file

    def read(self, name: str) -> np.ndarray:
        try:
            return self._in[name].read(name)
        except TorchFileError as error:
            raise CheckpointError(str(error)) from error


class OrbaxSource:
    """The parameters of one of this project's checkpoints, by dotted path."""

    config: dict[str, Any] | None = None

    def __init__(self, directory: Path):
        self.files = sorted(file for file in directory.rglob("*") if file.is_file())
        self._tree = TreeReader(directory)
        self.infos = {name: Info(shape, np.dtype(dtype).name) for name, (shape, dtype) in self._tree.leaves.items()}

    def read(self, name: str) -> np.ndarray:
        return self._tree.read(name)


def open_weights(path: Path) -> Source:
    """The tensors of a file or directory of safetensors or PyTorch files. Raises CheckpointError."""
    if (index := _index(path)) is None:
        return _source(_weight_files(path))
    names = _indexed(index)
    source = _source(sorted({index.with_name(shard) for shard in names.values()}))
    if wrong := [f"{name} in {shard}" for name, shard in names.items() if not source.holds(name, shard)]:
        raise CheckpointError(f"{index}: names tensors where they are not: {', '.join(wrong)}")
    return source


def _source(files: list[Path]) -> SafetensorsSource | TorchSource:
    return SafetensorsSource(files) if files[0].suffix == ".safetensors" else TorchSource(files)


def _index(path: Path) -> Path | None:
    """The index of shards that ``path`` is, or has."""
    if path.is_file():
        return path if path.name.endswith(".index.json") else None
    return next((path / name for name in (INDEX, "pytorch_model.bin.index.json") if (path / name).is_file()), None)


def _weight_files(path: Path) -> list[Path]:
    """The files that hold the weights, where there is no index. Raises CheckpointError: there are none."""
    if path.is_file():
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
            return [path]
        raise CheckpointError(f"{path}: expected .safetensors, .bin, .pt, .pth, an index of shards, or a directory")
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.bin", "*.pt", "*.pth"):
        found = sorted(file for file in path.glob(pattern) if file.name != "training_args.bin")
        preferred = [file for file in found if file.name in ("model.safetensors", "pytorch_model.bin", "model.pt")]
        if found:
            return preferred or found
    config = "" if (path / "config.json").exists() else "; config.json: missing too"
    raise CheckpointError(f"{path}: holds no weights (safetensors, .bin, .pt, or a checkpoint of this project){config}")


def _indexed(index: Path) -> dict[str, str]:
    """The shard of each tensor. Raises CheckpointError."""
    try:
        text = index.read_text(encoding="utf-8")
        names = {name: str(shard) for name, shard in json.loads(text, object_pairs_hook=_once)["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of shards: {type(error).__name__}: {error}") from error
    shards = sorted(set(names.values()))
    if not shards:
        raise CheckpointError(f"{index}: names no shard")
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise CheckpointError(f"{index}: names files outside its directory: {', '.join(outside)}")
    if absent := [shard for shard in shards if not index.with_name(shard).is_file()]:
        raise CheckpointError(f"{index}: names shards that are absent: {', '.join(absent)}")
    return names


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python's reader would keep the last of two equal keys. Raises ValueError."""
    if twice := sorted(name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1):
        raise ValueError(f"names {', '.join(twice)} more than once")
    return dict(pairs)
