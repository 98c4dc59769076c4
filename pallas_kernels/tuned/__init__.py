"""Measured configs, a JSON file per device (``python -m pallas_kernels.tune`` writes them), and how calls find theirs.

A file holds ``schema``, ``device``, ``jax``, and lists of entries, ``attention``, ``selection``, ``commit`` and
``compress`` (older files lack the last two): what was measured (``shape``, and ``sparsity`` of attention; of selection
``rows`` and ``num_blocks``), its best ``config``, ``microseconds``, and ``heuristic_microseconds``, those of the config
that is used without an entry.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

import jax.numpy as jnp

from pallas_kernels import _check
from pallas_kernels.attention.arguments import Shape, Sparsity
from pallas_kernels.attention.config import AttentionConfig, Branch
from pallas_kernels.commit.arguments import Shape as CommitShape
from pallas_kernels.commit.config import CommitConfig
from pallas_kernels.compress.arguments import Shape as CompressShape
from pallas_kernels.compress.config import CompressConfig
from pallas_kernels.selection.config import SelectionConfig

SCHEMA = 1
KINDS = ("attention", "selection", "commit", "compress")
# A call takes an entry of its own heads, queries and block sizes, and of the nearest sizes not above its own.
EXACT = ("num_heads", "num_kv_heads", "head_dim", "width")
NEAREST = ("table", "batch")
# But none that is further off than a doubling of one of them: splits follow the sizes.
_FARTHEST = 1.0
BLOCKS = ("compress_block", "compress_stride", "select_block", "num_selected", "compressed_output")
# Slots do not matter to a commit, which finds one of them by a single load.
COMMIT_EXACT, COMMIT_NEAREST = ("num_kv_heads", "head_dim"), ("batch", "steps")
COMPRESS_EXACT = ("num_kv_heads", "head_dim", "block", "width", "sides", "is_mlp", "itemsize")
COMPRESS_NEAREST = ("batch", "slots")


class TuningError(ValueError):
    """A data file that cannot be used; the message names it and says why."""


def slug(device_kind: str) -> str:
    """The stem of a device's file: ``NVIDIA H200`` → ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


def lookup(
    device_kind: str, sparsity: Sparsity, shape: Shape, group: int | None = None, dtype: Any = "bfloat16"
) -> AttentionConfig | None:
    """The config measured for the call nearest to this one, of the same dtype; None where no entry is near enough.

    ``group`` None: the fastest of those measured there, if the heuristic's is among them: others say nothing of it.
    Raises TuningError for a file that is broken.
    """
    found: dict[tuple[Any, ...], dict[int, tuple[float, Any]]] = {}  # by distance and sizes, and group
    same = (entry for entry in _load(device_kind)["attention"]
            if entry.get("dtype", "bfloat16") == str(jnp.dtype(dtype))
            and all(entry["sparsity"][name] == getattr(sparsity, name) for name in BLOCKS))  # fmt: skip
    for distance, entry in _nearest(same, vars(shape), EXACT, NEAREST, _FARTHEST):
        where = distance, *(entry["shape"][name] for name in NEAREST)
        found.setdefault(where, {})[entry["config"]["group"]] = entry["microseconds"], entry["config"]
    default = AttentionConfig.heuristic(sparsity, shape, group).group
    for _, groups in sorted(found.items()):
        if default in groups:
            chosen = groups[default] if group is not None else min(groups.values(), key=lambda one: one[0])
            return attention_config(chosen[1])
    return None


def lookup_selection(device_kind: str, rows: int, num_blocks: int) -> SelectionConfig | None:
    """The config measured for the nearest ``select_blocks`` of no more rows and blocks; None where there is none."""
    call = {"rows": rows, "num_blocks": num_blocks}
    found = _nearest(_load(device_kind)["selection"], call, (), tuple(call))
    return SelectionConfig(**found[0][1]["config"]) if found else None


def lookup_commit(device_kind: str, shape: CommitShape) -> CommitConfig | None:
    """The config measured for the nearest commit of these heads; None where no entry is near enough."""
    found = _nearest(_load(device_kind)["commit"], vars(shape), COMMIT_EXACT, COMMIT_NEAREST, _FARTHEST)
    return CommitConfig(**found[0][1]["config"]) if found else None


