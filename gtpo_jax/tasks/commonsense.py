"""Commonsense reasoning: StrategyQA (yes or no) and CommonsenseQA (A to E), answers boxed.

The tool stays available. Both are held out on their `dev` split, whose answers are public.
"""

from concurrent.futures import Future

from gtpo_jax.tasks.loaders import Hub, Row, read_rows
from gtpo_jax.tasks.types import Judges, Problem, Task, Verdict
from gtpo_jax.tasks.verifiers import boxed


def load_strategyqa(
    split: str,
    path: str | None = None,
    seed: int = 0,
    count: int | None = None,
    strict: bool = True,
) -> list[Problem]:
    """Rows in file order. The hub's copy is split otherwise than the authors' train and dev."""
    source = Hub("ChilleD/StrategyQA", splits={"dev": "test"}) if path is None else path

    def make(row: Row, index: int) -> Problem:
        message = {"role": "user", "content": row["question"].strip()}
        answer = "yes" if row["answer"] else "no"
        return Problem(f"strategyqa/{split}/{row['qid']}", "strategyqa", (message,), answer)

    fields = {"qid": str, "question": str, "answer": bool}
    return read_rows(source, split, fields, make, count, strict)


def load_commonsenseqa(
    split: str,
    path: str | None = None,
    seed: int = 0,
    count: int | None = None,
    strict: bool = True,
) -> list[Problem]:
    """Rows in file order, the choices below the question, a line each."""
    source = Hub("tau/commonsense_qa", splits={"dev": "validation"}) if path is None else path

    def make(row: Row, index: int) -> Problem:
        labels, texts = row["choices"].get("label"), row["choices"].get("text")
        if not (isinstance(labels, list) and isinstance(texts, list)) or len(labels) != len(
            texts
        ):
            raise ValueError(
                "field 'choices' must hold two lists of one length, label and text"
            )
        if row["answerKey"] not in labels:
            raise ValueError(f"field 'answerKey' is {row['answerKey']!r}, not one of {labels}")
        choices = "\n".join(f"{a}. {b}" for a, b in zip(labels, texts, strict=True))
        message = {"role": "user", "content": f"{row['question'].strip()}\n{choices}"}
        return Problem(
            f"commonsenseqa/{split}/{row.get('id', index)}",
            "commonsenseqa",
            (message,),
            row["answerKey"],
        )

    fields = {"question": str, "choices": dict, "answerKey": str}
    return read_rows(source, split, fields, make, count, strict)


def _verify_yes_no(problem: Problem, answer: str, judges: Judges) -> Future[Verdict]:
    return judges.answers.submit("yes_no", problem.answer, answer)


def _verify_choice(problem: Problem, answer: str, judges: Judges) -> Future[Verdict]:
    return judges.answers.submit("choice", problem.answer, answer)


STRATEGYQA = Task(
    load_strategyqa,
    "Reason step by step, and put yes or no in \\boxed{}.",
    boxed,
    _verify_yes_no,
    held_out="dev",
)
COMMONSENSEQA = Task(
    load_commonsenseqa,
    "Reason step by step, and put the letter of the best choice in \\boxed{}.",
    boxed,
    _verify_choice,
    held_out="dev",
)
