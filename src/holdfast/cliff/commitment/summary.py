"""The figures of a commitment curve: shares of accounts, and means by group."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.cliff.commitment.accounts import ACCOUNTS, LINES, AccountName
from holdfast.cliff.commitment.cuts import SHARES
from holdfast.cliff.commitment.draws import Outcomes
from holdfast.cliff.commitment.first_words import Read
from holdfast.cliff.commitment.opened import Opened, harmful_of
from holdfast.cliff.groups import COMPLIED
from holdfast.judges.calibration import is_same
from holdfast.rollout.rows import judging_record
from holdfast.stats.bootstrap import Estimate, undefined
from holdfast.stats.rates import clustered_mean, clustered_rate
from holdfast.study.figures import figure_of, generator
from holdfast.study.rows import Int32

OTHER_JUDGE = "Another judge judged the rollouts, by which the rows were chosen."
NEVER_REFUSED = (
    "No harmful request of this study was refused. Where a model refuses nothing there "
    "is nothing to decide, and its answers read as decided early all the same."
)
KINDS = ("draws stay mixed", "decided by one jump", "a jump between cuts", "no draw")
"""What sentences on undecided rows begin with."""
MAY_HAVE_FALLEN = "some of these may have fallen at the end template"
FEW_REQUESTS = 20
"""Complied base requests below which shares are said to be of few."""


@dataclass(frozen=True)
class CurveRow:
    """One answer of the study at all of its cuts, and its account."""

    row_id: str
    request_id: str
    group: str
    wrapper: str | None
    account: str | None  # None for the controls.
    reason: str
    commitment: float | None
    at: tuple[float, ...]
    n_thinking: tuple[Int32, ...]
    is_whole: tuple[bool, ...]
    # Share with the final outcome; not a number where no draw could be judged.
    same: tuple[float, ...]
    n: tuple[Int32, ...]  # Draws that were judged; 0 where a probability was read.
    # Leaning to refuse before the end template; not a number where it was not read.
    leaning: tuple[float, ...]


def summarise(
    opened: Opened,
    rows: Sequence[CurveRow],
    read: Read,
    redrawn: Outcomes,
    known: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the block `decide.curve` of the report."""
    seed = opened.seed
    complied = [row for row in rows if row.group == COMPLIED]
    clusters = [row.request_id for row in complied]
    why = unread_reason(read)
    shares = {name: figure_of(_account(name, complied, why, seed)) for name in ACCOUNTS}
    groups = _groups(rows)
    block: dict[str, Any] = {
        "draws": known["draws"],
        "cheap": known["cheap"],
        "temperature": known["sampling"]["temperature"],
        "top_p": known["sampling"]["top_p"],
        "draw_tokens": known["sampling"]["max_answer"],
        "judge": known["judge"],
        "rows": {name: len(found) for name, found in opened.groups.items()},
        "too_short": opened.too_short,
        "unjudged": known["unjudged"],  # Draws that count at no cut.
        "n_requests": len(set(clusters)),
        "account": shares,
        # Why no row can be shown to have fallen; empty where one can.
        "unread": why,
        "by_wrapper": _by_wrapper(complied, why),
        "reasons": _reasons(complied),
        "curves": [
            {"group": name, "points": _points(found, _same, f"same/{name}", seed)}
            for name, found in groups.items()
        ],
        "leanings": [
            {"group": name, "points": _points(found, _lean, f"lean/{name}", seed)}
            for name, found in groups.items()
        ],
        "meters": [
            {"at": share, "auroc": figure_of(meter.auroc)}
            for share, meter in zip(SHARES, read.meters, strict=bool(read.meters))
        ],
    }
    if redrawn:
        block["redrawn"] = [
            {"group": name, "points": _redrawn(opened, found, redrawn, name, seed)}
            for name, found in groups.items()
        ]
    block["notes"] = _notes(opened, read, known, block)
    block["evidence"] = _evidence(block)
    return block


def _account(
    name: AccountName, rows: Sequence[CurveRow], unread: str, seed: int
) -> Estimate:
    """Return the share of complied harmful answers that have an account.

    `unread`: Why no fall could be seen; that rule comes first, so that all with a
    commitment point may have fallen, and what they are found to be instead is a bound.
    """
    counted = torch.tensor([row.account == name for row in rows])
    clusters = [row.request_id for row in rows]

    def rate(counted: Tensor) -> Estimate:
        source = generator(seed, f"decide/account/{name}")
        return clustered_rate(counted, clusters, source)

    if not unread:
        return rate(counted)
    if name == "fell_at_template":
        return undefined(len(rows), unread)
    sure = counted & torch.tensor([row.commitment is None for row in rows])
    least, most = rate(sure), rate(counted)
    if least.value == most.value:
        return most
    return undefined(len(rows), MAY_HAVE_FALLEN)._replace(
        bounds=(least.value or 0.0, most.value or 0.0)
    )


def _groups(rows: Sequence[CurveRow]) -> dict[str, list[CurveRow]]:
    """Return rows by account, and the controls by group; those that have any."""
    named: dict[str, list[CurveRow]] = {
        name: [row for row in rows if row.account == name] for name in ACCOUNTS
    }
    for row in rows:
        if row.account is None:
            named.setdefault(row.group, []).append(row)
    return {name: found for name, found in named.items() if found}


def _same(row: CurveRow, place: int) -> float:
    return row.same[place]


def _lean(row: CurveRow, place: int) -> float:
    return row.leaning[place]


