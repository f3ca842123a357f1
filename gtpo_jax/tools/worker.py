"""What runs inside the sandbox: imports the preload once, then forks a child per run.

Started by file path with the standard library alone. The host sends length-prefixed JSON
frames over a socket (`send`, `receive`), and imports this file for these two. Needs Linux 5.3.
The child holds no descriptor of that socket; what became of it is read from waitpid, from
/proc and from its output pipe. It claims only two things: that a phase (the problem's setup,
the replay of earlier calls) is over, and by its exit code whether an exception went uncaught.
"""

import ast
import builtins
import ctypes
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
SEPARATOR = "\x1e"  # before the line of an uncaught exception, the last thing written
TICK_SECONDS = 0.01  # how often a running child is looked at
SWEEP_SECONDS = 5.0
PAGE = resource.getpagesize()
CLOCK = os.sysconf("SC_CLK_TCK")
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER = 1, 4, 22, 36
# System calls that get around a limit or reach another process: memory no limit counts
# (memfd_create, shmget, msgget, mq_open), the worker (ptrace, kcmp, process_vm_*, sched_set*,
# setpriority, ioprio_set, pidfd_getfd, process_madvise), new rights (unshare, setns, mounts),
# and much code of the kernel that no call needs (keys, bpf, perf, userfaultfd, io_uring).
# By machine: audit number, clone, prlimit64, then those that are refused.
SYSTEM_CALLS = {
    "x86_64": """0xC000003E 56 302 29 68 101 141 142 144 155 165 166 203 240 248 249 250 251 272
        298 304 308 310 311 312 314 319 321 323 425 438 440 447""",
    "aarch64": """0xC00000B7 220 261 30 39 40 41 97 117 118 119 122 140 180 186 194 217 218 219
        241 265 268 270 271 272 274 279 280 282 425 438 440 447""",
}


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
    tape, news = Tape(limits["output_bytes"]), bytearray()
    started = looked = time.monotonic()
    running, verdict, status = False, None, None
    spent = before = 0.0  # CPU seconds; `before`: of setup and replay, on their own budget
    poll = select.poll()
    ended = os.pidfd_open(pid)
    for fd in (out, phase, channel.fileno(), ended):
        poll.register(fd, select.POLLIN)
    while status is None and verdict is None:
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
                verdict = "timeout", limits["cpu_seconds"] * budget
            elif now - started > limits["wall_seconds"] * budget:
                verdict = "timeout", limits["wall_seconds"] * budget
            elif own > limits["memory_mib"] << 20:
                verdict = "memory", 0
            elif len(pids) > limits["processes"]:
                verdict = "processes", 0
    os.close(ended)
    seconds = time.monotonic() - started
    swept = sweep()
    ends = not drain(out, tape.add)  # its writers are gone, so the pipe must end
    drain(phase, news.extend)
    exit_code = None if status is None else os.waitstatus_to_exitcode(status)
    word, line = judge(verdict, exit_code, bytes(news), spent - before, limits)
    text = "" if word == "infra" else tape.text()
    if not line and exit_code == 1:
        text, _, line = text.rpartition(SEPARATOR)
    if line:
        text += ("\n" if text and not text.endswith("\n") else "") + line
    # A child that dies before any code of the model's says something about the worker.
    return {"status": word, "output": text, "seconds": seconds}, swept and ends and news


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


def judge(verdict, exit_code, news: bytes, cpu: float, limits: dict) -> tuple[str, str]:
    """Status and closing line, from what was seen. `news`: b"x..." setup failed, b"s" setup
    done, then b"r" the code runs; only its first byte is written before any code of the
    model's, and only that one can make a fault ours."""
    running = b"r" in news[1:]
    if news[:1] == b"x":
        return "infra", "the problem's setup failed: " + news[1:].decode(errors="replace")
    if not news:
        return "infra", "the problem's setup did not finish"
    kind, limit = verdict or ("", 0)
    if exit_code == -signal.SIGXCPU or (
        exit_code == -signal.SIGKILL and cpu >= limits["cpu_seconds"]
    ):
        kind, limit = "timeout", limits["cpu_seconds"]
    if kind == "timeout" and not running:
        return "infra", f"replaying earlier calls took more than {limit:g} s"
    if kind == "timeout":
        return "timeout", f"timeout: stopped after {limit:g} s"
    if kind == "memory" or exit_code == MEMORY_EXIT:
        return "memory", f"memory: stopped at {limits['memory_mib']} MiB"
    if kind == "processes":
        return "killed", f"killed: more than {limits['processes']} processes"
    if exit_code < 0:
        known = -exit_code in list(signal.Signals)
        name = signal.Signals(-exit_code).name if known else f"signal {-exit_code}"
        return "killed", f"killed: {name}"
    if not running:
        return "error", "error: an earlier call ends the process"
    if exit_code == 0:
        return "ok", ""
    return "error", "" if exit_code == 1 else f"error: exit status {exit_code}"


# --- the child ---


def play(request: dict, config: dict, out: int, phase: int) -> int:
    """Setup, earlier calls and the code in one fresh `__main__`; the exit code."""
    confine(config["limits"], config["address_pages"], 1 + len(request["history"]))
    os.chdir(config["scratch"])
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv, space = ["main"], vars(module)
    sys.path.insert(0, "")
    if "random" in sys.modules:
        sys.modules["random"].seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    open_streams()  # on /dev/null still
    error = attempt(request.pop("setup"), "<setup>", space)
    if error is not None:
        os.write(
            phase, b"x" + describe(error, "<setup>", config)[1].encode(errors="replace")[:900]
        )
        return 1
    os.write(phase, b"s")
    for block in request.pop("history"):
        attempt(block, "<earlier call>", space)
        flush()
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.write(phase, b"r")
    os.close(out)
    os.close(phase)
    open_streams()
    error = attempt(request.pop("code"), "<call>", space, echo_last=config["echo_last"])
    status = 0
    if error is not None:
        status, line = describe(error, "<call>", config)
    try:
        join_threads()
    finally:
        flush()
    if status == 1:
        os.write(1, (SEPARATOR + line).encode(errors="replace"))
    return status


