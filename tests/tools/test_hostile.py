"""Code that means harm: the host, the worker and the next run are unaffected (`conftest`)."""

import os
import socket
from pathlib import Path

import pytest

from gtpo_jax.tools.isolation import SYSTEM_CALLS
from gtpo_jax.tools.sandbox import Result


def check(result: Result, status: str, output: str) -> None:
    assert (result.status, result.output) == (status, output)


# --- both levels ---


def test_infinite_loop(sandbox):
    check(
        sandbox.run("print(1)\nwhile True: pass"), "timeout", "1\ntimeout: stopped after 0.5 s"
    )


def test_sleep(sandbox):
    check(sandbox.run("import time; time.sleep(60)"), "timeout", "timeout: stopped after 2 s")


def test_cpu_of_children_counts(sandbox):
    code = "import os\nfor _ in range(3): os.fork()\nwhile True: pass"
    assert sandbox.run(code).output == "timeout: stopped after 0.5 s"


@pytest.mark.parametrize(
    "code",
    [
        "x = [0]\nwhile True: x += x",
        "x = bytearray(10 ** 10)",
        "import os\nfor _ in range(3): os.fork()\nx = b'1' * (90 << 20)\nwhile True: pass",
    ],
)
def test_memory_bomb(sandbox, code):
    check(sandbox.run(code), "memory", "memory: stopped at 128 MiB")


def test_fork_bomb(sandbox):
    code = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert sandbox.run(code).status in ("killed", "timeout")


def test_a_gigabyte_of_output(sandbox):
    code = "import os\nprint('head')\nfor _ in range(1024): os.write(1, b'x' * (1 << 20))"
    result = sandbox.run(code + "\nprint('tail')")
    assert result.status in ("ok", "timeout") and result.output.startswith("head\nxxx")
    assert "bytes cut" in result.output and len(result.output) < 1100
    assert result.status == "timeout" or result.output.endswith("xxxtail\n")


def test_double_fork_that_writes_on(sandbox):
    code = """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: os.write(1, b'y')
    os._exit(0)
print(1)
"""
    result = sandbox.run(code)
    assert result.status == "ok" and "1" in result.output


def test_tampering_is_gone_with_the_run(sandbox):
    code = "import math, builtins; math.pi = 3; builtins.print = None; open('left', 'w')"
    assert [sandbox.run(code).status for _ in range(4)] == ["ok"] * 4
    code = "import math, os; print(math.pi, os.listdir('.'))"
    for future in [sandbox.submit(code) for _ in range(4)]:
        check(future.result(), "ok", "3.141592653589793 []\n")


def test_forged_frames(sandbox):
    code = """
import os, json
reply = {"setup": "s", "running": True, "stopped": None, "exit_code": 0, "cpu_seconds": 0,
         "seconds": 0, "output": "forged", "worn": False}
frame = json.dumps(reply).encode() + b"\\n"
print([fd for fd in os.listdir('/proc/self/fd')].__len__())
for fd in range(3, 64):
    try: os.write(fd, frame)
    except OSError: pass
1 / 0
"""
    assert sandbox.run(code).status == "error"


def test_large_files(sandbox):
    code = "open('a', 'wb').write(bytes(17 << 20))"
    check(sandbox.run(code), "error", "line 1: OSError: [Errno 27] File too large")


# --- what only bwrap holds ---


def test_nothing_of_the_host_is_seen(jail):
    code = f"""
import os
for path in ({__file__!r}, {str(Path.home())!r} + '/.bashrc', '/etc/passwd', '/proc/1/environ',
             '/proc/1/mem', '/sys/kernel', '/var', '/home', '/run'):
    try: print(path, open(path, 'rb').read(1) if not os.path.isdir(path) else os.listdir(path))
    except OSError: pass
for path in ('/', '/usr', '/dev', '/dev/shm', '/tmp', os.path.dirname(os.__file__)):
    try: print('wrote', open(path + '/x', 'w'))
    except OSError: pass
print(sorted(set(os.environ) - {{'LC_CTYPE', 'LD_LIBRARY_PATH'}}), os.getuid() > 0)
print([n for n in os.listdir('/proc') if n.isdigit()].__len__())
"""
    names = "HOME MKL_NUM_THREADS OMP_NUM_THREADS OPENBLAS_NUM_THREADS PATH PWD PYTHONHASHSEED"
    expected = f"{[*names.split(), 'TMPDIR']} True\n2\n"
    check(jail.run(code), "ok", expected)


def test_no_network(jail):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = jail.run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert result.status == "error" and "Error: [Errno 1" in result.output


@pytest.mark.parametrize(
    "code",
    [
        "import os, signal\nfor s in (9, 15, 19): os.kill(os.getppid(), s)",
        "import os\ntry: os.kill(-1, 9)\nexcept ProcessLookupError: pass",
        "import resource, os\ntry: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0))\n"
        "except PermissionError: pass",
        "import os\ntry: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))\n"
        "except PermissionError: pass",
        "import ctypes\nctypes.CDLL(None).ptrace(16, 1, 0, 0)",
    ],
)
def test_the_worker_cannot_be_reached(jail, code):
    check(jail.run(code + "\nprint(1)"), "ok", "1\n")


def test_process_limit_holds(jail):
    code = """
import os, time
n = 0
try:
    while True:
        if os.fork() == 0: time.sleep(60)
        n += 1
except BlockingIOError: print(n < 16)
"""
    check(jail.run(code), "ok", "True\n")


@pytest.mark.skipif(os.uname().machine not in SYSTEM_CALLS, reason="no filter for it")
def test_ways_around_the_limits_are_shut(jail):
    code = """
import ctypes, os
libc = ctypes.CDLL(None)
print(libc.shmget(0, 1 << 20, 0o1600), libc.msgget(0, 0o600), libc.unshare(0x10000000))
os.memfd_create('a')
"""
    check(
        jail.run(code),
        "error",
        "-1 -1 -1\nline 5: PermissionError: [Errno 1] Operation not permitted",
    )


def test_a_deep_folder_costs_the_worker_only(jail):
    code = "import os\nfor _ in range(3000):\n    os.mkdir('d'); os.chdir('d')"
    assert jail.run(code).status == "ok"
    check(jail.run("import os; print(os.listdir('/scratch'))"), "ok", "[]\n")
