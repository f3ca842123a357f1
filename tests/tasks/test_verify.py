"""Checks in worker processes: hostile answers cost their limit and hurt nobody else."""

import os
import signal
import threading
import time

import pytest

from gtpo_jax.errors import InputError
from gtpo_jax.tasks.types import Verdict
from gtpo_jax.tasks.verify import Verifier

LIMIT = 1.0


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=2, cpu_seconds=LIMIT) as made:
        made.submit("math", "\\frac{1}{2}", "0.5").result()  # sympy is imported
        yield made


def test_each_check_by_name(verifier):
    for check, truth, answer, status in [
        ("number", "72", "72.0", "right"),
        ("number", "72", "73", "wrong"),
        ("choice", "B", "(b)", "right"),
        ("yes_no", "no", "Yes.", "wrong"),
        ("math", "\\frac{1}{2}", "0.5", "right"),
        ("math", "x+1", "1+x", "right"),
        ("math", "x+1", "x", "wrong"),
    ]:
        assert verifier.submit(check, truth, answer).result().status == status
    with pytest.raises(InputError, match="check='chess': one of number, math"):
        verifier.submit("chess", "1", "1")


HANGING = ["9^{9^{9^{9}}}", "2^{10^{10}}", "(" * 3000 + ")" * 3000, "10!!!"]
HOSTILE = [
    *HANGING,
    "9**9**9**9",
    "{" * 50_000 + "}" * 50_000,
    "\\frac{1}{" * 200 + "2" + "}" * 200,
    "\\sqrt{" * 500 + "2" + "}" * 500,
    "1" * 9000,
    "1e999999999",
    "\\sum_{n=1}^{10^{12}} n!",
    "\\left( " * 100,
    "\\text{" * 100,
    "\0\ud800",
    "__import__('os').system('true')",
]


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_answer_costs_at_most_the_limit(verifier, answer):
    began = time.monotonic()
    verdict = verifier.submit("math", "\\frac{3}{7}", answer).result()
    assert verdict.status == ("timeout" if answer in HANGING else verdict.status)
    assert verdict.status in ("wrong", "timeout")
    assert verdict.reason
    # CPU seconds are what is limited; the rest is a new worker's start on a busy machine.
    assert time.monotonic() - began < 20 * LIMIT
    assert verifier.submit("math", "\\frac{3}{7}", "3/7").result().status == "right"


def test_others_are_answered_while_one_hangs(verifier):
    verifier.metrics()
    slow = verifier.submit("math", "\\frac{3}{7}", HANGING[0])
    quick = [verifier.submit("number", "3", str(n)) for n in range(200)]
    assert [v.result().status for v in quick].count("right") == 1
    assert not slow.done()
    assert slow.result() == Verdict("timeout", f"stopped after {LIMIT:g} s")
    seen = verifier.metrics()
    assert seen["checks"] == 201
    assert seen["timeout_rate"] == pytest.approx(1 / 201)
    assert seen["seconds_p50"] < LIMIT
    assert verifier.metrics()["checks"] == 0


def test_a_truth_that_cannot_be_read_is_our_fault(verifier):
    verdict = verifier.submit("math", "$t(0,4]$", "3").result()
    assert verdict.status == "infra" and "cannot be read" in verdict.reason
    assert verifier.submit("math", "$t(0,4]$", "t(0,4]").result().status == "right"


def test_a_worker_that_is_lost_is_replaced_and_the_check_tried_again():
    with Verifier(workers=1) as one:
        assert one.submit("number", "3", "3").result().status == "right"
        (worker,) = one._all
        worker.process.send_signal(signal.SIGKILL)
        worker.process.wait()
        assert one.submit("number", "3", "3").result().status == "right"
        assert worker not in one._all and len(one._all) == 1


def test_workers_are_replaced_after_so_many_checks():
    with Verifier(workers=1, max_checks=3) as one:
        seen = set()
        for _ in range(7):
            assert one.submit("number", "3", "3").result().status == "right"
            seen |= {worker.process.pid for worker in one._all}
        assert len(seen) >= 2


def test_it_works_off_the_main_thread_and_ends_its_processes():
    verdicts = []
    one = Verifier(workers=1)

    def check():
        verdicts.append(one.submit("math", "\\frac{1}{2}", "0.5").result().status)

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert verdicts == ["right"]
    (pid,) = [worker.process.pid for worker in one._all]
    one.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_is_under_way_when_it_closes_is_infra():
    one = Verifier(workers=1, cpu_seconds=60)
    one.submit("math", "\\frac{1}{2}", "0.5").result()
    hanging = one.submit("math", "\\frac{1}{2}", HANGING[0])
    while not hanging.running():
        time.sleep(0.01)
    one.close()
    assert hanging.result().status == "infra"


@pytest.mark.parametrize("name", ["workers", "cpu_seconds", "memory_mib", "max_checks"])
@pytest.mark.parametrize("value", [0, -1, "2", True])
def test_wrong_limits_are_input_errors(name, value):
    with pytest.raises(InputError, match=f"verify: {name}={value!r} must be a number above 0"):
        Verifier(**{name: value})
