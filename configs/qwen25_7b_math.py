"""Qwen2.5-7B-Instruct on mathematics, at the paper's scale: for a pod of TPUs or H100s.

The recipe is ReTool's as verl publishes it, with the learning signal of GTPO: 64 problems of
DAPO-Math-17k x 16 samples a step, four mini-batches, lr 1e-6, clip 0.2/0.28, no KL, up to 16
turns, 2048 tokens of prompt and 16384 after it. What it takes, without the hardware:

    python -m gtpo_jax.plan --config=configs/qwen25_7b_math.py --topology=v5p:4x4x4

(benchmarks/results/plan.md). On the pod, the same command on every host; the weights are a
Hugging Face folder, the problems a file of JSON lines with `problem` and `answer`:

    python -m gtpo_jax.train --config=configs/qwen25_7b_math.py:gtpo --workdir=RUN \
        --config.model.source=FOLDER --config.task.path=FILE --config.parallel.coordinator=auto

The argument is a name of gtpo_jax.config.ALGORITHMS. It has not been trained.
"""

from gtpo_jax.config import default, with_algorithm


def get_config(algorithm: str | None = None):
    """Everything of the run; `algorithm` is gtpo where none is named."""
    config = default()
    config.steps = 300
    config.eval_every = 25
    config.checkpoint_every = 25
    config.task.name = "jsonl"
    config.task.eval_count = 256

    config.model.vocab_size = 152064
    config.model.width = 3584
    config.model.layers = 28
    config.model.heads = 28
    config.model.kv_heads = 4
    config.model.head_dim = 128
    config.model.hidden = 18944
    config.model.max_length = 32768
    config.model.rope_theta = 1e6
    config.model.qkv_bias = True
    config.model.qk_norm = False
    config.model.tie_embeddings = False
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    config.rollout.problems = 64
    config.rollout.samples = 16
    config.rollout.format = "hermes"
    config.rollout.max_turns = 16
    config.rollout.max_prompt_tokens = 2048
    config.rollout.max_tokens = 16384
    config.rollout.max_feedback_chars = 4096
    config.rollout.chunk = 64
    config.rollout.slots = 0

    config.learn.minibatches = 4
    config.learn.row_tokens = 18432
    config.learn.micro_rows = 4

    config.optim.lr = 1e-6
    config.optim.warmup = 10

    config.sandbox.wall_seconds = 60.0
    config.sandbox.cpu_seconds = 30.0

    config.parallel.fsdp = 4
    config.parallel.tensor = 4
    return with_algorithm(config, algorithm)
