"""Which heads an ablation switches off, and where: conditions that run together."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from holdfast.analysis.heads import (
    Head,
    RankedHead,
    count_heads,
    layer_matched_draws,
    most_positive_heads,
    top_heads,
)
from holdfast.errors import SettingsError
from holdfast.session.figures import generator
from holdfast.session.head_settings import AblateSettings, Scope
from holdfast.session.rows import Rollout

Name = Literal["none", "top", "random", "positive", "second_round"]


class Condition(NamedTuple):
    """Which heads are scaled, and where.

    Attributes:
        name: Nothing; the top of the ranking; random heads of the same layers; the
            heads that hold refusal up the most; or the top with that of a second round.
        scope: At which positions.
        fraction: Share of all heads that was asked for; None for nothing.
        draw: Which of the random draws, from 0.
        heads: The heads.
    """

    name: Name
    scope: Scope
    fraction: float | None
    draw: int
    heads: tuple[Head, ...]

    @property
    def key(self) -> str:
        """Name of the condition, which no other one has."""
        return f"{self.scope}/{self.name}/{len(self.heads)}/{self.draw}"


class Item(NamedTuple):
    """One prompt under one condition.

    Attributes:
        condition: What is done to the model.
        row: The prompt, and the answer without an edit.
        target: The exact answer; None for prompts that have none.
    """

    condition: Condition
    row: Rollout
    target: str | None = None

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.condition.key}#{self.row.row_id}"


class Plan(NamedTuple):
    """The conditions, and sentences on those that could not be made."""

    conditions: tuple[Condition, ...]
    notes: tuple[str, ...]


class _Set(NamedTuple):
    name: Name
    draw: int
    heads: tuple[Head, ...]


def plan(
    ranking: Sequence[RankedHead],
    n_heads: int,
    settings: AblateSettings,
    seed: int,
    *,
    chosen: Sequence[Head] = (),
    second: Sequence[Head] = (),
) -> Plan:
    """Return every condition, nothing first in each scope.

    Args:
        ranking: Every head, the first of the ranking first.
        n_heads: Heads in each layer.
        settings: Fractions, scopes, draws.
        seed: Seed of the draws.
        chosen: Heads to take in place of the top ones, at one fraction: their own.
        second: Heads that a second round found, taken together with the first ones.

    Raises:
        SettingsError: If a fraction selects no head, or no fraction leaves controls.
    """
    total = len(ranking)
    sizes: dict[int, float] = {len(chosen): len(chosen) / total} if chosen else {}
    for fraction in () if chosen else settings.fractions:
        sizes.setdefault(count_heads(fraction, total), fraction)
    sets: dict[int, list[_Set]] = {}
    problems: dict[int, SettingsError] = {}
    for size in sizes:
        top = tuple(chosen) or top_heads(ranking, size)
        try:
            sets[size] = _sets(ranking, top, n_heads, settings, seed)
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
        sets[main].append(_Set("second_round", 0, both))
    made: list[Condition] = []
    for place, scope in enumerate(settings.scopes):
        made.append(Condition("none", scope, None, 0, ()))
        for size in sets if place == 0 else [main]:
            made += [
                Condition(each.name, scope, sizes[size], each.draw, each.heads)
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
) -> list[_Set]:
    """Return the top heads and what they are compared with."""
    draws = layer_matched_draws(
        top, n_heads, settings.random_draws, generator(seed, f"ablate/{sorted(top)}")
    )
    positive = most_positive_heads(ranking, len(top))
    return [
        _Set("top", 0, top),
        *(_Set("random", draw, heads) for draw, heads in enumerate(draws)),
        _Set("positive", 0, positive),
    ]


def main_condition(conditions: Sequence[Condition]) -> Condition:
    """Return the top condition of the middle size, in the first scope."""
    first = [each for each in conditions if each.scope == conditions[0].scope]
    tops = {len(each.heads): each for each in first if each.name == "top"}
    return tops[main_size(tuple(tops))]
