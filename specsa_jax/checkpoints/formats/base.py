"""What a format is, and what the formats share: reading of config fields, RoPE, the rows of Llama-type keys."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from specsa_jax.checkpoints.transforms import LINEAR, InexpressibleError, Row, Shape
from specsa_jax.config import ConfigError, ModelConfig, NSAConfig, RopeConfig

Shapes = Mapping[str, Shape]


@dataclasses.dataclass(frozen=True)
class Format:
    """A public checkpoint format.

    Attributes:
      name: for ``--from`` and ``--to``.
      title: one line for people.
      model_types: values of the config's ``model_type`` or names in ``architectures`` that say this format.
      has_keys: whether tensors of these shapes say this format.
      understand: the model that a config (and the tensors' shapes) describe; raises ConfigError with every reason.
      express: the format's config of a model, without checks: :meth:`config_of` makes sure that it says all.
      table: source keys, targets and transformations for a model.
      ignored: endings of keys of tensors that hold nothing (buffers).
      notes: what is worth knowing about the format's own code where it differs from what it defines.
      dense: has no sparse attention; ``--adapt nsa`` gives it one.
      byte_tokens: its tokens are bytes, so it needs no tokenizer file.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    has_keys: Callable[[Shapes], bool]
    understand: Callable[[dict[str, Any], Shapes], ModelConfig]
    express: Callable[[ModelConfig], dict[str, Any]]
    table: Callable[[ModelConfig], Sequence[Row]]
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)
    notes: tuple[str, ...] = ()
    dense: bool = False
    byte_tokens: bool = False

    def says(self, config: Mapping[str, Any]) -> bool:
        """Whether the config names this format."""
        architectures = config.get("architectures")
        names = [config.get("model_type"), *(architectures if isinstance(architectures, list) else ())]
        return any(name in self.model_types for name in names)

    def config_of(self, model: ModelConfig) -> dict[str, Any]:
        """The format's config of a model. Raises InexpressibleError with every field that it has no word for."""
        try:
            raw = self.express(model)
            back = self.understand(raw, {})
        except ConfigError as error:
            raise InexpressibleError(f"{self.name} cannot express this model: {error}") from error
        if problems := _differences(model, back):
            raise InexpressibleError(f"{self.name} cannot express this model: " + "; ".join(problems))
        return raw


# Without effect under these conditions, so that two configs that differ in them alone describe one model.
_UNUSED: dict[str, Callable[[NSAConfig], bool]] = {
    "compress_hidden": lambda nsa: nsa.compression != "mlp",
    "gate_hidden": lambda nsa: nsa.gate != "query_mlp",
    "gate_bias": lambda nsa: not nsa.gate_outputs,
}


def _differences(wanted: ModelConfig, got: ModelConfig) -> list[str]:
    problems = []
    for where, a, b in (("", wanted, got), ("nsa.", wanted.nsa, got.nsa), ("rope.", wanted.rope, got.rope)):
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            unused = where == "nsa." and field.name in _UNUSED and _UNUSED[field.name](wanted.nsa)
            if where == "rope." and not _rope_uses(wanted.rope, field.name):
                unused = True
            if field.name == "scale":  # 0.0 stands for 1/√D
                x, y = wanted.nsa.softmax_scale, got.nsa.softmax_scale
            if field.name in ("nsa", "rope") or unused or x == y:
                continue
            if isinstance(x, float) and isinstance(y, float) and math.isclose(x, y, rel_tol=1e-12):
                continue
            problems.append(f"{where}{field.name} is {x!r:.60}, where it can only be {y!r:.60}")
    return problems


def _rope_uses(rope: RopeConfig, name: str) -> bool:
    used = {
        "default": (), "linear": ("factor",),
        "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "original_length", "beta_fast", "beta_slow"),
        "longrope": ("factor", "original_length", "factors"),
    }[rope.kind]  # fmt: skip
    return name in ("theta", "kind", "query_span", *used)


_MISSING = object()


