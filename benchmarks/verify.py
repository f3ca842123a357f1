"""How many answers are checked a second: plain numbers, and LaTeX by `math-verify`.

    python -m benchmarks.verify --checks=5000

Prints one JSON line. Beside the workers' rates stand those of the same checks called directly,
one after the other in this process, alternating with the workers': what the processes cost and
what running several at once brings. Each LaTeX pair is a different one, since the parsers
remember what they parsed last.
"""

import json
import os
import platform
import statistics
import time

from gtpo_jax.errors import command_parser, run_command
from gtpo_jax.tasks.verifiers import CHECKS
from gtpo_jax.tasks.verify import Verifier

ROUNDS = 3


def plain(i: int) -> tuple[str, str, str]:
    return "number", f"{i}", f"\\${i:,}.0" if i % 2 else f"{i + 1}"


def latex(i: int) -> tuple[str, str, str]:
    kind = i % 4
    if kind == 0:
        return "math", f"\\frac{{{i}}}{{{i + 7}}}", f"{i}/{i + 7}"
    if kind == 1:
        return "math", f"x^2+{2 * i}x+{i * i}", f"(x+{i})^2"
    if kind == 2:
        return "math", f"({i}, \\frac{{\\pi}}{{2}})", f"\\left({i}, \\pi/2\\right)"
    return "math", f"{i}\\sqrt{{3}}", f"\\sqrt{{{3 * i * i}}}"


def direct(checks: list[tuple[str, str, str]]) -> float:
    """Checks a second, called here."""
    began = time.perf_counter()
    for check, truth, answer in checks:
        CHECKS[check](truth, answer)
    return len(checks) / (time.perf_counter() - began)


def by_workers(verifier: Verifier, checks: list[tuple[str, str, str]]) -> float:
    """Checks a second, in worker processes."""
    began = time.perf_counter()
    verdicts = [verifier.submit(*check).result for check in checks]
    statuses = {verdict().status for verdict in verdicts}
    seconds = time.perf_counter() - began
    if not statuses <= {"right", "wrong"}:
        raise RuntimeError(f"some checks ended as {statuses}")
    return len(checks) / seconds


def main() -> None:
    """Measure both kinds, both ways, alternating."""
    parser = command_parser("benchmarks.verify", __doc__)
    parser.add_argument("--checks", type=int, default=5000, help="plain ones a round")
    options = parser.parse_args()
    rates: dict[str, list[float]] = {}
    with Verifier() as verifier:
        for name, make, count in (
            ("plain", plain, options.checks),
            ("latex", latex, max(4, options.checks // 10)),
        ):
            warm = [make(i) for i in range(1_000_000, 1_000_000 + 16 * 4)]
            direct(warm), by_workers(verifier, warm)
            for turn in range(ROUNDS):
                first, second = 2 * turn * count, (2 * turn + 1) * count
                checks = [make(1 + first + i) for i in range(count)]
                others = [make(1 + second + i) for i in range(count)]
                rates.setdefault(f"{name}_per_s", []).append(by_workers(verifier, checks))
                rates.setdefault(f"{name}_direct_per_s", []).append(direct(others))
    print(
        json.dumps(
            {
                "benchmark": "verify",
                **{name: round(statistics.median(values)) for name, values in rates.items()},
                "cpus": len(os.sched_getaffinity(0)),
                "python": platform.python_version(),
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    run_command(main)
