"""Attention, in the two shapes the decoder needs: packed rows and a cache of slots.

Letters: b rows or slots, t query tokens, s key tokens, k key/value heads, g query heads per
key/value head, h head width. Scores and softmax are float32 whatever the model's dtype.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row of padding has no NaN


class Cache(NamedTuple):
    """Keys and values of one layer. `slots` names the rows this call works on (None: all)."""

    keys: jax.Array  # [B, kv_heads, S, head_dim]
    values: jax.Array  # [B, kv_heads, S, head_dim]
    slots: jax.Array | None = None  # [n] int32; a slot >= B is padding: nothing is written


def packed_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Causal attention within segments. q [B,T,heads,h], k and v [B,T,kv_heads,h] -> as q."""
    rows, length = segment_ids.shape
    query = q.reshape(rows, length, k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("btkgh,bskh->bkgts", query, k, preferred_element_type=jnp.float32)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    allowed = same & jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v)
    return out.reshape(q.shape)


def cached_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Write k and v at `positions` [n,T] of the cache, attend to all up to each position.

    q [n,T,heads,h], k and v [n,T,kv_heads,h]. A position >= S is padding and is not written.
    """
    keys, values, slots = cache
    rows = jnp.arange(keys.shape[0]) if slots is None else slots
    keys = keys.at[rows[:, None], :, positions].set(k.astype(keys.dtype), mode="drop")
    values = values.at[rows[:, None], :, positions].set(v.astype(values.dtype), mode="drop")
    seen_k, seen_v = (keys, values) if slots is None else (keys[slots], values[slots])

    # One batch of plain products, [T*g,h] x [h,S] for each row and head: XLA on CPU takes a
    # third of the time that it takes for the einsum over rows, heads and groups.
    rows, length, heads = *positions.shape, k.shape[2]
    query = jnp.moveaxis(q.reshape(rows, length, heads, -1, q.shape[-1]), 1, 2)
    query = query.reshape(rows * heads, -1, q.shape[-1]).astype(keys.dtype)
    flat_k, flat_v = (x.reshape(rows * heads, *x.shape[2:]) for x in (seen_k, seen_v))
    scores = jnp.einsum("bqh,bsh->bqs", query, flat_k, preferred_element_type=jnp.float32)
    allowed = jnp.arange(keys.shape[2]) <= positions[:, :, None]  # [n,T,S]
    scores = jnp.where(
        allowed[:, None, :, None],
        scores.reshape(rows, heads, length, -1, keys.shape[2]),
        MASKED,
    )
    weights = jax.nn.softmax(scores, axis=-1).reshape(rows * heads, -1, keys.shape[2])
    out = jnp.einsum("bqs,bsh->bqh", weights.astype(values.dtype), flat_v)
    out = jnp.moveaxis(out.reshape(rows, heads, length, -1, q.shape[-1]), 1, 2)
    return out.reshape(q.shape).astype(q.dtype), Cache(keys, values, slots)
