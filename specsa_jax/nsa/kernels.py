"""The seam to ``pallas_kernels``: which layers its attention and φ take, and calls of them in this package's terms."""

from __future__ import annotations

from typing import Any

import jax

import pallas_kernels
from pallas_kernels import Implementation, attention, compress
from pallas_kernels.attention import GroupMode, Selection, Sparsity
from pallas_kernels.attention.arguments import check
from specsa_jax.cache import Cache, LayerCache, LayerTail, Tail, chain_slots
from specsa_jax.config import NSAConfig, RopeConfig
from specsa_jax.nsa.compression import Compress
from specsa_jax.nsa.sequence import Projected
from specsa_jax.rope import cos_sin

# Slots of a sequence's chain: more has only a chunk of a prompt, which uses them all and is work for XLA's products, of
# larger tiles. While sequences decode, or in a tree, most slots are unused, and XLA's code would compute them all.
MAX_CHAIN_SLOTS = 8


def sparsity(config: NSAConfig) -> Sparsity:
    """The kernels' view of a layer."""
    return Sparsity(
        compress_block=config.compress_block,
        compress_stride=config.compress_stride,
        select_block=config.select_block,
        num_selected=config.num_selected,
        num_initial=config.num_initial,
        num_local=config.num_local,
        window=config.window_tokens,
        scale=config.softmax_scale,
        compressed_output=config.compressed_output,
    )


def limit(config: NSAConfig, max_length: int) -> str | None:
    """Why the kernels do not take this layer at contexts of ``max_length`` tokens; None if they do."""
    for name, wrong in (
        ("fused_selected_window", config.fused_selected_window),
        ("dense_len", config.dense_len > 0),
        ("score_map", config.score_map != "overlap"),
    ):
        if wrong:
            return f"{name}: got {getattr(config, name)!r}, which only the XLA path takes"
    pages = -(-max_length // config.select_block)
    shape = attention.Shape(1, 1, config.num_heads, config.num_kv_heads, config.head_dim, pages, pages, 1, 1)
    return attention.limit(sparsity(config), shape)


def choose(config: NSAConfig, max_length: int, implementation: Implementation | None) -> Implementation:
    """The implementation of attention to use; None stands for "pallas" where device and layer allow it, else "xla".

    Raises UnsupportedError for "pallas" by name where it does not run, with the reason; ValueError for an unknown name.
    """
    return pallas_kernels.choose("attention", implementation, limit(config, max_length), interpret=False, ptx=True)


def attend(
    config: NSAConfig,
    projected: Projected,
    cache: Cache,
    layer: LayerCache,
    tail: Tail,
    new: LayerTail,
    *,
    is_chain: bool = False,
    selected: Selection | None = None,
    keep_compressed: bool = True,
    group: int = 0,
    group_mode: GroupMode = "merged",
    interpret: bool = False,
) -> tuple[jax.Array, Selection]:
    """Output [B, T, Hq, D] of the tail's queries and the blocks that they selected, by the kernels.

    ``is_chain`` says that the tail's tree is one, whose ancestor mask needs no reading. A reuse layer is given another
    layer's ``selected``, and keeps or drops its compressed output. ``group`` 0: the kernels' choice, if they merge.
    """
    arguments = _arguments(config, projected, cache, layer, tail, new, is_chain)
    kernel_config = None
    if group or group_mode == "shared":
        kernel_config = attention.configure(
            arguments[0], check(*arguments), group or None, group_mode, interpret, projected.query.dtype
        )
    return attention.attend(
        *arguments, selected=selected, reuse_compressed=keep_compressed, config=kernel_config, interpret=interpret
    )


def attend_deterministic(
    config: NSAConfig,
    projected: Projected,
    cache: Cache,
    layer: LayerCache,
    tail: Tail,
    new: LayerTail,
    *,
    is_chain: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Output [B, T, Hq, D] of the tail's queries, whose bits depend on nothing but their own prefixes and paths, in
    calls of one width of the page table. More than 128 queries have to be a chain, and all such calls of one T."""
    arguments = _arguments(config, projected, cache, layer, tail, new, is_chain)
    return attention.attend(*arguments, deterministic=True, interpret=interpret)[0]


def _arguments(
    config: NSAConfig, projected: Projected, cache: Cache, layer: LayerCache, tail: Tail, new: LayerTail, is_chain: bool
) -> Any:
    """The positional arguments of the kernels' ``attend``."""
    return (
        sparsity(config),
        projected.query,
        projected.gates,
        attention.Layer(
            layer.key, layer.value, layer.compressed_key, layer.compressed_value, layer.window_key, layer.window_value
        ),
        cache.page_table,
        cache.lengths,
        attention.Tail(
            tail.positions, None if is_chain else tail.ancestor, tail.slot, new.key, new.value, new.window_key,
            new.window_value, new.compressed_key, new.compressed_value,
        ),
    )  # fmt: skip


def compresses(config: NSAConfig, phi_key: Compress, layer: LayerCache, tail: Tail) -> bool:
    """Whether the kernels compute a tail's compressed entries: where φ has large weights, which they read only if a
    block ends."""
    if config.compression not in ("linear", "mlp") or config.compressed_rope == "before":
        return False
    slots = tail.slot.shape[1]
    is_chain = slots <= chain_slots(config, tail.positions.shape[1])
    width = config.compress_hidden if config.compression == "mlp" else config.head_dim
    return (
        not (is_chain and slots > MAX_CHAIN_SLOTS)
        and layer.raw_key.dtype == phi_key.dtype
        and compress.limit(config.head_dim, width) is None
    )


def compress_blocks(
    config: NSAConfig,
    rope: RopeConfig,
    phi_key: Compress,
    phi_value: Compress | None,
    layer: LayerCache,
    raw_key: jax.Array,
    raw_value: jax.Array,
    tail: Tail,
    starts: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Compressed keys and values [B, M, Hkv, D] of the blocks from ``starts`` int32 [B, M] on, which end in the tail.

    The tail's raw keys and values are [B, T, Hkv, D]. Entries of unused slots are arbitrary bits, which nobody reads:
    attention loads used slots only, and a commit those of its path.
    """

    def side(phi: Compress, ring: jax.Array, fresh: jax.Array) -> compress.Side:
        is_mlp = phi.kind == "mlp"
        return compress.Side(
            ring,
            fresh.astype(ring.dtype),
            phi.weight_in[...] if is_mlp else phi.weight[...],
            phi.weight_out[...] if is_mlp else None,
            phi.position[...] if hasattr(phi, "position") else None,
        )

    value = None
    if phi_value is not None:
        value = side(phi_value, layer.raw_key if layer.raw_value is None else layer.raw_value, raw_value)
    rotation = cos_sin(starts, config.head_dim, rope) if config.compressed_rope == "after" else None
    return compress.compress(
        side(phi_key, layer.raw_key, raw_key), value, tail.slot, tail.slot_back, starts, rotation, interpret=interpret
    )
