"""Accuracy of a policy on held-out problems, by the engine, rollout and sandbox of training.

    python -m gtpo_jax.evaluate --config=configs/tiny.py --workdir=runs/tiny/gtpo

evaluates the newest checkpoint of a run and writes eval.json and eval_trajectories.jsonl.
"""

import json
from collections.abc import Sequence

import numpy as np

from gtpo_jax import build
from gtpo_jax.config import parse_command, validate
from gtpo_jax.errors import run_command
from gtpo_jax.rl import record
from gtpo_jax.rl.rollout import RolloutStats, Sampler
from gtpo_jax.rl.types import Trajectory
from gtpo_jax.tasks import get_task
from gtpo_jax.tasks.types import Problem
from gtpo_jax.tools.toolcall import Call, Invalid

# Evaluations draw with keys of their own, the same ones every time: what changes between two
# evaluations is the policy, not the dice.
EVAL_STEP = 2**31


def evaluate(
    sample: Sampler, problems: Sequence[Problem], samples: int
) -> tuple[dict[str, float], list[Trajectory]]:
    """sample(problems, samples, step) -> metrics `eval/*` and the trajectories."""
    trajectories, stats = sample(problems, samples, EVAL_STEP)
    metrics = rollout_metrics(trajectories, stats)
    out = {"eval/accuracy": metrics.pop("accuracy/train")}
    out |= {f"eval/{name.replace('/', '_')}": value for name, value in metrics.items()}
    return out, trajectories


def rollout_metrics(
    trajectories: Sequence[Trajectory], stats: RolloutStats
) -> dict[str, float]:
    """What a set of trajectories was like. Trajectories that failed by our fault are out."""
    ours = [t for t in trajectories if t.status == "tool_failure"]
    kept = [t for t in trajectories if t.status != "tool_failure"]
    calls = [u for t in kept for u in t.turns if isinstance(u.call, Call)]
    invalid = [u for t in kept for u in t.turns if isinstance(u.call, Invalid)]
    ran = [u.result.status for u in calls if u.result is not None]

    def share(part: int, whole: int) -> float:
        return part / whole if whole else 0.0

    n = len(kept)
    return {
        "accuracy/train": share(sum(t.correct for t in kept), n),
        "rollout/tokens_per_s": stats.sampled / max(stats.seconds, 1e-9),
        "rollout/turns_mean": share(sum(len(t.turns) for t in kept), n),
        "rollout/tokens_mean": share(sum(t.sampled_length() for t in kept), n),
        "rollout/truncated": share(sum(t.status == "truncated" for t in kept), n),
        "rollout/void": share(sum(t.status == "void" for t in kept), n),
        "rollout/tool_failure": share(len(ours), len(trajectories)),
        "tool/calls_mean": share(len(calls), n),
        "tool/error_rate": share(sum(s != "ok" for s in ran), len(ran)),
        "tool/timeout_rate": share(sum(s == "timeout" for s in ran), len(ran)),
        "tool/invalid_rate": share(len(invalid), len(invalid) + len(calls)),
        "time/rollout": stats.seconds,
        "time/tools": stats.tool_seconds,
    }


def main() -> None:
    """Evaluate the newest checkpoint of a run."""
    config, workdir = parse_command()
    validate(config)
    with build.sandbox(config) as tools:
        policy = build.from_run(workdir)
        engine = build.engine(config, policy)
        engine.refresh(policy.params)
        sample = build.sampler(config, policy, engine, tools, get_task(config.task.name))
        problems = build.problems(config, config.task.eval_split)
        metrics, trajectories = evaluate(sample, problems, config.task.eval_samples)
    (workdir / "eval.json").write_text(json.dumps(metrics, indent=1))
    path = workdir / "eval_trajectories.jsonl"
    path.unlink(missing_ok=True)
    record.write(path, 0, trajectories, policy.tokenizer)
    count, correct = len(trajectories), metrics["eval/accuracy"]
    error = np.sqrt(correct * (1 - correct) / max(count, 1))
    print(f"accuracy {correct:.3f} +- {error:.3f} over {count} trajectories; {path}")


if __name__ == "__main__":
    run_command(main)
