"""Run code that a model wrote, in a pool of preloaded workers. The host side.

`bwrap` (what "auto" asks for): each worker lives in its own user, process, network, IPC and
mount namespaces. Runs see a read-only /usr and the Python installation, a small scratch folder
that is emptied after each run, and nothing else of the host: no network, no home, no
environment. It does NOT protect from faults of the kernel itself, from what timing and /proc
tell about the machine's load and hardware, nor from a run that spends its whole budget. On
x86_64 and aarch64 a filter of system calls narrows the first; elsewhere memfd and shared
memory also escape the memory limit. `setup` is no secret either: its text is out of sight,
but its compiled functions can be taken apart.

`process`: limits on time, memory, files and output only. It does NOT protect the machine: the
code can read and write all that you can, use the network, signal your processes, and end its
worker. For code you would run by hand.
"""

import atexit
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from gtpo_jax.errors import InputError, command_parser, run_command
from gtpo_jax.tools import worker
from gtpo_jax.tools.isolation import (
    NOBODY,
    bwrap_command,
    environment,
    find_bwrap,
    map_ids,
    no_bwrap,
    prefixes,
    python_command,
    site_folders,
    system_call_filter,
)
from gtpo_jax.tools.verdict import Limits, Result, judge

MAX_RUNS = 5000  # after so many a worker is replaced, which takes a second
START_SECONDS = 60.0
GRACE_SECONDS = 10.0  # beyond its limits before a worker counts as lost
PRELOAD = ("math", "fractions", "itertools", "collections", "numpy", "sympy")
_warned = False


class _Worker:
    """A process, its channel, its scratch folder (isolation "process"), and the descriptors
    over which its user ids are mapped (bwrap started by root)."""

    def __init__(
        self,
        process: subprocess.Popen,
        channel: socket.socket,
        config: dict,
        scratch: str | None,
        ids: tuple[int, ...],
    ):
        self.process, self.channel, self.config = process, channel, config
        self.scratch, self.ids = scratch, ids
        self.runs = 0

    def begin(self) -> dict:
        """Its word that it is ready, or which module is missing. Raises as `ask`."""
        try:
            if self.ids:
                map_ids(*self.ids)
        finally:
            for fd in self.ids:
                os.close(fd)
        return self.ask(self.config, START_SECONDS)

    def ask(self, request: dict, seconds: float) -> dict:
        """Raises OSError (TimeoutError too), EOFError or ValueError where the channel fails."""
        deadline = time.monotonic() + seconds
        worker.send(self.channel, request)
        return worker.receive(self.channel, deadline)

    def last_words(self) -> str:
        """The last line on stderr of a worker that did not begin."""
        self.process.kill()
        assert self.process.stderr is not None  # a pipe
        lines = self.process.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)  # it sweeps up and leaves
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.channel.close()
        if self.process.stderr:
            self.process.stderr.close()
        if self.scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)


