"""The target's own text: what its draft head is trained and judged on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from specsa_jax.engine import Engine
from specsa_jax.sampling import SamplingParams
from specsa_jax.training import data
from specsa_jax.training.config import TrainingError
from specsa_jax.training.draft_config import DraftConfig
from specsa_jax.training.tokenizer import END_OF_TEXT_ID


@dataclasses.dataclass(frozen=True)
class Generated:
    """Texts that the target has continued.

    Attributes:
      rows: int32 [N, context], of which the first context − new_tokens are a prompt out of the files. A text that
        ended early is followed by the beginning of a file, as in the stream of all files.
      ends: int32 [N], where the target's own text ends.
    """

    rows: np.ndarray
    ends: np.ndarray


def generate(
    engine: Engine,
    prompts: np.ndarray,
    stream: np.ndarray,
    config: DraftConfig,
    sampled: float,
    progress: Callable[[int], bool],
) -> Generated:
    """Continues prompts int32 [N, context − new_tokens] out of ``stream``, the fraction ``sampled`` of them sampled.

    ``progress`` is called with the number of rows done, and says whether to go on. A batch is filled up with prompts
    from the start, so that all batches, of training and held-out text, share a compiled program.
    """
    count, width = prompts.shape
    size = min(config.generation_batch, max(config.generated, config.eval_rows))
    random = np.random.default_rng((config.seed, count, width))
    begins = np.flatnonzero(stream[:-1] == END_OF_TEXT_ID) + 1
    begins = begins if len(begins) else np.zeros(1, np.int64)
    rows, ends = np.zeros((count, config.context), np.int32), np.zeros(count, np.int32)
    for first in range(0, count, size):
        chosen = np.arange(first, first + size) % count
        hot = random.random(size) < sampled
        seeds = random.integers(2**32, size=size)
        sampling = [
            SamplingParams(temperature=config.temperature if h else 0.0, seed=int(s))
            for h, s in zip(hot, seeds, strict=True)
        ]
        result = engine.generate(
            [prompts[index].tolist() for index in chosen], config.new_tokens, sampling=sampling, speculate=False
        )
        for index, generation in zip(chosen[: count - first], result[: count - first], strict=True):
            text = np.concatenate([prompts[index], generation.tokens])
            begin = int(random.choice(begins))
            filler = stream[(begin + np.arange(config.context - len(text))) % len(stream)]
            rows[index], ends[index] = np.concatenate([text, filler]), len(text)
        done = min(first + size, count)
        if not progress(done):
            break
    return Generated(rows[:done], ends[:done])


def training_prompts(stream: np.ndarray, config: DraftConfig) -> np.ndarray:
    """``config.generated`` prompts int32 [N, context − new_tokens] out of the stream, in a random order."""
    width = config.context - config.new_tokens
    return data.training_rows(stream, width, config.generated, 0, config.seed, 1)[:, :width]


def held_out_prompts(stream: np.ndarray, config: DraftConfig) -> np.ndarray:
    """Up to ``config.eval_rows`` prompts int32 [N, context − new_tokens], spread evenly over the held-out stream.

    Raises TrainingError when the stream has not one.
    """
    width = config.context - config.new_tokens
    possible = (len(stream) - 1) // width
    if not possible:
        raise TrainingError(
            f"holdout: {len(stream)} held-out tokens, expected at least {width + 1} (context - new_tokens); "
            "give more files, a larger holdout fraction or a shorter context"
        )
    rows = min(config.eval_rows, possible)
    return data.held_out_batches(stream, width, rows, 1)[0, :, :width]


def cached(file: Path, make: Callable[[], Generated]) -> Generated:
    """What ``file`` holds, else what ``make`` gives, which is then written there."""
    if not file.exists():
        made, part = make(), file.with_suffix(".part")
        with part.open("wb") as out:
            np.savez(out, rows=made.rows, ends=made.ends)
        part.rename(file)
    with np.load(file) as saved:
        return Generated(saved["rows"], saved["ends"])


def batch_rows(stream: np.ndarray, generated: Generated | None, config: DraftConfig, step: int) -> np.ndarray:
    """Rows of one optimiser step, int32 [batch, context]: generated ones, then text of the files.

    A pure function of the arguments; every pass over the generated rows takes them in a new order.
    """
    count = config.generated_rows()
    parts = []
    if count and generated is not None:
        total = len(generated.rows)
        for place in range(step * count, (step + 1) * count):
            epoch, at = divmod(place, total)
            parts.append(generated.rows[_order(total, config.seed, epoch)[at]][None])
    if count < config.batch:
        width = config.context - 1
        parts.append(data.training_rows(stream, width, config.batch - count, step, config.seed, 0))
    return np.concatenate(parts)


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _order(total: int, seed: int, epoch: int) -> np.ndarray:
    key = (total, seed, epoch)
    if key not in _orders:
        while len(_orders) > 1:
            _orders.pop(next(iter(_orders)))
        _orders[key] = np.random.default_rng((seed, 2, epoch)).permutation(total)
    return _orders[key]
