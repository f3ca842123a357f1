"""The policy: one linen `Block`, scanned over stacked layers to train and to score.

The engine (`model.engine`) applies the same `Block` layer by layer with a cache. There is no
second model. Parameters: {"embed" [V,D], "layers" (leading axis: layer), "final_norm",
"head" [D,V] where embeddings are untied}.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gtpo_jax.model import kernels
from gtpo_jax.model.attention import Cache, cached_attention, packed_attention
from gtpo_jax.model.config import ModelConfig, RopeScaling
from gtpo_jax.model.lora import Adapted
from gtpo_jax.parallel import Layout

Params = dict[str, Any]
ONE_DEVICE = Layout()
FEW = 64  # rows; with more, a product takes as long as its arithmetic


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    """RoPE's angle per token, radians: f_i = theta^(-2i/h), float32 [h/2].

    Scaled to reach a longer context (transformers, modeling_rope_utils.py):

        linear   f / factor
        llama3   (1 - s) f / factor + s f,   s = clip((L f / 2 pi - low) / (high - low), 0, 1)

    with L = original_max_position_embeddings: a pair that turns less than `low` times over L is
    slowed down, one that turns more than `high` times is kept.
    """
    half = head_dim // 2
    f = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return f
    if scaling.kind == "linear":
        return f / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * f / (2 * jnp.pi)
    s = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - s) * f / scaling.factor + s * f


def rope(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotary embedding, Hugging Face's half-rotation form. x [B,T,n,h], positions [B,T],
    frequencies [h/2]."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies  # [B,T,1,h/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def product_for(platform: str, rows: int) -> Callable:
    """What multiplies activations [rows,in] by a kernel [in,out] when tokens are generated."""
    return columns if platform == "cpu" and rows <= FEW else jax.lax.dot_general


def columns(x: jax.Array, kernel: jax.Array, *_: Any, **how: Any) -> jax.Array:
    """x [n,in] @ kernel [in,out] as (kernel' x')', for few rows on a CPU.

    There a product takes as long as it takes to read the kernel, and that is faster in order:
    kept as [out,in], on the left. 34 ms instead of 41 for 16 rows of SmolLM2-135M.
    """
    product = jnp.dot(kernel.T, x.T, **how)
    # Without the barrier XLA would turn it round again.
    return jax.lax.optimization_barrier(product).T


def norm(config: ModelConfig, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(
        epsilon=config.norm_eps,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        name=name,
    )


class Block(nn.Module):
    """One layer: attention and SwiGLU, each after an RMSNorm, each added to the residual."""

    config: ModelConfig
    layout: Layout = ONE_DEVICE

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """x [B,T,D], positions [B,T] -> x, cache.

        Without a cache: packed rows with `segment_ids` [B,T]. With one: keys and values of
        these tokens are written to it, and attention sees everything in it.
        """
        c = self.config
        rows, length, width = x.shape
        product = jax.lax.dot_general
        if cache is not None:
            product = product_for(self.layout.platform, rows * length)

        def dense(features: int, name: str, bias: bool = False) -> nn.Module:
            dtypes = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}
            if c.lora_rank and name in c.lora_targets:
                adapter = (c.lora_rank, c.lora_alpha)
                return Adapted(features, bias, *adapter, **dtypes, name=name)
            return nn.Dense(features, bias, dot_general=product, **dtypes, name=name)

        # [B*T, D]: XLA on CPU multiplies flat matrices faster than batched ones.
        flat = x.reshape(rows * length, width)
        normed = norm(c, "attn_norm")(flat)

        def heads(name: str, count: int) -> jax.Array:
            out = dense(count * c.head_dim, name, c.qkv_bias)(normed)
            return out.reshape(rows, length, count, c.head_dim)

        q, k, v = heads("q", c.heads), heads("k", c.kv_heads), heads("v", c.kv_heads)
        if c.qk_norm:
            q, k = norm(c, "q_norm")(q), norm(c, "k_norm")(k)
        turning = frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        q = rope(q, positions, turning) * c.head_dim**-0.5
        k = rope(k, positions, turning)
        on = {"platform": self.layout.platform}
        if cache is None:
            attend = functools.partial(packed_attention, one_segment=c.one_segment, **on)
            attend = self.layout.by_rows_and_heads(attend)
            attended = attend(q, k, v, segment_ids)
        else:
            attend = self.layout.by_heads(functools.partial(cached_attention, **on))
            attended, cache = attend(q, k, v, positions, cache)
        flat = flat + dense(width, "o")(attended.reshape(rows * length, -1))

        normed = norm(c, "mlp_norm")(flat)
        gated = nn.silu(dense(c.hidden, "gate")(normed)) * dense(c.hidden, "up")(normed)
        flat = flat + dense(width, "down")(gated)
        x = flat.reshape(x.shape)
        return x if cache is not None else self.layout.between_layers(x), cache


class Transformer(nn.Module):
    """Embedding, stacked layers, final norm; the head is applied by `logits` and `logprobs`."""

    config: ModelConfig
    layout: Layout = ONE_DEVICE

    @nn.compact
    def __call__(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        """tokens, positions, segment_ids [R,T] -> the last hidden states [R,T,D]."""
        c = self.config
        shape, dtype = (c.vocab_size, c.width), jnp.dtype(c.param_dtype)
        embed = self.param("embed", nn.initializers.normal(0.02), shape, dtype)
        if not c.tie_embeddings:
            self.param("head", nn.initializers.normal(c.width**-0.5), shape[::-1], dtype)
        block = Block
        if c.remat != "none":
            policies = jax.checkpoint_policies
            matmuls = policies.save_from_both_policies(
                policies.dots_saveable, policies.save_only_these_names(kernels.KEPT)
            )
            policy = {"full": None, "matmuls": matmuls}[c.remat]
            block = nn.remat(Block, policy=policy, prevent_cse=c.unroll > 1)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.layers,
            unroll=c.unroll,
        )(c, self.layout, name="layers")
        x = self.layout.between_layers(embed[tokens].astype(c.dtype))
        x, _ = layers(x, positions, segment_ids)
        return norm(c, "final_norm")(self.layout.whole_rows(x))


def init(config: ModelConfig, seed: int) -> Params:
    """Fresh parameters. Only the shape of the tokens matters here, so one token will do."""
    one = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(Transformer(config).init)(jax.random.key(seed), one, one, one)["params"]


def head(
    config: ModelConfig,
    params: Params,
    hidden: jax.Array,
    product: Callable = jax.lax.dot_general,
) -> jax.Array:
    """hidden [..., D] -> logits [..., V], float32."""
    matrix = params["embed"].T if config.tie_embeddings else params["head"]
    last_by_first = (((hidden.ndim - 1,), (0,)), ((), ()))
    matrix = matrix.astype(config.dtype)
    return product(hidden, matrix, last_by_first, preferred_element_type=jnp.float32)


def logits(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """One sequence a row: tokens [B,T] -> logits [B,T,V], float32. For tests and inspection."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = Transformer(config).apply(
        {"params": params}, tokens, positions, jnp.ones_like(tokens)
    )
    return head(config, params, hidden)


