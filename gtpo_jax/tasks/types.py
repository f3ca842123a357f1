"""What a task hands to the rest of the house. No JAX here: problems are host-side objects."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    `messages` are chat messages ({"role", "content"}), `answer` the ground truth as the
    task's `verify` reads it, `meta` whatever the task needs later; `meta["setup"]`, where
    present, is the problem's own code: the sandbox runs it silently before the model's.
    """

    id: str
    task: str
    messages: tuple[Mapping[str, str], ...]
    answer: str
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """A loader, a reader of answers, a verifier.

    load(split, path=None, seed=0, count=None) -> list of problems, in a fixed order
    answer(text) -> the final answer that the sampled text gives, or None
    verify(problem, answer) -> whether that answer is right
    """

    load: Callable[..., list[Problem]]
    answer: Callable[[str], str | None]
    verify: Callable[[Problem, str], bool]


@dataclasses.dataclass(frozen=True)
class TraceTurn:
    """What the policy should write in a turn, and what the tool answers ("" at the end)."""

    text: str
    feedback: str


@dataclasses.dataclass(frozen=True)
class Trace:
    """A conversation to imitate; `flaw` names what is wrong with it, "" for nothing."""

    problem: Problem
    turns: tuple[TraceTurn, ...]
    flaw: str = ""
