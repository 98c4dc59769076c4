"""Prompt lookup against its definition in plain Python; drafters by name."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from specsa_jax.checkpoints import CheckpointError
from specsa_jax.drafting import Context, DraftModel, PromptLookup, TrainedHead, drafter_from_name, parse_tree

ROWS, SIZE = 4, 24
RULES = [PromptLookup(max_ngram=3, min_ngram=1), PromptLookup(), PromptLookup(max_ngram=2, min_ngram=2)]


@functools.lru_cache
def proposer(rule, length):
    template = parse_tree(f"chain:{length}")

    def propose(tokens, known):
        context = Context(tokens, known, known > 0, None, None, None, None, None)
        return rule.propose((), (), context, template)

    return jax.jit(propose)


def propose(rule, texts, length, size=SIZE, filler=0):
    """The drafts of a ragged batch, as lists; ``filler`` lies behind every text."""
    tokens = np.full((len(texts), size), filler, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    known = jnp.asarray([len(text) for text in texts], jnp.int32)
    draft = proposer(rule, length)(jnp.asarray(tokens), known)
    assert draft.tokens.shape == (len(texts), length) and draft.tokens.dtype == jnp.int32
    return [row[valid].tolist() for row, valid in zip(np.asarray(draft.tokens), np.asarray(draft.valid), strict=True)]


def expected_draft(rule, text, length):
    """Tries every earlier place; continues by copying, the copied tokens included."""
    best, best_end = 0, 0
    for end in range(1, len(text)):
        ngram = 0
        while ngram < min(end, rule.max_ngram) and text[end - 1 - ngram] == text[-1 - ngram]:
            ngram += 1
        if ngram >= best:
            best, best_end = ngram, end
    if best < rule.min_ngram:
        return []
    longer = list(text)
    for place in range(length):
        longer.append(longer[best_end + place])
    return longer[len(text) :]


TEXT = st.integers(1, 3).flatmap(lambda letters: st.lists(st.integers(0, letters), min_size=1, max_size=SIZE))


@pytest.mark.parametrize("rule", RULES, ids=str)
@hypothesis.given(texts=st.lists(TEXT, min_size=ROWS, max_size=ROWS), filler=st.integers(0, 4))
@hypothesis.settings(max_examples=150)
def test_prompt_lookup_continues_the_longest_most_recent_match(rule, texts, filler):
    """Ragged rows on small alphabets; what lies behind a text, here equal to its tokens or not, is never read."""
    assert propose(rule, texts, 7, filler=filler) == [expected_draft(rule, text, 7) for text in texts]


@pytest.mark.parametrize(
    "text, draft",
    [
        ([1, 2, 3, 4, 9, 1, 2], [3, 4, 9, 1, 2]),  # the copy goes on into the match itself
        ([1, 2, 5, 1, 2, 6, 0, 1, 2], [6, 0, 1, 2, 6]),  # the most recent of equals
        ([3, 1, 2, 5, 4, 1, 2, 6, 3, 1, 2], [5, 4, 1, 2, 6]),  # the longest before the most recent
        ([7, 7, 7], [7, 7, 7, 7, 7]),  # overlapping the end: periodic
        ([4, 1, 2, 1, 2, 1, 2], [1, 2, 1, 2, 1]),
        ([1, 2, 3, 4], []),
        ([5, 1, 6, 1], []),  # one token is shorter than min_ngram
        ([5], []),
    ],
)
def test_prompt_lookup_on_texts_that_explain_it(text, draft):
    assert propose(PromptLookup(), [text] * ROWS, 5) == [draft] * ROWS


def test_prompt_lookup_counts_longer_matches_as_max_ngram():
    """So of two matches beyond it the most recent wins, although the other is longer."""
    text = [1, 2, 3, 4, 8, 0, 2, 3, 4, 9, 1, 2, 3, 4]
    assert propose(PromptLookup(max_ngram=3), [text], 1)[0] == [9]
    assert propose(PromptLookup(max_ngram=4), [text], 1)[0] == [8]


def test_prompt_lookup_reads_a_full_buffer_and_drafts_longer_than_it():
    assert propose(PromptLookup(min_ngram=1), [[1, 2, 3, 1]], 9, size=4)[0] == [2, 3, 1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize("min_ngram, max_ngram", [(0, 8), (3, 2), (-1, -1), (1, 65)])
def test_prompt_lookup_refuses_ngrams_out_of_order_or_range(min_ngram, max_ngram):
    with pytest.raises(ValueError, match=f"got min_ngram {min_ngram} and max_ngram {max_ngram}, expected 1 <= min"):
        PromptLookup(max_ngram=max_ngram, min_ngram=min_ngram)


@pytest.mark.parametrize("field", ["max_ngram", "min_ngram", "matches"])
@pytest.mark.parametrize("value", ["8", 2.5, True, None])
def test_prompt_lookup_refuses_what_is_no_integer(field, value):
    with pytest.raises(ValueError, match=f"PromptLookup: got {field} {value!r}, expected an integer"):
        PromptLookup(**{field: value})


@pytest.mark.parametrize("drafter", [DraftModel, TrainedHead])
@pytest.mark.parametrize("path", [7, None])
def test_drafters_refuse_what_is_no_path(drafter, path):
    with pytest.raises(CheckpointError, match=f"checkpoint: got {path}, expected a path or a packaged name"):
        drafter(path)


def test_drafters_have_names():
    assert drafter_from_name("lookup") == PromptLookup()
    assert drafter_from_name("none") is None
    with pytest.raises(ValueError, match="drafter: got 'medusa', expected one of lookup, head"):
        drafter_from_name("medusa")


def test_drafters_are_frozen_and_compare_by_value():
    """They are part of a static argument: a mutable or identity-hashed one would retrace or go stale."""
    assert PromptLookup() == PromptLookup() and hash(PromptLookup()) == hash(PromptLookup())
    assert PromptLookup(max_ngram=4) != PromptLookup()
    with pytest.raises(AttributeError):
        PromptLookup().max_ngram = 3
