"""What a run that trains a draft head is: :class:`DraftConfig`, checked before any work."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any, Literal

from specsa_jax.config import _Config, _require


@dataclasses.dataclass(frozen=True)
class DraftConfig(_Config):
    """One run of ``specsa train-draft``.

    Attributes:
      target: the checkpoint whose drafts the head is to write.
      output: the run's directory.
      data: directories and files; empty: those that the target's card names, with its glob, exclude,
        skip_undecodable and holdout wherever they are not given here ("" , empty, False, 0).
      glob, exclude, skip_undecodable, holdout: as for :class:`specsa_jax.training.TrainConfig`.
      context: tokens a sequence.
      new_tokens: of these, how many the target writes itself in a generated sequence; the rest is its prompt.
      generated: sequences that the target continues, in batches of ``generation_batch``; 0: none, only files.
      sampled, temperature: the fraction of them that is sampled, not greedy, and at which temperature.
      mix: the fraction of generated sequences in a batch; the others are text of the files.
      batch, steps: sequences an optimiser step, and steps.
      unroll: how many steps deep the head is trained (EAGLE-3's training-time test); a depth of k is the k-th draft.
      step_decay: weight of each depth's loss, relative to the one before.
      layers, num_heads, num_kv_heads, head_dim, intermediate, window, features: the head's sizes
        (:class:`specsa_jax.drafting.head_model.HeadConfig`); 0 or empty: its defaults.
      learning_rate, warmup: peak; linear warm-up in steps, then a cosine to 0.
      weight_decay, clip, beta1, beta2: AdamW (decay on projections alone), global norm.
      dtype, export_dtype: of the passes (``auto``: bf16 on GPUs, f32 elsewhere), and of the head that is written.
      query_chunk: queries that the target attends at a time.
      prefill_chunk: prompt tokens a pass while generating; 0: the engine's own.
      implementation: of the target's attention while generating: ``auto``, ``pallas`` or ``xla``.
      eval_every, eval_rows: steps between evaluations on held-out files (0: only at the end), and sequences for them.
      chain: drafted tokens a step in the predicted acceptance length.
      save_every, keep: steps between saved states (0: only at the end), and how many to keep.
      time_limit: seconds for all but the last evaluation, of which generating gets a third (it then stops after the
        batch); the learning rate falls by time as well as by steps, so that it has fallen when the time is up. 0: none.
      resume: go on from the last saved state in ``output``.
      seed: of the initial weights, the order of the data, and the sampling.
    """

    target: str
    output: str
    data: tuple[str, ...] = ()
    glob: str = ""
    exclude: tuple[str, ...] = ()
    skip_undecodable: bool = False
    holdout: float = 0.0
    context: int = 1536
    new_tokens: int = 512
    generated: int = 2048
    generation_batch: int = 64
    sampled: float = 0.25
    temperature: float = 0.8
    mix: float = 0.75
    batch: int = 8
    steps: int = 2000
    unroll: int = 5
    step_decay: float = 0.9
    layers: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    intermediate: int = 0
    window: int = 0
    features: tuple[int, ...] = ()
    learning_rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    dtype: Literal["auto", "bf16", "f32"] = "auto"
    export_dtype: Literal["bf16", "f32"] = "bf16"
    query_chunk: int = 512
    prefill_chunk: int = 0
    implementation: Literal["auto", "pallas", "xla"] = "auto"
    eval_every: int = 250
    eval_rows: int = 64
    chain: int = 4
    save_every: int = 500
    keep: int = 2
    time_limit: float = 0.0
    resume: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        _require(bool(self.target), "target: got '', expected a checkpoint")
        _require(bool(self.output), "output: got '', expected a directory")
        for name in ("generation_batch", "batch", "steps", "unroll", "query_chunk", "eval_rows", "chain", "keep",
                     "new_tokens"):  # fmt: skip
            _require(getattr(self, name) >= 1, f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("generated", "layers", "num_heads", "num_kv_heads", "head_dim", "intermediate", "window",
                     "warmup", "weight_decay", "prefill_chunk", "eval_every", "save_every", "time_limit",
                     "seed"):  # fmt: skip
            _require(getattr(self, name) >= 0, f"{name}: got {getattr(self, name)}, expected at least 0")
        for name in ("learning_rate", "clip", "step_decay", "temperature"):
            _require(getattr(self, name) > 0, f"{name}: got {getattr(self, name)}, expected above 0")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"{name}: got {getattr(self, name)}, expected at least 0, below 1")
        for name in ("sampled", "mix"):
            _require(0 <= getattr(self, name) <= 1, f"{name}: got {getattr(self, name)}, expected from 0 to 1")
        _require(0 <= self.holdout < 1, f"holdout: got {self.holdout}, expected at least 0, below 1")
        _require(self.warmup < self.steps, f"warmup: got {self.warmup}, expected below the run's {self.steps} steps")
        _require(self.unroll < self.context, f"unroll: got {self.unroll}, expected below the context {self.context}")
        _require(self.chain <= self.unroll, f"chain: got {self.chain}, expected at most unroll = {self.unroll}")
        _require(self.new_tokens < self.context,
                 f"new_tokens: got {self.new_tokens}, expected below the context {self.context}")  # fmt: skip
        _require(not self.generated or self.generated >= self.generated_rows(),
                 f"mix: got {self.mix}, expected at most {self.generated} generated sequences a batch")  # fmt: skip

    def generated_rows(self) -> int:
        """Generated sequences in a batch."""
        return round(self.mix * self.batch) if self.generated else 0

    def sizes(self) -> dict[str, Any]:
        """The head's sizes that are given."""
        names = ("layers", "num_heads", "num_kv_heads", "head_dim", "intermediate", "window", "features")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def identity(self) -> dict[str, Any]:
        """The fields that decide the losses; a resumed run must have the same."""
        free = ("output", "resume", "time_limit", "save_every", "keep", "eval_every", "eval_rows", "chain",
                "export_dtype", "implementation", "prefill_chunk")  # fmt: skip
        return {name: value for name, value in self.to_dict().items() if name not in free}

    def command(self) -> str:
        """The shell command of this run."""
        words = ["specsa", "train-draft", self.target, *self.data]
        for field in dataclasses.fields(self):
            value, option = getattr(self, field.name), "--" + field.name.replace("_", "-")
            if field.name in ("target", "data", "resume", "time_limit") or value == field.default:
                continue
            if isinstance(value, bool):
                words.append(option)
            elif field.name == "features":
                words += [option, ",".join(map(str, value))]
            else:
                for item in value if isinstance(value, tuple) else (value,):
                    words += [option, str(item)]
        return shlex.join(words)
