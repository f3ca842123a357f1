"""How a model writes a tool call and what it reads back: text in, values out.

A format tells a model how to call (`system`), finds where a call ends while text is still
streaming in (`end_of_call`), takes a turn apart (`parse`) and writes the tool's answer
(`feedback`). What a tool printed can neither look like a call nor end its own block.

    markdown    ```python block, answered by an ```output block (as in ToRA)
    code_tags   <code> ```python block </code>, <interpreter> output </interpreter> (ReTool)
    hermes      <tool_call>{json}</tool_call>, answered by a tool message (Qwen's own)
    none        no calls at all

In every format a ```solution block is a final program: nothing in it is a call.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from gtpo_jax.errors import InputError
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

    system: what a model is told. closing: the mark that ends a call. parse: the turn's call,
    what is wrong with it, or None (no call); never raises. end_of_call: index just past the
    first complete call, or None; once it is there, more text does not move it.
    feedback(outcome, max_chars, harmless): what is appended for a result or an invalid call,
    its output made harmless and cut to so many characters; where `message` is set, it is the
    content of a message of the role "tool", else it goes on in the same message.
    write(code): a call as `parse` reads it.
    """

    name: str
    system: str
    closing: str
    parse: Callable[[str], Call | Invalid | None]
    end_of_call: Callable[[str], int | None]
    feedback: Callable[..., str]
    write: Callable[[str], str]
    message: bool = False


# --- what all formats share ---

# A model is stopped as soon as its call is complete, so a fence must be known by its first
# characters: what may still follow on its line cannot count.
_SOLUTION = r"(?P<solution>^```solution)"
_FENCE_END = "\n```"
# Marks that chat templates or formats give a meaning; a space takes it from them.
_MARK = re.compile(
    r"<(?=[|\uff5c])|(?<=[|\uff5c])(?=>)"
    r"|<(?=/?(?:s|bos|eos|pad|unk|tool_call|tool_response|start_of_turn|end_of_turn|think"
    r"|code|interpreter)>)"
    r"|\[(?=/?INST\])|<(?=<SYS>>|</SYS>>)"
)


def first(pattern: re.Pattern, text: str) -> re.Match | None:
    """The first match outside of ```solution blocks, which `pattern` names as a group."""
    position = 0
    while match := pattern.search(text, position):
        if match.lastgroup != "solution":
            return match
        closing = text.find(_FENCE_END, match.end() - 1)
        if closing < 0:
            return None
        position = closing + len(_FENCE_END)
    return None


def harmless(text: str) -> str:
    """No fence, no mark of a format or template: ``` -> ''', <|im_end|> -> < |im_end| >."""
    return _MARK.sub(lambda m: m[0] + " ", text.replace("```", "'''"))


