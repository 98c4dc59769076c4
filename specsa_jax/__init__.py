"""SpecSA-JAX: speculative decoding for native sparse attention models, in JAX."""

from specsa_jax.admission import PrecisionError
from specsa_jax.cache import CapacityError
from specsa_jax.checkpoints import CheckpointError
from specsa_jax.config import ConfigError, ModelConfig, NSAConfig, RopeConfig
from specsa_jax.drafting import PromptLookup
from specsa_jax.engine import Engine
from specsa_jax.prompts import PromptError
from specsa_jax.results import Chunk, Generation, Result, Stats
from specsa_jax.sampling import SamplingParams
from specsa_jax.strategy import Strategy

__version__ = "0.1.0"

__all__ = [
    "CapacityError", "CheckpointError", "Chunk", "ConfigError", "Engine", "Generation", "ModelConfig", "NSAConfig",
    "PrecisionError", "PromptError", "PromptLookup", "Result", "RopeConfig", "SamplingParams", "Stats", "Strategy",
]  # fmt: skip
