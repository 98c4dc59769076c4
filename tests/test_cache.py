"""The cache: any history leaves what sequential decoding leaves; pages, rings, capacity, and updates in place."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from reference_params import random_params, random_tokens, tiny_model

from specsa_jax import model as transformer
from specsa_jax import reference
from specsa_jax.cache import (
    CapacityError,
    LayerTail,
    Topology,
    cache_bytes,
    chain,
    chain_slots,
    check_rollback,
    commit,
    create_cache,
    make_tail,
    pages_for,
    ring_positions,
    rollback,
    topology,
)
from specsa_jax.config import ModelConfig, NSAConfig
from specsa_jax.decoding import Decoder, State
from specsa_jax.drafting import DraftModel
from specsa_jax.sampling import SamplingParams, batch_sampling
from specsa_jax.strategy import AUTOREGRESSIVE, Strategy

ROWS, CAPACITY, CHUNK, NODES, ROLLBACK = 3, 40, 6, 7, 5
SPARE = 4
POISON = 12345.0  # finite, since masked reads of unowned pages are allowed; far outside what a model computes
CONFIGS = {
    "separate": tiny_model(layers=1),
    "shared": tiny_model(layers=1, separate_kv=False, compressed_output=False, fused_selected_window=True),
}


@functools.lru_cache
def numpy_params(name):
    return random_params(CONFIGS[name], seed=3)


def page_table():
    """Pages in random order; those that nobody owns lie between them."""
    columns = CAPACITY // CONFIGS["separate"].nsa.select_block
    pool = ROWS * columns + SPARE
    return np.random.default_rng(1).permutation(pool)[: ROWS * columns].reshape(ROWS, columns), pool


def poisoned(cache, unowned):
    """The cache with every entry of the unowned pages overwritten."""

    def poison(name, leaf):
        paged = leaf is not None and not name.startswith(("raw", "window"))
        return leaf.at[unowned].set(POISON) if paged else leaf

    return cache._replace(
        layers=[layer._replace(**{n: poison(n, leaf) for n, leaf in layer._asdict().items()}) for layer in cache.layers]
    )


def unowned_pages(table, pool):
    return np.setdiff1d(np.arange(pool), table)


def empty(name):
    table, pool = page_table()
    cache = create_cache(CONFIGS[name], table, pool, jnp.float32, max_rollback=ROLLBACK)
    return poisoned(cache, unowned_pages(table, pool))


@functools.lru_cache
def steps(name):
    """Compiled: append a chain, commit a path of a tree, the logits of one more token, sequential decoding."""
    config = CONFIGS[name]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), numpy_params(name))

    def forward(cache, tokens, tree, slots=None):
        tail = make_tail(config.nsa, tree, cache.lengths, slots)
        hidden, tails = transformer.verify(config, params, tokens, cache, tail)
        return transformer.head(config, params, hidden), tails, tail

    def extend(cache, tokens, count):
        width = tokens.shape[1]
        tree = chain(width, config.nsa.compress_block)
        logits, tails, tail = forward(cache, tokens, tree, chain_slots(config.nsa, width))
        path = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
        return logits, commit(config.nsa, cache, tails, tail, path, count)

    def tree_step(cache, tokens, tree, path, count):
        _, tails, tail = forward(cache, tokens, tree)
        return commit(config.nsa, cache, tails, tail, path, count)

    def sequential(cache, tokens, lengths):
        def step(cache, at):
            token = jax.lax.dynamic_slice_in_dim(tokens, at, 1, axis=1)
            return extend(cache, token, (at < lengths).astype(jnp.int32))[1], None

        return jax.lax.scan(step, cache, jnp.arange(CAPACITY, dtype=jnp.int32))[0]

    return jax.jit(extend), jax.jit(tree_step), jax.jit(sequential)


def readable(config, cache):
    """Everything that a later query of each row may read, by name: K/V, complete compressed entries, ring entries."""
    nsa, lengths, table = config.nsa, np.asarray(cache.lengths), np.asarray(cache.page_table)
    complete = np.maximum(0, (lengths - nsa.compress_block) // nsa.compress_stride + 1)
    entries = {"key": lengths, "value": lengths, "compressed_key": complete, "compressed_value": complete}
    reach = {"raw": nsa.compress_block - 1, "window": nsa.window_tokens - 1}
    found = {}
    for index, layer in enumerate(cache.layers):
        for name, leaf in layer._asdict().items():
            if leaf is None:
                continue
            leaf = np.asarray(leaf)
            for row, length in enumerate(lengths):
                if name in entries:
                    pages = np.concatenate(list(leaf[table[row][table[row] < len(leaf)]]), axis=1)  # [Hkv, entries, D]
                    taken = pages[:, : entries[name][row]]
                else:
                    at = np.arange(max(0, length - reach[name.split("_")[0]]), length)
                    taken = leaf[row][:, at % leaf.shape[2]]
                found[index, name, row] = taken
    return found


def assert_same_contents(config, cache, expected):
    np.testing.assert_array_equal(cache.lengths, expected.lengths)
    actual = readable(config, cache)
    for where, content in readable(config, expected).items():
        np.testing.assert_allclose(actual[where], content, atol=2e-5, err_msg=str(where))


def random_tree(random):
    """Parents of NODES nodes, from bushy to a chain."""
    reach = int(random.integers(1, NODES))
    return [-1] + [int(random.integers(max(0, node - reach), node)) for node in range(1, NODES)]


def batch_topology(config, trees):
    each = [topology(parents, config.nsa.compress_block) for parents in trees]
    return Topology(*(jnp.stack(leaves) for leaves in zip(*each, strict=True)))


def padded(rows, width=None):
    width = width or max(map(len, rows))
    tokens = np.zeros((len(rows), width), np.int32)
    for row, values in enumerate(rows):
        tokens[row, : len(values)] = values
    return tokens


class History:
    """A cache, and the tokens that each row must hold by now."""

    def __init__(self, name):
        self.name, self.config, self.cache = name, CONFIGS[name], empty(name)
        self.extend, self.tree_step, self.sequential = steps(name)
        self.rows = [[] for _ in range(ROWS)]
        self.longest = np.zeros(ROWS, int)

    def _keep(self, kept):
        self.rows = [row + list(new) for row, new in zip(self.rows, kept, strict=True)]
        self.longest = np.maximum(self.longest, [len(row) for row in self.rows])

    def _bounded(self, counts):
        return np.array([min(count, CAPACITY - len(row)) for count, row in zip(counts, self.rows, strict=True)])

    def append(self, counts, seed):
        counts = self._bounded(counts)
        tokens = random_tokens(self.config, ROWS * CHUNK, seed).reshape(ROWS, CHUNK)
        self.cache = self.extend(self.cache, tokens, jnp.asarray(counts, jnp.int32))[1]
        self._keep([row[:count] for row, count in zip(tokens, counts, strict=True)])

    def accept(self, counts, seed):
        """A random tree per row, of which a path from the root to some node is committed, cut to ``counts``."""
        random = np.random.default_rng(seed)
        tokens = random_tokens(self.config, ROWS * NODES, seed).reshape(ROWS, NODES)
        trees = [random_tree(random) for _ in range(ROWS)]
        paths = []
        for parents in trees:
            path = [int(random.integers(NODES))]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            paths.append(path)
        counts = self._bounded(np.minimum(counts, [len(path) for path in paths]))
        self.cache = self.tree_step(
            self.cache, tokens, batch_topology(self.config, trees), padded(paths, NODES), jnp.asarray(counts, jnp.int32)
        )
        self._keep([tokens[row][paths[row][:count]] for row, count in enumerate(counts)])

    def roll_back(self, counts):
        """As far as ``counts``, or as the rings allow: they hold what the longest length so far left in them."""
        lengths = [len(row) for row in self.rows]
        lengths = np.maximum(np.subtract(lengths, counts), np.maximum(self.longest - ROLLBACK, 0))
        check_rollback(self.config.nsa, self.cache, lengths)
        self.cache = rollback(self.cache, jnp.asarray(lengths))
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]

    def check(self):
        lengths = np.array([len(row) for row in self.rows], np.int32)
        want = self.sequential(empty(self.name), padded(self.rows, CAPACITY), lengths)
        assert_same_contents(self.config, self.cache, want)
        # The next tokens' logits: one compiled width, of which the first place counts.
        following = np.arange(ROWS) + 1
        tokens = np.tile(following[:, None], (1, CHUNK)).astype(np.int32)
        logits = self.extend(self.cache, tokens, jnp.zeros(ROWS, jnp.int32))[0]
        for row in range(ROWS):
            expected = reference.forward(self.config, numpy_params(self.name), [*self.rows[row], following[row]])[-1]
            np.testing.assert_allclose(logits[row, 0], expected, atol=1e-5 * max(1, np.abs(expected).max()))
        table, pool = page_table()
        for layer in self.cache.layers:
            for name in ("key", "value", "compressed_key", "compressed_value"):
                leaf = getattr(layer, name)
                if leaf is not None:
                    assert (np.asarray(leaf)[unowned_pages(table, pool)] == POISON).all(), name


COUNTS = st.lists(st.integers(0, CHUNK), min_size=ROWS, max_size=ROWS)
SEEDS = st.integers(0, 2**16)
OPERATIONS = st.one_of(
    st.tuples(st.just("append"), COUNTS, SEEDS),
    st.tuples(st.just("accept"), COUNTS, SEEDS),
    st.tuples(st.just("roll_back"), st.lists(st.integers(0, ROLLBACK), min_size=ROWS, max_size=ROWS)),
)


@pytest.mark.parametrize("name", CONFIGS)
@hypothesis.given(operations=st.lists(OPERATIONS, min_size=1, max_size=10))
@hypothesis.settings(max_examples=25)
def test_any_history_leaves_the_cache_of_sequential_decoding(name, operations):
    """Appended chunks, accepted paths of trees and rollbacks, ragged, then everything that can still be read."""
    history = History(name)
    for kind, *arguments in operations:
        getattr(history, kind)(*arguments)
    history.check()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_long_history_leaves_the_cache_of_sequential_decoding(name):
    """Rings wrap several times, rows reach the capacity at different times, and rollbacks repeat."""
    history, random = History(name), np.random.default_rng(5)
    for turn in range(30):
        history.append(random.integers(0, 4, ROWS), seed=turn)
        history.accept(random.integers(0, 4, ROWS), seed=turn)
        history.roll_back(random.integers(0, 3, ROWS))
    assert min(map(len, history.rows)) > 20  # the rings have wrapped
    history.check()


@pytest.mark.parametrize("name", CONFIGS)
def test_no_compressed_block_is_stale_after_rollback_across_its_end(name):
    """Every offset of a block's end, taken back by one to max_rollback tokens and decoded on with other tokens."""
    for length in range(10, 14):
        for back in (1, ROLLBACK):
            history = History(name)
            history.append([CHUNK] * ROWS, seed=1)
            history.append([length - CHUNK] * ROWS if length <= 2 * CHUNK else [CHUNK] * ROWS, seed=2)
            history.append([max(0, length - 2 * CHUNK)] * ROWS, seed=3)
            history.roll_back([back] * ROWS)
            history.append([back + 1, back, 1], seed=4)
            history.check()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_finished_sequence_is_left_untouched_to_the_bit(name):
    """A row with count 0, beside rows that go on, in a chain and in a tree."""
    history = History(name)
    for seed in range(3):
        history.append([CHUNK, 5, CHUNK], seed)
    before, table = history.cache, np.asarray(history.cache.page_table)
    history.append([0, CHUNK, 3], seed=8)
    history.accept([0, 3, 1], seed=9)
    assert len(history.rows[1]) > 15
    assert int(history.cache.lengths[0]) == int(before.lengths[0])
    for old, new in zip(before.layers, history.cache.layers, strict=True):
        for field, leaf in old._asdict().items():
            if leaf is not None:
                at = 0 if field.startswith(("raw", "window")) else table[0]
                np.testing.assert_array_equal(np.asarray(leaf)[at], np.asarray(getattr(new, field))[at], field)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_draft_may_run_past_the_capacity(name):
    """Its logits are right; what a commit would put beyond a row's pages is dropped and hurts nobody."""
    config = CONFIGS[name]
    page = config.nsa.select_block
    # Row 0 ends where the table does, row 1 where its own pages do, row 2 has room.
    pool = 12
    table = np.array([[7, 2, 9], [4, 0, pool], [11, 3, 5]])
    cache = poisoned(create_cache(config, table, pool, jnp.float32, ROLLBACK), unowned_pages(table, pool))
    extend, _, _ = steps(name)
    rows = [random_tokens(config, length, seed=length) for length in (3 * page - 2, 2 * page - 1, 2 * page)]
    done = np.zeros(ROWS, int)
    while (done < [len(row) for row in rows]).any():
        count = np.minimum(CHUNK, [len(row) for row in rows] - done)
        chunk = padded([row[at : at + n] for row, at, n in zip(rows, done, count, strict=True)], CHUNK)
        _, cache = extend(cache, chunk, jnp.asarray(count, jnp.int32))
        done += count
    draft = random_tokens(config, ROWS * CHUNK, seed=7).reshape(ROWS, CHUNK)
    logits, after = extend(cache, draft, jnp.full(ROWS, CHUNK, jnp.int32))
    for row in range(ROWS):
        expected = reference.forward(config, numpy_params(name), [*rows[row], *draft[row]])[-CHUNK:]
        np.testing.assert_allclose(logits[row], expected, atol=1e-5 * max(1, np.abs(expected).max()))
    # What lies within the pages is as if the rows had been committed apart; unowned pages are as they were.
    capacity = np.array([3 * page, 2 * page, 3 * page])
    fits = np.minimum(capacity - done, CHUNK)
    _, bounded = extend(cache, draft, jnp.asarray(fits, jnp.int32))
    for layer in after.layers:
        for field, leaf in layer._asdict().items():
            if leaf is not None and not field.startswith(("raw", "window")):
                assert (np.asarray(leaf)[unowned_pages(table, pool)] == POISON).all()
    actual = readable(config, rollback(after, bounded.lengths))
    for where, content in readable(config, bounded).items():
        np.testing.assert_array_equal(actual[where], content, err_msg=str(where))


