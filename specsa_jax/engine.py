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
import statistics
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from pallas_kernels import Implementation
from specsa_jax import checkpoints
from specsa_jax.admission import Bound, admit, admitted, check_bound
from specsa_jax.cache import Cache, CacheBytes
from specsa_jax.checkpoints import draft_head, records
from specsa_jax.checkpoints.records import Records
from specsa_jax.config import ModelConfig
from specsa_jax.decoding import State
from specsa_jax.drafting import Drafter
from specsa_jax.drafting.watching import Watching
from specsa_jax.planning import profile as profiles
from specsa_jax.planning import space
from specsa_jax.planning.costs import Costs, measure_bandwidth
from specsa_jax.planning.plan import SHORTEST, Fixed, Plan
from specsa_jax.planning.planner import Candidate, Planner
from specsa_jax.planning.predict import Acceptance
from specsa_jax.planning.profile import Profile
from specsa_jax.planning.space import Space
from specsa_jax.prompts import PromptError, encode, stop_texts, token_row, whole_number
from specsa_jax.reading import Reader
from specsa_jax.results import Chunk, Output, Result, Stream, stats_of
from specsa_jax.runtime import Runtime, bucket, signature
from specsa_jax.sampling import SamplingParams, batch_sampling
from specsa_jax.schedule import Sharing, parse_schedule
from specsa_jax.segments import Segments
from specsa_jax.strategy import Precision, Strategy

# What compiling a loop takes, as far as a planner knows before the first one.
_COMPILE_SECONDS = 10.0


