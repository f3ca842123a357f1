"""What a task hands to the rest of the house. No JAX here: problems are host-side objects."""

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from gtpo_jax.tasks.verify import Verifier
    from gtpo_jax.tools.sandbox import Sandbox


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    `messages` are chat messages ({"role", "content"}): the question alone, without the task's
    `prompt`. `answer` is the ground truth as the task's `verify` reads it, `meta` whatever the
    task needs later; `meta["setup"]`, where present, is the problem's own code: the sandbox
    runs it silently before the model's.
    """

    id: str
    task: str
    messages: tuple[Mapping[str, str], ...]
    answer: str
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of checking an answer.

    `timeout` and `infra` judge nothing: the check did not finish, or our side failed.
    `reason` says why, for whatever is not right.
    """

    status: Literal["right", "wrong", "timeout", "infra"]
    reason: str = ""


class Judges(NamedTuple):
    """Where answers are checked, never in the trainer itself: texts by `answers`, programs
    by `programs`."""

    answers: "Verifier"
    programs: "Sandbox"

    def metrics(self) -> dict[str, float]:
        """What the sandbox did since the last call, tool calls and programs together."""
        return {f"sandbox/{name}": value for name, value in self.programs.metrics().items()}


@dataclasses.dataclass(frozen=True)
class Task:
    """A loader, a prompt, a reader of answers, a verifier.

    load(split, path=None, seed=0, count=None, strict=True) -> list of problems, in a fixed
        order
    prompt: what is asked for besides the question, put after it; "" for nothing
    answer(text) -> the final answer that the sampled text gives, or None
    verify(problem, answer, judges) -> Future[Verdict]
    held_out: the split on which results are reported
    """

    load: Callable[..., list[Problem]]
    prompt: str
    answer: Callable[[str], str | None]
    verify: Callable[[Problem, str, Judges], Future[Verdict]]
    held_out: str = "test"


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
