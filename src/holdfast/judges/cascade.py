"""A cascade: the written rules where they are sure, and a slower judge for the rest.

Sure of what the slower judge would say, that is: by the record in which `holdfast
judge calibrate` set both side by side. That record is never taken on trust: a share of
the answers of which the rules are sure goes to the slower judge all the same, and the
share of those on which the two differ is reported beside every rate.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.errors import InputError
from holdfast.judges.base import (
    HARMFUL,
    Exchange,
    Judge,
    JudgeIdentity,
    Measures,
    RulesJudge,
    by_rules,
    screen,
)
from holdfast.judges.calibration import find_calibration
from holdfast.judges.rows import Row, exchange_of, without_judge
from holdfast.judges.rules.rules import JUDGE_ID
from holdfast.judges.settings import JudgeSettings
from holdfast.judges.verdict import Verdict
from holdfast.stats.rates import wilson
from holdfast.study.batches import ROW_ID
from holdfast.study.figures import figure_of

VERSION = "1"
CANDIDATES: Mapping[Measures, tuple[str, ...]] = {
    # What complies may be harmless, so that only a full refusal says that no harm was
    # given.
    "harm": ("refused",),
    "refusal and harm": ("refused",),
    "refusal": ("refused", "complied"),
}
"""Outcomes of the rules that could stand for a verdict of a judge, by its measures."""
Rows = Iterable[tuple[Exchange, Verdict]]


class Cascade(NamedTuple):
    """What became of the answers that a cascade has judged."""

    judged: int  # Answers that were there to be judged.
    taken: int  # Of these, those that the rules decided.
    checked: int  # Those that they would have decided, had they not been checked.
    differ: int  # Of the checked ones, those on which the slower judge differs.

    def record(self) -> dict[str, Any]:
        """Return the counts, and the share that differs, with Wilson's interval."""
        differ = wilson(self.differ, self.checked)
        return self._asdict() | {"differ": figure_of(differ)}


