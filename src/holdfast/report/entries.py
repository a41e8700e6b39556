"""Every figure of a report in one list, each under its section and its name."""

from collections.abc import Iterator
from typing import NamedTuple

from holdfast.report.evaluation import name as condition
from holdfast.report.records import Figure, Report, is_audited, is_figure
from holdfast.report.text import GROUPS, MEASURES, OUTCOMES, ROLES, title
from holdfast.report.words import CONTROLS, PROBE

__all__ = ["Entry", "entries"]


class Entry(NamedTuple):
    """One figure of a report."""

    section: str
    metric: str
    share: bool
    figure: Figure


def entries(report: Report) -> Iterator[Entry]:
    """Yield every figure of a report with its section and its name."""
    yield from _suites(report)
    yield from _sinks(report)
    if not is_audited(report):
        return
    success = report["attack_success"]
    section = "Attack success"
    yield Entry(section, ROLES["harmful"], True, success["harmful"])
    yield Entry(section, ROLES["wrapped"], True, success["wrapped"])
    for name, shares in success["by_wrapper"].items():
        yield Entry("By wrapper", f"{name}: harmful", True, shares["attack_success"])
        benign = shares["benign_compliance"]
        yield Entry("By wrapper", f"{name}: harmless", True, benign)
    for role, outcomes in report["outcomes"].items():
        name = f"Answers: {ROLES[role]}"
        for key, figure in outcomes.items():
            yield Entry(name, OUTCOMES[key], True, figure)
    yield from _scores(report)


def _scores(report: Report) -> Iterator[Entry]:
    """Yield the figures of trace, controls and probe."""
    for group, measures in report["trace"].items():
        for key, figure in measures.items():
            if is_figure(figure):
                name = f"End of thinking: {title(group, GROUPS)}"
                yield Entry(name, title(key, MEASURES), False, figure)
    for block, known in (("controls", CONTROLS), ("probe", PROBE)):
        for key, figure in report[block].items():
            if is_figure(figure):
                name = known[key].name if key in known else title(key)
                yield Entry(block.capitalize(), name, False, figure)


def _suites(report: Report) -> Iterator[Entry]:
    """Yield the figures of an evaluation, if there was one."""
    for row in report.get("evaluation", {}).get("rows", ()):
        name = f"{condition(row)}: {title(row['measure'])}"
        yield Entry(f"Suite {row['suite']}", name, True, row["figure"])


def _sinks(report: Report) -> Iterator[Entry]:
    """Yield the figures of the last model whose sink was looked at, if one was."""
    for each in report.get("sinks", {}).get("checkpoints", ())[-1:]:
        section = "Attention to the first token"
        yield Entry(section, "Heads that diverge", False, each["positive"])
        yield Entry(section, "Harmful text", True, each["harmful"])
        yield Entry(section, "Reference text", True, each["reference"])
