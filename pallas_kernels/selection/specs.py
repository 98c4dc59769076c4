"""Named arguments for ``select_blocks``: one list for the tests, one for benchmarks and tuning."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class SelectionSpec:
    """Arguments of one call.

    Attributes:
      name: what is special about it.
      shape: of ``importance``.
      positions: lowest and highest position, drawn uniformly; None: every row at the end of its N blocks.
      positions_shape: None: one position per row.
      scores: ``wide``: many orders of magnitude; ``ties``: three values; ``special``: negative, −0, NaN and +inf too.
    """

    name: str
    shape: tuple[int, ...]
    positions: tuple[int, int] | None = None
    positions_shape: tuple[int, ...] | None = None
    scores: Literal["uniform", "wide", "ties", "zeros", "special"] = "uniform"
    select_block: int = 64
    num_selected: int = 16
    num_initial: int = 1
    num_local: int = 2

    @property
    def counts(self) -> dict[str, int]:
        """The static keyword arguments."""
        return {name: getattr(self, name) for name in ("select_block", "num_selected", "num_initial", "num_local")}

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def bytes(self) -> int:
        """What the operation has to move: scores and positions once, ids once."""
        return 4 * (math.prod(self.shape) + math.prod(self._positions_shape) + self.rows * self.num_selected)

    @property
    def _positions_shape(self) -> tuple[int, ...]:
        return self.shape[:-1] if self.positions_shape is None else self.positions_shape

    def abstract(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the array arguments."""
        return (
            jax.ShapeDtypeStruct(self.shape, jnp.float32),
            jax.ShapeDtypeStruct(self._positions_shape, jnp.int32),
        )

    def arguments(self, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """``importance`` and ``positions``."""
        rng = np.random.default_rng(seed)
        match self.scores:
            case "uniform":
                scores = rng.random(self.shape)
            case "wide":
                scores = np.exp(rng.normal(-10, 5, self.shape))
            case "ties":
                scores = rng.choice([0.0, 1e-3, 0.5], self.shape, p=[0.6, 0.3, 0.1])
            case "zeros":
                scores = np.zeros(self.shape)
            case "special":
                finite = np.finfo(np.float32)
                values = np.array([0.0, -0.0, -1.0, np.nan, np.inf, finite.max, finite.tiny, 1.0])
                scores = rng.choice(values, self.shape)
        end = self.shape[-1] * self.select_block - 1
        low, high = self.positions or (end, end)
        positions = rng.integers(low, high, self._positions_shape, endpoint=True)
        return scores.astype(np.float32), positions.astype(np.int32)


_LAST = 2**31 - 1
TESTS = [
    SelectionSpec("random", (2, 3, 4, 128), (0, 8191)),
    SelectionSpec("odd-N", (3, 5, 101), (0, 101 * 64 - 1)),
    SelectionSpec("N-1", (3, 1), (0, 63)),
    SelectionSpec("N-3-below-n", (5, 3), (0, 191)),
    SelectionSpec("one-block-sequences", (4, 2, 37), (0, 63)),
    SelectionSpec("local-block-is-initial", (8, 16), (0, 127)),
    SelectionSpec("full-capacity", (2, 4, 256)),
    SelectionSpec("past-capacity", (4, 50), (50 * 64, 60 * 64)),
    SelectionSpec("n-above-available", (6, 64), (0, 15 * 64)),
    SelectionSpec("negative-positions", (8, 20), (-70, 70)),
    SelectionSpec("largest-positions", (4, 33), (_LAST - 64, _LAST)),
    SelectionSpec("largest-positions-of-one-token-blocks", (2, 33), (_LAST, _LAST), select_block=1),
    SelectionSpec("zeros", (4, 200), scores="zeros"),
    SelectionSpec("ties", (2, 8, 300), (0, 300 * 64 - 1), scores="ties"),
    SelectionSpec("wide", (8, 250), (5000, 15999), scores="wide"),
    SelectionSpec("special-values", (8, 90), scores="special"),
    SelectionSpec("scalar-batch", (77,)),
    SelectionSpec("no-rows", (0, 5, 8)),
    SelectionSpec("position-per-sequence-and-token", (2, 3, 4, 70), (0, 4479), positions_shape=(2, 3, 1)),
    SelectionSpec("position-per-token", (2, 3, 4, 70), (0, 4479), positions_shape=(3, 1)),
    SelectionSpec("position-heads-first", (2, 4, 3, 70), (0, 4479), positions_shape=(2, 1, 3)),
    SelectionSpec("one-position", (3, 4, 70), (4000, 4000), positions_shape=()),
    SelectionSpec("only-forced", (5, 40), (0, 2559), num_selected=3),
    SelectionSpec("nothing-forced", (5, 40), (0, 2559), num_initial=0, num_local=0),
    SelectionSpec("many-forced", (5, 90), (0, 5759), num_selected=24, num_initial=4, num_local=17),
    SelectionSpec("n-1", (5, 40), (0, 2559), num_selected=1, num_initial=0, num_local=1),
    SelectionSpec("n-64-odd-block", (4, 333), (0, 333 * 48 - 1), select_block=48, num_selected=64, num_local=8),
    SelectionSpec("n-65-of-N-64", (2, 64), num_selected=65, scores="ties"),
    SelectionSpec("N-4096", (2, 4096), (200_000, 262_143), scores="wide"),
    SelectionSpec("N-4097-ties", (2, 4097), scores="ties", num_selected=63),
    SelectionSpec("largest-N-equal", (1, 2**14), scores="zeros"),
]

# [batch, T, Hkv, N], one position for all heads of a token.
BENCHMARKS = [
    SelectionSpec(f"B{b}-T{t}-H8-N{n}", (b, t, 8, n), positions_shape=(b, t, 1), scores="wide")
    for n in (256, 1024)
    for b, t in ((1, 1), (1, 8), (1, 64), (8, 8), (32, 8), (32, 16))
] + [SelectionSpec("B8-T8-H8-N4096", (8, 8, 8, 4096), positions_shape=(8, 8, 1), scores="wide")]
