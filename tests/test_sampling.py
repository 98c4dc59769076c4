"""Sampling parameters, the law they define, and draws from it."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from specsa_jax.cache import topology
from specsa_jax.sampling import SamplingParams, batch_sampling, filtered_logits, penalised_logits, sample

# Seeds are fixed, so a test passes or fails for good; this is how likely a right implementation was to fail at all.
ERROR_RATE = 1e-6

filtered = jax.jit(filtered_logits)
draw = jax.jit(sample)


def numpy_law(logits, params):
    """Probabilities [V] of one row: the definition, token by token, in float64."""
    scaled = np.asarray(logits, np.float64) / params.temperature
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    kept = 1
    while kept < len(order) and weights[:kept].sum() < params.top_p:
        kept += 1
    kept = min(kept, max(1, int((weights >= params.min_p * weights[0]).sum())))
    law = np.zeros(len(scaled))
    law[order[:kept]] = weights[:kept] / weights[:kept].sum()
    return law


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", -math.inf),
        ("temperature", True), ("temperature", "1"), ("temperature", None), ("temperature", 1j),
        ("top_p", 0.0), ("top_p", 0), ("top_p", -0.5), ("top_p", 1.0001), ("top_p", math.nan), ("top_p", math.inf),
        ("top_p", True), ("top_p", "0.9"),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan), ("min_p", None),
        ("repetition_penalty", 0.0), ("repetition_penalty", math.inf), ("repetition_penalty", "1"),
        ("top_k", -1), ("top_k", 2**31), ("top_k", 1.0), ("top_k", True), ("top_k", None),
        ("seed", -1), ("seed", 2**32), ("seed", 0.0), ("seed", False), ("seed", "7"),
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: got .*, expected "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0}, {"temperature": 1}, {"temperature": np.float32(0.7)}, {"top_p": 1}, {"top_p": 1e-9},
        {"top_k": 2**31 - 1}, {"top_k": np.int64(3)}, {"seed": 2**32 - 1}, {"seed": np.uint32(5)},
    ],
)  # fmt: skip
def test_parameters_at_the_ends_of_their_ranges_work(values):
    params = SamplingParams(temperature=1.0) if "temperature" not in values else SamplingParams()
    params = SamplingParams(**{**params.__dict__, **values})
    token = draw(jnp.zeros((1, 1, 9)), jnp.zeros((1, 1), jnp.int32), batch_sampling([params]))
    assert 0 <= int(token[0, 0]) < 9


@pytest.mark.parametrize("ties", [False, True])
def test_filtered_logits_are_the_law_by_its_definition(ties):
    """Temperature, top-k and top-p in every combination, in one batch; ties go to the lower id."""
    cases = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for temperature in (0.3, 1.0, 2.5)
        for top_k in (0, 1, 4, 11, 12, 50)
        for top_p in (1e-6, 0.37, 0.83, 0.999, 1.0)
        for min_p in (0.0, 0.043, 1.0)
    ]
    random = np.random.default_rng(0)
    logits = random.standard_normal((len(cases), 3, 12)) * 2
    if ties:
        # Rounded, many are equal; cumulated ties reach none of the values of top_p above exactly.
        logits = np.round(logits)
    logits = logits.astype(np.float32)
    actual = jax.nn.softmax(filtered(logits, batch_sampling(cases)), axis=-1)
    for row, params in enumerate(cases):
        for place in range(3):
            law = numpy_law(logits[row, place], params)
            np.testing.assert_array_equal(actual[row, place] > 0, law > 0, err_msg=f"{params}")
            np.testing.assert_allclose(actual[row, place], law, atol=1e-6, err_msg=f"{params}")


def test_the_repetition_penalty_of_a_node_counts_the_text_and_its_own_path():
    """Of a ragged batch of trees; what lies behind a text and on other branches is not penalised, greedy rows are."""
    random = np.random.default_rng(7)
    logits = random.standard_normal((3, 5, 12)).astype(np.float32)
    tokens = random.integers(12, size=(3, 9)).astype(np.int32)
    known, nodes = np.array([1, 4, 9]), random.integers(12, size=(3, 5)).astype(np.int32)
    parents = [-1, 0, 0, 1, 2]
    ancestor = np.asarray(topology(parents, 4).ancestor)
    rules = ((1.3, 0), (1, 1), (0.7, 1))
    params = [SamplingParams(repetition_penalty=penalty, temperature=hot) for penalty, hot in rules]
    actual = jax.jit(penalised_logits)(logits, batch_sampling(params), tokens, known, nodes, ancestor[None])
    for row, node in itertools.product(range(3), range(5)):
        expected = logits[row, node].copy()
        for token in {*tokens[row, : known[row]], *nodes[row][ancestor[node]]}:
            penalty = params[row].repetition_penalty
            expected[token] = expected[token] / penalty if expected[token] > 0 else expected[token] * penalty
        np.testing.assert_allclose(actual[row, node], expected, rtol=1e-6)


def test_greedy_rows_keep_their_logits_beside_filtered_rows():
    """Their top-k and top-p mean nothing, even while a neighbour's are applied."""
    logits = np.random.default_rng(1).standard_normal((2, 2, 12)).astype(np.float32)
    params = [SamplingParams(temperature=0.0, top_k=2, top_p=0.1), SamplingParams(temperature=1.0, top_k=2)]
    actual = np.asarray(filtered(logits, batch_sampling(params)))
    np.testing.assert_array_equal(actual[0], logits[0])
    assert (np.isfinite(actual[1]).sum(axis=-1) == 2).all()


