"""Compiles kernels for an H200 on any machine: ``python -m pallas_kernels.report [NAME ...]`` (parts of spec names).

Registers, spills (stack) and shared memory of what a call on an H200 runs: with the config that was measured there
(``tuned``), where there is one for the call, else with the heuristic's. Needs PyPI's ``triton``, on x86-64 Linux. That
is not the Triton inside XLA, so the resources listed are a lead, not a proof. A kernel takes it some seconds, all of
them an hour and more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.extend.backend import get_backend
from jax.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from jaxlib.mlir import ir
from jaxlib.triton import dialect

from pallas_kernels import tuned
from pallas_kernels.attention import attend, configure
from pallas_kernels.attention import specs as attention_specs
from pallas_kernels.attention.config import GroupMode
from pallas_kernels.commit import commit
from pallas_kernels.commit import specs as commit_specs
from pallas_kernels.compress import compress
from pallas_kernels.compress import specs as compress_specs
from pallas_kernels.selection import select_blocks, specs

KIND = "NVIDIA H200"
H200 = AbstractMesh((), (), abstract_device=AbstractDevice(KIND, None, "gpu"))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel in a lowered program: its Triton module as text, and how it is launched."""

    name: str
    module: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A call of one of the specs.

    Attributes:
      name: its operation's and its spec's; of attention with the group, "-shared" where that shares an index, or
        "deterministic".
      config: where its tuning parameters are from: "tuned", "heuristic", or "fixed".
      function, shapes: the call, and what gives its arguments' shapes.
    """

    name: str
    config: str
    function: Callable[..., Any]
    shapes: Callable[[], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers and stack bytes (spills) a thread, shared memory bytes a program."""

    registers: int
    stack: int
    shared: int


def lower(function: Callable[..., Any], *shapes: Any) -> jax.stages.Lowered:
    """``function`` lowered for an H200; ``shapes`` are pytrees of ``jax.ShapeDtypeStruct``."""
    with use_abstract_mesh(H200):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))


def kernels(lowered: jax.stages.Lowered) -> list[Kernel]:
    """The Triton kernels of a program, in order."""
    module: Any = lowered.compiler_ir("stablehlo")
    return [_kernel(call) for call in _triton_calls(module.operation)]


def compile_sm90(kernel: Kernel) -> Resources:
    """Compiles ``kernel`` to an sm_90 cubin with PyPI's ``triton``."""
    import triton
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder:
        module, cubin = Path(folder, "kernel.ttir"), Path(folder, "kernel.cubin")
        module.write_text(kernel.module)
        options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": True}
        compiled = triton.compile(str(module), target=GPUTarget("cuda", 90, 32), options=options)
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Resources(int(found[1]), int(found[2]), compiled.metadata.shared)


def verification(
    spec: attention_specs.AttentionSpec,
    group: int | None = None,
    deterministic: bool = False,
    mode: GroupMode = "merged",
) -> Callable[..., Any]:
    """A refresh layer, and a layer that reuses its selection, as one function, with an H200's config: six launches, or
    seven."""
    config = None
    if not deterministic:
        with use_abstract_mesh(H200):
            config = configure(spec.sparsity, spec.shape, group, mode, dtype=spec.dtype)

    def layers(*arguments: Any) -> Any:
        call = partial(attend, spec.sparsity, *arguments, config=config, deterministic=deterministic)
        out, selected = call()
        return out, call(selected=selected)[0]

    return layers


