"""Every kernel lowers for an H200 on a machine without a GPU: interpret mode accepts what Triton does not."""

import dataclasses
import json
import re
from functools import partial

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

from pallas_kernels import report, tuned
from pallas_kernels.attention import AttentionConfig, attend, configure
from pallas_kernels.attention import specs as attention_specs
from pallas_kernels.commit import specs as commit_specs
from pallas_kernels.compress import specs as compress_specs
from pallas_kernels.selection import SelectionConfig, select_blocks, specs
from specsa_jax import model
from specsa_jax.cache import create_cache, make_tail, topology
from specsa_jax.config import preset
from specsa_jax.nsa.cached import Backend


@pytest.mark.parametrize("spec", [*specs.TESTS, *specs.BENCHMARKS], ids=lambda spec: spec.name)
def test_selection_lowers(spec):
    # Not by name: on a GPU "pallas" is what None stands for.
    lowered = report.lower(partial(select_blocks, **spec.counts), *spec.abstract())
    if spec.rows == 0:
        assert report.kernels(lowered) == []
        return
    assert "__gpu$xla.gpu.triton" in lowered.as_text()
    [kernel] = report.kernels(lowered)
    sizes = spec.rows, spec.shape[-1]
    config = tuned.lookup_selection("NVIDIA H200", *sizes) or SelectionConfig.heuristic(*sizes)
    assert (kernel.name, kernel.grid, kernel.num_warps) == ("select_blocks_kernel", (spec.rows, 1, 1), config.num_warps)


def test_the_report_knows_which_programs_there_are(capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(["no-such-program"])
    assert stopped.value.code == 2 and "names: got no-such-program, expected" in capsys.readouterr().err


def test_the_report_compiles_what_an_h200_runs():
    """With its measured configs, where there are any."""
    programs = {program.name: program for program in report.programs()}
    for spec in attention_specs.BENCHMARKS:
        with use_abstract_mesh(report.H200):
            group = configure(spec.sparsity, spec.shape).group
        assert {f"attention/{spec.name}-{form}" for form in (f"C{group}", "C1", "deterministic")} <= set(programs)
    for spec in attention_specs.TESTS:
        forms = ("C1", "deterministic", *(["C4-shared"] if spec.width > 1 else []))
        assert {f"attention/{spec.name}-{form}" for form in forms} <= set(programs)
    for operation, kind in ((specs, "selection"), (commit_specs, "commit"), (compress_specs, "compress")):
        calls = {f"{kind}/{spec.name}" for spec in (*operation.BENCHMARKS, *operation.TESTS)}
        assert calls - set(programs) <= {"selection/no-rows"}  # which launches nothing
    name = "B32-T8-H32x8-L64K-o70"
    for form, config in (("C8", "tuned"), ("C1", "heuristic"), ("deterministic", "fixed")):
        assert programs[f"attention/{name}-{form}"].config == config
    [spec] = [spec for spec in attention_specs.BENCHMARKS if spec.name == name]
    splits = [config(spec.sparsity, spec.shape).selected.splits
              for config in (partial(tuned.lookup, "NVIDIA H200"), AttentionConfig.heuristic)]  # fmt: skip
    program = programs[f"attention/{name}-C8"]
    kernels = report.kernels(report.lower(program.function, *program.shapes()))
    assert kernels[2].name == "nsa_selected" and kernels[2].grid[2] == splits[0] != splits[1]


def test_the_reports_file_says_what_its_figures_depend_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "version", lambda name: "3.9.0")
    monkeypatch.setattr(report, "compile_sm90", lambda kernel: report.Resources(32, 0, 2048))
    path = tmp_path / "file.json"
    report.main(["selection/B1-T1-H8-N256", "commit/B1-A1", "--json", str(path)])
    data = json.loads(path.read_text())
    assert set(data) == {*harness.environment(), "triton", "rows"}
    assert data["commit"] == harness.environment()["commit"]
    assert data["command"] == f"report.py selection/B1-T1-H8-N256 commit/B1-A1 --json {path}"
    rows = {row["program"]: row for row in data["rows"]}
    assert rows["selection/B1-T1-H8-N256"]["config"] == "tuned" and rows["commit/B1-A1"]["config"] == "heuristic"
    assert {"kernel", "grid", "warps", "stages", "registers", "stack", "shared"} <= set(rows["commit/B1-A1"])
    assert "heuristic" in capsys.readouterr().out


