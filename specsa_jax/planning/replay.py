"""How a drafter would have fared on texts that are known: on the prompts themselves, at places of their tails, and on
what others have drafted, step by step. Costs no pass of the target, and nothing of the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specsa_jax.drafting import Drafter

PLACES, SPAN = 32, 256  # drafts of all prompts together; spread over so many last tokens of each
# What the time of looking up grows with: tokens of a long text, and texts of a batch; of prompts, on which the device
# works meanwhile, and of what is decoded, for which it waits.
PROMPT, PROMPTS, RECENT, TEXTS = 65536, 4, 16384, 4
# Steps of decoding that a replay counts for: few, since what a model makes of a text repeats itself more than the text
# (0.5 to 2 do: benchmarks/planner_replay.py).
WORTH = 1.0


def places(lengths: np.ndarray, depth: int) -> np.ndarray:
    """int32 [N, B], at least PLACES: how much of each of B prompts is known at each draft; as far as that goes, so that
    all ``depth`` next tokens are known too."""
    last = np.maximum(1, lengths - depth)
    return np.linspace(np.maximum(1, last - SPAN), last, -(-PLACES // len(lengths))).astype(np.int32)


def replay(rows: Sequence[np.ndarray], drafter: Drafter, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Histograms float [depth + 1] of the drafts of chains on prompts int32 [T], at most PROMPTS of them, and the last
    PROMPT tokens of each: by depth, and by tokens that stood."""
    drafted, accepted = np.zeros(depth + 1), np.zeros(depth + 1)
    rows = [rows[index][-PROMPT:] for index in some(len(rows), PROMPTS)]
    for row, known in zip(rows, places(np.array([len(row) for row in rows]), depth).T, strict=True):
        more = fates(row, known, *drafter.replay(row, known, depth))
        drafted, accepted = drafted + more[0], accepted + more[1]
    return drafted, accepted


def some(count: int, most: int) -> np.ndarray:
    """int [min(count, most)]: the first and the last of ``count``, and others evenly between them."""
    return np.linspace(0, count - 1, min(count, most)).astype(int)


def fates(text: np.ndarray, known: np.ndarray, chains: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Histograms float [depth + 1] of drafts [N, depth] behind the first ``known`` int32 [N] tokens of ``text`` int32
    [T]: by depth, as far as the text goes, and by tokens that it has too."""
    depth = chains.shape[1]
    at = known[:, None] + np.arange(depth)
    valid = valid & (at < len(text))
    accepted = np.cumprod(valid & (chains == text[np.minimum(at, len(text) - 1)]), axis=1).sum(axis=1)
    drafted = valid.sum(axis=1)
    return tuple(np.bincount(x, minlength=depth + 1).astype(float) for x in (drafted, accepted))  # type: ignore[return-value]


def walk(
    texts: np.ndarray, since: np.ndarray, known: np.ndarray, drafter: Drafter, depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """Histograms float [depth + 1] as :func:`replay`, of the steps that ``drafter`` would have taken to get from
    ``since`` int32 [B] tokens of ``texts`` int32 [B, T] to ``known``. Of many texts, TEXTS; of long ways, the last
    PLACES tokens of all together, but two drafts of each. Of a draft that is right up to the end of what is known, only
    that much was drafted."""
    drafted, accepted = np.zeros(depth + 1), np.zeros(depth + 1)
    chosen = some(len(texts), TEXTS)
    most = max(2 * depth, PLACES // max(1, len(chosen)))
    for index in chosen:
        begin = max(0, known[index] - RECENT)
        text, end = texts[index, begin:], known[index] - begin
        places = np.arange(max(since[index] - begin, end - most, 0), end, dtype=np.int32)
        chains, valid = drafter.replay(text[:end], places, depth)
        at = places[:, None] + np.arange(depth)
        right = np.cumprod(valid & (at < end) & (chains == text[np.minimum(at, end - 1)]), axis=1).sum(axis=1)
        reach, place = valid.sum(axis=1), 0
        while place < len(places):
            stood, left = right[place], len(places) - place
            if stood < left or reach[place] <= left:
                drafted[reach[place]] += 1
                accepted[stood] += 1
            else:
                drafted[left] += 1
                accepted[left] += 1
            place += stood + 1
    return drafted, accepted
