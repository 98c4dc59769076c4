"""The model against the plain reference: whole sequences, prefill and decode over the cache, chains and trees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_params import random_params, random_tokens, tiny_model

from specsa_jax import reference
from specsa_jax.cache import chain_slots, commit, create_cache, grown_topology, make_tail, pages_for, topology
from specsa_jax.config import ModelConfig, RopeConfig, preset
from specsa_jax.model import head, hidden_states, init_params, verify

# Many small programs, each run a few times: unoptimised code makes these tests almost twice as fast.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})

# Each switch of NSAConfig away from its default, and combinations that public models use.
# Of those that touch different parts some are tried together: compiling is what takes time.
SWITCHES = {
    "paper": {},
    "shared-kv, window-w-plus-1, scale": {"separate_kv": False, "window_excludes_query": True, "scale": 0.5},
    "gate-shared-bias, window-of-1": {"gate": "shared", "gate_bias": True, "window": 1},
    "no-gate, mqa": {"gate": "none", "num_kv_heads": 1},
    "gate-bias, rope-before": {"gate_bias": True, "compressed_rope": "before"},
    "rope-none, qk-norm": {"compressed_rope": "none", "separate_kv": False, "qk_norm": True},
    "mean, forced-0-1": {"compression": "mean", "compress_position": "none", "num_initial": 0, "num_local": 1},
    "mean-position-keys, mha": {"compression": "mean", "compress_position": "keys", "num_kv_heads": 4},
    "linear, dense-len": {"compression": "linear", "dense_len": 37},
    "mlp, fused-window": {"compression": "mlp", "compress_position": "keys", "fused_selected_window": True},
    "paper-score-map, forced-2-2": {"score_map": "paper", "num_initial": 2, "num_local": 2, "num_selected": 5},
    "selection-only": {"compressed_output": False},
    "fused-window-separate": {"fused_selected_window": True, "separate_kv": True},
    "infllm": {"separate_kv": False, "compressed_output": False, "fused_selected_window": True, "gate": "none",
               "compression": "mean", "compress_position": "none", "compressed_rope": "before", "dense_len": 20},
    "identity-map": {"compress_block": 8, "compress_stride": 8, "select_block": 8},
    "minicpm4": {"separate_kv": False, "compressed_output": False, "fused_selected_window": True, "gate": "none",
                 "compression": "mean", "compress_position": "none", "compressed_rope": "before", "dense_len": 20,
                 "score_map": "max", "num_local": 2, "window": 8, "embed_scale": 3.0, "residual_scale": 0.6,
                 "logit_scale": 0.5},
    "query-mlp-gate": {"gate": "query_mlp", "gate_hidden": 6, "mlp": "silu"},
}  # fmt: skip
ROPES = {
    "linear": RopeConfig(kind="linear", factor=4.0),
    "llama3": RopeConfig(theta=1000.0, kind="llama3", factor=8.0, original_length=64),
    "yarn": RopeConfig(theta=1000.0, kind="yarn", factor=4.0, original_length=64),
    "longrope": RopeConfig(theta=1000.0, kind="longrope", factor=4.0, original_length=64, factors=(1.0, 1.5, 3.0, 6.0)),
    "query-span": RopeConfig(theta=1000.0, query_span="all_heads"),
}


def close(actual, expected):
    """Within 1e-5 of the expected values' scale."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(actual), expected, atol=1e-5 * max(1.0, np.abs(expected).max()), rtol=0)


def as_jax(params):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def shuffled_cache(config: ModelConfig, lengths, spare=3):
    """A cache whose pages lie in random order in the pool, some of them owned by nobody."""
    pages = [pages_for(config.nsa, length) for length in lengths]
    pool = sum(pages) + spare
    order = np.random.default_rng(1).permutation(pool)
    table = np.full((len(lengths), max(pages)), pool)
    for row, count in enumerate(pages):
        table[row, :count], order = order[:count], order[count:]
    return create_cache(config, table, pool, jnp.float32)


def run_tree(config, params, cache, tokens, parents, slots=None):
    """Logits [B, T, V] of the tree's nodes, and the pieces of a commit."""
    tail = make_tail(config.nsa, topology(parents, config.nsa.compress_block), cache.lengths, slots)
    hidden, tails = verify(config, params, jnp.asarray(tokens, jnp.int32), cache, tail)
    return head(config, params, hidden), tails, tail


