"""Trees as data: templates, topologies, orders; and the trees that lookup merges and models grow, by definition."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from reference_params import tiny_model

from specsa_jax.cache import grown_topology, topology
from specsa_jax.drafting import Context, Draft, Drafter, PromptLookup, depth_first, drafter_from_name, grow, parse_tree
from specsa_jax.drafting.base import top
from specsa_jax.drafting.tree import MAX_NODES
from specsa_jax.sampling import SamplingParams, batch_sampling


@pytest.mark.parametrize(
    "text, nodes, depth, width, children",
    [
        ("chain:1", 1, 1, 1, 1), ("chain:127", 127, 127, 1, 1), ("4-2-1-1", 28, 4, 8, 4), ("1-1", 2, 2, 1, 1),
        ("2-3", 8, 2, 2, 3), ("127-0", None, 0, 0, 0), ("best:64", 64, 8, 8, 8), ("best:127:20", 127, 20, 8, 8),
        ("best:3", 3, 3, 3, 3), ("best:5:2", 5, 2, 5, 5),
    ],
)  # fmt: skip
def test_templates_have_the_sizes_that_their_texts_say(text, nodes, depth, width, children):
    if nodes is None:
        with pytest.raises(ValueError, match="^tree: got"):
            parse_tree(text)
        return
    template = parse_tree(text)
    assert (template.nodes, template.depth, template.width, template.children) == (nodes, depth, width, children)
    assert template.is_chain == (children == 1) and template == parse_tree(text)
    assert template.is_static == (not text.startswith("best"))


@pytest.mark.parametrize("traversal", ["breadth", "depth"])
def test_the_best_of_one_node_is_a_chain_of_one(traversal):
    """Its parent is known before it is grown, and drafters may rely on it: a chain has a layout."""
    for text in ("best:1", "best:1:1"):
        template = parse_tree(text, traversal)
        assert template.is_chain and template.is_static and template.parents == (-1, 0)


@pytest.mark.parametrize(
    "text, words",
    [
        ("chain:0", "no drafted tokens"), ("chain:128", "more than 127 drafted"), ("best:128", "at most 128 nodes"),
        ("chain:999999999", "more than 127"), ("8-8-8", "more than 127"), ("2-0", "every level at least 1"),
        ("best:0", "no drafted"), ("best:4:5", "5 deep, expected a depth from 1 to its 4"), ("best:4:0", "0 deep"),
        ("bush", "expected chain:K"), ("4", "expected chain:K"), ("best", "expected chain:K"), (None, "expected chain"),
    ],
)  # fmt: skip
def test_texts_that_are_no_tree_are_refused_with_the_reason(text, words):
    with pytest.raises(ValueError, match=f"^tree: got .*{words}"):
        parse_tree(text)


def test_an_order_that_is_none_is_refused():
    with pytest.raises(ValueError, match="traversal: got 'random', expected one of 'breadth', 'depth'"):
        parse_tree("2-2", "random")


def test_trees_that_do_not_suit_a_model_are_refused():
    config = tiny_model()  # a vocabulary of 50, pages of 8
    parse_tree("50-1").check(config)
    with pytest.raises(ValueError, match="51 children of one node, expected at most vocab_size = 50"):
        parse_tree("51-1").check(config)
    parse_tree("chain:8").check(config)
    for text in ("chain:9", "best:20:9"):
        with pytest.raises(ValueError, match="9 tokens deep, expected at most a page, select_block = 8"):
            parse_tree(text).check(config)


@pytest.mark.parametrize("text", ["chain:5", "3-2-1", "2-1-3", "1-4"])
def test_both_orders_number_the_same_tree_parents_first(text):
    """And the tables by which drafters find their way agree with the parents."""
    shapes = []
    for traversal in ("breadth", "depth"):
        template = parse_tree(text, traversal)
        parents, depths = template.parents, template.depths
        assert parents[0] == -1 and all(0 <= parent < node for node, parent in enumerate(parents) if node)
        assert all(depths[node] == depths[parents[node]] + 1 for node in range(1, len(parents)))
        for node, children in enumerate(template.child.tolist()):
            found = [child for child in children if child <= template.nodes]
            assert found == [child for child in range(len(parents)) if parents[child] == node]
        for depth, level in enumerate(template.levels.tolist()):
            assert sorted(node for node in level if node <= template.nodes) == [
                node for node in range(len(parents)) if depths[node] == depth
            ]
        shapes.append(sorted((depths[node], list(parents).count(node)) for node in range(len(parents))))
    assert shapes[0] == shapes[1]
    assert list(parse_tree(text).depths) == sorted(parse_tree(text).depths)
    preorder = parse_tree(text, "depth").parents
    # Every node hangs below the one before, or below one of that one's ancestors.
    assert all(parent == node - 1 or parent <= preorder[node - 1] for node, parent in enumerate(preorder) if node)


@pytest.mark.parametrize("text", ["chain:7", "chain:8", "4-2-1-1", "2-2-2-2"])
@pytest.mark.parametrize("stride", [1, 2, 4, 16])
def test_there_is_room_for_all_compression_blocks_that_end_in_a_tree(text, stride):
    template = parse_tree(text)
    ends = [sum((start + depth + 1) % stride == 0 for depth in template.depths) for start in range(stride)]
    assert template.slots(stride) == max(ends)


def random_parents(random, size):
    reach = int(random.integers(1, size))
    return [-1] + [int(random.integers(max(0, node - reach), node)) for node in range(1, size)]


@pytest.mark.parametrize("size, block", [(9, 4), (MAX_NODES, 3), (6, 32), (5, 1)])
def test_trees_grown_on_the_device_have_the_topology_of_static_ones(size, block):
    random = np.random.default_rng(size)
    parents = [random_parents(random, size) for _ in range(5)]
    expected = [topology(row, block) for row in parents]
    depth = max(int(tree.depth.max()) for tree in expected)
    actual = jax.jit(grown_topology, static_argnums=(1, 2))(jnp.asarray(parents), depth, block)
    for name in ("depth", "ancestor", "back"):
        np.testing.assert_array_equal(getattr(actual, name), np.stack([getattr(tree, name) for tree in expected]), name)


def paths_of(tokens, valid, parents):
    """The token sequences of a draft's valid nodes, in the order of the nodes."""
    found = [()]
    for node, parent in enumerate(parents[1:], 1):
        found.append((*found[parent], int(tokens[node - 1])) if valid[node - 1] and found[parent] is not None else None)
    return [path for path in found[1:] if path is not None]


