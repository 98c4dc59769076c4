"""Training: tokenizer, packing, the loop. ``train(TrainConfig(...))`` is the whole interface."""

from specsa_jax.training.config import DivergedError, Stage, TrainConfig, TrainingError, parse_stages
from specsa_jax.training.data import is_held_out
from specsa_jax.training.trainer import Summary, train

__all__ = ["DivergedError", "Stage", "Summary", "TrainConfig", "TrainingError", "is_held_out", "parse_stages", "train"]
