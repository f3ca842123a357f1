"""What finished runs left, small enough to be checked in: experiments/results/PRESET/ARM/seedN.

manifest.json       config, versions, device, commit, hashes of data and code, the command
metrics.jsonl.gz    a line a step and an evaluation
BENCHMARK.json      problem -> how many of its answers were right, of how many
"""

import gzip
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments import claims
from gtpo_jax.errors import InputError

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One arm with one seed, as it was written down."""

    manifest: Mapping[str, Any]
    evals: Sequence[Mapping[str, Any]]
    trains: Sequence[Mapping[str, Any]]
    problems: Mapping[tuple[str, str], float]  # benchmark, problem -> share of right answers

    def accuracy(self, which: str) -> float:
        """The primary outcomes."""
        values = [line["eval/accuracy"] for line in self.evals if line["step"] > 0]
        return float(np.mean(values)) if which == "mean" else values[-1]

    def total(self, key: str) -> float:
        return float(sum(line[key] for line in self.trains))

    def mean(self, key: str, steps: slice) -> float:
        return float(np.mean([line[key] for line in self.trains[steps]]))


def collect(root: Path, preset: str, arms: Sequence[str]) -> None:
    """Copy what the finished runs of these arms wrote down, and what their answers earned."""
    for arm in arms:
        for folder in sorted((root / preset / arm).glob("seed*")):
            if not claims.done(folder):
                continue
            seed, _, benchmark = folder.name.partition("-")
            target = RESULTS / preset / arm / seed
            target.mkdir(parents=True, exist_ok=True)
            if benchmark:
                shutil.copy(folder / "outcome.json", target / f"{benchmark}.json")
                continue
            made = (folder / "manifest.json").read_text(encoding="utf-8")
            (target / "manifest.json").write_text(made.replace(str(root), "ROOT"))
            lines = (folder / "metrics.jsonl").read_bytes()
            # No time of day in it: the same run gives the same file.
            (target / "metrics.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))


def load(preset: str, arm: str, benchmarks: Sequence[str]) -> dict[int, Run]:
    """Seed -> run, of those that are whole."""
    runs = {}
    for folder in sorted((RESULTS / preset / arm).glob("seed*")):
        answered = {name: folder / f"{name}.json" for name in benchmarks}
        parts = (folder / "manifest.json", folder / "metrics.jsonl.gz", *answered.values())
        if not all(path.exists() for path in parts):
            continue
        text = gzip.decompress((folder / "metrics.jsonl.gz").read_bytes()).decode()
        lines = [json.loads(line) for line in text.splitlines()]
        runs[int(folder.name.removeprefix("seed"))] = Run(
            json.loads((folder / "manifest.json").read_text(encoding="utf-8")),
            [line for line in lines if line["phase"] == "eval"],
            [line for line in lines if line["phase"] == "train"],
            {
                (benchmark, problem): right / count
                for benchmark, path in answered.items()
                for problem, (right, count) in json.loads(path.read_text()).items()
            },
        )
    return runs


def paired(runs: Mapping[str, Mapping[int, Run]]) -> list[int]:
    """The seeds that all arms have. Raises InputError where runs of a seed are no pair: made
    by other code, of other data, or from another cold start."""
    seeds = sorted(set.intersection(*(set(of_arm) for of_arm in runs.values())))
    for seed in seeds:
        (first, one), *others = ((arm, of_arm[seed]) for arm, of_arm in runs.items())
        for arm, run in others:
            for part in ("data", "code", "versions"):
                if run.manifest[part] != one.manifest[part]:
                    raise InputError(
                        f"seed {seed}: {arm} and {first} are of different {part}, so they are "
                        "no pair: run both with the same"
                    )
            if run.evals[0]["eval/accuracy"] != one.evals[0]["eval/accuracy"]:
                raise InputError(
                    f"seed {seed}: {arm} and {first} differ before their first step: not from "
                    "the same cold start"
                )
    return seeds


def accuracies(run: Run) -> dict[str, float]:
    """Benchmark -> accuracy of the answers drawn when the run had ended."""
    names = sorted({benchmark for benchmark, _ in run.problems})
    return {
        name: float(np.mean([v for (b, _), v in run.problems.items() if b == name]))
        for name in names
    }
