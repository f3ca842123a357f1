"""Reinforcement learning with a tool, several turns at a time. A table of contents.

    python -m gtpo_jax.train --config=configs/tiny.py:gtpo --workdir=runs/tiny/gtpo

A run starts in one of four ways, in this order:
    1. --workdir has a checkpoint       it is resumed there (rules: gtpo_jax/checkpoint.py)
    2. config.model.init_from=RUN       from another run's policy, such as a cold start
    3. config.model.source=...          from published weights
    4. otherwise                        from a fresh initialisation
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gtpo_jax import build, parallel
from gtpo_jax.checkpoint import Checkpoints
from gtpo_jax.config import known, options_for, parse_command, validate
from gtpo_jax.errors import InputError, run_command
from gtpo_jax.evaluate import evaluate, rollout_metrics
from gtpo_jax.metrics import CompileCounter, MetricsLog, drop_from_step
from gtpo_jax.rl import record
from gtpo_jax.rl.advantages import ADVANTAGES, discounted_returns, equal_groups
from gtpo_jax.rl.losses import LOSSES
from gtpo_jax.rl.packing import pack
from gtpo_jax.rl.rewards import score as score_rewards
from gtpo_jax.rl.rollout import collect
from gtpo_jax.rl.shaping import SIMILARITIES
from gtpo_jax.rl.types import Batch, Trajectory
from gtpo_jax.rl.update import TrainState, Update, make_optimizer
from gtpo_jax.rl.update import build as build_update
from gtpo_jax.tasks import get_task
from gtpo_jax.tasks.overlap import overlap


def run(
    config: ConfigDict,
    workdir: Path,
    loss: Callable | None = None,
    advantages: Callable | None = None,
) -> TrainState:
    """Train; `loss` and `advantages` replace the config's by functions of one's own."""
    validate(config)
    loss = loss or named(LOSSES, config.loss, "loss")
    advantages = jax.jit(advantages or named(ADVANTAGES, config.advantage, "advantage"))
    similarity = known(SIMILARITIES, config.reward.similarity, "similarity")
    equal, returns = jax.jit(equal_groups), jax.jit(discounted_returns)
    compiles = CompileCounter()
    with contextlib.ExitStack() as stack:  # closed in any case: a save under way is finished
        judges = stack.enter_context(build.judges(config))
        # ---- setup -------------------------------------------------------------------------
        devices = parallel.make(config.parallel.mapping, config.parallel.devices)
        problems = build.problems(config, "train")
        held_out = build.problems(config, config.task.eval_split)
        if len(problems) < config.rollout.problems:
            raise InputError(
                f"rollout.problems={config.rollout.problems}, but task {config.task.name!r} "
                f"has {len(problems)} training problems"
            )
        print(overlap(problems, held_out))

        # ---- model -------------------------------------------------------------------------
        policy = build.policy(config, workdir)
        build.check_prompts(config, policy, problems + held_out)
        optimizer = make_optimizer(
            steps=config.steps * config.learn.epochs * config.learn.minibatches,
            **config.optim,
        )
        update = build_update(
            policy.config,
            loss,
            optimizer,
            devices,
            config.learn.micro_rows,
            config.rollout.temperature,
            config.learn.logprob_chunk,
        )
        params = devices.replicate(policy.params)
        state = TrainState(params, optimizer.init(params), devices.replicate(np.int32(0)))
        wants_reference = config.loss.options.get("kl_coef", 0.0) > 0
        reference = jax.tree.map(jnp.array, params) if wants_reference else None
        engine = build.engine(config, policy)
        print(engine.warm_up(config.rollout.chunk))
        sample = build.sampler(config, policy, engine, judges, get_task(config.task.name))

        # ---- restore -----------------------------------------------------------------------
        checkpoints = stack.enter_context(Checkpoints(workdir, config.keep_checkpoints))
        cursor = {"step": 0, "consumed": 0, "seed": config.seed}
        if checkpoints.latest() is not None:
            state, cursor = checkpoints.restore(state, config.seed)
            print(f"resuming {workdir} after step {cursor['step']}")
        log = MetricsLog(workdir, cursor["step"])
        trajectory_path = workdir / "trajectories.jsonl"
        drop_from_step(trajectory_path, cursor["step"])
        (workdir / "config.json").write_text(config.to_json_best_effort(indent=1))

        # ---- loop --------------------------------------------------------------------------
        for step in range(cursor["step"], config.steps + 1):
            engine.refresh(devices.local(state.params))
            if step % config.eval_every == 0 or step == config.steps:
                measured, _ = evaluate(sample, held_out, config.task.eval_samples)
                log.write(step, "eval", measured, config.steps)
            if step == config.steps:
                break
            started = time.perf_counter()
            trajectories, stats, consumed = collect(
                sample,
                problems,
                cursor["consumed"],
                step,
                config.seed,
                config.rollout.problems,
                config.rollout.samples,
                config.rollout.resample_rounds,
            )
            rewards, mask, groups = score_rewards(
                trajectories,
                config.rollout.max_turns,
                similarity=similarity,
                max_tokens=config.rollout.max_tokens,
                **{k: v for k, v in config.reward.items() if k != "similarity"},
            )
            advantage = np.asarray(advantages(rewards, mask, groups))
            updating = time.perf_counter()
            state, learned = learn(
                config, update, state, reference, trajectories, advantage, mask, groups, step
            )
            ended = time.perf_counter()
            cursor = {**cursor, "step": step + 1, "consumed": consumed}
            earned = np.where(mask, rewards.turn, 0.0).sum(axis=1)[mask.any(axis=1)]
            log.write(
                step,
                "train",
                {
                    **rollout_metrics(trajectories, stats),
                    **judges.metrics(),
                    "reward/mean": earned.mean() if len(earned) else 0.0,
                    "reward/equal_groups": equal(rewards, mask, groups).mean(),
                    **advantage_metrics(advantage, mask),
                    **learned,
                    "update/tokens_per_s": learned["loss/tokens"] / (ended - updating),
                    "time/update": ended - updating,
                    "time/step": ended - started,
                    "compile/count": compiles.take(),
                },
                config.steps,
            )
            if step % config.trajectories_every == 0 or step + 1 == config.steps:
                record.write(
                    trajectory_path,
                    step,
                    trajectories,
                    policy.tokenizer,
                    reward=rewards.turn,
                    discounted_return=np.asarray(returns(rewards.turn, mask, gamma_of(config))),
                    advantage=advantage,
                )
            if cursor["step"] % config.checkpoint_every == 0 or step + 1 == config.steps:
                checkpoints.save(cursor["step"], state, cursor)
        log.close()
    return state


def named(table: dict[str, Callable], chosen: ConfigDict, what: str) -> Callable:
    """The function of that name with its options bound."""
    function = known(table, chosen.name, what)
    return functools.partial(function, **options_for(function, chosen.options, what))


def gamma_of(config: ConfigDict) -> float:
    """The discount that the recorded returns use: the estimator's, else the paper's."""
    return config.advantage.options.get("gamma", 0.9)


def learn(
    config: ConfigDict,
    update: Update,
    state: TrainState,
    reference,
    trajectories: Sequence[Trajectory],
    advantage: np.ndarray,
    mask: np.ndarray,
    groups: np.ndarray,
    step: int,
) -> tuple[TrainState, dict[str, float]]:
    """All mini-batches and epochs of one step. pi_old is scored once, before the first."""

    def packed(chosen: np.ndarray) -> Batch:
        rows = np.flatnonzero(np.isin(groups, chosen) & mask.any(axis=1))
        return pack(
            [trajectories[i] for i in rows],
            advantage[rows],
            config.learn.row_tokens,
            config.loss.aggregation,
            config.rollout.max_tokens,
            config.learn.micro_rows,
        )

    order = np.random.default_rng((config.seed, step, 1)).permutation(groups.max() + 1)
    parts = np.array_split(order, config.learn.minibatches)
    batches = []
    for part in parts:
        if not np.any(np.isin(groups, part) & mask.any(axis=1)):
            continue  # every trajectory of these groups was left out
        batch = packed(part)
        batch = batch._replace(old_logprobs=update.score(state.params, batch))
        if reference is not None:
            batch = batch._replace(ref_logprobs=update.score(reference, batch))
        batches.append(batch)
    if not batches:
        return state, {"loss/tokens": 0.0}
    history = []
    for _ in range(config.learn.epochs):
        for batch in batches:
            state, metrics = update.step(state, batch)
            history.append(metrics)
    history = jax.device_get(history)
    means = {f"loss/{k}": float(np.mean([h[k] for h in history])) for k in history[0]}
    means["loss/tokens"] = float(sum(h["tokens"] for h in history))
    return state, means


def advantage_metrics(advantage: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Mean, spread and share of zeros over the turns that count."""
    values = advantage[mask] if mask.any() else np.zeros(1)
    return {
        "advantage/mean": float(values.mean()),
        "advantage/std": float(values.std()),
        "advantage/abs_mean": float(np.abs(values).mean()),
        "advantage/zero_share": float((values == 0).mean()),
    }


def main() -> None:
    """Train as the command line says."""
    config, workdir, _ = parse_command()
    print(json.dumps({"algorithm": config.advantage.name, "task": config.task.name}))
    run(config, workdir)


if __name__ == "__main__":
    run_command(main)