def test_depth_first_order_keeps_the_trees():
    random = np.random.default_rng(3)
    parents = np.array([random_parents(random, 12)[1:] for _ in range(6)], np.int32)
    tokens = np.broadcast_to(np.arange(100, 111, dtype=np.int32), parents.shape)
    valid = np.ones(parents.shape, bool)
    draft = jax.jit(depth_first, static_argnums=1)(
        Draft(jnp.asarray(tokens), jnp.asarray(valid), jnp.asarray(parents)), 11
    )
    for row in range(6):
        before = paths_of(tokens[row], valid[row], [-1, *parents[row]])
        after = paths_of(np.asarray(draft.tokens[row]), valid[row], [-1, *np.asarray(draft.parents[row])])
        assert after == sorted(before)  # siblings keep their order: here tokens grow with the nodes' numbers


# --- lookup ---

SIZE, LOOKUP = 20, PromptLookup(max_ngram=3, min_ngram=1, matches=4)


@functools.lru_cache
def proposer(tree):
    template = parse_tree(tree)

    def propose(tokens, known):
        context = Context(tokens, known, known > 0, None, None, None, None, None)
        draft = LOOKUP.propose((), (), context, template)
        parents = jnp.asarray(template.parents[1:]) if draft.parents is None else draft.parents
        return draft.tokens, draft.valid, jnp.broadcast_to(parents, draft.tokens.shape)

    return jax.jit(propose)


