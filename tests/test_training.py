"""Training: data, the jitted step, the loop with its interruptions, the command."""

import dataclasses
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import typer
from typer.testing import CliRunner

from specsa_jax import checkpoints, model
from specsa_jax.config import ConfigError, ModelConfig, NSAConfig
from specsa_jax.training import (
    DivergedError,
    Stage,
    TrainConfig,
    TrainingError,
    cli,
    data,
    is_held_out,
    parse_stages,
    report,
    train,
    trainer,
)
from specsa_jax.training import step as steps
from specsa_jax.training.tokenizer import END_OF_TEXT, train_tokenizer

MODEL = ModelConfig(
    vocab_size=300, hidden=16, layers=1, intermediate=16, max_length=64,
    nsa=NSAConfig(num_heads=2, num_kv_heads=1, head_dim=8, compress_block=8, compress_stride=4, select_block=8,
                  num_selected=3, window=8, compression="weighted"),
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A directory of 40 Python files, and the model's config beside them."""
    root = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for i in range(40):
        lines = [f"def function_{draw.randrange(9)}(x):\n    return x + {draw.randrange(99)}\n" for _ in range(12)]
        (root / f"module_{i}.py").write_text("\n".join(lines))
    (root / "model.json").write_text(MODEL.to_json())
    return root


@pytest.fixture
def config(corpus, tmp_path):
    """A run of six steps."""
    return TrainConfig(
        data=(str(corpus),), output=str(tmp_path / "run"), stages=(Stage(32, 4, 4), Stage(48, 2, 2)),
        model=str(corpus / "model.json"), holdout=0.2, dtype="f32", remat=False, warmup=1, learning_rate=1e-2,
        eval_every=0, save_every=3,
    )  # fmt: skip


def log_of(config):
    return report.read_log(Path(config.output) / "log.jsonl")


def losses_of(config):
    return {record["step"]: record["loss"] for record in log_of(config)}


# --- the loop --------------------------------------------------------------------------------------------------------


def test_run_lowers_the_loss_and_leaves_what_it_documents(config):
    records = []
    config = dataclasses.replace(config, stages=(Stage(32, 4, 30),), save_every=0, eval_every=10)
    summary = train(config, records.append)
    assert (summary.stopped, summary.steps, summary.tokens) == ("completed", 30, 30 * 4 * 32)
    log = log_of(config)
    assert [r["step"] for r in log] == list(range(1, 31))
    assert [r["step"] for r in log if "held_out_loss" in r] == [10, 20, 30]
    assert log[-1]["held_out_loss"] == summary.held_out_loss < log[0]["loss"] - 1
    assert [r for r in records if "step" in r][:-1] == log[:-1]
    assert summary.held_out_files + summary.training_files == 40
    files = {p.name for p in Path(config.output).iterdir()}
    assert {"run.json", "tokenizer.json", "log.jsonl", "loss.png", "state", "checkpoint"} <= files
    loaded = checkpoints.load(summary.checkpoint)
    assert loaded.config == MODEL
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    assert loaded.metadata["recipe"] == config.command()
    assert loaded.metadata["result"]["held_out_loss"] == summary.held_out_loss
    # The reported loss is that of the exported weights.
    rows = data.held_out_batches(data.encode(data.read_corpus(config).split(True), loaded.tokenizer), 32, 4)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), loaded.params)
    again = np.mean([float(steps.next_token_loss(MODEL, config, params, batch)) for batch in rows])
    assert again == pytest.approx(summary.held_out_loss, rel=1e-5)
    nats_per_byte = summary.held_out_bits_per_byte * np.log(2)
    assert 0 < nats_per_byte < summary.held_out_loss


