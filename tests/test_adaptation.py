"""Dense checkpoints as NSA models, checkpoints on meshes, and the two commands."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import foreign_models as foreign
import numpy as np
import pytest
from test_conversion import TOKENS, logits, write

from specsa_jax import checkpoints
from specsa_jax.checkpoints import CheckpointError, convert
from specsa_jax.checkpoints.formats import FORMATS
from specsa_jax.cli import main

SIZES = {"compress_block": 4, "compress_stride": 2, "select_block": 8, "num_selected": 4, "window": 6}


@pytest.mark.parametrize("case", ["llama", "qwen3"])  # the one measures its divergence, the other does not
def test_adapted_model_starts_near_the_dense_one(tmp_path, case):
    """Dense attention while all blocks are selected, but for gates that are not quite shut; close to it beyond."""
    source = write(tmp_path / "source", case)
    report = convert(
        source, tmp_path / "nsa", adapt="nsa", adapt_options=SIZES, tokenizer="ids",
        divergence_tokens=None if case == "llama" else 0,
    )  # fmt: skip
    loaded = checkpoints.load(tmp_path / "nsa")
    nsa = loaded.config.nsa
    assert (nsa.num_selected, nsa.window, nsa.dense_len) == (4, 6, 0) and nsa.gate == "per_head"
    dense = foreign.forward(case, foreign.tensors(case), TOKENS)
    got = logits(loaded)
    all_selected = nsa.num_selected * nsa.select_block
    spread = dense.std()
    assert np.abs(got[:all_selected] - dense[:all_selected]).max() < 0.1 * spread
    assert np.abs(got[all_selected:] - dense[all_selected:]).mean() < 0.5 * spread
    far = report.divergence
    assert far == loaded.metadata["adaptation"]["divergence"]
    if case == "llama":
        assert far["tokens"] == 64 and 0 < far["kl_mean"] < 0.5 and far["kl_mean"] < far["kl_beyond"] <= far["kl_max"]
        assert 0.5 < far["top1_agreement"] <= 1 and abs(far["loss_adapted"] - far["loss_dense"]) < 0.5
    # What it was made of is still in it: with nothing but the dense branch it is the dense model.
    below = dataclasses.replace(nsa, dense_len=len(TOKENS) + 1)
    same = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, nsa=below))
    np.testing.assert_allclose(logits(same), dense, atol=1e-4 * np.abs(dense).max())
    with pytest.raises(CheckpointError, match="gate|compression"):
        convert(tmp_path / "nsa", tmp_path / "back", to_format=case)


def test_adaptation_refuses_sizes_that_do_not_fit(tmp_path):
    source = write(tmp_path / "source", "llama")
    for options, message in (({"gate": 3}, "unknown option.*gate"), ({"num_selected": 1}, "num_selected: got 1"),
                             ({"num_selected": 10**14}, "max_length = 256")):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            convert(source, tmp_path / "nsa", adapt="nsa", adapt_options=options, tokenizer="ids")
    assert not (tmp_path / "nsa").exists()


@pytest.mark.slow
def test_training_goes_on_from_an_adapted_model(tmp_path):
    """``specsa train --init`` with its config and tokenizer; the loss falls."""
    from specsa_jax.training.config import Stage, TrainConfig
    from specsa_jax.training.tokenizer import train_tokenizer
    from specsa_jax.training.trainer import train

    source = foreign.write_config(tmp_path / "source", "llama")
    tensors = foreign.tensors("llama")
    tensors["model.embed_tokens.weight"] = np.resize(tensors["model.embed_tokens.weight"], (300, foreign.HIDDEN))
    from safetensors.numpy import save_file

    save_file(tensors, source / "model.safetensors")
    config = foreign.CONFIGS["llama"] | {"vocab_size": 300}
    train_tokenizer(["def f(x):\n    return x\n"] * 4, 300).save(str(source / "tokenizer.json"))
    (tmp_path / "data").mkdir()
    for n in range(40):
        (tmp_path / "data" / f"{n}.py").write_text(f"def f{n}(x):\n    return x + {n}\n" * 20)
    convert(source, tmp_path / "nsa", adapt="nsa", adapt_options=SIZES, config=config, divergence_tokens=0)
    summary = train(TrainConfig(
        data=(str(tmp_path / "data"),), output=str(tmp_path / "run"), init=str(tmp_path / "nsa"),
        stages=(Stage(64, 4, 12),), warmup=2, learning_rate=3e-3, dtype="f32", eval_every=0, save_every=0,
    ))  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert summary.steps == 12 and records[-1]["loss"] < records[0]["loss"] - 0.3


# --- meshes ----------------------------------------------------------------------------------------------------------

MESHES = """
import sys
import jax, numpy as np
from jax.sharding import Mesh
from specsa_jax import checkpoints
from specsa_jax.checkpoints.store import named_leaves
assert len(jax.devices()) == 8
whole = named_leaves(checkpoints.load(sys.argv[1]).params)
for directory in sys.argv[1:]:
    for count in (8, 4, 1):
        mesh = Mesh(np.asarray(jax.devices()[:count]), ("model",))
        leaves = named_leaves(checkpoints.load(directory, mesh=mesh).params)
        split = 0
        for name, leaf in leaves.items():
            assert leaf.sharding.device_set == set(jax.devices()[:count]), name
            assert leaf.dtype == whole[name].dtype and (np.asarray(leaf) == np.asarray(whole[name])).all(), name
            split += leaf.addressable_shards[0].data.size < leaf.size
        assert (split > 10) == (count > 1), (count, split)
        if count == 4:  # heads and MLP by outputs, back by inputs, tokens
            def shape(name):
                return leaves[name].addressable_shards[0].data.shape
            assert shape("layers.0.attn.q_proj.kernel") == (32, 8) and shape("layers.1.attn.o_proj.kernel") == (8, 32)
            assert shape("layers.0.mlp.down_proj.kernel") == (64, 32) and shape("norm.scale") == (32,)
