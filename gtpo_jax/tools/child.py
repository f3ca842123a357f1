"""What a run's own process does: limits on itself, then setup, earlier calls and the code.

Loaded by file path by the worker, with the standard library alone. It claims only two things:
that a phase (the problem's setup, the replay of earlier calls) is over, and by its exit code
whether an exception went uncaught.
"""

import ast
import math
import os
import resource
import signal
import sys
import types

MEMORY_EXIT = 86  # exit code where the uncaught exception was a MemoryError
SEPARATOR = "\x1e"  # before the line of an uncaught exception, the last thing written


def play(request: dict, config: dict, out: int, phase: int) -> int:
    """Setup, earlier calls and the code in one fresh `__main__`; the exit code."""
    confine(config["limits"], config["address_bytes"], 1 + len(request["history"]))
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
        line = describe(error, "<setup>", config)[1]
        os.write(phase, b"x" + line.encode(errors="replace")[:900])
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


def confine(limits: dict, address_bytes: int, blocks: int) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cpu = math.ceil(limits["cpu_seconds"] * (blocks + 1)) + 1  # the watch is finer
    bounds = {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_AS: address_bytes + (limits["memory_mib"] << 20),
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
