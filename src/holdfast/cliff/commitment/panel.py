"""When it was decided, on page and terminal."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from holdfast.report.section import Part, Section


def section(block: Mapping[str, Any]) -> Section:
    """Return the block `decide`: each part in turn."""
    shown = [part for key in PARTS if key in block for part in PARTS[key](block[key])]
    return Section("When it was decided", shown, "decide", "Decided when")


def _curve(block: Mapping[str, Any]) -> Iterator[Part]:
    yield from ()


PARTS: dict[str, Callable[[Mapping[str, Any]], Iterator[Part]]] = {"curve": _curve}
"""What shows the block of each part, in the order of the page."""