def feed(config, params, cache, rows, sizes):
    """Runs ragged rows of tokens through the cache in chunks of ``sizes``: logits per row."""
    lengths = np.array([len(row) for row in rows])

    @jit
    def step(cache, tokens, count):
        width = tokens.shape[1]
        parents = [node - 1 for node in range(width)]
        logits, tails, tail = run_tree(config, params, cache, tokens, parents, chain_slots(config.nsa, width))
        path = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
        return logits, commit(config.nsa, cache, tails, tail, path, count)

    outs, done = [[] for _ in rows], np.zeros(len(rows), int)
    for size in sizes:
        count = np.minimum(size, lengths - done)
        tokens = np.zeros((len(rows), size), np.int32)
        for row in range(len(rows)):
            tokens[row, : count[row]] = rows[row][done[row] : done[row] + count[row]]
        logits, cache = step(cache, jnp.asarray(tokens), jnp.asarray(count, jnp.int32))
        for row in range(len(rows)):
            outs[row].append(np.asarray(logits[row, : count[row]]))
        done += count
    assert (done == lengths).all()
    return [np.concatenate(out) for out in outs], cache


@pytest.mark.parametrize("switch", SWITCHES)
def test_forward_prefill_decode_and_verify_agree_with_the_reference(switch):
    """Odd lengths in one ragged batch, chunks across every border, then a tree behind different lengths."""
    config = tiny_model(layers=1, **SWITCHES[switch])
    nsa = config.nsa
    params = random_params(config, seed=3, dtype=np.float32)
    block, page = nsa.compress_block, nsa.select_block
    lengths = [1, block - 1, block, page, page + 1, 3 * page + 17]
    rows = [random_tokens(config, length, seed=length) for length in lengths]
    expected = [reference.forward(config, random_params(config, seed=3), row) for row in rows]
    jax_params = as_jax(params)

    longest = jnp.asarray(rows[-1][None], jnp.int32)
    close(head(config, jax_params, hidden_states(config, jax_params, longest, query_chunk=7))[0], expected[-1])

    # Two compiled widths, a chunk across borders and single tokens, each used more than once.
    wide = page + 3
    sizes = [wide, 1, 1, wide, 1]
    sizes += [1] * (max(lengths) - sum(sizes))
    outs, cache = feed(config, jax_params, shuffled_cache(config, lengths), rows, sizes)
    for out, want in zip(outs, expected, strict=True):
        close(out, want)

    parents = [-1, 0, 0, 1, 2, 3, 3, 5, 7, 8, 9, 10, 6]
    draft = random_tokens(config, len(parents), seed=99)
    logits = jit(lambda cache, draft: run_tree(config, jax_params, cache, draft, parents)[0])(
        cache, np.tile(draft, (len(rows), 1))
    )
    for row in (0, 2, len(rows) - 1):
        close(logits[row], reference.verify_tree(config, random_params(config, seed=3), rows[row], draft, parents))


@pytest.mark.parametrize("scaling", ROPES)
def test_rope_scalings_agree_with_the_reference(scaling):
    config = dataclasses.replace(tiny_model(), rope=ROPES[scaling])
    tokens = random_tokens(config, 90, seed=2)
    expected = reference.forward(config, random_params(config, seed=4), tokens)
    params = as_jax(random_params(config, seed=4))
    close(head(config, params, hidden_states(config, params, jnp.asarray(tokens[None], jnp.int32)))[0], expected)


def test_untied_head_agrees_with_the_reference():
    config = dataclasses.replace(tiny_model(), tied=False)
    tokens = random_tokens(config, 30, seed=2)
    params = as_jax(random_params(config, seed=4))
    hidden = hidden_states(config, params, jnp.asarray(tokens[None], jnp.int32))
    close(head(config, params, hidden)[0], reference.forward(config, random_params(config, seed=4), tokens))


