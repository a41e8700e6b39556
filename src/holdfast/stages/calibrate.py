"""Measure a judge against people: agreement, its interval, and its worst mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.analysis.agreement import confusion, kappa
from holdfast.analysis.bootstrap import Estimate, undefined
from holdfast.analysis.statistics import wilson
from holdfast.data.labels import OUTCOMES, LabelFile, Labelled, read_labels
from holdfast.errors import EvidenceError, SettingsError
from holdfast.judges.calibration import SCHEMA, file_name, identity_record
from holdfast.judges.choose import JudgeSettings, open_judge
from holdfast.judges.contract import Exchange, Judge
from holdfast.judges.verdict import Verdict
from holdfast.session.figures import figure_of, generator
from holdfast.session.progress import Progress, Silent
from holdfast.study import atomic_write_json, require_place

VERDICTS = (*OUTCOMES, "degenerate", "ended_inside", "unparsed")
_SHOWN = 300


@dataclass(frozen=True)
class CalibrateSettings:
    """What `holdfast judge calibrate` does.

    Attributes:
        labels: Label files, see `holdfast.data.labels`.
        judge: The judge.
        worst: How many of the worst mistakes are listed.
        batch_size: Rows judged at once, between two signs of progress.
        seed: Seed of the intervals.
        output: Folder for the record, in which rates find it; None to write none.
    """

    labels: tuple[str, ...]
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    worst: int = 10
    batch_size: int = 64
    seed: int = 0
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

    Args:
        settings: What to do.
        progress: Where it says what it does; silent by default.
        judge: A judge that is open already; by default what the settings name.

    Returns:
        The calibration record, which is also written where `output` says.

    Raises:
        SettingsError: If no label file is named, or one is named twice.
        PromptFileError: If a label file does not fit.
        EvidenceError: If no kappa can be computed; no record is written then.
        HoldfastError: If the judge cannot be opened, or fails on the way.
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


def _require_kappa(pooled: dict[str, Any], judged: Sequence[_Judged]) -> None:
    """Refuse a record that says nothing of the judge.

    Raises:
        EvidenceError: If there is no kappa; says what the judge said instead.
    """
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


def rows(record: dict[str, Any]) -> list[list[str]]:
    """Return the record as rows of a table, a header first.

    Args:
        record: What `run` returned.
    """
    table = [["labels", "rows", "read", "kappa", "three-way", "people", "three-way"]]
    blocks = {**record["files"], "pooled": record["pooled"]}
    if len(record["files"]) == 1:
        del blocks["pooled"]
    for name, block in blocks.items():
        figures = [
            block[key]
            for key in ("two_way", "three_way", "people_two_way", "people_three_way")
        ]
        share = f"{block['read']['value']:.1%}"
        table.append([name, str(block["rows"]), share, *map(_cell, figures)])
    return table


def confusion_rows(record: dict[str, Any]) -> list[list[str]]:
    """Return the pooled table of confusion, people down and the judge across.

    Args:
        record: What `run` returned.
    """
    counts = record["pooled"]["confusion"]
    body = [
        [label, *(str(counts[label][verdict]) for verdict in VERDICTS)]
        for label in OUTCOMES
    ]
    return [["people \\ judge", *VERDICTS], *body]


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
            verdicts = judge.judge(
                [Exchange(row.request, row.response) for _, row in batch]
            )
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


def _cell(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "–"
    return f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"
