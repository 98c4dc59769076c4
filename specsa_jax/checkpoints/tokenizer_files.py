"""The tokenizer of a converted checkpoint: the files beside the weights, or a stand-in where there are none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from specsa_jax.checkpoints import store
from specsa_jax.checkpoints.sources import TOKENIZER_FILES
from specsa_jax.checkpoints.trees import CheckpointError

if TYPE_CHECKING:
    from specsa_jax.checkpoints.opening import Opened


def write_tokenizer(
    opened: Opened, given: str | os.PathLike[str] | None, fallback: str | None, scratch: Path | None = None
) -> Tokenizer:
    """The tokenizer of a checkpoint; with ``scratch`` its files are written there.

    Args:
      given: a ``tokenizer.json``, "bytes" or "ids", in place of what lies beside the weights.
      fallback: "ids", where nothing else is known; None: that is an error.

    Raises CheckpointError: none found, unreadable, or more tokens than the model's vocabulary.
    """
    vocab = opened.model.vocab_size
    found = opened.directory / "tokenizer.json"
    kind = str(given) if given is not None else None
    if kind is None and not found.is_file():
        kind = "bytes" if opened.format is not None and opened.format.byte_tokens else fallback
        if kind is None:
            raise CheckpointError(
                f"{found}: missing; give one with --tokenizer FILE, or --tokenizer ids to read and write token ids"
            )
    if kind in ("bytes", "ids"):
        if kind == "bytes" and vocab < 256:
            raise CheckpointError(f"tokenizer: got 'bytes' for a vocabulary of {vocab}, expected at least 256")
        made = byte_tokenizer() if kind == "bytes" else id_tokenizer(vocab)
        if scratch is not None:
            made.save(str(scratch / "tokenizer.json"))
            _copy(opened.directory, scratch, "generation_config.json")  # its end tokens are ids, whoever spells them
        return made
    tokenizer = store.read_tokenizer(found if kind is None else Path(kind), vocab)
    if scratch is not None:
        _copy(opened.directory, scratch, *TOKENIZER_FILES)
        if kind is not None:
            shutil.copyfile(kind, scratch / "tokenizer.json")
    return tokenizer


def _copy(source: Path, target: Path, *names: str) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def byte_tokenizer() -> Tokenizer:
    """Token b is byte b; there are no others."""
    shown = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}  # as GPT-2 shows bytes
    rest = [byte for byte in range(256) if byte not in shown]
    shown |= {byte: chr(256 + index) for index, byte in enumerate(rest)}
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in shown.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def id_tokenizer(vocab_size: int) -> Tokenizer:
    """Text is token ids in decimal, apart by white space; other text is an error."""
    tokenizer = Tokenizer(models.WordLevel(vocab={str(i): i for i in range(vocab_size)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def end_tokens(opened: Opened) -> tuple[int, ...] | None:
    """Ids that end a text: ``eos_token_id`` of ``generation_config.json`` or the config; None where neither says.

    Raises CheckpointError for what are no ids of the vocabulary: dropped, they would let texts go on and on.
    """
    if opened.format is None:
        return store.end_tokens_of(opened.metadata)
    file = opened.directory / "generation_config.json"
    vocab = opened.model.vocab_size
    for where, config in ((file, store.read_json(file) if file.exists() else {}), (opened.path, opened.raw)):
        if (ids := config.get("eos_token_id")) is None:
            continue
        found = ids if isinstance(ids, list) else [ids]
        if not all(type(i) is int and 0 <= i < vocab for i in found):
            raise CheckpointError(f"{where}: eos_token_id: got {ids!r:.80}, expected ids below vocab_size = {vocab}")
        if found:
            return tuple(found)
    return None
