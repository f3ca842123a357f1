import os
import select
import signal
import subprocess
import sys
from concurrent.futures import wait
from pathlib import Path

import pytest

from gtpo_jax.errors import InputError
from gtpo_jax.tools.sandbox import Limits, Result, Sandbox
from gtpo_jax.tools.worker import Tape


def check(result: Result, status: str, output: str) -> None:
    assert (result.status, result.output) == (status, output)


# --- what a run gives ---


@pytest.mark.parametrize(
    ("code", "status", "output"),
    [
        ("print(1)\nprint(2)", "ok", "1\n2\n"),
        ("", "ok", ""),
        ("1 + 1", "ok", ""),
        ("import sys; sys.exit()", "ok", ""),
        ("print(1); raise SystemExit(0)", "ok", "1\n"),
        ("import sys\nsys.exit(3)", "error", "line 2: SystemExit: 3"),
        ("exit_now = 1\nraise SystemExit('no way')", "error", "line 2: SystemExit: no way"),
        ("import os; print(1, flush=True); os._exit(0)", "ok", "1\n"),
        ("import os; os._exit(7)", "error", "error: exit status 7"),
        ("print(x)", "error", "line 1: NameError: name 'x' is not defined"),
        ("print(1)\n1 / 0", "error", "1\nline 2: ZeroDivisionError: division by zero"),
        ("print(1, end='')\nx", "error", "1\nline 2: NameError: name 'x' is not defined"),
        ("import os; os.kill(os.getpid(), 40)", "killed", "killed: signal 40"),
        ("def f():\n    assert 0\nf()", "error", "line 2: AssertionError"),
        ("a = 1\nb = = 2", "error", "line 2: SyntaxError: invalid syntax"),
        ("x = 1\neval('1 +')", "error", "line 2: SyntaxError: invalid syntax"),
        ("raise ValueError('a\\nb')", "error", "line 1: ValueError: a b"),
        ("import json\njson.loads('')", "error", None),
        ("raise KeyboardInterrupt", "error", "line 1: KeyboardInterrupt"),
        ("raise MemoryError", "memory", "memory: stopped at 128 MiB"),
        ("import sys; print(2, file=sys.stderr)", "ok", "2\n"),
        ("print(input())", "error", "line 1: EOFError: EOF when reading a line"),
        ("print('a\\0b\\ud800')", "ok", "a\ufffdb\\ud800\n"),
        ("import os; _ = os.write(1, b'\\xff')", "ok", "\ufffd"),
        ("'\ud800'", "error", None),
        ("\0", "error", None),
        ("import sys; sys.stdout.close()", "ok", ""),
        ("import os; os.close(1); os.close(2)", "ok", ""),
        ("import threading as t; t.Thread(target=lambda: print(5)).start()", "ok", "5\n"),
        ("print(__name__, math)", "error", "line 1: NameError: name 'math' is not defined"),
        ("import ctypes\nprint(1)\nctypes.string_at(0)", "killed", "1\nkilled: SIGSEGV"),
        ("import os; os.kill(os.getpid(), 9)", "killed", "killed: SIGKILL"),
        ("f = lambda n: f(n + 1)\nf(0)", "error", None),
    ],
)
def test_status_and_output(sandbox, code, status, output):
    result = sandbox.run(code)
    assert result.status == status, result
    assert output is None or result.output == output


def test_no_host_path_in_an_error(sandbox):
    result = sandbox.run("from math import nothing")
    assert result.output.startswith("line 1: ImportError: cannot import name 'nothing'")
    assert sys.base_prefix not in result.output


def test_each_run_starts_alike(sandbox):
    code = "import random; print(random.random(), hash('a'), globals().keys())"
    assert len({f.result().output for f in [sandbox.submit(code) for _ in range(6)]}) == 1


def test_echo_of_the_last_expression():
    with Sandbox(workers=1, isolation="process", preload=(), echo_last=True) as sandbox:
        check(sandbox.run("x = 'a'\nx"), "ok", "'a'\n")
        check(sandbox.run("x = 1"), "ok", "")
        check(sandbox.run("1\nNone"), "ok", "")


# --- setup and history ---

SETUP = (
    "def secret(n):\n    print('called')\n    return None if n < 0 else n * 7\nprint('loud')"
)


def test_setup_is_silent_and_usable(sandbox):
    check(
        sandbox.run("print(secret(6), secret(-1))", setup=SETUP),
        "ok",
        "called\ncalled\n42 None\n",
    )


def test_text_of_setup_is_out_of_sight(sandbox):
    code = """
import gc, sys
frame, seen = sys._getframe(), []
while frame:
    seen += list(frame.f_locals.values())
    frame = frame.f_back
seen += [x for o in gc.get_objects() if isinstance(o, dict) for x in list(o.values())]
print(any(isinstance(x, (str, bytes)) and str(x).startswith('def secret') for x in seen))
"""
    check(sandbox.run(code, setup=SETUP), "ok", "False\n")


def test_an_error_in_setup_is_located_in_the_call(sandbox):
    result = sandbox.run("\nf()", setup="def f():\n    raise ValueError('bad')")
    check(result, "error", "line 2: ValueError: bad")


@pytest.mark.parametrize(
    "setup", ["1 / 0", "def", "raise SystemExit(1)", "import os; os._exit(0)"]
)
def test_failing_setup_is_our_fault(sandbox, setup):
    result = sandbox.run("print(1)", setup=setup)
    assert result.status == "infra" and "setup" in result.output