def test_trees_that_are_no_trees_are_refused():
    for parents in ([], [0], [0, -1], [-1, 1], [-1, 0, 3, 0], [-1, -1]):
        with pytest.raises(ValueError, match="^parents: "):
            topology(parents, 4)


@pytest.mark.parametrize(
    "table, message",
    [
        ([[0, 1], [1, 2]], "a page is listed twice"),
        ([[0, 0], [1, 2]], "a page is listed twice"),
        ([[0, 1], [2, 7]], "got pages 0 to 7, expected 0 to 5"),
        ([[0, -1], [2, 3]], "got pages -1 to 3, expected 0 to 5"),
    ],
)
def test_page_tables_that_share_or_invent_pages_are_refused(table, message):
    with pytest.raises(CapacityError, match=message):
        create_cache(CONFIGS["separate"], np.array(table), 6, jnp.float32)
    # The pool's size marks "no page", as often as needed.
    create_cache(CONFIGS["separate"], np.array([[0, 6], [6, 6]]), 6, jnp.float32)


def test_rollbacks_beyond_the_rings_or_the_lengths_are_refused_with_the_numbers():
    nsa = CONFIGS["separate"].nsa
    cache = empty("separate")._replace(lengths=jnp.array([20, 3, 9], jnp.int32))
    check_rollback(nsa, cache, np.array([15, 0, 9]))
    with pytest.raises(CapacityError, match=r"got \[14, 3, 9\] from \[20, 3, 9\], expected at most 5 back"):
        check_rollback(nsa, cache, np.array([14, 3, 9]))
    for wrong in ([20, 4, 9], [20, -1, 9]):
        with pytest.raises(CapacityError, match=r"expected values from 0 to \[20, 3, 9\]"):
            check_rollback(nsa, cache, np.array(wrong))
    with pytest.raises(CapacityError, match=r"got \[1, 2\], expected"):
        check_rollback(nsa, cache, np.array([1, 2]))
    assert rollback(cache, jnp.array([25, 1, 9])).lengths.tolist() == [20, 1, 9]  # never forward


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("max_rollback", [1, 9])
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"separate_kv": False},
        {"compressed_output": False},
        {"fused_selected_window": True},
        {"window": 1},
        {"separate_kv": False, "compressed_output": False, "fused_selected_window": True},
    ],
    ids=str,
)
def test_cache_bytes_are_those_of_the_arrays(switches, max_rollback, dtype):
    config = tiny_model(layers=2, **switches)
    cache = create_cache(config, np.arange(12).reshape(4, 3), 13, dtype, max_rollback)
    sizes = cache_bytes(config, pages=13, batch=4, dtype=dtype, max_rollback=max_rollback)

    def held(*names):
        leaves = [getattr(layer, name) for layer in cache.layers for name in names]
        return sum(leaf.nbytes for leaf in leaves if leaf is not None)

    assert sizes.selected == held("key", "value")
    assert sizes.compressed == held("compressed_key", "compressed_value")
    assert sizes.window == held("window_key", "window_value")
    assert sizes.raw == held("raw_key", "raw_value")
    assert sizes.total == sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))


