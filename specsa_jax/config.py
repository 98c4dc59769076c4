"""Frozen configurations: one NSA layer, one transformer, and the presets.

Everything here is static (hashable, compared by value) and becomes part of a compiled program's identity.
Names follow the NSA paper (arXiv 2502.11089): l, d, l', n, w are ``compress_block``, ``compress_stride``,
``select_block``, ``num_selected`` and ``window``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal, get_args, get_type_hints

Compression = Literal["mean", "weighted", "linear", "mlp"]
PositionEncoding = Literal["none", "keys", "both"]
GateKind = Literal["per_head", "shared", "query_mlp", "none"]
CompressedRope = Literal["before", "after", "none"]
ScoreMap = Literal["overlap", "paper", "max"]
RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]
QuerySpan = Literal["head", "all_heads"]
MLPKind = Literal["swiglu", "silu"]


class ConfigError(ValueError):
    """A configuration whose values contradict each other or are out of range."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


class _Config:
    """Checks of field types and the dict form shared by all configs."""

    def _check_types(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, hint = getattr(self, field.name), hints[field.name]
            where = f"{type(self).__name__}.{field.name}"
            choices = get_args(hint) if getattr(hint, "__origin__", None) is Literal else None
            if choices:
                _require(value in choices, f"{where}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
            elif hint is int:
                _require(
                    isinstance(value, int) and not isinstance(value, bool),
                    f"{where}: got {value!r}, expected an integer",
                )
            elif hint is bool:
                _require(isinstance(value, bool), f"{where}: got {value!r}, expected true or false")
            elif hint is float:
                _require(
                    isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
                    f"{where}: got {value!r}, expected a finite number",
                )

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-ready nested dicts."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """The inverse of :meth:`to_dict`. Raises ConfigError that names unknown or missing fields."""
        _require(isinstance(values, dict), f"{cls.__name__}: got {type(values).__name__}, expected an object")
        hints = get_type_hints(cls)
        names = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(names))
        _require(not unknown, f"{cls.__name__}: unknown field(s) {', '.join(unknown)}; known: {', '.join(names)}")
        missing = sorted(
            n for n, f in names.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and n not in values
        )  # fmt: skip
        _require(not missing, f"{cls.__name__}: missing field(s) {', '.join(missing)}")
        nested = {
            n: hints[n].from_dict(v) if isinstance(hints[n], type) and issubclass(hints[n], _Config) else v
            for n, v in values.items()
        }
        return cls(**nested)


@dataclasses.dataclass(frozen=True)
class NSAConfig(_Config):
    """One native-sparse-attention layer: sizes, and the switches that public models need.

    Attributes:
      num_heads, num_kv_heads, head_dim: Hq, Hkv, D; G = Hq / Hkv query heads share a KV head.
      compress_block, compress_stride: l and d, in tokens; block i covers [i·d, i·d+l).
      select_block, num_selected: l' in tokens and n, the forced blocks included.
      num_initial, num_local: forced blocks at the start, and at the query's end (its own block and those before).
      window: w, in tokens. ``window_excludes_query``: the window holds w tokens *and* the query's own (w+1).
      compression: how l keys become one. ``mean``; ``weighted``: a learned weight per head and offset;
        ``linear``: l·D → D per head; ``mlp``: l·D → ``compress_hidden`` → D per head with SiLU.
      compress_position: a learned encoding per head and offset in the block, added to keys (and values).
      compressed_rope: RoPE on the keys before pooling, on the pooled key at position i·d, or none there.
      separate_kv: each branch has its own K/V projections (the paper), else the three share one.
      qk_norm: RMSNorm over D, with a learned scale, on every query and key before RoPE (Qwen3).
      gate, gate_bias: sigmoid gates per head and branch, per branch for all heads, or none (branches add up);
        ``query_mlp``: softmax over the branches, per KV head, of an MLP with ``gate_hidden`` SiLU units (and biases)
        on the mean of the group's rotated queries.
      score_map: blocks' overlap counts (default), the index map as the paper prints it, or the largest probability
        among the compression blocks that touch the block (InfLLM-V2).
      compressed_output: False: the compressed branch only selects (InfLLM-V2).
      fused_selected_window: selected and window tokens meet in one softmax (InfLLM-V2), each token once,
        under the selected branch's gate.
      dense_len: queries that see fewer than this many tokens attend to all of them, ungated; 0: never.
      scale: softmax scale; 0.0 stands for 1/√D.
    """

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    num_initial: int = 1
    num_local: int = 2
    window: int = 512
    window_excludes_query: bool = False
    compression: Compression = "mlp"
    compress_hidden: int = 256
    compress_position: PositionEncoding = "both"
    compressed_rope: CompressedRope = "after"
    separate_kv: bool = True
    qk_norm: bool = False
    gate: GateKind = "per_head"
    gate_bias: bool = False
    gate_hidden: int = 32
    score_map: ScoreMap = "overlap"
    compressed_output: bool = True
    fused_selected_window: bool = False
    dense_len: int = 0
    scale: float = 0.0

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("num_heads", "num_kv_heads", "head_dim", "compress_block", "compress_stride", "select_block",
                     "num_selected", "window", "compress_hidden", "gate_hidden"):  # fmt: skip
            _require(getattr(self, name) >= 1, f"NSAConfig.{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("num_initial", "num_local", "dense_len", "scale"):
            _require(getattr(self, name) >= 0, f"NSAConfig.{name}: got {getattr(self, name)}, expected at least 0")
        l, d, lp = self.compress_block, self.compress_stride, self.select_block
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads: got {self.num_heads}, expected a multiple of num_kv_heads = {self.num_kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim: got {self.head_dim}, expected an even number (RoPE rotates pairs)")
        _require(l % d == 0, f"compress_block: got {l}, expected a multiple of compress_stride = {d}")
        _require(lp % d == 0, f"select_block: got {lp}, expected a multiple of compress_stride = {d}")
        _require(l <= lp, f"compress_block: got {l}, expected at most select_block = {lp}")
        _require(self.num_local >= 1, "num_local: got 0, expected at least 1 (a query's own block is always selected)")
        _require(self.num_selected >= self.num_initial + self.num_local,
                 f"num_selected: got {self.num_selected}, expected at least num_initial + num_local = "
                 f"{self.num_initial + self.num_local}")  # fmt: skip

    @property
    def group(self) -> int:
        """G, query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def window_tokens(self) -> int:
        """Tokens in the window, the query's own included."""
        return self.window + self.window_excludes_query

    @property
    def softmax_scale(self) -> float:
        return self.scale or self.head_dim**-0.5

    @property
    def blocks_per_page(self) -> int:
        """l'/d: compression blocks that start in one selection block."""
        return self.select_block // self.compress_stride

    @property
    def gate_outputs(self) -> int:
        """Width of the gate projection from the hidden state: 3·Hq, 3, or 0."""
        return {"per_head": 3 * self.num_heads, "shared": 3}.get(self.gate, 0)

    @property
    def branch_sets(self) -> int:
        """How many K/V projections a layer has: 3 (compressed, selected, window) or 1."""
        return 3 if self.separate_kv else 1

    @property
    def branch_set(self) -> tuple[int, int, int]:
        """Which K/V set the compressed, the selected and the window branch read."""
        return (0, 1, 2) if self.separate_kv else (0, 0, 0)

    @property
    def window_ring(self) -> bool:
        """Whether the window has K/V of its own, of which only the last w tokens need to stay."""
        return self.separate_kv and not self.fused_selected_window

    def overlap_weights(self) -> dict[int, int]:
        """How often block c's probability counts in selection block j, by the offset o = c − j·l'/d (zero elsewhere).

        The sum over m in [0, l'/d), k in [0, l/d) of p[j·l'/d + m − k]; the paper prints − m − k. The keys are the
        blocks that touch block j, over which ``score_map="max"`` takes the largest.
        """
        counts: dict[int, int] = {}
        sign = -1 if self.score_map == "paper" else 1
        for m in range(self.blocks_per_page):
            for k in range(self.compress_block // self.compress_stride):
                counts[sign * m - k] = counts.get(sign * m - k, 0) + 1
        return counts


@dataclasses.dataclass(frozen=True)
class RopeConfig(_Config):
    """Rotary embedding in the rotate-half layout (Su et al. 2021) with the scalings in public use.

    Attributes:
      theta: base of the frequencies.
      kind: ``default``; ``linear``: positions divided by ``factor``; ``llama3``: wavelengths above
        ``original_length / low_freq_factor`` stretched by ``factor``, blended up to ``high_freq_factor``;
        ``yarn``: blended by rotations between ``beta_fast`` and ``beta_slow`` (arXiv 2309.00071), with its
        attention temperature applied to both queries and keys; ``longrope``: each pair's wavelength stretched by its
        own of ``factors`` (D/2 of them), and √(1 + ln factor / ln original_length) on queries and keys
        (arXiv 2402.13753).
      query_span: the frequencies of a query's pairs fall from 1 within each head, or once over all heads together,
        as one vector of Hq·D (seconds-0/nsa-117m-byte); keys always rotate head by head.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_length: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    factors: tuple[float, ...] = ()
    query_span: QuerySpan = "head"

    def __post_init__(self) -> None:
        if isinstance(self.factors, list):  # JSON's
            object.__setattr__(self, "factors", tuple(self.factors))
        _require(isinstance(self.factors, tuple), f"rope.factors: got {self.factors!r:.80}, expected a list of numbers")
        self._check_types()
        fits = (self.kind == "longrope") == bool(self.factors)
        _require(fits, f"rope.factors: got {len(self.factors)} with kind {self.kind!r}; 'longrope' alone has them")
        _require(all(isinstance(f, (int, float)) and f > 0 for f in self.factors),
                 f"rope.factors: got {self.factors!r:.80}, expected numbers above 0")  # fmt: skip
        _require(self.theta > 0, f"rope.theta: got {self.theta}, expected above 0")
        _require(self.factor >= 1, f"rope.factor: got {self.factor}, expected at least 1")
        _require(self.original_length >= 1, f"rope.original_length: got {self.original_length}, expected at least 1")
        _require(
            self.high_freq_factor > self.low_freq_factor > 0,
            f"rope.high_freq_factor: got {self.high_freq_factor}, expected above low_freq_factor = "
            f"{self.low_freq_factor} > 0",
        )
        _require(self.beta_fast > self.beta_slow > 0,
                 f"rope.beta_fast: got {self.beta_fast}, expected above beta_slow = {self.beta_slow} > 0")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Config):
    """A decoder-only transformer with NSA layers (pre-RMSNorm, RoPE, GQA).

    Attributes:
      vocab_size, hidden, layers, intermediate: V, width, depth, width of the MLP's inside.
      max_length: the longest context, in tokens, that the model is meant for.
      norm_eps: ε of every RMSNorm.
      tied: the output head is the embedding, transposed.
      mlp: ``swiglu``: down(silu(gate·x) · up·x), or ``silu``: down(silu(up·x)).
      embed_scale, residual_scale, logit_scale: factors on embeddings, on what a sublayer adds, and on logits (MiniCPM).
      nsa, rope: the attention layer and its rotary embedding.
    """

    vocab_size: int
    hidden: int
    layers: int
    intermediate: int
    max_length: int
    nsa: NSAConfig
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-5
    tied: bool = True
    mlp: MLPKind = "swiglu"
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        self._check_types()
        pairs = self.nsa.head_dim // 2
        _require(len(self.rope.factors) in (0, pairs),
                 f"rope.factors: got {len(self.rope.factors)}, expected head_dim / 2 = {pairs}")  # fmt: skip
        for name in ("vocab_size", "hidden", "layers", "intermediate", "max_length"):
            _require(getattr(self, name) >= 1, f"ModelConfig.{name}: got {getattr(self, name)}, expected at least 1")
        # Every layer is traced: a damaged number would take days to be found out.
        _require(self.layers <= 4096, f"ModelConfig.layers: got {self.layers}, expected at most 4096")
        _require(self.norm_eps > 0, f"ModelConfig.norm_eps: got {self.norm_eps}, expected above 0")

    def to_json(self) -> str:
        """Pretty-printed JSON, fields in declaration order."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _llama3_rope() -> RopeConfig:
    return RopeConfig(theta=500000.0, kind="llama3", factor=8.0, original_length=8192)


PRESETS: dict[str, ModelConfig] = {
    # The checkpoint that ships with the package: Python source, trained at 4K tokens and finished at 8K.
    "embedded": ModelConfig(
        vocab_size=4096, hidden=384, layers=6, intermediate=768, max_length=8192,
        nsa=NSAConfig(num_heads=8, num_kv_heads=2, head_dim=64, num_selected=8, window=256, compression="weighted"),
    ),
    "120m": ModelConfig(
        vocab_size=32768, hidden=768, layers=12, intermediate=2048, max_length=65536, rope=RopeConfig(theta=500000.0),
        nsa=NSAConfig(num_heads=16, num_kv_heads=2, head_dim=64, compression="weighted"),
    ),
    "1b": ModelConfig(
        vocab_size=128256, hidden=2048, layers=16, intermediate=8192, max_length=131072, rope=_llama3_rope(),
        nsa=NSAConfig(num_heads=32, num_kv_heads=8, head_dim=64, compression="mlp"),
    ),
    "8b": ModelConfig(
        vocab_size=128256, hidden=4096, layers=32, intermediate=14336, max_length=131072, tied=False,
        rope=_llama3_rope(),
        nsa=NSAConfig(num_heads=32, num_kv_heads=8, head_dim=128, compression="mlp"),
    ),
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """The preset called ``name``. Raises ConfigError listing the known ones."""
    _require(name in PRESETS, f"preset: got {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
