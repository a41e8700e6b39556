"""The commitment curve: what is answered where a thinking is cut short."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import torch

from holdfast.cliff.commitment.accounts import (
    LINES,
    Account,
    CutReading,
    Jump,
    account,
    is_resolved,
    jump_of,
    readable,
)
from holdfast.cliff.commitment.cuts import SHARES, Cut, cuts_of, end_template
from holdfast.cliff.commitment.draws import (
    CutRow,
    Drawing,
    Outcomes,
    outcomes_of,
    prove,
)
from holdfast.cliff.commitment.first_words import (
    Read,
    first_words,
    meters,
    odds_before,
    odds_behind,
)
from holdfast.cliff.commitment.opened import Opened
from holdfast.cliff.commitment.settings import file_of
from holdfast.cliff.commitment.summary import (
    CurveRow,
    summarise,
    unread_reason,
)
from holdfast.errors import EvidenceError, TooFewExamplesError
from holdfast.judges.calibration import identity_record
from holdfast.models.decoding.row_state import Sampling
from holdfast.rollout.engine import engine_identity
from holdfast.rollout.rows import UNJUDGED, Rollout
from holdfast.rollout.sampling import sampling_of
from holdfast.study.directory import Stage
from holdfast.study.rows import table_of

KEY = "curve"
ROWS, DRAWS = "decide_curve.parquet", "decide_draws.parquet"
ROUNDS = 8
"""Rounds of further cuts inside a jump, each of which halves what is not resolved, and
of drawing again at its ends."""
AGAIN = 2
"""Times as many draws as before at the two ends of a jump, before it counts."""
WARM = 0.7
"""Temperature of draws where the study was drawn greedily."""


def run(opened: Opened) -> dict[str, Any]:
    """Draw answers from every cut of every answer; writes `decide_curve.json`.

    Beside it stand `decide_curve.parquet`, an answer of the study in each row, and
    `decide_draws.parquet`, every answer that was drawn.
    """
    session, study = opened.session, opened.study
    session.check_same(study)
    sampling = sampling_for(opened)
    judge = identity_record(session.open_judge(opened.judge).identity)
    known = {
        "sampling": asdict(sampling),
        "draws": 0 if opened.settings.cheap else opened.settings.draws,
        "cheap": opened.settings.cheap,
        "redrawn": opened.settings.redraw_thinking,
        "shares": SHARES,
        "judge": judge,
        "lines": asdict(LINES),
    } | engine_identity(session)
    with opened.stage(KEY, known) as stage:
        if stage.is_done:
            return stage.read_json(file_of(KEY))
        read = _read_before(opened)
        if opened.settings.cheap:
            readings = _probabilities(opened, read)
            drawn: list[pa.Table] = []
            redrawn: Outcomes = {}
        else:
            engine = prove(opened)
            if engine is not None:
                stage.facts["engine"] = engine
            readings, drawn = _drawn(opened, stage, sampling, read)
            redrawn = _redrawn(opened, stage, sampling, drawn)
        rows = _rows(opened, readings, read)
        if drawn:
            stage.write_table(DRAWS, pa.concat_tables(drawn))
        stage.write_table(ROWS, table_of(rows, CurveRow))
        unread = sum(table["outcome"].to_pylist().count(UNJUDGED) for table in drawn)
        block = summarise(opened, rows, read, redrawn, known | {"unjudged": unread})
        return stage.write_json(file_of(KEY), block)


def require(opened: Opened) -> None:
    """Refuse to read first words that tell nothing.

    Raises:
        EvidenceError: If they do not, and are all that is asked for.
    """
    if opened.settings.cheap and (reason := first_words(opened.every).reason):
        raise EvidenceError(
            "first tokens that open refusals alone, and others that open compliances",
            reason,
            "Draw answers: leave --cheap out.",
        )


def sampling_for(opened: Opened) -> Sampling:
    """Return how answers are drawn: as the study's, but never greedily by default."""
    settings = opened.settings
    own = sampling_of(opened.study, opened.session.adapter)
    temperature = settings.draw_temperature
    if temperature is None:
        temperature = own.temperature or WARM
    if temperature == 0 and settings.draws > 1 and not settings.cheap:
        raise TooFewExamplesError(
            "draws that can differ",
            f"{settings.draws} greedy ones from each cut, which are one and the same",
            "Give a --draw-temperature above 0, or --cheap.",
        )
    return replace(
        own, temperature=temperature, max_thinking=0, max_answer=settings.draw_tokens
    )


