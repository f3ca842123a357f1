"""What memory an update works in, against the length of its rows: compiled, not run.

    python -m benchmarks.memory --model=smollm2-135m --lengths=4096,16384,65536

Prints one JSON line: for a micro-batch of one row of each length, the bytes that XLA sets
aside beside weights, optimiser and gradients (full rematerialisation), those bytes per token,
and what the logits of all its tokens would take in float32.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import optax

from benchmarks.shapes import SHAPES
from gtpo_jax import parallel
from gtpo_jax.errors import InputError, command_parser, run_command
from gtpo_jax.model import transformer
from gtpo_jax.rl.losses import ppo_clip
from gtpo_jax.rl.types import Batch
from gtpo_jax.rl.update import build


def working_bytes(config, length: int) -> int:
    """Of the gradients of one row of `length` tokens."""
    update = build(config, ppo_clip, optax.sgd(0.1), parallel.make("mesh", 1), 1)
    ints = jax.ShapeDtypeStruct((1, length), jnp.int32)
    floats = jax.ShapeDtypeStruct((1, length), jnp.float32)
    params = jax.eval_shape(lambda: transformer.init(config, 0))
    batch = Batch(ints, ints, ints, ints, ints, *[floats] * 5)
    compiled = update.programs["gradients"].lower(params, {}, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Compile for every length."""
    parser = command_parser("benchmarks.memory", __doc__)
    parser.add_argument("--model", default="smollm2-135m", help=", ".join(SHAPES))
    parser.add_argument("--lengths", default="4096,16384,65536")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    if options.model not in SHAPES:
        raise InputError(f"--model={options.model}: one of {', '.join(SHAPES)}")
    rows = []
    for length in map(int, options.lengths.split(",")):
        config = dataclasses.replace(
            SHAPES[options.model], dtype=options.dtype, remat="full", max_length=length
        )
        size = working_bytes(config, length)
        rows.append(
            {
                "tokens": length,
                "working_mib": round(size / 2**20, 1),
                "bytes_per_token": round(size / length),
                "logits_of_all_mib": round(4 * length * config.vocab_size / 2**20, 1),
            }
        )
    report = {"benchmark": "memory", "model": options.model, "dtype": options.dtype}
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(json.dumps({**report, "rows": rows, **device}))


if __name__ == "__main__":
    run_command(main)
