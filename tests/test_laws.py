"""Drafters that draw from a law of their own, inside the loop: output and accepted lengths against the exact laws.

Tiny random models with a vocabulary of 5: the probabilities of all 125 outputs of three tokens are known, and those of
the first step's accepted lengths follow from the target's law and the drafter's. The target's comes from the NumPy
reference; so do the self-drafter's (the reference with fewer blocks) and the draft model's, the head's from its
training form, which runs over whole sequences.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_acceptance import block_law, rejection_children
from test_decoding import ERROR_RATE, LAW_CONFIG, MANY, chi_square, next_law, outputs, start, weights

from specsa_jax import acceptance, reference
from specsa_jax import model as transformer
from specsa_jax.cache import Cache
from specsa_jax.checkpoints import draft_head
from specsa_jax.decoding import Decoder
from specsa_jax.drafting import Combined, DraftModel, PromptLookup, SelfDraft, TrainedHead, head_model
from specsa_jax.drafting.head_model import HeadConfig
from specsa_jax.sampling import SamplingParams, batch_sampling
from specsa_jax.strategy import Strategy
from specsa_jax.training.draft_unroll import unroll

BATCH, NEW, VOCABULARY = 2048, 3, LAW_CONFIG.vocab_size
# Six blocks, of which queries select four; the last four tokens stand before 2, 4 too.
PROMPT = [*np.random.default_rng(16).integers(0, VOCABULARY, 30).tolist(), 3, 0, 3, 1, 2, 4, 1, 0, 2, 3, 0, 3, 1]
LAW = {"temperature": 1.3, "top_p": 0.95}
UNOPTIMISED = {"xla_backend_optimization_level": "0"}  # of programs that run once or twice
HEAD = HeadConfig.of(LAW_CONFIG, window=16)
OTHER = DraftModel("another", config=LAW_CONFIG)


@functools.lru_cache
def head_params():
    return head_model.init_params(HEAD, 7)


def logits_after(config, params):
    """Logits [5] after the prompt and each continuation of 0, 1 and 2 tokens, by the reference."""
    _, cache = reference.extend(config, params, reference.empty_cache(config, params), PROMPT[:-1])
    found = {}
    for pair in itertools.product(range(VOCABULARY), repeat=2):
        rows, _ = reference.extend(config, params, cache, [PROMPT[-1], *pair])
        found[()], found[pair[:1]], found[pair] = rows
    return found


def laws(logits):
    return {path: next_law(row, **LAW) for path, row in logits.items()}


@functools.lru_cache
def target_law():
    return laws(logits_after(LAW_CONFIG, weights(LAW_CONFIG)[0]))


def self_law():
    """With one layer K/V do not depend on what is selected: the drafter's cache is the target's."""
    return laws(logits_after(SelfDraft()._cheap(LAW_CONFIG), weights(LAW_CONFIG)[0]))


def other_law():
    return laws(logits_after(LAW_CONFIG, weights(LAW_CONFIG, 5)[0]))


def head_law():
    @functools.partial(jax.jit, compiler_options=UNOPTIMISED)
    def whole(target, params, texts):
        _, features = transformer.hidden_states(LAW_CONFIG, target, texts, features=HEAD.features)
        states = unroll(HEAD, params, target, texts[:, 1:], features[:, :-1], 2)
        return head_model.logits(HEAD, params, target, states)

    texts = jnp.array([[*PROMPT, token] for token in range(VOCABULARY)], jnp.int32)
    logits = np.asarray(whole(weights(LAW_CONFIG)[1], head_params(), texts), np.float64)
    return laws({(): logits[0, 0, -2]} | {(token,): logits[1, token, -1] for token in range(VOCABULARY)})


def lookup_law():
    return {path: np.eye(VOCABULARY)[token] for path, token in {(): 2, (2,): 4}.items()}


def lengths_law(drafter_law, branching, acceptance="rejection"):
    """Probabilities of 0 … D accepted drafts of the first step."""
    p, law = target_law(), np.zeros(len(branching) + 1)
    if acceptance == "block":
        return block_law(p, drafter_law, len(branching), VOCABULARY)

    def walk(path, chance):
        children = np.zeros(VOCABULARY)
        if len(path) < len(branching) and chance:
            children = rejection_children(p[path], drafter_law[path], branching[len(path)])
        law[len(path)] += chance * (1 - children.sum())
        for token in np.flatnonzero(children):
            walk((*path, int(token)), chance * children[token])

    walk((), 1.0)
    return law


@functools.lru_cache
def head_drafter(folder):
    """A random head of the target, saved and read like any other."""
    head = draft_head.DraftHead(
        head_params(), HEAD, draft_head.fingerprint(LAW_CONFIG, weights(LAW_CONFIG)[1]), "", {}
    )  # fmt: skip
    return TrainedHead(draft_head.save(folder / "head", head))


def repeated(state):
    """A prefilled state of one sequence, BATCH times: with its pages, to which each sequence has a table of its own."""

    def repeat(leaf):
        return jnp.tile(leaf, (BATCH, *[1] * (leaf.ndim - 1)))

    def own_pages(cache):
        first = jnp.arange(BATCH, dtype=jnp.int32)[:, None] * cache.page_table.shape[1]
        return jax.tree.map(repeat, cache)._replace(page_table=cache.page_table + first)

    draft = own_pages(state.draft) if isinstance(state.draft, Cache) else jax.tree.map(repeat, state.draft)
    return jax.tree.map(repeat, state._replace(draft=()))._replace(cache=own_pages(state.cache), draft=draft)


def p_values(strategy, draft_params, law):
    """Of the first step's accepted lengths, and of the output; and these lengths' counts."""
    decoder, params = Decoder(LAW_CONFIG, jnp.float32), weights(LAW_CONFIG)[1]
    sampling = batch_sampling([SamplingParams(**LAW, seed=seed) for seed in range(BATCH)])
    state = repeated(start(decoder, [PROMPT], NEW, strategy, draft_params))
    arguments, known = (params, state, sampling), {"strategy": strategy, "draft_params": draft_params}
    decode = decoder.decode.lower(*arguments, MANY, **known).compile(UNOPTIMISED)
    state, counts = decode(params, state, sampling, jnp.int32(1), draft_params=draft_params)
    state, _ = decode(params, state, sampling, MANY, draft_params=draft_params)
    seen = np.bincount(np.array(outputs(state, [PROMPT] * BATCH)) @ [25, 5, 1], minlength=125)
    p = target_law()
    exact = np.array([np.prod([p[out[:at]][out[at]] for at in range(NEW)])
                      for out in itertools.product(range(VOCABULARY), repeat=NEW)])  # fmt: skip
    lengths = np.asarray(counts.accepted)
    return stats.chisquare(lengths, law / law.sum() * BATCH).pvalue, chi_square(seen, exact * BATCH), lengths


def head_and_weights(folder):
    return head_drafter(folder), {
        "head": head_params(), "target": {"embed": weights(LAW_CONFIG)[1]["embed"]},
    }  # fmt: skip


def combined(folder):
    head, params = head_and_weights(folder)
    return Combined(PromptLookup(min_ngram=4), head), params


CASES = {
    "self, chain": (lambda _: (SelfDraft(), ()), "chain:2", "rejection", (1, 1), self_law),
    "model, chain": (lambda _: (OTHER, weights(LAW_CONFIG, 5)[1]), "chain:2", "block", (1, 1), other_law),
    "head, tree": (head_and_weights, "2-2", "rejection", (2, 2), head_law),
    "lookup, else head, chain": (combined, "chain:2", "rejection", (1, 1), lookup_law),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("heads")


@pytest.mark.parametrize("case", CASES)
def test_output_and_accepted_lengths_follow_their_exact_laws(case, folder):
    make, tree, acceptance, branching, law = CASES[case]
    drafter, params = make(folder)
    strategy = Strategy(drafter, tree, acceptance=acceptance)
    length, output, lengths = p_values(strategy, params, lengths_law(law(), branching, acceptance))
    assert length > ERROR_RATE and output > ERROR_RATE
    assert (lengths > 30).all()  # drafts fell at every place, and stood whole


def test_a_token_from_the_whole_law_after_a_rejection_fails_the_same_statistic(monkeypatch):
    """A deliberately wrong rule: what follows a rejected draft is not drawn from the residual."""
    monkeypatch.setattr(acceptance, "_residual", lambda p, q, scale=None: p)
    strategy = Strategy(OTHER, "chain:2", acceptance="rejection")
    _, output, _ = p_values(strategy, weights(LAW_CONFIG, 5)[1], np.ones(3))
    assert output < ERROR_RATE
