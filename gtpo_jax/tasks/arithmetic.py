"""The embedded task: word problems from templates and a seed, and traces for a cold start.

Made for a transformer of a million parameters: fixed wordings, few words, and numbers that
are too large for it to do in its head but short enough to copy digit by digit. In the
several-call families the problem brings a function that *prints* a hidden value and returns
None, so no single program can solve them: the value has to be read from the feedback first.

The traces are imperfect on purpose. A perfect imitator, sampled, is right a little under half
of the time; in seven of the thirteen families its most likely trace is wrong.
"""

import dataclasses
import random
import string
import zlib
from concurrent.futures import Future

from gtpo_jax.errors import InputError
from gtpo_jax.tasks.types import Judges, Problem, Task, Trace, TraceTurn, Verdict
from gtpo_jax.tasks.verifiers import boxed

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Family:
    """One template. `a`, `b`, `c` are drawn from `ranges` and shown; `h` is printed last.

    `right` and `wrong` are the expressions of the last call. `hidden` are the ranges of the
    values that `peek()` and then `look()` print: as many extra calls.
    """

    wordings: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    right: str
    wrong: str
    hidden: tuple[tuple[int, int], ...] = ()


# The first words tell the family, so that a policy can learn each one's habits apart.
FAMILIES = {
    "add": Family(
        (
            "Ann has {a} coins and finds {b} more. How many coins now?",
            "Ann had {a} coins and won {b} more. How many coins now?",
        ),
        ((1000, 9999), (100, 999)),
        "{a}+{b}",
        "{a}-{b}",
    ),
    "sub": Family(
        (
            "Bob had {a} cards and sold {b}. How many cards are left?",
            "Bob has {a} cards and gives {b} away. How many cards are left?",
        ),
        ((1000, 9999), (100, 999)),
        "{a}-{b}",
        "{a}+{b}",
    ),
    "mul": Family(
        (
            "Each of {a} trucks carries {b} boxes. How many boxes in all?",
            "Each of {a} shops sells {b} boxes. How many boxes in all?",
        ),
        ((100, 999), (12, 99)),
        "{a}*{b}",
        "{a}+{b}",
    ),
    "share": Family(
        ("Divide {a} nuts among {b} boys. How many nuts does each get?",),
        ((10000, 99999), (12, 99)),
        "{a}//{b}",
        "{a}-{b}",
    ),
    "rest": Family(
        ("Pack {a} eggs in boxes of {b}. How many eggs remain?",),
        ((2000, 9999), (100, 999)),
        "{a}%{b}",
        "{a}-{b}",
    ),
    "sum": Family(
        ("Three bags weigh {a}, {b} and {c}. What is the total?",),
        ((100, 999), (100, 999), (100, 999)),
        "{a}+{b}+{c}",
        "{a}+{b}-{c}",
    ),
    "bill": Family(
        ("Rent is {a} a day for {b} days, plus {c} once. What is the bill?",),
        ((100, 899), (12, 99), (100, 999)),
        "{a}*{b}+{c}",
        "{a}+{b}+{c}",
    ),
    "fence": Family(
        ("A field is {a} long and {b} wide. How long is its fence?",),
        ((100, 999), (100, 999)),
        "2*({a}+{b})",
        "{a}+{b}",
    ),
    "peek_add": Family(
        (
            "The safe prints its coins with peek(). We add {a}. How many coins now?",
            "The jar prints its coins with peek(). We add {a}. How many coins now?",
        ),
        ((100, 999),),
        "{h}+{a}",
        "{h}-{a}",
        ((1000, 9999),),
    ),
    "peek_sub": Family(
        ("One tank prints its level with peek(). We drain {a}. How much is left?",),
        ((100, 999),),
        "{h}-{a}",
        "{h}+{a}",
        ((1000, 9999),),
    ),
    "peek_mul": Family(
        ("Some shop prints a price with peek(). What do {a} bikes cost?",),
        ((100, 316),),
        "{h}*{a}",
        "{h}+{a}",
        ((100, 316),),
    ),
    "peek_share": Family(
        ("Our prize is printed by peek(). We are {a} friends. How much does each get?",),
        ((100, 999),),
        "{h}//{a}",
        "{h}-{a}",
        ((10000, 99999),),
    ),
    "chain": Family(
        ("Use peek() for the key and look(key) for the gold. We add {a}. How much gold?",),
        ((100, 999),),
        "{h}+{a}",
        "{h}-{a}",
        ((100, 999), (1000, 9999)),
    ),
}

# family -> (what is wrong, in which share of its traces). More than a half means that greedy
# decoding of an imitator fails there; the right way keeps at least 0.25.
FLAWS = {
    "add": ("operation", 0.70),
    "sub": ("name", 0.40),
    "mul": ("operation", 0.68),
    "share": ("syntax", 0.70),
    "rest": ("operation", 0.35),
    "sum": ("unclosed", 0.70),
    "bill": ("at_once", 0.65),
    "fence": ("unclosed", 0.40),
    "peek_add": ("skip", 0.70),
    "peek_sub": ("at_once", 0.35),
    "peek_mul": ("name", 0.70),
    "peek_share": ("operation", 0.40),
    "chain": ("skip", 0.40),
}

# Of the traces whose last call fails (`name`, `syntax`, `unclosed`): the share that tries
# again and gets it right. The others box a number of the prompt.
RECOVERY = 0.15

# Single tokens. A sampled call ends with "\n```", which starts no other piece of a turn;
# feedback opens with a piece of its own, so turn and feedback never share a token.
SYMBOLS = (
    "```python\n",
    "\n```",
    "\n```output\n",
    "\n```\n",
    "\\boxed{",
    "print(",
    "peek()",
    "look(",
)

