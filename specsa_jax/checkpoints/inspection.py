"""What a checkpoint holds, without reading its weights: :func:`inspect`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specsa_jax.cache import cache_bytes, pages_for
from specsa_jax.checkpoints import opening, store
from specsa_jax.checkpoints.trees import CheckpointError
from specsa_jax.config import ModelConfig, NSAConfig
from specsa_jax.nsa import kernels

CONTEXTS, BATCHES = (4096, 16384, 65536, 131072), (1, 8, 32)


def inspect(
    path: str | os.PathLike[str],
    *,
    from_format: str | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] = BATCHES,
    verify: bool = False,
) -> dict[str, Any]:
    """A report on a checkpoint of any known format, as JSON-ready values.

    Memory is planned for ``contexts`` (None: those of CONTEXTS that the model takes, or its ``max_length``) and
    ``batches``.

    Keys: ``format``, ``model`` (the config as understood), ``switches`` (NSAConfig's fields that differ from their
    defaults), ``kernels`` (None, or why the GPU kernels do not take it), ``parts`` (parameters by part),
    ``parameters``, ``dtypes``, ``weight_bytes``, ``problems`` (missing, unexpected, mis-shaped tensors, wrong dtypes),
    ``memory`` (bytes of weights and bfloat16 cache by context and batch), ``source`` (where it was converted from),
    ``notes``, ``verified`` (files compared; None without ``verify``).

    Raises CheckpointError: nothing there, not understood, or (``verify``) damaged or without checksums.
    """
    opened = opening.open_checkpoint(path, from_format, config=config, verify=verify)
    model, infos = opened.model, opened.source.infos
    weight_bytes = sum(math.prod(info.shape) * _itemsize(info.dtype) for info in infos.values())
    shapes = {name: x.shape for name, x in store.named_leaves(store.expected_params(model)).items()}
    defaults = NSAConfig()
    contexts = contexts or [c for c in CONTEXTS if c <= model.max_length] or [model.max_length]
    record = _record(opened)
    return {
        "path": str(opened.path),
        "format": opened.format_name,
        "title": "SpecSA-JAX checkpoint" if opened.format is None else opened.format.title,
        "model": model.to_dict(),
        "switches": {
            field.name: getattr(model.nsa, field.name)
            for field in dataclasses.fields(NSAConfig)
            if getattr(model.nsa, field.name) != getattr(defaults, field.name)
        },
        "kernels": kernels.limit(model.nsa, model.max_length),
        "parts": _parts(shapes),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "dtypes": _dtypes(opened),
        "weight_bytes": weight_bytes,
        "problems": opened.problems,
        "memory": [_memory(model, weight_bytes, context, batch) for context in contexts for batch in batches],
        "source": record["source"] if isinstance(record.get("source"), dict) else None,
        "notes": [] if opened.format is None else list(opened.format.notes),
        "verified": _verify(opened, record) if verify else None,
    }


def _itemsize(dtype: str) -> int:
    try:
        return np.dtype(dtype).itemsize
    except TypeError:
        return 1  # one of the byte-sized types that NumPy lacks


def _parts(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Parameters by part of the model."""
    parts = dict.fromkeys(("embedding", "attention", "compression", "gates", "mlp", "norms", "head"), 0)
    for name, shape in shapes.items():
        owner = name.split(".")[-2]
        if owner == "embed":
            part = "embedding"
        elif owner == "head":
            part = "head"
        elif "norm" in owner:
            part = "norms"
        elif ".mlp." in name:
            part = "mlp"
        elif owner.startswith("compress"):
            part = "compression"
        else:
            part = "gates" if owner.startswith("gate") else "attention"
        parts[part] += math.prod(shape)
    return parts


def _dtypes(opened: opening.Opened) -> dict[str, int]:
    """Elements by dtype."""
    counts: dict[str, int] = {}
    for info in opened.source.infos.values():
        counts[info.dtype] = counts.get(info.dtype, 0) + math.prod(info.shape)
    return counts


def _memory(model: ModelConfig, weight_bytes: int, context: int, batch: int) -> dict[str, int]:
    cache = cache_bytes(model, batch * pages_for(model.nsa, context), batch, np.dtype("float16")).total
    return {"context": context, "batch": batch, "cache": cache, "total": cache + weight_bytes}


def _record(opened: opening.Opened) -> dict[str, Any]:
    """What a conversion left: this project's metadata, or ``conversion.json`` beside foreign weights."""
    if opened.format is None:
        return opened.metadata
    file = opened.directory / "conversion.json"
    return store.read_json(file) if file.exists() else {}


def _verify(opened: opening.Opened, record: Mapping[str, Any]) -> int:
    """Compares checksums; how many files. This project's own were compared as they were opened."""
    if opened.format is None:
        return len(store.read_json(opened.path / "config.json")["files"])
    files = record.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{opened.path}: has no checksums; only converted checkpoints carry them")
    store.check_files(opened.directory, files, verify=True)
    return len(files)
