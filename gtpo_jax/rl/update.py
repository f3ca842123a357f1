"""The jitted update: a loss over packed rows, gradients summed over micro-batches, one step.

    J(theta) = sum over sampled tokens of weight * loss,   weights written by `pack`

Because the weights come from the whole mini-batch, micro-batches, devices and packing only
decide where the terms of that one sum are computed. Nothing here knows text or rewards.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gtpo_jax.errors import InputError
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.model.transformer import Params, logprobs
from gtpo_jax.parallel import Parallel
from gtpo_jax.rl.losses import LossInputs, Metrics
from gtpo_jax.rl.types import Batch


class TrainState(NamedTuple):
    """Everything the optimiser owns."""

    params: Params
    opt_state: Any
    step: jax.Array  # updates done, int32


class Update(NamedTuple):
    """score(params, batch) -> logprobs [R,T];  step(state, batch) -> state, metrics."""

    score: Callable[[Params, Batch], np.ndarray]
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def build(
    config: ModelConfig,
    loss: Callable[[LossInputs], tuple[jax.Array, Metrics]],
    optimizer: optax.GradientTransformation,
    parallel: Parallel,
    micro_rows: int,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> Update:
    """Compile the two functions of an update. Batches have a multiple of `micro_rows` rows.

    Raises InputError where `micro_rows` does not divide by the number of devices.
    """
    if micro_rows % parallel.devices:
        raise InputError(
            f"learn.micro_rows={micro_rows} does not divide by {parallel.devices} devices"
        )

    def forward(params: Params, batch: Batch):
        return logprobs(
            config,
            params,
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            batch.loss_index,
            temperature,
            chunk,
        )

    def objective(params: Params, batch: Batch):
        scores, entropy = forward(params, batch)
        inputs = LossInputs(
            scores,
            batch.old_logprobs,
            batch.behaviour_logprobs,
            batch.ref_logprobs,
            batch.advantages,
            batch.weights,
            batch.turn_ids,
            batch.segment_ids,
        )
        per_token, metrics = loss(inputs)
        sampled = batch.turn_ids >= 0
        sums = {name: jnp.sum(value) for name, value in metrics.items()}
        sums["entropy"] = jnp.sum(jnp.where(sampled, entropy, 0.0))
        sums["logprob"] = jnp.sum(jnp.where(sampled, scores, 0.0))
        sums["tokens"] = jnp.sum(sampled).astype(jnp.float32)
        total = jnp.sum(batch.weights * per_token)
        sums["loss"] = total
        return total, sums

    def gradients(params: Params, batch: Batch):
        return jax.grad(objective, has_aux=True)(params, batch)

    @functools.partial(jax.jit, donate_argnums=0)
    def apply(state: TrainState, grads: Params):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norms = {
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
        }
        return TrainState(params, opt_state, state.step + 1), norms

    @functools.partial(jax.jit, donate_argnums=0)
    def add(left, right):
        return jax.tree.map(jnp.add, left, right)

    gradients_of = parallel.sum_over_rows(gradients)
    score_of = parallel.per_row(lambda params, batch: forward(params, batch)[0])

    def score(params: Params, batch: Batch) -> np.ndarray:
        parts = [score_of(params, micro) for micro in micro_batches(batch, micro_rows)]
        return np.concatenate(jax.device_get(parts))

    def step(state: TrainState, batch: Batch):
        total = None
        for micro in micro_batches(batch, micro_rows):
            part = gradients_of(state.params, micro)
            total = part if total is None else add(total, part)
        grads, sums = total
        state, norms = apply(state, grads)
        loss_sum, tokens = sums.pop("loss"), sums.pop("tokens")
        means = {name: value / jnp.maximum(tokens, 1.0) for name, value in sums.items()}
        return state, {"loss": loss_sum, "tokens": tokens, **means, **norms}

    return Update(score, step)


def micro_batches(batch: Batch, rows: int) -> Iterator[Batch]:
    """Cut a batch into pieces of `rows` rows."""
    for first in range(0, len(batch.tokens), rows):
        yield Batch(*(x[first : first + rows] for x in batch))


def make_optimizer(
    name: str,
    lr: float,
    steps: int,
    warmup: int = 0,
    schedule: str = "constant",
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.95,
    max_grad_norm: float = 1.0,
    muon_lr: float = 0.02,
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW, or Muon for matrices with AdamW for the rest.

    The rate warms up linearly over `warmup` updates, then is constant, or falls to a tenth of
    its peak by `steps` ("cosine", "linear"). Raises InputError on an unknown name.
    """
    if schedule not in ("constant", "cosine", "linear"):
        raise InputError(f"optim.schedule={schedule!r}: constant, cosine or linear")

    def rate(peak: float) -> optax.Schedule:
        after = max(steps - warmup, 1)
        main = {
            "constant": optax.constant_schedule(peak),
            "cosine": optax.cosine_decay_schedule(peak, after, alpha=0.1),
            "linear": optax.linear_schedule(peak, 0.1 * peak, after),
        }[schedule]
        rising = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
        return optax.join_schedules([rising, main], [warmup]) if warmup else main

    if name == "adamw":
        core = optax.adamw(rate(lr), b1, b2, weight_decay=weight_decay)
    elif name == "muon":
        core = optax.contrib.muon(
            rate(muon_lr),
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            adam_learning_rate=rate(lr),
            muon_weight_dimension_numbers=_matrices_of_layers,
        )
    else:
        raise InputError(f"optim.name={name!r}: adamw or muon")
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), core)


def _matrices_of_layers(params: Params) -> Any:
    """Muon's part: the [L, in, out] kernels of the layers; embedding and head stay AdamW's."""

    def numbers(path, leaf):
        stacked = jax.tree_util.keystr(path).startswith("['layers']") and leaf.ndim == 3
        return optax.contrib.MuonDimensionNumbers(1, 2) if stacked else None

    return jax.tree_util.tree_map_with_path(numbers, params)
