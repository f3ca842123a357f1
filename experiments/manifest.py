"""What made a run's numbers, and the refusal to mix those that something else made."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import gtpo_jax
from gtpo_jax import build
from gtpo_jax.errors import InputError

SAME = ("config", "data", "code", "versions")  # of all processes that work on a run
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def make(config: ConfigDict, splits: Sequence[str], command: Sequence[str]) -> dict[str, Any]:
    """The manifest of a run of this config: what is compared, and what is only told."""
    return {
        "config": json.loads(config.to_json_best_effort()),
        "data": data(config, splits),
        "code": code(),
        "versions": versions(),
        "device": device(),
        "commit": commit(),
        "command": shlex.join(("python", *command[1:])),
    }


def check(there: Mapping[str, Any], here: Mapping[str, Any], what: str) -> None:
    """Raises InputError where config, data, code or versions are others, and says which."""
    for part in SAME:
        if there[part] != here[part]:
            raise InputError(
                f"{what} was begun with another {part}: {difference(there[part], here[part])}. "
                "Go on with that, or choose another --root"
            )


def difference(there: Any, here: Any, name: str = "") -> str:
    """The first thing that differs, by its dotted name."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted({*there, *here}):
            if there.get(key) != here.get(key):
                return difference(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))
    return f"{name + ' ' if name else ''}{there!r} there, {here!r} here"


def data(config: ConfigDict, splits: Sequence[str]) -> dict[str, str]:
    """A hash of the problems of each split that a run reads, of its traces too."""
    out = {}
    for split in splits:
        text = json.dumps([(p.id, p.messages, p.answer) for p in build.problems(config, split)])
        out[split] = _hash(text.encode())
    if config.sft.path:
        out["traces"] = _hash(Path(config.sft.path).read_bytes())
    return out


@cache
def code() -> str:
    """A hash of the package's sources."""
    root = Path(gtpo_jax.__file__).parent
    text = b"".join(
        str(path.relative_to(root)).encode() + b"\0" + path.read_bytes()
        for path in sorted(root.rglob("*.py"))
    )
    return _hash(text)


@cache
def versions() -> dict[str, str]:
    """Of Python and of what computes."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


@cache
def device() -> str:
    """What a run computes on. Asked in a process of its own: a runner holds no device."""
    ask = "import jax; print(jax.device_count(), jax.devices()[0].device_kind)"
    out = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=True
    )
    return f"{out.stdout.strip()}, {len(os.sched_getaffinity(0))} CPUs"


@cache
def commit() -> str:
    """Of the sources, with a + where they were changed since; empty without git."""
    root = Path(gtpo_jax.__file__).parent
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.decode().strip() + ("+" if changed.stdout else "")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
