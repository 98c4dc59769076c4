"""What steps, drafts and prompts cost, in seconds: from a profile, or from bytes and operations.

A step's time is a sum of nonnegative coefficients times features (:func:`_features`): what a step does once, for each
refresh layer, for each sequence, for each token of each, and for each compressed entry that these read and score.
Without a profile the coefficients are counted bytes over bandwidth and operations over throughput, and launches. A
profile's step times determine them instead, by nonnegative least squares on the relative error; what they leave open
stays as counted, but for two scales, of launches and of all else: a graph's launches cost a fraction of one by itself,
bytes what they always do, so that small steps say little of large ones. What the fit misses is interpolated between the
measured points.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from specsa_jax.checkpoints import load_config
from specsa_jax.config import ModelConfig
from specsa_jax.drafting import PromptLookup, parse_tree
from specsa_jax.nsa.rows import block_rows
from specsa_jax.planning.profile import Interpolation, Point, Profile, ProfileError, StepTime

# How far apart, in doublings of batch, context or width, points of different kinds count: of chains and trees, or with
# other schedules, groups or precision.
KIND_DISTANCE = 4.0
# How firmly counted coefficients hold where measured times do not say otherwise: as a relative residual of so much.
_PRIOR, _LEAST_SCALE = 0.03, 0.01
# Operations of a layer, as launched: norms, projections, MLP, commit, and the attention of a reuse layer. A refresh
# layer's attention has two more (docs/architecture.md).
_LAUNCHES, _REFRESH_LAUNCHES = 12, 2
# Of a layer in class strict, beside them: for each block of rows (specsa_jax/nsa/rows.py), and as many again for its
# attention. On an H200 a block takes a layer 55 us, as 15 launches of 3.8 us (end_to_end.json).
_STRICT_LAUNCHES = 15
_PREFILL_CHUNK = 512


@dataclasses.dataclass(frozen=True, eq=False)
class Costs:
    """Seconds of steps, drafts and prompts of one model. Made by :meth:`from_profile` or :meth:`from_bytes`.

    Attributes:
      config: the model.
      rates: what bytes and operations cost.
      coefficients: float64, of :func:`_features`.
      profile: what was measured; None: nothing was.
    """

    config: ModelConfig
    rates: _Rates
    coefficients: np.ndarray
    profile: Profile | None = None

    @classmethod
    def from_profile(cls, profile: Profile, config: ModelConfig) -> Costs:
        """Fitted to the measured steps. Raises ProfileError for a profile without any."""
        if not profile.steps:
            raise ProfileError("profile: has no step times, expected at least one; measure with specsa profile")
        rates = _Rates(jnp.dtype(profile.dtype).itemsize, profile.bandwidth, profile.flops, profile.overhead)
        return cls(config, rates, _fit(profile.steps, config, rates), profile)

    @classmethod
    def from_bytes(cls, config: ModelConfig, dtype: Any, bandwidth: float, flops: float, overhead: float) -> Costs:
        """Counted; :func:`measure_bandwidth` gives the last three: bytes/s, operations/s, seconds of an operation.

        Bytes and operations are taken to follow each other, and each query to load its blocks alone: too much where a
        device does both at once, or queries share blocks. Raises ValueError for rates that are not above 0.
        """
        for name, value in (("bandwidth", bandwidth), ("flops", flops), ("overhead", overhead)):
            if not value > 0:
                raise ValueError(f"{name}: got {value}, expected above 0")
        rates = _Rates(jnp.dtype(dtype).itemsize, bandwidth, flops, overhead)
        return cls(config, rates, _counted(config, rates))

    @property
    def measured(self) -> bool:
        """Whether there is a profile behind it."""
        return self.profile is not None

    def step(self, point: Point) -> float:
        """Of verifying, accepting and committing; without drafting. Exact at measured points."""
        if point not in self._known:  # planners ask again and again
            self._known[point] = self._fitted(point) * self._misses["step"](*_place(point))
        return self._known[point]

    def draft(self, drafter: str, tree: str, width: int, batch: int, context: int) -> float:
        """Of proposing ``tree`` (of ``width`` nodes, the pending token included) and observing what stands; 0 for
        "none".

        Drafters that were not measured are counted, and corrected as those are that were. Raises ValueError for a tree
        that cannot be read.
        """
        if drafter == "none":
            return 0.0
        asked = drafter, tree, width, batch, context
        if asked not in self._known:
            counted = self._count_draft(drafter, tree, batch, context)
            self._known[asked] = counted * self._misses["draft"]((batch, context, width), (drafter, tree))
        return self._known[asked]

    def prefill(self, batch: int, tokens: int) -> float:
        """Of reading prompts of ``tokens`` tokens, ``batch`` of them together."""
        return self._count_prefill(batch, tokens) * self._misses["prefill"]((batch, tokens), ())

    def watching(self, batch: int, tokens: int) -> float:
        """What reading prompts takes longer where a drafter is shown them: as much as two layers more (of a head, which
        has one and the products with the features: end_to_end.json)."""
        return 2 * self.prefill(batch, tokens) / self.config.layers

    @functools.cached_property
    def _known(self) -> dict[Any, float]:
        """What was asked before."""
        return {}

    @functools.cached_property
    def _misses(self) -> dict[str, _Misses]:
        """Measured over calculated, of what was measured."""
        had = self.profile
        steps, drafts, prefills = ((), (), ()) if had is None else (had.steps, had.drafts, had.prefills)
        return {
            "step": _Misses([(*_place(s.point), s.seconds / self._fitted(s.point)) for s in steps]),
            "draft": _Misses([
                ((d.batch, d.context, parse_tree(d.tree).nodes + 1), (d.drafter, d.tree),
                 d.seconds / self._count_draft(d.drafter, d.tree, d.batch, d.context))
                for d in drafts
            ]),
            "prefill": _Misses([
                ((p.batch, p.tokens), (), p.seconds / self._count_prefill(p.batch, p.tokens)) for p in prefills
            ]),
        }  # fmt: skip

    def _fitted(self, point: Point) -> float:
        return float(_features(point, self.config.layers) @ self.coefficients)

    def _count_draft(self, drafter: str, tree: str, batch: int, context: int) -> float:
        first, plus, second = drafter.partition("+")
        if plus:  # the second runs unless the first serves every sequence
            return sum(self._count_draft(one, tree, batch, context) for one in (first, second))
        (kind, _, where), template, rates = first.partition(":"), parse_tree(tree), self.rates
        if kind == "lookup":
            passes = PromptLookup.max_ngram + (1 if template.is_chain else PromptLookup.matches)
            return passes * (rates.overhead + 2 * 4 * batch * context / rates.bandwidth)
        level = -(-template.nodes // template.depth)  # nodes that a pass adds
        if kind in ("self", "model"):  # each pass evaluates the tree so far
            config, coefficients = self.config, self.coefficients
            if kind == "model":
                config = load_config(where)
                coefficients = _counted(config, rates)
            trees = (Point(batch, context, 1 + step * level) for step in range(template.depth))
            return float(sum(_features(tree, config.layers) @ coefficients for tree in trees))
        # A head, and whatever one's own drafter is: a layer and the output matrix a pass.
        layer = dataclasses.replace(self.config, layers=1)
        once = (_LAUNCHES * rates.overhead) + _weights(layer) * (
            rates.itemsize / rates.bandwidth + 2 * batch * level / rates.flops
        )
        return template.depth * once

    def _count_prefill(self, batch: int, tokens: int) -> float:
        """Chunks, each behind half of the prompt on average."""
        chunk = min(_PREFILL_CHUNK, tokens)
        return -(-tokens // chunk) * self._fitted(Point(batch, max(1, tokens // 2), chunk))


@dataclasses.dataclass(frozen=True)
class _Rates:
    """Bytes of a value; bytes/s, operations/s, seconds of a small operation."""

    itemsize: int
    bandwidth: float
    flops: float
    overhead: float


def _features(point: Point, layers: int) -> np.ndarray:
    """What a step does, as float64 [9]: launches of its layers, of refresh layers, of class strict; weights; sequences;
    tokens; compressed entries read, by layers that do; their scores; their importance, by refresh layers."""
    sharing = point.sharing
    refresh = sharing.schedule.count("F") or layers
    compressed = layers if sharing.keep_compressed else refresh
    tokens = point.batch * point.width
    strict = 1 + -(-tokens // block_rows()) if point.precision == "strict" else 0
    return np.array([
        1, refresh, strict, 1, point.batch, tokens, point.batch * point.context * compressed,
        tokens * point.context * compressed, tokens * point.context * refresh,
    ], np.float64)  # fmt: skip


# Which of the features are launches.
_LAUNCHED = np.arange(9) < 3


def _weights(config: ModelConfig) -> int:
    """Parameters that a token is multiplied with, the output matrix included."""
    nsa = config.nsa
    projections = config.hidden * nsa.head_dim * 2 * (nsa.num_heads + nsa.branch_sets * nsa.num_kv_heads)
    mlp = (3 if config.mlp == "swiglu" else 2) * config.hidden * config.intermediate
    return config.layers * (projections + config.hidden * nsa.gate_outputs + mlp) + config.vocab_size * config.hidden


def _counted(config: ModelConfig, rates: _Rates) -> np.ndarray:
    """Seconds of each of the features, float64 [9]: bytes over bandwidth, operations over throughput."""
    nsa, byte, operation = config.nsa, rates.itemsize / rates.bandwidth, 1 / rates.flops
    kinds = 2 if nsa.compressed_output else 1  # keys, and values
    heads, kv = nsa.num_heads * nsa.head_dim, nsa.num_kv_heads * nsa.head_dim
    selected, weights = nsa.num_selected * nsa.select_block, _weights(config)
    return np.array([
        config.layers * _LAUNCHES * rates.overhead,
        _REFRESH_LAUNCHES * rates.overhead,
        config.layers * _STRICT_LAUNCHES * rates.overhead,
        weights * byte,
        config.layers * 2 * nsa.window * kv * byte,
        2 * weights * operation + config.layers * (2 * selected * kv * byte
                                                   + 4 * (selected + nsa.window) * heads * operation),
        kinds * kv / nsa.compress_stride * byte,
        2 * kinds * heads / nsa.compress_stride * operation,
        2 * 4 * nsa.num_heads / nsa.compress_stride / rates.bandwidth,  # float32 probabilities, written and read
    ])  # fmt: skip


def _fit(steps: Sequence[StepTime], config: ModelConfig, rates: _Rates) -> np.ndarray:
    """Coefficients of the features that make the relative errors of ``steps`` small."""
    counted = _counted(config, rates)
    share = np.stack([_features(s.point, config.layers) * counted / s.seconds for s in steps])
    # Of launches and of all else, counted to measured: what more of the time is made of, more is off.
    both = np.stack([share[:, _LAUNCHED].sum(axis=1), share[:, ~_LAUNCHED].sum(axis=1)], axis=1)
    launches, others = np.maximum(_near_one(both), _LEAST_SCALE)
    scale = np.where(_LAUNCHED, launches, others)
    return _near_one(share * scale) * scale * counted


def _near_one(shares: np.ndarray) -> np.ndarray:
    """Factors float64 [F] of ``shares`` [N, F] by which each row comes near a sum of 1; near 1 where rows say
    nothing."""
    count = shares.shape[1]
    rows = np.concatenate([shares, _PRIOR * np.eye(count)])
    return nnls(rows, np.concatenate([np.ones(len(shares)), np.full(count, _PRIOR)]))[0]


def _place(point: Point) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Where a point lies: its numbers, and its kind."""
    sharing = point.sharing
    return (point.batch, point.context, point.width), (
        point.chain, (sharing.schedule, sharing.keep_compressed), (sharing.group, sharing.group_mode), point.precision,
    )  # fmt: skip


