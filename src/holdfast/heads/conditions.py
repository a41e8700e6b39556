"""Conditions of an ablation: which heads are ablated, where, and the answers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import torch

from holdfast.engines.port import Around, Ask, Engine
from holdfast.errors import SettingsError
from holdfast.heads.ranking import (
    Head,
    RankedHead,
    count_heads,
    layer_matched_draws,
    most_positive_heads,
    top_heads,
)
from holdfast.heads.settings import AblateSettings, Scope
from holdfast.judges.rows import NOT_YET
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.models.interventions import (
    HeadEdit,
    Renormalise,
    head_factors,
    scope_ranges,
)
from holdfast.models.model import Adapter
from holdfast.report.progress import Tick
from holdfast.rollout.engine import all_drawn
from holdfast.rollout.rows import Rollout
from holdfast.study.figures import generator
from holdfast.study.rows import Int32, table_of

Name = Literal["none", "top", "random", "positive", "second_round"]


class Condition(NamedTuple):
    """Which heads are scaled, and where."""

    # Nothing; the top of the ranking; random heads of the same layers; the heads that
    # hold refusal up the most; or the top with that of a second round.
    name: Name
    scope: Scope  # At which positions.
    fraction: float | None  # Share of all heads that was asked for; None for nothing.
    draw: int  # Which of the random draws, from 0.
    heads: tuple[Head, ...]  # The heads.

    @property
    def key(self) -> str:
        """Name of the condition, which no other one has."""
        return f"{self.scope}/{self.name}/{len(self.heads)}/{self.draw}"

    @property
    def adapter(self) -> str:
        """Name of the adapter that does the same; also that of its folder."""
        return self.key.replace("/", "-")


class Item(NamedTuple):
    """One prompt under one condition."""

    condition: Condition  # What is done to the model.
    row: Rollout  # The prompt, and the answer without an edit.
    target: str | None = None  # The exact answer; None for prompts that have none.

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.condition.key}#{self.row.row_id}"


class Plan(NamedTuple):
    """The conditions, and sentences on those that could not be made."""

    conditions: tuple[Condition, ...]
    notes: tuple[str, ...]


def plan(
    ranking: Sequence[RankedHead],
    n_heads: int,
    settings: AblateSettings,
    seed: int,
    *,
    chosen: Sequence[Head] = (),
    second: Sequence[Head] = (),
) -> Plan:
    """Return every condition, nothing first in each scope."""
    total = len(ranking)
    sizes: dict[int, float] = {len(chosen): len(chosen) / total} if chosen else {}
    for fraction in () if chosen else settings.fractions:
        sizes.setdefault(count_heads(fraction, total), fraction)
    sets: dict[int, list[Condition]] = {}
    problems: dict[int, SettingsError] = {}
    for size in sizes:
        top = tuple(chosen) or top_heads(ranking, size)
        try:
            sets[size] = _sets(ranking, top, n_heads, settings, seed, sizes[size])
        except SettingsError as error:
            problems[size] = error
    if not sets:
        raise next(iter(problems.values()))
    notes = [
        f"{size} of {total} heads ({sizes[size]:.3g}) were not switched off: "
        f"they leave no controls (expected {error.expected}; found {error.found})."
        for size, error in problems.items()
    ]
    main = main_size(tuple(sets))
    if second:
        both = (*sets[main][0].heads, *second)
        sets[main].append(
            Condition("second_round", settings.scopes[0], sizes[main], 0, both)
        )
    made: list[Condition] = []
    for place, scope in enumerate(settings.scopes):
        made.append(Condition("none", scope, None, 0, ()))
        for size in sets if place == 0 else [main]:
            made += [
                each._replace(scope=scope)
                for each in sets[size]
                if place == 0 or each.name != "second_round"
            ]
    return Plan(tuple(made), tuple(notes))


def main_size(sizes: Sequence[int]) -> int:
    """Return the middle size: the one that every scope and the second round use."""
    ordered = sorted(sizes)
    return ordered[(len(ordered) - 1) // 2]


def _sets(
    ranking: Sequence[RankedHead],
    top: tuple[Head, ...],
    n_heads: int,
    settings: AblateSettings,
    seed: int,
    fraction: float,
) -> list[Condition]:
    """Return the top heads and what they are compared with, in the first scope."""
    scope = settings.scopes[0]
    draws = layer_matched_draws(
        top, n_heads, settings.random_draws, generator(seed, f"ablate/{sorted(top)}")
    )
    positive = most_positive_heads(ranking, len(top))
    return [
        Condition("top", scope, fraction, 0, top),
        *(
            Condition("random", scope, fraction, i, each)
            for i, each in enumerate(draws)
        ),
        Condition("positive", scope, fraction, 0, positive),
    ]


def main_condition(conditions: Sequence[Condition]) -> Condition:
    """Return the top condition of the middle size, in the first scope."""
    first = [each for each in conditions if each.scope == conditions[0].scope]
    tops = {len(each.heads): each for each in first if each.name == "top"}
    return tops[main_size(tuple(tops))]


PLAIN = Condition("none", "everywhere", None, 0, ())
"""The condition in which nothing differs from the rollouts."""


def is_as_drawn(condition: Condition, sampling: Sampling) -> bool:
    """Return whether answers under a condition are those that were drawn without it.

    Where tokens are drawn, an answer behind a fixed thinking has other random numbers.
    """
    return not condition.heads and (
        condition.scope == "everywhere" or sampling.temperature == 0
    )


@dataclass(frozen=True)
class AnswerRow:
    """An answer under a condition, in `ablation.parquet`."""

    row_id: str
    condition: str
    fraction: float | None
    n_heads: Int32
    scope: str
    draw: Int32
    heads: str
    asked: str  # Row of the rollouts whose prompt was asked.
    role: str
    request_id: str
    prompt_id: str
    label: str
    wrapper: str | None
    outcome: str | None  # None where no judge has seen it.
    reason: str
    judge: str | None
    answer: str
    finish: str
    closed: bool
    forced_close: bool
    token_ids: tuple[Int32, ...]
    answer_start: Int32
    score: float | None
    prompt: str
    thinking: str
    target: str | None


def answer(
    adapter: Adapter,
    items: Sequence[Item],
    sampling: Sampling,
    settings: AblateSettings,
    batch_size: int,
    *,
    drawn_here: bool = True,
    told: Callable[[Tick], None] | None = None,
    engine: Engine | None = None,
    held: Collection[str] = (),
) -> pa.Table:
    """Answer each prompt under its condition; no judge has seen the answers.

    Everywhere, the thinking is drawn anew under the edit. In the other scopes it is
    the model's own, as it was drawn without an edit, and only the answer is drawn.
    Rows of all conditions run side by side, each with its own heads scaled.

    `drawn_here`: Whether the rollouts were drawn with this sampling. Then they are
    themselves the answers without an edit and with the thinking drawn anew, and are not
    drawn a second time.
    `held`: Conditions, by their keys, that `engine` holds as adapters and draws.
    """
    groups: dict[str, list[Item]] = {}
    made: list[AnswerRow] = []
    for item in items:
        if drawn_here and is_as_drawn(item.condition, sampling):
            made.append(answer_row(item, item.row))
            continue
        kind = batch_key(item.condition, settings.renormalise, held)
        groups.setdefault(kind, []).append(item)
    for kind, group in groups.items():
        if engine is not None and kind == ADAPTER:
            asks = [ask_of(item) for item in group]
            drawn = all_drawn(engine, asks, sampling, Around(batch_size, told=told))
            made += [answer_row(*each) for each in zip(group, drawn, strict=True)]
            continue
        edit = _edit(adapter, group, settings.factor, settings.renormalise)
        done = answers(
            adapter,
            [item.row for item in group],
            sampling,
            batch_size,
            edit=edit,
            thinking_done=is_fixed(group[0].condition),
            told=told,
        )
        made += [answer_row(item, each) for item, each in zip(group, done, strict=True)]
    return table_of(made, AnswerRow)


def ask_of(item: Item) -> Ask:
    """Return what an engine is asked for a prompt under a condition that it holds."""
    condition, row = item.condition, item.row
    name = condition.adapter if condition.heads else None
    return Ask(row.token_ids[: row.spans.prompt[1]], row.seed, condition=name)


ADAPTER = "adapter"
"""What rows of conditions have in common that an engine holds."""


def batch_key(
    condition: Condition, renormalise: Renormalise, held: Collection[str] = ()
) -> str:
    """Return what the rows of one call of an engine, or of `generate`, have in common.

    The norm of a whole tensor would be that of several conditions, so there each one
    runs by itself.
    """
    if condition.key in held:
        return ADAPTER
    fixed = "fixed" if is_fixed(condition) else "drawn"
    return f"{fixed}/{condition.key}" if renormalise == "tensor" else fixed


def is_fixed(condition: Condition) -> bool:
    """Return whether the thinking is that of the rollout, and only the answer new."""
    return condition.scope != "everywhere"


def answers(
    adapter: Adapter,
    rows: Sequence[Rollout],
    sampling: Sampling,
    batch_size: int,
    *,
    edit: HeadEdit | None = None,
    thinking_done: bool = False,
    told: Callable[[Tick], None] | None = None,
) -> list[Completion]:
    """Draw the answers of rollouts again, with their own seeds, in their order.

    What the rollouts say is the draft (see `generate`): it saves passes and changes
    no answer.
    """
    ends = [
        row.spans.answer[0] if thinking_done else row.spans.prompt[1] for row in rows
    ]
    prompts = [
        (row.token_ids[:end], row.seed) for row, end in zip(rows, ends, strict=True)
    ]
    # Drawn after a fixed thinking, an answer has other random numbers than it had.
    known = sampling.temperature == 0 or not thinking_done
    drafts = [
        row.token_ids[end:] if known else ()
        for row, end in zip(rows, ends, strict=True)
    ]
    parts = generate(
        adapter,
        prompts,
        sampling,
        batch_size=batch_size,
        edit=edit,
        thinking_done=thinking_done,
        drafts=drafts,
        told=told,
    )
    found = {each.index: each for part in parts for each in part}
    return [found[place] for place in range(len(rows))]


def by_condition(
    rows: Sequence[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], Any]
) -> dict[Any, list[Mapping[str, Any]]]:
    """Group rows, in their order."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _edit(
    adapter: Adapter, items: Sequence[Item], factor: float, renormalise: Renormalise
) -> HeadEdit | None:
    """Return one edit for prompts under conditions that run in one call."""
    if not any(item.condition.heads for item in items):
        return None
    ranges = None
    if is_fixed(items[0].condition):
        ranges = tuple(
            place
            for item in items
            for place in scope_ranges([item.row.spans], item.condition.scope) or ()
        )
    tables = {
        item.condition.key: head_factors(adapter, item.condition.heads, factor)
        for item in items
    }
    if len(tables) == 1:
        return HeadEdit(next(iter(tables.values())), ranges, renormalise)
    stacked = torch.stack([tables[item.condition.key] for item in items])
    return HeadEdit(stacked, ranges, renormalise)