def test_history_is_replayed_silently(sandbox):
    history = ["x = secret(6)\nprint('heard')", "x += 1\n1 / 0\nx = 0", "raise SystemExit(3)"]
    check(sandbox.run("print(x)", history, SETUP), "ok", "43\n")


def test_history_that_overruns_is_infra(sandbox):
    assert sandbox.run("print(1)", ["while True: pass"]).status == "infra"


def test_history_cannot_claim_a_fault_of_ours(sandbox):
    forge = "import os\nfor fd in range(64):\n  try: os.write(fd, b'xfault' * 999)\n"
    forge += "  except OSError: pass"
    assert sandbox.run("print(1)", [forge]).status == "ok"
    assert sandbox.run("print(1)", ["import os; os._exit(0)"]).status == "error"


# --- the pool ---


def test_a_lost_worker_is_replaced(sandbox):
    for one in list(sandbox._idle):
        one.process.kill()
        one.process.wait()
    check(sandbox.run("print(1)"), "ok", "1\n")


def test_a_worker_that_keeps_dying_is_infra():
    with Sandbox(
        workers=1, isolation="process", preload=(), limits=Limits(cpu_seconds=0.5)
    ) as sandbox:
        result = sandbox.run("import os; os.kill(os.getppid(), 9); os.kill(os.getpid(), 9)")
        assert result.status == "infra" and result.output
        assert sandbox.run("print(1)").status == "ok"


def test_metrics():
    with Sandbox(
        workers=1, isolation="process", preload=(), limits=Limits(cpu_seconds=0.5)
    ) as sandbox:
        wait([sandbox.submit(c) for c in ("1", "while True: pass", "2", "1 / 0")])
        metrics = sandbox.metrics()
        assert metrics["runs"] == 4 and metrics["timeout_rate"] == 0.25
        assert metrics["infra_rate"] == 0 and metrics["seconds_p95"] >= 0.5
        assert sandbox.metrics()["runs"] == 0


def below(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(n) for path in children for n in path.read_text().split()]
    return found + [deeper for child in found for deeper in below(child)]


def test_killing_the_host_leaves_no_worker(isolation):
    script = f"""
from gtpo_jax.tools.sandbox import Sandbox
sandbox = Sandbox(workers=2, isolation={isolation!r})
sandbox.run('1')
sandbox.submit('import time; time.sleep(600)')
code = 'import os, time; os.fork() or (os.setsid(), os.fork()); time.sleep(600)'
sandbox.submit(code, setup='import os; os.write(2, b"")')
import pathlib, os
def count(pid):
    own = pathlib.Path(f'/proc/{{pid}}/task').glob('*/children')
    return 1 + sum(count(n) for p in own for n in p.read_text().split())
while count(os.getpid()) < {9 if isolation == "bwrap" else 7}: pass
print('up', flush=True)
import time; time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as host:
        assert host.stdout.readline() == b"up\n"
        ends = [os.pidfd_open(pid) for pid in below(host.pid)]
        assert len(ends) >= 6
        host.send_signal(signal.SIGKILL)
    for fd in ends:
        assert select.select([fd], [], [], 20)[0], "a process outlived the host"
        os.close(fd)


def test_close_ends_what_runs():
    sandbox = Sandbox(workers=1, isolation="process", preload=())
    running, waiting = (sandbox.submit("import time; time.sleep(60)") for _ in range(2))
    while not running.running():
        pass
    sandbox.close()
    assert running.result().status == "infra" and waiting.cancelled()


# --- wrong input ---


@pytest.mark.parametrize(
    "values",
    [
        {"wall_seconds": 0},
        {"cpu_seconds": float("nan")},
        {"cpu_seconds": "5"},
        {"memory_mib": 1.5},
        {"processes": 0},
        {"open_files": True},
        {"output_bytes": -1},
    ],
)
def test_limits_that_cannot_be_held(values):
    (name,) = values
    with pytest.raises(InputError, match=f"{name}=.*must be"):
        Limits(**values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"isolation": "docker"}, "isolation='docker'.*auto, bwrap, process"),
        ({"workers": 0}, "workers=0"),
        ({"isolation": "process", "preload": ["math", "no_such"]}, "preload: module 'no_such'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        Sandbox(**options)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "#!/bin/sh\necho 'bwrap: no permission to make' >&2\nexit 1\n",
            "no permission to make",
        ),
        ("#!/no/such/shell\n", "No such file"),
    ],
)
def test_without_bwrap_the_message_says_what_to_do(monkeypatch, tmp_path, script, reason):
    broken = tmp_path / "bwrap"
    broken.write_text(script)
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(InputError) as error:
        Sandbox(workers=1)
    for part in (reason, "pip install", "apt install", "ISOLATION=process"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_probe(isolation):
    level = "process" if isolation == "process" else "auto"
    command = [sys.executable, "-m", "gtpo_jax.tools.sandbox", f"--isolation={level}"]
    probe = subprocess.run(command, capture_output=True, text=True)
    assert probe.returncode == 0 and "isolation works (" in probe.stdout
    assert ("\033[31m" in probe.stderr) == (isolation == "process")


def test_probe_of_wrong_input():
    command = [sys.executable, "-m", "gtpo_jax.tools.sandbox", "--isolation=x"]
    probe = subprocess.run(command, capture_output=True, text=True)
    assert probe.returncode == 2 and probe.stderr.startswith("error: isolation='x'")


def test_tape_keeps_head_and_tail():
    tape = Tape(10)
    for byte in b"0123456789":
        tape.add(bytes([byte]))
    assert tape.text() == "0123456789"
    tape.add(b"abc" * 100)
    assert tape.text() == "01234\n... [300 bytes cut] ...\nbcabc"
