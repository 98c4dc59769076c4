"""How a drafter would have fared on texts that are known: on the prompts themselves, at places of their tails, and on
what others have drafted, step by step. Costs no pass of the target, and nothing of the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specsa_jax.drafting import Drafter

# What the time of looking up grows with: tokens of a long text, and texts of a batch; of prompts, on which the device
# works meanwhile, and of what is decoded, for which it waits.
PROMPT, PROMPTS, RECENT, TEXTS = 65536, 4, 16384, 4
# Tokens of all texts together that are walked at least; of each as many as two drafts have.
PLACES = 32
# Steps of decoding that a replay counts for: few, since what a model makes of a text repeats itself more than the text
# (0.25 to 1 do: benchmarks/planner_replay.py).
WORTH = 0.5


def replay(rows: Sequence[np.ndarray], drafter: Drafter, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Histograms float [depth + 1] of the steps that ``drafter`` would have taken through the ends of prompts int32
    [T], at most PROMPTS of them: by the draft's depth, and by tokens that stood."""
    drafted, accepted = np.zeros(depth + 1), np.zeros(depth + 1)
    for index in some(len(rows), PROMPTS):
        row = rows[index]
        more = walk(row[None], np.ones(1, int), np.array([len(row)]), drafter, depth, PROMPT)
        drafted, accepted = drafted + more[0], accepted + more[1]
    return drafted, accepted


def some(count: int, most: int) -> np.ndarray:
    """int [min(count, most)]: the first and the last of ``count``, and others evenly between them."""
    return np.linspace(0, count - 1, min(count, most)).astype(int)


def walk(
    texts: np.ndarray, since: np.ndarray, known: np.ndarray, drafter: Drafter, depth: int, recent: int = RECENT
) -> tuple[np.ndarray, np.ndarray]:
    """Histograms float [depth + 1] as :func:`replay`, of the steps that ``drafter`` would have taken to get from
    ``since`` int32 [B] tokens of ``texts`` int32 [B, T] to ``known``, looking at the ``recent`` tokens. Of many texts,
    TEXTS; of long ways, the last PLACES tokens of all together, but two drafts of each. Of a draft that is right up to
    the end of what is known, only that much was drafted."""
    drafted, accepted = np.zeros(depth + 1), np.zeros(depth + 1)
    chosen = some(len(texts), TEXTS)
    most = max(2 * depth, PLACES // max(1, len(chosen)))
    for index in chosen:
        begin = max(0, known[index] - recent)
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
