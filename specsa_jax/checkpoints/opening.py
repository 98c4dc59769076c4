"""A checkpoint of any format, recognised and understood but not yet read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specsa_jax.checkpoints import sources, store
from specsa_jax.checkpoints.formats import FORMATS, Format
from specsa_jax.checkpoints.formats.dense import adapted, added_rows
from specsa_jax.checkpoints.transforms import Row, expand
from specsa_jax.checkpoints.trees import CheckpointError, Lazy
from specsa_jax.config import ConfigError, ModelConfig

OURS = "specsa"
_DTYPES = ("float32", "bfloat16", "float16")


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
    def origin(self) -> dict[str, Any]:
        """Where a converted checkpoint says that it came from."""
        source = self.metadata.get("source")
        return source if isinstance(source, dict) else {}

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
    store.refuse_partial(path)
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
    except (OSError, ValueError, RecursionError):
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
    found = [f for f in FORMATS.values() if f.says(raw)]
    if not found and not raw.get("model_type") and not raw.get("architectures"):
        found = [f for f in FORMATS.values() if f.has_keys(shapes)]  # many other models have Llama's keys
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
