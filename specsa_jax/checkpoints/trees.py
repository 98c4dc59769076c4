"""Trees of parameters on disk: Orbax, leaf by leaf where that matters, and onto meshes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import type_handlers

# Of arrays on disk, so that a restore onto several devices reads for each about what it keeps.
_CHUNK_BYTES = 64 << 20


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A leaf that is read when it is written: the tree then never lies in memory as a whole."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of any pytree by dotted path: ``{"layers.0.attn.q_proj.kernel": array, ...}``."""
    return {".".join(map(_key, keys)): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _key(entry: Any) -> str:
    return str(next(getattr(entry, a) for a in ("key", "idx", "name") if hasattr(entry, a)))


def fit(like: Any, leaves: dict[str, Any], where: str) -> Any:
    """``leaves`` (by dotted path) in the tree structure of ``like``.

    Raises CheckpointError that lists every missing, unexpected and mis-shaped leaf.
    """
    expected = named_leaves(like)
    problems = [f"missing {n} {list(x.shape)}" for n, x in expected.items() if n not in leaves]
    problems += [f"unexpected {n} {list(x.shape)}" for n, x in leaves.items() if n not in expected]
    problems += [
        f"{n}: got shape {list(leaves[n].shape)}, expected {list(x.shape)}"
        for n, x in expected.items()
        if n in leaves and tuple(leaves[n].shape) != tuple(x.shape)
    ]
    if problems:
        raise CheckpointError(f"{where}: does not fit the config: " + "; ".join(problems))
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in expected])


def write_tree(path: Path, tree: Any) -> None:
    """Writes any pytree of arrays (or :class:`Lazy` ones, one after the other) as nested dicts with Orbax; atomic.

    Raises CheckpointError.
    """
    leaves = {n: x if isinstance(x, Lazy) else np.asarray(x) for n, x in named_leaves(tree).items()}
    nested = traverse_util.unflatten_dict(leaves, sep=".")
    args = traverse_util.unflatten_dict({n: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for n in leaves}, sep=".")
    handlers = type_handlers.create_type_handler_registry(
        (np.ndarray, type_handlers.NumpyHandler()), (Lazy, _LazyHandler())
    )
    with _told(path, "written"), _quiet():
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)) as checkpointer:
            checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(nested, save_args=args))


class _LazyHandler(type_handlers.NumpyHandler):
    """Writes lazy leaves as NumPy arrays, each before the next is read."""

    def __init__(self) -> None:
        # A leaf is read for the write alone. Before 0.12.6 Orbax knew no such option, and made a copy.
        known = inspect.signature(type_handlers.NumpyHandler.__init__).parameters
        super().__init__(**{name: False for name in ("deepcopy_host_arrays",) if name in known})

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            for future in await super().serialize([value.read()], [info], [arg]):
                try:
                    await asyncio.to_thread(future.result)
                except asyncio.CancelledError:  # Ctrl-C: this write ends before its directory goes
                    future.result()
                    raise
        return []


def read_tree(path: Path, like: Any, mesh: Mesh | None = None) -> Any:
    """Reads what :func:`write_tree` wrote, in the structure of ``like``; dtypes as saved.

    Leaves are arrays on the default device, whatever backend wrote them; or on the mesh's devices, each reading its
    own part. Raises CheckpointError.
    """
    with _told(path, "read"), _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = _saved(checkpointer, path)
        fit(like, named_leaves(saved), where=str(path))
        args = {n: _restore_args(n, x, mesh) for n, x in named_leaves(saved).items()}
        as_asked = jax.tree.unflatten(jax.tree.structure(saved), [args[n] for n in named_leaves(saved)])
        restored = checkpointer.restore(path.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_asked))
    leaves = named_leaves(restored)
    del restored
    for name in leaves:  # one by one, so that NumPy's copy of each goes before the next is made
        leaves[name] = jnp.asarray(leaves[name])
    return fit(like, leaves, where=str(path))


def _saved(checkpointer: ocp.Checkpointer, path: Path) -> Any:
    """Orbax's metadata of every leaf. Raises CheckpointError."""
    item = checkpointer.metadata(path.absolute()).item_metadata
    if item is None:  # Orbax has logged why, and _quiet has swallowed it
        raise CheckpointError(f"{path}: cannot be read: damaged, or no parameters of this project's (an Orbax tree)")
    return item.tree


def _restore_args(name: str, leaf: Any, mesh: Mesh | None) -> ocp.RestoreArgs:
    if mesh is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    sharding = NamedSharding(mesh, partition(name, leaf.shape, mesh))
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding, global_shape=leaf.shape)


def partition(name: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How a parameter is split over the mesh's last axis (tensor parallelism).

    Projections into heads and MLP by their outputs, out of them by their inputs, the embedding by tokens; whole where
    the axis does not divide the length, and where there is little to split.
    """
    axis = mesh.axis_names[-1]
    owner, kind = name.split(".")[-2:]
    split = {"o_proj": 0, "down_proj": 0, "embed": 0}.get(owner, len(shape) - 1 if kind == "kernel" else None)
    if len(shape) < 2 or split is None or shape[split] % mesh.shape[axis]:
        return PartitionSpec()
    return PartitionSpec(*(axis if i == split else None for i in range(len(shape))))


class TreeReader:
    """Reads single leaves of what :func:`write_tree` wrote, by dotted path. Raises CheckpointError.

    Attributes:
      leaves: shape and dtype of every leaf.
    """

    def __init__(self, path: Path):
        self.path = path
        with _told(path, "read"), _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            saved = _saved(checkpointer, path)
            self.leaves = {n: (tuple(x.shape), np.dtype(x.dtype)) for n, x in named_leaves(saved).items()}

    def read(self, name: str) -> np.ndarray:
        one = traverse_util.unflatten_dict({name: ocp.RestoreArgs(restore_type=np.ndarray)}, sep=".")
        shape, dtype = self.leaves[name]
        like = traverse_util.unflatten_dict({name: jax.ShapeDtypeStruct(shape, dtype)}, sep=".")
        with _told(self.path, "read"), _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                self.path.absolute(), args=ocp.args.PyTreeRestore(item=like, restore_args=one, partial_restore=True)
            )
        return named_leaves(restored)[name]


@contextlib.contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    """Orbax and TensorStore raise many kinds for a damaged directory or a full disk: all become CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be {what}: {reason}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs several warnings a save through absl, and what it raises too; exceptions still come through."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
