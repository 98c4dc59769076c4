"""What ``specsa profile`` can measure of an engine, each as a task: times of its parts, and what text shows."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax import precision
from specsa_jax.cache import pages_for
from specsa_jax.calibration import Calibration, CalibrationError, edited
from specsa_jax.checkpoints import CheckpointError
from specsa_jax.checkpoints.records import measured_as
from specsa_jax.decoding import Decoder, State
from specsa_jax.drafting import Drafter, drafter_from_name, parse_tree
from specsa_jax.drafting.watching import watcher
from specsa_jax.engine import Engine
from specsa_jax.planning.overlap import overlaps, selected_blocks
from specsa_jax.planning.profile import DraftTime, Point, PrefillTime, Prior, StepTime
from specsa_jax.planning.steps import Fixed, draft_steps, timed, with_values
from specsa_jax.runtime import bucket
from specsa_jax.sampling import Sampling, SamplingParams, batch_sampling
from specsa_jax.schedule import Sharing
from specsa_jax.strategy import Strategy

# A model's own text repeats itself the more the longer it gets: acceptance is of as much as a call usually decodes.
PRIOR_TOKENS, PLACES, SPACING, OVERLAP_QUERIES = 256, 8, 64, 33

TextKind = Literal["continuation", "edit"]
TEXTS: tuple[TextKind, ...] = ("continuation", "edit")


class Task(NamedTuple):
    """Something to measure: its name, what it is found by in a profile, what gives the new entries by field, and what
    compiles its programs without running anything."""

    name: str
    key: tuple[Any, ...]
    run: Callable[[], dict[str, tuple[Any, ...]]]
    compile: Callable[[], object] | None = None


class Bench:
    """Measures one engine's parts.

    Args: as of :func:`specsa_jax.planning.measure.measure`; ``contexts`` ascending.
    """

    def __init__(
        self, engine: Engine, calibration: Calibration, batches: Sequence[int], contexts: Sequence[int],
        drafters: Sequence[tuple[str, Sequence[str]]],
    ):  # fmt: skip
        for name, values, most in (("batch", batches, 4096), ("context", contexts, engine.max_length)):
            if not values or min(values) < 1 or max(values) > most:
                raise ValueError(f"{name}: got {list(values)}, expected whole numbers from 1 to {most}")
        self.engine, self.calibration, self.batches, self.contexts = engine, calibration, batches, contexts
        self.prior_tokens = min(PRIOR_TOKENS, engine.max_length // 2)
        self.missing: list[str] = []
        for tree in (tree for _, trees in drafters for tree in trees):
            parse_tree(tree)
        self.drafters = {name: self._drafter(name) for name, _ in drafters}
        self.drafts = [(name, tree) for name, trees in drafters for tree in trees if self._takes(name, tree)]
        # Timed steps go on behind an end token.
        self.timer = copy.copy(engine)
        self.timer._compiled = {}
        self.timer.decoder = Decoder(
            engine.config, engine.dtype, (), engine.implementation, engine.decoder.backend.interpret
        )
        self._loops: dict[tuple[str, str], Callable[..., Any]] = {}
        self.held: tuple[Any, State] | None = None  # a state behind timed steps, for others of its shapes
        self.prefilled = functools.lru_cache(maxsize=4)(self._prefilled)

    def _drafter(self, name: str) -> Drafter | None:
        """None, and a line in ``missing``, where the checkpoint has none such. Raises ValueError for other names."""
        where = self.engine.checkpoint
        try:
            drafter = drafter_from_name(name, "" if where is None else str(where))
            if drafter is not None:
                self.engine.load_drafter(drafter)
        except CheckpointError as error:
            self.missing.append(f"drafter {name}: {error}")
            return None
        return drafter

    def _takes(self, name: str, tree: str) -> bool:
        """Whether the drafter drafts such trees for this model."""
        if self.drafters[name] is None:
            return False
        try:
            Strategy(self.drafters[name], tree).check(self.engine.config)
        except ValueError as error:
            self.missing.append(f"drafts of {name}, {tree}: {error}")
            return False
        return True

    def behind_text(self) -> list[int]:
        """Contexts, at most two, behind which real text is read: those that text and model have room for.

        Raises CalibrationError where there is none.
        """
        room, refused = max(self.prior_tokens, OVERLAP_QUERIES), None
        found = []
        for context in self.contexts:
            if context + room > self.engine.max_length:
                context = max(1, self.engine.max_length - room)
            try:
                self.calibration.windows(context, max(SPACING, OVERLAP_QUERIES), PLACES)
                found.append(context)
            except CalibrationError as error:
                refused = error
        if not found:
            assert refused is not None
            raise refused
        return sorted(set(found))[:2]

    def sharing(self, schedule: str) -> Sharing:
        strategy = Strategy(None, precision="approx", schedule=schedule)
        return self.engine.resolve(strategy).sharing(self.engine.config.layers)

    # --- times --------------------------------------------------------------------------------------------------------

    def step(self, batch: int, context: int, width: int, **options: Any) -> Task:
        drafts: dict[str, Any] = {"tree": f"chain:{width - 1}"} if width > 1 else {}
        return self.step_of(batch, context, Strategy(Fixed() if width > 1 else None, **drafts, **options))

    def tree_step(self, batch: int, context: int, tree: str) -> Task:
        return self.step_of(batch, context, Strategy(Fixed(), tree))

    def step_of(self, batch: int, context: int, strategy: Strategy) -> Task:
        columns = _columns(self.engine, context, strategy)
        if self.engine.implementation == "xla":  # which computes over the whole table
            context = columns * self.engine.config.nsa.select_block
        sharing = strategy.sharing(self.engine.config.layers)
        precise: Any = "strict" if strategy.precision == "strict" else "exact"
        is_chain = strategy.drafter is None or strategy.template.is_chain
        point = Point(batch, context, strategy.width, is_chain, sharing, precise)

        def program(state: State) -> Callable[..., Any]:
            arguments = (self.engine.params, state, _greedy(batch), jnp.int32(0))
            return self.timer.executable("decode", {"strategy": strategy}, *arguments, draft_params=())[0]

        def run() -> dict[str, tuple[Any, ...]]:
            state, sampling = self._filled(batch, context, strategy)
            decode = program(state)
            known, lengths = np.asarray(state.known), np.asarray(state.cache.lengths)

            def steps(state: State, count: int) -> State:
                self.held = None  # it is given away
                cache = state.cache._replace(lengths=jnp.asarray(lengths))
                state = state._replace(cache=cache, known=jnp.asarray(known), done=jnp.zeros(batch, bool))
                return decode(self.engine.params, state, sampling, jnp.int32(count), draft_params=())[0]

            seconds, state = timed(steps, state, _room(context) // 2)
            self.held = ((batch, context, columns), state)
            return {"steps": (StepTime(point, *seconds),)}

        name = f"step of {point.width} tokens, batch {batch}, context {context:,}"
        words = [strategy.tree] if not is_chain else []
        words += [sharing.describe()] if sharing.approximates else []
        words += [f"groups of {sharing.group}"] if sharing.group and not sharing.approximates else []
        words += ["strict"] if precise == "strict" else []
        return Task(", ".join([name, *words]), ("step", point), run,
                     lambda: program(self._filled_shapes(batch, context, strategy)))  # fmt: skip

    def draft(self, name: str, tree: str, batch: int, context: int) -> Task:
        engine = self.engine

        def program(state: State, params: Any, draft: Any) -> Callable[..., Any]:
            arguments = (engine.params, params, draft, state, _greedy(batch), jnp.int32(0))
            return engine.executable(self._drafting(name, tree), {}, *arguments)[0]

        def run() -> dict[str, tuple[Any, ...]]:
            drafter, strategy = self._drafts(name, tree)
            params = engine.load_drafter(drafter)
            state, sampling = self._filled(batch, context, strategy)
            columns = state.cache.page_table.shape[1]
            draft = with_values(engine.draft_state(drafter, batch, columns), np.asarray(state.cache.lengths))
            compiled = program(state, params, draft)

            def steps(before: Any, count: int) -> Any:
                return compiled(engine.params, params, before[0], state, sampling, jnp.int32(count))

            (seconds, _, _), _ = timed(steps, (draft, None), _room(context) // 2)
            return {"drafts": (DraftTime(name, tree, batch, context, seconds),)}

        def compile() -> None:
            drafter, strategy = self._drafts(name, tree)
            state = self._filled_shapes(batch, context, strategy)
            draft = engine.draft_state(drafter, batch, state.cache.page_table.shape[1], abstract=True)
            program(state, engine.load_drafter(drafter), draft)

        return Task(f"drafts of {name}, {tree}, batch {batch}, context {context:,}",
                     ("draft", name, tree, batch, context), run, compile)  # fmt: skip

    def _drafts(self, name: str, tree: str) -> tuple[Drafter, Strategy]:
        drafter = self.drafters[name]
        assert drafter is not None
        return drafter, Strategy(drafter, tree)

    def _drafting(self, name: str, tree: str) -> Callable[..., Any]:
        """The jitted :func:`draft_steps`, one for each drafter and tree."""
        loop = functools.partial(draft_steps, self.engine.decoder, self._drafts(name, tree)[1])
        return self._loops.setdefault((name, tree), jax.jit(loop, donate_argnums=2))  # of two threads', the first one's

    def prefill(self, batch: int, tokens: int) -> Task:
        def run() -> dict[str, tuple[Any, ...]]:
            engine = self.engine
            rows = self._rows(batch, tokens)
            state = self._initial(rows, tokens, Strategy(None))
            chunk = engine.chunk(tokens)
            static = {"chunk": chunk, "drafter": None, "precision": "exact"}
            prefill, _ = engine.executable("prefill", static, engine.params, state, jnp.int32(1))
            state = jax.block_until_ready(prefill(engine.params, state, jnp.int32(1)))
            chunks = -(-(tokens - 1) // chunk)
            # On XLA's path each chunk computes over the whole table, and so takes as long as any other.
            some = chunks if engine.implementation == "pallas" else min(chunks, 4)
            state = state._replace(cache=state.cache._replace(lengths=jnp.zeros(batch, jnp.int32)))
            begun = time.perf_counter()
            jax.block_until_ready(prefill(engine.params, state, jnp.int32(some)))
            seconds = (time.perf_counter() - begun) * max(chunks, 1) / max(some, 1)
            return {"prefills": (PrefillTime(batch, tokens, seconds),)}

        return Task(f"prefill of {tokens:,} tokens, batch {batch}", ("prefill", batch, tokens), run)

    def _rows(self, batch: int, tokens: int) -> list[np.ndarray]:
        """Text, from several places where it is long enough, over and over where it is short."""
        stream = self.calibration.stream
        return [np.resize(np.roll(stream, -row * len(stream) // batch), tokens) for row in range(batch)]

    def _initial(self, rows: list[np.ndarray], capacity: int, strategy: Strategy) -> State:
        """State of ``rows``, nothing of them read, with room for ``capacity`` tokens each. Raises CapacityError."""
        # A table's width is rounded up, which may be beyond what the model serves.
        full = [np.zeros(min(capacity, self.engine.max_length), np.int32)] * len(rows)
        pages, _ = self.engine.plan_pages(full, 0, strategy)
        state = self.engine.initial_state(rows, pages, 0)
        return state._replace(limit=jnp.full(len(rows), capacity, jnp.int32))

    def _filled(self, batch: int, context: int, strategy: Strategy) -> tuple[State, Sampling]:
        """State of sequences that fill ``context`` tokens but for the room of timed steps, without a drafter's.

        The kernels' time depends on which blocks queries share, so there the cache holds text; XLA's does not.
        """
        rows = self._filling(batch, context)
        lengths = jnp.full(batch, len(rows[0]), jnp.int32)
        key = batch, context, _columns(self.engine, context, strategy)
        if self.held is not None and self.held[0] == key:
            state = self.held[1]
            return state._replace(
                known=lengths, done=jnp.zeros(batch, bool), cache=state.cache._replace(lengths=lengths - 1)
            ), _greedy(batch)
        self.held = None
        state = self._initial(rows, context, strategy)
        if self.engine.implementation == "pallas":
            state = self._read(state, len(rows[0]), None)
        else:
            state = with_values(state, np.asarray(lengths) - 1)
        return state, _greedy(batch)

    def _filling(self, batch: int, context: int) -> list[np.ndarray]:
        return self._rows(batch, max(1, min(context, self.engine.max_length) - _room(context)))

    def _filled_shapes(self, batch: int, context: int, strategy: Strategy) -> State:
        """Shapes of :meth:`_filled`, whose programs are compiled."""
        rows = self._filling(batch, context)
        state = jax.eval_shape(lambda: self._initial(rows, context, strategy))
        if self.engine.implementation == "pallas":
            self._reader(state, len(rows[0]), None)
        return state

    def _read(self, state: State, longest: int, drafter: Drafter | None) -> State:
        """Prefilled, shown to a drafter that observes."""
        prefill, shown = self._reader(state, longest, drafter)
        return prefill(self.engine.params, state, jnp.int32(longest), **shown)

    def _reader(self, state: State, longest: int, drafter: Drafter | None) -> tuple[Callable[..., Any], dict[str, Any]]:
        prefill, _, shown = self.engine.prefill_program(state, self.engine.chunk(longest), drafter, "exact")
        return prefill, shown

    # --- what real text shows -----------------------------------------------------------------------------------------

    def prior(self, name: str, tree: str, text: TextKind, context: int) -> Task:
        engine = self.engine

        def run() -> dict[str, tuple[Any, ...]]:
            drafter, strategy = self._drafts(name, tree)
            state = jax.tree.map(jnp.copy, self.prefilled(watcher(drafter), text, context))
            if watcher(drafter) is None:
                state = state._replace(draft=engine.draft_state(drafter, PLACES, state.cache.page_table.shape[1]))
            sampling = _greedy(PLACES)
            decode, _ = engine.decode_program(strategy, state, sampling)
            _, counts = decode(
                engine.params, state, sampling, jnp.int32(self.prior_tokens)
            )  # each gives a token or more
            drafted, accepted = (tuple(map(int, column)) for column in (counts.drafted, counts.accepted))
            found = Prior(name, tree, text, context, sum(accepted), drafted, accepted, int(counts.nodes))
            return {"priors": (found,)}

        def compile() -> None:
            drafter, strategy = self._drafts(name, tree)
            own = watcher(drafter)
            state = jax.eval_shape(lambda: self._prompted([np.zeros(context, np.int32)] * PLACES, context))
            columns = state.cache.page_table.shape[1]
            self._reader(state._replace(draft=engine.draft_state(own, PLACES, columns, abstract=True)), context, own)
            draft = engine.draft_state(drafter, PLACES, columns, abstract=True)
            engine.decode_program(strategy, state._replace(draft=draft), _greedy(PLACES), alone=False)

        return Task(f"acceptance of {name}, {tree}, {text} behind {context:,}", ("prior", name, tree, text, context),
                     run, compile)  # fmt: skip

    def _prefilled(self, observer: Drafter | None, text: TextKind, context: int) -> State:
        """Read prompts of the calibration text, with room for what is decoded."""
        rows = list(self.calibration.windows(context, SPACING, PLACES)[:, :context])
        if text == "edit":
            rows = [np.asarray(edited(self.engine.tokenizer, row.tolist(), context), np.int32) for row in rows]
        state = self._prompted(rows, context)
        draft = self.engine.draft_state(observer, len(rows), state.cache.page_table.shape[1])
        return self._read(state._replace(draft=draft), context, observer)

    def _prompted(self, rows: list[np.ndarray], context: int) -> State:
        state = self._initial(rows, context + self.prior_tokens, Strategy(None))
        return state._replace(limit=state.known + self.prior_tokens)

    def overlap(self, context: int) -> Task:
        def run() -> dict[str, tuple[Any, ...]]:
            rows = self.calibration.windows(context, OVERLAP_QUERIES, PLACES)
            cache = self.engine.prefill(list(rows[:, : context + 1]), OVERLAP_QUERIES)
            tokens = jnp.asarray(rows[:, context:-1])
            selected = np.asarray(
                jax.jit(functools.partial(selected_blocks, self.engine))(self.engine.params, tokens, cache)
            )
            return {"overlaps": tuple(overlaps(selected, context, self.engine.config.nsa))}

        return Task(f"overlap of selected blocks behind {context:,}", ("overlap", context), run)

    def divergence(self, schedule: str) -> Task:
        strategy = Strategy(None, precision="approx", schedule=schedule)

        def run() -> dict[str, tuple[Any, ...]]:
            found = precision.measure(self.engine, [strategy], self.calibration, contexts=self.behind_text())
            return {"measurements": tuple(found)}

        key = ("divergence", *measured_as(self.sharing(schedule), 0), str(self.engine.dtype))
        return Task(f"divergence of {schedule}", key, run)


def _greedy(batch: int) -> Sampling:
    return batch_sampling([SamplingParams()] * batch)


def _columns(engine: Engine, context: int, strategy: Strategy) -> int:
    """Width of the page table for so many tokens, as the engine plans it."""
    longest = engine.max_length if strategy.precision == "strict" else context
    return bucket(pages_for(engine.config.nsa, longest))


def _room(context: int) -> int:
    """Tokens of ``context`` that are left free for timed steps: an eighth of long ones, 512 at most."""
    return max(min(192, context // 2), min(512, context // 8))
