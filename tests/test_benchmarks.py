"""The benchmarks run, and their lines add up."""

import json
import subprocess
import sys

import pytest

COMMANDS = {
    "train": "--model=tiny --tokens=400 --median=60 --row_tokens=128 --rounds=1",
    "memory": "--model=tiny --lengths=128,512",
    "decode": "--model=tiny --slots=2 --context=32 --new=8 --rounds=1",
    "overhead": "--problems=2 --samples=2 --rounds=2 --step_seconds=1.0",
}


def run(name, arguments):
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_prints_one_line_that_adds_up(name):
    report = run(name, COMMANDS[name])
    assert report["benchmark"] == name and report["device"] == "cpu" and report["jax"]
    if name == "train":
        assert 400 <= report["tokens"] < 528
        assert report["tokens_per_s"] == pytest.approx(
            report["tokens"] / report["seconds"], 0.01
        )
        used = report["tokens"] / (report["rows"] * 128)
        assert report["padding_share"] == pytest.approx(1 - used, abs=1e-3)
        assert report["mfu"] is None  # nobody's data sheet says what a CPU can
    if name == "memory":
        short, long = report["rows"]
        assert long["logits_of_all_mib"] == 4 * 512 * 512 / 2**20
        assert short["working_mib"] < long["working_mib"] < 6 * short["working_mib"]
    if name == "overhead":
        assert report["share"] == pytest.approx(report["ms_more"] / 1000, abs=1e-6)


def test_an_unknown_shape_is_refused_in_one_line():
    command = [sys.executable, "-m", "benchmarks.memory", "--model=gpt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--model=gpt: one of tiny" in done.stderr
