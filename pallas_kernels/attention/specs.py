"""Named arguments of the attention kernels: one list drives tests, tuning and benchmarks.

Keys are made such that queries select what the spec wants: query t of a KV head is a unit vector u_t (the same for its
G heads, plus noise), and the compressed keys of a block are the sum of the u_t that select it, plus noise.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.arguments import Layer, Shape, Sparsity, Tail

CHAIN = "chain"


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Arguments of one call.

    Attributes:
      name: what tests and benchmarks call it.
      width: T; lengths: committed tokens of each sequence, −1 for a finished one.
      heads: (Hq, Hkv); dim: D.
      tree: parents of the T nodes, or "chain".
      overlap: of the selected blocks of adjacent queries, the fraction that they share; None: what noise selects.
      recorded: int [texts, heads, queries, blocks], in place of ``overlap``: a query's blocks beside the forced ones,
        in the numbers of another context. Equal numbers become one block, wherever there is room for it.
      pages: table columns; 0: as many as the longest sequence with its tail takes.
      shared_kv: the window branch reads the selected branch's keys and values.
      dtype: of queries, keys and values.
    """

    name: str
    width: int
    lengths: tuple[int, ...]
    heads: tuple[int, int] = (4, 2)
    dim: int = 16
    sparsity: Sparsity = Sparsity(8, 4, 16, 4, window=20, scale=0.25)
    tree: str | tuple[int, ...] = CHAIN
    overlap: float | None = None
    pages: int = 0
    shared_kv: bool = False
    dtype: str = "float32"
    recorded: np.ndarray[Any, Any] | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def shape(self) -> Shape:
        """The call's sizes."""
        page = self.sparsity.select_block
        own = [-(-(max(length, 0) + self.width) // page) for length in self.lengths]
        table = self.pages or max(own)
        pool = sum(min(count, table) for count in own) + 1
        ring = 0 if self.shared_kv else self.sparsity.window
        slots = -(-self.width // self.sparsity.compress_stride) if self.tree == CHAIN else self.width
        return Shape(len(self.lengths), self.width, *self.heads, self.dim, pool, table, slots, ring)

    @property
    def parents(self) -> list[int]:
        """Each node's parent, −1 for the root."""
        return list(range(-1, self.width - 1)) if isinstance(self.tree, str) else list(self.tree)

    def wanted(self, seed: int = 0) -> np.ndarray[Any, Any]:
        """Ids int32 [B, T, Hkv, n] that queries are made to select; adjacent ones share ``overlap`` of theirs."""
        rng, sparsity = np.random.default_rng((seed, 1)), self.sparsity
        ids = np.full((len(self.lengths), self.width, self.heads[1], sparsity.num_selected), -1, np.int32)
        forced_count = sparsity.num_initial + sparsity.num_local
        keep = max(0, round((self.overlap or 0.0) * sparsity.num_selected) - forced_count)
        for b, length in enumerate(self.lengths):
            own = max(length, 0) // sparsity.select_block
            # Blocks that neither end forces, now or within the tail.
            free = np.arange(sparsity.num_initial, own - sparsity.num_local + 1)
            forced = [*range(sparsity.num_initial), *range(own - sparsity.num_local + 1, own + 1)]
            count = sparsity.num_selected - len(forced)
            if len(free) < 2 * count:
                raise ValueError(f"{self.name}: lengths[{b}] = {length}: too short to choose blocks at will")
            for h in range(self.heads[1]):
                if self.recorded is not None:
                    text = self.recorded[(b + seed) % len(self.recorded)]
                    numbers = text[h % len(text), : self.width, :count]
                    unique, place = np.unique(numbers, return_inverse=True)
                    chosen = rng.choice(free, len(unique), replace=False)[place.reshape(numbers.shape)]
                    for t in range(self.width):
                        ids[b, t, h] = np.sort(np.concatenate([forced, chosen[t]]))
                    continue
                chosen = rng.choice(free, count, replace=False)
                for t in range(self.width):
                    if t:
                        kept = rng.choice(chosen, keep, replace=False)
                        others = np.setdiff1d(free, chosen)
                        chosen = np.concatenate([kept, rng.choice(others, count - keep, replace=False)])
                    ids[b, t, h] = np.sort(np.concatenate([forced, chosen]))
        return ids

    def arguments(self, seed: int = 0) -> tuple[Any, ...]:
        """``query, gates, layer, page_table, lengths, tail`` of :func:`pallas_kernels.attention.attend`."""
        rng, shape, sparsity = np.random.default_rng(seed), self.shape, self.sparsity
        batch, width, kv_heads, dim = shape.batch, shape.width, shape.num_kv_heads, shape.head_dim
        dtype, page = jnp.dtype(self.dtype), sparsity.select_block
        keys = iter(jax.random.split(jax.random.key(seed), 32))

        def normal(*dims: int) -> jax.Array:
            if math.prod(dims) < 1 << 20:  # where compiling a generator would take longer than the numbers
                return jnp.asarray(rng.standard_normal(dims, np.float32), dtype)
            return jax.random.normal(next(keys), dims, dtype)

        table = np.full((batch, shape.table), shape.num_pages, np.int32)
        order, used = rng.permutation(shape.num_pages), 0
        for row, length in zip(table, self.lengths, strict=True):
            own = min(-(-(max(length, 0) + width) // page), shape.table)
            row[:own], used = order[used : used + own], used + own

        def pages(entries: int) -> jax.Array:
            # Big pools repeat some pages' values: 2^31 random numbers would take minutes.
            some = normal(min(shape.num_pages, 2048), kv_heads, entries, dim)
            return jnp.take(some, jnp.arange(shape.num_pages) % len(some), axis=0)

        query = normal(batch, width, shape.num_heads, dim)
        layer = Layer(
            pages(page),
            pages(page),
            pages(sparsity.entries_per_page),
            pages(sparsity.entries_per_page) if sparsity.compressed_output else None,
            None if self.shared_kv else normal(batch, kv_heads, shape.ring, dim),
            None if self.shared_kv else normal(batch, kv_heads, shape.ring, dim),
        )
        if self.overlap is not None or self.recorded is not None:
            query, layer = self._planted(table, query, layer, rng, seed)
        depth, ancestor = _tree(self.parents)
        lengths = np.array(self.lengths, np.int32)
        positions = np.maximum(lengths, 0)[:, None] + depth
        ends = ((positions + 1) % sparsity.compress_stride == 0) & (positions + 1 >= sparsity.compress_block)
        slot = np.sort(np.where(ends, np.arange(width), width), axis=1)[:, : shape.slots].astype(np.int32)
        own_kv = (batch, width, kv_heads, dim)
        unused = jnp.asarray(slot == width)[..., None, None]

        def compressed() -> jax.Array:
            return jnp.where(unused, jnp.nan, normal(batch, shape.slots, kv_heads, dim)).astype(dtype)

        tail = Tail(
            jnp.asarray(positions, jnp.int32),
            None if self.tree == CHAIN else jnp.asarray(ancestor[None]),
            jnp.asarray(slot),
            normal(*own_kv), normal(*own_kv),
            None if self.shared_kv else normal(*own_kv), None if self.shared_kv else normal(*own_kv),
            compressed(), compressed() if sparsity.compressed_output else None,
        )  # fmt: skip
        gates = jnp.asarray(rng.random((batch, width, shape.num_heads, 3), np.float32))
        return query, gates, layer, jnp.asarray(table), jnp.asarray(lengths), tail

    def _planted(
        self, table: np.ndarray[Any, Any], query: jax.Array, layer: Layer, rng: np.random.Generator, seed: int
    ) -> tuple[jax.Array, Layer]:
        shape, dtype = self.shape, jnp.dtype(self.dtype)
        directions = np.linalg.qr(rng.standard_normal((shape.head_dim, shape.head_dim)))[0][: shape.width]
        if len(directions) < shape.width:
            raise ValueError(f"{self.name}: more queries than dimensions cannot all point their own way")
        keys, wanted = np.zeros((shape.num_pages, shape.num_kv_heads, shape.head_dim), np.float32), self.wanted(seed)
        for b, h in np.ndindex(shape.batch, shape.num_kv_heads):
            for t, blocks in enumerate(wanted[b, :, h]):
                np.add.at(keys, (table[b, blocks], h), directions[t] * 2.0)
        own = np.repeat(directions, shape.num_heads, axis=0).reshape(shape.width, shape.num_heads, shape.head_dim)
        query = (jnp.asarray(own * 2.0 / self.sparsity.scale) + 0.1 * query.astype(jnp.float32)).astype(dtype)
        noise = 0.02 * layer.compressed_key.astype(jnp.float32)
        return query, layer._replace(compressed_key=(jnp.asarray(keys)[:, :, None] + noise).astype(dtype))

    def abstract(self) -> tuple[Any, ...]:
        """The arguments' shapes and dtypes."""
        # Which blocks queries select is a matter of values, and choosing them takes seconds.
        return jax.eval_shape(dataclasses.replace(self, overlap=None, recorded=None).arguments)


def _tree(parents: list[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    depth, ancestor = np.zeros(len(parents), np.int32), np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents[1:], 1):
        depth[node], ancestor[node] = depth[parent] + 1, ancestor[node] | ancestor[parent]
    return depth, ancestor


def benchmark(
    batch: int, width: int, context: int, heads: tuple[int, int] = (32, 8), overlap: float | None = 0.7
) -> AttentionSpec:
    """A layer of the published defaults (l = 32, d = 16, l' = 64, n = 16, w = 512, D = 128) in bfloat16."""
    name = f"B{batch}-T{width}-H{heads[0]}x{heads[1]}-L{context // 1024}K"
    name += "" if overlap is None else f"-o{round(100 * overlap)}"
    lengths = (context - width,) * batch
    return AttentionSpec(name, width, lengths, heads, 128, Sparsity(), overlap=overlap, dtype="bfloat16")


def _chain(name: str, width: int, *lengths: int, **others: Any) -> AttentionSpec:
    return AttentionSpec(name, width, lengths, **others)


_TREE = (-1, 0, 0, 1, 1, 2, 3, 5)
_WIDE = (-1, *[0] * 9, *range(1, 10), *range(10, 19))
_DEFAULT = Sparsity(32, 16, 64, 8, window=96, scale=0.25)
_IDENTITY_16, _IDENTITY_64 = (
    Sparsity(16, 16, 16, 6, window=24, scale=0.25),
    Sparsity(64, 64, 64, 4, window=70, scale=0.2),
)
TESTS = [
    _chain("decode", 1, 200, 37),
    _chain("chain-8", 8, 211, 37, 128),
    _chain("empty-prefix", 5, 0, 0),
    _chain("one-block-sequences", 3, 1, 7, 8),
    _chain("block-ends", 6, 7, 8, 15, 16, 17, 63),
    _chain("finished-sequence", 4, 150, -1, 90),
    _chain("all-finished", 2, -1, -1),
    _chain("full-capacity", 4, 16 * 12 - 4, pages=12),
    _chain("past-capacity", 9, 16 * 6, pages=6),
    _chain("chain-40", 40, 300, 5),
    _chain("chain-70-beyond-local", 70, 260),
    _chain("chain-128", 128, 150, heads=(2, 1)),
    _chain("chain-512", 512, 300, heads=(2, 1)),
    AttentionSpec("tree", 8, (200, 0, 7), tree=_TREE),
    AttentionSpec("tree-28-wide", 28, (123, 64), tree=_WIDE),
    AttentionSpec("tree-shared-kv", 8, (200, 37), tree=_TREE, shared_kv=True),
    _chain("shared-kv", 5, 140, 33, shared_kv=True),
    _chain("selection-only", 5, 140, 33,
           sparsity=Sparsity(8, 4, 16, 4, window=20, scale=0.25, compressed_output=False)),
    _chain("l32-d16-p64", 7, 700, 65, sparsity=_DEFAULT),
    _chain("l16-d16-p16", 7, 400, 15, sparsity=_IDENTITY_16),
    _chain("l64-d64-p64", 7, 700, 63, sparsity=_IDENTITY_64),
    _chain("l32-d32-p64", 7, 700, 63, sparsity=Sparsity(32, 32, 64, 6, window=70, scale=0.2)),
    _chain("G1", 8, 200, heads=(2, 2)),
    _chain("G16", 3, 200, heads=(32, 2)),
    _chain("G3", 5, 200, heads=(6, 2)),
    _chain("G4", 5, 200, heads=(8, 2)),
    _chain("D24", 4, 200, dim=24),
    _chain("D8-bf16", 4, 200, dim=8, dtype="bfloat16"),
    _chain("D64-bf16", 8, 200, 61, dim=64, dtype="bfloat16"),
    _chain("D128-bf16", 6, 700, dim=128, sparsity=_DEFAULT, dtype="bfloat16"),
    *[
        _chain(f"overlap-{round(100 * overlap)}", 8, 1200, overlap=overlap,
               sparsity=Sparsity(8, 4, 16, 16, window=20, scale=0.25))
        for overlap in (0.5, 0.7, 0.9)
    ],
]  # fmt: skip
BENCHMARKS = [
    benchmark(batch, width, context, heads)
    for heads in ((32, 8), (64, 4))
    for context in (16384, 65536)
    for batch in (1, 8, 32)
    for width in (1, 4, 8, 16, 64)
] + [benchmark(1, 512, 65536, overlap=None)]  # a chunk of a prompt, of more queries than have a direction each
