"""Rules of acceptance on small vocabularies: the law of the output and of the accepted length against the exact ones.

The "models" are tables: a law for the target and one for the drafter after every sequence of up to three tokens.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from specsa_jax import acceptance
from specsa_jax.acceptance import draft_noise, step_keys
from specsa_jax.drafting import Context, Draft, grow, parse_tree
from specsa_jax.drafting.tree import static_tree
from specsa_jax.sampling import SamplingParams, batch_sampling, sample

# Seeds are fixed, so a test passes or fails for good; this is how likely a right implementation was to fail at all.
ERROR_RATE = 1e-6
VOCABULARY, DEPTH, DRAWS = 4, 3, 12_000
CHAIN, TREE = "chain:3", "3-2-1"


def index(path):
    """Of a sequence of up to DEPTH tokens among all."""
    at = 0
    for token in path:
        at = at * VOCABULARY + token + 1
    return at


PATHS = [path for length in range(DEPTH + 1) for path in itertools.product(range(VOCABULARY), repeat=length)]


@functools.lru_cache
def tables(seed=0):
    """Probabilities of the next token after each path, of the target and of the drafter: [paths, V] each."""
    random = np.random.default_rng(seed)
    p = random.standard_normal((max(map(index, PATHS)) + 1, VOCABULARY)) * 1.2
    q = p + random.standard_normal(p.shape) * 1.2
    return tuple((np.exp(x) / np.exp(x).sum(-1, keepdims=True)).astype(np.float32) for x in (p, q))


@functools.lru_cache
def stepper(tree, rule):
    """Compiled: one step of many sequences, (accepted path's tokens [B, A], accepted length [B])."""
    template, (p, q) = parse_tree(tree), tables()
    log_p, log_q = jnp.log(p), jnp.log(q)
    whole = static_tree(template, 2)

    def step(sampling, known):
        batch = known.shape[0]
        keys = step_keys(sampling, known)
        if rule == "coupled":
            at = known[:, None] + jnp.arange(template.depth)
            noise = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(sampling.keys, at)
        else:
            noise = draft_noise(keys, template.depth)
        context = Context(None, known, known > 0, sampling, noise, None, None, None, keep_law=rule != "coupled")

        def evaluate(above, level):
            at = jnp.where(level.step == 0, 0, jnp.take_along_axis(above, level.parent, axis=1))
            at = at * VOCABULARY + level.tokens + 1
            return log_q[at], at

        start = jnp.zeros((batch, template.width), jnp.int32)
        draft = grow(evaluate, start, context, template, jnp.broadcast_to(log_q[0], (batch, VOCABULARY)))
        tokens = jnp.pad(draft.tokens, ((0, 0), (1, 0)))
        at = [jnp.zeros(batch, jnp.int32)]
        for node, parent in enumerate(template.parents[1:], 1):
            at.append(at[parent] * VOCABULARY + tokens[:, node] + 1)
        logits = log_p[jnp.stack(at, axis=1)]
        valid = jnp.pad(draft.valid, ((0, 0), (1, 0)))
        targets = sample(logits, known[:, None] + whole.topology.depth, sampling)
        width = template.depth + 1
        if rule == "coupled":
            accepted = acceptance.accept_coupled(whole, tokens, valid, targets, width)
        elif rule == "block":
            accepted = acceptance.accept_block(tokens, draft, logits, sampling, keys)
        elif rule == "typical":
            accepted = acceptance.accept_typical(whole, tokens, valid, logits, targets, sampling, width)
        else:
            child = jnp.asarray(template.child)
            accepted = acceptance.accept_by_rejection(child, tokens, draft, logits, sampling, keys, width)
        return accepted.tokens, accepted.length

    return jax.jit(step)


def outcomes(tree, rule, **law):
    """Sequences of DEPTH tokens [N, DEPTH], completed from the target's law where a step gave fewer; lengths [N]."""
    sampling = batch_sampling([SamplingParams(temperature=1.0, seed=seed, **law) for seed in range(DRAWS)])
    tokens, length = map(np.asarray, stepper(tree, rule)(sampling, jnp.full(DRAWS, 7, jnp.int32)))
    return complete(tokens, length), length


def complete(tokens, length):
    p, random = tables()[0].astype(np.float64), np.random.default_rng(1)
    out = tokens[:, :DEPTH].copy()
    for row in range(len(out)):
        for place in range(length[row] + 1, DEPTH):
            law = p[index(out[row, :place])]
            out[row, place] = random.choice(VOCABULARY, p=law / law.sum())
    return out


def output_p_value(out):
    """Of outputs against their exact law (chi-square over all 64 outcomes)."""
    p = tables()[0].astype(np.float64)
    law = np.array([np.prod([p[index(path[:i])][path[i]] for i in range(DEPTH)]) for path in PATHS if len(path) == 3])
    seen = np.bincount(out @ [VOCABULARY**2, VOCABULARY, 1], minlength=VOCABULARY**3)
    order = np.argsort(law)
    rare = np.cumsum(law[order]) * len(out) < 20  # merged, as chi-square wants some in every cell
    seen, law = seen[order], law[order] / law.sum()
    seen = np.concatenate([[seen[rare].sum()], seen[~rare]])[int(not rare.any()) :]
    law = np.concatenate([[law[rare].sum()], law[~rare]])[int(not rare.any()) :]
    return stats.chisquare(seen, law * len(out)).pvalue


def length_p_value(length, law):
    seen = np.bincount(length, minlength=len(law))
    return stats.chisquare(seen, np.array(law) / np.sum(law) * len(length)).pvalue


# --- Exact laws of the accepted length, by enumeration in float64 ---


def rejection_children(p, q, count):
    """Probability that each token becomes the accepted child, of ``count`` siblings drawn without replacement."""
    chance = np.zeros(len(p))
    for token in np.flatnonzero(q) if count else ():
        accept = min(1.0, p[token] / q[token])
        chance[token] += q[token] * accept
        left = np.maximum(p - q, 0)
        if count > 1 and accept < 1 and left.sum():
            rest = np.where(np.arange(len(q)) == token, 0, q)
            chance += q[token] * (1 - accept) * rejection_children(left / left.sum(), rest / rest.sum(), count - 1)
    return chance


def by_path(table):
    return {path: table[index(path)].astype(np.float64) for path in PATHS}


def rejection_law(branching):
    p, q = (table.astype(np.float64) for table in tables())
    law = np.zeros(len(branching) + 1)

    def walk(path, chance):
        if len(path) == len(branching):
            law[len(path)] += chance
            return
        children = rejection_children(p[index(path)], q[index(path)], branching[len(path)])
        law[len(path)] += chance * (1 - children.sum())
        for token, one in enumerate(children):
            walk((*path, token), chance * one)

    walk((), 1.0)
    return law


def coupled_law():
    """Of chains: a draft and the target's token agree on x with probability 1 / Σ_y max(p_y/p_x, q_y/q_x)."""
    p, q = (table.astype(np.float64) for table in tables())
    law = np.zeros(DEPTH + 1)

    def walk(path, chance):
        if len(path) == DEPTH:
            law[DEPTH] += chance
            return
        here_p, here_q = p[index(path)], q[index(path)]
        agree = [1 / np.maximum(here_p / here_p[x], here_q / here_q[x]).sum() for x in range(VOCABULARY)]
        law[len(path)] += chance * (1 - sum(agree))
        for token, one in enumerate(agree):
            walk((*path, token), chance * one)

    walk((), 1.0)
    return law


def block_law(p, q, depth, vocabulary):
    """Of chains by the paper's equations, over all drafts; ``p`` and ``q`` have the law after each path."""
    law = np.zeros(depth + 1)
    for path in itertools.product(range(vocabulary), repeat=depth):
        drawn, mass, stand = 1.0, 1.0, []
        for place, token in enumerate(path):
            here, after = path[:place], path[: place + 1]
            drawn *= q[here][token]
            if not drawn:
                break  # nothing of it counts
            mass = min(1.0, mass * p[here][token] / q[here][token])
            if place < depth - 1:
                left = np.maximum(mass * p[after] - q[after], 0).sum()
                stand.append(left / (left + 1 - mass) if left else 0.0)
            else:
                stand.append(mass)
        for length in range(depth, -1, -1) if drawn else ():
            chance = 1.0 if length == 0 else stand[length - 1]
            law[length] += drawn * chance
            drawn *= 1 - chance
    return law


CASES = [
    (CHAIN, "rejection", lambda: rejection_law((1, 1, 1))),
    (TREE, "rejection", lambda: rejection_law((3, 2, 1))),
    (CHAIN, "block", lambda: block_law(*map(by_path, tables()), DEPTH, VOCABULARY)),
    (CHAIN, "coupled", coupled_law),
    (TREE, "coupled", None),
]


@pytest.mark.parametrize("tree, rule, law", CASES, ids=[f"{rule}-{tree}" for tree, rule, _ in CASES])
def test_output_and_accepted_length_follow_their_exact_laws(tree, rule, law):
    """12,000 steps; 64 outcomes of three tokens, and the number of accepted drafts."""
    out, length = outcomes(tree, rule)
    assert output_p_value(out) > ERROR_RATE
    if law is not None:
        assert length_p_value(length, law()) > ERROR_RATE
    assert (np.bincount(length, minlength=DEPTH + 1) > 100).all()


def test_block_verification_accepts_more_than_token_by_token_and_trees_more_than_chains():
    mean = {(tree, rule): outcomes(tree, rule)[1].mean() for tree, rule, _ in CASES}
    assert mean[CHAIN, "block"] > mean[CHAIN, "rejection"]
    assert mean[TREE, "rejection"] > mean[CHAIN, "rejection"] + 0.3
    assert mean[TREE, "coupled"] > mean[CHAIN, "coupled"] + 0.3


def test_siblings_judged_as_drawn_with_replacement_fail_the_statistic(monkeypatch):
    """A deliberately wrong rule: the drafter's law is not taken down by the siblings that fell."""
    monkeypatch.setattr(acceptance, "_without", lambda q, token: q)
    out, _ = wrong_outcomes("with replacement", TREE, "rejection")
    assert output_p_value(out) < ERROR_RATE


@pytest.mark.parametrize("tree, rule", [(CHAIN, "rejection"), (TREE, "rejection"), (CHAIN, "block")])
def test_a_token_from_the_whole_law_after_a_rejection_fails_the_statistic(monkeypatch, tree, rule):
    """A deliberately wrong rule: what follows a rejected draft is not drawn from the residual."""
    monkeypatch.setattr(acceptance, "_residual", lambda p, q, scale=None: p)
    out, _ = wrong_outcomes("whole law", tree, rule)
    assert output_p_value(out) < ERROR_RATE


def test_typical_acceptance_is_not_lossless():
    """It may change the law, so it is allowed only where approximations are."""
    out, length = outcomes(CHAIN, "typical")
    assert output_p_value(out) < ERROR_RATE
    assert length.mean() > outcomes(CHAIN, "rejection")[1].mean()


def wrong_outcomes(name, tree, rule):
    """With a trace of its own: the right rule's must neither be reused nor spoilt."""
    stepper.cache_clear()
    try:
        return outcomes(tree, rule)
    finally:
        stepper.cache_clear()


@pytest.mark.parametrize("tree, rule", [(tree, rule) for tree, rule, _ in CASES] + [(CHAIN, "typical")])
def test_greedy_sequences_are_exact_under_every_rule(tree, rule):
    sampling = batch_sampling([SamplingParams(seed=seed) for seed in range(DRAWS)])
    tokens, length = map(np.asarray, stepper(tree, rule)(sampling, jnp.full(DRAWS, 7, jnp.int32)))
    p, best = tables()[0], []
    while len(best) <= DEPTH:
        best.append(int(p[index(best)].argmax()))
    for row in (0, 17, DRAWS - 1):
        assert tokens[row, : length[row] + 1].tolist() == best[: length[row] + 1]


def test_rows_that_were_not_drawn_count_as_certain():
    """Beside drawn ones, as a combination of drafters makes them: accepted with the target's probability."""
    template, p = parse_tree("chain:1"), tables()[0]
    batch = DRAWS
    draft = Draft(
        jnp.full((batch, 1), 2, jnp.int32), jnp.ones((batch, 1), bool),
        law=jnp.full((batch, 2, VOCABULARY), -jnp.inf), drawn=jnp.zeros(batch, bool),
    )  # fmt: skip
    sampling = batch_sampling([SamplingParams(temperature=1.0, seed=seed) for seed in range(batch)])
    logits = jnp.broadcast_to(jnp.log(p[:2]), (batch, 2, VOCABULARY))
    tokens, keys = jnp.full((batch, 2), 2, jnp.int32), step_keys(sampling, jnp.full(batch, 3, jnp.int32))
    for accepted in (
        jax.jit(acceptance.accept_by_rejection, static_argnums=6)(
            jnp.asarray(template.child), tokens, draft, logits, sampling, keys, 2
        ),
        jax.jit(acceptance.accept_block)(tokens, draft, logits, sampling, keys),
    ):
        assert stats.binomtest(int(accepted.length.sum()), batch, float(p[0, 2])).pvalue > ERROR_RATE
        first = np.bincount(np.asarray(accepted.tokens[:, 0]), minlength=VOCABULARY)
        law = p[0].astype(np.float64)
        assert stats.chisquare(first, law / law.sum() * batch).pvalue > ERROR_RATE
