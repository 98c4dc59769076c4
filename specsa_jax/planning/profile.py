"""The profile: what was measured of a checkpoint on a device, in one JSON file. ``specsa profile`` makes it."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pallas_kernels.tuned import slug
from specsa_jax.checkpoints.records import Measurement, Text
from specsa_jax.checkpoints.store import write_text
from specsa_jax.drafting import parse_tree
from specsa_jax.schedule import Sharing

# Integers in a file: those that a float holds exactly, too.
_LARGEST = 2**53
SCHEMA = 2  # 1: a step's seconds had a share of a call's


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the file, what it has and what was expected."""


def _at_least(of: Any, least: float, *names: str) -> None:
    for name in names:
        if getattr(of, name) < least:
            raise ProfileError(f"{type(of).__name__}.{name}: got {getattr(of, name)}, expected at least {least:g}")


@dataclasses.dataclass(frozen=True)
class Point:
    """What the time of a verification step depends on.

    Attributes:
      batch: B, sequences.
      context: C, tokens in the cache; for XLA's path, which computes over whole page tables, what the table has room
        for (:meth:`specsa_jax.engine.Engine` rounds it to an eighth of its power of two).
      width: T, tokens that a step verifies for each sequence, the pending one included; 1 decodes one token.
      chain: the tokens are a chain; else a tree.
      sharing: schedule and groups.
      precision: "exact" or "strict"; what class approx does is in ``sharing``.
    """

    batch: int
    context: int
    width: int
    chain: bool = True
    sharing: Sharing = Sharing()
    precision: Literal["exact", "strict"] = "exact"

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch", "context", "width")


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds that a step adds to a call, drafting left out: median, least and most of several calls."""

    point: Point
    seconds: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.seconds <= self.high:
            raise ProfileError(f"StepTime: got {self.low}, {self.seconds}, {self.high}, expected 0 < low <= seconds <= "
                               "high")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DraftTime:
    """Seconds that a drafter takes in a step: to propose a tree, and to observe what is accepted.

    ``drafter`` and ``tree`` are as :func:`specsa_jax.drafting.drafter_from_name` and ``parse_tree`` read them.
    """

    drafter: str
    tree: str
    batch: int
    context: int
    seconds: float

    def __post_init__(self) -> None:
        parse_tree(self.tree)
        _at_least(self, 1, "batch", "context")
        _at_least(self, 0.0, "seconds")


@dataclasses.dataclass(frozen=True)
class PrefillTime:
    """Seconds to read prompts of so many tokens, ``batch`` of them together."""

    batch: int
    tokens: int
    seconds: float

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch", "tokens")
        _at_least(self, 0.0, "seconds")


@dataclasses.dataclass(frozen=True)
class Prior:
    """How a drafter fared on calibration text, which is not the user's: greedy, histograms over sequences' steps.

    Attributes:
      text: "continuation" of a text, or "edit": its beginning once more, with another name for something.
      context: tokens of the prompt.
      steps: of sequences.
      drafted: of these, by the depth of the draft, from 0 on; ``accepted``: by drafted tokens that stood.
      nodes: drafted tokens, all branches.
    """

    drafter: str
    tree: str
    text: Literal["continuation", "edit"]
    context: int
    steps: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    nodes: int

    def __post_init__(self) -> None:
        parse_tree(self.tree)
        _at_least(self, 1, "context", "steps")
        _at_least(self, 0, "nodes")
        for name in ("drafted", "accepted"):
            counts = getattr(self, name)
            if min(counts, default=-1) < 0 or sum(counts) != self.steps:
                raise ProfileError(f"Prior.{name}: got {counts}, expected counts that add up to {self.steps} steps")
        if any(sum(self.accepted[depth:]) > sum(self.drafted[depth:]) for depth in range(1, len(self.accepted))):
            raise ProfileError(
                f"Prior.accepted: got {self.accepted}, expected no more than was drafted, {self.drafted}"
            )


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The fraction of a query's selected blocks that the query ``distance`` tokens before it selected too.

    Attributes:
      layer: from 0; context: tokens before the queries; distance: 1 for neighbours.
      shared: mean over queries, KV heads and places in the text, forced blocks included.
      free: the same of the blocks that are not forced (first, own, before); 0 where there are none.
    """

    layer: int
    context: int
    distance: int
    shared: float
    free: float

    def __post_init__(self) -> None:
        _at_least(self, 0, "layer", "shared", "free")
        _at_least(self, 1, "context", "distance")
        if max(self.shared, self.free) > 1:
            raise ProfileError(f"Overlap: got {self.shared}, {self.free}, expected fractions")


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """Relative error of step times between the measured ones: of each point, from all the others (leave-one-out)."""

    points: int
    median: float
    p90: float
    worst: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """What was measured of one model on one device.

    Attributes:
      fingerprint: of the model (:func:`specsa_jax.checkpoints.draft_head.fingerprint`).
      device: the kind of device, as JAX names it.
      versions: of what it was measured with; of a CPU, the processor and its cores.
      dtype, implementation: of computation and cache; of attention.
      max_context: tokens, the longest measured.
      bandwidth, flops, overhead: bytes/s of a copy, operations/s of a matmul, seconds of a small operation in a
        compiled loop (:func:`specsa_jax.planning.costs.measure_bandwidth`).
      steps, drafts, prefills, priors, overlaps: what was measured.
      measurements: divergence of approximate strategies.
      text: the calibration text of priors and overlaps; None without any.
      interpolation: the error between the measured step times; None with fewer than 3.
      seconds: spent measuring, compilation included.
    """

    fingerprint: str
    device: str
    versions: dict[str, str]
    dtype: str
    implementation: Literal["xla", "pallas"]
    max_context: int
    bandwidth: float
    flops: float
    overhead: float
    steps: tuple[StepTime, ...] = ()
    drafts: tuple[DraftTime, ...] = ()
    prefills: tuple[PrefillTime, ...] = ()
    priors: tuple[Prior, ...] = ()
    overlaps: tuple[Overlap, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    text: Text | None = None
    interpolation: Interpolation | None = None
    seconds: float = 0.0
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _at_least(self, 1.0, "bandwidth", "flops")
        if not 0 < self.overhead <= 1:
            raise ProfileError(f"Profile.overhead: got {self.overhead}, expected seconds, above 0 and at most 1")


def default_path(checkpoint: Path, device: str) -> Path:
    """The profile of a device of kind ``device`` in the directory of a checkpoint."""
    return checkpoint / f"profile-{slug(device)}.json"


def save(path: Path, profile: Profile) -> Path:
    """Writes the file beside its place, then renames it. Raises CheckpointError where it cannot be written."""
    return write_text(path, json.dumps(dataclasses.asdict(profile), indent=1, allow_nan=False) + "\n")


def load(
    path: Path,
    *,
    fingerprint: str,
    device: str,
    allow_mismatch: bool = False,
    dtype: str | None = None,
    implementation: str | None = None,
) -> Profile:
    """The profile in ``path``, if it is of this model and of this kind of device.

    Args:
      fingerprint: of the model; allow_mismatch does not override it.
      device: its kind, as JAX names it.
      allow_mismatch: take one of another device, dtype or implementation.
      dtype, implementation: of the engine; None: whatever it was measured with.

    Raises ProfileError, with the reason: a file that is missing, truncated, damaged, of another schema, of another
    model, or (without allow_mismatch) measured otherwise.
    """
    profile = read(path)
    if profile.fingerprint != fingerprint:
        raise ProfileError(f"profile: {path} was measured on another model (fingerprint {profile.fingerprint:.12}), "
                           f"expected {fingerprint:.12}; measure this one with specsa profile, into another file"
                           )  # fmt: skip
    for name, wanted in (("device", device), ("dtype", dtype), ("implementation", implementation)):
        got = getattr(profile, name)
        if wanted is not None and got != wanted and not allow_mismatch:
            raise ProfileError(f"profile: {path}: {name}: got {got!r}, expected {wanted!r}; measure here with specsa "
                               "profile, or allow the mismatch (--allow-mismatch)")  # fmt: skip
    return profile


def read(path: Path) -> Profile:
    """The profile in ``path``, of whatever model and device. Raises ProfileError as :func:`load`."""
    values = _json(path)
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise ProfileError(f"profile: {path}: schema: got {schema!r}, expected {SCHEMA}; measure anew with specsa "
                           "profile --again, into another file where this is no profile")  # fmt: skip
    try:
        return _value(Profile, values, "Profile")
    except ValueError as error:
        raise ProfileError(f"profile: {path}: damaged: {error}") from error


def is_profile(path: Path) -> bool:
    """Whether the file is one at all, of whatever schema: what may be replaced by another. Raises ProfileError where it
    cannot be read."""
    values = _json(path)
    return isinstance(values, dict) and {"schema", "fingerprint", "device"} <= set(values)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"profile: got {str(path)!r}, expected a readable file: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"profile: {path}: truncated or damaged, remove it or name another: {error}") from error


_hints = functools.cache(get_type_hints)


def _value(hint: Any, value: Any, where: str) -> Any:
    """JSON's ``value`` as the type ``hint``. Raises ProfileError that says ``where`` it is not."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        fields = {field.name: field for field in dataclasses.fields(hint)}
        if not isinstance(value, dict) or set(value) != set(fields):
            got = ", ".join(sorted(value)) if isinstance(value, dict) else repr(value)
            raise ProfileError(f"{where}: got {got:.200}, expected the fields {', '.join(fields)}")
        found = {name: _value(_hints(hint)[name], value[name], f"{where}.{name}") for name in fields}
        try:
            return hint(**found)
        except ValueError as error:
            raise ProfileError(f"{where}: {error}") from error
    kind, choices = get_origin(hint), get_args(hint)
    if kind is types.UnionType:  # X | None
        return None if value is None else _value(choices[0], value, where)
    if kind is tuple and isinstance(value, list):
        return tuple(_value(choices[0], one, f"{where}[{index}]") for index, one in enumerate(value))
    if kind is dict and isinstance(value, dict):
        return {key: _value(choices[1], one, f"{where}.{key}") for key, one in value.items()}
    if kind is Literal and value in choices:
        return value
    if hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if hint is int and type(value) is int and abs(value) <= _LARGEST:
        return value
    if hint in (str, bool) and type(value) is hint:
        return value
    wanted = " or ".join(map(repr, choices)) if kind is Literal else getattr(kind or hint, "__name__", str(hint))
    wanted += " of at most 2**53" if hint is int else ""
    raise ProfileError(f"{where}: got {value!r:.80}, expected {wanted}")
