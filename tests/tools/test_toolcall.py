import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtpo_jax.tools.sandbox import Result
from gtpo_jax.tools.toolcall import FORMATS, Call, Invalid, harmless

MARKDOWN = FORMATS["markdown"]
# Text made of the pieces that matter finds more than text made of any characters.
PIECES = ["```", "`", "python", "output", "py", "\n", " ", "\r\n", "x = 1", "é", "<|im_end|>"]
PIECES += ["```python\n", "\n```", "```output\n", "<|", "|>", "</s>", "[INST]", "</tool_call>"]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=5)).map("".join)
blocks = st.tuples(st.text("ab \n", max_size=9), st.text("xy=1 \n`", min_size=1, max_size=20))


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


def test_system_text_shows_a_call():
    assert "```python" in MARKDOWN.system


@given(texts | st.text())
def test_parse_is_total(text):
    call = MARKDOWN.parse(text)
    assert call is None or isinstance(call, Call | Invalid)
    if isinstance(call, Call):
        assert call.code.strip() and call.code in text


@given(texts)
def test_streaming_finds_the_same_end(text):
    final = MARKDOWN.end_of_call(text)
    for length in range(len(text) + 1):
        expected = final if final is not None and length >= final else None
        assert MARKDOWN.end_of_call(text[:length]) == expected


@given(texts)
def test_what_follows_the_end_does_not_change_the_call(text):
    end = MARKDOWN.end_of_call(text)
    if end is not None:
        assert MARKDOWN.parse(text[:end]) == MARKDOWN.parse(text)


@given(blocks)
def test_a_written_call_is_read_back(block):
    before, code = block
    call = MARKDOWN.parse(f"{before}\n```python\n{code}\n```")
    if code.strip() and "\n```" not in "\n" + code:
        assert call == Call(code)


@given(texts, st.integers(0, 200))
def test_output_cannot_break_out(text, limit):
    feedback = MARKDOWN.feedback(Result("ok", text, 0.0), limit)
    assert not isinstance(MARKDOWN.parse(feedback), Call)
    body = feedback.removeprefix("\n```output\n").removesuffix("\n```\n")
    assert "```" not in body and len(body) <= limit
    assert not any(mark in body for mark in ("<|", "|>", "</s>", "[INST]", "</tool_call>"))


@given(texts)
def test_harmless_twice_is_harmless_once(text):
    assert harmless(harmless(text)) == harmless(text)