class Fields:
    """Reads a foreign config and collects everything that is wrong with it; :meth:`finish` raises it all at once."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw
        self.problems: list[str] = []

    def _get(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is None:
            if default is _MISSING:
                self.problems.append(f"{name}: missing")
            return default
        return value

    def whole(self, name: str, default: Any = _MISSING, least: int = 1) -> int:
        """An integer of at least ``least``."""
        value = self._get(name, default)
        if value is _MISSING:
            return max(least, 1)  # a stand-in; finish() raises
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
            self.problems.append(f"{name}: got {value!r:.80}, expected an integer of at least {least}")
            return max(least, 1)
        return value

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A number above 0."""
        value = self._get(name, default)
        if value is _MISSING:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            self.problems.append(f"{name}: got {value!r:.80}, expected a number above 0")
            return 1.0
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.problems.append(f"{name}: got {value!r}, expected true or false")
            return default
        return value

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """The field may be absent or null, or one of ``allowed``; anything else is not supported."""
        value = self.raw.get(name)
        if value is not None and value not in allowed:
            expected = " or ".join(map(repr, allowed)) or "nothing"
            self.problems.append(f"{name}: got {value!r:.80}, expected {expected} ({why})")

    def finish(self) -> None:
        """Raises ConfigError with every problem."""
        if self.problems:
            raise ConfigError("; ".join(dict.fromkeys(self.problems)))  # some fields are read twice


def read_rope(fields: Fields, default_theta: Any = 10000.0) -> RopeConfig:
    """RoPE as Hugging Face configs state it: ``rope_theta`` and ``rope_scaling``, or ``rope_parameters``."""
    raw = fields.raw
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        fields.problems.append(f"rope_scaling: got {scaling!r:.80}, expected an object")
        scaling = {}
    theta = fields.number("rope_theta", scaling.get("rope_theta", default_theta))
    inner = Fields(scaling)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    built: dict[str, Any] = {}
    if kind in ("default", None):
        kind = "default"
    elif kind == "linear":
        built = {"factor": inner.number("factor")}
    elif kind == "llama3":
        built = {
            "factor": inner.number("factor"), "original_length": inner.whole("original_max_position_embeddings"),
            "low_freq_factor": inner.number("low_freq_factor"), "high_freq_factor": inner.number("high_freq_factor"),
        }  # fmt: skip
    elif kind == "yarn":
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            inner.only(name, why="only YaRN's own temperature is supported")
        inner.only("truncate", True, why="pairs are rounded outwards")
        built = {
            "factor": inner.number("factor"),
            "original_length": inner.whole("original_max_position_embeddings", raw.get("max_position_embeddings", 0)),
            "beta_fast": inner.number("beta_fast", 32.0), "beta_slow": inner.number("beta_slow", 1.0),
        }  # fmt: skip
    elif kind in ("longrope", "su"):
        kind, built = "longrope", _read_longrope(fields, inner)
    else:
        inner.problems.append(f"rope_type: got {kind!r}, expected default, linear, llama3, yarn or longrope")
        kind = "default"
    fields.problems += [f"rope_scaling.{problem}" for problem in inner.problems]
    return RopeConfig(theta=theta, kind=kind, **built)


def _read_longrope(fields: Fields, inner: Fields) -> dict[str, Any]:
    short, long = inner.raw.get("short_factor"), inner.raw.get("long_factor")
    if not isinstance(short, list) or not isinstance(long, list) or not short:
        inner.problems.append("short_factor, long_factor: expected two lists of numbers")
        return {"factors": (1.0,)}
    longest = fields.whole("max_position_embeddings")
    original = inner.whole("original_max_position_embeddings", longest)
    if short != long and longest > original:
        inner.problems.append("short_factor: differs from long_factor, and which of them counts would depend on how "
                              "long the text becomes; a decoded token must not change its past")  # fmt: skip
    return {"factors": tuple(short), "factor": max(longest / original, 1.0), "original_length": original}


