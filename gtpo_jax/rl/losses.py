"""Policy-gradient losses: pure functions on arrays, one row of options each.

A loss is f(inputs: LossInputs, **options) -> (per_token_loss [R,T], metrics). It sees logprobs
and advantages, never rewards, text or a model. `rl.update` computes sum(weights * loss); how
tokens are averaged was decided by `pack`, which wrote the weights. `metrics` are [R,T] arrays,
reported as means over the sampled tokens.

To add one: write a function, name it in LOSSES.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gtpo_jax.errors import InputError
from gtpo_jax.rl.types import Array

Metrics = dict[str, jax.Array]


class LossInputs(NamedTuple):
    """All [R,T]. `weights` is what the loss will be summed with; a loss need not read it."""

    logprobs: Array
    old_logprobs: Array
    behaviour_logprobs: Array
    ref_logprobs: Array | None
    advantages: Array
    weights: Array
    turn_ids: Array
    segment_ids: Array


def ppo_clip(
    inputs: LossInputs,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    tis_cap: float | None = None,
) -> tuple[jax.Array, Metrics]:
    """-min(w A, clip(w, 1-clip_low, 1+clip_high) A) with w = pi / pi_old, token by token.

    dual_clip c (arXiv 1912.09729): where A < 0, the surrogate is at least c A.
    kl_coef adds the k3 estimate of KL(pi || ref); tis_cap C weights by min(pi_old / mu, C),
    mu the sampler.
    """
    ratio = _exp(_sampled(inputs, inputs.logprobs - inputs.old_logprobs))
    return _surrogate(inputs, ratio, clip_low, clip_high, dual_clip, kl_coef, tis_cap)


def gspo(
    inputs: LossInputs,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    tis_cap: float | None = None,
) -> tuple[jax.Array, Metrics]:
    """GSPO (arXiv 2507.18071): s_i = exp(mean_t log w_{i,t}) in place of the token's ratio."""
    ratio = _exp(_segment_mean(inputs, inputs.logprobs - inputs.old_logprobs))
    return _surrogate(inputs, ratio, clip_low, clip_high, dual_clip, kl_coef, tis_cap)


def gspo_token(
    inputs: LossInputs,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    tis_cap: float | None = None,
) -> tuple[jax.Array, Metrics]:
    """GSPO, token form: s_{i,t} = sg[s_i] pi / sg[pi]: the same value, a gradient per token."""
    mean = _segment_mean(inputs, inputs.logprobs - inputs.old_logprobs)
    logprobs = _sampled(inputs, inputs.logprobs)
    ratio = _exp(jax.lax.stop_gradient(mean - logprobs) + logprobs)
    return _surrogate(inputs, ratio, clip_low, clip_high, dual_clip, kl_coef, tis_cap)


LOSSES: dict[str, Callable[..., tuple[jax.Array, Metrics]]] = {
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "gspo_token": gspo_token,
}


def _exp(log_ratio: Array) -> jax.Array:
    # e^20 is far beyond any clip range; infinity times an advantage of 0 would be NaN.
    return jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))


def _sampled(inputs: LossInputs, x: Array) -> jax.Array:
    """x where the policy sampled, 0 elsewhere: nothing off the mask has a value or gradient."""
    return jnp.where(inputs.turn_ids >= 0, x, 0.0)


def _segment_mean(inputs: LossInputs, x: Array) -> jax.Array:
    """Mean of x over the sampled tokens of each token's segment. [R,T] -> [R,T]."""

    def total(values, segments):  # one row; a row of T tokens has at most T segments
        sums = jax.ops.segment_sum(values, segments, num_segments=values.shape[0] + 1)
        return sums[segments]

    count = jax.vmap(total)((inputs.turn_ids >= 0).astype(jnp.float32), inputs.segment_ids)
    sums = jax.vmap(total)(_sampled(inputs, x), inputs.segment_ids)
    return _sampled(inputs, sums / jnp.maximum(count, 1.0))


def _surrogate(
    inputs: LossInputs,
    ratio: jax.Array,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float,
    tis_cap: float | None,
) -> tuple[jax.Array, Metrics]:
    chex.assert_rank([inputs.logprobs, inputs.advantages, inputs.turn_ids], 2)
    advantages = inputs.advantages
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    surrogate = jnp.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        floor = jnp.maximum(surrogate, dual_clip * advantages)
        surrogate = jnp.where(advantages < 0, floor, surrogate)
    mismatch = _sampled(inputs, inputs.old_logprobs - inputs.behaviour_logprobs)
    if tis_cap is not None:
        surrogate *= jax.lax.stop_gradient(jnp.minimum(jnp.exp(mismatch), tis_cap))
    loss = -surrogate
    metrics = {
        "ratio": ratio,
        "clip_low": ((ratio < 1.0 - clip_low) & (advantages < 0)).astype(jnp.float32),
        "clip_high": ((ratio > 1.0 + clip_high) & (advantages > 0)).astype(jnp.float32),
        "kl_behaviour": -mismatch,  # k1 estimate of KL(sampler || trainer)
    }
    if kl_coef:
        if inputs.ref_logprobs is None:
            raise InputError(f"kl_coef={kl_coef} needs ref_logprobs, and there are none")
        log_ref = _sampled(inputs, inputs.ref_logprobs - inputs.logprobs)
        k3 = jnp.exp(log_ref) - log_ref - 1.0
        loss = loss + kl_coef * k3
        metrics["kl_ref"] = k3
    metrics = {name: _sampled(inputs, value) for name, value in metrics.items()}
    return _sampled(inputs, loss), jax.lax.stop_gradient(metrics)
