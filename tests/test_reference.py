"""The NumPy definition against hand-computed cases, and the NumPy transformer against itself.

Naming: ``identity`` stands in for RoPE where positions would only get in the way.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_params import random_params, random_tokens, tiny_model, tiny_nsa

from specsa_jax.config import NSAConfig, RopeConfig
from specsa_jax.nsa import reference as nsa
from specsa_jax.reference import (
    attention,
    decode,
    empty_cache,
    extend,
    forward,
    gates,
    rope_frequencies,
    rotate,
    to_numpy,
    verify_tree,
)

SWITCHES = {
    "paper": {},
    "shared_kv": dict(separate_kv=False),
    "no_gate": dict(gate="none"),
    "shared_gate": dict(gate="shared", gate_bias=True),
    "rope_before": dict(compressed_rope="before", compression="weighted", compress_position="keys"),
    "rope_none": dict(compressed_rope="none", compression="linear"),
    "mean": dict(compression="mean", compress_position="none", window_excludes_query=True),
    "paper_map": dict(score_map="paper", num_initial=0, num_local=1),
    "infllm": dict(compression="mean", compress_position="none", separate_kv=False, gate="none",
                   compressed_output=False, fused_selected_window=True, dense_len=30),
    "one_size": dict(compress_block=8, compress_stride=8),
}  # fmt: skip

BRANCHES = {"compressed": 0, "selected": 1, "window": 2}


def identity(x, positions):
    return x


def only(branch, config):
    """Gates that let a single branch through."""
    g = np.zeros((config.num_heads, 3))
    g[:, BRANCHES[branch]] = 1.0
    return g


def random_layer(config, tokens, seed=0):
    """Random attention parameters, one query, and keys and values of ``tokens`` tokens."""
    rng = np.random.default_rng(seed)
    params = random_params(dataclasses.replace(tiny_model(), nsa=config), seed)["layers"][0]["attn"]
    q = rng.standard_normal((config.num_heads, config.head_dim))
    k, v = rng.standard_normal((2, tokens, config.branch_sets, config.num_kv_heads, config.head_dim))
    return params, q, k, v


def mean_nsa(**switches):
    """Mean pooling without parameters, shared K/V, and no RoPE on the compressed branch: easy to compute by hand."""
    plain = dict(compression="mean", compress_position="none", separate_kv=False, compressed_rope="none")
    return tiny_nsa(**{**plain, **switches})


def tokens_that_matter(config, branch, tokens, seed=0):
    """The tokens whose *value* changes the last query's output through one branch: exactly those it attends to."""
    params, q, k, v = random_layer(config, tokens, seed)
    run = lambda values: nsa.attend(config, params, q, only(branch, config), k, values, identity)[0]  # noqa: E731
    before, found = run(v), []
    for s in range(tokens):
        perturbed = v.copy()
        perturbed[s] += 1.0
        if np.any(run(perturbed) != before):
            found.append(s)
    return found


# The transformer against itself


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_decoding_token_by_token_equals_the_whole_sequence(switches):
    config = tiny_model(**switches)
    params, tokens = random_params(config), random_tokens(config, 70)
    np.testing.assert_allclose(decode(config, params, tokens), forward(config, params, tokens), rtol=0, atol=1e-11)


