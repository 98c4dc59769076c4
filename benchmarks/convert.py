"""Converts a random checkpoint of zen-E/NSA-1B's config and shapes, and measures time and peak memory.

python benchmarks/convert.py --out benchmarks/results/cpu/convert_1b.json

Every step is a process of its own, so that each one's peak (VmHWM, which counts file pages that are mapped) is its own:
writing the checkpoint, ``specsa convert`` to this project's format, the way back, ``specsa inspect --verify``, and
generation from the converted one. The bound of a conversion is the two largest tensors and 1 GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

CONFIG = {
    "architectures": ["LlamaNSAForCausalLM"], "model_type": "llama-nsa", "vocab_size": 128256, "hidden_size": 2048,
    "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 2,
    "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 131072, "block_size": 16,
    "block_counts": 16, "window_size": 128, "bos_token_id": 128000, "eos_token_id": 128001, "torch_dtype": "bfloat16",
}  # fmt: skip

MAKE = """
import json, sys
from pathlib import Path
import ml_dtypes, numpy as np
from safetensors.numpy import save_file
directory = Path(sys.argv[1]); config = json.loads((directory / "config.json").read_text())
random = np.random.default_rng(0)
def values(*shape):
    return (random.standard_normal(shape, np.float32) * shape[-1] ** -0.5).astype(ml_dtypes.bfloat16)
H, I, q, kv = config["hidden_size"], config["intermediate_size"], 32 * 64, 2 * 64
ones = np.ones(H, ml_dtypes.bfloat16)
tensors = {"model.embed_tokens.weight": values(config["vocab_size"], H), "model.norm.weight": ones}
for i in range(config["num_hidden_layers"]):
    at = f"model.layers.{i}."
    tensors |= {at + "input_layernorm.weight": ones, at + "post_attention_layernorm.weight": ones}
    for name, shape in {"self_attn.q": (q, H), "self_attn.k": (kv, H), "self_attn.v": (kv, H), "self_attn.o": (H, q),
                        "self_attn.g": (96, H), "mlp.gate": (I, H), "mlp.up": (I, H), "mlp.down": (H, I)}.items():
        tensors[f"{at}{name}_proj.weight"] = values(*shape)
save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
"""
CONVERT = """
import json, sys
from specsa_jax.checkpoints import convert
report = convert(sys.argv[1], sys.argv[2], tokenizer="ids" if len(sys.argv) > 3 else None)
print(json.dumps({"parameters": report.parameters, "bytes": report.bytes, "seconds": round(report.seconds, 1)}))
"""
VERIFY = """
import json, sys
from specsa_jax.checkpoints.inspection import inspect
print(json.dumps({"files": inspect(sys.argv[1], verify=True)["verified"]}))
"""
GENERATE = """
import json, sys
import numpy as np
from specsa_jax import Engine
engine = Engine.from_pretrained(sys.argv[1], dtype="bfloat16", max_length=4096)
prompt = np.random.default_rng(1).integers(128000, size=300).tolist()
result = engine.generate([prompt], max_new_tokens=16)
print(json.dumps({"new_tokens": result.stats.new_tokens, "decode_seconds": round(result.stats.decode_seconds, 1)}))
"""
SAME = """
import sys
import ml_dtypes
import numpy as np
from safetensors import safe_open
with safe_open(sys.argv[1], "np") as a, safe_open(sys.argv[2], "np") as b:
    assert set(a.keys()) == set(b.keys())
    for name in a.keys():
        assert np.array_equal(a.get_tensor(name).view(np.uint16), b.get_tensor(name).view(np.uint16)), name
"""
PEAK = """
import re, sys
sys.argv.pop(0)
exec(compile(sys.argv[0], "<step>", "exec"))
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def step(code: str, *arguments: object) -> dict[str, object]:
    """Runs a step: what it prints, and its peak in bytes."""
    out = subprocess.run(
        [sys.executable, "-c", PEAK, code, *map(str, arguments)], check=True, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    ).stdout.splitlines()  # fmt: skip
    printed = json.loads(out[-2]) if len(out) > 1 else {}
    return {**printed, "peak_bytes": int(out[-1].split()[1]) * 1024}


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--layers", type=harness.count, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--keep", type=Path, help="work here, and leave the checkpoints")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.keep or Path(scratch)
        source = work / "source"
        source.mkdir(parents=True, exist_ok=True)
        (source / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": args.layers}))
        largest = 2 * CONFIG["vocab_size"] * CONFIG["hidden_size"]
        second = 2 * CONFIG["intermediate_size"] * CONFIG["hidden_size"]
        bound = largest + second + 10**9
        step(MAKE, source)
        rows = [
            {"step": "convert", **step(CONVERT, source, work / "ours", "ids")},
            {"step": "back", **step(CONVERT, work / "ours", work / "back")},
        ]
        step(SAME, source / "model.safetensors", work / "back" / "model.safetensors")
        rows += [
            {"step": "verify", **step(VERIFY, work / "ours")},
            {"step": "generate", **step(GENERATE, work / "ours")},
        ]
    for row in rows:
        print(json.dumps(row))
    if path := harness.out_path(args):
        harness.save(path, rows, largest_tensor_bytes=largest, bound_bytes=bound)
    for row in rows[:2]:
        if int(str(row["peak_bytes"])) > bound:
            sys.exit(f"{row['step']}: peak {row['peak_bytes']:,} bytes, expected at most {bound:,}")


if __name__ == "__main__":
    harness.run(main)
