"""What was measured of a checkpoint's approximations, in one file inside its directory.

::

    precision.json   schema version, fingerprint of the model, measured divergences, schedules that a search has found
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pallas_kernels.attention.config import GroupMode
from specsa_jax.checkpoints.store import CheckpointError, read_json, write_text
from specsa_jax.config import ConfigError, _Config, _require
from specsa_jax.schedule import Sharing

FILE, SCHEMA = "precision.json", 1


@dataclasses.dataclass(frozen=True)
class Text(_Config):
    """Calibration text: where it is from, in words, its tokens, and the SHA-256 of these as little-endian int32."""

    source: str
    tokens: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class AtContext(_Config):
    """A strategy's divergence from class exact behind so many tokens of context, over teacher-forced tokens.

    Attributes:
      context: tokens that were read exactly before; then ``tokens`` of ``windows`` places were scored.
      loss: of class exact, nats a token; ``loss_change``: what the approximation adds.
      mean_kl, p99_kl: Kullback-Leibler divergence of its next-token distribution from the exact one, nats: mean and
        99th percentile over the tokens.
      top1: the fraction of tokens after which both hold the same next token for the most probable.
      …_error: standard error, from the spread between windows (tokens of one window depend on each other).
      …_bound: one-sided confidence bound.
    """

    context: int
    windows: int
    tokens: int
    loss: float
    mean_kl: float
    mean_kl_error: float
    mean_kl_bound: float
    p99_kl: float
    top1: float
    top1_error: float
    top1_bound: float
    loss_change: float
    loss_change_error: float

    def __post_init__(self) -> None:
        self._check_types()


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A strategy's divergence at several context lengths.

    Attributes:
      sharing: what approximates; ``width``: T of a step's chain where queries share (0 where it has no influence).
      confidence: of the bounds, at each context length.
      dtype: of the computation: it says nothing of another, which rounds otherwise.
      text: the calibration text.
      contexts: the figures, by context length.
    """

    sharing: Sharing
    width: int
    confidence: float
    dtype: str
    text: Text
    contexts: tuple[AtContext, ...]

    @property
    def mean_kl(self) -> float:
        """The confidence bound of the mean KL at the context length where it is worst."""
        return max(at.mean_kl_bound for at in self.contexts)

    @property
    def top1(self) -> float:
        """The confidence bound of the top-1 agreement at the context length where it is worst."""
        return min(at.top1_bound for at in self.contexts)

    @property
    def reach(self) -> int:
        """The longest context that it speaks of, tokens."""
        return max(at.context + at.tokens // at.windows for at in self.contexts)

    @property
    def key(self) -> tuple[Sharing, int, str]:
        """What it is stored by: one of another dtype stands beside it."""
        return *measured_as(self.sharing, self.width), self.dtype

    def describe(self) -> str:
        """The strategy in words, by which another measurement's differs."""
        return self.sharing.describe() + (f", T = {self.width}" if self.width else "")


@dataclasses.dataclass(frozen=True)
class Searched(_Config):
    """A schedule that greedy search has found, and its mean KL, with standard error, on the search's text."""

    schedule: str
    keep_compressed: bool
    mean_kl: float
    mean_kl_error: float
    text: Text

    def __post_init__(self) -> None:
        self._check_types()
        _require(isinstance(self.schedule, str) and set(self.schedule) <= {"F", "S"} and self.schedule[:1] == "F",
                 f"schedule: got {self.schedule!r}, expected a letter a layer, F first")  # fmt: skip

    @property
    def refresh(self) -> int:
        """Refresh layers."""
        return self.schedule.count("F")


@dataclasses.dataclass(frozen=True)
class Records:
    """The file's content; ``model`` is :func:`specsa_jax.checkpoints.draft_head.fingerprint` of the checkpoint."""

    model: str
    measurements: tuple[Measurement, ...] = ()
    searched: tuple[Searched, ...] = ()

    def find(self, sharing: Sharing, width: int) -> dict[str, Measurement]:
        """The measurements of what verification of ``width`` tokens a step does, by dtype."""
        key = measured_as(sharing, width)
        return {m.dtype: m for m in self.measurements if m.key[:2] == key}

    def schedule(self, refresh: int, keep_compressed: bool) -> str | None:
        """The schedule that the search has found for so many refresh layers."""
        found = (s for s in self.searched if s.refresh == refresh and s.keep_compressed == keep_compressed)
        return next((s.schedule for s in found), None)

    def with_(self, measurements: tuple[Measurement, ...] = (), searched: tuple[Searched, ...] = ()) -> Records:
        """With new ones in place of older ones of the same things."""
        measured = {m.key: m for m in (*self.measurements, *measurements)}
        schedules = {(s.refresh, s.keep_compressed): s for s in (*self.searched, *searched)}
        return Records(self.model, tuple(measured.values()), tuple(schedules.values()))


def measured_as(sharing: Sharing, width: int) -> tuple[Sharing, int]:
    """The sharing and T that a measurement is found by: merged groups, and T without shared ones, change nothing."""
    if sharing.group_mode == "merged":
        return dataclasses.replace(sharing, group=0), 0
    return dataclasses.replace(sharing, group=min(sharing.group, width)), width


def load(directory: Path, model: str) -> Records:
    """The records of the checkpoint in ``directory`` whose fingerprint is ``model``; empty where there is no file.

    Raises CheckpointError for a file that is damaged, of another schema, or of another model.
    """
    file = directory / FILE
    if not file.exists():
        return Records(model)
    values = read_json(file)
    if values.get("schema") != SCHEMA:
        raise CheckpointError(f"{file}: schema: got {values.get('schema')!r}, expected {SCHEMA}")
    if values.get("model") != model:
        raise CheckpointError(
            f"{file}: was measured on another model; measure this one with specsa precision, after removing the file"
        )
    try:
        return Records(
            model,
            tuple(_measurement(m) for m in values["measurements"]),
            tuple(Searched.from_dict(s) for s in values["searched"]),
        )
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged: {type(error).__name__}: {error}") from error


def stamp(directory: Path) -> tuple[int, ...] | None:
    """What differs as soon as the records of ``directory`` were written anew; None where there are none."""
    try:
        found = (directory / FILE).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def save(directory: Path, records: Records) -> Path:
    """Writes the file beside its place, then renames it. Raises CheckpointError where it cannot be written."""
    values = {"schema": SCHEMA, **dataclasses.asdict(records)}
    return write_text(directory / FILE, json.dumps(values, indent=1) + "\n")


def _measurement(values: dict[str, Any]) -> Measurement:
    contexts = tuple(AtContext.from_dict(at) for at in values["contexts"])
    mode: GroupMode = values["sharing"]["group_mode"]
    _require(bool(contexts) and mode in ("merged", "shared"), "measurements: got no context, or another group_mode")
    return Measurement(
        Sharing(**values["sharing"]), int(values["width"]), float(values["confidence"]), str(values["dtype"]),
        Text.from_dict(values["text"]), contexts,
    )  # fmt: skip
