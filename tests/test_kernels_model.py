"""The model over the Pallas kernels: the same tokens as over XLA's code."""

import dataclasses
import functools
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from reference_params import random_params, random_tokens, tiny_model

import specsa_jax
from pallas_kernels import UnsupportedError, report
from specsa_jax import PromptLookup, Strategy
from specsa_jax.cache import commit, create_cache, make_tail, pages_for, topology
from specsa_jax.decoding import Decoder, State
from specsa_jax.model import verify
from specsa_jax.nsa import kernels
from specsa_jax.nsa.cached import Backend
from specsa_jax.sampling import SamplingParams, batch_sampling

SIZES = dict(num_heads=4, num_kv_heads=2, head_dim=16, compress_block=8, compress_stride=4, select_block=16,
             num_selected=4, window=20, compression="mean", compress_position="none", layers=1)  # fmt: skip


def generate(config, params, decoder, prompts, new_tokens, strategy):
    """Tokens after ``prompts`` by the decoder's loops, their log-probabilities (a row each), and the counts."""
    batch, pages = len(prompts), pages_for(config.nsa, max(map(len, prompts)) + new_tokens)
    buffer = np.zeros((batch, pages * config.nsa.select_block + 1), np.int32)
    for row, prompt in zip(buffer, prompts, strict=True):
        row[: len(prompt)] = prompt
    known = jnp.array(list(map(len, prompts)), jnp.int32)
    table = np.arange(batch * pages).reshape(batch, pages)
    state = State(create_cache(config, table, table.size, jnp.float32), jnp.asarray(buffer), known,
                  known + new_tokens, jnp.zeros(batch, bool), jnp.zeros(buffer.shape, jnp.float32))  # fmt: skip
    # A program runs once: unoptimised code is there sooner.
    options = {"xla_backend_optimization_level": "0"}
    arguments = (params, state, jnp.int32(100))
    read = decoder.prefill.lower(*arguments, chunk=16, precision=strategy.precision)
    state = read.compile(options)(*arguments)
    arguments = (params, state, batch_sampling([SamplingParams()] * batch), jnp.int32(100))
    state, counts = decoder.decode.lower(*arguments, strategy=strategy).compile(options)(*arguments)
    assert state.done.all()
    new = [slice(len(prompt), len(prompt) + new_tokens) for prompt in prompts]
    tokens, logprobs = np.asarray(state.tokens), np.asarray(state.logprobs)
    return [np.stack([row[at] for row, at in zip(rows, new, strict=True)]) for rows in (tokens, logprobs)], counts


@pytest.mark.slow
def test_prefill_and_speculative_decoding_give_the_tokens_of_xla():
    config = tiny_model(**SIZES)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), random_params(config))
    prompt = np.tile(random_tokens(config, 23), 4)[:75]  # repeats, so that lookup drafts
    strategy = Strategy(PromptLookup(max_ngram=3, min_ngram=1), "chain:3")
    expected, got = (
        generate(config, params, Decoder(config, jnp.float32, (), *how), [prompt], 24, strategy)[0][0]
        for how in (("xla",), ("pallas", True))
    )
    np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
@pytest.mark.long
def test_strict_kernels_give_drafted_trees_in_a_ragged_batch_the_bits_of_decoding_alone():
    """And the values of XLA's strict path. Untied, so that the logits of a random model are about 1."""
    config = dataclasses.replace(tiny_model(**SIZES), vocab_size=8, tied=False)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), random_params(config))
    prompts = [random_tokens(config, size, seed=seed) for size, seed in ((45, 0), (43, 200))]  # four pages each
    decoder = Decoder(config, jnp.float32, (), "pallas", True)
    one = Strategy(None, precision="strict")
    tree = Strategy(PromptLookup(min_ngram=1), "3-1", precision="strict")
    (tokens, logprobs), counts = generate(config, params, decoder, prompts, 6, tree)
    assert (np.asarray(counts.accepted)[:2] > 0).all()  # drafts stood and fell
    (plain, values), _ = generate(config, params, Decoder(config, jnp.float32), prompts, 6, one)
    np.testing.assert_array_equal(tokens, plain)
    np.testing.assert_allclose(logprobs, values, atol=1e-5)
    for row, prompt in enumerate(prompts):
        (alone, own), _ = generate(config, params, decoder, [prompt], 6, one)
        np.testing.assert_array_equal(alone[0], tokens[row])
        assert own[0].tobytes() == logprobs[row].tobytes()


@pytest.mark.slow
def test_a_tree_behind_a_prefix_gives_the_hidden_states_and_the_commit_of_xla():
    """With an MLP, whose new entries come from the kernels; those of unused slots are NaN."""
    config = tiny_model(**{**SIZES, "compression": "mlp"})
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), random_params(config, seed=1))
    cache = create_cache(config, np.arange(4)[None], 4, jnp.float32)
    rng = np.random.default_rng(2)
    layers = [jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), layer)
              for layer in cache.layers]  # fmt: skip
    cache = cache._replace(layers=layers, lengths=jnp.array([38], jnp.int32))
    tokens = jnp.asarray(random_tokens(config, 8), jnp.int32)[None]
    tail = make_tail(config.nsa, topology([-1, 0, 0, 1, 1, 2, 3, 5], 8), cache.lengths)
    path, count = jnp.array([[0, 1, 3, 6]], jnp.int32), jnp.array([4], jnp.int32)

    def step(backend):
        hidden, tails = verify(config, params, tokens, cache, tail, backend=backend)
        return hidden, tails, commit(config.nsa, cache, tails, tail, path, count, implementation="xla")

    (expected, _, committed), (got, tails, after) = (
        jax.jit(functools.partial(step, backend))() for backend in (Backend(), Backend("pallas", interpret=True))
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)
    unused = np.asarray(tail.slot) == 8
    assert unused.any() and not unused.all()
    assert np.isnan(np.asarray(tails[0].compressed_key)[unused]).all()
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(committed), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_strict_steps_keep_xlas_phi():
    config = tiny_model(**{**SIZES, "compression": "mlp"})
    params = random_params(config)
    cache = create_cache(config, np.arange(4)[None], 4, jnp.float32)
    tail = make_tail(config.nsa, topology([-1, 0, 1, 2], 8), cache.lengths)

    def names(**switches):
        def step(tokens):
            return verify(config, params, tokens, cache, tail, backend=Backend("pallas", is_chain=True, **switches))[0]

        lowered = report.lower(step, jax.ShapeDtypeStruct((1, 4), jnp.int32))
        return {kernel.name for kernel in report.kernels(lowered)}

    assert "compress_project" in names()
    assert "compress_project" not in names(deterministic=True)


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


def test_a_gpu_of_another_vendor_takes_xla():
    nsa = tiny_model(**SIZES).nsa
    with use_abstract_mesh(report.H200):
        assert kernels.choose(nsa, 1024, None) == "pallas"
    device = AbstractDevice("AMD Instinct MI300X", None, "gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        assert kernels.choose(nsa, 1024, None) == "xla"
        with pytest.raises(UnsupportedError, match="attention: implementation 'pallas': device: got AMD Instinct"):
            kernels.choose(nsa, 1024, "pallas")


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
