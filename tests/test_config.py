"""Configurations that contradict themselves are refused, by the name of the field."""

import pytest
from reference_params import tiny_model, tiny_nsa

from specsa_jax.config import ConfigError, ModelConfig, RopeConfig, preset


@pytest.mark.parametrize(
    "switches, words",
    [
        ({"num_heads": 3}, "num_heads: got 3, expected a multiple of num_kv_heads = 2"),
        ({"head_dim": 7}, "head_dim: got 7, expected an even number"),
        ({"compress_block": 5}, "compress_block: got 5, expected a multiple of compress_stride = 2"),
        ({"select_block": 7}, "select_block: got 7, expected a multiple of compress_stride = 2"),
        ({"compress_block": 10}, "compress_block: got 10, expected at most select_block = 8"),
        ({"num_selected": 2}, r"num_selected: got 2, expected at least num_initial \+ num_local = 3"),
        ({"num_local": 0}, "num_local: got 0, expected at least 1"),
        ({"window": 0}, "window: got 0, expected at least 1"),
        ({"num_heads": 4.0}, "num_heads: got 4.0, expected an integer"),
        ({"gate": "two"}, "gate: got 'two', expected one of 'per_head'"),
        ({"scale": float("nan")}, "scale: got nan, expected a finite number"),
    ],
)
def test_a_layer_whose_sizes_do_not_fit_is_refused(switches, words):
    with pytest.raises(ConfigError, match=words):
        tiny_nsa(**switches)


def test_a_model_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="vocab_size: got 0, expected at least 1"):
        ModelConfig.from_dict({**tiny_model().to_dict(), "vocab_size": 0})
    with pytest.raises(ConfigError, match="rope.factor: got 0.5, expected at least 1"):
        RopeConfig(kind="linear", factor=0.5)
    with pytest.raises(ConfigError, match="preset: got '7b', expected one of embedded"):
        preset("7b")


def test_unknown_and_missing_fields_are_named_and_others_come_back():
    config = tiny_model()
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"unknown field\(s\) colour"):
        ModelConfig.from_dict({**config.to_dict(), "colour": 1})
    with pytest.raises(ConfigError, match=r"missing field\(s\) hidden"):
        ModelConfig.from_dict({name: value for name, value in config.to_dict().items() if name != "hidden"})
