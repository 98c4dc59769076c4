"""The attention kernels against their NumPy reference: in interpret mode, and on a GPU where there is one."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import UnsupportedError, _dispatch, attention
from pallas_kernels.attention import (
    MAX_GROUP,
    AttentionConfig,
    Branch,
    Launch,
    Selection,
    Sparsity,
    attend,
    configure,
    reference,
    specs,
)
from pallas_kernels.attention import launch as launches
from pallas_kernels.attention import selection as selection_module

CHAIN_8 = next(spec for spec in specs.TESTS if spec.name == "chain-8")
TREE = next(spec for spec in specs.TESTS if spec.name == "tree-28-wide")
# Interpreted, these chains of short and finished sequences are one batch: a program takes seconds to compile.
JOINED = [spec for spec in specs.TESTS
          if spec.name in ("empty-prefix", "one-block-sequences", "block-ends", "finished-sequence")]  # fmt: skip
RAGGED = dataclasses.replace(CHAIN_8, name="ragged", lengths=sum((spec.lengths for spec in JOINED), ()))
SHARED = 4  # queries of a group that shares an index
# Reuse layers take the same code in another launch: for these specs that is compiled too.
REUSED = {
    "decode", "chain-8", "ragged", "past-capacity", "chain-70-beyond-local", "tree", "shared-kv",
    "selection-only", "l64-d64-p64", "D64-bf16", "overlap-70",
}  # fmt: skip
PLACES = [
    pytest.param(True, id="interpret"),
    pytest.param(False, id="gpu", marks=pytest.mark.gpu),
]
# A GPU takes every spec in both dtypes; drafts as one group, each query alone, and by a shared index.
ON_GPU = [
    (dataclasses.replace(spec, name=f"{spec.name.removesuffix('-bf16')}-{short}", dtype=dtype), group, mode)
    for spec in specs.TESTS
    for short, dtype in (("f32", "float32"), ("bf16", "bfloat16"))
    for group, mode in dict.fromkeys([(min(spec.width, MAX_GROUP), "merged"), (1, "merged"), (SHARED, "shared")])
    if spec.width > 1 or mode == "merged"
]
# Interpreted, queries alone, with all at once that the other specs have in groups only.
ALONE = specs.AttentionSpec("alone-G16-l16-d16-p16-shared-kv-D24-bf16", 3, (120,), (16, 1), 24, Sparsity(16, 16, 16, 4,
                            window=24, scale=0.25), shared_kv=True, dtype="bfloat16")  # fmt: skip
# The others count as slow: they run on one version of Python.
QUICK = {"decode", "chain-8", "tree", "D64-bf16"}
SPECS = [
    *[
        pytest.param(spec, spec.width, "merged", True, id=f"{spec.name}-interpret",
                     marks=[] if spec.name in QUICK else pytest.mark.slow)
        for spec in [*specs.TESTS, RAGGED]
        # These two compile for as long as three others, and longer.
        if spec not in JOINED and spec.name not in ("chain-128", "chain-512")
    ],
    pytest.param(ALONE, 1, "merged", True, id=f"{ALONE.name}-interpret", marks=pytest.mark.slow),
    *[pytest.param(spec, group, mode, False, id=f"{spec.name}-{mode}-{group}-gpu", marks=pytest.mark.gpu)
      for spec, group, mode in ON_GPU],
]  # fmt: skip
# Of float32 that a key's term goes through: in its score, in the exponential, in the sum, and where splits are merged.
# Errors wander: a sum of n terms of about unit size is off by √n times as much as one term.
ROUNDINGS = 4


def config_of(spec, group=None, mode="merged", splits=(3, 2, 2), rows=16, **others):
    """A config with several splits and row tiles, so that small shapes exercise merging."""
    shape = spec.shape
    lanes = 1 << (shape.group - 1).bit_length()
    group = min(group or shape.width, shape.width)
    rows = max(rows, 16, lanes)
    return AttentionConfig(group=group, mode=mode, compressed=Branch(rows, splits[0]), selected=Branch(rows, splits[1]),
                           window=Branch(rows, splits[2]), **others)  # fmt: skip


@functools.lru_cache
def arguments_of(spec, seed=0):
    """``spec.arguments(seed)``, which several tests share."""
    return spec.arguments(seed)


@functools.lru_cache
def function_of(sparsity, config, interpret, reuse, others):
    """The kernels as one jitted function: out, selection, and with ``reuse`` the out of a layer that reuses that."""

    def function(*arguments, **selected):
        call = functools.partial(attend, sparsity, config=config, interpret=interpret, **dict(others))
        out, selection = call(*arguments, **selected)
        return (out, selection, *call(*arguments, selected=selection)) if reuse else (out, selection)

    # A program is run a few times at most: unoptimised code is there sooner.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": "0"} if interpret else None)


def run(spec, arguments, config, interpret, reuse=False, selected=None, **others):
    """The kernels' results; on a GPU the memory that outputs get is likely to hold NaN before."""
    function = function_of(spec.sparsity, config, interpret, reuse, tuple(others.items()))
    selected = {} if selected is None else {"selected": selected}
    if not interpret:
        compiled = function.lower(*arguments, **selected).compile()
        jax.block_until_ready(jnp.full((1 << 24,), jnp.nan)).delete()
        return compiled(*arguments, **selected)
    return function(*arguments, **selected)


