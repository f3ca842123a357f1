"""GSM8K, from small files made here and, where they lie beside the project, the real ones."""

import json
from pathlib import Path

import pytest

from gtpo_jax.errors import InputError
from gtpo_jax.tasks import get_task

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"
TASK = get_task("gsm8k")


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"question": f" How much is {i}+1? ", "answer": f"#### no\n#### {i + 1}"}
        for i in range(9)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def test_problems_come_in_file_order_and_count_takes_the_first(folder):
    problems = TASK.load("train", path=folder, seed=5)
    assert [p.answer for p in problems] == [str(i + 1) for i in range(9)]
    assert problems[7].id == "gsm8k/train/7"
    assert problems[7].task == "gsm8k"
    assert TASK.load("train", path=str(folder), count=4) == problems[:4]
    assert TASK.load("train", path=folder, count=0) == []
    assert TASK.load("train", path=folder / "train.jsonl", count=100) == problems


def test_the_one_message_is_the_question_and_the_instruction(folder):
    (message,) = TASK.load("train", path=folder, count=1)[0].messages
    assert message["role"] == "user"
    assert message["content"].startswith("How much is 0+1?\n\n")
    assert "```python" in message["content"]
    assert "\\boxed{}" in message["content"]


def test_an_answer_is_read_from_the_box_and_compared_as_a_number(folder):
    problem = TASK.load("train", path=folder, count=1)[0]
    assert TASK.verify(problem, TASK.answer("so it is \\boxed{\\$1.00}"))
    assert not TASK.verify(problem, TASK.answer("\\boxed{2}"))
    assert TASK.answer("#### 1") is None


@pytest.mark.parametrize("answer", ["12", "it is ####", ""])
def test_a_row_without_its_final_answer_is_named(folder, answer):
    (folder / "train.jsonl").write_text(json.dumps({"question": "q", "answer": answer}))
    with pytest.raises(
        InputError, match=r"\[train\] row 0: field 'answer' has no '#### number'"
    ):
        TASK.load("train", path=folder)


def test_wrong_splits_paths_and_counts_are_input_errors(folder):
    with pytest.raises(InputError, match="split='dev'"):
        TASK.load("dev", path=folder)
    with pytest.raises(InputError, match="no such file or folder"):
        TASK.load("train", path=str(folder / "none"))
    with pytest.raises(InputError, match="count=-1"):
        TASK.load("train", path=folder, count=-1)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"GSM8K is not at {DATA}")
@pytest.mark.parametrize(("split", "rows"), [("train", 7473), ("test", 1319)])
def test_every_real_ground_truth_verifies_against_itself(split, rows):
    problems = TASK.load(split, path=DATA)
    assert len(problems) == rows
    for problem in problems:
        assert TASK.verify(problem, TASK.answer(f"\\boxed{{{problem.answer}}}")), problem.id
        assert not TASK.verify(problem, problem.answer + "1"), problem.id
