"""The command line."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from specsa_jax.cli import app, main
from specsa_jax.config import preset


def specsa(*arguments, stdin="", stderr=subprocess.PIPE):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "specsa_jax", *map(str, arguments)],
        input=stdin if isinstance(stdin, bytes) else stdin.encode(), stdout=subprocess.PIPE, stderr=stderr,
        env=environment, timeout=300,
    )  # fmt: skip


def test_generate_continues_standard_input_and_ends_with_json():
    """The last line, also where a terminal or a log shows standard output and error together."""
    run = specsa(
        "generate", "--prompt-file", "-", "--max-new-tokens", 16, "--compare", "--json", stdin="import os\nimport ",
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    *text, last = run.stdout.decode().splitlines()
    report = json.loads(last)
    assert text and report["identical"] is True and 0 < report["new_tokens"] <= 16 and report["prompt_tokens"] > 2
    wanted = {"speedup", "mean_acceptance_length", "tokens_per_second", "baseline_tokens_per_second"}
    assert wanted <= set(report) and all(report[name] > 0 for name in wanted)
    assert any("mean acceptance length" in line for line in text)


@pytest.mark.slow
@pytest.mark.long
def test_several_prompt_files_make_a_batch(tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(f"# {name}\nimport sys\n")
    run = specsa("generate", "--prompt-file", tmp_path / "a.py", "--prompt-file", tmp_path / "b.py",
                 "--max-new-tokens", 8, "--json")  # fmt: skip
    assert run.returncode == 0, run.stderr
    text = run.stdout.decode()
    report = json.loads(text.splitlines()[-1])
    assert report["batch"] == 2
    for name, own in zip(("a.py", "b.py"), report["texts"], strict=True):
        assert f"── {tmp_path / name}\n{own}\n" in text


@pytest.mark.slow
@pytest.mark.long
def test_the_planner_explains_itself_and_gives_the_same_tokens():
    run = specsa("generate", "--prompt-file", "-", "--max-new-tokens", 24, "--explain", "--compare", "--json",
                 stdin="import os\nimport sys\nimport os\nimport ")  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.decode().splitlines()[-1])
    assert report["identical"] is True and report["strategy"].startswith("planned: ")
    assert sum(decision["observed_steps"] for decision in report["plan"]) == report["steps"]
    shown = run.stderr.decode()
    assert "the planner's decisions, from " in shown and "autoregressive" in shown and "observed" in shown


def test_the_table_says_why_tokens_may_differ_and_shouts_where_they_should_not():
    from rich.console import Console

    from specsa_jax.cli import _table

    numbers = ("prompt_tokens", "batch", "new_tokens", "tokens_per_second", "baseline_tokens_per_second", "speedup",
               "mean_acceptance_length", "drafted", "accepted", "steps", "prefill_seconds", "decode_seconds",
               "compile_seconds", "cache_bytes")  # fmt: skip
    report = {"strategy": "self chain:2 block", "finish": ["length"], "identical": False, "dtype": "float32",
              "device": "cpu", "acceptance_per_position": [0.5], "accepted_histogram": [3, 3], "plan": ()}  # fmt: skip
    for reason, words in (("block acceptance keeps the law", "no: block acceptance keeps the law"), ("", "NO")):
        out = io.StringIO()
        _table(report | dict.fromkeys(numbers, 1), Console(file=out, width=100), reason)
        assert f" {words} " in out.getvalue()


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Runs a command that is to be refused: the line that it ends with."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["specsa", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert stopped.value.code == 2, err
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return run


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt-file", "{tmp}/absent.py"], "prompt_file: got '{tmp}/absent.py', expected a readable file: No such"),
        (["--prompt-file", "{tmp}"], "expected a readable file: Is a directory"),
        (["--prompt-file", "{tmp}/empty"], "prompt_file: {tmp}/empty: is empty"),
        (["--prompt-file", "{tmp}/binary"], "prompt_file: {tmp}/binary: not UTF-8 at byte 2"),
        (["--prompt-file", "{tmp}/long"], "tokens and max_new_tokens = 256 make"),
        (["--prompt-file", "-"], "prompt_file: -: is empty"),
        (["--prompt-file", "-", "--prompt-file", "-"], "prompt_file: got '-' twice"),
        (["--drafter", "oracle"], "drafter: got 'oracle', expected one of lookup, head"),
        (["--drafter", "model:nonesuch"], "drafter: model:nonesuch: checkpoint: got 'nonesuch', expected an"),
        (["--drafter", "model:"], "checkpoint: got '', expected an existing directory"),
        (["--drafter", "lookup+none"], "drafter: got 'lookup+none', expected two drafters"),
        (["--drafter", "lookup:8"], "drafter: got 'lookup:8', expected 'lookup', with nothing behind it"),
        (["--drafter", ":Parrot"], "drafter: got ':Parrot', expected one of lookup, head"),
        (["--drafter", "json:loads"], "drafter: got 'json:loads', expected one of lookup, head"),
        (["--drafter", "head:{tmp}"], "drafter: head:{tmp}: {tmp}/config.json: missing"),
        (["--drafter", "head+lookup"], "Combined.first: got head:embedded, expected a drafter without a model"),
        (["--drafter", "none", "--tree", "best:16"], "tree: got a value with drafter 'none', which drafts nothing"),
        (["--drop-compressed"], "drop_compressed: given with schedule 'all', which has no reuse layers"),
        (["--traversal", "random"], "traversal: got 'random', expected one of 'breadth', 'depth'"),
        (["--tree", "chain:128"], "tree: got chain:128, more than 127 drafted tokens"),
        (["--tree", "bush"], "tree: got 'bush', expected chain:K"),
        (["--tree", "8-8-8"], "tree: got 8-8-8, more than 127 drafted tokens"),
        (["--tree", "chain:65"], "tree: got chain:65, 65 tokens deep, expected at most a page, select_block = 64"),
        (["--acceptance", "magic"], "acceptance: got 'magic', expected one of 'coupled'"),
        (["--acceptance", "typical"], "acceptance: got 'typical', which is lossy, in precision 'exact'"),
        (["--acceptance", "block"], "whose drafts are not drawn from a law, expected 'coupled'"),
        (["--precision", "fp8"], "precision: got 'fp8', expected one of 'exact'"),
        (["--precision", "strict", "--implementation", "pallas"], "expected"),
        (
            ["--plan", "--drafter", "head", "--shared", "2"],
            "drafter, shared: got a value with --plan, which chooses it",
        ),
        (["--plan", "--precision", "fp8"], "precision: got 'fp8', expected one of"),
        (["--plan", "--max-kl", "0.1"], "max_kl: got 0.1 in precision 'exact'"),
        (["--profile", "{tmp}/empty"], "profile, allow_mismatch: got one without a planner"),
        (["--explain", "--profile", "{tmp}/absent.json"], "profile: got '{tmp}/absent.json', expected a readable file"),
        (["--explain", "--profile", "{tmp}/empty"], "profile: {tmp}/empty: truncated or damaged"),
        (["--min-p", "2"], "min_p: got 2.0"),
        (["--repetition-penalty", "0"], "repetition_penalty: got 0.0"),
        (["--temperature", "-1"], "temperature: got -1.0"),
        (["--temperature", "nan"], "temperature: got nan"),
        (["--top-p", "0"], "top_p: got 0.0"),
        (["--top-k", "-1"], "top_k: got -1"),
        (["--seed", "-1"], "seed: got -1"),
        (["--seed", str(2**32)], "seed: got 4294967296"),
        (["--stop", ""], "stop: got ('',), expected non-empty texts"),
        (["--max-new-tokens", "100000"], "max_new_tokens = 100000"),
        (["--max-new-tokens", "0"], "max_new_tokens: got 0"),
        (["--max-new-tokens", "-3"], "max_new_tokens: got -3"),
        (["--max-new-tokens", "1.5"], "Invalid value for '--max-new-tokens'"),
        (["--checkpoint", "nonesuch"], "checkpoint: got 'nonesuch', expected"),
        (["--checkpoint", ""], "checkpoint: got '', expected"),
        (["--checkpoint", "{tmp}"], "config.json: missing too"),
        (["--colour"], "No such option: --colour"),
    ],
)
def test_bad_input_ends_with_one_clear_line_and_exit_code_2(tmp_path, refusal, arguments, words):
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"ab\xff")
    (tmp_path / "long").write_text("x = [1, 2]\n" * 4000)
    assert words.format(tmp=tmp_path) in refusal("generate", *(a.format(tmp=tmp_path) for a in arguments))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["{tmp}/absent"], "data: got '{tmp}/absent', expected an existing directory or file"),
        (["stdlib", "-o", "{tmp}/file/run"], "output: {tmp}/file/run: cannot be written: Not a directory"),
        (["stdlib", "--batch", "0"], "stage batch: got 0, expected at least 1"),
        (["stdlib", "--context", "0"], "stage context: got 0, expected at least 1"),
        (["stdlib", "--steps", "0"], "stage steps: got 0, expected at least 1"),
        (["stdlib", "--learning-rate", "nan"], "learning_rate: got nan"),
        (["stdlib", "--model", "{tmp}/config.json"], "num_heads: got 3, expected a multiple of num_kv_heads = 2"),
        ([], "Missing argument 'data'"),
    ],
)
def test_training_that_cannot_start_ends_with_one_clear_line_too(tmp_path, refusal, arguments, words):
    (tmp_path / "file").touch()
    config = preset("embedded").to_dict()
    config["nsa"] |= {"num_heads": 3, "num_kv_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = refusal("train", "-o", tmp_path / "run", *(a.format(tmp=tmp_path) for a in arguments))
    assert words.format(tmp=tmp_path) in line


def test_a_reader_that_leaves_early_is_no_error():
    command = [sys.executable, "-m", "specsa_jax", "generate", "--prompt-file", "-", "--max-new-tokens", "16"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.close()
        _, notes = run.communicate(b"import os\nimport ", timeout=300)
    assert run.returncode == 1 and b"rror" not in notes, notes


def test_help_is_there_for_every_command_with_an_example():
    assert b"Example" in specsa("--help").stdout
    for command in ("generate", "train", "tune", "schedule", "precision"):
        assert "Example" in CliRunner().invoke(app, [command, "--help"]).output


def test_tune_says_that_there_is_no_gpu():
    run = specsa("tune", "B1-T8")
    assert run.returncode == 2 and b"error: device: got cpu, expected a GPU" in run.stderr


def test_an_interrupt_ends_a_command_while_it_compiles():
    with subprocess.Popen([sys.executable, "-m", "specsa_jax", "generate"], env={**os.environ, "JAX_PLATFORMS": "cpu"},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:  # fmt: skip
        time.sleep(6)
        run.send_signal(signal.SIGINT)
        _, notes = run.communicate(timeout=60)
    assert run.returncode == 130 and notes.endswith(b"interrupted\n") and b"Traceback" not in notes, notes


def test_an_interrupt_in_the_garbage_collector_is_heard_behind_it():
    """Python prints what is raised there, and goes on; JAX has such a callback. In a process of its own: an interrupt
    that comes late is not another test's."""
    program = """
import gc, signal, time
from specsa_jax.terminal import hear_interrupts

def callback(phase, info):
    signal.raise_signal(signal.SIGINT)

hear_interrupts()
gc.disable()
gc.callbacks.append(callback)
try:
    gc.collect()
    gc.callbacks.remove(callback)
    time.sleep(60)
except KeyboardInterrupt:
    print("heard")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=300,
                         env={**os.environ, "JAX_PLATFORMS": "cpu"})  # fmt: skip
    assert run.stdout == b"heard\n" and b"ignored" not in run.stderr, run.stderr


def test_compiled_programs_outlive_a_command(tmp_path):
    program = "; ".join([
        "from specsa_jax import cli", "cli._app()", "import jax",
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)", "jax.jit(lambda x: x + 1)(1)",
    ])  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300,
                   env=environment | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)})  # fmt: skip
    assert list((tmp_path / "specsa-jax" / "xla").iterdir())