def test_killed_and_interrupted_runs_resume_with_the_same_losses(config, tmp_path):
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    train(whole)
    expected = losses_of(whole)

    def fail_after(number):
        def listener(record):
            if record.get("step") == number:
                raise RuntimeError("killed")

        return listener

    with pytest.raises(RuntimeError, match="killed"):  # after the save at step 3; step 4 is lost
        train(config, fail_after(4))
    resumed = dataclasses.replace(config, resume=True)

    def interrupt(record):
        if record.get("step") == 4:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    summary = train(resumed, interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert summary.stopped == "SIGINT" and summary.checkpoint is None and 4 <= summary.steps < 6
    summary = train(resumed)
    assert (summary.stopped, summary.steps) == ("completed", 6)
    assert losses_of(config) == expected  # bit for bit


@pytest.mark.slow
def test_a_killed_command_resumes_and_ctrl_c_saves_then_stops(config):
    """SIGKILL in the middle, --resume, Ctrl-C: the losses so far are those of a run that nobody disturbed."""
    config = dataclasses.replace(config, stages=(Stage(32, 4, 300),), save_every=2)
    words = shlex.split(config.command())[1:]

    def run_until(saved, number, *more):
        command = subprocess.Popen([sys.executable, "-m", "specsa_jax", *words, *more], stderr=subprocess.PIPE)
        state, deadline = Path(config.output) / "state", time.monotonic() + 120
        while max([int(p.name) for p in state.glob("*") if p.name.isdecimal()], default=0) < saved:
            assert command.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        command.send_signal(number)
        _, notes = command.communicate(timeout=60)
        return command.returncode, notes.decode()

    assert run_until(4, signal.SIGKILL)[0] == -signal.SIGKILL
    code, notes = run_until(max(losses_of(config)) + 4, signal.SIGINT, "--resume")
    assert code == 130 and "training: SIGINT" in notes and "--resume" in notes
    losses = losses_of(config)
    assert len(losses) < 300 and (Path(config.output) / "state" / str(max(losses))).exists()
    whole = dataclasses.replace(config, output=config.output + "-whole", save_every=0)
    train(whole)
    assert losses == {step: loss for step, loss in losses_of(whole).items() if step <= max(losses)}  # bit for bit


def test_time_limit_saves_exports_and_can_be_resumed(config):
    config = dataclasses.replace(config, stages=(Stage(32, 4, 6),))
    summary = train(dataclasses.replace(config, time_limit=1e-6))
    assert (summary.stopped, summary.steps) == ("time limit", 1)
    assert checkpoints.load(summary.checkpoint).metadata["result"]["stopped"] == "time limit"
    assert train(dataclasses.replace(config, resume=True)).steps == 6


def test_only_the_newest_whole_states_are_kept(config):
    (Path(config.output) / "state" / "3.half-written").mkdir(parents=True)
    train(dataclasses.replace(config, stages=(Stage(32, 4, 6),), save_every=1, keep=2))
    assert sorted(p.name for p in (Path(config.output) / "state").iterdir()) == ["5", "6"]


def test_run_can_start_from_a_checkpoint(config, tmp_path):
    config = dataclasses.replace(config, stages=(Stage(32, 4, 6),))
    first = train(config)
    start = dataclasses.replace(config, output=str(tmp_path / "second"), model="embedded", init=first.checkpoint)
    train(start)
    assert log_of(start)[0]["loss"] < log_of(config)[0]["loss"]


def test_diverged_loss_stops_the_run(config, monkeypatch):
    def diverge(params, opt_state, rows):
        return params, opt_state, jnp.float32(jnp.nan)

    monkeypatch.setattr(steps, "make_train_step", lambda *_: diverge)
    with pytest.raises(DivergedError, match="step 1: loss is nan; lower the learning rate"):
        train(config)
    assert not (Path(config.output) / "checkpoint").exists()


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    return model.init_params(MODEL, 0)


@pytest.fixture
def rows():
    return np.random.default_rng(0).integers(300, size=(4, 33), dtype=np.int32)


def test_loss_in_chunks_is_the_plain_cross_entropy(config, params, rows):
    hidden = model.hidden_states(MODEL, params, rows[:, :-1], dtype=jnp.float32)
    logits = model.head(MODEL, params, hidden, jnp.float32)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()
    for chunk in (0, 50):  # 128 tokens: one chunk; two whole ones and a padded third
        got = steps.next_token_loss(MODEL, config, params, rows, chunk)
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_logits_of_a_whole_batch_never_exist(config, params, rows):
    gradient = jax.grad(lambda p: steps.next_token_loss(MODEL, config, p, rows, chunk=32))
    shapes = set(re.findall(r"f32\[([\d,]*),300\]", str(jax.make_jaxpr(gradient)(params))))
    assert "32" in shapes and not shapes & {"128", "4,32"}


def test_accumulated_gradients_make_the_step_of_the_whole_batch(config, params, rows):
    results = []
    for accum in (1, 2):
        config = dataclasses.replace(config, grad_accum=accum)
        fresh = jax.tree.map(jnp.copy, params)
        results.append(steps.make_train_step(MODEL, config)(fresh, steps.optimizer(config).init(fresh), rows))
    (one, _, loss_one), (two, _, loss_two) = results
    np.testing.assert_allclose(loss_one, loss_two, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_step_donates_parameters_and_optimiser_state(config, params, rows):
    fresh = jax.tree.map(jnp.copy, params)
    state = steps.optimizer(config).init(fresh)
    steps.make_train_step(MODEL, config)(fresh, state, rows)
    assert all(x.is_deleted() for x in jax.tree.leaves((fresh, state)))


def test_weight_decay_is_for_matrices_alone(config, params):
    config = dataclasses.replace(config, weight_decay=0.5, learning_rate=1.0, warmup=0)
    transform = steps.optimizer(config)
    updates, _ = jax.jit(transform.update)(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
    named = checkpoints.store.named_leaves(updates)
    shrunk = {name for name, update in named.items() if np.any(np.asarray(update) != 0)}
    assert shrunk == {n for n in named if n.endswith((".kernel", ".embedding"))}


def test_learning_rate_warms_up_and_falls(config):
    config = dataclasses.replace(config, stages=(Stage(32, 4, 110),), warmup=10, learning_rate=1.0)
    cosine = np.asarray(steps.learning_rate(config, np.arange(110)))
    np.testing.assert_allclose(cosine[[0, 10, 60, 109]], [1 / 11, 1.0, 0.55, 0.1], atol=1e-3)
    wsd = np.asarray(steps.learning_rate(dataclasses.replace(config, schedule="wsd"), np.arange(110)))
    np.testing.assert_allclose(wsd[[10, 89, 100, 109]], [1.0, 1.0, 0.5, 0.05], atol=1e-3)


# --- data ------------------------------------------------------------------------------------------------------------


def test_held_out_files_are_the_same_everywhere():
    names = ["json/decoder.py", "os.py", "traceback.py", "secrets.py", "argparse.py", "zoneinfo/__init__.py"]
    assert [n for n in names if is_held_out(n, 0.05)] == ["traceback.py", "secrets.py", "zoneinfo/__init__.py"]
    assert is_held_out("zoneinfo\\__init__.py", 0.05)
    assert np.mean([is_held_out(f"{i}.py", 0.1) for i in range(10_000)]) == pytest.approx(0.1, abs=0.01)
    assert not is_held_out("traceback.py", 0.0) and is_held_out("os.py", 1.0)


def test_every_token_is_trained_on_once_a_pass_and_order_depends_on_the_arguments_alone():
    stream = np.arange(103, dtype=np.int32)
    batches = [data.training_rows(stream, 10, 2, step, seed=3, stage=0) for step in range(5)]
    assert all(rows.shape == (2, 11) for rows in batches)
    rows = np.concatenate(batches)
    np.testing.assert_array_equal((rows[:, 1:] - rows[:, :-1]) % 103, 1)
    assert len(set(rows[:, :-1].ravel())) == 100  # 103 // 10 rows of 10
    again = data.training_rows(stream, 10, 2, 3, seed=3, stage=0)
    np.testing.assert_array_equal(again, batches[3])
    assert (data.training_rows(stream, 10, 2, 3, seed=4, stage=0) != again).any()
    assert (data.training_rows(stream, 10, 2, 8, seed=3, stage=0) != again).any()  # the next pass


def test_held_out_batches_are_spread_over_the_stream():
    stream = np.arange(101, dtype=np.int32)
    np.testing.assert_array_equal(data.held_out_batches(stream, 10, 2)[:, :, 0].ravel(), np.arange(10) * 10)
    np.testing.assert_array_equal(data.held_out_batches(stream, 10, 2, 2)[:, :, 0].ravel(), [0, 20, 50, 70])


def test_documents_end_with_end_of_text_and_its_name_in_a_file_is_text():
    tokenizer = train_tokenizer(["a b c"] * 3, 300)
    documents = [data.Document("a", f"x {END_OF_TEXT} y", False), data.Document("b", "\x00é\r\n", False)]
    stream = data.encode(documents, tokenizer)
    assert (stream == 0).sum() == 2 and stream[-1] == 0
    first = int(np.argmax(stream == 0))
    assert tokenizer.decode(stream[:first].tolist()) == documents[0].text
    assert tokenizer.decode(stream[first + 1 : -1].tolist()) == documents[1].text


def test_duplicates_and_empty_files_are_left_out(config, tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.py").write_text(f"x = {i // 2}\n" if i else "")
    corpus = data.read_corpus(dataclasses.replace(config, data=(str(tmp_path),)))
    assert len({d.text for d in corpus.documents}) == len(corpus.documents) == 30
    assert corpus.duplicates == 29


def test_standard_library_is_a_data_source(config):
    config = dataclasses.replace(config, data=("stdlib",), glob="json/*.py", holdout=0.3)
    files = dict(data.find_files("stdlib", config))
    assert "json/decoder.py" in files
    fewer = dict(data.find_files("stdlib", dataclasses.replace(config, exclude=("*/decoder.py",))))
    assert fewer.keys() == files.keys() - {"json/decoder.py"}


def test_an_installed_package_is_a_data_source_wherever_it_lies(config):
    config = dataclasses.replace(config, data=("site-packages/numpy",), glob="lib/*.py")
    assert "lib/_version.py" in dict(data.find_files("site-packages/numpy", config))
    with pytest.raises(
        TrainingError, match="got 'site-packages/absent', expected .* the site-packages/NAME of an inst"
    ):
        data.find_files("site-packages/absent", config)


def test_file_that_is_not_utf8_is_an_error_or_skipped_and_counted(config, tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.py").write_text(f"x = {i}\n")
    (tmp_path / "latin.py").write_bytes("# café\n".encode("latin-1"))
    config = dataclasses.replace(config, data=(str(tmp_path),))
    with pytest.raises(TrainingError, match=r"latin.py: not UTF-8 at byte 5 .*--skip-undecodable"):
        train(config)
    corpus = data.read_corpus(dataclasses.replace(config, skip_undecodable=True))
    assert corpus.undecodable == 1 and len(corpus.documents) == 20


def test_tokens_are_cached_by_content(config, tmp_path):
    corpus = data.read_corpus(config)
    tokenizer = train_tokenizer((d.text for d in corpus.split(False)), 300)
    first = data.encode_cached(corpus, tokenizer, tmp_path)
    (cached,) = tmp_path.glob("tokens-*.npz")
    written = cached.stat().st_mtime_ns
    second = data.encode_cached(corpus, tokenizer, tmp_path)
    assert cached.stat().st_mtime_ns == written
    np.testing.assert_array_equal(first.train, second.train)
    data.encode_cached(corpus, train_tokenizer(["other"], 257), tmp_path)
    assert len(list(tmp_path.glob("tokens-*.npz"))) == 2


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ()}, "data: got nothing"),
        ({"output": ""}, "output: got ''"),
        ({"stages": ()}, "stages: got none"),
        ({"holdout": 0.0}, "holdout: got 0.0, expected between 0 and 1"),
        ({"holdout": float("nan")}, "holdout: got nan, expected a finite number"),
        ({"grad_accum": 3}, "grad_accum: got 3, expected a divisor of the batch 4"),
        ({"learning_rate": -1.0}, "learning_rate: got -1.0, expected above 0"),
        ({"beta2": 1.0}, "beta2: got 1.0"),
        ({"warmup": 6}, "warmup: got 6, expected below the run's 6 steps"),
        ({"vocab_size": 256}, "vocab_size: got 256, expected at least 257"),
        ({"dtype": "f16"}, "dtype: got 'f16', expected one of 'bf16', 'f32'"),
        ({"schedule": "linear"}, "schedule: got 'linear'"),
        ({"keep": 0}, "keep: got 0, expected at least 1"),
        ({"init": "x", "model": "embedded", "vocab_size": 300}, "vocab_size: cannot be given with init"),
    ],
)
def test_bad_option_is_refused_with_its_value_and_what_is_expected(config, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(config, **change)


@pytest.mark.parametrize("text", ["", "4096:16", "4096:16:x", "4096:16:-3", "1:1:1,"])
def test_malformed_stages_are_refused(text):
    with pytest.raises(ConfigError, match="expected context:batch:steps"):
        parse_stages(text)


def test_stages_parse():
    assert parse_stages("4096:16:3000, 8192:8:400") == (Stage(4096, 16, 3000), Stage(8192, 8, 400))
    with pytest.raises(ConfigError, match="stage batch: got 0, expected at least 1"):
        parse_stages("4096:0:3000")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ("/nowhere",)}, "data: got '/nowhere', expected an existing directory or file"),
        ({"glob": "**/*.txt"}, r"no file in .* matches glob '\*\*/\*.txt'"),
        ({"exclude": ("*",)}, r"\(40 match, but are excluded\)"),
        ({"glob": "/*.py"}, "glob: got '/.*', expected a relative pattern"),
        ({"holdout": 1e-9}, "leave none to hold out"),
        ({"stages": (Stage(64, 32, 2),)}, "expected at least one batch of 32"),
        ({"stages": (Stage(128, 1, 2),)}, "context of 128, expected at most 64"),
        ({"model": "nonesuch"}, "model: got 'nonesuch', expected a ModelConfig JSON file or one of embedded"),
        ({"init": "nonesuch", "model": "embedded"}, "checkpoint: got 'nonesuch'"),
        ({"resume": True}, "holds no saved state"),
    ],
)
def test_unusable_input_is_an_error_before_any_work(config, change, message):
    with pytest.raises((TrainingError, ConfigError, checkpoints.CheckpointError), match=message):
        train(dataclasses.replace(config, **change))