def rounding(spec):
    """The relative error of the call's longest sum: over keys, or over a head's dimensions."""
    sparsity, length = spec.sparsity, max(spec.lengths) + spec.width
    tokens = min(length, max(sparsity.num_selected * sparsity.select_block, sparsity.window))
    terms = max(spec.dim, tokens, length // sparsity.compress_stride)
    return ROUNDINGS * math.sqrt(terms) * float(jnp.finfo(jnp.float32).eps)


def assert_close(spec, out, expected):
    """To the sums' error and, in bfloat16, half an eps for rounding weights and half an eps for rounding the output."""
    tolerance = rounding(spec) + (float(jnp.finfo(jnp.bfloat16).eps) if spec.dtype == "bfloat16" else 0.0)
    atol = tolerance * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=atol, rtol=0)


def assert_selected(spec, ids, expected, importance):
    """Those of the reference; of blocks whose importance is the same but for rounding, any."""
    assert ids.shape == expected.shape
    for at in map(tuple, np.argwhere((ids != expected).any(axis=-1))):
        ours, theirs = np.setdiff1d(ids[at], expected[at]), np.setdiff1d(expected[at], ids[at])
        swapped = np.sort(np.concatenate([np.setdiff1d(expected[at], theirs), ours]))
        message = f"selected {ids[at]}, expected {expected[at]} at {at}"
        np.testing.assert_array_equal(ids[at], swapped, err_msg=message)
        ours, theirs = importance[at][ours], importance[at][theirs]
        # Of equal ones the lower id counts, so it is less.
        assert (ours.max() < theirs.min()) & (ours.min() >= theirs.max() * (1 - rounding(spec))), message


def check(spec, arguments, out, selection, selected=None, shown=None):
    """Against the reference: ids but for near-ties, outputs to what the dtype and the longest reduction allow."""
    as_numpy = jax.tree.map(np.asarray, arguments)
    if shown is None:
        shown = (0, 1, 2) if spec.sparsity.compressed_output else (1, 2)
    attend_as = functools.partial(reference.attend, spec.sparsity, *as_numpy, shown=shown)
    expected, own, importance = attend_as(selected=selected)
    if selected is None:
        ids = np.asarray(selection.ids)
        assert_selected(spec, ids, own, importance)
        if (ids != own).any():
            expected, *_ = attend_as(selected=ids)
    assert out.dtype == arguments[0].dtype
    assert_close(spec, out, expected)


def check_shared(spec, arguments, selection, group):
    """The ids of a shared index, checked: all queries of a group have those of its longest prefix."""
    positions = np.asarray(arguments[-1].positions)
    longest = np.empty_like(positions)
    for b in range(len(positions)):
        for start in range(0, spec.width, group):
            members = range(start, min(start + group, spec.width))
            longest[b, start : start + group] = max(members, key=lambda t: (positions[b, t], t))
    ids = np.asarray(selection.ids)
    _, *own = reference.attend(spec.sparsity, *jax.tree.map(np.asarray, arguments))
    assert_selected(spec, ids, *(np.take_along_axis(array, longest[..., None, None], axis=1) for array in own))
    np.testing.assert_array_equal(ids, np.take_along_axis(ids, longest[..., None, None], axis=1))
    return ids


