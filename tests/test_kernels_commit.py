"""The commit kernel against its NumPy reference, bit by bit: in interpret mode, on a GPU where there is one."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from reference_params import tiny_model

from pallas_kernels import UnsupportedError, report, tuned
from pallas_kernels.commit import CommitConfig, Entries, choose, commit, reference, specs
from specsa_jax import cache as caches

PLACES = [
    pytest.param(True, id="interpret"),
    pytest.param(False, id="gpu", marks=pytest.mark.gpu),
]
CHAIN = next(spec for spec in specs.TESTS if spec.name == "chain")


def run(spec, arguments, interpret, config=None):
    """The kernel's result, jitted, in place of the donated ``layer``."""
    function = jax.jit(
        lambda *a: commit(*a, compress_block=spec.block, config=config, interpret=interpret), donate_argnums=0
    )
    return function(*jax.tree.map(jnp.asarray, arguments))


def bits(array):
    array = np.asarray(array)
    return array.view(f"uint{8 * array.dtype.itemsize}")


def assert_same_bits(actual, expected):
    for name, array in actual._asdict().items():
        wanted = getattr(expected, name)
        assert (array is None) == (wanted is None), name
        if array is not None:
            assert array.dtype == wanted.dtype
            np.testing.assert_array_equal(bits(array), bits(wanted), err_msg=name)


@pytest.mark.parametrize("interpret", PLACES)
@pytest.mark.parametrize("spec", specs.TESTS, ids=lambda spec: spec.name)
def test_equals_reference(spec, interpret, kernel_seed):
    arguments = spec.arguments(kernel_seed)
    expected = reference.commit(*arguments, compress_block=spec.block)
    assert_same_bits(run(spec, arguments, interpret), expected)


@pytest.mark.parametrize("interpret", PLACES)
@pytest.mark.parametrize("config", [CommitConfig(1, 1), CommitConfig(4, 2)], ids=str)
def test_any_config_gives_the_same(config, interpret):
    spec = dataclasses.replace(CHAIN, heads=3)
    arguments = spec.arguments(seed=1)
    expected = reference.commit(*arguments, compress_block=spec.block)
    assert_same_bits(run(spec, arguments, interpret, config), expected)


@pytest.mark.gpu
def test_beyond_two_to_the_31_elements():
    """Pools of 2^31 + 2^22 elements each (two of 4 GiB, two of 1), written at their very end."""
    spec = specs.CommitSpec("", (60,), (8,), width=8, heads=8, dim=128, table=2, rings=(32, 64), block=32, stride=16,
                            page=64, dtype="bfloat16")  # fmt: skip
    layer, new, _, *others = spec.arguments()
    pages = 2**31 // layer.key[0].size + 64
    small = layer._replace(**{name: np.zeros_like(getattr(layer, name)) for name in layer._fields[:4]})
    expected = reference.commit(small, new, np.array([[0, 1]]), *others, compress_block=spec.block)
    big = [jnp.zeros((pages, *getattr(layer, name).shape[1:]), jnp.bfloat16) for name in layer._fields[:4]]
    table = np.array([[pages - 2, pages - 1]], np.int32)
    after = run(spec, (Entries(*big, *layer[4:]), new, table, *others), interpret=False)
    for name in layer._fields[:4]:
        pool, wanted = getattr(after, name), getattr(expected, name)[:2]
        assert int(jnp.count_nonzero(pool[:-2])) == 0, name
        np.testing.assert_array_equal(bits(pool[-2:]), bits(wanted), err_msg=name)


@st.composite
def calls(draw):
    """A spec of one of a few shapes, each compiled once, with any lengths, pages, trees and counts."""
    switches = draw(
        st.sampled_from(
            [
                dict(tree=True, rings=(2, 5)),
                dict(tree=True, steps=4, rings=(3, 0), dtype="bfloat16"),
                dict(rings=(4, 7), compressed_output=False),
            ]
        )
    )
    lengths = tuple(draw(st.lists(st.integers(0, 30), min_size=3, max_size=3)))
    owned = tuple(draw(st.lists(st.integers(0, 4), min_size=3, max_size=3)))
    spec = specs.CommitSpec("", lengths, (0, 0, 0), width=8, table=4, owned=owned, dim=4, block=4, stride=2, page=8,
                            **switches)  # fmt: skip
    arguments = list(spec.arguments(draw(st.integers(0, 2**16))))
    # Paths in a tree are followed by zeros, so that they ascend as far as they go.
    path = arguments[4]
    longest = 1 + (np.diff(path, axis=1) > 0).sum(axis=1)
    arguments[5] = np.array([draw(st.integers(0, int(size))) for size in longest], np.int32)
    return spec, arguments