class Engine(Runtime):
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
        profile: Profile | str | os.PathLike[str] | None = None,
        allow_mismatch: bool = False,
    ):
        if not isinstance(profile, Profile | str | os.PathLike | None):
            raise profiles.ProfileError(f"profile: got {profile!r}, expected a Profile, or the path of its file")
        super().__init__(
            config, params, tokenizer, dtype=dtype, max_length=max_length, max_cache_bytes=max_cache_bytes,
            prefill_chunk=prefill_chunk, implementation=implementation, end_tokens=end_tokens,
        )  # fmt: skip
        Strategy(precision=precision)  # refused here rather than in each call
        self.precision = precision
        self._candidates: dict[Any, list[Candidate]] = {}  # of planners' spaces, read once
        self._spaces: dict[Any, Space] = {}
        self._records: tuple[Any, Records] | None = None
        self.checkpoint, self._profile, self._allow_mismatch = checkpoint, profile, allow_mismatch
        if profile is not None:
            _ = self.profile

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of config and weights: what says that measurements are of this very model."""
        return draft_head.fingerprint(self.config, self.params)

    @property
    def records(self) -> Records:
        """What was measured of this model and is stored with its checkpoint, as the file is now. Raises
        CheckpointError."""
        stamp = None if self.checkpoint is None else records.stamp(self.checkpoint)
        if self._records is None or self._records[0] != stamp:
            loaded = Records(self.fingerprint)
            if self.checkpoint is not None:
                loaded = records.load(self.checkpoint, self.fingerprint)
            self._records = stamp, loaded
        return self._records[1]

    @functools.cached_property
    def profile(self) -> Profile | None:
        """What was measured of this model on this kind of device, for planners. Raises ProfileError."""
        device = jax.devices()[0].device_kind
        given, dtype, implementation = self._profile, str(self.dtype), self.implementation
        if isinstance(given, Profile):
            return given
        if given is not None:
            return profiles.load(
                Path(given), fingerprint=self.fingerprint, device=device, allow_mismatch=self._allow_mismatch,
                dtype=dtype, implementation=implementation,
            )  # fmt: skip
        if self.checkpoint is None or not (path := profiles.default_path(self.checkpoint, device)).exists():
            return None
        found = profiles.load(path, fingerprint=self.fingerprint, device=device)
        # Nobody has asked for this one: where the engine computes otherwise, it is as if it were not there.
        return found if (found.dtype, found.implementation) == (dtype, implementation) else None

    @functools.cached_property
    def costs(self) -> Costs:
        """What steps and drafts of this model cost on this device: of the profile, or of bytes and bandwidth."""
        profile = self.profile
        if profile is None:
            return Costs.from_bytes(self.config, self.dtype, *measure_bandwidth(self.dtype))
        if not profile.steps:  # its budget was spent before the first
            return Costs.from_bytes(self.config, self.dtype, profile.bandwidth, profile.flops, profile.overhead)
        return Costs.from_profile(profile, self.config)

    @functools.cached_property
    def _priors(self) -> Acceptance:
        return Acceptance(() if self.profile is None else self.profile.priors)

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

    def _choice(self, strategy: Any, speculate: bool, bound: Bound, reach: int) -> Strategy | Space:
        """What a call may use, all of it checked and loaded."""
        if not isinstance(speculate, bool):
            raise PromptError(f"speculate: got {speculate!r}, expected True or False")
        if isinstance(strategy, str) and strategy == "auto":  # arrays compare element by element
            strategy = Planner()
        if not isinstance(strategy, Strategy | Planner | None):
            raise PromptError(f"strategy: got {strategy!r}, expected a Strategy, a Planner or 'auto'")
        if not isinstance(strategy, Planner):
            return self._fixed(strategy, speculate, bound, reach)
        if not speculate:
            raise PromptError("speculate: got False with a planner, expected a Strategy, or None")
        return self.space(strategy, bound, reach)

    def _fixed(self, strategy: Strategy | None, speculate: bool, bound: Bound, reach: int) -> Strategy:
        """The strategy of a call without a planner. Raises ValueError and PrecisionError where it may not be used."""
        strategy = Strategy(precision=self.precision) if strategy is None else strategy
        if not speculate:
            strategy = Strategy(None, precision=strategy.precision, schedule=strategy.schedule,
                                keep_compressed=strategy.keep_compressed)  # fmt: skip
        strategy = self.resolve(strategy)
        self.decoder.check(strategy)
        sharing = strategy.sharing(self.config.layers)
        check_bound(strategy, sharing, bound)
        if sharing.approximates and bound.finite:
            admit(self.records, bound, str(self.dtype), sharing, strategy.width, reach)
        self.load_drafter(strategy.drafter)
        return strategy

    def space(self, planner: Planner, bound: Bound = Bound(), reach: int = 0) -> Space:
        """The strategies among which ``planner`` may choose, in class approx within ``bound``, for contexts of up to
        ``reach`` tokens. Raises ValueError for what cannot be had."""
        precision = planner.precision or self.precision
        check_bound(Strategy(None, precision=precision), Sharing(), bound)
        profile, _ = self.profile, self.costs  # measured now where there is no profile, once
        usual = () if profile is None else space.profiled(profile, self.config)
        drafters, named = planner.drafters or usual or space.DRAFTERS, bool(planner.drafters)
        key = drafters, named, precision
        if key not in self._candidates:
            found = space.candidates(drafters, self.config, str(self.checkpoint or ""), precision, named)
            for candidate in found:
                self.load_drafter(candidate.strategy.drafter)
            self._candidates[key] = found
        approximate = precision == "approx" and bound.given
        inside = admitted(self.records, bound, str(self.dtype), reach) if approximate else []
        # A measurement is the same object until the file changes. Its space keeps it, so its id is nobody else's.
        asked = planner, precision, self.costs, tuple(map(id, inside))
        if asked not in self._spaces:
            sharings = [Sharing()]
            # Counted costs cannot tell groups apart: docs/planning.md.
            if self.implementation == "pallas" and precision != "strict" and profile is not None:
                sharings += [s for s in dict.fromkeys(t.point.sharing for t in profile.steps) if not s.approximates]
            self._spaces[asked] = Space(planner, self._candidates[key], sharings, inside)
        return self._spaces[asked]

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

    def _plan_meanwhile(
        self, found: Space, rows: list[np.ndarray], max_new_tokens: int, reader: Reader, drawn: bool
    ) -> Plan:
        """A plan, made while the device begins to read the prompts: shown to who watched in the last such call, if
        there was one. Should others be to watch now, it begins anew."""
        key = signature(reader.state), drawn
        before = found.watched_last.get(key)
        if before is not None:
            reader.start(Watching(None, before))
        course = self._plan(found, rows, max_new_tokens, reader.state, drawn=drawn)
        # Of a plan that was there before the device had read what it was sent, nobody has waited.
        hidden = before is not None and reader.is_busy and (before == course.watchers or not course.watchers)
        if before != course.watchers:
            reader.start(Watching(None, course.watchers))
            found.watched_last[key] = course.watchers
        if hidden:
            course.seconds = 0.0
        elif before is not None:
            reader.seconds -= course.seconds  # which are counted as planning
        return course

    def _plan(
        self, found: Space, rows: list[np.ndarray], max_new_tokens: int, state: State, *, replays: bool = True,
        drawn: bool = False, watchers: tuple[Drafter, ...] | None = None,
    ) -> Plan:  # fmt: skip
        """A plan for these prompts; ``replays``, ``drawn``, ``watchers`` as :meth:`Space.plan`."""
        capacity = state.cache.page_table.shape[1] * self.config.nsa.select_block
        # XLA's path computes over whole page tables.
        context = capacity if self.implementation == "xla" else bucket(int(np.mean([len(row) for row in rows])))
        return found.plan(
            self.costs, self._priors, rows, max_new_tokens, context=context, layers=self.config.layers,
            compiled=self.ready.setdefault(signature(state), set()).__contains__,
            compile_seconds=statistics.median(self.compile_times or [_COMPILE_SECONDS]),
            shortest=SHORTEST.get(jax.default_backend(), SHORTEST["gpu"]), replays=replays, drawn=drawn,
            watchers=watchers,
        )  # fmt: skip

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
        rows = [np.zeros(whole_number("prompt_tokens", prompt_tokens), np.int32)] * whole_number("batch", batch)
        bound, max_new_tokens = Bound(max_kl, min_top1), whole_number("max_new_tokens", max_new_tokens)
        several = list(strategy) if isinstance(strategy, list | tuple) else [strategy]
        if not several:
            raise PromptError("strategy: got an empty list, expected at least one Strategy or Planner")
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

    def _contenders(
        self, choice: Strategy | Space, rows: list[np.ndarray], max_new_tokens: int, state: State
    ) -> Generator[tuple[Strategy, Drafter | None, str]]:
        """What a call may come to use: strategies, who watches from the beginning, and words."""
        if isinstance(choice, Strategy):
            yield choice, choice.drafter, choice.describe()
            return
        for watchers in choice.watching:
            plan = self._plan(choice, rows, max_new_tokens, state, replays=False, watchers=watchers)
            for one in plan.contenders():
                yield one, Watching(None, watchers) if isinstance(one.drafter, Watching) else None, plan.words[one]

    # --- scoring ------------------------------------------------------------------------------------------------------

    def score(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Teacher-forced log-probabilities float32 [T, V]: row t is the law of the token after tokens[: t + 1].

        Raises PromptError or CapacityError, before any work.
        """
        row = token_row(self.tokenizer, self.config.vocab_size, "tokens", tokens)
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
