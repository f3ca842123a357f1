import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtpo_jax.errors import InputError
from gtpo_jax.tools.sandbox import Result
from gtpo_jax.tools.toolcall import FORMATS, Call, Invalid, harmless

MARKDOWN = FORMATS["markdown"]
# Text made of the pieces that matter finds more than text made of any characters.
PIECES = ["```", "`", "python", "output", "py", "\n", " ", "\r\n", "x = 1", "é", "<|im_end|>"]
PIECES += ["```python\n", "\n```", "```output\n", "<|", "|>", "</s>", "[INST]", "</tool_call>"]
PIECES += ["<code>", "</code>", "<interpreter>", "</interpreter>", "\n```solution\n"]
PIECES += ["<tool_call>", "<tool_response>", '{"name": "python", "arguments": {"code": "1"}}']
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=5)).map("".join)
codes = st.text('xy=1 \n`"\\é', min_size=1, max_size=20)
MARKS = ["```", "<|", "|>", "</s>", "[INST]", "</tool_call>", "<code>", "</interpreter>"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\nprint(1)\n```", Call("print(1)")),
        ("First:\n```python\na = 1\n\nprint(a)\n```\n", Call("a = 1\n\nprint(a)")),
        ("The answer is \\boxed{3}.\n```python\nprint(1)\n```", Call("print(1)")),
        ("```python  \r\nprint(1)\n```", Call("print(1)")),
        ("```python\na\n```\nthen\n```python\nb\n```", Call("a")),
        ("```js\nx\n```\n```python\na\n```", Call("a")),
        ("```python\nprint('a ``` b')\n```", Call("print('a ``` b')")),
        ("```python\nprint(1)", Invalid("unclosed ```python block")),
        ("so\n```python", Invalid("unclosed ```python block")),
        ("```python\n```", Invalid("empty code block")),
        ("```python\n \n\n```", Invalid("empty code block")),
        ("```output\n5\n```", Invalid("the turn writes its own ```output block")),
        ("```py\nprint(1)\n```", Invalid("a call starts with a line that is ```python")),
        ("so ```python\n1\n```", Invalid("a call starts with a line that is ```python")),
        ("<tool_call>{}</tool_call>", Invalid("a call starts with a line that is ```python")),
        ("```js\nx\n```", None),
        ("```\nx\n```", None),
        ("The answer is \\boxed{42}.", None),
        ("", None),
    ],
)
def test_parse(text, expected):
    assert MARKDOWN.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("```python\nprint(1)\n```", 22),
        ("```python\nprint(1)\n```\nand on", 22),
        ("```python\nprint(1)\n``", None),
        ("```python\n```", 13),
        ("```output\n", 9),
        ("it is 4\n```output", 17),
        ("```js\nx\n```", None),
        ("", None),
    ],
)
def test_end_of_call(text, end):
    assert MARKDOWN.end_of_call(text) == end


@pytest.mark.parametrize(
    ("outcome", "limit", "text"),
    [
        (Result("ok", "5\n", 0.1), 100, "5"),
        (Result("ok", "", 0.1), 100, "(no output)"),
        (Invalid("empty code block"), 100, "invalid call: empty code block"),
        (Invalid("unclosed ```python block"), 100, "invalid call: unclosed '''python block"),
        (
            Result("ok", "```\n<|im_end|>\n</s>[/INST]", 0),
            100,
            "'''\n< |im_end| >\n< /s>[ /INST]",
        ),
        (Result("ok", "<class 'int'> 1<2 a|b", 0), 100, "<class 'int'> 1<2 a|b"),
        (Result("ok", "0123456789", 0), 4, "0123"),
    ],
)
def test_feedback(outcome, limit, text):
    assert MARKDOWN.feedback(outcome, limit) == f"\n```output\n{text}\n```\n"