@functools.lru_cache
def compiled(block, interpret):
    return jax.jit(lambda *arguments: commit(*arguments, compress_block=block, interpret=interpret))


@pytest.mark.parametrize("interpret", PLACES)
@hypothesis.given(call=calls())
def test_any_path_equals_reference(interpret, call):
    spec, arguments = call
    expected = reference.commit(*arguments, compress_block=spec.block)
    assert_same_bits(compiled(spec.block, interpret)(*arguments), expected)


def test_reference_by_hand():
    """l = 4, d = 2, l' = 4; 3 tokens known; the path 0, 2 of the tree 0 → 1, 0 → 2 goes to positions 3 and 4."""

    def numbered(first, *dims):
        return np.arange(first, first + np.prod(dims), dtype=np.float32).reshape(*dims, 1)

    layer = Entries(*(np.zeros((3, 1, size, 1), np.float32) for size in (4, 4, 2, 2)),
                    *(np.zeros((1, 1, size, 1), np.float32) for size in (3, 3)))  # fmt: skip
    new = Entries(numbered(10, 1, 3, 1), numbered(20, 1, 3, 1), numbered(30, 1, 1, 1), numbered(40, 1, 1, 1),
                  numbered(50, 1, 3, 1), numbered(60, 1, 3, 1))  # fmt: skip
    table, lengths, path = np.array([[2, 0]]), np.array([3]), np.array([[0, 2, 0]])
    after = reference.commit(layer, new, table, lengths, path, np.array([2]), np.array([[0]]), compress_block=4)
    assert after.key[..., 0].tolist() == [[[12, 0, 0, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 10]]]
    assert after.compressed_key[..., 0].tolist() == [[[0, 0]], [[0, 0]], [[30, 0]]]
    assert after.raw_value[..., 0].tolist() == [[[60, 62, 0]]]
    assert after.window_key is None


NAMES = ("layer", "new", "page_table", "lengths", "path", "count", "slot")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(layer=lambda x: x._replace(key=x.key[0])), r"layer.key: got shape \(2, 16, 16\), expected \[P,"),
        (dict(layer=lambda x: x._replace(raw_key=x.raw_key[:, :, :0])), r"layer.raw_key: got shape \(3, 2, 0, 16\)"),
        (dict(layer=lambda x: x._replace(value=x.value[:1])), r"layer.value: got float32 \(1, 2, 16, 16\), expected"),
        (dict(layer=lambda x: x._replace(window_key=None)), "window_key: given in one of layer and new"),
        (dict(layer=lambda x: x._replace(compressed_key=x.compressed_key[:, :, :3])), "compressed_key: got 3 e"),
        (dict(layer=lambda x: x._replace(compressed_value=x.compressed_value[:, :, :2])), "compressed_value: got"),
        (dict(new=lambda x: x._replace(key=x.key[0])), r"new.key: got shape \(6, 2, 16\), expected \[B, T, Hkv, D\]"),
        (dict(new=lambda x: x._replace(value=x.value.view(np.int32))), "new.value: got int32"),
        (dict(new=lambda x: x._replace(compressed_key=x.key)), r"new.compressed_key: got float32 \(3, 6, 2, 16\), exp"),
        (dict(page_table=lambda x: x[:1]), r"page_table: got int32 \(1, 4\), expected int32 \(3, 4\)"),
        (dict(lengths=lambda x: x.astype(np.int16)), r"lengths: got int16 \(3,\), expected int32 \(3,\)"),
        (dict(path=lambda x: x[0]), r"path: got shape \(6,\), expected \[B, A\]"),
        (dict(count=lambda x: x[:, None]), r"count: got int32 \(3, 1\), expected int32 \(3,\)"),
        (dict(slot=lambda x: x[:2]), r"slot: got int32 \(2, 2\), expected int32 \(3, 2\)"),
        (dict(layer=lambda x: x._replace(value=None)), "value: given in one of layer and new"),
        (dict.fromkeys(("layer", "new"), lambda x: x._replace(value=None)), "layer.value: got None, expected .P, Hkv"),
        (dict(layer=lambda x: x._replace(key=x.key[:0])), r"layer.key: got shape \(0, .*, expected .* with P of at le"),
        (dict(new=lambda x: x._replace(key=x.key[:, :0])), r"new.key: got shape \(3, 0, .*, expected .* with T of at"),
        (dict(page_table=lambda x: x[:, :0]), r"page_table: got shape \(3, 0\), expected .* with N of at least 1"),
        (dict(compress_block=lambda x: 0), "compress_block: got 0, expected at least 1"),
        (dict(compress_block=lambda x: 8.0), "compress_block: got 8.0, expected a whole number"),
    ],
)
def test_errors(change, message):
    arguments = dict(zip(NAMES, CHAIN.arguments(), strict=True), compress_block=8)
    for name, function in change.items():
        arguments[name] = function(arguments[name])
    with pytest.raises(ValueError, match=message):
        commit(**arguments, interpret=True)


