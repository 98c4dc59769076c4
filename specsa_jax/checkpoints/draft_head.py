"""A draft head on disk: the directory ``draft`` inside its target's checkpoint, or anywhere else.

::

    config.json      schema version, head config, whose head it is, size and SHA-256 of every file of params/
    params/          the parameters, an Orbax PyTree, dtypes as saved
    metadata.json    the training card
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from specsa_jax.checkpoints import store
from specsa_jax.checkpoints.store import CheckpointError
from specsa_jax.config import ModelConfig
from specsa_jax.drafting import head_model
from specsa_jax.drafting.head_model import HeadConfig

DIRECTORY = "draft"


@dataclasses.dataclass(frozen=True)
class DraftHead:
    """A loaded head.

    Attributes:
      params: nested dict of ``jax.Array``, in the layout of ``head_model.init_params``.
      config: its config.
      target: :func:`fingerprint` of the model that it was trained on.
      tokenizer: :func:`tokenizer_digest` of that model's tokenizer.
      metadata: the training card, as JSON values.
    """

    params: dict[str, Any]
    config: HeadConfig
    target: str
    tokenizer: str
    metadata: dict[str, Any]


def fingerprint(config: ModelConfig, params: dict[str, Any]) -> str:
    """SHA-256 (hex) of a model's config and of a few hundred values of each parameter, spread evenly.

    Values count as bfloat16: a float32 model and its export have one fingerprint. Settings at their defaults do not
    count: a later version with more of them gives a model the same fingerprint.
    """
    state = hashlib.sha256(json.dumps(_settings(config), sort_keys=True).encode())
    for name, leaf in sorted(store.named_leaves(params).items()):
        flat = leaf.reshape(-1)
        taken = np.asarray(flat[:: max(1, flat.size // 256)], jnp.bfloat16)
        state.update(f"\0{name}{list(leaf.shape)}".encode() + taken.tobytes())
    return state.hexdigest()


def _settings(config: Any) -> dict[str, Any]:
    """The fields of a frozen config that are not at their defaults."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = _settings(value)
        elif value != field.default:
            found[field.name] = value
    return found


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of a tokenizer's vocabulary: which token has which id."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def differences(theirs: ModelConfig, ours: ModelConfig) -> str:
    """The fields in which two configs differ, in words."""
    a, b = theirs.to_dict(), ours.to_dict()
    return "; ".join(f"{name} {a[name]!r}, not {b[name]!r}" for name in a if a[name] != b[name])


def check_target(head: DraftHead, config: ModelConfig, params: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raises CheckpointError unless ``head`` was trained on this very model with this vocabulary."""
    if head.tokenizer != tokenizer_digest(tokenizer):
        raise CheckpointError("draft head: was trained with another tokenizer than the target's")
    if head.config.target != config:
        raise CheckpointError(
            f"draft head: belongs to a target of another config: {differences(head.config.target, config)}"
        )
    if head.target != fingerprint(config, params):
        raise CheckpointError(
            "draft head: belongs to another target: the config is the same, the weights are not; "
            "train one with specsa train-draft"
        )


def save(path: str | os.PathLike[str], head: DraftHead, *, overwrite: bool = False) -> Path:
    """Writes a head's directory beside ``path``, then renames it into place.

    Raises CheckpointError when ``path`` exists (without ``overwrite``), cannot be written, or the parameters do not
    fit the config.
    """
    path = Path(path)
    store.check_target(path, overwrite)
    store.fit(expected_params(head.config), store.named_leaves(head.params), where="params")
    with store.replacing(path, overwrite) as scratch:
        store.write_tree(scratch / "params", head.params)
        (scratch / "metadata.json").write_text(json.dumps(head.metadata, indent=2) + "\n", encoding="utf-8")
        checked = sorted(p for p in (scratch / "params").rglob("*") if p.is_file())
        top = {"schema": store.SCHEMA, "head": head.config.to_dict(), "target": head.target,
               "tokenizer": head.tokenizer, "files": store.checksums(scratch, checked)}  # fmt: skip
        (scratch / "config.json").write_text(json.dumps(top, indent=2) + "\n", encoding="utf-8")
    return path


def _directory(path: str | os.PathLike[str]) -> Path:
    """The directory of the head that ``path`` is or has. Raises CheckpointError."""
    where = store.resolve(path)
    if (where / DIRECTORY / "config.json").is_file():
        return where / DIRECTORY
    if "model" in store.read_json(where / "config.json"):
        raise CheckpointError(f"{where}: has no draft head ({DIRECTORY}/); train one with specsa train-draft --install")
    return where


def read_config(path: str | os.PathLike[str]) -> HeadConfig:
    """The config alone of the head that :func:`load` reads. Raises CheckpointError."""
    return store.read_top(_directory(path), "head", HeadConfig)[1]


def load(path: str | os.PathLike[str], *, verify: bool = True) -> DraftHead:
    """Reads a head's directory; ``path`` may also be a checkpoint that has one inside, or a packaged name.

    Raises CheckpointError: no such directory, a checkpoint without a head, unknown schema, missing or corrupt files,
    or weights that do not fit the config.
    """
    where = _directory(path)
    top, config = store.read_top(where, "head", HeadConfig)
    store.check_files(where, top.get("files"), verify)
    metadata = store.read_json(where / "metadata.json")
    for name in ("target", "tokenizer"):
        if not isinstance(top.get(name), str):
            raise CheckpointError(f"{where / 'config.json'}: {name}: got {top.get(name)!r}, expected a SHA-256")
    params = store.read_tree(where / "params", expected_params(config))
    return DraftHead(params, config, top["target"], top["tokenizer"], metadata)


def expected_params(config: HeadConfig) -> dict[str, Any]:
    """The parameters' tree as ``jax.ShapeDtypeStruct`` leaves; nothing is allocated."""
    return jax.eval_shape(lambda: head_model.init_params(config, 0))
