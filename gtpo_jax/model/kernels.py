"""What attends: kernels for packed rows, with gradients, and for a cache. `attention` chooses.

Packed rows: (q [R,T,heads,h], k, v [R,T,kv_heads,h], segment_ids [R,T]) -> as q. A token sees
its own segment up to itself. Segment 0 is padding: what comes out there is finite, and its
gradient reaches padding only.
A cache: (q [N,m,h], k, v [N,S,h], counts [N,m]) -> as q. A query sees the first `counts`.
Of the cache's kernels `attend_turned` alone takes keys as [N,h,S].
q is scaled by the caller. Scores and softmax are float32 whatever the dtype. Letters: r rows,
k key/value heads, g query heads of each, m queries, s keys, h head width.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

MASKED = -1e30  # finite, so that a row of padding has no NaN
BLOCK = 64  # tokens; of 64 to 640, the fastest on two cores, or within the noise of it
KEPT = "attended"  # where the backward pass makes a layer again, but not its products
LANES = 128  # rows are filled up to a multiple of it for Pallas kernels


@jax.custom_vjp
def packed_xla(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Packed rows block by block, in memory linear in T: FlashAttention-2, arXiv 2307.08691.

    Blocks of keys beyond the diagonal, or before the first segment that a block of queries
    shares, are not computed. Backward, scores are made again from the saved log-sum-exp.
    """
    return _packed_forward(q, k, v, segment_ids)[0]


def _packed_forward(q, k, v, segment_ids):
    queries, keys, values = (_blocks(x, k.shape[2]) for x in (q, k, v))
    segments, first = _segment_blocks(segment_ids)

    def attend(block):
        i, query, own, start = block

        def step(j, carry):
            top, total, out = carry
            scores = _scores(query, keys[j], own, segments[j], i == j)
            new_top = jnp.maximum(top, scores.max(-1))
            kept = jnp.exp(top - new_top)
            weights = jnp.exp(scores - new_top[..., None])
            seen = _product("rkms,rksh->rkmh", weights.astype(v.dtype), values[j])
            return new_top, total * kept + weights.sum(-1), out * kept[..., None] + seen

        # Zeros of the inputs' kind: inside shard_map a carry has to vary as they do.
        out = jnp.zeros_like(query, jnp.float32)
        nothing = out[..., 0]
        carry = (nothing + MASKED, nothing, out)
        top, total, out = jax.lax.fori_loop(start, i + 1, step, carry)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    blocks = (jnp.arange(len(queries)), queries, segments, first)
    out, log_total = jax.lax.map(attend, blocks)
    out, log_total = checkpoint_name(_rows(out, q), KEPT), checkpoint_name(log_total, KEPT)
    return out, (q, k, v, segment_ids, out, log_total)


def _packed_backward(saved, d_out):
    q, k, v, segment_ids, out, log_total = saved
    queries, keys, values, d_outs = (_blocks(x, k.shape[2]) for x in (q, k, v, d_out))
    segments, first = _segment_blocks(segment_ids)
    # The mean of d_weights under the weights, without either.
    mean = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True)
    mean = _blocks(mean, k.shape[2])[..., 0]

    def attend(carry, block):
        i, query, own, start, d_block, log_block, mean_block = block

        def step(j, carry):
            d_query, d_keys, d_values = carry
            scores = _scores(query, keys[j], own, segments[j], i == j)
            weights = jnp.exp(scores - log_block[..., None])
            d_weights = _product("rkmh,rksh->rkms", d_block, values[j])
            d_scores = (weights * (d_weights - mean_block[..., None])).astype(q.dtype)
            d_value = _product("rkms,rkmh->rksh", weights.astype(q.dtype), d_block)
            d_key = _product("rkms,rkmh->rksh", d_scores, query)
            d_query += _product("rkms,rksh->rkmh", d_scores, keys[j])
            return d_query, d_keys.at[j].add(d_key), d_values.at[j].add(d_value)

        carry = (jnp.zeros_like(query, jnp.float32), *carry)
        d_query, *carry = jax.lax.fori_loop(start, i + 1, step, carry)
        return tuple(carry), d_query.astype(q.dtype)

    carry = tuple(jnp.zeros_like(x, jnp.float32) for x in (keys, values))
    blocks = (jnp.arange(len(queries)), queries, segments, first, d_outs, log_total, mean)
    (d_keys, d_values), d_queries = jax.lax.scan(attend, carry, blocks)
    d_keys, d_values = d_keys.astype(k.dtype), d_values.astype(v.dtype)
    return _rows(d_queries, q), _rows(d_keys, k), _rows(d_values, v), None


packed_xla.defvjp(_packed_forward, _packed_backward)


def _product(letters, a, b):
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def _scores(query, key, segments_q, segments_k, diagonal):
    """query [r,k,g*BLOCK,h], key [r,k,BLOCK,h], segments [r,BLOCK] -> [r,k,g*BLOCK,BLOCK]."""
    scores = _product("rkmh,rksh->rkms", query, key)
    seen = segments_q[:, :, None] == segments_k[:, None, :]
    seen &= ~diagonal | jnp.tril(jnp.ones((BLOCK, BLOCK), bool))
    grouped = scores.reshape(*key.shape[:2], -1, BLOCK, BLOCK)
    return jnp.where(seen[:, None, None], grouped, MASKED).reshape(scores.shape)


