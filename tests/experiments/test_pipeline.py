"""The pipeline of the larger presets, whole and in miniature: minutes, so it is marked slow."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import run
from gtpo_jax import build, metrics
from gtpo_jax.model import transformer
from gtpo_jax.rl import record

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
PRESET = "smollm2_cpu"
FEW = (("gsm8k", "train", 150), ("gsm8k", "test", 16), ("svamp", "test", 8))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The jobs of GRPO and GTPO with one seed: on the first lines of the real files."""
    if not DATA.is_dir():
        pytest.skip("no benchmark files beside the project")
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("pipeline")
    data, root = folder / "data", folder / "runs"
    for task, name, count in FEW:
        (data / task).mkdir(parents=True, exist_ok=True)
        with (DATA / task / f"{name}.jsonl").open(encoding="utf-8") as lines:
            few = list(itertools.islice(lines, count))
        (data / task / f"{name}.jsonl").write_text("".join(few), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(root / "compiled"))
        run.make_traces(PRESET, root, str(data))
        yield run.jobs("overhead", PRESET, (0,), root, str(data), "process")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
def test_smollm2_from_traces_to_answers(number, jobs):
    assert [job.name.removeprefix(f"{PRESET}/") for job in jobs] == [
        "coldstart/seed0",
        "grpo/seed0",
        "grpo/seed0-svamp",
        "gtpo/seed0",
        "gtpo/seed0-svamp",
    ]
    assert run.work(jobs[: number + 1])
    folder = jobs[number].folder
    if number in (1, 3):
        lines = metrics.read(folder)
        trains = [line for line in lines if line["phase"] == "train"]
        assert [line["step"] for line in trains] == [0, 1, 2]
        assert all(line["train/tokens"] > 0 for line in trains)
        assert sum(line["phase"] == "eval" for line in lines) == 2
    if number in (2, 4):
        answers = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
        assert len(answers) == 8 and all(count == 1 for _, count in answers.values())
    if number == 3:
        # The same problems, weights and keys: up to the first update nothing differs.
        first = [metrics.read(jobs[n].folder)[1]["rollout/tokens_mean"] for n in (1, 3)]
        assert first[0] == first[1]
        scores_what_it_sampled(folder, jobs[0].folder)


def scores_what_it_sampled(folder, cold):
    """One forward pass of the cold start's weights gives the logprobs of step 0's samples."""
    policy = build.from_run(cold)
    params = jax.tree.map(jnp.asarray, policy.params)
    temperature = json.loads((folder / "config.json").read_text())["rollout"]["temperature"]

    @jax.jit
    def score(tokens):
        logits = transformer.logits(policy.config, params, tokens)
        return jax.nn.log_softmax(logits / temperature)

    for trajectory, line in record.read(folder / "trajectories.jsonl")[:4]:
        assert line["step"] == 0 and line["prompt"]
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
