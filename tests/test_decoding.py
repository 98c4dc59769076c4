"""The jitted loops: speculation changes nothing but the speed, in tokens and in law; endings, traces, transfers."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_params import random_params, random_tokens, tiny_model
from scipy import stats

import specsa_jax.decoding
from specsa_jax import reference
from specsa_jax.acceptance import accept_coupled
from specsa_jax.cache import create_cache, pages_for
from specsa_jax.decoding import Decoder, State
from specsa_jax.drafting import Combined, DraftModel, PromptLookup, SelfDraft
from specsa_jax.planning.plan import Fixed
from specsa_jax.sampling import SamplingParams, batch_sampling
from specsa_jax.segments import STREAM_STEPS, Segments
from specsa_jax.strategy import AUTOREGRESSIVE, Strategy

# Seeds are fixed, so a test passes or fails for good; this is how likely a right implementation was to fail at all.
ERROR_RATE = 1e-6
SPECULATIVE = Strategy(PromptLookup(min_ngram=1), "chain:3")
NEW = 28
MANY = jnp.int32(2**30)


def model(vocabulary):
    """Untied: with a tied head a random model repeats its last token. Logits are about 1: neither flat nor certain."""
    return dataclasses.replace(tiny_model(layers=1), vocab_size=vocabulary, tied=False)


@functools.lru_cache
def weights(config, seed=3):
    """Parameters for the reference (float64), and the same for JAX."""
    params = random_params(config, seed=seed)
    return params, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


@functools.lru_cache
def decoder(config, end_tokens=()):
    return Decoder(config, jnp.float32, end_tokens)


def start(decoder, prompts, new, strategy=AUTOREGRESSIVE, draft_params=(), columns=None):
    """A prefilled state; ``new`` tokens each, or one number per prompt."""
    config = decoder.config
    new = np.broadcast_to(new, len(prompts))
    columns = columns or pages_for(config.nsa, max(map(len, prompts)) + NEW)
    pool = len(prompts) * columns
    cache = create_cache(config, np.arange(pool)[::-1].reshape(len(prompts), columns), pool, jnp.float32)
    tokens = np.zeros((len(prompts), columns * config.nsa.select_block + 1), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    known = np.array([len(prompt) for prompt in prompts], np.int32)
    state = State(
        cache, jnp.asarray(tokens), jnp.asarray(known), jnp.asarray(known + new, jnp.int32), jnp.asarray(new == 0),
        jnp.zeros(tokens.shape, jnp.float32),
    )  # fmt: skip
    drafter, shown = strategy.drafter, {}
    if drafter is not None:
        state = state._replace(draft=drafter.init(config, len(prompts), tokens.shape[1], jnp.float32))
        shown = {"drafter": drafter, "draft_params": draft_params} if drafter.observes else {}
    return decoder.prefill(weights(config)[1], state, MANY, chunk=8, precision=strategy.precision, **shown)


def outputs(state, prompts):
    """The new tokens of each row."""
    return [
        row[len(prompt) : known].tolist()
        for row, prompt, known in zip(np.asarray(state.tokens), prompts, np.asarray(state.known), strict=True)
    ]


def run(decoder, prompts, strategy, new=NEW, sampling=None, draft_params=(), columns=None):
    """New tokens per row, final state and counts."""
    sampling = sampling or [SamplingParams()] * len(prompts)
    state, counts = decoder.decode(
        weights(decoder.config)[1], start(decoder, prompts, new, strategy, draft_params, columns),
        batch_sampling(sampling), MANY, strategy=strategy, draft_params=draft_params,
    )  # fmt: skip
    assert state.done.all()
    return outputs(state, prompts), state, counts


CONFIG = model(vocabulary=8)
PROMPTS = [random_tokens(CONFIG, length, seed=length).tolist() for length in (1, 3, 8, 17, 30, 41)]


@functools.lru_cache
def greedy():
    """What autoregressive decoding gives for PROMPTS."""
    return run(decoder(CONFIG), PROMPTS, AUTOREGRESSIVE)[0]


def test_greedy_speculative_autoregressive_and_reference_tokens_are_the_same():
    """A ragged batch, in which drafts stand and fall."""
    tokens, _, counts = run(decoder(CONFIG), PROMPTS, SPECULATIVE)
    assert tokens == greedy()
    accepted = np.asarray(counts.accepted)
    assert accepted[0] > 3 and accepted[3] > 3  # both kinds of steps took place
    for prompt, new in zip(PROMPTS, tokens, strict=True):
        assert len(new) == NEW
        # If every token is the reference's choice after those before it, all of them are its greedy decoding.
        logits = reference.forward(CONFIG, weights(CONFIG)[0], [*prompt, *new[:-1]])[len(prompt) - 1 :]
        assert new == logits.argmax(axis=-1).tolist()


def test_counts_say_what_happened():
    _, state, counts = run(decoder(CONFIG), PROMPTS, SPECULATIVE)
    drafted, accepted = np.asarray(counts.drafted), np.asarray(counts.accepted)
    assert drafted.sum() == accepted.sum()  # a step of a sequence counts once in each
    assert int(counts.steps) <= drafted.sum() <= int(counts.steps) * len(PROMPTS)
    assert drafted[1] == drafted[2] == 0  # lookup drafts all of its length or nothing
    # Every step gives the accepted tokens and one more; the budget can cut off the last step's.
    given = (accepted * (np.arange(4) + 1)).sum()
    assert NEW * len(PROMPTS) <= given <= (NEW + 3) * len(PROMPTS)
    _, _, counts = run(decoder(CONFIG), PROMPTS, AUTOREGRESSIVE)
    assert [leaf.tolist() for leaf in counts] == [NEW, [168], [168], 0]


@pytest.mark.parametrize("strategy", [AUTOREGRESSIVE, SPECULATIVE], ids=["one", "chain"])
def test_each_sequence_ends_on_its_own_at_its_end_token_or_its_budget(strategy):
    """And what it gave by then is what it gives alone; nothing is written behind an end."""
    end_tokens = (4, 6)
    budgets = np.array([28, 2, 28, 0, 28, 1])
    expected = []
    for new, budget in zip(greedy(), budgets, strict=True):
        stops = [place for place, token in enumerate(new) if token in end_tokens]
        expected.append(new[: min(budget, stops[0] + 1 if stops else NEW)])
    lengths = [len(new) for new in expected]
    assert any(0 < length < budget for length, budget in zip(lengths, budgets, strict=True))  # some met an end token
    assert len(set(lengths)) >= 4
    tokens, state, _ = run(decoder(CONFIG, end_tokens), PROMPTS, strategy, new=budgets)
    assert tokens == expected
    for row, (prompt, new) in enumerate(zip(PROMPTS, tokens, strict=True)):
        assert not np.asarray(state.tokens)[row, len(prompt) + len(new) :].any()
        # The cache holds all but the pending token, however a sequence ended.
        assert int(state.cache.lengths[row]) == len(prompt) + len(new) - 1


@pytest.mark.parametrize("strategy", [AUTOREGRESSIVE, SPECULATIVE], ids=["one", "chain"])
def test_decoding_in_segments_gives_the_same_as_one_call(strategy):
    loops = decoder(CONFIG)
    _, whole, total = run(loops, PROMPTS, strategy)
    state, parts = start(loops, PROMPTS, NEW), []
    while not state.done.all():
        before = np.asarray(state.known)
        state, counts = loops.decode(
            weights(CONFIG)[1], state, batch_sampling([SamplingParams()] * 6), jnp.int32(3), strategy=strategy
        )
        assert int(counts.steps) <= 3 and (np.asarray(state.known) >= before).all()
        parts.append(counts)
    for kind, summed in zip(total, map(sum, zip(*parts, strict=True)), strict=True):
        np.testing.assert_array_equal(kind, summed)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_no_steps_are_taken_when_none_are_asked_for_or_needed():
    loops = decoder(CONFIG)
    state = start(loops, PROMPTS, NEW)
    known = np.asarray(state.known)
    sampling = batch_sampling([SamplingParams()] * 6)
    state, counts = loops.decode(weights(CONFIG)[1], state, sampling, jnp.int32(0), strategy=SPECULATIVE)
    assert int(counts.steps) == 0 and state.known.tolist() == known.tolist()
    tokens, _, counts = run(loops, PROMPTS, SPECULATIVE, new=0)
    assert int(counts.steps) == 0 and tokens == [[]] * 6


def test_prefill_in_segments_gives_the_same_as_one_call():
    loops, params = decoder(CONFIG), weights(CONFIG)[1]
    whole = start(loops, PROMPTS, NEW)
    assert whole.cache.lengths.tolist() == [len(prompt) - 1 for prompt in PROMPTS]
    state = whole._replace(cache=jax.tree.map(lambda leaf: leaf, start(loops, PROMPTS, NEW).cache))
    columns = state.cache.page_table.shape
    fresh = create_cache(CONFIG, np.asarray(state.cache.page_table), columns[0] * columns[1], jnp.float32)
    state = jax.tree.map(jnp.copy, whole._replace(cache=fresh))
    for _ in range(6):
        state = loops.prefill(params, state, jnp.int32(1), chunk=8)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_trace_per_strategy_however_often_it_is_called_and_when_it_comes_back():
    loops = Decoder(CONFIG, jnp.float32)
    other = Strategy(PromptLookup(min_ngram=1), "chain:1")
    again = Strategy(PromptLookup(min_ngram=1), "chain:3")  # equal to SPECULATIVE, not the same object
    hot = [SamplingParams(temperature=0.9, top_k=3, seed=seed) for seed in range(6)]
    for strategy in (AUTOREGRESSIVE, SPECULATIVE, other, again, AUTOREGRESSIVE, SPECULATIVE):
        assert run(loops, PROMPTS, strategy)[0] == greedy()
        run(loops, PROMPTS, strategy, sampling=hot, new=[1, 5, 2, 0, 7, 3])  # values are no part of a trace
    assert loops.traces == {AUTOREGRESSIVE: 1, SPECULATIVE: 1, other: 1, 8: 1}


def test_the_state_is_donated():
    loops = decoder(CONFIG)
    state = start(loops, PROMPTS, NEW)
    run_in = state.cache.layers[0].key
    loops.decode(weights(CONFIG)[1], state, batch_sampling([SamplingParams()] * 6), MANY, strategy=SPECULATIVE)
    assert run_in.is_deleted()


@pytest.mark.parametrize("tree", ["chain:-1", "chain", "chain:7 ", "7", "", None, 7, "chain:x", "4--1", "best:", "4-"])
def test_strategies_with_a_tree_that_cannot_be_read_are_refused(tree):
    with pytest.raises(ValueError, match="^tree: got .*, expected chain:K"):
        Strategy(tree=tree)


def test_strategies_are_frozen_and_compare_by_value():
    assert Strategy() == Strategy(PromptLookup(), "chain:5") and hash(Strategy()) == hash(Strategy())
    assert len({Strategy(), Strategy(tree="chain:1"), AUTOREGRESSIVE, Strategy(None)}) == 3
    assert (Strategy(tree="chain:5").width, AUTOREGRESSIVE.width) == (6, 1)
    assert AUTOREGRESSIVE.describe() == "autoregressive" and "chain:5" in Strategy().describe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Strategy().tree = "chain:1"


def test_sampled_speculative_tokens_are_those_of_sampling_one_at_a_time():
    """The coupling by seed and position: drafts change which tokens are verified together, not which are drawn."""
    sampling = [
        SamplingParams(temperature=0.7, seed=1), SamplingParams(temperature=1.0, top_k=3, seed=2), SamplingParams(),
        SamplingParams(temperature=1.0, top_p=0.7, seed=3), SamplingParams(temperature=0.4, seed=2**32 - 1),
        SamplingParams(temperature=2.0, top_k=5, top_p=0.9, seed=1),
    ]  # fmt: skip
    tokens, _, counts = run(decoder(CONFIG), PROMPTS, SPECULATIVE, sampling=sampling)
    assert tokens == run(decoder(CONFIG), PROMPTS, AUTOREGRESSIVE, sampling=sampling)[0]
    assert tokens[2] == greedy()[2] and tokens[0] != greedy()[0]
    assert counts.accepted[0] > 3 and counts.accepted[1:].sum() > 3


SAMPLED = [
    SamplingParams(temperature=0.7, seed=1), SamplingParams(temperature=1.0, top_k=3, seed=2),
    SamplingParams(repetition_penalty=1.3), SamplingParams(temperature=1.0, top_p=0.7, repetition_penalty=0.8, seed=3),
    SamplingParams(temperature=0.4, min_p=0.2, seed=2**32 - 1),
    SamplingParams(temperature=2.0, top_k=5, top_p=0.9, seed=1),
]  # fmt: skip
OTHER = DraftModel("another", config=CONFIG)


TREES = [
    Strategy(PromptLookup(min_ngram=1), "3-2-1", "depth"),
    Strategy(Combined(PromptLookup(min_ngram=4), OTHER), "best:12:4"),
]


@pytest.mark.parametrize("strategy", TREES, ids=["lookup", "lookup, else another model"])
def test_trees_give_the_tokens_of_decoding_one_at_a_time(strategy):
    """Greedy, and sampled with every parameter there is; in a ragged batch, in which branches stand and fall."""
    draft_params = weights(CONFIG, 5)[1]
    tokens, _, counts = run(decoder(CONFIG), PROMPTS, strategy, draft_params=draft_params)
    assert tokens == greedy()
    assert (np.asarray(counts.accepted)[:3] > 3).all() and counts.nodes > 3 * counts.steps
    tokens, state, _ = run(decoder(CONFIG), PROMPTS, strategy, sampling=SAMPLED, draft_params=draft_params)
    plain, one_by_one, _ = run(decoder(CONFIG), PROMPTS, AUTOREGRESSIVE, sampling=SAMPLED)
    assert tokens == plain
    np.testing.assert_allclose(state.logprobs, one_by_one.logprobs, atol=1e-4)


@pytest.mark.parametrize("strategy", [SPECULATIVE, *TREES], ids=["a chain", "a tree", "a grown tree, a model watching"])
def test_nothing_crosses_between_host_and_device_inside_a_segment(strategy):
    """What runs is guarded, not what the host gives it, and reads of it afterwards. Watchers of a plan and schedules
    are guarded in an engine: test_planned_engine.py, test_precision.py."""
    loops, ran = decoder(CONFIG), []
    draft_params = weights(CONFIG, 5)[1] if strategy in TREES else ()
    options = {"strategy": strategy, "draft_params": draft_params}

    def program(*arguments):
        *rest, steps = arguments
        arguments = *rest, jnp.asarray(steps)
        if not ran:
            text = loops.decode.lower(*arguments, **options).as_text()
            assert "callback" not in text and "outfeed" not in text
        # The first call compiles; constants go to the device then.
        with jax.transfer_guard("disallow" if ran else "allow"):
            ran.append(jax.block_until_ready(loops.decode(*arguments, **options)))
        return ran[-1]

    runtime = types.SimpleNamespace(params=weights(CONFIG)[1], decode_program=lambda *_: (program, 0.0))
    state = start(loops, PROMPTS, NEW, strategy, draft_params)
    sampling = batch_sampling([SamplingParams(temperature=0.5, top_p=0.9)] * 6)
    segments = Segments(runtime, state, sampling, Fixed(strategy), streamed=True)
    while not (read := segments.run(NEW)).done.all():
        assert read.counts.steps == STREAM_STEPS
    assert len(ran) > 1
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="[Dd]isallowed host-to-device"):
        loops.decode(runtime.params, ran[-1][0], sampling, np.int32(1), **options)  # the guard does guard


def test_the_model_as_its_own_draft_model_is_always_accepted():
    """Its cache follows the target's through prefill and steps; sampled drafts share the target's randomness."""
    strategy = Strategy(OTHER, "chain:3")
    for sampling in (None, [dataclasses.replace(one, repetition_penalty=1.0) for one in SAMPLED]):
        _, state, counts = run(decoder(CONFIG), PROMPTS, strategy, sampling=sampling, draft_params=weights(CONFIG)[1])
        assert counts.accepted.tolist() == [0, 0, 0, NEW // 4 * 6]
        for ours, theirs in zip(jax.tree.leaves(state.draft.layers), jax.tree.leaves(state.cache.layers), strict=True):
            assert ours.shape[1:] == theirs.shape[1:]
        np.testing.assert_array_equal(state.draft.lengths, state.cache.lengths)


def test_log_probabilities_are_those_of_the_reference():
    tokens, state, _ = run(decoder(CONFIG), PROMPTS, SPECULATIVE)
    for row, (prompt, new) in enumerate(zip(PROMPTS, tokens, strict=True)):
        logits = reference.forward(CONFIG, weights(CONFIG)[0], [*prompt, *new[:-1]])[len(prompt) - 1 :]
        law = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        got = np.asarray(state.logprobs)[row, len(prompt) : len(prompt) + NEW]
        np.testing.assert_allclose(got, law[np.arange(NEW), new], atol=1e-5)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"acceptance": "magic"}, "acceptance: got 'magic', expected one of 'coupled', 'rejection', 'block'"),
        ({"precision": "fp8"}, "precision: got 'fp8', expected one of 'exact', 'strict', 'approx'"),
        ({"acceptance": "typical"}, "acceptance: got 'typical', which is lossy, in precision 'exact'"),
        ({"acceptance": "typical", "precision": "strict"}, "which is lossy, in precision 'strict'"),
        ({"drafter": SelfDraft(), "acceptance": "rejection", "precision": "strict"}, "in precision 'strict'"),
        ({"acceptance": "rejection"}, "acceptance: got 'rejection' for drafter lookup.*not drawn from a law"),
        ({"drafter": None, "acceptance": "block"}, "acceptance: got 'block' for drafter None"),
        ({"drafter": SelfDraft(), "acceptance": "rejection", "tree": "best:8"}, "'rejection' for tree best:8"),
        ({"drafter": SelfDraft(), "acceptance": "block", "tree": "2-2"}, "'block' for tree 2-2, expected a chain"),
        ({"group": 4, "precision": "strict"}, "group: got 4 in precision 'strict', where queries are served one by"),
        ({"traversal": "random"}, "traversal: got 'random'"),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Strategy(**arguments)


@pytest.mark.parametrize(
    "strategy, words",
    [
        (Strategy(tree="9-1"), "9 children of one node, expected at most vocab_size = 8"),
        (Strategy(tree="chain:9"), "9 tokens deep, expected at most a page"),
        (Strategy(SelfDraft(5)), "SelfDraft: got num_selected 5, expected at most the model's, 4"),
        (Strategy(SelfDraft(2)), r"SelfDraft: num_selected: got 2, expected at least num_initial \+ num_local = 3"),
        (Strategy(DraftModel("other", config=model(9))), "vocab_size 9, expected the target's, 8"),
        (Strategy(Combined(PromptLookup(), DraftModel("other", config=model(9)))), "vocab_size 9"),
    ],
)
def test_strategies_that_do_not_suit_the_model_are_refused(strategy, words):
    with pytest.raises(ValueError, match=words):
        decoder(CONFIG).check(strategy)


# --- The law of sampled output. Vocabulary 5, 3 new tokens: all 125 outcomes and their probabilities are known. ---

LAW_CONFIG = model(vocabulary=5)
LAW_PROMPT = [0, 3, 1, 2, 4, 0, 3, 1, 2, 4, 0, 3]  # lookup drafts 1, 2, 4
LAW_NEW, LAW_BATCH, LAW_ROUNDS = 3, 512, 8
LAWS = [{"temperature": 1.0}, {"temperature": 1.3, "top_k": 4, "top_p": 0.9}]


def next_law(logits, temperature, top_k=0, top_p=1.0):
    """Probabilities [5] after temperature, top-k and top-p, by their definition."""
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    weights = np.exp((logits[order] - logits.max()) / temperature)
    weights /= weights.sum()
    kept = 1 + int((np.cumsum(weights)[:-1] < top_p).sum())
    law = np.zeros(len(logits))
    law[order[:kept]] = weights[:kept] / weights[:kept].sum()
    return law


@functools.lru_cache
def reference_logits():
    """After the prompt and each continuation of 0, 1 and 2 tokens."""
    config, params = LAW_CONFIG, weights(LAW_CONFIG)[0]
    _, cache = reference.extend(config, params, reference.empty_cache(config, params), LAW_PROMPT[:-1])
    found = {}
    for pair in itertools.product(range(5), repeat=2):
        logits, _ = reference.extend(config, params, cache, [LAW_PROMPT[-1], *pair])
        found[()], found[pair[:1]], found[pair] = logits
    return found


def exact_law(law):
    """Probabilities [125] of the outputs, the first token most significant."""
    logits = reference_logits()
    return np.array([
        np.prod([next_law(logits[out[:place]], **law)[out[place]] for place in range(LAW_NEW)])
        for out in itertools.product(range(5), repeat=LAW_NEW)
    ])  # fmt: skip


def p_value(loops, strategy, law):
    """Of 4096 sampled outputs against their exact law (chi-square); and the accepted counts."""
    seen, accepted = np.zeros(5**LAW_NEW), 0
    for at in range(LAW_ROUNDS):
        sampling = [SamplingParams(**law, seed=at * LAW_BATCH + row) for row in range(LAW_BATCH)]
        tokens, _, counts = run(loops, [LAW_PROMPT] * LAW_BATCH, strategy, new=LAW_NEW, sampling=sampling)
        np.add.at(seen, np.array(tokens) @ [25, 5, 1], 1)
        accepted = accepted + np.asarray(counts.accepted)
    return chi_square(seen, exact_law(law) * seen.sum()), accepted


def chi_square(seen, expected):
    """The p-value of counts [125] where ``expected`` [125] were."""
    if seen[expected == 0].sum():
        return 0.0
    # Chi-square needs 5 expected per cell: the 125 outcomes from rare to frequent, merged until there are.
    cells = np.zeros((0, 2))
    pooled = np.zeros(2)
    for outcome in np.argsort(expected):
        pooled += seen[outcome], expected[outcome]
        if pooled[1] >= 5:
            cells, pooled = np.vstack([cells, pooled]), np.zeros(2)
    assert len(cells) > 50
    cells[-1] += pooled
    return stats.chisquare(cells[:, 0], cells[:, 1]).pvalue


@pytest.mark.parametrize("law", LAWS, ids=["temperature", "filtered"])
def test_sampled_speculative_output_follows_the_exact_law(law):
    p, accepted = p_value(decoder(LAW_CONFIG), SPECULATIVE, law)
    assert p > ERROR_RATE
    assert (accepted > 30).all()  # drafts were rejected at every place, and accepted whole


@pytest.mark.parametrize("law", LAWS, ids=["temperature", "filtered"])
def test_wrong_acceptance_fails_the_same_statistic(law, monkeypatch):
    """So it can tell: here every draft stands, and tokens follow drafts that were not drawn."""

    def all_stand(tree, tokens, valid, targets, width):
        drawn = jnp.where(valid[:, 1:], tokens[:, 1:], targets[:, :-1])
        return accept_coupled(tree, tokens, valid, jnp.concatenate([drawn, targets[:, -1:]], axis=1), width)

    monkeypatch.setattr(specsa_jax.decoding, "accept_coupled", all_stand)
    p, _ = p_value(wrong_decoder("all"), SPECULATIVE, law)
    assert p < ERROR_RATE


def test_acceptance_shifted_by_one_fails_the_same_statistic(monkeypatch):
    """A subtler error: a draft is compared with the token drawn after it instead of before it."""

    def shifted(tree, tokens, valid, targets, width):
        later = jnp.pad(targets[:, 1:], ((0, 0), (0, 1)))
        accepted = accept_coupled(tree, tokens, valid, later, width)
        return accepted._replace(tokens=jnp.take_along_axis(targets, accepted.path, axis=1))

    monkeypatch.setattr(specsa_jax.decoding, "accept_coupled", shifted)
    p, _ = p_value(wrong_decoder("shifted"), SPECULATIVE, LAWS[0])
    assert p < ERROR_RATE


@functools.lru_cache
def wrong_decoder(name):
    """A decoder of its own for each wrong rule: the right one's traces must not be reused, nor spoilt."""
    return Decoder(LAW_CONFIG, jnp.float32)
