"""What an engine computes with: a model's compiled programs, its drafters' weights and states, caches that fit."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from pallas_kernels import Implementation
from specsa_jax.cache import CacheBytes, CapacityError, cache_bytes, create_cache, pages_for
from specsa_jax.compiling import compiler_options
from specsa_jax.config import ModelConfig
from specsa_jax.decoding import Decoder, State
from specsa_jax.drafting import Drafter, Target
from specsa_jax.drafting.watching import Watching
from specsa_jax.nsa import kernels
from specsa_jax.prompts import end_ids, whole_number
from specsa_jax.sampling import Sampling
from specsa_jax.strategy import Precision, Strategy


class Runtime:
    """One model on the present device. Arguments as of :class:`specsa_jax.Engine`, which is one.

    Attributes:
      decoder: the jitted functions.
      ready: by shapes (:func:`signature`), the strategies whose loop is compiled for them.
      compile_times: seconds that compiling each loop took.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        dtype: Any = None,
        max_length: int | None = None,
        max_cache_bytes: int | None = None,
        prefill_chunk: int | None = None,
        implementation: Implementation | None = None,
        end_tokens: Sequence[int] | None = None,
    ):
        on_gpu = jax.default_backend() == "gpu"
        if dtype is None:
            dtype = jnp.bfloat16 if on_gpu else jnp.float32
        if prefill_chunk is None:
            prefill_chunk = 512 if on_gpu else 64
        self.config, self.tokenizer, self.dtype = config, tokenizer, _floating(dtype)
        self.max_length = whole_number("max_length", config.max_length if max_length is None else max_length)
        self.max_cache_bytes = None if max_cache_bytes is None else whole_number("max_cache_bytes", max_cache_bytes)
        self.prefill_chunk = whole_number("prefill_chunk", prefill_chunk)
        self.params = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), params)
        end = tokenizer.token_to_id("<|endoftext|>")
        self.end_tokens: tuple[int, ...] = () if end is None else (end,)
        if end_tokens is not None:
            self.end_tokens = end_ids(tokenizer, config.vocab_size, end_tokens)
        self.implementation = kernels.choose(config.nsa, self.max_length, implementation)
        self.decoder = Decoder(config, self.dtype, self.end_tokens, self.implementation)
        self.ready: dict[Any, set[Strategy]] = {}
        self.compile_times: list[float] = []
        self._compiled: dict[Any, Any] = {}
        self._compiling: dict[Any, threading.Lock] = {}
        self._draft_params: dict[Drafter, Any] = {}

    # --- programs -----------------------------------------------------------------------------------------------------

    def executable(self, kind: Any, static: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Callable, float]:
        """The compiled function for these shapes, and the seconds that compiling it took now (0 if it was there).

        ``kind``: a jitted function, or the name of one of the decoder's.
        """
        leaves, structure = jax.tree.flatten((args, kwargs))
        key = (kind, *static.values(), structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        begun = time.perf_counter()
        with self._compiling.setdefault(key, threading.Lock()):  # who comes second finds what the first one compiled
            if key in self._compiled:
                return self._compiled[key], 0.0
            strict = "strict" in (static.get("precision"), getattr(static.get("strategy"), "precision", None))
            # float32 means float32: a GPU's default would round the factors to TF32.
            with jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else "default"):
                jitted = getattr(self.decoder, kind) if isinstance(kind, str) else kind
                lowered = jitted.lower(*args, **kwargs, **static)
                self._compiled[key] = lowered.compile(compiler_options(self.dtype, strict))
            return self._compiled[key], time.perf_counter() - begun

    def prefill_program(
        self, state: State, chunk: int, observer: Drafter | None, precision: Precision
    ) -> tuple[Callable, float, dict[str, Any]]:
        """The compiled prefill, what compiling took, and the keyword arguments that it wants."""
        drafter = observer if observer is not None and observer.observes else None
        shown = {} if drafter is None else {"draft_params": self.load_drafter(drafter)}
        static = {"chunk": chunk, "drafter": drafter, "precision": precision}
        prefill, seconds = self.executable("prefill", static, self.params, state, jnp.int32(0), **shown)
        return prefill, seconds, shown

    def decode_program(
        self, strategy: Strategy, state: State, sampling: Sampling, *, alone: bool = True
    ) -> tuple[Callable, float]:
        """The compiled loop for a strategy, with its drafter's weights; and what compiling took. Not ``alone``: others
        are compiled at the same time, so that says nothing of the next."""
        draft_params = self.load_drafter(strategy.drafter)
        decode, seconds = self.executable(
            "decode", {"strategy": strategy}, self.params, state, sampling, jnp.int32(0), draft_params=draft_params
        )  # fmt: skip
        if seconds and alone:
            self.compile_times.append(seconds)
        self.ready.setdefault(signature(state), set()).add(strategy)
        return functools.partial(decode, draft_params=draft_params), seconds

    def forget_programs(self) -> None:
        """Drops all compiled programs: a process has room for some hundreds."""
        self._compiled.clear()
        self._compiling.clear()
        self.ready.clear()
        jax.clear_caches()

    def chunk(self, longest: int, precision: Precision = "exact") -> int:
        """Tokens of a pass over prompts; always as many for strict kernels, which keep bits in calls of one length."""
        if precision == "strict" and self.implementation == "pallas":
            return self.prefill_chunk
        return min(self.prefill_chunk, max(16, 1 << (longest - 1).bit_length()))

    # --- drafters -----------------------------------------------------------------------------------------------------

    def load_drafter(self, drafter: Drafter | None) -> Any:
        """The drafter's weights, loaded once. Raises ValueError where it does not belong to this model."""
        if drafter is None:
            return ()
        if isinstance(drafter, Watching):
            return drafter.gather(self.load_drafter)
        if drafter not in self._draft_params:
            target = Target(self.config, self.params, self.tokenizer, self.dtype)
            self._draft_params[drafter] = drafter.load(target)
        return self._draft_params[drafter]

    def draft_state(self, drafter: Drafter | None, batch: int, columns: int, abstract: bool = False) -> Any:
        """The drafter's state before any token, beside a page table of so many columns; ``abstract``: its shapes."""
        if drafter is None:
            return ()
        capacity = columns * self.config.nsa.select_block

        def init() -> Any:
            return drafter.init(self.config, batch, capacity, self.dtype)

        return jax.eval_shape(init) if abstract else init()

    # --- memory -------------------------------------------------------------------------------------------------------

    def initial_state(self, rows: list[np.ndarray], pages: np.ndarray, max_new_tokens: int) -> State:
        """Before any work: ``rows`` of token ids int32 [T], in a cache with the page table of :meth:`plan_pages`."""
        page = self.config.nsa.select_block
        pool = bucket(sum(len(pages_row[pages_row >= 0]) for pages_row in pages))
        cache = create_cache(self.config, np.where(pages < 0, pool, pages), pool, self.dtype)
        buffer = np.zeros((len(rows), pages.shape[1] * page + 1), np.int32)
        for index, row in enumerate(rows):
            buffer[index, : len(row)] = row
        lengths = np.array([len(row) for row in rows], np.int32)
        return State(
            cache, jnp.asarray(buffer), jnp.asarray(lengths), jnp.asarray(lengths + max_new_tokens),
            jnp.zeros(len(rows), bool), jnp.zeros(buffer.shape, jnp.float32),
        )  # fmt: skip

    def plan_pages(
        self, rows: list[np.ndarray], max_new_tokens: int, strategy: Strategy
    ) -> tuple[np.ndarray, CacheBytes]:
        """Page table with −1 where there is no page, and the cache's size. Raises CapacityError.

        The table's width is a bucket; in the strict class, whose programs it shapes, always that of ``max_length``.
        """
        for index, row in enumerate(rows):
            if len(row) + max_new_tokens > self.max_length:
                raise CapacityError(
                    f"prompts[{index}]: {len(row)} tokens and max_new_tokens = {max_new_tokens} make "
                    f"{len(row) + max_new_tokens}, expected at most {self.max_length} (max_length)"
                )
        counts = [pages_for(self.config.nsa, len(row) + max_new_tokens) for row in rows]
        longest = pages_for(self.config.nsa, self.max_length) if strategy.precision == "strict" else max(counts)
        width = bucket(longest)
        size = cache_bytes(self.config, bucket(sum(counts)), len(rows), self.dtype)
        drafts = self.draft_state(strategy.drafter, len(rows), width, abstract=True)
        needed = size.total + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(drafts))
        limit = _free_memory() * 9 // 10 if self.max_cache_bytes is None else self.max_cache_bytes
        if needed > limit:
            raise CapacityError(
                f"prompts: {len(rows)} sequences need a cache of {needed:,} bytes ({sum(counts)} pages of "
                f"{self.config.nsa.select_block} tokens, and the drafter's), expected at most {limit:,}"
            )
        table = np.full((len(rows), width), -1)
        first = 0
        for row, count in zip(table, counts, strict=True):
            row[:count] = np.arange(first, first + count)
            first += count
        return table, size


def signature(state: State) -> Any:
    """What a compiled loop's shapes depend on, but for the drafter's state, which the strategy determines."""
    return tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state._replace(draft=())))


def _floating(dtype: Any) -> jnp.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"dtype: got {dtype!r}, expected bfloat16 or float32") from error
    if found not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"dtype: got {found}, expected bfloat16 or float32")
    return found


def bucket(count: int) -> int:
    """``count`` rounded up to an eighth of its power of two, so that near lengths share a compiled program."""
    step = max(1, (1 << (max(count, 1) - 1).bit_length()) // 16)
    return -(-count // step) * step


def _free_memory() -> int:
    """Bytes free on the default device, or on the host where the device does not say."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
