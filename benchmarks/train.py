"""What an update costs: real tokens a second, model FLOP/s, their share of the device's peak.

    python -m benchmarks.train --model=smollm2-135m --row_tokens=640 --micro_rows=2 --peer
    python -m benchmarks.train --model=qwen2.5-1.5b --tokens=131072 --row_tokens=4096 \\
        --micro_rows=4 --dtype=bfloat16

Prints one JSON line. One update is `rl.update`'s step on all parameters (ppo_clip, clipping by
global norm, AdamW), from a packed batch on the host to new parameters on the device. Its
trajectories are made up: several turns with feedback between, log-normal lengths about
`median`. Padding counts for nothing: neither as tokens nor as FLOPs.

Model FLOPs are 6 for every weight of a matrix, the head's too, and every token, and causal
attention's, each trajectory for itself (model/flops.py). What is computed a second time in the
backward pass earns no credit.

`--peer` does the same update in PyTorch (extra `parity`), alternating, in a process of its own:
the `transformers` model with the same weights, tokens and loss, `benchmarks.peer`;
"peer_grad_norm" is of its first gradient. Its micro-batches are as large as ours, or of
`--peer_tokens`, if that is faster.
"""

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.shapes import SHAPES, load
from gtpo_jax import parallel
from gtpo_jax.errors import InputError, command_parser, run_command
from gtpo_jax.model import flops
from gtpo_jax.model.config import REMAT
from gtpo_jax.rl.losses import ppo_clip
from gtpo_jax.rl.packing import pack
from gtpo_jax.rl.types import Batch, Trajectory, Turn
from gtpo_jax.rl.update import build, make_optimizer, start
from gtpo_jax.tasks.types import Problem

SHORTEST = 16  # tokens of a made-up trajectory


def trajectories(
    tokens: int, median: int, longest: int, vocab_size: int, seed: int
) -> list[Trajectory]:
    """About `tokens` tokens: a prompt, then 1 to 4 turns with feedback between."""
    rng = np.random.default_rng(seed)

    def ids(count: int) -> list[int]:
        return rng.integers(0, vocab_size, count).tolist()

    made, total = [], 0
    while total < tokens:
        length = int(np.clip(rng.lognormal(np.log(median), 0.5), SHORTEST, longest))
        parts = 2 * int(rng.integers(1, 5))  # prompt, turn, then feedback and turn in pairs
        cuts = np.sort(rng.choice(np.arange(1, length), parts - 1, replace=False))
        prompt, *rest = np.diff([0, *cuts, length]).tolist()
        turns = [
            Turn(ids(sampled), [-1.0] * sampled, feedback_tokens=ids(given))
            for sampled, given in zip(rest[::2], [*rest[1::2], 0], strict=True)
        ]
        problem = Problem(str(len(made)), "made up", (), "")
        made.append(Trajectory(problem, 0, ids(prompt), turns, "finished"))
        total += length
    return made


def ours(
    config, params, batch: Batch, lr: float, micro_rows: int, chunk: int
) -> tuple[Callable, Batch]:
    """A function that updates, and gives seconds and metrics; the batch with old logprobs."""
    devices = parallel.make("mesh")
    optimizer = make_optimizer("adamw", lr, steps=1)
    update = build(config, ppo_clip, optimizer, devices, micro_rows, chunk=chunk)
    state = start(config, params, optimizer, devices)
    old = update.score(state.params, state.frozen, update.rows(batch))
    batch = batch._replace(old_logprobs=np.concatenate([devices.fetch(x) for x in old]))

    def run() -> tuple[float, dict[str, float]]:
        nonlocal state
        began = time.perf_counter()
        state, metrics = update.step(state, update.rows(batch))
        jax.block_until_ready(state)
        return time.perf_counter() - began, jax.device_get(metrics)

    return run, batch


