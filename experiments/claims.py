"""Whose a run is: several runners, on one machine or many, may share a folder.

A run's folder holds one file `claim.WHO`, WHO being `free`, `done`, or HOST.RUNNER.WORKER, the
numbers of the process that looks after it and of the one that works in it. Changing hands is
one rename of that file, which the file system grants to one of those who try. A folder appears
whole, with its claim, by a rename as well.

A claim is abandoned, and may be taken, when both are gone: on their own host when no process
has their numbers, for other hosts when nothing in the folder was written for `STALE` seconds.
"""

import contextlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import psutil

FREE, DONE = "claim.free", "claim.done"
STALE = 1800.0  # seconds; a step, an evaluation or a compilation takes less


def create(folder: Path, files: Mapping[str, str]) -> None:
    """Make the folder with these files, free to claim, unless it is there already."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    new.mkdir()
    for name, text in files.items():
        (new / name).write_text(text, encoding="utf-8")
    (new / FREE).touch()
    try:
        new.rename(folder)
    except OSError:  # another runner's came first
        shutil.rmtree(new)


def done(folder: Path) -> bool:
    """Whether the run is finished."""
    return (folder / DONE).exists()


def take(folder: Path) -> Path | None:
    """Claim the folder for this process: the claim, or None where it is done or somebody's."""
    for claim in folder.glob("claim.*"):
        if claim.name != DONE and (claim.name == FREE or abandoned(claim)):
            return hand(claim, os.getpid())
    return None


def hand(claim: Path, worker: int) -> Path | None:
    """Give the claim to this process and its worker; None where somebody was faster."""
    return _rename(claim, f"claim.{socket.gethostname()}.{os.getpid()}.{worker}")


def release(claim: Path) -> None:
    """Leave the run to whoever comes next."""
    _rename(claim, FREE)


def finish(claim: Path) -> None:
    """The run is done."""
    _rename(claim, DONE)


def abandoned(claim: Path) -> bool:
    """Whether those whom the claim names are gone."""
    host, *pids = claim.name.removeprefix("claim.").rsplit(".", 2)
    if host == socket.gethostname():
        return not any(_runs(int(pid)) for pid in pids)
    written = 0.0
    for path in (claim, *claim.parent.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            written = max(written, path.stat().st_mtime)
    return time.time() - written > STALE


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _rename(claim: Path, name: str) -> Path | None:
    target = claim.with_name(name)
    try:
        claim.rename(target)
    except FileNotFoundError:
        return None
    with contextlib.suppress(FileNotFoundError):
        os.utime(target)
    return target
