"""Conversion between public checkpoint formats and this project's, tensor by tensor, in both directions.

``convert`` writes a directory; ``load`` reads any known directory into memory, converting on the fly; both go through
:class:`Opened`, a checkpoint understood but not yet read.
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
from specsa_jax.checkpoints.formats import FORMATS, Format
from specsa_jax.checkpoints.formats.dense import adapted, added_rows
from specsa_jax.checkpoints.safetensors_file import write_safetensors
from specsa_jax.checkpoints.store import Checkpoint, CheckpointError, Lazy
from specsa_jax.checkpoints.tokenizer_files import end_tokens, write_tokenizer
from specsa_jax.checkpoints.transforms import InexpressibleError, Row, expand
from specsa_jax.config import ConfigError, ModelConfig

OURS = "specsa"
VERSION = 1  # of the converter: raised when a conversion's result changes
_DTYPES = ("float32", "bfloat16", "float16")
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


@dataclasses.dataclass
class Opened:
    """A checkpoint of any format, understood; its tensors are read when they are asked for.

    Attributes:
      path: file or directory.
      directory: where tokenizer files lie.
      format: None for this project's own.
      raw: the format's config, as found.
      model: the model's config.
      source: the tensors.
      rows: the format's table for this model.
      problems: every missing, unexpected and mis-shaped tensor and wrong dtype, in words.
      metadata: this project's own; empty elsewhere.
    """

    path: Path
    directory: Path
    format: Format | None
    raw: dict[str, Any]
    model: ModelConfig
    source: sources.Source
    rows: list[Row]
    problems: list[str]
    metadata: dict[str, Any]

    @property
    def format_name(self) -> str:
        return OURS if self.format is None else self.format.name

    def check(self) -> None:
        """Raises CheckpointError with every problem."""
        if self.problems:
            raise CheckpointError(f"{self.path}: does not fit {self.format_name}: " + "; ".join(self.problems))

    def leaves(self) -> dict[str, Lazy]:
        """This project's parameters by dotted path."""
        expected = store.named_leaves(store.expected_params(self.model))
        if self.format is None:
            infos = self.source.infos
            return {n: Lazy(infos[n].shape, np.dtype(infos[n].dtype), _reader(self.source, n)) for n in expected}
        common = np.dtype(next(iter(self.source.infos.values())).dtype)
        by_target = {row.target: row for row in self.rows}
        return {n: self._leaf(by_target[n], tuple(x.shape), common) for n, x in expected.items()}

    def _leaf(self, row: Row, shape: tuple[int, ...], common: np.dtype) -> Lazy:
        dtype = np.dtype(self.source.infos[row.sources[0]].dtype) if row.sources else common

        def read() -> np.ndarray:
            return row.how.forward([self.source.read(name) for name in row.sources], shape).astype(dtype, copy=False)

        return Lazy(shape, dtype, read)


def _reader(source: sources.Source, name: str) -> Callable[[], np.ndarray]:
    return lambda: source.read(name)


# --- opening ---------------------------------------------------------------------------------------------------------


