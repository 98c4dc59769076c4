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
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

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
from specsa_jax.decoding import Counts, Decoder, State, add_counts
from specsa_jax.drafting import Drafter, Target
from specsa_jax.drafting.watching import Watching
from specsa_jax.nsa import kernels
from specsa_jax.nsa.rows import STRICT_OPTIONS
from specsa_jax.planning import profile as profiles
from specsa_jax.planning import replay, space
from specsa_jax.planning.costs import Costs, measure_bandwidth
from specsa_jax.planning.planner import Fixed, Plan, Planner, cheapest
from specsa_jax.planning.predict import Acceptance
from specsa_jax.planning.profile import Profile
from specsa_jax.planning.space import Space
from specsa_jax.results import Chunk, Output, Result, Stream, stats_of
from specsa_jax.sampling import Sampling, SamplingParams, batch_sampling
from specsa_jax.schedule import Sharing, parse_schedule
from specsa_jax.strategy import Precision, Strategy

# Steps between two looks of the host when text is streamed or stop strings are watched for, and otherwise.
_STREAM_STEPS, _QUIET_STEPS = 8, 512

# What compiling a loop takes, as far as a planner knows before the first one.
_COMPILE_SECONDS = 10.0


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
      profile: what planners go by (:mod:`specsa_jax.planning`), or its file; None: the checkpoint's own for this kind
        of device, if there is one, else counted bytes and measured bandwidth. ProfileError for one of another model,
        device, dtype or implementation.
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
        on_gpu = jax.default_backend() == "gpu"
        if dtype is None:
            dtype = jnp.bfloat16 if on_gpu else jnp.float32
        if prefill_chunk is None:
            prefill_chunk = 512 if on_gpu else 64
        self.config, self.tokenizer, self.dtype = config, tokenizer, _floating(dtype)
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
        self._decoders: set[tuple[Strategy, Any]] = set()  # compiled loops, by strategy and shapes
        self._compile_times: list[float] = []
        self.checkpoint, self._profile, self._allow_mismatch = checkpoint, profile, allow_mismatch
        if profile is not None:
            _ = self.profile

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of config and weights: what says that measurements are of this very model."""
        return draft_head.fingerprint(self.config, self.params)

    @property
    def records(self) -> Records:
        """What was measured of this model and is stored with its checkpoint, read anew. Raises CheckpointError."""
        return Records(self.fingerprint) if self.checkpoint is None else records.load(self.checkpoint, self.fingerprint)

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
        if self.profile is not None:
            return Costs.from_profile(self.profile, self.config)
        return Costs.from_bytes(self.config, self.dtype, *measure_bandwidth(self.dtype))

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
        strategy: Strategy | Planner | Literal["auto"] | None = None,
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
        reach = max(len(row) for row in rows) + max_new_tokens
        choice = self._choice(strategy, speculate, Bound(max_kl, min_top1), reach)
        pages, size = self._plan_pages(
            rows, max_new_tokens, choice if isinstance(choice, Strategy) else choice.largest
        )  # fmt: skip
        watched = bool(stop) or not _quiet
        return Stream(self._run(rows, max_new_tokens, list(sampling), stop, choice, pages, size, watched))

    def _choice(self, strategy: Any, speculate: bool, bound: Bound, reach: int) -> Strategy | Space:
        """What a call may use, all of it checked and loaded."""
        if strategy == "auto":
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
            admit(self.records, bound, sharing, strategy.width, reach)
        self._load_drafter(strategy.drafter)
        return strategy

    def space(self, planner: Planner, bound: Bound = Bound(), reach: int = 0) -> Space:
        """The strategies among which ``planner`` may choose, in class approx within ``bound``, for contexts of up to
        ``reach`` tokens. Raises ValueError for what cannot be had."""
        precision = planner.precision or self.precision
        check_bound(Strategy(None, precision=precision), Sharing(), bound)
        profile, _ = self.profile, self.costs  # measured now where there is no profile, once
        drafters = planner.drafters or (() if profile is None else space.profiled(profile, self.config))
        found = space.candidates(drafters, self.config, str(self.checkpoint or ""), precision)
        sharings = [Sharing()]
        if self.implementation == "pallas" and precision != "strict" and profile is not None:
            sharings += [s for s in dict.fromkeys(t.point.sharing for t in profile.steps) if not s.approximates]
        measured = self.records.measurements if precision == "approx" and bound.given else ()
        for candidate in found:
            self.decoder.check(candidate.strategy)
            self._load_drafter(candidate.strategy.drafter)
        return Space(planner, found, sharings, [m for m in measured if bound.admits(m) and m.reach >= reach])

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
        params = batch_sampling(sampling)
        state = self._initial_state(rows, pages, max_new_tokens)
        per_call = _STREAM_STEPS if watched else _QUIET_STEPS
        course: Plan | Fixed
        compiled = 0.0
        if isinstance(choice, Strategy):
            course, observer = Fixed(choice, per_call), choice.drafter
        else:
            course, compiled = self._plan(choice, rows, max_new_tokens, state)
            observer = Watching(None, course.watchers)
        state = state._replace(draft=self._draft_state(observer, len(rows), pages.shape[1]))
        longest = max(len(row) for row in rows)
        chunk = self._chunk(longest, course.strategy.precision)
        few = jnp.int32(max(1, 1024 // chunk))  # so that Ctrl-C is heard during a long prefill
        prefill, seconds, shown = self._prefill_program(state, chunk, observer, course.strategy.precision)
        compiled += seconds
        decode, seconds = self._decode_program(course.strategy, state, params)
        compiled += seconds
        programs = {course.strategy: decode}

        begun = time.perf_counter()
        for _ in range(0, longest, int(few) * chunk):
            state = jax.block_until_ready(prefill(self.params, state, few, **shown))
        prefill_seconds = time.perf_counter() - begun

        outputs = [Output(self.tokenizer, len(row), stop, self.end_tokens) for row in rows]
        totals: Counts | None = None
        decode_seconds, running, given = 0.0, len(rows), 0
        while running:
            if course.strategy not in programs:
                programs[course.strategy], seconds = self._decode_program(course.strategy, state, params)
                compiled += seconds
            begun = time.perf_counter()
            state, counts = programs[course.strategy](
                self.params, state, params, jnp.int32(min(per_call, course.steps_left))
            )
            tokens, logprobs, known, done = jax.device_get((state.tokens, state.logprobs, state.known, state.done))
            seconds = time.perf_counter() - begun
            decode_seconds += seconds
            counts = jax.device_get(counts)
            totals = add_counts(totals, counts)
            for index, output in enumerate(outputs):
                text = output.update(tokens[index, : known[index]], bool(done[index]))
                if text and watched:
                    yield Chunk(index, text, len(output.tokens))
            finished = np.array([output.finish is not None for output in outputs])
            if (finished & ~done).any():  # a stop string, which only the host sees
                state = state._replace(done=jnp.asarray(finished))
            running = int((~finished).sum())
            before, given = given, sum(len(output.tokens) for output in outputs)
            left = sum(max_new_tokens - len(output.tokens) for output in outputs if output.finish is None)
            course.observe(counts, seconds, given - before, running, left)
        assert totals is not None
        stats = stats_of(course, rows, outputs, totals, prefill_seconds, decode_seconds, compiled, size)
        generations = (output.generation(logprobs[index]) for index, output in enumerate(outputs))
        return Result(tuple(generations), stats)

    def _prefill_program(
        self, state: State, chunk: int, observer: Drafter | None, precision: Precision
    ) -> tuple[Callable, float, dict[str, Any]]:
        """The compiled prefill, what compiling took, and the keyword arguments that it wants."""
        drafter = observer if observer is not None and observer.observes else None
        shown = {} if drafter is None else {"draft_params": self._load_drafter(drafter)}
        static = {"chunk": chunk, "drafter": drafter, "precision": precision}
        prefill, seconds = self._executable("prefill", static, self.params, state, jnp.int32(0), **shown)
        return prefill, seconds, shown

    def _decode_program(self, strategy: Strategy, state: State, sampling: Sampling) -> tuple[Callable, float]:
        """The compiled loop for a strategy, with its drafter's weights; and what compiling took."""
        draft_params = self._load_drafter(strategy.drafter)
        decode, seconds = self._executable(
            "decode", {"strategy": strategy}, self.params, state, sampling, jnp.int32(0), draft_params=draft_params
        )  # fmt: skip
        if seconds:
            self._compile_times.append(seconds)
        self._decoders.add((strategy, _signature(state)))
        return functools.partial(decode, draft_params=draft_params), seconds

    def _plan(self, found: Space, rows: list[np.ndarray], max_new_tokens: int, state: State) -> tuple[Plan, float]:
        """A plan for these prompts, after replays on them; and the seconds that compiling the replay took."""
        begun = time.perf_counter()
        batch, columns = state.cache.page_table.shape
        capacity = columns * self.config.nsa.select_block
        # XLA's path computes over whole page tables.
        context = capacity if self.implementation == "xla" else int(np.mean([len(row) for row in rows]))
        candidates = [
            dataclasses.replace(one, strategy=cheapest(one.strategy, found.sharings_of(one.strategy), self.costs, batch,
                                                       context))
            for one in found.candidates
        ]  # fmt: skip
        acceptance = Acceptance(() if self.profile is None else self.profile.priors)
        compiling = 0.0
        for name, drafter, depth in found.replayed:
            for index, row in enumerate(rows):
                known = replay.places(len(row), depth)
                arguments = (state.tokens[index], jnp.asarray(known))
                drafts, seconds = self._executable(replay.drafts, {"drafter": drafter, "depth": depth}, *arguments)
                compiling += seconds
                chains, valid = jax.device_get(drafts(*arguments))
                acceptance.add(name, f"chain:{depth}", *replay.fates(row, known, chains, valid), worth=replay.WORTH)
        signature = _signature(state)

        def ready(strategy: Strategy) -> bool:
            return (strategy, signature) in self._decoders

        plan = Plan(
            found.planner, candidates, self.costs, acceptance, batch=batch, context=context, layers=self.config.layers,
            compiled=ready, compile_seconds=statistics.median(self._compile_times or [_COMPILE_SECONDS]),
            new_tokens=len(rows) * max_new_tokens,
        )  # fmt: skip
        plan.seconds = time.perf_counter() - begun - compiling
        return plan, compiling

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
        strategy: Strategy | Planner | Literal["auto"] | None = None,
        *,
        batch: int = 1,
        prompt_tokens: int,
        max_new_tokens: int = 256,
        max_kl: float | None = None,
        min_top1: float | None = None,
    ) -> list[str]:
        """Compiles ahead what :meth:`generate` needs for ``batch`` prompts of ``prompt_tokens`` tokens: the strategy's
        programs, or those of all that a planner would choose at some acceptance of drafts.

        Programs are of rounded shapes, so near lengths share them. With JAX's persistent compilation cache
        (JAX_COMPILATION_CACHE_DIR) they outlive the process. Returns the strategies, in words. Raises as
        :meth:`generate`.
        """
        rows = [np.zeros(_whole("prompt_tokens", prompt_tokens), np.int32)] * _whole("batch", batch)
        bound, max_new_tokens = Bound(max_kl, min_top1), _whole("max_new_tokens", max_new_tokens)
        choice = self._choice(strategy, True, bound, prompt_tokens + max_new_tokens)
        pages, _ = self._plan_pages(rows, max_new_tokens, choice if isinstance(choice, Strategy) else choice.largest)
        state = self._initial_state(rows, pages, max_new_tokens)
        if isinstance(choice, Strategy):
            strategies, observer, names = [choice], choice.drafter, None
        else:
            plan, _ = self._plan(choice, rows, max_new_tokens, state)
            strategies, observer, names = plan.contenders(), Watching(None, plan.watchers), plan.words
        state = state._replace(draft=self._draft_state(observer, batch, pages.shape[1], abstract=True))
        precision = strategies[0].precision
        self._prefill_program(state, self._chunk(prompt_tokens, precision), observer, precision)
        params = batch_sampling([SamplingParams()] * batch)
        for one in strategies:
            self._decode_program(one, state, params)
        return [one.describe() if names is None else names[one] for one in strategies]

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

    def _executable(self, kind: Any, static: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Callable, float]:
        """The compiled function for these shapes, and the seconds that compiling it took now (0 if it was there).

        ``kind``: a jitted function, or the name of one of the decoder's.
        """
        leaves, structure = jax.tree.flatten((args, kwargs))
        key = (kind, *static.values(), structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key in self._compiled:
            return self._compiled[key], 0.0
        begun = time.perf_counter()
        strict = "strict" in (static.get("precision"), getattr(static.get("strategy"), "precision", None))
        options = STRICT_OPTIONS if strict and jax.default_backend() == "gpu" else None
        # float32 means float32: a GPU's default would round the factors to TF32.
        with jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else "default"):
            jitted = getattr(self.decoder, kind) if isinstance(kind, str) else kind
            self._compiled[key] = jitted.lower(*args, **kwargs, **static).compile(options)
        return self._compiled[key], time.perf_counter() - begun

    def _load_drafter(self, drafter: Drafter | None) -> Any:
        """The drafter's weights, loaded once. Raises ValueError where it does not belong to this model."""
        if drafter is None:
            return ()
        if isinstance(drafter, Watching):
            return drafter.gather(self._load_drafter)
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


def _signature(state: State) -> Any:
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
