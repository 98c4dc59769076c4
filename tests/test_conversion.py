"""Conversion of public formats: logits against plain models of their own conventions, round trips bit by bit."""

import json

import foreign_models as foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from specsa_jax import Engine, checkpoints
from specsa_jax.checkpoints import CheckpointError, convert
from specsa_jax.model import head, hidden_states

LENGTH = 75
TOKENS = np.random.default_rng(7).integers(foreign.VOCAB, size=LENGTH).astype(np.int32)


def write(directory, case, dtype=np.float32):
    """A checkpoint of the case as Hugging Face lays it out."""
    foreign.write_config(directory, case)
    save_file(foreign.tensors(case, dtype), directory / "model.safetensors")
    return directory


def logits(loaded):
    config = loaded.config
    run = jax.jit(lambda params, row: head(config, params, hidden_states(config, params, row[None], remat=False))[0])
    return np.asarray(run(loaded.params, jnp.asarray(TOKENS)))


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-4 * max(1.0, np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize("case", foreign.CONFIGS)
def test_logits_are_those_of_the_formats_own_conventions(tmp_path, case):
    """At every length from 1 on, so across every border: logits of all positions of a text."""
    source = write(tmp_path / "source", case)
    report = convert(source, tmp_path / "target", tokenizer="bytes" if "byte" in case else "ids")
    assert report.from_format == foreign.NAMES.get(case, case) and report.to_format == "specsa"
    loaded = checkpoints.load(tmp_path / "target")
    close(logits(loaded), foreign.forward(case, foreign.tensors(case), TOKENS))