def _points(
    rows: Sequence[CurveRow],
    value: Callable[[CurveRow, int], float],
    name: str,
    seed: int,
) -> list[dict[str, Any]]:
    """Return means over rows at each of `SHARES`, and behind the whole thinking."""
    points = []
    for share in (*SHARES, None):
        found = [(row, value(row, _place(row, share))) for row in rows]
        found = [(row, number) for row, number in found if number == number]
        if not found:
            continue
        estimate = clustered_mean(
            torch.tensor([number for _, number in found], dtype=torch.float64),
            [row.request_id for row, _ in found],
            generator(seed, f"decide/{name}/{share}"),
            bounds=(0.0, 1.0) if value is _same else None,
        )
        points.append({"at": share, "share": figure_of(estimate)})
    return points


def _place(row: CurveRow, share: float | None) -> int:
    """Return the cut of a row that stands for a part of the thinking."""
    if share is None:
        return len(row.at) - 1
    total = row.n_thinking[-1]
    return row.n_thinking.index(round(share * total))


def _redrawn(
    opened: Opened,
    rows: Sequence[CurveRow],
    redrawn: Outcomes,
    name: str,
    seed: int,
) -> list[dict[str, Any]]:
    verdicts = {row.row_id: row.verdict for row in opened.rows}
    points = []
    for share in SHARES:
        found = []
        for row in rows:
            cut = str(round(share * row.n_thinking[-1]))
            counter = redrawn[row.row_id, cut]
            if counter.total():
                found.append((row, counter[verdicts[row.row_id]] / counter.total()))
        if found:
            estimate = clustered_mean(
                torch.tensor([number for _, number in found], dtype=torch.float64),
                [row.request_id for row, _ in found],
                generator(seed, f"decide/redrawn/{name}/{share}"),
                bounds=(0.0, 1.0),
            )
            points.append({"at": share, "share": figure_of(estimate)})
    return points


def _by_wrapper(
    rows: Sequence[CurveRow], unread: str
) -> dict[str, dict[str, int | None]]:
    """Count accounts under each wrapper; null where no fall could be seen."""
    counted: dict[str, Counter[str]] = {}
    for row in rows:
        counted.setdefault(row.wrapper or "none", Counter())[str(row.account)] += 1
    return {
        wrapper: {name: counter[name] for name in ACCOUNTS}
        | ({"fell_at_template": None} if unread else {})
        for wrapper, counter in sorted(counted.items())
    }


def _reasons(rows: Sequence[CurveRow]) -> dict[str, int]:
    """Count why rows are undecided, by what their sentences begin with."""
    undecided = [row.reason for row in rows if row.account == "undecided"]
    return {kind: sum(each.startswith(kind) for each in undecided) for kind in KINDS}


def _notes(
    opened: Opened, read: Read, known: Mapping[str, Any], block: Mapping[str, Any]
) -> list[str]:
    notes = []
    record = judging_record(opened.study)["settings"]
    if "judge" in record and not is_same(record["judge"], known["judge"]):
        notes.append(OTHER_JUDGE)
    if opened.too_short:
        notes.append(
            f"{opened.too_short} complied harmful answers have fewer than "
            f"{opened.settings.min_thinking} tokens of thinking and are left out."
        )
    if block["unjudged"]:
        notes.append(
            f"{block['unjudged']} of the answers that were drawn could not be judged, "
            "and count at no cut."
        )
    forced = sum(row.forced_close for row in opened.complied)
    if forced:
        notes.append(
            f"{forced} of {len(opened.complied)} thinkings of complied harmful answers "
            "ran out of their budget and were closed by force: 100% is where they were "
            "stopped, and their end template is not the model's own doing."
        )
    if not any(row.is_refused for row in harmful_of(opened.every)):
        notes.append(NEVER_REFUSED)
    if block["n_requests"] < FEW_REQUESTS:
        notes.append(
            f"{block['n_requests']} complied harmful requests are few; add more for "
            "narrower intervals."
        )
    if why := block["unread"]:
        notes.append(
            f"No row can be shown to have fallen at the end template: {why}. Rows that "
            "fell count under another account, whose share is an upper bound."
        )
    return notes


def unread_reason(read: Read) -> str:
    """Return why what is read before the end template is not trusted; empty if it is.

    At the last cut, where a refusal has to be held to fall.
    """
    if read.reason:
        return read.reason
    last = read.meters[-1].auroc
    if (last.low or 0.0) >= LINES.meter:
        return ""
    why = last.reason or f"AUROC {last.value:.2f}, of which {last.low:.2f} is shown"
    return f"the reading before it is not shown to read refusal ({why})"


def _evidence(block: Mapping[str, Any]) -> list[str]:
    how = (
        "the probability of the first word"
        if block["cheap"]
        else f"{block['draws']} draws at temperature {block['temperature']:g}"
    )
    n = block["rows"][COMPLIED]
    told = {name: _told(each, n) for name, each in block["account"].items()}
    return [
        f"Of {n} complied harmful answers {told['decided_early']} were decided "
        f"early, {told['drifted']} drifted, {told['fell_at_template']} fell at the "
        f"end template, and {told['undecided']} stayed undecided, by {how} at each cut."
    ]


def _told(figure: Mapping[str, Any], n: int) -> str:
    """Write how many answers a share is of, as far as that is known."""
    if figure["value"] is not None:
        return str(round(figure["value"] * n))
    if "bounds" not in figure:
        return "an unknown number"
    return f"at most {round(figure['bounds'][1] * n)}"
