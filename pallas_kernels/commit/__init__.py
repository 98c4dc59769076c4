"""Commit of an accepted path: its keys and values into all of a layer's arrays, in place, in one launch."""

from __future__ import annotations

import jax

from pallas_kernels import _check, _dispatch, tuned
from pallas_kernels._dispatch import Implementation
from pallas_kernels.commit import kernel
from pallas_kernels.commit.arguments import Entries as Entries
from pallas_kernels.commit.arguments import Shape as Shape
from pallas_kernels.commit.arguments import check
from pallas_kernels.commit.config import CommitConfig as CommitConfig


def choose(slots: int, head_dim: int, implementation: Implementation | None, interpret: bool = False) -> Implementation:
    """Whether the kernel or the caller's own scatters should commit ``slots`` (M) compression blocks and a path.

    None stands for "pallas" on a GPU for sizes that it takes (or in interpret mode), else "xla".

    Raises:
      UnsupportedError: "pallas" by name, or ``interpret``, where the kernel does not run, with the reason.
      ValueError: an unknown name.
    """
    return _dispatch.choose("commit", implementation, kernel.limit(slots, head_dim), interpret)


def commit(
    layer: Entries,
    new: Entries,
    page_table: jax.Array,
    lengths: jax.Array,
    path: jax.Array,
    count: jax.Array,
    slot: jax.Array,
    *,
    compress_block: int,
    config: CommitConfig | None = None,
    interpret: bool = False,
) -> Entries:
    """Writes a path of new tokens behind each sequence's committed ones, with the compressed entries that it completes.

    Step s of a sequence's path, node ``path[b, s]``, gets position p = L + s. Its key and value go to slot p mod l' of
    the page of block p // l'; into rings at p mod R, where of steps that meet the last stays. If a compression block
    ends at the node, its compressed entry i = (p + 1 − l) // d goes to slot i mod (l'/d) of the page of block
    i // (l'/d). What falls beyond a sequence's pages is dropped. All else keeps its bits; under jit the arrays of
    ``layer`` are updated in place if nothing reads them afterwards.

    Args:
      layer: the cache, of any dtype; see :class:`Entries`. d follows from the shapes.
      new: the new tokens' entries, of that dtype; an array for each of ``layer``'s.
      page_table: int32 [B, N], a page that the sequence alone owns, or P where it owns none.
      lengths: int32 [B], L.
      path: int32 [B, A], nodes 0 … T − 1, of which the first ``count`` int32 [B] are meant (0: nothing is written).
      slot: int32 [B, M], the nodes at which compression blocks end, T where unused.
      compress_block: l.
      config: the tuning parameters; None: those measured on this kind of device (``pallas_kernels.tuned``), or else
        chosen from the sizes.
      interpret: interpret the kernel, on any device.

    Returns:
      ``layer`` with the path written.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
      UnsupportedError: sizes or a device that the kernel does not take, with the reason.
    """
    compress_block = _check.whole("compress_block", compress_block)
    shape = check(layer, new, page_table, lengths, path, count, slot)
    choose(shape.slots, shape.head_dim, "pallas", interpret)
    if shape.batch == 0 or shape.steps == 0:
        return layer
    if config is None and not interpret:
        config = tuned.lookup_commit(_dispatch.device_kind(), shape)
    return kernel.commit(
        layer, new, page_table, lengths, path, count, slot,
        compress_block=compress_block, shape=shape, config=config or CommitConfig.heuristic(shape), interpret=interpret,
    )  # fmt: skip
