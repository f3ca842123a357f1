"""Evaluation: what is counted, against hand numbers, and that a killed one goes on."""

import json
import math

import numpy as np
import pytest

from gtpo_jax import evaluate
from gtpo_jax.config import default
from gtpo_jax.errors import InputError
from gtpo_jax.rl import record
from gtpo_jax.rl.rollout import RolloutStats
from gtpo_jax.rl.types import Trajectory, Turn
from gtpo_jax.tasks.types import Problem
from gtpo_jax.tools.sandbox import Result
from gtpo_jax.tools.toolcall import Call, Invalid


class Words:
    def decode(self, ids):
        return " ".join(map(str, ids))


def problem(i):
    return Problem(f"p{i}", "t", ({"role": "user", "content": "?"},), "1")


def trajectory(i, member, answer, status="finished", call=None, result=None, **meta):
    turns = [Turn([1, 2], [0.0, 0.0], call, [3], result)] if call else []
    turns.append(Turn([4], [0.0]))
    return Trajectory(
        problem(i),
        member,
        [0],
        turns,
        status,
        answer,
        answer == "1",
        {"verdict": "right", **meta},
    )


OK, ERROR = Result("ok", "1", 0.1), Result("error", "no", 0.1)
SET = [
    # all right; two of four, its wrong answers agree; never right; our fault once
    *[trajectory(0, m, "1", call=Call("x"), result=OK) for m in range(4)],
    *[trajectory(1, m, a) for m, a in enumerate(["1", "2", "1", "2"])],
    *[trajectory(2, m, "7", call=Call("x"), result=ERROR) for m in range(2)],
    trajectory(2, 2, None, "truncated", call=Invalid("unclosed")),
    trajectory(2, 3, None, "void"),
    *[trajectory(3, m, "1" if m else "9") for m in range(3)],
    trajectory(3, 3, "1", "tool_failure", verdict="timeout"),
]


def test_summary_by_hand():
    out = evaluate.summarise(SET, 4)
    assert out["avg@4"].value == pytest.approx((1 + 1 / 2 + 0 + 2 / 3) / 4)
    assert out["pass@1"].value == pytest.approx((1 + 1 / 2 + 0 + 2 / 3) / 4)
    # pass@2: 1;  1 - C(2,2)/C(4,2) = 5/6;  0;  two right of three: always one among two
    assert out["pass@2"].value == pytest.approx((1 + 5 / 6 + 0 + 1) / 4)
    # pass@4 is not known of the problem with three samples
    assert out["pass@4"].value == pytest.approx((1 + 1 + 0) / 3)
    assert "pass@8" not in out
    assert out["maj@4"].value == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert out["mixed"].value == pytest.approx(2 / 4)
    for name in ("avg@4", "pass@2", "maj@4"):
        assert out[name].low <= out[name].value <= out[name].high
    assert out["left_out"] == 1
    assert out["tool_used"] == pytest.approx(6 / 15)
    assert out["tool_error_rate"] == pytest.approx(2 / 6)
    assert out["tool_invalid_rate"] == pytest.approx(1 / 7)
    assert out["rollout_truncated"] == pytest.approx(1 / 15)
    assert out["rollout_void"] == pytest.approx(1 / 15)
    assert out["rollout_turns_mean"] == pytest.approx((4 * 2 + 4 + 3 * 2 + 1 + 3) / 15)
    assert out["verify_timeout_rate"] == pytest.approx(1 / 16)


def test_one_sample_is_plain_accuracy():
    out = evaluate.summarise([t for t in SET if t.member == 0], 1)
    assert out["accuracy"].value == pytest.approx(2 / 4)
    assert not [name for name in out if "@" in name]


def test_the_interval_respects_that_samples_belong_together():
    """Two problems, 100 samples each: the interval is that of two facts."""
    lot = [trajectory(i, m, str(1 + i)) for i in range(2) for m in range(100)]
    interval = evaluate.summarise(lot, 100)["avg@100"]
    assert (interval.low, interval.value, interval.high) == (0.0, 0.5, 1.0)


class Sampler:
    """Says what (problem, member) always says; dies in the call after `calls`."""

    def __init__(self, calls=math.inf):
        self.calls, self.asked = calls, []

    def __call__(self, problems, samples, step):
        if len(self.asked) >= self.calls:
            raise KeyboardInterrupt
        self.asked.append([p.id for p in problems])
        done = [
            trajectory(int(p.id[1:]), m, str(int(p.id[1:]) * m % 3))
            for p in problems
            for m in range(samples)
        ]
        return done, RolloutStats(seconds=1.0)


PROBLEMS = [problem(i) for i in range(7)]


def go(path, sampler):
    return evaluate.trajectories_of(path, sampler, PROBLEMS, 2, 3, Words())


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    expected = go(whole, Sampler())
    with pytest.raises(KeyboardInterrupt):
        go(path, Sampler(calls=1))
    with path.open("a") as file:  # it also died in the middle of writing its second block
        record_lines = whole.read_text().splitlines()
        file.write(record_lines[6] + "\n" + record_lines[7][:40])
    second = Sampler()
    assert go(path, second) == expected
    assert second.asked == [["p3", "p4", "p5"], ["p6"]]
    assert path.read_text() == whole.read_text()
    third = Sampler()
    assert go(path, third) == expected and third.asked == []


def test_trajectories_of_other_problems_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    record.write(path, 0, [trajectory(5, m, "1") for m in range(6)], Words())
    with pytest.raises(InputError, match="not of these problems"):
        go(path, Sampler())


def test_a_folder_holds_one_evaluation(tmp_path):
    settings = {"samples": 2, "rollout": default().rollout.to_dict()}
    evaluate.claim(tmp_path, settings)
    evaluate.claim(tmp_path, settings)  # as a killed evaluation does that goes on
    with pytest.raises(InputError, match="holds an evaluation with samples=2, not 4"):
        evaluate.claim(tmp_path, settings | {"samples": 4})


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("samples", -1, "--samples=-1 must not be negative"),
        ("count", -3, "--count=-3 must not be negative"),
        ("temperature", 0.0, "--temperature=0.0 must be > 0"),
        ("top_p", 0.0, "top_p=0.0 must be above 0"),
        ("top_p", 1.5, "top_p=1.5 must be above 0"),
    ],
)
def test_wrong_options(option, value, says):
    options = {name: default for name, (default, _) in evaluate.FLAGS.items()}
    with pytest.raises(InputError, match=says):
        evaluate.check_options({**options, option: value})


def test_results_are_json_without_nan():
    out = evaluate.summarise([trajectory(0, m, "1", "tool_failure") for m in range(2)], 2)
    text = json.dumps(evaluate._readable(out), allow_nan=False)
    assert json.loads(text)["avg@2"] == {"value": None, "low": None, "high": None}


def test_periodic_evaluation_has_an_interval():
    trajectories = [trajectory(i, 0, str(i % 2)) for i in range(64)]
    metrics, _ = evaluate.evaluate(lambda *_: (trajectories, RolloutStats()), PROBLEMS, 1)
    assert metrics["eval/accuracy"] == 0.5
    error = 1.96 * math.sqrt(0.25 / 64)
    assert metrics["eval/low"] == pytest.approx(0.5 - error, abs=0.02)
    assert metrics["eval/high"] == pytest.approx(0.5 + error, abs=0.02)
    assert np.isfinite(list(metrics.values())).all()