class _Misses:
    """Measured over calculated, between measured points: a mean of the logarithm, weighted by inverse squared distance
    in doublings (Shepard's interpolation); 1 where nothing was measured.

    Args:
      measured: (numbers, kinds, measured over calculated), lengths alike in all.
    """

    def __init__(self, measured: Sequence[tuple[tuple[int, ...], tuple[Any, ...], float]]):
        self.numbers = np.log2([numbers for numbers, _, _ in measured])
        self.kinds = [kinds for _, kinds, _ in measured]
        self.misses = np.log([max(miss, 1e-9) for _, _, miss in measured])

    def __call__(self, numbers: tuple[int, ...], kinds: tuple[Any, ...]) -> float:
        if not self.kinds:
            return 1.0
        unlike = np.array([sum(a != b for a, b in zip(kinds, other, strict=True)) for other in self.kinds])
        far = ((self.numbers - np.log2(numbers)) ** 2).sum(axis=1) + KIND_DISTANCE**2 * unlike
        if (here := far == 0).any():
            return float(np.exp(self.misses[here].mean()))
        return float(np.exp((self.misses / far).sum() / (1 / far).sum()))


def interpolation_error(profile: Profile, config: ModelConfig) -> Interpolation | None:
    """The relative error of step times between measured ones: each measured step's from all the others.

    The outermost points are among them, so it is, there, that of going beyond what is measured. None for fewer than 3.
    """
    steps, errors = profile.steps, []
    if len(steps) < 3:
        return None
    for index, one in enumerate(steps):
        others = dataclasses.replace(profile, steps=steps[:index] + steps[index + 1 :])
        errors.append(abs(Costs.from_profile(others, config).step(one.point) / one.seconds - 1))
    return Interpolation(len(errors), float(np.median(errors)), float(np.quantile(errors, 0.9)), max(errors))


