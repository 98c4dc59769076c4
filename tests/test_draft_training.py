"""Training of a draft head: the run, its interruptions, what is refused; the head's checkpoint."""

import dataclasses
import functools
import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from specsa_jax import Engine, Strategy, checkpoints, model
from specsa_jax.checkpoints import CheckpointError, draft_head
from specsa_jax.config import ConfigError, ModelConfig, NSAConfig
from specsa_jax.drafting import TrainedHead, drafter_from_name, head_model, parse_tree
from specsa_jax.drafting.head_model import HeadConfig
from specsa_jax.training import TrainingError, draft_cli, draft_data, draft_step, report
from specsa_jax.training.draft import train_draft
from specsa_jax.training.draft_config import DraftConfig
from specsa_jax.training.draft_eval import acceptance_lengths
from specsa_jax.training.tokenizer import train_tokenizer

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})

TARGET = ModelConfig(
    vocab_size=300, hidden=16, layers=2, intermediate=16, max_length=128,
    nsa=NSAConfig(num_heads=2, num_kv_heads=1, head_dim=8, compress_block=8, compress_stride=4, select_block=8,
                  num_selected=3, window=8, compression="weighted"),
)  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A directory with 30 Python files, and in ``target/`` a model whose card names them."""
    root = tmp_path_factory.mktemp("draft")
    (root / "files").mkdir()
    draw = random.Random(0)
    texts = []
    for i in range(30):
        lines = [f"def function_{draw.randrange(9)}(x):\n    return x + {draw.randrange(99)}\n" for _ in range(12)]
        texts.append("\n".join(lines))
        (root / "files" / f"module_{i}.py").write_text(texts[-1])
    card = {"config": {"data": [str(root / "files")], "holdout": 0.3}}
    params = model.init_params(TARGET, 0)
    checkpoints.save(root / "target", params, TARGET, train_tokenizer(texts, 300), card)
    return root / "target"


@pytest.fixture
def config(target, tmp_path):
    return DraftConfig(
        target=str(target), output=str(tmp_path / "run"), context=40, new_tokens=24, generated=24, generation_batch=12,
        batch=4, steps=8, warmup=1, unroll=2, chain=2, window=16, learning_rate=1e-2, dtype="f32", eval_every=0,
        eval_rows=6, save_every=3,
    )  # fmt: skip


def losses_of(config):
    return {r["step"]: r["loss"] for r in report.read_log(Path(config.output) / "log.jsonl")}


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long
def test_run_learns_to_draft_and_leaves_what_it_documents(config, target):
    records = []
    config = dataclasses.replace(config, steps=60, save_every=0, eval_every=20)
    summary = train_draft(config, records.append)
    assert (summary.stopped, summary.steps, summary.tokens) == ("completed", 60, 60 * 4 * 40)
    log = report.read_log(Path(config.output) / "log.jsonl")
    measured = [r for r in log if "acceptance_length" in r]
    assert [r["step"] for r in measured] == [20, 40, 60]
    assert log[-1]["loss"] < log[0]["loss"] / 2 and len(log[-1]["matches"]) == 2
    assert measured[-1]["held_out_loss"] < measured[0]["held_out_loss"]
    assert summary.evaluation.acceptance_length == measured[-1]["acceptance_length"] > 1.4
    assert summary.evaluation.matches[0] > 0.5 and summary.evaluation.steps > 6
    files = {p.name for p in Path(config.output).iterdir()}
    assert {"run.json", "generated.npz", "log.jsonl", "draft.png", "state", "draft"} <= files

    head, whole = draft_head.load(summary.head), checkpoints.load(target)
    draft_head.check_target(head, whole.config, whole.params, whole.tokenizer)
    assert head.config == HeadConfig.of(TARGET, window=16) and head.metadata["recipe"] == config.command()
    assert {x.dtype for x in jax.tree.leaves(head.params)} == {jnp.dtype(jnp.bfloat16)}
    assert head.metadata["result"]["evaluation"]["acceptance_length"] == summary.evaluation.acceptance_length
    decoding_accepts_what_was_predicted(config, head, whole)


def decoding_accepts_what_was_predicted(config, head, target):
    """Steps by accepted drafts, on the held-out prompts, one for one; and trees give the tokens of no drafts at all."""
    with np.load(Path(config.output) / "eval-6.npz") as saved:
        rows = saved["rows"][saved["ends"] == config.context]
    assert len(rows) >= 4
    params = jax.tree.map(lambda x: x.astype(jnp.float32), head.params)
    batch = np.resize(rows, (4, config.context))  # the shape that training has compiled
    _, match, _ = draft_step.make_evaluate(head.config, config)(params, target.params, batch)
    expected, new = np.zeros(3, int), 20
    for matches in np.moveaxis(np.asarray(match), 1, 0):
        known = 16
        while known < 16 + new:
            accepted = 0
            while accepted < 2 and matches[accepted, known - 2 + accepted]:
                accepted += 1
            expected[accepted] += 1
            known += accepted + 1
    engine = Engine(TARGET, target.params, target.tokenizer, dtype=jnp.float32)
    prompts, drafter = batch[:, :16].tolist(), TrainedHead(Path(config.output))
    result = engine.generate(prompts, new, strategy=Strategy(drafter, "chain:2"))
    assert result.stats.accepted_histogram == tuple(expected)
    for row, generation in zip(batch, result, strict=True):
        np.testing.assert_array_equal(generation.tokens, row[16 : 16 + new])
    for tree in ("2-2-1", "best:6:3"):
        grown = engine.generate(prompts, new, strategy=Strategy(drafter, tree))
        assert [g.tokens.tolist() for g in grown] == [g.tokens.tolist() for g in result]
        assert grown.stats.mean_acceptance_length >= result.stats.mean_acceptance_length

    other = Engine(TARGET, model.init_params(TARGET, 1), target.tokenizer, dtype=jnp.float32)
    with pytest.raises(ValueError, match="other|weights"):
        other.generate(prompts, new, strategy=Strategy(drafter, "chain:2"))
    with pytest.raises(ValueError, match="window"):
        drafter.check(TARGET, parse_tree("chain:16"))
    with pytest.raises(ValueError, match="max_length 128, not 64"):
        drafter.check(dataclasses.replace(TARGET, max_length=64), parse_tree("chain:2"))


@pytest.mark.slow
@pytest.mark.long
def test_killed_runs_resume_with_the_same_losses_and_other_runs_are_refused(config, tmp_path):
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    train_draft(whole)

    def fail(record):
        if record.get("step") == 5:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train_draft(config, fail)
    with pytest.raises(TrainingError, match="holds a run"):
        train_draft(config)
    with pytest.raises(TrainingError, match="learning_rate: was 0.01, now 0.02"):
        train_draft(dataclasses.replace(config, resume=True, learning_rate=0.02))
    summary = train_draft(dataclasses.replace(config, resume=True))
    assert summary.steps == 8 and losses_of(config) == losses_of(whole)  # bit for bit


@pytest.mark.slow
@pytest.mark.long
def test_a_time_limit_ends_the_run_with_a_head_and_lowers_the_rate_on_the_way(config):
    config = dataclasses.replace(config, steps=10**6, save_every=0, time_limit=1e-3)
    summary = train_draft(config)
    assert summary.stopped == "time limit" and summary.head and summary.steps < 10
    assert draft_step.learning_rate(config, 500, time_spent=1.0) == 0.0
    assert draft_step.learning_rate(config, 500, time_spent=0.5) == pytest.approx(config.learning_rate / 2, rel=0.01)


def test_generated_rows_are_prompts_out_of_the_files_and_what_the_target_makes_of_them(config):
    train_draft(dataclasses.replace(config, steps=2, save_every=0, generated=17, sampled=0.0))
    with np.load(Path(config.output) / "generated.npz") as saved:
        rows, ends = saved["rows"], saved["ends"]
    assert rows.shape == (17, 40) and (ends > 16).all()
    target = checkpoints.load(config.target)
    hidden = jit(lambda p, t: model.hidden_states(TARGET, p, t))(target.params, rows)
    greedy = np.asarray(model.head(TARGET, target.params, hidden)).argmax(-1)
    for row, end, best in zip(rows, ends, greedy, strict=True):
        np.testing.assert_array_equal(row[16:end], best[15 : end - 1])


# --- what is measured ------------------------------------------------------------------------------------------------


def test_laws_are_compared_at_every_depth_whatever_the_chunk(config):
    head_config = HeadConfig.of(TARGET, window=16)
    target, params = model.init_params(TARGET, 0), head_model.init_params(head_config, 1)
    rows = np.random.default_rng(0).integers(1, 300, (2, 20)).astype(np.int32)
    whole, parts = jit(lambda *args: [draft_step.compare(head_config, config, *args, chunk=n) for n in (0, 7)])(
        params, target, rows
    )
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    divergence, match, overlap = map(np.asarray, whole)
    assert divergence.shape == (2, 2, 19) and (divergence > 0).all() and (overlap > 0).all() and (overlap < 1).all()
    assert match.dtype == bool


def test_predicted_acceptance_walks_as_decoding_does():
    """By hand: drafts stand while their depth matches; the next step begins behind the target's own token."""
    match = np.zeros((2, 1, 12), bool)
    match[0, 0, [2, 5, 8]] = True  # the first draft of the steps that begin with 4, 7 and 10 known tokens stands
    match[1, 0, 3] = True  # and the second of the first
    gained = acceptance_lengths(match, 4, np.array([10]), chain=2)
    assert gained.tolist() == [3, 2]  # 4 → 7 → 9; the last one's chain would pass the end


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"context": 200}, "max_length"), ({"features": (1, 5)}, "features"), ({"window": 8}, "window"),
     ({"target": "nowhere"}, "nowhere"), ({"data": ("nowhere",)}, "nowhere"), ({"holdout": 0.001}, "hold out")],
)  # fmt: skip
def test_unusable_input_is_refused_before_any_work(config, changes, named):
    with pytest.raises((ConfigError, TrainingError, CheckpointError), match=named):
        train_draft(dataclasses.replace(config, **changes))
    assert not (Path(config.output) / "run.json").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"chain": 3}, "chain"), ({"mix": 1.5}, "mix"), ({"new_tokens": 40}, "new_tokens"), ({"unroll": 0}, "unroll"),
     ({"warmup": 8}, "warmup"), ({"temperature": 0.0}, "temperature"), ({"dtype": "f16"}, "dtype")],
)  # fmt: skip
def test_contradictory_options_are_refused(config, changes, named):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(config, **changes)


