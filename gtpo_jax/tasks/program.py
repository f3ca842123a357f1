"""Program synthesis: HumanEval and MBPP. The final answer is a program, graded by its tests.

The program stands in a ```solution block, a mark that no tool call has. It is graded in the
sandbox, never in the trainer, and there in a process of its own that holds nothing of the
tests: it is asked for the values of its functions and answers in plain data. It passes if a
word that only this side knows is printed after the last assert. So none of these help:
leaving before the asserts, objects that equal everything, replacing `check` or a builtin,
looking for the tests in frames, in memory or on disk.

What grading cannot prove: that a program is right beyond the tests it was given. One that has
the values of MBPP's three asserts written into it passes, and MBPP's prompt shows them.
And with isolation="process", run as root, a program may read the memory of its grader.
"""

import ast
import re
import secrets
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from gtpo_jax.errors import InputError
from gtpo_jax.tasks import grader
from gtpo_jax.tasks.loaders import Hub, Row, read_rows
from gtpo_jax.tasks.types import Judges, Problem, Task, Verdict
from gtpo_jax.tools.isolation import PYTHON_FLAGS
from gtpo_jax.tools.sandbox import Result, Sandbox

PROMPT = """Put the whole program, with its imports, in a last block that starts with a line \
```solution and ends with a line ```. It is not run before it is tested."""

_SOLUTION = re.compile(r"^```solution[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SOURCE = Path(grader.__file__).read_text(encoding="utf-8")
# MBPP's splits, by task_id (Austin et al., arXiv 2108.07732).
MBPP_SPLITS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}


def solution(text: str) -> str | None:
    """The program in the last ```solution block that is closed; None where there is none."""
    blocks = _SOLUTION.findall(text)
    return blocks[-1] if blocks else None


def grade(
    sandbox: Sandbox,
    program: str,
    tests: str,
    names: Sequence[str],
    before: str = "",
    given: str = "",
) -> Future[Verdict]:
    """Whether `tests` pass, in which `names` stand for the program's.

    before: what the tests need of their own. given: executed ahead of the program, in its
    process. A program that overruns its limits is wrong; only a failure of ours is infra.
    """
    nonce = secrets.token_hex(16)
    case = {
        "flags": list(PYTHON_FLAGS),
        "source": _SOURCE,
        "programs": [given, program],
        "before": before,
        "names": list(names),
        "tests": tests,
        "nonce": nonce,
    }
    verdict: Future[Verdict] = Future()

    def settle(done: Future[Result]) -> None:
        if done.cancelled() or done.exception() is not None:
            verdict.set_result(Verdict("infra", "the sandbox was closed"))
            return
        result = done.result()
        last = result.output.rstrip("\n").rpartition("\n")[2]
        if result.status == "infra":
            verdict.set_result(Verdict("infra", result.output))
        elif result.status == "ok" and last == nonce:
            verdict.set_result(Verdict("right"))
        else:
            verdict.set_result(Verdict("wrong", last[:200] or result.status))

    sandbox.submit(f"{_SOURCE}\ngrade({case!r})").add_done_callback(settle)
    return verdict


def _verify(problem: Problem, answer: str, judges: Judges) -> Future[Verdict]:
    return grade(judges.programs, answer, **problem.meta["grading"])


def load_humaneval(
    split: str,
    path: str | None = None,
    seed: int = 0,
    count: int | None = None,
    strict: bool = True,
) -> list[Problem]:
    """The 164 problems, all of them split 'test'. Raises InputError for any other."""
    source = Hub("openai/openai_humaneval") if path is None else path

    def make(row: Row, index: int) -> Problem:
        name, prompt = row["entry_point"], row["prompt"]
        content = f"Complete this function.\n\n```\n{prompt.strip()}\n```"
        grading = {
            "tests": f"{row['test']}\ncheck({name})",
            "names": [name],
            "before": prompt,  # some tests call its helpers
            "given": prompt,
        }
        return Problem(
            f"humaneval/{split}/{row['task_id']}",
            "humaneval",
            ({"role": "user", "content": content},),
            prompt + row["canonical_solution"],
            {"grading": grading},
        )

    fields = dict.fromkeys(
        ("task_id", "prompt", "entry_point", "canonical_solution", "test"), str
    )
    return read_rows(source, split, fields, make, count, strict)


def load_mbpp(
    split: str,
    path: str | None = None,
    seed: int = 0,
    count: int | None = None,
    strict: bool = True,
) -> list[Problem]:
    """One of MBPP's splits: train, validation, test, prompt. A local folder has all in one
    file, mbpp.jsonl, of which the split's task ids are taken."""
    if split not in MBPP_SPLITS:
        raise InputError(f"split={split!r}: MBPP has {', '.join(MBPP_SPLITS)}")
    source: Hub | Path | str = Hub("google-research-datasets/mbpp", "full")
    if path is not None:
        one = Path(path) / "mbpp.jsonl"
        source = one if one.is_file() else path

    def make(row: Row, index: int) -> Problem | None:
        if row["task_id"] not in MBPP_SPLITS[split]:
            return None
        if not all(isinstance(test, str) for test in row["test_list"]):
            raise ValueError("field 'test_list' must be a list of texts")
        code, prepare = (row[f].replace("\r\n", "\n") for f in ("code", "test_setup_code"))
        shown = "\n".join(test.strip() for test in row["test_list"])
        tests = f"{prepare}\n{shown}"
        try:
            names, imports = _called(code, tests)
        except SyntaxError as error:
            raise ValueError(f"field 'code' or 'test_list' is not Python: {error}") from None
        content = f"{row['text'].strip()}\n\nIt has to pass these tests:\n\n```\n{shown}\n```"
        grading = {"tests": tests, "names": names, "before": imports}
        return Problem(
            f"mbpp/{split}/{row['task_id']}",
            "mbpp",
            ({"role": "user", "content": content},),
            code,
            {"grading": grading},
        )

    fields = {
        "task_id": int,
        "text": str,
        "code": str,
        "test_list": list,
        "test_setup_code": str,
    }
    made = read_rows(source, split, fields, make, strict=strict)
    return [problem for problem in made if problem is not None][:count]


def _called(code: str, tests: str) -> tuple[list[str], str]:
    """The names of the tests that the reference defines, and its imports that they use."""
    used = {n.id for n in ast.walk(_parsed(tests)) if isinstance(n, ast.Name)}
    defined, imports = [], []
    for node in _parsed(code).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in used:
            defined.append(node.name)
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound = {(a.asname or a.name).split(".")[0] for a in node.names}
            if bound & used:
                imports.append(ast.unparse(node))
    return sorted(set(defined)), "\n".join(imports)


def _parsed(code: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # '\\w' is bad style, not bad code
        return ast.parse(code)


def _task(load: Callable[..., list[Problem]]) -> Task:
    return Task(load, PROMPT, solution, _verify)


HUMANEVAL = _task(load_humaneval)
MBPP = _task(load_mbpp)
