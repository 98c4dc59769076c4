"""The strict class: the same bits whatever is drafted, verified together or in the batch; the same values as elsewhere.

``benchmarks/strict.py`` is the long form of this: 300 prompts, every drafter, five trees.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_params import random_params, random_tokens, tiny_model
from test_decoding import CONFIG, NEW, PROMPTS, SAMPLED, decoder, run, weights

from specsa_jax import Engine
from specsa_jax import model as transformer
from specsa_jax.cache import make_tail, topology
from specsa_jax.config import preset
from specsa_jax.drafting import Combined, DraftModel, PromptLookup, TrainedHead
from specsa_jax.nsa.cached import Backend
from specsa_jax.nsa.rows import STRICT_OPTIONS, block_rows, in_blocks
from specsa_jax.sampling import SamplingParams
from specsa_jax.strategy import AUTOREGRESSIVE, Strategy

COLUMNS = 10  # of the page table, whatever the prompts
GREEDY = [SamplingParams()] * len(PROMPTS)


def bits(rows, strategy, sampling, draft_params=()):
    """Of each row of PROMPTS: its new tokens, and their log-probabilities to the bit."""
    prompts = [PROMPTS[row] for row in rows]
    tokens, state, _ = run(
        decoder(CONFIG), prompts, strategy, sampling=[sampling[row] for row in rows], draft_params=draft_params,
        columns=COLUMNS,
    )  # fmt: skip
    logprobs = np.asarray(state.logprobs)
    return [
        (new, logprobs[at, len(prompt) : len(prompt) + NEW].tobytes())
        for at, (prompt, new) in enumerate(zip(prompts, tokens, strict=True))
    ]


@functools.lru_cache
def alone(kind):
    """What decoding each prompt alone, one token at a time, gives."""
    strategy = Strategy(None, precision="strict")
    return [bits([row], strategy, kind_of(kind))[0] for row in range(len(PROMPTS))]


def kind_of(kind):
    return SAMPLED if kind == "sampled" else GREEDY


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize(
    "rows, strategy",
    [
        ([5], Strategy(PromptLookup(min_ngram=1), "chain:3", precision="strict")),
        (
            [3, 1, 5, 0],
            Strategy(Combined(PromptLookup(min_ngram=4), DraftModel("another", config=CONFIG)), "best:12:4", "depth",
                     precision="strict"),
        ),
        (range(6), Strategy(None, precision="strict")),
    ],
    ids=["chain, alone", "trees, ragged batch", "one at a time, ragged batch"],
)  # fmt: skip
def test_bits_are_those_of_decoding_alone_and_one_at_a_time(rows, strategy, kind):
    got = bits(rows, strategy, kind_of(kind), weights(CONFIG, 5)[1])
    assert got == [alone(kind)[row] for row in rows]


def test_the_exact_class_is_not_strict():
    """Or the tests above could not fail: here batches change bits, though no token."""
    batch = bits(range(6), AUTOREGRESSIVE, GREEDY)
    one = bits([5], AUTOREGRESSIVE, GREEDY)
    assert batch[5][0] == one[0][0] == alone("greedy")[5][0]
    assert batch[5][1] != alone("greedy")[5][1] or one[0][1] != alone("greedy")[5][1]


SWITCHES = {
    "paper": {},
    "shared": {"separate_kv": False, "compressed_output": False, "fused_selected_window": True, "gate": "none"},
    "dense": {"dense_len": 20, "window_excludes_query": True, "compressed_rope": "before", "compression": "linear"},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_strict_values_are_those_of_the_other_path(switch):
    """Of every node of a random tree, behind a ragged cache; the reference is compared with that path elsewhere."""
    config = tiny_model(layers=1, **SWITCHES[switch])
    nsa, random = config.nsa, np.random.default_rng(3)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), random_params(config, seed=6))
    rows = [random_tokens(config, length, seed=length) for length in (1, 7, 8, 30)]
    parents = [-1] + [int(random.integers(max(0, node - 4), node)) for node in range(1, 16)]
    from test_model import feed, shuffled_cache

    _, cache = feed(config, params, shuffled_cache(config, [len(row) + 20 for row in rows]), rows, [15, 15])
    tokens = jnp.asarray(random_tokens(config, 4 * 16, seed=8).reshape(4, 16), jnp.int32)
    tail = make_tail(nsa, topology(parents, nsa.compress_block), cache.lengths)

    def hidden(backend):
        return jax.jit(lambda cache: transformer.verify(config, params, tokens, cache, tail, backend=backend))(cache)

    (expected, tails), (actual, strict_tails) = hidden(Backend()), hidden(Backend(deterministic=True))
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(strict_tails), jax.tree.leaves(tails), strict=True):
        used = np.asarray(tail.slot < 16)[..., None, None] if ours.shape[1] == tail.slot.shape[1] != 16 else True
        np.testing.assert_allclose(ours * used, theirs * used, atol=2e-5)


@pytest.mark.parametrize("name", ["embedded", pytest.param("1b", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_matrix_product_of_a_block_computes_every_row_alike(dtype, name):
    """In all shapes of the model: a row has the same bits in every place, among any others."""
    config, random, size = preset(name), np.random.default_rng(0), block_rows()
    nsa, lengths = config.nsa, jnp.zeros(1, jnp.int32)
    heads, keys = nsa.num_heads * nsa.head_dim, nsa.branch_sets * 2 * nsa.num_kv_heads * nsa.head_dim
    widths = {(config.hidden, n) for n in (heads, keys, nsa.gate_outputs, config.intermediate, config.vocab_size)}
    for rows, columns in [*widths, (config.intermediate, config.hidden), (heads, config.hidden)]:
        weight = jnp.asarray(random.standard_normal((rows, columns)), dtype)
        options = STRICT_OPTIONS if jax.default_backend() == "gpu" else None
        product = jax.jit(lambda x, w: in_blocks(lengths)(lambda x: x @ w, x), compiler_options=options)
        row, found = random.standard_normal(rows), set()
        for place in range(size):
            others = random.standard_normal((1, 2 * size, rows))
            others[0, size + place] = row
            found.add(np.asarray(product(jnp.asarray(others, dtype), weight)[0, size + place]).tobytes())
        assert len(found) == 1, (rows, columns)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_trees_in_ragged_batches_have_the_bits_of_decoding_alone_on_the_gpu(implementation):
    """bfloat16, the embedded model; ``benchmarks/strict.py --dtype bfloat16`` is the long form."""
    engine = Engine.from_pretrained(
        "embedded", max_length=1024, dtype=jnp.bfloat16, precision="strict", implementation=implementation
    )
    text = Path(functools.__file__).read_text(encoding="utf-8")
    prompts = [engine.tokenizer.encode(text[at : at + size]).ids for at, size in ((0, 9), (500, 700), (4000, 2000))]
    sampling = [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.95, seed=3), SamplingParams()]

    def run(rows, strategy):
        found = engine.generate(
            [prompts[row] for row in rows], 48, sampling=[sampling[row] for row in rows], strategy=strategy
        )  # fmt: skip
        return [(g.tokens.tolist(), g.logprobs.tobytes()) for g in found]

    expected = [run([row], Strategy(None, precision="strict"))[0] for row in range(3)]
    for drafter, tree in ((PromptLookup(), "chain:4"), (Combined(PromptLookup(), TrainedHead()), "best:12:4")):
        strategy = Strategy(drafter, tree, precision="strict")
        assert run([2], strategy) == [expected[2]], tree
        assert run(range(3), strategy) == expected, tree