def test_empty_directory_is_an_error(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="no file in .*empty"):
        train(dataclasses.replace(config, data=(str(tmp_path / "empty"),)))


def test_unwritable_output_is_an_error_before_the_data_is_read(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written: Not a directory"):
        train(dataclasses.replace(config, output=str(tmp_path / "file" / "run"), data=("/nowhere",)))


def test_finished_run_is_not_overwritten_and_another_run_is_not_resumed(config):
    train(config)
    with pytest.raises(TrainingError, match="holds a run; go on with --resume"):
        train(config)
    with pytest.raises(TrainingError, match="is another run: learning_rate: was 0.01, now 0.02"):
        train(dataclasses.replace(config, resume=True, learning_rate=0.02))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_command():
    app = typer.Typer()
    app.command()(cli.train)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


SUMMARY = trainer.Summary(1, 2, 3.0, 4.0, 5.0, 6, 7, 8.0, 9.0, "completed", "run", "run/checkpoint")


@pytest.mark.parametrize(("stopped", "code"), [("completed", 0), ("time limit", 0), ("SIGINT", 130), ("SIGTERM", 143)])
def test_exit_code_says_how_the_run_ended_and_json_is_the_last_line(monkeypatch, run_command, stopped, code):
    given = []

    def fake(config, progress):
        given.append(config)
        return dataclasses.replace(SUMMARY, stopped=stopped)

    monkeypatch.setattr(trainer, "train", fake)
    result = run_command("stdlib", "-o", "run", "--stages", "64:2:30", "--warmup", 3, "--exclude", "a*", "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout.splitlines()[-1])["stopped"] == stopped
    assert given == [TrainConfig(("stdlib",), "run", (Stage(64, 2, 30),), warmup=3, exclude=("a*",))]
    resume = "specsa train stdlib --output run --stages 64:2:30 --exclude 'a*' --warmup 3 --resume"
    assert resume in result.stderr


def test_command_refuses_bad_input_with_exit_code_2(run_command, tmp_path):
    result = run_command(tmp_path / "nowhere", "-o", tmp_path / "run", "--steps", 200)
    assert result.exit_code == 2 and "error: data: got" in result.stderr
    result = run_command("stdlib", "-o", "run", "--stages", "64:2:30", "--batch", 4)
    assert result.exit_code == 2 and "stages: cannot be given with" in result.stderr


def test_command_reports_ctrl_c_during_set_up(monkeypatch, run_command):
    def fake(config, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", fake)
    assert run_command("stdlib", "-o", "run").exit_code == 130


def test_help_has_every_option_and_an_example(run_command):
    text = run_command("--help").stdout
    assert "specsa train stdlib -o run" in text
    for field in dataclasses.fields(TrainConfig):
        if field.name not in ("data", "stages"):
            assert "--" + field.name.replace("_", "-") in text
