"""Many runs, one in five of them hostile: what is left of them afterwards?

    python -m benchmarks.soak --runs=10000 --isolation=auto

After the first hundred runs and after all of them the processes, open descriptors, resident
memory of host and workers and files under the scratch root are counted; the JSON line holds
both, and the exit status is 1 where something has grown (memory: by more than a quarter).
"""

import collections
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from gtpo_jax.errors import command_parser, run_command
from gtpo_jax.tools.sandbox import Limits, Sandbox

LIMITS = Limits(wall_seconds=2.0, cpu_seconds=0.2, memory_mib=128, output_bytes=1000)
ORDINARY = (
    "print(sum(i * i for i in range(1000)))",
    "import math\nprint(math.comb(30, 12))",
    "open('notes', 'w').write('x' * 1000)\nprint(open('notes').read()[:3])",
    "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nprint(f(12))",
    "print(1 / 0)",
    "x = 1 +",
)
HOSTILE = (
    "while True: pass",
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "x = bytearray(10 ** 10)",
    "import os\nfor _ in range(64): os.write(1, b'x' * (1 << 20))",
    "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: os.write(1, b'y')",
    "import os\nfds = []\nwhile True: fds.append(os.open('/dev/null', 0))",
    "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "import ctypes\nctypes.string_at(0)",
    "import os\nos._exit(0)",
    "import os, signal\nfor s in (9, 15, 19):\n    os.kill(os.getppid(), s)",
    "import os\nfor i in range(100): open(f'f{i}', 'wb').write(bytes(1 << 20))",
    "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
    "import builtins, math\nmath.pi = 3\nbuiltins.print = None",
)
# Killing one's parent is of use to code that only limits hold (isolation 'process').
REACHES_THE_WORKER = "getppid"


def program(i: int, isolation: str) -> str:
    """Run number i: every fifth is hostile."""
    hostile = [h for h in HOSTILE if isolation == "bwrap" or REACHES_THE_WORKER not in h]
    return hostile[i // 5 % len(hostile)] if i % 5 == 4 else ORDINARY[i % len(ORDINARY)]


def descendants() -> list[int]:
    """Every process below this one."""
    children = collections.defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # gone in the meantime
        children[parent].append(int(stat.parent.name))
    found, queue = [], [os.getpid()]
    while queue:
        more = children[queue.pop()]
        found += more
        queue += more
    return found


def resident_mib(pid: int) -> float:
    """Resident memory of a process; 0 where it has gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGESIZE") / (1 << 20)


def state() -> dict[str, float]:
    """What is there now."""
    scratch = Path(tempfile.gettempdir()).glob("sandbox-*/**/*")
    below = descendants()
    return {
        "processes": len(below),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "host_mib": round(resident_mib(os.getpid()), 1),
        "workers_mib": round(sum(map(resident_mib, below)), 1),
        "scratch_files": sum(1 for _ in scratch),
    }


def grown(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """What there is more of."""
    slack = {"host_mib": 1.25, "workers_mib": 1.25}
    return [name for name in before if after[name] > before[name] * slack.get(name, 1.0)]


def soak(runs: int, isolation: str = "auto", workers: int = 2, seconds: float = 1e9) -> dict:
    """At most `runs` runs in at most about `seconds`, and what they left."""
    statuses: collections.Counter[str] = collections.Counter()
    began, done = time.monotonic(), 0
    with Sandbox(workers, isolation, limits=LIMITS) as sandbox:

        def play(first: int, last: int) -> None:
            codes = [program(i, sandbox.isolation) for i in range(first, last)]
            for future in [sandbox.submit(code) for code in codes]:
                statuses[future.result().status] += 1

        play(0, 100)
        before, done = state(), 100
        while done < runs and time.monotonic() - began < seconds:
            play(done, min(done + 100, runs))
            done = min(done + 100, runs)
        after = state()
        clean = sandbox.run("import math\nprint(math.pi)").output == "3.141592653589793\n"
        isolation = sandbox.isolation
    return {
        "benchmark": "soak",
        "isolation": isolation,
        "runs": done,
        "seconds": round(time.monotonic() - began, 1),
        "statuses": dict(statuses),
        "before": before,
        "after": after,
        "grown": grown(before, after),
        "next_run_clean": clean,
    }


def main() -> None:
    """Soak, and say what is left."""
    parser = command_parser("benchmarks.soak", __doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--isolation", default="auto")
    options = parser.parse_args()
    report = soak(options.runs, options.isolation)
    print(json.dumps(report))
    sys.exit(bool(report["grown"] or not report["next_run_clean"]))


if __name__ == "__main__":
    run_command(main)
