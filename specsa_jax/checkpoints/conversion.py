"""Conversion between public checkpoint formats and this project's, tensor by tensor, in both directions.

``convert`` writes a directory; ``load`` reads any known one into memory, converting on the fly.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tokenizers import Tokenizer

from specsa_jax.checkpoints import sources, store
from specsa_jax.checkpoints.formats import FORMATS
from specsa_jax.checkpoints.opening import OURS, Opened, check_tied_head, is_ours, open_checkpoint
from specsa_jax.checkpoints.safetensors_file import write_safetensors
from specsa_jax.checkpoints.store import Checkpoint
from specsa_jax.checkpoints.tokenizer_files import end_tokens, write_tokenizer
from specsa_jax.checkpoints.transforms import InexpressibleError, Row, expand
from specsa_jax.checkpoints.trees import CheckpointError, Lazy, partition
from specsa_jax.config import ConfigError

VERSION = 1  # of the converter: raised when a conversion's result changes
# Called with (tensors done, tensors in all, the tensor's name).
Progress = Callable[[int, int, str], None]


def _silent(done: int, total: int, name: str) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
      source, target: paths.
      from_format, to_format: names of formats.
      parameters, tensors, bytes: of the target's weights.
      dtypes: of the target's weights.
      seconds: wall time.
      notes: what is worth knowing about the format.
      divergence: of an adapted model from the dense one, see :func:`specsa_jax.checkpoints.adapt.divergence`.
    """

    source: str
    target: str
    from_format: str
    to_format: str
    parameters: int
    tensors: int
    bytes: int
    dtypes: tuple[str, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    divergence: dict[str, Any] | None = None


# --- loading ---------------------------------------------------------------------------------------------------------


def load(name_or_path: str | os.PathLike[str], *, verify: bool = True, mesh: Mesh | None = None) -> Checkpoint:
    """As :func:`specsa_jax.checkpoints.store.load`, and also reads public formats, converting on the fly.

    Nothing is written. A directory without tokenizer files gets a tokenizer of bytes or of token ids
    (:mod:`specsa_jax.checkpoints.tokenizer_files`).
    """
    path = Path(name_or_path)
    if not str(name_or_path) or not path.exists() or (path.is_dir() and is_ours(path)):
        return store.load(name_or_path, verify=verify, mesh=mesh)
    opened = open_checkpoint(path)
    opened.check()
    check_tied_head(opened)
    tokenizer = write_tokenizer(opened, None, "ids")

    def put(name: str, leaf: Lazy) -> jax.Array:
        array = leaf.read()
        if mesh is None:
            return jnp.asarray(array)
        return jax.device_put(array, NamedSharding(mesh, partition(name, leaf.shape, mesh)))

    leaves = {name: put(name, leaf) for name, leaf in opened.leaves().items()}
    params = store.fit(store.expected_params(opened.model), leaves, where=str(path))
    metadata = {"source": {"path": str(path), "format": opened.format_name}}
    return Checkpoint(params, opened.model, tokenizer, metadata, end_tokens(opened))


# --- converting ------------------------------------------------------------------------------------------------------


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    from_format: str | None = None,
    to_format: str | None = None,
    adapt: str | None = None,
    adapt_options: Mapping[str, int] | None = None,
    divergence_tokens: int | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress = _silent,
) -> Report:
    """Converts a checkpoint; ``target`` appears when it is whole.

    Tensors are read, moved and written one by one, and keep their dtype and every bit.

    Args:
      source: a directory or file of safetensors (an index of shards too), a PyTorch ``.bin`` or ``.pt`` (weights
        only), or a checkpoint of this project.
      target: the directory to create.
      from_format: a name of ``formats.FORMATS`` or "specsa"; None: recognised from config and keys.
      to_format: the same; None: "specsa", or where the source is that, the format that it came from.
      adapt: "nsa" makes an NSA model of a dense one.
      adapt_options: sizes of its NSAConfig, such as ``{"window": 512, "num_selected": 16}``.
      divergence_tokens: length of the text on which an adapted model is compared with the dense one; 0: not compared;
        None: twice what its selected blocks hold.
      config: the source's config where it is not in ``config.json`` beside the weights: values, or a JSON file.
      tokenizer: a ``tokenizer.json`` where there is none beside the weights; "bytes" (256 tokens), or "ids" for one
        that reads and writes token ids.
      overwrite: replace an existing checkpoint.
      progress: called before every tensor.

    Raises CheckpointError, before anything is written: unknown or unreadable source, a target that exists, a config
    or tensors that do not fit (one error lists them all), a format that cannot express the model (with the reasons).
    """
    begun = time.monotonic()
    target = Path(target)
    opened = open_checkpoint(source, from_format, config=config, adapt=adapt, adapt_options=adapt_options, verify=True)
    to_format = _target_format(opened, to_format)
    store.check_target(target, overwrite)
    if target.exists() and target.resolve() in (opened.path.resolve(), opened.directory.resolve()):
        raise CheckpointError(f"{target}: is the source")
    opened.check()
    raw, rows = _expressed(opened, to_format)
    write_tokenizer(opened, tokenizer, None)  # refused before the weights are read
    ends = end_tokens(opened)
    _check_room(target, opened)
    check_tied_head(opened)
    with store.replacing(target, overwrite) as scratch:
        write_tokenizer(opened, tokenizer, None, scratch)
        written = _write_weights(opened, to_format, rows, scratch, progress)
        metadata = {"end_tokens": ends, **_provenance(opened)}
        divergence = None
        if adapt and divergence_tokens != 0:
            from specsa_jax.checkpoints.adapt import divergence as measure

            text = Tokenizer.from_file(str(scratch / "tokenizer.json"))
            divergence = measure(scratch / "params", opened.model, text, divergence_tokens)
        if adapt:
            metadata["adaptation"] = {"kind": adapt, "divergence": divergence}
        if to_format == OURS:
            store.seal(scratch, opened.model, metadata)
        else:
            _seal_foreign(scratch, raw, metadata)
    return Report(
        source=str(source), target=str(target), from_format=opened.format_name, to_format=to_format,
        parameters=sum(math.prod(info.shape) for info in written), tensors=len(written),
        bytes=sum(math.prod(info.shape) * np.dtype(info.dtype).itemsize for info in written),
        dtypes=tuple(sorted({info.dtype for info in written})), seconds=time.monotonic() - begun,
        notes=() if opened.format is None else opened.format.notes, divergence=divergence,
    )  # fmt: skip