def _blocks(x, kv_heads):
    """[r,T,k*g,h] -> [n,r,k,g*BLOCK,h]: what one product takes lies together."""
    rows, length, heads, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % BLOCK), (0, 0), (0, 0)))
    x = x.reshape(rows, -1, BLOCK, kv_heads, heads // kv_heads, width)
    x = x.transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(*x.shape[:3], -1, width)


def _rows(x, like):
    """`_blocks` undone, to the shape of `like`."""
    count, rows, kv_heads, _, width = x.shape
    x = x.reshape(count, rows, kv_heads, -1, BLOCK, width).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(rows, count * BLOCK, -1, width)[:, : like.shape[1]]


def _segment_blocks(segment_ids):
    """[r,T] -> [n,r,BLOCK], and the first block [n] that shares a segment in any row.

    Two blocks share none where their ranges of ids do not meet: exact for any ids.
    """
    padded = jnp.pad(segment_ids, ((0, 0), (0, -segment_ids.shape[1] % BLOCK)))
    segments = jnp.moveaxis(padded.reshape(len(padded), -1, BLOCK), 1, 0)
    low, high = segments.min(-1), segments.max(-1)
    meet = jnp.any((low[:, None] <= high) & (high[:, None] >= low), axis=-1)
    return segments, jnp.argmax(meet, axis=1)


def packed_triton(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, interpret: bool = False
) -> jax.Array:
    """Packed rows on a GPU, by JAX's flash attention; in blocks of 128, and of 32 backward.

    JAX 0.12 deprecates the module (its successor is the package tokamax): imported here only.
    """
    from jax.experimental.pallas.ops.gpu.attention import mha

    group = q.shape[2] // k.shape[2]
    filled, segments = _fill((q, k, v), segment_ids)
    filled[1:] = (jnp.repeat(x, group, axis=2) for x in filled[1:])
    out = mha(*filled, segments, causal=True, interpret=interpret)
    return out[:, : q.shape[1]]


def packed_cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    implementation: str = "cudnn",
) -> jax.Array:
    """Rows that hold one segment each, from column 0 on, then padding; bfloat16 or float16."""
    out = jax.nn.dot_product_attention(
        q, k, v, scale=1.0, is_causal=True, implementation=implementation
    )
    # No token sees the padding after it; this keeps padding from seeing tokens.
    return jnp.where((segment_ids > 0)[..., None, None], out, 0)


def packed_splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, interpret: bool = False
) -> jax.Array:
    """Packed rows on a TPU, by JAX's splash attention.

    Blocks are the largest of 512, 256 and 128 that divides T (filled up to 128): a row of
    640 tokens goes in blocks of 128, so row lengths are best multiples of 512.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    filled, segments = _fill((q, k, v), segment_ids)
    length = segments.shape[1]
    block = next(b for b in (512, 256, 128) if length % b == 0)
    sides = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    attend = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * q.shape[2]),
        block_sizes=splash.BlockSizes(**{f"block_{side}": block for side in sides}),
        interpret=interpret,
    )
    heads_first = (jnp.moveaxis(x, 1, 2) for x in filled)
    out = jax.vmap(attend)(*heads_first, splash.SegmentIds(segments, segments))
    return jnp.moveaxis(out, 2, 1)[:, : q.shape[1]]


def _fill(arrays, segment_ids):
    """Rows filled up with padding to a multiple of LANES tokens."""
    more = (0, -segment_ids.shape[1] % LANES)
    filled = [jnp.pad(x, ((0, 0), more, (0, 0), (0, 0))) for x in arrays]
    return filled, jnp.pad(segment_ids, ((0, 0), more))


def attend_xla(q: jax.Array, k: jax.Array, v: jax.Array, counts: jax.Array) -> jax.Array:
    """q [N,m,h] to the first counts [N,m] of k and v [N,S,h] -> [N,m,h]."""
    scores = jnp.einsum("nmh,nsh->nms", q, k, preferred_element_type=jnp.float32)
    return _mean(scores, v, counts)


def attend_turned(q: jax.Array, k: jax.Array, v: jax.Array, counts: jax.Array) -> jax.Array:
    """As `attend_xla`, of keys [N,h,S]. On a CPU a cache that lies like this gives its scores
    in two thirds of the time; a transposed view of the other does not."""
    scores = jnp.einsum("nmh,nhs->nms", q, k, preferred_element_type=jnp.float32)
    return _mean(scores, v, counts)


def _mean(scores, v, counts):
    seen = jnp.arange(v.shape[1]) < counts[..., None]
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


def attend_paged(q: jax.Array, k: jax.Array, v: jax.Array, counts: jax.Array) -> jax.Array:
    """As `attend_xla` where a row's queries see the same, by JAX's paged attention for TPUs,
    which reads only pages with something to see: the cache is one long list of pages, in
    order. S a multiple of 128, counts at most S. Keys and values are used as bfloat16.
    """
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    rows, size, width = k.shape
    page = next(p for p in (512, 256, 128) if size % p == 0)
    pages = jnp.arange(rows * size // page, dtype=jnp.int32).reshape(rows, -1)
    keys, values = (x.reshape(1, -1, page, width) for x in (k, v))
    # The kernel keeps its running sum in the dtype of q.
    out = paged_attention(
        q.astype(jnp.float32), keys, values, counts[:, 0], pages, pages_per_compute_block=1
    )
    return out.astype(v.dtype)
