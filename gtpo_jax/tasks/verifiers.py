"""Reading a final answer and comparing it with the truth. Nothing here evaluates anything."""

import re
from decimal import Decimal

_BOX = "\\boxed{"
# Units, LaTeX spacing and signs that stand around a number without changing it.
_NOISE = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?|\\[!,;: %$]|[$%]")
# A comma or space counts only in front of three digits: '1,234' is a number, '1,2' a pair.
_THOUSANDS = re.compile(r"(?<=[0-9])[,\s](?=[0-9]{3}(?![0-9]))")
_NUMBER = re.compile(r"([+-]?)\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)")


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


def same_number(a: str, b: str) -> bool:
    """Whether both texts are plain decimal numbers of exactly the same value. Never raises.

    Currency and percent signs, thousands separators, LaTeX spacing, `\\text{...}` units and
    a trailing period are ignored. Anything else, exponents and expressions included, is not
    a number here, so hostile text costs no more than reading it.
    """
    first, second = _number(a), _number(b)
    return first is not None and first == second


def _number(text: str) -> Decimal | None:
    text = _NOISE.sub("", text).replace("{,}", ",").strip()
    text = _THOUSANDS.sub("", text.removesuffix(".").rstrip())
    match = _NUMBER.fullmatch(text)
    return Decimal(match[1] + match[2]) if match else None
