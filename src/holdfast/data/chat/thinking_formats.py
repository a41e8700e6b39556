"""How models mark their thinking, as data: tags, what stands around them, switches.

The tables are in `thinking_formats.toml`; what a template renders goes before them.
"""

import re
import tomllib
from importlib.resources import files
from typing import Any, Final, NamedTuple


class Tags(NamedTuple):
    """One way to mark thinking."""

    open: str  # What opens it, "<think>".
    close: str  # What closes it, "</think>".
    open_template: str  # What is usually written to open it, "<think>\n".
    end_template: str  # What usually stands between a thought and its answer.
    answer_end: str = ""  # What ends the answer, where a template names it.
    # Whether no switch turns it off, though one may change what is asked for.
    always: bool = False


class Answer(NamedTuple):
    """Marks around an answer, behind the usual tags of thinking."""

    begin: str  # What stands between the closing tag and the answer.
    end: str  # What stands behind the answer.


class Switch(NamedTuple):
    """A variable of chat templates that turns thinking on and off."""

    name: str
    on: Any
    off: Any
    # Whether it counts only where its settings differ in marks behind the prompt: what
    # it is for is known by its name alone.
    in_marks: bool = False


_TABLE: Final = tomllib.loads(
    files(__package__).joinpath("thinking_formats.toml").read_text("utf-8")
)
TAGS: Final = tuple(Tags(**each) for each in _TABLE["formats"])
"""Every known way to mark thinking, the usual one first."""
ANSWERS: Final = tuple(Answer(**each) for each in _TABLE["answers"])
"""Marks around answers. They count where a template names both."""
_SWITCHES: Final = tuple(Switch(**each) for each in _TABLE["switches"])
_SWITCH_NAME: Final = re.compile(r"\b\w*(?:think|reason)\w*\b", re.IGNORECASE)
_NEGATIVE: Final = re.compile(
    r"(?:^|_)(?:no|not|non|without|skip|hide|off|disable|disabled|omit|suppress|clear)(?:_|$)"
)
_HTML: Final = frozenset(
    "a article b body blockquote br center code details div doctype em footer form "
    "h1 h2 h3 h4 h5 h6 head header hr html i img input label li link main meta nav ol "
    "p pre script section small span strong style sub sup svg table tbody td th thead "
    "title tr u ul video xml".split()
)


def tags_of(opening: str, closing: str) -> Tags:
    r"""Return tags with what usually stands around them.

    `opening`: What opens the thinking. With white space around it, it is taken as what
    is written to open it: "<plan>\n".
    Returns: The tags: of the table where it has them; else a tag in angle brackets has
    a line of its own, and any other mark stands alone, as models write them.
    """
    tag, end = opening.strip(), closing.strip()
    known = next((each for each in TAGS if (each.open, each.close) == (tag, end)), None)
    own_line = tag.startswith("<") and not tag.startswith("<|")
    usual = known or Tags(
        tag,
        end,
        f"{tag}\n" if own_line else tag,
        f"\n{end}\n\n" if own_line else end,
    )
    before = usual.open_template if opening == tag else opening
    after = usual.end_template if closing == end else closing
    return Tags(tag, end, before, after, usual.answer_end)


def switches(source: str) -> tuple[Switch, ...]:
    """Return the switches that a template may have: of the table, and by their names.

    `source`: Text of the template.
    Returns: Variables of the table first, then any other that speaks of thinking or
    reasoning; what they change has yet to be seen.
    """
    words = dict.fromkeys(_SWITCH_NAME.findall(source))
    known = {each.name for each in _SWITCHES}
    others = (
        Switch(word, on := not _NEGATIVE.search(word), not on, in_marks=True)
        for word in words
        if word not in known
    )
    return (*(each for each in _SWITCHES if each.name in words), *others)


def is_html(tag: str) -> bool:
    """Return whether an answer may begin with a tag because it is a page."""
    return tag.strip("<|>").lower() in _HTML


def named_thinker(name: str) -> Tags | None:
    """Return the tags of a model that is known to think, by its name; else None."""
    path = re.split(r"[/\\]", name.lower().rstrip("/\\"))
    parts = [*path[-2:], *(part for part in path if part.startswith("models--"))]
    for thinker in _TABLE["thinkers"]:
        if any(re.search(thinker["name"], part) for part in parts):
            return next(each for each in TAGS if each.open == thinker["open"])
    return None
