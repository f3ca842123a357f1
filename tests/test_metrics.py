"""The log of a run, its table and its curves."""

import subprocess
import sys
import types

import pytest

from gtpo_jax import metrics
from gtpo_jax.config import default
from gtpo_jax.errors import InputError


def write_run(run, steps=12, **more):
    with metrics.MetricsLog(run, 0, **more) as log:
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
                steps,
            )
        log.write(steps, "eval", {"eval/accuracy": 0.9})


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


def test_a_line_says_what_is_left(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 1.0, 5.0, 35.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    with metrics.MetricsLog(tmp_path, 0) as log:
        for step in (0, 1, 3):
            log.write(step, "train", {"accuracy/train": 0.5}, 10)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "[   1.0s] train 0/10  acc 0.50"
    # 4 seconds for one step, 8 to go; then 34 for three, 6 to go.
    assert second == "[   5.0s] train 1/10  acc 0.50  left 0:00:32"
    assert third.endswith("left 0:01:08")


def test_tensorboard_and_wandb_get_the_same_keys(tmp_path, monkeypatch):
    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            seen.append(("open", folder, purge_step))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            seen.append("closed")

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

    class Run:
        def log(self, values, step):
            seen.append((values, step))

        def finish(self):
            seen.append("finished")

    def init(**options):
        seen.append((options["project"], options["resume"], options["config"]["steps"]))
        return Run()

    board, service = types.ModuleType("tensorboardX"), types.ModuleType("wandb")
    board.SummaryWriter, service.init = SummaryWriter, init
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    monkeypatch.setitem(sys.modules, "wandb", service)
    config = default()
    config.log.tensorboard, config.log.wandb = True, "mine"
    with metrics.MetricsLog(tmp_path, 3, config=config) as log:
        log.write(3, "train", {"accuracy/train": 0.5})
    assert seen == [
        ("open", str(tmp_path / "tensorboard"), 3),
        ("mine", "allow", 100),
        ("accuracy/train", 0.5, 3),
        ({"accuracy/train": 0.5}, 3),
        "finished",
        "closed",
    ]


@pytest.mark.parametrize("name, value", [("tensorboard", True), ("wandb", "mine")])
def test_a_missing_writer_says_what_to_install(tmp_path, monkeypatch, name, value):
    for package in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    config = default()
    config.log[name] = value
    with pytest.raises(InputError, match=rf"log\.{name}.*gtpo_jax\[{name}\]"):
        metrics.MetricsLog(tmp_path, 0, config=config)