def lookup_compress(device_kind: str, shape: CompressShape) -> CompressConfig | None:
    """The config measured for the nearest call with a φ of these sizes; None where no entry is near enough."""
    found = _nearest(_load(device_kind)["compress"], vars(shape), COMPRESS_EXACT, COMPRESS_NEAREST, _FARTHEST)
    return CompressConfig(**found[0][1]["config"]) if found else None


def _nearest(
    entries: Iterable[dict[str, Any]],
    call: Mapping[str, Any],
    exact: tuple[str, ...],
    nearest: tuple[str, ...],
    farthest: float = math.inf,
) -> list[tuple[float, dict[str, Any]]]:
    """Entries of the call's own ``exact`` sizes and of ``nearest`` ones not above its own, with their distance: the
    doublings of all of these together, ``farthest`` at most. Nearest first, then in the file's order."""
    found = []
    for entry in entries:
        of = entry.get("shape", entry)
        if all(of[name] == call[name] for name in exact) and all(of[name] <= call[name] for name in nearest):
            found.append((sum(math.log2(call[name] / of[name]) for name in nearest), entry))
    return sorted((one for one in found if one[0] <= farthest), key=lambda one: one[0])


def parse(text: str | bytes, name: str) -> dict[str, Any]:
    """A data file's contents, checked. Raises TuningError that names ``name``, and the entry that is wrong."""
    where = name
    try:
        data = json.loads(text)
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r}, expected {SCHEMA}")
        for kind in ("commit", "compress"):
            data.setdefault(kind, [])
        for kind in KINDS:
            if not isinstance(data[kind], list):
                raise ValueError(f"{kind}: got {type(data[kind]).__name__}, expected a list")
            for index, entry in enumerate(data[kind]):
                where = f"{name}: {kind}[{index}]"
                _check_entry(kind, entry)
            where = name
        if not isinstance(data["device"], str):
            raise ValueError(f"device: got {data['device']!r}, expected its name")
    except KeyError as error:
        raise TuningError(f"{where}: lacks {error}; delete it, or tune again") from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise TuningError(f"{where}: {error}; delete it, or tune again") from error
    return data


def _check_entry(kind: str, entry: dict[str, Any]) -> None:
    """Refuses what a lookup would fail at."""
    if kind == "attention":
        attention_config(entry["config"])
        sizes = {name: entry["shape"][name] for name in EXACT + NEAREST}
        sizes |= {name: entry["sparsity"][name] for name in BLOCKS}
    elif kind == "selection":
        SelectionConfig(**entry["config"])
        sizes = {name: entry[name] for name in ("rows", "num_blocks")}
    elif kind == "commit":
        CommitConfig(**entry["config"])
        sizes = vars(CommitShape(**entry["shape"]))
    else:
        sizes = vars(CompressShape(**entry["shape"]))
    for name, size in sizes.items():
        if name not in ("compressed_output", "is_mlp"):
            _check.whole(name, size)
    if kind == "compress" and not CompressConfig(**entry["config"]).fits(CompressShape(**sizes)):
        raise ValueError(f"config {entry['config']} takes more shared memory than there is")
    if math.isnan(microseconds := entry["microseconds"]) or microseconds < 0:
        raise ValueError(f"microseconds: got {microseconds}, expected at least 0")


def attention_config(fields: dict[str, Any]) -> AttentionConfig:
    """The inverse of ``dataclasses.asdict``."""
    branches = {name: Branch(**value) for name, value in fields.items() if isinstance(value, dict)}
    return AttentionConfig(**{**fields, **branches})


@functools.cache
def _load(device_kind: str) -> dict[str, Any]:
    name = f"{slug(device_kind)}.json"
    file = resources.files(__name__).joinpath(name)
    if not file.is_file():
        return {kind: [] for kind in KINDS}
    return parse(file.read_bytes(), f"pallas_kernels/tuned/{name}")
