"""What one step of training does with its trajectories: mini-batches, packed, scored, learned.

Mini-batches are a seeded permutation of whole groups. pi_old, and the reference where there is
one, is scored once, before the first update.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from gtpo_jax.model import flops
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.parallel import Parallel
from gtpo_jax.rl.packing import pack
from gtpo_jax.rl.types import Batch, Trajectory
from gtpo_jax.rl.update import TrainState, Update, build, make_optimizer


class Learned(NamedTuple):
    """What a step has changed, its metrics, and the problems of updates that were skipped."""

    state: TrainState
    metrics: dict[str, float]
    skipped: list[list[str]]


def prepare(
    config: ConfigDict, model: ModelConfig, loss: Callable, devices: Parallel
) -> tuple[optax.GradientTransformation, Update]:
    """The optimiser and the update that a config asks for."""
    optimizer = make_optimizer(
        steps=config.steps * config.learn.epochs * config.learn.minibatches, **config.optim
    )
    update = build(
        model,
        loss,
        optimizer,
        devices,
        config.learn.micro_rows,
        config.rollout.temperature,
        config.learn.logprob_chunk,
    )
    return optimizer, update


def learn(
    config: ConfigDict,
    model: ModelConfig,
    update: Update,
    state: TrainState,
    reference: Any,
    trajectories: Sequence[Trajectory],
    advantage: np.ndarray,
    mask: np.ndarray,
    groups: np.ndarray,
    step: int,
) -> Learned:
    """All mini-batches and epochs of one step. advantage, mask [N,K], groups [N]."""
    started = time.perf_counter()
    order = np.random.default_rng((config.seed, step, 1)).permutation(groups.max() + 1)
    parts = []
    for chosen in np.array_split(order, config.learn.minibatches):
        rows = np.flatnonzero(np.isin(groups, chosen) & mask.any(axis=1))
        if len(rows):  # else every trajectory of these groups was left out
            parts.append(rows)
    if not parts:
        return Learned(state, {"train/tokens": 0.0}, [])
    batches = [_pack(config, trajectories, advantage, rows) for rows in parts]
    scored = [_score(update, state, reference, batch) for batch in batches]
    history, skipped = [], []
    for _ in range(config.learn.epochs):
        for micros in scored:
            state, metrics = update.step(state, micros)
            history.append(metrics)
    history = jax.device_get(history)
    seconds = time.perf_counter() - started
    for i, metrics in enumerate(history):
        if metrics["skipped"]:
            rows = parts[i % len(parts)]
            skipped.append(sorted({trajectories[r].problem.id for r in rows.tolist()}))
    means = {f"train/{k}": float(np.mean([h[k] for h in history])) for k in history[0]}
    means["train/ratio_max"] = float(max(h["ratio_max"] for h in history))
    means["train/tokens"] = float(sum(h["tokens"] for h in history))
    means["train/skipped"] = int(history[-1]["skipped"])
    real = np.mean([(b.segment_ids > 0).mean() for b in batches])
    means["train/padding_share"] = 1.0 - float(real)
    lengths = [trajectories[r].length() for rows in parts for r in rows.tolist()]
    needed = config.learn.epochs * flops.update(model, lengths)
    means["train/tflops"] = needed / seconds / 1e12
    device = flops.DEVICES.get(jax.devices()[0].device_kind)
    if device:
        means["train/mfu"] = needed / seconds / (device.flops * jax.device_count())
    return Learned(state, means, skipped)


def _pack(config, trajectories, advantage, rows) -> Batch:
    return pack(
        [trajectories[i] for i in rows],
        advantage[rows],
        config.learn.row_tokens,
        config.loss.aggregation,
        config.rollout.max_tokens,
        config.learn.micro_rows,
        config.learn.packed,
    )


def _score(update: Update, state: TrainState, reference, batch: Batch) -> list[Batch]:
    """The micro-batches of a mini-batch, on the devices, with the logprobs they lack."""
    micros = update.rows(batch)
    old = update.score(state.params, state.frozen, micros)
    micros = [m._replace(old_logprobs=x) for m, x in zip(micros, old, strict=True)]
    if reference is not None:
        params, frozen = reference
        ref = update.score(params, frozen, micros)
        micros = [m._replace(ref_logprobs=x) for m, x in zip(micros, ref, strict=True)]
    return micros
