"""The embedded default: word problems that need the tool, a model of half a million parameters.

    make train                                                   cold start, then GTPO
    python -m gtpo_jax.sft   --config=configs/tiny.py --workdir=runs/tiny/sft
    python -m gtpo_jax.train --config=configs/tiny.py:gtpo --workdir=runs/tiny/gtpo \
        --config.model.init_from=runs/tiny/sft

The argument is a name of gtpo_jax.config.ALGORITHMS.
"""

from gtpo_jax.config import default, with_algorithm


def get_config(algorithm: str | None = None):
    """Everything of the tiny run; `algorithm` is gtpo where none is named."""
    config = default()
    config.steps = 100
    config.eval_every = 20
    config.checkpoint_every = 20
    config.task.name = "arithmetic"
    config.task.count = 4000
    config.task.eval_count = 256
    config.task.eval_samples = 1

    config.model.hidden = 512
    config.model.unroll = 2

    config.rollout.problems = 16
    config.rollout.samples = 8
    config.rollout.slots = 128
    config.rollout.system_prompt = False
    config.rollout.max_turns = 5
    config.rollout.max_prompt_tokens = 40
    config.rollout.max_tokens = 120
    config.rollout.max_feedback_chars = 96
    config.rollout.chunk = 16

    config.learn.minibatches = 2
    config.learn.row_tokens = 160
    config.learn.micro_rows = 16

    config.optim.name = "adamw"
    config.optim.lr = 4e-4

    config.sft.traces = 30000
    config.sft.steps = 2400
    config.sft.schedule = "linear"
    config.sft.rows = 8
    config.sft.row_tokens = 129
    config.sft.stop_accuracy = 0.99

    config.sandbox.wall_seconds = 5.0
    config.sandbox.cpu_seconds = 2.0
    config.sandbox.memory_mib = 256
    config.sandbox.preload = ("math", "random")
    return with_algorithm(config, algorithm)