def measure_bandwidth(dtype: Any) -> tuple[float, float, float]:
    """Bytes/s of a copy larger than the caches (what is read and what is written both count), operations/s of a matmul
    in ``dtype``, and seconds of a small operation in a compiled loop; best of a few, within about a second."""
    on_gpu = jax.default_backend() == "gpu"
    dtype = jnp.dtype(dtype)

    def fastest(step: Callable[[jax.Array], jax.Array], x: jax.Array, steps: int) -> float:
        loop = jax.jit(lambda x: jax.lax.fori_loop(0, steps, lambda _, x: step(x), x), donate_argnums=0)
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
            x, times = jax.block_until_ready(loop(x)), []
            for _ in range(3):
                begun = time.perf_counter()
                x = jax.block_until_ready(loop(x))
                times.append(time.perf_counter() - begun)
        return min(times) / steps

    size = (1024 if on_gpu else 256) << 20
    copy = fastest(lambda x: -x, jnp.ones(size // dtype.itemsize, dtype), 4)
    side = 4096 if on_gpu else 512
    matmul = fastest(lambda x: x @ x, jnp.eye(side, dtype=dtype), 8)
    small = fastest(lambda x: x @ x, jnp.eye(16, dtype=dtype), 512)
    return 2 * size / copy, 2 * side**3 / matmul, small
