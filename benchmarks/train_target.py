"""A long-context model and its draft head, trained within minutes on source code found on the machine; then measured.

Three runs of ``specsa`` and one of benchmarks/end_to_end.py, one after the other, each a process:

1. ``train`` at the short context for a share of the time, at a constant learning rate (its cosine is far longer);
2. ``train --init`` at the long context, with as many steps as the first run's tokens a second allow, and the whole fall
   of the learning rate;
3. ``train-draft --install``;
4. end_to_end.py on the result (``--measure`` 0 seconds: not).

With ``--init`` the target is a checkpoint, stretched to LONGEST tokens by YaRN and trained on. Without, it is a preset
from scratch, which takes longer to become a model whose greedy text is worth measuring: training attends densely, and
in six minutes of an H100 a 120M model sees two to four million tokens (an estimate).

Data: the standard library and the packages that are installed, in the order of their names, up to --megabytes of Python
source. The JSON has the data, tokens, held-out files, losses and commands, and end_to_end.py's rows; weights are not
kept, unless --keep says where. What is left of --seconds at a step is divided among those that follow.

    python benchmarks/train_target.py --init embedded --seconds 570 --out      # on a GPU
    python benchmarks/train_target.py --tiny --out FILE      # does the script run? (on a CPU, three minutes)
"""

from __future__ import annotations

import os

# The processes that this one starts need the GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

from specsa_jax import checkpoints
from specsa_jax.checkpoints import draft_head
from specsa_jax.config import PRESETS, RopeConfig
from specsa_jax.training import data, is_held_out

# Shares of --seconds: the short and the long context, the draft head; the rest measures. Of a training run's share a
# part goes on tokenizing and compiling; what no limit holds (held-out losses, processes that start) takes SPARE.
SHORT, LONG, DRAFT, SPARE = 0.20, 0.18, 0.20, 0.15
STEPPING = 0.6
# Of the files: enough text for prompts of 64K tokens. The embedded model's own 5 % have these among them.
HOLDOUT = 0.04
LONGEST = 65536


def sources(megabytes: float, tiny: bool) -> list[str]:
    """Directories and files to train on: the standard library, then packages by name while they fit ``megabytes``."""
    if tiny:
        return [str(data.locate("stdlib") / name) for name in ("asyncio", "email", "json", "unittest")]
    left, chosen = megabytes * 1e6, ["stdlib"]
    for package in sorted(data.locate(data.INSTALLED).iterdir()):
        if package.is_dir() and not package.name.endswith((".dist-info", ".data", "__pycache__")):
            size = sum(file.stat().st_size for file in package.glob("**/*.py") if file.is_file())
            if 0 < size <= left:
                left -= size
                chosen.append(data.INSTALLED + package.name)
    return chosen


def tiny_model(folder: Path) -> str:
    """The file of a config that trains within seconds on a CPU."""
    small = PRESETS["embedded"]
    nsa = dataclasses.replace(small.nsa, num_heads=4, num_kv_heads=2, head_dim=16, window=64)
    config = dataclasses.replace(small, vocab_size=512, hidden=64, layers=2, intermediate=128, max_length=2048, nsa=nsa)
    (folder / "tiny.json").write_text(config.to_json(), encoding="utf-8")
    return str(folder / "tiny.json")


def longer(checkpoint: str, path: Path) -> Path:
    """A copy of the checkpoint at ``path`` that serves LONGEST tokens."""
    found = checkpoints.load(checkpoint)
    rope, length = found.config.rope, found.config.max_length
    if length < LONGEST:
        rope = RopeConfig(theta=rope.theta, kind="yarn", factor=LONGEST / length, original_length=length)
    config = dataclasses.replace(found.config, rope=rope, max_length=max(length, LONGEST))
    return checkpoints.save(path, found.params, config, found.tokenizer, found.metadata, overwrite=True)