def write_rope(rope: RopeConfig, max_length: int) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` of a Hugging Face config."""
    scaling: dict[str, Any] | None = None
    if rope.kind == "linear":
        scaling = {"factor": rope.factor}
    elif rope.kind == "llama3":
        scaling = {
            "factor": rope.factor, "low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_length,
        }  # fmt: skip
    elif rope.kind == "yarn":
        scaling = {
            "factor": rope.factor, "original_max_position_embeddings": rope.original_length,
            "beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow,
        }  # fmt: skip
    elif rope.kind == "longrope":
        scaling = {
            "short_factor": list(rope.factors), "long_factor": list(rope.factors),
            "original_max_position_embeddings": rope.original_length,
        }  # fmt: skip
    if scaling is not None:
        scaling = {"rope_type": rope.kind, **scaling}
    return {"rope_theta": rope.theta, "rope_scaling": scaling, "max_position_embeddings": max_length}


def read_decoder(fields: Fields, **defaults: Any) -> dict[str, Any]:
    """The sizes that Llama-type configs have in common, as ModelConfig's arguments (without ``nsa`` and ``rope``)."""
    for name in ("attention_bias", "mlp_bias"):
        fields.only(name, False, why="biases are not supported")
    fields.only("hidden_act", "silu", "swish", why="the MLP is a SwiGLU")
    return {
        "vocab_size": fields.whole("vocab_size"), "hidden": fields.whole("hidden_size"),
        "layers": fields.whole("num_hidden_layers"), "intermediate": fields.whole("intermediate_size"),
        "max_length": fields.whole("max_position_embeddings", defaults.get("max_length", _MISSING)),
        "norm_eps": fields.number("rms_norm_eps", defaults.get("norm_eps", 1e-6)),
        "tied": fields.flag("tie_word_embeddings", defaults.get("tied", False)),
    }  # fmt: skip


def read_heads(fields: Fields) -> dict[str, int]:
    """NSAConfig's heads from a Llama-type config."""
    heads = fields.whole("num_attention_heads")
    return {
        "num_heads": heads, "num_kv_heads": fields.whole("num_key_value_heads", heads),
        "head_dim": fields.whole("head_dim", max(fields.whole("hidden_size"), heads) // heads),
    }  # fmt: skip


def write_decoder(model: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`read_decoder` and :func:`read_heads`, RoPE included."""
    return {
        "vocab_size": model.vocab_size, "hidden_size": model.hidden, "num_hidden_layers": model.layers,
        "intermediate_size": model.intermediate, "num_attention_heads": model.nsa.num_heads,
        "num_key_value_heads": model.nsa.num_kv_heads, "head_dim": model.nsa.head_dim, "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps, "tie_word_embeddings": model.tied, "attention_bias": False,
        **write_rope(model.rope, model.max_length),
    }  # fmt: skip


def llama_rows(model: ModelConfig) -> list[Row]:
    """The rows of ``LlamaForCausalLM``'s keys."""
    rows = [
        Row("model.embed_tokens.weight", "embed.embedding"),
        Row("model.layers.{i}.input_layernorm.weight", "layers.{i}.attn_norm.scale"),
        Row("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.attn.q_proj.kernel", LINEAR),
        Row("model.layers.{i}.self_attn.k_proj.weight", "layers.{i}.attn.k_proj.kernel", LINEAR),
        Row("model.layers.{i}.self_attn.v_proj.weight", "layers.{i}.attn.v_proj.kernel", LINEAR),
        Row("model.layers.{i}.self_attn.o_proj.weight", "layers.{i}.attn.o_proj.kernel", LINEAR),
        Row("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.mlp_norm.scale"),
        Row("model.layers.{i}.mlp.gate_proj.weight", "layers.{i}.mlp.gate_proj.kernel", LINEAR),
        Row("model.layers.{i}.mlp.up_proj.weight", "layers.{i}.mlp.up_proj.kernel", LINEAR),
        Row("model.layers.{i}.mlp.down_proj.weight", "layers.{i}.mlp.down_proj.kernel", LINEAR),
        Row("model.norm.weight", "norm.scale"),
    ]
    return rows if model.tied else [*rows, Row("lm_head.weight", "head.kernel", LINEAR)]


def power_of_two(count: int) -> int:
    """The smallest power of two of at least ``count``."""
    return 1 << (count - 1).bit_length()
