"""The runner: what it would run, what it refuses, and that killing it loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import claims, manifest, run
from experiments.studies import ARMS, PRESETS, STUDIES
from gtpo_jax.config import ALGORITHMS
from gtpo_jax.errors import InputError

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


def made(study="main_math", preset="tiny", seeds=(0,), root="runs", data=""):
    return run.jobs(study, preset, seeds, Path(root), data, "process")


def flat(config, prefix=""):
    out = {}
    for key, value in config.items():
        out |= (
            flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
        )
    return out


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_names_arms_and_contrasts_that_there_are(study):
    asked = STUDIES[study]
    assert {arm for pair in asked.contrasts for arm in pair} <= set(asked.arms) <= set(ARMS)
    assert set(asked.benchmarks) == set(PRESETS)
    assert all(ARMS[arm].algorithm in ALGORITHMS for arm in asked.arms)
    # Every arm but one is compared, directly or not.
    assert set(asked.arms) == {arm for pair in asked.contrasts for arm in pair}


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_arms_differ_in_what_their_name_says_and_in_nothing_else(study, preset, monkeypatch):
    monkeypatch.chdir(ROOT)
    if not DATA.is_dir() and preset != "tiny":
        pytest.skip(f"no benchmark files at {DATA}")
    trained = [j for j in made(study, preset, data=str(DATA)) if "gtpo_jax.train" in j.command]
    assert [j.folder.parent.name for j in trained] == list(STUDIES[study].arms)
    configs = [flat(job.config) for job in trained]
    for job, config in zip(trained, configs, strict=True):
        arm = ARMS[job.folder.parent.name]
        allowed = {"advantage.name", "reward.alpha", "loss.name", "loss.aggregation"}
        allowed |= {"rollout.resample_rounds", "reward.overlong_buffer", *arm.settings}
        for key in config.keys() | configs[0].keys():
            if config.get(key) != configs[0].get(key):
                names = {*allowed, *ARMS[trained[0].folder.parent.name].settings}
                assert key in names or ".options." in key, key
        for key, value in arm.settings.items():
            assert config[key] == value


def test_arms_share_a_cold_start_a_seed_and_studies_share_arms(monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs = made(seeds=(0, 1))
    assert [j.name for j in jobs[:3]] == [
        "tiny/coldstart/seed0",
        "tiny/grpo/seed0",
        "tiny/grpo/seed0-arithmetic",
    ]
    assert jobs[1].needs == jobs[0].folder and jobs[2].needs == jobs[1].folder
    ours = {j.folder: (j.command, j.config.to_json_best_effort()) for j in made(seeds=(0, 1))}
    theirs = {j.folder: (j.command, j.config.to_json_best_effort()) for j in made("ablation")}
    both = ours.keys() & theirs.keys()
    assert {folder.parent.name for folder in both} == {"coldstart", "gtpo", "grpo_sum"}
    assert all(ours[folder] == theirs[folder] for folder in both)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files at {DATA}")
def test_larger_presets_start_all_seeds_from_one_cold_start(monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs = made("overhead", "smollm2", (0, 1, 2), data=str(DATA))
    cold = [job.folder for job in jobs if "gtpo_jax.sft" in job.command]
    trained = [job for job in jobs if "gtpo_jax.train" in job.command]
    assert len(cold) == 1 and len(trained) == 6
    assert all(job.needs == cold[0] for job in trained)
    assert [job.config.seed for job in trained] == [0, 0, 1, 1, 2, 2]


def test_the_manifest_refuses_to_mix_and_says_what_differs(monkeypatch):
    monkeypatch.chdir(ROOT)
    job = made()[1]
    here = manifest.make(job.config, job.splits, job.command)
    assert here["data"].keys() == {"train", "test"} and len(here["code"]) == 16
    assert here["command"].startswith("python -m gtpo_jax.train --config=configs/tiny.py:grpo ")
    manifest.check(here, json.loads(json.dumps(here)), "it")
    other = json.loads(json.dumps(here))
    other["config"]["optim"]["lr"] = 0.5
    with pytest.raises(InputError, match=r"another config: optim\.lr 0\.5 there, 0\.0001 here"):
        manifest.check(other, here, "it")
    other = {**here, "data": {**here["data"], "train": "0"}}
    with pytest.raises(InputError, match="another data: train '0' there"):
        manifest.check(other, here, "it")
    with pytest.raises(InputError, match="it was begun with another code: 'x' there"):
        manifest.check({**here, "code": "x"}, here, "it")


def test_data_and_code_are_hashed(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = made()[1].config
    before = manifest.data(config, ("train", "test"))
    assert manifest.data(config, ("train", "test")) == before
    config.task.count = 3999
    changed = manifest.data(config, ("train", "test"))
    assert changed["train"] != before["train"] and changed["test"] == before["test"]
    package = tmp_path / "gtpo_jax"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    monkeypatch.setattr(manifest.gtpo_jax, "__file__", str(package / "__init__.py"))
    first = manifest.code.__wrapped__()
    (package / "__init__.py").write_text("a = 2\n")
    assert manifest.code.__wrapped__() != first


# --- killed and gone on with, on commands that are quick ---

COUNT = """
import pathlib, sys, time
path = pathlib.Path(sys.argv[1]) / "numbers"
path.touch()
for i in range(len(path.read_text().split()), 30):
    with path.open("a") as file:
        file.write(f"{i}\\n")
    time.sleep(0.02)