def a_key_of_another_token(query, gates, layer, page_table, lengths, tail):
    """In the first sequence's first page, which all its queries select, for one KV head."""
    keys = np.array(layer.key)
    keys[page_table[0, 0], 1, 5] = keys[page_table[0, 0], 1, 6]
    return dict(layer=layer._replace(key=keys))


def a_token_after_its_own(query, gates, layer, page_table, lengths, tail):
    ancestor = np.tri(query.shape[1], dtype=bool)[None]
    ancestor[0, 2, 3] = True
    return dict(tail=tail._replace(ancestor=ancestor))


def gates_of_other_branches(query, gates, *others):
    """For one head of one query."""
    gates = np.array(gates)
    gates[0, 3, 1] = gates[0, 3, 1, ::-1]
    return dict(gates=gates)


def another_block(*arguments):
    """In place of one query's first block that is not forced, for one KV head."""
    ids = reference.attend(CHAIN_8.sparsity, *arguments)[1]
    ids[0, 3, 0, 1] = next(block for block in range(1, 11) if block not in ids[0, 3, 0])
    return dict(selected=ids)


def a_window_one_key_short(*arguments):
    return dict(sparsity=dataclasses.replace(CHAIN_8.sparsity, window=CHAIN_8.sparsity.window - 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fault",
    [a_key_of_another_token, a_token_after_its_own, gates_of_other_branches, another_block,
     a_window_one_key_short],
    ids=lambda fault: fault.__name__,
)  # fmt: skip
def test_the_comparison_finds(fault, dtype):
    """In the reference's own output, rounded to the dtype, which passes without the fault."""
    spec = dataclasses.replace(CHAIN_8, dtype=dtype)
    arguments = jax.tree.map(np.asarray, arguments_of(spec))
    names = ("query", "gates", "layer", "page_table", "lengths", "tail")
    right = dict(zip(names, arguments, strict=True), sparsity=spec.sparsity)
    out, ids, _ = reference.attend(**right)
    selection = SimpleNamespace(ids=ids)
    check(spec, arguments, out.astype(jnp.dtype(dtype)), selection)
    wrong, *_ = reference.attend(**{**right, "selected": ids, **fault(*arguments)})
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(spec, arguments, wrong.astype(jnp.dtype(dtype)), selection)


def test_another_block_counts_as_selected_only_where_it_is_as_important_but_for_rounding():
    spec = next(spec for spec in specs.TESTS if spec.name == "l16-d16-p16")  # a block's importance is one key's
    query, gates, layer, table, *others = jax.tree.map(np.asarray, arguments_of(spec))
    _, ids, importance = reference.attend(spec.sparsity, query, gates, layer, table, *others)
    free = ids[0, 0, 0, 1:-2]  # those that are not forced
    least = free[importance[0, 0, 0, free].argmin()]
    other = next(block for block in range(1, 20) if block not in ids[0, 0, 0])

    def check_other_choice(factor):
        """``other`` gets ``factor`` times the key of ``least``, and the first query the one that comes second."""
        keys = np.array(layer.compressed_key)
        keys[table[0, other], 0] = keys[table[0, least], 0] * np.float32(factor)
        arguments = (query, gates, layer._replace(compressed_key=keys), table, *others)
        _, ids, _ = reference.attend(spec.sparsity, *arguments)
        row = ids[0, 0, 0]
        assert (least in row) != (other in row)
        row[:] = np.sort(np.where((row == least) | (row == other), least + other - row, row))
        out, *_ = reference.attend(spec.sparsity, *arguments, selected=ids)
        check(spec, arguments, out.astype(np.float32), SimpleNamespace(ids=ids))

    check_other_choice(1 - 3e-7)
    with pytest.raises(AssertionError, match="selected"):
        check_other_choice(0.99)


@pytest.mark.parametrize("spec, group, mode, interpret", SPECS)
def test_refresh_and_reuse_equal_reference(spec, group, mode, interpret, kernel_seed):
    arguments = arguments_of(spec, kernel_seed)
    reuse = spec.name in REUSED or not interpret
    out, selection, *again = run(spec, arguments, config_of(spec, group, mode), interpret, reuse)
    shared = check_shared(spec, arguments, selection, group) if mode == "shared" else None
    check(spec, arguments, out, selection, shared)
    if reuse:
        check(spec, arguments, *again, shared)
        np.testing.assert_array_equal(again[1].ids, selection.ids)


@pytest.mark.parametrize(
    "spec, dtype, interpret",
    [
        *[pytest.param(spec, "float32", True, id=f"{spec.name}-interpret", marks=pytest.mark.slow)
          for spec in specs.TESTS if spec.name in ("tree-28-wide", "l32-d16-p64")],
        *[pytest.param(spec, dtype, False, id=f"{spec.name}-{dtype}-gpu", marks=pytest.mark.gpu)
          for spec in specs.TESTS for dtype in ("float32", "bfloat16")],
    ],
)  # fmt: skip
def test_equals_reference_with_the_config_that_a_call_takes(spec, dtype, interpret, kernel_seed):
    """The other tests' configs have tiles of their own, and several splits. A chunk of a prompt is among the specs."""
    spec = dataclasses.replace(spec, dtype=dtype)
    arguments, config = arguments_of(spec, kernel_seed), configure(spec.sparsity, spec.shape, dtype=dtype)
    assert config.tile == 16 or dtype == "bfloat16"
    out, selection, *again = run(spec, arguments, config, interpret, reuse=True)
    check(spec, arguments, out, selection)
    check(spec, arguments, *again)


@pytest.mark.slow
@pytest.mark.parametrize("interpret", [pytest.param(True, id="interpret", marks=pytest.mark.long), PLACES[1]])
def test_a_reuse_layer_whose_selected_branch_is_launched_apart_gives_the_same(interpret, kernel_seed, monkeypatch):
    monkeypatch.setattr(attention, "_apart", lambda config, shape, shown: True)
    arguments, config = arguments_of(CHAIN_8, kernel_seed), config_of(CHAIN_8, splits=(2, 3, 1))
    for reuse_compressed, shown in ((True, (0, 1, 2)), (False, (1, 2))):
        call = functools.partial(attend, CHAIN_8.sparsity, config=config, interpret=interpret)
        selection = call(*arguments)[1]
        out = call(*arguments, selected=selection, reuse_compressed=reuse_compressed)[0]
        check(CHAIN_8, arguments, out, None, np.asarray(selection.ids), shown)


@pytest.mark.slow
@pytest.mark.parametrize("interpret", PLACES)
def test_a_reuse_layer_in_one_wave_gives_the_same(interpret, kernel_seed, monkeypatch):
    config = config_of(CHAIN_8, splits=(2, 3, 1))
    launch = Launch(CHAIN_8.sparsity, CHAIN_8.shape, config, (0, 1, 2))
    tiles = {index: launch.row_tiles(index) for index in launch.branches}
    lead = CHAIN_8.shape.batch * CHAIN_8.shape.num_kv_heads
    # Room for two splits of the selected branch.
    monkeypatch.setattr(launches, "_MULTIPROCESSORS", lead * (2 * tiles[0] + 2 * tiles[1] + tiles[2]))
    monkeypatch.setattr(launches, "_PROGRAMS", 1)
    assert launch.in_one_wave().config.selected.splits == 2
    arguments = arguments_of(CHAIN_8, kernel_seed)
    call = functools.partial(attend, CHAIN_8.sparsity, config=config, interpret=interpret)
    selection = call(*arguments)[1]
    out = call(*arguments, selected=selection)[0]
    check(CHAIN_8, arguments, out, None, np.asarray(selection.ids))


@pytest.mark.parametrize(
    "width, branches, splits",
    # All fit; all but a few; three waves and more; two of them, without the compressed branch.
    [(1, (0, 1, 2), 11), (5, (0, 1, 2), 5), (8, (0, 1, 2), 5), (16, (0, 1, 2), 4), (64, (0, 1, 2), 7), (9, (1, 2), 7)],
)
def test_a_reuse_layer_of_one_sequence_leaves_no_few_programs_for_later(width, branches, splits, monkeypatch):
    monkeypatch.setattr(_dispatch, "device_kind", lambda: "NVIDIA H200")
    spec = specs.benchmark(1, width, 65536, (32, 8))
    launch = Launch(spec.sparsity, spec.shape, configure(spec.sparsity, spec.shape), branches)
    assert launch.in_one_wave().config.selected.splits == splits
    scored = dataclasses.replace(launch, branches=(0, 2), scored=True)
    assert scored.in_one_wave() == scored


def test_reused_specs_exist():
    assert {spec.name for spec in [*specs.TESTS, RAGGED]} >= REUSED
    assert len(JOINED) == 4


@pytest.mark.slow
@pytest.mark.parametrize("interpret", PLACES)
@pytest.mark.parametrize(
    "spec, group", [(CHAIN_8, 1), (CHAIN_8, 3), (TREE, 1), (TREE, 2)],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_any_group_gives_the_same(spec, group, interpret, kernel_seed):
    arguments = arguments_of(spec, kernel_seed)
    out, selection = run(spec, arguments, config_of(spec, group, splits=(1, 1, 1), rows=32), interpret)
    check(spec, arguments, out, selection)


@pytest.mark.slow
@pytest.mark.parametrize("interpret", PLACES)
@pytest.mark.parametrize("tile", [16, 128])
def test_any_tile_gives_the_same(tile, interpret, kernel_seed):
    arguments = arguments_of(CHAIN_8, kernel_seed)
    check(CHAIN_8, arguments, *run(CHAIN_8, arguments, config_of(CHAIN_8, tile=tile), interpret))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [CHAIN_8, TREE], ids=lambda spec: spec.name)
def test_shared_index_gives_a_group_the_blocks_of_its_longest_prefix(spec, kernel_seed):
    """On a GPU all specs do."""
    arguments = arguments_of(spec, kernel_seed)
    out, selection = run(spec, arguments, config_of(spec, SHARED, mode="shared"), interpret=True)
    # A shallower query never sees tokens after its own, even in a block that another selected.
    check(spec, arguments, out, selection, selected=check_shared(spec, arguments, selection, SHARED))


@pytest.mark.parametrize("interpret", PLACES)
def test_reuse_without_the_compressed_branch(interpret, kernel_seed):
    arguments = arguments_of(CHAIN_8, kernel_seed)
    config = config_of(CHAIN_8)
    _, selection, *_ = run(CHAIN_8, arguments, config, interpret, reuse=True)  # compiled by another test
    out, _ = run(CHAIN_8, arguments, config, interpret, selected=selection, reuse_compressed=False)
    check(CHAIN_8, arguments, out, selection, selected=np.asarray(selection.ids), shown=(1, 2))


@pytest.mark.parametrize("interpret", PLACES)
def test_without_gates_branches_add_up(interpret, kernel_seed):
    query, _, *others = arguments_of(CHAIN_8, kernel_seed)
    arguments = (query, None, *others)
    check(CHAIN_8, arguments, *run(CHAIN_8, arguments, config_of(CHAIN_8), interpret))


@pytest.mark.slow
@pytest.mark.parametrize("interpret", PLACES)
def test_selections_of_many_programs_and_long_rows_are_the_same(interpret, kernel_seed, monkeypatch):
    """There rows of scores are loaded once their length is known, and heads one after the other."""
    spec = next(spec for spec in specs.TESTS if spec.name == "G3")
    monkeypatch.setattr(selection_module, "_EAGER", 0)
    monkeypatch.setattr(selection_module, "_IN_FLIGHT", 0)
    config = config_of(spec, splits=(4, 2, 3))  # of no other test, whose program this one would be
    arguments = arguments_of(spec, kernel_seed)
    check(spec, arguments, *run(spec, arguments, config, interpret))


@pytest.mark.parametrize("interpret", PLACES)
def test_what_lies_behind_the_length_is_not_read(interpret, kernel_seed):
    spec = CHAIN_8
    arguments = arguments_of(spec, kernel_seed)
    query, gates, layer, table, lengths, tail = arguments
    expected, *_ = run(spec, arguments, config_of(spec), interpret, reuse=True)  # compiled by another test
    page, ring = spec.sparsity.select_block, spec.shape.ring
    pools = {name: np.array(getattr(layer, name)) for name in layer._fields}
    unread = np.ones(spec.shape.num_pages, bool)
    for b, length in enumerate(spec.lengths):
        used = -(-length // page)
        unread[np.asarray(table)[b, :used]] = False
        last = int(np.asarray(table)[b, used - 1])
        for name in ("key", "value"):
            pools[name][last, :, (length - 1) % page + 1 :] = np.nan
        complete = (length - spec.sparsity.compress_block) // spec.sparsity.compress_stride + 1
        per = spec.sparsity.entries_per_page
        for name in ("compressed_key", "compressed_value"):
            for entry in range(complete, used * per):
                pools[name][int(np.asarray(table)[b, entry // per]), :, entry % per] = np.nan
        for name in ("window_key", "window_value"):
            pools[name][b, :, min(length, ring) :] = np.nan
    for name in ("key", "value", "compressed_key", "compressed_value"):
        pools[name][unread] = np.nan
    poisoned = type(layer)(**{name: jnp.asarray(pool) for name, pool in pools.items()})
    out, _, again, _ = run(spec, (query, gates, poisoned, table, lengths, tail), config_of(spec), interpret, reuse=True)
    np.testing.assert_array_equal(out, expected)
    assert_close(spec, again, expected)


def cut(axis, *names):
    """A change of those arrays of a named tuple, or of an array, to none along ``axis``."""

    def none_of(array):
        return array[(slice(None),) * axis + (slice(0, 0),)]

    return lambda x: x._replace(**{name: none_of(getattr(x, name)) for name in names}) if names else none_of(x)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query=lambda x: x.astype(jnp.float16)), "query: got float16, expected bfloat16 or float32"),
        (dict(query=lambda x: x[:, :, :3]), r"query: got 3 heads, expected a multiple of layer.key's 2"),
        (dict(gates=lambda x: x[..., :2]), r"gates: got float32 \(3, 8, 4, 2\), expected float32 \(3, 8, 4, 3\)"),
        (dict(lengths=lambda x: x[:1]), r"lengths: got int32 \(1,\), expected int32 \(3,\)"),
        (dict(layer=lambda x: x._replace(value=x.value[:1])), "layer.value: got float32"),
        (dict(layer=lambda x: x._replace(window_key=None, window_value=None)), "window_key: given in one of layer and"),
        (dict(layer=lambda x: x._replace(compressed_value=None)), "compressed_value: given in one of layer and tail"),
        (dict(tail=lambda x: x._replace(ancestor=jnp.ones((2, 8, 8), bool))), "tail.ancestor: got a batch of 2"),
        (dict(tail=lambda x: x._replace(ancestor=jnp.array(True))), r"tail.ancestor: got shape \(\), expected \[B or"),
        (dict(tail=lambda x: x._replace(slot=jnp.int32(3))), r"tail.slot: got shape \(\), expected \[B, M\]"),
        (dict(tail=lambda x: x._replace(key=None)), "tail.key: got None, expected float32"),
        (dict(layer=lambda x: x._replace(key=None)), "layer.key: got None, expected .P, Hkv, l', D."),
        (dict(layer=lambda x: x._replace(value=None)), "layer.value: got None, expected float32"),
        (dict(layer=lambda x: x._replace(compressed_key=None)), "layer.compressed_key: got None, expected float32"),
        (dict(query=cut(0)), r"query: got shape \(0, 8, 4, 16\), expected .* with B of at least 1"),
        (dict(query=cut(1)), r"query: got shape \(3, 0, 4, 16\), expected .* with T of at least 1"),
        (dict(query=cut(2)), r"query: got shape \(3, 8, 0, 16\), expected .* with Hq of at least 1"),
        (dict(layer=cut(0, "key")), r"layer.key: got shape \(0, 2, 16, 16\), expected .* with P of at least 1"),
        (dict(layer=cut(2, "window_key")), r"layer.window_key: got shape \(3, 2, 0, 16\), expected .* with R of"),
        (dict(page_table=cut(1)), r"page_table: got shape \(3, 0\), expected .* with N of at least 1"),
        (dict(tail=cut(1, "slot")), r"tail.slot: got shape \(3, 0\), expected .* with M of at least 1"),
        (
            dict(
                layer=lambda x: x._replace(window_key=x.window_key[:, :, :18], window_value=x.window_value[:, :, :18])
            ),
            "layer.window_key: got a ring of 18, expected at least 19",
        ),
    ],
)
def test_errors(change, message):
    names = ("query", "gates", "layer", "page_table", "lengths", "tail")
    arguments = dict(zip(names, arguments_of(CHAIN_8), strict=True))
    for name, function in change.items():
        arguments[name] = function(arguments[name])
    with pytest.raises(ValueError, match=message):
        attend(CHAIN_8.sparsity, *arguments.values(), interpret=True)


@pytest.mark.parametrize(
    "group, change, message",
    [
        (
            3,
            dict(ids=np.zeros((3, 8, 2, 5), np.int32)),
            r"ids: got int32 \(3, 8, 2, 5\), expected int32 \(3, 8, 2, 4\)",
        ),
        (3, dict(pages=None, owners=None, size=None), "pages: got None, expected .* as config.group = 3 says"),
        (
            3,
            dict(pages=np.zeros((3, 2, 3, 11), np.int32)),
            r"pages: got int32 \(3, 2, 3, 11\), expected int32 \(3, 2, 3, 12",
        ),
        (3, dict(pages=np.zeros((3, 2, 3, 12), np.float32)), "pages: got float32 .*, expected int32"),
        (3, dict(owners=None), r"owners: got None, expected int32 \(3, 2, 3, 1, 12\)"),
        (3, dict(size=np.zeros((3, 2, 3), np.float32)), r"size: got float32 \(3, 2, 3\), expected int32"),
        (1, dict(), r"pages: got int32 \(3, 2, 3, 12\), expected None, as config.group = 1 says"),
    ],
)
def test_a_selection_that_is_not_one_of_the_call_is_refused(group, change, message):
    sizes = dict(ids=(3, 8, 2, 4), pages=(3, 2, 3, 12), owners=(3, 2, 3, 1, 12), size=(3, 2, 3))
    selected = Selection(**{name: np.zeros(size, np.int32) for name, size in sizes.items()})._replace(**change)
    with pytest.raises(ValueError, match=f"selected.{message}"):
        attend(CHAIN_8.sparsity, *arguments_of(CHAIN_8), selected=selected, config=config_of(CHAIN_8, group),
               interpret=True)  # fmt: skip


@pytest.mark.parametrize(
    "switches, message",
    [
        (dict(window=0), "window: got 0, expected at least 1"),
        (dict(window=10**12), "window: got 1000000000000, expected at least 1 and at most 2147483647"),
        (dict(compress_block=8.0), "compress_block: got 8.0, expected a whole number"),
        (dict(num_selected=True), "num_selected: got True, expected a whole number"),
        (dict(num_initial=-3), "num_initial: got -3, expected at least 0"),
        (dict(num_local=0), "num_local: got 0, expected at least 1"),
        (dict(scale=math.nan), "scale: got nan, expected a finite number"),
        (dict(scale=-math.inf), "scale: got -inf, expected a finite number"),
        (dict(scale=10**400), "scale: got 1000.*, expected a finite number"),
        (dict(scale="1"), "scale: got '1', expected a finite number"),
        (dict(num_selected=2), "got num_selected 2, num_initial 1, num_local 2, expected num_selected >="),
        (dict(compress_stride=24), "got l = 32, d = 24, l' = 64, expected d to divide"),
    ],
)
def test_sparsities_out_of_range_are_refused(switches, message):
    with pytest.raises(ValueError, match=message):
        Sparsity(**switches)


def test_numpys_integers_are_taken_for_sizes():
    sparsity = Sparsity(window=np.int64(96), num_selected=np.int32(8), scale=np.float32(0.5))
    assert sparsity == Sparsity(window=96, num_selected=8, scale=0.5)
    assert type(sparsity.window) is type(sparsity.num_selected) is int


@pytest.mark.parametrize(
    "switches, message",
    [
        (dict(group=1.5), "group: got 1.5, expected a whole number"),
        (dict(group=0), "group: got 0, expected at least 1"),
        (dict(num_stages=0), "num_stages: got 0, expected at least 1"),
        (dict(selection_warps=0), "selection_warps: got 0, expected a power of two of at least 1 and at most 32"),
        (dict(selection_warps=3), "selection_warps: got 3, expected a power of two"),
        (dict(warp_rows=12), "warp_rows: got 12, expected a power of two"),
        (dict(merge_values=3000), "merge_values: got 3000, expected a power of two"),
        (dict(merge_warps=0), "merge_warps: got 0, expected a power of two"),
        (dict(tile=17), "tile: got 17, expected a power of two of at least 16"),
        (dict(mode="both"), "mode: got 'both', expected 'merged' or"),
        (dict(window=4), "window: got 4, expected a Branch"),
    ],
)
def test_configs_out_of_range_are_refused(switches, message):
    branch = Branch(16, 1)
    fields = dict(group=1, compressed=branch, selected=branch, window=branch)
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**(fields | switches))


