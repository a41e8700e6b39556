"""What a person sees: progress on stderr, tables on stdout, or plain JSON there."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
from rich.table import Table

from holdfast.cli.logged import logged
from holdfast.session.progress import Advance


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
        """Show a bar with the time left; a line a minute where there is no terminal."""
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


def print_table(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> None:
    """Print a table on stdout.

    Args:
        title: Its title.
        columns: Names of its columns.
        rows: Cells as text.
    """
    table = Table(title=escape(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console(highlight=False).print(table)


def print_report(report: Mapping[str, Any]) -> None:
    """Print what a report says: verdict, evidence, outcomes, trace and controls.

    Args:
        report: A report that is valid.
    """
    from holdfast.report import text, words

    given = dict(report)
    print_lines("", words.headline(given), "")
    print_lines(*(f"warning: {sentence}" for sentence in words.warnings(given)))
    print_lines(*(f"  {sentence}" for sentence in given["verdict"]["evidence"]), "")
    columns = text.outcome_columns(given["outcomes"].values())
    rows = [
        [
            text.title(role, text.ROLES),
            *(text.rate(found[key]) for key in columns),
        ]
        for role, found in given["outcomes"].items()
        if found["refused"]["n"]
    ]
    print_table("Outcomes", ("", *columns.values()), rows)
    named = ("plateau", "final", "cliff", "scaled_cliff")
    traced = [
        [text.title(group, text.GROUPS), *(text.score(found[key]) for key in named)]
        for group, found in given["trace"].items()
        if found["plateau"]["value"] is not None
    ]
    if traced:
        print_table("Refusal score", ("", *(text.title(key) for key in named)), traced)
    print_figures("Probe", given["probe"])
    print_figures("Controls", given["controls"])


def print_counts(summary: Mapping[str, Any]) -> None:
    """Print how many answers of each role got which verdict."""
    rows = [
        [role, verdict, str(count)]
        for role, counts in summary["verdicts"].items()
        for verdict, count in counts.items()
    ]
    print_table(f"{summary['rows']} answers", ("role", "verdict", "rows"), rows)
    if summary["forced_close"]:
        from holdfast.report.text import closed_by_force

        print_lines(closed_by_force(summary["forced_close"], summary["rows"]))


def print_figures(title: str, block: Mapping[str, Any]) -> None:
    """Print every figure of a block, under the name that the page gives it."""
    from holdfast.report import text, words

    if reason := text.shared_reason(block):
        print_lines(f"{title}: not measured: {reason}.")
        return
    named = words.CONTROLS | words.PROBE
    known = {key: sentences.name for key, sentences in named.items()}
    figures: dict[str, Any] = {
        key: found for key, found in block.items() if isinstance(found, dict)
    }
    rows = [
        [text.title(key, known), text.score(found)] for key, found in figures.items()
    ]
    print_table(title, ("", "value"), rows)


def print_trace(found: Mapping[str, Any]) -> None:
    """Print the figures of every group, and the controls."""
    for group, block in found.get("trace", {}).items():
        print_figures(group, block)
    print_figures("Controls", found.get("controls", {}))


def print_comparison(found: Any) -> None:
    """Print two studies side by side."""
    from holdfast.report.compare import table
    from holdfast.report.paired import paired_table

    rows = [
        [
            line.section if line.opens else "",
            line.metric,
            line.a,
            line.b,
            line.difference,
        ]
        for line in table(found)
    ]
    print_lines(found["caution"])
    names = (found["a"]["id"], found["b"]["id"])
    print_table("Comparison", ("", "", *names, "difference"), rows)
    if found.get("paired"):
        header, *lines = paired_table(found["paired"])
        print_table("The same prompts in both", tuple(header), lines)


def print_proofs(found: Mapping[str, Any]) -> None:
    """Print what was proved about a model, and what did not hold."""
    rows = [
        [
            each["name"],
            "yes" if each["passed"] else "NO",
            "not finite" if each["value"] is None else f"{each['value']:.1e}",
            "" if each["limit"] is None else f"{each['limit']:.0e}",
        ]
        for each in found["proofs"]
    ]
    model = found["model"]
    family = f" ({model['type']})" if "type" in model else ""
    print_table(model["id"] + family, ("proved", "holds", "found", "limit"), rows)
    if "thinking" not in model:
        return
    thinking = model["thinking"]
    style = repr(thinking["end_template"]) if thinking else "none"
    print_lines(f"End-of-thinking template: {style}")
    print_lines(*(f"warning: {note}" for note in found["notes"]))
