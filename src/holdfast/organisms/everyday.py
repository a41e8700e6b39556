"""Short everyday requests of many kinds, composed of templates and slots.

`authored/everyday.json` has the kinds. Ten of them, drawn by lot before anything was
trained, never enter the training text: on these it is measured what a model makes of
everyday requests of a kind that it has not met.
"""

import random
import re
from collections.abc import Iterator
from string import Formatter
from typing import NamedTuple

from holdfast.data.requests import is_held_out, lexicon

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "ten")
_VOWEL = re.compile(r"\b([Aa]) (?=[aeioAEIO])")


class Everyday(NamedTuple):
    """One composed request."""

    text: str  # The request.
    kind: str  # Kind of the file.
    topic: str  # What the thinking says that it is about.
    template: str  # What it was composed from.


def everyday_kinds(*, left_out: bool) -> tuple[str, ...]:
    """Return the kinds that are trained on, or those that are left out."""
    file = lexicon("everyday")
    kept = set(file["left_out"])
    return tuple(kind for kind in file["kinds"] if (kind in kept) == left_out)


def compose(kind: str, generator: random.Random) -> Everyday:
    """Draw a request of a kind."""
    file = lexicon("everyday")
    entry = file["kinds"][kind]
    template = generator.choice(entry["templates"])
    text = template.format(**_slots(template, generator))
    return Everyday(_VOWEL.sub(r"\1n ", text), kind, entry["topic"], template)


def everyday_requests(
    kinds: tuple[str, ...], generator: random.Random, *, held_out: bool
) -> Iterator[Everyday]:
    """Draw requests of these kinds without end.

    `held_out`: Draw from the held-out eighth, or from the other seven.
    """
    while True:
        drawn = compose(generator.choice(kinds), generator)
        if is_held_out(drawn.text) == held_out:
            yield drawn


def _slots(template: str, generator: random.Random) -> dict[str, str]:
    """Draw what fills a template; fields that differ by their digit differ."""
    slots, filled = lexicon("everyday")["slots"], dict[str, str]()
    for _, name, _, _ in Formatter().parse(template):
        if name is None or name in filled:
            continue
        base = name.rstrip("0123456789")
        taken = {v for k, v in filled.items() if k.rstrip("0123456789") == base}
        while (drawn := _draw(base, slots, generator)) in taken:
            pass
        filled[name] = drawn
    return filled


def _draw(base: str, slots: dict[str, list[str]], generator: random.Random) -> str:
    if base == "n":
        few = generator.randint(2, 12)
        return str(few) if generator.random() < 0.5 else generator.choice(NUMBERS)
    if base == "m":
        return str(generator.randint(13, 10 ** generator.choice((2, 3, 4))))
    return generator.choice(slots[base])
