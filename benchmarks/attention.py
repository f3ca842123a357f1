"""Attending to the cache while one token a row is decoded, every way there is.

    python -m benchmarks.attention --rows=128 --group=6 --width=128 --capacity=2048

Prints one JSON line: microseconds a layer of every kernel that runs on this device, GB/s of the
live part of the cache, and the largest difference from float32. rows: slots times key/value
heads; group: query heads of each. A way that this device does not have is named with its error.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp

from gtpo_jax.errors import run_command
from gtpo_jax.model.attention import FLAT, attend_xla


def main() -> None:
    """Measure, alternating, after a round that compiles."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--group", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--capacity", type=int, default=2048)
    parser.add_argument("--live", type=float, default=0.75, help="share of it that is seen")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, default=16, help="of caches, one after the other")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
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

    exact = attend_xla(*(x.astype(jnp.float32) for x in (q, *caches[:2])), counts)
    programs, ways = {}, {}
    for name, attend in FLAT.items():
        try:
            programs[name] = layers(attend)
            programs[name](q, caches).block_until_ready()
            off = jnp.abs(attend(q, *caches[:2], counts).astype(jnp.float32) - exact).max()
            ways[name] = {"off_by": round(float(off), 5), "us": []}
        except Exception as error:
            del programs[name]
            ways[name] = {"error": str(error).splitlines()[0][:200]}
    for _ in range(options.rounds):
        for name, program in programs.items():
            began = time.perf_counter()
            program(q, caches).block_until_ready()
            ways[name]["us"].append(1e6 * (time.perf_counter() - began) / options.layers)
    moved = 2 * options.rows * live * options.width * q.dtype.itemsize
    for name in programs:
        middle = statistics.median(ways[name]["us"])
        ways[name] |= {"us": round(middle, 1), "gb_per_s": round(moved / middle / 1e3, 1)}
    report = {"benchmark": "attention", **vars(options), "ways": ways}
    report |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
