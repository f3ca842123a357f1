"""Save and restore, by Orbax. The rules of resuming stand here and nowhere else.

1. A checkpoint is taken after a step: parameters, optimiser state and update count (arrays),
   and a cursor (JSON): the next step, problems consumed so far, seed, held-out score.
2. Random draws have keys folded from (seed, step, ...): the seed and the step are the PRNG's
   whole state, and both are in the cursor.
3. A run folder that has a checkpoint is resumed from the newest; metrics and trajectories
   written after it are dropped and made again (`metrics.drop_from_step`).
4. A run is resumed with the seed it began with; anything else is refused, and so are arrays of
   other names, shapes or dtypes. Devices and shardings may change: values go where `like` is.
5. Ctrl-C takes effect after the save that it falls into.
6. A save is written while training goes on, and gets its step's name when it is whole. What a
   killed process was writing or removing is removed by the one that resumes, with a line.
7. The newest `keep` are kept, and the one with the best score (the earliest of equal ones). An
   older checkpoint goes when a newer one is whole, never before.
8. A checkpoint with a file missing, cut short or not JSON is torn. The one before it is used,
   with a line that names it; who resumes the run renames it to STEP.torn. Where all are torn
   that is an error, and nothing is renamed.
9. A save that fails (a full disk) is given up with a line, and the next one is tried. A command
   whose last save failed ends with an error.
"""

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gtpo_jax import checkpoint_folder as folders
from gtpo_jax.errors import InputError


class Checkpoints:
    """The checkpoints of one run folder: the newest `keep` of them, and the best.

    A context manager: leaving it, by whatever way, waits for the save in flight. Leaving it
    without an exception raises InputError if the last save failed.
    """

    def __init__(self, workdir: Path, keep: int = 2) -> None:
        self._folder = (workdir / "checkpoints").absolute()
        self._saving: int | None = None
        self._failed = ""
        for path in folders.remove_left_over(self._folder):
            folders.say(f"removed {path}, which a process that was killed left over")
        folders.set_torn_aside(self._folder)
        self._policy = folders.NewestAndBest(keep, folders.scores(self._folder))
        self._manager = self._open()

    def save(
        self, step: int, state: Any, cursor: dict[str, Any], score: float | None = None
    ) -> None:
        """Save after `step` steps. Copies to the host, then writes in the background.

        score: the held-out accuracy last measured, higher is better; None where none was.
        """
        with _uninterrupted():
            self.wait()
            self._policy.scores[step] = score
            try:
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state),
                        cursor=ocp.args.JsonSave({**cursor, "score": score}),
                    ),
                    force=True,  # or a step below the newest is skipped without a word
                )
                self._saving = step
            except OSError as error:
                self._give_up(step, error)

    def wait(self) -> None:
        """Wait for the save in flight; one that failed is given up, with a line."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
            self._failed = ""
            folders.remove_left_over(self._folder)
        except (OSError, ValueError) as error:  # ValueError: TensorStore's
            self._give_up(self._saving, error)
        self._saving = None

    def latest(self) -> int | None:
        """The newest step that is on disk, or None in a fresh run folder."""
        return max(folders.steps(self._folder), default=None)

    def best(self) -> int | None:
        """The step with the best score on disk, or None where none has a score."""
        return next(iter(folders.best_first(folders.scores(self._folder))), None)

    def restore(self, like: Any, seed: int) -> tuple[Any, dict[str, Any]]:
        """The newest checkpoint, on the devices and with the shapes of `like`.

        Raises InputError for another seed or other arrays.
        """
        path = self._folder / str(self.latest())
        cursor = folders.read_cursor(path)
        if cursor["seed"] != seed:
            raise InputError(
                f"the run was begun with seed {cursor['seed']} and can't go on with seed {seed}"
            )
        return _read_state(path, like), cursor

    def __enter__(self) -> "Checkpoints":
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_one_line_errors())
        return self

    def __exit__(self, kind, *_) -> None:
        with _uninterrupted():
            self.wait()
            self._manager.close()
        if not self._failed:  # else its writes may still be ending
            self._quiet.close()
        elif kind is None:
            raise InputError(
                f"{self._failed}: the end of the run is not saved; when that is mended, the "
                f"same command goes on from {_name(self.latest())}"
            )

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            # Moved there in one go: a removal that is cut short would look like a torn one.
            todelete_subdir=folders.REMOVED,
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def _give_up(self, step: int, error: Exception) -> None:
        self._failed = (
            f"{self._folder / str(step)} could not be written ({folders.reason(error)})"
        )
        folders.say(f"{self._failed}; {_name(self.latest())} stays the last one saved")
        # A manager that failed raises again, and has forgotten older steps: take a new one.
        with contextlib.suppress(OSError, ValueError):
            self._manager.close()
        folders.remove_left_over(self._folder)
        self._manager = self._open()


def newest_step(run: Path) -> int:
    """The step of a run's newest checkpoint. Raises InputError where there is none."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise InputError(f"{run} has no checkpoints: train it first, or check the path")
    if not folders.steps(folder):
        raise InputError(f"{folder} is empty: train it first")
    return folders.first_whole(folder, sorted(folders.steps(folder), reverse=True))


