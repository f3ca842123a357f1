"""Run what a study lacks; what is done is skipped, what was cut off goes on.

    python -m experiments.run --study=main_math --preset=tiny --seeds=5
    python -m experiments.run --study=main_math --preset=smollm2 --seeds=3 --data=FOLDER

A run is a folder ROOT/PRESET/ARM/seedN. Of a seed, all arms see the same problems in the same
order, begin from the same cold start (ROOT/PRESET/coldstart/seedN) and draw with the same keys;
arms that studies share are run once. Its answers to a benchmark are in ARM/seedN-BENCHMARK.
Each is the command that its manifest.json names, so it can be repeated without this one.

Start it as often as there are machines or cards: runners that share ROOT share the work. With
--minutes=8 it begins nothing after 8 minutes, and a run that is under way is stopped, to go on
from its last checkpoint when this is started again; the exit code is 75 then.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import claims, manifest
from experiments.studies import ARMS, PRESETS, STUDIES
from gtpo_jax.config import known, validate
from gtpo_jax.errors import InputError, command_parser, run_command
from gtpo_jax.evaluate import for_benchmark

POLL = 5.0  # seconds
OUT_OF_TIME = 75  # exit code; sysexits.h: try again


@dataclass(frozen=True)
class Job:
    """One folder to fill: by this command, after the folder `needs` is done. The command reads
    the `splits` of `config.task`."""

    folder: Path
    command: tuple[str, ...]
    config: ConfigDict
    splits: tuple[str, ...]
    needs: Path | None = None

    @property
    def name(self) -> str:
        return "/".join(self.folder.parts[-3:])


def jobs(
    study: str, preset: str, seeds: Sequence[int], root: Path, data: str, isolation: str
) -> list[Job]:
    """Seed by seed, so that arms that are compared run one after the other."""
    asked, scale = known(STUDIES, study, "study"), known(PRESETS, preset, "preset")
    places = {"data": data, "traces": str(root / preset / "traces.jsonl")}

    def job(name: str, algorithm: str, folder: Path, settings: dict, needs=None) -> Job:
        settings = {
            key: value.format(**places) if isinstance(value, str) else value
            for key, value in settings.items()
        }
        argument = scale.config_argument.format(algorithm=algorithm)
        config = resolved(scale.config, argument, settings)
        command = (
            *(sys.executable, "-m", f"gtpo_jax.{name}"),
            f"--config={scale.config}:{argument}",
            *(f"--config.{key}={value}" for key, value in settings.items()),
            f"--workdir={folder}",
        )
        return Job(folder, command, config, ("train", config.task.eval_split), needs)

    def evaluation(trained: Job, benchmark: str) -> Job:
        config = for_benchmark(trained.config, benchmark, {"count": scale.count, "data": data})
        folder = trained.folder.with_name(f"{trained.folder.name}-{benchmark}")
        settings = [f"--benchmarks={benchmark}", "--nogreedy", f"--samples={scale.samples}"]
        settings += [f"--count={scale.count}"] * bool(scale.count)
        settings += [f"--data={data}"] * bool(data) + [f"--out={folder}"]
        command = tuple(
            part.replace("gtpo_jax.train", "gtpo_jax.evaluate") for part in trained.command
        )
        splits = (config.task.eval_split,)
        return Job(folder, (*command, *settings), config, splits, needs=trained.folder)

    made = []
    for seed in seeds:
        shared = {"seed": seed, "sandbox.isolation": isolation}
        first = seed % scale.cold_starts if scale.cold_starts else seed
        cold = root / preset / "coldstart" / f"seed{first}"
        if first == seed:
            made.append(job("sft", "gtpo", cold, shared | scale.cold_start))
        for arm in asked.arms:
            settings = shared | scale.settings | ARMS[arm].settings
            settings["model.init_from"] = str(cold)
            folder = root / preset / arm / f"seed{seed}"
            trained = job("train", ARMS[arm].algorithm, folder, settings, needs=cold)
            made += [trained, *(evaluation(trained, b) for b in asked.benchmarks[preset])]
    return made


def resolved(file: str, argument: str, settings: dict[str, Any]) -> ConfigDict:
    """The config that the command line makes of these, checked."""
    spec = importlib.util.spec_from_file_location("config", file)
    if spec is None or not Path(file).exists():
        raise InputError(f"{file} does not exist: run from the folder that holds configs/")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument)
    config.update_from_flattened_dict(settings)
    validate(config)
    return config


def work(todo: Sequence[Job], until: float = float("inf")) -> bool:
    """Do all jobs that nobody else does, wait for those of others. False: out of time."""
    for job in todo:
        text = json.dumps(manifest.make(job.config, job.splits, job.command), indent=1)
        claims.create(job.folder, {"manifest.json": text})
        there = json.loads((job.folder / "manifest.json").read_text(encoding="utf-8"))
        manifest.check(there, json.loads(text), job.name)
    waiting = False
    while left := [job for job in todo if not claims.done(job.folder)]:
        if time.time() > until:
            return False
        ready = (job for job in left if not job.needs or claims.done(job.needs))
        claimed = next(((j, c) for j in ready if (c := claims.take(j.folder))), None)
        if claimed is None:
            if not waiting:
                print(f"waiting for others, who do {', '.join(j.name for j in left)}")
            waiting = True
            time.sleep(POLL)
            continue
        job, claim = claimed
        began = time.time()
        print(f"{len(todo) - len(left) + 1}/{len(todo)} {job.name}", end="", flush=True)
        if not perform(job, claim, until):
            print(" stopped, to go on later")
            return False
        print(f" {time.time() - began:.0f} s", flush=True)
    return True


def perform(job: Job, claim: Path, until: float) -> bool:
    """The command of a job, which is done then; the claim names its process meanwhile.

    False where time ran out: the command was interrupted, and goes on another time. Raises
    InputError where it fails.
    """
    log = job.folder / "log.txt"
    with log.open("a") as out:
        process = subprocess.Popen(job.command, stdout=out, stderr=out)
    claim = claims.hand(claim, process.pid)
    if claim is None:
        process.kill()
        raise InputError(
            f"{job.name}: another runner took it, as if this one had been gone for "
            f"{claims.STALE:.0f} s"
        )
    try:
        code = process.wait(None if until == float("inf") else max(until - time.time(), 0))
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
        process.send_signal(signal.SIGINT)
        process.wait()
        claims.release(claim)
        if isinstance(stopped, KeyboardInterrupt):
            raise
        return False
    if code:
        claims.release(claim)
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise InputError(
            f"{job.name}: exit code {code} ({' '.join(last)}); {log} has all of it, "
            f"{job.folder / 'manifest.json'} the command"
        )
    if (job.folder / "results.json").exists():
        (job.folder / "outcome.json").write_text(json.dumps(outcome(job.folder)))
    claims.finish(claim)
    return True


def outcome(evaluation: Path) -> dict[str, list[int]]:
    """Problem -> how many answers were right, of how many that count."""
    counts: dict[str, list[int]] = {}
    for path in sorted(evaluation.glob("*.sampled.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            trajectory = json.loads(line)
            if trajectory["status"] != "tool_failure":
                count = counts.setdefault(trajectory["problem"]["id"], [0, 0])
                count[0] += trajectory["correct"]
                count[1] += 1
    return counts


def make_traces(preset: str, root: Path, data: str) -> None:
    """The traces that cold starts of this preset imitate, once."""
    path = root / preset / "traces.jsonl"
    if not PRESETS[preset].traces or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".traces.{os.getpid()}.jsonl")
    command = ["-m", "gtpo_jax.tasks.coldstart", f"--out={part}", f"--path={data}/gsm8k"]
    if subprocess.run([sys.executable, *command]).returncode:
        raise InputError(f"no traces: {' '.join(command)} failed")
    part.rename(path)


def main() -> None:
    """Run a study as the command line says."""
    parser = command_parser("experiments.run", __doc__)
    parser.add_argument("--study", required=True, help=", ".join(STUDIES))
    parser.add_argument("--preset", required=True, help=", ".join(PRESETS))
    parser.add_argument("--seeds", type=int, default=0, help="0: as many as the study names")
    parser.add_argument("--root", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--data", default="", help="the folder with the benchmarks' files")
    parser.add_argument("--isolation", default="auto", help="of the sandbox")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after so many"
    )
    options = parser.parse_args()
    until = time.time() + 60 * options.minutes
    seeds = range(options.seeds or known(STUDIES, options.study, "study").seeds)
    known(PRESETS, options.preset, "preset")
    if "{data}" in str(PRESETS[options.preset]) and not options.data:
        raise InputError(f"--preset={options.preset} needs --data=FOLDER, with the problems")
    make_traces(options.preset, options.root, options.data)
    todo = jobs(
        options.study, options.preset, seeds, options.root, options.data, options.isolation
    )
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(options.root / "compiled"))
    if not work(todo, until):
        raise SystemExit(OUT_OF_TIME)
    print(
        f"done; python -m experiments.report --study={options.study} --preset={options.preset} "
        f"--root={options.root}"
    )


if __name__ == "__main__":
    run_command(main)
