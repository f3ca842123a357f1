"""What runs inside the sandbox: imports the preload once, then forks a child per run.

Started by file path with the standard library alone. The host sends length-prefixed JSON
frames over a socket (`send`, `receive`); this file is also imported by the host for these two.
The child holds no descriptor of that socket; what became of it is read from waitpid, from
/proc and from its output pipe. It claims only two things: that a phase (the problem's setup,
the replay of earlier calls) is over, and by its exit code whether an exception went uncaught.
"""

import ast
import gc
import importlib
import json
import math
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import time
import types

MEMORY_EXIT = 86  # exit code of a child whose uncaught exception was a MemoryError
TICK_SECONDS = 0.01  # how often a running child is looked at
SWEEP_SECONDS = 5.0
PAGE = resource.getpagesize()
CLOCK = os.sysconf("SC_CLK_TCK")
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36


def send(channel: socket.socket, message: dict) -> None:
    """One frame: 4 bytes of length, big endian, then JSON."""
    body = json.dumps(message).encode()
    channel.sendall(struct.pack(">I", len(body)) + body)


def receive(channel: socket.socket, deadline: float = math.inf) -> dict:
    """The next frame. Raises EOFError at the end, TimeoutError after `deadline` (monotonic)."""
    (length,) = struct.unpack(">I", _exactly(channel, 4, deadline))
    return json.loads(_exactly(channel, length, deadline))


def _exactly(channel, count, deadline):
    data = bytearray()
    while len(data) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer from the worker in time")
        channel.settimeout(None if left == math.inf else left)
        chunk = channel.recv(min(count - len(data), 1 << 20))
        if not chunk:
            raise EOFError("the channel to the worker ended")
        data += chunk
    return bytes(data)


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


def run(request: dict, config: dict, channel: socket.socket) -> dict:
    """One request in a fresh child: {status, output, seconds, worn}."""
    out, out_child = os.pipe()
    phase, phase_child = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for fd in (channel.fileno(), out, phase):
                os.close(fd)
            status = play(request, config, out_child, phase_child)
        finally:
            os._exit(status)
    os.close(out_child)
    os.close(phase_child)
    for fd in (out, phase):
        os.set_blocking(fd, False)
    try:
        reply, clean = watch(pid, out, phase, 1 + len(request["history"]), config, channel)
    finally:
        os.close(out)
        os.close(phase)
    reply["worn"] = not (empty(config["scratch"]) and clean)
    return reply


def watch(pid: int, out: int, phase: int, blocks: int, config: dict, channel) -> tuple:
    """Read the child's output and hold it to its limits until it ends: (reply, all swept)."""
    limits = config["limits"]
    tape, news = Tape(limits["output_bytes"]), b""
    started = looked = time.monotonic()
    cpu_before = 0.0  # CPU seconds of setup and replay, on a budget of their own
    running, verdict, status, spent = False, None, None, 0.0
    poll = select.poll()
    for fd in (out, phase, channel.fileno()):
        poll.register(fd, select.POLLIN)
    pidfd = os.pidfd_open(pid)
    poll.register(pidfd, select.POLLIN)
    while status is None and verdict is None:
        for fd, _ in poll.poll(TICK_SECONDS * 1000):
            if fd == channel.fileno():  # nothing is due from the host: it has gone
                sweep()
                os._exit(1)
            if fd == out and not drain(out, tape.add):
                poll.unregister(out)
            if fd == phase:
                chunks = []
                if not drain(phase, chunks.append):
                    poll.unregister(phase)
                news = (news + b"".join(chunks))[:1000]
        done, waited, rusage = os.wait4(pid, os.WNOHANG)
        now = time.monotonic()
        if done:
            status, spent = waited, rusage.ru_utime + rusage.ru_stime
        elif now - looked >= TICK_SECONDS or (not running and b"r" in news[:2]):
            looked = now
            pids = processes()
            spent, resident = usage(pids)
            if not running and news[:2] == b"sr":
                running, started, cpu_before = True, now, spent
            budget = 1 if running else blocks
            own = sum(max(0, r - config["resident"]) for r in resident)
            if spent - cpu_before > limits["cpu_seconds"] * budget:
                verdict = "timeout", limits["cpu_seconds"] * budget
            elif now - started > limits["wall_seconds"] * budget:
                verdict = "timeout", limits["wall_seconds"] * budget
            elif own > limits["memory_mib"] << 20:
                verdict = "memory", 0
            elif len(pids) > limits["processes"]:
                verdict = "processes", 0
    os.close(pidfd)
    clean = sweep()
    clean = not drain(out, tape.add) and clean  # all writers are gone: the pipe must end
    drain(phase, chunks := [], extend=True)
    news += b"".join(chunks)
    code = None if status is None else os.waitstatus_to_exitcode(status)
    word, line = judge(verdict, code, news, spent - cpu_before, limits)
    text = tape.text()
    if line:
        text += ("\n" if text and not text.endswith("\n") else "") + line
    return {"status": word, "output": text, "seconds": time.monotonic() - started}, clean


def drain(fd: int, take, extend: bool = False, most: int = 1 << 20) -> bool:
    """Read what is there, at most `most` bytes at a time; False at the end of the pipe."""
    raise NotImplementedError
