"""Reinforcement learning with a tool, several turns at a time. A table of contents.

    python -m gtpo_jax.train --config=configs/tiny.py:gtpo --workdir=runs/tiny/gtpo

A run starts in one of four ways, in this order:
    1. --workdir has a checkpoint       it is resumed there (rules: gtpo_jax/checkpoint.py)
    2. config.model.init_from=RUN       from another run's policy, such as a cold start
    3. config.model.source=...          from published weights
    4. otherwise                        from a fresh initialisation

--dry_run checks the config and says what the run would be, without starting it.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gtpo_jax import build, parallel, preview
from gtpo_jax.checkpoint import Checkpoints
from gtpo_jax.config import default, named, parse_command, validate
from gtpo_jax.errors import Diverged, InputError, run_command
from gtpo_jax.evaluate import evaluate, rollout_metrics
from gtpo_jax.generation import Generation, sampler
from gtpo_jax.metrics import CompileCounter, MetricsLog, drop_from_step
from gtpo_jax.model import lora
from gtpo_jax.rl import record
from gtpo_jax.rl.advantages import ADVANTAGES, discounted_returns, equal_groups
from gtpo_jax.rl.learn import learn, prepare
from gtpo_jax.rl.losses import LOSSES
from gtpo_jax.rl.rewards import score as score_rewards
from gtpo_jax.rl.rollout import collect
from gtpo_jax.rl.update import TrainState, start
from gtpo_jax.tasks import get_task
from gtpo_jax.tasks.overlap import overlap

FLAGS = {"dry_run": (False, "check the config, say what the run would be, and end")}


def run(
    config: ConfigDict,
    workdir: Path,
    loss: Callable | None = None,
    advantages: Callable | None = None,
    similarity: Callable | None = None,
) -> TrainState:
    """Train; `loss`, `advantages` and `similarity` replace the config's by functions of one's
    own."""
    validate(config)
    loss = loss or named(LOSSES, config.loss, "loss")
    advantages = jax.jit(advantages or named(ADVANTAGES, config.advantage, "advantage"))
    similarity = similarity or build.similarity(config)
    equal, returns = jax.jit(equal_groups), jax.jit(discounted_returns)
    compiles = CompileCounter()
    with contextlib.ExitStack() as stack:  # closed in any case: a save under way is finished
        # ---- setup -------------------------------------------------------------------------
        judges = stack.enter_context(build.judges(config))
        devices = stack.enter_context(build.devices(config))
        problems = build.problems(config, "train")
        held_out = build.problems(config, config.task.eval_split)
        if len(problems) < config.rollout.problems:
            raise InputError(
                f"rollout.problems={config.rollout.problems}, but task {config.task.name!r} "
                f"has {len(problems)} training problems"
            )
        speaks = parallel.speaks()
        say = print if speaks else lambda *_: None
        say(overlap(problems, held_out))

        # ---- model -------------------------------------------------------------------------
        policy = build.policy(config, workdir)
        build.check_prompts(config, policy, problems + held_out)
        optimizer, update = prepare(config, policy.config, loss, devices)
        state = start(policy.config, policy.params, optimizer, devices)
        wants_reference = config.loss.options.get("kl_coef", 0.0) > 0
        reference = jax.tree.map(jnp.copy, state[:2]) if wants_reference else None
        say("\n".join(preview.lines(config, policy.config, devices, workdir)))
        generation = Generation(config, policy, devices)
        say(generation.warm_up(config.rollout.chunk))
        sample = sampler(config, policy, generation, judges, get_task(config.task.name))

        # ---- restore -----------------------------------------------------------------------
        checkpoints = stack.enter_context(Checkpoints(workdir, config.keep_checkpoints))
        cursor = {"step": 0, "consumed": 0, "seed": config.seed}
        if checkpoints.latest() is not None:
            state, cursor = checkpoints.restore(state, config.seed)
            say(f"resuming {workdir} after step {cursor['step']}")
        log = stack.enter_context(MetricsLog(workdir, cursor["step"], speaks, config))
        trajectory_path = workdir / "trajectories.jsonl"
        if speaks:
            drop_from_step(trajectory_path, cursor["step"])
            (workdir / "config.json").write_text(config.to_json_best_effort(indent=1))

        # ---- loop --------------------------------------------------------------------------
        saved = cursor["step"]
        for step in range(saved, config.steps + 1):
            generation.refresh(lora.join(state.params, state.frozen))
            last, score = step == config.steps, None
            if last or step % config.eval_every == 0:
                measured, _ = evaluate(sample, held_out, config.task.eval_samples)
                log.write(step, "eval", measured, config.steps)
                score = measured["eval/accuracy"]
            if step > saved and (last or step % config.checkpoint_every == 0):
                checkpoints.save(step, state, cursor, score)
            if last:
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
            generation.release()
            crediting = time.perf_counter()
            rewards, mask, groups = score_rewards(
                trajectories,
                config.rollout.max_turns,
                similarity=similarity,
                max_tokens=config.rollout.max_tokens,
                **build.reward_options(config),
            )
            advantage = np.asarray(advantages(rewards, mask, groups))
            updating = time.perf_counter()
            state, learned, skipped = learn(
                config,
                policy.config,
                update,
                state,
                reference,
                trajectories,
                advantage,
                mask,
                groups,
                step,
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
                    "update/tokens_per_s": learned["train/tokens"] / (ended - updating),
                    "time/credit": updating - crediting,
                    "time/update": ended - updating,
                    "time/step": ended - started,
                    "compile/count": compiles.take(),
                },
                config.steps,
            )
            chosen = step % config.trajectories_every == 0 or step + 1 == config.steps
            if chosen and speaks:
                record.write(
                    trajectory_path,
                    step,
                    trajectories,
                    policy.tokenizer,
                    reward=rewards.turn,
                    discounted_return=np.asarray(returns(rewards.turn, mask, gamma_of(config))),
                    advantage=advantage,
                )
            if skipped and speaks:
                record.write_skipped(workdir / "skipped.jsonl", step, skipped)
            if learned.get("train/skipped", 0) >= config.learn.max_skipped:
                raise Diverged(
                    f"step {step}: {learned['train/skipped']} updates in a row had a loss or "
                    f"gradient that is not finite; {workdir / 'skipped.jsonl'} names their "
                    "problems"
                )
    return state


def gamma_of(config: ConfigDict) -> float:
    """The discount that the recorded returns use: the estimator's, else the paper's."""
    return config.advantage.options.get("gamma", 0.9)


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
    config, workdir, options = parse_command(FLAGS)
    if options["dry_run"]:
        validate(config)
        with build.devices(config) as devices:
            print("\n".join(preview.lines(config, preview.model(config), devices, workdir)))
        print("settings:", *preview.changed(config, default()), sep="\n  ")
    elif workdir is None:
        raise InputError("--workdir=RUN is needed, the folder that the run writes to")
    else:
        run(config, workdir)


if __name__ == "__main__":
    run_command(main)