def test_configs():
    with pytest.raises(ValueError, match="heads: got 3, expected a power of two"):
        CommitConfig(3, 1)
    with pytest.raises(ValueError, match="num_warps: got 64, expected a power of two of at least 1 and at most 32"):
        CommitConfig(2, 64)
    for spec in specs.BENCHMARKS:
        assert CommitConfig.heuristic(spec.shape) in CommitConfig.search_space(spec.shape)


def test_unsupported_sizes_say_which_and_why():
    with pytest.raises(UnsupportedError, match="commit: implementation 'pallas': slot: got 5000 slots"):
        choose(5000, 16, "pallas", interpret=True)
    with pytest.raises(UnsupportedError, match="layer.key: got head dim 2048, expected at most 1024"):
        commit(*dataclasses.replace(CHAIN, dim=2048).arguments(), compress_block=8, interpret=True)
    with pytest.raises(ValueError, match="commit: implementation: got 'cuda', expected None or one of"):
        choose(1, 16, "cuda")


def test_without_a_gpu_the_kernel_says_so():
    with jax.default_device(jax.devices("cpu")[0]):
        with pytest.raises(UnsupportedError, match="device: got cpu, expected a GPU"):
            commit(*CHAIN.arguments(), compress_block=8)
        assert choose(1, 16, None) == "xla"


