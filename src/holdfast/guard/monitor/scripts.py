"""Which scripts a text is written in, as far as Unicode names its letters."""

import unicodedata
from collections import Counter
from collections.abc import Iterable

LEAST_SHARE = 0.1
"""Share of its letters that a script of a text has, at least."""


def scripts_of(text: str) -> tuple[str, ...]:
    """Return the scripts that have a tenth of the letters of a text, by name.

    The first word of a letter's name stands for its script: LATIN, CYRILLIC, CJK. It
    says which alphabet, and not which language.
    """
    letters = Counter(
        unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
        for letter in text
        if letter.isalpha()
    )
    total = sum(letters.values())
    return tuple(
        sorted(name for name, n in letters.items() if n >= LEAST_SHARE * total)
    )


def range_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the scripts of some texts together."""
    return tuple(sorted({name for text in texts for name in scripts_of(text)}))
