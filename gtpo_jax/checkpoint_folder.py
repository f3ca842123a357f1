"""What lies in a run's folder of checkpoints, and which of it is whole.

A folder named by its step is one that Orbax finished; rule 8 of `gtpo_jax/checkpoint.py` says
when it is torn all the same. Every process of a run looks for itself, process 0 alone renames,
removes and prints.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tensorstore
from jax.experimental import multihost_utils

from gtpo_jax.errors import InputError

REMOVED = "removed"  # what is no longer kept goes through this folder


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in no order."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return [int(path.name) for path in paths if path.name.isdigit()]


def read_cursor(path: Path) -> dict[str, Any]:
    """The cursor of one checkpoint, as Orbax's JsonSave wrote it."""
    return json.loads((path / "cursor" / "metadata").read_text())


def scores(folder: Path) -> dict[int, float | None]:
    """Step -> score; None too where the cursor can't be read."""
    found = dict.fromkeys(steps(folder))
    for step in found:
        with contextlib.suppress(OSError, ValueError):
            found[step] = read_cursor(folder / str(step)).get("score")
    return found


def best_first(scores: dict[int, float | None]) -> list[int]:
    """The steps that have a score, the highest first and the earliest first of equal ones."""
    scored = {step: score for step, score in scores.items() if score is not None}
    return sorted(scored, key=lambda step: (-scored[step], step))


class NewestAndBest:
    """What is kept, as Orbax's PreservationPolicy. Its own BestN reads files of metrics, and
    a torn one would keep a run from being resumed.
    """

    def __init__(self, keep: int, scores: dict[int, float | None]) -> None:
        self.keep, self.scores = keep, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = best_first({step: self.scores.get(step) for step in steps})[:1]
        return [step in (*steps[-self.keep :], *best) for step in steps]


def first_whole(folder: Path, order: Sequence[int]) -> int:
    """The first step of `order` whose checkpoint is whole; the ones passed over are printed.

    Raises InputError where none is.
    """
    torn = {}
    for step in order:
        path = folder.absolute() / str(step)
        torn[path] = wrong(path)
        if not torn[path]:
            return step
        say(f"{path} is torn ({torn[path]}) and passed over")
    raise _all_torn(torn)


def set_torn_aside(folder: Path) -> None:
    """Rename what is torn to STEP.torn. Raises InputError where nothing is whole."""
    paths = [folder / str(step) for step in steps(folder)]
    torn = {path: why for path in paths if (why := wrong(path))}
    if torn and len(torn) == len(paths):
        raise _all_torn(torn)
    multihost_utils.sync_global_devices("every process has looked")
    for path, why in torn.items():
        aside = path.with_suffix(".torn")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}.torn")
        say(f"{path} is torn ({why}); renamed to {aside.name}")
        if jax.process_index() == 0:
            path.rename(aside)


def remove_left_over(folder: Path) -> list[Path]:
    """Remove saves that did not finish and checkpoints no longer kept; returns their paths.

    Not while a save is in flight.
    """
    if jax.process_index() != 0:
        return []
    found = sorted((*folder.glob("*.orbax-checkpoint-tmp*"), *folder.glob(f"{REMOVED}/*")))
    for path in found:
        shutil.rmtree(path, ignore_errors=True)  # a writer may outlive its failed save
    return found


def wrong(path: Path) -> str:
    """What is wrong with a checkpoint, found without reading its arrays; "" if nothing is."""
    state = path / "state"
    texts = [path / "cursor" / "metadata", state / "_METADATA"]
    texts += [*state.glob("_sharding"), *state.glob("array_metadatas/*")]
    for file in texts:
        try:
            json.loads(file.read_text())
        except OSError as error:
            return f"{file.relative_to(path)}: {error.strerror}"
        except ValueError:
            return f"{file.relative_to(path)} is cut short"
    try:
        return _short(state)
    except (OSError, ValueError) as error:
        return reason(error)


def _short(state: Path) -> str:
    """Which file is shorter than what the tree of arrays (OCDBT) places in it; "" if none."""
    store = tensorstore.KvStore.open(f"file://{state}/").result()
    places = [tensorstore.ocdbt.dump(store).result()["versions"][-1]["root"]["location"]]
    while places:
        place = places.pop()
        kind, *folder_and_file, start, length = place.split(":")
        file = state / "".join(folder_and_file)
        if not file.exists() or file.stat().st_size < int(start) + int(length):
            return f"{file.relative_to(state.parent)} is missing or cut short"
        if kind == "btreenode":
            for entry in tensorstore.ocdbt.dump(store, place).result()["entries"]:
                places += [entry[k] for k in ("location", "indirect_value") if k in entry]
    return ""


def _all_torn(torn: dict[Path, str]) -> InputError:
    named = "; ".join(f"{path} ({why})" for path, why in torn.items())
    return InputError(f"no checkpoint is whole: {named}. Move them away to begin anew")


def reason(error: BaseException | None) -> str:
    """The end of a message, in one line, without TensorStore's specifications."""
    text = " ".join(re.split(r" \[\w+='", str(error))[0].split())
    return ": ".join(text.split(": ")[-2:])


def say(line: str) -> None:
    """Print on process 0."""
    if jax.process_index() == 0:
        print(line, flush=True)
