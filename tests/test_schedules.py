"""Refresh/reuse schedules and shared-index groups against the reference, and the bug classes of reuse layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_params import random_params, random_tokens, tiny_model

from specsa_jax import Strategy, reference
from specsa_jax.cache import chain_slots, commit, create_cache, make_tail, pages_for, topology
from specsa_jax.decoding import Decoder, State
from specsa_jax.drafting import PromptLookup
from specsa_jax.model import head, verify
from specsa_jax.nsa.cached import Backend
from specsa_jax.sampling import SamplingParams, batch_sampling
from specsa_jax.schedule import Sharing, parse_schedule, uniform_schedule

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def as_jax(params):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def close(actual, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(actual), expected, atol=1e-5 * max(1.0, np.abs(expected).max()), rtol=0)


class Model:
    """A tiny model over a ragged batch; ``width`` tokens a pass, by one compiled program a schedule."""

    def __init__(self, layers=3, seed=3, backend=Backend(), **switches):
        self.config = tiny_model(layers=layers, **switches)
        self.exact = random_params(self.config, seed=seed)
        self.params, self.backend = as_jax(self.exact), backend
        self.programs = {}

    def cache(self, lengths, room=24):
        pages = [pages_for(self.config.nsa, length + room) for length in lengths]
        table = np.full((len(lengths), max(pages)), sum(pages))
        order = iter(np.random.default_rng(1).permutation(sum(pages)))
        for row, count in enumerate(pages):
            table[row, :count] = [next(order) for _ in range(count)]
        return create_cache(self.config, table, sum(pages), jnp.float32)

    def step(self, cache, tokens, parents, path, count, schedule="", keep=True):
        """Logits [B, T, V] of a tree, and the cache with the first ``count`` nodes of ``path`` committed."""
        key = (tuple(parents), schedule if isinstance(schedule, str) else None, keep)
        if key not in self.programs:

            def run(cache, tokens, path, count, schedule):
                nsa, size = self.config.nsa, len(parents)
                chain = list(parents) == list(range(-1, size - 1))
                tree = topology(parents, nsa.compress_block)
                tail = make_tail(nsa, tree, cache.lengths, chain_slots(nsa, size) if chain else None)
                backend = dataclasses.replace(self.backend, is_chain=chain)
                schedule = key[1] if schedule is None else schedule
                hidden, tails = verify(self.config, self.params, tokens, cache, tail, backend=backend,
                                       schedule=schedule, keep_compressed=keep)  # fmt: skip
                return head(self.config, self.params, hidden), commit(nsa, cache, tails, tail, path, count)

            self.programs[key] = jit(run)
        arrays = (jnp.asarray(x, jnp.int32) for x in (tokens, path, count))
        return self.programs[key](cache, *arrays, None if isinstance(schedule, str) else schedule)

    def prefill(self, cache, rows, width=16, **kind):
        """Commits ragged rows, ``width`` tokens at a time."""
        done, lengths = np.zeros(len(rows), int), np.array([len(row) for row in rows])
        while (done < lengths).any():
            count = np.minimum(width, lengths - done)
            tokens = np.zeros((len(rows), width), np.int32)
            for i, row in enumerate(rows):
                tokens[i, : count[i]] = row[done[i] : done[i] + count[i]]
            path = np.broadcast_to(np.arange(width), tokens.shape)
            _, cache = self.step(cache, tokens, range(-1, width - 1), path, count, **kind)
            done += count
        return cache


@functools.lru_cache
def usual():
    """One model whose programs several tests share."""
    return Model()


def committed(config, cache, layer, row):
    """The committed entries of a layer by name: what a later step can read of a sequence."""
    nsa, length = config.nsa, int(cache.lengths[row])
    pages, entries, found = np.asarray(cache.page_table[row]), cache.layers[layer], {}
    complete = max(0, (length - nsa.compress_block) // nsa.compress_stride + 1)
    for name, array in entries._asdict().items():
        if array is None:
            continue
        array = np.asarray(array)
        if name in ("key", "value"):
            at = np.arange(length)
            found[name] = array[pages[at // nsa.select_block], :, at % nsa.select_block]
        elif name.startswith("compressed"):
            at, per = np.arange(complete), nsa.blocks_per_page
            found[name] = array[pages[at // per], :, at % per]
        else:
            at = np.arange(max(0, length - array.shape[2]), length)
            found[name] = array[row, :, at % array.shape[2]]
    return found


# --- schedules as text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, layers, expected",
    [("all", 3, "FFF"), ("every:1", 2, "FF"), ("every:3", 7, "FSSFSSF"), ("every:9", 3, "FSS"), ("FSF", 3, "FSF")],
)
def test_schedules_are_read(text, layers, expected):
    assert parse_schedule(text, layers) == expected


@pytest.mark.parametrize(
    "text, words",
    [
        ("SFF", "schedule: got 'SFF', expected F first"),
        ("FSX", "schedule: got 'FSX', expected a letter a layer"),
        ("fss", "expected a letter a layer"),
        ("", "schedule: got '', expected a letter a layer"),
        ("every:0", "schedule: got 'every:0', expected a number of at least 1"),
        ("every:-1", "expected a number of at least 1"),
        ("every:x", "expected a number of at least 1"),
        ("every:²", "expected a number of at least 1"),
        ("each:2", "schedule: got 'each:2', expected a letter a layer"),
        ("F:2", "expected a letter a layer"),
        (3, "schedule: got 3, expected a text"),
    ],
)
def test_a_schedule_that_is_none_is_refused_at_once(text, words):
    with pytest.raises(ValueError, match=words):
        Strategy(schedule=text, precision="approx")


def test_a_schedule_of_another_length_is_refused():
    with pytest.raises(ValueError, match="schedule: got 'FS', 2 layers, expected the model's 3"):
        Decoder(tiny_model(layers=3), jnp.float32).check(Strategy(schedule="FS", precision="approx"))
    with pytest.raises(ValueError, match="only an engine with a checkpoint"):
        Decoder(tiny_model(layers=3), jnp.float32).check(Strategy(schedule="searched:2", precision="approx"))


@pytest.mark.parametrize("precision", ["exact", "strict"])
@pytest.mark.parametrize(
    "options, words",
    [
        ({"schedule": "FSS"}, "schedule: got 'FSS', which has reuse layers, in precision '{}'"),
        ({"schedule": "every:2"}, "schedule: got 'every:2', which has reuse layers"),
        ({"schedule": "searched:2"}, "schedule: got 'searched:2', which has reuse layers"),
        ({"group": 4, "group_mode": "shared"}, "group_mode: got 'shared' in precision '{}'"),
    ],
)
def test_approximations_are_refused_in_the_exact_classes(precision, options, words):
    with pytest.raises(ValueError, match=words.format(precision)):
        Strategy(precision=precision, **options)


def test_what_approximates_nothing_is_exact():
    for text in ("all", "every:1", "FFF"):
        assert not Strategy(schedule=text).sharing(3).approximates
        assert Strategy(schedule=text).sharing(3) == Sharing()
    assert Strategy(schedule="every:3", precision="approx").sharing(3).approximates


@pytest.mark.parametrize(
    "options, words",
    [
        ({"group": -1}, "group: got -1"),
        ({"group_mode": "loose"}, "group_mode: got 'loose', expected one of 'merged', 'shared'"),
        ({"group_mode": "shared"}, "group: got 0 in group_mode 'shared', expected at least 2"),
        ({"keep_compressed": "yes"}, "keep_compressed: got 'yes'"),
    ],
)
def test_contradictory_groups_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Strategy(precision="approx", **options)


def test_uniform_schedules_spread_their_refresh_layers():
    assert [uniform_schedule(6, k) for k in (1, 2, 3, 4, 6)] == ["FSSSSS", "FSSFSS", "FSFSFS", "FFSFFS", "FFFFFF"]
    for wrong in (0, 7):
        with pytest.raises(ValueError, match=f"refresh: got {wrong}, expected 1 to 6"):
            uniform_schedule(6, wrong)


# --- against the definition ------------------------------------------------------------------------------------------

SWITCHES = {
    "keep": ({}, "FSS", True),
    "drop": ({}, "FSF", False),
    "shared-kv": ({"separate_kv": False}, "FFS", True),
    "infllm": ({"separate_kv": False, "compressed_output": False, "fused_selected_window": True, "gate": "none",
                "compression": "mean", "compress_position": "none", "compressed_rope": "before", "dense_len": 20},
               "FSS", True),
}  # fmt: skip


@pytest.mark.parametrize("case", SWITCHES)
def test_reuse_layers_agree_with_the_reference(case):
    """A tree behind odd lengths in a ragged batch, then, of an accepted path, one token at a time."""
    switches, schedule, keep = SWITCHES[case]
    model = Model(**switches) if switches else usual()
    lengths = [1, 7, 31, 61]
    rows = [random_tokens(model.config, length, seed=length) for length in lengths]
    cache = model.prefill(model.cache(lengths), rows)
    parents, path, count = [-1, 0, 0, 1, 2, 4, 5, 5, 7], [0, 2, 4, 5, 7], [1, 5, 3, 4]
    tree = np.stack([random_tokens(model.config, len(parents), seed=row) for row in range(4)])
    paths = np.tile(path, (4, 1))
    logits, cache = model.step(cache, tree, parents, paths, count, schedule, keep)
    following = np.stack([random_tokens(model.config, 3, seed=9 + row) for row in range(4)])
    singles = []
    for at in range(3):
        out, cache = model.step(cache, following[:, at : at + 1], [-1], np.zeros((4, 1)), np.ones(4), schedule, keep)
        singles.append(out[:, 0])
    for row, prefix in enumerate(rows):
        args = (model.config, model.exact)
        close(logits[row], reference.verify_tree(*args, prefix, tree[row], parents, schedule, keep))
        # Indices after partial acceptance are the accepted path's own, never those of a rejected branch.
        _, known = reference.extend(*args, reference.empty_cache(*args), prefix)
        _, known = reference.extend(*args, known, tree[row, path[: count[row]]], schedule, keep)
        expected, _ = reference.extend(*args, known, following[row], schedule, keep)
        close([single[row] for single in singles], expected)


def test_a_schedule_known_to_the_running_program_alone_gives_the_same():
    model = usual()
    lengths = [29, 50]
    cache = model.prefill(model.cache(lengths), [random_tokens(model.config, n, seed=n) for n in lengths])
    tokens = np.stack([random_tokens(model.config, 5, seed=row) for row in range(2)])
    for schedule, keep in (("FSS", True), ("FFF", True), ("FSF", False)):
        reused = jnp.asarray([letter == "S" for letter in schedule])
        arguments = (cache, tokens, range(-1, 4), np.tile(np.arange(5), (2, 1)), [5, 5])
        close(model.step(*arguments, reused, keep)[0], model.step(*arguments, schedule, keep)[0])


def test_the_first_reuse_layer_caches_what_all_refresh_does():
    """K/V, rings and compressed entries to the bit, over many steps that accept a part and cross block ends."""
    model = usual()
    lengths, schedule = [41, 60], "FSS"
    rows = [random_tokens(model.config, length, seed=length) for length in lengths]
    caches = {kind: model.prefill(model.cache(lengths), rows) for kind in (schedule, "FFF")}
    random = np.random.default_rng(0)
    for _ in range(5):
        draft, count = random.integers(50, size=(2, 5)), random.integers(0, 6, size=2)
        for kind in caches:
            caches[kind] = model.step(caches[kind], draft, range(-1, 4), np.tile(np.arange(5), (2, 1)), count, kind)[1]
    for row in range(2):
        for layer in (0, 1):
            got, expected = (committed(model.config, caches[kind], layer, row) for kind in (schedule, "FFF"))
            assert len(got["compressed_key"]) > 3
            for name in expected:
                np.testing.assert_array_equal(got[name], expected[name], err_msg=f"layer {layer}: {name}")
        # The layer above read a residual stream that reuse has changed: its cache must differ, or nothing was tested.
        above = [committed(model.config, caches[kind], 2, row)["key"] for kind in (schedule, "FFF")]
        assert np.abs(above[0] - above[1]).max() > 1e-3


def test_a_reuse_layer_forgets_what_was_rolled_back_across_a_block_end():
    """Lengths taken back behind an end of a compression and a selection block, then other tokens: as if never there."""
    model = usual()
    nsa, schedule = model.config.nsa, "FSS"
    length = 2 * nsa.select_block - 1  # the next token ends a compression block and its page
    prefix = [random_tokens(model.config, length, seed=1)]
    fresh = model.prefill(model.cache([length]), prefix)
    wrong, right = (random_tokens(model.config, 4, seed=seed)[None] for seed in (2, 3))
    path = np.arange(4)[None]
    _, taken = model.step(fresh, wrong, range(-1, 3), path, [1], schedule)
    back = taken._replace(lengths=taken.lengths - 1)
    got, after = model.step(back, right, range(-1, 3), path, [4], schedule)
    expected, without = model.step(fresh, right, range(-1, 3), path, [4], schedule)
    np.testing.assert_array_equal(got, expected)
    for layer in range(3):
        entries, wanted = (committed(model.config, cache, layer, 0) for cache in (after, without))
        for name in wanted:
            np.testing.assert_array_equal(entries[name], wanted[name], err_msg=f"layer {layer}: {name}")


# --- groups that share an index --------------------------------------------------------------------------------------


def test_a_shared_group_attends_to_the_blocks_of_its_longest_prefix():
    """By definition: a query alone, given its group's representative's ids, as a reuse layer below would."""
    model = Model(layers=1, backend=Backend(group=3, group_mode="shared"), compressed_output=True)
    rows = [random_tokens(model.config, 45, seed=1)]
    cache = Model(layers=1).prefill(model.cache([45]), rows)
    parents = [-1, 0, 0, 1, 2, 2, 4]
    tokens = random_tokens(model.config, len(parents), seed=2)
    logits, _ = model.step(cache, tokens[None], parents, np.zeros((1, 1)), [0])
    params, config = model.exact, model.config
    _, committed_kv = reference.extend(config, params, reference.empty_cache(config, params), rows[0])

    def attended(node, reused=None):
        """Logits and ids of a node after its path."""
        path, up = [], node
        while up >= 0:
            path, up = [up, *path], parents[up]
        x = params["embed"]["embedding"][tokens[path]]
        layer = params["layers"][0]
        h = reference.rms_norm(x, layer["attn_norm"]["scale"], config.norm_eps)
        if reused is not None:  # only the last token counts; those before write K/V, which no id changes
            reused = np.concatenate([np.full((len(path) - 1, *reused.shape), -1), reused[None]])
        out, ids, *_ = reference.attention(config.nsa, config.rope, layer["attn"], h, *committed_kv[0], reused)
        x = x + out
        x = x + reference.mlp(layer["mlp"], reference.rms_norm(x, layer["mlp_norm"]["scale"], config.norm_eps))
        x = reference.rms_norm(x, params["norm"]["scale"], config.norm_eps)
        return (x @ params["embed"]["embedding"].T)[-1], ids[-1]

    # Depths 0 1 1 | 2 2 2 | 3: of several longest prefixes the last one represents.
    for node, representative in enumerate([2, 2, 2, 5, 5, 5, 6]):
        close(logits[0, node], attended(node, attended(representative)[1])[0])


# --- in the loop -----------------------------------------------------------------------------------------------------


def decode(model, decoder, prompt, new_tokens, strategy):
    config = model.config
    pages = pages_for(config.nsa, len(prompt) + new_tokens)
    buffer = np.zeros((1, pages * config.nsa.select_block + 1), np.int32)
    buffer[0, : len(prompt)] = prompt
    known = jnp.array([len(prompt)], jnp.int32)
    state = State(create_cache(config, np.arange(pages)[None], pages, jnp.float32), jnp.asarray(buffer), known,
                  known + new_tokens, jnp.zeros(1, bool), jnp.zeros(buffer.shape, jnp.float32))  # fmt: skip
    state = decoder.prefill(model.params, state, jnp.int32(100), chunk=16)
    state, counts = decoder.decode(model.params, state, batch_sampling([SamplingParams()]), jnp.int32(100),
                                   strategy=strategy)  # fmt: skip
    return np.asarray(state.tokens)[0, len(prompt) : len(prompt) + new_tokens].tolist(), counts


def test_decoding_by_a_schedule_is_the_same_loop_with_and_without_drafts():
    model = usual()
    prompt = np.tile(random_tokens(model.config, 11), 5)[:47]
    decoder = Decoder(model.config, jnp.float32)
    plain = Strategy(None, schedule="FSS", precision="approx")
    drafted = Strategy(PromptLookup(max_ngram=2, min_ngram=1), "chain:3", schedule="FSS", precision="approx")
    expected, _ = decode(model, decoder, prompt, 16, plain)
    got, counts = decode(model, decoder, prompt, 16, drafted)
    assert got == expected and int(counts.nodes) > 0
    _, cache = reference.extend(
        model.config, model.exact, reference.empty_cache(model.config, model.exact), prompt[:-1]
    )
    token, sequential = prompt[-1], []
    for _ in range(16):
        logits, cache = reference.extend(model.config, model.exact, cache, [token], "FSS")
        token = int(logits[0].argmax())
        sequential.append(token)
    assert got == sequential
    assert decoder.traces[plain] == decoder.traces[drafted] == 1


@pytest.mark.parametrize("keep, sharing", [(True, {}), (False, {"group": 2, "group_mode": "shared"})])
def test_reuse_layers_by_the_kernels_give_the_hidden_states_of_xla(keep, sharing):
    sizes = dict(num_heads=2, num_kv_heads=1, head_dim=16, compress_block=8, compress_stride=4, select_block=16,
                 num_selected=3, window=20, compression="mean", compress_position="none", layers=2)  # fmt: skip
    plain = Model(**sizes)
    random = np.random.default_rng(0)
    cache = jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), plain.cache([90], 0).layers)
    cache = plain.cache([90], 0)._replace(layers=cache, lengths=jnp.array([90], jnp.int32))
    tokens = random_tokens(plain.config, 4)[None]
    expected, got = (
        Model(**sizes, backend=backend).step(cache, tokens, [-1, 0, 0, 1], np.zeros((1, 1)), [0], "FS", keep)[0]
        for backend in (Backend(**sharing), Backend("pallas", interpret=True, **sharing))
    )
    close(got, expected)
