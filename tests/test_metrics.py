"""The log of a run, its table and its curves."""

import subprocess
import sys

import pytest

from gtpo_jax import metrics


def write_run(run, steps=12):
    log = metrics.MetricsLog(run, 0)
    log.write(0, "eval", {"eval/accuracy": 0.4})
    for step in range(steps):
        log.write(
            step,
            "train",
            {
                "accuracy/train": 0.4 + 0.04 * step,
                "rollout/turns_mean": 2.5,
                "tool/error_rate": 0.25,
                "tool/invalid_rate": 0.5,
                "advantage/zero_share": 0.0,
                "time/step": 2.0,
            },
        )
    log.write(steps, "eval", {"eval/accuracy": 0.9})
    log.close()


def test_summary_is_first_and_last_evaluation_and_the_last_ten_steps(tmp_path):
    write_run(tmp_path)
    row = metrics.summary(tmp_path)
    assert (row["before"], row["after"], row["steps"]) == (0.4, 0.9, 12)
    assert row["turns"] == pytest.approx(2.5) and row["tool errors"] == pytest.approx(0.25)
    assert row["seconds"] == pytest.approx(24.0)


def test_the_command_prints_a_table_and_draws(tmp_path):
    run = tmp_path / "gtpo"
    write_run(run)
    out = subprocess.run(
        [sys.executable, "-m", "gtpo_jax.metrics", str(run)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "40.0%" in out and "90.0%" in out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_no_run_is_named(tmp_path):
    out = subprocess.run(
        [sys.executable, "-m", "gtpo_jax.metrics", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 2 and "is the folder of a run" in out.stderr.replace(
        "is " + str(tmp_path) + " the folder", "is the folder"
    )


def test_compilations_are_counted():
    import jax
    import jax.numpy as jnp

    counter = metrics.CompileCounter()
    double = jax.jit(lambda x: x * 2 + 1)
    counter.take()
    double(jnp.ones(3)).block_until_ready()
    assert counter.take() >= 1
    double(jnp.ones(3)).block_until_ready()
    assert counter.take() == 0
