"""Decoding of one call, a segment after the other: what goes to the device, and what is read of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax.decoding import Counts, State, add_counts
from specsa_jax.planning.plan import Fixed, Plan
from specsa_jax.runtime import Runtime
from specsa_jax.sampling import Sampling
from specsa_jax.strategy import Strategy

# Steps between two looks of the host when text is streamed or stop strings are watched for, and otherwise.
STREAM_STEPS, QUIET_STEPS = 8, 512


class Read(NamedTuple):
    """What a segment, or a part of it, gave.

    Attributes:
      known, done: of :class:`specsa_jax.decoding.State`, in NumPy.
      counts: of its steps; ``seconds``: that they took, without reading the text.
      tokens: int32 [B, S], where the plan or the text wants them; else (). ``logprobs``: float32 [B, S], where the text
        is wanted; else ().
    """

    known: np.ndarray
    done: np.ndarray
    counts: Counts
    seconds: float
    tokens: Any
    logprobs: Any


class Segments:
    """The compiled loops of a call, by the strategies that ``course`` chooses. Nothing else runs between two segments.

    Attributes:
      totals: counts of all steps; ``seconds`` that they and reading them took, and ``compile_seconds``.
    """

    def __init__(self, runtime: Runtime, state: State, sampling: Sampling, course: Plan | Fixed, streamed: bool):
        self.course, self.seconds, self.compile_seconds = course, 0.0, 0.0
        self.totals: Counts | None = None
        self._runtime, self._state, self._sampling = runtime, state, sampling
        self._streamed, self._per_call = streamed, STREAM_STEPS if streamed else QUIET_STEPS
        self._programs: dict[Strategy, Callable[..., Any]] = {}

    def run(self, left: int) -> Read:
        """Some steps of the course's strategy; ``left``: tokens that the running sequences may still give."""
        course = self.course
        if isinstance(course, Plan) and not course.watchers:
            self._state = self._state._replace(draft=())  # nobody watches any more
        if course.strategy not in self._programs:
            program, seconds = self._runtime.decode_program(course.strategy, self._state, self._sampling)
            self._programs[course.strategy] = program
            self.compile_seconds += seconds
        program = self._programs[course.strategy]
        steps = int(max(1, min(self._per_call, course.steps_left)))
        ends = self._streamed or course.steps_left >= left  # the text is wanted, or this goes to the end
        looked = course.wants_text and steps >= course.steps_left
        begun = time.perf_counter()
        state, counts = program(self._runtime.params, self._state, self._sampling, np.int32(steps))
        known, done, counts = jax.device_get((state.known, state.done, counts))
        seconds = time.perf_counter() - begun
        ends = ends or bool(done.all())
        tokens, logprobs = jax.device_get((state.tokens if ends or looked else (), state.logprobs if ends else ()))
        self._state, self.totals = state, add_counts(self.totals, counts)
        self.seconds += time.perf_counter() - begun
        return Read(known, done, counts, seconds, tokens, logprobs)

    def stop(self, done: np.ndarray) -> None:
        """Ends sequences, bool [B], for what only the host sees."""
        self._state = self._state._replace(done=jnp.asarray(done))

    def tell(self, read: Read, finished: np.ndarray, new_tokens: int, left: int) -> None:
        """Tells the course what was read, and goes where it goes."""
        self.course.look(read.tokens, read.known, finished)
        self.course.observe(read.counts, read.seconds, new_tokens, int((~finished).sum()), left)
