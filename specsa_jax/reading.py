"""Prompts on their way into the cache. The first plan of a call is made meanwhile, where it is known who watches."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from specsa_jax.decoding import State
from specsa_jax.drafting import Drafter
from specsa_jax.runtime import Runtime
from specsa_jax.strategy import Precision

# Tokens of each prompt that a call of the compiled prefill reads, by backend: so few that Ctrl-C is heard; and calls
# that are sent at once to begin with: a GPU is busy with so many for longer than a plan takes.
_TOKENS, _AHEAD = {"cpu": 1024, "gpu": 4096}, 2


class Reader:
    """Reads the prompts of one call.

    Args:
      runtime: whose programs they are.
      rows, pages, max_new_tokens: of :meth:`specsa_jax.runtime.Runtime.initial_state`.
      precision: class of the passes.

    Attributes:
      state: what has been sent to the device so far gives.
      seconds: from the first :meth:`start` to the end; compilation is in ``compile_seconds`` alone.
    """

    def __init__(
        self, runtime: Runtime, rows: list[np.ndarray], pages: np.ndarray, max_new_tokens: int, precision: Precision
    ):
        self._initial = functools.partial(runtime.initial_state, rows, pages, max_new_tokens)
        self._runtime, self._precision, self._pages = runtime, precision, pages
        self._longest = max(len(row) for row in rows)
        self._chunk = runtime.chunk(self._longest, precision)
        self._calls, self._sent, self._begun = 0, 0, 0.0
        self._prefill: Callable[..., State]
        self._few = np.int32(0)
        self.state = self._initial()
        self.seconds = self.compile_seconds = 0.0

    def start(self, observer: Drafter | None) -> None:
        """Sends the first chunks to the device, and does not wait. ``observer`` is shown what is read.

        Anew if it had been started; but where nobody is to be shown what is read any more, reading goes on.
        """
        again = self._sent > 0
        if again and (observer is None or not observer.observes):
            if self._sent == self._calls:
                self.state = self.state._replace(draft=())
            else:
                self._compile(observer)
            return
        if again:
            jax.block_until_ready(self.state)  # its memory is wanted again
            del self.state
            self.state = self._initial()
        self._compile(observer)
        few = max(1, _TOKENS.get(jax.default_backend(), 1024) // self._chunk)
        self._few, self._calls = np.int32(few), -(-self._longest // (few * self._chunk))
        self._begun, self._sent = self._begun or time.perf_counter(), 0
        for _ in range(min(_AHEAD, self._calls)):
            self._send(self.state)

    def _compile(self, observer: Drafter | None) -> None:
        """The program for ``observer``, whose state, before any token, takes the place of the one before."""
        runtime = self._runtime
        self.state = self.state._replace(draft=runtime.draft_state(observer, *self._pages.shape))
        program, compiled, shown = runtime.prefill_program(self.state, self._chunk, observer, self._precision)
        self._prefill = functools.partial(program, **shown)
        self.compile_seconds += compiled
        if self._begun:
            self._begun += compiled

    def _send(self, state: State) -> None:
        self.state = self._prefill(self._runtime.params, state, self._few)
        self._sent += 1

    @property
    def is_busy(self) -> bool:
        """Whether the device still reads what it was sent."""
        length: Any = self.state.cache.lengths  # whose stub lacks it
        return not length.is_ready()

    def finish(self) -> State:
        """Waits until everything is read. Gives the state away."""
        while self._sent < self._calls:
            self._send(jax.block_until_ready(self.state))
        state = jax.block_until_ready(self.state)
        del self.state
        self.seconds += time.perf_counter() - self._begun
        return state
