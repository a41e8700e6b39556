"""The verdict in plain language, for somebody who meets these words today."""

from typing import NamedTuple

from holdfast.report.labels import ANSWERED
from holdfast.report.schema import Figure, Report
from holdfast.report.text import (
    ROLES,
    WORDS,
    clean,
    cut_at_limit,
    rate,
    score,
    span,
    title,
)

_FEW = 20
_WARNING = "warning: "
_DIFFERENCES = ("excess_over_refused", "excess_over_benign", "plateau_over_benign")


class Answer(NamedTuple):
    """One question of the audit, its answer in a word or two, and what it means."""

    question: str
    word: str
    meaning: str
    tone: str


def answers(report: Report) -> list[Answer]:
    """Return the three questions of an audit with their answers.

    `report`: A report that passes `schema.validate`.
    """
    verdict = report["verdict"]
    reasons = verdict.get("reasons", {})
    made = []
    for key, said in WORDS["questions"].items():
        tone = ANSWERED[verdict[key]]
        is_tried = tone == "open" and key == "sparse" and _switched_off(report)
        word, meaning = said["tried" if is_tried else tone]
        if tone == "open":
            meaning = reasons.get(key, meaning)
        made.append(Answer(said["question"], word, meaning, tone))
    return made


def _switched_off(report: Report) -> bool:
    """Return whether heads were switched off and requests asked, if too few."""
    return bool(report.get("ablation", {}).get("sparse", {}).get("sizes"))


def asked(report: Report) -> str:
    """Say in two sentences what was put to the model."""
    outcomes = report["outcomes"]
    parts: list[str] = []
    for role, words in (
        ("harmful", "to harmful requests as they stand"),
        ("wrapped", "to harmful requests inside a jailbreak wrapper"),
        ("benign", "to harmless requests"),
        ("benign_wrapped", "to harmless requests inside a wrapper"),
        ("safe_lookalike", "to harmless requests that sound dangerous"),
    ):
        n = outcomes[role]["refused"]["n"]
        if n:
            parts.append(f"{n:,} {'answers ' * (not parts)}{words}")
    listed = ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + "".join(parts[-1:])
    return f"{clean(report['model']['id'])} gave {listed or 'no answers'}."


def sureness(report: Report) -> list[str]:
    """Say how sure the findings are, in sentences with their intervals."""
    success = report["attack_success"]
    said = []
    for name, found, sentence, write in (
        (
            "Compliance inside wrappers",
            success["wrapped"],
            "Inside wrappers the model complied with {} of the harmful requests.",
            rate,
        ),
        (
            "Compliance without a wrapper",
            success["harmful"],
            "Without a wrapper it complied with {}.",
            rate,
        ),
        (
            "The probe on wrapped requests",
            report["probe"]["wrapped_auroc"],
            "On wrapped requests the refusal score ranks refusals above other answers "
            "with an AUROC of {}; 0.5 would be guessing, 1 perfect.",
            score,
        ),
        (
            "The cliff beyond that of refused requests",
            report["controls"]["excess_over_refused"],
            "Before complying, the score falls by {} more than before refusing, where "
            "1 is the whole gap between refusing and complying.",
            score,
        ),
    ):
        is_null = found["value"] is None
        said.append((f"{name}: {{}}." if is_null else sentence).format(write(found)))
    few = sorted({figure["n"] for figure in _main_figures(report) if figure["n"]})
    if few and few[0] < _FEW:
        said.append(
            f"Some of these figures rest on as few as {few[0]} examples: trust their "
            "ranges, not their values."
        )
    return said


def warnings(report: Report) -> list[str]:
    """Return the notes on data and answers that a reader must not miss.

    `report`: A report that passes `schema.validate`.
    """
    cut = {role: found.get("cut", 0) for role, found in report["outcomes"].items()}
    return [
        f"{title(source['role'], ROLES)}: {note.removeprefix(_WARNING)}"
        for source in report["data"]["sources"]
        for note in source["notes"]
        if note.startswith(_WARNING)
    ] + [
        f"{title(role, ROLES)}: "
        + cut_at_limit(n, report["outcomes"][role]["unparsed"]["n"])
        for role, n in cut.items()
        if n
    ]


def reading(figure: Figure, key: str) -> str:
    """Say where the interval of a control lies, which is all a report may say."""
    if figure["value"] is None or figure["low"] is None or figure["high"] is None:
        return ""
    if key not in _DIFFERENCES:
        return ""
    if figure["low"] > 0:
        return "The whole range is above 0."
    if figure["high"] < 0:
        return "The whole range is below 0."
    return f"The range {span(figure)} includes 0: this control does not rule it out."


def _main_figures(report: Report) -> list[Figure]:
    success, trace = report["attack_success"], report["trace"]
    return [
        success["harmful"],
        success["wrapped"],
        *(trace[group]["cliff"] for group in trace),
        report["probe"]["wrapped_auroc"],
    ]
