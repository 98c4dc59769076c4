"""The training loop.

The run's directory::

    run.json             config and data digest; what --resume compares
    tokenizer.json       the tokenizer
    tokens-{hash}.npz    the tokenised corpus
    state/{step}/        parameters and optimiser state for --resume (Orbax)
    log.jsonl, loss.png  losses
    checkpoint/          the trained model, as specsa_jax.checkpoints writes it
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from specsa_jax import checkpoints, model
from specsa_jax.checkpoints import store
from specsa_jax.config import PRESETS, ConfigError, ModelConfig, preset
from specsa_jax.training import data, report, step
from specsa_jax.training.config import DivergedError, TrainConfig, TrainingError
from specsa_jax.training.run import LAG, Meter, States, check_identity, check_writable, signals
from specsa_jax.training.tokenizer import END_OF_TEXT_ID, train_tokenizer


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
      steps, tokens: done in the whole run, resumed parts included.
      train_loss: mean of the last 50 steps, in nats a token.
      held_out_loss, held_out_bits_per_byte: of the exported weights on all held-out files; None if interrupted.
      held_out_files, training_files: documents on each side.
      seconds: of this process, set-up included.
      tokens_per_second: of this process, compilation, evaluation and saving left out.
      stopped: ``"completed"``, ``"time limit"``, ``"SIGINT"`` or ``"SIGTERM"``.
      output, checkpoint: directories; no checkpoint is exported when interrupted.
    """

    steps: int
    tokens: int
    train_loss: float | None
    held_out_loss: float | None
    held_out_bits_per_byte: float | None
    held_out_files: int
    training_files: int
    seconds: float
    tokens_per_second: float
    stopped: str
    output: str
    checkpoint: str | None


def train(config: TrainConfig, progress: report.Listener = lambda record: None) -> Summary:
    """Trains a model; on SIGINT or SIGTERM it finishes the step, saves, and returns.

    Args:
      config: the run.
      progress: called with every log record (``step``, ``loss``, ``learning_rate``, ``tokens_per_second``,
        ``held_out_loss`` when measured) and with ``{"message": text}``.

    Raises ConfigError, TrainingError or CheckpointError before any work when something given is unusable;
    DivergedError when the loss stops being finite.
    """
    return _Run(config, progress).go()


