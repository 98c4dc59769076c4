"""What generation gives: texts, tokens and statistics; and a sequence's text as it grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from specsa_jax.cache import CacheBytes
from specsa_jax.decoding import Counts
from specsa_jax.planning.plan import Fixed, Plan
from specsa_jax.planning.planner import Decision


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of streamed text: of sequence ``index``; ``new_tokens`` of it are known so far."""

    index: int
    text: str
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Generation:
    """One sequence's continuation.

    Attributes:
      text: without the prompt, the end token, and a stop string and what follows it.
      tokens: int32 [new tokens]; the end token is included, as are those that complete a stop string.
      finish: ``"end"`` (end token), ``"stop"`` (stop string) or ``"length"`` (token budget).
      logprobs: float32 [new tokens], of the tokens in the model's own law (as :meth:`Engine.score` gives it:
        temperature 1, nothing filtered or penalised).
    """

    text: str
    tokens: np.ndarray
    finish: str
    logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Stats:
    """What a call to :meth:`Engine.generate` did. Compilation is in ``compile_seconds`` alone.

    Attributes:
      strategy: the strategy used, in words.
      prompt_tokens, new_tokens: sums over the batch.
      steps: target passes; ``sequence_steps``: the same, summed over the sequences that were still running.
      drafted, accepted: drafted tokens (of a tree, all branches), and those of them that stood.
      accepted_histogram: sequence steps by the number of drafted tokens that stood, from 0.
      acceptance_per_position: for the first drafted token of a path, the second, …: of the steps that drafted one
        there, the fraction in which one stood.
      prefill_seconds, decode_seconds, compile_seconds: wall time.
      planning_seconds: of the planner's own work, in none of the others; without the first plan, where it was ready
        before the device had read what it was sent of the prompts. ``plan``: its decisions, in their order.
      cache: bytes that the cache takes.
    """

    strategy: str
    prompt_tokens: int
    new_tokens: int
    steps: int
    sequence_steps: int
    drafted: int
    accepted: int
    accepted_histogram: tuple[int, ...]
    acceptance_per_position: tuple[float, ...]
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    cache: CacheBytes
    planning_seconds: float = 0.0
    plan: tuple[Decision, ...] = ()

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a sequence gains in a step, the target's own ("bonus") token included; at least 1."""
        return 1.0 + self.accepted / max(self.sequence_steps, 1)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of the whole batch per second of decoding."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the derived ones included."""
        return {
            **dataclasses.asdict(self),
            "cache_bytes": self.cache.total,
            "mean_acceptance_length": self.mean_acceptance_length,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclasses.dataclass(frozen=True)
class Result(Sequence):
    """The generations of a batch, in the order of the prompts, with the call's statistics."""

    generations: tuple[Generation, ...]
    stats: Stats

    def __getitem__(self, index: Any) -> Any:
        return self.generations[index]

    def __len__(self) -> int:
        return len(self.generations)


class Stream:
    """An iterator over :class:`Chunk`; behind the last one ``result`` holds the :class:`Result`."""

    def __init__(self, chunks: Generator[Chunk, None, Result]):
        self._chunks = chunks
        self.result: Result | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        try:
            return next(self._chunks)
        except StopIteration as end:
            if self.result is None:  # once it has ended, it says so without one
                self.result = end.value
            raise StopIteration from None


class Output:
    """A sequence's new tokens and text as they grow."""

    def __init__(self, tokenizer: Tokenizer, prompt_length: int, stop: tuple[str, ...], end_tokens: tuple[int, ...]):
        self.tokenizer, self.prompt_length, self.stop, self.end_tokens = tokenizer, prompt_length, stop, end_tokens
        self.tokens = np.zeros(0, np.int32)
        self.text = ""
        self.shown = 0
        self.finish: str | None = None

    def update(self, known: np.ndarray, done: bool, watched: bool = True) -> str:
        """Takes the sequence's known tokens; returns the text that can now be shown. Not ``watched``: nothing is to be
        shown, and nothing stops it, before it is done."""
        if self.finish is not None:
            return ""
        self.tokens = known[self.prompt_length :]
        if done:
            self.finish = "end" if len(self.tokens) and int(self.tokens[-1]) in self.end_tokens else "length"
        elif not watched:
            return ""
        self.text = self._decode(self.tokens)
        if any(text in self.text for text in self.stop):
            self._cut()
        # What may still change is held back: half a character, or the beginning of a stop string.
        safe = len(self.text)
        if self.finish is None:
            safe -= max((len(text) for text in self.stop), default=1) - 1
            while safe > self.shown and self.text[safe - 1] == "\ufffd":
                safe -= 1
        new = self.text[self.shown : max(safe, self.shown)]
        self.shown += len(new)
        return new

    def _cut(self) -> None:
        """Ends at the token that completes the first stop string."""
        count = next(
            count for count in range(1, len(self.tokens) + 1)
            if any(text in self._decode(self.tokens[:count]) for text in self.stop)
        )  # fmt: skip
        self.tokens = self.tokens[:count]
        text = self._decode(self.tokens)
        self.text = text[: min(text.find(stop) for stop in self.stop if stop in text)]
        self.finish = "stop"

    def _decode(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

    def generation(self, logprobs: np.ndarray) -> Generation:
        """What it has become; ``logprobs`` float32 [S] by position."""
        assert self.finish is not None
        own = logprobs[self.prompt_length : self.prompt_length + len(self.tokens)]
        return Generation(self.text, self.tokens, self.finish, own)


def stats_of(
    course: Plan | Fixed,
    rows: list[np.ndarray],
    outputs: list[Output],
    totals: Counts,
    prefill_seconds: float,
    decode_seconds: float,
    compile_seconds: float,
    size: CacheBytes,
) -> Stats:
    """The statistics of a call from its prompts, outputs and counts (``decoding.add_counts``), and what it took."""
    drafted, accepted = totals.drafted, totals.accepted
    places = np.arange(len(accepted))
    reached = [int(accepted[place:].sum()) for place in places]
    tried = [int(drafted[place:].sum()) for place in places]
    return Stats(
        strategy=_strategies(course),
        prompt_tokens=sum(len(row) for row in rows),
        new_tokens=sum(len(output.tokens) for output in outputs),
        steps=int(totals.steps),
        sequence_steps=int(accepted.sum()),
        drafted=int(totals.nodes),
        accepted=int(accepted @ places),
        accepted_histogram=tuple(int(count) for count in accepted),
        acceptance_per_position=tuple(r / t if t else 0.0 for r, t in zip(reached[1:], tried[1:], strict=True)),
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        compile_seconds=compile_seconds,
        cache=size,
        planning_seconds=course.seconds,
        plan=tuple(course.decisions),
    )


def _strategies(course: Plan | Fixed) -> str:
    """What was used, in words; of a plan, with the steps of each."""
    if not course.decisions:
        return course.strategy.describe()
    steps: dict[str, int] = {}
    for decision in course.decisions:
        steps[decision.chosen] = steps.get(decision.chosen, 0) + decision.observed_steps
    return "planned: " + ", ".join(f"{chosen} ({count} steps)" for chosen, count in steps.items())
