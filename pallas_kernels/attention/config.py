"""Tuning parameters of the attention kernels."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from pallas_kernels import _check
from pallas_kernels.attention.arguments import Shape, Sparsity

GroupMode = Literal["merged", "shared"]
_MOST_SELECTION_WARPS = 16
# Values and warps of a merge's program worth measuring: others have 16 values a thread, or half or twice as many.
_MERGES = (1024, 2), (1024, 4), (2048, 2), (4096, 4), (4096, 8)


@dataclasses.dataclass(frozen=True)
class Branch:
    """How one branch is spread over programs.

    Attributes:
      rows: most rows (queries × G) that a program holds; a power of two, at least 16.
      splits: programs that share a row tile's keys, the last of several taking the tail; their partial softmaxes are
        merged later.
    """

    rows: int
    splits: int

    def __post_init__(self) -> None:
        _check.whole_fields(self, "rows", least=16, power_of_two=True)
        _check.whole_fields(self, "splits")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """How a layer is mapped to the GPU.

    Attributes:
      group: C, adjacent queries whose selected blocks are loaded once for all; 1: every query loads its own.
      mode: ``merged``: a query attends to exactly the blocks that it selected; ``shared``: to those of the group's
        query with the longest prefix (approximate).
      compressed, selected, window: the branches.
      tile: keys that a program loads at a time, a power of two.
      num_stages: of Triton's pipeline, in the launch with scores; every two stages keep one more tile in flight,
        because a tile's page is looked up before. Of other launches: ``Launch.num_stages``.
      warp_rows: of the branches' kernels, rows for which a program has a warp, a power of two; a program has at most 8.
      selection_warps: of the selection.
      merge_values, merge_warps: of the merge, what a program holds of a branch's splits at a time, a power of two, and
        its warps. Few, since many small programs hide latency.
    """

    group: int
    compressed: Branch
    selected: Branch
    window: Branch
    mode: GroupMode = "merged"
    tile: int = 32
    num_stages: int = 3
    warp_rows: int = 16
    selection_warps: int = 4
    merge_values: int = 2048
    merge_warps: int = 4

    # Fields that depend on each other, for tuning: one such axis after the other.
    AXES: ClassVar = (("compressed",), ("selected",), ("window",), ("tile", "num_stages"), ("warp_rows",),
                      ("selection_warps",), ("merge_values", "merge_warps"))  # fmt: skip

    def __post_init__(self) -> None:
        _check.whole_fields(self, "group", "num_stages")
        _check.whole_fields(self, "warp_rows", most=128, power_of_two=True)
        _check.whole_fields(self, "tile", "merge_values", least=16, power_of_two=True)
        _check.warps(self, "selection_warps", "merge_warps")
        if self.mode not in ("merged", "shared"):
            raise ValueError(f"mode: got {self.mode!r}, expected 'merged' or 'shared'")
        for name in ("compressed", "selected", "window"):
            if not isinstance(branch := getattr(self, name), Branch):
                raise ValueError(f"{name}: got {branch!r}, expected a Branch")

    @classmethod
    def heuristic(
        cls, sparsity: Sparsity, shape: Shape, group: int | None = None, mode: GroupMode = "merged",
        dtype: Any = "bfloat16",
    ) -> AttentionConfig:  # fmt: skip
        """The config for a call of this shape; ``group`` None: chosen too. ``dtype``: of queries, keys and values.

        About three programs for each of some 132 multiprocessors, no more: splits cost merging, and a second wave of
        programs would wait for the first. Products of float32 are no tensor core's: a thread holds whole rows of both
        factors. Tiles of 32 keys and a warp for 16 rows spilled 0.5 to 0.7 KB a thread at D = 64 and 1.9 to 2.9 at 128;
        with 16 keys, and 4 rows a warp, 0.4 at most.
        """
        every = shape.batch * shape.num_kv_heads
        if group is None:
            # As many rows as one product takes, but for small batches and long drafts fewer queries: a larger union has
            # more blocks of one query alone. Where queries alone keep the device busy, or fill a product's 16 rows by
            # themselves, it costs more than it saves.
            most = min(16 if shape.width <= 16 and every >= 128 else 8, max(1, 64 // shape.lanes))
            few = every * shape.width <= (max(128, 16 * shape.lanes) if shape.width <= 16 else 64)
            group = 1 if few else most
        group = min(_check.whole("group", group), shape.width)
        rows = _power(shape.rows, 16, 64)
        tiles = -(-shape.rows // rows)
        entries = -(-shape.table * sparsity.entries_per_page // 64)
        own_rows = _power(group * shape.lanes, 16, 64)
        groups = -(-shape.width // group) * -(-group * shape.lanes // own_rows)
        blocks = min(group * sparsity.num_selected, shape.table)
        near = -(-(shape.ring or sparsity.window) // 128)
        # Long walks over the cache like long steps; short ones, of many splits, want their first keys soon: measured at
        # up to 128 row tiles and from 256 on. The window is short beside the cache, so its programs come on top.
        long, full = every * tiles >= 200, jnp.dtype(dtype) == jnp.float32
        return cls(
            group=group,
            mode=mode,
            compressed=Branch(rows, _splits(every * tiles, entries)),
            selected=Branch(own_rows, _splits(every * groups, blocks * 2 // 3)),
            window=Branch(rows, _splits(every * tiles, near, programs=256)),
            tile=16 if full else 64 if long else 32,
            num_stages=3 if long else 5,
            warp_rows=4 if full else 16,
            selection_warps=selection_warps(shape),
        )

    @classmethod
    def search_space(
        cls, sparsity: Sparsity, shape: Shape, group: int | None = None, mode: GroupMode = "merged",
        dtype: Any = "bfloat16",
    ) -> list[AttentionConfig]:  # fmt: skip
        """The configs worth measuring for that shape: the heuristic's, and those that differ from it along one axis."""
        base = cls.heuristic(sparsity, shape, group, mode, dtype)

        def around(branch: Branch, factors: tuple[float, ...] = (1, 0.5, 2)) -> list[Branch]:
            # Twice the rows may pay though half stay empty: from 64 on, Hopper's larger matrix instruction takes them.
            rows = [rows for factor in factors if 16 <= (rows := int(branch.rows * factor)) <= 128]
            splits = [max(1, int(branch.splits * factor)) for factor in (1, 0.5, 2)]
            return [Branch(*choice) for choice in itertools.product(rows, splits)]

        changes: list[dict[str, Any]] = [{}]
        changes += [{"compressed": branch} for branch in around(base.compressed)]
        changes += [{"selected": branch} for branch in around(base.selected)]
        # Of the window, which is short, the splits alone.
        changes += [{"window": branch} for branch in around(base.window, (1,))]
        changes += [{"tile": tile, "num_stages": stages} for tile in (base.tile, 32, 64, 128) for stages in (3, 4, 5)]
        warps = base.selection_warps // 2, base.selection_warps * 2
        changes += [{"warp_rows": rows} for rows in (base.warp_rows // 2, base.warp_rows * 2)]
        changes += [{"selection_warps": count} for count in warps if 1 <= count <= _MOST_SELECTION_WARPS]
        changes += [{"merge_values": values, "merge_warps": count} for values, count in _MERGES]
        return list(dict.fromkeys(dataclasses.replace(base, **change) for change in changes))


def selection_warps(shape: Shape) -> int:
    """Warps of the selection: so many that a thread holds at most 64 of the scores of a query's heads."""
    return _power(shape.lanes * shape.table // 2048, 4, _MOST_SELECTION_WARPS)


def _power(value: int, low: int, high: int) -> int:
    return min(high, max(low, 1 << (value - 1).bit_length()))


def _splits(programs_without: int, steps: int, programs: int = 400) -> int:
    """Splits of ``steps`` tiles that ``programs_without`` programs would take without splits; one is for the tail."""
    return max(1, min(steps, 31, round(programs / programs_without))) + 1
