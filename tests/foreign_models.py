"""Tiny random checkpoints of the public formats, and plain NumPy models of each format's own conventions.

Independent of the package on purpose: keys, shapes, configs and arithmetic are written down here a second time, after
the formats' public code. Everything is computed in float64, one query at a time.
"""

from __future__ import annotations

import collections
import io
import json
import math
import pickle
import sys
import types
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

HIDDEN, HEADS, KV_HEADS, DIM, LAYERS, INNER, VOCAB = 32, 4, 2, 8, 2, 48, 50
GROUP = HEADS // KV_HEADS


# --- configs, as the formats write them ------------------------------------------------------------------------------

LLAMA_SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": INNER,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
TOY = {
    "vocab_size": VOCAB, "max_position_embeddings": 256, "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM,
    "rope_theta": 500.0, "rope_scaling": LLAMA3, "kernel_size": 4, "kernel_stride": 2, "block_size": 8, "topk": 4,
    "init_blocks": 1, "local_blocks": 2, "window_size": 6,
}  # fmt: skip

CONFIGS = {
    "llama-nsa": LLAMA_SIZES | {
        "architectures": ["LlamaNSAForCausalLM"], "model_type": "llama-nsa", "rms_norm_eps": 1e-5, "rope_theta": 500.0,
        "tie_word_embeddings": True, "block_size": 4, "block_counts": 6, "window_size": 6,
    },
    "llama-nsa-untied": LLAMA_SIZES | {
        "architectures": ["LlamaNSAForCausalLM"], "model_type": "llama-nsa", "rms_norm_eps": 1e-5, "rope_theta": 500.0,
        "tie_word_embeddings": False, "block_size": 4, "block_counts": 4, "window_size": 6,
    },
    "fla": {
        "architectures": ["NSAForCausalLM"], "model_type": "nsa", "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "qkv_bias": False,
        "block_size": 4, "block_counts": 6, "window_size": 6, "rope_theta": 500.0, "max_position_embeddings": 256,
        "hidden_ratio": 2, "intermediate_size": None, "hidden_act": "swish", "norm_eps": 1e-6,
        "tie_word_embeddings": False, "elementwise_affine": True,
    },
    "toy-nsa-llama-weighted": TOY | {"compress_type": "weightedpool"},
    "toy-nsa-llama-linear": TOY | {"compress_type": "linear"},
    "toy-nsa-llama-avg": TOY | {"compress_type": "avgpool"},
    "flash-sparse-attention": TOY | {"compress_type": "weightedpool"},
    "nsa-byte": {
        "model": {"dim": 2 * DIM * 6, "n_layers": LAYERS, "n_heads": 12, "n_kv_groups": 2, "d_k": DIM, "d_v": DIM},
        "nsa": {"l": 4, "d": 2, "l_sel": 8, "n_sel": 4, "w": 6, "phi": "avg"},
        "data": {"tokenizer": "byte"},
    },
    "nsa-byte-conv": {
        "model": {"dim": 2 * DIM * 6, "n_layers": LAYERS, "n_heads": 12, "n_kv_groups": 2, "d_k": DIM, "d_v": DIM},
        "nsa": {"l": 4, "d": 2, "l_sel": 8, "n_sel": 4, "w": 6, "phi": "mlp"},
        "data": {"tokenizer": "byte"},
    },
    "minicpm4": LLAMA_SIZES | {
        "architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "rms_norm_eps": 1e-6, "rope_theta": 500.0,
        "tie_word_embeddings": False, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 8,
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.5, 2.0],
                         "long_factor": [1.0, 1.1, 1.5, 2.0], "original_max_position_embeddings": 64},
        "sparse_config": {"kernel_size": 4, "kernel_stride": 2, "init_blocks": 1, "block_size": 8, "window_size": 8,
                          "topk": 3, "use_nope": False, "dense_len": 45},
    },
    "llama": LLAMA_SIZES | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500.0,
        "rope_scaling": LLAMA3, "tie_word_embeddings": True,
    },
    "qwen3": {key: value for key, value in LLAMA_SIZES.items() if key != "mlp_bias"} | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1000.0,
        "rope_scaling": None, "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": None,
    },
}  # fmt: skip
# The format's name to the package, where the case's differs.
NAMES = {
    "llama-nsa-untied": "llama-nsa", "toy-nsa-llama-weighted": "toy-nsa-llama", "toy-nsa-llama-linear": "toy-nsa-llama",
    "toy-nsa-llama-avg": "toy-nsa-llama", "nsa-byte-conv": "nsa-byte",
}  # fmt: skip