def test_a_target_whose_card_names_no_files_needs_some(config, target, tmp_path):
    whole = checkpoints.load(target)
    checkpoints.save(tmp_path / "bare", whole.params, TARGET, whole.tokenizer, {})
    with pytest.raises(ConfigError, match="data: got nothing"):
        train_draft(dataclasses.replace(config, target=str(tmp_path / "bare")))


@pytest.fixture
def head(target):
    whole, config = checkpoints.load(target), HeadConfig.of(TARGET, window=16)
    print_, digest = draft_head.fingerprint(TARGET, whole.params), draft_head.tokenizer_digest(whole.tokenizer)
    return draft_head.DraftHead(head_model.init_params(config, 0), config, print_, digest, {"note": "fresh"})


def test_a_head_belongs_to_its_target_alone(head, target):
    whole = checkpoints.load(target)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole.params)
    draft_head.check_target(head, TARGET, rounded, whole.tokenizer)
    with pytest.raises(CheckpointError, match="other|weights"):
        draft_head.check_target(head, TARGET, model.init_params(TARGET, 1), whole.tokenizer)
    with pytest.raises(CheckpointError, match="max_length 128, not 64"):
        smaller = dataclasses.replace(TARGET, max_length=64)
        draft_head.check_target(head, smaller, whole.params, whole.tokenizer)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        other = train_tokenizer(["a b c d e f"], 300)
        draft_head.check_target(head, TARGET, whole.params, other)


