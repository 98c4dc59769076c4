"""Prompts of real text for a checkpoint: held-out code, edits of it, prose. Shared by scripts."""

from __future__ import annotations

import functools
import importlib.metadata

import numpy as np

from specsa_jax import Engine
from specsa_jax.calibration import CalibrationError, edited, read_calibration

WORKLOADS = ("code", "edit", "prose")


def prompts(engine: Engine, checkpoint: str, workload: str, tokens: int, count: int) -> list[list[int]]:
    """``count`` prompts of about ``tokens`` token ids (an edit's may be fewer), spread evenly over a text.

    code: a piece of the files that the checkpoint's card says were held out of its training, one after the other, which
    is cut off somewhere in a file. edit: two thirds of such a piece, then the beginning of a copy of it in which the
    commonest identifier has another name (``calibration.edited``). prose: what the packages that are installed say of
    themselves (their README files, of the names in order).

    Raises ValueError for a text that is shorter than a prompt.
    """
    stream = _prose(engine) if workload == "prose" else _code(engine, checkpoint)
    if len(stream) < tokens:
        raise ValueError(
            f"context: got prompts of {tokens} tokens, expected at most {len(stream)}, the {workload} text"
        )
    starts = np.linspace(0, len(stream) - tokens, count + 2)[1:-1].astype(int)
    rows = [stream[start : start + tokens].tolist() for start in starts]
    return _edits(engine, rows, tokens) if workload == "edit" else rows


def _edits(engine: Engine, rows: list[list[int]], tokens: int) -> list[list[int]]:
    """As many edits as rows; those of rows without a name, such as data in base64, are others again."""
    found, refused = [], None
    for row in rows:
        try:
            found.append(edited(engine.tokenizer, row, tokens))
        except CalibrationError as error:
            refused = error
    if not found:
        assert refused is not None
        raise refused
    return [found[index % len(found)] for index in range(len(rows))]


@functools.cache
def _code(engine: Engine, checkpoint: str) -> np.ndarray:
    return read_calibration(checkpoint, engine.tokenizer).stream


@functools.cache
def _prose(engine: Engine) -> np.ndarray:
    cards = [found.metadata for found in importlib.metadata.distributions()]
    texts = {str(card["Name"]): str(card.get_payload()) for card in cards if card}
    text = "\n\n".join(texts[name] for name in sorted(texts, key=str.lower))
    return np.asarray(engine.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