def shapes(case: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a case's checkpoint."""
    q, kv = HEADS * DIM, KV_HEADS * DIM
    out: dict[str, tuple[int, ...]] = {}
    if case.startswith("nsa-byte"):
        hidden = CONFIGS[case]["model"]["dim"]
        out = {"embed.weight": (256, hidden), "norm_f.weight": (hidden,), "lm_head.weight": (256, hidden)}
        for i in range(LAYERS):
            at = f"blocks.{i}."
            out |= {at + "norm1.weight": (hidden,), at + "norm2.weight": (hidden,),
                    at + "attn.W_Q.weight": (12 * DIM, hidden), at + "attn.out.weight": (hidden, 12 * DIM),
                    at + "attn.gate.fc1.weight": (DIM // 2, DIM), at + "attn.gate.fc1.bias": (DIM // 2,),
                    at + "attn.gate.fc2.weight": (3, DIM // 2), at + "attn.gate.fc2.bias": (3,),
                    at + "mlp.fc1.weight": (4 * hidden, hidden),
                    at + "mlp.fc2.weight": (hidden, 4 * hidden)}  # fmt: skip
            for kind in ("K_sel", "V_sel", "K_win", "V_win", "K_cmp", "V_cmp"):
                out[f"{at}attn.W_{kind}.weight"] = (2 * DIM, hidden)
            if case == "nsa-byte-conv":
                out |= {f"{at}attn.phi_{kind}_conv.weight": (DIM, 1, 4) for kind in "kv"}
        return out
    if case.startswith(("toy", "flash")):
        out = {"embedding.weight": (VOCAB, HIDDEN), "norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
        for i in range(LAYERS):
            at = f"layers.{i}."
            out |= {at + "attn_norm.weight": (HIDDEN,), at + "ffn_norm.weight": (HIDDEN,),
                    at + "nsa.proj_q.weight": (q, HIDDEN), at + "nsa.proj_k.weight": (kv, HIDDEN),
                    at + "nsa.proj_v.weight": (kv, HIDDEN), at + "nsa.proj_o.weight": (HIDDEN, q),
                    at + "nsa.intra_block_pe": (KV_HEADS, 4, DIM),
                    at + "nsa.gate.0.weight": (3 if case.startswith("flash") else 3 * HEADS, HIDDEN),
                    at + "ffn.gate_proj.weight": (INNER, HIDDEN), at + "ffn.up_proj.weight": (INNER, HIDDEN),
                    at + "ffn.down_proj.weight": (HIDDEN, INNER)}  # fmt: skip
            kind = CONFIGS[case]["compress_type"]
            if kind != "avgpool":
                shape = (KV_HEADS, 4) if kind == "weightedpool" else (KV_HEADS, 4 * DIM, DIM)
                out |= {at + "nsa.compress_key": shape, at + "nsa.compress_value": shape}
        return out
    if case == "fla":
        inner = 256  # 32 · 2 · 2/3, rounded up to a multiple of 256
        out = {"model.embeddings.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,),
               "lm_head.weight": (VOCAB, HIDDEN)}  # fmt: skip
        names = ("attn_norm", "mlp_norm", "attn")
    else:
        inner = INNER
        out = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
        if not CONFIGS[case]["tie_word_embeddings"]:
            out["lm_head.weight"] = (VOCAB, HIDDEN)
        names = ("input_layernorm", "post_attention_layernorm", "self_attn")
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        out |= {f"{at}{names[0]}.weight": (HIDDEN,), f"{at}{names[1]}.weight": (HIDDEN,),
                f"{at}{names[2]}.q_proj.weight": (q, HIDDEN), f"{at}{names[2]}.k_proj.weight": (kv, HIDDEN),
                f"{at}{names[2]}.v_proj.weight": (kv, HIDDEN), f"{at}{names[2]}.o_proj.weight": (HIDDEN, q),
                at + "mlp.gate_proj.weight": (inner, HIDDEN), at + "mlp.up_proj.weight": (inner, HIDDEN),
                at + "mlp.down_proj.weight": (HIDDEN, inner)}  # fmt: skip
        if case == "fla" or case.startswith("llama-nsa"):
            out[f"{at}{names[2]}.g_proj.weight"] = (3 * HEADS, HIDDEN)
        if case == "qwen3":
            out |= {at + "self_attn.q_norm.weight": (DIM,), at + "self_attn.k_norm.weight": (DIM,)}
    return out


def tensors(case: str, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values; attention and gates far from uniform, norms not 1."""
    random = np.random.default_rng(seed)
    out = {}
    for name, shape in shapes(case).items():
        if "norm" in name:
            value = 1.0 + 0.2 * random.standard_normal(shape)
        elif name.endswith(("bias", "intra_block_pe")):
            value = 0.5 * random.standard_normal(shape)
        elif "embed" in name:
            value = random.standard_normal(shape)
        else:
            gain = 2.0 if any(part in name for part in ("q_proj", "proj_q", "W_Q", "gate.", "g_proj")) else 1.0
            fan_in = shape[1] if len(shape) > 1 else shape[0]
            value = gain * fan_in**-0.5 * random.standard_normal(shape)
        out[name] = value.astype(np.float32).astype(dtype)
    return out


# --- writing them ----------------------------------------------------------------------------------------------------


def write_config(directory: Path, case: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[case]))
    return directory


def write_torch(file: Path, value) -> None:
    """A file as ``torch.save`` writes it, of nested dictionaries with NumPy arrays for tensors."""
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}

    def stub(module: str, name: str):
        def function(*args):
            raise AssertionError

        function.__module__, function.__qualname__, function.__name__ = module, name, name
        setattr(modules[module], name, function)
        return function

    rebuild = stub("torch._utils", "_rebuild_tensor_v2")
    kinds = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage", "int8": "CharStorage"}
    storages = {name: stub("torch", kind) for name, kind in kinds.items()}
    data: dict[str, bytes] = {}

    class Storage:
        def __init__(self, array):
            self.key, self.kind, self.count = str(len(data)), storages[array.dtype.name], array.size
            data[self.key] = array.tobytes()

    class Stored:
        def __init__(self, array):
            self.array = np.ascontiguousarray(array)

        def __reduce__(self):
            strides = tuple(stride // self.array.itemsize for stride in self.array.strides)
            shape = self.array.shape
            return rebuild, (Storage(self.array), 0, shape, strides, False, collections.OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            return ("storage", item.kind, item.key, "cpu", item.count) if isinstance(item, Storage) else None

    def wrap(item):
        if isinstance(item, dict):
            return collections.OrderedDict((key, wrap(inner)) for key, inner in item.items())
        return Stored(item) if isinstance(item, np.ndarray) else item

    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        stream = io.BytesIO()
        Pickler(stream, 2).dump(wrap(value))
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("model/data.pkl", stream.getvalue())
        archive.writestr("model/byteorder", "little")
        for key, content in data.items():
            archive.writestr(f"model/data/{key}", content)
        archive.writestr("model/version", "3\n")


# --- plain models ----------------------------------------------------------------------------------------------------


def forward(case: str, weights: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits float64 [T, V] of the case's model by its format's conventions."""
    config = CONFIGS[case]
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    if case.startswith("nsa-byte"):
        return _byte(config, w, tokens)
    if case.startswith(("toy", "flash")):
        return _toy(config, w, tokens)
    eps = config.get("rms_norm_eps", config.get("norm_eps"))
    if case == "fla":
        embed, names, attention = w["model.embeddings.weight"], ("attn_norm", "mlp_norm", "attn"), _mean_pooled
    else:
        embed, names = w["model.embed_tokens.weight"], ("input_layernorm", "post_attention_layernorm", "self_attn")
        attention = {"minicpm4": _infllm, "llama": _dense, "qwen3": _dense}.get(case, _mean_pooled)
    scale = config.get("scale_depth", math.sqrt(LAYERS)) / math.sqrt(LAYERS)
    x = embed[tokens] * config.get("scale_emb", 1.0)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        out = attention(config, w, f"{at}{names[2]}.", rms(x, w[f"{at}{names[0]}.weight"], eps))
        x = x + scale * out @ w[f"{at}{names[2]}.o_proj.weight"].T
        h = rms(x, w[f"{at}{names[1]}.weight"], eps)
        inner = silu(h @ w[at + "mlp.gate_proj.weight"].T) * (h @ w[at + "mlp.up_proj.weight"].T)
        x = x + scale * inner @ w[at + "mlp.down_proj.weight"].T
    x = rms(x, w["model.norm.weight"], eps)
    if "dim_model_base" in config:
        x = x / (HIDDEN / config["dim_model_base"])
    return x @ w.get("lm_head.weight", embed).T


def rms(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def inverse_frequencies(config, dim=DIM):
    inverse = 1.0 / config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":  # wave by wave, as Hugging Face's code has it
        low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
        high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
        for n, value in enumerate(inverse):
            wave = 2 * math.pi / value
            if wave > low:
                inverse[n] = value / scaling["factor"]
            elif wave >= high:
                smooth = (scaling["original_max_position_embeddings"] / wave - scaling["low_freq_factor"]) / (
                    scaling["high_freq_factor"] - scaling["low_freq_factor"]
                )
                inverse[n] = (1 - smooth) * value / scaling["factor"] + smooth * value
    return inverse


def half_rope(x, positions, inverse, amplitude=1.0):
    """x [T, heads, D]: channel c pairs with c + D/2."""
    angles = np.outer(positions, inverse)
    cos, sin = np.cos(np.concatenate([angles, angles], 1)), np.sin(np.concatenate([angles, angles], 1))
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    turned = np.concatenate([-x2, x1], -1)
    return amplitude * (x * cos[:, None] + turned * sin[:, None])


def over(q, k, v, allowed):
    """One query head over the tokens in ``allowed``."""
    allowed = sorted(allowed)
    return softmax(k[allowed] @ q / math.sqrt(len(q))) @ v[allowed]


def llama_qkv(w, at, x):
    q = (x @ w[at + "q_proj.weight"].T).reshape(len(x), HEADS, DIM)
    k = (x @ w[at + "k_proj.weight"].T).reshape(len(x), KV_HEADS, DIM)
    return q, k, (x @ w[at + "v_proj.weight"].T).reshape(len(x), KV_HEADS, DIM)


def best(scores, count):
    """Ids of the ``count`` largest, ties to the lower."""
    return np.argsort(-np.asarray(scores), kind="stable")[:count]


def _mean_pooled(config, w, at, x):
    """flash-linear-attention's NSA, and the older version of it that LlamaNSA uses."""
    size, window = config["block_size"], config["window_size"]
    count = 2 ** math.ceil(math.log2(config["block_counts"]))
    q, k, v = llama_qkv(w, at, x)
    at_positions = np.arange(len(x))
    inverse = inverse_frequencies(config)
    q, k = half_rope(q, at_positions, inverse), half_rope(k, at_positions, inverse)
    gates = sigmoid(x @ w[at + "g_proj.weight"].T).reshape(len(x), HEADS, 3)
    whole = len(x) // size
    k_mean = k[: whole * size].reshape(whole, size, KV_HEADS, DIM).mean(1)
    v_mean = v[: whole * size].reshape(whole, size, KV_HEADS, DIM).mean(1)
    out = np.zeros((len(x), HEADS, DIM))
    for t in range(len(x)):
        own, complete = t // size, (t + 1) // size
        for h in range(KV_HEADS):
            scores = np.zeros(own + 1)
            for g in range(h * GROUP, (h + 1) * GROUP):
                if complete:
                    p = softmax(k_mean[:complete, h] @ q[t, g] / math.sqrt(DIM))
                    out[t, g] += gates[t, g, 0] * (p @ v_mean[:complete, h])
                    scores[:complete] += p[: own + 1]
            forced = {own} if config["model_type"] == "llama-nsa" else {0, max(own - 1, 0), own}
            for block in forced:
                scores[block] = np.inf
            chosen = best(scores, count)
            tokens = [s for block in chosen for s in range(block * size, (block + 1) * size) if s <= t]
            for g in range(h * GROUP, (h + 1) * GROUP):
                out[t, g] += gates[t, g, 1] * over(q[t, g], k[:, h], v[:, h], tokens)
                near = range(max(0, t - window + 1), t + 1)
                out[t, g] += gates[t, g, 2] * over(q[t, g], k[:, h], v[:, h], near)
    return out.reshape(len(x), -1)


def _dense(config, w, at, x):
    q, k, v = llama_qkv(w, at, x)
    if at + "q_norm.weight" in w:
        q = rms(q, w[at + "q_norm.weight"], config["rms_norm_eps"])
        k = rms(k, w[at + "k_norm.weight"], config["rms_norm_eps"])
    inverse = inverse_frequencies(config)
    q, k = (half_rope(z, np.arange(len(x)), inverse) for z in (q, k))
    out = [[over(q[t, g], k[:, g // GROUP], v[:, g // GROUP], range(t + 1)) for g in range(HEADS)]
           for t in range(len(x))]  # fmt: skip
    return np.asarray(out).reshape(len(x), -1)


def _infllm(config, w, at, x):
    """InfLLM-V2: scores max-pooled over stride + 1 pooled keys with padding 1, window blocks on top of topk."""
    sparse, scaling = config["sparse_config"], config["rope_scaling"]
    size, length, stride = sparse["block_size"], sparse["kernel_size"], sparse["kernel_stride"]
    local = sparse["window_size"] // size
    q, k, v = llama_qkv(w, at, x)
    original = scaling["original_max_position_embeddings"]
    amplitude = math.sqrt(1 + math.log(config["max_position_embeddings"] / original) / math.log(original))
    inverse = inverse_frequencies(config) / np.asarray(scaling["long_factor"])
    q, k = (half_rope(z, np.arange(len(x)), inverse, amplitude) for z in (q, k))
    out = np.zeros((len(x), HEADS, DIM))
    for t in range(len(x)):
        for h in range(KV_HEADS):
            group, own = range(h * GROUP, (h + 1) * GROUP), t // size
            tokens = range(t + 1)
            if t + 1 >= sparse["dense_len"]:
                pooled = [k[i : i + length, h].mean(0) for i in range(0, t + 2 - length, stride)]
                p = sum(softmax(np.asarray(pooled) @ q[t, g] / math.sqrt(DIM)) for g in group)
                per = size // stride
                scores = np.full(own + 1, -np.inf)
                for block in range(own + 1):
                    if block < sparse["init_blocks"] or own <= block + local:
                        scores[block] = np.inf
                        continue
                    window = p[max(block * per - 1, 0) : block * per + per]
                    scores[block] = window.max()
                chosen = best(scores, sparse["topk"] + local)
                tokens = [s for block in chosen for s in range(block * size, (block + 1) * size) if s <= t]
            for g in group:
                out[t, g] = over(q[t, g], k[:, h], v[:, h], tokens)
    return out.reshape(len(x), -1)


def _toy(config, w, tokens):
    eps = 1e-6
    x = w["embedding.weight"][tokens]
    for i in range(LAYERS):
        at = f"layers.{i}."
        x = x + _toy_attention(config, w, at + "nsa.", rms(x, w[at + "attn_norm.weight"], eps))
        h = rms(x, w[at + "ffn_norm.weight"], eps)
        inner = silu(h @ w[at + "ffn.gate_proj.weight"].T) * (h @ w[at + "ffn.up_proj.weight"].T)
        x = x + inner @ w[at + "ffn.down_proj.weight"].T
    return rms(x, w["norm.weight"], eps) @ w["lm_head.weight"].T


def _toy_attention(config, w, at, x):
    length, stride, size = config["kernel_size"], config["kernel_stride"], config["block_size"]
    q = (x @ w[at + "proj_q.weight"].T).reshape(len(x), HEADS, DIM)
    k = (x @ w[at + "proj_k.weight"].T).reshape(len(x), KV_HEADS, DIM)
    v = (x @ w[at + "proj_v.weight"].T).reshape(len(x), KV_HEADS, DIM)
    starts = range(0, len(x) - length + 1, stride)

    def compressed(z, weight, position):
        out = []
        for start in starts:
            block = z[start : start + length].transpose(1, 0, 2)  # [heads, l, D]
            if config["compress_type"] == "avgpool":
                entry = block.mean(1) + (0 if position is None else position.mean(1))
            elif config["compress_type"] == "weightedpool":
                entry = np.einsum("hld,hl->hd", block, weight)
                if position is not None:
                    entry = entry + np.einsum("hld,hl->hd", position, weight)
            else:
                entry = np.einsum("hk,hkd->hd", block.reshape(KV_HEADS, -1), weight)
                if position is not None:
                    entry = entry + np.einsum("hk,hkd->hd", position.reshape(KV_HEADS, -1), weight)
            out.append(entry)
        return np.asarray(out)

    k_cmp = compressed(k, w.get(at + "compress_key"), w[at + "intra_block_pe"])
    v_cmp = compressed(v, w.get(at + "compress_value"), None)
    inverse = inverse_frequencies(config)
    q = half_rope(q, np.arange(len(x)), inverse)
    k_cmp = half_rope(k_cmp, np.arange(len(k_cmp)) * stride, inverse)
    k = half_rope(k, np.arange(len(x)), inverse)
    gates = sigmoid(x @ w[at + "gate.0.weight"].T).reshape(len(x), -1, 3)
    gates = np.broadcast_to(gates, (len(x), HEADS, 3))
    pad = length // stride - 1
    offsets = collections.Counter(a + b for a in range(length // stride) for b in range(size // stride))
    out = np.zeros((len(x), HEADS, DIM))
    for t in range(len(x)):
        seen = [i for i, start in enumerate(starts) if start + length - 1 <= t]
        for h in range(KV_HEADS):
            group, own = range(h * GROUP, (h + 1) * GROUP), t // size
            padded = np.zeros(len(x) + 2 * pad + size)
            for g in group:
                if seen:
                    p = softmax(k_cmp[seen, h] @ q[t, g] / math.sqrt(DIM))
                    out[t, g] += gates[t, g, 0] * (p @ v_cmp[seen, h])
                    padded[pad : pad + len(seen)] += p
            scores = [sum(times * padded[j * size // stride + offset] for offset, times in offsets.items())
                      for j in range(own + 1)]  # fmt: skip
            for j in range(own + 1):
                if j < config["init_blocks"] or own < j + config["local_blocks"]:
                    scores[j] = np.inf
            tokens = [s for j in best(scores, config["topk"]) for s in range(j * size, (j + 1) * size) if s <= t]
            for g in group:
                out[t, g] += gates[t, g, 1] * over(q[t, g], k[:, h], v[:, h], tokens)
                near = range(max(0, t - config["window_size"]), t + 1)
                out[t, g] += gates[t, g, 2] * over(q[t, g], k[:, h], v[:, h], near)
    return out.reshape(len(x), -1) @ w[at + "proj_o.weight"].T


def pair_rope(x, base=10000.0):
    """x [T, …, D] at positions 0 … T − 1: channel 2p pairs with 2p + 1."""
    dim = x.shape[-1]
    angles = np.outer(np.arange(len(x)), base ** (-2 * np.arange(dim // 2) / dim))
    angles = angles.reshape(len(x), *[1] * (x.ndim - 2), dim // 2)
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * np.cos(angles) - x[..., 1::2] * np.sin(angles)
    out[..., 1::2] = x[..., 0::2] * np.sin(angles) + x[..., 1::2] * np.cos(angles)
    return out


def _byte(config, w, tokens):
    x = w["embed.weight"][tokens]
    for i in range(LAYERS):
        at = f"blocks.{i}."
        x = x + _byte_attention(config, w, at + "attn.", rms(x, w[at + "norm1.weight"], 1e-6))
        x = x + silu(rms(x, w[at + "norm2.weight"], 1e-6) @ w[at + "mlp.fc1.weight"].T) @ w[at + "mlp.fc2.weight"].T
    return rms(x, w["norm_f.weight"], 1e-6) @ w["lm_head.weight"].T


def _byte_attention(config, w, at, x):
    nsa, heads, groups = config["nsa"], 12, 2
    length, stride, size, per = nsa["l"], nsa["d"], nsa["l_sel"], heads // groups
    q = pair_rope(x @ w[at + "W_Q.weight"].T).reshape(len(x), groups, per, DIM)  # over the whole width at once
    kv = {kind: (x @ w[f"{at}W_{kind}.weight"].T).reshape(len(x), groups, DIM)
          for kind in ("K_sel", "V_sel", "K_win", "V_win", "K_cmp", "V_cmp")}  # fmt: skip
    for kind in ("K_sel", "K_win", "K_cmp"):
        kv[kind] = pair_rope(kv[kind])

    def pooled(z, weight):
        blocks = [z[i : i + length] for i in range(0, len(x) - length + 1, stride)]
        if nsa["phi"] == "avg":
            return np.asarray([block.mean(0) for block in blocks])
        return np.asarray([np.einsum("lgd,dl->gd", block, weight[:, 0]) for block in blocks])

    k_cmp, v_cmp = (pooled(kv[f"{kind}_cmp"], w.get(f"{at}phi_{kind.lower()}_conv.weight")) for kind in "KV")
    out = np.zeros((len(x), groups, per, DIM))
    for t in range(len(x)):
        count = max(0, (t + 1 - length) // stride + 1)
        for h in range(groups):
            mean = q[t, h].mean(0)
            hidden = silu(w[at + "gate.fc1.weight"] @ mean + w[at + "gate.fc1.bias"])
            gate = softmax(w[at + "gate.fc2.weight"] @ hidden + w[at + "gate.fc2.bias"])
            own = t // size
            scores = np.zeros(own + 1)
            for g in range(per):
                if count:
                    p = softmax(k_cmp[:count, h] @ q[t, h, g] / math.sqrt(DIM))
                    out[t, h, g] += gate[0] * (p @ v_cmp[:count, h])
                    for i in range(count):
                        for j in range(own + 1):  # by the fraction of the block that lies in j
                            shared = min(i * stride + length, (j + 1) * size) - max(i * stride, j * size)
                            scores[j] += p[i] * max(0, shared) / length
            forced = {0, max(own - 1, 0), own}
            scores[list(forced)] = -np.inf
            rest = [j for j in best(scores, max(0, nsa["n_sel"] - 3)) if scores[j] > -np.inf]
            chosen = [s for j in (*forced, *rest) for s in range(j * size, (j + 1) * size) if s <= t]
            near = range(max(0, t + 1 - nsa["w"]), t + 1)
            for g in range(per):
                out[t, h, g] += gate[1] * over(q[t, h, g], kv["K_sel"][:, h], kv["V_sel"][:, h], chosen)
                out[t, h, g] += gate[2] * over(q[t, h, g], kv["K_win"][:, h], kv["V_win"][:, h], near)
    return out.reshape(len(x), -1) @ w[at + "out.weight"].T


BFLOAT16 = ml_dtypes.bfloat16