def open_checkpoint(
    path: str | os.PathLike[str],
    from_format: str | None = None,
    *,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    adapt: str | None = None,
    adapt_options: Mapping[str, int] | None = None,
    verify: bool = False,
) -> Opened:
    """Recognises and understands a checkpoint; nothing of its weights is read. Arguments as for :func:`convert`.

    ``verify`` compares the SHA-256 of this project's own. Raises CheckpointError; tensors that do not fit are listed
    in ``problems`` instead.
    """
    if from_format is not None and from_format not in (OURS, *FORMATS):
        raise CheckpointError(f"from: got {from_format!r}, expected one of {', '.join((OURS, *FORMATS))}")
    if adapt not in (None, "nsa"):
        raise CheckpointError(f"adapt: got {adapt!r}, expected 'nsa'")
    if adapt_options and adapt is None:
        raise CheckpointError("adapt_options: given without adapt='nsa'")
    if not str(path) or not Path(path).exists():  # '' would be the working directory
        path = store.resolve(path)
    path = Path(path)
    directory = path if path.is_dir() else path.parent
    if (path / "_METADATA").is_file() and from_format in (None, OURS):
        return _open_tree(path, config)
    if path.is_dir() and (from_format == OURS or (from_format is None and is_ours(path))):
        if adapt:
            raise CheckpointError("adapt: the checkpoint is this project's already, not a dense Llama or Qwen3")
        return _open_ours(path, verify)
    if from_format == OURS:
        raise CheckpointError(f"{path}: expected a checkpoint directory of this project")
    source = sources.open_weights(path)
    raw = _raw_config(directory, source, config)
    shapes = {name: info.shape for name, info in source.infos.items()}
    chosen = _recognise(path, raw, shapes, from_format)
    if adapt and not chosen.dense:
        raise CheckpointError(f"adapt: {chosen.name} has sparse attention already; only dense formats are adapted")
    try:
        model = chosen.understand(raw, shapes)
        rows = list(chosen.table(model))
        if adapt:
            model = adapted(model, **(adapt_options or {}))
            rows += added_rows(model)
    except ConfigError as error:
        raise CheckpointError(f"{directory / 'config.json'}: as {chosen.name}: {error}") from error
    if model.layers > len(source.infos):
        raise CheckpointError(f"{path}: config says {model.layers} layers, but there are {len(source.infos)} tensors")
    rows = expand(rows, model.layers)
    problems = _problems(chosen, model, rows, source)
    return Opened(path, directory, chosen, raw, model, source, rows, problems, {})


def is_ours(directory: Path) -> bool:
    """Whether a directory is one of this project's checkpoints (perhaps a damaged one)."""
    try:
        top = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (directory / "params").is_dir()
    return isinstance(top, dict) and "schema" in top


def _open_ours(path: Path, verify: bool) -> Opened:
    model, metadata = store.read_header(path, verify=verify)
    source = sources.OrbaxSource(path / "params")
    rows = [Row(name, name) for name in store.named_leaves(store.expected_params(model))]
    problems = _problems(None, model, rows, source)
    return Opened(path, path, None, model.to_dict(), model, source, rows, problems, metadata)


def _open_tree(path: Path, config: Any) -> Opened:
    """A bare Orbax tree of this project's parameters; its config is given, or lies in the directory above."""
    file = path.parent / "config.json" if config is None else config
    values = dict(file) if isinstance(file, Mapping) else store.read_json(Path(file))
    try:
        model = ModelConfig.from_dict(values.get("model", values))
    except ConfigError as error:
        raise CheckpointError(
            f"{path}: an Orbax tree, whose config (--config FILE) is a ModelConfig: {error}"
        ) from error
    source = sources.OrbaxSource(path)
    rows = [Row(name, name) for name in store.named_leaves(store.expected_params(model))]
    problems = _problems(None, model, rows, source)
    return Opened(path, path, None, model.to_dict(), model, source, rows, problems, {})


