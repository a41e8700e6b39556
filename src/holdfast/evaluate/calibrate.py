"""Measure a judge against people's labels: agreement and worst mistakes.

Two shapes are read: that of XSTest (`prompt`, `completion`, `final_label`, and two
annotators), and rows of `request`, `response` and `label`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.data.sources import load
from holdfast.data.tables import Table, TableRow
from holdfast.errors import EvidenceError, PromptFileError, SettingsError
from holdfast.judges.base import Exchange, Judge, RulesJudge
from holdfast.judges.calibration import SCHEMA, file_name, identity_record
from holdfast.judges.cascade import CascadeJudge, beside_rules
from holdfast.judges.choose import open_judge
from holdfast.judges.settings import JudgeSettings
from holdfast.judges.verdict import Verdict
from holdfast.report.progress import Progress, Silent
from holdfast.stats.agreement import confusion, kappa
from holdfast.stats.bootstrap import Estimate, undefined
from holdfast.stats.rates import wilson
from holdfast.study import atomic_write_json, require_place
from holdfast.study.figures import figure_of, generator

OUTCOMES = ("complied", "partial", "refused")
VOCABULARY: Mapping[str, str] = {
    "1_full_compliance": "complied",
    "2_full_refusal": "refused",
    "3_partial_refusal": "partial",
    **{outcome: outcome for outcome in OUTCOMES},
}
SHAPES = (
    ("request", "response", "label"),
    ("prompt", "completion", "final_label"),
)
ANNOTATORS = ("annotation_1", "annotation_2")


@dataclass(frozen=True, slots=True)
class Labelled:
    """One exchange and what people said of it."""

    request: str  # What the user asked.
    response: str  # What a model answered.
    label: str  # The label that counts: complied, partial or refused.
    # The labels of two annotators, where the file has them.
    people: tuple[str, str] | None
    place: str  # Where in its file it stands.

    @property
    def exchange(self) -> Exchange:
        """What a judge is shown."""
        return Exchange(self.request, self.response)


@dataclass(frozen=True, slots=True)
class LabelFile:
    """The labelled rows of one source, with the hash of its bytes."""

    name: str
    sha256: str
    rows: tuple[Labelled, ...]


def read_labels(source: str, revision: str | None = None) -> LabelFile:
    """Read one file of labelled exchanges.

    `source`: Path of a CSV, JSON, JSONL or Parquet file, or `hub:owner/name`.
    """
    content = load(source, revision)
    shape = _shape(content.table, content.name)
    _check_vocabulary(content.table, shape[2], content.name)
    asked = all(name in content.table.columns for name in ANNOTATORS)
    if asked:
        for name in ANNOTATORS:
            _check_vocabulary(content.table, name, content.name)
    rows = tuple(
        Labelled(
            _text(row, shape[0], content.name),
            _text(row, shape[1], content.name),
            _outcome(row.cells[shape[2]]),
            _people(row) if asked else None,
            row.place,
        )
        for row in content.table.rows
    )
    return LabelFile(content.name, content.sha256, rows)


def _shape(table: Table, name: str) -> tuple[str, str, str]:
    for shape in SHAPES:
        if set(shape) <= set(table.columns):
            return shape
    shapes = " or ".join(", ".join(f"`{column}`" for column in s) for s in SHAPES)
    found = ", ".join(f"`{column}`" for column in table.columns) or "no columns"
    raise PromptFileError(
        f"columns {shapes} in `{name}`", found, "Rename the columns of the file."
    )


def _check_vocabulary(table: Table, column: str, name: str) -> None:
    found = {str(row.cells.get(column, "")).strip() for row in table.rows}
    strange = sorted(value for value in found if value.casefold() not in VOCABULARY)
    if strange:
        shown = ", ".join(f"`{value[:40]}`" for value in strange[:5])
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        raise PromptFileError(
            f"labels {', '.join(f'`{label}`' for label in VOCABULARY)} in column "
            f"`{column}` of `{name}`",
            shown + more,
            "Translate the labels; a row without one is to be left out.",
        )


def _outcome(value: Any) -> str:
    return VOCABULARY[str(value).strip().casefold()]


def _people(row: TableRow) -> tuple[str, str]:
    first, second = (_outcome(row.cells[name]) for name in ANNOTATORS)
    return first, second


def _text(row: TableRow, column: str, name: str) -> str:
    value = row.cells.get(column)
    # An empty answer is an answer, and one that judges have to know.
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise PromptFileError(
                f"valid Unicode in column `{column}` of `{name}`",
                f"half a surrogate pair at {row.place}",
                "Write the character itself, or both halves of its escape.",
            ) from error
        return value
    raise PromptFileError(
        f"text in column `{column}` of `{name}`",
        f"{type(value).__name__} at {row.place}",
        "Write every request and response as text.",
    )


VERDICTS = (*OUTCOMES, "degenerate", "ended_inside", "unparsed")
_SHOWN = 300


@dataclass(frozen=True)
class CalibrateSettings:
    """What `holdfast judge calibrate` does."""

    labels: tuple[str, ...]  # Label files, see `holdfast.evaluate.calibrate`.
    judge: JudgeSettings = field(default_factory=JudgeSettings)  # The judge.
    worst: int = 10  # How many of the worst mistakes are listed.
    batch_size: int = 64  # Rows judged at once, between two signs of progress.
    seed: int = 0  # Seed of the intervals.
    # Folder for the record, in which rates find it; None to write none.
    output: str | None = "calibrations"


@dataclass(frozen=True)
class _Judged:
    source: str
    row: Labelled
    verdict: Verdict

    @property
    def read(self) -> bool:
        return self.verdict.outcome in OUTCOMES


def run(
    settings: CalibrateSettings,
    progress: Progress | None = None,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Judge labelled exchanges and say how well the judge agrees with people.

    Rows that the judge calls degenerate or cannot read are in the table of confusion
    and in the share `read`, and in no kappa: they are neither agreement nor refusal.

    `progress`: Where it says what it does; silent by default.
    `judge`: A judge that is open already; by default what the settings name.
    Returns: The calibration record, which is also written where `output` says.
    """
    progress = progress or Silent()
    if not settings.labels or len(set(settings.labels)) < len(settings.labels):
        raise SettingsError(
            "label files, each named once",
            ", ".join(settings.labels) or "none",
            "Name them with --labels.",
        )
    if settings.output is not None:
        place = Path(settings.output) / "record"
        require_place(place, folder=False, flag="--calibrations")
    # Files are read first: a wrong column shows before a model is loaded.
    files = _named_apart(settings.labels)
    judge = judge or open_judge(settings.judge)
    judged = _judge(files, judge, settings.batch_size, progress)
    pooled = _agreement(judged, settings.seed, "pooled")
    _require_kappa(pooled, judged)
    record = {
        "schema": SCHEMA,
        "judge": identity_record(judge.identity),
        "pooled": pooled,
        **_rules(judged, judge),
        "files": {
            file.name: _agreement(
                [each for each in judged if each.source == file.name],
                settings.seed,
                file.name,
            )
            for file in files
        },
        "sources": [
            {"name": file.name, "sha256": file.sha256, "rows": len(file.rows)}
            for file in files
        ],
        "worst": _worst(judged, settings.worst),
    }
    if settings.output is not None:
        path = Path(settings.output).expanduser() / file_name(judge.identity)
        atomic_write_json(path, record)
        progress.say(f"The record lies in {path}.")
    return record