def test_a_head_is_read_from_its_directory_or_its_targets(head, target, tmp_path):
    with pytest.raises(CheckpointError, match="has no draft head"):
        drafter_from_name("head", str(target))
    with pytest.raises(CheckpointError, match="nowhere"):
        drafter_from_name("head:nowhere")
    copy = shutil.copytree(target, tmp_path / "copy")
    draft_head.save(copy / "draft", head)
    for path in (copy, copy / "draft"):
        loaded = draft_head.load(path)
        assert loaded.config == head.config and loaded.metadata == head.metadata
        jax.tree.map(np.testing.assert_array_equal, loaded.params, head.params)
        assert drafter_from_name(f"head:{path}") == TrainedHead(path)
    checkpoints.load(copy)
    with pytest.raises(CheckpointError, match="already exists"):
        draft_head.save(copy / "draft", head)
    top = json.loads((copy / "draft" / "config.json").read_text())
    for change, named in (({"schema": 2}, "schema"), ({"target": 5}, "target"), ({"head": {"layers": 1}}, "head")):
        (copy / "draft" / "config.json").write_text(json.dumps(top | change))
        with pytest.raises(CheckpointError, match=named):
            draft_head.load(copy)


def test_the_command_installs_the_head_and_says_what_was_wrong(config, target, tmp_path):
    app = typer.Typer()
    app.command()(draft_cli.train_draft)
    copy = shutil.copytree(target, tmp_path / "copy")
    words = [str(copy), "-o", config.output, "--context", "40", "--new-tokens", "24", "--generated", "17", "--steps",
             "2", "--warmup", "1", "--unroll", "2", "--chain", "2", "--window", "16", "--dtype", "f32", "--batch", "4",
             "--eval-rows", "6", "--features", "1,2", "--generation-batch", "12"]  # fmt: skip
    run = CliRunner().invoke(app, [*words, "--install", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout.splitlines()[-1])["head"] == str(Path(config.output) / "draft")
    assert draft_head.load(copy).config.features == (1, 2)
    for extra, named in (
        (["--features", "x"], "features"), (["--holdout", "2"], "holdout"), ([], "holds a run"),
        (["--implementation", "pallas", "-o", str(tmp_path / "new")], "pallas"),
    ):  # fmt: skip
        run = CliRunner().invoke(app, [*words, *extra])
        assert run.exit_code == 2 and named in run.stderr, run.output


def test_batches_take_every_generated_row_once_a_pass(config):
    rows = np.arange(24 * 40, dtype=np.int32).reshape(24, 40)
    generated = draft_data.Generated(rows, np.full(24, 40))
    stream = np.zeros(1000, np.int32)
    config = dataclasses.replace(config, batch=4, mix=0.5)
    taken = [draft_data.batch_rows(stream, generated, config, step) for step in range(24)]
    assert all(batch.shape == (4, 40) for batch in taken)
    for half in (taken[:12], taken[12:]):
        assert sorted(row[0] for batch in half for row in batch[:2]) == rows[:, 0].tolist()
