"""Draft trees: templates, and the trees that drafters grow within them.

A tree has 1 + K nodes: node 0 is the pending token, nodes 1 … K are drafted, parents before children. A template says
how many and, unless the tree is grown best-first, where.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax.cache import Topology, grown_topology, topology
from specsa_jax.config import ModelConfig

Traversal = Literal["breadth", "depth"]

MAX_NODES = 128  # of a tree, the pending token included
_BEST_WIDTH, _BEST_DEPTH = 8, 8


@dataclasses.dataclass(frozen=True)
class TreeTemplate:
    """The static part of a draft tree, read from a text by :func:`parse_tree`.

    Attributes:
      text: as it was given: ``chain:8``, ``4-2-1-1``, ``best:64``, ``best:64:6``.
      traversal: order of the nodes: "breadth" has siblings side by side, "depth" parents and children.
      nodes: K, room for drafted tokens.
      depth: D, the most drafted tokens on a path.
      branching: children of each node by its depth, from the pending token on; () for trees that are grown best-first.
      width: the most nodes of one depth that a drafter expands.
      children: the most children of a node that are drafted.
    """

    text: str
    traversal: Traversal
    nodes: int
    depth: int
    branching: tuple[int, ...]
    width: int
    children: int

    @property
    def is_chain(self) -> bool:
        return self.children == 1

    @property
    def is_static(self) -> bool:
        """Whether the template says every node's parent."""
        return bool(self.branching)

    @property
    def parents(self) -> tuple[int, ...]:
        """Of nodes 0 … K of a static template, −1 for node 0."""
        return tuple(self._layout[0].tolist())

    @property
    def depths(self) -> tuple[int, ...]:
        """Of nodes 0 … K of a static template."""
        return tuple(self._layout[1].tolist())

    @property
    def child(self) -> np.ndarray:
        """int32 [K + 1, children]: each node's children in a static template, K + 1 where there are fewer."""
        return self._layout[2]

    @property
    def levels(self) -> np.ndarray:
        """int32 [D, width]: the nodes of depth 0 … D − 1 in a static template, K + 1 where there are fewer."""
        return self._layout[3]

    @property
    def _layout(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        if not self.is_static:
            raise ValueError(f"tree: {self.text} is grown by its drafter, its nodes have no fixed parents")
        return _layout(self.branching, self.traversal)

    def slots(self, stride: int) -> int:
        """The most compression blocks, one ending every ``stride`` tokens, that can end in such a tree."""
        return int(np.bincount(np.array(self.depths) % stride).max()) if self.is_static else self.nodes + 1

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError for a tree that does not suit the model."""
        if self.children > config.vocab_size and self.is_static:
            raise ValueError(
                f"tree: got {self.text}, {self.children} children of one node, expected at most vocab_size = "
                f"{config.vocab_size}"
            )
        if self.depth > config.nsa.select_block:
            raise ValueError(
                f"tree: got {self.text}, {self.depth} tokens deep, expected at most a page, "
                f"select_block = {config.nsa.select_block}"
            )


@functools.lru_cache
def _layout(branching: tuple[int, ...], traversal: Traversal) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Parents, depths [K + 1], child table [K + 1, C], levels [D, W] of a template with fixed branchings."""
    parents, depths, levels = [-1], [0], [[0]]
    for depth, count in enumerate(branching):
        levels.append([])
        for node in levels[depth]:
            for _ in range(count):
                levels[-1].append(len(parents))
                parents.append(node)
                depths.append(depth + 1)
    size = len(parents)
    order = np.arange(size)
    if traversal == "depth":
        offspring: list[list[int]] = [[] for _ in range(size)]
        for node in range(1, size):
            offspring[parents[node]].append(node)
        order, stack = np.zeros(size, int), [0]
        for place in range(size):
            order[place] = node = stack.pop()
            stack.extend(reversed(offspring[node]))
    place_of = np.empty(size + 1, np.int32)
    place_of[order], place_of[-1] = np.arange(size), -1
    new_parents = np.array([place_of[parents[node]] for node in order], np.int32)
    child = np.full((size, max(branching)), size, np.int32)
    filled = np.zeros(size, int)
    for node in range(1, size):
        parent = new_parents[node]
        child[parent, filled[parent]] = node
        filled[parent] += 1
    table = np.full((len(branching), max(map(len, levels[:-1]))), size, np.int32)
    for depth, nodes in enumerate(levels[:-1]):
        table[depth, : len(nodes)] = place_of[nodes]
    return new_parents, np.array(depths, np.int32)[order], child, table


def parse_tree(text: Any, traversal: Any = "breadth") -> TreeTemplate:
    """The template that a text describes.

    ``chain:K``: K tokens in a row. ``4-2-1-1``: the pending token has 4 children, each of them 2, each of those 1, …
    ``best:K`` or ``best:K:D``: the K most probable nodes by the drafter's joint probability, at most D deep (by
    default 8); of one depth at most 8 nodes are expanded, each to at most 8 children.

    Raises ValueError for a text of another form, and for trees of more than 128 nodes, the pending token included.
    """
    if traversal not in get_args(Traversal):
        raise ValueError(f"traversal: got {traversal!r}, expected one of {', '.join(map(repr, get_args(Traversal)))}")
    forms = "chain:K, branchings such as 4-2-1-1, or best:K[:depth]"
    if not isinstance(text, str):
        raise ValueError(f"tree: got {text!r}, expected {forms}")
    if match := re.fullmatch(r"chain:(\d{1,9})", text):
        branching = (1,) * min(int(match[1]), MAX_NODES)
    elif re.fullmatch(r"\d{1,9}(-\d{1,9})*", text) and "-" in text:
        branching = tuple(map(int, text.split("-")))
    elif match := re.fullmatch(r"best:(\d{1,9})(?::(\d{1,9}))?", text):
        nodes = int(match[1])
        depth = min(nodes, _BEST_DEPTH) if match[2] is None else int(match[2])
        _bound(text, nodes)
        if not 1 <= depth <= nodes:
            raise ValueError(f"tree: got {text}, {depth} deep, expected a depth from 1 to its {nodes} nodes")
        width = min(nodes, _BEST_WIDTH)
        # The best of one node leaves nothing to choose: its parent is the pending token.
        return TreeTemplate(text, traversal, nodes, depth, (1,) if nodes == 1 else (), width, width)
    else:
        raise ValueError(f"tree: got {text!r}, expected {forms}")
    widths = [1]
    for count in branching:
        widths.append(min(widths[-1] * count, MAX_NODES))
    _bound(text, sum(widths[1:]) if min(branching, default=0) else 0)
    return TreeTemplate(
        text, traversal, sum(widths[1:]), len(branching), branching, max(widths[:-1]), max(branching)
    )  # fmt: skip


def _bound(text: str, nodes: int) -> None:
    if not 1 <= nodes < MAX_NODES:
        what = f"more than {MAX_NODES - 1}" if nodes else "no"
        raise ValueError(
            f"tree: got {text}, {what} drafted tokens, expected 1 to {MAX_NODES - 1} (with the pending token at most "
            f"{MAX_NODES} nodes; in branchings every level at least 1)"
        )


class Tree(NamedTuple):
    """A tree of T nodes: parents int32 [T], or [B, T] with one tree per sequence (−1 for node 0); its topology."""

    parents: jax.Array
    topology: Topology


def static_tree(template: TreeTemplate, block: int) -> Tree:
    """The tree of a static template; ``block`` is l, the tokens of a compression block."""
    return Tree(jnp.asarray(template.parents, jnp.int32), topology(template.parents, block))


def grown_tree(parents: jax.Array, depth: int, block: int) -> Tree:
    """The trees of a batch from the parents int32 [B, K] of drafted nodes, at most ``depth`` deep."""
    parents = jnp.pad(parents, ((0, 0), (1, 0)), constant_values=-1)
    return Tree(parents, grown_topology(parents, depth, block))