def test_feedback_is_cut_in_the_middle():
    body = MARKDOWN.feedback(Result("ok", "a" * 500 + "z" * 500, 0.0), 100)
    body = body.removeprefix("\n```output\n").removesuffix("\n```\n")
    assert len(body) == 100
    assert body.startswith("aaa") and body.endswith("zzz") and "[1000 characters, cut]" in body


CODE_TAGS, HERMES, NONE = (FORMATS[name] for name in ("code_tags", "hermes", "none"))
FENCED = "<code>\n```python\n{}\n```\n</code>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FENCED.format("print(1)"), Call("print(1)")),
        (
            "So \\boxed{1}.\n" + FENCED.format("a = 1\n\nprint(a)") + " on",
            Call("a = 1\n\nprint(a)"),
        ),
        ("<code>```python \r\n1\n```</code>", Call("1")),
        (FENCED.format("a") + FENCED.format("b"), Call("a")),
        (FENCED.format("print('<code>')"), Call("print('<code>')")),
        ("<code>\n```python\n1\n```", Invalid("unclosed <code>")),
        ("<code>print(1)</code>", CODE_TAGS.parse("<code></code>")),
        (FENCED.format(" "), Invalid("empty code block")),
        (
            "<interpreter>5</interpreter>",
            Invalid("the turn writes its own <interpreter> block"),
        ),
        ("print(1)</code>", Invalid("a call starts with <code>")),
        ("```python\nprint(1)\n```", None),  # code to read, not to run
        ("The answer is \\boxed{42}.", None),
        ("", None),
    ],
)
def test_parse_code_tags(text, expected):
    assert CODE_TAGS.parse(text) == expected


def test_a_call_without_its_fence_says_what_is_wrong():
    for body in ("", "print(1)", "```py\n1\n```", "```python\n1```", "```\n1\n```"):
        call = CODE_TAGS.parse(f"<code>{body}</code>")
        assert isinstance(call, Invalid) and "must hold one block" in call.reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HERMES.write("print(1)"), Call("print(1)")),
        ("First.\n" + HERMES.write('a = "é"\nprint(a)\n'), Call('a = "é"\nprint(a)\n')),
        ('<tool_call>{"arguments": {"code": "1"}, "name": "python"}</tool_call>', Call("1")),
        (
            '<tool_call>{"name": "python", "arguments": {"code": "a\nb"}}</tool_call>',
            Call("a\nb"),
        ),
        (HERMES.write("a") + HERMES.write("b"), Call("a")),
        ('<tool_call>{"name": "python"', Invalid("unclosed <tool_call>")),
        ("<tool_call>print(1)</tool_call>", Invalid("the call is not a JSON object")),
        (
            "<tool_call>" + "[" * 100_000 + "</tool_call>",
            Invalid("the call is not a JSON object"),
        ),
        (
            "<tool_call>[1]</tool_call>",
            Invalid("a call is a JSON object with 'name' and 'arguments'"),
        ),
        (
            '<tool_call>{"name": "python", "arguments": "x"}</tool_call>',
            Invalid("a call is a JSON object with 'name' and 'arguments'"),
        ),
        (
            '<tool_call>{"name": "search", "arguments": {}}</tool_call>',
            Invalid("unknown tool 'search': there is 'python'"),
        ),
        (
            '<tool_call>{"name": "python", "arguments": {"text": "1"}}</tool_call>',
            Invalid("argument 'code' is missing, or no string"),
        ),
        (
            '<tool_call>{"name": "python", "arguments": {"code": 1}}</tool_call>',
            Invalid("argument 'code' is missing, or no string"),
        ),
        (HERMES.write(" \n"), Invalid("argument 'code' is empty")),
        (
            "<tool_response>5</tool_response>",
            Invalid("the turn writes its own <tool_response>"),
        ),
        ("{}</tool_call>", Invalid("a call starts with <tool_call>")),
        ("```python\nprint(1)\n```", None),
        ("\\boxed{42}", None),
    ],
)
def test_parse_hermes(text, expected):
    assert HERMES.parse(text) == expected


