"""Acceptance: priors, observations, and replays on texts that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from profiles import histogram

from specsa_jax import PromptLookup
from specsa_jax.drafting import Context, parse_tree, prompt_lookup
from specsa_jax.planning import replay
from specsa_jax.planning.predict import Acceptance
from specsa_jax.planning.profile import Prior


def test_prediction_tends_to_what_is_observed():
    random, chance = np.random.default_rng(0), 0.7
    lengths = [int(np.argmin([*(random.random(4) < chance), False])) for _ in range(4000)]
    acceptance = Acceptance()
    acceptance.add("lookup", "chain:4", *histogram(4, lengths, draftless=1000))
    assert acceptance.rate("lookup") == pytest.approx(0.8, abs=0.01)
    np.testing.assert_allclose(acceptance.chances("lookup", "chain:4", 4), chance, atol=0.04)  # 4 errors at the last
    assert acceptance.length("lookup", "chain:4", 4) == pytest.approx(1 + 0.8 * np.mean(lengths), abs=0.02)


def test_chains_of_other_lengths_and_other_trees_learn_too():
    def prior(tree, depth):
        drafted, accepted = histogram(depth, [1, 2] * 50)
        return Prior("lookup", tree, "continuation", 64, 100, tuple(map(int, drafted)), tuple(map(int, accepted)), 0)

    acceptance = Acceptance([prior("chain:4", 4), prior("best:8:4", 4)])
    before = [acceptance.length("lookup", tree, 4) for tree in ("chain:4", "best:8:4")]
    acceptance.add("lookup", "chain:2", *histogram(2, [2] * 50))
    after = [acceptance.length("lookup", tree, 4) for tree in ("chain:4", "best:8:4")]
    assert after[0] > before[0] + 0.2 and after[1] > before[1] + 0.2
    assert acceptance.length("head", "chain:4", 4) == Acceptance().length("head", "chain:4", 4)


def test_drafts_for_drawn_tokens_are_expected_to_fare_worse_than_the_greedy_priors_until_they_are_seen():
    drafted, accepted = histogram(4, [3, 4] * 50)
    prior = Prior("lookup", "chain:4", "continuation", 64, 100, tuple(map(int, drafted)), tuple(map(int, accepted)), 0)
    priors = Acceptance([prior])
    greedy, drawn = priors.fresh(), priors.fresh(drawn=True)
    expected = [one.length("lookup", "chain:4", 4) - 1 for one in (greedy, drawn)]
    assert 0.5 * expected[0] < expected[1] < 0.8 * expected[0]
    assert (drawn.chances("lookup", "chain:4", 4) < greedy.chances("lookup", "chain:4", 4)).all()
    # What other calls ask before and after makes no difference, nor what they learn.
    greedy.add("lookup", "chain:4", *histogram(4, [0] * 50))
    assert [priors.fresh(kind).length("lookup", "chain:4", 4) - 1 for kind in (False, True)] == expected
    # What a text shows counts whole.
    drawn.add("lookup", "chain:4", *histogram(4, [3, 4] * 5000))
    assert drawn.length("lookup", "chain:4", 4) == pytest.approx(4.5, abs=0.02)


def test_a_copys_other_depths_follow_from_its_runs_and_a_heads_from_its_positions():
    """Of 100 steps of a chain of 16, 40 accept all of it, one after the other, and 60 nothing: a text that goes round
    for some 700 of 740 tokens, of which a chain of 63 needs a quarter of the steps, and one of 4 thrice as many."""
    acceptance = Acceptance()
    for drafter in ("lookup", "head"):
        acceptance.add(drafter, "chain:16", *histogram(16, [16] * 40_000 + [0] * 60_000))
        if drafter == "lookup":  # another stretch, of the same kind, by other steps
            acceptance.add(drafter, "chain:4", *histogram(4, [4] * 140_000 + [0] * 60_000))
    lengths = {depth: acceptance.length("lookup", f"chain:{depth}", depth) for depth in (4, 16, 63)}
    assert lengths[16] == pytest.approx(1 + 0.4 * 16, rel=0.04)
    assert lengths[4] == pytest.approx(740 / (700 / 5 + 60), rel=0.05)
    assert lengths[63] == pytest.approx(740 / (700 / 64 + 60), rel=0.05)
    assert acceptance.length("head", "chain:4", 4) == pytest.approx(1 + 0.4 * 4, rel=0.01)
    assert acceptance.outlook("lookup", "chain:4", 4, rate=0.5).share < 0.9
    assert acceptance.outlook("lookup", "chain:16", 16, shift=-9.0).length < 1.2


def test_of_a_copys_priors_those_of_its_longest_chain_count():
    """Steps of chains of several lengths, taken for those of one, would be of no text."""

    def prior(depth, lengths):
        drafted, accepted = (tuple(map(int, counts)) for counts in histogram(depth, lengths))
        return Prior("lookup", f"chain:{depth}", "edit", 64, len(lengths), drafted, accepted, 0)

    short, long = prior(4, [4] * 1400 + [0] * 600), prior(16, [16] * 400 + [0] * 600)
    both, alone = Acceptance([short, long]), Acceptance([long])
    for depth in (4, 16, 63):
        assert both.length("lookup", f"chain:{depth}", depth) == alone.length("lookup", f"chain:{depth}", depth)


def test_chains_deeper_than_what_is_counted_by_position_are_evidence_too():
    acceptance = Acceptance()
    before = acceptance.length("lookup", "chain:100", 100)
    acceptance.add("lookup", "chain:100", *histogram(100, [100] * 50))
    assert 3 * before < acceptance.length("lookup", "chain:100", 100) <= 101


def test_old_evidence_fades():
    acceptance = Acceptance()
    acceptance.add("lookup", "chain:4", *histogram(4, [4] * 100))
    acceptance.decay(200)
    acceptance.add("lookup", "chain:4", *histogram(4, [0] * 20))
    assert acceptance.chances("lookup", "chain:4", 1)[0] < 0.2


def test_a_replay_is_the_steps_that_lookup_would_have_taken_through_the_ends_of_prompts():
    """By hand: of a text of period 5, three drafts of 8 stand along the last 32 tokens, and one of 5 that are left."""
    row = np.array([1, 2, 3, 4, 5] * 12, np.int32)
    drafted, accepted = replay.replay([row], PromptLookup(), 8)
    assert (
        drafted.tolist() == accepted.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 3]
    )  # of 32 tokens, the least that it looks at
    assert replay.replay([row[:1], row[:2]], PromptLookup(min_ngram=4), 8)[0].tolist() == [1] + 8 * [0]  # too short
    three, _ = replay.replay([row, row[:20], row[:1]], PromptLookup(), 8)
    assert three.sum() > drafted.sum() and three[0] > 0


def test_a_walk_is_the_steps_that_lookup_would_have_taken():
    """By hand: of a text of period 5, a draft of 4 stands at each step; the last is right as far as the text goes."""
    row = np.array([1, 2, 3, 4, 5] * 8, np.int32)
    texts, since, known = np.stack([row, row]), np.array([20, 7]), np.array([38, 7])
    [(drafted, accepted)] = replay.walk(texts, since, known, PromptLookup(), (4,))
    # Of 32 tokens for two texts the last 16: steps from 22, 27, 32 and, with one token left, from 37.
    assert drafted.tolist() == accepted.tolist() == [0, 1, 0, 0, 3]
    wrong = texts.copy()
    # The draft of 22 stands for three tokens; of 26 and 27 there is none; that of 28 repeats the 9, and stands for two;
    # that of 31 stands; of 36's, two are known.
    wrong[0, 25] = 9
    [(drafted, accepted)] = replay.walk(wrong, since, known, PromptLookup(), (4,))
    assert accepted.tolist() == [2, 0, 2, 1, 1] and drafted.tolist() == [2, 0, 1, 0, 3]


# A text that goes round: 2 follows 1 1 1 1 1 1 1 1, and so does 3, so that a copy from there is wrong each time.
ROUND = np.array([*[1] * 9, 2, *[1] * 9, 3, *range(4, 20)], np.int32)


def test_a_walk_at_several_depths_is_that_at_each():
    text, known = np.tile(ROUND, 12)[None], np.array([300])
    depths = (2, 4, 8, 16, 32)
    found = replay.walk(text, np.array([120]), known, PromptLookup(), depths)
    for depth, one in zip(depths, found, strict=True):
        [alone] = replay.walk(text, np.array([120]), known, PromptLookup(), (depth,))
        np.testing.assert_array_equal(one, alone)
        steps, tokens = one[1].sum(), one[1] @ np.arange(1, depth + 2)
        assert tokens in (180, 181) and steps >= 180 / (depth + 1)  # all of a text that is alone
    [few] = replay.walk(text, np.array([120]), known, PromptLookup(), (8,), places=32)
    assert few[1] @ np.arange(1, 10) in (32, 33)


def test_of_one_text_chains_of_each_length_speak_for_themselves():
    """In a text that goes round one length may begin, each time, where it is misled, and another never does."""
    misled, whole, lengths = histogram(8, [2, 8] * 20), histogram(16, [16] * 20), []
    for one in (Acceptance(alone=True), Acceptance().fresh(alone=True), Acceptance()):
        one.add("lookup", "chain:8", *misled)
        one.add("lookup", "chain:16", *whole)
        lengths.append([one.length("lookup", f"chain:{depth}", depth) for depth in (4, 8, 16)])
    alone, fresh, pooled = lengths
    assert alone == fresh and alone[0] == pooled[0]  # nobody walked it by 4: as all say
    assert 5.5 < alone[1] < pooled[1] - 1 and alone[2] > 12.5 > pooled[2] + 2


def test_a_replay_sees_what_a_long_prompt_copies_from_its_beginning():
    prompt = np.random.default_rng(3).integers(0, 1000, 60_000).astype(np.int32)
    prompt[-1000:] = prompt[:1000]
    drafted, accepted = replay.replay([prompt], PromptLookup(), 16)
    assert drafted.tolist() == accepted.tolist() and drafted[0] == 0 and drafted[16] == 1


def test_of_a_large_batch_some_texts_are_walked_far_enough_for_whole_drafts():
    row = np.array([1, 2, 3, 4, 5] * 4000, np.int32)  # longer than what is looked up in
    texts, since, known = np.stack([row] * 32), np.full(32, 19000), np.full(32, 19500)
    [(drafted, accepted)] = replay.walk(texts, since, known, PromptLookup(), (16,))
    assert drafted.tolist() == accepted.tolist() == [0] * 15 + [4, 4]  # 17 and 15 tokens of four texts
    drafted, accepted = replay.replay(list(texts), PromptLookup(), 16)
    assert drafted.tolist() == accepted.tolist() and drafted.sum() == 8  # two of each of four


@pytest.mark.parametrize("many", [0, 1 << 40], ids=["long matches first", "all pairs"])
@pytest.mark.parametrize("drafter", [PromptLookup(), PromptLookup(max_ngram=3, min_ngram=1), PromptLookup(64, 5)])
def test_a_replay_on_the_host_drafts_what_the_loop_would(drafter, many, monkeypatch):
    monkeypatch.setattr(prompt_lookup, "_MANY", many)
    texts = np.random.default_rng(1).integers(0, 3, (40, 50)).astype(np.int32)
    texts[:20, 30:], known = texts[:20, :20], np.arange(5, 45).astype(np.int32)
    context = Context(jnp.asarray(texts), jnp.asarray(known), jnp.ones(40, bool), *[None] * 5)
    draft = jax.device_get(drafter.propose((), (), context, parse_tree("chain:8")))
    found = [drafter.replay(text, one[None], 8) for text, one in zip(texts, known, strict=True)]
    chains, valid = (np.concatenate(parts) for parts in zip(*found, strict=True))
    np.testing.assert_array_equal(valid, draft.valid)
    np.testing.assert_array_equal(chains[valid], draft.tokens[valid])
    assert 0 < valid.sum() < valid.size or drafter.min_ngram == 1


@pytest.mark.parametrize("changed", [{}, {"_NEAR": 20}, {"_FACTOR": np.uint64(0)}], ids=["all", "near", "one name"])
def test_a_replay_at_many_places_of_a_text_that_goes_round_is_that_at_each(changed, monkeypatch):
    random, drafter = np.random.default_rng(2), PromptLookup()
    text = np.concatenate([random.integers(0, 9, 60), np.tile(random.integers(0, 9, 13), 12), random.integers(0, 9, 9)])
    text, known = text.astype(np.int32), np.arange(1, 200, dtype=np.int32)
    known = known[150:] if "_NEAR" in changed else known  # ends that are farther back than that are left out
    each = [drafter.replay(text, known[index : index + 1], 8) for index in range(len(known))]
    for name, value in {"_MANY": 0, **changed}.items():
        monkeypatch.setattr(prompt_lookup, name, value)
    chains, valid = drafter.replay(text, known, 8)
    np.testing.assert_array_equal(valid, np.concatenate([one[1] for one in each]))
    np.testing.assert_array_equal(chains[valid], np.concatenate([one[0] for one in each])[valid])
    assert 0.7 * len(known) < valid[:, 0].sum() <= len(known)