def test_branches_and_groups_out_of_range_are_refused():
    for sizes, message in (
        ((24, 1), "rows: got 24, expected a power"),
        ((16, 0), "splits: got 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Branch(*sizes)
    with pytest.raises(ValueError, match="group: got 0, expected at least 1"):
        configure(CHAIN_8.sparsity, CHAIN_8.shape, 0)


@pytest.mark.parametrize(
    "spec, message",
    [
        (dataclasses.replace(CHAIN_8, heads=(34, 2)), "got 17 heads per KV head, expected at most 16"),
        (dataclasses.replace(CHAIN_8, dim=512), "got head dim 512, expected at most 256"),
        (dataclasses.replace(CHAIN_8, sparsity=Sparsity(8, 4, 24, 4, window=20)), "got l' = 24 and d = 4, expected l'"),
        (dataclasses.replace(CHAIN_8, sparsity=Sparsity(8, 4, 8, 4, window=20)), "got l' = 8, expected 16 to 128"),
    ],
)
def test_unsupported_sizes_say_which_and_why(spec, message):
    with pytest.raises(UnsupportedError, match=message):
        attend(spec.sparsity, *spec.abstract(), interpret=True)


def test_without_a_gpu_the_kernels_say_so():
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    with pytest.raises(UnsupportedError, match="device: got cpu, expected a GPU"):
        attend(CHAIN_8.sparsity, *arguments_of(CHAIN_8))


def test_the_search_space_is_the_heuristic_and_what_differs_along_one_axis():
    fields = [field.name for field in dataclasses.fields(AttentionConfig)]
    # A group and its mode are the call's.
    assert sorted(sum(AttentionConfig.AXES, ())) == sorted(set(fields) - {"group", "mode"})
    for spec in specs.BENCHMARKS:
        base, *others = AttentionConfig.search_space(spec.sparsity, spec.shape)
        assert base == AttentionConfig.heuristic(spec.sparsity, spec.shape)
        assert AttentionConfig.search_space(spec.sparsity, spec.shape, dtype="float32")[0].tile == 16
        assert len({base, *others}) == 1 + len(others) <= 40
        along = [
            [axis for axis in AttentionConfig.AXES if any(getattr(base, name) != getattr(own, name) for name in axis)]
            for own in others
        ]
        assert all(len(axes) == 1 for axes in along) and {axes[0] for axes in along} == set(AttentionConfig.AXES)
        assert {base.window.splits * 2, base.window.splits // 2} <= {own.window.splits for own in others}
        assert base.selection_warps // 2 in {own.selection_warps for own in others}
        assert {1024, 4096} <= {own.merge_values for own in others} and {8, 32} <= {own.warp_rows for own in others}


def test_a_gpu_of_another_vendor_is_refused_for_the_kernels_ptx():
    device = AbstractDevice("AMD Instinct MI300X", None, "gpu")
    message = "attend: implementation 'pallas': device: got AMD Instinct MI300X, expected a GPU of NVIDIA's"
    mesh = AbstractMesh((), (), abstract_device=device)
    with use_abstract_mesh(mesh), pytest.raises(UnsupportedError, match=message):
        attend(CHAIN_8.sparsity, *CHAIN_8.abstract())
