"""The engine: a checkpoint, its tokenizer and its compiled loops behind two calls, ``generate`` and ``score``.

import specsa_jax

engine = specsa_jax.Engine.from_pretrained("embedded")
result = engine.generate(["def main():\\n"], max_new_tokens=64)
print(result[0].text, result.stats.mean_acceptance_length)
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from pallas_kernels import Implementation
from specsa_jax import checkpoints
from specsa_jax.admission import Bound, admit, check_bound
from specsa_jax.cache import Cache, CacheBytes, CapacityError, cache_bytes, create_cache, pages_for
from specsa_jax.checkpoints import draft_head, records
from specsa_jax.checkpoints.records import Records
from specsa_jax.config import ModelConfig
from specsa_jax.decoding import Decoder, State
from specsa_jax.drafting import Drafter, Target
from specsa_jax.nsa import kernels
from specsa_jax.nsa.rows import STRICT_OPTIONS
from specsa_jax.results import Chunk, Output, Result, Stream, stats_of
from specsa_jax.sampling import SamplingParams, batch_sampling
from specsa_jax.schedule import parse_schedule
from specsa_jax.strategy import Precision, Strategy

# Steps between two looks of the host when text is streamed or stop strings are watched for, and otherwise.
_STREAM_STEPS, _QUIET_STEPS = 8, 512


class PromptError(ValueError):
    """A prompt or a generation argument that cannot be used; the message names it, what came and what was expected."""


class Engine:
    """Generates and scores text with one model. Not thread-safe.

    Args:
      config, params, tokenizer, end_tokens: as :func:`specsa_jax.checkpoints.load` gives them; without end_tokens,
        ``<|endoftext|>`` ends a text where the tokenizer has it.
      dtype: of computation and cache; None: bfloat16 on GPUs, float32 elsewhere.
      max_length: longest context served, in tokens; None: the model's.
      max_cache_bytes: refuse calls whose cache would be larger; None: nine tenths of the memory that is free.
      prefill_chunk: prompt tokens per forward pass of the prefill; None: 512 on GPUs, 64 elsewhere (where a chunk
        that stays in the CPU's caches is faster).
      precision: of strategies that are not given: "exact", "strict" or "approx" (:class:`Strategy`); and of scoring.
      implementation: of attention: "pallas" (the GPU kernels), "xla", or None: "pallas" where device and model allow
        it. UnsupportedError where "pallas" is named and does not run, with the reason.
      checkpoint: the directory that keeps what was measured of the model (:mod:`specsa_jax.checkpoints.records`).
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
        precision: Precision = "exact",
        implementation: Implementation | None = None,
        end_tokens: Sequence[int] | None = None,
        checkpoint: Path | None = None,
    ):
        on_gpu = jax.default_backend() == "gpu"
        if dtype is None:
            dtype = jnp.bfloat16 if on_gpu else jnp.float32
        if prefill_chunk is None:
            prefill_chunk = 512 if on_gpu else 64
        self.config, self.tokenizer, self.dtype = config, tokenizer, jnp.dtype(dtype)
        self.max_length = _whole("max_length", config.max_length if max_length is None else max_length)
        self.max_cache_bytes, self.precision = max_cache_bytes, precision
        Strategy(precision=precision)  # refused here rather than in each call
        self.prefill_chunk = _whole("prefill_chunk", prefill_chunk)
        self.params = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), params)
        end = tokenizer.token_to_id("<|endoftext|>")
        self.end_tokens = tuple(end_tokens) if end_tokens is not None else () if end is None else (end,)
        self.implementation = kernels.choose(config.nsa, self.max_length, implementation)
        self.decoder = Decoder(config, self.dtype, self.end_tokens, self.implementation)
        self._compiled: dict[Any, Any] = {}
        self._draft_params: dict[Drafter, Any] = {}
        self.checkpoint = checkpoint

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of config and weights: what says that measurements are of this very model."""
        return draft_head.fingerprint(self.config, self.params)

    @property
    def records(self) -> Records:
        """What was measured of this model and is stored with its checkpoint, read anew. Raises CheckpointError."""
        return Records(self.fingerprint) if self.checkpoint is None else records.load(self.checkpoint, self.fingerprint)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> Engine:
        """The engine of a packaged checkpoint ("embedded") or of a checkpoint directory; ``options`` as for Engine.

        A directory of a public format (``specsa_jax.checkpoints.formats``) is converted on the fly.

        Raises CheckpointError for an unknown, damaged or contradictory checkpoint.
        """
        checkpoint = checkpoints.load(name_or_path)
        options = {"end_tokens": checkpoint.end_tokens, "checkpoint": checkpoints.resolve(name_or_path), **options}
        return cls(checkpoint.config, checkpoint.params, checkpoint.tokenizer, **options)

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        sampling: Sequence[SamplingParams] | None = None,
        stop: Sequence[str] = (),
        speculate: bool = True,
        strategy: Strategy | None = None,
        max_kl: float | None = None,
        min_top1: float | None = None,
        on_chunk: Callable[[Chunk], None] | None = None,
    ) -> Result:
        """Continues a batch of prompts.

        Args:
          prompts: texts, or lists of token ids; one text stands for a batch of one.
          max_new_tokens: budget of each sequence.
          temperature, top_k, top_p: of all sequences (:class:`specsa_jax.sampling.SamplingParams`); sequence i
            gets seed ``seed`` + i.
          sampling: one SamplingParams per prompt, in place of the four above.
          stop: texts that end a sequence; they are cut off.
          speculate: False decodes one token at a time, by the same loop and in the strategy's precision.
          strategy: how to speculate; None: the default Strategy() in the engine's precision.
          max_kl, min_top1: in class approx, how far a strategy's next-token distributions may be from the exact ones
            (:class:`specsa_jax.admission.Bound`); a strategy with reuse layers or shared groups needs one of them.
          on_chunk: called with each piece of text as it becomes known.

        Raises PromptError or ValueError for bad arguments, PrecisionError for a strategy that the bound does not admit
        (it lists the nearest that it does) and CapacityError for requests that do not fit, all before any work.
        """
        stream = self.stream(
            prompts, max_new_tokens, temperature, top_k, top_p, seed,
            sampling=sampling, stop=stop, speculate=speculate, strategy=strategy, max_kl=max_kl, min_top1=min_top1,
            _quiet=on_chunk is None,
        )  # fmt: skip
        for chunk in stream:
            if on_chunk is not None:
                on_chunk(chunk)
        assert stream.result is not None
        return stream.result

    def stream(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        sampling: Sequence[SamplingParams] | None = None,
        stop: Sequence[str] = (),
        speculate: bool = True,
        strategy: Strategy | None = None,
        max_kl: float | None = None,
        min_top1: float | None = None,
        _quiet: bool = False,
    ) -> Stream:
        """As :meth:`generate`, but gives an iterator over chunks of text, which ends with ``stream.result`` set."""
        rows = self._encode(prompts)
        max_new_tokens = _whole("max_new_tokens", max_new_tokens)
        stop = self._stops(stop)
        if sampling is None:
            first = SamplingParams(temperature, top_k, top_p, seed)
            sampling = [dataclasses.replace(first, seed=(first.seed + i) % 2**32) for i in range(len(rows))]
        if not isinstance(sampling, Sequence) or not all(isinstance(one, SamplingParams) for one in sampling):
            raise PromptError(f"sampling: got {sampling!r}, expected a list of SamplingParams")
        if len(sampling) != len(rows):
            raise PromptError(f"sampling: got {len(sampling)} parameter sets, expected one per prompt ({len(rows)})")
        if not isinstance(strategy, Strategy | None):
            raise PromptError(f"strategy: got {strategy!r}, expected a Strategy")
        strategy = Strategy(precision=self.precision) if strategy is None else strategy
        if not speculate:
            strategy = Strategy(None, precision=strategy.precision, schedule=strategy.schedule,
                                keep_compressed=strategy.keep_compressed)  # fmt: skip
        strategy = self.resolve(strategy)
        self.decoder.check(strategy)
        sharing, bound = strategy.sharing(self.config.layers), Bound(max_kl, min_top1)
        check_bound(strategy, sharing, bound)
        if sharing.approximates and bound.finite:
            admit(self.records, bound, sharing, strategy.width, max(len(row) for row in rows) + max_new_tokens)
        draft_params = self._load_drafter(strategy.drafter)
        pages, size = self._plan_pages(rows, max_new_tokens, strategy)
        watched = bool(stop) or not _quiet
        return Stream(
            self._run(rows, max_new_tokens, list(sampling), stop, strategy, draft_params, pages, size, watched)
        )

    def _run(
        self,
        rows: list[np.ndarray],
        max_new_tokens: int,
        sampling: list[SamplingParams],
        stop: tuple[str, ...],
        strategy: Strategy,
        draft_params: Any,
        pages: np.ndarray,
        size: CacheBytes,
        watched: bool,
    ) -> Generator[Chunk, None, Result]:
        params = batch_sampling(sampling)
        drafter = strategy.drafter
        state = self._initial_state(rows, pages, max_new_tokens)
        state = state._replace(draft=self._draft_state(drafter, len(rows), pages.shape[1]))
        longest = max(len(row) for row in rows)
        chunk = self._chunk(longest, strategy.precision)
        few = jnp.int32(max(1, 1024 // chunk))  # so that Ctrl-C is heard during a long prefill
        shown = {} if drafter is None or not drafter.observes else {"draft_params": draft_params}
        prefill, compile_prefill = self._executable(
            "prefill", {"chunk": chunk, "drafter": drafter if shown else None, "precision": strategy.precision},
            self.params, state, few, **shown,
        )  # fmt: skip
        decode, compile_decode = self._executable(
            "decode", {"strategy": strategy}, self.params, state, params, jnp.int32(0), draft_params=draft_params
        )

        begun = time.perf_counter()
        for _ in range(0, longest, int(few) * chunk):
            state = jax.block_until_ready(prefill(self.params, state, few, **shown))
        prefill_seconds = time.perf_counter() - begun

        outputs = [Output(self.tokenizer, len(row), stop, self.end_tokens) for row in rows]
        per_call = jnp.int32(_STREAM_STEPS if watched else _QUIET_STEPS)
        totals = None
        decode_seconds, running = 0.0, True
        while running:
            begun = time.perf_counter()
            state, counts = decode(self.params, state, params, per_call, draft_params=draft_params)
            tokens, logprobs, known, done = jax.device_get((state.tokens, state.logprobs, state.known, state.done))
            decode_seconds += time.perf_counter() - begun
            counts = jax.tree.map(lambda count: np.asarray(count, np.int64), counts)
            totals = counts if totals is None else jax.tree.map(np.add, totals, counts)
            for index, output in enumerate(outputs):
                text = output.update(tokens[index, : known[index]], bool(done[index]))
                if text and watched:
                    yield Chunk(index, text, len(output.tokens))
            finished = np.array([output.finish is not None for output in outputs])
            if (finished & ~done).any():  # a stop string, which only the host sees
                state = state._replace(done=jnp.asarray(finished))
            running = not finished.all()
        assert totals is not None
        stats = stats_of(strategy, rows, outputs, totals, prefill_seconds, decode_seconds,
                       compile_prefill + compile_decode, size)  # fmt: skip
        generations = (output.generation(logprobs[index]) for index, output in enumerate(outputs))
        return Result(tuple(generations), stats)

    def resolve(self, strategy: Strategy) -> Strategy:
        """``strategy`` with its schedule as letters ("all" if all refresh), so that equal ones are one program.

        Raises ValueError for a ``searched:K`` that is not stored with the checkpoint, or a schedule of another length.
        """
        kind, _, number = strategy.schedule.partition(":")
        schedule = strategy.schedule
        if kind == "searched":
            stored = self.records
            found = stored.schedule(int(number), strategy.keep_compressed)
            if found is None:
                have = ", ".join(f"searched:{s.refresh}" for s in stored.searched
                                 if s.keep_compressed == strategy.keep_compressed)  # fmt: skip
                raise ValueError(
                    f"schedule: got {schedule!r}, which is not stored with this checkpoint, expected one of: "
                    f"{have or 'none'}; search with specsa schedule CHECKPOINT --refresh {number}"
                )
            schedule = found
        letters = parse_schedule(schedule, self.config.layers)
        if "S" not in letters:
            return dataclasses.replace(strategy, schedule="all", keep_compressed=True)
        return dataclasses.replace(strategy, schedule=letters)

    # --- scoring ------------------------------------------------------------------------------------------------------

    def score(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Teacher-forced log-probabilities float32 [T, V]: row t is the law of the token after tokens[: t + 1].

        Raises PromptError or CapacityError, before any work.
        """
        row = self._row("tokens", tokens)
        pages, _ = self._plan_pages([row], 0, Strategy(None, precision=self.precision))
        chunk = self._chunk(len(row), self.precision)
        cache = self._initial_state([row], pages, 0).cache
        out = np.empty((len(row), self.config.vocab_size), np.float32)
        for start in range(0, len(row), chunk):
            part = row[start : start + chunk]
            padded = jnp.asarray(np.pad(part, (0, chunk - len(part)))[None], jnp.int32)
            arguments = (self.params, padded, cache, jnp.asarray([len(part)], jnp.int32))
            score, _ = self._executable("score", {"precision": self.precision}, *arguments)
            logprobs, cache = score(*arguments)
            out[start : start + len(part)] = np.asarray(logprobs[0, : len(part)])
        return out

    # --- what both need -----------------------------------------------------------------------------------------------

    def prefill(self, rows: Sequence[np.ndarray], room: int) -> Cache:
        """A cache that holds ``rows`` of token ids but the last of each, read with all layers refreshing.

        It has room for ``room`` tokens more. Raises PromptError or CapacityError, before any work.
        """
        checked = [self._row(f"rows[{index}]", row) for index, row in enumerate(rows)]
        pages, _ = self._plan_pages(checked, room, Strategy(None))
        state = self._initial_state(checked, pages, 0)
        longest = max(len(row) for row in checked)
        arguments = (self.params, state, jnp.int32(longest))
        static = {"chunk": self._chunk(longest), "drafter": None, "precision": "exact"}
        return self._executable("prefill", static, *arguments)[0](*arguments).cache

    def check_fits(self, rows: Sequence[np.ndarray], room: int) -> None:
        """Raises CapacityError unless a cache of ``rows`` with ``room`` more tokens each fits."""
        self._plan_pages(list(rows), room, Strategy(None))

    def _chunk(self, longest: int, precision: Precision = "exact") -> int:
        """Tokens of a pass over prompts; always as many for strict kernels, which keep bits in calls of one length."""
        if precision == "strict" and self.implementation == "pallas":
            return self.prefill_chunk
        return min(self.prefill_chunk, max(16, 1 << (longest - 1).bit_length()))

    def _executable(self, kind: str, static: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Callable, float]:
        """The compiled function for these shapes, and the seconds that compiling it took now (0 if it was there)."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        key = (kind, *static.values(), structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key in self._compiled:
            return self._compiled[key], 0.0
        begun = time.perf_counter()
        strict = "strict" in (static.get("precision"), getattr(static.get("strategy"), "precision", None))
        options = STRICT_OPTIONS if strict and jax.default_backend() == "gpu" else None
        # float32 means float32: a GPU's default would round the factors to TF32.
        with jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else "default"):
            self._compiled[key] = getattr(self.decoder, kind).lower(*args, **kwargs, **static).compile(options)
        return self._compiled[key], time.perf_counter() - begun

    def _load_drafter(self, drafter: Drafter | None) -> Any:
        """The drafter's weights, loaded once. Raises ValueError where it does not belong to this model."""
        if drafter is None:
            return ()
        if drafter not in self._draft_params:
            target = Target(self.config, self.params, self.tokenizer, self.dtype)
            self._draft_params[drafter] = drafter.load(target)
        return self._draft_params[drafter]

    def _draft_state(self, drafter: Drafter | None, batch: int, columns: int, abstract: bool = False) -> Any:
        """The drafter's state before any token, beside a page table of so many columns; ``abstract``: its shapes."""
        if drafter is None:
            return ()
        capacity = columns * self.config.nsa.select_block

        def init() -> Any:
            return drafter.init(self.config, batch, capacity, self.dtype)

        return jax.eval_shape(init) if abstract else init()

    def _initial_state(self, rows: list[np.ndarray], pages: np.ndarray, max_new_tokens: int) -> State:
        page = self.config.nsa.select_block
        pool = _bucket(sum(len(pages_row[pages_row >= 0]) for pages_row in pages))
        cache = create_cache(self.config, np.where(pages < 0, pool, pages), pool, self.dtype)
        buffer = np.zeros((len(rows), pages.shape[1] * page + 1), np.int32)
        for index, row in enumerate(rows):
            buffer[index, : len(row)] = row
        lengths = np.array([len(row) for row in rows], np.int32)
        return State(
            cache, jnp.asarray(buffer), jnp.asarray(lengths), jnp.asarray(lengths + max_new_tokens),
            jnp.zeros(len(rows), bool), jnp.zeros(buffer.shape, jnp.float32),
        )  # fmt: skip

    def _plan_pages(
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
        width = _bucket(longest)
        size = cache_bytes(self.config, _bucket(sum(counts)), len(rows), self.dtype)
        drafts = self._draft_state(strategy.drafter, len(rows), width, abstract=True)
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

    def _encode(self, prompts: Any) -> list[np.ndarray]:
        """Token ids int32 per prompt. Raises PromptError."""
        if isinstance(prompts, str):
            prompts = [prompts]
        try:
            prompts = list(prompts)
        except TypeError as error:
            raise PromptError(f"prompts: got {type(prompts).__name__}, expected texts or lists of token ids") from error
        if not prompts:
            raise PromptError("prompts: got a batch of 0, expected at least one prompt")
        return [self._row(f"prompts[{index}]", prompt) for index, prompt in enumerate(prompts)]

    def _row(self, where: str, prompt: Any) -> np.ndarray:
        """Token ids int32 [T] of a text or a list of ids. Raises PromptError that says ``where``."""
        try:
            # With what the tokenizer puts around a text: public ones begin it with a token of its own.
            ids = self.tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
            row = np.asarray(ids)
        except Exception as error:  # a lone surrogate, lists of unequal lengths; the tokenizers raise bare Exception
            raise PromptError(f"{where}: got {prompt!r:.80}, expected a text or a list of token ids") from error
        if row.size == 0:
            raise PromptError(f"{where}: is empty, expected at least one token")
        if row.ndim != 1 or row.dtype.kind not in "iu":
            raise PromptError(
                f"{where}: got {row.dtype} of shape {list(row.shape)}, expected a text or a list of token ids"
            )
        if row.min() < 0 or row.max() >= self.config.vocab_size:
            bad = int(row[(row < 0) | (row >= self.config.vocab_size)][0])
            raise PromptError(f"{where}: got token id {bad}, expected 0 to {self.config.vocab_size - 1}")
        return row.astype(np.int32)

    @staticmethod
    def _stops(stop: Any) -> tuple[str, ...]:
        stops = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise PromptError(f"stop: got {stops!r}, expected non-empty texts")
        return stops


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise PromptError(f"{name}: got {value!r}, expected an integer of at least 1")
    return int(value)


def _bucket(count: int) -> int:
    """``count`` rounded up to an eighth of its power of two, so that near lengths share a compiled program."""
    step = max(1, (1 << (max(count, 1) - 1).bit_length()) // 16)
    return -(-count // step) * step


def _free_memory() -> int:
    """Bytes free on the default device, or on the host where the device does not say."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