def confine(limits: dict, pages: int, blocks: int) -> None:
    os.setsid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cpu = math.ceil(limits["cpu_seconds"] * (blocks + 1)) + 1  # the watch is finer
    bounds = {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_AS: pages * PAGE + (limits["memory_mib"] << 20),
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_FSIZE: limits["file_mib"] << 20,
        resource.RLIMIT_CORE: 0,
    }
    if os.getppid() == 1:  # elsewhere it would count every process of the user
        bounds[resource.RLIMIT_NPROC] = limits["processes"]
    for name, bound in bounds.items():
        resource.setrlimit(name, (bound, bound))


def open_streams() -> None:
    """Line-buffered, so that a run that is stopped has shown what it printed."""
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (
        open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        for fd in (1, 2)
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # the code may have closed it or put anything in its place
            continue


def attempt(source: str, name: str, space: dict, echo_last: bool = False):
    """Execute; the exception that went uncaught, or None. `sys.exit()` is a fine end."""
    last = None
    try:
        if echo_last and (tree := ast.parse(source)).body and type(tree.body[-1]) is ast.Expr:
            last = compile(ast.Expression(tree.body.pop().value), name, "eval")
            source = tree
        code = compile(source, name, "exec", dont_inherit=True)
        del source  # the frame below must not lead to the setup's text
        exec(code, space)
        if last is not None and (value := eval(last, space)) is not None:
            print(repr(value))
    except SystemExit as error:
        return None if error.code is None or error.code == 0 else error
    except BaseException as error:
        return error
    return None


def describe(error: BaseException, name: str, config: dict) -> tuple[int, str]:
    """Exit code and the one line `line N: Type: message`; N is the deepest of block `name`."""
    if isinstance(error, MemoryError):
        return MEMORY_EXIT, ""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == name:
            line = trace.tb_lineno
        trace = trace.tb_next
    try:
        syntax = isinstance(error, SyntaxError)
        message = str(error.msg if syntax and error.msg else error)
        if line is None and syntax and isinstance(error.lineno, int):
            line = error.lineno
    except BaseException:
        message = "<no message: its __str__ fails>"
    for path in config["hide"]:
        message = message.replace(path, "...")
    parts = (f"line {line or 1}", type(error).__name__, " ".join(message.split()))
    return 1, ": ".join(p for p in parts if p)


def join_threads() -> None:
    threading = sys.modules.get("threading")
    for thread in threading.enumerate() if threading else ():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()


# --- the worker ---


LIBC = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    LIBC.prctl(option, int(value), 0, 0, 0)


def forbid() -> None:
    """A seccomp filter, inherited by every run; other machines than the listed go without."""
    if os.uname().machine not in SYSTEM_CALLS:
        return
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, eperm, enosys = 0x7FFF0000, 0x50001, 0x50026
    number, machine, argument = 0, 4, 16  # offsets in struct seccomp_data
    numbers = SYSTEM_CALLS[os.uname().machine].split()
    audit, clone, prlimit, *others = (int(n, 0) for n in numbers)
    rows = [(load, 0, 0, machine), (equal, 1, 0, audit), (give, 0, 0, eperm)]
    rows += [(load, 0, 0, number), (at_least, 0, 1, 0x40000000), (give, 0, 0, eperm)]
    rows += [(equal, 0, 1, 435), (give, 0, 0, enosys)]  # clone3; libc falls back on clone
    for other in others:
        rows += [(equal, 0, 1, other), (give, 0, 0, eperm)]
    rows += [(equal, 0, 3, clone), (load, 0, 0, argument), (any_bit, 0, 1, 0x7E020000)]
    rows += [(give, 0, 0, eperm), (load, 0, 0, number)]  # no new namespaces
    rows += [(equal, 0, 3, prlimit), (load, 0, 0, argument), (equal, 1, 0, 0)]
    rows += [(give, 0, 0, eperm), (give, 0, 0, allow)]  # its own limits only
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in rows))
    LIBC.prctl(PR_SET_SECCOMP, 2, struct.pack("HxxxxxxP", len(rows), ctypes.addressof(code)))


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
    sys.path += config["path"]
    builtins.exit = builtins.quit = sys.exit  # else made by `site`, which is left out
    try:
        for name in config["preload"]:
            importlib.import_module(name)
    except Exception as error:
        send(channel, {"missing": name, "reason": f"{type(error).__name__}: {error}"})
        return
    if config["drop_uid"] is not None:  # after the imports, which root's files may need
        os.chmod(config["scratch"], 0o777)
        os.setgroups([])
        os.setresgid(*[config["drop_uid"]] * 3)
        os.setresuid(*[config["drop_uid"]] * 3)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # pid 1 without handlers gets no signals
    if os.getpid() == 1:
        forbid()
    else:
        signal.signal(signal.SIGTERM, lambda *_: leave(config["scratch"]))
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL if os.getpid() == 1 else signal.SIGTERM)
    gc.collect()
    gc.freeze()
    with open("/proc/self/statm") as file:
        config["address_pages"], resident = (int(n) for n in file.read().split()[:2])
    config["resident"] = resident * PAGE
    send(channel, {"ready": True})
    os.dup2(null, 2)
    os.close(null)
    while True:
        try:
            request = receive(channel)
        except (EOFError, OSError):
            leave(config["scratch"])
        send(channel, run(request, config, channel))


if __name__ == "__main__":
    main()
