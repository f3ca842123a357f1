"""A made-up run on disk, for the tests of the report."""

import json

import numpy as np

from gtpo_jax import view
from gtpo_jax.rl import record
from gtpo_jax.rl.types import Trajectory, Turn
from gtpo_jax.tasks.types import Problem
from gtpo_jax.tools.sandbox import Result
from gtpo_jax.tools.toolcall import Call, Invalid

EVIL = "</script><script>window.evil=1</script><img src=x onerror='window.evil=1'>&amp;\u2028"


class Characters:
    """A tokenizer whose tokens are characters."""

    def decode(self, tokens):
        return "".join(map(chr, tokens))


def turn(text, call=None, feedback="", result=None):
    ids = [ord(c) for c in text]
    return Turn(ids, [-0.25] * len(ids), call, [ord(c) for c in feedback], result)


def ran(code, status="ok", output="7\n", thought=""):
    said = "\n```output\n" + output.rstrip("\n") + "\n```\n"
    text = f"{thought}```python\n{code}\n```"
    return turn(text, Call(code), said, Result(status, output, 0.002))


def trajectory(problem, member, turns, status="finished", answer="7", correct=False, reason=""):
    prompt = [ord(c) for c in f"<user>{problem.messages[0]['content']}</user>"]
    meta = {"verdict": "right" if correct else "wrong", "reason": reason}
    return Trajectory(problem, member, prompt, turns, status, answer, correct, meta)


def group(number):
    """One of each kind: right, wrong by other code, wrong without code, truncated, infra."""
    messages = ({"role": "user", "content": f"question {number} {EVIL}"},)
    problem = Problem(f"problem {number} {EVIL}", "arithmetic", messages, f"7 {EVIL}")
    end = turn("\\boxed{7}")
    unclosed = turn("```python\nprint(", Invalid(f"unclosed {EVIL}"), "\ninvalid\n")
    return [
        trajectory(problem, 0, [ran("x"), end], correct=True),
        trajectory(problem, 1, [ran("x y", "error", f"{EVIL}\n"), end], reason=f"not {EVIL}"),
        trajectory(problem, 2, [unclosed, turn(f"so {EVIL}")], answer=EVIL),
        trajectory(problem, 3, [ran("while True: pass", "timeout")] * 3, "truncated", None),
        trajectory(problem, 4, [ran("x", "infra", "worker lost")], "tool_failure", None),
    ]


def write_run(run, steps=(0, 2, 4), problems=2, lines=5):
    run.mkdir(exist_ok=True)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(lines):
            measured = {"eval/accuracy": 0.5, "eval/low": 0.4, "eval/high": 0.6}
            for phase, values in (
                ("eval", measured),
                ("train", {"accuracy/train": step / lines, "train/loss": float("nan")}),
            ):
                file.write(
                    json.dumps({"step": step, "phase": phase, "time": 1.5} | values) + "\n"
                )
    trajectories = [t for number in range(problems) for t in group(number)]
    advantage = np.zeros((len(trajectories), 3))
    advantage[0::5, :2] = [0.5, 1.0]
    advantage[1::5, :2] = [-0.75, -0.5]
    advantage[0, 1], advantage[1, 0] = 1.5, -2.0  # of the first problem
    for step in steps:
        numbers = {key: advantage for key in view.NUMBERS}
        path = run / "trajectories.jsonl"
        record.write(path, step, trajectories, Characters(), **numbers)
    return run
