"""The jitted update: a loss over packed rows, gradients summed over micro-batches, one step.

    J(theta) = sum over sampled tokens of weight * loss,   weights written by `pack`

Because the weights come from the whole mini-batch, micro-batches, devices and packing only
decide where the terms of that one sum are computed. Nothing here knows text or rewards.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gtpo_jax.errors import InputError
from gtpo_jax.model import lora
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.model.transformer import Params, logprobs
from gtpo_jax.parallel import Parallel
from gtpo_jax.rl.losses import LossInputs, Metrics
from gtpo_jax.rl.types import Batch


class TrainState(NamedTuple):
    """Everything an update reads and writes."""

    params: Params  # what is trained: all weights, or the adapters (model.lora)
    frozen: Params  # the rest; empty without adapters
    opt_state: Any
    step: jax.Array  # updates done, int32
    skipped: jax.Array  # updates skipped since the last one that was done, int32


class Update(NamedTuple):
    """rows(batch) -> micro-batches on the devices; score(params, frozen, micros) -> logprobs
    [R,T] of each; step(state, micros) -> state, metrics."""

    rows: Callable[[Batch], list[Batch]]
    score: Callable[[Params, Params, Sequence[Batch]], list[jax.Array]]
    step: Callable[[TrainState, Sequence[Batch]], tuple[TrainState, dict[str, jax.Array]]]
    programs: dict[str, Callable]  # the jitted parts, for `gtpo_jax.plan`


def start(
    config: ModelConfig,
    params: Params,
    optimizer: optax.GradientTransformation,
    devices: Parallel,
) -> TrainState:
    """The state before the first update, on the devices."""
    trained, frozen = (devices.place(part) for part in lora.split(config, params))
    zero = np.int32(0)
    return TrainState(
        trained,
        frozen,
        devices.make(optimizer.init, trained),
        devices.place(zero),
        devices.place(zero),
    )


def build(
    config: ModelConfig,
    loss: Callable[[LossInputs], tuple[jax.Array, Metrics]],
    optimizer: optax.GradientTransformation,
    devices: Parallel,
    micro_rows: int,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> Update:
    """The functions of an update. Batches have a multiple of `micro_rows` rows.

    An update whose loss or gradient is not finite changes nothing but `state.skipped`. Raises
    InputError where `micro_rows` does not divide by the number of devices that share rows.
    """
    if micro_rows % devices.sharers:
        raise InputError(
            f"learn.micro_rows={micro_rows} does not divide by the {devices.sharers} devices "
            "that share the rows"
        )
    tensor = devices.mesh.shape["tensor"]
    if config.kv_heads % tensor:
        raise InputError(
            f"parallel.tensor={tensor} does not divide the model's {config.kv_heads} key/value "
            "heads"
        )

    def forward(params: Params, frozen: Params, batch: Batch):
        return logprobs(
            config,
            lora.join(params, frozen),
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            batch.loss_index,
            temperature,
            chunk,
            devices.layout,
        )

    def objective(params: Params, frozen: Params, batch: Batch):
        scores, entropy = forward(params, frozen, batch)
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
        change = jnp.where(sampled, scores - batch.old_logprobs, -jnp.inf)
        return total, (sums, {"ratio_max": jnp.exp(jnp.max(change))})

    def gradients(params: Params, frozen: Params, batch: Batch):
        grads, (sums, maxima) = jax.grad(objective, has_aux=True)(params, frozen, batch)
        return grads, sums, maxima

    @functools.partial(jax.jit, donate_argnums=0)
    def apply(state: TrainState, grads: Params, loss: jax.Array):
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        def kept(new, old):
            return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

        state = TrainState(
            kept(params, state.params),
            state.frozen,
            kept(opt_state, state.opt_state),
            state.step + good,
            jnp.where(good, 0, state.skipped + 1),
        )
        changed = jnp.where(good, optax.tree.norm(updates), 0.0)
        return state, {"grad_norm": norm, "update_norm": changed, "skipped": state.skipped}

    @functools.partial(jax.jit, donate_argnums=0)
    def add(left, right):
        (grads, sums, maxima), (more, others, higher) = left, right
        both = jax.tree.map(jnp.add, (grads, sums), (more, others))
        return *both, jax.tree.map(jnp.maximum, maxima, higher)

    gradients_of = devices.over_rows(gradients)
    score_of = devices.per_row(lambda params, frozen, batch: forward(params, frozen, batch)[0])

    def rows(batch: Batch) -> list[Batch]:
        cuts = range(0, len(batch.tokens), micro_rows)
        return [devices.rows(Batch(*(x[i : i + micro_rows] for x in batch))) for i in cuts]

    def score(params: Params, frozen: Params, micros: Sequence[Batch]) -> list[jax.Array]:
        return list(devices.each(lambda micro: score_of(params, frozen, micro), micros))

    def step(state: TrainState, micros: Sequence[Batch]):
        parts = devices.each(lambda m: gradients_of(state.params, state.frozen, m), micros)
        grads, sums, maxima = functools.reduce(add, parts)
        state, norms = apply(state, grads, sums["loss"])
        loss_sum, tokens = sums.pop("loss"), sums.pop("tokens")
        means = {name: value / jnp.maximum(tokens, 1.0) for name, value in sums.items()}
        return state, {"loss": loss_sum, "tokens": tokens, **means, **maxima, **norms}

    programs: dict[str, Callable] = {
        "gradients": gradients_of,
        "add": add,
        "apply": apply,
        "score": score_of,
    }
    return Update(rows, score, step, programs)


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
    state_dtype: str = "float32",
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW, or Muon for matrices with AdamW for the rest.

    The rate warms up linearly over `warmup` updates, then is constant, or falls to a tenth of
    its peak by `steps` ("cosine", "linear"). `state_dtype` is that of the first moment; the
    second, whose small numbers bfloat16 would lose, stays as the weights are. Raises InputError
    on an unknown name.
    """
    if state_dtype not in ("float32", "bfloat16"):
        raise InputError(f"optim.state_dtype={state_dtype!r}: float32 or bfloat16")
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
        core = optax.adamw(
            rate(lr), b1, b2, weight_decay=weight_decay, mu_dtype=jnp.dtype(state_dtype)
        )
    elif name == "muon":
        core = optax.contrib.muon(
            rate(muon_lr),
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            adam_learning_rate=rate(lr),
            mu_dtype=jnp.dtype(state_dtype),
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
