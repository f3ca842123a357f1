"""What runs inside the sandbox: imports the preload once, then forks a child per run.

Started by file path with the standard library alone. The host sends lines of JSON over a
socket (`send`, `receive`), and imports this file for these two. Needs Linux 5.3. The child
(`child.py`, which lies beside this file) holds no descriptor of that socket; what became of it
is read from waitpid, from /proc and from its output pipe, and judged by the host.
"""

import builtins
import ctypes
import gc
import importlib
import json
import math
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import struct
import sys
import time

TICK_SECONDS = 0.01  # how often a running child is looked at
SWEEP_SECONDS = 5.0
PAGE = resource.getpagesize()
CLOCK = os.sysconf("SC_CLK_TCK")
LIBC = ctypes.CDLL(None)
# What modules put off until it is asked for, once here instead of in every run: sympy's first
# `solve` takes 200 ms, the second 6.
WARM = {
    "numpy": "import numpy, numpy.random\nnumpy.linalg.solve(numpy.eye(2), numpy.ones(2))",
    "sympy": "from sympy import *\nx = symbols('x')\nsolve(x**2 - 2, x), solve([x - 3], [x])\n"
    "simplify((x**2 - 1) / (x - 1)), integrate(x**2, x), limit(sin(x) / x, x, 0), N(pi)\n"
    "str(expand((x + 1)**3)), factorint(12), nsimplify(0.5), Matrix([[1, 2], [3, 4]]).inv()",
}
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER = 1, 4, 22, 36


def send(channel: socket.socket, message: dict) -> None:
    """One line of JSON. The two ends take turns, so nothing ever follows an unread line."""
    channel.sendall(json.dumps(message).encode() + b"\n")


def receive(channel: socket.socket, deadline: float = math.inf) -> dict:
    """The next line. Raises EOFError at the end, TimeoutError after `deadline` (monotonic)."""
    data = bytearray()
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer from the worker in time")
        channel.settimeout(None if left == math.inf else left)
        chunk = channel.recv(1 << 16)
        if not chunk:
            raise EOFError("the channel to the worker ended")
        data += chunk
    return json.loads(data)


class Tape:
    """Output with a bound: keeps the head and the tail, counts the rest."""

    def __init__(self, limit: int):
        self.half, self.limit, self.total = limit // 2, limit, 0
        self.head, self.tail = bytearray(), bytearray()

    def add(self, chunk: bytes) -> None:
        self.total += len(chunk)
        room = self.half - len(self.head)
        self.head += chunk[:room]
        self.tail += chunk[room:]
        if len(self.tail) > 2 * self.limit:
            del self.tail[: -self.limit]

    def text(self) -> str:
        data = bytes(self.head + self.tail)
        if self.total > self.limit:
            keep = self.limit - self.half
            note = f"\n... [{self.total - self.limit} bytes cut] ...\n".encode()
            data = bytes(self.head) + note + bytes(self.tail[-keep:])
        return data.decode(errors="replace").replace("\0", "\ufffd")


# --- the processes of a run, seen from the worker ---


def processes() -> list[int]:
    """Every process below the worker: as pid 1 of its namespace, every other process."""
    if os.getpid() == 1:
        return [int(n) for n in os.listdir("/proc") if n.isdigit() and n != "1"]
    found, queue = [], [os.getpid()]
    while queue:
        pid = queue.pop()
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children") as file:
                    queue += [int(n) for n in file.read().split()]
        except OSError:
            continue  # gone in the meantime
        found.append(pid)
    return found[1:]


def usage(pids: list[int]) -> tuple[float, list[int]]:
    """CPU seconds of all together, and each one's resident bytes."""
    seconds, resident = 0.0, []
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        seconds += sum(int(f) for f in fields[11:15]) / CLOCK
        resident.append(int(fields[21]) * PAGE)
    return seconds, resident


def sweep() -> bool:
    """Kill and reap all that a run left; False if something would not go."""
    deadline = time.monotonic() + SWEEP_SECONDS
    while time.monotonic() < deadline:
        try:
            if os.getpid() == 1:
                os.kill(-1, signal.SIGKILL)
            else:
                for pid in processes():
                    os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        time.sleep(0.001)
    return False


def empty(folder: str) -> bool:
    """Empty the scratch folder; False if something would not go."""
    try:
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
    except (OSError, RecursionError):
        return False
    return True


def run(play, request: dict, config: dict, channel: socket.socket) -> dict:
    """One request in a fresh child: what `watch` saw, and whether the worker is worn."""
    out, out_child = os.pipe()
    phase, phase_child = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for fd in (channel.fileno(), out, phase):
                os.close(fd)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            status = play(request, config, out_child, phase_child)
        finally:
            os._exit(status)
    os.close(out_child)
    os.close(phase_child)
    for fd in (out, phase):
        os.set_blocking(fd, False)
    try:
        seen, clean = watch(pid, out, phase, 1 + len(request["history"]), config, channel)
    finally:
        os.close(out)
        os.close(phase)
    return seen | {"worn": not (empty(config["scratch"]) and clean)}