def _check_room(target: Path, opened: Opened) -> None:
    """Raises CheckpointError where the disk has less room than the weights take."""
    parent = next(directory for directory in target.absolute().parents if directory.exists())
    needed, free = sum(leaf.nbytes for leaf in opened.leaves().values()), shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(f"{target}: needs {needed:,} bytes, but {parent} has {free:,} left")


def _target_format(opened: Opened, named: str | None) -> str:
    if named is not None and named not in (OURS, *FORMATS):
        raise CheckpointError(f"to: got {named!r}, expected one of {', '.join((OURS, *FORMATS))}")
    if named is not None:
        return named
    if opened.format is not None:
        return OURS
    origin = opened.origin.get("format")
    if not isinstance(origin, str) or origin not in FORMATS:
        raise CheckpointError(f"to: name the format to write, one of {', '.join(FORMATS)}")
    return origin


def _expressed(opened: Opened, to_format: str) -> tuple[dict[str, Any], list[Row]]:
    """The target's config and table; empty for this project's own. Raises CheckpointError with the reasons."""
    if to_format == OURS:
        return {}, []
    chosen = FORMATS[to_format]
    # A config that came from this format and still says the model is kept word for word.
    origin: dict[str, Any] = {"format": opened.format_name, "config": opened.raw}
    if opened.format is None:
        origin = opened.origin
    if origin.get("format") == to_format and isinstance(origin.get("config"), dict):
        try:
            if chosen.understand(origin["config"], origin.get("shapes", {})) == opened.model:
                return origin["config"], expand(list(chosen.table(opened.model)), opened.model.layers)
        except (ConfigError, TypeError, LookupError):  # metadata that somebody has edited
            pass
    try:
        raw = chosen.config_of(opened.model)
    except InexpressibleError as error:
        raise CheckpointError(f"to: {error}") from error
    ids = end_tokens(opened)
    if ids:
        raw["eos_token_id"] = ids[0] if len(ids) == 1 else list(ids)
    return raw, expand(list(chosen.table(opened.model)), opened.model.layers)


