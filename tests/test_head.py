"""The trained head: whole sequences against the cache, its checkpoint, its training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specsa_jax import model
from specsa_jax.cache import chain, create_cache, make_tail
from specsa_jax.config import ConfigError, ModelConfig, NSAConfig
from specsa_jax.drafting import head_model
from specsa_jax.drafting.head_model import HeadConfig
from specsa_jax.training.draft_unroll import unroll

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})

TARGET = ModelConfig(
    vocab_size=300, hidden=32, layers=3, intermediate=32, max_length=128,
    nsa=NSAConfig(num_heads=4, num_kv_heads=2, head_dim=8, compress_block=8, compress_stride=4, select_block=8,
                  num_selected=4, window=16, compression="weighted"),
)  # fmt: skip
CONFIG = HeadConfig.of(TARGET, window=16)


@pytest.fixture(scope="module")
def weights():
    """(the target's parameters, the head's)."""
    return model.init_params(TARGET, 0), head_model.init_params(CONFIG, 1)


def tokens_of(batch, size, seed=0):
    return np.random.default_rng(seed).integers(1, TARGET.vocab_size, (batch, size)).astype(np.int32)


# --- features --------------------------------------------------------------------------------------------------------


def test_features_are_the_residual_streams_and_the_same_from_sequences_and_from_a_cache(weights):
    tokens, wanted = tokens_of(2, 12), (1, 3)
    hidden, features = jit(lambda p, t: model.hidden_states(TARGET, p, t, features=wanted))(weights[0], tokens)
    assert features.shape == (2, 12, 2, TARGET.hidden)
    np.testing.assert_allclose(hidden, model.hidden_states(TARGET, weights[0], tokens), atol=1e-5)
    normed = model.bind(TARGET, weights[0], jnp.float32).norm(features[:, :, 1])  # behind the last layer
    np.testing.assert_allclose(normed, hidden, atol=1e-5)
    shallow = dataclasses.replace(TARGET, layers=1)
    first = weights[0] | {"layers": {0: weights[0]["layers"][0]}}
    _, alone = model.hidden_states(shallow, first, tokens, features=(1,))
    np.testing.assert_allclose(features[:, :, 0], alone[:, :, 0], atol=1e-5)

    cache = create_cache(TARGET, np.arange(4, dtype=np.int32).reshape(2, 2), 4, jnp.float32)
    tail = make_tail(TARGET.nsa, chain(12, TARGET.nsa.compress_block), cache.lengths)
    out = jit(lambda p, t: model.verify(TARGET, p, t, cache, tail, features=wanted))(weights[0], tokens)
    np.testing.assert_allclose(out[0], hidden, atol=1e-5)
    np.testing.assert_allclose(out[2], features, atol=1e-5)


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
def test_slots_of_a_sequence_equal_those_of_a_cache_extended_and_grown_from_it(weights, layers):
    """Training's unrolled states at every start are those that decoding computes there, beyond the window too."""
    config, size, steps = dataclasses.replace(CONFIG, layers=layers), 45, 4
    target, params = weights[0], head_model.init_params(config, 1)
    tokens = tokens_of(2, size)
    features = np.random.default_rng(2).normal(size=(2, size, 3, TARGET.hidden)).astype(np.float32)
    states = jit(lambda p, t, f: unroll(config, p, target, t, f, steps))(params, tokens, features)
    extend = jit(lambda c, t, f, n: head_model.extend(config, params, target, c, t, f, n))

    @jit
    def grow(cache, drafted, step, token, state):
        visible = (jnp.arange(steps) <= step)[None, None]
        return head_model.grow(
            config, params, target, cache, drafted, step, token, state, step[None, None], visible
        )  # fmt: skip

    cache, chunk = head_model.create_cache(config, 2, jnp.float32), 5
    counts = np.array([[5, 3], [1, 5], [5, 2], [0, 5], [5, 5], [5, 1], [5, 5], [3, 5], [5, 4], [5, 4]])
    for count in counts:
        at = np.asarray(cache.length)[:, None] - 1 + np.arange(chunk)
        take = np.minimum(at, size - 1)
        rows = np.arange(2)[:, None]
        cache = extend(cache, tokens[rows, take], features[rows, take], count)
        last = np.asarray(cache.length) - 2  # the last slot's index in the arrays
        np.testing.assert_allclose(cache.state, states[0, np.arange(2), last], atol=1e-5)
        state, drafted = cache.state[:, None], head_model.create_drafted(config, 2, steps, jnp.float32)
        for step in range(steps - 1):
            index = last + 1 + step
            if (index >= size).any():
                break
            token = tokens[np.arange(2), index][:, None]
            state, drafted = grow(cache, drafted, jnp.int32(step), token, state)
            np.testing.assert_allclose(state[:, 0], states[step + 1, np.arange(2), index], atol=1e-5)
    assert last.min() > CONFIG.window + 8


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"features": (0, 1)}, "features"), ({"features": (2, 1)}, "features"), ({"features": (4,)}, "features"),
     ({"features": ()}, "features"), ({"num_kv_heads": 3}, "num_heads"), ({"window": 8}, "window"),
     ({"layers": 0}, "layers"), ({"head_dim": 7}, "head_dim")],
)  # fmt: skip
def test_a_config_out_of_range_is_refused(changes, named):
    with pytest.raises(ConfigError, match=named):
        HeadConfig.of(TARGET, **changes)


def test_a_config_survives_json():
    assert HeadConfig.from_dict(CONFIG.to_dict()) == CONFIG