class Sandbox:
    """`workers` (default: as many as CPUs) at once; a context manager.

    preload: modules imported before the first run. echo_last: print the value of a last
    expression, as a notebook does. Raises `InputError` where the isolation cannot be had,
    is unknown, or a module of `preload` is missing.
    """

    def __init__(
        self,
        workers: int | None = None,
        isolation: str = "auto",
        preload: Sequence[str] = PRELOAD,
        limits: Limits | None = None,
        echo_last: bool = False,
    ):
        if workers is None:
            workers = len(os.sched_getaffinity(0))
        if not isinstance(workers, int) or workers < 1:
            raise InputError(f"workers={workers!r}: must be a whole number of at least 1")
        if isolation not in ("auto", "bwrap", "process"):
            raise InputError(f"isolation={isolation!r}: one of auto, bwrap, process")
        self.limits = limits or Limits()
        self.isolation = "process" if isolation == "process" else "bwrap"
        self._bwrap = find_bwrap() if self.isolation == "bwrap" else None
        self._config = {
            "preload": list(preload),
            "path": site_folders(),
            "limits": asdict(self.limits),
            "echo_last": echo_last,
            "hide": sorted({*site_folders(), *prefixes()}, key=len, reverse=True),
        }
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._closed = False
        self._runs: list[tuple[str, float, float]] = []
        # A worker dies with the thread that started it, so one thread starts them all.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="sandbox-start")
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
        atexit.register(self.close)
        try:
            self._idle.append(self._start())
        except BaseException:
            self.close()
            raise
        if self.isolation == "process":
            _warn_once()

    def submit(self, code: str, history: Sequence[str] = (), setup: str = "") -> Future[Result]:
        """Run `code` after `setup` and the earlier blocks of `history`, both silent.

        Exceptions of earlier blocks are swallowed, and they have a time budget of their own:
        leave out those that were stopped the first time.
        """
        request = {"code": code, "history": list(history), "setup": setup}
        return self._threads.submit(self._serve, request, time.monotonic())

    def run(self, code: str, history: Sequence[str] = (), setup: str = "") -> Result:
        """`submit`, waited for."""
        return self.submit(code, history, setup).result()

    def metrics(self) -> dict[str, float]:
        """Since the last call: runs, rates of timeout and infra, seconds, queueing (mean)."""
        with self._lock:
            runs, self._runs = self._runs, []
        count = max(1, len(runs))
        seconds = sorted(r[1] for r in runs) or [0.0]
        return {
            "runs": len(runs),
            "timeout_rate": sum(r[0] == "timeout" for r in runs) / count,
            "infra_rate": sum(r[0] == "infra" for r in runs) / count,
            "seconds_p50": seconds[len(seconds) // 2],
            "seconds_p95": seconds[min(len(seconds) - 1, int(len(seconds) * 0.95))],
            "queue_seconds": sum(r[2] for r in runs) / count,
        }

    def close(self) -> None:
        """Stop all workers; runs under way end as infra, those that wait are cancelled."""
        with self._lock:
            self._closed = True
            workers = list(self._all)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for each in workers:
            self._drop(each)
        self._threads.shutdown()
        self._starter.shutdown()
        atexit.unregister(self.close)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _serve(self, request: dict, submitted: float) -> Result:
        began = time.monotonic()
        for _ in range(2):  # a fault of ours that is no fault of the request: once more
            result, worn = self._once(request)
            if result.status != "infra" or not worn or self._closed:
                break
        with self._lock:
            self._runs.append((result.status, result.seconds, began - submitted))
        return result

    def _once(self, request: dict) -> tuple[Result, bool]:
        seconds = self.limits.wall_seconds * (len(request["history"]) + 2) + GRACE_SECONDS
        began, one, worn = time.monotonic(), None, True
        try:
            one = self._take()
            reply = one.ask(request, seconds)
            result = judge(reply, self.limits)
            one.runs += 1
            worn = reply["worn"] or one.runs >= MAX_RUNS
        except (OSError, EOFError, ValueError, RuntimeError) as error:
            reason = "the sandbox was closed" if self._closed else str(error)
            result = Result("infra", reason, time.monotonic() - began)
        if one is not None and worn:
            self._drop(one)
        elif one is not None:
            with self._lock:
                self._idle.append(one)
        return result, worn

    def _take(self) -> _Worker:
        while True:
            with self._lock:
                one = self._idle.pop() if self._idle else None
            if one is None:
                return self._start()
            if one.process.poll() is None:
                return one
            self._drop(one)

    def _start(self) -> _Worker:
        """A worker that has said it is ready. Raises `InputError`."""
        one = self._starter.submit(self._launch).result()
        with self._lock:
            self._all.add(one)
        ready, reason = {}, ""
        try:
            ready = one.begin()
        except (OSError, EOFError, ValueError) as error:
            reason = str(error)
        if self._closed:
            reason = "the sandbox was closed"
        elif reason:
            reason = one.last_words() or reason
        reason = reason or ready.get("refused", "")
        if not reason and "missing" not in ready:
            return one
        self._drop(one)
        if reason:
            raise no_bwrap(reason) if self._bwrap else InputError(f"worker: {reason}")
        raise InputError(
            f"preload: module {ready['missing']!r} cannot be imported"
            f" ({ready['reason']}); install it or leave it out"
        )

    def _launch(self) -> _Worker:
        ours, theirs = socket.socketpair()
        config: dict[str, Any] = {"scratch": "/scratch", "drop_uid": None, "filter": ""}
        scratch, ids, fds = None, tuple[int, ...](), tuple[int, ...]()
        if self._bwrap is None:
            config["scratch"] = scratch = tempfile.mkdtemp(prefix="sandbox-")
        else:
            config["filter"] = system_call_filter().hex()
            if os.geteuid() == 0:
                # The kernel does not hold root to RLIMIT_NPROC: map a second id to drop to.
                info, info_child = os.pipe()
                block_child, block = os.pipe()
                ids, fds = (info, block), (info_child, block_child)
                config["drop_uid"] = NOBODY
        try:
            if self._bwrap is None:
                command = python_command(worker.__file__)
            else:
                command = bwrap_command(self._bwrap, self.limits.scratch_mib, fds)
            process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment(config["scratch"]),
                cwd="/",
                pass_fds=fds,
                start_new_session=True,
            )
        except OSError as error:
            for fd in (ours.detach(), *ids):
                os.close(fd)
            reason = str(error)
            raise no_bwrap(reason) if self._bwrap else InputError(reason) from None
        finally:
            theirs.close()
            for fd in fds:
                os.close(fd)
        return _Worker(process, ours, self._config | config, scratch, ids)

    def _drop(self, one: _Worker) -> None:
        with self._lock:
            known = one in self._all
            self._all.discard(one)
            if one in self._idle:
                self._idle.remove(one)
        if known:
            one.stop()


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        text = "sandbox: isolation='process' does not protect this machine from model code"
        print(f"\033[31m{text}\033[0m", file=sys.stderr)


def main() -> None:
    """Probe: does the isolation work here, and what does a run cost?

    python -m gtpo_jax.tools.sandbox --isolation=auto
    """
    parser = command_parser("gtpo_jax.tools.sandbox", main.__doc__)
    parser.add_argument("--isolation", default="auto", help="auto, bwrap or process")
    with Sandbox(workers=1, isolation=parser.parse_args().isolation) as sandbox:
        sandbox.run("print(6*7)")
        start = time.monotonic()
        result = sandbox.run("print(6*7)")
        cost = (time.monotonic() - start) * 1000
        if (result.status, result.output) != ("ok", "42\n"):
            raise InputError(f"isolation={sandbox.isolation!r}: the probe gave {result}")
        print(f"sandbox: {sandbox.isolation} isolation works ({cost:.1f} ms a run)")


if __name__ == "__main__":
    run_command(main)
