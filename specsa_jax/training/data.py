"""Files → documents → one stream of tokens → rows.

The stream is every document in the order of the paths, an end-of-text token after each. A row is ``context + 1``
consecutive tokens of it, so rows start and end inside documents, and attention crosses the borders between them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from specsa_jax.training.config import TrainingError
from specsa_jax.training.tokenizer import END_OF_TEXT_ID

# Of a data argument that names an installed package: what its name begins with, wherever they lie.
INSTALLED = "site-packages/"
# What shares the standard library's directory but is no part of it.
_NOT_STDLIB = ("*site-packages/*", "*dist-packages/*")


class Sources(Protocol):
    """Which files a run reads; TrainConfig explains the fields."""

    @property
    def data(self) -> tuple[str, ...]: ...
    @property
    def glob(self) -> str: ...
    @property
    def exclude(self) -> tuple[str, ...]: ...
    @property
    def skip_undecodable(self) -> bool: ...
    @property
    def holdout(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Document:
    """A text file: its path relative to the data directory, with forward slashes, and its text."""

    path: str
    text: str
    held_out: bool


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All documents, and what became of the files.

    Attributes:
      documents: in the order of the data arguments, then of the paths; neither empty nor twice the same text.
      undecodable: files left out because they are not UTF-8.
      duplicates: files left out because another has the same text (a held-out one comes first).
    """

    documents: tuple[Document, ...]
    undecodable: int
    duplicates: int

    def split(self, held_out: bool) -> list[Document]:
        """The held-out documents, or the others."""
        return [d for d in self.documents if d.held_out == held_out]

    def digest(self) -> str:
        """SHA-256 of every path, text and split."""
        state = hashlib.sha256()
        for d in self.documents:
            state.update(f"{d.path}\0{d.held_out}\0{len(d.text)}\0{d.text}".encode())
        return state.hexdigest()


