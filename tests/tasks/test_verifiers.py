"""The last box, and when two texts are the same number."""

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtpo_jax.tasks.verifiers import (
    boxed,
    same_choice,
    same_mathematics,
    same_number,
    same_yes_no,
)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{72}", "72"),
        (r"so \boxed{1} or rather \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        ("\\boxed{1\n2}", "1\n2"),
        ("no box, 72", None),
        (r"\boxed72", None),
        (r"\boxed{72", None),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed{\frac{1}{2}", None),
        ("\\boxed{1\\", None),
        ("", None),
    ],
)
def test_boxed(text, content):
    assert boxed(text) == content


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("3.0", "3"),
        ("3.", "3"),
        (".50", "0.5"),
        ("-0", "0"),
        ("+7", "7"),
        ("- 7", "-7"),
        ("007", "7"),
        ("$1,080", "1080"),
        (r"\$1,080.00", "1080"),
        ("1,234,567", "1234567"),
        ("10{,}000", "10000"),
        (r"12,\!345", "12345"),
        (r"12\,345", "12345"),
        ("12 345", "12345"),
        (r"25\%", "25"),
        ("25 %.", "25"),
        (r"18\text{ dollars}", "18"),
        (r"30 \text{ cm}^2", "30"),
        (r"\ 5 ", "5"),
        ("0.1", "0.10"),
    ],
)
def test_the_same_number(a, b):
    assert same_number(a, b)
    assert same_number(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("3", "4"),
        ("0.3", "0.30000000000000004"),
        ("12345678901234567890", "12345678901234567891"),
        ("1,2", "12"),  # a pair is no number
        ("1 2", "12"),
        ("1-2", "-1"),
        ("x", "x"),
        ("", ""),
        (".", "0"),
        ("5", "-5"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("1/2", "0.5"),
        ("9**9**9", "1"),
        ("1e999999999", "1e999999999"),
        ("__import__('os')", "0"),
        ("1_000", "1000"),
        ("٣", "3"),
    ],
)
def test_not_the_same_number(a, b):
    assert not same_number(a, b)
    assert not same_number(b, a)


@given(st.decimals(-(10**12), 10**12, places=4))
def test_every_decimal_equals_its_decorated_self(value):
    text = format(value, "f")
    assert same_number(text, f"${text}0")
    assert same_number(text, f" {value:,f} \\text{{ m}}.")
    assert not same_number(text, format(value + Decimal("0.0001"), "f"))


@given(st.text(), st.text(alphabet="\\boxed{}text$,.! 0159e*%^"))
def test_any_text_is_read_without_raising(a, b):
    assert same_number(a, b) == same_number(b, a)
    for text in (a, b, a + "\\boxed{" + b):
        content = boxed(text)
        assert content is None or "\\boxed{" + content + "}" in text


@given(st.text().filter(lambda text: not set(text) & set("{}\\")), st.text())
def test_the_last_box_is_found_behind_any_text(content, before):
    assert boxed(before + "\\boxed{" + content + "}") == content


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("\\frac{1}{2}", "0.5"),
        ("0.5", "50\\%"),
        ("50\\%", "50"),
        ("\\frac{14}{3}", "4\\frac{2}{3}"),
        ("x=5", "5"),
        ("5", "x=5"),
        ("M=2^{N-2}+1", "2^{N-2}+1"),
        ("m_{\\max }=n^{2}-n-1", "n^2-n-1"),
        ("(3, \\frac{\\pi}{2})", "\\left( 3, \\pi/2 \\right)"),
        ("1,-2", "-2, 1"),
        ("\\{1,2\\}", "\\{2,1\\}"),
        ("(-\\infty, 0) \\cup\\{1\\}.", "(-\\infty,0)\\cup\\{1\\}"),
        ("(-\\infty,2]", "x \\le 2"),
        ("90^\\circ", "90"),
        ("\\$32,\\!348", "32348"),
        ("x^2+2x+1", "(x+1)^2"),
        ("\\sqrt{8}", "2\\sqrt2"),
        ("\\text{Evelyn}", "Evelyn"),
        ("\\text{(C)}", "C"),
        ("\\text{odd}", "\\text{Odd}"),
        ("3", "\\boxed{3}"),
        ("5", "5\\text{ cm}"),
        ("025", "25"),
        ("anything at all", "anything at all"),
    ],
)
def test_the_same_mathematics(truth, answer):
    assert same_mathematics(truth, answer)


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("\\text{listen}", "\\text{silent}"),  # the same product of letters
        ("\\text{Evelyn}", "nylevE"),
        ("3", "1,2,3"),
        ("3", "2 or 3"),
        ("3", "x=2, x=3"),
        ("3", "\\boxed{2}\\boxed{3}"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", "(2,1)"),
        ("\\frac{1}{3}", "0.33"),
        ("27", "-27"),
        ("\\pi", "3.14"),
        ("x^2", "x^3"),
        ("5", ""),
        ("5", "\\text{five"),
        ("\\frac{3}{7}", "3 \\text{ to } 7"),
    ],
)
def test_not_the_same_mathematics(truth, answer):
    assert not same_mathematics(truth, answer)


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("B", True),
        ("b", True),
        ("(B)", True),
        ("B.", True),
        ("\\text{B}", True),
        ("B: a bank", True),
        ("**B**", True),
        ("A", False),
        ("A or B", False),
        ("bank", False),
        ("", False),
    ],
)
def test_the_same_choice(answer, same):
    assert same_choice("B", answer) == same


@pytest.mark.parametrize(
    ("truth", "answer", "same"),
    [
        ("yes", "Yes.", True),
        ("no", "\\text{No}", True),
        ("yes", "true", True),
        ("no", "False", True),
        ("no", "yes", False),
        ("yes", "yes or no", False),
        ("no", "not", False),
        ("yes", "", False),
    ],
)
def test_the_same_yes_or_no(truth, answer, same):
    assert same_yes_no(truth, answer) == same


@given(st.text())
def test_choices_and_yes_or_no_read_any_text(text):
    assert same_choice("A", text) in (True, False)
    assert same_yes_no("yes", text) in (True, False)


@settings(deadline=None)  # sympy is imported, and knows slow corners
@given(st.sampled_from(["\\frac{3}{7}", "x+1", "\\text{ab}", "(1,2)"]), st.text(max_size=30))
def test_mathematics_reads_any_short_text(truth, text):
    assert same_mathematics(truth, text) in (True, False)
