"""Conversion of public formats: logits against plain models of their own conventions, round trips bit by bit."""

import dataclasses
import json

import foreign_models as foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from specsa_jax import Engine, PromptError, Strategy, checkpoints
from specsa_jax.checkpoints import CheckpointError, convert
from specsa_jax.checkpoints.formats import FORMATS
from specsa_jax.checkpoints.transforms import InexpressibleError
from specsa_jax.model import head, hidden_states
from specsa_jax.prompts import encode

LENGTH = 75
TOKENS = np.random.default_rng(7).integers(foreign.VOCAB, size=LENGTH).astype(np.int32)


def write(directory, case, dtype=np.float32):
    """A checkpoint of the case as Hugging Face lays it out."""
    foreign.write_config(directory, case)
    save_file(foreign.tensors(case, dtype), directory / "model.safetensors")
    return directory


def logits(loaded):
    config = loaded.config
    run = jax.jit(
        lambda params, row: head(config, params, hidden_states(config, params, row[None], remat=False))[0],
        compiler_options={"xla_backend_optimization_level": "0"},  # one run each: compiling is what takes time
    )
    return np.asarray(run(loaded.params, jnp.asarray(TOKENS)))


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", foreign.CONFIGS)
def test_logits_are_those_of_the_formats_own_conventions(tmp_path, case):
    """At every length from 1 on, so across every border: logits of all positions of a text."""
    source = write(tmp_path / "source", case)
    report = convert(source, tmp_path / "target", tokenizer="bytes" if "byte" in case else "ids")
    assert report.from_format == foreign.NAMES.get(case, case) and report.to_format == "specsa"
    loaded = checkpoints.load(tmp_path / "target")
    close(logits(loaded), foreign.forward(case, foreign.tensors(case), TOKENS))


def same_bits(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        np.testing.assert_array_equal(got[name].view(np.uint8), value.view(np.uint8), err_msg=name)


@pytest.mark.parametrize("case", foreign.CONFIGS)
def test_round_trip_gives_back_the_same_bits_and_config(tmp_path, case):
    source = write(tmp_path / "source", case, foreign.BFLOAT16)
    kind = "bytes" if "byte" in case else "ids"
    report = convert(source, tmp_path / "ours", tokenizer=kind)
    assert report.dtypes == ("bfloat16",)
    convert(tmp_path / "ours", tmp_path / "back")  # to where it came from, which the checkpoint knows
    same_bits(load_file(tmp_path / "back" / "model.safetensors"), foreign.tensors(case, foreign.BFLOAT16))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == foreign.CONFIGS[case]
    again = convert(tmp_path / "back", tmp_path / "again", to_format=report.from_format)
    same_bits(load_file(tmp_path / "again" / "model.safetensors"), foreign.tensors(case, foreign.BFLOAT16))
    assert again.from_format == report.from_format


def test_a_config_is_written_where_none_is_remembered(tmp_path):
    """The same model through another format's words: Llama-NSA's tensors under flash-linear-attention's keys."""
    source = write(tmp_path / "source", "llama-nsa-untied")
    with pytest.raises(CheckpointError, match="num_initial is 0, where it can only be 1"):
        convert(source, tmp_path / "fla", to_format="fla", tokenizer="ids")
    assert not (tmp_path / "fla").exists()
    toy = write(tmp_path / "toy", "flash-sparse-attention")
    config = foreign.CONFIGS["flash-sparse-attention"] | {"topk": 5, "rope_scaling": None}
    convert(toy, tmp_path / "ours", tokenizer="ids", config=config)
    metadata = json.loads((tmp_path / "ours" / "metadata.json").read_text())
    del metadata["source"]["config"]
    (tmp_path / "ours" / "metadata.json").write_text(json.dumps(metadata))
    convert(tmp_path / "ours", tmp_path / "back", to_format="flash-sparse-attention")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["topk"] == 5 and written["compress_type"] == "weightedpool" and written["rope_scaling"] is None
    same_bits(load_file(tmp_path / "back" / "model.safetensors"), foreign.tensors("flash-sparse-attention"))


@pytest.mark.parametrize("case", foreign.CONFIGS)
def test_every_format_states_its_own_models_in_full(case):
    """The config written for a model is understood as that model, without the original at hand."""
    chosen = FORMATS[foreign.NAMES.get(case, case)]
    model = chosen.understand(foreign.CONFIGS[case], foreign.shapes(case))
    written = chosen.config_of(model)
    assert chosen.understand(written, {}) == model
    with pytest.raises(InexpressibleError, match="nsa.scale is 0.5"):
        chosen.config_of(dataclasses.replace(model, nsa=dataclasses.replace(model.nsa, scale=0.5)))


def test_formats_refuse_what_they_cannot_express(tmp_path):
    with pytest.raises(CheckpointError) as error:
        convert("embedded", tmp_path / "x", to_format="llama-nsa")
    text = str(error.value)
    assert "nsa.separate_kv is True" in text and "nsa.compression is 'weighted'" in text
    assert not any(tmp_path.iterdir())


# --- containers ------------------------------------------------------------------------------------------------------


def shard(directory, tensors, count=3):
    """Splits tensors over shards with an index, as Hugging Face does."""
    names = list(tensors)
    files = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    where = {name: files[n % count] for n, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if where[name] == file}, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


@pytest.mark.parametrize("container", ["shards", "index", "file", "bin", "nested pt", "two bins"])
def test_every_container_holds_the_same_model(tmp_path, container):
    case = "llama-nsa"
    tensors = foreign.tensors(case, foreign.BFLOAT16)
    source = foreign.write_config(tmp_path / "source", case)
    path = source
    if container in ("shards", "index"):
        index = shard(source, tensors)
        path = index if container == "index" else source
    elif container == "file":
        path = source / "some-name.safetensors"
        save_file(tensors, path)
    elif container == "bin":
        foreign.write_torch(source / "pytorch_model.bin", tensors)
        (source / "training_args.bin").write_bytes(b"not weights")
    elif container == "nested pt":
        path = tmp_path / "only.pt"
        foreign.write_torch(path, {"step": 7, "model": tensors, "config": foreign.CONFIGS[case]})
    else:
        names = sorted(tensors)
        foreign.write_torch(source / "pytorch_model-1.bin", {name: tensors[name] for name in names[:5]})
        foreign.write_torch(source / "pytorch_model-2.bin", {name: tensors[name] for name in names[5:]})
    convert(path, tmp_path / "ours", tokenizer="ids")
    convert(tmp_path / "ours", tmp_path / "back")
    same_bits(load_file(tmp_path / "back" / "model.safetensors"), tensors)


def test_large_checkpoints_are_written_in_shards(tmp_path, monkeypatch):
    from specsa_jax.checkpoints import conversion, safetensors_file

    def small(directory, tensors):
        safetensors_file.write_safetensors(directory, tensors, max_shard_bytes=8000)

    monkeypatch.setattr(conversion, "write_safetensors", small)
    convert(write(tmp_path / "source", "qwen3"), tmp_path / "out", to_format="qwen3", tokenizer="ids")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    parts = {name: value for file in files for name, value in load_file(tmp_path / "out" / file).items()}
    same_bits(parts, foreign.tensors("qwen3"))
    convert(tmp_path / "out", tmp_path / "ours")


def test_engine_reads_unconverted_directories(tmp_path):
    """Greedy tokens are the plain model's first choices, and the config's end token ends a text."""
    case = "minicpm4"  # of the formats the one whose attention has most switches
    engine = Engine.from_pretrained(write(tmp_path / "source", case))
    assert engine.end_tokens == (2,)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]  # nothing was written
    result = engine.generate([TOKENS[:40].tolist()], max_new_tokens=12, strategy=Strategy(tree="chain:2"))[0]
    text = np.concatenate([TOKENS[:40], result.tokens])
    np.testing.assert_array_equal(foreign.forward(case, foreign.tensors(case), text)[39:-1].argmax(-1), result.tokens)
    assert result.text == " ".join(map(str, result.tokens))


