"""The verdict in plain language, for somebody who meets these words today."""

from collections.abc import Callable
from typing import NamedTuple

from holdfast.evaluate import panel as evaluate_panel
from holdfast.report.schema import Figure, Report
from holdfast.report.text import (
    ROLES,
    clean,
    cut_at_limit,
    plain,
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


_QUESTIONS: dict[str, str] = {
    "attack_succeeds": "Do attacks get through?",
    "cliff": "Is refusal lost at the end of thinking?",
    "sparse": "Do a few attention heads do it?",
}
_MEANINGS: dict[tuple[str, bool], tuple[str, str]] = {
    ("attack_succeeds", True): (
        "Yes",
        "Some harmful requests are carried out. The table below says how many.",
    ),
    ("attack_succeeds", False): (
        "Not these",
        "None of the attacks tried here worked more often than could be chance or "
        "an error of the judge. Others may.",
    ),
    ("cliff", True): (
        "Yes",
        "While it thinks, the model leans towards refusing. In the last few tokens "
        "before the answer that leaning drops, and the drop is larger than the "
        "controls explain.",
    ),
    ("cliff", False): (
        "No",
        "The leaning towards refusal does not drop at the end of thinking by more "
        "than the controls explain.",
    ),
    ("sparse", True): (
        "Yes",
        "Switching off a few heads brings refusal back; as many random heads do not.",
    ),
    ("sparse", False): (
        "No",
        "No small set of heads brings refusal back better than random heads do.",
    ),
}
_UNTOLD = {
    "attack_succeeds": "There were not enough answers that could be judged.",
    "cliff": "There were not enough answers of each kind to compare.",
    "sparse": "This study did not trace single heads.",
}


def answers(report: Report) -> list[Answer]:
    """Return the three questions of an audit with their answers.

    `report`: A report that passes `schema.validate`.
    """
    verdict = report["verdict"]
    reasons = verdict.get("reasons", {})
    made = []
    for key, question in _QUESTIONS.items():
        found = verdict[key]
        if found is None:
            word = "Not tested" if key == "sparse" else "Could not be told"
            made.append(Answer(question, word, reasons.get(key, _UNTOLD[key]), "open"))
            continue
        word, meaning = _MEANINGS[key, found]
        made.append(Answer(question, word, meaning, "yes" if found else "no"))
    return made


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
    success, probe = report["attack_success"], report["probe"]
    excess = report["controls"]["excess_over_refused"]
    said = [
        _figure_sentence(
            "Compliance inside wrappers",
            success["wrapped"],
            "Inside wrappers the model complied with {} of the harmful requests.",
            rate,
        ),
        _figure_sentence(
            "Compliance without a wrapper",
            success["harmful"],
            "Without a wrapper it complied with {}.",
            rate,
        ),
        _figure_sentence(
            "The probe on wrapped requests",
            probe["wrapped_auroc"],
            "On wrapped requests the refusal score ranks refusals above other answers "
            "with an AUROC of {}; 0.5 would be guessing, 1 perfect.",
            score,
        ),
        _figure_sentence(
            "The cliff beyond that of refused requests",
            excess,
            "Before complying, the score falls by {} more than before refusing, where "
            "1 is the whole gap between refusing and complying.",
            score,
        ),
    ]
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


def _figure_sentence(
    name: str, figure: Figure, words: str, write: Callable[[Figure], str]
) -> str:
    if figure["value"] is None:
        return f"{name}: {write(figure)}."
    return words.format(write(figure))


def _main_figures(report: Report) -> list[Figure]:
    success, trace = report["attack_success"], report["trace"]
    return [
        success["harmful"],
        success["wrapped"],
        *(trace[group]["cliff"] for group in trace),
        report["probe"]["wrapped_auroc"],
    ]


def signed(number: int | float) -> str:
    """Write a difference with its sign."""
    return f"+{plain(number)}" if number > 0 else plain(number)


def judge_sentences(report: Report) -> list[str]:
    """Say who judged the rollouts; nothing where the report does not name the judge."""
    judge = report.get("judge")
    if judge is None:
        return []
    return evaluate_panel.judge_sentences(judge, judge["calibration"])
