"""Save and restore, by Orbax. The rules of resuming stand here and nowhere else.

1. A checkpoint is taken after a step: parameters, optimiser state and update count (arrays),
   and a cursor (JSON): the next step, problems consumed so far, seed.
2. Random draws have keys folded from (seed, step, ...): the seed and the step are the PRNG's
   whole state, and both are in the cursor.
3. A run folder that has a checkpoint is resumed from the newest; metrics and trajectories
   written after it are dropped and made again (`metrics.drop_from_step`).
4. A run is resumed with the seed it began with; anything else is refused.
5. Ctrl-C takes effect after the save that it falls into.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gtpo_jax.errors import InputError


class Checkpoints:
    """The checkpoints of one run folder, the newest `keep` of them.

    A context manager: leaving it, by whatever way, waits for the save in flight.
    """

    def __init__(self, workdir: Path, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(), options=options
        )

    def save(self, step: int, state: Any, cursor: dict[str, Any]) -> None:
        """Save after `step` steps. Copies to the host, then writes in the background."""
        with _uninterrupted():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), cursor=ocp.args.JsonSave(cursor)
                ),
            )

    def latest(self) -> int | None:
        """The newest step, or None in a fresh run folder."""
        return self._manager.latest_step()

    def restore(self, like: Any, seed: int) -> tuple[Any, dict[str, Any]]:
        """The newest checkpoint, on the devices and with the shapes of `like`."""
        step = self.latest()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), cursor=ocp.args.JsonRestore()
            ),
        )
        cursor = restored["cursor"]
        if cursor["seed"] != seed:
            raise InputError(
                f"the run was begun with seed {cursor['seed']} and can't go on with seed {seed}"
            )
        return restored["state"], cursor

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        with _uninterrupted():
            self._manager.wait_until_finished()
            self._manager.close()


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


def newest_step(run: Path) -> int:
    """The step of a run's newest checkpoint. Raises InputError where there is none."""
    if not (run / "checkpoints").is_dir():
        raise InputError(f"{run} has no checkpoints: train it first, or check the path")
    with ocp.CheckpointManager((run / "checkpoints").absolute()) as manager:
        step = manager.latest_step()
    if step is None:
        raise InputError(f"{run}/checkpoints is empty: train it first")
    return step


def load_params(run: Path, like: Any) -> Any:
    """The parameters of a run's newest checkpoint, whatever its optimiser was."""
    folder = run.absolute() / "checkpoints" / str(newest_step(run)) / "state"
    target = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            ),
        )
    return restored["params"]