def watch(pid: int, out: int, phase: int, blocks: int, config: dict, channel) -> tuple:
    """Read the child's output and hold it to its limits until it ends: (seen, all swept).

    The child's news: b"x..." setup failed, b"s" setup done, then b"r" the code runs. Only the
    first byte is written before any code of the model's, so only it can make a fault ours.
    """
    limits = config["limits"]
    tape, news = Tape(limits["output_bytes"]), bytearray()
    started = looked = time.monotonic()
    running, stopped, status = False, None, None
    spent = before = 0.0  # CPU seconds; `before`: of setup and replay, on their own budget
    poll = select.poll()
    ended = os.pidfd_open(pid)
    for fd in (out, phase, channel.fileno(), ended):
        poll.register(fd, select.POLLIN)
    while status is None and stopped is None:
        for fd, _ in poll.poll(TICK_SECONDS * 1000):
            if fd == channel.fileno():  # nothing is due from the host: it has gone
                leave(config["scratch"])
            if fd == out and not drain(out, tape.add):
                poll.unregister(out)
            if fd == phase and not drain(phase, news.extend):
                poll.unregister(phase)
        del news[1000:-1000]  # what it may have written there beyond what is asked
        ready = news[:1] == b"s" and b"r" in news
        now = time.monotonic()
        done, code, rusage = os.wait4(pid, os.WNOHANG)
        if done:
            status, spent = code, rusage.ru_utime + rusage.ru_stime
        elif now - looked >= TICK_SECONDS or (ready and not running):
            looked = now
            pids = processes()
            spent, resident = usage(pids)
            if ready and not running:
                running, started, before = True, now, spent
            budget = 1 if running else blocks
            own = sum(max(0, r - config["resident"]) for r in resident)
            if spent - before > limits["cpu_seconds"] * budget:
                stopped = "timeout", limits["cpu_seconds"] * budget
            elif now - started > limits["wall_seconds"] * budget:
                stopped = "timeout", limits["wall_seconds"] * budget
            elif own > limits["memory_mib"] << 20:
                stopped = "memory", 0
            elif len(pids) > limits["processes"]:
                stopped = "processes", 0
    os.close(ended)
    seconds = time.monotonic() - started
    swept = sweep()
    ends = not drain(out, tape.add)  # its writers are gone, so the pipe must end
    drain(phase, news.extend)
    seen = {
        "setup": news[:1000].decode(errors="replace"),
        "running": b"r" in news[1:],
        "stopped": stopped,
        "exit_code": None if status is None else os.waitstatus_to_exitcode(status),
        "cpu_seconds": spent - before,
        "seconds": seconds,
        "output": tape.text(),
    }
    # A child that dies before any code of the model's says something about the worker.
    return seen, bool(swept and ends and news)


def drain(fd: int, take, most: int = 1 << 20) -> bool:
    """Read what is there, about `most` bytes at a time; False at the pipe's end."""
    while most > 0:
        try:
            chunk = os.read(fd, 1 << 16)
        except BlockingIOError:
            return True
        if not chunk:
            return False
        take(chunk)
        most -= len(chunk)
    return True


# --- the worker ---


def prctl(option: int, value: int) -> None:
    LIBC.prctl(option, int(value), 0, 0, 0)


def forbid(program: bytes) -> None:
    """Put a seccomp filter on this process, inherited by every run."""
    code = ctypes.create_string_buffer(program)
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    if LIBC.prctl(PR_SET_SECCOMP, 2, head):
        raise OSError("this kernel refuses the filter of system calls (seccomp)")


def collapse_pages() -> None:
    """Put the heap on huge pages: a fork copies one entry for each, not 512 of them, which
    halves what a fork costs with numpy and sympy loaded. Kernels before 6.1 refuse."""
    size, hugepage, collapse = 1 << 21, 14, 25
    with open("/proc/self/maps") as file:
        maps = [line.split() for line in file]
    for span, mode, _, _, _, *name in maps:
        if mode == "rw-p" and name in ([], ["[heap]"]):
            low, high = (int(end, 16) for end in span.split("-"))
            for start in range(-(-low // size) * size, high - size + 1, size):
                for advice in (hugepage, collapse):
                    LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)


def leave(scratch: str) -> None:
    """The host has gone: leave nothing behind."""
    sweep()
    if os.getpid() != 1:
        shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


def main() -> None:
    """Prepare, say ready (or why not), then serve requests until the host goes away."""
    channel = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    config = receive(channel)
    play = runpy.run_path(os.path.join(os.path.dirname(__file__), "child.py"))["play"]
    sys.path += config["path"]
    builtins.exit = builtins.quit = sys.exit  # else made by `site`, which is left out
    try:
        for name in config["preload"]:
            importlib.import_module(name)
        for name in WARM.keys() & sys.modules.keys():
            exec(WARM[name], {})
    except Exception as error:
        send(channel, {"missing": name, "reason": f"{type(error).__name__}: {error}"})
        return
    if config["drop_uid"] is not None:  # after the imports, which root's files may need
        os.chmod(config["scratch"], 0o777)
        os.setgroups([])
        os.setresgid(*[config["drop_uid"]] * 3)
        os.setresuid(*[config["drop_uid"]] * 3)
        for path in (os.__file__, *config["path"]):
            if not os.access(path, os.R_OK):  # what a run imports later would be missing
                send(channel, {"refused": f"user {config['drop_uid']} cannot read {path}"})
                return
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # pid 1 without handlers gets no signals
    if config["filter"]:
        forbid(bytes.fromhex(config["filter"]))
    if os.getpid() != 1:
        signal.signal(signal.SIGTERM, lambda *_: leave(config["scratch"]))
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL if os.getpid() == 1 else signal.SIGTERM)
    gc.collect()
    gc.freeze()
    collapse_pages()
    with open("/proc/self/statm") as file:
        address, resident = (int(n) * PAGE for n in file.read().split()[:2])
    config |= {"address_bytes": address, "resident": resident}
    send(channel, {"ready": True})
    os.dup2(null, 2)
    os.close(null)
    while True:
        try:
            request = receive(channel)
        except (EOFError, OSError):
            leave(config["scratch"])
        send(channel, run(play, request, config, channel))


if __name__ == "__main__":
    main()