def cut(text: str, max_chars: int) -> str:
    """At most `max_chars` characters: head and tail, and between them how many are missing."""
    if len(text) <= max_chars:
        return text
    note = f"\n... [{len(text)} characters, cut] ...\n"
    room = max_chars - len(note)
    if room < 2:
        return text[: max(0, max_chars)]
    return text[: room - room // 2] + note + text[len(text) - room // 2 :]


def _output(
    outcome: Result | Invalid, max_chars: int, also: Callable[[str], str] = lambda text: text
) -> str:
    """What the model is told of an outcome; `also` is made harmless what a tokenizer names."""
    if isinstance(outcome, Invalid):
        output = f"invalid call: {outcome.reason}"
    else:
        output = outcome.output.rstrip("\n") or "(no output)"
    # Twice, since neither may bring back what the other has broken up.
    return cut(harmless(also(harmless(output))), max_chars)


# --- markdown ---

MARKDOWN_SYSTEM = """You can run Python code. Write it in a block that starts with a line \
```python and ends with a line ```. Stop there: the code is run, and what it printed comes \
back in an ```output block. Then go on, with another block or with your final answer."""

_OPENING = re.compile(rf"^```(?:python[ \t\r]*\n|(?P<output>output))|{_SOLUTION}", re.MULTILINE)
_MEANT = re.compile(
    r"```[ \t]*(?:python|py\b|tool_?c)|<tool_call>|<\|python_tag\|>|" + _SOLUTION,
    re.IGNORECASE | re.MULTILINE,
)


def _first_block(text: str) -> tuple[str | None, int | None]:
    """(code, end) of the first ```python block, end None while it is open; (None, end) where
    an ```output block comes first, (None, None) where neither is there."""
    opening = first(_OPENING, text)
    if opening is None or opening["output"]:
        return None, opening and opening.end()
    closing = text.find(_FENCE_END, opening.end() - 1)
    if closing < 0:
        return text[opening.end() :], None
    return text[opening.end() : closing], closing + len(_FENCE_END)


def _markdown_end(text: str) -> int | None:
    return _first_block(text)[1]


def _markdown_parse(text: str) -> Call | Invalid | None:
    code, end = _first_block(text)
    if code is None and end is not None:
        return Invalid("the turn writes its own ```output block")
    if code is None:
        wrong = first(_MEANT, text) and Invalid("a call starts with a line that is ```python")
        unclosed = text.endswith("\n```python") or text == "```python"
        return Invalid("unclosed ```python block") if unclosed else wrong
    if end is None:
        return Invalid("unclosed ```python block")
    return Call(code) if code.strip() else Invalid("empty code block")


def _markdown_feedback(outcome: Result | Invalid, max_chars: int, *also) -> str:
    return f"\n```output\n{_output(outcome, max_chars, *also)}\n```\n"


# --- code_tags ---

CODE_TAGS_SYSTEM = """You can run Python code. Write it between <code> and </code>, in a block \
that starts with a line ```python and ends with a line ```. Stop there: the code is run, and \
what it printed comes back between <interpreter> and </interpreter>. Then go on, with more \
code or with your final answer."""

_TAG = re.compile(rf"(?P<call><code>)|(?P<own></?interpreter>)|{_SOLUTION}", re.MULTILINE)
_TAG_MEANT = re.compile(rf"</code>|<tool_call>|<\|python_tag\|>|{_SOLUTION}", re.MULTILINE)
_FENCED = re.compile(r"\s*```python[ \t\r]*\n(.*)\n```\s*", re.DOTALL)


def _tagged(text: str, tag: re.Pattern, closing: str) -> tuple[str | None, int | None]:
    """As `_first_block`, for what stands between two tags."""
    opening = first(tag, text)
    if opening is None or opening["own"]:
        return None, opening and opening.end()
    end = text.find(closing, opening.end())
    if end < 0:
        return text[opening.end() :], None
    return text[opening.end() : end], end + len(closing)


def _code_tags_end(text: str) -> int | None:
    return _tagged(text, _TAG, "</code>")[1]


def _code_tags_parse(text: str) -> Call | Invalid | None:
    body, end = _tagged(text, _TAG, "</code>")
    if body is None and end is not None:
        return Invalid("the turn writes its own <interpreter> block")
    if body is None:
        return first(_TAG_MEANT, text) and Invalid("a call starts with <code>")
    if end is None:
        return Invalid("unclosed <code>")
    fenced = _FENCED.fullmatch(body)
    if fenced is None:
        return Invalid("<code> must hold one block that starts with ```python, ends with ```")
    return Call(fenced[1]) if fenced[1].strip() else Invalid("empty code block")


def _code_tags_feedback(outcome: Result | Invalid, max_chars: int, *also) -> str:
    return f"\n<interpreter>\n{_output(outcome, max_chars, *also)}\n</interpreter>\n"


# --- hermes ---

TOOL = "python"
_SIGNATURE = {
    "type": "function",
    "function": {
        "name": TOOL,
        "description": "Run Python code and return what it printed.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "Python code"}},
            "required": ["code"],
        },
    },
}
# Worded as Qwen's own templates word it, whose models have seen it.
HERMES_SYSTEM = f"""# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{json.dumps(_SIGNATURE)}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

_CALL = re.compile(
    rf"(?P<call><tool_call>)|(?P<own></?tool_response>)|{_SOLUTION}", re.MULTILINE
)
_CALL_MEANT = re.compile(rf"</tool_call>|<\|python_tag\|>|{_SOLUTION}", re.MULTILINE)


def _hermes_end(text: str) -> int | None:
    return _tagged(text, _CALL, "</tool_call>")[1]


def _hermes_parse(text: str) -> Call | Invalid | None:
    body, end = _tagged(text, _CALL, "</tool_call>")
    if body is None and end is not None:
        return Invalid("the turn writes its own <tool_response>")
    if body is None:
        return first(_CALL_MEANT, text) and Invalid("a call starts with <tool_call>")
    if end is None:
        return Invalid("unclosed <tool_call>")
    try:
        call = json.loads(body, strict=False)  # a raw newline inside a string is understood
    except (ValueError, RecursionError):
        return Invalid("the call is not a JSON object")
    if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
        return Invalid("a call is a JSON object with 'name' and 'arguments'")
    if call.get("name") != TOOL:
        return Invalid(f"unknown tool {str(call.get('name'))[:40]!r}: there is {TOOL!r}")
    code = call["arguments"].get("code")
    if not isinstance(code, str):
        return Invalid("argument 'code' is missing, or no string")
    return Call(code) if code.strip() else Invalid("argument 'code' is empty")


def _hermes_write(code: str) -> str:
    call = {"name": TOOL, "arguments": {"code": code}}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


# --- none ---


def _no_calls(code: str) -> str:
    raise InputError("format 'none' has no calls to write")


FORMATS: dict[str, Format] = {
    "markdown": Format(
        "markdown",
        MARKDOWN_SYSTEM,
        _FENCE_END,
        _markdown_parse,
        _markdown_end,
        _markdown_feedback,
        lambda code: f"```python\n{code}\n```",
    ),
    "code_tags": Format(
        "code_tags",
        CODE_TAGS_SYSTEM,
        "</code>",
        _code_tags_parse,
        _code_tags_end,
        _code_tags_feedback,
        lambda code: f"<code>\n```python\n{code}\n```\n</code>",
    ),
    "hermes": Format(
        "hermes",
        HERMES_SYSTEM,
        "</tool_call>",
        _hermes_parse,
        _hermes_end,
        _output,
        _hermes_write,
        message=True,
    ),
    "none": Format("none", "", "", lambda text: None, lambda text: None, _output, _no_calls),
}