def _rules(judged: Sequence[_Judged], judge: Judge) -> dict[str, Any]:
    """Return how often a judge differs from the rules, for a cascade of both."""
    if isinstance(judge, RulesJudge | CascadeJudge):
        return {}
    rows = [(each.row.exchange, each.verdict) for each in judged]
    return {"rules": beside_rules(rows, judge.identity.measures)}


def _require_kappa(pooled: dict[str, Any], judged: Sequence[_Judged]) -> None:
    """Refuse a record that says nothing of the judge."""
    figures = [pooled[key] for key in ("two_way", "three_way")]
    if any(figure["value"] is not None for figure in figures):
        return
    read = sum(each.read for each in judged)
    found = (
        f"none ({figures[0]['reason']}): {read} of {len(judged)} answers were judged"
    )
    unread = next((each.verdict for each in judged if not each.read), None)
    if unread is not None:
        found += f", and of another the judge says: {unread.reason}"
    raise EvidenceError(
        "a kappa of the judge and people",
        found,
        "No record was written. See that the judge answers and is understood, and that "
        "the labels hold answers of two kinds at least.",
    )


def _named_apart(sources: Sequence[str]) -> list[LabelFile]:
    """Read label files; those that share a name go by their whole path."""
    found = [read_labels(source) for source in sources]
    names = [file.name for file in found]
    return [
        file if names.count(file.name) == 1 else replace(file, name=source)
        for source, file in zip(sources, found, strict=True)
    ]


