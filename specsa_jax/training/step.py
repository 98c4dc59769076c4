"""The jitted functions of training: loss, optimiser, train step, evaluation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from specsa_jax import model
from specsa_jax.config import ModelConfig
from specsa_jax.training.config import TrainConfig

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}
Params = dict[str, Any]


def next_token_loss(
    model_config: ModelConfig, config: TrainConfig, params: Params, rows: jax.Array, chunk: int = 0
) -> jax.Array:
    """Mean cross entropy, float32 [], in nats a token, of rows int32 [B, context + 1].

    Logits exist for ``chunk`` tokens at a time (0: 64 MB of float32), in the backward pass too.
    """
    dtype = DTYPES[config.dtype]
    hidden = model.hidden_states(
        model_config, params, rows[:, :-1], dtype=dtype, remat=config.remat, query_chunk=config.query_chunk
    )
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), rows[:, 1:].reshape(-1)
    count = targets.shape[0]
    chunk = min(count, chunk or max(256, 2**24 // model_config.vocab_size))
    padding = -count % chunk
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, hidden.shape[-1])
    targets = jnp.pad(targets, (0, padding), constant_values=-1).reshape(-1, chunk)

    @jax.checkpoint
    def chunk_loss(total: jax.Array, xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        chunk_hidden, chunk_targets = xs
        logits = model.head(model_config, params, chunk_hidden, dtype)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(chunk_targets, 0))
        return total + jnp.sum(jnp.where(chunk_targets >= 0, losses, 0.0)), None

    total, _ = jax.lax.scan(chunk_loss, jnp.float32(0.0), (hidden, targets))
    return total / count


def learning_rate(config: TrainConfig, step: Any) -> jax.Array:
    """The rate, float32 in the shape of ``step``: the optimiser step(s), counted from 0."""
    step = jnp.asarray(step, jnp.float32)
    progress = (step - config.warmup) / (config.steps - config.warmup)
    if config.schedule == "cosine":
        factor = 0.1 + 0.45 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
    else:
        factor = jnp.clip((1.0 - progress) / 0.2, 0.0, 1.0)
    return config.learning_rate * jnp.minimum((step + 1.0) / (config.warmup + 1.0), factor)


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip; decay on projections and the embedding alone."""

    def decayed(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            lambda count: learning_rate(config, count),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def make_train_step(model_config: ModelConfig, config: TrainConfig) -> Any:
    """The jitted ``(params, opt_state, rows int32 [B, context + 1]) → (params, opt_state, loss)``.

    The first two are donated; the batch is worked off in ``grad_accum`` slices.
    """
    update = optimizer(config).update

    def step(params: Params, opt_state: Any, rows: jax.Array) -> tuple[Params, Any, jax.Array]:
        def loss_and_grad(slice_: jax.Array) -> Any:
            return jax.value_and_grad(lambda p: next_token_loss(model_config, config, p, slice_))(params)

        if config.grad_accum == 1:
            loss, grads = loss_and_grad(rows)
        else:
            slices = rows.reshape(config.grad_accum, -1, rows.shape[-1])
            zero = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, params))
            total, _ = jax.lax.scan(
                lambda carry, slice_: (jax.tree.map(jnp.add, carry, loss_and_grad(slice_)), None), zero, slices
            )
            loss, grads = jax.tree.map(lambda x: x / config.grad_accum, total)
        updates, opt_state = update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def make_evaluate(model_config: ModelConfig, config: TrainConfig) -> Any:
    """The jitted ``(params, rows int32 [B, context + 1]) → loss``."""
    return jax.jit(lambda params, rows: next_token_loss(model_config, config, params, rows))
