"""The command line, run as a user runs it."""

import json
import os
import subprocess
import sys

import pytest


def specsa(*arguments, stdin=""):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "specsa_jax", *map(str, arguments)],
        input=stdin if isinstance(stdin, bytes) else stdin.encode(), capture_output=True, env=environment, timeout=300,
    )  # fmt: skip


def test_generate_continues_standard_input_and_ends_with_json():
    run = specsa(
        "generate", "--prompt-file", "-", "--max-new-tokens", 16, "--compare", "--json", stdin="import os\nimport "
    )
    assert run.returncode == 0, run.stderr
    *text, last = run.stdout.decode().splitlines()
    report = json.loads(last)
    assert text and report["identical"] is True and report["new_tokens"] <= 16
    wanted = {"speedup", "mean_acceptance_length", "tokens_per_second", "baseline_tokens_per_second", "prompt_tokens"}
    assert wanted <= set(report)
    assert "mean acceptance length" in run.stderr.decode()


def test_several_prompt_files_make_a_batch(tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(f"# {name}\nimport sys\n")
    run = specsa("generate", "--prompt-file", tmp_path / "a.py", "--prompt-file", tmp_path / "b.py",
                 "--max-new-tokens", 8, "--json")  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.decode().splitlines()[-1])["batch"] == 2
    assert b"a.py" in run.stderr and b"b.py" in run.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt-file", "absent.py"], "absent.py"),
        (["--prompt-file", "{empty}"], "empty"),
        (["--prompt-file", "{binary}"], "not UTF-8 at byte 2"),
        (["--drafter", "oracle"], "drafter: got 'oracle', expected one of lookup, none"),
        (["--tree", "bush"], "tree: got 'bush'"),
        (["--temperature", "-1"], "temperature: got -1.0"),
        (["--temperature", "nan"], "temperature: got nan"),
        (["--top-p", "0"], "top_p: got 0.0"),
        (["--max-new-tokens", "100000"], "max_new_tokens = 100000"),
        (["--max-new-tokens", "0"], "max_new_tokens: got 0"),
        (["--checkpoint", "nonesuch"], "nonesuch"),
    ],
)
def test_bad_input_ends_with_one_clear_line_and_exit_code_2(tmp_path, arguments, words):
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"ab\xff")
    run = specsa("generate", *(a.format(empty=tmp_path / "empty", binary=tmp_path / "binary") for a in arguments))
    message = " ".join(run.stderr.decode().split())
    assert run.returncode == 2, message
    assert words in message and "error: " in message and "Traceback" not in message
    assert run.stdout == b""


def test_help_is_there_for_every_command_with_an_example():
    assert b"Example" in specsa("--help").stdout
    for command in ("generate", "train"):
        assert b"Example" in specsa(command, "--help").stdout
