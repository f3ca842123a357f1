"""Runs of the whole chain on a small config: resume to the bit, devices, records, errors."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from pages import metric_keys

from configs import tiny
from gtpo_jax import checkpoint, metrics, train
from gtpo_jax.errors import run_command
from gtpo_jax.rl import record
from gtpo_jax.rl.advantages import discounted_returns, gtpo
from gtpo_jax.rl.learn import learn
from gtpo_jax.rl.losses import LossInputs, ppo_clip
from gtpo_jax.rl.packing import pack
from gtpo_jax.rl.rewards import score
from gtpo_jax.rl.types import Trajectory, Turn
from gtpo_jax.tasks.types import Problem

ROOT = Path(__file__).parents[1]
SMALL = {
    "steps": 6,
    "eval_every": 3,
    "checkpoint_every": 1,
    "trajectories_every": 1,
    "task.count": 40,
    "task.eval_count": 4,
    "model.width": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.head_dim": 8,
    "model.hidden": 16,
    "rollout.problems": 2,
    "rollout.samples": 3,
    "rollout.slots": 4,
    "rollout.max_tokens": 40,
    "rollout.chunk": 8,
    "learn.row_tokens": 96,
    "learn.micro_rows": 4,
    "sandbox.isolation": "process",
    "sandbox.workers": 2,
}


def command(workdir, *more, **overrides):
    settings = {**SMALL, **overrides}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    config = "--config=configs/tiny.py:gtpo"
    return [
        sys.executable,
        *("-m", "gtpo_jax.train", config, f"--workdir={workdir}", *flags, *more),
    ]


def start(workdir, **overrides):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen(
        command(workdir, **overrides),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def below(pid):
    """The processes below one, at any depth."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found += [int(child), *below(child)]
    return found


def arrays_of(run):
    """Every array of the newest checkpoint's state, by name, read without the trainer."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((run / "checkpoints").absolute()) as manager:
        step = manager.latest_step()
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.restore(run.absolute() / "checkpoints" / str(step) / "state")
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of six steps."""
    run = tmp_path_factory.mktemp("whole")
    process = start(run)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return run


def test_killed_and_resumed_equals_uninterrupted_to_the_bit(whole, tmp_path):
    process = start(tmp_path)
    for line in process.stdout:  # the fourth step's line: three are saved, or about to be
        if line.strip().split("] ")[-1].startswith("train 3"):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved and max(saved) < 6
    resumed = start(tmp_path)
    out, _ = resumed.communicate()
    assert resumed.returncode == 0, out
    assert f"after step {max(saved)}" in out

    step, expected = arrays_of(whole)
    again, got = arrays_of(tmp_path)
    assert step == again == 6
    assert expected.keys() == got.keys()
    assert any("opt_state" in name for name in got)
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)

    def trajectories(run):
        keep = ("step", "problem", "member", "status", "turns", "correct")
        lines = map(json.loads, (run / "trajectories.jsonl").read_text().splitlines())
        out = [{name: line[name] for name in keep} for line in lines]
        for line in out:
            for turn in line["turns"]:
                turn.pop("result")  # carries seconds
        return out

    assert trajectories(tmp_path) == trajectories(whole)
    assert [m["step"] for m in metrics.read(tmp_path)] == [
        m["step"] for m in metrics.read(whole)
    ]


def test_ctrl_c_ends_cleanly_and_leaves_no_worker(tmp_path):
    process = start(tmp_path, steps=1000)
    for line in process.stdout:
        if line.strip().split("] ")[-1].startswith("train 1"):
            break
    children = [os.pidfd_open(pid) for pid in below(process.pid)]
    assert children
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "Traceback" not in out and out.strip().endswith("goes on from what was saved")
    for fd in children:
        assert select.select([fd], [], [], 20)[0], "a worker outlived the run"
        os.close(fd)


def test_metrics_have_the_documented_keys(whole):
    lines = metrics.read(whole)
    trains = [line for line in lines if line["phase"] == "train"]
    assert [line["step"] for line in trains] == list(range(6))
    assert [line["step"] for line in lines if line["phase"] == "eval"] == [0, 3, 6]
    sometimes = {"train/kl_ref", "train/mfu"}  # with a reference; on a known device
    for line in trains:
        assert metric_keys("train") - sometimes <= line.keys() <= metric_keys("train")
    for line in lines:
        if line["phase"] == "eval":
            assert line.keys() == metric_keys("eval")
    assert all(0 < line["engine/useful_share"] <= 1 for line in trains)
    assert all("eval/accuracy" in line for line in lines if line["phase"] == "eval")


def test_losses_can_be_recomputed_from_disk_without_a_model(whole):
    records = [(t, line) for t, line in record.read(whole / "trajectories.jsonl")]
    step = [(t, line) for t, line in records if line["step"] == 2]
    assert len(step) == 6
    trajectories = [t for t, _ in step]
    rewards, mask, groups = score(trajectories, 5)
    advantage = np.asarray(gtpo(rewards, mask, groups))
    returns = np.asarray(discounted_returns(rewards.turn, mask, 0.9))
    for i, (trajectory, line) in enumerate(step):
        for j, turn in enumerate(line["turns"]):
            assert turn["reward"] == pytest.approx(rewards.turn[i, j], abs=1e-6)
            assert turn["discounted_return"] == pytest.approx(returns[i, j], abs=1e-6)
            assert turn["advantage"] == pytest.approx(advantage[i, j], abs=1e-5)
            assert len(turn["tokens"]) == len(turn["logprobs"])
        assert trajectory.problem.meta["family"]
    batch = pack(trajectories, advantage, 96)
    logprobs = batch.behaviour_logprobs
    inputs = LossInputs(
        logprobs,
        logprobs,
        logprobs,
        None,
        batch.advantages,
        batch.weights,
        batch.turn_ids,
        batch.segment_ids,
    )
    per_token, _ = ppo_clip(inputs)
    # On policy the surrogate is -A: a weighted mean that NumPy can take from the records.
    sampled = sum(t.sampled_length() for t in trajectories)
    expected = -sum(
        turn["advantage"] * len(turn["tokens"]) for _, line in step for turn in line["turns"]
    )
    np.testing.assert_allclose(np.sum(batch.weights * per_token), expected / sampled, atol=1e-5)