@pytest.mark.parametrize("spec", [*specs.TESTS, *specs.BENCHMARKS], ids=lambda spec: spec.name)
def test_lowers_in_place(spec):
    lowered = report.lower(functools.partial(commit, compress_block=spec.block), *spec.abstract())
    [kernel] = report.kernels(lowered)
    shape = spec.shape
    config = tuned.lookup_commit("NVIDIA H200", shape) or CommitConfig.heuristic(shape)
    assert kernel.grid == (shape.steps, -(-shape.num_kv_heads // config.heads), shape.batch)
    assert (kernel.name, kernel.num_warps) == ("commit_kernel", config.num_warps)
    arrays = len(jax.tree.leaves(spec.abstract()[0]))
    assert lowered.as_text().count("output_operand_alias<") == arrays


def test_compiles_for_sm90():
    pytest.importorskip("triton")
    for spec in (specs.BENCHMARKS[0], dataclasses.replace(specs.BENCHMARKS[-1], tree=True, width=128, steps=16)):
        [kernel] = report.kernels(report.lower(functools.partial(commit, compress_block=spec.block), *spec.abstract()))
        resources = report.compile_sm90(kernel)
        assert resources.stack == 0, f"{spec.name} spills: {resources}"


# What cache.commit makes of it.


def cache_and_tail(switches, dtype, seed=0):
    """A cache of random contents, a random tree of 7 nodes behind each sequence, and a path to commit."""
    rng = np.random.default_rng(seed)
    config = tiny_model(layers=1, **switches)
    nsa, batch, width = config.nsa, 3, 7
    table = np.array([[7, 2, 9], [4, 0, 12], [11, 3, 5]])
    cache = caches.create_cache(config, table, 12, dtype, max_rollback=2)
    trees, paths = [], np.zeros((batch, width), np.int32)
    count = np.zeros(batch, np.int32)
    for row in range(batch):
        parents = [-1] + [int(rng.integers(max(0, node - 2), node)) for node in range(1, width)]
        path = [width - 1]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        trees.append(caches.topology(parents, nsa.compress_block))
        paths[row, : len(path)] = path
        count[row] = len(path) if row else 0
    tree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    lengths = jnp.array([20, 14, 6], jnp.int32)
    tail = caches.make_tail(nsa, tree, lengths)

    def filled(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape), dtype)

    layers = jax.tree.map(filled, cache.layers)
    token, slot = (np.zeros((batch, size, nsa.num_kv_heads, nsa.head_dim)) for size in (width, tail.slot.shape[1]))
    tails = [
        caches.LayerTail(
            **{
                name: None if leaf is None else filled(slot if name.startswith("compressed") else token)
                for name, leaf in layer._asdict().items()
            }
        )
        for layer in layers
    ]
    cache = cache._replace(layers=layers, lengths=lengths)
    return nsa, (cache, tails, tail, jnp.asarray(paths), jnp.asarray(count))


@pytest.mark.parametrize("interpret", PLACES)
@pytest.mark.parametrize(
    "switches, dtype",
    [
        ({}, "float32"),
        ({}, "bfloat16"),
        ({"separate_kv": False}, "float32"),
        ({"compressed_output": False}, "bfloat16"),
    ],
    ids=str,
)
def test_a_cache_gets_the_same_bits_from_kernel_and_scatters(switches, dtype, interpret):
    nsa, arguments = cache_and_tail(switches, dtype)
    kernel = jax.jit(lambda *a: caches.commit(nsa, *a, implementation="pallas", interpret=interpret))(*arguments)
    scatters = jax.jit(lambda *a: caches.commit(nsa, *a, implementation="xla"))(*arguments)
    np.testing.assert_array_equal(kernel.lengths, scatters.lengths)
    [before], [actual], [expected] = arguments[0].layers, kernel.layers, scatters.layers
    assert_same_bits(actual, expected)
    assert not np.array_equal(before.compressed_key, actual.compressed_key)


def decode_loop(nsa, implementation=None):
    """Commits the tail ten times, in a loop that carries the cache."""

    def loop(cache, tails, tail, path, count):
        def body(_, cache):
            return caches.commit(nsa, cache, tails, tail, path, count, implementation=implementation)

        return jax.lax.fori_loop(0, 10, body, cache)

    return loop


def test_on_gpus_a_cache_is_committed_by_one_aliased_kernel_a_layer():
    nsa, arguments = cache_and_tail({}, jnp.float32)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    # Not by name: on a GPU "pallas" is what None stands for.
    lowered = report.lower(decode_loop(nsa), *shapes)
    assert [kernel.name for kernel in report.kernels(lowered)] == ["commit_kernel"]
    assert lowered.as_text().count("output_operand_alias<") == len(jax.tree.leaves(arguments[0].layers))
    assert report.kernels(report.lower(decode_loop(nsa, "xla"), *shapes)) == []


@pytest.mark.parametrize("implementation", [pytest.param("pallas", marks=pytest.mark.gpu), "xla"])
def test_a_donated_cache_is_committed_in_place(implementation):
    """By the compiled program's own account: no temporary comes near the cache's size."""
    config = tiny_model(layers=1)
    nsa, (cache, *others) = cache_and_tail({}, jnp.float32)
    pages = 2**14
    big = jax.eval_shape(lambda: caches.create_cache(config, np.zeros((0, 3), int), pages, jnp.float32))
    # The pool's pages grow; rings belong to the three sequences.
    layers = [small._replace(**{name: getattr(large, name) for name in small._fields[:4]})
              for small, large in zip(cache.layers, big.layers, strict=True)]  # fmt: skip
    cache = cache._replace(layers=layers)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (cache, *others))
    compiled = jax.jit(decode_loop(nsa, implementation), donate_argnums=0).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
    assert held > 16 * 2**20
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 16, f"{memory.temp_size_in_bytes} of {held} bytes"
