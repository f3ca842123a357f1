"""Tasks: where problems come from, and how an answer is read and verified."""

from gtpo_jax.errors import InputError
from gtpo_jax.tasks import arithmetic, math
from gtpo_jax.tasks.types import Task

TASKS: dict[str, Task] = {
    "arithmetic": arithmetic.TASK,
    "gsm8k": math.GSM8K,
}


def get_task(name: str) -> Task:
    """The task called `name`. Raises InputError for an unknown name."""
    if name not in TASKS:
        raise InputError(f"task={name!r}: one of {', '.join(TASKS)}")
    return TASKS[name]