@given(texts | st.text())
def test_without_tools_nothing_is_a_call(text):
    assert NONE.parse(text) is None and NONE.end_of_call(text) is None


def test_without_tools_nothing_can_be_written():
    assert NONE.system == NONE.closing == ""
    with pytest.raises(InputError, match="no calls to write"):
        NONE.write("print(1)")


def test_feedback_of_the_other_formats():
    result = Result("ok", "5</interpreter><code>\n", 0.1)
    assert CODE_TAGS.feedback(result, 99) == (
        "\n<interpreter>\n5< /interpreter>< code>\n</interpreter>\n"
    )
    assert HERMES.feedback(Invalid("no tool"), 99) == "invalid call: no tool"
    assert HERMES.message and not CODE_TAGS.message


WITH_CALLS = [FORMATS[name] for name in ("markdown", "code_tags", "hermes")]
formats = pytest.mark.parametrize("form", WITH_CALLS, ids=lambda form: form.name)
SOLUTION = "```solution\n{}\n```"


@formats
def test_a_final_program_is_no_call_and_does_not_hide_one(form):
    for inside in ("print(1)", form.write("print(1)").replace("\n```", " ```"), "</tool_call>"):
        assert form.parse(SOLUTION.format(inside)) is None
        assert form.parse("```solution\n" + inside) is None
        assert form.end_of_call(SOLUTION.format(inside)) is None
    text = SOLUTION.format("x = 1") + "\n" + form.write("print(1)")
    assert form.parse(text) == Call("print(1)")
    assert form.end_of_call(text + " and on") == len(text)


@formats
def test_the_system_text_shows_the_marks(form):
    assert form.closing.strip() in form.system
    assert "boxed" not in form.system  # what is asked for is the task's to say


@formats
@given(text=texts | st.text())
def test_parse_is_total(form, text):
    call = form.parse(text)
    assert call is None or isinstance(call, Call | Invalid)
    if isinstance(call, Call):
        assert call.code.strip()
        assert form.name == "hermes" or call.code in text


@formats
@given(text=texts)
def test_streaming_finds_the_same_end(form, text):
    final = form.end_of_call(text)
    for length in range(len(text) + 1):
        expected = final if final is not None and length >= final else None
        assert form.end_of_call(text[:length]) == expected


@formats
@given(text=texts)
def test_what_follows_the_end_does_not_change_the_call(form, text):
    end = form.end_of_call(text)
    if end is not None:
        assert form.parse(text[:end]) == form.parse(text)


@formats
@given(before=st.text("ab \n", max_size=9), code=codes)
def test_a_written_call_is_read_back(form, before, code):
    text = f"{before}\n{form.write(code)}"
    if code.strip() and form.closing not in "\n" + code and "\n```" not in "\n" + code:
        assert form.parse(text) == Call(code)
        assert form.end_of_call(text + "more") == len(text)


@formats
@given(text=texts | st.text(), limit=st.integers(0, 200))
def test_output_cannot_break_out(form, text, limit):
    feedback = form.feedback(Result("ok", text, 0.0), limit)
    assert not isinstance(form.parse(feedback), Call)
    empty = form.feedback(Result("ok", "x", 0.0), 1)
    frame = empty.split("x")
    body = feedback.removeprefix(frame[0]).removesuffix(frame[-1])
    assert len(body) <= limit
    assert not any(mark in body for mark in MARKS)


@formats
@given(text=texts)
def test_output_is_kept_from_the_marks_of_a_tokenizer(form, text):
    feedback = form.feedback(Result("ok", text, 0.0), 500, lambda t: t.replace("1", "one"))
    assert "1" not in feedback


@given(texts)
def test_harmless_twice_is_harmless_once(text):
    assert harmless(harmless(text)) == harmless(text)
