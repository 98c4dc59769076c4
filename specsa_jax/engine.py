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
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax import checkpoints
from specsa_jax.admission import Bound
from specsa_jax.cache import Cache, CacheBytes, CapacityError
from specsa_jax.choosing import Chooser
from specsa_jax.planning.plan import Fixed, Plan
from specsa_jax.planning.planner import Planner
from specsa_jax.planning.space import Space
from specsa_jax.prompts import PromptError, encode, stop_texts, token_row, whole_number
from specsa_jax.reading import Reader
from specsa_jax.results import Chunk, Output, Result, Stream, stats_of
from specsa_jax.runtime import signature
from specsa_jax.sampling import SamplingParams, batch_sampling
from specsa_jax.segments import Segments
from specsa_jax.strategy import Strategy


class Engine(Chooser):
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
      profile: what planners go by (:mod:`specsa_jax.planning`), or its file; None: the checkpoint's own for this kind
        of device, if there is one, else counted bytes and measured bandwidth; so too where it has no step times.
        ProfileError for a file of another model, device, dtype or implementation.
      allow_mismatch: take a profile's file all the same, if it is of this model.
    """

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
        strategy: Strategy | Planner | Literal["auto"] | None = None,
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
          strategy: how to speculate; None: the default Strategy() in the engine's precision. A Planner chooses, for
            these prompts and anew as decoding goes on, within the engine's precision and, in class approx, the bound;
            "auto": Planner(). What it decided is in ``stats.plan``.
          max_kl, min_top1: in class approx, how far a strategy's next-token distributions may be from the exact ones
            (:class:`specsa_jax.admission.Bound`), as measured in the engine's dtype; a strategy with reuse layers or
            shared groups needs one of them.
          on_chunk: called with each piece of text as it becomes known.

        Raises PromptError or ValueError for bad arguments, PrecisionError for a strategy that the bound does not admit
        (it lists the nearest that it does) and CapacityError for requests that do not fit, all before any work.
        """
        if not (on_chunk is None or callable(on_chunk)):
            raise PromptError(f"on_chunk: got {on_chunk!r}, expected a function of a Chunk, or None")
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
        strategy: Strategy | Planner | Literal["auto"] | None = None,
        max_kl: float | None = None,
        min_top1: float | None = None,
        _quiet: bool = False,
    ) -> Stream:
        """As :meth:`generate`, but gives an iterator over chunks of text, which ends with ``stream.result`` set."""
        rows = encode(self.tokenizer, self.config.vocab_size, prompts)
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
        stops = stop_texts(stop)
        if sampling is None:
            first = SamplingParams(temperature, top_k, top_p, seed)
            sampling = [dataclasses.replace(first, seed=(first.seed + i) % 2**32) for i in range(len(rows))]
        if not isinstance(sampling, Sequence) or not all(isinstance(one, SamplingParams) for one in sampling):
            raise PromptError(f"sampling: got {sampling!r}, expected a list of SamplingParams")
        if len(sampling) != len(rows):
            raise PromptError(f"sampling: got {len(sampling)} parameter sets, expected one per prompt ({len(rows)})")
        reach = max(len(row) for row in rows) + max_new_tokens
        choice = self._choice(strategy, speculate, Bound(max_kl, min_top1), reach)
        pages, size = self.plan_pages(
            rows, max_new_tokens, choice if isinstance(choice, Strategy) else choice.largest
        )  # fmt: skip
        watched = bool(stops) or not _quiet
        return Stream(self._run(rows, max_new_tokens, list(sampling), stops, choice, pages, size, watched))

    def _run(
        self,
        rows: list[np.ndarray],
        max_new_tokens: int,
        sampling: list[SamplingParams],
        stop: tuple[str, ...],
        choice: Strategy | Space,
        pages: np.ndarray,
        size: CacheBytes,
        watched: bool,
    ) -> Generator[Chunk, None, Result]:
        reader = Reader(self, rows, pages, max_new_tokens, choice.precision)
        course: Plan | Fixed
        if isinstance(choice, Strategy):
            course = Fixed(choice)
            reader.start(choice.drafter)
        else:
            # Of a batch the most: one plan serves all.
            drawn = sum(one.temperature > 0 for one in sampling) * 2 > len(sampling)
            course = self._plan_meanwhile(choice, rows, max_new_tokens, reader, drawn)
        state = reader.finish()

        outputs = [Output(self.tokenizer, len(row), stop, self.end_tokens) for row in rows]
        limits = np.array([len(row) + max_new_tokens for row in rows])
        known, finished, left = limits - max_new_tokens, np.zeros(len(rows), bool), len(rows) * max_new_tokens
        segments = Segments(self, state, batch_sampling(sampling), course, streamed=watched)
        del state  # the loop is given it
        while not finished.all():
            read, before = segments.run(left), known
            known, finished = read.known, read.done
            if len(read.logprobs):
                for index, output in enumerate(outputs):
                    text = output.update(read.tokens[index, : known[index]], bool(read.done[index]), watched)
                    if text and watched:
                        yield Chunk(index, text, len(output.tokens))
                finished = np.array([output.finish is not None for output in outputs])
                if (finished & ~read.done).any():  # a stop string, which only the host sees
                    segments.stop(finished)
            left = int((limits - known)[~finished].sum())
            segments.tell(read, finished, int((known - before).sum()), left)
        assert segments.totals is not None
        stats = stats_of(course, rows, outputs, segments.totals, reader.seconds, segments.seconds,
                         reader.compile_seconds + segments.compile_seconds, size)  # fmt: skip
        generations = (output.generation(read.logprobs[index]) for index, output in enumerate(outputs))
        return Result(tuple(generations), stats)

    def warmup(
        self,
        strategy: Strategy | Planner | Literal["auto"] | Sequence[Strategy | Planner] | None = None,
        *,
        batch: int = 1,
        prompt_tokens: int,
        max_new_tokens: int = 256,
        max_kl: float | None = None,
        min_top1: float | None = None,
    ) -> list[str]:
        """Compiles ahead, on all cores, what :meth:`generate` needs for ``batch`` prompts of ``prompt_tokens`` tokens:
        the programs of a strategy or of several, or those of all that a planner would choose at some acceptance of
        drafts.

        Programs are of rounded shapes, so near lengths share them. With JAX's persistent compilation cache
        (JAX_COMPILATION_CACHE_DIR) they outlive the process. Returns the strategies, in words. Raises as
        :meth:`generate`.
        """
        bound, max_new_tokens = Bound(max_kl, min_top1), whole_number("max_new_tokens", max_new_tokens)
        several = list(strategy) if isinstance(strategy, list | tuple) else [strategy]
        if not several:
            raise PromptError("strategy: got an empty list, expected at least one Strategy or Planner")
        if whole_number("prompt_tokens", prompt_tokens) + max_new_tokens > self.max_length:
            raise CapacityError(f"prompt_tokens, max_new_tokens: got {prompt_tokens} and {max_new_tokens}, expected at "
                                f"most {self.max_length} together (max_length)")  # fmt: skip
        rows = [np.zeros(prompt_tokens, np.int32)] * whole_number("batch", batch)
        choices = [self._choice(one, True, bound, prompt_tokens + max_new_tokens) for one in several]
        params, words = batch_sampling([SamplingParams()] * batch), []
        jobs: dict[Any, Callable[[], Any]] = {}
        for choice in choices:
            largest = choice if isinstance(choice, Strategy) else choice.largest
            pages, _ = self.plan_pages(rows, max_new_tokens, largest)
            state = jax.eval_shape(functools.partial(self.initial_state, rows, pages, max_new_tokens))
            for one, observer, name in self._contenders(choice, rows, max_new_tokens, state):
                self.load_drafter(one.drafter)
                seen = state._replace(draft=self.draft_state(observer, batch, pages.shape[1], abstract=True))
                chunk, key = self.chunk(prompt_tokens, one.precision), signature(state)
                jobs[key, observer, one.precision] = functools.partial(
                    self.prefill_program, seen, chunk, observer, one.precision
                )
                jobs[key, one] = functools.partial(self.decode_program, one, seen, params, alone=False)
                words.append(name)
        # XLA compiles a program on one core, mostly.
        with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
            for done in [pool.submit(job) for job in jobs.values()]:
                done.result()
        return list(dict.fromkeys(words))

    # --- scoring ------------------------------------------------------------------------------------------------------

    def score(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Teacher-forced log-probabilities float32 [T, V]: row t is the law of the token after tokens[: t + 1].

        Raises PromptError or CapacityError, before any work.
        """
        row = token_row(self.tokenizer, self.config.vocab_size, "tokens", tokens)
        if len(row) > self.max_length:
            raise CapacityError(f"tokens: got {len(row)}, expected at most {self.max_length} (max_length)")
        pages, _ = self.plan_pages([row], 0, Strategy(None, precision=self.precision))
        chunk = self.chunk(len(row), self.precision)
        cache = self.initial_state([row], pages, 0).cache
        out = np.empty((len(row), self.config.vocab_size), np.float32)
        for start in range(0, len(row), chunk):
            part = row[start : start + chunk]
            padded = jnp.asarray(np.pad(part, (0, chunk - len(part)))[None], jnp.int32)
            arguments = (self.params, padded, cache, jnp.asarray([len(part)], jnp.int32))
            score, _ = self.executable("score", {"precision": self.precision}, *arguments)
            logprobs, cache = score(*arguments)
            out[start : start + len(part)] = np.asarray(logprobs[0, : len(part)])
        return out

    def prefill(self, rows: Sequence[np.ndarray], room: int) -> Cache:
        """A cache that holds ``rows`` of token ids but the last of each, read with all layers refreshing.

        It has room for ``room`` tokens more. Raises PromptError or CapacityError, before any work.
        """
        checked = [
            token_row(self.tokenizer, self.config.vocab_size, f"rows[{index}]", row) for index, row in enumerate(rows)
        ]
        pages, _ = self.plan_pages(checked, room, Strategy(None))
        state = self.initial_state(checked, pages, 0)
        longest = max(len(row) for row in checked)
        arguments = (self.params, state, jnp.int32(longest))
        static = {"chunk": self.chunk(longest), "drafter": None, "precision": "exact"}
        return self.executable("prefill", static, *arguments)[0](*arguments).cache

    def check_fits(self, rows: Sequence[np.ndarray], room: int) -> None:
        """Raises CapacityError unless a cache of ``rows`` with ``room`` more tokens each fits."""
        self.plan_pages(list(rows), room, Strategy(None))
