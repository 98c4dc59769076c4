"""The deterministic form of the attention kernels: a query's bits depend on its prefix and its path alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels_attention import PLACES, check, run

from pallas_kernels.attention import Sparsity, attend, specs
from pallas_kernels.commit import Entries
from pallas_kernels.commit import reference as commit_reference

SPECS = {spec.name: spec for spec in specs.TESTS}
CHAIN = specs.AttentionSpec("chain", 8, (203, 38), sparsity=Sparsity(8, 4, 16, 4, window=20, scale=0.25))
TREE = dataclasses.replace(CHAIN, name="tree", tree=(-1, 0, 0, 1, 1, 2, 3, 5))
PAGED = dataclasses.replace(CHAIN, name="paged", shared_kv=True)
BF16 = dataclasses.replace(TREE, name="tree-bf16", dtype="bfloat16", dim=64)


@pytest.mark.slow
@pytest.mark.parametrize("interpret", PLACES)
@pytest.mark.parametrize("name", ["tree-28-wide", "shared-kv", "past-capacity"])
def test_equals_reference(name, interpret, kernel_seed):
    spec = SPECS[name]
    arguments = spec.arguments(kernel_seed)
    check(spec, arguments, *run(spec, arguments, None, interpret, deterministic=True))


@functools.lru_cache
def out_of(sparsity, interpret):
    # A program is run a few times at most: unoptimised code is there sooner.
    options = {"xla_backend_optimization_level": "0"} if interpret else None
    function = functools.partial(attend, sparsity, deterministic=True, interpret=interpret)
    return jax.jit(lambda *arguments: function(*arguments), compiler_options=options)


def decoded(spec, arguments, path):
    """Arguments in which ``path`` but its last node is committed, and that node is the root of a chain.

    Behind it stand tokens that are none of its business. What the call has for node 0 is what decoding the path gives.
    """
    query, gates, layer, page_table, lengths, tail = jax.tree.map(np.asarray, arguments)
    stored, new = (Entries(**{name: getattr(arrays, name) for name in layer._fields}) for arrays in (layer, tail))
    steps, root, batch = len(path) - 1, path[-1], len(lengths)
    done = commit_reference.commit(
        stored, new, page_table, lengths, np.tile(np.array(path, np.int32), (batch, 1)),
        np.full(batch, steps, np.int32), tail.slot, compress_block=spec.sparsity.compress_block,
    )  # fmt: skip
    order = np.array([root, *(node for node in range(spec.width)[::-1] if node != root)])

    def moved(array):
        return None if array is None else array[:, order]

    # The slots of the root; the others' entries are noise, as the others are.
    slot = np.full_like(tail.slot, spec.width)
    entries = [None if array is None else np.array(array) for array in (tail.compressed_key, tail.compressed_value)]
    for b in range(batch):
        for m in np.flatnonzero(tail.slot[b] == root):
            slot[b, 0] = 0
            for array, old in zip(entries, (tail.compressed_key, tail.compressed_value), strict=True):
                if array is not None:
                    array[b, 0] = old[b, m]
    fresh = tail._replace(
        positions=(lengths[:, None] + steps + np.arange(spec.width)).astype(np.int32), ancestor=None, slot=slot,
        key=moved(tail.key), value=moved(tail.value), window_key=moved(tail.window_key),
        window_value=moved(tail.window_value), compressed_key=entries[0], compressed_value=entries[1],
    )  # fmt: skip
    layer = layer._replace(**{name: getattr(done, name) for name in layer._fields if getattr(layer, name) is not None})
    lengths = (lengths + steps).astype(np.int32)
    arguments = query[:, order], gates[:, order], layer, page_table, lengths, fresh
    return jax.tree.map(jnp.asarray, arguments)


def path_of(spec, node):
    path = []
    while node >= 0:
        path, node = [node, *path], spec.parents[node]
    return path


# Interpreted, two of them: a program takes seconds to compile.
BITS = [
    *[pytest.param(spec, True, id=f"{spec.name}-interpret", marks=pytest.mark.slow) for spec in (TREE, BF16)],
    *[pytest.param(spec, False, id=f"{spec.name}-gpu", marks=pytest.mark.gpu) for spec in (CHAIN, TREE, PAGED, BF16)],
]


@pytest.mark.parametrize("spec, interpret", BITS)
def test_a_node_has_the_bits_of_decoding_its_path(spec, interpret, kernel_seed):
    arguments = spec.arguments(kernel_seed)
    function = out_of(spec.sparsity, interpret)
    out, selection = jax.tree.map(np.asarray, function(*arguments))
    for node in (1, 3, spec.width - 1):
        alone, own = jax.tree.map(np.asarray, function(*decoded(spec, arguments, path_of(spec, node))))
        np.testing.assert_array_equal(own.ids[:, 0], selection.ids[:, node], err_msg=f"node {node}")
        np.testing.assert_array_equal(alone[:, 0], out[:, node], err_msg=f"node {node}")


@pytest.mark.parametrize("interpret", PLACES)
def test_neighbours_in_the_batch_change_no_bit(interpret, kernel_seed):
    arguments = CHAIN.arguments(kernel_seed)
    function = out_of(CHAIN.sparsity, interpret)
    out = np.asarray(function(*arguments)[0])
    query, gates, layer, page_table, lengths, tail = arguments

    def reversed_batch(array):
        return None if array is None else array[::-1]

    rings = {name: reversed_batch(getattr(layer, name)) for name in ("window_key", "window_value")}
    other = (query[::-1], gates[::-1], layer._replace(**rings), page_table[::-1], lengths[::-1].at[1].set(-1),
             jax.tree.map(reversed_batch, tail))  # fmt: skip
    swapped = np.asarray(function(*other)[0])
    np.testing.assert_array_equal(swapped[0], out[1])
    assert not swapped[1].any(), "a finished sequence's output is 0"


def first(arguments, count):
    """The arguments with the first ``count`` nodes of the tail alone."""
    query, gates, *others, tail = arguments
    parts = {name: None if array is None else array[:, :count] for name, array in tail._asdict().items()
             if name in ("positions", "key", "value", "window_key", "window_value")}  # fmt: skip
    ancestor = None if tail.ancestor is None else tail.ancestor[:, :count, :count]
    tail = tail._replace(**parts, ancestor=ancestor, slot=jnp.minimum(tail.slot, count))
    return query[:, :count], gates[:, :count], *others, tail


@pytest.mark.slow
@pytest.mark.parametrize("interpret", PLACES)
@pytest.mark.parametrize("spec", [CHAIN, TREE], ids=lambda spec: spec.name)
def test_how_many_nodes_stand_beside_it_changes_no_bit(spec, interpret, kernel_seed):
    arguments, function = spec.arguments(kernel_seed), out_of(spec.sparsity, interpret)
    out, selection = jax.tree.map(np.asarray, function(*arguments))
    for count in (1, 3):
        few, own = jax.tree.map(np.asarray, function(*first(arguments, count)))
        assert few.shape[1] == own.ids.shape[1] == count
        np.testing.assert_array_equal(few, out[:, :count])
        np.testing.assert_array_equal(own.ids, selection.ids[:, :count])


def test_no_program_runs_for_what_pads_a_tail():
    def programs(arguments):
        function = functools.partial(attend, TREE.sparsity, deterministic=True, interpret=True)
        calls = [e for e in jax.make_jaxpr(function)(*arguments).eqns if e.primitive.name == "pallas_call"]
        return [int(np.prod(call.params["grid_mapping"].grid)) for call in calls]

    arguments = TREE.arguments()
    whole, few = programs(arguments), programs(first(arguments, 2))
    assert len(whole) == len(few) == 4
    assert [many * 2 for many in whole[:3]] == [some * TREE.width for some in few[:3]]
    assert few[3] <= whole[3]  # a program of the merge has several nodes


def test_more_slots_than_a_tree_has_are_refused():
    query, gates, layer, page_table, lengths, tail = CHAIN.arguments()
    tail = tail._replace(
        slot=jnp.full((len(lengths), 129), CHAIN.width, jnp.int32),
        compressed_key=jnp.zeros((len(lengths), 129, *tail.compressed_key.shape[2:])),
        compressed_value=jnp.zeros((len(lengths), 129, *tail.compressed_value.shape[2:])),
    )
    with pytest.raises(ValueError, match="tail.slot: got 129 slots of 8 nodes, expected at most 128"):
        attend(CHAIN.sparsity, query, gates, layer, page_table, lengths, tail, deterministic=True, interpret=True)


def test_a_config_of_ones_own_is_refused():
    from pallas_kernels.attention import AttentionConfig

    config = AttentionConfig.heuristic(CHAIN.sparsity, CHAIN.shape)
    with pytest.raises(ValueError, match="config: given with deterministic"):
        attend(CHAIN.sparsity, *CHAIN.arguments(), config=config, deterministic=True, interpret=True)
