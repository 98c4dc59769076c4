"""The checkpoint directory on disk.

::

    config.json      schema version, model config, size and SHA-256 of every file below
    tokenizer.json   a ``tokenizers`` tokenizer; converted checkpoints keep their other tokenizer files beside it
    params/          the parameters, an Orbax PyTree (nested dicts; integer keys as strings), dtypes as saved
    metadata.json    the training card: data, tokens, held-out loss, recipe, versions; or where it was converted from
    README.md        the card for people (optional, not checked)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from specsa_jax import model
from specsa_jax.checkpoints.trees import CheckpointError, fit, named_leaves, read_tree, write_tree
from specsa_jax.config import ConfigError, ModelConfig

SCHEMA = 1
_PACKAGED = Path(__file__).parent
# Ends the name of a directory that is being written. Nothing below such a name is read, so that the rename that gives
# a directory its own name is what makes it a checkpoint: a writer killed at any moment leaves none.
_PARTIAL = ".partial"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
      params: nested dict of ``jax.Array`` on the default device, in the layout of ``model.init_params``.
      config: the model's config.
      tokenizer: its tokenizer.
      metadata: the training card, as JSON values.
      end_tokens: ids that end a text, where the checkpoint names them; None: ``<|endoftext|>``, if there is one.
    """

    params: dict[str, Any]
    config: ModelConfig
    tokenizer: Tokenizer
    metadata: dict[str, Any]
    end_tokens: tuple[int, ...] | None = None


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The directory of a packaged checkpoint's name (``"embedded"``) or of a path.

    Raises CheckpointError that lists the packaged names when there is no such directory.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise CheckpointError(f"checkpoint: got {name_or_path!r}, expected a path or a packaged name")
    path = Path(name_or_path)
    refuse_partial(path)
    packaged = {p.parent.name: p.parent for p in sorted(_PACKAGED.glob("*/config.json"))}
    if str(name_or_path) in packaged:
        return packaged[str(name_or_path)]
    if str(name_or_path) and path.is_dir():  # '' would be the working directory
        return path
    names = ", ".join(packaged) or "none"
    raise CheckpointError(
        f"checkpoint: got {str(name_or_path)!r}, expected an existing directory or a packaged name ({names})"
    )


def refuse_partial(path: Path) -> None:
    """Raises CheckpointError where ``path`` is, or lies in, a directory that :func:`replacing` has not finished."""
    if any(part.startswith(".") and part.endswith(_PARTIAL) for part in path.resolve().parts):
        raise CheckpointError(
            f"{path}: got a directory that was not finished (.NAME-…{_PARTIAL}), expected a checkpoint; "
            "delete it unless something is still writing it"
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
    check_target(path, overwrite)
    fit(expected_params(config), named_leaves(params), where="params")
    with replacing(path, overwrite) as scratch:
        write_tree(scratch / "params", params)
        tokenizer.save(str(scratch / "tokenizer.json"))
        seal(scratch, config, metadata, card)
    return path


def check_target(path: Path, overwrite: bool) -> None:
    """Raises CheckpointError if ``path`` exists and is not to be overwritten, or is no checkpoint."""
    refuse_partial(path)
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise CheckpointError(f"{path}: already exists; choose another directory, or overwrite it")
    if path.exists() and not (path / "config.json").exists():
        raise CheckpointError(f"{path}: is no checkpoint, so it is not overwritten")


@contextlib.contextmanager
def replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A scratch directory beside ``path`` that takes its place at the end, unless something fails.

    Raises CheckpointError where nothing can be written, and at the end as :func:`check_target`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=_PARTIAL, dir=path.parent))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    retired = scratch.with_suffix(".old" + _PARTIAL)
    try:
        scratch.chmod(0o755)  # mkdtemp's 0700 would survive the rename
        yield scratch
        check_target(path, overwrite)  # somebody may have made it in the meantime
        if path.exists():
            path.rename(retired)
        scratch.rename(path)
    except BaseException as error:
        if retired.exists() and not path.exists():
            retired.rename(path)
        _remove(scratch)
        if isinstance(error, OSError):  # the disk is full, say
            raise CheckpointError(f"{path}: cannot be written: {error}") from error
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def _remove(directory: Path) -> None:
    """Removes a directory that threads of an interrupted write may still put files into, or make again."""
    absent = 0
    for _ in range(100):
        shutil.rmtree(directory, ignore_errors=True)
        absent = 0 if directory.exists() else absent + 1
        if absent == 3:
            return
        time.sleep(0.1)


