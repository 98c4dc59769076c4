"""Named arguments of ``commit``: one list for the tests, one for benchmarks and tuning."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.commit.arguments import Entries, Shape


@dataclasses.dataclass(frozen=True)
class CommitSpec:
    """Arguments of one call.

    Attributes:
      name: what is special about it.
      lengths, counts: L of each sequence, and how many steps of its path are committed.
      width: T; tree: a random one, of which a random path is taken, instead of a chain.
      steps: A; 0: T.
      table: page-table columns; owned: how many of them each sequence has pages for, None: all.
      rings: R and R'; R' = 0: the window has no keys and values of its own.
      compressed_output: False: no compressed and raw values.
      block, stride, page: l, d, l'.
    """

    name: str
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    width: int = 6
    tree: bool = False
    steps: int = 0
    heads: int = 2
    dim: int = 16
    table: int = 4
    owned: tuple[int, ...] | None = None
    rings: tuple[int, int] = (9, 21)
    compressed_output: bool = True
    block: int = 8
    stride: int = 4
    page: int = 16
    dtype: str = "float32"

    @property
    def shape(self) -> Shape:
        """The call's sizes."""
        slots = self.width if self.tree else -(-self.width // self.stride)
        return Shape(len(self.lengths), self.steps or self.width, slots, self.heads, self.dim)

    @property
    def bytes(self) -> int:
        """What the operation has to move: every committed entry read and written once."""
        kinds = 2 if self.compressed_output else 1
        tokens = sum(self.counts) * (2 + kinds + 2 * (self.rings[1] > 0))
        blocks = sum(max(0, (length - self.block) // self.stride + 1) for length in np.add(self.lengths, self.counts))
        blocks -= sum(max(0, (length - self.block) // self.stride + 1) for length in self.lengths)
        return 2 * (tokens + kinds * blocks) * self.heads * self.dim * jnp.dtype(self.dtype).itemsize

    def abstract(self) -> tuple[Any, ...]:
        """Shapes and dtypes of the array arguments."""
        shape, dtype = self.shape, jnp.dtype(self.dtype)
        pages, lead = shape.batch * self.table + 1, (shape.batch, self.heads)

        def entries(page: tuple[int, ...], compressed: tuple[int, ...], raw: Any, near: Any) -> Entries:
            def pair(dims: tuple[int, ...], values: bool = True) -> list[Any]:
                array = jax.ShapeDtypeStruct((*dims, self.dim), dtype)
                return [array, array if values else None]

            window = pair(near) if self.rings[1] else [None, None]
            return Entries(*pair(page), *pair(compressed, self.compressed_output),
                           *pair(raw, self.compressed_output), *window)  # fmt: skip

        def integers(*dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((shape.batch, *dims), jnp.int32)

        token, pool = (shape.batch, self.width, self.heads), (pages, self.heads)
        raw, near = ((*lead, size) for size in self.rings)
        return (
            entries((*pool, self.page), (*pool, self.page // self.stride), raw, near),
            entries(token, (shape.batch, shape.slots, self.heads), token, token),
            integers(self.table), integers(), integers(shape.steps), integers(), integers(shape.slots),
        )  # fmt: skip

    def arguments(self, seed: int = 0) -> tuple[Any, ...]:
        """``layer, new, page_table, lengths, path, count, slot`` in NumPy; entries are random bits, NaN among them."""
        rng, shape = np.random.default_rng(seed), self.shape
        layer, new = jax.tree.map(lambda leaf: _random_bits(rng, leaf), self.abstract()[:2])
        pages = len(layer.key)
        table = rng.permutation(pages)[: pages - 1].reshape(shape.batch, self.table).astype(np.int32)
        for row, owned in zip(table, self.owned or (), strict=False):
            row[owned:] = pages
        path = np.zeros((shape.batch, shape.steps), np.int32)
        slot = np.full((shape.batch, self.width), self.width, np.int32)
        for b, length in enumerate(self.lengths):
            parents = [-1] + [int(rng.integers(node)) if self.tree else node - 1 for node in range(1, self.width)]
            depth = [0] * self.width
            for node in range(1, self.width):
                depth[node] = depth[parents[node]] + 1
            nodes = [max(range(self.width), key=depth.__getitem__)]
            while parents[nodes[0]] >= 0:
                nodes.insert(0, parents[nodes[0]])
            nodes = nodes[: shape.steps]
            if len(nodes) < self.counts[b]:
                raise ValueError(f"{self.name}: counts[{b}]: got {self.counts[b]}, expected at most {len(nodes)}")
            path[b, : len(nodes)] = nodes
            after = length + 1 + np.array(depth)
            ends = np.flatnonzero((after % self.stride == 0) & (after >= self.block))
            slot[b, : len(ends)] = ends
        lengths, count = np.array((self.lengths, self.counts), np.int32)
        return layer, new, table, lengths, path, count, slot[:, : shape.slots]

    def rotated(self, count: int) -> tuple[Entries, Any, list[tuple[Any, ...]]]:
        """``layer``, ``page_table``, and ``count`` times ``new, lengths, path, count, slot``, each at other lengths: a
        loop's commits then go to different pages."""
        rng, found = np.random.default_rng(0), []
        for seed in range(count):
            lengths = rng.integers(self.block, self.table * self.page - self.width, len(self.lengths))
            # One cache, which may have gigabytes, is enough.
            sizes: dict[str, Any] = {"lengths": tuple(lengths.tolist())} | ({"table": 1} if seed else {})
            found.append(dataclasses.replace(self, **sizes).arguments(seed))
        return found[0][0], found[0][2], [(new, *others) for _, new, _, *others in found]


def _random_bits(rng: np.random.Generator, leaf: jax.ShapeDtypeStruct) -> np.ndarray[Any, Any]:
    bits = rng.integers(0, 256, (*leaf.shape, leaf.dtype.itemsize), np.uint8)
    values = bits.view(leaf.dtype)[..., 0]
    # One NaN of them all: on CPUs XLA moves bfloat16 through float32, which keeps no others.
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(values), np.array(np.nan, leaf.dtype), values)


TESTS = [
    CommitSpec("decode", (19, 30), (1, 1), width=1),
    CommitSpec("chain", (13, 5, 31), (6, 3, 5)),
    CommitSpec("finished-sequence", (13, 40, 7), (4, 0, 6)),
    CommitSpec("nothing-accepted", (13, 40), (0, 0)),
    CommitSpec("empty-cache", (0, 0), (6, 1)),
    CommitSpec("across-pages", (15, 14, 30), (6, 6, 6)),
    CommitSpec("tree", (21, 10, 5), (3, 2, 0), width=13, tree=True),
    CommitSpec("tree-path-of-four", (21, 11), (3, 4), width=20, tree=True, steps=4),
    CommitSpec("rings-wrap", (17, 41, 8), (6, 4, 6), rings=(4, 5)),
    CommitSpec("path-longer-than-the-rings", (3, 30), (20, 17), width=20, rings=(7, 13)),
    CommitSpec("rings-of-one", (3, 30), (6, 0), rings=(1, 1)),
    CommitSpec("past-the-table", (62, 40), (6, 6)),
    CommitSpec("past-the-pages", (14, 31, 30), (6, 6, 6), owned=(1, 2, 4)),
    CommitSpec("no-pages", (0, 4), (6, 6), owned=(0, 0)),
    CommitSpec("shared-kv", (13, 26), (6, 5), rings=(9, 0)),
    CommitSpec("selection-only", (13, 26), (6, 5), compressed_output=False),
    CommitSpec("shared-kv-selection-only", (13, 26), (6, 5), rings=(9, 0), compressed_output=False, dtype="bfloat16"),
    CommitSpec("odd-heads-and-dim", (13, 26), (6, 5), heads=3, dim=24),
    CommitSpec("one-block-a-page", (13, 40), (6, 5), block=16, stride=16),
    CommitSpec("bfloat16", (13, 5, 31), (6, 3, 5), dtype="bfloat16"),
    CommitSpec("tree-bfloat16", (21, 10, 5), (3, 2, 0), width=13, tree=True, dtype="bfloat16", dim=64),
    CommitSpec("chunk", (15, 0), (50, 37), width=50, table=5),
    CommitSpec("paper-sizes", (510, 64), (8, 3), width=8, heads=2, dim=128, table=9, rings=(32, 512), block=32,
               stride=16, page=64, dtype="bfloat16"),
]  # fmt: skip

# 8 KV heads of 128, 4K tokens of room, all steps committed.
BENCHMARKS = [
    CommitSpec(f"B{batch}-A{steps}", tuple(1024 + 61 * b for b in range(batch)), (steps,) * batch, width=steps, heads=8,
               dim=128, table=64, rings=(32, 512), block=32, stride=16, page=64, dtype="bfloat16")
    for batch in (1, 8, 32)
    for steps in (1, 8, 16)
]  # fmt: skip