def test_selection_compiles_for_sm90():
    pytest.importorskip("triton")
    for spec in specs.BENCHMARKS[-3:]:
        [kernel] = report.kernels(report.lower(partial(select_blocks, **spec.counts), *spec.abstract()))
        resources = report.compile_sm90(kernel)
        assert resources.stack == 0, f"{spec.name} spills: {resources}"


# Bytes a thread, of the programs below. Spills of that size stay in L1; more than it means that a tile does not fit
# registers at all, as with 16 rows and tiles of 64 keys (kernels_sm90.json has all).
MOST_STACK = 256
PRODUCT_LENGTHS = re.compile(r"tt\.dot [^\n]*: tensor<\d+x(\d+)x")
LAUNCHES = ["nsa_compressed_window", "nsa_selection", "nsa_selected", "nsa_merge", "nsa_compressed_selected_window",
            "nsa_merge"]  # fmt: skip
# A single token, groups of one and of several row tiles. Not 16 heads per KV head, which take Triton much longer.
# The group None stands for the deterministic form.
REPRESENTATIVE = [("B1-T1-H32x8-L64K-o70", 1), ("B8-T8-H32x8-L64K-o70", 8), ("B1-T64-H32x8-L64K-o70", 64),
                  ("B8-T8-H32x8-L64K-o70", None)]  # fmt: skip


@pytest.mark.parametrize(
    "spec, options",
    [
        *[pytest.param(spec, {}, id=spec.name) for spec in attention_specs.TESTS],
        *[pytest.param(spec, {"deterministic": True}, id=f"{spec.name}-deterministic") for spec in attention_specs.TESTS
          if spec.name in ("tree-28-wide", "shared-kv", "selection-only", "l16-d16-p16", "l64-d64-p64", "G16", "D24")],
        *[pytest.param(spec, {"mode": "shared"}, id=f"{spec.name}-shared-index") for spec in attention_specs.TESTS
          if spec.name in ("chain-40", "tree", "tree-shared-kv", "selection-only", "l16-d16-p16", "G16", "D64-bf16")],
    ],
)  # fmt: skip
def test_attention_lowers(spec, options):
    lowered = report.lower(report.verification(spec, min(spec.width, 128), **options), *spec.abstract())
    expected = LAUNCHES
    if not spec.sparsity.compressed_output:  # a reuse layer has no use for that branch
        expected = ["nsa_selected_window" if "compressed_selected" in name else name for name in LAUNCHES]
    kernels = report.kernels(lowered)
    assert [kernel.name for kernel in kernels] == expected
    # Shorter ones of bfloat16 come out doubled.
    assert min(int(length) for kernel in kernels for length in PRODUCT_LENGTHS.findall(kernel.module)) >= 16


def each_once(benchmarks):
    """Every choice of heads and width, at one of the batches and contexts in turn: others change sizes, no code."""
    found = {}
    for spec in benchmarks:
        found.setdefault((spec.heads, spec.width), []).append(spec)
    return [others[i % len(others)] for i, others in enumerate(found.values())]


@pytest.mark.slow
@pytest.mark.parametrize("spec", each_once(attention_specs.BENCHMARKS), ids=lambda spec: spec.name)
def test_attention_of_the_benchmarks_lowers_with_the_config_of_an_h200(spec):
    def layers(*arguments):
        out, selected = attend(spec.sparsity, *arguments)
        return out, attend(spec.sparsity, *arguments, selected=selected)[0]

    names = [kernel.name for kernel in report.kernels(report.lower(layers, *spec.abstract()))]
    assert names[:4] == LAUNCHES[:4]
    assert names[4:] in (LAUNCHES[4:], ["nsa_compressed_window", "nsa_selected", "nsa_merge"])


