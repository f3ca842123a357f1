"""How a model writes a tool call and what it reads back: text in, values out.

A format tells a model how to call (`system`), finds where a call ends while text is still
streaming in (`end_of_call`), takes a turn apart (`parse`) and writes the tool's answer
(`feedback`). What a tool printed can neither look like a call nor end its own block.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from gtpo_jax.tools.sandbox import Result


@dataclass(frozen=True)
class Call:
    """Code to run."""

    code: str


@dataclass(frozen=True)
class Invalid:
    """A turn that means to call but does not do it right."""

    reason: str


@dataclass(frozen=True)
class Format:
    """How calls are written. Every function takes a turn's text, decoded so far or whole.

    closing: the mark that ends a call. parse: the turn's call, what is wrong with it, or None
    (no call); never raises. end_of_call: index just past the first complete call, or None;
    once it is there, more text does not move it. feedback: what is appended for a result or
    an invalid call, its output cut to so many characters.
    """

    name: str
    system: str
    closing: str
    parse: Callable[[str], Call | Invalid | None]
    end_of_call: Callable[[str], int | None]
    feedback: Callable[[Result | Invalid, int], str]


# --- markdown: a ```python block, answered by an ```output block (as in ToRA) ---

MARKDOWN_SYSTEM = """You can run Python code. Write it in a block that starts with a line \
```python and ends with a line ```. Stop there: the code is run, and what it printed comes \
back in an ```output block. Then go on, with another block or with your answer in \\boxed{}."""

# A model is stopped as soon as its call is complete, so a fence must be known by its first
# characters: what may still follow on its line cannot count.
OPENING = re.compile(r"^```(?:python[ \t\r]*\n|(output))", re.MULTILINE)
CLOSING = "\n```"
MEANT = re.compile(
    r"```[ \t]*(?:python|py\b|tool_?c)|<tool_call>|<\|python_tag\|>", re.IGNORECASE
)
# Marks that chat templates give a meaning, and how a tool's output is kept from using them.
ROLE_MARK = re.compile(
    r"<(?=[|\uff5c])|(?<=[|\uff5c])(?=>)"
    r"|<(?=/?(?:s|bos|eos|pad|unk|tool_call|tool_response|start_of_turn|end_of_turn|think)>)"
    r"|\[(?=/?INST\])|<(?=<SYS>>|</SYS>>)"
)


def _first_block(text: str) -> tuple[str | None, int | None]:
    """(code, end) of the first ```python block, end None while it is open; (None, end) where
    an ```output block comes first, (None, None) where neither is there."""
    opening = OPENING.search(text)
    if opening is None or opening[1]:
        return None, opening and opening.end()
    closing = text.find(CLOSING, opening.end() - 1)
    if closing < 0:
        return text[opening.end() :], None
    return text[opening.end() : closing], closing + len(CLOSING)


def _markdown_end(text: str) -> int | None:
    return _first_block(text)[1]


def _markdown_parse(text: str) -> Call | Invalid | None:
    code, end = _first_block(text)
    if code is None and end is not None:
        return Invalid("the turn writes its own ```output block")
    if code is None:
        wrong = MEANT.search(text) and Invalid("a call starts with a line that is ```python")
        unclosed = text.endswith("\n```python") or text == "```python"
        return Invalid("unclosed ```python block") if unclosed else wrong
    if end is None:
        return Invalid("unclosed ```python block")
    return Call(code) if code.strip() else Invalid("empty code block")


def _markdown_feedback(outcome: Result | Invalid, max_chars: int) -> str:
    if isinstance(outcome, Invalid):
        output = f"invalid call: {outcome.reason}"
    else:
        output = outcome.output.rstrip("\n") or "(no output)"
    return f"\n```output\n{cut(harmless(output), max_chars)}\n```\n"


def harmless(text: str) -> str:
    """No fence, no mark of a chat template: ``` -> ''', <|im_end|> -> < |im_end| >."""
    text = text.replace("```", "'''")
    return ROLE_MARK.sub(lambda m: m[0] + " ", text)


def cut(text: str, max_chars: int) -> str:
    """At most `max_chars` characters: head and tail, and between them how many are missing."""
    if len(text) <= max_chars:
        return text
    note = f"\n... [{len(text)} characters, cut] ...\n"
    room = max_chars - len(note)
    if room < 2:
        return text[: max(0, max_chars)]
    return text[: room - room // 2] + note + text[len(text) - room // 2 :]


FORMATS: dict[str, Format] = {
    "markdown": Format(
        "markdown",
        MARKDOWN_SYSTEM,
        CLOSING,
        _markdown_parse,
        _markdown_end,
        _markdown_feedback,
    ),
}