def seal(scratch: Path, config: ModelConfig, metadata: dict[str, Any], card: str | None = None) -> None:
    """Writes what makes a directory with parameters and tokenizer files a checkpoint; ``config.json`` comes last."""
    text = json.dumps(metadata, indent=2) + "\n"
    checked = sorted(p for p in scratch.rglob("*") if p.is_file())
    (scratch / "metadata.json").write_text(text, encoding="utf-8")
    if card is not None:
        (scratch / "README.md").write_text(card, encoding="utf-8")
    top = {"schema": SCHEMA, "model": config.to_dict(), "files": checksums(scratch, checked)}
    (scratch / "config.json").write_text(json.dumps(top, indent=2) + "\n", encoding="utf-8")


def load(name_or_path: str | os.PathLike[str], *, verify: bool = True, mesh: Mesh | None = None) -> Checkpoint:
    """Reads a checkpoint directory, or the packaged checkpoint of that name.

    Args:
      verify: compare every file's SHA-256 (about a second per GB); sizes are always compared.
      mesh: restore straight onto its devices, every tensor split over the mesh's last axis as ``trees.partition`` says.

    Raises CheckpointError: no such checkpoint, unknown schema, missing, truncated or corrupt files, or weights that
    do not fit the config (one error lists every missing, unexpected and mis-shaped tensor).
    """
    path = resolve(name_or_path)
    config, metadata = read_header(path, verify=verify)
    tokenizer = read_tokenizer(path / "tokenizer.json", config.vocab_size)
    params = read_tree(path / "params", expected_params(config), mesh)
    return Checkpoint(params, config, tokenizer, metadata, end_tokens_of(metadata))


def read_header(path: Path, *, verify: bool) -> tuple[ModelConfig, dict[str, Any]]:
    """A checkpoint's config and metadata, once its files are there and (``verify``) whole. Raises CheckpointError."""
    top, config = read_top(path, "model", ModelConfig)
    files = top.get("files")
    if not isinstance(files, dict) or "tokenizer.json" not in files:
        raise CheckpointError(f"{path / 'config.json'}: files: expected the size and SHA-256 of every file")
    check_files(path, files, verify)
    return config, read_json(path / "metadata.json")


def read_tokenizer(file: Path, vocab_size: int) -> Tokenizer:
    """A tokenizer of at most ``vocab_size`` tokens. Raises CheckpointError."""
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{file}: not a tokenizer: {error}") from error
    if tokenizer.get_vocab_size() > vocab_size:
        raise CheckpointError(
            f"{file}: has {tokenizer.get_vocab_size()} tokens, but config.json says vocab_size = {vocab_size}"
        )
    return tokenizer


def end_tokens_of(metadata: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The ids under ``end_tokens`` in a checkpoint's metadata. Raises CheckpointError."""
    ids = metadata.get("end_tokens")
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(f"metadata.json: end_tokens: got {ids!r:.80}, expected a list of token ids")
    return tuple(ids)


def load_config(name_or_path: str | os.PathLike[str]) -> ModelConfig:
    """The config alone of what :func:`load` reads. Raises CheckpointError."""
    return read_top(resolve(name_or_path), "model", ModelConfig)[1]


def expected_params(config: ModelConfig) -> dict[str, Any]:
    """The parameters' tree as ``jax.ShapeDtypeStruct`` leaves; nothing is allocated."""
    return jax.eval_shape(lambda: model.init_params(config, 0))


# --- files -----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: got {type(value).__name__}, expected an object")
    return value


def write_text(path: Path, text: str) -> Path:
    """Writes a file beside its place, then renames it: a killed writer leaves the one that was there.

    Raises CheckpointError where it cannot be written.
    """
    try:
        handle, part = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                out.write(text)
            os.chmod(part, 0o644)  # mkstemp's 0600 would survive the rename
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    return path


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


def checksums(directory: Path, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of ``files``, by their path in ``directory``."""
    return {p.relative_to(directory).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}


def check_files(path: Path, files: Any, verify: bool) -> None:
    """Compares sizes, and contents too (``verify``), with :func:`checksums`. Raises CheckpointError with all of it."""
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) for entry in files.values()
    ):
        raise CheckpointError(f"{path}: files: expected the size and SHA-256 of every file")
    problems = []
    for name, entry in files.items():
        file = path / name
        try:
            if not file.is_file():
                problems.append(f"{name} is missing")
            elif file.stat().st_size != entry["bytes"]:
                problems.append(f"{name} has {file.stat().st_size} bytes, expected {entry['bytes']}")
            elif verify and sha256(file) != entry["sha256"]:
                problems.append(f"{name} is corrupt (SHA-256 differs)")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(problems))


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