def continuations(text, depth):
    """Of the best four matches, best first: (tokens, length of the match)."""
    found = []
    for end in range(1, len(text)):
        ngram = 0
        while ngram < min(end, LOOKUP.max_ngram) and text[end - 1 - ngram] == text[-1 - ngram]:
            ngram += 1
        if ngram >= LOOKUP.min_ngram:
            found.append((-ngram, -end))
    chosen = []
    for ngram, end in sorted(found)[: LOOKUP.matches]:
        longer = list(text)
        for place in range(depth):
            longer.append(longer[-end + place])
        chosen.append((tuple(longer[len(text) :]), -ngram))
    return chosen


def expected_in_template(text, branching):
    children, order = {(): []}, []
    for tokens, _ in continuations(text, len(branching)):
        for depth, token in enumerate(tokens):
            path = tokens[:depth]
            if token not in children[path]:
                if len(children[path]) == branching[depth]:
                    break
                children[path].append(token)
                children[(*path, token)] = []
                order.append((*path, token))
    return order


TEXT = st.integers(1, 3).flatmap(lambda letters: st.lists(st.integers(0, letters), min_size=1, max_size=SIZE))


@hypothesis.given(text=TEXT)
@hypothesis.settings(max_examples=100)
def test_lookup_fills_a_template_with_the_continuations_of_several_matches(text):
    tokens = np.zeros((1, SIZE), np.int32)
    tokens[0, : len(text)] = text
    draft, valid, parents = (np.asarray(leaf)[0] for leaf in proposer("3-2-1")(tokens, np.array([len(text)])))
    assert sorted(paths_of(draft, valid, [-1, *parents])) == sorted(expected_in_template(text, (3, 2, 1)))


@hypothesis.given(text=TEXT)
@hypothesis.settings(max_examples=100)
def test_lookup_merges_matches_into_a_tree_of_the_heaviest_nodes(text):
    """A node weighs 2^match, summed over the continuations through it, times 0.9 a step down."""
    tokens = np.zeros((1, SIZE), np.int32)
    tokens[0, : len(text)] = text
    draft, valid, parents = (np.asarray(leaf)[0] for leaf in proposer("best:6:4")(tokens, np.array([len(text)])))
    found = paths_of(draft, valid, [-1, *parents])
    mass = {}
    for continuation, ngram in continuations(text, 4):
        for depth in range(1, 5):
            path = continuation[:depth]
            mass[path] = mass.get(path, 0) + 2**ngram * 0.9 ** (depth - 1)
    assert len(set(found)) == len(found) == min(6, len(mass))
    best = sorted(mass.values(), reverse=True)[: len(found)]
    np.testing.assert_allclose(sorted((mass[path] for path in found), reverse=True), best, rtol=1e-5)


# --- trees grown by a model: here a table with a law after every path of up to three of four tokens ---

VOCABULARY, DEPTH = 4, 3


def index(path):
    at = 0
    for token in path:
        at = at * VOCABULARY + token + 1
    return at


TABLE = np.random.default_rng(5).standard_normal((200, VOCABULARY)).astype(np.float32) * 2
LOG_PROBS = TABLE - np.log(np.exp(TABLE).sum(axis=1, keepdims=True))


def grown(tree, traversal="breadth", small=False):
    template, batch = parse_tree(tree, traversal), 2
    known = jnp.full(batch, 3, jnp.int32)

    def evaluate(above, level):
        at = jnp.where(level.step == 0, 0, jnp.take_along_axis(above, level.parent, axis=1))
        at = at * VOCABULARY + level.tokens + 1
        # The ancestors are the node's own path: as many as it is deep.
        return jnp.where(
            (level.ancestor.sum(axis=-1) == level.step + 1)[..., None], jnp.asarray(TABLE)[at], jnp.nan
        ), at

    @jax.jit
    def run():
        sampling = batch_sampling([SamplingParams()] * batch)
        noise = jax.random.split(jax.random.key(0), (batch, template.depth))
        context = Context(None, known, known > 0, sampling, noise, None, None, None)
        start = jnp.zeros((batch, template.width), jnp.int32)
        logits = jnp.broadcast_to(jnp.asarray(TABLE)[0], (batch, VOCABULARY))
        draft = grow(evaluate, start, context, template, logits, small)
        return depth_first(draft, template.depth) if traversal == "depth" and draft.parents is not None else draft

    draft = run()
    parents = np.asarray(template.parents[1:] if draft.parents is None else draft.parents[1])
    return paths_of(np.asarray(draft.tokens[1]), np.asarray(draft.valid[1]), [-1, *parents])


