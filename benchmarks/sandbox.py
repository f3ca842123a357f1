"""What a run in the sandbox costs: runs per second and latency, beside a cold interpreter.

    python -m benchmarks.sandbox --runs=1000 --isolation=auto

Prints one JSON line. The runs are small programs of the kind a model writes, with numpy and
sympy preloaded; a cold `python -c` with the same imports is timed in the same process,
alternating with the pool. Latency is from `submit` to the result with as many runs in flight
as there are workers.
"""

import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gtpo_jax.errors import command_parser, run_command
from gtpo_jax.tools.sandbox import PRELOAD, Sandbox

PROGRAMS = (
    "print(sum(i * i for i in range(1000)))",
    "import math\nprint(math.comb(30, 12))",
    "import numpy as np\nprint(np.arange(12).reshape(3, 4).sum(axis=0))",
    "from sympy import symbols, expand\nx = symbols('x')\nprint(expand((x + 1)**3))",
    "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nprint(f(15))",
    "print(1 / 0)",
)
COLD = "import math, fractions, itertools, collections, numpy, sympy\nprint(6 * 7)"


def latencies(sandbox: Sandbox, runs: int, in_flight: int) -> tuple[float, list[float]]:
    """Wall seconds of all `runs`, and each one's own."""

    def one(i: int) -> float:
        began = time.perf_counter()
        result = sandbox.run(PROGRAMS[i % len(PROGRAMS)])
        if result.status not in ("ok", "error"):
            raise RuntimeError(f"the sandbox gave {result}")
        return time.perf_counter() - began

    with ThreadPoolExecutor(in_flight) as threads:
        began = time.perf_counter()
        each = list(threads.map(one, range(runs)))
        return time.perf_counter() - began, each


def cold(times: int) -> list[float]:
    """Seconds of `python -c` with the imports."""
    out = []
    for _ in range(times):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", COLD], check=True, stdout=subprocess.DEVNULL)
        out.append(time.perf_counter() - began)
    return out


def main() -> None:
    """Measure pools of 1, 2, ... up to twice as many workers as CPUs."""
    parser = command_parser("benchmarks.sandbox", __doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--isolation", default="auto")
    options = parser.parse_args()
    cpus = len(os.sched_getaffinity(0))
    pools, fresh = [], []
    for workers in range(1, 2 * cpus + 1):
        fresh += cold(3)
        with Sandbox(workers, options.isolation, PRELOAD) as sandbox:
            latencies(sandbox, 20 * workers, workers)  # starts all workers
            seconds, each = latencies(sandbox, options.runs, workers)
            isolation = sandbox.isolation
        p50, p95, p99 = (round(1000 * v, 2) for v in np.percentile(each, [50, 95, 99]))
        rate = round(options.runs / seconds, 1)
        pools.append(
            {
                "workers": workers,
                "runs_per_s": rate,
                "p50_ms": p50,
                "p95_ms": p95,
                "p99_ms": p99,
            }
        )
    print(
        json.dumps(
            {
                "benchmark": "sandbox",
                "isolation": isolation,
                "pools": pools,
                "cold_python_ms": round(1000 * float(np.median(fresh)), 1),
                "cpus": cpus,
                "python": platform.python_version(),
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    run_command(main)
