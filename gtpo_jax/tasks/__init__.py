"""Tasks: where problems come from, what is asked for, how an answer is read and verified."""

from gtpo_jax.errors import InputError
from gtpo_jax.tasks import arithmetic, commonsense, math, program
from gtpo_jax.tasks.types import Task

TASKS: dict[str, Task] = {
    "arithmetic": arithmetic.TASK,
    "gsm8k": math.GSM8K,
    "svamp": math.SVAMP,
    "math500": math.MATH500,
    "aime24": math.AIME24,
    "aime25": math.AIME25,
    "amc23": math.AMC23,
    "olympiadbench": math.OLYMPIADBENCH,
    "jsonl": math.JSONL,
    "strategyqa": commonsense.STRATEGYQA,
    "commonsenseqa": commonsense.COMMONSENSEQA,
    "humaneval": program.HUMANEVAL,
    "mbpp": program.MBPP,
}


def get_task(name: str) -> Task:
    """The task called `name`. Raises InputError for an unknown name."""
    if name not in TASKS:
        raise InputError(f"task={name!r}: one of {', '.join(TASKS)}")
    return TASKS[name]
