"""Attention, in the two shapes the decoder needs: packed rows and a cache of slots.

Which kernel attends is chosen in two tables, by platform; `kernels` has them all.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gtpo_jax.model import kernels


class Cache(NamedTuple):
    """Keys and values of one layer. `slots` names the rows this call works on (None: all)."""

    keys: jax.Array  # [B, kv_heads, S, h], or [B, kv_heads, h, S] where they are `turned`
    values: jax.Array  # [B, kv_heads, S, h]
    slots: jax.Array | None = None  # [n] int32; a slot >= B is padding: nothing is written


# What attends in training, by platform and by what a row holds: several segments, or one that
# starts at column 0. A platform that is not here takes "xla". `benchmarks.attention --training`
# measures them all; so far only a CPU has been.
PACKED: dict[str, Callable[..., jax.Array]] = {
    "xla": kernels.packed_xla,
    "triton": kernels.packed_triton,
    "cudnn": kernels.packed_cudnn,
    "splash": kernels.packed_splash,
}
BEST_PACKED = {
    ("gpu", "several"): "triton",
    ("gpu", "one"): "cudnn",
    ("tpu", "several"): "splash",
    ("tpu", "one"): "splash",
}

# What attends to the cache when one token is decoded, by platform, likewise.
FLAT = {
    "xla": kernels.attend_xla,
    "turned": kernels.attend_turned,
    "triton": kernels.attend_triton,
    "cudnn": kernels.attend_cudnn,
    "paged": kernels.attend_paged,
}
BEST = {"cpu": "turned", "tpu": "paged"}


def turned(platform: str) -> bool:
    """Whether keys are cached as [B, kv_heads, h, S], for the kernel of this platform."""
    return BEST.get(platform) == "turned"


def cache_shapes(
    platform: str, rows: int, kv_heads: int, capacity: int, head_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the keys and the values of one layer."""
    lies, other = (rows, kv_heads, capacity, head_dim), (rows, kv_heads, head_dim, capacity)
    return other if turned(platform) else lies, lies


def packed_kernel(platform: str, dtype: jnp.dtype, one_segment: bool) -> str:
    """The name in `PACKED` of what attends to packed rows."""
    # cuDNN has no float32, and Triton's products of it are TF32: who asks for float32 on a GPU
    # asks for the reference.
    if platform == "gpu" and dtype == jnp.float32:
        return "xla"
    return BEST_PACKED.get((platform, "one" if one_segment else "several"), "xla")


def flat_kernel(platform: str, values: jax.Array, length: int = 1) -> str:
    """The name in `FLAT` of what attends with `length` tokens a row to a cache of one layer,
    `values` [..., S, h]."""
    name = BEST.get(platform, "xla")
    if length > 1 and not turned(platform):
        return "xla"
    # Mosaic wants whole lanes of 128, pages have at least 128 tokens, products are bfloat16.
    fits = values.shape[-1] % 128 == values.shape[-2] % 128 == 0
    fits &= values.dtype == jnp.bfloat16
    return "xla" if name == "paged" and not fits else name


def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    one_segment: bool = False,
    platform: str = "",
) -> jax.Array:
    """Causal attention within segments. q [B,T,heads,h], k and v [B,T,kv_heads,h] -> as q.

    q is scaled already. segment_ids [B,T], 0 for padding. `one_segment` (static) promises that
    a row holds one segment, from column 0 on, then padding. `platform`: of the devices that the
    program is compiled for, JAX's default where it is empty. The GPU's and the TPU's kernels
    work on local arrays: over a mesh, call them inside `jax.shard_map`.
    """
    name = packed_kernel(platform or jax.default_backend(), q.dtype, one_segment)
    return PACKED[name](q, k, v, segment_ids)


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    cache: Cache,
    platform: str = "",
) -> tuple[jax.Array, Cache]:
    """Write k and v at `positions` [n,T] of the cache, attend to all up to each position.

    q [n,T,heads,h], k and v [n,T,kv_heads,h]. A position >= S is padding and is not written.
    """
    platform = platform or jax.default_backend()
    keys, values, slots = cache
    at = jnp.arange(keys.shape[0]) if slots is None else slots
    all_of = slice(None)
    place = (at[:, None], all_of, positions)
    keys_place = (at[:, None], all_of, all_of, positions) if turned(platform) else place
    keys = keys.at[keys_place].set(k.astype(keys.dtype), mode="drop")
    values = values.at[place].set(v.astype(values.dtype), mode="drop")
    seen_k, seen_v = (keys, values) if slots is None else (keys[slots], values[slots])

    # Flat: a batch of products [T*g,h] x [h,S], one for each row and head. XLA on CPU takes a
    # third of the time that it takes for an einsum over rows, heads and groups.
    rows, length, heads = *positions.shape, k.shape[2]
    query = jnp.moveaxis(q.reshape(rows, length, heads, -1, q.shape[-1]), 1, 2)
    query = query.reshape(rows * heads, -1, q.shape[-1]).astype(keys.dtype)
    flat_k, flat_v = (x.reshape(rows * heads, *x.shape[2:]) for x in (seen_k, seen_v))
    groups = query.shape[1] // length
    # At most S: a kernel that reads only what is seen would read on into the next row's cache.
    counts = jnp.minimum(positions + 1, values.shape[2])
    counts = jnp.repeat(jnp.repeat(counts, heads, axis=0), groups, axis=1)
    attend = FLAT[flat_kernel(platform, values, length)]
    out = attend(query, flat_k, flat_v, counts)
    out = jnp.moveaxis(out.reshape(rows, heads, length, -1, q.shape[-1]), 1, 2)
    return out.reshape(q.shape).astype(q.dtype), Cache(keys, values, slots)
