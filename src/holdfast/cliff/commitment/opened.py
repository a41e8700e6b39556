"""A study opened for `decide`: which answers are looked at, and what is known."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from holdfast.cliff.commitment.settings import DecideSettings, stage_of
from holdfast.cliff.groups import BENIGN, COMPLIED, REFUSED
from holdfast.errors import TooFewExamplesError
from holdfast.judges.settings import JudgeSettings
from holdfast.rollout.answers import as_asked
from holdfast.rollout.rows import BESIDE, GROUPS, UNJUDGED, Rollout, from_table
from holdfast.rollout.session import Session
from holdfast.stats.rates import wilson
from holdfast.study import Study, fingerprint
from holdfast.study.batches import ROW_ID
from holdfast.study.directory import Stage
from holdfast.study.figures import study_seed

ROLLOUTS = "rollouts.parquet"


@dataclass(frozen=True)
class Opened:
    """What every part of `decide` is handed."""

    study: Study
    session: Session
    settings: DecideSettings
    judge: JudgeSettings
    # Answers by group (`cliff.groups`): all have enough thinking to cut. Those of one
    # group are in an order of their own, which neither files nor seeds change.
    groups: Mapping[str, tuple[Rollout, ...]]
    # What a judge is shown of each answer of the study beside what it judges, by row.
    shown: Mapping[str, Mapping[str, Any]]
    every: tuple[Rollout, ...]  # All answers of the study.
    too_short: int  # Complied harmful answers that were left out: too little thinking.

    @property
    def seed(self) -> int:
        """The seed that the study was made with."""
        return study_seed(self.study)

    @property
    def rows(self) -> list[Rollout]:
        """All answers, the complied harmful ones first."""
        return [row for name in GROUPS for row in self.groups[name]]

    @property
    def complied(self) -> tuple[Rollout, ...]:
        """The complied harmful answers."""
        return self.groups[COMPLIED]

    def stage(
        self, key: str, settings: Any, inputs: Iterable[str] = ()
    ) -> AbstractContextManager[Stage]:
        """Open the stage of a part; when it ends well it has written `file(key)`.

        `settings`: What else than the model and the answers its results depend on; the
        answers that were chosen are added.
        `inputs`: Files of the study that it reads beside the rollouts.
        """
        chosen = fingerprint([row.row_id for row in self.rows])
        return self.study.stage(
            stage_of(key),
            {"rows": chosen, "settings": settings},
            [ROLLOUTS, *inputs],
            progress=self.session.progress,
            done=f"`{stage_of(key)}` is there and up to date.",
            parts=[f"{stage_of(key)}_*"],
        )


def open_study(
    study: Study, settings: DecideSettings, session: Session, judge: JudgeSettings
) -> Opened:
    """Choose the answers that are looked at, and refuse a study that has none.

    Raises:
        TooFewExamplesError: If there is nothing to cut, or too few draws for the
            interval that was asked for.
    """
    session.check_judge(judge)
    if study.manifest.get("model", {}).get("thinking") is None:
        raise TooFewExamplesError(
            "a model that thinks before it answers, so that a thinking can be cut",
            "0 answers with thinking, for the chat template has no thinking format",
            "Use a reasoning model, or name its marks with --thinking-tags.",
        )
    _require_draws(settings)
    found: dict[str, list[Rollout]] = {name: [] for name in GROUPS}
    short: dict[str, list[Rollout]] = {name: [] for name in GROUPS}
    every = tuple(from_table(study.read_table(ROLLOUTS)))
    for row in every:
        if row.role in BESIDE or not row.is_decided or row.group is None:
            continue
        enough = row.n_thinking >= settings.min_thinking
        (found if enough else short)[row.group].append(row)
    if not found[COMPLIED]:
        if short[COMPLIED]:
            raise _too_short(short[COMPLIED], settings)
        raise _none_complied(every)
    most = {
        COMPLIED: settings.complied_rows,
        REFUSED: settings.refused_rows,
        BENIGN: settings.benign_rows,
    }
    groups = {
        name: tuple(sorted(rows, key=_order)[: most[name]])
        for name, rows in found.items()
    }
    shown = {each[ROW_ID]: each for each in as_asked(every)}
    return Opened(
        study, session, settings, judge, groups, shown, every, len(short[COMPLIED])
    )


def _order(row: Rollout) -> str:
    # By content, so that a part of the rows has wrappers and requests of all kinds.
    return fingerprint([row.row_id])


def _require_draws(settings: DecideSettings) -> None:
    if settings.cheap:
        return

    def width(n: int) -> float:
        # The widest there is: half of the draws one way.
        half = wilson(n // 2, n)
        assert half.low is not None
        assert half.high is not None
        return half.high - half.low

    found = width(settings.draws)
    if found > settings.widest:
        enough = settings.draws
        while width(enough) > settings.widest:
            enough += 1
        raise TooFewExamplesError(
            f"draws enough for an interval no wider than {settings.widest:g}",
            f"{settings.draws} from each cut, whose interval may be {found:.2f} wide",
            f"Give --draws {enough} or more, or a larger --widest.",
        )


def _too_short(
    rows: Sequence[Rollout], settings: DecideSettings
) -> TooFewExamplesError:
    most = max(row.n_thinking for row in rows)
    return TooFewExamplesError(
        f"a complied harmful answer with {settings.min_thinking} tokens of thinking or "
        "more",
        f"{len(rows)} complied harmful answers, the longest thinking of {most} tokens",
        "Lower --min-thinking, or add prompts that the model thinks about longer."
        if most
        else "Draw or import answers together with their thinking.",
    )


def harmful_of(rows: Sequence[Rollout]) -> list[Rollout]:
    """Return answers to harmful requests of the study itself."""
    return [r for r in rows if r.label == "harmful" and r.role not in BESIDE]


UNCLOSED, UNREAD, NO_TOKENS = (
    "whose thinking was not closed",
    "that no judge could read",
    "whose tokens are lost",
)
ADVICE = {
    UNCLOSED: "Let the thinking end: draw again with a higher --max-thinking.",
    UNREAD: "Judge the answers again: `holdfast rollout` with another judge.",
    NO_TOKENS: "Draw the answers here, or import those whose tokens are known.",
}
"""What helps where most of the harmful answers are left out for a reason."""


def _none_complied(every: Sequence[Rollout]) -> TooFewExamplesError:
    """Return how many harmful answers there are, and why none can be cut."""
    harmful = harmful_of(every)
    why = Counter(map(_why_not, harmful))
    told = ", ".join(f"{n} {reason}" for reason, n in sorted(why.items()))
    most = max(why, key=lambda reason: why[reason], default="")
    return TooFewExamplesError(
        "a harmful request that was complied with, with its thinking closed",
        f"none among {len(harmful)} harmful answers" + f" ({told})" * bool(told),
        ADVICE.get(
            most,
            "Add harmful requests, or jailbreak wrappers, that the model complies "
            "with.",
        ),
    )


def _why_not(row: Rollout) -> str:
    if not row.closed:
        return UNCLOSED
    if row.verdict == UNJUDGED:
        return UNREAD
    return NO_TOKENS if row.is_complied else row.verdict
