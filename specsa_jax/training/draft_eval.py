"""Judging a draft head on the target's own text, without decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from specsa_jax.training.draft_config import DraftConfig
from specsa_jax.training.draft_data import Generated
from specsa_jax.training.draft_step import known_past


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a head does on held-out files that the target continues greedily.

    Attributes:
      loss: as in training, in nats.
      matches: by depth, how often the head's most probable token is the target's.
      overlap: by depth, Σ min(p, q): how often a draft sampled from the head's law would stand.
      acceptance_length: tokens a step with a chain of ``chain`` drafts, the target's own included, from 1 to chain + 1.
      chain: see there.
      steps: steps that this is a mean of.
    """

    loss: float
    matches: tuple[float, ...]
    overlap: tuple[float, ...]
    acceptance_length: float
    chain: int
    steps: int


def judge(
    evaluate: Callable[..., Any], params: Any, target: Any, held_out: Generated, config: DraftConfig
) -> Evaluation:
    """Of a head's parameters, where ``target`` has written greedily; ``evaluate`` is ``make_evaluate``'s.

    In batches of the training's shape; the last is filled up from the start.
    """
    rows, parts = held_out.rows, []
    for first in range(0, len(rows), config.batch):
        chosen = np.arange(first, first + config.batch) % len(rows)
        kept = min(config.batch, len(rows) - first)
        parts.append([np.asarray(x)[:, :kept] for x in evaluate(params, target, rows[chosen])])
    divergence, match, overlap = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    # Only where the target writes: entry i speaks of position i + 2.
    begin = config.context - config.new_tokens
    place = np.arange(match.shape[2]) + 2
    meant = (place >= begin) & (place < held_out.ends[:, None]) & known_past(*match.shape[::2])

    def by_depth(values: np.ndarray) -> np.ndarray:
        return (values * meant).sum(axis=(1, 2)) / np.maximum(meant.sum(axis=(1, 2)), 1)

    gained = acceptance_lengths(match, begin, held_out.ends, config.chain)
    weight = config.step_decay ** np.arange(config.unroll)
    return Evaluation(
        float(by_depth(divergence) @ weight / weight.sum()),
        tuple(round(float(x), 4) for x in by_depth(match)),
        tuple(round(float(x), 4) for x in by_depth(overlap)),
        float(gained.mean()) if len(gained) else 1.0,
        config.chain,
        len(gained),
    )


def acceptance_lengths(match: np.ndarray, begin: int, ends: np.ndarray, chain: int) -> np.ndarray:
    """Tokens gained a step, int32 [steps of all rows], when each row is decoded with chains of ``chain`` drafts.

    ``match`` bool [unroll, B, S], as :func:`compare` gives it on text that the target wrote greedily from position
    ``begin`` on: there, a draft stands iff it is the target's most probable token, and the drafts after one that
    stands are those of the next depth. Row b is decoded up to position ``ends[b]`` of it.
    """
    gained = []
    for row, end in enumerate(ends):
        known = begin  # tokens known so far; the last of them is in slot known − 1, at index known − 2
        while known < end:
            accepted = 0
            while accepted < min(chain, end - known - 1) and match[accepted, row, known - 2 + accepted]:
                accepted += 1
            if known + chain < end:  # a step cut short by the end says nothing
                gained.append(accepted + 1)
            known += accepted + 1
    return np.asarray(gained, np.int32)


def record_of(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation's fields in a log record."""
    return {
        "held_out_loss": evaluation.loss,
        "held_out_matches": list(evaluation.matches),
        "acceptance_length": evaluation.acceptance_length,
    }
