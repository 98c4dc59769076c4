"""Measured configs, a JSON file per device (``python -m pallas_kernels.tune`` writes them), and how calls find theirs.

A file holds ``schema``, ``device``, ``jax``, and two lists of entries, ``attention`` and ``selection``: what was
measured (``shape`` and ``sparsity``, or ``rows`` and ``num_blocks``), its best ``config``, ``microseconds``, and
``heuristic_microseconds``, those of the config that is used without an entry.
"""

from __future__ import annotations

import functools
import json
import math
import re
from importlib import resources
from typing import Any

from pallas_kernels.attention.arguments import Shape, Sparsity
from pallas_kernels.attention.config import AttentionConfig, Branch
from pallas_kernels.selection.config import SelectionConfig

SCHEMA = 1
# A call takes an entry of its own heads, queries and block sizes, and of the nearest sizes not above its own.
EXACT = ("num_heads", "num_kv_heads", "head_dim", "width")
NEAREST = ("table", "batch")
# But none that is further off than a doubling of one of them: splits follow the sizes.
_FARTHEST = 1.0
BLOCKS = ("compress_block", "compress_stride", "select_block", "num_selected", "compressed_output")


class TuningError(ValueError):
    """A data file that cannot be used; the message names it and says why."""


def slug(device_kind: str) -> str:
    """The stem of a device's file: ``NVIDIA H200`` → ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


def lookup(device_kind: str, sparsity: Sparsity, shape: Shape, group: int | None = None) -> AttentionConfig | None:
    """The config measured for the call nearest to this one; None where no entry is near enough.

    ``group`` None: the fastest of those measured there, if the heuristic's is among them: others say nothing of it.
    Raises TuningError for a file that is broken.
    """
    found: dict[tuple[Any, ...], dict[int, tuple[float, Any]]] = {}  # by distance and sizes, and group
    for entry in _load(device_kind)["attention"]:
        of, blocks = entry["shape"], entry["sparsity"]
        if (
            all(of[name] == getattr(shape, name) for name in EXACT)
            and all(blocks[name] == getattr(sparsity, name) for name in BLOCKS)
            and all(of[name] <= getattr(shape, name) for name in NEAREST)
        ):
            distance = sum(math.log2(getattr(shape, name) / of[name]) for name in NEAREST)
            measured = entry["microseconds"], entry["config"]
            where = distance, *(of[name] for name in NEAREST)
            found.setdefault(where, {})[entry["config"]["group"]] = measured
    default = AttentionConfig.heuristic(sparsity, shape, group).group
    for (distance, *_), groups in sorted(found.items()):
        if distance <= _FARTHEST and default in groups:
            chosen = groups[default] if group is not None else min(groups.values(), key=lambda one: one[0])
            return attention_config(chosen[1])
    return None


def lookup_selection(device_kind: str, rows: int, num_blocks: int) -> SelectionConfig | None:
    """The config measured for the nearest ``select_blocks`` of no more rows and blocks; None where there is none."""
    candidates = [
        (math.log2(max(rows, 1) / entry["rows"]) + math.log2(num_blocks / entry["num_blocks"]), number, entry["config"])
        for number, entry in enumerate(_load(device_kind)["selection"])
        if entry["rows"] <= rows and entry["num_blocks"] <= num_blocks
    ]
    return SelectionConfig(**min(candidates)[-1]) if candidates else None


def parse(text: str, name: str) -> dict[str, Any]:
    """A data file's contents, checked. Raises TuningError that names ``name``."""
    try:
        data = json.loads(text)
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r}, expected {SCHEMA}")
        for entry in data["attention"]:
            attention_config(entry["config"])
            for field in ("shape", "sparsity"):
                {key: entry[field][key] for key in (EXACT + NEAREST if field == "shape" else BLOCKS)}
            float(entry["microseconds"])
        for entry in data["selection"]:
            SelectionConfig(**entry["config"])
            {key: entry[key] for key in ("rows", "num_blocks", "microseconds")}
    except KeyError as error:
        raise TuningError(f"{name}: lacks {error}; delete it, or tune again") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise TuningError(f"{name}: {error}; delete it, or tune again") from error
    return data


def attention_config(fields: dict[str, Any]) -> AttentionConfig:
    """The inverse of ``dataclasses.asdict``."""
    branches = {name: Branch(**value) for name, value in fields.items() if isinstance(value, dict)}
    return AttentionConfig(**{**fields, **branches})


@functools.cache
def _load(device_kind: str) -> dict[str, Any]:
    name = f"{slug(device_kind)}.json"
    file = resources.files(__name__).joinpath(name)
    if not file.is_file():
        return {"attention": [], "selection": []}
    return parse(file.read_text(encoding="utf-8"), f"pallas_kernels/tuned/{name}")
