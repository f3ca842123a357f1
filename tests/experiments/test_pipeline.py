"""The pipeline of the larger presets, whole and in miniature: minutes, so it is marked slow."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gtpo_jax import metrics

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="no benchmark files beside the project")
def test_smollm2_from_traces_to_a_report(tmp_path):
    pytest.importorskip("gguf")
    data = tmp_path / "data"
    for task, name, count in (
        ("gsm8k", "train", 150),
        ("gsm8k", "test", 16),
        ("svamp", "test", 8),
    ):
        (data / task).mkdir(parents=True, exist_ok=True)
        with (DATA / task / f"{name}.jsonl").open(encoding="utf-8") as lines:
            few = list(itertools.islice(lines, count))
        (data / task / f"{name}.jsonl").write_text("".join(few), encoding="utf-8")
    command = [sys.executable, "-m", "experiments.run", "--study=overhead"]
    command += ["--preset=smollm2_cpu", "--seeds=1", f"--root={tmp_path / 'runs'}"]
    command += [f"--data={data}", "--isolation=process"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout[-1000:] + out.stderr[-2000:]
    preset = tmp_path / "runs" / "smollm2_cpu"
    first = {}
    for arm in ("grpo", "gtpo"):
        lines = metrics.read(preset / arm / "seed0")
        trains = [line for line in lines if line["phase"] == "train"]
        assert [line["step"] for line in trains] == [0, 1, 2]
        assert all(line["train/tokens"] > 0 for line in trains)
        assert sum(line["phase"] == "eval" for line in lines) == 2
        answers = json.loads((preset / arm / "seed0-svamp" / "outcome.json").read_text())
        assert len(answers) == 8
        first[arm] = trains[0]["rollout/tokens_mean"]
    # The same problems, weights and keys: up to the first update nothing differs.
    assert first["grpo"] == first["gtpo"]