def test_every_switch_changes_the_logits():
    config = tiny_model(compression="weighted")
    params, tokens = random_params(config), random_tokens(config, 70)
    base = forward(config, params, tokens)
    for switches in (
        dict(compressed_rope="before"), dict(compressed_rope="none"), dict(window_excludes_query=True),
        dict(score_map="paper"), dict(compressed_output=False), dict(fused_selected_window=True), dict(dense_len=40),
        dict(scale=0.2), dict(num_selected=3), dict(num_initial=0), dict(num_local=1), dict(window=7),
        dict(compress_position="keys"), dict(compress_position="none"), dict(compression="mean"), dict(gate="none"),
    ):  # fmt: skip
        changed = forward(tiny_model(**{"compression": "weighted", **switches}), params, tokens)
        assert np.abs(changed - base).max() > 1e-3, switches


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_nodes_of_a_tree_equal_decoding_their_path(switches):
    # 29 + 4 tokens: the deepest nodes cross a dense_len, a selection block (32), and ends of compression blocks.
    config = tiny_model(**switches)
    params, prefix = random_params(config), random_tokens(config, 29)
    parents = [-1, 0, 0, 1, 1, 2, 3, 5, 6]
    tokens = random_tokens(config, len(parents), seed=1)
    logits = verify_tree(config, params, prefix, tokens, parents)
    for i in range(len(parents)):
        path, node = [], i
        while node != -1:
            path, node = [tokens[node], *path], parents[node]
        alone = decode(config, params, [*prefix, *path])[-1]
        np.testing.assert_allclose(logits[i], alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("length", [0, 3, 29])
def test_a_chain_equals_the_whole_sequence(length):
    config = tiny_model()
    params, tokens = random_params(config), random_tokens(config, length + 6)
    logits = verify_tree(config, params, tokens[:length], tokens[length:], [-1, 0, 1, 2, 3, 4])
    np.testing.assert_allclose(logits, forward(config, params, tokens)[length:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("parents", [[0, 0], [-1, -1], [-1, 1], [-1, 2, 0], [-1, -2]])
def test_a_malformed_tree_is_refused(parents):
    config = tiny_model()
    with pytest.raises(ValueError, match="parents"):
        verify_tree(config, random_params(config), [1, 2], [3] * len(parents), parents)


def test_extending_leaves_the_old_cache_as_it_was():
    config = tiny_model()
    params = random_params(config)
    _, cache = extend(config, params, empty_cache(config, params), [1, 2, 3])
    copies = [(k.copy(), v.copy()) for k, v in cache]
    extend(config, params, cache, [4, 5])
    for (k, v), (k_copy, v_copy) in zip(cache, copies, strict=True):
        assert np.array_equal(k, k_copy) and np.array_equal(v, v_copy) and len(k) == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_the_dtype_of_the_parameters_is_the_dtype_of_everything(switches, dtype):
    config = tiny_model(**switches)
    params = to_numpy(random_params(config), dtype)
    logits, cache = extend(config, params, empty_cache(config, params), random_tokens(config, 20))
    assert {logits.dtype, *(a.dtype for pair in cache for a in pair)} == {np.dtype(dtype)}
    assert np.isfinite(logits).all()


def test_an_untied_head_is_used():
    config = tiny_model(tied=False)
    params = random_params(config)
    tokens = random_tokens(config, 5)
    logits = forward(config, params, tokens)
    params["head"]["kernel"] = params["head"]["kernel"] * 2
    np.testing.assert_allclose(forward(config, params, tokens), 2 * logits, rtol=1e-12)


def test_one_token_through_one_layer_equals_the_formula_written_out():
    # A single token attends to itself: each branch returns its own value, the compressed one 0.
    config = dataclasses.replace(tiny_model(layers=1), norm_eps=0.3)
    params = random_params(config)
    layer = params["layers"][0]
    x = params["embed"]["embedding"][7]

    def norm(x, scale):
        return x / math.sqrt(sum(x**2) / len(x) + 0.3) * scale["scale"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    h = norm(x, layer["attn_norm"])
    g = sigmoid(h @ layer["attn"]["gate_proj"]["kernel"])
    v = h @ layer["attn"]["v_proj"]["kernel"]
    heads = []
    for head in range(4):
        selected, window = (v[8 * (2 * kind + head // 2) :][:8] for kind in (1, 2))
        heads += [g[3 * head + 1] * selected + g[3 * head + 2] * window]
    x = x + np.concatenate(heads) @ layer["attn"]["o_proj"]["kernel"]
    h = norm(x, layer["mlp_norm"])
    gate, up = h @ layer["mlp"]["gate_proj"]["kernel"], h @ layer["mlp"]["up_proj"]["kernel"]
    x = x + (gate * sigmoid(gate) * up) @ layer["mlp"]["down_proj"]["kernel"]
    expected = params["embed"]["embedding"] @ norm(x, params["norm"])
    np.testing.assert_allclose(forward(config, params, [7])[0], expected, rtol=0, atol=1e-12)


# Compression


def test_every_kind_of_compression_equals_its_formula():
    rng = np.random.default_rng(0)
    l, d, D, hidden = 4, 2, 8, 10
    x, position = rng.standard_normal((9, D)), rng.standard_normal((l, D))
    weight, linear = rng.standard_normal(l), rng.standard_normal((l * D, D))
    w_in, w_out = rng.standard_normal((l * D, hidden)), rng.standard_normal((hidden, D))

    def formula(kind, block):
        if kind == "mean":
            return sum(block) / l
        if kind == "weighted":
            return sum(weight[r] * block[r] for r in range(l))
        if kind == "linear":
            return sum(block[r, c] * linear[r * D + c] for r in range(l) for c in range(D))
        hidden_units = sum(block[r, c] * w_in[r * D + c] for r in range(l) for c in range(D))
        return sum(u / (1 + math.exp(-u)) * w_out[i] for i, u in enumerate(hidden_units))

    for kind in ("mean", "weighted", "linear", "mlp"):
        phi = dict(position=position, weight=weight if kind == "weighted" else linear, weight_in=w_in, weight_out=w_out)
        for encode in (False, True):
            got = nsa.compress(tiny_nsa(compression=kind), phi, x, encode)
            blocks = [x[i : i + l] + encode * position for i in (0, d, 2 * d)]  # the block at 6 lacks a token
            np.testing.assert_allclose(got, [formula(kind, b) for b in blocks], rtol=0, atol=1e-12, err_msg=kind)


@pytest.mark.parametrize("kinds, on_keys, on_values", [("none", 0, 0), ("keys", 1, 0), ("both", 1, 1)])
def test_position_encodings_reach_keys_and_values_as_switched(kinds, on_keys, on_values):
    config = mean_nsa(compress_position=kinds)
    phi, x = {"position": np.full((4, 8), 3.0)}, np.zeros((4, 8))
    assert (nsa.compress_keys(config, phi, x, identity) == 3.0 * on_keys).all()
    assert (nsa.compress_values(config, phi, x) == 3.0 * on_values).all()


def test_compressed_keys_are_rotated_before_or_after_pooling_or_not_at_all():
    rope = RopeConfig(theta=100.0)
    k, position = np.random.default_rng(0).standard_normal((6, 8)), np.random.default_rng(1).standard_normal((4, 8))
    turned = rotate(rope, k, np.arange(6))
    at_zero_and_two = np.array([0, 2])  # positions i·d
    expected = {
        "before": np.stack([(turned[0:4] + position).mean(0), (turned[2:6] + position).mean(0)]),
        "none": np.stack([(k[0:4] + position).mean(0), (k[2:6] + position).mean(0)]),
    }
    expected["after"] = rotate(rope, expected["none"], at_zero_and_two)
    for kind, want in expected.items():
        config = mean_nsa(compressed_rope=kind, compress_position="keys")
        got = nsa.compress_keys(config, {"position": position}, k, lambda x, at: rotate(rope, x, at))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-14, err_msg=kind)


@pytest.mark.parametrize("i", [0, 1, 5])
def test_a_compression_block_becomes_visible_with_its_last_token(i):
    l, d = 4, 2
    last = i * d + l - 1
    visible_before = tokens_that_matter(mean_nsa(), "compressed", last)  # to the query at last − 1
    visible_now = tokens_that_matter(mean_nsa(), "compressed", last + 1)  # to the query at last
    assert visible_before == (list(range((i - 1) * d + l)) if i else [])
    assert visible_now == list(range(last + 1))


def test_without_a_visible_block_the_compressed_branch_adds_zero_and_scores_are_zero():
    config = tiny_nsa()
    params, q, k, v = random_layer(config, tokens=3)
    output, selection = nsa.attend(config, params, q, only("compressed", config), k, v, identity)
    assert (output == 0).all()
    assert (selection == [[0, -1, -1, -1]] * 2).all()
    p_cmp = nsa.compressed_probabilities(config, q[:2], np.zeros((0, 8)))
    assert p_cmp.shape == (2, 0) and (nsa.block_importance(config, p_cmp, t=2) == [0.0]).all()


def test_a_single_visible_block_is_its_pooled_value():
    config = mean_nsa()
    params, q, k, v = random_layer(config, tokens=5)
    output, _ = nsa.attend(config, params, q, only("compressed", config), k, v, identity)
    np.testing.assert_allclose(output, np.repeat(v[:4, 0].mean(axis=0), 2, axis=0), rtol=0, atol=1e-14)


def test_each_kv_head_has_its_own_compression():
    config = mean_nsa(compression="weighted")
    _, q, k, v = random_layer(config, tokens=4)
    pick_first, pick_last = np.eye(4)[[0, 3]]
    params = {"compress_k": {"weight": np.ones((2, 4))}, "compress_v": {"weight": np.stack([pick_first, pick_last])}}
    output, _ = nsa.attend(config, params, q, only("compressed", config), k, v, identity)
    assert np.array_equal(output, [v[0, 0, 0], v[0, 0, 0], v[3, 0, 1], v[3, 0, 1]])


# Importance


def one_hot(i, count):
    return np.eye(count)[[i]]


def paper_sizes(**switches):
    return NSAConfig(num_heads=1, num_kv_heads=1, head_dim=2, **switches)  # l=32, d=16, l'=64


def chunks_shared(config, i, j):
    """How many d-token chunks compression block i and selection block j have in common, by counting tokens."""
    l, d, size = config.compress_block, config.compress_stride, config.select_block
    common = set(range(i * d, i * d + l)) & set(range(j * size, (j + 1) * size))
    assert len(common) % d == 0
    return len(common) // d


@given(d=st.integers(1, 3), span=st.integers(1, 4), extra=st.integers(0, 3), count=st.integers(1, 12), data=st.data())
def test_importance_counts_the_chunks_that_two_blocks_share(d, span, extra, count, data):
    config = paper_sizes(compress_stride=d, compress_block=d * span, select_block=d * (span + extra))
    i = data.draw(st.integers(0, count - 1))
    t = (count - 1) * d + d * span - 1  # the first query that sees `count` blocks
    importance = nsa.block_importance(config, one_hot(i, count), t)
    assert importance.tolist() == [chunks_shared(config, i, j) for j in range(t // config.select_block + 1)]


def test_importance_with_the_papers_sizes():
    # Compression block 3 covers tokens 48 … 79, one chunk in block 0 and one in block 1; the neighbours lie inside.
    config = paper_sizes()
    scores = [nsa.block_importance(config, one_hot(i, 11), t=191).tolist() for i in range(8)]
    assert scores == [[2, 0, 0], [2, 0, 0], [2, 0, 0], [1, 1, 0], [0, 2, 0], [0, 2, 0], [0, 2, 0], [0, 1, 1]]


def test_importance_as_the_paper_prints_it_points_before_the_block():
    # Block 1 takes p[4 − m − k], m < 4, k < 2: p[4] once, p[3], p[2], p[1] twice, p[0] once; block 0 only p[0], once.
    config = paper_sizes(score_map="paper")
    scores = [nsa.block_importance(config, one_hot(i, 11), t=191).tolist() for i in range(6)]
    assert scores == [[1, 1, 0], [0, 2, 0], [0, 2, 0], [0, 2, 0], [0, 1, 1], [0, 0, 2]]


@pytest.mark.parametrize("score_map", ["overlap", "paper"])
def test_importance_is_the_identity_when_all_blocks_are_one_size(score_map):
    config = paper_sizes(compress_block=8, compress_stride=8, select_block=8, score_map=score_map)
    p = np.random.default_rng(0).random((3, 5))
    importance = nsa.block_importance(config, p, t=44)  # token 44 begins block 5, which no compressed block reaches
    np.testing.assert_allclose(importance, [*p.sum(axis=0), 0.0], rtol=0, atol=1e-15)


@given(t=st.integers(0, 400), score_map=st.sampled_from(["overlap", "paper"]))
def test_the_literal_loop_agrees_with_the_configs_overlap_weights(t, score_map):
    config = paper_sizes(score_map=score_map)
    p = np.random.default_rng(t).random((2, max(0, (t - 15) // 16)))
    expected = [
        sum(n * p[:, 4 * j + o].sum() for o, n in config.overlap_weights().items() if 0 <= 4 * j + o < p.shape[1])
        for j in range(t // 64 + 1)
    ]
    np.testing.assert_allclose(nsa.block_importance(config, p, t), expected, rtol=1e-12)


# Selection


def test_forced_blocks_count_inside_n():
    importance = np.array([0.0, 5.0, 9.0, 7.0, 0.0, 0.0])
    assert nsa.select_blocks(tiny_nsa(num_selected=3), importance, t=40) == [0, 4, 5]
    assert nsa.select_blocks(tiny_nsa(num_selected=4), importance, t=40) == [0, 2, 4, 5]
    assert nsa.select_blocks(tiny_nsa(num_selected=5), importance, t=40) == [0, 2, 3, 4, 5]
    assert nsa.select_blocks(tiny_nsa(num_selected=3, num_initial=0, num_local=1), importance, t=40) == [2, 3, 5]
    assert nsa.select_blocks(tiny_nsa(num_selected=3, num_initial=2, num_local=1), importance, t=40) == [0, 1, 5]


@pytest.mark.parametrize("t, blocks", [(0, [0]), (7, [0]), (8, [0, 1]), (16, [0, 1, 2]), (24, [0, 1, 2, 3])])
def test_a_forced_block_that_is_initial_and_local_counts_once(t, blocks):
    assert nsa.select_blocks(tiny_nsa(), np.ones(t // 8 + 1), t) == blocks


def test_ties_go_to_the_lower_block():
    importance = np.array([0.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 0.0, 0.0])
    assert nsa.select_blocks(tiny_nsa(num_selected=5), importance, t=64) == [0, 2, 4, 7, 8]
    assert nsa.select_blocks(tiny_nsa(num_selected=7), importance, t=64) == [0, 1, 2, 4, 6, 7, 8]


def test_equal_keys_tie_and_the_lower_blocks_win():
    config = mean_nsa()
    params, q, k, v = random_layer(config, tokens=70)
    selection = nsa.attend(config, params, q, None, np.ones_like(k), v, identity)[1]
    assert selection.tolist() == [[0, 1, 7, 8]] * 2


def test_each_kv_head_selects_by_its_own_group():
    # One key of KV head 0 lies in block 2, one of KV head 1 in block 4, each along the queries of its group.
    config = mean_nsa(num_selected=4)
    q, k, v = np.ones((4, 8)), np.zeros((70, 1, 2, 8)), np.zeros((70, 1, 2, 8))
    k[20, 0, 0], k[36, 0, 1] = 10.0, 10.0
    assert nsa.attend(config, {}, q, None, k, v, identity)[1].tolist() == [[0, 2, 7, 8], [0, 4, 7, 8]]
    # A group votes together: its first head avoids the key in block 5, its second, turned around, wants only that.
    k[20, 0, 0] = k[36, 0, 1] = 0.0
    k[44, 0, :], q[1], q[3] = -10.0, -3.0, -3.0
    assert nsa.attend(config, {}, q, None, k, v, identity)[1].tolist() == [[0, 5, 7, 8]] * 2


def test_the_selected_branch_sees_exactly_its_blocks_up_to_the_query():
    config = mean_nsa(num_kv_heads=1)
    params, q, k, v = random_layer(config, tokens=70)
    blocks = nsa.attend(config, params, q, None, k, v, identity)[1][0]
    expected = [s for s in range(70) if s // 8 in blocks]
    assert blocks.tolist()[::3] == [0, 8] and len(expected) == 3 * 8 + 6  # token 69 is the sixth of its block
    assert tokens_that_matter(config, "selected", 70) == expected


def test_selecting_every_block_is_dense_attention():
    config = mean_nsa(num_selected=9)
    params, q, k, v = random_layer(config, tokens=70)
    output, selection = nsa.attend(config, params, q, only("selected", config), k, v, identity)
    assert selection.tolist() == [list(range(9))] * 2
    for head in range(4):
        weights = np.exp(k[:, 0, head // 2] @ q[head] / math.sqrt(8))
        np.testing.assert_allclose(output[head], weights @ v[:, 0, head // 2] / weights.sum(), rtol=0, atol=1e-13)


# Window


@pytest.mark.parametrize("excludes_query, first", [(False, 24), (True, 23)])
def test_the_window_holds_w_tokens_or_w_and_the_query(excludes_query, first):
    config = mean_nsa(window=6, window_excludes_query=excludes_query)
    assert tokens_that_matter(config, "window", 30) == list(range(first, 30))


def test_a_window_longer_than_the_prefix_holds_the_prefix():
    assert tokens_that_matter(mean_nsa(window=6), "window", 4) == [0, 1, 2, 3]


# Switches on the combination


@pytest.mark.parametrize("branch", BRANCHES)
def test_each_branch_reads_its_own_keys_and_values(branch):
    config = tiny_nsa()
    params, q, k, v = random_layer(config, tokens=70)
    run = lambda k, v: nsa.attend(config, params, q, only(branch, config), k, v, identity)[0]  # noqa: E731
    for other, index in BRANCHES.items():
        k_changed, v_changed = k.copy(), v.copy()
        v_changed[:, index] += 1.0
        assert np.any(run(k, v_changed) != run(k, v)) == (other == branch)
        k_changed[:, index] *= -1.0
        # The compressed keys also decide what the selected branch reads.
        touches = other == branch or (branch, other) == ("selected", "compressed")
        assert np.any(run(k_changed, v) != run(k, v)) == touches


def test_the_output_is_the_gated_sum_of_the_branches():
    config = tiny_nsa()
    params, q, k, v = random_layer(config, tokens=70)
    g = np.random.default_rng(1).random((4, 3))
    branches = [nsa.attend(config, params, q, only(b, config), k, v, identity)[0] for b in BRANCHES]
    output = nsa.attend(config, params, q, g, k, v, identity)[0]
    np.testing.assert_allclose(output, sum(g[:, [b]] * branches[b] for b in range(3)), rtol=0, atol=1e-14)
    ungated = nsa.attend(config, params, q, None, k, v, identity)[0]
    np.testing.assert_allclose(ungated, sum(branches), rtol=0, atol=1e-14)


def test_gate_columns_run_over_heads_then_branches():
    x, kernel = np.ones((1, 1)), np.arange(12.0)[None] / 10
    sigmoid = lambda y: 1 / (1 + np.exp(-y))  # noqa: E731
    per_head = gates(tiny_nsa(), {"gate_proj": {"kernel": kernel}}, x)[0]
    np.testing.assert_allclose(per_head, sigmoid(kernel.reshape(4, 3)), rtol=1e-14)
    bias = np.array([5.0, 0.0, -5.0])
    params = {"gate_proj": {"kernel": kernel[:, :3], "bias": bias}}
    shared = gates(tiny_nsa(gate="shared", gate_bias=True), params, x)[0]
    np.testing.assert_allclose(shared, [sigmoid(kernel[0, :3] + bias)] * 4, rtol=1e-14)
    assert (gates(tiny_nsa(gate="none"), {}, x) == np.ones((1, 4, 3))).all()


def test_without_a_compressed_output_the_branch_still_selects():
    with_output, without = mean_nsa(), mean_nsa(compressed_output=False)
    params, q, k, v = random_layer(with_output, tokens=70)
    output, selection = nsa.attend(with_output, params, q, None, k, v, identity)
    selected_only, same_selection = nsa.attend(without, params, q, None, k, v, identity)
    assert np.array_equal(selection, same_selection) and selection[0].tolist() != [0, 1, 7, 8]  # not a tie: by score
    compressed = nsa.attend(with_output, params, q, only("compressed", with_output), k, v, identity)[0]
    np.testing.assert_allclose(output - selected_only, compressed, rtol=0, atol=1e-14)


def test_the_fused_softmax_counts_each_token_once():
    # A zero query attends uniformly: the output is the plain average of the values of the union.
    config = mean_nsa(fused_selected_window=True, compressed_output=False, num_selected=3, window=20)
    params, _, k, v = random_layer(config, tokens=70)
    g = np.array([[0.9, 0.5, 0.2]] * 4)
    output, selection = nsa.attend(config, params, np.zeros((4, 8)), g, k, v, identity)
    assert selection[0].tolist() == [0, 7, 8]
    union = [*range(8), *range(50, 70)]  # blocks 7 and 8 begin at 56 and lie inside the window of 20
    expected = np.repeat(0.5 * v[union, 0].mean(axis=0), 2, axis=0)  # under the selected branch's gate
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-14)


def test_the_fused_softmax_reads_the_selected_set():
    config = mean_nsa(fused_selected_window=True, compressed_output=False, separate_kv=True)
    params, q, k, v = random_layer(config, tokens=70)
    before = nsa.attend(config, params, q, None, k, v, identity)[0]
    k[:, 2], v[:, 2], v[:, 0] = 0.0, 0.0, 0.0
    assert np.array_equal(nsa.attend(config, params, q, None, k, v, identity)[0], before)


def test_queries_below_dense_len_attend_to_everything_ungated():
    params, q, k, v = random_layer(mean_nsa(), tokens=30)
    closed = np.zeros((4, 3))
    dense, nothing_selected = nsa.attend(mean_nsa(dense_len=31), params, q, closed, k, v, identity)
    assert (nothing_selected == -1).all()
    full = nsa.attend(mean_nsa(num_selected=9), params, q, only("selected", mean_nsa()), k, v, identity)[0]
    np.testing.assert_allclose(dense, full, rtol=0, atol=1e-14)
    sparse, selection = nsa.attend(mean_nsa(dense_len=30), params, q, closed, k, v, identity)
    assert (sparse == 0).all() and (selection[:, 0] == 0).all()


def test_queries_below_dense_len_read_the_selected_set():
    config = tiny_nsa(dense_len=31)
    params, q, k, v = random_layer(config, tokens=30)
    before = nsa.attend(config, params, q, None, k, v, identity)[0]
    k[:, [0, 2]], v[:, [0, 2]] = 0.0, 0.0
    assert np.array_equal(nsa.attend(config, params, q, None, k, v, identity)[0], before)


def test_the_scale_replaces_one_over_root_d_in_every_branch():
    params, q, k, v = random_layer(tiny_nsa(), tokens=70)
    for branch in BRANCHES:
        gate = only(branch, tiny_nsa())
        scaled = nsa.attend(tiny_nsa(scale=0.1), params, q, gate, k, v, identity)[0]
        by_query = nsa.attend(tiny_nsa(), params, q * (0.1 * math.sqrt(8)), gate, k, v, identity)[0]
        np.testing.assert_allclose(scaled, by_query, rtol=0, atol=1e-13)


def test_keys_are_rotated_at_their_own_positions_and_values_never():
    config, rope = mean_nsa(window=3), RopeConfig(theta=100.0)
    params, q, k, v = random_layer(config, tokens=12)
    output = nsa.attend(config, params, q, only("window", config), k, v, lambda x, at: rotate(rope, x, at))[0]
    for head in range(4):
        turned = rotate(rope, k[9:, 0, head // 2], np.array([9, 10, 11]))
        weights = np.exp(turned @ q[head] / math.sqrt(8))
        np.testing.assert_allclose(output[head], weights @ v[9:, 0, head // 2] / weights.sum(), rtol=0, atol=1e-13)


def test_new_tokens_stand_after_the_past_ones():
    config = tiny_model()
    params, x = random_params(config)["layers"][0]["attn"], np.random.default_rng(0).standard_normal((40, 32))
    no_past = np.zeros((0, 3, 2, 8))
    whole, selection, keys, values = attention(config.nsa, config.rope, params, x, no_past, no_past)
    tail = attention(config.nsa, config.rope, params, x[33:], keys[:33], values[:33])
    np.testing.assert_allclose(tail[0], whole[33:], rtol=0, atol=1e-12)
    assert np.array_equal(tail[1], selection[33:]) and tail[2].shape == keys.shape


# RoPE


def test_scores_of_rotated_vectors_depend_on_the_distance_only():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 16))
    score = lambda at, back: float(rotate(RopeConfig(), q, [at])[0] @ rotate(RopeConfig(), k, [at - back])[0])  # noqa: E731
    assert score(5, 3) == pytest.approx(score(905, 3), abs=1e-11)
    assert abs(score(5, 3) - score(5, 4)) > 1e-3


def test_rotation_is_the_rotate_half_layout():
    turned = rotate(RopeConfig(theta=10000.0), np.eye(4)[:2], [1, 1])
    expected = [[math.cos(1), 0, math.sin(1), 0], [0, math.cos(0.01), 0, math.sin(0.01)]]
    np.testing.assert_allclose(turned, expected, rtol=0, atol=1e-15)


def test_linear_scaling_divides_positions():
    x = np.random.default_rng(0).standard_normal((3, 16))
    scaled = rotate(RopeConfig(kind="linear", factor=4.0), x, [4, 8, 400])
    np.testing.assert_allclose(scaled, rotate(RopeConfig(), x, [1, 2, 100]), rtol=0, atol=1e-13)


def test_llama3_scaling_stretches_long_wavelengths_only():
    # Llama 3.1: wavelengths up to 8192/4 are kept, above 8192/1 stretched 8 times; between, blended by 8192/wavelength.
    rope = RopeConfig(theta=500000.0, kind="llama3", factor=8.0, original_length=8192)
    base = 500000.0 ** (-np.arange(64) / 64)
    wavelength = 2 * math.pi / base
    got, magnitude = rope_frequencies(rope, 128)
    short, long = wavelength < 2048, wavelength > 8192
    assert magnitude == 1.0 and short.sum() == 29 and long.sum() == 29
    np.testing.assert_allclose(got[short], base[short], rtol=1e-14)
    np.testing.assert_allclose(got[long], base[long] / 8, rtol=1e-14)
    for c in np.flatnonzero(~short & ~long):
        smooth = (8192 / wavelength[c] - 1) / (4 - 1)
        assert got[c] == pytest.approx((1 - smooth) * base[c] / 8 + smooth * base[c], rel=1e-13)


def test_yarn_scaling_ramps_between_its_two_rotation_counts():
    # Pairs make 32 rotations in 4096 tokens at index 20.94 …, and 1 at 45.03 …: the ramp runs from 20 to 46.
    rope = RopeConfig(theta=10000.0, kind="yarn", factor=16.0, original_length=4096)
    base = 10000.0 ** (-np.arange(64) / 64)
    got, magnitude = rope_frequencies(rope, 128)
    assert magnitude == pytest.approx(0.1 * math.log(16) + 1)
    ramp = np.array([0.0] * 20 + [(c - 20) / 26 for c in range(20, 47)] + [1.0] * 17)
    np.testing.assert_allclose(got, base * (1 - ramp) + base / 16 * ramp, rtol=1e-13)
    x = np.ones((1, 128))
    assert np.linalg.norm(rotate(rope, x, [7])) == pytest.approx(magnitude * np.linalg.norm(x))