def test_a_large_batch_launches_small_groups_of_a_reuse_layer_apart():
    for name, apart in (("B8-T16-H32x8-L64K-o70", True), ("B1-T16-H32x8-L64K-o70", False)):
        [spec] = [spec for spec in attention_specs.BENCHMARKS if spec.name == name]
        kernels = report.kernels(report.lower(report.verification(spec, 8), *spec.abstract()))
        expected = ["nsa_compressed_window", "nsa_selected"] if apart else ["nsa_compressed_selected_window"]
        assert [kernel.name for kernel in kernels[4:-1]] == expected


@pytest.mark.parametrize("name, group", REPRESENTATIVE)
def test_attention_compiles_for_sm90(name, group):
    [spec] = [spec for spec in attention_specs.BENCHMARKS if spec.name == name]
    kernels = report.kernels(report.lower(report.verification(spec, group, group is None), *spec.abstract()))
    assert [kernel.name for kernel in kernels] == LAUNCHES
    assert all(size < 1 << 16 for kernel in kernels for size in kernel.grid[1:])
    pytest.importorskip("triton")
    # Without the reuse layer's merge, which is the refresh layer's with other splits.
    for kernel in kernels[:-1]:
        resources = report.compile_sm90(kernel)
        # What a program may have on sm_90, and registers for at least one program in a multiprocessor.
        assert resources.shared <= 227 * 1024, f"{kernel.name}: {resources}"
        assert resources.registers * 32 * kernel.num_warps <= 65536, f"{kernel.name}: {resources}"
        assert resources.stack <= MOST_STACK, f"{kernel.name} spills: {resources}"


# Everything that computes with floats, and what repeats it, with the types that it has.
FLOATS = re.compile(
    r"((?:arith\.\w+f|math\.\w+|tt\.dot|tt\.reduce|scf\.for|scf\.while)\b).*?(?: : (.*))?$", re.MULTILINE
)


def arithmetic(batch, parents, pages, backend):
    """Of each kernel of a layer of the embedded model: its operations on floats, in order."""
    config = dataclasses.replace(preset("embedded"), layers=1)
    params = jax.eval_shape(lambda: model.init_params(config, 0, jnp.bfloat16))
    cache = jax.eval_shape(lambda: create_cache(config, np.full((batch, 16), pages), pages, jnp.bfloat16))

    def step(params, tokens, cache):
        tail = make_tail(config.nsa, topology(parents, config.nsa.compress_block), cache.lengths)
        return model.verify(config, params, tokens, cache, tail, dtype=jnp.bfloat16, backend=backend)[0]

    lowered = report.lower(step, params, jax.ShapeDtypeStruct((batch, len(parents)), jnp.int32), cache)
    return [(kernel.name, kernel.num_warps, FLOATS.findall(kernel.module)) for kernel in report.kernels(lowered)]


def test_deterministic_arithmetic_follows_the_width_of_the_page_table_but_not_the_batch():
    """Of T, M and one kind of tree. The wider table is one over which heads are summed in two halves."""
    modules = []
    for batch, context in ((1, 65536), (8, 65536), (1, 262144)):
        spec = attention_specs.benchmark(batch, 8, context, (64, 4))
        function = partial(attend, spec.sparsity, deterministic=True)
        kernels = report.kernels(report.lower(function, *spec.abstract()))
        modules.append([(kernel.name, kernel.num_warps, FLOATS.findall(kernel.module)) for kernel in kernels])
    one, many, long = modules
    assert one == many and all(len(floats) > 20 for *_, floats in one)
    assert [name for (name, *_), own, other in zip(one, one, long, strict=True) if own != other] == ["nsa_selection"]


def test_a_token_alone_and_a_tree_in_a_batch_have_the_same_arithmetic_in_the_strict_class():
    """In class exact they have not, or this could not fail."""
    alone, together = (1, [-1], 16), (8, [-1] + [max(0, node - 3) for node in range(16)], 100)
    strict = Backend("pallas", deterministic=True)
    one, many = arithmetic(*alone, strict), arithmetic(*together, strict)
    assert one == many and all(len(floats) > 20 for *_, floats in one)
    assert arithmetic(*alone, Backend("pallas")) != arithmetic(*together, Backend("pallas"))
