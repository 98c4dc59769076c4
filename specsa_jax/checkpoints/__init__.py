"""Checkpoint directories, conversion of public formats from and to them, and what they hold.

:mod:`specsa_jax.checkpoints.store` is the format on disk, ``formats/`` has one file per public format.
"""

from specsa_jax.checkpoints.conversion import Report, convert, load
from specsa_jax.checkpoints.store import Checkpoint, load_config, resolve, save
from specsa_jax.checkpoints.trees import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "Report", "convert", "load", "load_config", "resolve", "save"]