"""
RUNNER = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
from experiments import manifest, run
from tests_of_run import fake
manifest.make = lambda *_: {part: "" for part in manifest.SAME}
run.POLL = 0.05
assert run.work(fake(pathlib.Path(sys.argv[1])))
"""


def fake(root, code=COUNT):
    jobs, before = [], None
    for name in ("cold", "one", "two"):
        folder = root / "tiny" / name / "seed0"
        command = (sys.executable, "-c", code, str(folder))
        jobs.append(run.Job(folder, command, None, (), before))
        before = before or folder
    return jobs


def start(root):
    # This file under a name that can be imported.
    (root / "tests_of_run.py").write_text(Path(__file__).read_text())
    command = [sys.executable, "-c", RUNNER, str(root), str(root)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def test_a_runner_killed_three_times_and_two_at_once_change_nothing(tmp_path):
    for number in range(3):
        runner = start(tmp_path)
        progress = tmp_path / "tiny" / ("cold", "one", "two")[number] / "seed0" / "numbers"
        while not progress.exists():
            assert runner.poll() is None
            time.sleep(0.01)
        if number == 1:
            os.kill(runner.pid, signal.SIGKILL)  # its worker lives on
        else:
            os.killpg(runner.pid, signal.SIGKILL)
        runner.wait()
    runners = [start(tmp_path), start(tmp_path)]
    assert [runner.wait() for runner in runners] == [0, 0]
    for name in ("cold", "one", "two"):
        folder = tmp_path / "tiny" / name / "seed0"
        assert (folder / "numbers").read_text().split() == [str(i) for i in range(30)]
        assert claims.done(folder)


def test_out_of_time_and_failing_commands_leave_the_run_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "make", lambda *_: {part: "" for part in manifest.SAME})
    jobs = fake(tmp_path)
    assert not run.work(jobs, until=time.time() + 0.2)
    assert (jobs[0].folder / "claim.free").exists()
    bad = fake(tmp_path / "bad", "print('no such thing'); raise SystemExit(3)")
    with pytest.raises(InputError, match=r"tiny/cold/seed0: exit code 3 \(no such thing\)"):
        run.work(bad)
    assert (bad[0].folder / "claim.free").exists()


def test_outcome_counts_what_was_right_and_leaves_our_failures_out(tmp_path):
    lines = [
        {"problem": {"id": "a"}, "status": "finished", "correct": True},
        {"problem": {"id": "a"}, "status": "finished", "correct": False},
        {"problem": {"id": "a"}, "status": "tool_failure", "correct": False},
        {"problem": {"id": "b"}, "status": "truncated", "correct": False},
    ]
    path = tmp_path / "svamp.sampled.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run.outcome(tmp_path) == {"a": [1, 2], "b": [0, 1]}


def test_the_command_says_what_it_lacks(tmp_path):
    def ended(*arguments):
        command = [sys.executable, "-m", "experiments.run", *arguments, f"--root={tmp_path}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    out = ended("--study=main_maths", "--preset=tiny")
    assert out.returncode == 2 and "unknown study 'main_maths': one of main_math" in out.stderr
    out = ended("--study=main_math", "--preset=smollm2")
    assert out.returncode == 2 and "needs --data=FOLDER" in out.stderr
    assert out.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
