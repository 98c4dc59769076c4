"""Bad input to the converter: what is wrong is named, all of it, and nothing is written."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import foreign_models as foreign
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_conversion import shard, write

from specsa_jax import checkpoints
from specsa_jax.checkpoints import CheckpointError, convert


@pytest.fixture
def refused(tmp_path):
    """Converts what is to be refused: the message; and nothing is left at or beside the target."""

    def run(source, **options):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        with pytest.raises(CheckpointError) as error:
            convert(source, out / "target", **{"tokenizer": "ids", **options})
        assert not any(out.iterdir())
        return str(error.value)

    return run


def test_one_error_lists_every_tensor_that_is_wrong(tmp_path, refused):
    source = foreign.write_config(tmp_path / "source", "llama-nsa")
    tensors = foreign.tensors("llama-nsa")
    del tensors["model.layers.1.self_attn.g_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((5, 7), np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 32), np.int8)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)  # a buffer: no harm
    tensors["model.layers.7.extra"] = np.zeros(3, np.float32)
    save_file(tensors, source / "model.safetensors")
    text = refused(source)
    assert "missing model.layers.1.self_attn.g_proj.weight [12, 32]" in text
    assert "missing model.norm.weight [32]" in text
    assert "unexpected model.layers.7.extra [3]" in text and "inv_freq" not in text
    assert "model.layers.0.mlp.up_proj.weight: got shape [5, 7], expected [48, 32]" in text
    assert "model.layers.0.self_attn.q_proj.weight: got dtype int8, expected float32, bfloat16, float16" in text


@pytest.mark.parametrize("dtype", ["float64", "F8_E4M3"])
def test_other_dtypes_are_refused(tmp_path, refused, dtype):
    import ml_dtypes

    source = foreign.write_config(tmp_path / "source", "llama-nsa")
    tensors = foreign.tensors("llama-nsa")
    kind = np.float64 if dtype == "float64" else ml_dtypes.float8_e4m3fn
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(kind)
    save_file(tensors, source / "model.safetensors")
    assert f"model.norm.weight: got dtype {dtype}" in refused(source)


def test_projections_that_become_one_must_agree_in_dtype(tmp_path, refused):
    source = foreign.write_config(tmp_path / "source", "nsa-byte")
    tensors = foreign.tensors("nsa-byte")
    tensors["blocks.0.attn.W_K_sel.weight"] = tensors["blocks.0.attn.W_K_sel.weight"].astype(foreign.BFLOAT16)
    save_file(tensors, source / "model.safetensors")
    assert "dtypes bfloat16 and float32, expected one for all" in refused(source, tokenizer=None)


def test_config_that_contradicts_the_weights_is_told_by_their_shapes(tmp_path, refused):
    source = write(tmp_path / "source", "fla")
    text = refused(source, config=foreign.CONFIGS["fla"] | {"hidden_size": 64, "num_hidden_layers": 1})
    assert "model.embeddings.weight: got shape [50, 32], expected [50, 64]" in text
    assert "unexpected model.layers.1.attn.q_proj.weight" in text


def test_one_error_lists_every_unsupported_setting(tmp_path, refused):
    source = write(tmp_path / "source", "llama")
    bad = {"attention_bias": True, "hidden_act": "gelu", "num_hidden_layers": None, "rms_norm_eps": "small",
           "rope_theta": 10**400, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}  # fmt: skip
    text = refused(source, config=foreign.CONFIGS["llama"] | bad)
    for part in ("attention_bias: got True", "hidden_act: got 'gelu'", "num_hidden_layers: missing",
                 "rms_norm_eps: got 'small'", "rope_theta: got 1000",
                 "rope_scaling.rope_type: got 'dynamic'"):  # fmt: skip
        assert part in text


def test_tied_head_that_differs_is_a_contradiction(tmp_path, refused):
    source = foreign.write_config(tmp_path / "source", "llama-nsa")
    tensors = foreign.tensors("llama-nsa")
    head = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors")
    convert(source, tmp_path / "same", tokenizer="ids")  # written out twice, but the same
    head[3, 4] += 1
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors")
    assert "tie_word_embeddings, but lm_head.weight differs" in refused(source)


# --- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_truncated_safetensors_are_refused(tmp_path, refused, keep):
    source = write(tmp_path / "source", "llama-nsa")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors: not a whole safetensors file" in refused(source)


def test_absent_shards_are_named(tmp_path, refused):
    source = foreign.write_config(tmp_path / "source", "llama-nsa")
    shard(source, foreign.tensors("llama-nsa"))
    for number in (1, 3):
        (source / f"model-0000{number}-of-00003.safetensors").unlink()
    text = refused(source)
    assert "names shards that are absent: model-00001-of-00003.safetensors, model-00003-of-00003.safetensors" in text


def test_index_that_leads_outside_is_refused(tmp_path, refused):
    source = write(tmp_path / "source", "llama-nsa")
    index = {"weight_map": {"model.norm.weight": "../../etc/passwd"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside its directory" in refused(source)


def test_index_that_contradicts_the_shards_is_refused(tmp_path, refused):
    index = shard(foreign.write_config(tmp_path / "source", "llama-nsa"), foreign.tensors("llama-nsa"))
    where = json.loads(index.read_text())["weight_map"]
    other = next(file for file in where.values() if file != where["model.norm.weight"])
    index.write_text(json.dumps({"weight_map": where | {"model.norm.weight": other, "ghost": other}}))
    text = refused(index)
    assert f"names tensors where they are not: model.norm.weight in {other}, ghost in {other}" in text
    index.write_text(f'{{"weight_map": {{"ghost": "a", "ghost": "{other}"}}}}')
    assert "names ghost more than once" in refused(index.parent)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000])
def test_damaged_index_is_refused(tmp_path, refused, text):
    source = write(tmp_path / "source", "llama-nsa")
    (source / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json: " in refused(source)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.99])
def test_truncated_torch_files_are_refused(tmp_path, refused, cut):
    source = foreign.write_config(tmp_path / "source", "llama-nsa")
    file = source / "pytorch_model.bin"
    foreign.write_torch(file, foreign.tensors("llama-nsa"))
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * cut)])
    assert "damaged or truncated ZIP archive" in refused(source)


def test_flipped_bit_in_a_torch_file_is_found(tmp_path, refused):
    source = foreign.write_config(tmp_path / "source", "llama-nsa")
    file = source / "pytorch_model.bin"
    foreign.write_torch(file, foreign.tensors("llama-nsa"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "CRC" in refused(source)


class Malicious:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("container", ["zip", "bare", "protocol 0"])
def test_code_in_a_torch_file_is_not_run(tmp_path, refused, container):
    source = foreign.write_config(tmp_path / "source", "llama-nsa")
    spoor = tmp_path / "ran"
    value = {"weight": Malicious((os.system, (f"touch {spoor}",)))}
    content = pickle.dumps(value, protocol=0 if container == "protocol 0" else 2)
    file = source / "pytorch_model.bin"
    if container == "bare":
        file.write_bytes(content)
        assert "a bare pickle" in refused(source)
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x/data.pkl", content)
        assert "refers to posix.system, which is not part of a state dict; nothing of it was run" in refused(source)
    assert not spoor.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "torch.load", "torch.nn.Module", "numpy.load"])
def test_names_beyond_a_state_dicts_are_refused(tmp_path, refused, name):
    source = foreign.write_config(tmp_path / "source", "llama-nsa")
    module, _, attribute = name.rpartition(".")
    content = f"c{module}\n{attribute}\n.".encode()
    with zipfile.ZipFile(source / "pytorch_model.bin", "w") as archive:
        archive.writestr("x/data.pkl", content)
    assert f"refers to {name}" in refused(source)


def test_tensors_beyond_their_storage_are_refused(tmp_path, refused):
    """A view that would read other memory: its strides leave the storage."""
    source = foreign.write_config(tmp_path / "source", "llama-nsa")
    file = source / "pytorch_model.bin"
    foreign.write_torch(file, foreign.tensors("llama-nsa"))
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    # The shape [50, 32] and its strides (32, 1), as pickled; (255, 1) in their place.
    pickled, count = re.subn(
        rb"(K2K \x86q.)K (K\x01\x86)", lambda found: found[1] + b"K\xff" + found[2], parts["model/data.pkl"]
    )
    assert count == 1
    parts["model/data.pkl"] = pickled
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert "lies outside its storage" in refused(source)


# --- targets, names, options -----------------------------------------------------------------------------------------


def test_existing_target_stays_unless_overwritten(tmp_path):
    source = write(tmp_path / "source", "llama-nsa")
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(CheckpointError, match="already exists|is no checkpoint"):
            convert(source, target, tokenizer="ids", **options)
    assert [file.name for file in target.iterdir()] == ["thesis.txt"]
    (target / "thesis.txt").unlink()
    target.rmdir()
    convert(source, target, tokenizer="ids")
    convert(source, target, tokenizer="ids", overwrite=True)
    with pytest.raises(CheckpointError, match="is the source"):
        convert(source, source, tokenizer="ids", overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"from_format": "gguf"}, "from: got 'gguf', expected one of specsa, llama-nsa"),
        ({"to_format": "gguf"}, "to: got 'gguf', expected one of specsa, llama-nsa"),
        ({"adapt": "nsa"}, "llama-nsa has sparse attention already"),
        ({"adapt": "moba"}, "adapt: got 'moba', expected 'nsa'"),
        ({"adapt_options": {"window": 4}}, "adapt_options: given without adapt"),
        ({"from_format": "fla"}, "as fla: .*block_counts|missing model.embeddings.weight"),
        ({"tokenizer": None}, "tokenizer.json: missing; give one with --tokenizer FILE"),
        ({"tokenizer": "bytes"}, "'bytes' for a vocabulary of 50"),
        ({"tokenizer": "/no/such/file"}, "/no/such/file: not a tokenizer"),
        ({"config": {"model_type": "llama-nsa", "layers": 2}}, "vocab_size: missing"),
        ({"config": foreign.CONFIGS["llama-nsa"] | {"eos_token_id": [2, 50]}}, "eos_token_id: got .2, 50., expected"),
    ],
)
def test_bad_options_are_named(tmp_path, refused, options, message):
    text = refused(write(tmp_path / "source", "llama-nsa"), **options)
    assert re.search(message, text), text


def test_full_disk_is_told_before_it_is_full(tmp_path, refused, monkeypatch):
    from collections import namedtuple

    source = write(tmp_path / "source", "llama-nsa")
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "free")(1000))
    assert "bytes, but" in refused(source) and "has 1,000 left" in refused(source)


def test_unknown_checkpoints_list_the_known_formats(tmp_path, refused):
    source = tmp_path / "source"
    source.mkdir()
    assert "holds no weights" in refused(source)
    assert "got '', expected an existing directory" in refused("")
    save_file({"weight": np.zeros(3, np.float32)}, source / "model.safetensors")
    assert "config.json: missing" in refused(source)
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    text = refused(source)
    assert "'gpt2'" in text and "no known format; name the format with --from: llama-nsa, nsa-byte, fla" in text
    assert "expected an existing directory" in refused(tmp_path / "nowhere")
    (source / "notes.txt").write_text("")
    assert "expected .safetensors, .bin" in refused(source / "notes.txt")


def test_models_with_the_keys_of_llama_are_not_taken_for_it(tmp_path, refused):
    """Mistral's window and Granite's factors are in their configs alone."""
    source = write(tmp_path / "source", "llama")
    config = {
        key: value for key, value in foreign.CONFIGS["llama"].items() if key not in ("model_type", "architectures")
    }
    for named in ({"model_type": "mistral"}, {"architectures": ["GraniteForCausalLM"]}):
        assert "no known format; name the format with --from" in refused(source, config=config | named)
    assert convert(source, tmp_path / "unnamed", config=config, tokenizer="ids").from_format == "llama"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b'{"model_type": "\xff"}', b"[" * 100_000])
def test_damaged_json_is_named(tmp_path, refused, file, content):
    source = write(tmp_path / "source", "llama-nsa")
    (source / file).write_bytes(content)
    assert f"{file}: not readable JSON" in refused(source)


def test_foreign_directories_that_do_not_fit_do_not_load(tmp_path):
    source = write(tmp_path / "source", "llama-nsa")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(CheckpointError, match=r"got shape \[50, 32\], expected \[50, 64\]"):
        checkpoints.load(source)


# --- interruption ----------------------------------------------------------------------------------------------------

KILLED = """
import os, pathlib, signal, sys
from specsa_jax.checkpoints import convert
def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[4] == "rename":
    pathlib.Path.rename = kill
