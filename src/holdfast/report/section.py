"""What a method shows, in parts that the page and the terminal both render."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from holdfast.report import labels, text
from holdfast.report.schema import Figure

MOST_VIEWS = 4
"""Views of a switch that the style sheet knows."""
MIDDLE = 5
"""Tone of a square or token without colour; 0 is full orange and 10 full blue."""


@dataclass(frozen=True)
class Number:
    """A figure as a cell: its value, its interval, and what it was counted on."""

    figure: Figure | Mapping[str, Any]
    share: bool = False  # Whether it is written in percent.
    count: bool = False  # Whether the page shows the count below the interval.

    def __str__(self) -> str:
        """Write value and interval, or why there is none, as a terminal shows it."""
        return text.interval(self.figure, share=self.share)  # type: ignore[arg-type]


Cell = str | Number


@dataclass(frozen=True)
class Paragraph:
    """Prose that explains; on the page alone."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Heading:
    """A small title between parts; on the page alone, for tables have their own."""

    text: str


@dataclass(frozen=True)
class Sentences:
    """Sentences that say what was found, or what to beware of."""

    lines: Sequence[str]
    tone: Literal["", "note", "warning"] = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells; a row of one cell opens a group of rows."""

    title: str  # What a screen reader and the terminal call it.
    columns: Sequence[str]  # Empty for a table without a header.
    rows: Sequence[Sequence[Cell]]
    style: str = ""  # Class of the style sheet: narrow, described, settings or pairs.
    brief: Sequence[int] | None = None  # Columns on the terminal; None for all.
    most: int | None = None  # Rows on the terminal; None for all.


@dataclass(frozen=True)
class Chart:
    """A figure, drawn where it is needed: on the page alone."""

    title: str
    draw: Callable[[], str]  # Returns SVG.
    caption: str = ""


@dataclass(frozen=True)
class Scale:
    """What the colours of squares or tokens mean; on the page alone."""

    low: str
    high: str
    first: int = 0  # First tone that is shown; the last is 10.


class Square(NamedTuple):
    """One square of a grid, with what the pointer shows."""

    tone: int | None = None
    title: str = ""
    kind: str = ""  # Class of the style sheet, such as `checked` for a ring.
    text: str = ""


@dataclass(frozen=True)
class Grid:
    """Coloured squares in rows with names; on the page alone."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Square]]]


@dataclass(frozen=True)
class Switch:
    """Views of one thing, of which the page shows the one that is chosen.

    Print shows all of them, and so does a reader that knows no style sheet.
    """

    title: str
    key: str  # Name of its own on the page.
    views: "Sequence[tuple[str, Sequence[Shown]]]"  # At most `MOST_VIEWS`.


class Token(NamedTuple):
    """A word of an answer, with its colour and what the pointer shows."""

    text: str
    tone: int | None
    title: str


class Passage(NamedTuple):
    """A region of an answer: `kind` is its class in the style sheet."""

    kind: str
    name: str
    tokens: Sequence[Token]


@dataclass(frozen=True)
class Answer:
    """One answer token by token, and what belongs to it; on the page alone."""

    title: str
    about: str
    passages: Sequence[Passage]
    parts: "Sequence[Part | None]" = ()


@dataclass(frozen=True)
class Fold:
    """Parts that the page shows on request; the terminal where `brief` says so."""

    summary: str
    parts: "Sequence[Part | None]"
    brief: bool = False


@dataclass(frozen=True)
class Raw:
    """Markup that the page itself has made, whole and harmless; on the page alone."""

    markup: str


Shown = Paragraph | Heading | Sentences | Table | Chart | Scale | Grid
Part = Shown | Answer | Fold | Raw | Switch


@dataclass(frozen=True)
class Section:
    """What a block of a report shows, in order; a part that is None is left out."""

    title: str
    parts: Sequence[Part | None]
    key: str = ""  # Name of its place on the page.
    link: str = ""  # What the list of sections calls it.


def table_of(
    title: str,
    rows: Iterable[Any],
    columns: Mapping[str, Callable[[Any], Cell]],
    **options: Any,
) -> Table:
    """Return a table of records: `columns` names each, and says what it writes."""
    cells = [[write(row) for write in columns.values()] for row in rows]
    return Table(title, list(columns), cells, **options)


def figures(title: str, block: Mapping[str, Any]) -> Part:
    """Return every figure of a block by name, or why there is none."""
    if reason := text.shared_reason(block):
        return Sentences([f"{title}: not measured: {reason}."])
    named = labels.CONTROLS | labels.PROBE
    known = {key: sentences.name for key, sentences in named.items()}
    rows: list[list[Cell]] = [
        [text.title(key, known), Number(each)]
        for key, each in block.items()
        if isinstance(each, dict)
    ]
    return Table(title, ("", "value"), rows)


def head_grid(
    title: str,
    block: Mapping[str, Any],
    shade: Callable[[Mapping[str, Any]], float | None],
    words: Callable[[Mapping[str, Any]], str],
    is_marked: Callable[[Mapping[str, Any]], bool],
    written: Callable[[Mapping[str, Any]], str] = lambda _: "",
) -> Grid:
    """Lay the heads of a block out by layer, blue where `shade` is above 0.

    `written`: What stands in the square of a head, for those who see no colour.

    `block`: Has `heads` with `layer` and `head`, `n_layers` and `n_heads`, and
    `layers_with_heads` where some layers have none.
    """
    shades = {(each["layer"], each["head"]): shade(each) for each in block["heads"]}
    found = {(each["layer"], each["head"]): each for each in block["heads"]}
    largest = max((abs(value or 0.0) for value in shades.values()), default=0.0) or 1.0

    def square(place: tuple[int, int]) -> Square:
        tone = MIDDLE + round(MIDDLE * (shades[place] or 0.0) / largest)
        kind = "checked" if is_marked(found[place]) else ""
        head = found[place]
        return Square(tone, text.clean(words(head)), kind, written(head))

    heads = range(block["n_heads"])
    return Grid(
        title,
        [str(head) for head in heads],
        [
            (str(layer), [square((layer, head)) for head in heads])
            for layer in block.get("layers_with_heads", range(block["n_layers"]))
        ],
    )
