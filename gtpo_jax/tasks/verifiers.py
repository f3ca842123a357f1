"""Reading a final answer and comparing it with the truth: pure functions, CHECKS by name.

`math` hands text of the model's to sympy, which may hang or take all memory: it is called
through `tasks.verify`, in a process that has limits. The others evaluate nothing.
"""

import functools
import re
from collections.abc import Callable
from decimal import Decimal

MAX_ANSWER = 10_000  # characters; nothing longer is an answer

_BOX = "\\boxed{"
# Units, LaTeX spacing and signs that stand around a number without changing it.
_NOISE = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?|\\[!,;: %$]|[$%]")
# A comma or space counts only in front of three digits: '1,234' is a number, '1,2' a pair.
_THOUSANDS = re.compile(r"(?<=[0-9])[,\s](?=[0-9]{3}(?![0-9]))")
_NUMBER = re.compile(r"([+-]?)\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_WORD = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}\\]*)\}")
_EXTREME = re.compile(r"_\{\\(?:max|min)\s*\}")  # a label, which the LaTeX parser stumbles on


def boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}`; None where there is none or it never closes."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start += len(_BOX)
    depth = 1
    position = start
    while position < len(text):
        character = text[position]
        if character == "\\":  # an escaped brace is text, not structure
            position += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:position]
        position += 1
    return None


def same_number(truth: str, answer: str) -> bool:
    """Whether both texts are plain decimal numbers of exactly the same value. Never raises.

    Currency and percent signs, thousands separators, LaTeX spacing, `\\text{...}` units and
    a trailing period are ignored. Anything else, exponents and expressions included, is not
    a number here, so hostile text costs no more than reading it.
    """
    first, second = _number(truth), _number(answer)
    return first is not None and first == second


def same_choice(truth: str, answer: str) -> bool:
    """Whether the answer is the letter `truth`: 'B', '(b)', 'B.', '\\text{B}', 'B: a bank'."""
    match = re.match(r"\(?([A-Za-z])\)?(?![A-Za-z])", _unworded(answer))
    return match is not None and match[1].upper() == truth


def same_yes_no(truth: str, answer: str) -> bool:
    """Whether the answer says `truth`, 'yes' or 'no'; 'true' and 'false' say the same."""
    said = _unworded(answer).rstrip(".!").strip().lower()
    return {"true": "yes", "false": "no"}.get(said, said) == truth


def same_mathematics(truth: str, answer: str) -> bool:
    """Whether the answer is mathematically the same, by `math-verify`.

    LaTeX, fractions, sets, intervals, tuples, percent, units, x=5 for 5. Words are compared
    as words: to sympy 'listen' is a product of letters, and equal to 'silent'.
    Raises ValueError where the truth cannot be read. May hang: see `tasks.verify`.
    """
    if _bare(truth) == _bare(answer) or same_number(truth, answer):
        return True
    if "%" not in truth + answer and None not in (_number(truth), _number(answer)):
        return False
    if _WORD.fullmatch(truth.strip()):
        return _letters(truth) == _letters(answer)
    parse, verify = load_math_verify()
    gold = parse(_plain(truth))
    if not gold:
        raise ValueError(f"the truth {truth!r} cannot be read")
    return verify(gold, parse(_plain(answer)))


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "number": same_number,
    "math": same_mathematics,
    "choice": same_choice,
    "yes_no": same_yes_no,
}


def _number(text: str) -> Decimal | None:
    text = _NOISE.sub("", text).replace("{,}", ",").strip()
    text = _THOUSANDS.sub("", text.removesuffix(".").rstrip())
    match = _NUMBER.fullmatch(text)
    return Decimal(match[1] + match[2]) if match else None


def _unworded(text: str) -> str:
    return _WORD.sub(r"\1", text).strip(" \t\n$*")


def _letters(text: str) -> str:
    return re.sub(r"[\s()]", "", _unworded(text)).lower()


def _bare(text: str) -> str:
    """Without spacing and dollar signs."""
    return re.sub(r"\\[!,;: ]|[\s$]", "", text).removesuffix(".")


def _plain(text: str) -> str:
    """What `math-verify` is given: no dollar signs, and a number without its ornaments."""
    number = _number(text)
    if number is not None and "%" not in text:
        return format(number, "f")
    text = _EXTREME.sub("", text.replace("\\$", "").replace("$", "").strip())
    return text.removesuffix(".")


@functools.cache
def load_math_verify() -> tuple[Callable, Callable]:
    """(parse, verify), imported when first needed: sympy takes a second."""
    import logging

    import math_verify

    # Its own time limits are signals, which work in a main thread only and cannot stop C code.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = (math_verify.LatexExtractionConfig(boxed_match_priority=0),)

    def parse(text: str) -> list:
        return math_verify.parse(
            _BOX + text + "}",
            extraction_config=config,
            extraction_mode="first_match",
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )

    def verify(gold: list, answer: list) -> bool:
        return math_verify.verify(
            gold, answer, allow_set_relation_comp=True, timeout_seconds=None
        )

    return parse, verify
