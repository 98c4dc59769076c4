"""Prompt lookup: the continuations of the longest n-grams that ended the text before and end it now.

After Saxena's prompt lookup decoding and arXiv 2304.04487; over prompt and output, on the device. A chain continues
the best match; a tree merges the continuations of several.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specsa_jax.drafting.base import Context, Draft, Drafter, top
from specsa_jax.drafting.tree import TreeTemplate

# So many pairs of a place and an end are in a text that goes round, where the longest matches are not far back; and an
# odd factor by whose powers n-grams are named.
_MANY, _NEAR, _FACTOR = 1 << 16, 1024, np.uint64(0x9E3779B97F4A7C15)
# Of a token's weight, this much stays per step down: a continuation is less sure the longer it goes on.
_DECAY = 0.9


@dataclasses.dataclass(frozen=True)
class PromptLookup(Drafter):
    """Attributes:
    max_ngram: longest suffix that is compared; longer matches count as this long.
    min_ngram: shortest match that gives a draft.
    matches: at most so many matches are merged into a tree.
    """

    name = "lookup"

    max_ngram: int = 8
    min_ngram: int = 2
    matches: int = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"PromptLookup: got {field.name} {value!r}, expected an integer")
        if not 1 <= self.min_ngram <= self.max_ngram <= 64:
            raise ValueError(
                f"PromptLookup: got min_ngram {self.min_ngram} and max_ngram {self.max_ngram}, "
                "expected 1 <= min_ngram <= max_ngram <= 64"
            )
        if not 1 <= self.matches <= 64:
            raise ValueError(f"PromptLookup: got matches {self.matches}, expected 1 to 64")

    def replay(self, text: np.ndarray, known: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(known)
        # Of a text that is shorter than the n-gram its first token again: no match ends before so early a place.
        suffix = [text[np.maximum(known - back, 0)] for back in range(1, self.min_ngram + 1)]
        least, size = min(self.min_ngram, len(text)), text.max() + 1
        ends = np.zeros(0, int)  # behind n-grams that some match may be: few
        for back, tokens in enumerate(suffix, 1):
            wanted = np.zeros(size, bool)
            wanted[tokens] = True
            if back == 1:  # over all of the text, so without an index of all its places
                ends = least + np.flatnonzero(wanted[text[least - 1 : -1]])
            else:
                ends = ends[wanted[text[ends - back]]]
        latest = np.zeros(count, np.int64)  # behind the best match, 0 without one
        if count * len(ends) > _MANY:
            latest = self._longest(text, known, ends[ends > known.min() - _NEAR])
        left = np.flatnonzero(latest == 0)
        same = np.ones((len(left), len(ends)), bool)
        for back, tokens in enumerate(suffix, 1):
            same &= text[ends - back] == tokens[left, None]
        place, match = np.nonzero(same & (ends < known[left, None]))
        place, end = left[place], ends[match]
        latest[place] = end  # of several of one place the last holds; then those that match for longer
        for back in range(self.min_ngram + 1, self.max_ngram + 1):
            longer = (end >= back) & (text[end - back] == text[known[place] - back])
            place, end = place[longer], end[longer]
            latest[place] = end
        source = latest[:, None] + np.arange(depth) % np.maximum(known - latest, 1)[:, None]
        chains = text[np.minimum(source, len(text) - 1)]
        return chains, np.broadcast_to(latest[:, None] > 0, chains.shape)

    def _longest(self, text: np.ndarray, known: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """int64 [N]: of ``ends`` the last before each place of ``known`` behind an n-gram as long as any is compared, 0
        without one. Sorted, so that no pair is looked at by itself."""
        size, backs = len(text) + 1, np.arange(1, self.max_ngram + 1)
        ends, long = ends[ends >= self.max_ngram], known >= self.max_ngram
        factors = np.cumprod(np.full(self.max_ngram, _FACTOR))

        def names(places: np.ndarray) -> np.ndarray:
            return (text[np.maximum(places[:, None] - backs, 0)].astype(np.uint64) * factors).sum(axis=1)

        wanted, group = np.unique(names(known), return_inverse=True)
        found = names(ends)
        at = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
        hit = wanted[at] == found
        at, ends = at[hit], ends[hit]
        order = np.argsort(at, kind="stable")
        ranked = np.concatenate([[-1], at[order] * size + ends[order]])
        before = ranked[np.searchsorted(ranked, group * size + known) - 1]
        latest = np.where(long & (before // size == group), before % size, 0)
        # Two n-grams may have one name.
        same = text[np.maximum(latest[:, None] - backs, 0)] == text[np.maximum(known[:, None] - backs, 0)]
        return np.where(same.all(axis=1), latest, 0)

    def propose(self, params: Any, state: Any, context: Context, template: TreeTemplate) -> Draft:
        """The longest match wins, then the most recent; a match that overlaps the end continues periodically.

        Costs ``max_ngram`` comparisons over the buffer int32 [B, S].
        """
        count = 1 if template.is_chain else self.matches
        tokens, length = self.continuations(context.tokens, context.known, count, template.depth)
        if template.is_chain:
            return Draft(tokens[:, 0], jnp.broadcast_to(length > 0, tokens[:, 0].shape))
        weight = jnp.where(length > 0, jnp.exp2(length.astype(jnp.float32)), 0.0)
        return (_fill if template.is_static else _merge)(tokens, weight, template)

    def continuations(
        self, tokens: jax.Array, known: jax.Array, count: int, length: int
    ) -> tuple[jax.Array, jax.Array]:
        """Continuations int32 [B, count, length] of the best matches, best first, and the lengths of these, int32
        [B, count]; 0 where there is no match of at least ``min_ngram`` tokens."""
        batch, size = tokens.shape
        end = jnp.arange(size, dtype=jnp.int32)[None]  # a candidate: the n-gram that ends just before ``end``
        inside = (end >= 1) & (end < known[:, None])
        alive, match = inside, jnp.zeros((batch, size), jnp.int32)
        for back in range(1, self.max_ngram + 1):
            suffix = jnp.take_along_axis(tokens, jnp.maximum(known[:, None] - back, 0), axis=1)
            shifted = jnp.pad(tokens, ((0, 0), (back, 0)))[:, :size]
            alive &= (shifted == suffix) & (end >= back)
            match += alive
        found, ends = [], []
        left = jnp.where(inside, match, -1)
        for _ in range(count):
            best = jnp.max(left, axis=1)
            latest = jnp.max(jnp.where((left == best[:, None]) & inside, end, 0), axis=1)
            found.append(jnp.where(best >= self.min_ngram, best, 0))
            ends.append(latest)
            left = jnp.where(end == latest[:, None], -1, left)
        latest = jnp.stack(ends, axis=1)
        period = jnp.maximum(known[:, None] - latest, 1)
        source = latest[..., None] + jnp.arange(length, dtype=jnp.int32) % period[..., None]
        taken = jnp.take_along_axis(tokens[:, None], jnp.clip(source, 0, size - 1), axis=2)
        return taken, jnp.stack(found, axis=1)


def _same_prefix(tokens: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which continuations [B, M, D] begin alike, bool [B, D, M, M]; and at which a node is new, bool [B, D, M]."""
    step = jnp.moveaxis(tokens, 2, 1)
    same = jnp.cumprod(step[..., :, None] == step[..., None, :], axis=1, dtype=jnp.int32) > 0
    same &= (weight > 0)[:, None, None, :] & (weight > 0)[:, None, :, None]
    order = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    earlier = (same & (order[None, :] < order[:, None])).any(axis=-1)
    return same, ~earlier & (weight > 0)[:, None, :]


