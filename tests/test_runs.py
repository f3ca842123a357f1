"""The run of the README, whole: minutes, so it is marked slow."""

import subprocess
import sys
from pathlib import Path

import pytest

from gtpo_jax import metrics

ROOT = Path(__file__).parents[1]


def python(*arguments):
    out = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]


@pytest.mark.slow
def test_the_embedded_default_learns(tmp_path):
    cold, run = tmp_path / "sft", tmp_path / "gtpo"
    isolation = "--config.sandbox.isolation=process"
    python("gtpo_jax.sft", "--config=configs/tiny.py", f"--workdir={cold}", isolation)
    python(
        "gtpo_jax.train",
        "--config=configs/tiny.py:gtpo",
        f"--workdir={run}",
        f"--config.model.init_from={cold}",
        isolation,
    )
    accuracies = [m["eval/accuracy"] for m in metrics.read(run) if m["phase"] == "eval"]
    assert 0.25 <= accuracies[0] <= 0.60
    assert accuracies[-1] >= 0.90
    # There was something to credit turn by turn: failing and broken calls, second turns.
    trains = [m for m in metrics.read(run) if m["phase"] == "train"]
    assert trains[0]["tool/error_rate"] > 0.05 and trains[0]["tool/invalid_rate"] > 0.02
    assert trains[-1]["rollout/turns_mean"] > 2.1