def logprobs(
    config: ModelConfig,
    params: Params,
    tokens: ArrayLike,
    positions: ArrayLike,
    segment_ids: ArrayLike,
    loss_index: ArrayLike,
    temperature: float = 1.0,
    chunk: int = 1024,
    layout: Layout = ONE_DEVICE,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy of the tokens listed in `loss_index`, under logits / T.

    tokens, positions, segment_ids [R,T]; loss_index [R,M], positions of sampled tokens filled
    up with 0. Returns logprobs and entropies [R,T] in nats, float32; 0 where not listed.
    A device holds the logits of `chunk` tokens at a time, and makes them again in the backward
    pass: so memory does not grow with T x V, and what is not listed costs nothing.
    """
    (rows, length), groups = tokens.shape, layout.sharers
    model = Transformer(config, layout)
    hidden = model.apply({"params": params}, tokens, positions, segment_ids)

    def by_device(x):  # [R, n, ...] -> [G, R/G * n, ...]: the rows of a device, end to end
        return x.reshape(groups, -1, *x.shape[2:])

    # Listed tokens are moved to the front of their device's, so that chunks are full.
    place = loss_index + length * (jnp.arange(rows) % (rows // groups))[:, None]
    place, listed = by_device(place), by_device(loss_index > 0)
    front = jnp.argsort(~listed, axis=1, stable=True)
    index = jnp.take_along_axis(jnp.where(listed, place, 0), front, axis=1)
    width = min(chunk, index.shape[1])
    index = jnp.pad(index, ((0, 0), (0, -index.shape[1] % width)))
    before = jnp.maximum(index - 1, 0)[..., None]
    source = jnp.take_along_axis(by_device(hidden), before, axis=1)
    target = jnp.take_along_axis(by_device(tokens), index, axis=1)

    def chunks(x):  # [G, n*width, ...] -> [n, G, width, ...]
        return jnp.moveaxis(x.reshape(groups, -1, width, *x.shape[2:]), 1, 0)

    used = -(-jnp.max(jnp.sum(listed, axis=1)) // width)
    matrix = params["embed"] if config.tie_embeddings else params["head"].T
    out = scores(temperature, matrix.astype(config.dtype), chunks(source), chunks(target), used)
    # Position 0 is never a sampled token: the fill of `index` lands there and is cleared.
    return tuple(
        jnp.zeros((groups, rows // groups * length), jnp.float32)
        .at[jnp.arange(groups)[:, None], index]
        .set(jnp.moveaxis(x, 0, 1).reshape(groups, -1))
        .reshape(rows, length)
        .at[:, 0]
        .set(0.0)
        for x in out
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scores(temperature, matrix, hidden, target, used):
    """Log-probability and entropy of target [n,G,W] after hidden [n,G,W,D], [n,G,W] float32,
    of the first `used` of n chunks, 0 for the rest; the entropy has no gradient. matrix [V,D].

    The logits of one chunk exist at a time; the backward pass makes them again.
    """
    return _scores(temperature, matrix, hidden, target, used)[0]


def _scores(temperature, matrix, hidden, target, used):
    def step(i, out):
        scaled = _product("gwd,vd->gwv", hidden[i], matrix) / temperature
        total = jax.nn.logsumexp(scaled, axis=-1)
        picked = jnp.sum(jnp.where(_here(target[i], scaled), scaled, 0.0), axis=-1)
        mean_logit = jnp.sum(jnp.exp(scaled - total[..., None]) * scaled, axis=-1)
        new = (picked - total, total - mean_logit, total)
        return jax.tree.map(lambda o, x: o.at[i].set(x), out, new)

    zeros = jnp.zeros(target.shape, jnp.float32)
    logprobs, entropy, total = jax.lax.fori_loop(0, used, step, (zeros, zeros, zeros))
    return (logprobs, entropy), (matrix, hidden, target, used, total)


def _scores_backward(temperature, saved, cotangents):
    matrix, hidden, target, used, total = saved
    d_logprobs, _ = cotangents

    def step(i, carry):
        d_matrix, d_hidden = carry
        scaled = _product("gwd,vd->gwv", hidden[i], matrix) / temperature
        d = _here(target[i], scaled) - jnp.exp(scaled - total[i][..., None])
        d = (d * d_logprobs[i][..., None] / temperature).astype(matrix.dtype)
        d_hidden = d_hidden.at[i].set(_product("gwv,vd->gwd", d, matrix).astype(hidden.dtype))
        return d_matrix + _product("gwv,gwd->vd", d, hidden[i]), d_hidden

    zeros = jnp.zeros(matrix.shape, jnp.float32), jnp.zeros_like(hidden)
    d_matrix, d_hidden = jax.lax.fori_loop(0, used, step, zeros)
    return d_matrix.astype(matrix.dtype), d_hidden, None, None


scores.defvjp(_scores, _scores_backward)


def _product(letters, a, b):
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def _here(target, scaled):
    # Not a gather: the vocabulary may lie on several devices.
    return jnp.arange(scaled.shape[-1]) == target[..., None]
