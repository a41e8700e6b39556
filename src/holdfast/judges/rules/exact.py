r"""Exact answers: the last number of an answer, compared with the right one.

Where the number is looked for, in this order: the last \boxed{…}, the last line after
####, and the last number of the text. Numbers are compared as numbers: 1,000 and
1000.0 are the same, and so are 1/2 and 0.5.
"""

import re
from fractions import Fraction

_SIGN = r"(?<![\w.])(?:[-−+]?[$€£]\s?|[-−+])?"
_NUMBER = re.compile(
    _SIGN
    + r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)?(?:\.\d+)?(?:\s?/\s?\d+)?(?!\w)|"
    # A unit may follow at once, as in 7cm.
    + _SIGN
    + r"\d[\d,]*(?:\.\d+)?"
)
_TEX_FRACTION = re.compile(r"\\d?frac\s*{\s*(-?\d+)\s*}\s*{\s*(\d+)\s*}")
_NOISE = str.maketrans({"−": "-", "$": "", "€": "", "£": "", ",": "", "+": ""})


def exact_number(text: str) -> Fraction | None:
    """Return the number that an answer gives, or None where it gives none."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return _last_number(boxed)
    if "####" in text:
        said = text.rpartition("####")[2].strip().splitlines()
        return _first_number(said[0]) if said else None
    return _last_number(text)


def is_correct(answer: str, target: str) -> bool:
    """Return whether an answer gives the number that the target gives.

    `target`: The right answer, as the suite writes it (`… #### 72`).
    """
    right = exact_number(target)
    return right is not None and exact_number(answer) == right


def _last_boxed(text: str) -> str | None:
    r"""Return what the last closed \boxed{…} holds; braces may nest."""
    for start in reversed([each.end() for each in re.finditer(r"\\f?boxed\s*{", text)]):
        depth = 1
        for place, character in enumerate(text[start:], start):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return text[start:place]
    return None


def _last_number(text: str) -> Fraction | None:
    found = _numbers(text)
    return found[-1] if found else None


def _first_number(text: str) -> Fraction | None:
    found = _numbers(text)
    return found[0] if found else None


def _numbers(text: str) -> list[Fraction]:
    plain = _TEX_FRACTION.sub(r" \1/\2 ", text)
    plain = plain.replace("{,}", ",").replace("\\$", "$").replace("\\,", "")
    found = (_value(each[0]) for each in _NUMBER.finditer(plain))
    return [each for each in found if each is not None]


def _value(text: str) -> Fraction | None:
    bare = text.translate(_NOISE).replace(" ", "")
    if not any(character.isdigit() for character in bare):
        return None
    try:
        return Fraction(bare)
    except (ValueError, ZeroDivisionError):
        return None