def test_greedy_takes_the_most_probable_token_and_of_equals_the_first():
    logits = np.array([[[0, 3, 3, 1], [2, 2, 2, 2], [-1, -2, -3, -0.5]]], np.float32)
    tokens = draw(logits, jnp.arange(3, dtype=jnp.int32)[None], batch_sampling([SamplingParams(seed=5)]))
    assert tokens.tolist() == [[1, 0, 3]]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 5.0, "top_k": 1, "top_p": 0.5},
        {"temperature": 5.0, "top_p": 1e-9},
        # Logits divided by these overflow float32 unless the largest is taken off first.
        {"temperature": 1e-3},
        {"temperature": 2e-38},
        {"temperature": 2e-38, "top_p": 0.9},
        {"temperature": 1e-300},
    ],
)
def test_a_law_of_one_token_is_greedy(params):
    logits = np.random.default_rng(2).standard_normal((16, 4, 12)).astype(np.float32) * 10
    logits[:, :, 3] = logits[:, :, 7]  # ties as well, unless they are the maximum
    logits[np.arange(16)[:, None], np.arange(4), logits.argmax(axis=-1)] += 1
    positions = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (16, 4))
    sampling = batch_sampling([SamplingParams(**params, seed=seed) for seed in range(16)])
    np.testing.assert_array_equal(draw(logits, positions, sampling), logits.argmax(axis=-1))


def test_a_draw_depends_on_seed_and_position_alone():
    """Not on the row, the column, the neighbours' parameters or how many tokens are drawn at once."""
    random = np.random.default_rng(3)
    row = random.standard_normal(12).astype(np.float32)
    params = SamplingParams(temperature=1.0, top_k=9, top_p=0.95, seed=11)
    others = [SamplingParams(temperature=0.0), SamplingParams(temperature=2.0, seed=4), SamplingParams(seed=11)]

    def token(batch, at, width, column, position):
        logits = random.standard_normal((batch, width, 12)).astype(np.float32)
        positions = random.integers(100, size=(batch, width)).astype(np.int32)
        logits[at, column], positions[at, column] = row, position
        everyone = (others * 2)[:batch]
        everyone[at] = params
        return int(draw(logits, positions, batch_sampling(everyone))[at, column])

    alone = [token(1, 0, 1, 0, position) for position in range(30)]
    assert len(set(alone)) > 3  # positions differ
    for batch, at, width, column in [(4, 0, 1, 0), (4, 3, 1, 0), (4, 1, 5, 4), (2, 1, 5, 0)]:
        assert [token(batch, at, width, column, position) for position in range(30)] == alone
    params = SamplingParams(temperature=1.0, top_k=9, top_p=0.95, seed=12)
    assert [token(1, 0, 1, 0, position) for position in range(30)] != alone  # seeds differ


@functools.lru_cache
def drawn_counts(params, vocabulary=7, seeds=200, positions=150):
    """The logits [V] of a law, and how often each token was drawn from it over seeds and positions."""
    logits = np.random.default_rng(4).standard_normal(vocabulary).astype(np.float32) * 1.5
    sampling = batch_sampling([SamplingParams(**dict(params), seed=seed) for seed in range(seeds)])
    at = jnp.broadcast_to(jnp.arange(positions, dtype=jnp.int32), (seeds, positions))
    tokens = draw(jnp.broadcast_to(logits, (seeds, positions, vocabulary)), at, sampling)
    return logits, np.bincount(np.asarray(tokens).ravel(), minlength=vocabulary)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.7, "top_k": 5, "top_p": 0.9},
    ],
)
def test_draws_follow_the_law(params):
    """30,000 draws over seeds and positions against the exact probabilities (chi-square)."""
    logits, counts = drawn_counts(tuple(params.items()))
    law = numpy_law(logits, SamplingParams(**params))
    assert counts[law == 0].sum() == 0
    support = law > 0
    assert stats.chisquare(counts[support], law[support] * counts.sum()).pvalue > ERROR_RATE
    # The statistic can tell: another temperature fails it.
    wrong = numpy_law(logits, SamplingParams(**{**params, "temperature": params["temperature"] * 1.2}))
    if ((wrong > 0) == support).all():
        assert stats.chisquare(counts[support], wrong[support] * counts.sum()).pvalue < ERROR_RATE


def test_neighbouring_seeds_and_positions_draw_independently():
    """Pairs of draws at adjacent seeds, and at adjacent positions, follow the product of their laws (chi-square)."""
    sampling = batch_sampling([SamplingParams(temperature=1.0, seed=seed) for seed in range(200)])
    at = jnp.broadcast_to(jnp.arange(150, dtype=jnp.int32), (200, 150))
    tokens = np.asarray(draw(jnp.zeros((200, 150, 7)), at, sampling))
    for first, second in ((tokens[::2], tokens[1::2]), (tokens[:, ::2], tokens[:, 1::2])):
        pairs = np.bincount((first * 7 + second).ravel(), minlength=49)
        assert stats.chisquare(pairs).pvalue > ERROR_RATE
