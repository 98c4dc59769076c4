"""Training of a target's draft head: ``train_draft(DraftConfig(...))`` is the whole interface.

The run's directory::

    run.json                   config, head, target and data digest; what --resume compares
    tokens-{hash}.npz          the tokenised corpus
    generated.npz, eval.npz    the target's continuations of files, and of held-out files
    state/{step}/              parameters and optimiser state for --resume (Orbax)
    log.jsonl, draft.png       losses, and the predicted acceptance
    draft/                     the head, as specsa_jax.checkpoints.draft_head writes it
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax import checkpoints
from specsa_jax.checkpoints import draft_head, store
from specsa_jax.config import ConfigError
from specsa_jax.drafting import head_model
from specsa_jax.drafting.head_model import HeadConfig
from specsa_jax.engine import Engine
from specsa_jax.training import data, draft_data, draft_step, report
from specsa_jax.training.config import DivergedError, TrainingError
from specsa_jax.training.draft_config import DraftConfig
from specsa_jax.training.draft_eval import Evaluation, judge, record_of
from specsa_jax.training.run import LAG, Meter, States, check_identity, check_writable, signals
from specsa_jax.training.step import DTYPES


@dataclasses.dataclass(frozen=True)
class DraftSummary:
    """How a run ended.

    Attributes:
      steps, tokens: done in the whole run, resumed parts included.
      train_loss: mean of the last 50 steps, in nats.
      evaluation: of the head that is written; None if interrupted.
      parameters: the head's.
      seconds: of this process, set-up included.
      tokens_per_second: of this process, compilation, evaluation and saving left out.
      stopped: ``"completed"``, ``"time limit"``, ``"SIGINT"`` or ``"SIGTERM"``.
      output, head: directories; no head is written when interrupted.
    """

    steps: int
    tokens: int
    train_loss: float | None
    evaluation: Evaluation | None
    parameters: int
    seconds: float
    tokens_per_second: float
    stopped: str
    output: str
    head: str | None


def train_draft(config: DraftConfig, progress: report.Listener = lambda record: None) -> DraftSummary:
    """Trains a draft head; on SIGINT or SIGTERM it finishes the step, saves, and returns.

    ``progress`` is called with every log record (``step``, ``loss``, ``matches`` by depth, ``learning_rate``,
    ``tokens_per_second``, and ``held_out_loss``, ``held_out_matches``, ``acceptance_length`` when measured) and with
    ``{"message": text}``.

    Raises ConfigError, TrainingError, CheckpointError or UnsupportedError before any work when something given is
    unusable; DivergedError when the loss stops being finite.
    """
    return _Run(config, progress).go()


class _Run:
    def __init__(self, config: DraftConfig, progress: report.Listener):
        self.config, self.progress = config, progress
        self.started = time.monotonic()
        self.out = Path(config.output)
        target = checkpoints.load(config.target)
        self.head_config = HeadConfig.of(target.config, **config.sizes())
        if config.context > target.config.max_length:
            raise ConfigError(
                f"context: got {config.context}, expected at most {target.config.max_length} (the target's max_length)"
            )
        if config.unroll >= self.head_config.window:
            raise ConfigError(f"unroll: got {config.unroll}, expected below the window {self.head_config.window}")
        sources = _sources(config, target.metadata)
        check_writable(self.out)
        self.states = States(self.out, config.keep)
        resumed = self.states.resumed(config.resume, self.out / draft_head.DIRECTORY)

        corpus = data.read_corpus(sources)
        self.documents = {held: corpus.split(held) for held in (False, True)}
        self.sources, self.tokenizer = sources, target.tokenizer
        self.fingerprint = draft_head.fingerprint(target.config, target.params)
        identity = json.loads(json.dumps({
            "train": config.identity(), "head": self.head_config.to_dict(), "target": self.fingerprint,
            "corpus": corpus.digest(),
        }))  # fmt: skip
        if resumed:
            check_identity(self.out, identity)
        self._say(f"{len(self.documents[False])} files to train on, {len(self.documents[True])} held out")
        self.tokens = data.encode_cached(corpus, target.tokenizer, self.out)
        if len(self.tokens.train) <= config.context:
            raise TrainingError(
                f"data: {len(self.tokens.train)} training tokens, expected more than the context of {config.context}"
            )
        held_out_prompts = draft_data.held_out_prompts(self.tokens.held_out, config)
        (self.out / "run.json").write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")

        self._generate(target, held_out_prompts)
        dtype = draft_step.compute_dtype(config)
        self.target = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), target.params)

        def first_state() -> dict[str, Any]:
            params = head_model.init_params(self.head_config, config.seed)
            return {"params": params, "optimizer": draft_step.optimizer(config).init(params)}

        if resumed:
            self.state = store.read_tree(self.states.path(resumed), jax.eval_shape(first_state))
            self._say(f"resumed after step {resumed}")
        else:
            self.state = jax.jit(first_state)()
        self.parameters = sum(x.size for x in jax.tree.leaves(self.state["params"]))
        self._say(f"a head of {self.parameters:,} parameters, features behind layers "
                  f"{', '.join(map(str, self.head_config.features))}")  # fmt: skip
        self.step = self.saved = resumed
        self.train_step = draft_step.make_train_step(self.head_config, config)
        self.evaluate = draft_step.make_evaluate(self.head_config, config)

    def _generate(self, target: checkpoints.Checkpoint, held_out_prompts: np.ndarray) -> None:
        """Lets the target write, or reads what it wrote before the run was interrupted."""
        config = self.config
        engine = Engine(
            target.config, target.params, target.tokenizer, dtype=draft_step.compute_dtype(config),
            prefill_chunk=config.prefill_chunk or None,
            implementation=None if config.implementation == "auto" else config.implementation,
        )  # fmt: skip

        def write(prompts: np.ndarray, stream: np.ndarray, sampled: float, what: str) -> draft_data.Generated:
            begun = time.monotonic()

            def say(done: int) -> bool:
                spent = time.monotonic() - begun
                self._say(f"the target has continued {done} of {len(prompts)} {what} ({spent:.0f} s)")
                return not config.time_limit or time.monotonic() - self.started < config.time_limit / 3

            return draft_data.generate(engine, prompts, stream, config, sampled, say)

        self.held_out = draft_data.cached(
            self.out / f"eval-{len(held_out_prompts)}.npz",
            lambda: write(held_out_prompts, self.tokens.held_out, 0.0, "held-out prompts"),
        )
        self.generated = None
        if config.generated_rows():
            prompts = draft_data.training_prompts(self.tokens.train, config)
            self.generated = draft_data.cached(
                self.out / "generated.npz", lambda: write(prompts, self.tokens.train, config.sampled, "prompts")
            )

    # --- the loop -----------------------------------------------------------------------------------------------------

    def go(self) -> DraftSummary:
        self.log = report.Log(self.out / "log.jsonl", self.step)
        self.in_flight: collections.deque[tuple[int, int, float, Any]] = collections.deque()
        self.meter = Meter()
        try:
            with signals() as received:
                stopped = self._loop(received)
                if self.saved != self.step:
                    self._save()
            summary = self._finish(stopped)
            report.plot_draft(self.log.records, self.out / "draft.png", f"{self.step} steps", self.config.chain)
            return summary
        finally:
            self.log.close()

    def _loop(self, received: list[str]) -> str:
        config, begun, first = self.config, time.monotonic(), True
        while self.step < config.steps:
            rows = draft_data.batch_rows(self.tokens.train, self.generated, config, self.step)
            rate = draft_step.learning_rate(config, self.step, self._time_spent(begun))
            params, optimizer, loss, matches = self.train_step(
                self.state["params"], self.state["optimizer"], self.target, rows, np.float32(rate)
            )
            self.state = {"params": params, "optimizer": optimizer}
            if first:
                loss.block_until_ready()
                self._say(f"first step {time.monotonic() - begun:.1f} s")
                begun = time.monotonic()
            self.step += 1
            self.in_flight.append((self.step, 0 if first else rows.size, rate, (loss, matches)))
            first = False
            self._drain(LAG)
            if config.eval_every and self.step % config.eval_every == 0 and self.step < config.steps:
                self._drain(0, **record_of(self._evaluation(self.state["params"])))
            if config.save_every and self.step % config.save_every == 0 and self.step < config.steps:
                self._drain(0)
                self._save()
            if received:
                break
            if config.time_limit and self._time_spent(begun) >= 1.0:
                received.append("time limit")
                break
        self._drain(0)
        return received[0] if received else "completed"

    def _time_spent(self, begun: float) -> float:
        """How much of the time that the limit left at ``begun`` is gone, 0 to 1; 0 without a limit."""
        end = self.started + self.config.time_limit
        if not self.config.time_limit:
            return 0.0
        return min(1.0, (time.monotonic() - begun) / max(end - begun, 1e-3))

    def _drain(self, leave: int, **last: Any) -> None:
        """Reads and logs the losses in flight but the newest ``leave``; ``last`` goes into the last record."""
        while len(self.in_flight) > leave:
            number, tokens, rate, (loss, matches) = self.in_flight.popleft()
            value = float(loss)
            if not math.isfinite(value):
                hint = f"; the state of step {self.saved} is kept" if self.saved else ""
                raise DivergedError(f"step {number}: loss is {value}; lower the learning rate or clip{hint}")
            record = {
                "step": number,
                "loss": value,
                "matches": [round(float(x), 4) for x in matches],
                "learning_rate": rate,
                "tokens_per_second": self.meter.add(tokens),
                **(last if not self.in_flight else {}),
            }
            self.log.write(record)
            self.progress(record)
        if leave == 0:
            self.meter.restart()

    def _evaluation(self, params: Any) -> Evaluation:
        return judge(self.evaluate, params, self.target, self.held_out, self.config)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _finish(self, stopped: str) -> DraftSummary:
        config = self.config
        interrupted = stopped.startswith("SIG")
        recent = [r["loss"] for r in self.log.records[-50:]]
        evaluation = None
        if not interrupted:
            exported = jax.tree.map(lambda x: x.astype(DTYPES[config.export_dtype]), self.state["params"])
            evaluation = self._evaluation(jax.tree.map(lambda x: x.astype(jnp.float32), exported))
            self.log.amend(**record_of(evaluation))
        summary = DraftSummary(
            steps=self.step,
            tokens=self.step * config.batch * config.context,
            train_loss=float(np.mean(recent)) if recent else None,
            evaluation=evaluation,
            parameters=self.parameters,
            seconds=round(time.monotonic() - self.started, 1),
            tokens_per_second=round(self.meter.overall(), 1),
            stopped=stopped,
            output=str(self.out),
            head=None if interrupted else str(self.out / draft_head.DIRECTORY),
        )
        if summary.head:
            digest = draft_head.tokenizer_digest(self.tokenizer)
            head = draft_head.DraftHead(exported, self.head_config, self.fingerprint, digest, self._card(summary))
            draft_head.save(summary.head, head, overwrite=True)
        return summary

    def _card(self, summary: DraftSummary) -> dict[str, Any]:
        """metadata.json: everything that it takes to judge the head and to train it again."""
        result = dataclasses.asdict(summary)
        del result["output"], result["head"]
        return {
            "recipe": self.config.command(),
            "parameters": self.parameters,
            "result": result,
            "corpus": {
                "train": {"files": len(self.documents[False]), "tokens": len(self.tokens.train)},
                "held_out": {"files": len(self.documents[True]), "tokens": len(self.tokens.held_out)},
                **dataclasses.asdict(self.sources),
            },
            "config": self.config.identity(),
            "versions": {"python": platform.python_version(), "jax": jax.__version__},
            "device": jax.devices()[0].device_kind,
        }

    def _save(self) -> None:
        self.states.save(self.step, self.state)
        self.saved = self.step
        self.meter.restart()

    def _say(self, text: str) -> None:
        self.progress({"message": text})


@dataclasses.dataclass(frozen=True)
class _Sources:
    """What :func:`data.read_corpus` reads."""

    data: tuple[str, ...]
    glob: str
    exclude: tuple[str, ...]
    skip_undecodable: bool
    holdout: float


def _sources(config: DraftConfig, card: dict[str, Any]) -> _Sources:
    """The files of the run: what it does not say, the target's card does. Raises ConfigError."""
    trained = card.get("config") if isinstance(card.get("config"), dict) else {}
    assert isinstance(trained, dict)
    sources = _Sources(
        config.data or tuple(trained.get("data", ())),
        config.glob or trained.get("glob", "**/*.py"),
        config.exclude or tuple(trained.get("exclude", ())),
        config.skip_undecodable or bool(trained.get("skip_undecodable", False)),
        config.holdout or trained.get("holdout", 0.05),
    )
    if not sources.data:
        raise ConfigError("data: got nothing, and the target's card names no files; expected directories or files")
    return sources
