"""What a call may use, and how that is chosen: strategies, checked and loaded, and the plans of planners."""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from pallas_kernels import Implementation
from specsa_jax.admission import Bound, admit, admitted, check_bound
from specsa_jax.checkpoints import CheckpointError, draft_head, records
from specsa_jax.checkpoints.records import Records
from specsa_jax.config import ModelConfig
from specsa_jax.decoding import State
from specsa_jax.drafting import Drafter
from specsa_jax.drafting.watching import Watching
from specsa_jax.planning import profile as profiles
from specsa_jax.planning import space
from specsa_jax.planning.costs import Costs, measure_bandwidth
from specsa_jax.planning.plan import SHORTEST, Plan
from specsa_jax.planning.planner import Candidate, Planner
from specsa_jax.planning.predict import Acceptance
from specsa_jax.planning.profile import Profile
from specsa_jax.planning.space import Space
from specsa_jax.prompts import PromptError
from specsa_jax.reading import Reader
from specsa_jax.runtime import Runtime, bucket, signature
from specsa_jax.schedule import Sharing, parse_schedule
from specsa_jax.strategy import Precision, Strategy

# What compiling a loop takes, as far as a planner knows before the first one.
_COMPILE_SECONDS = 10.0


class Chooser(Runtime):
    """A model's programs with what was measured of it: which strategies a call may use, and plans among them.

    Arguments, and what is raised, as :class:`specsa_jax.Engine`.
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
        checkpoint: str | os.PathLike[str] | None = None,
        profile: Profile | str | os.PathLike[str] | None = None,
        allow_mismatch: bool = False,
    ):
        if not isinstance(profile, Profile | str | os.PathLike | None):
            raise profiles.ProfileError(f"profile: got {profile!r}, expected a Profile, or the path of its file")
        if not isinstance(checkpoint, str | os.PathLike | None):
            raise CheckpointError(f"checkpoint: got {checkpoint!r}, expected the path of a directory")
        if not isinstance(allow_mismatch, bool):
            raise profiles.ProfileError(f"allow_mismatch: got {allow_mismatch!r}, expected True or False")
        super().__init__(
            config, params, tokenizer, dtype=dtype, max_length=max_length, max_cache_bytes=max_cache_bytes,
            prefill_chunk=prefill_chunk, implementation=implementation, end_tokens=end_tokens,
        )  # fmt: skip
        Strategy(precision=precision)  # refused here rather than in each call
        self.precision = precision
        self._candidates: dict[Any, list[Candidate]] = {}  # of planners' spaces, read once
        self._spaces: dict[Any, Space] = {}
        self._records: tuple[Any, Records] | None = None
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self._profile, self._allow_mismatch = profile, allow_mismatch
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
