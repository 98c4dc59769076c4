"""How far an adapted model is from the dense one that it was made of."""

from __future__ import annotations

import dataclasses
import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from specsa_jax import model
from specsa_jax.checkpoints import store
from specsa_jax.config import ModelConfig

# A long text that every Python installation has.
_TEXT = "argparse.py"
_ROWS = 128  # positions whose logits are compared at a time


def divergence(params_dir: Path, config: ModelConfig, tokenizer: Tokenizer, length: int | None) -> dict[str, Any]:
    """Compares the next-token distributions of an adapted model with the dense model's, on one text.

    The dense model is the same parameters below ``dense_len``. Everything is computed in float32.

    Args:
      params_dir: the parameters on disk.
      length: of the text, in tokens; at most the model's ``max_length``. Beyond ``num_selected · select_block``
        tokens the adapted model no longer sees all of the past: None is twice as many.

    Returns ``kl_mean`` and ``kl_max`` (KL of the adapted from the dense distribution, nats), ``kl_beyond`` (the mean
    where not all of the past is seen; None in a shorter text), ``top1_agreement``, the losses of both in nats a token,
    ``tokens``, and ``text``.
    """
    sees_all = config.nsa.num_selected * config.nsa.select_block
    length = min(2 * sees_all if length is None else length, config.max_length)
    tokens, text = _tokens(tokenizer, config.vocab_size, length)
    params = store.read_tree(params_dir, store.expected_params(config))
    dense = dataclasses.replace(config, nsa=dataclasses.replace(config.nsa, dense_len=length + 1))
    hidden = [_hidden(one, params, tokens) for one in (dense, config)]
    kl, agree, losses = np.zeros(length), np.zeros(length, bool), np.zeros((2, length))
    head = jax.jit(lambda params, rows: jax.nn.log_softmax(model.head(config, params, rows)))
    for start in range(0, length, _ROWS):
        part = slice(start, min(start + _ROWS, length))
        p, q = (np.asarray(head(params, h[part])) for h in hidden)
        kl[part] = (np.exp(p) * (p - q)).sum(axis=-1)
        agree[part] = p.argmax(axis=-1) == q.argmax(axis=-1)
        following = tokens[start + 1 : part.stop + 1]
        for index, law in enumerate((p, q)):
            losses[index, start : start + len(following)] = -law[np.arange(len(following)), following]
    return {
        "kl_mean": float(kl.mean()), "kl_max": float(kl.max()),
        "kl_beyond": float(kl[sees_all:].mean()) if length > sees_all else None, "top1_agreement": float(agree.mean()),
        "loss_dense": float(losses[0, :-1].mean()), "loss_adapted": float(losses[1, :-1].mean()),
        "tokens": length, "text": text,
    }  # fmt: skip


def _hidden(config: ModelConfig, params: Any, tokens: np.ndarray) -> jax.Array:
    run = jax.jit(lambda params, row: model.hidden_states(config, params, row[None], remat=False)[0])
    return run(params, jnp.asarray(tokens))


def _tokens(tokenizer: Tokenizer, vocab_size: int, length: int) -> tuple[np.ndarray, str]:
    """Token ids int32 [length] of the text; random ones where the tokenizer does not read text."""
    text = (Path(sysconfig.get_path("stdlib")) / _TEXT).read_text(encoding="utf-8")
    try:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    except Exception:  # the Rust library raises bare Exception
        ids = []
    if len(ids) >= length and len(set(ids[:length])) > 16:
        return np.asarray(ids[:length], np.int32), f"{_TEXT} of the standard library"
    return np.random.default_rng(0).integers(vocab_size, size=length).astype(np.int32), "random tokens"
