"""Checkpoint directories: one format on disk, read and written by :mod:`specsa_jax.checkpoints.store`."""

from specsa_jax.checkpoints.store import Checkpoint, CheckpointError, load, load_config, resolve, save

__all__ = ["Checkpoint", "CheckpointError", "load", "load_config", "resolve", "save"]
