"""What one launch of the branches' kernel computes, and how it is laid out."""

from __future__ import annotations

import dataclasses

from pallas_kernels._call import padded
from pallas_kernels.attention.arguments import Shape, Sparsity
from pallas_kernels.attention.config import AttentionConfig, Branch

# Of sm_90's 227 KB a program, without what layouts meet in.
_SHARED_BYTES = 216 * 1024
# Of an H100 and an H200; and warps of the branches' kernels that one of them holds, of 255 registers a thread, and
# programs at most.
_MULTIPROCESSORS, _WARPS, _PROGRAMS = 132, 8, 6


@dataclasses.dataclass(frozen=True)
class Launch:
    """Which branches a launch computes, as (branch index, how it is split), and whether it scores blocks."""

    sparsity: Sparsity
    shape: Shape
    config: AttentionConfig
    branches: tuple[int, ...]
    scored: bool = False
    interpret: bool = False
    deterministic: bool = False
    present: int | None = None  # of T nodes, those that are no padding; None: all

    def branch(self, index: int) -> Branch:
        """The split of the compressed (0), the selected (1) or the window branch (2)."""
        return (self.config.compressed, self.config.selected, self.config.window)[index]

    def row_tiles(self, index: int) -> int:
        """Row tiles of a (sequence, KV head); those of the selected branch do not cross groups."""
        rows = self.branch(index).rows
        if self.deterministic:
            return self.nodes
        if index == 1:
            return self.groups * -(-self.config.group * self.shape.lanes // rows)
        return -(-self.shape.rows // rows)

    @property
    def nodes(self) -> int:
        """Nodes that grids go over. They are in no kernel's code, where T is."""
        return self.shape.width if self.present is None else self.present

    @property
    def groups(self) -> int:
        return -(-self.shape.width // self.config.group)

    def in_one_wave(self) -> Launch:
        """The launch, with fewer splits of the selected branch where not quite all programs run at the same time: the
        rest would take as long again (measured at one sequence). Where there are twice as many, it is as it is."""
        if self.branches == (1,) or 1 not in self.branches:
            return self
        wave = _MULTIPROCESSORS * max(1, min(_PROGRAMS, _WARPS // self.num_warps))
        lead = self.shape.batch * self.shape.num_kv_heads
        programs = {index: lead * self.row_tiles(index) * self.branch(index).splits for index in self.branches}
        total = sum(programs.values())
        splits = (wave - total + programs[1]) // (lead * self.row_tiles(1))
        if not (wave < total < 2 * wave and splits >= 2):
            return self
        selected = dataclasses.replace(self.config.selected, splits=splits)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, selected=selected))

    @property
    def segments(self) -> list[tuple[int, int, int]]:
        """(branch, first split, splits) in the launch's partial outputs."""
        found, first = [], 0
        for index in self.branches:
            found.append((index, first, self.branch(index).splits))
            first += self.branch(index).splits
        return found

    @property
    def splits(self) -> int:
        return sum(count for _, _, count in self.segments)

    @property
    def page_tile(self) -> int:
        """Pages whose compressed entries make a tile."""
        return max(1, self.config.tile // self.sparsity.entries_per_page)

    @property
    def entry_tile(self) -> int:
        return self.page_tile * self.sparsity.entries_per_page

    @property
    def page_run(self) -> int:
        """Adjacent pages of a tile whose entries one thread holds, where the tile is spread so (see ``scores``)."""
        return self.page_tile // 4 if self.page_tile % 4 == 0 and self.sparsity.entries_per_page % 2 == 0 else 1

    @property
    def near_tile(self) -> int:
        """Keys of a tile whose place needs no looking up (rings, the tail).

        With scores Triton keeps ``num_stages − 1`` of these in flight, but half as many of those that a page table
        places: the looking up takes the other stages. Half as long, they take the same shared memory.
        """
        return max(16, self.config.tile // 2)

    @property
    def blocks(self) -> int:
        """Blocks for which a row of scores has room: whole tiles, the block after the last, and whole vector loads."""
        unit = max(32, self.page_tile)
        table = -(-self.shape.table // self.page_tile) * self.page_tile
        if self.deterministic:  # the tail's entries too
            table += self.page_tile * (-(-self.shape.width // (self.sparsity.select_block * self.page_tile)) + 1)
        return -(-(table + 1) // unit) * unit

    @property
    def identity(self) -> bool:
        """Whether each compression block is one selection block (l = l' = d): its score is the block's."""
        return self.sparsity.compress_block == self.sparsity.select_block == self.sparsity.compress_stride

    @property
    def num_warps(self) -> int:
        return max(1, min(8, max(self.branch(index).rows for index in self.branches) // self.config.warp_rows))

    def num_stages(self, itemsize: int) -> int:
        """Of Triton's pipeline, as ``AttentionConfig.num_stages`` says for the launch with scores.

        In others pages are looked up a step ahead (``tiles.walk``) and take no stages: half of them keep as many tiles
        in flight. 64 rows, for which a tile of 64 keys is work enough, take one more, where there is room for it.
        """
        stages = self.config.num_stages
        if self.scored or self.deterministic:
            return stages
        rows = max(self.branch(index).rows for index in self.branches)
        row = padded(self.shape.head_dim) * itemsize
        room = (_SHARED_BYTES - rows * row) // (2 * self.config.tile * row)
        return max(2, min((stages + 1) // 2 + (rows >= 64 and self.config.tile >= 64), room))

    @property
    def mask_words(self) -> int:
        return -(-self.config.group // 32)

    @property
    def workspace(self) -> int:
        """Words per (sequence, KV head) that the selection wants zeroed: who owns which block, and who has arrived.

        Per group, ``mask_words`` rows of the table's N blocks and one that nobody reads; then one counter per group.
        """
        return self.groups * (self.mask_words * (self.shape.table + 1) + 1) if self.config.group > 1 else 0
