"""Attending to the cache while one token a row is decoded, or to packed rows in training.

    python -m benchmarks.attention --rows=128 --group=6 --width=128 --capacity=2048
    python -m benchmarks.attention --training --rows=4 --length=4096 --heads=2 --group=6

Prints one JSON line: every kernel there is, and the largest difference from float32. Decoding:
microseconds a layer and GB/s of the live part of the cache; rows: slots times key/value heads;
group: query heads of each. Training: milliseconds a layer, forward and forward with backward,
and MiB of temporary memory, the difference as a share of the largest value; heads: of keys and
values; `--segments=1`: what cuDNN can take.
A way that this device does not have is named with its error.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp

from gtpo_jax.errors import command_parser, run_command
from gtpo_jax.model.attention import FLAT, PACKED


def main() -> None:
    """Measure, alternating, after a round that compiles."""
    parser = command_parser("benchmarks.attention", __doc__)
    parser.add_argument("--training", action="store_true", help="packed rows, not the cache")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--group", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--capacity", type=int, default=2048)
    parser.add_argument("--live", type=float, default=0.75, help="share of it that is seen")
    parser.add_argument("--layers", type=int, default=16, help="of caches, one after the other")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a packed row")
    parser.add_argument("--heads", type=int, default=2, help="of keys and values")
    parser.add_argument("--segments", type=int, default=4, help="of a row, of equal lengths")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    ways = training(options) if options.training else decoding(options)
    report = {"benchmark": "attention", **vars(options), "ways": ways}
    report |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(json.dumps(report))


def decoding(options: argparse.Namespace) -> dict[str, dict]:
    """Layers of caches one after the other, as a decoding step reads them."""
    make = jax.random.split(jax.random.key(0), 2 * options.layers + 1)
    q = jax.random.normal(make[-1], (options.rows, options.group, options.width), options.dtype)
    shape = (options.rows, options.capacity, options.width)
    caches = [jax.random.normal(key, shape, options.dtype) for key in make[:-1]]
    live = int(options.live * options.capacity)
    counts = jnp.full((options.rows, options.group), live)

    def layers(attend):
        def run(q, caches):
            for k, v in zip(caches[::2], caches[1::2], strict=True):
                q = attend(q, k, v, counts).astype(q.dtype)
            return q

        return jax.jit(run)

    exact = FLAT["xla"](*(x.astype(jnp.float32) for x in (q, *caches[:2])), counts)
    turned = [x if i % 2 else jnp.swapaxes(x, 1, 2) for i, x in enumerate(caches)]
    ways, programs = {}, {}
    for name, attend in FLAT.items():
        held = turned if name == "turned" else caches
        try:
            program = layers(attend).lower(q, held).compile()
            program(q, held).block_until_ready()
            ways[name] = {"off_by": off_by(attend(q, *held[:2], counts), exact)}
            programs[name] = program, (q, held)
        except Exception as error:
            ways[name] = {"error": first_line(error)}
    moved = 2 * options.rows * live * options.width * q.dtype.itemsize
    for name, seconds in alternate(programs, options.rounds).items():
        each = seconds / options.layers
        ways[name] |= {"us": round(1e6 * each, 1), "gb_per_s": round(moved / each / 1e9, 1)}
    return ways


def training(options: argparse.Namespace) -> dict[str, dict]:
    """One layer of packed rows, alone and with its gradients."""
    make = jax.random.split(jax.random.key(0), 4)
    heads = [options.heads * options.group, options.heads, options.heads]
    heads.append(heads[0])
    q, k, v, d_out = (
        jax.random.normal(key, (options.rows, options.length, n, options.width), options.dtype)
        for key, n in zip(make, heads, strict=True)
    )
    q = q * options.width**-0.5
    row = 1 + jnp.arange(options.length) * options.segments // options.length
    segment_ids = jnp.broadcast_to(row, (options.rows, options.length)).astype(jnp.int32)

    def gradients(attend):
        def run(q, k, v, d_out):
            out, backward = jax.vjp(lambda *x: attend(*x, segment_ids), q, k, v)
            return out, *backward(d_out)

        return jax.jit(run)

    exact = gradients(PACKED["xla"])(*(x.astype(jnp.float32) for x in (q, k, v, d_out)))
    ways, programs = {}, {}
    for name, attend in PACKED.items():
        if name == "cudnn" and options.segments > 1:
            ways[name] = {"error": "takes one segment a row"}
            continue
        try:
            forward = jax.jit(attend).lower(q, k, v, segment_ids).compile()
            both = gradients(attend).lower(q, k, v, d_out).compile()
            jax.block_until_ready(forward(q, k, v, segment_ids))
            arrays = zip(both(q, k, v, d_out), exact, strict=True)
            shares = [off_by(x, y) / float(jnp.abs(y).max()) for x, y in arrays]
            temporary = both.memory_analysis().temp_size_in_bytes
            ways[name] = {"off_by": round(max(shares), 5)}
            ways[name]["temp_mib"] = round(temporary / 2**20, 1)
            programs[name, "forward_ms"] = forward, (q, k, v, segment_ids)
            programs[name, "both_ms"] = both, (q, k, v, d_out)
        except Exception as error:
            ways[name] = {"error": first_line(error)}
    for (name, what), seconds in alternate(programs, options.rounds).items():
        ways[name][what] = round(1e3 * seconds, 2)
    return ways


def alternate(programs: dict, rounds: int) -> dict:
    """{name: (program, arguments)}, all compiled and run once -> {name: median seconds}."""
    seconds = {name: [] for name in programs}
    for _ in range(rounds):
        for name, (program, arguments) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(all_of_it) for name, all_of_it in seconds.items()}


def off_by(out: jax.Array, exact: jax.Array) -> float:
    return round(float(jnp.abs(out.astype(jnp.float32) - exact).max()), 5)


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


if __name__ == "__main__":
    run_command(main)