class _Run:
    def __init__(self, config: TrainConfig, progress: report.Listener):
        self.config, self.progress = config, progress
        self.started = time.monotonic()
        self.out = Path(config.output)
        self.model_config, initial = _starting_point(config)
        check_writable(self.out)
        self.states = States(self.out, config.keep)
        resumed = self.states.resumed(config.resume, self.out / "checkpoint")

        corpus = data.read_corpus(config)
        self.documents = {held: corpus.split(held) for held in (False, True)}
        identity = json.loads(json.dumps({
            "train": config.identity(), "model": self.model_config.to_dict(), "corpus": corpus.digest(),
        }))  # fmt: skip
        if resumed:
            check_identity(self.out, identity)
        self._say(
            f"{len(self.documents[False])} files to train on, {len(self.documents[True])} held out"
            f" ({corpus.duplicates} duplicates and {corpus.undecodable} undecodable files left out)"
        )
        self.tokenizer = self._tokenizer(initial, resumed)
        self.end_tokens = initial.end_tokens if initial else None
        end = self.end_tokens[0] if self.end_tokens else END_OF_TEXT_ID
        self.tokens = data.encode_cached(corpus, self.tokenizer, self.out, end)
        self.bytes_per_token = sum(len(d.text.encode()) for d in self.documents[True]) / len(self.tokens.held_out)
        self._say(f"{len(self.tokens.train):,} training tokens, {len(self.tokens.held_out):,} held out")
        for stage in config.stages:
            if len(self.tokens.train) <= stage.context:
                raise TrainingError(
                    f"data: {len(self.tokens.train)} training tokens, expected more than the context of {stage.context}"
                )
            data.held_out_batches(self.tokens.held_out, stage.context, stage.batch // config.grad_accum, 1)

        def first_params() -> dict[str, Any]:
            return initial.params if initial else model.init_params(self.model_config, config.seed)

        def first_state(params: dict[str, Any]) -> dict[str, Any]:
            params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
            return {"params": params, "optimizer": step.optimizer(config).init(params)}

        if resumed:
            like = jax.eval_shape(lambda: first_state(first_params()))
            self.state = store.read_tree(self.states.path(resumed), like)
            self._say(f"resumed after step {resumed}")
        else:
            self.state = jax.jit(first_state)(first_params())
        (self.out / "run.json").write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        self.step = self.saved = resumed
        self.rates = np.asarray(step.learning_rate(config, np.arange(config.steps)))
        self.train_step = step.make_train_step(self.model_config, config)
        self.evaluate = step.make_evaluate(self.model_config, config)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def go(self) -> Summary:
        self.log = report.Log(self.out / "log.jsonl", self.step)
        self.in_flight: collections.deque[tuple[int, int, jax.Array]] = collections.deque()
        self.meter = Meter()
        try:
            with signals() as received:
                stopped = self._loop(received)
                if self.saved != self.step:
                    self._save()
            summary = self._finish(stopped)
            report.plot(self.log.records, self.out / "loss.png", f"{self.step} steps")
            return summary
        finally:
            self.log.close()

    def _loop(self, received: list[str]) -> str:
        config, stage_index = self.config, -1
        while self.step < config.steps:
            index, step_in_stage = config.stage_at(self.step)
            stage = config.stages[index]
            rows = data.training_rows(self.tokens.train, stage.context, stage.batch, step_in_stage, config.seed, index)
            new_shape, stage_index = index != stage_index, index
            if new_shape:
                self._drain(0)
                begun = time.monotonic()
            params, optimizer, loss = self.train_step(self.state["params"], self.state["optimizer"], rows)
            self.state = {"params": params, "optimizer": optimizer}
            if new_shape:
                loss.block_until_ready()
                self._say(f"context {stage.context}, batch {stage.batch}: first step {time.monotonic() - begun:.1f} s")
            self.step += 1
            self.in_flight.append((self.step, 0 if new_shape else stage.batch * stage.context, loss))
            self._drain(LAG)
            if new_shape:
                self.meter.restart()
            if config.eval_every and self.step % config.eval_every == 0 and self.step < config.steps:
                self._drain(0, held_out_loss=self._held_out_loss(self.state["params"], config.eval_batches))
            if config.save_every and self.step % config.save_every == 0 and self.step < config.steps:
                self._drain(0)
                self._save()
            if received:
                break
            if config.time_limit and time.monotonic() - self.started > config.time_limit:
                received.append("time limit")
                break
        self._drain(0)
        return received[0] if received else "completed"

    def _drain(self, leave: int, **last: float) -> None:
        """Reads and logs the losses in flight but the newest ``leave``; ``last`` goes into the last record."""
        while len(self.in_flight) > leave:
            number, tokens, loss = self.in_flight.popleft()
            value = float(loss)
            if not math.isfinite(value):
                hint = f"; the state of step {self.saved} is kept" if self.saved else ""
                raise DivergedError(f"step {number}: loss is {value}; lower the learning rate or clip{hint}")
            record = {
                "step": number,
                "loss": value,
                "learning_rate": float(self.rates[number - 1]),
                "tokens_per_second": self.meter.add(tokens),
                **(last if not self.in_flight else {}),
            }
            self.log.write(record)
            self.progress(record)
        if leave == 0:
            self.meter.restart()

    def _held_out_loss(self, params: Any, count: int) -> float:
        """Held-out loss in nats a token over ``count`` batches (0: all), in the shape of the stage of the last step."""
        stage = self.config.stages[self.config.stage_at(max(self.step, 1) - 1)[0]]
        batch = stage.batch // self.config.grad_accum
        batches = data.held_out_batches(self.tokens.held_out, stage.context, batch, count)
        return float(np.mean([float(self.evaluate(params, rows)) for rows in batches]))

    # --- beginning and end --------------------------------------------------------------------------------------------

    def _tokenizer(self, initial: checkpoints.Checkpoint | None, resumed: int) -> tokenizers.Tokenizer:
        file = self.out / "tokenizer.json"
        if resumed and file.exists():
            return tokenizers.Tokenizer.from_file(str(file))
        if initial:
            tokenizer = initial.tokenizer
        else:
            self._say(f"training a tokenizer of {self.model_config.vocab_size} tokens")
            tokenizer = train_tokenizer((d.text for d in self.documents[False]), self.model_config.vocab_size)
        tokenizer.save(str(file))
        return tokenizer

    def _finish(self, stopped: str) -> Summary:
        config = self.config
        interrupted = stopped.startswith("SIG")
        recent = [r["loss"] for r in self.log.records[-50:]]
        held_out = bits = None
        if not interrupted:
            exported = jax.tree.map(lambda x: x.astype(step.DTYPES[config.export_dtype]), self.state["params"])
            held_out = self._held_out_loss(jax.tree.map(lambda x: x.astype(jnp.float32), exported), 0)
            bits = held_out / math.log(2) / self.bytes_per_token
            self.log.amend(held_out_loss=held_out)
        tokens = sum(s.batch * s.context * n for s, n in self._steps_by_stage())
        summary = Summary(
            steps=self.step,
            tokens=tokens,
            train_loss=float(np.mean(recent)) if recent else None,
            held_out_loss=held_out,
            held_out_bits_per_byte=bits,
            held_out_files=len(self.documents[True]),
            training_files=len(self.documents[False]),
            seconds=round(time.monotonic() - self.started, 1),
            tokens_per_second=round(self.meter.overall(), 1),
            stopped=stopped,
            output=str(self.out),
            checkpoint=None if interrupted else str(self.out / "checkpoint"),
        )
        if not interrupted:
            card = self._card(summary)
            store.save(self.out / "checkpoint", exported, self.model_config, self.tokenizer, card, overwrite=True)
        return summary

    def _steps_by_stage(self) -> Iterator[tuple[Any, int]]:
        left = self.step
        for stage in self.config.stages:
            done = min(left, stage.steps)
            left -= done
            yield stage, done

    def _card(self, summary: Summary) -> dict[str, Any]:
        """metadata.json: everything that it takes to judge the model and to train it again."""
        result = dataclasses.asdict(summary)
        del result["output"], result["checkpoint"]
        corpus = {
            name: {"files": len(self.documents[held]), "tokens": len(stream),
                   "bytes": sum(len(d.text.encode()) for d in self.documents[held])}
            for name, held, stream in (("train", False, self.tokens.train), ("held_out", True, self.tokens.held_out))
        }  # fmt: skip
        count = sum(x.size for x in jax.tree.leaves(self.state["params"]))
        return {
            "recipe": self.config.command(),
            "parameters": count,
            "result": result,
            "corpus": {**corpus, "holdout": self.config.holdout},
            "config": self.config.identity(),
            "versions": {"python": platform.python_version(), "jax": jax.__version__,
                         "tokenizers": tokenizers.__version__},
            "device": jax.devices()[0].device_kind,
            **({"end_tokens": list(self.end_tokens)} if self.end_tokens else {}),
        }  # fmt: skip

    # --- states -------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self.states.save(self.step, self.state)
        self.saved = self.step
        self.meter.restart()

    def _say(self, text: str) -> None:
        self.progress({"message": text})


def _starting_point(config: TrainConfig) -> tuple[ModelConfig, checkpoints.Checkpoint | None]:
    """The model's config, and the checkpoint it comes from, if any."""
    initial = None
    if config.init:
        initial = checkpoints.load(config.init)
        model_config = initial.config
    elif config.model in PRESETS:
        model_config = preset(config.model)
    else:
        try:
            model_config = ModelConfig.from_dict(json.loads(Path(config.model).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise ConfigError(f"{config.model}: {error}") from error
            raise ConfigError(
                f"model: got {config.model!r}, expected a ModelConfig JSON file or one of {', '.join(PRESETS)}: {error}"
            ) from error
    if config.vocab_size:
        model_config = dataclasses.replace(model_config, vocab_size=config.vocab_size)
    if model_config.vocab_size < 257:
        raise ConfigError(f"vocab_size: got {model_config.vocab_size}, expected at least 257 (bytes and end of text)")
    longest = max(stage.context for stage in config.stages)
    if longest > model_config.max_length:
        raise ConfigError(
            f"stages: got a context of {longest}, expected at most {model_config.max_length} (max_length)"
        )
    return model_config, initial
