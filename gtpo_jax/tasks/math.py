"""Grade-school mathematics: GSM8K, from a folder of its own files or from the hub."""

from itertools import islice

from gtpo_jax.errors import InputError
from gtpo_jax.tasks.loaders import read_rows
from gtpo_jax.tasks.types import Problem, Task
from gtpo_jax.tasks.verifiers import boxed, same_number

INSTRUCTION = (
    "Reason step by step. Compute with ```python code blocks, whose printed output you will "
    "see, and put the final answer in \\boxed{}."
)


def load_gsm8k(
    split: str, path: str | None = None, seed: int = 0, count: int | None = None
) -> list[Problem]:
    """The first `count` problems of a split ('train', 'test') in file order; `seed` is unused.

    `path` is a folder with train.jsonl and test.jsonl, one such file, or a hub id; None is
    the hub's 'openai/gsm8k'. The number in an id is the row, counted from 0. Raises
    InputError for wrong paths, splits and counts, and for a row without its '#### answer'.
    """
    if count is not None and count < 0:
        raise InputError(f"count={count} must not be negative")
    source = "openai/gsm8k" if path is None else path
    fields = {"question": str, "answer": str}
    rows = read_rows(source, split, fields, config="main")
    return [_problem(row, split, i, source) for i, row in enumerate(islice(rows, count))]


def _problem(row: dict, split: str, index: int, source: str) -> Problem:
    _, mark, answer = row["answer"].rpartition("####")
    if not mark or not answer.strip():
        raise InputError(f"{source}[{split}] row {index}: field 'answer' has no '#### number'")
    message = {"role": "user", "content": f"{row['question'].strip()}\n\n{INSTRUCTION}"}
    return Problem(f"gsm8k/{split}/{index}", "gsm8k", (message,), answer.strip())


GSM8K = Task(load_gsm8k, boxed, lambda problem, answer: same_number(problem.answer, answer))
