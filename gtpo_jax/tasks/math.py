"""Mathematics: GSM8K, SVAMP, MATH-500, AIME, AMC, OlympiadBench, and any file of one's own.

Each is read from a folder with a file per split, from one file, or from the hub. Numbers are
compared exactly as decimals where all answers are plain numbers, else by `math-verify`.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from decimal import Decimal
from typing import Any

from gtpo_jax.errors import InputError
from gtpo_jax.tasks.loaders import Fields, Hub, Row, pick, read_rows
from gtpo_jax.tasks.types import Judges, Problem, Task, Verdict
from gtpo_jax.tasks.verifiers import boxed

PROMPT = "Reason step by step, and put the final answer in \\boxed{}."


def _user(text: str) -> tuple[Mapping[str, str], ...]:
    return ({"role": "user", "content": text.strip()},)


def _text(value: Any) -> str:
    """A number as decimal text, 27.0 as 27; a list of one as that one; text as it is."""
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"field 'answer' is a list of {len(value)}, must be of one")
        value = value[0]
    if isinstance(value, float):
        value = Decimal(repr(value))
        value = format(value.quantize(1) if value == value.to_integral() else value, "f")
    text = str(value).strip()
    if not text:
        raise ValueError("field 'answer' is empty")
    return text


def _loader(
    name: str,
    hub: Hub,
    fields: Fields,
    question: Callable[[Row], str],
    answer: Callable[[Row], Any],
    key: str | None = None,
) -> Callable[..., list[Problem]]:
    """load(split, path, seed, count, strict): rows in file order; `key` is a row's own name."""

    def load(
        split: str,
        path: str | None = None,
        seed: int = 0,
        count: int | None = None,
        strict: bool = True,
    ) -> list[Problem]:
        def make(row: Row, index: int) -> Problem:
            label = index if key is None else row.get(key, index)
            return Problem(
                f"{name}/{split}/{label}", name, _user(question(row)), _text(answer(row))
            )

        return read_rows(hub if path is None else path, split, fields, make, count, strict)

    return load


def _task(load: Callable[..., list[Problem]], check: str) -> Task:
    def verify(problem: Problem, answer: str, judges: Judges) -> Future[Verdict]:
        return judges.answers.submit(check, problem.answer, answer)

    return Task(load, PROMPT, boxed, verify)


def _svamp_question(row: Row) -> str:
    body = row["Body"].strip()
    return f"{body}{'' if body.endswith(('.', '?', '!', ',')) else '.'} {row['Question']}"


def _first(*names: str) -> Callable[[Row], str]:
    """The text in the first of these fields that a row has: copies of one file differ."""

    def read(row: Row) -> str:
        for name in names:
            if isinstance(row.get(name), str):
                return row[name]
        raise ValueError(f"field {' or '.join(map(repr, names))} is missing, or no text")

    return read


GSM8K_HUB = Hub("openai/gsm8k", "main")
GSM8K_FIELDS = {"question": str, "answer": str}


def gsm8k_problem(row: Row, split: str, index: int) -> Problem:
    """The problem of a row; its answer stands behind '####' in the solution."""
    _, mark, answer = row["answer"].rpartition("####")
    if not mark or not answer.strip():
        raise ValueError("field 'answer' has no '#### number'")
    return Problem(f"gsm8k/{split}/{index}", "gsm8k", _user(row["question"]), answer.strip())


def load_gsm8k(
    split: str,
    path: str | None = None,
    seed: int = 0,
    count: int | None = None,
    strict: bool = True,
) -> list[Problem]:
    """Rows in file order; the number in an id is the row, from 0."""

    def make(row: Row, index: int) -> Problem:
        return gsm8k_problem(row, split, index)

    source = GSM8K_HUB if path is None else path
    return read_rows(source, split, GSM8K_FIELDS, make, count, strict)


GSM8K = _task(load_gsm8k, "number")
SVAMP = _task(
    _loader(
        "svamp",
        Hub("ChilleD/SVAMP"),
        {"Body": str, "Question": str, "Answer": (float, str)},
        _svamp_question,
        lambda row: float(row["Answer"]),
        "ID",
    ),
    "number",
)
MATH500 = _task(
    _loader(
        "math500",
        Hub("HuggingFaceH4/MATH-500"),
        {"problem": str, "answer": str},
        lambda row: row["problem"],
        lambda row: row["answer"],
        "unique_id",
    ),
    "math",
)


def _contest(name: str, hub: Hub) -> Task:
    load = _loader(
        name,
        hub,
        {"answer": (str, float)},
        _first("problem", "question"),
        lambda row: row["answer"],
        "id",
    )
    return _task(load, "math")


AIME24 = _contest("aime24", Hub("HuggingFaceH4/aime_2024", splits={"test": "train"}))
AIME25 = _contest("aime25", Hub("math-ai/aime25"))
AMC23 = _contest("amc23", Hub("math-ai/amc23"))


# One of the 675 rows allows a tolerance of 0.1; it is compared exactly like the others.
OLYMPIADBENCH = _task(
    _loader(
        "olympiadbench",
        Hub("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", {"test": "train"}),
        {"question": str, "final_answer": list},
        lambda row: row["question"],
        lambda row: row["final_answer"],
        "id",
    ),
    "math",
)


def load_jsonl(
    split: str,
    path: str | None = None,
    seed: int = 0,
    count: int | None = None,
    strict: bool = True,
    fields: Mapping[str, str] | None = None,
) -> list[Problem]:
    """Rows of any file or dataset; `fields` says where question and answer stand.

    The question is text or a list of chat messages ({"role", "content"}), the answer text, a
    number or a list of one; names may be dotted. DAPO-Math: {"question": "prompt",
    "answer": "reward_model.ground_truth"}; DeepScaleR: {"question": "problem"}.
    """
    names = {"question": "question", "answer": "answer", **(fields or {})}
    if set(names) != {"question", "answer"}:
        raise InputError(
            f"task.fields={dict(fields or {})!r}: only question and answer are mapped"
        )
    if path is None:
        raise InputError("task 'jsonl' needs a file, a folder or a hub id: task.path")

    def make(row: Row, index: int) -> Problem:
        question, answer = pick(row, names["question"]), _text(pick(row, names["answer"]))
        messages = _user(question) if isinstance(question, str) else _chat(question)
        return Problem(f"jsonl/{split}/{index}", "jsonl", messages, answer)

    kinds = {names["question"]: (str, list), names["answer"]: (str, float, list)}
    return read_rows(path, split, kinds, make, count, strict)


def _chat(messages: list) -> tuple[Mapping[str, str], ...]:
    for message in messages:
        good = isinstance(message, dict) and {"role", "content"} <= set(message)
        if not good or not isinstance(message["content"], str):
            raise ValueError("messages must be objects with the texts role and content")
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("the last message must be the user's")
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


JSONL = _task(load_jsonl, "math")
