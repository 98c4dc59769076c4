"""What a training run is: :class:`TrainConfig`, checked before any work."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any, Literal

from specsa_jax.config import ConfigError, _Config, _require


class TrainingError(ValueError):
    """A run that cannot start: bad data, an unusable directory, nothing to resume."""


class DivergedError(TrainingError):
    """The loss stopped being finite."""


@dataclasses.dataclass(frozen=True)
class Stage(_Config):
    """A stretch of training at one shape.

    Attributes:
      context: tokens a sequence.
      batch: sequences an optimiser step (all gradient-accumulation slices together).
      steps: optimiser steps.
    """

    context: int
    batch: int
    steps: int

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("context", "batch", "steps"):
            _require(getattr(self, name) >= 1, f"stage {name}: got {getattr(self, name)}, expected at least 1")

    def __str__(self) -> str:
        return f"{self.context}:{self.batch}:{self.steps}"


def parse_stages(text: str) -> tuple[Stage, ...]:
    """``"4096:16:3000,8192:8:400"`` (context:batch:steps) as stages. Raises ConfigError."""
    stages = []
    for part in text.split(","):
        numbers = part.strip().split(":")
        if len(numbers) != 3 or not all(n.isdecimal() for n in numbers):
            raise ConfigError(f"stages: got {part!r}, expected context:batch:steps, such as 4096:16:3000")
        stages.append(Stage(*map(int, numbers)))
    return tuple(stages)


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Config):
    """One training run.

    Attributes:
      data: directories and files to train on; ``"stdlib"`` is the running Python's standard library, and
        ``"site-packages/NAME"`` a package's directory where its packages are installed.
      output: the run's directory.
      stages: shapes, in order; the learning-rate schedule spans all of them.
      model: a preset's name, or the path of a ModelConfig JSON file.
      init: a checkpoint to start from, with its config and tokenizer, in place of ``model``.
      vocab_size: BPE vocabulary, end-of-text included; 0: the model's.
      glob, exclude: which files of a directory: a pathlib pattern, and fnmatch patterns on the relative path.
      skip_undecodable: leave out files that are not UTF-8, and count them, where they would be an error.
      holdout: fraction of files held out, chosen by their relative paths.
      grad_accum: slices of a batch whose gradients add up to one step.
      learning_rate, warmup, schedule: peak; linear warm-up in steps; then ``cosine`` to 10 %, or ``wsd``: constant,
        with a linear fall to 0 over the last fifth.
      weight_decay, clip, beta1, beta2: AdamW (decay on projections and the embedding alone), global norm.
      dtype: of the forward and backward pass; master weights and the optimiser stay float32.
      export_dtype: of the final checkpoint, which is also what the final held-out loss is measured on.
      remat, query_chunk: recompute each layer in the backward pass; queries attended at a time.
      eval_every, eval_batches: steps between held-out losses (0: only at the end), and batches for one.
      save_every, keep: steps between saved states (0: only at the end), and how many to keep.
      time_limit: seconds after which the run saves, exports and stops; 0: none.
      resume: go on from the last saved state in ``output``.
      seed: of the initial weights and the order of the data.
    """

    data: tuple[str, ...]
    output: str
    stages: tuple[Stage, ...] = (Stage(4096, 16, 3000),)
    model: str = "embedded"
    init: str = ""
    vocab_size: int = 0
    glob: str = "**/*.py"
    exclude: tuple[str, ...] = ()
    skip_undecodable: bool = False
    holdout: float = 0.05
    grad_accum: int = 1
    learning_rate: float = 1e-3
    warmup: int = 100
    schedule: Literal["cosine", "wsd"] = "cosine"
    weight_decay: float = 0.1
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    dtype: Literal["bf16", "f32"] = "bf16"
    export_dtype: Literal["bf16", "f32"] = "bf16"
    remat: bool = True
    query_chunk: int = 256
    eval_every: int = 250
    eval_batches: int = 8
    save_every: int = 500
    keep: int = 2
    time_limit: float = 0.0
    resume: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        _require(len(self.data) >= 1, "data: got nothing, expected at least one directory or file")
        _require(bool(self.output), "output: got '', expected a directory")
        _require(len(self.stages) >= 1, "stages: got none, expected at least one")
        for name in ("grad_accum", "eval_batches", "keep", "query_chunk"):
            _require(getattr(self, name) >= 1, f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("warmup", "weight_decay", "eval_every", "save_every", "time_limit", "seed"):
            _require(getattr(self, name) >= 0, f"{name}: got {getattr(self, name)}, expected at least 0")
        for name in ("learning_rate", "clip"):
            _require(getattr(self, name) > 0, f"{name}: got {getattr(self, name)}, expected above 0")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"{name}: got {getattr(self, name)}, expected at least 0, below 1")
        _require(0 < self.holdout < 1, f"holdout: got {self.holdout}, expected between 0 and 1")
        _require(self.vocab_size == 0 or self.vocab_size >= 257,
                 f"vocab_size: got {self.vocab_size}, expected at least 257 (256 bytes and end of text)")  # fmt: skip
        for stage in self.stages:
            _require(stage.batch % self.grad_accum == 0,
                     f"grad_accum: got {self.grad_accum}, expected a divisor of the batch {stage.batch}")  # fmt: skip
        _require(self.warmup < self.steps, f"warmup: got {self.warmup}, expected below the run's {self.steps} steps")
        if self.init:
            _require(self.vocab_size == 0, "vocab_size: cannot be given with init, which brings its own tokenizer")
            _require(self.model == type(self).model, "model: cannot be given with init, which brings its own config")

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """(index of the stage that holds optimiser step ``step``, counted from 0; the step within it)."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        raise IndexError(step)

    def identity(self) -> dict[str, Any]:
        """The fields that decide the losses; a resumed run must have the same."""
        free = ("output", "resume", "time_limit", "save_every", "keep", "eval_every", "eval_batches", "export_dtype")
        return {name: value for name, value in self.to_dict().items() if name not in free}

    def command(self) -> str:
        """The shell command of this run."""
        words = ["specsa", "train", *self.data]
        for field in dataclasses.fields(self):
            value, option = getattr(self, field.name), "--" + field.name.replace("_", "-")
            if field.name in ("data", "resume", "time_limit") or value == field.default:
                continue
            if isinstance(value, bool):
                words.append(option if value else option.replace("--", "--no-", 1))
            elif field.name == "stages":
                words += [option, ",".join(map(str, value))]
            else:
                for item in value if isinstance(value, tuple) else (value,):
                    words += [option, str(item)]
        return shlex.join(words)
