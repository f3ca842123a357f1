"""Checking answers in processes of their own, with hard limits on their time and memory.

sympy can hang in C code where no exception reaches it, and signals work in a main thread only:
so a check runs in a spawned worker, and the kernel ends the worker that overruns. That check is
a `timeout`; the next one finds a new worker. A worker lost otherwise is our fault: the check
is tried once more, and is then `infra`.
"""

import atexit
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from gtpo_jax.errors import InputError
from gtpo_jax.tasks.types import Verdict
from gtpo_jax.tasks.verifiers import CHECKS, MAX_ANSWER, load_math_verify
from gtpo_jax.tools.worker import receive, send

START_SECONDS = 120.0  # importing sympy from a cold disk
MOST_WORKERS = 4  # by default: a check takes less than a millisecond


class Verifier:
    """`workers` (default: as many as CPUs, at most 4) checks at once; a context manager.

    cpu_seconds: of one check. memory_mib: address space of a worker. max_checks: after so
    many a worker is replaced, since sympy's caches only grow.
    """

    def __init__(
        self,
        workers: int | None = None,
        cpu_seconds: float = 5.0,
        memory_mib: int = 2048,
        max_checks: int = 10_000,
    ):
        workers = (
            min(len(os.sched_getaffinity(0)), MOST_WORKERS) if workers is None else workers
        )
        for name, value in (
            ("workers", workers),
            ("cpu_seconds", cpu_seconds),
            ("memory_mib", memory_mib),
            ("max_checks", max_checks),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise InputError(f"verify: {name}={value!r} must be a number above 0")
        self.cpu_seconds, self.memory_mib, self.max_checks = cpu_seconds, memory_mib, max_checks
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._closed = False
        self._checks: list[tuple[str, float]] = []
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verify")
        atexit.register(self.close)

    def submit(self, check: str, truth: str, answer: str) -> Future[Verdict]:
        """CHECKS[check](truth, answer), in a worker. An answer that is too long is wrong."""
        if check not in CHECKS:
            raise InputError(f"check={check!r}: one of {', '.join(CHECKS)}")
        if len(answer) > MAX_ANSWER:
            return settled(Verdict("wrong", f"an answer of {len(answer)} characters"))
        request = {"check": check, "truth": truth, "answer": answer}
        return self._threads.submit(self._serve, request)

    def metrics(self) -> dict[str, float]:
        """Since the last call: checks, rates of timeout and infra, seconds."""
        with self._lock:
            checks, self._checks = self._checks, []
        count = max(1, len(checks))
        seconds = sorted(c[1] for c in checks) or [0.0]
        return {
            "checks": len(checks),
            "timeout_rate": sum(c[0] == "timeout" for c in checks) / count,
            "infra_rate": sum(c[0] == "infra" for c in checks) / count,
            "seconds_p50": seconds[len(seconds) // 2],
            "seconds_p95": seconds[min(len(seconds) - 1, int(len(seconds) * 0.95))],
        }

    def close(self) -> None:
        """Stop all workers; checks under way end as infra, those that wait are cancelled."""
        with self._lock:
            self._closed = True
            workers, self._all, self._idle = self._all, set(), []
        self._threads.shutdown(wait=False, cancel_futures=True)
        for each in workers:
            each.stop()
        self._threads.shutdown()
        atexit.unregister(self.close)

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _serve(self, request: dict) -> Verdict:
        began = time.monotonic()
        for _ in range(2):
            verdict = self._once(request)
            if verdict.status != "infra" or self._closed:
                break
        with self._lock:
            self._checks.append((verdict.status, time.monotonic() - began))
        return verdict

    def _once(self, request: dict) -> Verdict:
        one = None
        try:
            one = self._take(request["check"])
            # Wall time is only a backstop, for a worker that waits for ever.
            verdict = Verdict(**one.ask(request, 10 * self.cpu_seconds + 60))
            one.checks += 1
        except (OSError, EOFError, ValueError) as error:
            if one is None:
                return Verdict("infra", f"no worker: {error}")
            ended = one.stop()
            self._forget(one)
            if ended == -signal.SIGPROF:
                return Verdict("timeout", f"stopped after {self.cpu_seconds:g} s")
            reason = "the verifier was closed" if self._closed else f"worker ended: {ended}"
            return Verdict("infra", reason)
        if one.checks >= self.max_checks:
            self._forget(one)
            one.stop()
        else:
            with self._lock:
                self._idle.append(one)
        return verdict

    def _take(self, check: str) -> "_Worker":
        with self._lock:
            if self._closed:
                raise OSError("the verifier was closed")
            one = self._idle.pop() if self._idle else None
        if one is None:
            one = _Worker(self.cpu_seconds, self.memory_mib)
            with self._lock:
                self._all.add(one)
        if check == "math" and not one.knows_math:
            one.ask({"load": True}, START_SECONDS)
            one.knows_math = True
        return one

    def _forget(self, one: "_Worker") -> None:
        with self._lock:
            self._all.discard(one)


def settled(verdict: Verdict) -> Future[Verdict]:
    """A future that has its result."""
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future


class _Worker:
    """A process that checks, and the channel to it."""

    def __init__(self, cpu_seconds: float, memory_mib: int):
        self.checks, self.knows_math = 0, False
        self.channel, theirs = socket.socketpair()
        source = str(Path(__file__).parents[2])
        path = os.pathsep.join(p for p in (source, os.environ.get("PYTHONPATH")) if p)
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    "-m",
                    __name__,
                    str(cpu_seconds),
                    str(memory_mib),
                ],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )

    def ask(self, request: dict, seconds: float) -> dict:
        send(self.channel, request)
        return receive(self.channel, time.monotonic() + seconds)

    def stop(self) -> int:
        """Its exit code, after killing it where it did not end by itself."""
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)
        try:
            code = self.process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.channel.close()
        return code


# --- inside the worker ---


def answer_one(request: dict) -> Verdict:
    """One check. What the answer makes the check stumble over is the answer's fault."""
    truth, answer = request["truth"], request["answer"]
    try:
        right = CHECKS[request["check"]](truth, answer)
    except (RecursionError, MemoryError) as error:
        return Verdict("wrong", f"unreadable: {type(error).__name__}")
    except Exception as error:  # a truth that cannot be read, or a fault of the checker
        return Verdict("infra", f"{type(error).__name__}: {error}"[:200])
    return Verdict("right") if right else Verdict("wrong", f"not {truth}"[:200])


def main() -> None:
    """Serve checks until the host goes away. The kernel ends a check that overruns."""
    cpu_seconds, memory_mib = float(sys.argv[1]), int(sys.argv[2])
    channel = socket.socket(fileno=os.dup(0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the host's Ctrl-C is the host's
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    while True:
        try:
            request = receive(channel)
        except (EOFError, OSError):
            return
        if "load" in request:
            parse, verify = load_math_verify()
            verify(parse("\\frac{1}{2}"), parse("0.5"))  # imports what sympy imports late
            send(channel, {})
            continue
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        verdict = answer_one(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(channel, {"status": verdict.status, "reason": verdict.reason})


if __name__ == "__main__":
    main()
