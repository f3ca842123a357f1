"""What a run may take, and what became of it: from what a worker saw to a `Result`."""

import signal
from dataclasses import asdict, dataclass

from gtpo_jax.errors import InputError
from gtpo_jax.tools.child import MEMORY_EXIT, SEPARATOR


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


def judge(seen: dict, limits: Limits) -> Result:
    """`seen`: what `worker.watch` reports. The closing line comes last in the output."""
    status, line = _status(seen, limits)
    text = "" if status == "infra" else seen["output"]
    if not line and seen["exit_code"] == 1:
        text, _, line = text.rpartition(SEPARATOR)
    if line:
        text += ("\n" if text and not text.endswith("\n") else "") + line
    return Result(status, text, seen["seconds"])


def _status(seen: dict, limits: Limits) -> tuple[str, str]:
    """Status and closing line; an exception that went uncaught has written its own."""
    setup, exit_code, running = seen["setup"], seen["exit_code"], seen["running"]
    if setup[:1] == "x":
        return "infra", "the problem's setup failed: " + setup[1:]
    if not setup:
        return "infra", "the problem's setup did not finish"
    kind, limit = seen["stopped"] or ("", 0)
    if exit_code == -signal.SIGXCPU or (
        exit_code == -signal.SIGKILL and seen["cpu_seconds"] >= limits.cpu_seconds
    ):
        kind, limit = "timeout", limits.cpu_seconds
    if kind == "timeout" and not running:
        return "infra", f"replaying earlier calls took more than {limit:g} s"
    if kind == "timeout":
        return "timeout", f"timeout: stopped after {limit:g} s"
    if kind == "memory" or exit_code == MEMORY_EXIT:
        return "memory", f"memory: stopped at {limits.memory_mib} MiB"
    if kind == "processes":
        return "killed", f"killed: more than {limits.processes} processes"
    if exit_code < 0:
        known = -exit_code in list(signal.Signals)
        name = signal.Signals(-exit_code).name if known else f"signal {-exit_code}"
        return "killed", f"killed: {name}"
    if not running:
        return "error", "error: an earlier call ends the process"
    if exit_code == 0:
        return "ok", ""
    return "error", "" if exit_code == 1 else f"error: exit status {exit_code}"