def is_held_out(relative_path: str, fraction: float) -> bool:
    """Whether the file of this path belongs to the held-out ``fraction``: the same on every machine and Python.

    The path is relative to the data directory; backslashes count as slashes.
    """
    digest = hashlib.sha256(relative_path.replace("\\", "/").encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def read_corpus(config: Sources) -> Corpus:
    """Reads the files that ``config`` names.

    Raises TrainingError: no such path, no file that matches, a file that is not UTF-8 (naming the byte), or nothing
    to train on or to hold out.
    """
    texts: dict[bool, dict[str, str]] = {False: {}, True: {}}  # held out → text → path; a dict keeps the order
    undecodable = files = 0
    for source in config.data:
        for relative, file in find_files(source, config):
            files += 1
            try:
                text = file.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                if not config.skip_undecodable:
                    raise TrainingError(
                        f"{file}: not UTF-8 at byte {error.start} ({error.reason}); "
                        "exclude the file, or skip all such files with --skip-undecodable"
                    ) from error
                undecodable += 1
                continue
            except OSError as error:
                raise TrainingError(f"{file}: cannot be read: {error.strerror}") from error
            if text:
                texts[is_held_out(relative, config.holdout)].setdefault(text, relative)
            else:
                files -= 1
    documents = [Document(path, text, held) for held, seen in texts.items() for text, path in seen.items()
                 if held or text not in texts[True]]  # fmt: skip
    corpus = Corpus(tuple(documents), undecodable, files - undecodable - len(documents))
    for held, name in ((False, "train on"), (True, "hold out")):
        if not corpus.split(held):
            raise TrainingError(
                f"data: {files} non-empty files in {', '.join(config.data)} (glob {config.glob!r}) leave none to "
                f"{name} at holdout = {config.holdout}; give more files, or change the fraction"
            )
    return corpus


def locate(source: str) -> Path:
    """Where a data argument lies: 'stdlib', an installed package, or a path."""
    if source.startswith(INSTALLED):
        return Path(sysconfig.get_path("purelib")) / source.removeprefix(INSTALLED)
    return Path(sysconfig.get_path("stdlib") if source == "stdlib" else source)


def find_files(source: str, config: Sources) -> Iterable[tuple[str, Path]]:
    """(relative path, file) of one data argument, sorted by relative path."""
    root = locate(source)
    exclude = config.exclude + (_NOT_STDLIB if source == "stdlib" else ())
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise TrainingError(
            f"data: got {source!r}, expected an existing directory or file, 'stdlib', or the "
            f"{INSTALLED}NAME of an installed package"
        )
    try:
        matches = [(p.relative_to(root).as_posix(), p) for p in root.glob(config.glob) if p.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise TrainingError(f"glob: got {config.glob!r}, expected a relative pattern: {error}") from error
    kept = sorted((r, p) for r, p in matches if not any(fnmatch.fnmatchcase(r, pattern) for pattern in exclude))
    if not kept:
        raise TrainingError(
            f"data: no file in {source!r} matches glob {config.glob!r}"
            + (f" ({len(matches)} match, but are excluded)" if matches else "")
        )
    return kept


def encode(documents: Iterable[Document], tokenizer: Tokenizer, end: int = END_OF_TEXT_ID) -> np.ndarray:
    """The stream of the documents' tokens, int32 [N], each document followed by the token ``end``."""
    documents = list(documents)
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a file is text, not an end
    pieces = []
    for i in range(0, len(documents), 256):  # in parallel inside a slice; slices bound the memory
        for encoding in tokenizer.encode_batch_fast([d.text for d in documents[i : i + 256]], add_special_tokens=False):
            pieces.append(np.asarray([*encoding.ids, end], np.int32))
    tokenizer.encode_special_tokens = False
    return np.concatenate(pieces)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The two streams, int32 [N] each."""

    train: np.ndarray
    held_out: np.ndarray


def encode_cached(corpus: Corpus, tokenizer: Tokenizer, directory: Path, end: int = END_OF_TEXT_ID) -> Tokens:
    """Both streams, from ``directory/tokens-{hash of texts and tokenizer}.npz`` where it exists, else written there."""
    key = hashlib.sha256(f"{corpus.digest()}{tokenizer.to_str()}{end or ''}".encode()).hexdigest()[:16]
    file = directory / f"tokens-{key}.npz"
    if not file.exists():
        sides = (("train", False), ("held_out", True))
        streams = {name: encode(corpus.split(held), tokenizer, end) for name, held in sides}
        part = file.with_suffix(".part")
        with part.open("wb") as out:
            np.savez(out, **streams)  # type: ignore[arg-type]
        part.rename(file)
    with np.load(file) as saved:
        return Tokens(saved["train"], saved["held_out"])


def training_rows(stream: np.ndarray, context: int, batch: int, step: int, seed: int, stage: int) -> np.ndarray:
    """Rows of one optimiser step, int32 [batch, context + 1]: a pure function of the arguments.

    Each pass over the stream cuts it at a new offset into rows that share one border token, in a new order; the
    stream is taken as a ring, so every token is used.
    """
    rows = len(stream) // context
    starts = []
    for i in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(i, rows)
        offset, order = _epoch(len(stream), rows, (seed, stage, epoch))
        starts.append(offset + int(order[place]) * context)
    index = np.asarray(starts)[:, None] + np.arange(context + 1)[None, :]
    return stream[index % len(stream)]


_epoch_cache: dict[tuple[int, ...], tuple[int, np.ndarray]] = {}


def _epoch(length: int, rows: int, key: tuple[int, int, int]) -> tuple[int, np.ndarray]:
    """(offset, order of the rows) of one pass over the stream."""
    full = (length, rows, *key)
    if full not in _epoch_cache:
        while len(_epoch_cache) > 1:  # a batch touches two passes at most, unless it is larger than the corpus
            _epoch_cache.pop(next(iter(_epoch_cache)))
        random = np.random.default_rng(key)
        _epoch_cache[full] = (int(random.integers(length)), random.permutation(rows))
    return _epoch_cache[full]


def held_out_batches(stream: np.ndarray, context: int, batch: int, count: int = 0) -> np.ndarray:
    """Batches of the held-out stream, int32 [n, batch, context + 1], spread evenly over it; n ≤ ``count`` (0: all).

    Raises TrainingError when the stream is too short for one batch.
    """
    rows = (len(stream) - 1) // context
    if rows < batch:
        raise TrainingError(
            f"holdout: {len(stream)} held-out tokens make {max(rows, 0)} sequences of {context}, expected at least one "
            f"batch of {batch}; give more files, a larger holdout fraction, a shorter context or a smaller batch"
        )
    n = rows // batch if count == 0 else min(count, rows // batch)
    chosen = np.arange(n * batch) * rows // (n * batch)
    index = chosen[:, None] * context + np.arange(context + 1)[None, :]
    return stream[index].reshape(n, batch, context + 1)
