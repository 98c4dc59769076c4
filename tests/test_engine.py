"""The engine on the embedded model and real prompts: held-out files of the standard library."""

import itertools
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest
from reference_params import random_params, random_tokens, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import specsa_jax
from specsa_jax import CapacityError, CheckpointError, Engine, PromptError, PromptLookup, SamplingParams, Strategy, cli
from specsa_jax.drafting import DraftModel, Target
from specsa_jax.planning import ProfileError
from specsa_jax.results import Output
from specsa_jax.runtime import bucket
from specsa_jax.training import is_held_out

HOLDOUT = 0.05  # the embedded model's


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("embedded")


@pytest.fixture(scope="module")
def held_out(engine):
    """Token ids of the standard library's held-out files, longest first."""
    root = Path(sysconfig.get_path("stdlib"))
    rows = []
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root).as_posix()
        if "-packages/" in relative or not is_held_out(relative, HOLDOUT):
            continue
        try:
            ids = engine.tokenizer.encode(file.read_text(encoding="utf-8")).ids
        except UnicodeDecodeError:
            continue
        rows.append(ids)
    return sorted(rows, key=len, reverse=True)


def cut(held_out, count, pages, seed):
    """``count`` prompts from random places; prompt i fills pages[i mod …] pages of 64, the last one partly."""
    random = np.random.default_rng(seed)
    prompts = []
    for i in range(count):
        wanted = 64 * pages[i % len(pages)] - int(random.integers(32, 64))
        files = [row for row in held_out if len(row) >= wanted]
        row = files[int(random.integers(len(files)))]
        start = int(random.integers(len(row) - wanted + 1))
        prompts.append(row[start : start + wanted])
    return prompts


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, pages, batch", [(196, (1,), 28), pytest.param(3, (9, 11), 3, marks=pytest.mark.long), (1, (17,), 1)]
)
def test_greedy_speculation_gives_the_tokens_of_decoding_one_by_one(engine, held_out, count, pages, batch):
    """200 held-out prompts of 1 to 1056 tokens, alone and in ragged batches; 8 blocks of 64 tokens are selected."""
    prompts = cut(held_out, count, pages, seed=count)
    speculated = 0
    for start in range(0, count, batch):
        part = prompts[start : start + batch]
        plain = engine.generate(part, max_new_tokens=8, speculate=False)
        drafted = engine.generate(part, max_new_tokens=8)
        for a, b in zip(plain, drafted, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
            assert a.finish == b.finish
        speculated += drafted.stats.accepted
    assert speculated > count // 2  # drafts were really accepted


@pytest.mark.slow
@pytest.mark.long
def test_the_default_prompt_is_long_held_out_and_continued_with_good_drafts(engine):
    """``make demo``: the same tokens, two a step at least, and text that is no single line for ever."""
    ((_, prompt),) = cli._prompts([])
    assert is_held_out(cli.DEFAULT_PROMPT, HOLDOUT) and prompt.endswith(cli.DEFAULT_CUT)
    assert 4000 < len(engine.tokenizer.encode(prompt).ids) < 6000
    plain, drafted = engine.generate(prompt, speculate=False), engine.generate(prompt)
    assert plain[0].tokens.tolist() == drafted[0].tokens.tolist()
    assert drafted.stats.mean_acceptance_length >= 2
    lines = [line for line in drafted[0].text.splitlines() if line.strip()]
    assert len(set(lines)) >= 6 and "def " in drafted[0].text
    assert not any(a == b == c for a, b, c in zip(lines, lines[1:], lines[2:], strict=False))


@pytest.mark.slow
def test_one_trace_per_strategy_whatever_the_call(engine, held_out):
    prompts = cut(held_out, 6, (1, 2), seed=1)
    strategies = [Strategy(PromptLookup(min_ngram=3), "chain:3"), Strategy(PromptLookup(min_ngram=3), "chain:2")]
    for pair, strategy in itertools.product(range(0, 6, 2), strategies):
        for temperature in (0.0, 0.8):
            engine.generate(prompts[pair : pair + 2], 8, temperature, strategy=strategy, top_k=3, seed=pair)
    assert [engine.decoder.traces[strategy] for strategy in strategies] == [1, 1]


@pytest.mark.slow
def test_score_is_the_law_that_greedy_decoding_follows(engine, held_out):
    (prompt,) = cut(held_out, 1, (3,), seed=2)
    result = engine.generate([prompt], max_new_tokens=16)
    tokens = np.concatenate([prompt, result[0].tokens])
    scores = engine.score(tokens)
    assert scores.shape == (len(tokens), engine.config.vocab_size) and scores.dtype == np.float32
    np.testing.assert_allclose(np.exp(scores.astype(np.float64)).sum(axis=1), 1.0, atol=1e-4)
    np.testing.assert_array_equal(scores[len(prompt) - 1 : -1].argmax(axis=1), result[0].tokens)
    assert result[0].logprobs.dtype == np.float32
    np.testing.assert_allclose(result[0].logprobs, scores[len(prompt) - 1 : -1].max(axis=1), atol=1e-3)


def test_score_prefers_real_code_to_shuffled_code(engine, held_out):
    (real,) = cut(held_out, 1, (4,), seed=3)
    shuffled = np.random.default_rng(0).permutation(real)

    def loss(tokens):
        scores = engine.score(tokens)
        return -scores[np.arange(len(tokens) - 1), tokens[1:]].mean()

    assert loss(np.asarray(real)) + 2.0 < loss(shuffled)


@pytest.mark.slow
def test_streamed_text_adds_up_and_equals_the_unstreamed(engine, held_out):
    prompts = cut(held_out, 2, (1, 2), seed=4)
    pieces = {0: "", 1: ""}
    stream = engine.stream(prompts, max_new_tokens=24)
    first = next(stream)
    pieces[first.index] += first.text
    for chunk in stream:
        pieces[chunk.index] += chunk.text
    whole = engine.generate(prompts, max_new_tokens=24)
    assert [pieces[0], pieces[1]] == [g.text for g in stream.result] == [g.text for g in whole]
    assert list(stream) == [] and stream.result is not None  # it has ended, and still has its result
    seen = []
    engine.generate(prompts, max_new_tokens=24, on_chunk=seen.append)
    assert "".join(chunk.text for chunk in seen if chunk.index == 1) == pieces[1]


@pytest.mark.slow
def test_a_stop_string_ends_its_sequence_alone_and_is_cut_off(engine, held_out):
    prompts = cut(held_out, 2, (1, 2), seed=5)
    free = engine.generate(prompts, max_new_tokens=24)
    words = free[0].text.split()
    stop = max(words, key=len)
    held = engine.generate(prompts, max_new_tokens=24, stop=[stop])
    assert held[0].finish == "stop" and held[0].text == free[0].text[: free[0].text.find(stop)] != free[0].text
    assert held[0].tokens.tolist() == free[0].tokens[: len(held[0].tokens)].tolist()
    if stop not in free[1].text:
        assert held[1].text == free[1].text and held[1].finish == free[1].finish


def test_stop_strings_across_tokens_are_never_shown(engine):
    output = Output(engine.tokenizer, 0, ("abc",), ())
    shown = ""
    for tokens in (engine.tokenizer.encode("x = a").ids, engine.tokenizer.encode("x = ab").ids):
        shown += output.update(np.asarray(tokens), False)
    assert "a" not in shown
    shown += output.update(np.asarray(engine.tokenizer.encode("x = abcd").ids), False)
    assert shown == output.text == "x = " and output.finish == "stop"


@pytest.mark.slow
def test_sampling_parameters_are_per_prompt_and_seeds_decide(engine, held_out):
    prompts = cut(held_out, 1, (1,), seed=6) * 3
    greedy, hot = SamplingParams(), SamplingParams(temperature=1.0, seed=11)
    result = engine.generate(prompts, 16, sampling=[greedy, hot, hot])
    assert result[1].tokens.tolist() == result[2].tokens.tolist() != result[0].tokens.tolist()
    other = engine.generate(prompts, 16, sampling=[hot, SamplingParams(temperature=1.0, seed=12), greedy])
    assert other[0].tokens.tolist() == result[1].tokens.tolist() != other[1].tokens.tolist()


@pytest.mark.slow
def test_sampled_speculation_draws_what_sampling_one_by_one_draws(engine, held_out):
    prompts = cut(held_out, 2, (1, 2), seed=7)
    plain = engine.generate(prompts, 24, temperature=0.7, top_p=0.9, seed=3, speculate=False)
    drafted = engine.generate(prompts, 24, temperature=0.7, top_p=0.9, seed=3)
    assert [g.tokens.tolist() for g in plain] == [g.tokens.tolist() for g in drafted]


@pytest.mark.slow
def test_a_strict_engine_gives_the_bits_of_decoding_each_prompt_alone():
    """A tiny model: greedy beside sampled, in a ragged batch that drafts trees. Page tables have one width for all."""
    config = tiny_model(layers=1)
    tokenizer = Tokenizer(WordLevel({f"t{token}": token for token in range(50)}, "t0"))
    engine = Engine(config, random_params(config, seed=3), tokenizer, max_length=96, precision="strict")
    prompts = [random_tokens(config, 5).tolist() * 3, random_tokens(config, 40, seed=1).tolist()]
    sampling = [SamplingParams(), SamplingParams(temperature=0.5, top_p=0.9, seed=4)]
    strategy = Strategy(PromptLookup(min_ngram=1), "best:6:4", precision="strict")
    drafted = engine.generate(prompts, 24, sampling=sampling, strategy=strategy)
    assert drafted.stats.strategy.endswith("best:6:4 strict") and drafted.stats.accepted > 0
    for prompt, params, together in zip(prompts, sampling, drafted, strict=True):
        (alone,) = engine.generate([prompt], 24, sampling=[params], speculate=False)
        assert alone.tokens.tolist() == together.tokens.tolist()
        assert alone.logprobs.tobytes() == together.logprobs.tobytes()


def test_a_draft_model_with_another_tokenizer_is_refused(engine):
    other = Tokenizer(WordLevel({"a": 0, "b": 1}, "a"))
    draft_model = DraftModel("embedded")
    assert draft_model.config == engine.config
    with pytest.raises(ValueError, match="drafter: the draft model embedded has another tokenizer than the target"):
        draft_model.load(Target(engine.config, engine.params, other, engine.dtype))


def test_an_engine_of_no_precision_class_is_refused():
    with pytest.raises(ValueError, match="precision: got 'fp8', expected one of 'exact', 'strict', 'approx'"):
        Engine.from_pretrained("embedded", precision="fp8")


def test_an_engine_with_a_profile_that_is_none_is_refused():
    with pytest.raises(ValueError, match="profile: got 3, expected a Profile, or the path of its file"):
        Engine.from_pretrained("embedded", profile=3)


@pytest.mark.parametrize("dtype", ["int8", "float64", "half a float"])
def test_an_engine_of_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype: got '?{dtype}'?, expected bfloat16 or float32"):
        Engine.from_pretrained("embedded", dtype=dtype)


@pytest.mark.slow
def test_statistics_are_consistent(engine, held_out):
    prompts = cut(held_out, 2, (1, 2), seed=8)
    result = engine.generate(prompts, max_new_tokens=24)
    stats = result.stats
    assert stats.new_tokens == sum(len(g.tokens) for g in result)
    assert stats.prompt_tokens == sum(map(len, prompts))
    assert sum(stats.accepted_histogram) == stats.sequence_steps <= 2 * stats.steps
    assert stats.accepted == sum(n * count for n, count in enumerate(stats.accepted_histogram))
    # Every step gives its accepted drafts and one more, but the last may be cut by the budget.
    assert stats.new_tokens <= stats.accepted + stats.sequence_steps <= stats.new_tokens + 2 * 5
    assert stats.mean_acceptance_length == pytest.approx(1 + stats.accepted / stats.sequence_steps)
    assert all(0 <= rate <= 1 for rate in stats.acceptance_per_position) and len(stats.acceptance_per_position) == 5
    assert stats.decode_seconds > 0 and stats.prefill_seconds > 0 and stats.cache.total > 0


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"prompts": []}, PromptError, "batch of 0"),
        ({"prompts": [""]}, PromptError, r"prompts\[0\].*empty"),
        ({"prompts": ["x", []]}, PromptError, r"prompts\[1\].*empty"),
        ({"prompts": [[5, 4096]]}, PromptError, "4096, expected 0 to 4095"),
        ({"prompts": [[-1]]}, PromptError, "-1, expected 0 to 4095"),
        ({"prompts": [[0.5]]}, PromptError, "float64"),
        ({"prompts": 7}, PromptError, "prompts: got int"),
        ({"prompts": [[1] * 8192]}, CapacityError, "8192 tokens and max_new_tokens = 256 make 8448, .* at most 8192"),
        ({"prompts": ["x"], "max_new_tokens": 9000}, CapacityError, "9000"),
        ({"prompts": ["x"], "max_new_tokens": 0}, PromptError, "max_new_tokens: got 0"),
        ({"prompts": ["x"], "max_new_tokens": 1.5}, PromptError, "max_new_tokens: got 1.5"),
        ({"prompts": ["x"], "temperature": -1.0}, ValueError, "temperature: got -1.0"),
        ({"prompts": ["x"], "temperature": float("nan")}, ValueError, "temperature: got nan"),
        ({"prompts": ["x"], "top_p": 0.0}, ValueError, "top_p: got 0.0"),
        ({"prompts": ["x"], "top_k": -1}, ValueError, "top_k: got -1"),
        ({"prompts": ["x", "y"], "sampling": [SamplingParams()]}, PromptError, "got 1 parameter sets"),
        ({"prompts": ["x"], "sampling": [{"temperature": 1}]}, PromptError, "sampling: .*expected a list of Sampling"),
        ({"prompts": ["x"], "sampling": 7}, PromptError, "sampling: got 7"),
        ({"prompts": ["x"], "seed": -1}, ValueError, "seed: got -1"),
        ({"prompts": ["x"], "seed": 2**32}, ValueError, "seed: got 4294967296"),
        ({"prompts": ["x"], "seed": 0.5}, ValueError, "seed: got 0.5"),
        ({"prompts": ["x"], "seed": "0"}, ValueError, "seed: got '0'"),
        ({"prompts": ["x"], "stop": [""]}, PromptError, r"stop: got \('',\)"),
        ({"prompts": ["x"], "stop": ""}, PromptError, r"stop: got \('',\)"),
        ({"prompts": ["x"], "stop": None}, PromptError, r"stop: got \(None,\)"),
        ({"prompts": ["x"], "strategy": Strategy(tree="chain:65")}, ValueError, "65 tokens deep, expected at most"),
        ({"prompts": ["x"], "strategy": "chain:5"}, PromptError, "strategy: got 'chain:5', expected a Strategy"),
        ({"prompts": ["x"], "strategy": np.ones(2)}, PromptError, r"strategy: got array\(\[1., 1.\]\), expected a "),
        ({"prompts": ["x"], "on_chunk": 3}, PromptError, "on_chunk: got 3, expected a function"),
        ({"prompts": {"a": 1}}, PromptError, "prompts: got dict, expected texts or lists"),
        ({"prompts": {"a", "b"}}, PromptError, "prompts: got set, expected texts or lists"),
        ({"prompts": [5, 6]}, PromptError, r"prompts\[0\]: got int64 of shape \[\], expected a text or a list"),
        ({"prompts": [[1, [2]]]}, PromptError, r"prompts\[0\]: got \[1, \[2\]\], expected a text or a list"),
        ({"prompts": ["x", "\ud800"]}, PromptError, r"prompts\[1\]: got .*ud800., expected a text or a list"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(engine, arguments, error, words):
    before = sum(engine.decoder.traces.values())
    with pytest.raises(error, match=words):
        engine.generate(**arguments)
    assert sum(engine.decoder.traces.values()) == before


@pytest.mark.parametrize(
    "tokens, error, words",
    [
        ([], PromptError, "tokens: is empty"),
        ([4096], PromptError, "tokens: got token id 4096, expected 0 to 4095"),
        ([[1, 2]], PromptError, r"tokens: got int64 of shape \[1, 2\]"),
        ([1] * 8193, CapacityError, "tokens: got 8193, expected at most 8192"),
    ],
)
def test_tokens_that_cannot_be_scored_are_refused(engine, tokens, error, words):
    with pytest.raises(error, match=words):
        engine.score(tokens)


def test_a_cache_larger_than_allowed_is_refused_with_the_numbers():
    engine = Engine.from_pretrained("embedded", max_cache_bytes=10_000)
    with pytest.raises(CapacityError, match=r"cache of [\d,]+ bytes .* at most 10,000"):
        engine.generate("x = 1", max_new_tokens=4)


@pytest.mark.parametrize("options, error, words", [
    ({"max_cache_bytes": "x"}, PromptError, "max_cache_bytes: got 'x', expected an integer"),
    ({"end_tokens": 5}, PromptError, "end_tokens: got int64 of shape"),
    ({"end_tokens": "xy"}, PromptError, "end_tokens: got 'xy', expected a list of token ids"),
    ({"end_tokens": [99999]}, PromptError, "end_tokens: got token id 99999, expected 0 to 4095"),
    ({"checkpoint": 5}, CheckpointError, "checkpoint: got 5, expected the path"),
    ({"allow_mismatch": "x"}, ProfileError, "allow_mismatch: got 'x', expected True or False"),
])  # fmt: skip
def test_an_engines_bad_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        Engine.from_pretrained("embedded", **options)


def test_what_could_not_be_generated_is_not_compiled(engine):
    with pytest.raises(CapacityError, match="prompt_tokens, max_new_tokens: got 1000000000000 and 256, expected at m"):
        engine.warmup(prompt_tokens=10**12)


def test_unknown_and_damaged_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nonesuch.*embedded"):
        Engine.from_pretrained("nonesuch")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Engine.from_pretrained(tmp_path)


@pytest.mark.parametrize("tree", ["chain:0", "chain:128", "chain", "4-2-0", "", None])
def test_a_tree_that_cannot_be_read_is_refused(tree):
    with pytest.raises(ValueError, match="^tree: got"):
        Strategy(tree=tree)


def test_a_drafter_that_is_none_is_refused():
    with pytest.raises(ValueError, match="drafter: got 'lookup', expected a Drafter"):
        Strategy("lookup")


def test_buckets_waste_at_most_an_eighth():
    for count in range(1, 3000):
        assert count <= bucket(count) <= count + max(0, count // 8)


def test_the_version_is_the_distributions():
    from importlib.metadata import version

    assert specsa_jax.__version__ == version("specsa-jax")


@pytest.mark.gpu
def test_speculation_on_the_gpu_gives_the_tokens_of_decoding_one_by_one(held_out):
    engine = Engine.from_pretrained("embedded", dtype=jax.numpy.float32)
    prompts = cut(held_out, 8, (1, 3, 9, 17), seed=9)
    plain = engine.generate(prompts, 64, speculate=False)
    drafted = engine.generate(prompts, 64)
    assert [g.tokens.tolist() for g in plain] == [g.tokens.tolist() for g in drafted]
