"""The attention kernels against their NumPy reference: in interpret mode, and on a GPU where there is one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedError
from pallas_kernels.attention import AttentionConfig, Branch, Selection, Sparsity, attend, reference, specs

CHAIN_8 = next(spec for spec in specs.TESTS if spec.name == "chain-8")
TREE = next(spec for spec in specs.TESTS if spec.name == "tree-28-wide")
PLACES = [
    pytest.param(True, id="interpret"),
    pytest.param(False, id="gpu", marks=pytest.mark.gpu),
]


def config_of(spec, group=None, mode="merged", splits=(3, 2, 2), rows=16, **others):
    """A config with several splits and row tiles, so that small shapes exercise merging."""
    shape = spec.shape
    lanes = 1 << (shape.group - 1).bit_length()
    group = min(group or shape.width, shape.width)
    rows = max(rows, 16, lanes)
    return AttentionConfig(group=group, mode=mode, compressed=Branch(rows, splits[0]), selected=Branch(rows, splits[1]),
                           window=Branch(rows, splits[2]), **others)  # fmt: skip


def run(spec, arguments, config, interpret, **others):
    """The kernels' result, jitted; on a GPU the memory that outputs get is likely to hold NaN before."""
    function = jax.jit(lambda *a: attend(spec.sparsity, *a, config=config, interpret=interpret, **others))
    if not interpret:
        compiled = function.lower(*arguments).compile()
        jax.block_until_ready(jnp.full((1 << 24,), jnp.nan)).delete()
        return compiled(*arguments)
    return function(*arguments)


def check(spec, arguments, out, selection, selected=None, shown=None):
    """Against the reference: ids exactly, outputs to what the dtype and the longest reduction allow."""
    as_numpy = jax.tree.map(np.asarray, arguments)
    if shown is None:
        shown = (0, 1, 2) if spec.sparsity.compressed_output else (1, 2)
    expected, ids = reference.attend(spec.sparsity, *as_numpy, selected=selected, shown=shown)
    if selected is None:
        np.testing.assert_array_equal(selection.ids, ids)
    assert out.dtype == arguments[0].dtype
    scale = max(1.0, np.abs(expected).max())
    tolerance = {"float32": 2e-6, "bfloat16": 1e-2}[spec.dtype] * scale
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("interpret", PLACES)
@pytest.mark.parametrize("spec", specs.TESTS, ids=lambda spec: spec.name)
def test_refresh_and_reuse_equal_reference(spec, interpret):
    arguments = spec.arguments()
    config = config_of(spec)
    out, selection = run(spec, arguments, config, interpret)
    check(spec, arguments, out, selection)
    again, kept = run(spec, arguments, config, interpret, selected=selection)
    check(spec, arguments, again, kept)
    assert kept is not None and np.array_equal(kept.ids, selection.ids)


@pytest.mark.parametrize("interpret", PLACES)
@pytest.mark.parametrize("group", [1, 2, 3, 28])
@pytest.mark.parametrize("spec", [CHAIN_8, TREE], ids=lambda spec: spec.name)
def test_any_group_gives_the_same(spec, group, interpret):
    arguments = spec.arguments(seed=1)
    out, selection = run(spec, arguments, config_of(spec, group, splits=(1, 1, 1), rows=32), interpret)
    check(spec, arguments, out, selection)


@pytest.mark.parametrize("interpret", PLACES)
def test_groups_of_more_than_32_queries_take_several_mask_words(interpret):
    spec = dataclasses.replace(CHAIN_8, width=70, lengths=(300,))
    arguments = spec.arguments()
    check(spec, arguments, *run(spec, arguments, config_of(spec, 70, rows=64), interpret))


@pytest.mark.parametrize("interpret", PLACES)
@pytest.mark.parametrize("tile", [16, 32, 128])
def test_any_tile_gives_the_same(tile, interpret):
    arguments = CHAIN_8.arguments(seed=2)
    check(CHAIN_8, arguments, *run(CHAIN_8, arguments, config_of(CHAIN_8, tile=tile), interpret))


