"""Tool-use traces in a file, whoever the teacher was, for the cold start. docs/traces.md.

A trace says what was written and what was run, not how a call is spelled: that is the
format's, and is chosen when the cold start reads the file.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from gtpo_jax.tasks import TASKS
from gtpo_jax.tasks.loaders import Row, read_file
from gtpo_jax.tasks.types import Problem, Trace, TraceTurn
from gtpo_jax.tools.sandbox import Result
from gtpo_jax.tools.toolcall import Call, Format

FIELDS = {"id": str, "task": str, "messages": list, "answer": str, "turns": list}


@dataclass(frozen=True)
class Step:
    """What the policy writes in a turn: `text`, then `code` to run, None in the last turn;
    `output` and `status` (of tools.sandbox.Result) are what came back."""

    text: str
    code: str | None = None
    output: str = ""
    status: str = "ok"


@dataclass(frozen=True)
class Recorded:
    """One line of a file of traces."""

    problem: Problem
    steps: tuple[Step, ...]


def read(path: str | os.PathLike, strict: bool = True) -> list[Recorded]:
    """The traces of a file; a malformed one is an InputError by file, line and field."""
    return read_file(path, FIELDS, _recorded, strict=strict)


def write(path: str | os.PathLike, traces: Iterable[Recorded]) -> int:
    """Write a file of traces whole, or not at all; how many there were."""
    temporary = Path(f"{path}.part")
    count = 0
    with temporary.open("w", encoding="utf-8") as file:
        for trace in traces:
            problem = trace.problem
            line = {
                "id": problem.id,
                "task": problem.task,
                "messages": list(problem.messages),
                "answer": problem.answer,
                "turns": [
                    {"text": s.text}
                    if s.code is None
                    else {
                        "text": s.text,
                        "code": s.code,
                        "output": s.output,
                        "status": s.status,
                    }
                    for s in trace.steps
                ],
            }
            file.write(json.dumps(line) + "\n")
            count += 1
    temporary.replace(path)
    return count


def to_trace(
    recorded: Recorded,
    form: Format,
    max_chars: int,
    neutralise: Callable[[str], str] = lambda text: text,
) -> Trace:
    """The conversation as a policy would have it in this format.

    Raises ValueError where the format cannot carry it: a text that is itself a call, or code
    that ends its own block.
    """
    turns = []
    for number, step in enumerate(recorded.steps):
        if step.code is None:
            turn = TraceTurn(step.text, "")
        else:
            before = step.text.rstrip()
            result = Result(step.status, step.output, 0.0)
            turn = TraceTurn(
                f"{before}\n{form.write(step.code)}" if before else form.write(step.code),
                form.feedback(result, max_chars, neutralise),
            )
        wanted = None if step.code is None else Call(step.code)
        if form.parse(turn.text) != wanted:
            raise ValueError(
                f"{recorded.problem.id}: turn {number} does not read back in format "
                f"{form.name!r}: it gives {form.parse(turn.text)}"
            )
        turns.append(turn)
    return Trace(recorded.problem, tuple(turns))


def _recorded(row: Row, index: int) -> Recorded:
    if row["task"] not in TASKS:
        raise ValueError(f"field 'task' is {row['task']!r}: one of {', '.join(TASKS)}")
    for message in row["messages"]:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(name), str) for name in ("role", "content")
        ):
            raise ValueError("field 'messages' must hold objects with the texts role, content")
    if not row["messages"] or not row["turns"]:
        raise ValueError("fields 'messages' and 'turns' must not be empty")
    messages = tuple({"role": m["role"], "content": m["content"]} for m in row["messages"])
    problem = Problem(row["id"], row["task"], messages, row["answer"])
    return Recorded(problem, tuple(_step(row["turns"], i) for i in range(len(row["turns"]))))


def _step(turns: list, i: int) -> Step:
    turn, last = turns[i], i == len(turns) - 1
    if not isinstance(turn, dict):
        raise ValueError(f"field 'turns.{i}' must be an object")
    step = Step(
        turn.get("text", ""),
        turn.get("code"),
        turn.get("output", ""),
        turn.get("status", "ok"),
    )
    for name in ("text", "output", "status"):
        if not isinstance(getattr(step, name), str):
            raise ValueError(f"field 'turns.{i}.{name}' must be text")
    if last and (step.code is not None or not step.text.strip()):
        raise ValueError(f"field 'turns.{i}' is the last: it needs text, and no code")
    if not last and not (isinstance(step.code, str) and step.code.strip()):
        raise ValueError(f"field 'turns.{i}.code' must be code: only the last turn has none")
    return step