@pytest.mark.parametrize("seed", range(4))
def test_every_node_of_a_random_tree_equals_sequential_decoding_of_its_path(seed):
    """32 nodes behind prefixes of length 0, 1, l − 1, l' and across borders; siblings share compression ends."""
    config = tiny_model()
    nsa = config.nsa
    random = np.random.default_rng(seed)
    parents = [-1] + [int(random.integers(max(0, node - 4), node)) for node in range(1, 32)]
    lengths = [0, 1, nsa.compress_block - 1, nsa.select_block, nsa.select_block - 2, 3 * nsa.select_block + 1]
    rows = [random_tokens(config, length, seed=length) for length in lengths]
    params = as_jax(random_params(config, seed=5))
    _, cache = feed(config, params, shuffled_cache(config, [length + 40 for length in lengths]), rows, [13, 13])
    draft = np.stack([random_tokens(config, 32, seed=seed * 10 + row) for row in range(len(rows))])
    logits = jit(lambda cache, draft: run_tree(config, params, cache, draft, parents)[0])(cache, draft)
    for row, prefix in enumerate(rows):
        expected = reference.verify_tree(config, random_params(config, seed=5), prefix, draft[row], parents)
        close(logits[row], expected)


def test_every_node_of_the_widest_trees_equals_sequential_decoding_of_its_path():
    """128 nodes, another tree for each sequence, known on the device alone; behind 0, l − 1 and l' + 1 tokens."""
    config = tiny_model(layers=1)
    nsa, random, size = config.nsa, np.random.default_rng(9), 128
    reach = (3, 20, 100)  # from deep to bushy
    parents = [[-1] + [int(random.integers(max(0, node - far), node)) for node in range(1, size)] for far in reach]
    depth = max(int(topology(tree, nsa.compress_block).depth.max()) for tree in parents)
    rows = [random_tokens(config, length, seed=length) for length in (0, nsa.compress_block - 1, nsa.select_block + 1)]
    params = as_jax(random_params(config, seed=5))
    _, cache = feed(config, params, shuffled_cache(config, [len(row) + 1 for row in rows]), rows, [13])
    draft = np.stack([random_tokens(config, size, seed=row) for row in range(3)])

    @jit
    def verify_all(cache, draft, parents):
        tail = make_tail(nsa, grown_topology(parents, depth, nsa.compress_block), cache.lengths)
        return head(config, params, verify(config, params, draft, cache, tail)[0])

    logits = verify_all(cache, jnp.asarray(draft), jnp.asarray(parents, jnp.int32))
    for row, prefix in enumerate(rows):
        expected = reference.verify_tree(config, random_params(config, seed=5), prefix, draft[row], parents[row])
        close(logits[row], expected)


def test_gradients_reach_every_parameter_and_are_finite():
    config = tiny_model()
    params = as_jax(random_params(config, seed=6))
    tokens = jnp.asarray(random_tokens(config, 70, seed=1)[None], jnp.int32)

    def loss(params):
        logits = head(config, params, hidden_states(config, params, tokens[:, :-1], query_chunk=16))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()

    gradients = jax.grad(loss)(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    # And they are right: a small step along the gradient lowers the loss by about its squared norm.
    squared = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradients))
    step = 1e-4 / squared**0.5
    moved = jax.tree.map(lambda leaf, gradient: leaf - step * gradient, params, gradients)
    backed = jax.tree.map(lambda leaf, gradient: leaf + step * gradient, params, gradients)
    np.testing.assert_allclose(float(loss(backed) - loss(moved)), 2 * step * squared, rtol=0.05)


@pytest.mark.parametrize("name, millions", [("embedded", 11), ("120m", 120), ("1b", 1400), ("8b", 8400)])
def test_presets_have_about_the_parameters_of_their_names(name, millions):
    shapes = jax.eval_shape(lambda: init_params(preset(name), 0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert 0.8 * millions < count / 1e6 < 1.25 * millions, count


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_no_array_of_the_whole_forward_is_quadratic_in_the_length(gradient):
    """Doubling the length doubles every array of the traced program, and the chunk bounds the rest."""
    config = tiny_model()
    params = as_jax(random_params(config, seed=6))

    def largest(length):
        tokens = jnp.zeros((1, length), jnp.int32)

        def summed(params):
            return hidden_states(config, params, tokens, query_chunk=16).sum()

        jaxpr = jax.make_jaxpr(jax.grad(summed) if gradient else summed)(params)
        sizes = []

        def walk(inner):
            for equation in inner.eqns:
                sizes.extend(var.aval.size for var in equation.outvars if hasattr(var.aval, "size"))
                for value in equation.params.values():
                    for sub in value if isinstance(value, (list, tuple)) else [value]:
                        if hasattr(sub, "jaxpr") or hasattr(sub, "eqns"):
                            walk(getattr(sub, "jaxpr", sub))

        walk(jaxpr.jaxpr)
        return max(sizes)

    assert largest(1024) <= 2.2 * largest(512)