_NAME_ERROR = "line 1: NameError: name 'total' is not defined"
_SYNTAX_ERROR = "line 1: SyntaxError: '(' was never closed"
_UNCLOSED = "invalid call: unclosed '''python block"  # a fence inside feedback is neutralised


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """A problem and how it is solved: `steps` are (code, what it prints) of the right way."""

    problem: Problem
    steps: tuple[tuple[str, str], ...]
    wrong: str
    guess: str


def load(
    split: str,
    path: str | None = None,
    seed: int = 0,
    count: int | None = None,
    strict: bool = True,
) -> list[Problem]:
    """`count` problems (1000 if None); problem i depends on split, seed and i alone.

    The two splits share no tuple of shown numbers. Raises InputError for an unknown split,
    a negative count, and a path: there is nothing to read, nor to be `strict` about.
    """
    if path is not None:
        raise InputError(f"path={str(path)!r}: arithmetic is generated, its path must be None")
    return [_draw(split, seed, i).problem for i in range(_checked(split, count))]


def traces(seed: int = 0, count: int | None = None) -> list[Trace]:
    """Traces for the problems of `load("train", ...)`, flawed as `FLAWS` says."""
    return [_trace(_draw("train", seed, i)) for i in range(_checked("train", count))]


def corpus(seed: int = 0, count: int | None = None) -> list[str]:
    """The text of traces for training a tokenizer, cut where the conversation is cut."""
    # Every printable character once: feedback is then spelled out, never unknown.
    texts = [string.printable[:94]]
    for trace in traces(seed, count):
        texts.append(trace.problem.messages[0]["content"])
        for turn in trace.turns:
            texts.extend(text for text in (turn.text, turn.feedback) if text)
    return texts


def _checked(split: str, count: int | None) -> int:
    if split not in SPLITS:
        raise InputError(f"split={split!r}: arithmetic has {', '.join(SPLITS)}")
    if count is not None and count < 0:
        raise InputError(f"count={count} must not be negative")
    return 1000 if count is None else count


def _draw(split: str, seed: int, index: int) -> _Drawn:
    key = f"arithmetic/{split}/{seed}/{index}"
    rng = random.Random(key)
    name = rng.choice(tuple(FAMILIES))
    family = FAMILIES[name]
    while True:
        shown = [rng.randint(low, high) for low, high in family.ranges]
        hidden = [rng.randint(low, high) for low, high in family.hidden]
        # The split hangs on the shown numbers alone: test prompts are never in the training
        # set, whatever their wording and hidden values.
        is_test = zlib.crc32(repr(shown).encode()) % 5 == 0
        numbers = dict(zip("abc", shown, strict=False))
        prompt = rng.choice(family.wordings).format(**numbers)
        if is_test == (split == "test") and not any(str(h) in prompt for h in hidden):
            break
    if hidden:
        numbers["h"] = hidden[-1]
    right = family.right.format(**numbers)
    answer = str(eval(right))  # our own text, digits and operators only
    printed = [str(h) for h in hidden]
    codes = ["peek()", *(f"look({value})" for value in printed)][: len(hidden)]
    meta = {"family": name}
    if hidden:
        meta["setup"] = _setup(hidden)
    return _Drawn(
        Problem(key, "arithmetic", ({"role": "user", "content": prompt},), answer, meta),
        (*zip(codes, printed, strict=True), (f"print({right})", answer)),
        family.wrong.format(**numbers),
        str(shown[0]),
    )


def _setup(hidden: list[int]) -> str:
    """The problem's functions. `look` takes any number, but only the key gives the gold."""
    code = f"def peek():\n    print({hidden[0]})\n"
    if len(hidden) > 1:
        code += f"def look(key):\n    print({hidden[1]} + 7 * abs(key - {hidden[0]}))\n"
    return code


def _call(code: str, output: str) -> TraceTurn:
    return TraceTurn(f"```python\n{code}\n```", f"\n```output\n{output}\n```\n")


def _box(answer: str) -> TraceTurn:
    return TraceTurn(f"\\boxed{{{answer}}}", "")


def _trace(drawn: _Drawn) -> Trace:
    rng = random.Random(f"trace/{drawn.problem.id}")
    kind, share = FLAWS[drawn.problem.meta["family"]]
    if rng.random() >= share:
        kind = ""
    return Trace(drawn.problem, _turns(drawn, kind, rng.random() < RECOVERY), kind)


def _turns(drawn: _Drawn, kind: str, recovers: bool) -> tuple[TraceTurn, ...]:
    """The conversation with the flaw `kind`; "" is the right way."""
    *before, last = (_call(code, output) for code, output in drawn.steps)
    end = _box(drawn.problem.answer)
    if kind == "":
        return (*before, last, end)
    if kind == "operation":
        output = str(eval(drawn.wrong))
        return (*before, _call(f"print({drawn.wrong})", output), _box(output))
    if kind == "skip":  # boxes what was printed last as if it were the answer
        return (*before, _box(drawn.steps[-2][1] if before else drawn.guess))
    if kind == "at_once":
        return (_box(drawn.guess),)
    code = drawn.steps[-1][0]
    failed = {
        "name": _call("print(total)", _NAME_ERROR),
        "syntax": _call(code.removesuffix(")"), _SYNTAX_ERROR),
        "unclosed": TraceTurn(f"```python\n{code}", f"\n```output\n{_UNCLOSED}\n```\n"),
    }[kind]
    return (*before, failed, last, end) if recovers else (*before, failed, _box(drawn.guess))


def _verify(problem: Problem, answer: str, judges: Judges) -> Future[Verdict]:
    return judges.answers.submit("number", problem.answer, answer)


TASK = Task(load, "", boxed, _verify)
