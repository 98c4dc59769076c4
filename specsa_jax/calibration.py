"""Calibration text: what precision is measured on and schedules are searched on."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from specsa_jax.checkpoints import store
from specsa_jax.checkpoints.records import Text
from specsa_jax.training import data as corpus
from specsa_jax.training.config import TrainingError

# Fewer windows say nothing: the standard error itself would be off by a quarter.
MIN_WINDOWS = 8

# Searching and measuring take turns along the text: no token that is measured has been searched on.
Part = Literal["measure", "search"]


class CalibrationError(ValueError):
    """Calibration text that cannot be read, or is too small to state anything."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A stream of tokens int32 [N], and where it is from."""

    stream: np.ndarray
    source: str

    @property
    def text(self) -> Text:
        """Its description, for the records."""
        digest = hashlib.sha256(np.ascontiguousarray(self.stream, "<i4").tobytes()).hexdigest()
        return Text(self.source, len(self.stream), digest)

    def windows(self, context: int, tokens: int, count: int, part: Part = "measure") -> np.ndarray:
        """Up to ``count`` rows int32 [n, context + tokens + 1], spread evenly over the text.

        Of a row the first ``context`` tokens are read, the next ``tokens`` scored, each against the one after it.
        Scored tokens lie in no two rows, nor in rows of both parts.

        Raises CalibrationError unless there are MIN_WINDOWS rows, and for sizes below 1.
        """
        for name, value in (("context", context), ("tokens", tokens)):
            if value < 1:
                raise CalibrationError(f"{name}: got {value}, expected at least 1")
        if count < MIN_WINDOWS:
            raise CalibrationError(f"windows: got {count}, expected at least {MIN_WINDOWS}, or there is nothing to say "
                                   "of the error")  # fmt: skip
        places = np.arange(max(0, (len(self.stream) - 1 - context) // tokens))[part == "measure" :: 2]
        if len(places) < MIN_WINDOWS:
            raise CalibrationError(
                f"calibration text: {len(self.stream)} tokens of {self.source} make {len(places)} windows of {tokens} "
                f"tokens behind {context} of context, expected at least {MIN_WINDOWS}: about "
                f"{context + 1 + 2 * MIN_WINDOWS * tokens} tokens; give more text, or a shorter context"
            )
        count = min(count, len(places))
        starts = places[np.arange(count) * len(places) // count] * tokens
        return self.stream[starts[:, None] + np.arange(context + tokens + 1)]


@dataclasses.dataclass(frozen=True)
class _Sources:
    """As :class:`specsa_jax.training.data.Sources`."""

    data: tuple[str, ...]
    glob: str
    exclude: tuple[str, ...]
    skip_undecodable: bool
    holdout: float


def read_calibration(
    checkpoint: str | os.PathLike[str], tokenizer: Tokenizer, paths: Sequence[str] = (), glob: str = "**/*.py"
) -> Calibration:
    """The text of files and directories (of these, the files that match ``glob``); without ``paths``, the files that
    the checkpoint's card says were held out of its training, of packages as far as they are installed here.

    Raises CalibrationError: no such path, no text, a file that is not UTF-8, a card that names no files.
    """
    where = store.resolve(checkpoint)
    try:
        if paths:
            sources = _Sources(tuple(map(str, paths)), glob, (), False, 0.0)
            texts = [_read(file) for path in sources.data for _, file in corpus.find_files(path, sources)]
            documents = [corpus.Document("", text, True) for text in dict.fromkeys(texts) if text]
            source = ", ".join(sources.data)
        else:
            sources = _installed(_card_sources(store.read_json(where / "metadata.json")))
            documents = corpus.read_corpus(sources).split(held_out=True)
            source = f"held-out files of {', '.join(sources.data)}"
    except TrainingError as error:
        raise CalibrationError(f"calibration text: {error}") from error
    if not documents:
        raise CalibrationError(f"calibration text: got no text in {source} (glob {glob!r}), expected some")
    return Calibration(corpus.encode(documents, tokenizer), source)


def edited(tokenizer: Tokenizer, ids: Sequence[int], tokens: int) -> list[int]:
    """A prompt of up to ``tokens`` tokens whose continuation is an edit: the first two thirds of ``ids``, then the
    first half of a copy of them in which the commonest name (or word of four letters or more) is another.

    Raises CalibrationError for text without any.
    """
    kept = list(ids[: 2 * tokens // 3])
    text = tokenizer.decode(kept)
    names = collections.Counter(name for name in re.findall(r"\b[a-z_]{4,}\b", text) if name not in ("self", "return"))
    if not names:
        raise CalibrationError(f"calibration text: got {text!r:.60} without a name in lower case, which an edit could "
                               "change, expected words or code")  # fmt: skip
    name = names.most_common(1)[0][0]
    copy = tokenizer.encode(re.sub(rf"\b{name}\b", f"new_{name}", text)).ids
    return [*kept, *copy[: tokens // 3]]


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"calibration text: {file}: not UTF-8 at byte {error.start} ({error.reason})") from error
    except OSError as error:
        raise CalibrationError(f"calibration text: {file}: cannot be read: {error.strerror}") from error


def _installed(sources: _Sources) -> _Sources:
    """Without packages that this machine lacks: what was held out of the others is held out all the same."""
    here = (one for one in sources.data if not one.startswith(corpus.INSTALLED) or corpus.locate(one).is_dir())
    return dataclasses.replace(sources, data=tuple(here) or sources.data)


def _card_sources(card: dict[str, Any]) -> _Sources:
    trained = card.get("config") if isinstance(card.get("config"), dict) else {}
    assert isinstance(trained, dict)
    if not trained.get("data"):
        raise CalibrationError("calibration text: got none, and the checkpoint's card names no files; expected files "
                               "or directories")  # fmt: skip
    return _Sources(
        tuple(trained["data"]), trained.get("glob", "**/*.py"), tuple(trained.get("exclude", ())),
        bool(trained.get("skip_undecodable", False)), float(trained.get("holdout", 0.05)),
    )  # fmt: skip