def peak_bytes() -> tuple[int, str]:
    """The most memory so far, and whose: the fullest device's, or this process's."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(s["peak_bytes_in_use"] for s in stats), "device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process"


def main() -> None:
    """Measure, after one round that compiles."""
    parser = command_parser("benchmarks.train", __doc__)
    parser.add_argument(
        "--model", default="smollm2-135m", help=f"{', '.join(SHAPES)}, or a source"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of all trajectories, about")
    parser.add_argument("--median", type=int, default=300, help="tokens of a trajectory")
    parser.add_argument("--row_tokens", type=int, default=640)
    parser.add_argument("--micro_rows", type=int, default=2)
    parser.add_argument("--logprob_chunk", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", help="of products; weights are float32")
    parser.add_argument("--unroll", type=int, default=1, help="layers in a scan's iteration")
    parser.add_argument("--remat", default="none", choices=REMAT)
    parser.add_argument("--lora", type=int, default=0, help="rank; the rest is in --dtype then")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument(
        "--peer_tokens", type=int, default=0, help="of its micro-batch; 0: as many as ours"
    )
    options = parser.parse_args()
    if options.row_tokens < SHORTEST:
        raise InputError(f"--row_tokens={options.row_tokens} must be {SHORTEST} or more")
    if options.lora and options.model not in SHAPES:
        raise InputError(f"--lora with --model={options.model}: one of {', '.join(SHAPES)}")
    if options.lora and options.peer:
        raise InputError("--lora: the peer trains all weights")
    if options.peer_tokens and not options.peer:
        raise InputError(f"--peer_tokens={options.peer_tokens} needs --peer")
    config, params = load(
        options.model,
        dtype=options.dtype,
        param_dtype=options.dtype if options.lora else "float32",
        unroll=options.unroll,
        remat=options.remat,
        lora_rank=options.lora,
    )
    made = trajectories(
        options.tokens, options.median, options.row_tokens, config.vocab_size, seed=0
    )
    turns = max(len(t.turns) for t in made)
    advantages = np.random.default_rng(1).standard_normal((len(made), turns))
    batch = pack(made, advantages, options.row_tokens, rows_multiple=options.micro_rows)
    peer = None
    if options.peer:  # takes its copy of the weights before ours are given away
        from benchmarks.peer import beside

        options.peer_tokens = options.peer_tokens or options.micro_rows * options.row_tokens
        weights = jax.tree.map(np.array, params)
        take, peer = beside(config, weights, options.lr, options.peer_tokens)
    began = time.perf_counter()
    run, batch = ours(
        config, params, batch, options.lr, options.micro_rows, options.logprob_chunk
    )
    _, first = run()
    compiled = time.perf_counter() - began
    peak, whose = peak_bytes()
    seconds, other = [], []
    if peer:
        peer_computed = take(batch)
        _, peer_norm = peer()
    for _ in range(options.rounds):
        seconds.append(run()[0])
        if peer:
            other.append(peer()[0])
    middle = statistics.median(seconds)
    tokens = sum(t.length() for t in made)
    per_s = flops.update(config, [t.length() for t in made]) / middle
    device = jax.devices()[0].device_kind
    known = flops.DEVICES.get(device)
    report = {
        "benchmark": "train",
        **vars(options),
        "trajectories": len(made),
        "tokens": tokens,
        "sampled_tokens": sum(t.sampled_length() for t in made),
        "rows": len(batch.tokens),
        "padding_share": round(1 - tokens / batch.tokens.size, 3),
        "seconds": round(middle, 4),
        "tokens_per_s": round(tokens / middle, 1),
        "model_gflop_per_s": round(per_s / 1e9, 1),
        "mfu": round(per_s / known.flops / len(jax.devices()), 4) if known else None,
        "peak_bytes": peak,
        "peak_bytes_of": whose,
        "seconds_to_first": round(compiled, 1),
        "grad_norm": round(float(first["grad_norm"]), 6),
    }
    if peer:
        report |= {
            "peer_tokens_per_s": round(tokens / statistics.median(other), 1),
            "times_the_peer": round(statistics.median(other) / middle, 2),
            "peer_padding_share": round(1 - tokens / peer_computed, 3),
            "peer_grad_norm": round(peer_norm, 6),
        }
    report |= {"device": device, "devices": len(jax.devices()), "jax": jax.__version__}
    report |= {"cpus": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