def _merge(tokens: jax.Array, weight: jax.Array, template: TreeTemplate) -> Draft:
    """The K heaviest nodes of the trie of continuations int32 [B, M, D] with ``weight`` float32 [B, M].

    A node weighs what the continuations through it weigh, less the deeper it lies: never more than its parent.
    """
    batch, count, depth = tokens.shape
    same, new = _same_prefix(tokens, weight)
    decay = _DECAY ** jnp.arange(depth, dtype=jnp.float32)
    mass = jnp.einsum("bdmn,bn->bdm", same.astype(jnp.float32), weight) * decay[:, None]
    mass = jnp.where(new, mass, 0.0).reshape(batch, -1)  # by depth, then continuation: parents first
    room = max(0, template.nodes - mass.shape[1])
    mass = jnp.pad(mass, ((0, 0), (0, room)))
    heaviest, chosen = top(mass, template.nodes)
    chosen = jnp.sort(jnp.where(heaviest > 0, chosen, mass.shape[1]), axis=1)
    valid = chosen < mass.shape[1]
    taken = jnp.minimum(chosen, depth * count - 1)
    flat = jnp.moveaxis(tokens, 2, 1).reshape(batch, -1)
    # The parent: the node of the first continuation that began alike, one step up.
    first = jnp.argmax(same, axis=-1).astype(jnp.int32)  # [B, D, M]
    above = jnp.pad(first[:, :-1] + jnp.arange(depth - 1, dtype=jnp.int32)[:, None] * count, ((0, 0), (1, 0), (0, 0)),
                    constant_values=-1).reshape(batch, -1)  # fmt: skip
    parent_key = jnp.take_along_axis(above, taken, axis=1)
    parents = 1 + jnp.argmax(chosen[:, None, :] == parent_key[..., None], axis=-1).astype(jnp.int32)
    parents = jnp.where((parent_key >= 0) & valid, parents, 0)
    return Draft(jnp.take_along_axis(flat, taken, axis=1), valid, parents)


def _fill(tokens: jax.Array, weight: jax.Array, template: TreeTemplate) -> Draft:
    """Continuations int32 [B, M, D] in a template's places: of the children of a node the first found come first."""
    batch, count, depth = tokens.shape
    same, new = _same_prefix(tokens, weight)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    room = template.nodes + 1
    child = jnp.pad(jnp.asarray(template.child), ((0, 1), (0, 0)), constant_values=room)
    place = jnp.where(weight > 0, 0, room)  # the node in the template at which each continuation has arrived, [B, M]
    draft, valid = jnp.zeros((batch, room), jnp.int32), jnp.zeros((batch, room), bool)
    order = jnp.arange(count, dtype=jnp.int32)
    for step in range(depth):
        # A new node's number among its siblings: the new ones before it at the same parent.
        siblings = (place[:, :, None] == place[:, None, :]) & new[:, step, None, :] & (order[None, :] < order[:, None])
        rank = siblings.sum(axis=-1, dtype=jnp.int32)
        first = jnp.argmax(same[:, step], axis=-1)  # the continuation whose node this one shares
        rank = jnp.take_along_axis(rank, first, axis=1)
        fits = (place < room) & (rank < child.shape[1])
        place = jnp.where(fits, child[jnp.minimum(place, room), jnp.minimum(rank, child.shape[1] - 1)], room)
        draft = draft.at[rows, place].set(tokens[:, :, step], mode="drop")
        valid = valid.at[rows, place].set(True, mode="drop")
    return Draft(draft[:, 1:], valid[:, 1:])