print("restored")
"""


def test_checkpoints_are_restored_straight_onto_a_mesh(tmp_path):
    """8 simulated devices; restored on all, on 4 and on 1; converted ones, and a public one on the fly."""
    source = write(tmp_path / "source", "fla", foreign.BFLOAT16)
    convert(source, tmp_path / "ours", tokenizer="ids")
    run = subprocess.run(
        [sys.executable, "-c", MESHES, tmp_path / "ours", source], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu",
             "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )  # fmt: skip
    assert run.stdout.endswith("restored\n"), run.stderr


# --- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import re, sys
from specsa_jax.checkpoints import convert
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
convert(sys.argv[1], sys.argv[2], tokenizer="ids")  # what is loaded once is not counted
before = peak()
convert(sys.argv[3], sys.argv[4], tokenizer="ids")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak memory")
def test_conversion_never_holds_the_whole_checkpoint(tmp_path):
    """24 layers of 9 MiB each, whose largest tensors have 3 MiB."""
    from safetensors.numpy import save_file

    small = write(tmp_path / "small", "llama-nsa")
    large = foreign.write_config(tmp_path / "large", "llama-nsa")
    inner, layers = 24576, 24
    names = foreign.tensors("llama-nsa")
    tensors = {name: value for name, value in names.items() if "layers" not in name}
    for i in range(layers):
        at = f"layers.{i}."
        tensors |= {name.replace("layers.0.", at): value for name, value in names.items() if "layers.0." in name}
        for kind, shape in (("gate", (inner, 32)), ("up", (inner, 32)), ("down", (32, inner))):
            tensors[f"model.{at}mlp.{kind}_proj.weight"] = np.ones(shape, np.float32)
    save_file(tensors, large / "model.safetensors")
    config = foreign.CONFIGS["llama-nsa"] | {"num_hidden_layers": layers, "intermediate_size": inner}
    (large / "config.json").write_text(json.dumps(config))
    run = subprocess.run(
        [sys.executable, "-c", PEAK, small, tmp_path / "a", large, tmp_path / "b"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 60, run.stdout  # MiB; the whole has 216


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def specsa(monkeypatch, capsys):
    """Runs a command in this process: exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["specsa", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return (stopped.value.code or 0, *capsys.readouterr())

    return run


def test_convert_and_inspect_on_the_command_line(tmp_path, specsa):
    source = write(tmp_path / "source", "minicpm4", foreign.BFLOAT16)
    code, out, err = specsa("convert", source, tmp_path / "ours", "--tokenizer", "ids", "--json")
    report = json.loads(out.splitlines()[-1])
    assert code == 0 and report["from_format"] == "minicpm4" and report["dtypes"] == ["bfloat16"], err
    assert "minicpm4 → specsa" in err
    described = specsa("convert", "--help")[1]
    assert all(name in described for name in FORMATS)
    for directory, name in ((source, "minicpm4"), (tmp_path / "ours", "specsa")):
        code, out, err = specsa("inspect", directory, "--json", "--context", 100, "--batch", 2)
        seen = json.loads(out)
        assert code == 0 and seen["format"] == name and seen["problems"] == []
        assert seen["switches"]["score_map"] == "max" and "only the XLA path" in seen["kernels"]
        assert seen["parameters"] == sum(seen["parts"].values()) == sum(seen["dtypes"].values())
        assert seen["memory"] == [{"context": 100, "batch": 2, "cache": seen["memory"][0]["cache"],
                                   "total": seen["memory"][0]["cache"] + seen["weight_bytes"]}]  # fmt: skip
    code, out, err = specsa("inspect", tmp_path / "ours", "--verify")
    assert code == 0 and "files are whole" in out and "fused_selected_window True" in out.replace("\n", "")
    code, out, err = specsa("convert", source, tmp_path / "ours")
    assert code == 2 and err.startswith("error: ") and "already exists" in err and err.count("\n") == 1


def test_inspect_lists_what_is_wrong(tmp_path, specsa):
    source = write(tmp_path / "source", "fla")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(foreign.CONFIGS["fla"] | {"num_hidden_layers": 3}))
    code, out, err = specsa("inspect", source, "--config", config)
    assert " 256 " in out and "4,096" not in out  # contexts up to max_length
    assert code == 1 and "missing model.layers.2.attn_norm.weight [32]" in out
    code, out, err = specsa("inspect", source, "--verify")
    assert code == 2 and "has no checksums" in err