def best_step(run: Path) -> int:
    """The step of a run's best checkpoint. Raises InputError where none has a score."""
    folder = run / "checkpoints"
    if not (order := folders.best_first(folders.scores(folder))):
        raise InputError(f"no checkpoint of {run} has a score: take the newest")
    return folders.first_whole(folder, order)


def load_params(run: Path, like: dict[str, Any], which: str = "newest") -> dict[str, Any]:
    """`params` and `frozen` of a run's "newest" or "best" checkpoint, whatever its optimiser.

    They go where those of `like` are; where it has shapes and dtypes only, they are NumPy
    arrays. Only reads: a run may be training in that folder. Raises InputError where there is
    none.
    """
    step = {"newest": newest_step, "best": best_step}[which](run)
    path = run.absolute() / "checkpoints" / str(step)
    return _read_state(path, like, tuple(f"{name}." for name in like))


def _read_state(path: Path, like: Any, parts: tuple[str, ...] = ("",)) -> Any:
    """The arrays of `like`. Raises InputError where the saved ones (those whose names begin
    with one of `parts`) have other names, shapes or dtypes, or where their bytes were altered.
    """
    handler, state = ocp.PyTreeCheckpointHandler(), path / "state"
    saved, wanted = _described(handler.metadata(state).tree), _described(like)
    for name in (*wanted, *(name for name in saved if name.startswith(parts))):
        there, here = saved.get(name, "missing"), wanted.get(name, "missing")
        if there != here:
            raise InputError(
                f"{path} is of another model or optimiser: {name} is {there} there and "
                f"{here} here"
            )

    def placed(leaf):
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=sharding)

    restore = ocp.args.PyTreeRestore(
        item=like, restore_args=jax.tree.map(placed, like), partial_restore=parts != ("",)
    )
    try:
        return handler.restore(state, args=restore)
    except Exception as error:
        if type(error) is not Exception:  # Orbax raises a bare one where it can't decode
            raise
        raise InputError(
            f"{path} can't be read ({folders.reason(error.__cause__)}): move it away, and the "
            "checkpoint before it is used"
        ) from error


def _described(tree: Any) -> dict[str, str]:
    """Name -> "dtype[shape]" of every array."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{x.dtype}{list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _name(step: int | None) -> str:
    return "the beginning" if step is None else f"step {step}"


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """SIGINT waits until the block is left. Off the main thread there is nothing to hold."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Keeps Orbax from telling at length of a save that failed, which `Checkpoints` says in a
    line: it logs tracebacks, and then each write that it abandons raises one more.
    """
    log, hook = logging.getLogger("absl"), sys.unraisablehook

    def no_traceback(record) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    def not_abandoned(event) -> None:
        if str(event.exc_value) != "Event loop is closed":
            hook(event)

    log.addFilter(no_traceback)
    sys.unraisablehook = not_abandoned
    yield
    log.removeFilter(no_traceback)
    sys.unraisablehook = hook
