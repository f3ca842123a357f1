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

    # Flat: a batch of products [T*g,h] x [h,S], one for each row and head. XLA on CPU takes a
    # third of the time that it takes for an einsum over rows, heads and groups.
    rows, length, heads = *positions.shape, k.shape[2]
    query = jnp.moveaxis(q.reshape(rows, length, heads, -1, q.shape[-1]), 1, 2)
    query = query.reshape(rows * heads, -1, q.shape[-1]).astype(keys.dtype)
    flat_k, flat_v = (x.reshape(rows * heads, *x.shape[2:]) for x in (seen_k, seen_v))
    groups = query.shape[1] // length
    counts = jnp.repeat(jnp.repeat(positions + 1, heads, axis=0), groups, axis=1)
    kernel = FLAT[BEST.get(jax.default_backend(), "xla")] if length == 1 else attend_xla
    out = kernel(query, flat_k, flat_v, counts)
    out = jnp.moveaxis(out.reshape(rows, heads, length, -1, q.shape[-1]), 1, 2)
    return out.reshape(q.shape).astype(q.dtype), Cache(keys, values, slots)


def attend_xla(q: jax.Array, k: jax.Array, v: jax.Array, counts: jax.Array) -> jax.Array:
    """q [N,m,h] to the first counts [N,m] of k and v [N,S,h] -> [N,m,h]."""
    scores = jnp.einsum("nmh,nsh->nms", q, k, preferred_element_type=jnp.float32)
    seen = jnp.arange(k.shape[1]) < counts[..., None]
    weights = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1)
    return jnp.einsum("nms,nsh->nmh", weights.astype(v.dtype), v)


def attend_triton(
    q: jax.Array, k: jax.Array, v: jax.Array, counts: jax.Array, interpret: bool = False
) -> jax.Array:
    """As `attend_xla` where a row's queries see the same, by JAX's split-k decoding kernel,
    which reads only what is seen; k is cut into pieces of 64 and up to 8 parallel splits.

    JAX 0.12 deprecates the module (its successor is the package tokamax): imported here only.
    """
    from jax.experimental.pallas.ops.gpu.decode_attention import mqa

    splits = next(n for n in (8, 4, 2, 1) if k.shape[1] % (64 * n) == 0)
    return mqa(
        q, k, v, None, counts[:, 0], 1.0, block_k=64, k_splits=splits, interpret=interpret
    )


def attend_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, counts: jax.Array) -> jax.Array:
    """As `attend_xla` where a row's queries see the same, by cuDNN; bfloat16 only."""
    return jax.nn.dot_product_attention(
        q[:, None],
        k[:, :, None],
        v[:, :, None],
        scale=1.0,
        key_value_seq_lengths=counts[:, 0],
        implementation="cudnn",
    )[:, 0]


# What attends to the cache when one token is decoded, by platform. `benchmarks.attention`
# measures them all; a platform that is not here, or has not been measured, takes XLA's.
FLAT = {"xla": attend_xla, "triton": attend_triton, "cudnn": attend_cudnn}
BEST = {"cpu": "xla"}
