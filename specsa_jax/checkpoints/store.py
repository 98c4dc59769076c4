"""The checkpoint directory on disk.

::

    config.json      schema version, model config, size and SHA-256 of every file below
    tokenizer.json   a ``tokenizers`` tokenizer
    params/          the parameters, an Orbax PyTree (nested dicts; integer keys as strings), dtypes as saved
    metadata.json    the training card: data, tokens, held-out loss, recipe, versions
    README.md        the card for people (optional, not checked)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from tokenizers import Tokenizer

from specsa_jax import model
from specsa_jax.config import ConfigError, ModelConfig

SCHEMA = 1
_PACKAGED = Path(__file__).parent


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
      params: nested dict of ``jax.Array`` on the default device, in the layout of ``model.init_params``.
      config: the model's config.
      tokenizer: its tokenizer.
      metadata: the training card, as JSON values.
    """

    params: dict[str, Any]
    config: ModelConfig
    tokenizer: Tokenizer
    metadata: dict[str, Any]


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The directory of a packaged checkpoint's name (``"embedded"``) or of a path.

    Raises CheckpointError that lists the packaged names when there is no such directory.
    """
    path = Path(name_or_path)
    packaged = {p.parent.name: p.parent for p in sorted(_PACKAGED.glob("*/config.json"))}
    if str(name_or_path) in packaged:
        return packaged[str(name_or_path)]
    if str(name_or_path) and path.is_dir():  # '' would be the working directory
        return path
    names = ", ".join(packaged) or "none"
    raise CheckpointError(
        f"checkpoint: got {str(name_or_path)!r}, expected an existing directory or a packaged name ({names})"
    )


def save(
    path: str | os.PathLike[str],
    params: dict[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    metadata: dict[str, Any],
    *,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint directory beside ``path``, then renames it into place.

    Args:
      path: the directory to create; its parents are created.
      params: nested dict of arrays in the layout of ``model.init_params(config, ...)``; dtypes are kept.
      config, tokenizer, metadata: what :func:`load` gives back; ``metadata`` holds JSON values only.
      card: text of ``README.md``, if any.
      overwrite: replace an existing checkpoint.

    Raises CheckpointError when ``path`` exists (without ``overwrite``), cannot be written, or ``params`` do not
    fit ``config``.
    """
    path = Path(path)
    _check_free(path, overwrite)
    fit(expected_params(config), named_leaves(params), where="params")
    with written_beside(path, overwrite) as scratch:
        write_tree(scratch / "params", params)
        tokenizer.save(str(scratch / "tokenizer.json"))
        (scratch / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        if card is not None:
            (scratch / "README.md").write_text(card, encoding="utf-8")
        write_top(scratch, {"schema": SCHEMA, "model": config.to_dict()}, scratch / "tokenizer.json")
    return path


def _check_free(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path}: already exists; choose another directory, or overwrite it")
    if path.exists() and not (path / "config.json").exists():
        raise CheckpointError(f"{path}: is no checkpoint, so it is not overwritten")


@contextlib.contextmanager
def written_beside(path: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to fill, which then takes the place of ``path``; nothing is left of it when filling it fails.

    Raises CheckpointError when ``path`` exists (without ``overwrite``), is no checkpoint, or cannot be written.
    """
    _check_free(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    retired = scratch.with_name(scratch.name + "-old")
    try:
        scratch.chmod(0o755)  # mkdtemp's 0700 would survive the rename
        yield scratch
        if path.exists():
            path.rename(retired)
        scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def write_top(directory: Path, values: dict[str, Any], *others: Path) -> None:
    """``config.json``: ``values``, with size and SHA-256 of the files of ``params/`` and of ``others``."""
    checked = [*others, *sorted(p for p in (directory / "params").rglob("*") if p.is_file())]
    files = {p.relative_to(directory).as_posix(): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in checked}
    (directory / "config.json").write_text(json.dumps({**values, "files": files}, indent=2) + "\n", encoding="utf-8")


def load(name_or_path: str | os.PathLike[str], *, verify: bool = True) -> Checkpoint:
    """Reads a checkpoint directory, or the packaged checkpoint of that name.

    Args:
      verify: compare every file's SHA-256 (about a second per GB); sizes are always compared.

    Raises CheckpointError: no such checkpoint, unknown schema, missing, truncated or corrupt files, or weights that
    do not fit the config (one error lists every missing, unexpected and mis-shaped tensor).
    """
    path = resolve(name_or_path)
    top, config = read_top(path, "model", ModelConfig)
    check_files(path, top.get("files"), verify)
    if "tokenizer.json" not in top["files"]:
        raise CheckpointError(f"{path / 'config.json'}: files: expected tokenizer.json among them")
    metadata = read_json(path / "metadata.json")
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{path / 'tokenizer.json'}: not a tokenizer: {error}") from error
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CheckpointError(
            f"{path / 'tokenizer.json'}: has {tokenizer.get_vocab_size()} tokens, "
            f"but config.json says vocab_size = {config.vocab_size}"
        )
    params = read_tree(path / "params", expected_params(config))
    return Checkpoint(params, config, tokenizer, metadata)


def load_config(name_or_path: str | os.PathLike[str]) -> ModelConfig:
    """The config alone of what :func:`load` reads. Raises CheckpointError."""
    return read_top(resolve(name_or_path), "model", ModelConfig)[1]


def expected_params(config: ModelConfig) -> dict[str, Any]:
    """The parameters' tree as ``jax.ShapeDtypeStruct`` leaves; nothing is allocated."""
    return jax.eval_shape(lambda: model.init_params(config, 0))


# --- trees on disk ---------------------------------------------------------------------------------------------------


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
    """Writes any pytree of arrays as nested dicts with Orbax; atomic. Leaves go through host memory."""
    nested = traverse_util.unflatten_dict({n: np.asarray(x) for n, x in named_leaves(tree).items()}, sep=".")
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(nested))


def read_tree(path: Path, like: Any) -> Any:
    """Reads what :func:`write_tree` wrote, in the structure of ``like``; dtypes as saved.

    Leaves are arrays on the default device, whatever backend wrote them. Raises CheckpointError.
    """
    try:
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            saved = checkpointer.metadata(path.absolute()).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            restored = checkpointer.restore(path.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged directory
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error
    return jax.tree.map(jnp.asarray, fit(like, named_leaves(restored), where=str(path)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs several warnings a save through absl; errors are exceptions and still come through."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- files -----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: got {type(value).__name__}, expected an object")
    return value


def read_top(path: Path, name: str, kind: Any) -> tuple[dict[str, Any], Any]:
    """``config.json`` of the directory ``path``, and the config of class ``kind`` that it has under ``name``.

    Raises CheckpointError.
    """
    top = read_json(path / "config.json")
    if top.get("schema") != SCHEMA:
        raise CheckpointError(f"{path / 'config.json'}: schema: got {top.get('schema')!r}, expected {SCHEMA}")
    try:
        return top, kind.from_dict(top.get(name, {}))
    except (ConfigError, TypeError) as error:  # TypeError: a list's elements, which configs do not check
        raise CheckpointError(f"{path / 'config.json'}: {name}: {error}") from error


def check_files(path: Path, files: Any, verify: bool) -> None:
    """Compares the files of a checkpoint with what its config.json says of them. Raises CheckpointError."""
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) for entry in files.values()
    ):
        raise CheckpointError(f"{path / 'config.json'}: files: expected the size and SHA-256 of every file")
    problems = []
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, expected {entry['bytes']}")
        elif verify and _sha256(file) != entry["sha256"]:
            problems.append(f"{name} is corrupt (SHA-256 differs)")
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(problems))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