def answer_row(item: Item, made: Completion | Rollout) -> AnswerRow:
    """Return the row of an answer, which no judge has seen yet."""
    condition, row, target = item
    fixed = is_fixed(condition)
    start = row.spans.answer[0] if fixed else made.spans.answer[0]
    return AnswerRow(
        row_id=item.name,
        condition=condition.name,
        fraction=condition.fraction,
        n_heads=len(condition.heads),
        scope=condition.scope,
        draw=condition.draw,
        heads=",".join(f"{head.layer}:{head.head}" for head in condition.heads),
        asked=row.row_id,
        role=row.role,
        request_id=row.request_id,
        prompt_id=row.prompt_id,
        label=row.label,
        wrapper=row.wrapper,
        outcome=None,
        reason=NOT_YET,
        judge=None,
        answer=made.answer,
        finish=made.finish,
        closed=fixed or made.closed,
        forced_close=row.forced_close if fixed else made.forced_close,
        token_ids=tuple(made.token_ids),
        answer_start=start,
        score=None,
        prompt=row.prompt,
        thinking=row.thinking if fixed else made.thinking,
        target=target,
    )


def with_outcomes(
    rows: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return rows with what their verdicts say, or with whether they are right."""
    return [
        {
            **row,
            "outcome": said["verdict"] or ("correct" if said["correct"] else "wrong"),
            **{name: said.get(name) for name in ("reason", "judge", "score")},
        }
        for row, said in zip(rows, verdicts, strict=True)
    ]


ROLE = "utility"