def _read_before(opened: Opened) -> Read:
    """Read what would be said first at each cut, before the end template."""
    words, rows = first_words(opened.every), opened.rows
    if words.reason:
        return Read((), {}, words.reason)
    opened.session.progress.say("Reading what would be said before the end template.")
    found = odds_before(
        opened.session.adapter, rows, words.openings, opened.session.batch_size
    )
    odds = {row.row_id: each for row, each in zip(rows, found, strict=True)}
    gauges = meters(opened.groups, odds, opened.seed)
    leanings = {
        name: [
            meter.leaning(value, LINES.meter)
            for meter, value in zip(gauges, values, strict=True)
        ]
        for name, values in odds.items()
    }
    return Read(gauges, leanings, "")


def _drawn(
    opened: Opened, stage: Stage, sampling: Sampling, read: Read
) -> tuple[dict[str, list[CutReading]], list[pa.Table]]:
    """Draw at every cut, then at further ones inside jumps of complied rows.

    Where a jump is resolved, its two ends are drawn again: of a row that drifts evenly,
    a few draws make a jump in one case of ten.
    """
    drawing, n = Drawing(opened, stage, sampling), opened.settings.draws
    cuts = {row.row_id: cuts_of(row) for row in opened.rows}
    items = [CutRow(row, tuple(cuts[row.row_id]), range(n)) for row in opened.rows]
    outcomes: Outcomes = {}
    # Greedy draws are made once: a second look would count the same ones anew.
    again: set[tuple[str, str]] | None = set() if sampling.temperature else None
    tables: list[pa.Table] = []
    for number in range(ROUNDS + 1):
        judged = drawing.judged(drawing.draw(items, number), number)
        tables.append(judged)
        for key, counted in outcomes_of(judged).items():
            outcomes[key] = outcomes.get(key, Counter()) + counted
        readings = {
            row.row_id: _readings(row, cuts[row.row_id], outcomes, read)
            for row in opened.rows
        }
        items = []
        for row in opened.complied:
            more = asked_next(row, readings[row.row_id], again, n)
            if more is not None:
                cuts[row.row_id] = sorted({*cuts[row.row_id], *more.cuts})
                items.append(more)
        if not items:
            break
    return readings, tables


def asked_next(
    row: Rollout, cuts: Sequence[CutReading], again: set[tuple[str, str]] | None, n: int
) -> CutRow | None:
    """Return what a row waits for: a cut inside a jump, or its two ends once more.

    Args:
        row: A complied harmful row.
        cuts: What was read of it so far.
        again: Cuts that were drawn again already, by row and name; this adds to them.
            None where nothing is drawn again.
        n: Draws from each cut.
    """
    more = further_cut(row, cuts)
    if more is not None:
        return CutRow(row, (more,), range(n))
    if again is None:
        return None
    ends = [Cut(cut.n_thinking, cut.at) for cut in ends_of_jump(cuts)]
    doubted = [cut for cut in ends if (row.row_id, cut.name) not in again]
    if not doubted:
        return None
    again |= {(row.row_id, cut.name) for cut in doubted}
    return CutRow(row, tuple(doubted), range(n, (1 + AGAIN) * n))


def further_cut(row: Rollout, cuts: Sequence[CutReading]) -> Cut | None:
    """Return the middle of the jump that an account of a row waits for, if one does."""
    jump = _decisive(cuts)
    if jump is None or is_resolved(jump):
        return None
    start, end = row.spans.thinking
    total = end - start
    kept = round((jump.start + jump.end) / 2 * total)
    known = {cut.n_thinking for cut in cuts}
    return None if kept in known else Cut(kept, kept / total)


def ends_of_jump(cuts: Sequence[CutReading]) -> list[CutReading]:
    """Return both ends of the jump that makes a row undecided; none without one."""
    jump = _decisive(cuts)
    if jump is None:
        return []
    return [
        cut for cut in cuts if cut.at in (jump.start, jump.end) and not cut.is_whole
    ]


def _decisive(cuts: Sequence[CutReading]) -> Jump | None:
    """Return the jump for which a row is undecided, if it is for one."""
    if account(cuts).name != "undecided":
        return None
    known = readable(cuts)
    if cuts[-1].n == 0 or known[-1].same - known[0].same < LINES.moved:
        return None
    return jump_of(known)


