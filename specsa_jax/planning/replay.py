"""How a drafter would have fared on texts that are known: on the prompts themselves, at places of their tails, and on
what others have drafted, step by step. Costs no pass of the target, and nothing of the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specsa_jax.drafting import Drafter

# What the time of looking up grows with: tokens of a long text, and texts of a batch; of prompts, on which the device
# works meanwhile, and of what is decoded, for which it waits.
PROMPT, PROMPTS, RECENT, TEXTS = 65536, 4, 16384, 4
# Tokens of all texts together that are walked at least; of each as many as two drafts have. Of one that is alone, whose
# drafts of all lengths are told apart, as many as make so many pairs with the tokens looked up in (256 of 4,096).
PLACES, PAIRS = 32, 1 << 20
# Steps of decoding that a replay counts for: few, since what a model makes of a text repeats itself more than the text
# (0.25 to 1 do: benchmarks/planner_replay.py).
WORTH = 0.5


def replay(rows: Sequence[np.ndarray], drafter: Drafter, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Histograms float [depth + 1] of the steps that ``drafter`` would have taken through the ends of prompts int32
    [T], at most PROMPTS of them: by the draft's depth, and by tokens that stood."""
    drafted, accepted = np.zeros(depth + 1), np.zeros(depth + 1)
    for index in some(len(rows), PROMPTS):
        row = rows[index]
        [more] = walk(row[None], np.ones(1, int), np.array([len(row)]), drafter, (depth,), PROMPT, PLACES)
        drafted, accepted = drafted + more[0], accepted + more[1]
    return drafted, accepted


def some(count: int, most: int) -> np.ndarray:
    """int [min(count, most)]: the first and the last of ``count``, and others evenly between them."""
    return np.linspace(0, count - 1, min(count, most)).astype(int)


def walk(
    texts: np.ndarray, since: np.ndarray, known: np.ndarray, drafter: Drafter, depths: Sequence[int],
    recent: int = RECENT, places: int | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """For each of ``depths``, histograms float [depth + 1] as :func:`replay`, of the steps that ``drafter`` would have
    taken to get from ``since`` int32 [B] tokens of ``texts`` int32 [B, T] to ``known``, looking at the ``recent``
    tokens. Of many texts, TEXTS; of long ways, the last ``places`` tokens of all together (None: PLACES, or by PAIRS of
    one text), but two drafts of each. Of a draft that is right up to the end of what is known, only that much was
    drafted."""
    found = [(np.zeros(depth + 1), np.zeros(depth + 1)) for depth in depths]
    chosen, deepest = some(len(texts), TEXTS), max(depths)
    wanted = places or (PAIRS // min(recent, max(1, known[0])) if len(texts) == 1 else PLACES)
    most = max(2 * deepest, wanted // max(1, len(chosen)))
    for index in chosen:
        begin = max(0, known[index] - recent)
        text, end = texts[index, begin:], known[index] - begin
        at = np.arange(max(since[index] - begin, end - most, 0), end, dtype=np.int32)
        chains, valid = drafter.replay(text[:end], at, deepest)
        drawn = at[:, None] + np.arange(deepest)
        right = valid & (drawn < end) & (chains == text[np.minimum(drawn, end - 1)])
        reach, right = valid.sum(axis=1), np.cumprod(right, axis=1).sum(axis=1)
        for depth, histograms in zip(depths, found, strict=True):
            _step_through(np.minimum(reach, depth).tolist(), np.minimum(right, depth).tolist(), *histograms)
    return found


def _step_through(reach: list[int], right: list[int], drafted: np.ndarray, accepted: np.ndarray) -> None:
    """Adds to the histograms the steps along a text, at whose tokens drafts are so long, and right for so long."""
    place = 0
    while place < len(reach):
        stood, left = right[place], len(reach) - place
        whole = stood < left or reach[place] <= left
        drafted[reach[place] if whole else left] += 1
        accepted[stood if whole else left] += 1
        place += stood + 1