def programs() -> Iterator[Program]:
    """Every call that benchmarks and tests make, as an H200 runs it; of attention also that of queries alone, of class
    strict, and, of the tests', with a shared index."""

    def source(found: Any) -> str:
        return "heuristic" if found is None else "tuned"

    # Of the longer heads in float32 too.
    single = [dataclasses.replace(layer, name=f"{layer.name.removesuffix('-bf16')}-f32", dtype="float32")
              for layer in (*attention_specs.TESTS, *attention_specs.BENCHMARKS[::7])
              if layer.dim >= 64 and layer.width <= 128]  # fmt: skip
    for layer in (*attention_specs.BENCHMARKS, *attention_specs.TESTS, *single):
        groups: dict[int, int | None] = {}  # and how a call asks for them
        with use_abstract_mesh(H200):
            # All queries as one group: of tests, which call it so.
            whole = [layer.width] if layer in attention_specs.TESTS and layer.width <= 128 else []
            for asked in (None, 1, *whole):
                found = configure(layer.sparsity, layer.shape, asked, dtype=layer.dtype)
                groups.setdefault(found.group, asked)
        for group, asked in groups.items():
            config = source(tuned.lookup(KIND, layer.sparsity, layer.shape, asked, layer.dtype))
            name = f"attention/{layer.name}-C{group}"
            yield Program(name, config, verification(layer, asked), layer.abstract)
        name = f"attention/{layer.name}-deterministic"
        yield Program(name, "fixed", verification(layer, deterministic=True), layer.abstract)
    for layer in attention_specs.TESTS:
        if layer.width > 1:
            name, function = f"attention/{layer.name}-C4-shared", verification(layer, 4, mode="shared")
            yield Program(name, "heuristic", function, layer.abstract)
    for spec in (*specs.BENCHMARKS, *(spec for spec in specs.TESTS if spec.rows)):
        config = source(tuned.lookup_selection(KIND, spec.rows, spec.shape[-1]))
        counts: dict[str, Any] = spec.counts
        yield Program(f"selection/{spec.name}", config, partial(select_blocks, **counts), spec.abstract)
    for case in (*commit_specs.BENCHMARKS, *commit_specs.TESTS):
        config = source(tuned.lookup_commit(KIND, case.shape))
        yield Program(f"commit/{case.name}", config, partial(commit, compress_block=case.block), case.abstract)
    for blocks in (*compress_specs.BENCHMARKS, *compress_specs.TESTS):
        config = source(tuned.lookup_compress(KIND, blocks.shape))
        yield Program(f"compress/{blocks.name}", config, compress, blocks.abstract)


def environment(command: Sequence[str]) -> dict[str, str | int | None]:
    """What the figures depend on, as in other result files (``benchmarks/harness.py``)."""
    return {
        "device": "sm_90, compiled on a CPU by PyPI's triton, run nowhere",
        "cpus": os.cpu_count(),
        "triton": version("triton"),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "backend": get_backend().platform_version,
        "python": platform.python_version(),
        "commit": _commit(Path(__file__).parents[1]),
        "command": shlex.join(command),
    }


def _commit(root: Path) -> str | None:
    """The short hash, with ``-dirty`` where files other than results differ; None where ``root`` is no clone."""
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or a clone without commits
        return None


def _triton_calls(operation):
    for region in operation.regions:
        for block in region:
            for child in block:
                if child.operation.name == "stablehlo.custom_call" and "xla.gpu.triton" in str(child.call_target_name):
                    yield child.operation
                yield from _triton_calls(child.operation)


def _kernel(call):
    config = {entry.name: entry.attr for entry in call.attributes["mhlo.backend_config"]}
    with mlir.make_ir_context() as context:
        dialect.register_dialect(context)
        module = str(ir.Module.parse(config["ir"].value_bytes, context=context))
    return Kernel(
        config["name"].value,
        module,
        (config["grid_x"].value, config["grid_y"].value, config["grid_z"].value),
        config["num_warps"].value,
        config["num_stages"].value,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: a table, and with ``--json`` a file, of the programs that were named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="parts of programs' names, e.g. B8-T8-H32x8; none: all"
    )
    parser.add_argument("--json", type=Path, help="a file for the rows, written anew after each program")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    wanted = [one for one in programs() if not args.names or any(part in one.name for part in args.names)]
    if not wanted:
        parser.exit(2, f"error: names: got {', '.join(args.names)}, expected parts of programs' names\n")
    try:
        about = environment([Path(__file__).name, *argv])
    except PackageNotFoundError:
        parser.exit(2, "error: triton is not installed: pip install triton (x86-64 Linux)\n")
    rows: list[dict[str, Any]] = []
    known: dict[tuple[Any, ...], Resources] = {}  # programs share kernels
    print(f"{'program':48}{'config':>10}  {'kernel':32}{'grid':>16}{'warps':>7}{'registers':>11}{'stack B':>9}"
          f"{'shared B':>10}")  # fmt: skip
    for program in wanted:
        for kernel in kernels(lower(program.function, *program.shapes())):
            code = kernel.module, kernel.num_warps, kernel.num_stages
            if code not in known:
                known[code] = compile_sm90(kernel)
            used, grid = known[code], "x".join(map(str, kernel.grid))
            rows.append({"program": program.name, "config": program.config, "kernel": kernel.name, "grid": grid,
                         "warps": kernel.num_warps, "stages": kernel.num_stages,
                         **dataclasses.asdict(used)})  # fmt: skip
            print(f"{program.name:48}{program.config:>10}  {kernel.name:32}{grid:>16}{kernel.num_warps:>7}"
                  f"{used.registers:>11}{used.stack:>9}{used.shared:>10}", flush=True)  # fmt: skip
        if args.json is not None:
            text = json.dumps({**about, "rows": rows}, indent=1)
            part = args.json.with_name(args.json.name + ".part")
            part.write_text(text + "\n", encoding="utf-8")
            os.replace(part, args.json)


if __name__ == "__main__":
    main()
