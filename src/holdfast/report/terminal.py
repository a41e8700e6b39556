"""Tables and lines on the terminal, and progress while a stage runs."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import rich.table
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from holdfast.report.progress import Advance, logged
from holdfast.report.section import Fold, Part, Section, Sentences, Table


class Shown:
    """Progress as the command line shows it: on stderr, with the time left."""

    def __init__(self) -> None:
        """Use stderr, so that stdout holds results alone."""
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """Print one line."""
        self.console.print(escape(message))

    def warn(self, message: str) -> None:
        """Print one line that stands out."""
        self.console.print(f"[bold yellow]warning:[/] {escape(message)}")

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Advance]:
        """Show a bar with the time left, or a line per minute without a terminal."""
        if not self.console.is_terminal:
            with logged(self.say, label, total) as advance:
                yield advance
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[written]}"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bars:
            task, written = bars.add_task(label, total=total, written=""), 0

            def advance(steps: int, tokens: int = 0) -> None:
                nonlocal written
                written += tokens
                said = f"{written} tokens" if written else ""
                bars.update(task, advance=steps, written=said)

            yield advance


def print_json(value: Any) -> None:
    """Print JSON for machines, and nothing else, on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def print_lines(*lines: str) -> None:
    """Print lines of text on stdout."""
    out = Console(highlight=False, soft_wrap=True)
    for line in lines:
        out.print(escape(line))


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
) -> None:
    """Print a table on stdout; a row of one cell opens a group of rows."""
    table = rich.table.Table(
        title=escape(title), title_justify="left", show_header=bool(columns)
    )
    for column in columns or [""] * len(rows[0]):
        table.add_column(escape(column), overflow="fold")
    for row in rows:
        if len(row) == 1:
            table.add_section()
        table.add_row(*(escape(str(cell)) for cell in row))
    Console(highlight=False).print(table)


def _print_table(part: Table) -> None:
    """Print as many columns and rows as a terminal has room for."""
    shown = part.brief or range(len(part.columns or part.rows[0]))
    rows = part.rows[: part.most]
    print_table(
        part.title,
        [part.columns[place] for place in shown if part.columns],
        [[row[place] for place in shown if place < len(row)] for row in rows],
    )
    if len(rows) < len(part.rows):
        print_lines(f"and {len(part.rows) - len(rows)} more, see the page")


def print_section(section: Section) -> None:
    """Print what a terminal shows of a section: its sentences and its tables."""
    _print_parts(section.parts)


def _print_parts(parts: Sequence[Part | None]) -> None:
    for part in parts:
        if isinstance(part, Sentences):
            prefix = f"{part.tone}: " if part.tone else ""
            print_lines(*(prefix + line for line in part.lines))
        elif isinstance(part, Table) and part.rows and part.brief != ():
            _print_table(part)
        elif isinstance(part, Fold) and part.brief:
            _print_parts(part.parts)