def joint(path):
    return sum(LOG_PROBS[index(path[:i])][path[i]] for i in range(len(path)))


@pytest.mark.parametrize("traversal", ["breadth", "depth"])
def test_fixed_branchings_take_the_most_probable_children(traversal):
    expected = [()]
    for depth, count in enumerate((3, 2, 1)):
        for path in [path for path in expected if len(path) == depth]:
            expected += [(*path, int(token)) for token in np.argsort(-LOG_PROBS[index(path)])[:count]]
    found = grown("3-2-1", traversal)
    assert set(found) == set(expected[1:])
    lengths = [len(path) for path in found]
    assert lengths == (sorted(lengths) if traversal == "breadth" else [1, 2, 3, 2, 3] * 3)


@pytest.mark.parametrize("traversal", ["breadth", "depth"])
@pytest.mark.parametrize("nodes", [2, 6, 8])
def test_best_first_keeps_the_most_probable_nodes(nodes, traversal):
    depth = min(nodes, DEPTH)
    every = [path for length in range(1, depth + 1) for path in itertools.product(range(VOCABULARY), repeat=length)]
    best = sorted(every, key=joint, reverse=True)[:nodes]
    assert set(grown(f"best:{nodes}:{depth}", traversal)) == set(best)


@pytest.mark.parametrize("tree", ["chain:1", "chain:4", "3-2-1", "best:6:3"])
def test_a_small_model_grows_the_same_tree_on_a_gpu_without_a_loop(tree, monkeypatch):
    expected = grown(tree)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    loops = []
    scan = jax.lax.scan
    monkeypatch.setattr(jax.lax, "scan", lambda *args, **options: loops.append(options) or scan(*args, **options))
    assert grown(tree, small=True) == expected
    assert loops[-1] == {"unroll": True if tree != "chain:1" else 1}
    assert grown(tree) == expected and loops[-1] == {"unroll": 1}


@pytest.mark.parametrize("count", [1, 2, 8, 9, 40])
def test_the_largest_are_the_same_ones_on_a_gpu(count, monkeypatch):
    """Of values with many equal ones, and of some that are −∞."""
    values = jnp.asarray(np.random.default_rng(count).integers(-3, 4, (5, 3, 40)).astype(np.float32))
    values = jnp.where(values == -3, -jnp.inf, values)
    expected, places = top(values, count)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    text = str(jax.make_jaxpr(lambda values: top(values, count))(values))
    assert "top_k" not in text  # whose kernel keeps loops out of CUDA graphs
    found, at = top(values, count)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(at, places)
    assert at.dtype == places.dtype == jnp.int32


# --- a drafter of one's own ---


class Parrot(Drafter):
    """Drafts the last token again and again: the smallest drafter there is (docs/drafting.md)."""

    def propose(self, params, state, context, template):
        last = jnp.take_along_axis(context.tokens, context.known[:, None] - 1, axis=1)
        tokens = jnp.broadcast_to(last, (last.shape[0], template.nodes))
        return Draft(tokens, jnp.ones(tokens.shape, bool))


def test_a_drafter_of_ones_own_is_had_by_its_place():
    assert isinstance(drafter_from_name(f"{__name__}:Parrot"), Parrot)
    both = drafter_from_name(f"lookup+{__name__}:Parrot")
    assert both.first == PromptLookup() and both.second == Parrot()
    for name in ("nonesuch.module:Drafter", f"{__name__}:Absent", f"{__name__}:SIZE", f"{__name__}:index", "oracle"):
        with pytest.raises(ValueError, match="drafter: got .* expected one of lookup, head"):
            drafter_from_name(name)
    with pytest.raises(ValueError, match="makes .* expected a Drafter"):
        drafter_from_name("builtins:dict")
    with pytest.raises(ValueError, match="expected two drafters around the"):
        drafter_from_name("lookup+none")
    with pytest.raises(ValueError, match="Combined.first: got .* expected a drafter without a model"):
        drafter_from_name("self+lookup")