@pytest.mark.parametrize("target", ["specsa", "fla"])
def test_verification_finds_a_flipped_bit(tmp_path, specsa, target):
    source = write(tmp_path / "source", "fla")
    convert(source, tmp_path / "out", to_format=target, tokenizer="ids")
    assert specsa("inspect", tmp_path / "out", "--verify")[0] == 0
    file = max((p for p in (tmp_path / "out").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, out, err = specsa("inspect", tmp_path / "out", "--verify")
    assert code == 2 and f"{file.name} is corrupt (SHA-256 differs)" in err


def test_adapting_on_the_command_line(tmp_path, specsa, monkeypatch):
    from specsa_jax.checkpoints import adapt

    figures = {"kl_mean": 0.01, "kl_max": 0.1, "kl_beyond": 0.02, "top1_agreement": 0.98, "loss_dense": 3.0,
               "loss_adapted": 3.1, "tokens": 48, "text": "a text"}  # fmt: skip
    monkeypatch.setattr(adapt, "divergence", lambda *arguments: figures)  # measured in another test
    source = write(tmp_path / "source", "qwen3")
    sizes = [word for name, value in SIZES.items() for word in ("--adapt-option", f"{name}={value}")]
    code, out, err = specsa("convert", source, tmp_path / "nsa", "--adapt", "nsa", *sizes, "--tokenizer", "ids",
                            "--divergence-tokens", 48)  # fmt: skip
    assert code == 0 and "KL 0.0100 nats a token" in err.replace("\n", "") and "starting point" in err
    code, out, err = specsa("convert", source, tmp_path / "other", "--adapt", "nsa", "--adapt-option", "window=few")
    assert code == 2 and "adapt_option: got 'window=few'" in err