def test_pages_for_rounds_up():
    nsa = CONFIGS["separate"].nsa
    assert [pages_for(nsa, tokens) for tokens in (0, 1, 8, 9, 16, 17)] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("length", [2**15 - 4, 2**16 - 3])
def test_positions_beyond_16_bits_are_written_where_they_belong(length):
    """A chain across 2^15 and 2^16, committed as numbers that say their position."""
    config = ModelConfig(
        vocab_size=5, hidden=4, layers=1, intermediate=4, max_length=80_000,
        nsa=NSAConfig(num_heads=1, num_kv_heads=1, head_dim=2, compress_block=4, compress_stride=2, select_block=8,
                      num_selected=3, window=6),
    )  # fmt: skip
    nsa, width, columns = config.nsa, 9, 9000
    cache = create_cache(config, np.random.default_rng(0).permutation(columns)[None], columns, jnp.float32)
    cache = cache._replace(lengths=jnp.array([length], jnp.int32))
    tree = chain(width, nsa.compress_block)
    tail = jax.jit(make_tail, static_argnums=(0, 3))(nsa, tree, cache.lengths, chain_slots(nsa, width))
    at = np.arange(length, length + width)
    np.testing.assert_array_equal(tail.positions, at[None])
    ends = [place for place, position in enumerate(at) if (position + 1) % nsa.compress_stride == 0]
    assert [slot for slot in tail.slot[0].tolist() if slot < width] == ends

    def numbered(values, size):
        """[1, size, 1, 2] with the given numbers (each below 2^24, so exact)."""
        row = np.zeros(size, np.float32)
        row[: len(values)] = values
        return jnp.asarray(np.repeat(row[None, :, None, None], 2, axis=-1))

    entries = (at[ends] + 1 - nsa.compress_block) // nsa.compress_stride
    tokens, blocks = numbered(at, width), numbered(entries, tail.slot.shape[1])
    layer_tail = LayerTail(tokens, tokens, tokens, tokens, tokens, tokens, blocks, blocks)
    path = jnp.arange(width, dtype=jnp.int32)[None]
    after = jax.jit(commit, static_argnums=0)(nsa, cache, [layer_tail], tail, path, jnp.array([width], jnp.int32))
    order, layer = np.asarray(cache.page_table)[0], after.layers[0]
    expected = np.zeros(columns * nsa.select_block)
    expected[at] = at
    np.testing.assert_array_equal(np.asarray(layer.key)[order, 0, :, 0].ravel(), expected)
    expected = np.zeros(columns * nsa.blocks_per_page)
    expected[entries] = entries
    np.testing.assert_array_equal(np.asarray(layer.compressed_key)[order, 0, :, 0].ravel(), expected)
    for ring in (layer.raw_key, layer.window_key):
        held = ring_positions(after.lengths, ring.shape[2])
        np.testing.assert_array_equal(np.sort(held[0]), at[-ring.shape[2] :])
        np.testing.assert_array_equal(ring[0, 0, :, 0], held[0])