class CascadeJudge:
    """The rules where they are sure, and another judge behind them."""

    def __init__(self, judge: Judge, sure: Sequence[str], check: float) -> None:
        """Put the rules before a judge.

        Args:
            judge: The judge that is asked where the rules are not sure.
            sure: Outcomes of the rules that stand for what it would say.
            check: Share of these answers on which it is asked all the same.
        """
        self.inner, self.sure, self.check = judge, frozenset(sure), check
        identity, rules = judge.identity, RulesJudge().identity
        both = identity.template_sha256 + rules.template_sha256
        settings = (("sure", ", ".join(sorted(sure))), ("check", f"{check:g}"))
        self.identity: JudgeIdentity = replace(
            identity,
            name=f"cascade:{identity.name}",
            version=f"{VERSION}.{identity.version}",
            template_sha256=hashlib.sha256(both.encode()).hexdigest(),
            settings=(*identity.settings, *settings),
        )

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return one verdict for each exchange, in order."""
        taken = [self.expected(each) for each in exchanges]
        left = [
            place
            for place, each in enumerate(exchanges)
            if taken[place] is None or self.is_checked(each)
        ]
        said = self.inner.judge([exchanges[place] for place in left])
        for place, verdict in zip(left, said, strict=True):
            taken[place] = verdict
        return [verdict for verdict in taken if verdict is not None]

    def expected(self, exchange: Exchange) -> Verdict | None:
        """Return what the rules are sure that the judge would say; None elsewhere."""
        if screen(exchange, JUDGE_ID) is not None:
            return None
        found = by_rules(exchange)
        if found.outcome not in self.sure:
            return None
        score = None if self.inner.identity.measures == "refusal" else 0.0
        return found._replace(score=score)

    def is_checked(self, exchange: Exchange) -> bool:
        """Return whether the judge is asked although the rules are sure.

        By the hash of the exchange, so that the choice depends on no order and is the
        same when a run goes on.
        """
        text = f"{exchange.request}\0{exchange.response}"
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self.check * 2.0**64

    def counts(self, rows: Rows) -> Cascade:
        """Count what became of answers, with the verdicts that they have."""
        judged = taken = checked = differ = 0
        for exchange, verdict in rows:
            judged += 1
            expected = self.expected(exchange)
            if expected is None:
                continue
            if not self.is_checked(exchange):
                taken += 1
                continue
            checked += 1
            differ += differs(expected.outcome, verdict)
        return Cascade(judged, taken, checked, differ)


def cascade_record(
    judge: Judge, rows: Sequence[Row], verdicts: Iterable[Row]
) -> dict[str, Any] | None:
    """Return what a cascade left to the rules, and its error; None for another judge.

    `rows`: What was judged, as `judge_rows` takes it.
    `verdicts`: Rows of `JUDGED`, in any order.
    """
    if not isinstance(judge, CascadeJudge):
        return None
    said = {each[ROW_ID]: each for each in verdicts}
    asked = [row for row in rows if without_judge(row, judge.identity) is None]
    judged = ((row, said[row[ROW_ID]]) for row in asked if row[ROW_ID] in said)
    counts = judge.counts(
        (
            exchange_of(row, judge.identity),
            Verdict(each["verdict"], each["reason"], each["judge"], each["score"]),
        )
        for row, each in judged
    )
    return counts.record()


def differs(outcome: str, verdict: Verdict) -> bool:
    """Return whether a judge says other than an outcome of the rules stands for.

    A reply that cannot be read differs as well: nobody knows what it would have said.
    """
    harmful = verdict.score is not None and verdict.score >= HARMFUL
    return verdict.outcome != outcome or harmful


def beside_rules(rows: Rows, measures: Measures) -> dict[str, Any]:
    """Return how often a judge differs from the rules, by what the rules say.

    `rows`: Exchanges with the judge's verdicts; those that are screened count nowhere.
    Returns: For each outcome that could stand for a verdict, the share that differs.
    """
    said = [
        (by_rules(exchange).outcome, verdict)
        for exchange, verdict in rows
        if screen(exchange, JUDGE_ID) is None
    ]
    found: dict[str, Any] = {"judge": _rules()}
    for outcome in CANDIDATES[measures]:
        own = [differs(outcome, verdict) for name, verdict in said if name == outcome]
        found[outcome] = figure_of(wilson(sum(own), len(own)))
    return found


def require_record(settings: JudgeSettings) -> None:
    """Refuse a cascade without any record, before answers are drawn for it.

    Whether one is of this very judge is not known before the judge is loaded.
    """
    for path in Path(settings.calibrations).glob("*.json"):
        with suppress(ValueError, AttributeError):
            if json.loads(path.read_text(encoding="utf-8")).get("rules"):
                return
    raise _no_record(settings, settings.judge, "none")


def _no_record(settings: JudgeSettings, judge: str, found: str) -> InputError:
    return InputError(
        f"a record of {judge} beside {JUDGE_ID} in {settings.calibrations}, to tell "
        "where the rules are sure",
        found,
        f"Run {_calibrate(settings)} first, or leave out --judge-cascade.",
    )


def _calibrate(settings: JudgeSettings) -> str:
    return f"`holdfast judge calibrate {settings.judge} --labels FILE`"


def open_cascade(judge: Judge, settings: JudgeSettings) -> CascadeJudge:
    """Put the rules before a judge, as far as its calibration says that they are sure.

    Raises:
        InputError: If it was never set beside these rules, or they are sure of nothing.
    """
    record = find_calibration(judge.identity, [settings.calibrations])
    beside = (record or {}).get("rules", {})
    if beside.get("judge") != _rules():
        found = "none" if record is None else "a record without these rules"
        raise _no_record(settings, judge.identity.label, found)
    bound = settings.judge_cascade_error
    figures = {name: beside[name] for name in CANDIDATES[judge.identity.measures]}
    sure = [
        name
        for name, figure in figures.items()
        if figure["high"] is not None and figure["high"] <= bound
    ]
    if not sure:
        listed = ", ".join(
            f"{name}: {figure['high']} on {figure['n']} answers"
            for name, figure in figures.items()
        )
        raise InputError(
            f"rules that differ from {judge.identity.label} on at most {bound:g} of "
            "the answers that they are sure of (--judge-cascade-error)",
            f"upper ends of {listed}",
            f"Calibrate on more labelled answers ({_calibrate(settings)}), allow a "
            "larger error, or leave out --judge-cascade.",
        )
    return CascadeJudge(judge, sure, settings.judge_cascade_check)


def _rules() -> str:
    identity = RulesJudge().identity
    return f"{identity.label} {identity.template_sha256}"