def test_bare_orbax_trees_are_sources_too(tmp_path):
    """The parameters alone, with the config beside them or given."""
    convert(write(tmp_path / "source", "fla"), tmp_path / "ours", tokenizer="ids")
    model = json.loads((tmp_path / "ours" / "config.json").read_text())["model"]
    for number, config in enumerate((None, model)):
        target = tmp_path / f"back{number}"
        convert(tmp_path / "ours" / "params", target, to_format="fla", config=config, tokenizer="ids")
        same_bits(load_file(target / "model.safetensors"), foreign.tensors("fla"))
    with pytest.raises(CheckpointError, match="missing head.kernel|unexpected head.kernel"):
        convert(tmp_path / "ours" / "params", tmp_path / "x", to_format="fla", config=model | {"tied": True})


def test_prompts_begin_as_the_tokenizer_says(tmp_path):
    """Public tokenizers put a token before a text; lists of ids are left alone."""
    from tokenizers import processors

    from specsa_jax.checkpoints.tokenizer_files import id_tokenizer

    source = write(tmp_path / "source", "llama-nsa")
    tokenizer = id_tokenizer(foreign.VOCAB)
    tokenizer.post_processor = processors.TemplateProcessing(single="1 $A", special_tokens=[("1", 1)])
    tokenizer.save(str(source / "tokenizer.json"))
    engine = Engine.from_pretrained(source)
    rows = encode(engine.tokenizer, engine.config.vocab_size, ["7 8", [7, 8]])
    assert [row.tolist() for row in rows] == [[1, 7, 8], [7, 8]]
    with pytest.raises(PromptError, match="got 'hello', expected a text or a list"):
        engine.generate("hello")


def test_byte_checkpoints_bring_their_own_tokenizer(tmp_path):
    source = write(tmp_path / "source", "nsa-byte")
    (source / "generation_config.json").write_text('{"eos_token_id": 0}')
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert checkpoints.load(tmp_path / "back").end_tokens == (0,)
    tokenizer = checkpoints.load(tmp_path / "ours").tokenizer
    text = "naïve\t\x00\r\n🐍 and so on"
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text


def test_tokenizer_files_and_provenance_are_carried(tmp_path):
    from specsa_jax.checkpoints.tokenizer_files import id_tokenizer

    source = write(tmp_path / "source", "fla")
    id_tokenizer(foreign.VOCAB).save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"bos_token": "1"}')
    (source / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        for target in ("ours", "back"):
            assert (tmp_path / target / name).read_bytes() == (source / name).read_bytes()
    loaded = checkpoints.load(tmp_path / "ours")
    assert loaded.end_tokens == (3, 4)
    assert loaded.metadata["source"]["format"] == "fla" and loaded.metadata["converter"] == {"version": 1}
    assert len(loaded.metadata["source"]["fingerprint"]) == 64
    record = json.loads((tmp_path / "back" / "conversion.json").read_text())
    assert record["source"]["before"]["fingerprint"] == loaded.metadata["source"]["fingerprint"]