def large_config():
    nsa = NSAConfig(num_heads=4, num_kv_heads=2, head_dim=64, num_selected=4, window=64, compression="weighted")
    return ModelConfig(vocab_size=11, hidden=16, layers=2, intermediate=16, max_length=2**16, nsa=nsa)


@functools.lru_cache
def decoder_of_a_large_cache():
    """A decoder at realistic ratios of block sizes, and the shapes of a state whose cache dwarfs everything else.

    Two layers: what the last one reads in prefill is of no use and compiled away, and a copy of it with it.
    """
    config = large_config()
    batch, columns = 2, 1024
    params = jax.eval_shape(lambda: transformer.init_params(config, 0))
    # Shapes alone: nothing of this size is ever allocated.
    table = np.arange(batch * columns).reshape(batch, columns)
    cache = jax.eval_shape(lambda: create_cache(config, table, batch * columns, jnp.float32))
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((batch, columns * config.nsa.select_block + 1), jnp.int32)
    state = State(cache, tokens, row, row, jax.ShapeDtypeStruct((batch,), bool),
                  jax.ShapeDtypeStruct(tokens.shape, jnp.float32))  # fmt: skip
    return Decoder(config, jnp.float32), params, state, batch


OWN_CACHE = Strategy(DraftModel("large", config=large_config()), "2-1")


@pytest.mark.parametrize(
    "static", [AUTOREGRESSIVE, Strategy(tree="chain:3"), OWN_CACHE, 32], ids=["one", "chain", "draft model", "prefill"]
)
def test_the_cache_is_donated_and_updated_in_place(static):
    """By the compiled program's own account: the cache's bytes are aliased, and no temporary comes near them."""
    decoder, params, state, batch = decoder_of_a_large_cache()
    limit = jax.ShapeDtypeStruct((), jnp.int32)
    if isinstance(static, Strategy):
        sampling = jax.eval_shape(lambda: batch_sampling([SamplingParams(temperature=0.7, seed=1)] * batch))
        if static == OWN_CACHE:  # a model of the target's size drafts from a cache of its own
            draft = jax.eval_shape(lambda: static.drafter.init(decoder.config, batch, 2**16, jnp.float32))
            state = state._replace(draft=draft)
        lowered = decoder.decode.lower(params, state, sampling, limit, strategy=static, draft_params=params)
    else:
        lowered = decoder.prefill.lower(params, state, limit, chunk=static)
    memory = lowered.compile().memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.cache, state.draft)))
    assert held > 16 * 2**20
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 4, f"{memory.temp_size_in_bytes} of {held} bytes"
