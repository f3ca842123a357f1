"""Tool-use traces out of GSM8K's own solutions, for a cold start.

    python -m gtpo_jax.tasks.coldstart --task=gsm8k --out=traces.jsonl [--path=FOLDER]

GSM8K's solutions carry calculator marks, `48/2 = <<48/2=24>>24 clips in May`. Each mark becomes
a line of a program, named by the words around it, and a later step refers to an earlier result
by its name:

    clips_in_may = 48/2
    clips_altogether_in_april = 48+clips_in_may
    print(clips_altogether_in_april)

The program is run in the sandbox; a trace is kept if what it prints is the answer.
"""

import keyword
import re
from collections.abc import Sequence
from decimal import Decimal

from gtpo_jax.errors import InputError, command_parser, run_command
from gtpo_jax.tasks.loaders import Row, read_rows
from gtpo_jax.tasks.math import GSM8K_FIELDS, GSM8K_HUB, gsm8k_problem
from gtpo_jax.tasks.traces import Recorded, Step, write
from gtpo_jax.tasks.types import Problem
from gtpo_jax.tasks.verifiers import same_number
from gtpo_jax.tools.sandbox import Sandbox

_MARK = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
# The same, or a sum that the author did not mark: `4+6=10`.
_SUM = re.compile(
    _MARK.pattern
    + r"|(?<![\w.<%)+*/-])(\$?[0-9][0-9.,]*(?:\s*[-+*/x\u00d7\u2212]\s*\$?[0-9][0-9.,]*)+)"
    r"\s*=\s*\$?([0-9][0-9.,]*)"
)
_SIGNS = str.maketrans({"x": "*", "\u00d7": "*", "\u2212": "-", "$": None, ",": None})
_EXPRESSION = re.compile(r"[0-9.+\-*/() ]+")
_LITERAL = re.compile(r"(?<![\w.])(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?![\w.])")
_ZEROS = re.compile(r"(?<![\w.])0+(?=[0-9])")
_WORD = re.compile(r"[A-Za-z]+")
# Words that say nothing about a quantity.
_DULL = frozenset(
    """
    a an the is are was were be been has have had do does did will would can could of to
    for from by with at and or so if then that this these those there it its he she they
    his her their him them we our you your i my in on per each every more now still also
    which who than as total needs need get gets makes make made takes take took spends
    spent
    """.split()  # noqa: SIM905
)
_LONGEST = 4  # words in a name


def programs(solution: str) -> list[str]:
    """The program of a solution's marks, and the one that counts unmarked sums as well."""
    made = (_program(solution, mark) for mark in (_MARK, _SUM))
    return list(dict.fromkeys(code for code in made if code is not None))


def _program(solution: str, mark: re.Pattern) -> str | None:
    """None where there is nothing to compute, or something that is no sum."""
    names: dict[str, str] = {}  # a result -> the variable that holds it
    lines: list[str] = []
    for sentence in solution.split("####")[0].splitlines():
        for match in mark.finditer(sentence):
            expression, result = (
                text.translate(_SIGNS).strip().rstrip(".") for text in match.groups() if text
            )
            if not _EXPRESSION.fullmatch(expression) or not _LITERAL.fullmatch(result):
                return None
            expression = _ZEROS.sub("", expression)
            expression = _LITERAL.sub(lambda m: names.get(_value(m[0]), m[0]), expression)
            try:
                compile(expression, "<mark>", "eval")
            except SyntaxError:
                return None
            name = _name(sentence, match, {line.split(" = ")[0] for line in lines})
            lines.append(f"{name} = {expression}")
            names[_value(result)] = name
    return "\n".join([*lines, f"print({name})"]) if lines else None


def _value(number: str) -> str:
    return format(Decimal(number).normalize(), "f")


def _name(sentence: str, mark: re.Match, taken: set[str]) -> str:
    """Up to four words after the result; else, or where those are taken, before the sum."""
    rest = _SUM.sub("", sentence[mark.end() :]).lstrip(" $0123456789,.")
    start = _SUM.sub(" ", sentence[: mark.start()])
    after = _telling(re.split(r"[.,;:()=]|<<", rest)[0])[:_LONGEST]
    before = _telling(re.split(r"[.;:]\s", start)[-1])[-_LONGEST:]
    names = ["_".join(words) for words in (after, before) if words] or ["result"]
    names = [f"{n}_" if keyword.iskeyword(n) or n == "print" else n for n in names]
    names += (f"{names[0]}_{number}" for number in range(2, 2 + len(taken)))
    return next(name for name in names if name not in taken)


def _telling(text: str) -> list[str]:
    words = [w.lower() for w in _WORD.findall(text) if len(w) > 1]
    return [w for w in words if w not in _DULL]


def gsm8k(
    sandbox: Sandbox, split: str, path: str | None, count: int | None
) -> tuple[list[Recorded], int]:
    """(traces that are right, how many problems there were)."""

    def make(row: Row, index: int) -> tuple[Problem, list[str]]:
        return gsm8k_problem(row, split, index), programs(row["answer"])

    rows = read_rows(path or GSM8K_HUB, split, GSM8K_FIELDS, make, count)
    kept = []
    ran = [(p, [(code, sandbox.submit(code)) for code in codes]) for p, codes in rows]
    for problem, tries in ran:
        for code, future in tries:
            result = future.result()
            if result.status == "infra":
                raise InputError(f"{problem.id}: the sandbox failed: {result.output}")
            if result.status == "ok" and same_number(problem.answer, result.output):
                kept.append(_recorded(problem, code, result.output))
                break
    return kept, len(rows)


def _recorded(problem: Problem, code: str, output: str) -> Recorded:
    answer = problem.answer.replace(",", "")
    steps = (Step("", code, output), Step(f"The answer is \\boxed{{{answer}}}."))
    return Recorded(problem, steps)


MAKERS = {"gsm8k": gsm8k}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write traces of a task's solutions."""
    parser = command_parser("gtpo_jax.tasks.coldstart", __doc__)
    parser.add_argument("--task", default="gsm8k", help=", ".join(MAKERS))
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--path", help="folder, file or hub id; the hub where it is left out")
    parser.add_argument("--split", default="train")
    parser.add_argument("--count", type=int, help="the first problems only")
    parser.add_argument("--workers", type=int, help="of the sandbox; as many as CPUs")
    parser.add_argument("--isolation", default="auto", help="auto, bwrap or process")
    options = parser.parse_args(arguments)
    if options.task not in MAKERS:
        raise InputError(f"--task={options.task!r}: one of {', '.join(MAKERS)}")
    with Sandbox(options.workers, options.isolation, preload=()) as sandbox:
        make = MAKERS[options.task]
        kept, seen = make(sandbox, options.split, options.path, options.count)
    write(options.out, kept)
    print(f"{options.out}: {len(kept)} traces of {seen} problems, each run and right")


if __name__ == "__main__":
    run_command(main)