@pytest.mark.parametrize("interpret", PLACES)
@pytest.mark.parametrize("spec", [CHAIN_8, TREE], ids=lambda spec: spec.name)
def test_shared_index_gives_a_group_the_blocks_of_its_longest_prefix(spec, interpret):
    arguments = spec.arguments(seed=3)
    group = 4
    own = reference.attend(spec.sparsity, *jax.tree.map(np.asarray, arguments))[1]
    positions = np.asarray(arguments[-1].positions)
    wanted = np.empty_like(own)
    for b in range(own.shape[0]):
        for start in range(0, spec.width, group):
            members = range(start, min(start + group, spec.width))
            wanted[b, start : start + group] = own[b, max(members, key=lambda t: (positions[b, t], t))]
    out, selection = run(spec, arguments, config_of(spec, group, mode="shared"), interpret)
    np.testing.assert_array_equal(selection.ids, wanted)
    # A shallower query never sees tokens after its own, even in a block that another selected.
    check(spec, arguments, out, selection, selected=wanted)


@pytest.mark.parametrize("interpret", PLACES)
def test_reuse_without_the_compressed_branch(interpret):
    arguments = CHAIN_8.arguments(seed=4)
    config = config_of(CHAIN_8)
    _, selection = run(CHAIN_8, arguments, config, interpret)
    out, _ = run(CHAIN_8, arguments, config, interpret, selected=selection, reuse_compressed=False)
    check(CHAIN_8, arguments, out, selection, selected=np.asarray(selection.ids), shown=(1, 2))


@pytest.mark.parametrize("interpret", PLACES)
def test_without_gates_branches_add_up(interpret):
    query, _, *others = CHAIN_8.arguments(seed=5)
    arguments = (query, None, *others)
    check(CHAIN_8, arguments, *run(CHAIN_8, arguments, config_of(CHAIN_8), interpret))


@pytest.mark.parametrize("interpret", PLACES)
def test_what_lies_behind_the_length_is_not_read(interpret):
    spec = dataclasses.replace(CHAIN_8, lengths=(100, 37))
    arguments = spec.arguments(seed=6)
    query, gates, layer, table, lengths, tail = arguments
    expected, _ = run(spec, arguments, config_of(spec), interpret)
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
    out, _ = run(spec, (query, gates, poisoned, table, lengths, tail), config_of(spec), interpret)
    np.testing.assert_array_equal(out, expected)


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
    ],
)
def test_errors(change, message):
    names = ("query", "gates", "layer", "page_table", "lengths", "tail")
    arguments = dict(zip(names, CHAIN_8.arguments(), strict=True))
    for name, function in change.items():
        arguments[name] = function(arguments[name])
    with pytest.raises(ValueError, match=message):
        attend(CHAIN_8.sparsity, *arguments.values(), interpret=True)


def test_selection_of_another_grouping_is_refused():
    arguments = CHAIN_8.arguments()
    ids = jnp.zeros((3, 8, 2, 4), jnp.int32)
    with pytest.raises(ValueError, match="selected.size: got None, expected"):
        attend(CHAIN_8.sparsity, *arguments, selected=Selection(ids, None, None, None), config=config_of(CHAIN_8),
               interpret=True)  # fmt: skip


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
        attend(spec.sparsity, *spec.arguments(), interpret=True)


def test_without_a_gpu_the_kernels_say_so():
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    with pytest.raises(UnsupportedError, match="device: got cpu, expected a GPU"):
        attend(CHAIN_8.sparsity, *CHAIN_8.arguments())


def test_the_search_space_holds_the_heuristic():
    for spec in specs.BENCHMARKS:
        space = AttentionConfig.search_space(spec.sparsity, spec.shape)
        assert AttentionConfig.heuristic(spec.sparsity, spec.shape) in space
