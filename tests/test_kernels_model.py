"""The model over the Pallas kernels: the same tokens as over XLA's code."""

import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_params import random_params, random_tokens, tiny_model

import specsa_jax
from pallas_kernels import UnsupportedError
from specsa_jax import PromptLookup, Strategy
from specsa_jax.cache import create_cache, make_tail, pages_for, topology
from specsa_jax.decoding import Decoder, State
from specsa_jax.model import verify
from specsa_jax.nsa import kernels
from specsa_jax.nsa.cached import Backend
from specsa_jax.sampling import SamplingParams, batch_sampling

SIZES = dict(num_heads=4, num_kv_heads=2, head_dim=16, compress_block=8, compress_stride=4, select_block=16,
             num_selected=4, window=20, compression="mean", compress_position="none", layers=1)  # fmt: skip


def generate(config, params, decoder, prompt, new_tokens, strategy):
    """Tokens after ``prompt`` by the decoder's loops."""
    pages = pages_for(config.nsa, len(prompt) + new_tokens)
    buffer = np.zeros((1, pages * config.nsa.select_block + 1), np.int32)
    buffer[0, : len(prompt)] = prompt
    known = jnp.array([len(prompt)], jnp.int32)
    state = State(create_cache(config, np.arange(pages)[None], pages, jnp.float32), jnp.asarray(buffer), known,
                  known + new_tokens, jnp.zeros(1, bool), jnp.zeros(buffer.shape, jnp.float32))  # fmt: skip
    state = decoder.prefill(params, state, jnp.int32(100), chunk=16)
    state, _ = decoder.decode(params, state, batch_sampling([SamplingParams()]), jnp.int32(100), strategy=strategy)
    assert bool(state.done[0])
    return np.asarray(state.tokens)[0, len(prompt) : len(prompt) + new_tokens]


@pytest.mark.slow
def test_prefill_and_speculative_decoding_give_the_tokens_of_xla():
    config = tiny_model(**SIZES)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), random_params(config))
    prompt = np.tile(random_tokens(config, 23), 4)[:75]  # repeats, so that lookup drafts
    strategy = Strategy(PromptLookup(max_ngram=3, min_ngram=1), "chain:3")
    expected, got = (
        generate(config, params, Decoder(config, jnp.float32, (), *how), prompt, 24, strategy)
        for how in (("xla",), ("pallas", True))
    )
    np.testing.assert_array_equal(got, expected)


def test_a_tree_gives_the_hidden_states_of_xla():
    config = tiny_model(**SIZES)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), random_params(config, seed=1))
    cache = create_cache(config, np.arange(4)[None], 4, jnp.float32)
    tokens = jnp.asarray(random_tokens(config, 8), jnp.int32)[None]
    tail = make_tail(config.nsa, topology([-1, 0, 0, 1, 1, 2, 3, 5], 8), cache.lengths)
    expected, got = (
        jax.jit(lambda backend=backend: verify(config, params, tokens, cache, tail, backend=backend)[0])()
        for backend in (Backend(), Backend("pallas", interpret=True))
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    "switch, message",
    [
        (dict(dense_len=64), "dense_len: got 64, which only the XLA path takes"),
        (dict(fused_selected_window=True), "fused_selected_window: got True, which only the XLA path takes"),
        (dict(score_map="paper"), "score_map: got 'paper', which only the XLA path takes"),
        (dict(select_block=8), "got l' = 8, expected 16 to 128"),
    ],
)
def test_layers_that_the_kernels_do_not_take_are_named(switch, message):
    nsa = tiny_model(**{**SIZES, **switch}).nsa
    assert message in kernels.limit(nsa, 1024)
    with pytest.raises(UnsupportedError, match=message):
        kernels.choose(nsa, 1024, "pallas")
    assert kernels.choose(nsa, 1024, None) == "xla"


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="attention: implementation: got 'cuda', expected None or one of"):
        specsa_jax.Engine.from_pretrained("embedded", implementation="cuda")


@pytest.mark.gpu
def test_engine_gives_the_greedy_tokens_of_xla_on_real_prompts():
    stdlib = Path(sysconfig.get_path("stdlib"))
    texts = [(stdlib / name).read_text(encoding="utf-8") for name in ("queue.py", "bisect.py", "shelve.py", "sched.py")]
    prompts = [text[: len(text) * (3 + i) // 8] for i, text in enumerate(texts)]
    results = []
    for implementation in ("pallas", "xla"):
        engine = specsa_jax.Engine.from_pretrained("embedded", dtype=jnp.float32, implementation=implementation)
        assert engine.implementation == implementation
        batch = engine.generate(prompts, max_new_tokens=96)
        alone = engine.generate(prompts[:1], max_new_tokens=96, speculate=False)
        results.append([generation.tokens.tolist() for generation in (*batch, *alone)])
    assert results[0] == results[1]
    assert specsa_jax.Engine.from_pretrained("embedded").implementation == "pallas"
