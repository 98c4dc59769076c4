"""The checkpoint directory: what is saved comes back, and every kind of damage is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from specsa_jax import checkpoints, model
from specsa_jax.checkpoints import CheckpointError, store
from specsa_jax.config import ModelConfig, NSAConfig
from specsa_jax.training.tokenizer import train_tokenizer

CONFIG = ModelConfig(
    vocab_size=300, hidden=16, layers=2, intermediate=16, max_length=64,
    nsa=NSAConfig(num_heads=2, num_kv_heads=1, head_dim=8, compress_block=8, compress_stride=4, select_block=8,
                  num_selected=3, window=8, compression="weighted"),
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return model.init_params(CONFIG, 0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\n"] * 4, CONFIG.vocab_size)


@pytest.fixture
def saved(tmp_path, params, tokenizer):
    return checkpoints.save(tmp_path / "saved", params, CONFIG, tokenizer, {"recipe": "none"}, card="# Card\n")


def edit(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_load_gives_back_what_was_saved(tmp_path, params, tokenizer, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    checkpoints.save(tmp_path / "deep" / "saved", params, CONFIG, tokenizer, {"tokens": 7})
    loaded = checkpoints.load(tmp_path / "deep" / "saved")
    assert loaded.config == CONFIG and loaded.metadata == {"tokens": 7}
    assert loaded.tokenizer.to_str() == tokenizer.to_str()
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    for got, expected in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(params), strict=True):
        assert got.dtype == dtype and isinstance(got, jax.Array)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_directory_holds_the_documented_files(saved):
    assert {p.name for p in saved.iterdir()} == {
        "config.json", "tokenizer.json", "params", "metadata.json", "README.md"
    }  # fmt: skip
    assert (saved / "README.md").read_text() == "# Card\n"
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]  # nothing is left beside it


def test_existing_target_is_refused_unless_overwritten(saved, params, tokenizer):
    with pytest.raises(CheckpointError, match="already exists"):
        checkpoints.save(saved, params, CONFIG, tokenizer, {})
    checkpoints.save(saved, params, CONFIG, tokenizer, {"new": True}, overwrite=True)
    assert checkpoints.load(saved).metadata == {"new": True}
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_overwrite_spares_directories_that_are_no_checkpoint(tmp_path, params, tokenizer):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoints.save(tmp_path, params, CONFIG, tokenizer, {}, overwrite=True)


def test_failed_save_leaves_the_old_checkpoint_and_nothing_else(saved, params, tokenizer):
    with pytest.raises(TypeError):
        checkpoints.save(saved, params, CONFIG, tokenizer, {"not JSON": object()}, overwrite=True)
    assert checkpoints.load(saved).metadata == {"recipe": "none"}
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_unwritable_target_is_an_error(tmp_path, params, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoints.save(tmp_path / "file" / "saved", params, CONFIG, tokenizer, {})


def test_params_that_do_not_fit_the_config_are_not_saved(tmp_path, params, tokenizer):
    with pytest.raises(CheckpointError, match="missing layers.1.attn_norm.scale"):
        checkpoints.save(tmp_path / "x", params | {"layers": {0: params["layers"][0]}}, CONFIG, tokenizer, {})
    assert not any(tmp_path.iterdir())


def test_unknown_checkpoint_error_lists_the_packaged_ones(monkeypatch, saved):
    monkeypatch.setattr(store, "_PACKAGED", saved.parent)
    assert store.resolve("saved") == saved
    with pytest.raises(CheckpointError, match=r"got 'nowhere'.*packaged name \(saved\)"):
        checkpoints.load("nowhere")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "metadata.json"])
def test_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}.* missing|{name}: missing"):
        checkpoints.load(saved)


def largest(saved):
    return max((p for p in (saved / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_truncated_params_are_named(saved):
    file = largest(saved)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{file.name} has \d+ bytes, expected \d+"):
        checkpoints.load(saved)


def test_flipped_bit_in_the_params_is_named(saved):
    file = largest(saved)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{file.name} is corrupt"):
        checkpoints.load(saved)


def test_damage_beyond_the_listed_files_is_still_a_checkpoint_error(saved):
    for file in (saved / "params").rglob("*"):
        if file.is_file():
            file.unlink()
    edit(saved / "config.json", lambda top: top.update(files={"tokenizer.json": top["files"]["tokenizer.json"]}))
    with pytest.raises(CheckpointError, match="params: cannot be read"):
        checkpoints.load(saved)


def test_unreadable_json_is_named(saved):
    text = (saved / "config.json").read_text()
    (saved / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="config.json: not readable JSON"):
        checkpoints.load(saved)


def test_unknown_schema_is_refused(saved):
    edit(saved / "config.json", lambda top: top.update(schema=99))
    with pytest.raises(CheckpointError, match="schema: got 99, expected 1"):
        checkpoints.load(saved)


def test_invalid_model_config_is_explained(saved):
    edit(saved / "config.json", lambda top: top["model"].update(hidden=-1))
    with pytest.raises(CheckpointError, match="config.json: model: .*hidden: got -1"):
        checkpoints.load(saved)


def test_one_error_lists_every_tensor_that_contradicts_the_config(saved):
    edit(saved / "config.json", lambda top: top["model"].update(layers=1, intermediate=32, tied=False))
    with pytest.raises(CheckpointError) as error:
        checkpoints.load(saved)
    text = str(error.value)
    assert "missing head.kernel [16, 300]" in text
    assert "unexpected layers.1.attn.q_proj.kernel [16, 16]" in text
    assert "layers.0.mlp.up_proj.kernel: got shape [16, 16], expected [16, 32]" in text


def test_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path, params):
    bigger = train_tokenizer(["one two three four five six seven eight"] * 9, 300)
    bigger.add_tokens([f"<{i}>" for i in range(100)])
    checkpoints.save(tmp_path / "x", params, CONFIG, bigger, {})
    with pytest.raises(CheckpointError, match="vocab_size = 300"):
        checkpoints.load(tmp_path / "x")


def test_loaded_tokenizer_round_trips_every_character(saved):
    tokenizer: Tokenizer = checkpoints.load(saved).tokenizer
    text = "x = 'naïve'\t# \U0001f40d\r\n\x00 <|endoftext|>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
