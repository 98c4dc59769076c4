"""How a drafter would have fared on the prompts themselves: it drafts at places of their tails, whose next tokens are
known. Costs no pass of the target, and nothing of the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specsa_jax.drafting import Drafter

PLACES, SPAN = 32, 256  # drafts of all prompts together; spread over so many last tokens of each
# Steps of decoding that a replay counts for: a text is harder to foresee than what a model makes of it.
WORTH = 8.0


def places(length: int, depth: int, count: int = PLACES) -> np.ndarray:
    """int32 [count]: how much of a prompt of ``length`` tokens is known at each draft; as far as that goes, so that
    all ``depth`` next tokens are known too."""
    last = max(1, length - depth)
    first = max(1, last - SPAN)
    return np.linspace(first, last, count).astype(np.int32)


def replay(rows: Sequence[np.ndarray], drafter: Drafter, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Histograms float [depth + 1] of the drafts of chains on prompts int32 [T]: by depth, and by tokens that stood."""
    count, longest = -(-PLACES // len(rows)), max(map(len, rows))
    known = np.concatenate([places(len(row), depth, count) for row in rows])
    texts = np.stack([np.pad(row, (0, longest - len(row)), constant_values=-1) for row in rows])
    which = np.repeat(np.arange(len(rows)), count)
    texts = texts[which] if len(rows) > 1 else np.broadcast_to(texts, (count, longest))
    return fates(texts, known, *drafter.replay(texts, known, depth))


def fates(
    texts: np.ndarray, known: np.ndarray, chains: np.ndarray, valid: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Histograms float [depth + 1] of drafts [N, depth] behind ``known`` int32 [N] tokens of ``texts`` int32 [N, T]
    (-1 behind the end of each): by depth, and by tokens that the texts have too."""
    depth = chains.shape[1]
    at = known[:, None] + np.arange(depth)
    truth = np.where(at < texts.shape[1], np.take_along_axis(texts, np.minimum(at, texts.shape[1] - 1), axis=1), -1)
    drafted = (valid & (truth >= 0)).sum(axis=1)
    accepted = np.cumprod(valid & (chains == truth), axis=1).sum(axis=1)
    return tuple(np.bincount(x, minlength=depth + 1).astype(float) for x in (drafted, accepted))  # type: ignore[return-value]