def _readings(
    row: Rollout, cuts: Iterable[Cut], outcomes: Outcomes, read: Read
) -> list[CutReading]:
    leanings = _leanings(row, read)
    made = []
    for cut in sorted(cuts, key=_place):
        counter = outcomes[row.row_id, cut.name]
        n = counter.total()
        same = counter[row.verdict] / n if n else float("nan")
        made.append(_reading(cut, same, n, leanings))
    return made


def _leanings(row: Rollout, read: Read) -> dict[int, float | None]:
    """Return the leanings of a row by the tokens of thinking that are kept."""
    start, end = row.spans.thinking
    kept = [round(share * (end - start)) for share in SHARES]
    return dict(zip(kept, read.leanings.get(row.row_id, ()), strict=False))


def _probabilities(opened: Opened, read: Read) -> dict[str, list[CutReading]]:
    """Read the first word behind every cut, where no answers are drawn."""
    words = first_words(opened.every)
    template = end_template(opened.session.adapter)

    def at(row: Rollout, cuts: Sequence[Cut]) -> list[CutReading]:
        odds = odds_behind(
            opened.session.adapter,
            row,
            cuts,
            template,
            words.openings,
            opened.session.batch_size,
        )
        # Towards the outcome of the row.
        towards = -torch.tensor(odds, dtype=torch.float64)
        shares = torch.sigmoid(towards if row.is_complied else -towards).tolist()
        leanings = _leanings(row, read)
        return [
            _reading(cut, share, None, leanings)
            for cut, share in zip(cuts, shares, strict=True)
        ]

    found: dict[str, list[CutReading]] = {}
    label = "Reading first words behind cuts"
    with opened.session.progress.track(label, len(opened.rows)) as advance:
        for row in opened.rows:
            found[row.row_id] = at(row, cuts_of(row))
            for _ in range(ROUNDS if row.is_complied else 0):
                more = further_cut(row, found[row.row_id])
                if more is None:
                    break
                found[row.row_id] = sorted(
                    [*found[row.row_id], *at(row, [more])], key=_place
                )
            advance(1)
    return found


def _place(cut: Cut | CutReading) -> tuple[bool, int]:
    return cut.is_whole, cut.n_thinking


def _reading(
    cut: Cut, same: float, n: int | None, leanings: Mapping[int, float | None]
) -> CutReading:
    leaning = None if cut.is_whole else leanings.get(cut.n_thinking)
    return CutReading(cut.share, same, n, leaning, cut.n_thinking, cut.is_whole)


def _redrawn(
    opened: Opened, stage: Stage, sampling: Sampling, drawn: list[pa.Table]
) -> Outcomes:
    """Let the model think on from each cut, where that is asked for."""
    if not opened.settings.redraw_thinking:
        return {}
    own = sampling_of(opened.study, opened.session.adapter)
    thinking = replace(sampling, max_thinking=own.max_thinking)
    drawing = Drawing(opened, stage, thinking, "redrawn")
    items = [
        CutRow(
            row,
            tuple(cut for cut in cuts_of(row) if not cut.is_whole),
            range(opened.settings.draws),
        )
        for row in opened.rows
    ]
    judged = drawing.judged(drawing.draw(items, 0), 0)
    drawn.append(judged)
    return outcomes_of(judged)


def _rows(
    opened: Opened, readings: Mapping[str, Sequence[CutReading]], read: Read
) -> list[CurveRow]:
    unread = unread_reason(read)
    made = []
    for name, rows in opened.groups.items():
        for row in rows:
            cuts = readings[row.row_id]
            found = account(cuts, unread=unread)
            made.append(_row(row, name, cuts, found))
    return made


def _row(
    row: Rollout, group: str, cuts: Sequence[CutReading], found: Account
) -> CurveRow:
    mine = row.label == "harmful" and row.is_complied
    nothing = float("nan")
    return CurveRow(
        row_id=row.row_id,
        request_id=row.request_id,
        group=group,
        wrapper=row.wrapper,
        # Sentences speak of compliance, which controls may not have ended in.
        account=found.name if mine else None,
        reason=found.reason if mine else "",
        commitment=found.commitment,
        at=tuple(cut.at for cut in cuts),
        n_thinking=tuple(cut.n_thinking for cut in cuts),
        is_whole=tuple(cut.is_whole for cut in cuts),
        same=tuple(cut.same for cut in cuts),
        n=tuple(cut.n or 0 for cut in cuts),
        leaning=tuple(nothing if cut.leaning is None else cut.leaning for cut in cuts),
    )