def _judge(
    files: Sequence[LabelFile], judge: Judge, batch_size: int, progress: Progress
) -> list[_Judged]:
    todo = [(file.name, row) for file in files for row in file.rows]
    judged: list[_Judged] = []
    with progress.track(f"{judge.identity.label} judges", len(todo)) as advance:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            verdicts = judge.judge([row.exchange for _, row in batch])
            judged += [
                _Judged(source, row, verdict)
                for (source, row), verdict in zip(batch, verdicts, strict=True)
            ]
            advance(len(batch))
    return judged


def _agreement(judged: Sequence[_Judged], seed: int, name: str) -> dict[str, Any]:
    table = confusion(
        [each.row.label for each in judged],
        [each.verdict.outcome for each in judged],
        VERDICTS,
    ).tolist()
    read = [each for each in judged if each.read]
    both = [each for each in judged if each.row.people is not None]
    machine = [each.verdict.outcome for each in read]
    label = [each.row.label for each in read]
    people = list(zip(*(each.row.people or () for each in both), strict=True))
    first, second = people or ((), ())
    estimates = {
        "two_way": _kappa(_two(label), _two(machine), read, seed, f"{name}/two"),
        "three_way": _kappa(label, machine, read, seed, f"{name}/three"),
        "people_two_way": _kappa(
            _two(first), _two(second), both, seed, f"{name}/people two"
        ),
        "people_three_way": _kappa(first, second, both, seed, f"{name}/people three"),
        "read": wilson(len(read), len(judged)),
    }
    return {
        "rows": len(judged),
        **{key: figure_of(estimate) for key, estimate in estimates.items()},
        "confusion": {
            said: dict(zip(VERDICTS, table[place], strict=True))
            for place, said in enumerate(VERDICTS)
            if said in OUTCOMES
        },
    }


def _kappa(
    first: Sequence[str],
    second: Sequence[str],
    judged: Sequence[_Judged],
    seed: int,
    name: str,
) -> Estimate:
    if not judged:
        return undefined(0, "no row has both labels")
    clusters = [each.row.request for each in judged]
    return kappa(first, second, clusters, generator(seed, f"calibrate/{name}"))


def _two(labels: Sequence[str]) -> list[str]:
    """Tell full refusal from the rest."""
    return [label if label == "refused" else "rest" for label in labels]


def _worst(judged: Sequence[_Judged], count: int) -> list[dict[str, Any]]:
    """List the mistakes no person would make, the plainest first.

    Refusal taken for compliance and the reverse go before anything partial, what two
    annotators agreed on before the rest, and then what the judge was surest of.
    """

    def weight(each: _Judged) -> tuple[bool, bool, float]:
        sides = {each.row.label, each.verdict.outcome}
        agreed = each.row.people is not None and len(set(each.row.people)) == 1
        score = each.verdict.score
        sure = 0.0 if score is None else abs(score - 0.5)
        return ("partial" not in sides, agreed, sure)

    wrong = [each for each in judged if each.verdict.outcome != each.row.label]
    wrong.sort(key=weight, reverse=True)
    return [
        {
            "source": each.source,
            "place": each.row.place,
            "request": each.row.request[:_SHOWN],
            "response": each.row.response[:_SHOWN],
            "people": each.row.label,
            "verdict": each.verdict._asdict(),
        }
        for each in wrong[:count]
    ]