convert(sys.argv[1], sys.argv[2], to_format=sys.argv[3], tokenizer="ids",
        progress=lambda done, total, name: done == 9 and sys.argv[4] == "tensor" and kill())
"""


@pytest.mark.parametrize("format_, moment", [("specsa", "tensor"), ("llama-nsa", "rename")])
def test_killed_conversion_leaves_no_directory_that_loads(tmp_path, format_, moment):
    source = write(tmp_path / "source", "llama-nsa")
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", KILLED, source, out / "target", format_, moment]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    (left,) = out.iterdir()  # the scratch directory, hidden
    assert (left / "config.json").exists() == (moment == "rename")
    with pytest.raises(CheckpointError):
        checkpoints.load(left)
    convert(source, out / "target", to_format=format_, tokenizer="ids")  # and it is in nobody's way
    checkpoints.load(out / "target")


@pytest.mark.parametrize("format_", ["specsa", "llama-nsa"])
def test_no_step_of_a_conversion_leaves_a_directory_that_loads(tmp_path, format_, monkeypatch):
    """Before every file that is written and every rename, with and without a target to replace."""
    source = write(tmp_path / "source", "llama-nsa")
    out = tmp_path / "out"
    steps = []

    def checked(name):
        step = getattr(Path, name)

        def run(path, *arguments, **options):
            if out in path.parents:
                steps.append(name)
                for directory in (d for d in out.rglob("*") if d.is_dir() and out / "target" not in (d, *d.parents)):
                    with pytest.raises(CheckpointError):
                        checkpoints.load(directory)
            return step(path, *arguments, **options)

        monkeypatch.setattr(Path, name, run)

    for name in ("write_text", "rename"):
        checked(name)
    convert(source, out / "target", to_format=format_, tokenizer="ids")
    assert steps[-2:] == ["write_text", "rename"]
    convert(source, out / "target", to_format=format_, tokenizer="ids", overwrite=True)
    assert steps[-3:] == ["write_text", "rename", "rename"]
    checkpoints.load(out / "target")
    with pytest.raises(CheckpointError, match="not finished"):
        convert(source, out / ".mine.partial", tokenizer="ids")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_failed_overwrite_leaves_what_was_there(tmp_path, error, monkeypatch):
    source = write(tmp_path / "source", "llama-nsa")
    convert(source, tmp_path / "out", to_format="llama-nsa", tokenizer="ids")
    rename = Path.rename

    def fail(path, to):
        if path.name.endswith(".partial") and not path.name.endswith(".old.partial"):
            raise error
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises((KeyboardInterrupt, CheckpointError), match="cannot be written: .*No space|^$"):
        convert(source, tmp_path / "out", to_format="llama-nsa", tokenizer="ids", overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]
    checkpoints.load(tmp_path / "out")


def test_failure_in_the_middle_leaves_nothing(tmp_path):
    source = write(tmp_path / "source", "llama-nsa")

    def progress(done, total, name):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", tokenizer="ids", progress=progress)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_target_that_appears_in_the_meantime_stays(tmp_path):
    target = tmp_path / "out"

    def progress(done, total, name):
        target.mkdir(exist_ok=True)
        (target / "config.json").write_text("another's")

    with pytest.raises(CheckpointError, match="already exists"):
        convert(
            write(tmp_path / "source", "llama-nsa"), target, tokenizer="ids", to_format="llama-nsa", progress=progress
        )
    assert (target / "config.json").read_text() == "another's"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]
