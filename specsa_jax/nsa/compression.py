"""φ of the paper's equation 7: l keys (or values) of a compression block become one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from specsa_jax.config import NSAConfig, RopeConfig
from specsa_jax.rope import rotate


class Compress(nnx.Module):
    """One φ with its parameters (docs/architecture.md lists their shapes)."""

    def __init__(self, config: NSAConfig, *, has_position: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        l, heads, dim = config.compress_block, config.num_kv_heads, config.head_dim
        self.kind = config.compression
        self.dtype = dtype
        normal = jax.nn.initializers.normal

        def mean_of_offsets(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            # Starts as mean pooling, plus enough noise to tell the weights apart.
            pooled = jnp.tile(jnp.eye(dim) / l, (heads, l, 1))
            return pooled + normal(0.02 / l)(key, shape)

        if has_position:
            self.position = nnx.Param(normal(0.02)(rngs.params(), (heads, l, dim)))
        if self.kind == "weighted":
            self.weight = nnx.Param(jnp.full((heads, l), 1.0 / l) + normal(0.1 / l)(rngs.params(), (heads, l)))
        elif self.kind == "linear":
            self.weight = nnx.Param(mean_of_offsets(rngs.params(), (heads, l * dim, dim)))
        elif self.kind == "mlp":
            width = config.compress_hidden
            init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
            self.weight_in = nnx.Param(init(rngs.params(), (heads, l * dim, width)))
            self.weight_out = nnx.Param(init(rngs.params(), (heads, width, dim)))

    def __call__(self, blocks: jax.Array) -> jax.Array:
        """[..., l, Hkv, D] → [..., Hkv, D], accumulated in float32, in the dtype of ``blocks``."""
        x = blocks.astype(self.dtype)
        if hasattr(self, "position"):
            x = x + jnp.swapaxes(self.position[...], 0, 1).astype(self.dtype)
        if self.kind == "mean":
            return jnp.mean(x.astype(jnp.float32), axis=-3).astype(blocks.dtype)
        if self.kind == "weighted":
            weight = self.weight[...].astype(self.dtype)
            return jnp.einsum("...lhd,hl->...hd", x, weight, preferred_element_type=jnp.float32).astype(blocks.dtype)
        flat = jnp.swapaxes(x, -3, -2).reshape(*x.shape[:-3], x.shape[-2], -1)  # [..., Hkv, l·D], offset-major
        if self.kind == "linear":
            return self._per_head(flat, self.weight[...]).astype(blocks.dtype)
        hidden = jax.nn.silu(self._per_head(flat, self.weight_in[...])).astype(self.dtype)
        return self._per_head(hidden, self.weight_out[...]).astype(blocks.dtype)

    def _per_head(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum("...hi,hio->...ho", x, weight.astype(self.dtype), preferred_element_type=jnp.float32)


def compress_blocks(
    config: NSAConfig,
    rope: RopeConfig,
    phi_key: Compress,
    phi_value: Compress | None,
    keys: jax.Array,
    values: jax.Array,
    starts: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Compressed keys and values [..., Hkv, D] of blocks of raw (unrotated) keys and values [..., l, Hkv, D].

    ``starts`` int32 [...] are the positions i·d of the blocks' first tokens. Values are None without ``phi_value``.
    """
    if config.compressed_rope == "before":
        keys = rotate(keys, starts[..., None] + jnp.arange(config.compress_block, dtype=starts.dtype), rope)
    pooled = phi_key(keys)
    if config.compressed_rope == "after":
        pooled = rotate(pooled, starts, rope)
    return pooled, None if phi_value is None else phi_value(values)
