"""The divergence of approximate strategies from class exact, measured; and schedules searched for the least of it.

Teacher-forced on calibration text: a context is read exactly, as a prompt is; then the text's next tokens are verified
as the strategy does it, committed, and each next-token distribution is compared with the exact one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from specsa_jax.cache import Cache
from specsa_jax.calibration import Calibration, CalibrationError, Part
from specsa_jax.checkpoints.records import AtContext, Measurement, Searched, measured_as
from specsa_jax.engine import Engine
from specsa_jax.prompts import whole_number
from specsa_jax.schedule import Sharing, uniform_schedule
from specsa_jax.strategy import Strategy

CONTEXTS, WINDOWS, TOKENS, BATCH, CONFIDENCE = (512, 2048, 4096), 24, 64, 4, 0.95

# progress(done, total): passes over windows.
Progress = Callable[[int, int], None]


class Divergence(NamedTuple):
    """By token, [N, tokens] each: KL divergence from exact (nats), whether the most probable token is the same, and the
    losses (nats) of exact and of the approximation."""

    kl: np.ndarray
    same: np.ndarray
    loss: np.ndarray
    approximate_loss: np.ndarray


class Windows(NamedTuple):
    """A batch of places in a text: the cache behind their contexts, scored and following tokens int32 [B, tokens], and
    of each pass over them the exact log-probabilities float32 [B, width, V]."""

    cache: Cache
    tokens: np.ndarray
    following: np.ndarray
    exact: list[jax.Array]


@jax.jit
def _compare(exact: jax.Array, other: jax.Array, following: jax.Array) -> tuple[jax.Array, ...]:
    kl = jnp.maximum((jnp.exp(exact) * (exact - other)).sum(axis=-1), 0.0)

    def loss(law: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(law, following[..., None], axis=-1)[..., 0]

    return kl, exact.argmax(axis=-1) == other.argmax(axis=-1), loss(exact), loss(other)


def _score(engine: Engine, windows: Windows, sharing: Sharing, width: int) -> Iterator[jax.Array]:
    """Log-probabilities [B, width, V] after the scored tokens, ``width`` a pass, each committed as it was verified."""
    cache = jax.tree.map(jnp.copy, windows.cache)  # the pass's own is given away
    batch, total = windows.tokens.shape
    reused = None
    if engine.implementation == "xla" and sharing.group_mode == "merged":
        # One program for all schedules; a schedule that the program knows would skip what reuse layers do not need.
        reused = jnp.asarray([letter == "S" for letter in sharing.schedule or "F" * engine.config.layers])
        carrier = "F" + "S" * (engine.config.layers - 1)
        sharing = Sharing(carrier, sharing.keep_compressed if sharing.schedule else True)
    for start in range(0, total, width):
        part = windows.tokens[:, start : start + width]
        count = jnp.full(batch, part.shape[1], jnp.int32)
        padded = jnp.asarray(np.pad(part, ((0, 0), (0, width - part.shape[1]))), jnp.int32)
        arguments = (engine.params, padded, cache, count)
        score, _ = engine.executable("score", {"precision": "exact", "sharing": sharing}, *arguments, reused=reused)
        logprobs, cache = score(*arguments, reused=reused)
        yield logprobs[:, : part.shape[1]]


def prepare(engine: Engine, rows: np.ndarray, context: int, batch: int, width: int) -> Iterator[Windows]:
    """Reads ``rows`` int32 [N, context + tokens + 1] up to their contexts, and scores the rest exactly, ``width``
    tokens a pass. Batches are all of one size: the last is filled up with other rows, which callers drop."""
    for first in range(0, len(rows), batch):
        taken = rows[np.arange(first, first + batch) % len(rows)]
        scored, following = taken[:, context:-1], taken[:, context + 1 :]
        windows = Windows(engine.prefill(list(taken[:, : context + 1]), scored.shape[1]), scored, following, [])
        yield windows._replace(exact=list(_score(engine, windows, Sharing(), width)))


def diverge(engine: Engine, windows: Windows, sharing: Sharing, width: int) -> Divergence:
    """The divergence [B, tokens] of ``sharing`` on windows that :func:`prepare` has made with that ``width``; what a
    pass has verified is committed as the approximation computed it."""
    parts = [
        _compare(exact, other, jnp.asarray(windows.following[:, start : start + width]))
        for start, exact, other in zip(
            range(0, windows.tokens.shape[1], width), windows.exact, _score(engine, windows, sharing, width),
            strict=True,
        )
    ]  # fmt: skip
    return Divergence(*(np.concatenate([np.asarray(x) for x in column], axis=1) for column in zip(*parts, strict=True)))


def _join(parts: Sequence[Divergence], count: int) -> Divergence:
    return Divergence(*(np.concatenate(column)[:count] for column in zip(*parts, strict=True)))


def summarise(divergence: Divergence, context: int, confidence: float = CONFIDENCE) -> AtContext:
    """The figures of one context length, from arrays [windows, tokens].

    Tokens of a window depend on each other, so errors come from the spread of the windows' means, and so do bounds
    (:func:`upper_bound`). Agreement gets the more careful of that and the binomial bound over tokens (Clopper and
    Pearson), which speaks even where all agree.
    """
    windows, tokens = divergence.kl.shape

    def mean(values: np.ndarray) -> tuple[float, float]:
        by_window = np.asarray(values, np.float64).mean(axis=1)
        return float(by_window.mean()), float(by_window.std(ddof=1) / math.sqrt(windows))

    kl, kl_error = mean(divergence.kl)
    top1, top1_error = mean(divergence.same)
    change, change_error = mean(np.asarray(divergence.approximate_loss, np.float64) - divergence.loss)
    differing = upper_bound(1.0 - divergence.same.mean(axis=1), confidence)
    agreed, total = int(divergence.same.sum()), divergence.same.size
    exactly = float(stats.beta.ppf(1 - confidence, agreed, total - agreed + 1)) if agreed else 0.0
    return AtContext(
        context=context, windows=windows, tokens=windows * tokens, loss=mean(divergence.loss)[0],
        mean_kl=kl, mean_kl_error=kl_error,
        mean_kl_bound=upper_bound(divergence.kl.mean(axis=1, dtype=float), confidence),
        p99_kl=float(np.quantile(divergence.kl, 0.99)),
        top1=top1, top1_error=top1_error, top1_bound=max(0.0, min(1.0 - differing, exactly)),
        loss_change=change, loss_change_error=change_error,
    )  # fmt: skip


def upper_bound(means: np.ndarray, confidence: float) -> float:
    """One-sided confidence bound of the expectation of independent values [N].

    The larger of Student's t and of Hall's transformation of it (1992), which undoes the first-order effect of
    skewness: divergences are skewed to the right, where Student's alone is too low two or three times as often as it
    says.
    """
    count = len(means)
    spread = float(means.std(ddof=1))
    if spread == 0.0:
        return float(means.mean())
    quantile = float(stats.t.ppf(confidence, count - 1))
    student, skew = -quantile / math.sqrt(count), float(stats.skew(means, bias=False))
    hall = student
    if abs(skew) > 1e-6:
        hall = (float(np.cbrt(1.0 + skew * (student - skew / (6 * count)))) - 1.0) * 3.0 / skew
    return float(means.mean()) - spread * min(student, hall)


def _rows(
    engine: Engine, calibration: Calibration, contexts: Sequence[int], tokens: int, windows: int, part: Part
) -> dict[int, np.ndarray]:
    """Places of the text by context, the shortest first."""
    most = engine.max_length - 1 - tokens
    for context in contexts:
        if context > most:
            raise CalibrationError(f"contexts: got {context}, expected at most {most}: of the model's "
                                   f"{engine.max_length} tokens {tokens} are scored behind it")  # fmt: skip
    return {context: calibration.windows(context, tokens, windows, part) for context in sorted(set(contexts))}


def measure(
    engine: Engine,
    strategies: Sequence[Strategy],
    calibration: Calibration,
    *,
    contexts: Sequence[int] = CONTEXTS,
    windows: int = WINDOWS,
    tokens: int = TOKENS,
    batch: int = BATCH,
    confidence: float = CONFIDENCE,
    part: Part = "measure",
    progress: Progress | None = None,
) -> list[Measurement]:
    """Measures how far strategies diverge from class exact.

    Args:
      engine: of the model, in the dtype and implementation to be measured.
      strategies: of class approx. Schedules are independent of drafter and tree; shared groups are measured on the
        strategy's own chain.
      calibration: text, of which ``windows`` places of ``tokens`` tokens are scored behind each of ``contexts``.
      batch: windows at a time.
      confidence: of the one-sided bounds.
      part: which places: those that :func:`search` does not see, or those that it does.
      progress: called with passes done and all passes.

    Returns the measurements, one for each strategy.

    Raises ValueError for strategies without an approximation, CalibrationError for text too small to state anything and
    contexts beyond the model's, CapacityError for those that do not fit, all before any work.
    """
    batch = whole_number("batch", batch)
    if not 0.5 <= confidence < 1:
        raise CalibrationError(f"confidence: got {confidence}, expected at least 0.5, below 1")
    kinds: list[tuple[Sharing, int]] = []
    for strategy in map(engine.resolve, strategies):
        engine.decoder.check(strategy)
        sharing = strategy.sharing(engine.config.layers)
        if not sharing.approximates:
            raise ValueError(f"strategies: got {strategy.describe()}, whose divergence from class exact is 0, expected "
                             "a schedule with reuse layers, or shared groups")  # fmt: skip
        if sharing.group_mode == "shared" and not (strategy.drafter and strategy.template.is_chain):
            raise ValueError(f"strategies: got {strategy.describe()} with shared groups, expected a drafted chain: "
                             "text alone measures no other tree's groups")  # fmt: skip
        kinds.append(measured_as(sharing, strategy.width))
    if not kinds or not contexts:
        raise ValueError(f"{'contexts' if kinds else 'strategies'}: got none, expected at least one")
    # By pass width: strategies of one width share the exact laws that they are compared with.
    widths = {width: [kind for kind in dict.fromkeys(kinds) if kind[1] == width] for _, width in kinds}
    rows = _rows(engine, calibration, contexts, tokens, windows, part)
    for context, taken in rows.items():
        engine.check_fits([taken[0, : context + 1]] * batch, tokens)
    total = sum(-(-len(taken) // batch) for taken in rows.values()) * (len(set(kinds)) + len(widths))
    done = 0
    found: dict[tuple[Sharing, int], list[AtContext]] = {kind: [] for kind in kinds}
    for context, taken in rows.items():
        parts: dict[tuple[Sharing, int], list[Divergence]] = {kind: [] for kind in kinds}
        for width, members in widths.items():
            for prepared in prepare(engine, taken, context, batch, width or tokens):
                done += 1
                for kind in members:
                    parts[kind].append(diverge(engine, prepared, kind[0], width or tokens))
                    done += 1
                    if progress:
                        progress(done, total)
        for kind in found:
            found[kind].append(summarise(_join(parts[kind], len(taken)), context, confidence))
    return [
        Measurement(sharing, width, confidence, str(engine.dtype), calibration.text, tuple(found[sharing, width]))
        for sharing, width in kinds
    ]


def search(
    engine: Engine,
    calibration: Calibration,
    refresh: int = 1,
    *,
    keep_compressed: bool = True,
    contexts: Sequence[int] = (2048,),
    windows: int = WINDOWS,
    tokens: int = TOKENS,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> list[tuple[Searched, Searched]]:
    """Greedy search for schedules: from all refresh, the layer whose reuse costs the least mean KL reuses next.

    Args: as for :func:`measure`; ``refresh``: where to stop, in refresh layers.

    Returns, for each number of refresh layers from all but one down to ``refresh``, the schedule found and the uniform
    one of that number, both with their mean KL and its standard error on the text's places for searching.

    Raises ValueError for a number that is none; otherwise as :func:`measure`.
    """
    layers, batch = engine.config.layers, whole_number("batch", batch)
    if isinstance(refresh, bool) or not isinstance(refresh, int) or not 1 <= refresh < layers:
        raise ValueError(
            f"refresh: got {refresh!r}, expected 1 to {layers - 1}: fewer than the model's {layers} layers"
        )
    rows = _rows(engine, calibration, contexts, tokens, windows, "search")
    if not rows:
        raise ValueError("contexts: got none, expected at least one")
    for context, taken in rows.items():
        engine.check_fits([taken[0, : context + 1]] * len(taken), tokens)
    prepared = {c: list(prepare(engine, taken, c, batch, tokens)) for c, taken in rows.items()}
    text = calibration.text
    known: dict[str, Searched] = {}
    total = sum(range(refresh, layers)) + layers - refresh  # candidates, and the uniform ones

    def judge(schedule: str) -> Searched:
        if schedule not in known:
            sharing = Sharing(schedule, keep_compressed)
            joined = [_join([diverge(engine, w, sharing, tokens) for w in prepared[c]], len(rows[c])) for c in rows]
            means = np.concatenate([part.kl.mean(axis=1, dtype=float) for part in joined])
            error = float(means.std(ddof=1) / math.sqrt(len(means)))
            known[schedule] = Searched(schedule, keep_compressed, float(means.mean()), error, text)
            if progress:
                progress(len(known), total)
        return known[schedule]

    schedule, found = "F" * layers, []
    while schedule.count("F") > refresh:
        fewer = [schedule[:i] + "S" + schedule[i + 1 :] for i in range(1, layers) if schedule[i] == "F"]
        best = min(map(judge, fewer), key=lambda judged: judged.mean_kl)
        schedule = best.schedule
        found.append((best, judge(uniform_schedule(layers, best.refresh))))
    if progress:
        progress(total, total)
    return found


def describe(measurement: Measurement) -> dict[str, object]:
    """A measurement as JSON-ready values, the derived ones included."""
    return {
        **dataclasses.asdict(measurement), "strategy": measurement.describe(), "reach": measurement.reach,
        "worst_mean_kl_bound": measurement.mean_kl, "worst_top1_bound": measurement.top1,
    }  # fmt: skip