def test_nothing_compiles_after_warm_up(whole):
    counts = [m["compile/count"] for m in metrics.read(whole) if m["phase"] == "train"]
    assert counts[0] > 0
    assert not any(counts[2:])  # of step 1, it is what the first record on disk needs


def test_a_run_can_start_from_another(whole, tmp_path):
    kl = {"loss.options.kl_coef": 0.1}
    process = start(tmp_path, **{"model.init_from": whole, "steps": 1, **kl})
    out, _ = process.communicate()
    assert process.returncode == 0, out
    evals = [m["eval/accuracy"] for m in metrics.read(whole) if m["phase"] == "eval"]
    first, step, _ = metrics.read(tmp_path)
    assert first["eval/accuracy"] == evals[-1]
    assert "train/kl_ref" in metric_keys("train")
    assert step["train/kl_ref"] == pytest.approx(0, abs=1e-6)  # it is its own reference still


def test_evaluate_gives_the_numbers_of_the_run(whole):
    arguments = [*command(whole), "--samples=1", "--nogreedy"]
    arguments[2] = "gtpo_jax.evaluate"
    out = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    evals = [m["eval/accuracy"] for m in metrics.read(whole) if m["phase"] == "eval"]
    results = json.loads((whole / "evaluation" / "results.json").read_text())["results"]
    assert results["arithmetic"]["sampled"]["accuracy"]["value"] == evals[-1]
    assert "arithmetic (4)" in out.stdout
    assert len(record.read(whole / "evaluation" / "arithmetic.sampled.jsonl")) == 4


def test_a_step_whose_trajectories_all_failed_by_our_fault_changes_nothing():
    problem = Problem("p", "t", (), "1")
    failed = [Trajectory(problem, m, [1], [Turn([2], [-1.0])], "tool_failure") for m in (0, 1)]
    rewards, mask, groups = score(failed, 2)
    assert not mask.any() and not np.any(rewards.turn)
    learned = learn(
        tiny.get_config(), None, None, "state", None, failed, rewards.turn, mask, groups, 0
    )
    assert learned == ("state", {"train/tokens": 0.0}, [])
    assert train.advantage_metrics(rewards.turn, mask)["advantage/zero_share"] == 1


def test_a_torn_line_is_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"ste')
    metrics.drop_from_step(path, 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


WRONG = {
    "misspelt key": (["--config.rolout.samples=4"], "did you mean 'rollout.samples'"),
    "misspelt flag": (["--workdri=x"], "workdri"),
    "missing model": (["--config.model.source=/no/such/folder"], "/no/such/folder"),
    "missing run": (["--config.model.init_from=/no/such/run"], "/no/such/run"),
    "batch that does not divide": (["--config.learn.minibatches=3"], "learn.minibatches=3"),
    "row too short": (["--config.learn.row_tokens=50"], "learn.row_tokens=50"),
    "unknown advantage": (["--config.advantage.name=ppo"], "one of gtpo, grpo"),
    "unknown loss": (["--config.loss.name=x"], "one of ppo_clip"),
    "prompt too long": (["--config.rollout.max_prompt_tokens=8"], "max_prompt_tokens=8"),
    "unknown task": (["--config.task.name=chess"], "arithmetic, gsm8k"),
    "unknown mapping": (["--config.parallel.mapping=grid"], "mesh, pmap"),
    "greedy while training": (["--config.rollout.temperature=0"], "rollout.temperature=0"),
}


def refused(monkeypatch, capsys, argv):
    """What the command prints on stderr; it must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["train", *argv])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        run_command(train.main)
    assert stopped.value.code == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_line(case, tmp_path, monkeypatch, capsys):
    flags, expected = WRONG[case]
    arguments = command(tmp_path, *flags)[3:]
    assert expected in refused(monkeypatch, capsys, arguments)


def test_a_missing_config_and_a_wrong_algorithm_are_named(monkeypatch, capsys):
    for config, expected in (
        ("configs/none.py", "configs/none.py"),
        ("configs/tiny.py:gpto", "one of gtpo, grpo"),
    ):
        arguments = [f"--config={config}", "--workdir=unused"]
        assert expected in refused(monkeypatch, capsys, arguments)


def test_a_data_file_with_a_broken_row_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n{"quest\n')
    task = ("--config.task.name=gsm8k", f"--config.task.path={tmp_path}")
    arguments = command(tmp_path / "run", *task)[3:]
    assert "train.jsonl:2" in refused(monkeypatch, capsys, arguments)


def test_the_command_itself_ends_with_one_line_and_exit_code_2(tmp_path):
    out = subprocess.run(
        command(tmp_path, "--config.rolout.samples=4"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 2
    message = "error: no config key 'rolout.samples'; did you mean 'rollout.samples'?"
    assert out.stderr.splitlines() == [message]


def test_load_params_of_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoints"):
        checkpoint.load_params(tmp_path, {})