class Recipe:
    """Runs the steps within the time; ``report`` is what the JSON will have."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.begun = args, folder, time.monotonic()
        self.data = sources(args.megabytes, args.tiny)
        # Programs that several processes compile are compiled once.
        self.environment = {name: value for name, value in os.environ.items()
                            if name != "XLA_PYTHON_CLIENT_PREALLOCATE"}  # fmt: skip
        self.environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
        self.report: dict[str, Any] = {"seconds_allowed": args.seconds, "data": self.data, "runs": []}

        # Without measuring the rest is theirs.
        self.share = 1.0 if args.measure else (1.0 - SPARE) / (SHORT + LONG + DRAFT)

    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - self.begun)

    def run(self, *words: object) -> dict[str, Any]:
        """The summary that a ``specsa`` command prints last. CalledProcessError where it fails."""
        command, begun = [str(word) for word in words], time.monotonic()
        print("+ specsa", *command[:1], *command[1 + len(self.data) :], flush=True)
        done = subprocess.run([sys.executable, "-m", "specsa_jax", *command, "--json"], env=self.environment,
                              check=True, stdout=subprocess.PIPE, text=True)  # fmt: skip
        summary = json.loads(done.stdout.splitlines()[-1])
        self.report["runs"].append({"command": command, "wall_seconds": time.monotonic() - begun, "summary": summary})
        self.save()
        return summary

    def losses(self, run: Path, name: str) -> None:
        """Every tenth loss of a run, and the measured held-out ones."""
        records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        kept = [r for r in records if r["step"] % 10 == 1 or "held_out_loss" in r or r is records[-1]]
        names = ("loss", "matches", "held_out_loss")
        self.report[f"{name}_losses"] = [
            " ".join([str(r["step"]), *(f"{key}={r[key]}" for key in names if key in r)]) for r in kept
        ]

    def train(self) -> Path:
        """The target's checkpoint."""
        args, share = self.args, self.share
        first, second = self.folder / "short", self.folder / "long"
        common = ["--skip-undecodable", "--holdout", HOLDOUT, "--eval-every", 0, "--save-every", 0,
                  "--query-chunk", args.query_chunk, "--grad-accum", args.grad_accum,
                  *args.train_options.split()]  # fmt: skip
        start = ["--init", longer(args.init, self.folder / "start")] if args.init else ["--model", args.model]
        context, batch = args.short
        limit = SHORT * share * args.seconds
        # So long a cosine is constant for as long as the time lasts.
        short = self.run("train", *self.data, *common, "--output", first, *start, "--stages",
                         f"{context}:{batch}:1000000", "--learning-rate", args.learning_rate, "--warmup", args.warmup,
                         "--time-limit", f"{limit:.0f}")  # fmt: skip
        self.losses(first, "short")
        for later in (second, self.folder / "draft"):
            later.mkdir()
            for file in first.glob("tokens-*.npz"):  # the same text and tokenizer
                shutil.copy(file, later)
        context, batch = args.long
        limit = LONG * share * args.seconds
        steps = max(20, int(STEPPING * limit * short["tokens_per_second"] / (context * batch)))
        self.run("train", *self.data, *common, "--output", second, "--init", first / "checkpoint", "--stages",
                 f"{context}:{batch}:{steps}", "--learning-rate", args.learning_rate, "--warmup", min(20, steps // 4),
                 "--time-limit", f"{limit:.0f}")  # fmt: skip
        self.losses(second, "long")
        card = json.loads((second / "checkpoint" / "metadata.json").read_text(encoding="utf-8"))
        self.report |= {"parameters": card["parameters"], "corpus": card["corpus"], "held_out": self.held_out_files()}
        return second / "checkpoint"

    def held_out_files(self) -> list[str]:
        """Their paths, each within its directory of the data."""
        found = []
        for source in self.data:
            root = data.locate(source)
            paths = (path.relative_to(root).as_posix() for path in sorted(root.glob("**/*.py")))
            found += [f"{root.name}/{path}" for path in paths
                      if is_held_out(path, HOLDOUT) and not (source == "stdlib" and "-packages/" in path)]  # fmt: skip
        return found

    def draft(self, checkpoint: Path) -> None:
        args, share = self.args, DRAFT * self.share
        out = self.folder / "draft"
        self.run("train-draft", checkpoint, "--output", out, "--install", "--eval-every", 0, "--save-every", 0,
                 "--time-limit", f"{min(share * args.seconds, max(30.0, self.left() - 30)):.0f}",
                 *args.draft_options.split())  # fmt: skip
        self.losses(out, "draft")

    def measure(self, checkpoint: Path) -> None:
        file = self.folder / "end_to_end.json"
        budget = max(20.0, self.left() - 45)  # a row begins before the budget ends, and may take so long
        subprocess.run([sys.executable, str(Path(__file__).with_name("end_to_end.py")), "--checkpoint", str(checkpoint),
                        "--budget", f"{budget:.0f}", "--out", str(file), *self.args.measure_options.split()],
                       env=self.environment, check=True)  # fmt: skip
        self.report["end_to_end"] = json.loads(file.read_text(encoding="utf-8"))
        self.save()

    def save(self) -> None:
        """Writes the report, without where on this machine things lie."""
        path = harness.out_path(self.args)
        if path is None:
            return
        text = json.dumps(self.report).replace(str(self.folder), "run")
        for place in sorted({str(Path(source).parent) for source in self.data}, key=len, reverse=True):
            text = text.replace(f'"{place}/', f'"{Path(place).name}/')
        report = json.loads(text)
        measured = report.pop("end_to_end", {"rows": []})
        rows = measured.pop("rows")
        harness.save(path, rows, **report, measured_by=measured, wall_seconds=time.monotonic() - self.begun)


def shape(text: str) -> tuple[int, int]:
    context, _, batch = text.partition(":")
    return int(context), int(batch)


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=570, help="for all of it")
    parser.add_argument("--measure", type=int, default=1, choices=(0, 1), help="run end_to_end.py in the end")
    parser.add_argument("--megabytes", type=float, default=32, help="of packages' source besides the standard library")
    parser.add_argument("--model", default="120m", help="a preset, or the path of a ModelConfig JSON file")
    parser.add_argument("--init", help="a checkpoint to start from, in place of --model")
    parser.add_argument("--short", type=shape, default="4096:16", help="context:batch of the first run")
    parser.add_argument("--long", type=shape, default="16384:4", help="context:batch of the second run")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--grad-accum", type=harness.count, default=4)
    parser.add_argument("--query-chunk", type=harness.count, default=512)
    parser.add_argument("--train-options", default="", help="more, of specsa train")
    parser.add_argument("--draft-options", default="--generated 1024 --generation-batch 256 --steps 100000 --unroll 5",
                        help="of specsa train-draft")  # fmt: skip
    parser.add_argument("--measure-options", default="--precisions exact --repeats 2", help="of end_to_end.py")
    parser.add_argument("--keep", type=Path, help="work here, and leave the checkpoints")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on little text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if args.tiny:
            args.model, args.init, args.short, args.long = tiny_model(folder), None, (256, 4), (1024, 2)
            args.seconds = 90.0
            args.grad_accum, args.query_chunk, args.warmup = 1, 256, 5
            args.draft_options = ("--generated 8 --generation-batch 8 --steps 200 --context 128 --new-tokens 32 "
                                  "--batch 4 --unroll 4 --warmup 2 --eval-rows 4")  # fmt: skip
            args.measure_options = (
                "--precisions exact --contexts 512 --batches 1 --temperatures 0 --workloads code "
                "--new-tokens 16 --prompts 1 --repeats 1 --strategies lookup@chain:4 head@chain:4"
            )
        recipe = Recipe(args, folder)
        checkpoint = recipe.train()
        recipe.draft(checkpoint)
        target = checkpoints.load(str(checkpoint))
        recipe.report["fingerprint"] = draft_head.fingerprint(target.config, target.params)
        if args.measure:
            recipe.measure(checkpoint)
        recipe.save()
    for run in recipe.report["runs"]:
        print(run["command"][0], f"{run['wall_seconds']:.0f} s", run["summary"])


if __name__ == "__main__":
    harness.run(main)
