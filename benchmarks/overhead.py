"""What GTPO adds to GRPO on the host, as a share of a step of training.

    python -m benchmarks.overhead --run=runs/tiny/gtpo
    python -m benchmarks.overhead --problems=64 --samples=16 --step_seconds=120

Everything between trajectories and packed rows that the two algorithms do differently: turn
rewards with shaping by code similarity against one reward a trajectory, normalised discounted
returns against one normalised reward. With --run, on the trajectories that a finished run wrote
down, against the median of its steps; else on made-up ones with up to 8 turns of some 20 lines
of code, against a step of so many seconds. Prints one JSON line: milliseconds of each (the
median of alternating rounds), the difference, and its share of the step.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from gtpo_jax import metrics
from gtpo_jax.config import ALGORITHMS
from gtpo_jax.errors import InputError, command_parser, run_command
from gtpo_jax.rl import record
from gtpo_jax.rl.advantages import ADVANTAGES
from gtpo_jax.rl.rewards import score
from gtpo_jax.rl.types import Trajectory, Turn
from gtpo_jax.tasks.types import Problem
from gtpo_jax.tools.sandbox import Result
from gtpo_jax.tools.toolcall import Call

LINES = (
    "total = 0",
    "for i in range({n}):",
    "    total += i * {m}",
    "    if total > {n}{m}: break",
    "x = sympy.symbols('x')",
    "print(sympy.solve(x**2 - {n} * x + {m}, x))",
    "values = [k for k in range({m}, {n}) if k % {m} == 0]",
    "print(sum(values), max(values, default=0))",
)


def trajectories(problems: int, samples: int, turns: int, lines: int) -> list[Trajectory]:
    """Half of them right, each turn but the last with code of about `lines` lines."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(problems):
        problem = Problem(str(number), "made up", (), "1")
        for member in range(samples):
            said = []
            for _ in range(int(rng.integers(1, turns + 1))):
                code = "\n".join(
                    rng.choice(LINES).format(n=rng.integers(2, 99), m=rng.integers(2, 99))
                    for _ in range(int(rng.integers(lines // 2, 2 * lines)))
                )
                said.append(Turn([1], [-1.0], Call(code), [2], Result("ok", "1", 0.1)))
            said.append(Turn([1], [-1.0]))
            right = bool(rng.integers(2))
            made.append(Trajectory(problem, member, [3], said, "finished", "1", right))
    return made


def host_side(name: str, made: list[Trajectory], turns: int) -> Callable[[], float]:
    """A function that does it, and gives seconds."""
    alpha = ALGORITHMS[name].get("reward.alpha", 0.5)
    advantages = jax.jit(functools.partial(ADVANTAGES[ALGORITHMS[name]["advantage.name"]]))

    def run() -> float:
        began = time.perf_counter()
        rewards, mask, groups = score(made, turns, alpha=alpha)
        np.asarray(advantages(rewards, mask, groups))
        return time.perf_counter() - began

    return run


def main() -> None:
    """Measure, alternating, after a round that compiles."""
    parser = command_parser("benchmarks.overhead", __doc__)
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--lines", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--step_seconds", type=float, default=0.0)
    parser.add_argument("--run", type=Path, help="take the step from this finished run")
    options = parser.parse_args()
    step = options.step_seconds
    if options.run:
        steps = [m["time/step"] for m in metrics.read(options.run) if m["phase"] == "train"]
        step = statistics.median(steps)
        written = record.read(options.run / "trajectories.jsonl")
        made = [t for t, line in written if line["step"] == written[0][1]["step"]]
    else:
        made = trajectories(options.problems, options.samples, options.turns, options.lines)
    if step <= 0:
        raise InputError("--step_seconds or --run says what a step takes")
    most = max(len(t.turns) for t in made)
    runs = {name: host_side(name, made, most) for name in ("gtpo", "grpo")}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(1 + options.rounds):
        for name, run in runs.items():
            taken = run()
            if i:
                seconds[name].append(taken)
    ms = {name: 1000 * statistics.median(taken) for name, taken in seconds.items()}
    more = ms["gtpo"] - ms["grpo"]
    report = {"benchmark": "overhead", **vars(options), "run": str(options.run or "")}
    report |= {"trajectories": len(made)}
    report |= {f"{name}_ms": round(value, 3) for name, value in ms.items()}
    report |= {"ms_more": round(more, 3), "step_s": round(step, 3)}
    report |= {"share": round(more / 1000 / step, 6)}
    print(json.dumps(report | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}))


if __name__ == "__main__":
    run_command(main)