def _write_weights(
    opened: Opened, to_format: str, rows: Sequence[Row], scratch: Path, progress: Progress
) -> list[sources.Info]:
    leaves = opened.leaves()
    done = 0

    def counted(name: str, leaf: Lazy, total: int) -> Lazy:
        def read() -> np.ndarray:
            nonlocal done
            progress(done, total, name)
            done += 1
            array = leaf.read()
            if array.shape != leaf.shape or array.dtype != leaf.dtype:
                raise CheckpointError(f"{opened.path}: {name}: read {array.dtype} {list(array.shape)}, expected "
                                      f"{leaf.dtype} {list(leaf.shape)}")  # fmt: skip
            return array

        return dataclasses.replace(leaf, read=read)

    if to_format == OURS:
        written = {name: counted(name, leaf, len(leaves)) for name, leaf in leaves.items()}
        store.write_tree(scratch / "params", written)
        return [sources.Info(leaf.shape, leaf.dtype.name) for leaf in leaves.values()]
    out: dict[str, Lazy] = {}
    for row in rows:
        leaf = leaves[row.target]
        for index, (name, shape) in enumerate(zip(row.sources, row.how.shapes(leaf.shape), strict=True)):
            out[name] = Lazy(shape, leaf.dtype, _backwards(leaf, row, index))
    try:
        write_safetensors(scratch, {name: counted(name, leaf, len(out)) for name, leaf in out.items()})
    except InexpressibleError as error:
        raise CheckpointError(f"to: {to_format} cannot express this model: {error}") from error
    return [sources.Info(leaf.shape, leaf.dtype.name) for leaf in out.values()]


def _backwards(leaf: Lazy, row: Row, index: int) -> Callable[[], np.ndarray]:
    return lambda: row.how.backward(leaf.read())[index]


def _provenance(opened: Opened) -> dict[str, Any]:
    """Where a conversion's result came from; a chain of conversions keeps its first format's config."""
    files = opened.source.files
    prints = {file.relative_to(opened.directory).as_posix(): store.sha256(file) for file in files}
    digest = hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()
    source: dict[str, Any] = {"path": str(opened.path), "format": opened.format_name, "fingerprint": digest}
    if opened.format is not None:
        first = ("blocks.0.", "layers.0.", "embed")  # from which a config's gaps are read
        shapes = {n: list(i.shape) for n, i in opened.source.infos.items() if any(part in n for part in first)}
        source |= {"config": opened.raw, "shapes": shapes}
    elif opened.origin:
        source["before"] = opened.origin
    return {"source": source, "converter": {"version": VERSION}}


def _seal_foreign(scratch: Path, raw: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Writes ``conversion.json`` (provenance and checksums), and ``config.json`` last."""
    config = json.dumps(raw, indent=2) + "\n"
    files = store.checksums(scratch, sorted(p for p in scratch.rglob("*") if p.is_file()))
    files["config.json"] = {"bytes": len(config.encode()), "sha256": hashlib.sha256(config.encode()).hexdigest()}
    record = json.dumps({**metadata, "files": files}, indent=2) + "\n"
    (scratch / "conversion.json").write_text(record, encoding="utf-8")
    (scratch / "config.json").write_text(config, encoding="utf-8")
