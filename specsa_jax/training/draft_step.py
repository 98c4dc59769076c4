"""The jitted functions of a draft head's training: loss, optimiser, train step, evaluation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from specsa_jax import model
from specsa_jax.drafting import head_model
from specsa_jax.drafting.head_model import HeadConfig, Params
from specsa_jax.training.draft_config import DraftConfig
from specsa_jax.training.draft_unroll import unroll
from specsa_jax.training.step import DTYPES


def compute_dtype(config: DraftConfig) -> Any:
    """The dtype of the passes."""
    return DTYPES[{"gpu": "bf16"}.get(jax.default_backend(), "f32") if config.dtype == "auto" else config.dtype]


def compare(
    head_config: HeadConfig, config: DraftConfig, params: Params, target: Params, rows: jax.Array, chunk: int = 0
) -> tuple[jax.Array, ...]:
    """How the head's law compares with the target's, at every depth of slots 1 … S of rows int32 [B, S + 1].

    Returns three arrays [unroll, B, S]: KL(target ‖ head) float32 in nats; whether the two most probable tokens are the
    same, bool; and Σ min(p, q) float32, the chance that a drafted sample stands. Entries at i < depth mean nothing.
    Logits exist for ``chunk`` slots at a time (0: 64 MB of float32 at each depth), in the backward pass too.
    """
    dtype = compute_dtype(config)
    hidden, features = model.hidden_states(
        head_config.target, target, rows, dtype=dtype, remat=False, query_chunk=config.query_chunk,
        features=head_config.features,
    )  # fmt: skip
    hidden, features = jax.lax.stop_gradient((hidden[:, 1:], features[:, :-1]))
    states = unroll(head_config, params, target, rows[:, 1:], features, config.unroll)
    depths, batch, size, width = states.shape
    count = batch * size
    chunk = min(count, chunk or max(256, 2**24 // head_config.target.vocab_size))
    padding = -count % chunk
    hidden = jnp.pad(hidden.reshape(-1, width), ((0, padding), (0, 0))).reshape(-1, chunk, width)
    states = jnp.pad(states.reshape(depths, -1, width), ((0, 0), (0, padding), (0, 0)))
    states = jnp.moveaxis(states.reshape(depths, -1, chunk, width), 1, 0)

    @jax.checkpoint
    def one(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        wanted = model.head(head_config.target, target, xs[0], dtype)
        given = head_model.logits(head_config, params, target, xs[1])
        log_p, log_q = jax.nn.log_softmax(wanted), jax.nn.log_softmax(given)
        p = jnp.exp(log_p)
        return (
            (p * (log_p - log_q)).sum(axis=-1),
            jnp.argmax(wanted, axis=-1) == jnp.argmax(given, axis=-1),
            jnp.minimum(p, jnp.exp(jax.lax.stop_gradient(log_q))).sum(axis=-1),
        )

    outs = jax.lax.map(one, (hidden, states))  # [chunks, unroll, chunk] each
    return tuple(jnp.moveaxis(out, 0, 1).reshape(depths, -1)[:, :count].reshape(depths, batch, size) for out in outs)


def known_past(depths: int, size: int) -> np.ndarray:
    """bool [depths, 1, size]: the entries of :func:`compare` that mean something."""
    return (np.arange(size) >= np.arange(depths)[:, None])[:, None]


def loss_of(
    head_config: HeadConfig, config: DraftConfig, params: Params, target: Params, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The depths' KL, float32 [], weighted by ``step_decay``; and the top-1 matches of each depth, float32 [unroll]."""
    divergence, match, _ = compare(head_config, config, params, target, rows)
    meant = jnp.asarray(known_past(divergence.shape[0], divergence.shape[2]))
    count = meant.sum(axis=(1, 2)) * divergence.shape[1]
    by_depth = jnp.where(meant, divergence, 0.0).sum(axis=(1, 2)) / count
    weight = config.step_decay ** jnp.arange(config.unroll, dtype=jnp.float32)
    return (by_depth * weight).sum() / weight.sum(), (meant & match).sum(axis=(1, 2)) / count


def optimizer(config: DraftConfig) -> optax.GradientTransformation:
    """AdamW at a rate of 1 behind a global-norm clip; decay on projections alone."""

    def decayed(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(1.0, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decayed),
    )


def learning_rate(config: DraftConfig, step: int, time_spent: float = 0.0) -> float:
    """The rate of optimiser step ``step``, from 0: warm-up, then a cosine to 0 over the rest.

    ``time_spent`` is the fraction of the time limit; the run is as far as the larger of the two says.
    """
    progress = max((step - config.warmup) / (config.steps - config.warmup), time_spent)
    factor = 0.5 * (1.0 + np.cos(np.pi * np.clip(progress, 0.0, 1.0)))
    return float(config.learning_rate * min((step + 1.0) / (config.warmup + 1.0), factor))


def make_train_step(head_config: HeadConfig, config: DraftConfig) -> Any:
    """The jitted ``(params, opt_state, target, rows int32 [B, S + 1], rate) → (params, opt_state, loss, matches)``.

    The first two are donated.
    """
    update = optimizer(config).update

    def step(params: Params, opt_state: Any, target: Params, rows: jax.Array, rate: jax.Array) -> tuple[Any, ...]:
        def loss(params: Params) -> tuple[jax.Array, jax.Array]:
            return loss_of(head_config, config, params, target, rows)

        (value, matches), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = update(grads, opt_state, params)
        updates = jax.tree.map(lambda leaf: leaf * rate, updates)
        return optax.apply_updates(params, updates), opt_state, value, matches

    return jax.jit(step, donate_argnums=(0, 1))


def make_evaluate(head_config: HeadConfig, config: DraftConfig) -> Any:
    """The jitted ``(params, target, rows int32 [B, S + 1]) →`` what :func:`compare` gives."""
    return jax.jit(lambda params, target, rows: compare(head_config, config, params, target, rows))
