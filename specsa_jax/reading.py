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

# Tokens of each prompt that a call of the compiled prefill reads, by backend: so few that Ctrl-C is heard, and on a GPU
# so many that it is busy for longer than a plan takes.
_TOKENS = {"cpu": 1024, "gpu": 4096}


class Reader:
    """Reads the prompts of one call.

    Args:
      runtime: whose programs they are.
      rows, pages, max_new_tokens: of :meth:`specsa_jax.runtime.Runtime.initial_state`.
      precision: class of the passes.

    Attributes:
      state: what has been sent to the device so far gives.
      seconds: since the first :meth:`start`, of reading everything; compilation is in ``compile_seconds`` alone.
    """

    def __init__(
        self, runtime: Runtime, rows: list[np.ndarray], pages: np.ndarray, max_new_tokens: int, precision: Precision
    ):
        self._initial = functools.partial(runtime.initial_state, rows, pages, max_new_tokens)
        self._runtime, self._precision, self._pages = runtime, precision, pages
        self._longest = max(len(row) for row in rows)
        self._chunk = runtime.chunk(self._longest, precision)
        self._calls, self._begun = 0, 0.0
        self._prefill: Callable[[State], State]
        self.state = self._initial()
        self.seconds = self.compile_seconds = 0.0

    def start(self, observer: Drafter | None) -> None:
        """Sends the first chunks to the device, and does not wait. ``observer`` is shown what is read; begins anew if
        another one was."""
        if self._calls:
            jax.block_until_ready(self.state)  # its memory is wanted again
            del self.state
            self.state = self._initial()
        runtime, state = self._runtime, self.state
        state = state._replace(draft=runtime.draft_state(observer, *self._pages.shape))
        program, compiled, shown = runtime.prefill_program(state, self._chunk, observer, self._precision)
        few = np.int32(max(1, _TOKENS.get(jax.default_backend(), 1024) // self._chunk))
        self._prefill = functools.partial(_read, program, runtime.params, few, shown)
        self._calls = -(-self._longest // (int(few) * self._chunk))
        self.compile_seconds += compiled
        self._begun = self._begun + compiled if self._begun else time.perf_counter()
        self.state = self._prefill(state)

    @property
    def is_busy(self) -> bool:
        """Whether the device still reads what it was sent."""
        length: Any = self.state.cache.lengths  # whose stub lacks it
        return not length.is_ready()

    def finish(self) -> State:
        """Waits until everything is read. Gives the state away."""
        for _ in range(1, self._calls):
            self.state = self._prefill(jax.block_until_ready(self.state))
        state = jax.block_until_ready(self.state)
        del self.state
        self.seconds += time.perf_counter() - self._begun
        return state


def _read(program: Callable[..., State], params: Any, few: np.int32, shown: dict[str, Any], state: State) -> State:
    return program(params, state, few, **shown)
