"""Native sparse attention of T new tokens per sequence against a paged cache: decoding, verification, prefill."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _check, _dispatch, tuned
from pallas_kernels.attention import branches, merge, selection
from pallas_kernels.attention.arguments import Layer as Layer
from pallas_kernels.attention.arguments import Selection as Selection
from pallas_kernels.attention.arguments import Shape as Shape
from pallas_kernels.attention.arguments import Sparsity as Sparsity
from pallas_kernels.attention.arguments import Tail as Tail
from pallas_kernels.attention.arguments import check
from pallas_kernels.attention.config import AttentionConfig as AttentionConfig
from pallas_kernels.attention.config import Branch as Branch
from pallas_kernels.attention.config import GroupMode as GroupMode
from pallas_kernels.attention.deterministic import config_for, pad
from pallas_kernels.attention.launch import Launch as Launch
from pallas_kernels.selection import kernel as selection_kernel

MAX_GROUP, MAX_HEAD_DIM = 128, 256
# (Sequence, KV head) pairs from which on a reuse layer's launches are those of many.
_MANY = 64


def limit(sparsity: Sparsity, shape: Shape, group: int | None = None) -> str | None:
    """Why the kernels do not take these sizes; None if they do."""
    blocks = shape.table + -(-shape.width // sparsity.select_block) + 1
    if shape.group > 16:
        return f"query: got {shape.group} heads per KV head, expected at most 16"
    if shape.head_dim > MAX_HEAD_DIM:
        return f"query: got head dim {shape.head_dim}, expected at most {MAX_HEAD_DIM}"
    if sparsity.select_block & (sparsity.select_block - 1) or sparsity.entries_per_page & (
        sparsity.entries_per_page - 1
    ):
        return (
            f"sparsity: got l' = {sparsity.select_block} and d = {sparsity.compress_stride}, expected l' and l'/d to "
            "be powers of two, as the sizes of all tensors in a Triton kernel"
        )
    if not 16 <= sparsity.select_block <= 128:
        return f"sparsity: got l' = {sparsity.select_block}, expected 16 to 128: the keys of one matrix product"
    if group is not None and group > MAX_GROUP:
        return f"group: got {group}, expected at most {MAX_GROUP}"
    return selection_kernel.limit(blocks, sparsity.num_selected)


def configure(
    sparsity: Sparsity, shape: Shape, group: int | None = None, mode: GroupMode = "merged", interpret: bool = False,
    dtype: Any = "bfloat16",
) -> AttentionConfig:  # fmt: skip
    """The tuning parameters of a call of :func:`attend`: measured on this kind of device, or else the heuristic's.

    Args:
      group: C; None: chosen too.
      mode: of groups; shared ones are not measured.
      interpret: the heuristic's.
      dtype: of queries, keys and values.

    Raises TuningError for a data file that is broken.
    """
    found = None
    if mode == "merged" and not interpret:
        found = tuned.lookup(_dispatch.device_kind(), sparsity, shape, group, dtype)
    return found or AttentionConfig.heuristic(sparsity, shape, group, mode, dtype)


def attend(
    sparsity: Sparsity,
    query: jax.Array,
    gates: jax.Array | None,
    layer: Layer,
    page_table: jax.Array,
    lengths: jax.Array,
    tail: Tail,
    *,
    selected: Selection | None = None,
    reuse_compressed: bool = True,
    config: AttentionConfig | None = None,
    deterministic: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, Selection]:
    """NSA's output for the tail's tokens, and the blocks that they selected.

    Token i sees the committed tokens of its sequence, its ancestors in the tail, and itself: its output is that of
    decoding its path one token at a time. A refresh layer (``selected`` None) takes four launches: compressed and
    window branch with block scores, selection, selected branch, merge. A reuse layer takes two: the branches, merge; or
    three, where groups have fewer rows than the other branches' tiles and the batch is large. No gradient is defined.

    Args:
      query: [B, T, Hq, D], bfloat16 or float32, rotated; all keys and values have its dtype.
      gates: float32 [B, T, Hq, 3] in the order compressed, selected, window; None: the branches add up.
      layer, tail: see :class:`Layer` and :class:`Tail`.
      page_table: int32 [B, N]; entries behind a sequence's last page are not read.
      lengths: int32 [B], committed tokens; −1: the sequence has nothing to do, and its output is 0.
      selected: another layer's selection for the same tokens (a reuse layer).
      reuse_compressed: False: a reuse layer leaves the compressed branch out.
      config: the tuning parameters; None: those measured on this kind of device (``pallas_kernels.tuned``), or else
        chosen from the sizes. A reuse layer's group is the selection's.
      deterministic: what a token gets has the bits of decoding its path alone, whatever T, its row, and what stands
        beside it, in calls of one N (:mod:`pallas_kernels.attention.deterministic`). More than 128 tokens, a chunk of a
        prompt, have bits of their own T. Takes no ``config``: splits and tiles are fixed.
      interpret: interpret the kernels, on any device.

    Returns:
      [B, T, Hq, D] in the dtype of ``query``, and the :class:`Selection`.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
      UnsupportedError: sizes or a device that the kernels do not take, with the reason.
    """
    shape = check(sparsity, query, gates, layer, page_table, lengths, tail)
    width = shape.width
    if deterministic:
        if config is not None:
            raise ValueError("config: given with deterministic = True, which has a config of its own")
        _check_selection(sparsity, shape, config_for(sparsity, shape, query.dtype), selected)
        query, gates, tail, selected = pad(query, gates, lengths, tail, selected)
        shape = check(sparsity, query, gates, layer, page_table, lengths, tail)
        config = config_for(sparsity, shape, query.dtype)
    config = config or configure(sparsity, shape, interpret=interpret, dtype=query.dtype)
    # PTX is the exponential (``tiles.exp2``).
    reason = limit(sparsity, shape, config.group) or (None if interpret else _dispatch.device_limit(ptx=True))
    if reason:
        raise _dispatch.UnsupportedError(f"attend: implementation 'pallas': {reason}")
    _check_selection(sparsity, shape, config, selected)
    shown = [0, 1, 2] if sparsity.compressed_output else [1, 2]
    arguments = (query, layer, page_table, lengths, tail)
    form: dict[str, Any] = {"deterministic": deterministic, "present": width, "interpret": interpret}
    if selected is not None:
        shown = shown if reuse_compressed else [1, 2]
        apart = not deterministic and _apart(config, shape, shown)
        launches = [
            Launch(sparsity, shape, config, together, **form)
            for together in ([tuple(index for index in shown if index != 1), (1,)] if apart else [tuple(shown)])
        ]
        if not deterministic and shape.batch * shape.num_kv_heads < _MANY:
            launches = [launch.in_one_wave() for launch in launches]
        parts = [(launch, branches.run(launch, *arguments, selected)) for launch in launches]
    else:
        scoring = Launch(sparsity, shape, config, (0, 2), scored=True, **form)
        partial = branches.run(scoring, *arguments, None)
        selected = selection.run(scoring, partial, page_table, lengths, tail)
        launch = Launch(sparsity, shape, config, (1,), **form)
        parts = [(scoring, partial), (launch, branches.run(launch, *arguments, selected))]
    out = merge.run(parts, gates, shown, jnp.dtype(query.dtype))
    if shape.width > width:
        out, selected = out[:, :width], selected._replace(ids=selected.ids[:, :width])
    return out, selected


def _apart(config: AttentionConfig, shape: Shape, shown: list[int]) -> bool:
    """Whether a reuse layer's selected branch gets a launch of its own.

    A launch has a warp for every 16 rows of its largest tile. On fewer rows some of them do what others do, which
    costs more than another launch: measured at 8 sequences of 8 KV heads and more; at one sequence it does not.
    """
    largest = max((config.compressed, config.selected, config.window)[index].rows for index in shown)
    return config.selected.rows < largest and shape.batch * shape.num_kv_heads >= _MANY


def _check_selection(sparsity: Sparsity, shape: Shape, config: AttentionConfig, selected: Selection | None) -> None:
    if selected is None:
        return
    expected = selection.results(Launch(sparsity, shape, config, (1,)))
    why = f", as config.group = {config.group} says"
    for name, array in selected._asdict().items():
        if name in expected:
            _check.exact(f"selected.{name}", array, expected[name].shape, expected[name].dtype, why)
        elif array is not None:
            raise ValueError(f"selected.{name}: got {array.dtype} {array.shape}, expected None{why}")
