"""What the notebooks share: the embedded task at a size that takes seconds, and a cold start.

The cold start is made once, in runs/cold beside the notebooks: 350 steps, half a minute on two
cores. It calls the tool as it should and copies most numbers right. Without a sandbox that
isolates (see the README), start Jupyter with ISOLATION=process in its environment.
"""

import os
from pathlib import Path

from ml_collections import ConfigDict

from gtpo_jax import sft
from gtpo_jax.config import default, with_algorithm

SETTINGS = {
    "steps": 3,
    "eval_every": 3,
    "checkpoint_every": 3,
    "trajectories_every": 1,
    "task.count": 400,
    "task.eval_count": 16,
    "model.hidden": 512,
    "model.unroll": 2,
    "rollout.problems": 8,
    "rollout.samples": 8,
    "rollout.slots": 64,
    "rollout.system_prompt": False,  # the tiny policy has learned to call without being told
    "rollout.max_turns": 5,
    "rollout.max_prompt_tokens": 40,
    "rollout.max_tokens": 120,
    "rollout.max_feedback_chars": 96,
    "learn.row_tokens": 160,
    "learn.micro_rows": 16,
    "optim.lr": 3e-4,
    "sft.traces": 12000,
    "sft.held_out": 50,
    "sft.steps": 350,
    "sft.schedule": "linear",
    "sandbox.isolation": os.environ.get("ISOLATION", "auto"),
    "sandbox.preload": ("math", "random"),
}


def get_config(algorithm: str = "gtpo") -> ConfigDict:
    """The settings of the notebooks, for a name of gtpo_jax.config.ALGORITHMS."""
    config = default()
    config.update_from_flattened_dict(SETTINGS)
    return with_algorithm(config, algorithm)


def cold_start(run: Path = Path("runs/cold")) -> Path:
    """The run whose policy the notebooks start from; made where it is not there yet."""
    if not (run / "done").exists():
        sft.run(get_config(), run)
        (run / "done").touch()
    return run
