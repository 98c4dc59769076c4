"""A call's arguments, checked: prompts as rows of token ids, stop strings, sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer


class PromptError(ValueError):
    """A prompt or a generation argument that cannot be used; the message names it, what came and what was expected."""


def encode(tokenizer: Tokenizer, vocabulary: int, prompts: Any) -> list[np.ndarray]:
    """Token ids int32 [T] of each prompt. Raises PromptError."""
    if isinstance(prompts, str):
        prompts = [prompts]
    try:
        if isinstance(prompts, Mapping | set | frozenset):  # whose keys, or whose order, nobody meant
            raise TypeError
        prompts = list(prompts)
    except TypeError as error:
        raise PromptError(f"prompts: got {type(prompts).__name__}, expected texts or lists of token ids") from error
    if not prompts:
        raise PromptError("prompts: got a batch of 0, expected at least one prompt")
    return [token_row(tokenizer, vocabulary, f"prompts[{index}]", prompt) for index, prompt in enumerate(prompts)]


def token_row(tokenizer: Tokenizer, vocabulary: int, where: str, prompt: Any) -> np.ndarray:
    """Token ids int32 [T] of a text or a list of ids, below ``vocabulary``. Raises PromptError that says ``where``."""
    try:
        # With what the tokenizer puts around a text: public ones begin it with a token of its own.
        ids = tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
        row = np.asarray(ids)
    except Exception as error:  # a lone surrogate, lists of unequal lengths; the tokenizers raise bare Exception
        raise PromptError(f"{where}: got {prompt!r:.80}, expected a text or a list of token ids") from error
    if row.size == 0:
        raise PromptError(f"{where}: is empty, expected at least one token")
    if row.ndim != 1 or row.dtype.kind not in "iu":
        raise PromptError(
            f"{where}: got {row.dtype} of shape {list(row.shape)}, expected a text or a list of token ids"
        )
    if row.min() < 0 or row.max() >= vocabulary:
        bad = int(row[(row < 0) | (row >= vocabulary)][0])
        raise PromptError(f"{where}: got token id {bad}, expected 0 to {vocabulary - 1}")
    return row.astype(np.int32)


def end_ids(tokenizer: Tokenizer, vocabulary: int, tokens: Any) -> tuple[int, ...]:
    """Token ids that end a text, or none. Raises PromptError."""
    if isinstance(tokens, str):
        raise PromptError(f"end_tokens: got {tokens!r}, expected a list of token ids")
    if np.size(tokens) == 0:
        return ()
    return tuple(token_row(tokenizer, vocabulary, "end_tokens", tokens).tolist())


def stop_texts(stop: Any) -> tuple[str, ...]:
    """Stop strings from one or several. Raises PromptError."""
    stops = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise PromptError(f"stop: got {stops!r}, expected non-empty texts")
    return stops


def whole_number(name: str, value: Any) -> int:
    """``value``, if it is an integer of at least 1. Raises PromptError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise PromptError(f"{name}: got {value!r}, expected an integer of at least 1")
    return int(value)