def _raw_config(directory: Path, source: sources.Source, given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    file = directory / "config.json" if given is None else Path(given)
    if given is None and not file.exists():
        if source.config is None:
            raise CheckpointError(f"{file}: missing; give the model's config with --config FILE")
        return source.config
    return store.read_json(file)


def _recognise(path: Path, raw: dict[str, Any], shapes: Mapping[str, Any], named: str | None) -> Format:
    if named is not None:
        return FORMATS[named]
    found = [f for f in FORMATS.values() if f.says(raw)] or [f for f in FORMATS.values() if f.has_keys(shapes)]
    if len(found) == 1:
        return found[0]
    said = f"model_type {raw.get('model_type')!r}, architectures {raw.get('architectures')!r}"
    names = ", ".join(f.name for f in found) or "no known format"
    raise CheckpointError(
        f"{path}: config ({said}) and keys fit {names}; name the format with --from: {', '.join(FORMATS)}"
    )


def _problems(chosen: Format | None, model: ModelConfig, rows: Sequence[Row], source: sources.Source) -> list[str]:
    """Every missing, unexpected and mis-shaped tensor, and every wrong dtype."""
    expected = store.named_leaves(store.expected_params(model))
    wanted: dict[str, tuple[int, ...]] = {}
    mixed = []
    for row in rows:
        wanted |= dict(zip(row.sources, row.how.shapes(tuple(expected[row.target].shape)), strict=True))
        kinds = {source.infos[name].dtype for name in row.sources if name in source.infos}
        if len(kinds) > 1:
            mixed.append(f"{' and '.join(row.sources)}: dtypes {' and '.join(sorted(kinds))}, expected one for all")
    infos = source.infos
    ignored = () if chosen is None else chosen.ignored
    # A tied head that is written out all the same: compared when it is read.
    spare = {"lm_head.weight"} if chosen is not None and model.tied and "lm_head.weight" not in wanted else set()
    unexpected = [n for n in infos if n not in wanted and not n.endswith(ignored or ("\0",)) and n not in spare]
    problems = [f"missing {n} {list(shape)}" for n, shape in wanted.items() if n not in infos]
    problems += [f"unexpected {n} {list(infos[n].shape)}" for n in unexpected]
    problems += [
        f"{n}: got shape {list(infos[n].shape)}, expected {list(shape)}"
        for n, shape in wanted.items() if n in infos and infos[n].shape != tuple(shape)
    ]  # fmt: skip
    problems += [
        f"{n}: got dtype {infos[n].dtype}, expected {', '.join(_DTYPES)}"
        for n in wanted if n in infos and infos[n].dtype not in _DTYPES
    ]  # fmt: skip
    return problems + mixed


def check_tied_head(opened: Opened) -> None:
    """Raises CheckpointError where the config ties the head to the embedding and the weights do not."""
    infos = opened.source.infos
    if opened.format is None or not opened.model.tied or "lm_head.weight" not in infos:
        return
    embedding = next(row.sources[0] for row in opened.rows if row.target == "embed.embedding")
    same = infos["lm_head.weight"] == infos[embedding]
    if not same or not np.array_equal(
        opened.source.read("lm_head.weight").view(np.uint8), opened.source.read(embedding).view(np.uint8)
    ):
        raise CheckpointError(
            f"{opened.path}: config.json says tie_word_embeddings, but lm_head.weight differs from {embedding}"
        )


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
        return jax.device_put(array, NamedSharding(mesh, store.partition(name, leaf.shape, mesh)))

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
    divergence_tokens: int = 2048,
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
      divergence_tokens: length of the text on which an adapted model is compared with the dense one; 0: not compared.
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
    _check_room(target, opened)
    check_tied_head(opened)
    with store.replacing(target) as scratch:
        write_tokenizer(opened, tokenizer, None, scratch)
        written = _write_weights(opened, to_format, rows, scratch, progress)
        metadata = {"end_tokens": end_tokens(opened), **_provenance(opened)}
        divergence = None
        if adapt and divergence_tokens:
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
    origin = opened.metadata.get("source", {}).get("format")
    if origin not in FORMATS:
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
        origin = opened.metadata.get("source", {})
    if origin.get("format") == to_format and isinstance(origin.get("config"), dict):
        try:
            if chosen.understand(origin["config"], origin.get("shapes", {})) == opened.model:
                return origin["config"], expand(list(chosen.table(opened.model)), opened.model.layers)
        except ConfigError:
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
    elif "source" in opened.metadata:
        source["before"] = opened.metadata["source"]
    return {"source": source, "converter": {"version": VERSION}}


def _seal_foreign(scratch: Path, raw: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Writes ``conversion.json`` (provenance and checksums), and ``config.json`` last."""
    config = json.dumps(raw, indent=2) + "\n"
    files = store.checksums(scratch, sorted(p for p in scratch.rglob("*") if p.is_file()))
    files["config.json"] = {"bytes": len(config.encode()), "sha256": hashlib.sha256(config.encode()).hexdigest()}
    record = json.dumps({**metadata, "files": files}, indent=2) + "\n"
    (scratch / "conversion.json").write_text(record, encoding="utf-8")
    (scratch / "config.json").write_text(config, encoding="utf-8")
